//! What a dump would find in the running tree, and what finding it costs: the steps that harm nobody are made, each for
//! itself, with a watch in hand.

use super::{pages::Pages, predict::Costs, stopwatch::Stopwatch, writes};
use crate::{
    dump::history::Amounts,
    error::{Context, Error, Result},
    kernel::{
        PAGE,
        pagemap::{self, Pagemap, Range, Writes},
        proc,
    },
    memory::{
        area::Area,
        collect,
        private::{self, Job, PrivatePages},
        ranges, tracking,
    },
    objects::{Collected, shared_memory},
    observe::{self, FdEntry, Iterators, ProcessState, VmaEntry, vmas_by_process},
    parallel,
    task::Family,
    tree::clocks::Moment,
};
use standstill_images::types::DumpCounts;
use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io,
};

/// So many page frames of a process are compared.
const COMPARED: u64 = 1024;
/// The memory of so many processes is opened.
const OPENED: usize = 64;

/// What a rehearsal found.
pub(super) struct Found {
    pub amounts: Amounts,
    /// Which part of the pages that are read holds only zeros.
    pub zeros: f64,
    /// How many pages are written to within a time.
    pub writes: writes::Writes,
    /// Those costs that depend on the tree; the others are zero.
    pub costs: Costs,
    /// The descriptors, by the way.
    pub descriptors: Vec<FdEntry>,
    /// Who would read for the dump, by the name that the dump gives it.
    pub reader: &'static str,
}

/// A process of the tree with its parent and its threads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Member {
    pub pid: i32,
    pub ppid: i32,
    pub threads: u64,
}

/// The steps of a dump on a running tree. `tracked`: its memory is protected by one of us.
///
/// # Errors
/// When the tree has memory that cannot be dumped, or changes too quickly to be read.
pub(super) fn rehearse(
    root: i32,
    members: &[Member],
    tracked: bool,
    iterators: &mut Option<Iterators>,
    pages: &mut Pages,
) -> Result<Found> {
    let pids: Vec<i32> = members.iter().map(|m| m.pid).collect();
    let mut found = Found {
        amounts: Amounts::default(),
        zeros: 0.0,
        writes: writes::Writes::default(),
        costs: Costs::default(),
        descriptors: Vec::new(),
        reader: "procfs",
    };
    found.costs.list_process = each(list(root, &pids, iterators.as_mut()), pids.len() as u64);
    let seen = read(root, &pids, iterators, &mut found)?;
    let (spaces, shared) = spaces(members, tracked, &seen, &mut found)?;
    count(members, &spaces, &mut found);
    found.zeros = pages.copy(&spaces, &mut found.costs);
    let soon = pages.changed();
    let same = compare(members, &spaces, &mut found.costs)?;
    found.costs.copy_process = open(members)?;
    found.writes = writes::Writes::new(soon, pages.changed());
    let amounts = &mut found.amounts;
    amounts.scanned = amounts.counts.pages;
    amounts.shared = shared;
    amounts.copied = (amounts.counts.pages as f64 * (1.0 - same)) as u64 + shared;
    Ok(found)
}

fn each(total: f64, count: u64) -> f64 {
    if count == 0 { 0.0 } else { total / count as f64 }
}

/// How long a freeze takes to list the threads and children of the processes: it looks a second time for new ones.
pub(super) fn list(root: i32, pids: &[i32], iterators: Option<&mut Iterators>) -> f64 {
    let (mut family, _) = Family::of(root, iterators);
    let begin = Stopwatch::start();
    for _ in 0..2 {
        family.look();
        for &pid in pids {
            // Whoever is gone by now costs nothing.
            let tids = family.threads(pid).unwrap_or_default();
            let _ = family.children(pid, &tids);
        }
    }
    begin.nanoseconds()
}

/// State and mappings of each process, if the reader tells.
type Seen = HashMap<i32, (ProcessState, Vec<VmaEntry>)>;

