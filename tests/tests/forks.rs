//! `--snapshot fork`: memory is copied from forks of the processes, which nobody may notice.

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};
use std::{fs, hint};

use nix::sys::signal::Signal;
use nix::unistd::{Pid, getpid};
use serde_json::Value;
use standstill_tests::harness::left::{self, expect_no_process};
use standstill_tests::harness::{self, Run, Target, Tool, Turn, proc, say, standstill, wait_until};
use standstill_tests::workload::Random;

const FORK: [&str; 3] = ["-R", "--snapshot", "fork"];

/// Living processes with the target's program that are not in its tree. Orphans become children of the tests.
fn forks(target: &mut Target) -> Vec<Pid> {
    let exe = |pid: Pid| fs::read_link(proc::path(pid, "exe"));
    let program: PathBuf = exe(target.pid()).expect("the target's program");
    let tree = target.processes();
    let mut all = proc::tree(getpid());
    all.retain(|pid| !tree.contains(pid) && exe(*pid).is_ok_and(|exe| exe == program));
    all
}

/// The target is as it was, and there is no fork of it.
#[track_caller]
fn expect_well(target: &mut Target) {
    expect_no_fork(target);
    left::expect_well(target);
}

#[track_caller]
fn expect_no_fork(target: &mut Target) {
    let gone = wait_until(Duration::from_secs(5), || forks(target).is_empty());
    assert!(gone, "forks are left: {:?}", forks(target));
}

/// Takes the target back to an image; whatever is left of it is killed first.
#[track_caller]
fn take_back(tool: &Tool, target: &mut Target, images: &std::path::Path) {
    harness::take_back(tool, target, images);
    expect_no_fork(target);
}

/// A dump by forks that leaves the target running.
fn dump(tool: &Tool, target: &Target, images: &std::path::Path) -> Run {
    tool.dump(target.pid(), images).args(FORK).arg("--json")
}

/// Milliseconds of a phase of a dump; none if the dump has not had it.
fn phase(stats: &Value, name: &str) -> Option<f64> {
    let phases = stats["phases"].as_array().expect("phases");
    let found = phases.iter().find(|phase| phase[0] == name)?;
    found[1].as_f64().map(|us| us / 1000.0)
}

/// Dumps by forks, each of which restores.
fn cycle(args: &[&str], options: &[&str]) {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("writer", args);
    for round in ["first", "second"] {
        let images = target.images(round);
        let stats = dump(&tool, &target, &images).args(options).run().expect_success().json();
        assert!(phase(&stats, "forks").is_some(), "nothing was copied from forks: {stats}");
        expect_well(&mut target);
        take_back(&tool, &mut target, &images);
    }
    target.finish(0);
}

#[test]
fn one_that_writes_as_fast_as_it_can() {
    cycle(&["--heap", "256", "--pages-per-second", "max", "--threads", "4"], &["--precopy=0"]);
}

#[test]
fn one_that_writes_faster_than_precopy() {
    // More rounds may leave so little, where the writers do not get the processors, that no fork pays.
    cycle(&["--heap", "256", "--pages-per-second", "max", "--threads", "3"], &["--precopy=1"]);
}

#[test]
fn huge_pages() {
    cycle(&["--heap", "128", "--pages-per-second", "max", "--thp"], &["--precopy=0"]);
}

#[test]
fn mappings_that_a_fork_lacks() {
    cycle(&["--heap", "64", "--pages-per-second", "max", "--threads", "2", "--unforked"], &["--precopy=0"]);
    cycle(&["--heap", "256", "--pages-per-second", "max", "--threads", "3", "--unforked"], &["--precopy=1"]);
}

#[test]
fn children_that_share_copy_on_write() {
    cycle(&["--heap", "64", "--pages-per-second", "20000", "--children", "3"], &["--precopy=0"]);
}

/// A tree that does everything at once.
const EVERYTHING: [&str; 14] = [
    "--heap",
    "48",
    "--shared",
    "8",
    "--file",
    "8",
    "--pages-per-second",
    "max",
    "--threads",
    "2",
    "--children",
    "2",
    "--churn",
    "--thp",
];

