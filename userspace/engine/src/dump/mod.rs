//! The order of a dump; nothing but the order.

mod observer;

pub use observer::Reader;
pub(crate) use observer::no_reader;

use crate::{
    error::{Context, Error, Result},
    image,
    kernel::{PAGE, proc, sys},
    memory::{self, copy::Copier, private::PrivatePages},
    objects::{self, Collected, regular},
    observe::{self, FdEntry},
    restore::{environment, sessions},
    task::{Family, FrozenTree},
    tree::process,
};
use observer::Observer;
use standstill_images::{
    publish::ImageDir,
    store::{Compression, PageWriter},
    types::{
        AddressSpace, Backing, Descriptor, DumpCounts, DumpStats, FdTable, FileKind, Inventory, OpenFileId, Task, Vma,
    },
};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::PathBuf,
    time::{Duration, Instant, SystemTime},
};
use tracing::info;

/// What becomes of the tree after a successful dump.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Afterwards {
    /// It is killed.
    #[default]
    Kill,
    /// It goes on.
    Run,
    /// It goes on after a SIGCONT.
    Stop,
}

/// A dump to make.
#[derive(Clone, Debug)]
pub struct DumpOptions {
    /// Root of the tree.
    pub pid: i32,
    /// Directory of the image.
    pub dir: PathBuf,
    /// What becomes of the tree.
    pub afterwards: Afterwards,
    /// The root is the job of a shell that stays outside.
    pub shell_job: bool,
    /// Time limit of the freeze.
    pub timeout: Duration,
    /// Compression of the pages.
    pub compression: Compression,
    /// Who lists the descriptors.
    pub reader: Reader,
    /// Compare what a tracker knows with the truth, under the freeze, and believe the truth.
    pub paranoid: bool,
}

/// Measures named parts of the frozen time.
struct Phases {
    last: Instant,
    phases: Vec<(String, u64)>,
}

impl Phases {
    fn end(&mut self, name: &str) {
        let now = Instant::now();
        self.phases.push((name.into(), (now - self.last).as_micros() as u64));
        self.last = now;
    }
}

/// Dumps the tree of `options.pid`. It goes on as it was if anything fails.
///
/// # Errors
/// See [`Error`]; nothing is left in the image directory then.
pub fn dump(options: &DumpOptions) -> Result<DumpStats> {
    let begin = Instant::now();
    check_target(options.pid)?;
    let dir = ImageDir::create(&options.dir)?;
    let mut observer = Observer::open(options.reader, options.pid)?;
    let (_, running) = Family::of(options.pid, observer.iterators());
    observer.read_ahead(&running);
    let mut pages = PageWriter::create(&dir.pages_path(), options.compression)?;
    if options.afterwards != Afterwards::Kill {
        // The thaw must not wait for the disk: what the memory of the machine allows is copied first and written later.
        let expected = resident_bytes(&running);
        pages = pages.with_buffer_limit(expected.min(available_memory() / 2).max(MIN_BUFFER) as usize);
        pages.reserve(expected);
    }
    let (mut family, _) = Family::of(options.pid, observer.iterators());
    let prepare_us = begin.elapsed().as_micros() as u64;

    let freezing = Instant::now();
    let tree = FrozenTree::freeze(options.pid, options.timeout, &mut family)?;
    let frozen = Instant::now();
    let mut phases = Phases { last: frozen, phases: Vec::new() };
    let mut state = collect(&tree, options, &mut observer, &mut phases).map_err(|e| unless_dead(&tree, e))?;
    let counts = copy_pages(&tree, &mut state, &mut pages).map_err(|e| unless_dead(&tree, e))?;
    phases.end("pages");
    let mut stats = DumpStats {
        reader: observer.name().into(),
        prepare_us,
        freezing_us: (frozen - freezing).as_micros() as u64,
        frozen_us: 0,
        phases: Vec::new(),
        total_us: 0,
        pages_stored: counts.stored,
        pages_zero: counts.zero,
        pages_shared: counts.shared,
        counts: DumpCounts::default(),
    };
    // A tree that goes on has waited long enough; one that is killed must not run before its image is safe.
    let tree = match options.afterwards {
        Afterwards::Kill => Some(tree),
        Afterwards::Run => {
            drop(tree);
            phases.end("thaw");
            stats.frozen_us = frozen.elapsed().as_micros() as u64;
            None
        }
        Afterwards::Stop => {
            tree.leave_stopped();
            phases.end("thaw");
            stats.frozen_us = frozen.elapsed().as_micros() as u64;
            None
        }
    };
    regular::check_names(&mut state.objects)?;
    let index = pages.finish()?;
    phases.end("write");
    if tree.is_some() {
        stats.frozen_us = frozen.elapsed().as_micros() as u64;
    }
    stats.phases = phases.phases;
    stats.counts = state.counts();
    stats.total_us = begin.elapsed().as_micros() as u64;
    image::publish(dir, &state.into_records(options)?, &[index], &stats)?;
    if let Some(tree) = tree {
        tree.kill();
    } else {
        // A dump that kills writes under the freeze: its times say nothing of one that does not.
        observe::view::remember(options.pid, &stats);
    }
    info!(total_us = stats.total_us, frozen_us = stats.frozen_us, "dump published");
    Ok(stats)
}

