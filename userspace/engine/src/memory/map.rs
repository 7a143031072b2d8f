//! The address space in the restorer's words: what to map, what to read where, and what only becomes right at the end.

use crate::{
    image::{is_private, push_run},
    kernel::{PAGE, pagemap::Range},
    memory::{pages::PageFiles, ranges},
    objects::system_v,
    restore::program::{Arg, Program},
    tree::attributes,
};
use standstill_images::types::{
    AddressSpace, Backing, MemoryPolicy, OpenFileId, PageRun, SharedMemory, SharedMemoryId, SharedMemoryKind, Vma,
};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Descriptors that a task holds while it maps its memory.
pub(crate) struct MapFds<'a> {
    pub files: &'a HashMap<OpenFileId, i32>,
    pub shared: &'a HashMap<SharedMemoryId, i32>,
    pub objects: &'a BTreeMap<SharedMemoryId, SharedMemory>,
    pub pages: &'a PageFiles,
}

const WRITE: u8 = libc::PROT_WRITE as u8;

/// Whether a mapping is made by other means than mmap(2), and later.
fn is_special(vma: &Vma) -> bool {
    matches!(vma.backing, Backing::Kernel { .. } | Backing::AioRing { .. })
}

/// Whether `parent` has exactly the same private mapping, so that its child need not make it.
pub(super) fn is_inherited(vma: &Vma, parent: &AddressSpace) -> bool {
    is_private(vma)
        && parent.vmas.binary_search_by_key(&vma.start, |v| v.start).is_ok_and(|i| {
            let theirs = &parent.vmas[i];
            theirs.end == vma.end && theirs.backing == vma.backing && theirs.flags == vma.flags
        })
}

/// Ranges of `parent` that the child does not keep. Attributes that change what a fork copies are set only after all
/// forks, so the child has all of the parent's mappings.
pub(crate) fn to_unmap(space: &AddressSpace, parent: &AddressSpace) -> Vec<(u64, u64)> {
    parent
        .vmas
        .iter()
        .filter(|v| !is_special(v))
        .filter(|v| {
            let same = space.vmas.binary_search_by_key(&v.start, |o| o.start).map(|i| &space.vmas[i]);
            !same.is_ok_and(|own| is_inherited(own, parent))
        })
        .map(|v| (v.start, v.end))
        .collect()
}

/// Memory policies of mappings, by address: start, end, policy.
pub(crate) type MemoryPolicies = [(u64, u64, MemoryPolicy)];

/// What a task has when it begins: the mappings its parent had when it forked.
#[derive(Clone, Copy)]
pub(crate) struct Inherited<'a> {
    pub space: &'a AddressSpace,
    pub prots: &'a Prots,
    pub policies: &'a MemoryPolicies,
}

/// Protections in force while memory is being restored, by start address. A mapping that gets content is writable
/// until all children are forked, because they may have to write to it too.
pub(crate) type Prots = HashMap<u64, u8>;

/// Maps everything and reads the pages: of equal mappings of the parent only those that differ.
pub(crate) fn restore(
    (space, policies): (&AddressSpace, &MemoryPolicies),
    inherited: Option<Inherited<'_>>,
    fds: &MapFds<'_>,
    program: &mut Program,
) -> Prots {
    let mut prots = Prots::new();
    let (kept, new): (Vec<_>, Vec<_>) = space
        .vmas
        .iter()
        .filter(|v| !is_special(v))
        .map(|vma| Wanted { vma, own: cut(&space.pages, vma) })
        .partition(|wanted| inherited.is_some_and(|i| is_inherited(wanted.vma, i.space)));
    for joined in new.chunk_by(Wanted::joins) {
        let first = &joined[0];
        let whole = Vma { end: joined[joined.len() - 1].vma.end, ..first.vma.clone() };
        let prot = map(&whole, first.prot(), fds, program);
        joined.iter().for_each(|wanted| set_policy(wanted.vma, policy_of(policies, wanted.vma), None, program));
        read(joined.iter().flat_map(|wanted| &wanted.own), fds.pages, program);
        prots.extend(joined.iter().map(|wanted| (wanted.vma.start, prot)));
    }
    let Some(parent) = inherited else { return prots };
    for Wanted { vma, own } in kept {
        set_policy(vma, policy_of(policies, vma), policy_of(parent.policies, vma), program);
        let (runs, gone) = differing(vma, &own, &cut(&parent.space.pages, vma));
        let mut prot = parent.prots[&vma.start];
        if !runs.is_empty() && prot & WRITE == 0 {
            prot |= WRITE;
            protect(vma, prot, program);
        }
        for (start, pages) in gone {
            let args = [start.into(), (pages * PAGE).into(), libc::MADV_DONTNEED.into()];
            program.call("drop pages that only the parent has", libc::SYS_madvise, &args);
        }
        read(&runs, fds.pages, program);
        prots.insert(vma.start, prot);
    }
    prots
}

