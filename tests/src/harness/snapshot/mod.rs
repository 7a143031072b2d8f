//! What can be seen of a process tree from outside, for comparing before with after.

mod memory;
mod restored;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use nix::unistd::Pid;

pub use memory::Memory;

use super::proc;
use crate::workload::proc_stat_fields;

/// Facts about a tree, by name. Names start with the pid, or with pid and tid.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    pub(super) facts: BTreeMap<String, String>,
}

/// Files below `/proc/<pid>` that are taken as they are.
const FILES: [&str; 10] = [
    "cmdline",
    "environ",
    "auxv",
    "limits",
    "personality",
    "oom_score_adj",
    "coredump_filter",
    "timers",
    "setgroups",
    "timerslack_ns",
];

/// Lines of status files that count events or change by themselves.
const VOLATILE_STATUS: [&str; 13] = [
    "State",
    "SigQ",
    "VmPeak",
    "VmHWM",
    "VmRSS",
    "RssAnon",
    "RssFile",
    "RssShmem",
    "VmPTE",
    "VmSwap",
    "HugetlbPages",
    "nonvoluntary_ctxt_switches",
    "untag_mask",
];

/// How often a thread has gone to sleep: tells a parked thread from one that comes by the same place again and again.
const SWITCHES: &str = "voluntary_ctxt_switches";

/// System calls that run with a mask of their own: rt_sigtimedwait, rt_sigsuspend, pselect6, ppoll, epoll_pwait.
const CHANGE_MASK: [&str; 5] = ["128", "130", "270", "271", "281"];

/// In place of the mask during such a call.
const MASK_OF_CALL: &str = "that of the system call";

/// Fields of stat files that must stay, by their number in proc(5).
const STAT_FIELDS: [(usize, &str); 16] = [
    (4, "parent"),
    (5, "group"),
    (6, "session"),
    (7, "tty"),
    (19, "nice"),
    (22, "start time"),
    (26, "start of code"),
    (27, "end of code"),
    (28, "start of stack"),
    (38, "exit signal"),
    (41, "policy"),
    (45, "start of data"),
    (46, "end of data"),
    (47, "start of heap"),
    (48, "start of arguments"),
    (51, "end of environment"),
];

/// The same for zombies.
const ZOMBIE_FIELDS: [(usize, &str); 6] =
    [(3, "state"), (4, "parent"), (5, "group"), (6, "session"), (38, "exit signal"), (52, "exit code")];

impl Snapshot {
    /// Looks at processes and their threads.
    pub fn take(pids: &[Pid]) -> Self {
        let mut snapshot = Self::default();
        for pid in pids {
            snapshot.process(*pid);
        }
        snapshot
    }

    fn process(&mut self, pid: Pid) {
        let key = |name: &str| format!("{pid} {name}");
        if proc::state(pid) == Some('Z') {
            self.zombie(pid);
            return;
        }
        for file in FILES {
            self.add(key(file), proc::text(pid, file));
        }
        // Named hierarchies may be mounted by anybody at any time.
        let cgroup = proc::text(pid, "cgroup");
        self.add(key("cgroup"), cgroup.lines().filter(|line| !line.contains("name=")).collect::<Vec<_>>().join("\n"));
        for link in ["cwd", "root", "exe"] {
            self.add(key(link), link_text(&proc::path(pid, link)));
        }
        for line in proc::text(pid, "maps").lines() {
            let (range, rest) = line.split_once(' ').unwrap_or((line, ""));
            let (start, end) = range.split_once('-').unwrap_or((range, ""));
            let words: Vec<&str> = rest.splitn(5, ' ').map(str::trim).collect();
            self.add(key(&format!("map {start:0>16}")), format!("{end:0>16} {}", words.join(" ")));
        }
        for fd in proc::numbers_in(&proc::path(pid, "fd")) {
            self.add(key(&format!("fd {fd:05}")), link_text(&proc::path(pid, &format!("fd/{fd}"))));
            let info = proc::text(pid, &format!("fdinfo/{fd}"));
            // The rest of a timer's time runs on.
            let lines = info.lines().filter(|line| !line.starts_with("it_value") && !line.starts_with("ticks"));
            self.add(key(&format!("fdinfo {fd:05}")), lines.collect::<Vec<_>>().join("\n"));
        }
        for thread in proc::threads(pid) {
            self.thread(pid, thread);
        }
    }

    /// Of a zombie nothing is left but its place in the tree and how it ended.
    fn zombie(&mut self, pid: Pid) {
        let stat = proc_stat_fields(&format!("/proc/{pid}/stat")).unwrap_or_default();
        for (number, name) in ZOMBIE_FIELDS {
            self.add(format!("{pid}/{pid} {name}"), stat.get(number - 3).cloned().unwrap_or_default());
        }
        self.add(format!("{pid}/{pid} Name"), proc::text(pid, "comm"));
    }

