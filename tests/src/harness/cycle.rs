//! The ways a target is sent through the tool.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use super::left::expect_well;
use super::{Memory, Outcome, Run, Snapshot, Target, Tool, proc, wait_until};
use crate::workload::Random;

/// Dumps a running target so that it is gone, restores it, and checks from outside that it is the same again. Returns
/// the directory of the images.
#[track_caller]
pub fn dump_and_restore(tool: &Tool, target: &mut Target, name: &str, options: fn(Run) -> Run) -> PathBuf {
    let images = target.images(name);
    let first = target.snapshot();
    thread::sleep(Duration::from_millis(300));
    let before = first.stable(&target.snapshot()).restorable().of_running();
    let outcome = round_trip(tool, target, &images, options);
    target.assert_free();
    let changes = lasting_changes(&before, || target.snapshot().restorable().of_running());
    assert!(changes.is_empty(), "restored differently: {changes:#?}\n{outcome}");
    images
}

/// The same with a stopped target, which allows to compare every byte of its memory; it goes on afterwards.
#[track_caller]
pub fn dump_and_restore_stopped(tool: &Tool, target: &mut Target, name: &str, options: fn(Run) -> Run) -> PathBuf {
    let images = target.images(name);
    target.stop();
    let processes = target.processes();
    let (before, memory) = (Snapshot::take(&processes).restorable(), Memory::take(&processes));
    let outcome = round_trip(tool, target, &images, options);
    target.await_stop();
    target.assert_free();
    assert_eq!(target.processes(), processes, "processes of the tree");
    let mut changes = before.changes(&Snapshot::take(&processes).restorable(), true);
    changes.extend(memory.changes(&Memory::take(&processes)));
    changes.truncate(20);
    assert!(!before.is_empty() && !memory.is_empty(), "nothing to compare");
    assert!(changes.is_empty(), "restored differently: {changes:#?}\n{outcome}");
    target.go_on();
    images
}

/// Two rounds of dump and restore, of the running and of the stopped target, each followed by `verify`.
#[track_caller]
pub fn dump_and_restore_twice(
    tool: &Tool,
    target: &mut Target,
    options: fn(Run) -> Run,
    verify: &mut dyn FnMut(&mut Target),
) {
    dump_and_restore(tool, target, "first", options);
    verify(target);
    // CRIU lets a stopped process run a little before it stops again, and leaves it with a pending SIGSTOP.
    match tool.is_criu() {
        true => dump_and_restore(tool, target, "second", options),
        false => dump_and_restore_stopped(tool, target, "second", options),
    };
    verify(target);
}

/// Takes the target back to an image; whatever is left of it is killed first.
#[track_caller]
pub fn take_back(tool: &Tool, target: &mut Target, images: &Path) {
    take_back_by(tool.restore(images).arg("-d"), target);
}

/// The same from a store.
#[track_caller]
pub fn take_back_at(tool: &Tool, target: &mut Target, store: &Path, which: &str) {
    take_back_by(tool.restore_at(store, which), target);
}

/// Makes snapshots, twice, and takes the target back to random ones that are kept, some of which know of what happened long
/// before.
#[track_caller]
pub fn snapshots_and_back(tool: &Tool, target: &mut Target, every: &str, count: u32, seed: u64) {
    let store = target.images("store");
    let mut random = Random::new(seed);
    for _ in 0..2 {
        let run = tool.snapshot(target.pid(), &store, every).args(["--keep", "6", "--count", &count.to_string()]);
        run.run().expect_success();
        expect_well(target);
        for _ in 0..3 {
            let kept = kept(&store);
            let number = kept[random.below(kept.len())].to_string();
            take_back_at(tool, target, &store, &number);
        }
    }
}

/// Numbers of the complete snapshots that a store has: the folders in it that are called by a number.
pub fn kept(store: &Path) -> Vec<u64> {
    let entries = fs::read_dir(store).into_iter().flatten().flatten();
    let entries = entries.filter(|entry| entry.path().join("standstill.img").exists());
    let mut numbers: Vec<u64> = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    numbers.sort_unstable();
    numbers
}

#[track_caller]
fn take_back_by(restore: Run, target: &mut Target) {
    target.kill_tree();
    target.forget_verdicts();
    restore.run().expect_success();
    expect_well(target);
}

/// A dump that kills, and a restore.
#[track_caller]
fn round_trip(tool: &Tool, target: &mut Target, images: &Path, options: fn(Run) -> Run) -> Outcome {
    options(tool.dump(target.pid(), images)).run().expect_success();
    target.await_gone();
    let pidfile = target.dir().join("pidfile");
    _ = fs::remove_file(&pidfile);
    let outcome = tool.restore(images).args(["-d", "--pidfile"]).arg(&pidfile).run().expect_success();
    let pid = fs::read_to_string(&pidfile).expect("read the pidfile");
    assert_eq!(pid.trim(), target.pid().to_string(), "pid of the restored root");
    outcome
}

/// Facts that are not as before in any of several looks: a thread may be looked at while it is on its way between two
/// places where it was before.
#[track_caller]
fn lasting_changes(before: &Snapshot, mut look: impl FnMut() -> Snapshot) -> Vec<String> {
    assert!(!before.is_empty(), "nothing to compare");
    let mut left = before.clone();
    let mut changes = Vec::new();
    wait_until(Duration::from_secs(3), || {
        let now = look();
        changes = left.changes(&now, false);
        left = left.differing(&now);
        changes.is_empty()
    });
    changes.truncate(20);
    changes
}

/// Sends a target through everything: a dump that leaves it running, one of the stopped tree that must not change a
/// bit, and two rounds of dump and restore. `verify` is called in between to look whether the target is well.
#[track_caller]
pub fn full_cycle(tool: &Tool, target: &mut Target, verify: &mut dyn FnMut(&mut Target)) {
    verify(target);
    check_undisturbed_while_running(tool, target);
    verify(target);
    if !tool.is_criu() {
        check_undisturbed_while_stopped(tool, target);
        verify(target);
    }
    dump_and_restore_twice(tool, target, |run| run, verify);
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
    let stable = stable.of_running();
    let changes = lasting_changes(&stable, || target.snapshot().of_running());
    assert!(changes.is_empty(), "the running target was changed: {changes:#?}\n{outcome}");
}

/// Dumps the stopped tree with `--leave-running`; not a bit may change, and it must stay stopped.
#[track_caller]
fn check_undisturbed_while_stopped(tool: &Tool, target: &mut Target) {
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
    changes.truncate(20);
    assert!(!before.is_empty() && !memory.is_empty(), "nothing to compare");
    assert!(changes.is_empty(), "the stopped target was changed: {changes:#?}\n{outcome}");
    target.go_on();
}