fn policy_of<'a>(policies: &'a MemoryPolicies, vma: &Vma) -> Option<&'a MemoryPolicy> {
    policies.binary_search_by_key(&vma.start, |p| p.0).ok().map(|n| &policies[n].2)
}

/// Sets the memory policy of a mapping that has another one, before it gets pages.
fn set_policy(vma: &Vma, wanted: Option<&MemoryPolicy>, now: Option<&MemoryPolicy>, program: &mut Program) {
    if wanted != now {
        let (mode, nodes, bits) = attributes::policy_arguments(wanted, program);
        let args = [vma.start.into(), (vma.end - vma.start).into(), mode, nodes, bits, 0.into()];
        program.call(format!("set the memory policy of {:x}-{:x}", vma.start, vma.end), libc::SYS_mbind, &args);
    }
}

/// A mapping and its pages.
struct Wanted<'a> {
    vma: &'a Vma,
    own: Vec<PageRun>,
}

impl Wanted<'_> {
    /// The protection that it needs to get its pages.
    fn prot(&self) -> u8 {
        if self.own.is_empty() { self.vma.prot } else { self.vma.prot | WRITE }
    }

    /// Whether the kernel would make both of them one mapping, until they get their final protections and attributes: two
    /// calls less for each, and reads that are as long as the memory is. Memory that nobody may write to is not accounted
    /// for (overcommit), and stays apart.
    fn joins(&self, next: &Self) -> bool {
        let (a, b) = (self.vma, next.vma);
        let plain =
            |v: &Vma| matches!(v.backing, Backing::Anonymous { .. }) && !v.flags.growsdown && !v.flags.droppable;
        let advice = |v: &Vma| (v.flags.noreserve, v.flags.hugepage, v.flags.nohugepage);
        let writable = self.prot() & WRITE != 0 && self.prot() == next.prot();
        a.end == b.start && writable && plain(a) && plain(b) && advice(a) == advice(b)
    }
}

/// Files that the mappings not inherited need.
pub(crate) fn files_needed(space: &AddressSpace, inherited: Option<Inherited<'_>>) -> BTreeSet<OpenFileId> {
    space
        .vmas
        .iter()
        .filter(|v| !inherited.is_some_and(|i| is_inherited(v, i.space)))
        .filter_map(|v| match v.backing {
            Backing::PrivateFile { file, .. } | Backing::SharedFile { file, .. } | Backing::HugePages { file, .. } => {
                Some(file)
            }
            _ => None,
        })
        .collect()
}

/// Brings protections and attributes to their final state, once all children are forked.
pub(crate) fn finish(space: &AddressSpace, prots: &Prots, program: &mut Program) {
    for vma in space.vmas.iter().filter(|v| !is_special(v)) {
        if prots[&vma.start] != vma.prot {
            protect(vma, vma.prot, program);
        }
        advise(vma, program);
    }
    for &(start, end) in &space.guards {
        const MADV_GUARD_INSTALL: i32 = 102;
        let args = [start.into(), (end - start).into(), MADV_GUARD_INSTALL.into()];
        program.call("install guard pages", libc::SYS_madvise, &args);
    }
}

