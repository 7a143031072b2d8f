//! A copy of a tree's state, part by part, each with the time of its last change when it was read.

use super::programs::{Maps, Process};
use crate::{
    kernel::proc,
    observe::{FdEntry, Iterators, ProcessState, Result, Scope, VmaEntry, decode::Belongings, procfs},
};
use serde::{Deserialize, Serialize};
use standstill_ebpf_abi::track::part;
use standstill_images::types::SigAction;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::{Path, PathBuf},
};

/// What is known of a tracked tree.
#[derive(Debug, Serialize, Deserialize)]
pub struct Shadow {
    scope: Scope,
    processes: BTreeMap<i32, Copies>,
}

/// Parts of one process.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Copies {
    files: Option<Copy<Vec<FdEntry>>>,
    vmas: Option<Copy<Vec<VmaEntry>>>,
    sigactions: Option<Copy<Vec<SigAction>>>,
}

/// A part as it was read.
#[derive(Debug, Serialize, Deserialize)]
struct Copy<T> {
    stamp: Stamp,
    value: T,
}

/// When what a copy depends on last changed. The same stamp twice means that nothing changed in between.
type Stamp = Vec<u64>;

/// Whether the copy of a part has this stamp.
fn is_fresh<T>(copy: &Option<Copy<T>>, stamp: &Option<Stamp>) -> bool {
    matches!((copy, stamp), (Some(copy), Some(stamp)) if copy.stamp == *stamp)
}

/// Names of mapped files, each looked at once: anybody on the machine may rename or remove a file, or what is above it,
/// and no tracepoint tells.
#[derive(Default)]
struct Names<'a>(HashMap<(u64, u64, &'a Path), bool>);

impl<'a> Names<'a> {
    fn are_true(&mut self, pid: i32, vmas: &'a [VmaEntry]) -> bool {
        vmas.iter().filter(|v| v.ino != 0).all(|v| {
            *self.0.entry((v.dev, v.ino, &v.name)).or_insert_with(|| {
                let link = proc::path(pid, &format!("map_files/{:x}-{:x}", v.start, v.end));
                std::fs::read_link(link).is_ok_and(|name| name == v.name)
            })
        })
    }

    /// Whether a copy of mappings is true.
    fn are_fresh(&mut self, pid: i32, copy: &'a Option<Copy<Vec<VmaEntry>>>, stamp: &Option<Stamp>) -> bool {
        is_fresh(copy, stamp) && copy.as_ref().is_some_and(|copy| self.are_true(pid, &copy.value))
    }
}

/// Stamps of one process; `None`: the part cannot be known.
#[derive(Debug, Default)]
struct Stamps {
    files: Option<Stamp>,
    vmas: Option<Stamp>,
    sigactions: Option<Stamp>,
}

impl Stamps {
    fn of(pid: i32, process: &Belongings, maps: &Maps) -> Result<Self> {
        let Some(tracked) = maps.process(pid)? else { return Ok(Self::default()) };
        let at = |tracked: &Process, part: u16| tracked[1 + part.trailing_zeros() as usize];
        let stamp = |part| vec![tracked[0], at(&tracked, part)];
        // PR_SET_MM changes which mappings are called heap and stack, without the lock of the memory.
        let [brk_start, brk, stack] = process.named;
        let space = maps.space(process.mm)?.map(|changed| [process.mm, changed, brk_start, brk, stack]);
        Ok(Self {
            files: Some(stamp(part::FILES)),
            vmas: space.map(|space| [stamp(part::MEMORY), space.to_vec()].concat()),
            sigactions: Some(stamp(part::SIGNALS)),
        })
    }
}

/// Which parts of the copy are true.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Freshness {
    /// Processes whose descriptors are: which ones there are, what they refer to, and FD_CLOEXEC. Offsets, flags and
    /// sizes are never taken from the copy.
    pub files: BTreeSet<i32>,
    /// Processes whose mappings are.
    pub vmas: BTreeSet<i32>,
    /// Processes whose signal actions are.
    pub sigactions: BTreeSet<i32>,
    /// Parts that were asked for: those that the tracker's [`Scope`] covers.
    pub parts: usize,
}

impl Freshness {
    /// Share of the parts that are true, from 0 to 1.
    pub fn share(&self) -> f64 {
        let fresh = self.files.len() + self.vmas.len() + self.sigactions.len();
        if self.parts == 0 { 1.0 } else { fresh as f64 / self.parts as f64 }
    }
}

/// A place where a fresh part of the copy is not what is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Process.
    pub pid: i32,
    /// The part.
    pub part: &'static str,
    /// What was expected and what is there.
    pub what: String,
}

