//! Processes that share memory and signal actions: their memory is copied, tracked and restored once.

use serde_json::Value;
use standstill_tests::harness::left::expect_well;
use standstill_tests::harness::{
    Target, Tool, Turn, dump_and_restore, full_cycle, snapshots_and_back, standstill, take_back,
};

const MIB: u64 = 48;
/// Pages of the memory that the root writes.
const PAGES: u64 = MIB << 8;

fn target() -> Target {
    Target::workload("one_memory", &["--mib", &MIB.to_string()])
}

#[test]
fn relatives_of_every_kind() {
    let _turn = Turn::take();
    let mut target = Target::workload("one_memory", &[]);
    full_cycle(&Tool::get(), &mut target, &mut |target| _ = target.assert_well());
    target.finish(0);
}

#[test]
fn relatives_of_every_kind_without_ebpf() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("one_memory", &[]);
    for name in ["first", "second"] {
        dump_and_restore(&tool, &mut target, name, |run| run.args(["--reader", "procfs"]));
        target.assert_well();
    }
    target.finish(0);
}

/// One address space of those that there are, and a little.
#[track_caller]
fn expect_once(pages: &Value, what: &str) {
    let pages = pages.as_u64().unwrap_or_else(|| panic!("{what}: {pages}"));
    assert!((PAGES..PAGES * 3 / 2).contains(&pages), "{what}: {pages} pages, and {PAGES} there are");
}

/// Dumps the tree as it runs with such options, and takes it back to that, twice. `check`: what the dump told.
fn out_and_back(options: &[&str], check: impl Fn(&Value)) -> Option<(Tool, Target)> {
    let tool = standstill()?;
    let mut target = target();
    target.assert_well();
    for name in ["first", "second"] {
        let images = target.images(name);
        let run = tool.dump(target.pid(), &images).args(["-R", "--json"]).args(options);
        check(&run.run().expect_success().json());
        expect_well(&mut target);
        take_back(&tool, &mut target, &images);
    }
    Some((tool, target))
}

#[test]
fn memory_is_copied_once() {
    let _turn = Turn::take();
    let done = out_and_back(&["--precopy=0"], |stats| {
        expect_once(&stats["pages_stored"], "copied under the freeze");
    });
    let Some((_, target)) = done else { return };
    target.finish(0);
}

#[test]
fn memory_is_tracked_once() {
    let _turn = Turn::take();
    let done = out_and_back(&["--precopy=6"], |stats| {
        expect_once(&stats["precopy"]["rounds"][0]["pages"], "copied in the first round");
    });
    let Some((tool, mut target)) = done else { return };
    snapshots_and_back(&tool, &mut target, "80ms", 8, 23);
    target.finish(0);
}

#[test]
fn memory_is_forked_once() {
    let _turn = Turn::take();
    let done = out_and_back(&["--precopy=0", "--snapshot", "fork"], |stats| {
        let phases = stats["phases"].as_array().expect("phases");
        assert!(phases.iter().any(|phase| phase[0] == "forks"), "nothing was copied from forks: {stats}");
    });
    let Some((_, target)) = done else { return };
    target.finish(0);
}
