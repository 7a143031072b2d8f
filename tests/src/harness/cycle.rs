//! The ways a target is sent through the tool.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use super::{Memory, Outcome, Run, Snapshot, Target, Tool, proc, wait_until};

/// Dumps a target so that it is gone, restores it, and checks from outside that it is the same again. Returns the
/// directory of the images.
#[track_caller]
pub fn dump_and_restore(tool: &Tool, target: &mut Target, name: &str, options: fn(Run) -> Run) -> PathBuf {
    let images = target.images(name);
    let before = target.snapshot();
    let stable = {
        thread::sleep(Duration::from_millis(60));
        before.stable(&target.snapshot())
    };
    options(tool.dump(target.pid(), &images)).run().expect_success();
    target.await_gone();
    let pidfile = target.dir().join("pidfile");
    _ = fs::remove_file(&pidfile);
    let restore = tool.restore(&images).args(["-d", "--pidfile"]).arg(&pidfile);
    let outcome = restore.run().expect_success();
    let pid = fs::read_to_string(&pidfile).expect("read the pidfile");
    assert_eq!(pid.trim(), target.pid().to_string(), "pid of the restored root");
    expect_restored(&stable, target, &outcome);
    images
}

/// Fails unless everything about the tree is as it was, but for what a restore cannot keep.
#[track_caller]
fn expect_restored(before: &Snapshot, target: &mut Target, outcome: &Outcome) {
    target.assert_free();
    let before = before.restorable();
    assert!(!before.is_empty(), "nothing to compare");
    // Whatever the target does between the looks changes back or not within this time.
    let mut changes = Vec::new();
    let same = wait_until(Duration::from_secs(2), || {
        changes = before.changes(&target.snapshot().restorable(), false);
        changes.is_empty()
    });
    assert!(same, "restored differently: {changes:#?}\n{outcome}");
}

/// Sends a target through everything: a dump that leaves it running, one of the stopped tree that must not change a
/// bit, and two rounds of dump and restore. `verify` is called in between to look whether the target is well.
#[track_caller]
pub fn full_cycle(tool: &Tool, target: &mut Target, verify: &mut dyn FnMut(&mut Target)) {
    verify(target);
    check_undisturbed_while_running(tool, target);
    verify(target);
    check_undisturbed_while_stopped(tool, target);
    verify(target);
    for round in ["first", "second"] {
        dump_and_restore(tool, target, round, |run| run);
        verify(target);
    }
}

/// Dumps with `--leave-running` and looks for everything that should have stayed.
#[track_caller]
fn check_undisturbed_while_running(tool: &Tool, target: &mut Target) {
    let images = target.images("running");
    let first = target.snapshot();
    // Longer than any workload sleeps between two rounds.
    thread::sleep(Duration::from_millis(1100));
    let stable = first.stable(&target.snapshot());
    let outcome = tool.dump(target.pid(), &images).arg("--leave-running").run().expect_success();
    target.assert_free();
    let mut changes = Vec::new();
    // A thread may be looked at while it is on its way between two sleeps.
    let same = wait_until(Duration::from_secs(2), || {
        changes = stable.changes(&target.snapshot(), false);
        changes.is_empty()
    });
    assert!(same, "the running target was changed: {changes:#?}\n{outcome}");
}

/// Dumps the stopped tree with `--leave-running`; not a bit may change, and it must stay stopped.
#[track_caller]
pub fn check_undisturbed_while_stopped(tool: &Tool, target: &mut Target) {
    let images = target.images("stopped");
    target.stop();
    let processes = target.processes();
    let (before, memory) = (Snapshot::take(&processes), Memory::take(&processes));
    let outcome = tool.dump(target.pid(), &images).arg("--leave-running").run().expect_success();
    assert_eq!(target.processes(), processes, "processes of the tree");
    let stopped = processes.iter().all(|pid| matches!(proc::state(*pid), Some('T' | 'Z')));
    assert!(stopped, "a stopped process goes on: {outcome}");
    let mut changes = before.changes(&Snapshot::take(&processes), true);
    changes.extend(memory.changes(&Memory::take(&processes)));
    assert!(!before.is_empty() && !memory.is_empty(), "nothing to compare");
    assert!(changes.is_empty(), "the stopped target was changed: {changes:#?}\n{outcome}");
    target.go_on();
}
