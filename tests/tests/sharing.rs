//! Shared memory that is tracked: pre-copy and increments copy of it what has changed, and never miss a change.
//!
//! What came back is judged by the `sharers` workload, which knows the version of each of its pages.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use standstill_tests::harness::left::expect_well;
use standstill_tests::harness::{Target, Tool, Turn, kept, snapshots_and_back, standstill, take_back, wait_until};

/// Pages of 16 MiB.
const PAGES: u64 = 4096;

/// What a dump says of its pre-copy.
#[track_caller]
fn precopied(tool: &Tool, target: &Target, images: &Path) -> serde_json::Value {
    let outcome = tool.dump(target.pid(), images).args(["-R", "--precopy=5", "--json"]).run().expect_success();
    outcome.json()["precopy"].clone()
}

/// Only what has changed is left for the freeze, also of a tree that was restored, and of one that allocates memory.
#[test]
fn little_is_left_for_the_freeze() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    for args in [&["--children", "2"][..], &["--children", "1", "--noise"], &["--children", "0"]] {
        let mut target = Target::workload("sharers", args);
        for round in 0..2 {
            let images = target.images(&format!("round{round}"));
            let precopy = precopied(&tool, &target, &images);
            assert_eq!((&precopy["shared_tracked"], &precopy["shared_whole"]), (&1.into(), &0.into()), "{precopy}");
            assert!(precopy["late_pages"].as_u64() < Some(PAGES / 8), "{precopy}");
            expect_well(&mut target);
            take_back(&tool, &mut target, &images);
        }
        target.finish(0);
    }
}

/// Whoever else has the memory might write to it.
#[test]
fn memory_that_is_used_elsewhere_is_copied_in_full() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("sharers", &["--children", "1"]);
    let images = target.images("images");
    let file = open(&target);
    let precopy = precopied(&tool, &target, &images);
    assert_eq!((&precopy["shared_tracked"], &precopy["shared_whole"]), (&0.into(), &1.into()), "{precopy}");
    assert!(precopy["late_pages"].as_u64() > Some(PAGES / 4), "{precopy}");
    drop(file);
    let precopy = precopied(&tool, &target, &images);
    assert_eq!((&precopy["shared_tracked"], &precopy["shared_whole"]), (&1.into(), &0.into()), "{precopy}");
    take_back(&tool, &mut target, &images);
    target.finish(0);
    // A process outside of the tree.
    let mut target = Target::workload("sharers", &["--children", "1", "--outsider"]);
    let precopy = precopied(&tool, &target, &target.images("images"));
    assert_eq!((&precopy["shared_tracked"], &precopy["shared_whole"]), (&0.into(), &1.into()), "{precopy}");
    expect_well(&mut target);
    target.finish(0);
}

/// Without eBPF nobody sees who else maps the memory.
#[test]
fn without_ebpf_it_is_copied_in_full() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("sharers", &["--children", "1", "--tricks", "all"]);
    for _ in 0..3 {
        let images = target.images("images");
        target.processes();
        let dump = tool.dump(target.pid(), &images).args(["--precopy=3", "--reader", "procfs", "--json"]);
        let precopy = dump.run().expect_success().json()["precopy"].clone();
        assert_eq!((&precopy["shared_tracked"], &precopy["shared_whole"]), (&0.into(), &1.into()), "{precopy}");
        target.await_gone();
        tool.restore(&images).arg("-d").run().expect_success();
        expect_well(&mut target);
    }
    target.finish(0);
}

/// Dumps with rounds before them, of a tree that writes in ways that are hard to see.
#[track_caller]
fn hunt(tricks: &str, times: u32) {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let args = ["--mib", "4", "--children", "2", "--pages-per-second", "300", "--tricks", tricks, "--seed", "3"];
    let mut target = Target::workload("sharers", &args);
    for round in 0..times {
        let images = target.images("images");
        target.processes();
        let rounds = format!("--precopy={}", 2 + round % 4);
        tool.dump(target.pid(), &images).arg(rounds).run().expect_success();
        target.await_gone();
        tool.restore(&images).arg("-d").run().expect_success();
        expect_well(&mut target);
    }
    snapshots_and_back(&tool, &mut target, "60ms", 12, times.into());
    target.finish(0);
}

#[test]
fn writes_by_another_mapping_are_not_missed() {
    hunt("alias,replace", 8);
}

#[test]
fn writes_by_mappings_that_linger_are_not_missed() {
    hunt("linger", 8);
    hunt("grow", 4);
}

