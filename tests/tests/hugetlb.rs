//! Huge pages of hugetlbfs come back as such, with their contents, and none that was never touched.
//!
//! What came back is judged by the `hugetlb` workload, which writes to its memory all the time.

use standstill_tests::harness::left::{expect_no_process, expect_refused, expect_well};
use standstill_tests::harness::{
    HugePages, Hugetlbfs, Target, Tool, Turn, say, snapshots_and_back, standstill, take_back,
};

const SMALL: usize = 2 << 20;
const LARGE: usize = 1 << 30;
/// Pages for the workload, and for those of a process that is on its way out.
const PAGES: u64 = 120;

fn start(mount: &Hugetlbfs, args: &[&str]) -> Target {
    let mount = mount.path().to_str().expect("a path");
    Target::workload("hugetlb", &[&["--system-v", "--mount", mount], args].concat())
}

/// Dumps a target so that it is gone, and restores it.
#[track_caller]
fn there_and_back(tool: &Tool, target: &mut Target, name: &str, options: &[&str]) {
    let images = target.images(name);
    target.processes();
    tool.dump(target.pid(), &images).args(options).run().expect_success();
    target.await_gone();
    tool.restore(&images).arg("-d").run().expect_success();
    expect_well(target);
}

#[test]
fn every_kind_twice() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let Some(_pages) = HugePages::take(SMALL, PAGES) else { return };
    for reader in ["auto", "procfs"] {
        let mount = Hugetlbfs::new(SMALL);
        let mut target = start(&mount, &[]);
        expect_well(&mut target);
        for name in ["first", "second"] {
            there_and_back(&tool, &mut target, name, &["--reader", reader]);
        }
        target.finish(0);
    }
}

#[test]
fn compressed() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let Some(_pages) = HugePages::take(SMALL, PAGES) else { return };
    let mount = Hugetlbfs::new(SMALL);
    let mut target = start(&mount, &[]);
    there_and_back(&tool, &mut target, "lz4", &["--compress", "lz4"]);
    target.finish(0);
}

/// Mappings and files of which there is no page can be had where the machine has no pages.
#[test]
fn untouched_memory_takes_no_page() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    for page_size in [SMALL, LARGE] {
        let Some(_none) = HugePages::take(page_size, 0) else { return };
        let mut target = Target::workload("hugetlb", &["--untouched", "--page-size", &page_size.to_string()]);
        expect_well(&mut target);
        there_and_back(&tool, &mut target, "first", &[]);
        there_and_back(&tool, &mut target, "second", &["--precopy=2"]);
        target.finish(0);
    }
}

#[test]
#[ignore = "needs 3 GiB in pieces of one, which a machine that has run for a while does not have: by hand after a boot"]
fn pages_of_a_gibibyte() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let Some(_pages) = HugePages::take(LARGE, 3) else { return };
    let mut target = Target::workload("hugetlb", &["--few", "--page-size", &LARGE.to_string()]);
    expect_well(&mut target);
    there_and_back(&tool, &mut target, "first", &[]);
    there_and_back(&tool, &mut target, "second", &["--precopy=2"]);
    target.finish(0);
}

/// What is written while the tree is copied before the freeze, from forks, or not at all.
#[test]
fn nothing_that_is_written_is_missed() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let Some(_pages) = HugePages::take(SMALL, PAGES) else { return };
    let mount = Hugetlbfs::new(SMALL);
    let mut target = start(&mount, &["--nameless", "--heap", "64"]);
    let ways = [&["--precopy=0"][..], &["--precopy=3"], &["--precopy=0", "--snapshot", "fork"], &["--precopy=2"]];
    for (round, options) in ways.into_iter().enumerate() {
        let images = target.images(&format!("round{round}"));
        tool.dump(target.pid(), &images).arg("-R").args(options).run().expect_success();
        expect_well(&mut target);
        take_back(&tool, &mut target, &images);
    }
    target.finish(0);
}

/// The target writes to pages without a reservation, and there is not one more: a fork that keeps one kills it.
#[test]
fn a_fork_takes_no_huge_page() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let Some(pages) = HugePages::take(SMALL, PAGES) else { return };
    let mount = Hugetlbfs::new(SMALL);
    let mut target = start(&mount, &["--nameless", "--heap", "256"]);
    // Until all that is copied on write is.
    expect_well(&mut target);
    std::thread::sleep(std::time::Duration::from_millis(500));
    pages.leave(0);
    for round in 0..5 {
        let images = target.images(&format!("round{round}"));
        let dump = tool.dump(target.pid(), &images).args(["-R", "--precopy=0", "--snapshot", "fork", "--json"]);
        let stats = dump.run().expect_success().json();
        let forked = stats["phases"].as_array().expect("phases").iter().any(|phase| phase[0] == "forks");
        assert!(forked, "nothing was copied from forks: {stats}");
        expect_well(&mut target);
    }
    target.finish(0);
}

#[test]
fn every_snapshot_restores() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let Some(_pages) = HugePages::take(SMALL, PAGES) else { return };
    let mount = Hugetlbfs::new(SMALL);
    let mut target = start(&mount, &["--nameless", "--heap", "16"]);
    snapshots_and_back(&tool, &mut target, "80ms", 10, 17);
    target.finish(0);
}

#[test]
fn too_few_pages_at_the_restore() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let Some(pages) = HugePages::take(SMALL, PAGES) else { return };
    let mount = Hugetlbfs::new(SMALL);
    let mut target = start(&mount, &[]);
    let images = target.images("images");
    target.processes();
    tool.dump(target.pid(), &images).run().expect_success();
    target.await_gone();
    let mut least = None;
    for free in (0..PAGES / 2).chain([PAGES / 2]) {
        pages.leave(free);
        let outcome = tool.restore(&images).arg("-d").run();
        if outcome.status == Some(0) {
            least = Some(free);
            break;
        }
        outcome.expect_error(6, &["huge pages of 2048 kB", "nr_hugepages"]);
        expect_no_process(&tool);
        assert_eq!(pages.free(), free, "a failed restore keeps huge pages");
    }
    say(&format!("free huge pages for a restore: {least:?}, of which are left {}", pages.free()));
    assert!(least.is_some_and(|least| least > 20), "{least:?} free huge pages are enough");
    assert!(pages.free() <= 1, "a restore that needs less is refused");
    expect_well(&mut target);
    target.finish(0);
}

#[test]
fn a_hugetlbfs_that_is_gone() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let Some(_pages) = HugePages::take(SMALL, PAGES) else { return };
    let mount = Hugetlbfs::new(SMALL);
    let mut target = start(&mount, &["--nameless"]);
    std::fs::remove_file(mount.path().join("static-file")).expect("remove the file");
    let images = target.images("images");
    target.processes();
    tool.dump(target.pid(), &images).run().expect_success();
    target.await_gone();
    mount.unmount();
    tool.restore(&images).arg("-d").run().expect_error(7, &["-file: ", "pages of 2048 kB", "mount it"]);
    expect_no_process(&tool);
    mount.mount(SMALL);
    tool.restore(&images).arg("-d").run().expect_success();
    expect_well(&mut target);
    target.finish(0);
}

#[test]
fn a_segment_of_half_a_page() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let Some(_pages) = HugePages::take(SMALL, PAGES) else { return };
    let mut target = Target::workload("hugetlb", &["--odd-segment"]);
    expect_refused(&tool, &mut target, &[], 4, &["System V", "whole huge pages"]);
    target.finish(0);
}
