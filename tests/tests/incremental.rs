//! Dumps of a tree that goes on meanwhile: pre-copy, chains of increments, and stores of snapshots.
//!
//! What came back is judged by the `writer` workload, which knows the version of each of its pages.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::mount::{MsFlags, mount, umount};
use nix::sys::wait::WaitStatus;
use standstill_tests::harness::left::{expect_no_process, expect_not_tracked, expect_well, file_names};
use standstill_tests::harness::{
    Outcome, Target, Tool, Turn, kept, proc, standstill, take_back, take_back_at, wait_until,
};
use standstill_tests::workload::Random;

/// Exit status where the parent image is missing, damaged, or not of this tree.
const PARENT: i32 = 5;
/// Exit status where the target ended meanwhile.
const ENDED: i32 = 10;
/// Exit status of a full disk.
const FULL: i32 = 7;

/// A tree that does everything at once.
const EVERYTHING: [&str; 15] = [
    "--heap",
    "32",
    "--shared",
    "8",
    "--file",
    "8",
    "--pages-per-second",
    "3000",
    "--threads",
    "2",
    "--children",
    "2",
    "--churn",
    "--seed",
    "5",
];

/// Dumps with pre-copy that leave the target running or kill it, again and again, all of which restore.
fn precopy(args: &[&str], options: &[&str]) {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("writer", args);
    for round in ["first", "second"] {
        let running = target.images(&format!("{round}-running"));
        tool.dump(target.pid(), &running).arg("-R").args(options).run().expect_success();
        expect_well(&mut target);
        let killed = target.images(&format!("{round}-killed"));
        target.processes();
        tool.dump(target.pid(), &killed).args(options).run().expect_success();
        target.await_gone();
        tool.restore(&killed).arg("-d").run().expect_success();
        expect_well(&mut target);
        take_back(&tool, &mut target, &running);
    }
    target.finish(0);
}

#[test]
fn precopy_of_an_idle_heap() {
    precopy(&["--heap", "128"], &["--precopy"]);
}

#[test]
fn precopy_of_a_heap_that_is_written() {
    precopy(&["--heap", "128", "--pages-per-second", "3000"], &["--precopy=auto", "--max-freeze", "10ms"]);
}

#[test]
fn precopy_of_one_that_writes_faster_than_it_can_be_copied() {
    let args = ["--heap", "64", "--pages-per-second", "max", "--threads", "2"];
    precopy(&args, &["--precopy", "--max-freeze", "5ms", "--max-rounds", "4"]);
}

#[test]
fn precopy_with_threads() {
    precopy(&["--heap", "64", "--pages-per-second", "5000", "--threads", "6"], &["--precopy=3"]);
}

#[test]
fn precopy_of_children_that_share_copy_on_write() {
    precopy(&["--heap", "48", "--pages-per-second", "2000", "--children", "3"], &["--precopy=3"]);
}

#[test]
fn precopy_of_huge_pages() {
    precopy(&["--heap", "96", "--pages-per-second", "2000", "--thp"], &["--precopy=3"]);
}

#[test]
fn precopy_of_shared_memory() {
    let args = ["--heap", "16", "--shared", "24", "--pages-per-second", "3000", "--children", "2"];
    precopy(&args, &["--precopy=3"]);
}

#[test]
fn precopy_of_a_private_file_mapping() {
    precopy(&["--heap", "16", "--file", "32", "--pages-per-second", "2000"], &["--precopy=3"]);
}

#[test]
fn precopy_of_memory_that_comes_and_goes() {
    precopy(&["--heap", "16", "--pages-per-second", "500", "--churn"], &["--precopy=5"]);
}

#[test]
fn precopy_of_everything_at_once() {
    precopy(&EVERYTHING, &["--precopy=4"]);
}