#[test]
fn writes_by_other_processes_are_not_missed() {
    hunt("child,grandchild,member", 8);
}

#[test]
fn pages_that_were_thrown_away_are_not_missed() {
    hunt("remove,discard,pageout", 8);
}

#[test]
fn writes_to_mappings_that_change_are_not_missed() {
    hunt("protect,move,shrink,inject", 8);
}

#[test]
fn everything_at_once_is_not_missed() {
    hunt("all", 12);
}

/// A mapping of the target's shared memory, opened through procfs.
fn open(target: &Target) -> File {
    let maps = fs::read_to_string(format!("/proc/{}/maps", target.pid())).expect("mappings of the target");
    let line = maps.lines().find(|line| line.ends_with("/dev/zero (deleted)")).expect("shared memory");
    let link = format!("/proc/{}/map_files/{}", target.pid(), line.split(' ').next().expect("addresses"));
    OpenOptions::new().read(true).write(true).open(link).expect("open the shared memory")
}

/// Somebody opens the memory between two snapshots, writes and closes it: nobody in the tree has done anything.
#[test]
fn writes_through_procfs_are_not_missed() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    // Pages of nobody are those that no process of the tree has written.
    let mut target = Target::workload("sharers", &["--children", "1", "--pages-per-second", "0"]);
    let unwritten = |file: &File| {
        let mut page = [0; 4096];
        let free = |at: &u64| {
            file.read_exact_at(&mut page, at * 4096).expect("read");
            page.iter().all(|byte| *byte == 0)
        };
        (0..PAGES).filter(free).take(5).last().expect("a page that nobody writes")
    };
    let page = unwritten(&open(&target));
    let before = [7; 4096];
    open(&target).write_all_at(&before, page * 4096).expect("write");
    let store = target.images("store");
    let run = tool.snapshot(target.pid(), &store, "100ms").args(["--keep", "3"]).spawn();
    let newest = || kept(&store).into_iter().max().unwrap_or(0);
    let await_more = |more: u64| {
        let wanted = newest() + more;
        assert!(wait_until(Duration::from_secs(20), || newest() >= wanted), "no snapshots are made");
    };
    await_more(4);
    open(&target).write_all_at(&[8; 4096], page * 4096).expect("write");
    await_more(3);
    run.kill();
    run.wait();
    thread::sleep(Duration::from_millis(50));
    target.kill_tree();
    target.forget_verdicts();
    tool.restore_at(&store, "latest").run().expect_success();
    let mut now = [0; 4096];
    let file = open(&target);
    file.read_exact_at(&mut now, page * 4096).expect("read");
    assert_eq!(now[0], 8, "what was written through procfs");
    // The workload expects it to be empty.
    file.write_all_at(&[0; 4096], page * 4096).expect("write");
    drop(file);
    expect_well(&mut target);
    target.finish(0);
}

/// Increments are small: what has not changed is in the store of an earlier snapshot.
#[test]
fn increments_of_shared_memory_are_small() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let args = ["--mib", "64", "--children", "1", "--pages-per-second", "200"];
    let mut target = Target::workload("sharers", &args);
    let store = target.images("store");
    let run = tool.snapshot(target.pid(), &store, "150ms").args(["--keep", "20", "--count", "6", "--json"]);
    run.run().expect_success();
    expect_well(&mut target);
    let stored = |dir: &PathBuf| -> u64 {
        let stores = fs::read_dir(dir).expect("a snapshot").flatten();
        let mut sizes: Vec<(std::time::SystemTime, u64)> = stores
            .filter(|entry| entry.file_name().to_string_lossy().starts_with("pages-"))
            .map(|entry| entry.metadata().expect("a page store"))
            .map(|meta| (meta.modified().expect("time"), meta.len()))
            .collect();
        sizes.sort_unstable();
        sizes.last().expect("a page store").1
    };
    let numbers = kept(&store);
    let sizes: Vec<u64> = numbers.iter().map(|n| stored(&store.join(format!("{n:06}")))).collect();
    assert!(sizes[0] > 30 << 20, "{sizes:?}");
    assert!(sizes[2..].iter().all(|size| *size < 4 << 20), "{sizes:?}");
    for number in numbers {
        target.kill_tree();
        target.forget_verdicts();
        tool.restore_at(&store, &number.to_string()).run().expect_success();
        expect_well(&mut target);
    }
    target.finish(0);
}