/// The reader's passes.
#[cfg_attr(not(feature = "ebpf"), expect(unused_variables, reason = "there are no trackers"))]
fn read(root: i32, pids: &[i32], iterators: &mut Option<Iterators>, found: &mut Found) -> Result<Seen> {
    let failed = |e: observe::ObserveError| match e {
        // It was there when the list was made.
        observe::ObserveError::Io { source, .. } if proc::is_gone(&source) => changed(pids[0]),
        other => Error::System { call: "read the tree".into(), source: io::Error::other(other) },
    };
    let Some(iterators) = iterators else {
        let begin = Stopwatch::start();
        found.descriptors = observe::procfs::files(pids).map_err(failed)?;
        found.costs.read_descriptor = each(begin.nanoseconds(), found.descriptors.len() as u64);
        return Ok(HashMap::new());
    };
    // The dump would take the tree's tracker, too.
    #[cfg(feature = "ebpf")]
    if let Ok(Some(mut lease)) = observe::Lease::take(root) {
        found.reader = "tracker";
        lease.iterators().prefetch_paths(pids).map_err(failed)?;
        let begin = Stopwatch::start();
        let (processes, fresh) = lease.check(pids).map_err(failed)?;
        found.costs.read_process = each(begin.nanoseconds(), pids.len() as u64);
        let begin = Stopwatch::start();
        let mapped = lease.vmas(pids, &fresh).map_err(failed)?;
        found.costs.read_mapping = each(begin.nanoseconds(), mapped.values().map(|vmas| vmas.len() as u64).sum());
        let begin = Stopwatch::start();
        found.descriptors = lease.iterators().files(pids).map_err(failed)?;
        found.costs.read_descriptor = each(begin.nanoseconds(), found.descriptors.len() as u64);
        return Ok(join(processes, mapped));
    }
    found.reader = "ebpf";
    iterators.prefetch_paths(pids).map_err(failed)?;
    let begin = Stopwatch::start();
    found.descriptors = iterators.files(pids).map_err(failed)?;
    found.costs.read_descriptor = each(begin.nanoseconds(), found.descriptors.len() as u64);
    let begin = Stopwatch::start();
    let mapped = vmas_by_process(iterators.vmas(pids).map_err(failed)?);
    found.costs.read_mapping = each(begin.nanoseconds(), mapped.values().map(|vmas| vmas.len() as u64).sum());
    let begin = Stopwatch::start();
    let processes = iterators.processes(pids).map_err(failed)?;
    found.costs.read_process = each(begin.nanoseconds(), pids.len() as u64);
    Ok(join(processes, mapped))
}

fn join(processes: Vec<ProcessState>, mut mapped: HashMap<i32, Vec<VmaEntry>>) -> Seen {
    let mut both = |process: ProcessState| {
        let vmas = mapped.remove(&process.tgid).unwrap_or_default();
        (process.tgid, (process, vmas))
    };
    processes.into_iter().map(&mut both).collect()
}

fn changed(pid: i32) -> Error {
    Error::System {
        call: format!("read the tree of {pid}"),
        source: io::Error::other("it changes too quickly to be read while it runs"),
    }
}

/// Address spaces as the dump would record them; also the pages of shared memory objects.
fn spaces(members: &[Member], tracked: bool, seen: &Seen, found: &mut Found) -> Result<(Vec<PrivatePages>, u64)> {
    let mut all = Collected::new(0, Moment::now());
    let mut mapped = Vec::with_capacity(members.len());
    let mut mappings = 0;
    let begin = Stopwatch::start();
    for (n, member) in members.iter().enumerate() {
        let seen = seen.get(&member.pid);
        let state = seen.map(|(state, _)| state).filter(|state| state.layout.is_some());
        let vmas = seen.map_or(&[][..], |(_, vmas)| vmas.as_slice());
        let collected = collect::collect(member.pid, n as u32, 0, state, vmas, &mut all, tracked);
        let (space, areas) = collected.map_err(|e| gone(member.pid, e))?;
        mappings += space.vmas.len() as u64;
        mapped.push((member.pid, areas));
    }
    found.amounts.counts.mappings = mappings;
    found.costs.mapping = each(begin.nanoseconds(), mappings);
    let spaces = scan(&mapped, found)?;
    let mut shared = 0;
    for (object, source) in all.shared.iter().zip(&all.shared_sources) {
        let ranges = shared_memory::data_ranges(source, object).context(|| "look for shared memory".into())?;
        shared += ranges::size(&ranges) / PAGE;
    }
    Ok((spaces, shared))
}

/// An error of a process that was there when the list was made.
fn gone(pid: i32, error: Error) -> Error {
    match error {
        Error::System { source, .. } if proc::is_gone(&source) => changed(pid),
        other => other,
    }
}