#[test]
fn everything_at_once() {
    cycle(&EVERYTHING, &["--precopy=0"]);
}

#[test]
fn procfs_as_the_reader() {
    cycle(&EVERYTHING, &["--precopy=0", "--reader", "procfs"]);
}

/// Copy-on-write sharing is found between forks as it is between processes.
#[test]
fn shared_pages_are_stored_once() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("writer", &["--heap", "64", "--children", "3"]);
    let images = target.images("shared");
    let forked = dump(&tool, &target, &images).arg("--precopy=0").run().expect_success().json();
    assert!(phase(&forked, "forks").is_some(), "{forked}");
    let copied = tool.dump(target.pid(), &target.images("copied")).args(["-R", "--json", "--precopy=0"]).run();
    let copied = copied.expect_success().json();
    let shared = |stats: &Value| stats["pages_shared"].as_u64().expect("a number");
    assert!(shared(&copied) > 8192, "{copied}");
    // Stacks differ a little from one moment to the next.
    assert!(shared(&forked).abs_diff(shared(&copied)) < 100, "{forked}\n{copied}");
    expect_well(&mut target);
    take_back(&tool, &mut target, &images);
    target.finish(0);
}

#[test]
fn chains_and_stores() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("writer", &["--heap", "128", "--pages-per-second", "max", "--threads", "2"]);
    let (first, second) = (target.images("pre"), target.images("next"));
    tool.pre_dump(target.pid(), &first).args(["--snapshot", "fork"]).run().expect_success();
    target.assert_well();
    let run = tool.dump(target.pid(), &second).args(FORK).arg("--prev-images-dir").arg(&first);
    run.run().expect_success();
    expect_well(&mut target);
    take_back(&tool, &mut target, &second);
    take_back(&tool, &mut target, &first);
    let store = target.images("store");
    let run = tool.snapshot(target.pid(), &store, "100ms").args(["--keep", "3", "--count", "4", "--snapshot", "fork"]);
    run.run().expect_success();
    expect_well(&mut target);
    for which in ["latest", "2"] {
        target.kill_tree();
        target.forget_verdicts();
        tool.restore_at(&store, which).run().expect_success();
        expect_well(&mut target);
    }
    target.finish(0);
}

/// The freeze, by dumps in turn.
#[test]
fn the_freeze_is_shorter() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("writer", &["--heap", "512", "--pages-per-second", "max", "--threads", "2"]);
    let images = target.images("measured");
    let freeze = |snapshot: &str| {
        let args = ["-R", "--json", "--precopy=0", "--snapshot", snapshot];
        let stats = tool.dump(target.pid(), &images).args(args).run().expect_success().json();
        let us = |name: &str| stats[name].as_f64().expect("microseconds");
        (us("freezing_us") + us("frozen_us")) / 1000.0
    };
    let mut pairs: Vec<(f64, f64)> = (0..3).map(|_| (freeze("copy"), freeze("fork"))).collect();
    say(&format!("heap of 512 MiB: frozen while copied and while forked, in ms: {pairs:?}"));
    pairs.sort_by(|a, b| (a.1 / a.0).total_cmp(&(b.1 / b.0)));
    let (copied, forked) = pairs[1];
    assert!(forked < copied / 2.0, "frozen for {forked} ms with a fork, {copied} ms without: {pairs:?}");
    expect_well(&mut target);
    target.finish(0);
}

/// What a process can see of its children and descriptors is the same while it is forked.
#[test]
fn nobody_notices() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("waiter", &[]);
    let images = target.images("unseen");
    for _ in 0..10 {
        let run = dump(&tool, &target, &images).arg("--precopy=0").spawn();
        let (mut seen, mut open) = (0, usize::MAX);
        wait_until(Duration::from_secs(20), || {
            // Under the freeze it may still be the target's child.
            for fork in forks(&mut target).into_iter().filter(|fork| proc::parent(*fork) == Some(getpid())) {
                seen += 1;
                open = open.min(fs::read_dir(proc::path(fork, "fd")).map_or(usize::MAX, Iterator::count));
            }
            proc::state(run.pid()).is_none_or(|state| state == 'Z')
        });
        let stats = run.wait().expect_success().json();
        assert!(phase(&stats, "forks").is_some(), "{stats}");
        assert!(seen == 0 || open == 0, "a fork has {open} descriptors");
        expect_well(&mut target);
    }
    take_back(&tool, &mut target, &images);
    target.finish(0);
}

