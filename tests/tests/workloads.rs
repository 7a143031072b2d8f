//! The self-verifying workloads go out and come back.

use std::fs;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use serde_json::Value;
use standstill_tests::harness::{
    Run, Target, Tool, Turn, dump_and_restore, dump_and_restore_stopped, dump_and_restore_twice, full_cycle, proc,
    standstill, wait_until,
};

/// Dumps and restores twice in a row, with a verdict before and after each.
fn twice(name: &str, args: &[&str], options: fn(Run) -> Run) {
    let _turn = Turn::take();
    let mut target = Target::workload(name, args);
    target.assert_well();
    dump_and_restore_twice(&Tool::get(), &mut target, options, &mut |target| {
        target.assert_well();
    });
    target.finish(0);
}

/// The same, and dumps that leave the target running and stopped.
fn thoroughly(name: &str, args: &[&str]) {
    let _turn = Turn::take();
    let mut target = Target::workload(name, args);
    full_cycle(&Tool::get(), &mut target, &mut |target| {
        target.assert_well();
    });
    target.finish(0);
}

#[test]
fn copy_on_write_stays_shared() {
    twice("cow_tree", &[], |run| run);
}

#[test]
fn shared_memory_stays_shared() {
    thoroughly("shared_mem", &[]);
}

#[test]
fn memfd_stays_shared() {
    twice("shared_mem", &["--memfd"], |run| run);
}

#[test]
fn mappings_of_every_kind() {
    thoroughly("mappings", &[]);
}

#[test]
fn interrupted_system_calls_resume() {
    // CRIU lets sleeps end early with EINTR.
    let lenient: &[&str] = if Tool::get().is_criu() { &["--lenient"] } else { &[] };
    twice("interrupted", lenient, |run| run);
}

#[test]
fn parked_threads_do_not_notice() {
    let _turn = Turn::take();
    // Sleeps long enough that no thread moves by itself.
    let mut target = Target::workload("interrupted", &["--sleep-ms", "15000"]);
    full_cycle(&Tool::get(), &mut target, &mut |target| target.assert_free());
    if !Tool::get().is_criu() {
        target.assert_well();
    }
}

#[test]
fn descriptors_of_every_kind() {
    thoroughly("fds", &[]);
}

#[test]
fn listening_sockets() {
    twice("fds", &["--sockets"], |run| run);
}

#[test]
fn connected_sockets() {
    thoroughly("sockets", &[]);
}

#[test]
fn connected_sockets_without_ebpf() {
    twice("sockets", &[], |run| run.args(["--reader", "procfs"]));
}

#[test]
fn another_root_directory() {
    twice("fds", &["--chroot"], |run| run);
}

#[test]
fn tree_with_sessions_groups_and_zombies() {
    thoroughly("tree", &["--depth", "20"]);
}

#[test]
fn processes_share_descriptors_and_directories() {
    thoroughly("sharing", &[]);
}

#[test]
fn descriptors_of_processes() {
    thoroughly("pidfds", &[]);
}

#[test]
fn rings_of_asynchronous_io() {
    thoroughly("aio", &[]);
}

#[test]
fn filters_and_strict_mode_of_seccomp() {
    thoroughly("seccomp", &[]);
}

#[test]
fn filters_of_seccomp_without_ebpf() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("seccomp", &[]);
    dump_and_restore(&tool, &mut target, "procfs", |run| run.args(["--reader", "procfs"]));
    target.assert_well();
    target.finish(0);
}

#[test]
fn a_session_without_its_leader() {
    thoroughly("tree", &["--depth", "1", "--orphans"]);
}

#[test]
fn pipes_in_packet_mode() {
    twice("fds", &["--packets"], |run| run);
}

#[test]
fn credentials_of_another_user() {
    twice("tree", &["--depth", "1", "--credentials"], |run| run);
}

#[test]
fn pending_signals_timers_and_limits() {
    let _turn = Turn::take();
    let mut target = Target::workload("tree", &["--depth", "1", "--extras"]);
    // Running both times: the timers of a stopped process go on.
    for round in ["first", "second"] {
        dump_and_restore(&Tool::get(), &mut target, round, |run| run);
        target.assert_well();
    }
    target.finish(0);
}

