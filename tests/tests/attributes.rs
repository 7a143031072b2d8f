//! What few processes have: attributes of prctl(2), memory policies, a leader that has exited, stops that were told of.

use std::fs;
use std::process::Command;
use std::time::Duration;

use standstill_tests::harness::{Run, Target, Turn, dump_and_restore, proc, skip, standstill, wait_until};

/// Out and back twice while it runs.
fn twice(args: &[&str], options: fn(Run) -> Run) {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("attributes", args);
    target.assert_well();
    for round in ["first", "second"] {
        dump_and_restore(&tool, &mut target, round, options);
        target.assert_well();
    }
    let output = target.output();
    target.finish(0);
    let unavailable: Vec<&str> = output.lines().filter(|line| line.starts_with("UNAVAILABLE")).collect();
    if !unavailable.is_empty() {
        skip(&unavailable.join("; "));
    }
}

#[test]
fn of_prctl_and_scheduling() {
    twice(&["--members", "--mappings"], |run| run);
}

#[test]
fn of_prctl_and_scheduling_without_ebpf() {
    twice(&["--members"], |run| run.args(["--reader", "procfs"]));
}

#[test]
#[ignore = "needs CAP_SYS_RESOURCE, which root has not everywhere: by hand"]
fn an_io_flusher() {
    twice(&["--member", "IO_FLUSHER"], |run| run);
}

#[test]
#[ignore = "needs a processor that speculates wrongly and lets threads choose: by hand"]
fn a_speculation_control() {
    twice(&["--member", "speculation"], |run| run);
}

#[test]
fn a_stop_is_told_of_once() {
    twice(&["--stopped"], |run| run);
}

#[test]
fn a_stop_is_told_of_once_without_ebpf() {
    twice(&["--stopped"], |run| run.args(["--reader", "procfs"]));
}

#[test]
fn a_process_without_its_first_thread() {
    twice(&["--leaderless"], |run| run);
}

#[test]
fn a_process_without_its_first_thread_goes_on_unharmed() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("attributes", &["--leaderless"]);
    for options in [&["-R"][..], &["-R", "--reader", "procfs"], &["-R", "--precopy=3"], &["-R", "--snapshot", "fork"]] {
        let images = target.images("running");
        tool.dump(target.pid(), &images).args(options).run().expect_success();
        target.assert_free();
        target.assert_well();
    }
    target.finish(0);
}

/// The root itself, which counts in a thread.
#[test]
fn a_root_without_its_first_thread() {
    const SCRIPT: &str = r#"
import ctypes, os, sys, threading, time
os.chdir(sys.argv[1])
def count():
    n = 0
    while True:
        n += 1
        with open('count.new', 'w') as f: f.write(str(n))
        os.rename('count.new', 'count')
        time.sleep(0.01)
threading.Thread(target=count).start()
print('READY', flush=True)
ctypes.CDLL(None).syscall(60, 7)
"#;
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::start("leaderless root", |dir| {
        let mut command = Command::new("python3");
        command.args(["-c", SCRIPT]).arg(dir);
        command
    });
    let pid = target.pid();
    let file = target.dir().join("count");
    let count = || fs::read_to_string(&file).ok()?.parse::<u64>().ok();
    assert!(wait_until(Duration::from_secs(20), || proc::state(pid) == Some('Z') && count().is_some()), "not ready");
    let mut last = count();
    for _ in 0..3 {
        let images = target.images("root");
        tool.dump(pid, &images).run().expect_success();
        target.await_gone();
        let dumped = count();
        assert!(dumped >= last, "the count went back from {last:?} to {dumped:?}");
        tool.restore(&images).arg("-d").run().expect_success();
        assert!(wait_until(Duration::from_secs(10), || count() > dumped), "the thread does not count on");
        assert_eq!(proc::state(pid), Some('Z'), "state of the first thread");
        last = count();
    }
}
