//! System V shared memory: segments come back with their ids, whether they are still there or not.

use std::fs;

use standstill_tests::harness::left::{expect_no_process, expect_refused};
use standstill_tests::harness::{Target, Tool, Turn, dump_and_restore_twice, standstill};
use standstill_tests::workload::Segment;

/// The segments of a target that stay when it ends; removed when this is dropped.
struct Segments(Vec<Segment>);

impl Segments {
    fn of(target: &Target) -> Self {
        let ids = fs::read_to_string(target.dir().join("segments")).expect("read the ids");
        Self(ids.lines().map(|id| Segment { id: id.parse().expect("an id") }).collect())
    }
}

impl Drop for Segments {
    fn drop(&mut self) {
        for segment in &self.0 {
            segment.remove();
        }
    }
}

fn start(options: &[&str]) -> (Target, Segments) {
    let target = Target::workload("shared_mem", &[&["--system-v"], options].concat());
    let segments = Segments::of(&target);
    (target, segments)
}

#[test]
fn segments_that_are_still_there() {
    let _turn = Turn::take();
    let (mut target, _segments) = start(&[]);
    dump_and_restore_twice(&Tool::get(), &mut target, |run| run, &mut |target| {
        target.assert_well();
    });
    target.finish(0);
}

#[test]
fn segments_that_are_gone() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let (mut target, segments) = start(&[]);
    target.assert_well();
    let images = target.images("gone");
    tool.dump(target.pid(), &images).run().expect_success();
    target.await_gone();
    let key = segments.0[0].told().0;
    assert!(segments.0.iter().all(Segment::remove), "a segment was gone already");
    // Somebody else has taken the key.
    let other = Segment::new(key, 4096);
    let outcome = tool.restore(&images).arg("-d").run();
    assert!(other.remove());
    outcome.expect_error(1, &["System V", "key"]);
    expect_no_process(&tool);
    assert!(!segments.0.iter().any(Segment::remove), "a failed restore leaves a segment");
    tool.restore(&images).arg("-d").run().expect_success();
    target.assert_well();
    target.finish(0);
}

#[test]
fn segments_that_others_have() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let (mut target, segments) = start(&[]);
    let segment = &segments.0[1];
    let images = target.images("used");
    let ours = segment.attach(libc::SHM_RDONLY);
    tool.dump(target.pid(), &images).run().expect_error(4, &["System V", "outside of the tree"]);
    segment.detach(ours);
    target.assert_well();
    tool.dump(target.pid(), &images).run().expect_success();
    target.await_gone();
    let ours = segment.attach(libc::SHM_RDONLY);
    tool.restore(&images).arg("-d").run().expect_error(1, &["System V", "in use"]);
    segment.detach(ours);
    tool.restore(&images).arg("-d").run().expect_success();
    target.assert_well();
    target.finish(0);
}

#[test]
fn a_segment_of_which_a_part_is_unmapped() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let (mut target, _segments) = start(&["--in-part"]);
    expect_refused(&tool, &mut target, &[], 4, &["System V", "a part of it is unmapped"]);
}