/// A SIGSTOP that comes when its target is frozen takes effect after the restore.
#[test]
fn a_stop_that_is_under_way() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("clock", &[]);
    let images = target.images("stop");
    let frozen = |target: &Target| proc::state(target.pid()) == Some('t');
    // The dump has looked for pending signals soon after the freeze: not every try is in between.
    for _ in 0..50 {
        let dump = tool.dump(target.pid(), &images).spawn();
        while !frozen(&target) && proc::state(dump.pid()).is_some_and(|state| state != 'Z') {}
        kill(dump.pid(), Signal::SIGSTOP).expect("hold the dump");
        wait_until(Duration::from_secs(5), || matches!(proc::state(dump.pid()), Some('T' | 'Z')));
        if frozen(&target) {
            target.signal(Signal::SIGSTOP);
        }
        kill(dump.pid(), Signal::SIGCONT).expect("let the dump go on");
        dump.wait().expect_success();
        target.await_gone();
        let image = tool.command(["inspect", "--json", "-D"]).arg(&images).run().expect_success().json();
        let under_way = is_stop_pending(&image);
        tool.restore(&images).arg("-d").run().expect_success();
        if under_way {
            target.await_stop();
            target.assert_free();
            target.signal(Signal::SIGCONT);
            target.assert_well();
            return target.finish(0);
        }
        target.signal(Signal::SIGCONT);
        target.assert_well();
    }
    panic!("no SIGSTOP came in time to be in the image");
}

/// Whether a SIGSTOP is among the pending signals of an image.
fn is_stop_pending(value: &Value) -> bool {
    match value {
        Value::Object(fields) => fields.iter().any(|(name, value)| match value {
            Value::Array(signals) if name == "pending" => signals.iter().any(|s| s["signal"] == libc::SIGSTOP),
            _ => is_stop_pending(value),
        }),
        Value::Array(values) => values.iter().any(is_stop_pending),
        _ => false,
    }
}

/// A signal that waits for a stopped process still waits after the restore: no byte of the process changes until it goes
/// on, and then its handler runs.
#[test]
fn signals_wait_for_a_stopped_process() {
    const SCRIPT: &str = r#"
import os, signal, sys, threading, time
os.chdir(sys.argv[1])
signal.signal(signal.SIGUSR1, lambda *_: open('caught', 'a').write('USR1'))
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
print('READY', flush=True)
while True:
    time.sleep(1000)
"#;
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::start("handler", |dir| {
        let mut command = Command::new("python3");
        command.args(["-c", SCRIPT]).arg(dir);
        command
    })
    .await_ready();
    target.stop();
    target.signal(Signal::SIGUSR1);
    dump_and_restore_stopped(&tool, &mut target, "stopped", |run| run);
    let caught = target.dir().join("caught");
    let text = || fs::read_to_string(&caught).unwrap_or_default();
    assert!(wait_until(Duration::from_secs(10), || !text().is_empty()), "the handler has not run");
    assert_eq!(text(), "USR1");
}

#[test]
fn three_hundred_processes() {
    twice("tree", &["--depth", "5", "--processes", "300"], |run| run);
}

#[test]
fn a_thousand_threads() {
    twice("clock", &["--threads", "1000"], |run| run);
}

#[test]
fn five_thousand_files() {
    twice("clock", &["--fds", "5000"], |run| run);
}

#[test]
fn a_big_heap_uncompressed() {
    twice("clock", &["--heap-mib", "256"], |run| run);
}

#[test]
fn memory_that_is_written_all_the_time() {
    twice("writer", &["--heap", "48", "--pages-per-second", "max", "--threads", "3", "--thp"], |run| run);
}

#[test]
fn a_tree_that_writes_shared_memory_and_its_own() {
    let sizes = ["--heap", "32", "--shared", "8", "--file", "8"];
    let args = [&sizes[..], &["--pages-per-second", "2000", "--threads", "2", "--children", "2"]].concat();
    twice("writer", &args, |run| run);
}

#[test]
fn memory_that_comes_and_goes() {
    let _turn = Turn::take();
    let tool = Tool::get();
    let args =
        ["--heap", "16", "--shared", "4", "--file", "4", "--children", "1", "--pages-per-second", "500", "--churn"];
    let mut target = Target::workload("writer", &args);
    for _ in 0..8 {
        let images = target.images("moving");
        target.processes();
        tool.dump(target.pid(), &images).run().expect_success();
        target.await_gone();
        tool.restore(&images).arg("-d").run().expect_success();
        target.assert_well();
    }
    target.finish(0);
}