impl Shadow {
    pub(super) fn new(scope: Scope) -> Self {
        Self { scope, processes: BTreeMap::new() }
    }

    /// Processes that are known.
    pub fn pids(&self) -> impl Iterator<Item = i32> {
        self.processes.keys().copied()
    }

    /// The copy of a process's descriptors, without paths.
    pub fn files(&self, pid: i32) -> Option<&[FdEntry]> {
        Some(&self.processes.get(&pid)?.files.as_ref()?.value)
    }

    /// The copy of a process's mappings.
    pub fn vmas(&self, pid: i32) -> Option<&[VmaEntry]> {
        Some(&self.processes.get(&pid)?.vmas.as_ref()?.value)
    }

    /// The copy of a process's mappings, which is gone from here then.
    pub(super) fn take_vmas(&mut self, pid: i32) -> Option<Vec<VmaEntry>> {
        Some(self.processes.get_mut(&pid)?.vmas.take()?.value)
    }

    /// Reads the parts that are not fresh.
    pub(super) fn refresh(&mut self, maps: &Maps, iterators: &mut Iterators) -> Result<()> {
        let pids = maps.pids()?;
        let known: BTreeSet<i32> = pids.iter().copied().collect();
        self.processes.retain(|pid, _| known.contains(pid));
        let stamps = self.stamps(&pids, &iterators.belongings(&pids)?, maps)?;
        let mut stale = (Vec::new(), Vec::new(), Vec::new());
        pids.iter().for_each(|pid| _ = self.processes.entry(*pid).or_default());
        let mut names = Names::default();
        for &pid in &pids {
            let (copies, now) = (&self.processes[&pid], &stamps[&pid]);
            for (is_stale, list) in [
                (now.files.is_some() && !is_fresh(&copies.files, &now.files), &mut stale.0),
                (now.vmas.is_some() && !names.are_fresh(pid, &copies.vmas, &now.vmas), &mut stale.1),
                (now.sigactions.is_some() && !is_fresh(&copies.sigactions, &now.sigactions), &mut stale.2),
            ] {
                if is_stale {
                    list.push(pid);
                }
            }
        }
        // A process that changes or ends while it is read may give nonsense or an error: its copy stays stale then.
        for (pid, files) in by_process(&stale.0, read_files(iterators, &stale.0)) {
            self.keep(pid, |c| &mut c.files, &stamps[&pid].files, files);
        }
        let mut vmas = if stale.1.is_empty() { Vec::new() } else { iterators.vmas(&stale.1).unwrap_or_default() };
        // The first write to a mapping is no system call: nothing would tell that this is not so any more.
        vmas.iter_mut().for_each(|v| v.untouched = false);
        for (pid, vmas) in by_process(&stale.1, vmas.into_iter().map(|v| (v.tgid, v)).collect()) {
            self.keep(pid, |c| &mut c.vmas, &stamps[&pid].vmas, vmas);
        }
        let states = if stale.2.is_empty() { Vec::new() } else { iterators.processes(&stale.2).unwrap_or_default() };
        for ProcessState { tgid, sigactions, .. } in states {
            if let Some(stamps) = stamps.get(&tgid) {
                self.keep(tgid, |c| &mut c.sigactions, &stamps.sigactions, sigactions);
            }
        }
        Ok(())
    }

    fn keep<T>(&mut self, pid: i32, part: impl Fn(&mut Copies) -> &mut Option<Copy<T>>, at: &Option<Stamp>, value: T) {
        if let (Some(copies), Some(stamp)) = (self.processes.get_mut(&pid), at) {
            *part(copies) = Some(Copy { stamp: stamp.clone(), value });
        }
    }

    /// Which parts are true now.
    pub(super) fn check(&self, pids: &[i32], all: &HashMap<i32, Belongings>, maps: &Maps) -> Result<Freshness> {
        let of_each = if self.scope == Scope::Syscalls { 3 } else { 1 };
        let mut fresh = Freshness { parts: of_each * pids.len(), ..Freshness::default() };
        let mut names = Names::default();
        for (pid, stamps) in self.stamps(pids, all, maps)? {
            let Some(copies) = self.processes.get(&pid) else { continue };
            for (is_fresh, set) in [
                (is_fresh(&copies.files, &stamps.files), &mut fresh.files),
                (names.are_fresh(pid, &copies.vmas, &stamps.vmas), &mut fresh.vmas),
                (is_fresh(&copies.sigactions, &stamps.sigactions), &mut fresh.sigactions),
            ] {
                if is_fresh {
                    set.insert(pid);
                }
            }
        }
        Ok(fresh)
    }