/// Looks for the pages, and asks which have changed, as under the freeze. What both cost for a page is told by the largest
/// range there is.
fn scan(mapped: &[(i32, Vec<Area>)], found: &mut Found) -> Result<Vec<PrivatePages>> {
    let threads = pagemap::scanners();
    let jobs: Vec<Job<'_>> = mapped.iter().map(|(pid, areas)| (*pid, &areas[..], None)).collect();
    let failed = |pid: i32| move || format!("scan the pages of {pid}");
    let workers = workers(mapped, threads) as f64;
    let begin = Stopwatch::of_all_threads();
    let looked = private::look_at_all(&jobs, false, threads).map_err(|e| gone(jobs[0].0, e))?;
    let looking = begin.nanoseconds() / workers;
    let begin = Stopwatch::of_all_threads();
    parallel::map(&jobs, parallel::workers(jobs.len(), threads), |&(pid, areas, _)| {
        tracking::rehearse(pid, areas, threads).context(failed(pid))
    })
    .map_err(|e| gone(jobs[0].0, e))?;
    let tracking = looking + begin.nanoseconds() / workers;
    let spaces: Vec<PrivatePages> = looked.into_iter().map(|(pages, _)| pages).collect();
    let pages = |r: &Range| (r.end - r.start) / PAGE;
    let all: u64 = spaces.iter().flat_map(|s| s.ranges.iter().map(pages)).sum();
    let largest = spaces.iter().filter_map(|s| Some((s.pid, *s.ranges.iter().max_by_key(|r| pages(r))?)));
    // For a small range it is the system call that is measured, which belongs to the mapping.
    let largest = largest.max_by_key(|(_, r)| pages(r)).filter(|(_, r)| pages(r) >= 1024);
    if let Some((pid, range)) = largest {
        let pagemap = Pagemap::open(pid).context(failed(pid))?;
        let begin = Stopwatch::start();
        pagemap.empty(range, &mut Vec::new()).context(failed(pid))?;
        found.costs.scan_page = each(begin.nanoseconds() / workers, pages(&range));
        pagemap.written(range, &[], Writes::Seen, &mut Vec::new()).context(failed(pid))?;
        found.costs.track_page = each(begin.nanoseconds() / workers, pages(&range));
    }
    let mappings = found.amounts.counts.mappings;
    let of_mappings = |took: f64, page: f64| each((took - page * all as f64).max(0.0), mappings);
    found.costs.scan_mapping = of_mappings(looking, found.costs.scan_page);
    found.costs.track_mapping = of_mappings(tracking, found.costs.track_page);
    Ok(spaces)
}

/// How many threads scan at the same time.
fn workers(mapped: &[(i32, Vec<Area>)], threads: usize) -> usize {
    let parts = mapped.iter().map(|(_, areas)| {
        let private: Vec<Range> = areas.iter().filter(|a| a.is_private()).map(|a| a.range).collect();
        pagemap::parts(&private, threads)
    });
    parts.max().unwrap_or(1).max(parallel::workers(mapped.len(), threads))
}

fn count(members: &[Member], spaces: &[PrivatePages], found: &mut Found) {
    let related = related(members);
    let pages = |of: &PrivatePages| of.ranges.iter().map(|r| (r.end - r.start) / PAGE).sum::<u64>();
    let mut known = HashSet::new();
    let files: Vec<&FdEntry> = found.descriptors.iter().filter(|e| known.insert(e.file)).collect();
    // As `objects::dump` decides: these three need no question of their own.
    let plain =
        |e: &&&FdEntry| matches!(e.mode & libc::S_IFMT, libc::S_IFREG | libc::S_IFDIR | libc::S_IFCHR | libc::S_IFBLK);
    found.amounts.counts = DumpCounts {
        processes: members.len() as u64,
        threads: members.iter().map(|m| m.threads).sum(),
        descriptors: found.descriptors.len() as u64,
        files: files.len() as u64,
        asked: (files.len() - files.iter().filter(plain).count()) as u64,
        ranges: spaces.iter().map(|s| s.ranges.len() as u64).sum(),
        pages: spaces.iter().map(pages).sum(),
        compared: spaces.iter().filter(|s| related.contains(&s.pid)).map(pages).sum(),
        ..found.amounts.counts
    };
}

