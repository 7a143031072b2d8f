//! Files and directories that have lost the name under which they were opened.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use standstill_tests::harness::left::{expect_no_process, expect_nothing_left, expect_refused};
use standstill_tests::harness::{Target, Turn, dump_and_restore, dump_and_restore_twice, say, standstill};

/// The links that dumps have made for a target.
fn links(target: &Target) -> Vec<PathBuf> {
    let entries = fs::read_dir(target.dir().join("unnamed")).expect("list the files").flatten();
    let names = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(".standstill-link."));
    names.map(|entry| entry.path()).collect()
}

#[test]
fn files_that_have_other_names() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("unnamed", &[]);
    target.assert_well();
    expect_refused(&tool, &mut target, &[], 4, &["its name is gone", "--link-remap"]);
    expect_refused(&tool, &mut target, &["--reader", "procfs"], 4, &["its name is gone", "--link-remap"]);
    for reader in ["auto", "procfs"] {
        let images = target.images(reader);
        tool.dump(target.pid(), &images).args(["--link-remap", "--reader", reader]).run().expect_success();
        target.await_gone();
        // One for each file, however often it is open.
        assert_eq!(links(&target).len(), 2, "{:?}", links(&target));
        let shown = tool.command(["inspect", "-D"]).arg(&images).run().expect_success();
        assert!(shown.stdout.contains("linked to as"), "{shown}");
        tool.restore(&images).arg("-d").run().expect_success();
        assert!(links(&target).is_empty(), "links are left");
        target.assert_well();
        tool.restore(&images).arg("-d").run().expect_error(7, &["the first restore removes it"]);
    }
    target.finish(0);
}

fn directories(options: &[&str]) {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("directories", options);
    target.assert_well();
    dump_and_restore_twice(&tool, &mut target, |run| run, &mut |target| {
        target.assert_well();
    });
    dump_and_restore(&tool, &mut target, "procfs", |run| run.args(["--reader", "procfs"]));
    target.assert_well();
    target.finish(0);
}

#[test]
fn removed_directories() {
    directories(&[]);
}

#[test]
fn directories_of_a_dead_process() {
    directories(&["--dead"]);
}

#[test]
fn a_directory_of_a_dead_process_whose_number_another_has() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("directories", &["--reused"]);
    expect_refused(&tool, &mut target, &[], 4, &["/proc/", "another has the number"]);
    target.finish(0);
}

#[test]
fn a_symbolic_link() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("directories", &[]);
    let (images, link) = (target.images("image"), target.dir().join("link"));
    tool.dump(target.pid(), &images).run().expect_success();
    target.await_gone();
    fs::rename(&link, target.dir().join("kept")).expect("rename the link");
    fs::write(&link, "a file").expect("write a file");
    tool.restore(&images).arg("-d").run().expect_error(7, &["link", "not a symbolic link"]);
    expect_no_process(&tool);
    fs::rename(target.dir().join("kept"), link).expect("rename the link");
    tool.restore(&images).arg("-d").run().expect_success();
    target.assert_well();
    target.finish(0);
}

#[test]
fn a_symbolic_link_without_its_name() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("directories", &["--unlink"]);
    expect_refused(&tool, &mut target, &[], 4, &["link (deleted)", "its name is gone"]);
    target.finish(0);
}

#[test]
fn a_removed_directory_that_is_there_again() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("directories", &[]);
    let images = target.images("image");
    tool.dump(target.pid(), &images).run().expect_success();
    target.await_gone();
    let again = target.dir().join("gone/inner");
    fs::create_dir_all(&again).expect("make directories");
    tool.restore(&images).arg("-d").run().expect_error(7, &["gone", "is there again"]);
    expect_no_process(&tool);
    fs::remove_dir(again).expect("it is left alone");
    fs::remove_dir(target.dir().join("gone")).expect("it is left alone");
    tool.restore(&images).arg("-d").run().expect_success();
    target.assert_well();
    target.finish(0);
}

#[test]
fn links_of_a_dump_that_fails() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("unnamed", &["--ring"]);
    expect_refused(&tool, &mut target, &["--link-remap"], 4, &["io_uring"]);
    assert!(links(&target).is_empty(), "links are left");
    target.finish(0);
}

#[test]
fn links_of_a_restore_that_fails() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("unnamed", &[]);
    let images = target.images("image");
    tool.dump(target.pid(), &images).args(["--link-remap", "-R"]).run().expect_success();
    let made = links(&target);
    assert_eq!(made.len(), 2);
    target.assert_free();
    tool.restore(&images).arg("-d").run().expect_error(8, &[&target.pid().to_string()]);
    assert_eq!(links(&target), made);
    target.kill_tree();
    tool.restore(&images).arg("-d").run().expect_success();
    assert!(links(&target).is_empty(), "links are left");
    target.assert_well();
    target.finish(0);
}

#[test]
fn links_of_killed_dumps() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("unnamed", &[]);
    let images = target.images("killed");
    let dump = || tool.dump(target.pid(), &images).args(["--link-remap", "-R"]);
    let usual = (0..3).map(|_| dump().run().expect_success().wall).min().expect("three dumps");
    links(&target).iter().for_each(|link| fs::remove_file(link).expect("remove a link"));
    let (mut killed, mut left) = (0, 0);
    for number in 0..50 {
        let running = dump().spawn();
        thread::sleep(usual.mul_f64(f64::from(number) / 30.0));
        running.kill();
        killed += i32::from(running.wait().signal.is_some());
        expect_no_process(&tool);
        // What is left can be told by its name, and does no harm.
        target.assert_well();
        let links = links(&target);
        left += links.len();
        links.iter().for_each(|link| fs::remove_file(link).expect("remove a link"));
    }
    say(&format!("{killed} of 50 dumps were killed, {left} links were left"));
    assert!(killed > 10 && left > 0, "the instants do not fit: {killed} killed, {left} links");
    thread::sleep(Duration::from_millis(100));
    target.assert_free();
    target.assert_well();
    fs::remove_dir_all(&images).expect("remove the images");
    let images = target.images("after");
    tool.dump(target.pid(), &images).run().expect_error(4, &["--link-remap"]);
    expect_nothing_left(&tool, &images);
    target.finish(0);
}