/// Many pre-copies of memory that changes its place: each is another chance for a stale page.
#[test]
fn stale_pages_do_not_come_back() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target =
        Target::workload("writer", &["--heap", "8", "--pages-per-second", "500", "--churn", "--seed", "11"]);
    for round in 0..20 {
        let images = target.images("moving");
        target.processes();
        let rounds = format!("--precopy={}", 1 + round % 5);
        tool.dump(target.pid(), &images).arg(rounds).run().expect_success();
        target.await_gone();
        tool.restore(&images).arg("-d").run().expect_success();
        expect_well(&mut target);
    }
    target.finish(0);
}

/// `--prev-images-dir PARENT`, relative to the new image or absolute.
fn parent(images: &Path, relative: bool) -> [PathBuf; 2] {
    let name = images.file_name().expect("a name");
    let dir = if relative { Path::new("..").join(name) } else { images.to_owned() };
    ["--prev-images-dir".into(), dir]
}

/// Makes pre-dumps, each with the one before it as its parent.
#[track_caller]
fn pre_dumps(tool: &Tool, target: &mut Target, count: usize) -> Vec<PathBuf> {
    let mut chain: Vec<PathBuf> = Vec::new();
    for number in 0..count {
        let images = target.images(&format!("pre{number}"));
        let run = tool.pre_dump(target.pid(), &images);
        let run = match chain.last() {
            Some(last) => run.args(parent(last, number % 2 == 1)),
            None => run,
        };
        run.run().expect_success();
        target.assert_well();
        chain.push(images);
    }
    chain
}

#[test]
fn three_pre_dumps_and_a_dump() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    for args in [&["--heap", "64", "--pages-per-second", "2000"][..], &EVERYTHING] {
        let mut target = Target::workload("writer", args);
        let chain = pre_dumps(&tool, &mut target, 3);
        let images = target.images("last");
        target.processes();
        tool.dump(target.pid(), &images).args(parent(&chain[2], true)).run().expect_success();
        target.await_gone();
        tool.restore(&images).arg("-d").run().expect_success();
        expect_well(&mut target);
        target.finish(0);
    }
}

/// Whole dumps, each with the one before it as its parent.
#[track_caller]
fn dumps(tool: &Tool, target: &mut Target, count: usize) -> Vec<PathBuf> {
    let mut chain: Vec<PathBuf> = Vec::new();
    for number in 0..count {
        let images = target.images(&format!("full{number}"));
        let run = tool.dump(target.pid(), &images).args(["-R", "--track-mem"]);
        let run = match chain.last() {
            Some(last) => run.args(parent(last, number % 2 == 1)),
            None => run,
        };
        run.run().expect_success();
        target.assert_free();
        target.assert_well();
        chain.push(images);
    }
    chain
}

/// Bytes of an image.
fn size_of(images: &Path) -> u64 {
    let length = |name: String| fs::metadata(images.join(name)).map_or(0, |data| data.len());
    file_names(images).into_iter().map(length).sum()
}

#[test]
fn every_image_of_a_chain_restores() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    for args in [&["--heap", "64", "--pages-per-second", "500"][..], &EVERYTHING] {
        let mut target = Target::workload("writer", args);
        let chain = dumps(&tool, &mut target, 4);
        if args != EVERYTHING {
            let sizes: Vec<u64> = chain.iter().map(|images| size_of(images)).collect();
            assert!(sizes[1..].iter().all(|size| *size < sizes[0] / 2), "increments are not small: {sizes:?}");
        }
        for number in [3, 1, 0, 2] {
            take_back(&tool, &mut target, &chain[number]);
        }
        target.finish(0);
    }
}

#[test]
fn a_merged_chain_needs_no_parents() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("writer", &["--heap", "64", "--pages-per-second", "1000", "--children", "1"]);
    let chain = dumps(&tool, &mut target, 3);
    tool.command(["merge"]).arg(&chain[2]).run().expect_success();
    for images in &chain[..2] {
        fs::remove_dir_all(images).expect("remove a parent");
    }
    take_back(&tool, &mut target, &chain[2]);
    target.finish(0);
}

