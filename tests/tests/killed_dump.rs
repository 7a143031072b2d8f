//! The dump is killed at any instant: the target goes on and has nothing of it left in it.

use std::path::Path;
use std::thread;
use std::time::Duration;

use standstill_tests::harness::left::expect_no_process;
use standstill_tests::harness::{Snapshot, Target, Tool, Turn, say, standstill, wait_until};
use standstill_tests::workload::Pattern;

/// Shortest of a few whole dumps.
fn usual_duration(tool: &Tool, target: &Target) -> Duration {
    let dump = |_| tool.dump(target.pid(), &target.images("whole")).arg("-R").run().expect_success().wall;
    (0..4).map(dump).min().expect("four dumps")
}

/// The last instant, as a share of the usual duration.
const SPREAD: f64 = 1.2;

/// True when the directory holds an image that verify accepts; it must be that, or none at all.
#[track_caller]
fn holds_image(tool: &Tool, images: &Path) -> bool {
    let outcome = tool.command(["verify", "-D"]).arg(images).run();
    match outcome.status {
        Some(0) => true,
        _ => {
            outcome.expect_error(5, &[]);
            false
        }
    }
}

/// Kills dumps of a target that would leave it running, at instants spread over the time they take.
fn kill_dumps(workload: &str, args: &[&str], times: u64, seed: u64) {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload(workload, args);
    let mut duration = usual_duration(&tool, &target);
    // What does not change when the target works for a verdict.
    let first = target.snapshot();
    thread::sleep(Duration::from_millis(1100));
    target.assert_well();
    let before = first.stable(&target.snapshot()).without_activity();
    let mut mappings = target.snapshot();
    let random = Pattern::new(seed);
    let images = target.images("killed");
    let (mut killed, mut unfinished, mut left) = (0, 0, 0);
    for number in 0..times {
        // A random instant within its own part of the duration, and a little beyond.
        let share = (number as f64 + (random.word(number) % 1000) as f64 / 1000.0) / times as f64;
        let dump = tool.dump(target.pid(), &images).arg("-R").spawn();
        thread::sleep(duration.mul_f64(share * SPREAD));
        dump.kill();
        let outcome = dump.wait();
        match outcome.signal {
            Some(_) => killed += 1,
            // It was quicker than those before.
            None => duration = duration.min(outcome.wall),
        }
        expect_no_process(&tool);
        let at = format!("killed after {:.3} of {duration:?}", share * SPREAD);
        expect_untouched(&mut target, &before, &at);
        let now = target.snapshot();
        left += u32::from(!mappings.new_mappings(&now).is_empty());
        mappings = now;
        unfinished += u32::from(!holds_image(&tool, &images));
    }
    // A page of the parasite's may stay where nobody was left to take it away; it must be the exception.
    assert!(left <= killed / 2, "{left} of {killed} killed dumps left a mapping in the target");
    if left > 0 {
        say(&format!("NOTE: {left} of {killed} killed dumps left a mapping in the target"));
    }
    assert!(killed > times as u32 / 2, "only {killed} of {times} dumps were killed before they ended");
    assert!(unfinished > 0, "no dump was killed before its image was complete");
    // What the killed dumps have left in the directory is not in the way of a whole one.
    tool.dump(target.pid(), &images).run().expect_success();
    target.await_gone();
    tool.restore(&images).arg("-d").run().expect_success();
    target.assert_well();
    target.finish(0);
}

/// Fails unless the target is as before, from outside and from inside.
#[track_caller]
fn expect_untouched(target: &mut Target, before: &Snapshot, at: &str) {
    assert!(target.is_alive(), "{at}: the target is gone");
    let mut changes = Vec::new();
    let same = wait_until(Duration::from_secs(3), || {
        let now = target.snapshot();
        changes = before.changes(&now, false);
        changes.extend(before.new_descriptors(&now));
        changes.is_empty()
    });
    assert!(same, "{at}: the target was changed: {changes:#?}");
    target.assert_free();
    let verdict = target.verdict();
    let well = verdict.ok && verdict.checks > 0;
    let failures = verdict.failures;
    assert!(well, "{at}: the target finds itself changed: {failures:#?}\n{}", target.whereabouts());
}

#[test]
fn threads_survive_a_killed_dump_at_100_instants() {
    kill_dumps("threads_avx", &["--threads", "16"], 100, 1);
}

#[test]
fn interrupted_calls_survive_a_killed_dump() {
    kill_dumps("interrupted", &["--sleep-ms", "500"], 40, 2);
}

#[test]
fn a_tree_survives_a_killed_dump() {
    kill_dumps("tree", &["--depth", "8"], 40, 3);
}

#[test]
fn descriptors_of_processes_survive_a_killed_dump() {
    kill_dumps("pidfds", &[], 20, 11);
}

#[test]
fn processes_with_one_memory_survive_a_killed_dump() {
    kill_dumps("one_memory", &["--mib", "32"], 30, 12);
}

#[test]
fn rings_of_asynchronous_io_survive_a_killed_dump() {
    kill_dumps("aio", &[], 20, 13);
}

#[test]
fn descriptors_survive_a_killed_dump() {
    kill_dumps("fds", &[], 30, 4);
}

/// What waits in them is read with an option of theirs.
#[test]
fn sockets_survive_a_killed_dump() {
    kill_dumps("sockets", &[], 60, 8);
}

/// Their filters are suspended only while they are stopped.
#[test]
fn filters_of_seccomp_survive_a_killed_dump() {
    kill_dumps("seccomp", &[], 40, 6);
}

/// Processes with rare attributes make system calls for the dump, and one without its first thread is reached by another.
#[test]
fn rare_attributes_survive_a_killed_dump() {
    kill_dumps("attributes", &["--leaderless"], 30, 7);
}

#[test]
fn a_killed_dump_that_kills_leaves_the_target_or_a_complete_image() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("threads_avx", &["--threads", "8"]);
    // One that kills waits for the disk with the target frozen. The longest of a few: some have to be killed at the very end.
    let mut whole = || {
        let images = target.images("whole");
        target.processes();
        let wall = tool.dump(target.pid(), &images).run().expect_success().wall;
        target.await_gone();
        tool.restore(&images).arg("-d").run().expect_success();
        wall
    };
    let duration = (0..4).map(|_| whole()).max().expect("four dumps");
    let random = Pattern::new(5);
    let (mut survived, mut restored) = (0, 0);
    for number in 0..40 {
        let share = (number as f64 + (random.word(number) % 1000) as f64 / 1000.0) / 40.0;
        let images = target.images("killed");
        target.processes();
        let dump = tool.dump(target.pid(), &images).spawn();
        thread::sleep(duration.mul_f64(share * SPREAD));
        dump.kill();
        dump.wait();
        expect_no_process(&tool);
        let complete = holds_image(&tool, &images);
        // Killing takes a moment: the target may be on its way out.
        thread::sleep(Duration::from_millis(20));
        let at = format!("killed after {:.3} of {duration:?}", share * SPREAD);
        if target.is_alive() {
            survived += 1;
        } else {
            assert!(complete, "{at}: the target is gone, and so is its image");
            restored += 1;
            target.await_gone();
            tool.restore(&images).arg("-d").run().expect_success();
        }
        target.assert_free();
        let verdict = target.verdict();
        let (failures, places) = (verdict.failures, target.whereabouts());
        assert!(verdict.ok, "{at}, {survived} survived, {restored} restored: {failures:#?}\n{places}");
    }
    assert!(survived > 0, "no dump was killed early enough to test anything");
    assert!(restored > 0, "no dump was killed late enough to test anything");
    target.finish(0);
}