/// A frozen process can still be killed, and whatever is asked of it then fails in its own way.
fn unless_dead(tree: &FrozenTree, error: Error) -> Error {
    let ending = |pid: &i32| proc::stat(*pid).map_or(true, |s| s.is_ending());
    match tree.pids().into_iter().find(ending) {
        Some(pid) => Error::Died(pid),
        None => error,
    }
}

/// Everything collected under the freeze.
struct State {
    root: i32,
    tasks: Vec<Task>,
    spaces: Vec<AddressSpace>,
    private: Vec<PrivatePages>,
    tables: Vec<FdTable>,
    objects: Collected,
    vdso: Vec<u8>,
}

fn collect(tree: &FrozenTree, options: &DumpOptions, observer: &mut Observer, phases: &mut Phases) -> Result<State> {
    let pids = tree.pids();
    let seen = observer.read(&pids, options.paranoid)?;
    process::refuse_sharing(tree.processes(), &seen.processes)?;
    phases.end("descriptors");
    let entries = &seen.files;
    let next = entries.iter().map(|e| e.file.0 + 1).max().unwrap_or(0);
    let mut state = State {
        root: options.pid,
        tasks: Vec::new(),
        spaces: Vec::new(),
        private: Vec::new(),
        tables: tables(&pids, entries),
        objects: Collected::new(next),
        vdso: Vec::new(),
    };
    let mut done = HashSet::new();
    for entry in entries.iter().filter(|e| done.insert(e.file.0)) {
        objects::dump(entry, entries, &mut state.objects)?;
    }
    phases.end("files");
    let mut known = process::Known::default();
    for (n, process) in tree.processes().iter().enumerate() {
        let id = n as u32;
        let observed = seen.processes.get(&process.pid).filter(|p| p.layout.is_some());
        let (task, brk) = process::collect(process, observed, &mut known, id, id)?;
        let mapped = seen.vmas.get(&process.pid).map_or(&[][..], Vec::as_slice);
        let (space, private) = memory::collect::collect(process.pid, id, brk, observed, mapped, &mut state.objects)?;
        state.tasks.push(task);
        state.spaces.push(space);
        state.private.push(private);
    }
    state.vdso = vdso(options.pid, state.spaces.first())?;
    for &pid in tree.zombies() {
        state.tasks.push(process::collect_zombie(pid)?);
    }
    phases.end("tasks");
    check_restorable(&state, options)?;
    Ok(state)
}

/// The bytes of the `[vdso]` in an address space; empty if it has none.
fn vdso(pid: i32, space: Option<&AddressSpace>) -> Result<Vec<u8>> {
    let is_vdso = |v: &&Vma| matches!(&v.backing, Backing::Kernel { name } if name.0 == b"[vdso]");
    let found = space.and_then(|s| s.vmas.iter().find(is_vdso));
    found.map_or(Ok(Vec::new()), |vdso| environment::vdso_at(pid, vdso.start, vdso.end - vdso.start))
}

/// Refuses at once what the restore would refuse.
fn check_restorable(state: &State, options: &DumpOptions) -> Result<()> {
    let by_pid: BTreeMap<i32, Task> = state.tasks.iter().map(|t| (t.pid, t.clone())).collect();
    let Some(root) = by_pid.get(&options.pid) else { return Err(Error::Died(options.pid)) };
    if root.live.is_none() {
        return Err(Error::Target(format!("process {} is dead, only its parent has to notice", options.pid)));
    }
    if root.sid != root.pid && !options.shell_job {
        return Err(Error::unsupported(
            options.pid,
            format!("the session of process {}, outside the tree,", root.sid),
            "start the program with setsid, or dump and restore it as a --shell-job",
        ));
    }
    for file in &state.objects.files {
        if let FileKind::PidFd { pid } = file.kind
            && !by_pid.contains_key(&pid)
        {
            return Err(Error::unsupported(
                options.pid,
                format!("a pidfd of process {pid}, outside the tree,"),
                "close it before the dump",
            ));
        }
    }
    sessions::order(&by_pid, options.pid).map(drop)
}

fn copy_pages(tree: &FrozenTree, state: &mut State, pages: &mut PageWriter) -> Result<memory::copy::Counts> {
    let parents: HashMap<i32, i32> = state.tasks.iter().map(|t| (t.pid, t.ppid)).collect();
    let with_children: HashSet<i32> = parents.values().copied().collect();
    let mut copier = Copier::new(pages);
    for (process, (space, private)) in tree.processes().iter().zip(state.spaces.iter_mut().zip(&state.private)) {
        let parent = parents.get(&process.pid).copied();
        space.pages = copier.private(private, parent, with_children.contains(&process.pid))?;
    }
    for (object, source) in state.objects.shared.iter_mut().zip(&state.objects.shared_sources) {
        copier.shared(object, source)?;
    }
    copier.finish()
}