/// Makes a mapping. Returns the protection that it has then: `prot` where that can be chosen.
fn map(vma: &Vma, prot: u8, fds: &MapFds<'_>, program: &mut Program) -> u8 {
    let (kind, fd, offset) = match &vma.backing {
        Backing::Anonymous { .. } => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0),
        Backing::PrivateFile { file, offset } => (libc::MAP_PRIVATE, fds.files[file], *offset),
        Backing::SharedFile { file, offset } => (libc::MAP_SHARED, fds.files[file], *offset),
        Backing::HugePages { file, offset, shared, .. } => {
            (if *shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE }, fds.files[file], *offset)
        }
        Backing::SharedAnonymous { object, offset } => (libc::MAP_SHARED, fds.shared[object], *offset),
        Backing::SystemV { object, offset, writable } => {
            return match fds.objects.get(object).map(|o| &o.kind) {
                Some(SharedMemoryKind::SystemV(segment)) => system_v::attach(vma, segment, *offset, *writable, program),
                _ => prot,
            };
        }
        Backing::Kernel { .. } | Backing::AioRing { .. } => return prot,
    };
    let mut flags = kind | libc::MAP_FIXED_NOREPLACE;
    if vma.flags.droppable {
        const MAP_DROPPABLE: i32 = 8; // takes the place of MAP_PRIVATE, Linux 6.11
        flags = flags & !libc::MAP_PRIVATE | MAP_DROPPABLE;
    }
    if vma.flags.growsdown {
        flags |= libc::MAP_GROWSDOWN;
    }
    if vma.flags.noreserve {
        flags |= libc::MAP_NORESERVE;
    }
    let args: [Arg; 6] = [
        vma.start.into(),
        (vma.end - vma.start).into(),
        u64::from(prot).into(),
        flags.into(),
        fd.into(),
        offset.into(),
    ];
    program.call_expecting(format!("map {:x}-{:x}", vma.start, vma.end), libc::SYS_mmap, &args, vma.start);
    // Before the pages are touched: these decide how they are allocated.
    for (set, advice) in [(vma.flags.hugepage, libc::MADV_HUGEPAGE), (vma.flags.nohugepage, libc::MADV_NOHUGEPAGE)] {
        if set {
            madvise(vma, advice, program);
        }
    }
    prot
}

pub(super) fn protect(vma: &Vma, prot: u8, program: &mut Program) {
    let args = [vma.start.into(), (vma.end - vma.start).into(), u64::from(prot).into()];
    program.call(format!("protect {:x}-{:x}", vma.start, vma.end), libc::SYS_mprotect, &args);
}

fn madvise(vma: &Vma, advice: i32, program: &mut Program) {
    // MERGEABLE and HUGEPAGE fail on kernels built without them: then they meant nothing.
    let args = [vma.start.into(), (vma.end - vma.start).into(), advice.into()];
    program.try_call(format!("advise {:x}-{:x}", vma.start, vma.end), libc::SYS_madvise, &args);
}

pub(super) fn advise(vma: &Vma, program: &mut Program) {
    let f = &vma.flags;
    for (set, advice) in [
        (f.dontfork, libc::MADV_DONTFORK),
        (f.wipeonfork, libc::MADV_WIPEONFORK),
        (f.dontdump, libc::MADV_DONTDUMP),
        (f.mergeable, libc::MADV_MERGEABLE),
        (f.sequential, libc::MADV_SEQUENTIAL),
        (f.random, libc::MADV_RANDOM),
    ] {
        if set {
            madvise(vma, advice, program);
        }
    }
    if let Backing::Anonymous { name: Some(name) } = &vma.backing {
        const PR_SET_VMA: i32 = 0x5356_4d41;
        let name = program.string(&name.0);
        let args = [PR_SET_VMA.into(), 0.into(), vma.start.into(), (vma.end - vma.start).into(), name];
        program.try_call("name anonymous memory", libc::SYS_prctl, &args);
    }
    if f.locked {
        let on_fault = if f.lock_on_fault { libc::MLOCK_ONFAULT as u64 } else { 0 };
        let args = [vma.start.into(), (vma.end - vma.start).into(), on_fault.into()];
        program.call(format!("lock {:x}-{:x}", vma.start, vma.end), libc::SYS_mlock2, &args);
    }
}

/// Pages from which on a read needs no page cache: smaller ones profit from the readahead of their neighbours.
const LARGE: u64 = 64;

/// Runs that follow each other in memory and in the store are one read.
fn read<'a>(runs: impl IntoIterator<Item = &'a PageRun>, files: &PageFiles, program: &mut Program) {
    let mut merged = Vec::new();
    runs.into_iter().for_each(|run| push_run(&mut merged, *run));
    for run in merged {
        for part in files.find(run.store..run.store + run.pages) {
            let pages = part.pages.end - part.pages.start;
            let fd = if pages < LARGE { part.fds.cached } else { part.fds.direct };
            let (to, from) = (part.pages.start - run.store, part.pages.start - part.origin);
            program.read_full("read pages", fd, run.start + to * PAGE, pages * PAGE, from * PAGE);
        }
    }
}

/// The parts of `runs` inside `vma`.
pub(super) fn cut(runs: &[PageRun], vma: &Vma) -> Vec<PageRun> {
    let first = runs.partition_point(|r| r.start + r.pages * PAGE <= vma.start);
    runs[first..]
        .iter()
        .take_while(|r| r.start < vma.end)
        .map(|r| {
            let start = r.start.max(vma.start);
            let end = (r.start + r.pages * PAGE).min(vma.end);
            PageRun { start, pages: (end - start) / PAGE, store: r.store + (start - r.start) / PAGE }
        })
        .collect()
}