/// One that a user has stopped stays so, with a fork or without.
#[test]
fn a_stopped_tree() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("writer", &["--heap", "64", "--children", "1", "--threads", "2"]);
    target.stop();
    let images = target.images("stopped");
    let stats = dump(&tool, &target, &images).arg("--precopy=0").run().expect_success().json();
    assert!(phase(&stats, "forks").is_some(), "{stats}");
    target.await_stop();
    target.go_on();
    expect_well(&mut target);
    target.kill_tree();
    target.forget_verdicts();
    tool.restore(&images).arg("-d").run().expect_success();
    target.await_stop();
    for pid in target.processes() {
        nix::sys::signal::kill(pid, Signal::SIGCONT).expect("continue");
    }
    expect_well(&mut target);
    target.finish(0);
}

/// Where a fork would do harm, or cannot be made, memory is copied under the freeze.
#[test]
fn a_tree_that_cannot_be_forked_is_copied() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    for (option, reason) in [("--orphans", "orphans"), ("--limit", "temporarily unavailable"), ("--filter", "seccomp")]
    {
        let mut target = Target::workload("waiter", &[option]);
        let images = target.images("copied");
        let outcome = dump(&tool, &target, &images).arg("--precopy=0").run().expect_success();
        assert_eq!(phase(&outcome.json(), "forks"), None, "{outcome}");
        assert!(outcome.log.contains("copied under the freeze") && outcome.log.contains(reason), "{outcome}");
        expect_well(&mut target);
        target.kill_tree();
    }
    let mut target = Target::workload("clock", &[]);
    tool.dump(target.pid(), &target.images("killed")).args(["--snapshot", "fork"]).run().expect_error(2, &["running"]);
    let small = dump(&tool, &target, &target.images("small")).run().expect_success().json();
    assert_eq!(phase(&small, "forks"), None, "{small}");
    expect_well(&mut target);
    target.finish(0);
}

/// Waits for a moment that is over at once.
fn spin_until(limit: Duration, come: impl Fn() -> bool) -> bool {
    let end = Instant::now() + limit;
    while !come() {
        if Instant::now() > end {
            return false;
        }
    }
    true
}

fn spin(time: Duration) {
    let end = Instant::now() + time;
    while Instant::now() < end {
        hint::spin_loop();
    }
}

/// Children of a process's first thread.
fn children(pid: Pid) -> String {
    proc::text(pid, &format!("task/{pid}/children"))
}