#[test]
fn a_parent_that_is_not_there_or_none_of_this_tree_is_refused() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("writer", &["--heap", "16", "--pages-per-second", "500"]);
    let mut other = Target::workload("writer", &["--heap", "16", "--pages-per-second", "500"]);
    let foreign = pre_dumps(&tool, &mut other, 1).remove(0);
    let empty = target.images("empty");
    for (parent, words) in [(target.dir().join("nowhere"), "nowhere"), (empty, "empty"), (foreign, "of process")] {
        let images = target.images("refused");
        let dumps = [tool.pre_dump(target.pid(), &images), tool.dump(target.pid(), &images).arg("-R")];
        for run in dumps {
            run.arg("--prev-images-dir").arg(&parent).run().expect_error(PARENT, &[words]);
            let left: Vec<String> = file_names(&images).into_iter().filter(|name| !name.ends_with(".log")).collect();
            assert!(left.is_empty(), "left behind: {left:?}");
            expect_well(&mut target);
        }
    }
    target.finish(0);
    other.finish(0);
}

#[test]
fn a_chain_that_lost_a_link_is_not_restored() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("writer", &["--heap", "16", "--pages-per-second", "500"]);
    let chain = dumps(&tool, &mut target, 3);
    let again = target.images("again");
    tool.dump(target.pid(), &again).args(["-R", "--track-mem"]).run().expect_success();
    target.kill_tree();
    target.forget_verdicts();
    let refused = |what: &str| {
        let outcome = tool.restore(&chain[2]).arg("-d").run();
        assert_eq!(outcome.status, Some(PARENT), "{what}: {outcome}");
        outcome.expect_error(PARENT, &[]);
    };
    let aside = chain[1].with_extension("aside");
    fs::rename(&chain[1], &aside).expect("take the parent away");
    refused("parent missing");
    fs::rename(&again, &chain[1]).expect("put another image of the same tree in its place");
    refused("another parent");
    fs::rename(&chain[1], &again).expect("take it away again");
    fs::rename(&aside, &chain[1]).expect("put the parent back");
    damage(&chain[1]);
    refused("parent damaged");
    damage(&chain[1]);
    tool.restore(&chain[2]).arg("-d").run().expect_success();
    target.assert_well();
    target.finish(0);
}

/// Turns over a bit in the middle of the largest file of an image; the second time it is right again.
fn damage(images: &Path) {
    let size = |name: &String| fs::metadata(images.join(name)).map_or(0, |data| data.len());
    let largest = file_names(images).into_iter().max_by_key(size).expect("a file");
    let path = images.join(largest);
    let mut bytes = fs::read(&path).expect("read a file of the image");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, bytes).expect("write it back");
}

#[test]
fn kept_snapshots_restore() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut random = Random::new(7);
    for args in [&["--heap", "48", "--pages-per-second", "1000"][..], &EVERYTHING] {
        let mut target = Target::workload("writer", args);
        let store = target.images("store");
        let run = tool.snapshot(target.pid(), &store, "300ms").args(["--keep", "4", "--count", "10"]);
        run.args(["--max-freeze", "20ms"]).run().expect_success();
        expect_well(&mut target);
        let numbers = kept(&store);
        assert_eq!(numbers.len(), 4, "{numbers:?}");
        for _ in 0..4 {
            let number = numbers[random.below(numbers.len())];
            take_back_at(&tool, &mut target, &store, &number.to_string());
        }
        take_back_at(&tool, &mut target, &store, "latest");
        // It goes on where it was: the same store takes further ones.
        let run = tool.snapshot(target.pid(), &store, "200ms").args(["--keep", "4", "--count", "3"]);
        run.run().expect_success();
        assert!(kept(&store).last() > numbers.last(), "{:?} after {numbers:?}", kept(&store));
        take_back_at(&tool, &mut target, &store, "latest");
        target.finish(0);
    }
}