    /// What the programs say of the processes now.
    fn stamps(&self, pids: &[i32], all: &HashMap<i32, Belongings>, maps: &Maps) -> Result<HashMap<i32, Stamps>> {
        // Whoever shares a table changes it for others, and the programs note that at one process only.
        let count = |of: fn(&Belongings) -> u64| {
            let mut owners: HashMap<u64, usize> = HashMap::new();
            all.values().for_each(|process| *owners.entry(of(process)).or_default() += 1);
            owners
        };
        let (tables, handlers) = (count(|p| p.files.unwrap_or(0)), count(|p| p.sighand));
        let calls = self.scope == Scope::Syscalls;
        let stamps = |pid| {
            let Some(process) = all.get(&pid) else { return Ok(Stamps::default()) };
            let mut stamps = Stamps::of(pid, process, maps)?;
            let alone = process.files.is_some_and(|table| tables[&table] == 1);
            stamps.files = stamps.files.filter(|_| calls && alone);
            stamps.sigactions = stamps.sigactions.filter(|_| calls && handlers[&process.sighand] == 1);
            Ok(stamps)
        };
        pids.iter().map(|&pid| Ok((pid, stamps(pid)?))).collect()
    }

    /// Compares the fresh parts with the truth.
    pub(super) fn compare(&self, fresh: &Freshness, iterators: &mut Iterators) -> Result<Vec<Difference>> {
        let mut all = Vec::new();
        for &pid in &fresh.files {
            let mut truth: Vec<FdEntry> = procfs::files(&[pid])?;
            renumber(&mut truth);
            let copy = self.files(pid).unwrap_or_default();
            note(&mut all, pid, "descriptors", copy.iter().map(identity), truth.iter().map(identity));
        }
        for &pid in &fresh.vmas {
            let truth = procfs::vmas(&[pid])?;
            note(&mut all, pid, "mappings", self.vmas(pid).unwrap_or_default().iter(), truth.iter());
        }
        let pids: Vec<i32> = fresh.sigactions.iter().copied().collect();
        let states = if pids.is_empty() { Vec::new() } else { iterators.processes(&pids)? };
        for state in states.iter().filter(|s| fresh.sigactions.contains(&s.tgid)) {
            let copy = self.processes[&state.tgid].sigactions.iter().flat_map(|c| &c.value);
            note(&mut all, state.tgid, "signal actions", copy, state.sigactions.iter());
        }
        Ok(all)
    }
}

fn read_files(iterators: &mut Iterators, pids: &[i32]) -> Vec<(i32, FdEntry)> {
    if pids.is_empty() {
        return Vec::new();
    }
    let files = iterators.files(pids).unwrap_or_default().into_iter();
    // Nobody takes a path from the copy: anybody may rename a file.
    files.map(|f| (f.tgid, FdEntry { path: PathBuf::new(), ..f })).collect()
}

/// Groups entries; each process that was read has a group.
fn by_process<T: Renumber>(pids: &[i32], entries: Vec<(i32, T)>) -> BTreeMap<i32, Vec<T>> {
    let mut groups: BTreeMap<i32, Vec<T>> = BTreeMap::new();
    for (pid, entry) in entries {
        groups.entry(pid).or_default().push(entry);
    }
    groups.retain(|pid, _| pids.contains(pid));
    groups.values_mut().for_each(|group| T::renumber(group));
    groups
}

/// Entries whose numbers mean something only within one reading.
trait Renumber: Sized {
    fn renumber(_: &mut [Self]) {}
}

impl Renumber for VmaEntry {}

impl Renumber for FdEntry {
    fn renumber(entries: &mut [Self]) {
        renumber(entries);
    }
}

/// Numbers the open files of one process from 0, by their first descriptors.
fn renumber(entries: &mut [FdEntry]) {
    let mut ids = HashMap::new();
    for entry in entries {
        let next = ids.len() as u32;
        entry.file.0 = *ids.entry(entry.file.0).or_insert(next);
    }
}

/// What of a descriptor only its own process changes, by system calls of its own.
fn identity(entry: &FdEntry) -> (i32, u32, bool, u64, u64, u64) {
    (entry.fd, entry.file.0, entry.cloexec, entry.dev, entry.ino, entry.rdev)
}

fn note<T: PartialEq + std::fmt::Debug>(
    all: &mut Vec<Difference>,
    pid: i32,
    part: &'static str,
    mut copy: impl Iterator<Item = T>,
    mut truth: impl Iterator<Item = T>,
) {
    loop {
        match (copy.next(), truth.next()) {
            (None, None) => return,
            (expected, there) if expected == there => {}
            (expected, there) => {
                all.push(Difference { pid, part, what: format!("{expected:?} in the copy is {there:?}") });
                return;
            }
        }
    }
}
