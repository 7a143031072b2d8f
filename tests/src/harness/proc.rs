//! What `/proc` says about processes.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use nix::unistd::Pid;

use crate::workload::proc_stat_fields;

/// A file below `/proc/<pid>`.
pub fn path(pid: Pid, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{name}"))
}

/// A file below `/proc/<pid>` as text; empty when it cannot be read.
pub fn text(pid: Pid, name: &str) -> String {
    fs::read(path(pid, name)).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

/// State letter of a process; none when there is no such process.
pub fn state(pid: Pid) -> Option<char> {
    stat(pid)?.first()?.chars().next()
}

/// Parent of a process.
pub fn parent(pid: Pid) -> Option<Pid> {
    stat(pid)?.get(1)?.parse().ok().map(Pid::from_raw)
}

/// Cpu time a process has used, in clock ticks.
pub fn cpu_ticks(pid: Pid) -> u64 {
    let stat = stat(pid).unwrap_or_default();
    [11, 12].into_iter().filter_map(|at| stat.get(at)?.parse::<u64>().ok()).sum()
}

fn stat(pid: Pid) -> Option<Vec<String>> {
    proc_stat_fields(path(pid, "stat").to_str()?).ok()
}

/// A line of `/proc/<pid>/status`.
pub fn status_line(pid: Pid, name: &str) -> Option<String> {
    let status = text(pid, "status");
    let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(value.trim().to_owned())
}

/// Numbers that are names of entries in a directory.
pub fn numbers_in(path: &std::path::Path) -> Vec<i32> {
    let Ok(entries) = fs::read_dir(path) else { return Vec::new() };
    let mut numbers: Vec<i32> = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    numbers.sort_unstable();
    numbers
}

/// Threads of a process.
pub fn threads(pid: Pid) -> Vec<Pid> {
    numbers_in(&path(pid, "task")).into_iter().map(Pid::from_raw).collect()
}

/// A process and all its descendants, parents first.
pub fn tree(root: Pid) -> Vec<Pid> {
    let mut children: BTreeMap<Pid, Vec<Pid>> = BTreeMap::new();
    for pid in numbers_in(std::path::Path::new("/proc")).into_iter().map(Pid::from_raw) {
        if let Some(parent) = parent(pid) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut tree = vec![root];
    let mut next = 0;
    while next < tree.len() {
        tree.extend(children.remove(&tree[next]).unwrap_or_default());
        next += 1;
    }
    tree
}
