//! Nothing may be left behind by a command that failed.

use std::fs;
use std::path::Path;
use std::time::Duration;

use nix::unistd::{Pid, getpid};

use super::{Pidfd, Target, Tool, proc, wait_until};

/// Fails when the directory holds anything but log files, or a process of the tool is still there.
#[track_caller]
pub fn expect_nothing_left(tool: &Tool, images: &Path) {
    let files = file_names(images);
    let left: Vec<&String> = files.iter().filter(|name| !name.ends_with(".log")).collect();
    assert!(left.is_empty(), "left in {}: {left:?}", images.display());
    expect_no_process(tool);
}

/// Fails when a process of the tool is still there, among our descendants: orphans become our children.
#[track_caller]
pub fn expect_no_process(tool: &Tool) {
    let is_tool = |pid: &Pid| fs::read_link(proc::path(*pid, "exe")).is_ok_and(|exe| exe == tool.path());
    let left = || proc::tree(getpid()).into_iter().filter(is_tool).collect::<Vec<Pid>>();
    let gone = wait_until(Duration::from_secs(5), || left().is_empty());
    assert!(gone, "processes of the tool are still there: {:?}", left());
}

/// Fails when a mapping of the target is still registered with a userfaultfd, or a process of it has one.
#[track_caller]
pub fn expect_not_tracked(target: &mut Target) {
    let processes = target.processes();
    let tracked = || processes.iter().flat_map(|pid| tracked_parts(*pid)).collect::<Vec<String>>();
    // The kernel takes the registrations away when the last descriptor is closed, soon after its owner's death.
    let free = wait_until(Duration::from_secs(3), || tracked().is_empty());
    assert!(free, "still tracked: {:#?}", tracked());
}

/// The target goes on as it was, knows its memory, and is not tracked.
#[track_caller]
pub fn expect_well(target: &mut Target) {
    target.assert_free();
    expect_not_tracked(target);
    target.assert_well();
}

/// Mappings and descriptors of a process that have to do with userfaultfd.
fn tracked_parts(pid: Pid) -> Vec<String> {
    let mut parts = Vec::new();
    let mut mapping = String::new();
    for line in proc::text(pid, "smaps").lines() {
        match line.strip_prefix("VmFlags:") {
            Some(flags) if flags.split(' ').any(|flag| matches!(flag, "uw" | "um" | "ui")) => {
                parts.push(format!("{pid}: {mapping}"));
            }
            Some(_) => {}
            None if line.split(' ').next().is_some_and(|range| range.contains('-')) => line.clone_into(&mut mapping),
            None => {}
        }
    }
    for fd in proc::numbers_in(&proc::path(pid, "fd")) {
        let link = fs::read_link(proc::path(pid, &format!("fd/{fd}"))).unwrap_or_default();
        if link.to_string_lossy().contains("userfaultfd") {
            parts.push(format!("{pid}: descriptor {fd}"));
        }
    }
    parts
}

/// Fails when any of these processes exists in any form.
#[track_caller]
pub fn expect_none_of(processes: &[Pid]) {
    // What a command has killed becomes ours when the command ends, and its pid is free once we have taken its status.
    for pidfd in processes.iter().filter_map(|pid| Pidfd::open(*pid).ok()) {
        pidfd.reap();
    }
    let left: Vec<&Pid> = processes.iter().filter(|pid| proc::state(**pid).is_some_and(|state| state != 'Z')).collect();
    assert!(left.is_empty(), "processes were left behind: {left:?}");
}

/// Names of the files in a directory, sorted.
pub fn file_names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap_or_else(|error| panic!("list {}: {error}", dir.display()));
    let name = |entry: std::io::Result<fs::DirEntry>| entry.ok()?.file_name().into_string().ok();
    let mut names: Vec<String> = entries.filter_map(name).collect();
    names.sort();
    names
}

/// Dumps with options that must make it fail with this status and one error line, and checks that the target did not
/// notice and that nothing is left.
#[track_caller]
pub fn expect_refused(tool: &Tool, target: &mut Target, options: &[&str], status: i32, words: &[&str]) {
    let images = target.images("refused");
    tool.dump(target.pid(), &images).args(options).run().expect_error(status, words);
    expect_nothing_left(tool, &images);
    target.assert_free();
    target.assert_well();
}