/// Memory that is written to everywhere between two snapshots is not protected meanwhile: what has changed is found by
/// checksums.
#[test]
fn compared_snapshots_restore() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut random = Random::new(9);
    let heap = ["--heap", "96", "--pages-per-second"];
    let cases: [(&[&str], &[&str]); 4] = [
        (&["20000"], &[]),
        (&["10000", "--children", "2"], &[]),
        (&["max", "--thp"], &["--max-rounds", "3"]),
        (&["20000", "--threads", "2"], &["--snapshot", "fork"]),
    ];
    for (args, options) in cases {
        let mut target = Target::workload("writer", &[&heap, args].concat());
        let (store, log) = (target.images("store"), target.dir().join("log"));
        let run =
            tool.snapshot(target.pid(), &store, "700ms").args(["--keep", "5", "--count", "7", "-vv", "-o"]).arg(&log);
        run.args(options).run().expect_success();
        expect_well(&mut target);
        let compared = fs::read_to_string(&log).expect("read the log");
        let compared: Vec<&str> = compared.lines().filter(|line| line.contains(" compared ")).collect();
        let some_changed = compared.iter().any(|line| !line.ends_with("same=0"));
        assert!(some_changed, "{args:?}: memory was compared only so: {compared:#?}");
        let numbers = kept(&store);
        for number in [numbers[random.below(numbers.len())], numbers[random.below(numbers.len())]] {
            take_back_at(&tool, &mut target, &store, &number.to_string());
        }
        take_back_at(&tool, &mut target, &store, "latest");
        target.finish(0);
    }
}

/// The result of a computation that nobody disturbs.
#[track_caller]
fn undisturbed(args: &[&str]) -> String {
    let mut target = Target::workload("compute", args);
    target.await_exit(Duration::from_secs(120));
    result(&target).expect("a result")
}

fn result(target: &Target) -> Option<String> {
    fs::read_to_string(target.dir().join("result")).ok().filter(|text| text.ends_with('\n'))
}

#[test]
fn a_computation_survives_power_cuts() {
    const CUTS: usize = 12;
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let args = ["--steps", "1500", "--array", "64", "--pause-us", "4000"];
    let right = undisturbed(&args);
    let mut random = Random::new(3);
    let mut target = Target::workload("compute", &args);
    let store = target.images("store");
    let mut cuts = 0;
    while cuts < CUTS && result(&target).is_none() {
        let before = kept(&store);
        let run = tool.snapshot(target.pid(), &store, "100ms").args(["--keep", "3"]).spawn();
        // The first one has to be there; any later one may be under way.
        let begun = wait_until(Duration::from_secs(30), || !kept(&store).is_empty());
        assert!(begun, "no snapshot is made");
        thread::sleep(Duration::from_micros(random.next() % 600_000));
        let other_way = random.once_in(2);
        if other_way {
            target.kill_all();
        }
        run.kill();
        run.wait();
        expect_no_process(&tool);
        target.kill_tree();
        if result(&target).is_some() {
            break;
        }
        let now = kept(&store);
        assert!(!now.is_empty(), "nothing left of {before:?}");
        tool.restore_at(&store, "latest").run().expect_success();
        target.assert_free();
        expect_not_tracked(&mut target);
        cuts += 1;
    }
    assert!(cuts >= 4, "only {cuts} power cuts before the end");
    if let Some(exit) = target.await_exit(Duration::from_secs(120)) {
        assert_eq!(exit, WaitStatus::Exited(target.pid(), 0), "{}", target.output());
    }
    assert_eq!(result(&target), Some(right), "result after {cuts} power cuts");
}

/// A small file system, gone when dropped.
struct Small(PathBuf);

impl Small {
    fn mount(dir: PathBuf, size: &str) -> Self {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("tmpfs"), &dir, Some("tmpfs"), flags, Some(size)).expect("mount a small tmpfs");
        Self(dir)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        _ = umount(&self.0);
    }
}

#[test]
fn a_full_disk_leaves_earlier_snapshots_whole() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    // One snapshot fits, or some.
    for size in ["size=60m", "size=90m", "size=150m"] {
        let args = ["--heap", "40", "--pages-per-second", "20000", "--threads", "2"];
        let mut target = Target::workload("writer", &args);
        let store = Small::mount(target.images("store"), size);
        let run = tool.snapshot(target.pid(), &store.0, "200ms").args(["--keep", "20", "--count", "40"]);
        run.run().expect_error(FULL, &["space"]);
        expect_well(&mut target);
        let numbers = kept(&store.0);
        assert!(!numbers.is_empty(), "no snapshot is left with {size}");
        for number in numbers {
            take_back_at(&tool, &mut target, &store.0, &number.to_string());
        }
        take_back_at(&tool, &mut target, &store.0, "latest");
        target.finish(0);
    }
}