/// What turns the pages of `parent` in a mapping into those of `own`: runs to read, and ranges to drop. Huge pages are
/// dropped, and read, as a whole.
pub(super) fn differing(vma: &Vma, own: &[PageRun], parent: &[PageRun]) -> (Vec<PageRun>, Vec<(u64, u64)>) {
    let (read, gone) = diff(own, parent);
    let Backing::HugePages { page_size, .. } = vma.backing else { return (read, gone) };
    let changed =
        read.iter().map(|r| (r.start, r.pages)).chain(gone).map(|(start, pages)| huge(start, pages, page_size));
    let changed = ranges::set(changed.collect());
    let within = |range: &Range| cut(own, &Vma { start: range.start, end: range.end, ..vma.clone() });
    let read = changed.iter().flat_map(within).collect();
    (read, changed.iter().map(|range| (range.start, (range.end - range.start) / PAGE)).collect())
}

/// The huge pages that pages lie in.
pub(super) fn huge(start: u64, pages: u64, page_size: u64) -> Range {
    Range { start: start / page_size * page_size, end: (start + pages * PAGE).next_multiple_of(page_size) }
}

/// What turns the pages of `parent` into those of `own`: runs to read, and ranges to drop.
fn diff(own: &[PageRun], parent: &[PageRun]) -> (Vec<PageRun>, Vec<(u64, u64)>) {
    let mut edges: Vec<u64> = own.iter().chain(parent).flat_map(|r| [r.start, r.start + r.pages * PAGE]).collect();
    edges.sort_unstable();
    edges.dedup();
    let at = |runs: &[PageRun], address: u64| {
        let i = runs.partition_point(|r| r.start + r.pages * PAGE <= address);
        runs.get(i).filter(|r| r.start <= address).map(|r| r.store + (address - r.start) / PAGE)
    };
    let (mut read, mut gone) = (Vec::new(), Vec::new());
    for pair in edges.windows(2) {
        let (start, pages) = (pair[0], (pair[1] - pair[0]) / PAGE);
        match (at(own, start), at(parent, start)) {
            (Some(store), theirs) if theirs != Some(store) => read.push(PageRun { start, pages, store }),
            (None, Some(_)) => gone.push((start, pages)),
            _ => {}
        }
    }
    (read, gone)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn runs() -> impl Strategy<Value = Vec<PageRun>> {
        proptest::collection::vec((0..4u64, 1..5u64, 0..40u64), 0..12).prop_map(|parts| {
            let mut at = 0;
            parts
                .into_iter()
                .map(|(gap, pages, store)| {
                    at += gap;
                    let run = PageRun { start: at * PAGE, pages, store };
                    at += pages;
                    run
                })
                .collect()
        })
    }

    fn flat(runs: &[PageRun]) -> BTreeMap<u64, u64> {
        runs.iter().flat_map(|r| (0..r.pages).map(|n| (r.start + n * PAGE, r.store + n))).collect()
    }

    #[test]
    fn huge_pages_differ_as_a_whole() {
        let size = 4 * PAGE;
        let run = |page: u64, pages: u64, store: u64| PageRun { start: page * PAGE, pages, store };
        let vma = Vma {
            start: 0,
            end: 4 * size,
            prot: 3,
            backing: Backing::HugePages { file: 0, offset: 0, page_size: size, shared: false },
            flags: Default::default(),
        };
        // The first one is the same, one page of the second differs, the third is only the parent's.
        let (own, parent) = ([run(0, 2, 0), run(4, 1, 2), run(6, 2, 9)], [run(0, 2, 0), run(4, 1, 2), run(9, 1, 5)]);
        let (read, gone) = differing(&vma, &own, &parent);
        assert_eq!(read, [run(4, 1, 2), run(6, 2, 9)]);
        assert_eq!(gone, [(size, 8)]);
        assert_eq!(differing(&vma, &own, &own), (Vec::new(), Vec::new()));
    }

    proptest! {
        /// Applying the difference to the parent's pages gives the child's, and nothing equal is read again.
        #[test]
        fn a_difference_turns_the_parent_into_the_child(own in runs(), parent in runs()) {
            let (read, gone) = diff(&own, &parent);
            let mut pages = flat(&parent);
            for (start, n) in gone {
                for p in 0..n {
                    prop_assert!(pages.remove(&(start + p * PAGE)).is_some());
                }
            }
            for (address, store) in flat(&read) {
                prop_assert_ne!(pages.insert(address, store), Some(store));
            }
            prop_assert_eq!(pages, flat(&own));
        }
    }
}