/// Kills dumps at random instants: of the whole dump, of the freeze, and of the moment in which the target has a child
/// that it did not make.
fn kill_dumps(workload: &str, args: &[&str], times: u32) {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload(workload, args);
    let whole = || dump(&tool, &target, &target.images("whole")).arg("--precopy=0").run().expect_success();
    let outcomes: Vec<_> = (0..3).map(|_| whole()).collect();
    let duration = outcomes.iter().map(|outcome| outcome.wall).min().expect("three dumps");
    let frozen = outcomes.iter().map(|o| o.json()["frozen_us"].as_u64().expect("microseconds")).min().expect("three");
    let images = target.images("killed");
    let mut random = Random::new(13);
    let (mut killed, mut held, mut parents) = (0, 0, 0);
    for number in 0..times {
        let pid = target.pid();
        let own = children(pid);
        let run = dump(&tool, &target, &images).arg("--precopy=0").spawn();
        if number % 4 == 0 {
            thread::sleep(Duration::from_micros(random.next() % duration.as_micros() as u64));
        } else if spin_until(4 * duration, || proc::state(pid) == Some('t')) {
            if number % 4 == 1 {
                spin(Duration::from_micros(random.next() % (frozen + frozen / 4)));
            } else if spin_until(Duration::from_millis(500), || children(pid) != own) {
                spin(Duration::from_micros(random.next() % 150));
            }
            parents += u32::from(children(pid) != own);
            held += u32::from(proc::state(pid) == Some('t'));
        }
        run.kill();
        killed += u32::from(run.wait().signal.is_some());
        expect_no_process(&tool);
        expect_well(&mut target);
        // The target has some of its own, for a moment.
        let mut dead = Vec::new();
        let none = wait_until(Duration::from_secs(5), || {
            dead = target.processes();
            dead.retain(|pid| proc::state(*pid) == Some('Z'));
            dead.is_empty()
        });
        assert!(none, "zombies are left in the target: {dead:?}");
    }
    say(&format!(
        "{workload}: {killed} of {times} dumps were killed, {held} of them while the tree was frozen, {parents} while the \
         target had another child"
    ));
    assert!(killed > times / 2 && held > times / 10, "{killed} of {times} were killed, {held} under the freeze");
    dump(&tool, &target, &images).arg("--precopy=0").run().expect_success();
    take_back(&tool, &mut target, &images);
    target.finish(0);
}

#[test]
fn a_target_survives_killed_dumps() {
    kill_dumps("writer", &["--heap", "96", "--pages-per-second", "max", "--threads", "2"], 50);
}

/// Only whoever waits for clones (__WALL) in another thread can meet the child of a dump that was killed.
#[test]
fn one_that_waits_survives_killed_dumps() {
    kill_dumps("waiter", &["--memory", "24", "--no-clones"], 40);
}

#[test]
fn a_tree_survives_killed_dumps() {
    kill_dumps("writer", &EVERYTHING, 20);
}

/// The thread that waits for the child of a killed dump was computing, and goes on with all its registers.
#[test]
fn a_computation_survives_killed_dumps() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let start = || Target::workload("compute", &["--steps", "12000", "--array", "32"]);
    let result = |target: &mut Target| {
        target.await_exit(Duration::from_secs(120));
        fs::read_to_string(target.dir().join("result")).expect("a result")
    };
    let right = result(&mut start());
    let mut target = start();
    let (pid, images) = (target.pid(), target.images("killed"));
    let ended = |pid: Pid| proc::state(pid).is_none_or(|state| state == 'Z');
    let mut random = Random::new(17);
    let (mut killed, mut parents) = (0, 0);
    while !ended(pid) {
        let run = dump(&tool, &target, &images).arg("--precopy=0").spawn();
        spin_until(Duration::from_secs(5), || !children(pid).is_empty() || ended(run.pid()) || ended(pid));
        spin(Duration::from_micros(random.next() % 40));
        parents += u32::from(!children(pid).is_empty());
        run.kill();
        killed += u32::from(run.wait().signal.is_some());
    }
    say(&format!("{killed} dumps were killed, {parents} of them while the target had a child"));
    assert_eq!(result(&mut target), right, "result after {killed} killed dumps");
    assert!(parents > 0, "no dump was killed while the target had a child");
}

/// The image is what the tree was at the freeze, even if it is gone before that is copied.
#[test]
fn the_target_ends_while_its_fork_is_copied() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("writer", &["--heap", "512", "--pages-per-second", "max"]);
    let images = target.images("last");
    target.processes();
    let run = dump(&tool, &target, &images).arg("--precopy=0").spawn();
    let forked = wait_until(Duration::from_secs(20), || forks(&mut target).len() == 1 && target.is_alive());
    assert!(forked, "no fork is seen");
    // Once the fork is an orphan the tree is about to go on.
    thread::sleep(Duration::from_millis(5));
    target.kill_all();
    let outcome = run.wait().expect_success();
    assert!(phase(&outcome.json(), "forks").is_some(), "{outcome}");
    target.await_gone();
    target.forget_verdicts();
    tool.restore(&images).arg("-d").run().expect_success();
    expect_well(&mut target);
    target.finish(0);
}