    fn thread(&mut self, pid: Pid, thread: Pid) {
        let key = |name: &str| format!("{pid}/{thread} {name}");
        let file = |name: &str| proc::text(pid, &format!("task/{thread}/{name}"));
        let syscall = file("syscall");
        for (name, value) in file("status").lines().filter_map(|line| line.split_once(':')) {
            if !VOLATILE_STATUS.contains(&name) {
                self.add(key(name), value.trim().to_owned());
            }
        }
        let number = syscall.split(' ').next();
        if number.is_some_and(|number| CHANGE_MASK.contains(&number)) {
            self.add(key("SigBlk"), MASK_OF_CALL.to_owned());
        }
        let stat = proc_stat_fields(&format!("/proc/{pid}/task/{thread}/stat")).unwrap_or_default();
        let state = match stat.first().map(String::as_str) {
            Some("R" | "S" | "D") => "runs",
            Some(other) => other,
            None => "none",
        };
        self.add(key("state"), state.to_owned());
        for (number, name) in STAT_FIELDS {
            self.add(key(name), stat.get(number - 3).cloned().unwrap_or_default());
        }
        self.add(key("syscall"), significant(&syscall));
        self.add(key("children"), file("children"));
    }

    fn add(&mut self, name: String, value: String) {
        self.facts.insert(name, value);
    }

    /// Number of facts, so that a test can say that it compared something.
    pub fn len(&self) -> usize {
        self.facts.len()
    }

    /// True when there is nothing to compare.
    pub fn is_empty(&self) -> bool {
        self.facts.is_empty()
    }

    /// The facts that two snapshots of an undisturbed tree have in common: those that stay by themselves.
    pub fn stable(&self, later: &Self) -> Self {
        let equal = |name: &str| self.facts.get(name) == later.facts.get(name);
        let stable = |name: &str| match name.strip_suffix("syscall") {
            Some(thread) => equal(name) && equal(&format!("{thread}{SWITCHES}")),
            None => equal(name) && !name.ends_with(SWITCHES),
        };
        let facts = self.facts.iter().filter(|(name, _)| stable(name));
        Self { facts: facts.map(|(name, value)| (name.clone(), value.clone())).collect() }
    }

    /// The facts that are not the same in the other snapshot.
    pub fn differing(&self, other: &Self) -> Self {
        let facts = self.facts.iter().filter(|(name, was)| !same(name, was, other.facts.get(*name)));
        Self { facts: facts.map(|(name, value)| (name.clone(), value.clone())).collect() }
    }

    /// Descriptors that are new: what a dump might leave in a target.
    pub fn new_descriptors(&self, after: &Self) -> Vec<String> {
        self.new_facts(after, " fd ")
    }

    /// Mappings that are new, but for the heap.
    pub fn new_mappings(&self, after: &Self) -> Vec<String> {
        let mut new = self.new_facts(after, " map ");
        new.retain(|map| !map.contains("[heap]"));
        new
    }

    fn new_facts(&self, after: &Self, kind: &str) -> Vec<String> {
        // A process that is new has all its objects to itself.
        let known =
            |name: &str| name.split(' ').next().is_some_and(|pid| self.facts.contains_key(&format!("{pid} exe")));
        let facts = after.facts.iter().filter(|(name, _)| name.contains(kind) && known(name));
        let new = facts.filter(|(name, _)| !self.facts.contains_key(*name));
        new.map(|(name, is)| format!("{name}: new, is {is:?}")).collect()
    }

    /// Facts that are no longer as they were, and with `also_new` those that were not there before.
    pub fn changes(&self, after: &Self, also_new: bool) -> Vec<String> {
        let mut changes: Vec<String> = Vec::new();
        for (name, was) in &self.differing(after).facts {
            match after.facts.get(name) {
                Some(is) => changes.push(format!("{name}: {}", difference(was, is))),
                None => changes.push(format!("{name}: gone, was {was:?}")),
            }
        }
        if also_new {
            let new = after.facts.iter().filter(|(name, _)| !self.facts.contains_key(*name));
            changes.extend(new.map(|(name, is)| format!("{name}: new, is {is:?}")));
        }
        changes
    }
}

/// True when a fact is as it was, as far as it should be.
fn same(name: &str, was: &str, is: Option<&String>) -> bool {
    let waits = |value: &str| value == MASK_OF_CALL;
    name.ends_with(SWITCHES) || is.is_some_and(|is| is == was || resumed(name, was, is) || waits(is) || waits(was))
}

/// The system call of a thread. The kernel itself ends epoll_wait(2) and rt_sigtimedwait(2) with `EINTR` at any stop,
/// after which a program calls them again: then the registers behind their four arguments may hold something else.
fn significant(syscall: &str) -> String {
    let words: Vec<&str> = syscall.split_whitespace().collect();
    match words.as_slice() {
        [number @ ("128" | "232" | "281"), arguments @ .., sp, ip] => {
            format!("{number} {} … {sp} {ip}", arguments[..4].join(" "))
        }
        words => words.join(" "),
    }
}

/// A thread that sleeps for a certain time goes on in restart_syscall(2) after any stop; that is the kernel's doing.
/// Everything else must be the same, and so must its instruction and stack pointer.
fn resumed(name: &str, was: &str, is: &str) -> bool {
    let pointers = |text: &str| text.split_whitespace().rev().take(2).map(str::to_owned).collect::<Vec<_>>();
    name.ends_with(" syscall") && is.starts_with("219 ") && !was.starts_with("running") && pointers(was) == pointers(is)
}

/// Two values, cut down to where they differ when they are long.
fn difference(was: &str, is: &str) -> String {
    if was.len() + is.len() < 400 {
        return format!("was {was:?}, is {is:?}");
    }
    let lines = was.lines().zip(is.lines()).filter(|(was, is)| was != is).take(3);
    format!("lines {:?}", lines.collect::<Vec<_>>())
}

fn link_text(path: &Path) -> String {
    fs::read_link(path).map_or_else(|error| error.to_string(), |target| target.display().to_string())
}