/// Ends a target while a command works on it, at spread moments, and looks how the command ends.
fn end_while(
    ask: impl Fn(&Tool, &Target, &Path) -> standstill_tests::harness::Run,
    check: impl Fn(&Tool, &Path, Outcome),
) {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    for number in 0..6 {
        let args = ["--heap", "96", "--pages-per-second", "max", "--children", "1"];
        let mut target = Target::workload("writer", &args);
        let images = target.images("ended");
        target.processes();
        let run = ask(&tool, &target, &images).spawn();
        thread::sleep(Duration::from_millis(100 + 120 * number));
        if proc::state(run.pid()).is_none_or(|state| state == 'Z') {
            panic!("the command has ended before its target: {}", run.wait());
        }
        target.kill_all();
        let outcome = run.wait();
        target.await_gone();
        check(&tool, &images, outcome);
        expect_no_process(&tool);
    }
}

#[test]
fn the_target_ends_between_rounds() {
    let dump = |tool: &Tool, target: &Target, images: &Path| {
        tool.dump(target.pid(), images).args(["--precopy=1000", "--max-rounds", "1000", "--max-freeze", "1ms"])
    };
    end_while(dump, |_, images, outcome| {
        outcome.expect_error(ENDED, &[]);
        let left: Vec<String> = file_names(images).into_iter().filter(|name| !name.ends_with(".log")).collect();
        assert!(left.is_empty(), "left behind: {left:?}");
    });
}

#[test]
fn the_target_ends_between_snapshots() {
    let snapshot = |tool: &Tool, target: &Target, store: &Path| tool.snapshot(target.pid(), store, "200ms");
    end_while(snapshot, |_, _, outcome| _ = outcome.expect_error(ENDED, &[]));
}

/// Kills pre-copying dumps at instants spread over the time they take.
fn kill_precopy(args: &[&str], times: u32) {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("writer", args);
    let options = ["-R", "--precopy=4"];
    let whole = |target: &Target| tool.dump(target.pid(), &target.images("whole")).args(options).run();
    let duration = (0..2).map(|_| whole(&target).expect_success().wall).min().expect("two dumps");
    let images = target.images("killed");
    let mut killed = 0;
    for number in 0..times {
        let dump = tool.dump(target.pid(), &images).args(options).spawn();
        thread::sleep(duration * (2 * number + 1) / (2 * times));
        dump.kill();
        killed += u32::from(dump.wait().signal.is_some());
        expect_no_process(&tool);
        expect_well(&mut target);
    }
    assert!(killed > times / 3, "only {killed} of {times} dumps were killed before they ended");
    // What they left is in nobody's way.
    target.processes();
    tool.dump(target.pid(), &images).arg("--precopy=2").run().expect_success();
    target.await_gone();
    tool.restore(&images).arg("-d").run().expect_success();
    expect_well(&mut target);
    target.finish(0);
}

#[test]
fn a_target_survives_killed_precopies() {
    kill_precopy(&["--heap", "64", "--pages-per-second", "2000", "--threads", "2"], 30);
}

#[test]
fn a_tree_survives_killed_precopies() {
    kill_precopy(&EVERYTHING, 20);
}

/// A process that was tracked must not leave anything in a program it executes or in a child it forks.
#[test]
fn nothing_is_left_after_pre_dumps() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("writer", &EVERYTHING);
    let chain = pre_dumps(&tool, &mut target, 2);
    let images = target.images("last");
    tool.dump(target.pid(), &images).arg("-R").args(parent(&chain[1], true)).run().expect_success();
    expect_no_process(&tool);
    expect_well(&mut target);
    target.finish(0);
}