/// Processes with a parent or children in the tree.
fn related(members: &[Member]) -> HashSet<i32> {
    let pids: HashSet<i32> = members.iter().map(|m| m.pid).collect();
    let children = members.iter().filter(|m| pids.contains(&m.ppid));
    children.flat_map(|m| [m.pid, m.ppid]).collect()
}

/// What it takes to open the memory of a process.
fn open(members: &[Member]) -> Result<f64> {
    let begin = Stopwatch::start();
    let some = &members[..members.len().min(OPENED)];
    for member in some {
        let opened = File::open(proc::path(member.pid, "mem")).and(Pagemap::open(member.pid));
        opened.context(|| format!("open the memory of {}", member.pid))?;
    }
    Ok(each(begin.nanoseconds(), some.len() as u64))
}

/// Which share of the private pages is the parent's too; what comparing one costs.
fn compare(members: &[Member], spaces: &[PrivatePages], costs: &mut Costs) -> Result<f64> {
    let related = related(members);
    let parents: HashMap<i32, i32> = members.iter().map(|m| (m.pid, m.ppid)).collect();
    let mut frames: HashMap<i32, HashMap<u64, (u64, u64)>> = HashMap::new();
    let (mut took, mut compared, mut seen, mut same) = (0.0, 0, 0, 0.0);
    let mut total = 0;
    for space in spaces {
        let pages: u64 = space.ranges.iter().map(|r| (r.end - r.start) / PAGE).sum();
        total += pages;
        if !related.contains(&space.pid) || pages == 0 {
            continue;
        }
        let Ok(pagemap) = Pagemap::open(space.pid) else { continue };
        let begin = Stopwatch::start();
        let mut own = HashMap::new();
        let (mut left, mut shared) = (COMPARED, 0);
        for range in &space.ranges {
            let n = left.min((range.end - range.start) / PAGE);
            let Ok(numbers) = pagemap.frames(range.start, n) else { break };
            let parent = parents.get(&space.pid).and_then(|p| frames.get(p));
            for (page, frame) in numbers.into_iter().enumerate() {
                let address = range.start + page as u64 * PAGE;
                shared += u64::from(parent.and_then(|p| p.get(&address)).is_some_and(|p| p.0 == frame && frame != 0));
                own.insert(address, (frame, 0));
            }
            left -= n;
            if left == 0 {
                break;
            }
        }
        took += begin.nanoseconds();
        compared += COMPARED - left;
        seen += 1;
        // Of large processes the first pages speak for the others.
        same += pages as f64 * each(shared as f64, COMPARED - left);
        frames.insert(space.pid, own);
    }
    costs.compare_page = each(took, if seen == 0 { 0 } else { compared });
    Ok(each(same, total).min(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(pid: i32, ppid: i32) -> Member {
        Member { pid, ppid, threads: 1 }
    }

    #[test]
    fn relations() {
        let related = related(&[member(1, 0), member(2, 1), member(3, 0)]);
        assert_eq!(related, HashSet::from([1, 2]));
    }

    #[test]
    fn a_small_tree() {
        // Another program: a copy of this one has the mapped rings of whatever other tests track.
        let mut sleep = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let pid = sleep.id() as i32;
        let mut pages = Pages::new();
        let ours = member(pid, 0);
        // It has to be executed, and to have set itself up.
        std::thread::sleep(std::time::Duration::from_millis(200));
        let found = rehearse(pid, &[ours], false, &mut None, &mut pages).unwrap();
        let counts = found.amounts.counts;
        assert_eq!((counts.processes, counts.threads, counts.compared), (1, 1, 0));
        assert!(counts.mappings > 10 && counts.pages > 20 && counts.descriptors > 2, "{counts:?}");
        assert!(found.costs.copy_page > 10.0 && found.costs.read_descriptor > 100.0, "{:?}", found.costs);
        assert!(found.amounts.copied >= counts.pages / 2 && (0.0..=1.0).contains(&found.zeros));
        assert_eq!(found.writes.within(1.0), 0.0, "it sleeps");
        sleep.kill().unwrap();
        sleep.wait().unwrap();
        assert!(matches!(rehearse(pid, &[ours], false, &mut None, &mut pages), Err(Error::System { .. })));
    }
}
