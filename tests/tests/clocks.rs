//! CLOCK_MONOTONIC and CLOCK_BOOTTIME go on in a time namespace.

use std::ffi::CStr;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::time::Duration;

use nix::unistd::Pid;
use standstill_tests::harness::left::{expect_none_of, expect_nothing_left};
use standstill_tests::harness::{Run, Target, Tool, Turn, skip, standstill};
use standstill_tests::time_namespace;

/// Longer than the workload lets pass between two looks at its clocks.
const AWAY: Duration = Duration::from_secs(3);

fn namespace_of(pid: Pid) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/ns/time")).expect("the time namespace of a process")
}

fn own_namespace() -> PathBuf {
    namespace_of(nix::unistd::getpid())
}

/// As on a machine that was started at another time.
fn elsewhere(run: Run) -> Run {
    const OFFSETS: &CStr = c"monotonic 500000 250\nboottime 900000 0\n";
    run.with(|command| {
        // SAFETY: it makes system calls only.
        unsafe { command.pre_exec(|| time_namespace::enter(OFFSETS)) };
    })
}

fn prepare(args: &[&str]) -> Option<(Tool, Target)> {
    let tool = standstill()?;
    if !fs::exists("/proc/self/timens_offsets").expect("look at procfs") {
        skip("no time namespaces (CONFIG_TIME_NS)");
        return None;
    }
    let target = Target::workload("clocks", args);
    target.assert_well();
    Some((tool, target))
}

/// Out, a while away, and back.
fn cycle(tool: &Tool, target: &mut Target, name: &str, dump: fn(Run) -> Run, restore: fn(Run) -> Run) {
    let images = target.images(name);
    dump(tool.dump(target.pid(), &images)).run().expect_success();
    target.await_gone();
    std::thread::sleep(AWAY);
    restore(tool.restore(&images).arg("-d")).run().expect_success();
    target.assert_well();
    assert_ne!(namespace_of(target.pid()), own_namespace(), "time namespace of the tree");
}

#[test]
fn they_go_on_if_asked_to() {
    let _turn = Turn::take();
    let Some((tool, mut target)) = prepare(&[]) else { return };
    let images = target.images("running");
    tool.dump(target.pid(), &images).args(["-R", "--snapshot", "fork"]).run().expect_success();
    target.assert_well();
    cycle(&tool, &mut target, "first", |run| run, |run| run.arg("--timens"));
    // Now it has a namespace of its own.
    cycle(&tool, &mut target, "second", |run| run, |run| run);
    target.finish(0);
}

#[test]
fn they_go_on_in_a_namespace_that_the_tree_has() {
    let _turn = Turn::take();
    let Some((tool, mut target)) = prepare(&["--namespace"]) else { return };
    cycle(&tool, &mut target, "plain", |run| run, |run| run);
    cycle(&tool, &mut target, "procfs", |run| run.args(["--reader", "procfs"]), |run| run);
    cycle(&tool, &mut target, "restored elsewhere", |run| run.arg("--precopy=2"), elsewhere);
    cycle(&tool, &mut target, "dumped elsewhere", elsewhere, |run| run);
    target.finish(0);
}

#[test]
fn snapshots_of_a_tree_in_a_namespace_of_its_own() {
    let _turn = Turn::take();
    let Some((tool, mut target)) = prepare(&["--namespace"]) else { return };
    let store = target.images("store");
    let tracker = tool.command(["track", "-t", &target.pid().to_string()]).spawn();
    let run = tool.snapshot(target.pid(), &store, "100ms").args(["--count", "5", "--snapshot", "fork"]);
    run.run().expect_success();
    target.assert_well();
    target.kill_all();
    drop(tracker);
    target.await_gone();
    target.forget_verdicts();
    std::thread::sleep(AWAY);
    tool.restore_at(&store, "latest").run().expect_success();
    target.assert_well();
    target.finish(0);
}

#[test]
fn they_are_those_of_the_machine_if_asked_to() {
    let _turn = Turn::take();
    let Some((tool, mut target)) = prepare(&["--namespace"]) else { return };
    let images = target.images("image");
    tool.dump(target.pid(), &images).run().expect_success();
    target.await_gone();
    tool.restore(&images).args(["-d", "--timens=none"]).run().expect_success();
    assert_eq!(namespace_of(target.pid()), own_namespace(), "time namespace of the tree");
    target.kill_tree();
}

/// A process without CAP_SYS_TIME could make a time namespace, but not set its clocks.
#[test]
fn without_the_capability_to_set_them() {
    let _turn = Turn::take();
    let Some((tool, mut target)) = prepare(&[]) else { return };
    let images = target.images("image");
    tool.dump(target.pid(), &images).run().expect_success();
    target.await_gone();
    let processes = target.processes();
    let restore = || tool.restore(&images).args(["-d", "--timens"]);
    let powerless = restore().with(|command| {
        // SAFETY: it makes one system call.
        unsafe { command.pre_exec(without_time) };
    });
    powerless.run().expect_error(6, &["CAP_SYS_TIME"]);
    expect_none_of(&processes);
    restore().run().expect_success();
    target.assert_well();
    target.finish(0);
}

/// Root without CAP_SYS_TIME, also after exec.
fn without_time() -> std::io::Result<()> {
    const CAP_SYS_TIME: libc::c_ulong = 25;
    // SAFETY: the call takes numbers only.
    match unsafe { libc::prctl(libc::PR_CAPBSET_DROP, CAP_SYS_TIME, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Trees that are in several time namespaces, or whose children would be.
#[test]
fn several_namespaces_are_refused() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    for (arg, object) in
        [("--apart", "another time namespace than process"), ("--unborn", "children will be in another time namespace")]
    {
        let mut target = Target::workload("clocks", &[arg]);
        for reader in ["auto", "procfs"] {
            let images = target.images(reader);
            tool.dump(target.pid(), &images).args(["--reader", reader]).run().expect_error(4, &[object, "nsenter"]);
            expect_nothing_left(&tool, &images);
            target.assert_free();
        }
        target.kill_tree();
    }
}