impl State {
    /// How much there was to do.
    fn counts(&self) -> DumpCounts {
        let pids: HashSet<i32> = self.tasks.iter().map(|t| t.pid).collect();
        let parents: HashMap<i32, i32> = self.tasks.iter().map(|t| (t.pid, t.ppid)).collect();
        let with_children: HashSet<i32> = parents.values().copied().collect();
        let related = |pid: i32| with_children.contains(&pid) || parents.get(&pid).is_some_and(|p| pids.contains(p));
        let living = || self.tasks.iter().filter_map(|t| t.live.as_ref());
        let pages = |of: &PrivatePages| of.ranges.iter().map(|r| (r.end - r.start) / PAGE).sum::<u64>();
        // Mapped files have descriptions too, for which nobody is asked.
        let open: HashSet<OpenFileId> = self.tables.iter().flat_map(|t| t.fds.iter().map(|d| d.file)).collect();
        let asked = self.objects.files.iter().filter(|f| open.contains(&f.id) && objects::is_asked(&f.kind));
        DumpCounts {
            processes: living().count() as u64,
            threads: living().map(|l| l.threads.len() as u64).sum(),
            descriptors: self.tables.iter().map(|t| t.fds.len() as u64).sum(),
            files: open.len() as u64,
            asked: asked.count() as u64,
            mappings: self.spaces.iter().map(|s| s.vmas.len() as u64).sum(),
            ranges: self.private.iter().map(|p| p.ranges.len() as u64).sum(),
            pages: self.private.iter().map(pages).sum(),
            compared: self.private.iter().filter(|p| related(p.pid)).map(pages).sum(),
        }
    }

    fn into_records(self, options: &DumpOptions) -> Result<image::Records> {
        let uname = nix::sys::utsname::uname().context(|| "uname".into())?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Ok(image::Records {
            inventory: Inventory {
                writer: env!("CARGO_PKG_VERSION").into(),
                kernel: uname.release().to_string_lossy().into(),
                machine: uname.machine().to_string_lossy().into(),
                created: now.as_secs(),
                root: self.root,
                shell_job: options.shell_job,
                vdso: self.vdso,
            },
            tasks: self.tasks,
            spaces: self.spaces,
            tables: self.tables,
            files: self.objects.files,
            pipes: self.objects.pipes.into_values().collect(),
            shared: self.objects.shared,
        })
    }
}

fn tables(pids: &[i32], entries: &[FdEntry]) -> Vec<FdTable> {
    let mut by_pid: HashMap<i32, Vec<Descriptor>> = HashMap::new();
    for e in entries {
        by_pid.entry(e.tgid).or_default().push(Descriptor { fd: e.fd, cloexec: e.cloexec, file: e.file.0 });
    }
    pids.iter()
        .enumerate()
        .map(|(n, pid)| FdTable { id: n as u32, fds: by_pid.remove(pid).unwrap_or_default() })
        .collect()
}

/// Bytes of page data that may wait at least.
const MIN_BUFFER: u64 = 64 << 20;

/// Memory that the processes have in use: a hint.
fn resident_bytes(pids: &[i32]) -> u64 {
    let anonymous = |pid: &i32| -> Option<u64> {
        let text = std::fs::read_to_string(proc::path(*pid, "status")).ok()?;
        let kib: u64 = proc::field(&text, "RssAnon")?.trim_end_matches(" kB").parse().ok()?;
        Some(kib << 10)
    };
    pids.iter().filter_map(anonymous).sum()
}

/// Memory that the machine can spare.
fn available_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    proc::field(&text, "MemAvailable").and_then(|v| v.trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) << 10
}

/// Refuses what can never be a target.
pub(crate) fn check_target(pid: i32) -> Result<()> {
    const PF_KTHREAD: u64 = 0x0020_0000;
    if !sys::page_size_is_supported() {
        return Err(Error::Missing { what: "a kernel with pages of 4 KiB".into(), remedy: "use such a kernel".into() });
    }
    if pid <= 0 {
        return Err(Error::Target(format!("{pid} is not a process id")));
    }
    let stat = match proc::stat(pid) {
        Ok(stat) => stat,
        Err(e) if proc::is_gone(&e) => return Err(Error::Target(format!("no such process: {pid}"))),
        Err(e) => return Err(e).context(|| format!("read /proc/{pid}/stat")),
    };
    let leader = proc::status(pid, pid).map(|s| s.tgid).unwrap_or(pid);
    if leader != pid {
        return Err(Error::Target(format!("{pid} is a thread of process {leader}: give that pid")));
    }
    if stat.flags & PF_KTHREAD != 0 {
        return Err(Error::Target(format!("process {pid} is a kernel thread")));
    }
    if stat.state == b'Z' {
        return Err(Error::Target(format!("process {pid} is dead, only its parent has to notice")));
    }
    let mut ancestor = std::process::id() as i32;
    while ancestor > 0 {
        if ancestor == pid {
            return Err(Error::Target(format!(
                "process {pid} is this standstill process or an ancestor of it, which it cannot freeze: run it from elsewhere"
            )));
        }
        ancestor = proc::stat(ancestor).map_or(0, |s| s.ppid);
    }
    Ok(())
}
