//! Reads a tree through BPF iterators.

use super::{
    FdEntry, Lineage, ObserveError, ProcessState, Result, SharedMapping, SocketEntry, ThreadState, VmaEntry,
    decode::{self, Belongings},
    ids::Ids,
    loader::Programs,
    procfs::{self, Descriptors},
    sorted, sys,
};
use crate::kernel;
use standstill_ebpf_abi::{CPUS, FileRecord};
use std::{
    cmp::Ordering,
    collections::{HashMap, HashSet},
    fmt, io,
    io::Read,
    mem,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
};

/// Up to so many processes each gets an iterator of its own, for about 12 µs; beyond, one iterator visits all tasks of the
/// machine, and costs what is running there.
pub(super) const ONE_BY_ONE: usize = 32;
/// Up to so many unknown paths, readlink(2) is quicker than letting the iterator write all paths.
const SINGLE_PATHS: usize = 100;

/// File systems whose stat(2) says nothing but what is in the inode. Others are asked: some have device, inode number
/// or size elsewhere (btrfs, overlayfs, procfs, …).
const PLAIN_FILE_SYSTEMS: [u64; 7] = [
    decode::ANON_INODE_FS,
    0xef53,      // ext2, ext3, ext4
    0x5846_5342, // xfs
    0x0102_1994, // tmpfs, devtmpfs, memfd
    0x5049_5045, // pipes
    0x534f_434b, // sockets
    0x1cd1,      // pseudo terminals
];

/// Whoever maps a DMA buffer may rename it at any time.
const DMA_BUF: u64 = 0x444d_4142;

/// Reader of a tree's state through BPF iterators.
///
/// Needs Linux 5.13 with BTF, and the capabilities CAP_BPF and CAP_PERFMON. Tracks nothing: each reading asks anew, and
/// is consistent as far as the processes stand still.
///
/// ```no_run
/// # use standstill_engine::observe::{Iterators, ObserveError};
/// let mut iterators = Iterators::load()?;
/// iterators.prefetch_paths(&[4711])?;
/// // … freeze …
/// for entry in iterators.files(&[4711])? {
///     println!("{} {}", entry.fd, entry.path.display());
/// }
/// # Ok::<(), ObserveError>(())
/// ```
#[doc(alias = "bpf_iter")]
pub struct Iterators {
    programs: Programs,
    /// What was read ahead.
    pub(super) ahead: Ahead,
    /// What `programs.tree` holds.
    tree: HashSet<i32>,
    /// CPUs that this machine may ever have; `None`: nobody knows.
    possible_cpus: Option<usize>,
    /// Whether iterators can be restricted to a process (Linux 6.1).
    restrictable: bool,
    pub(super) stream: Vec<u8>,
}

impl fmt::Debug for Iterators {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The streams are full of kernel addresses.
        write!(f, "Iterators {{ {} descriptors read ahead }}", self.ahead.order.len())
    }
}

/// The programs, by what they iterate over.
#[derive(Clone, Copy)]
pub(super) enum What {
    Files,
    Tasks,
    Vmas,
    Sockets,
}

impl Iterators {
    /// Loads the programs.
    ///
    /// # Errors
    /// [`ObserveError::MissingCapability`], [`ObserveError::NoBtf`], [`ObserveError::MissingField`] or
    /// [`ObserveError::Load`].
    pub fn load() -> Result<Self> {
        Ok(Self::new(Programs::load()?))
    }

    fn new(programs: Programs) -> Self {
        Self {
            programs,
            ahead: Ahead::default(),
            tree: HashSet::new(),
            possible_cpus: kernel::proc::possible_cpus(),
            restrictable: true,
            stream: Vec::new(),
        }
    }

    /// The programs of another process, which does not use them meanwhile.
    pub(super) fn from_programs(programs: Programs) -> Result<Self> {
        let mut iterators = Self::new(programs);
        iterators.learn_tree()?;
        Ok(iterators)
    }

    /// Looks which processes the programs look at, after somebody else used them.
    pub(super) fn learn_tree(&mut self) -> Result<()> {
        let pids = self.programs.tree.keys().map(|pid| pid.map(|pid| pid as i32));
        self.tree = pids.collect::<std::result::Result<_, _>>().map_err(map_failed)?;
        Ok(())
    }

    /// Gives the room of the last reading back.
    pub(super) fn release(&mut self) {
        self.stream = Vec::new();
    }

    /// For lending them.
    pub(super) fn programs(&self) -> &Programs {
        &self.programs
    }

    /// Reads the paths of all open files ahead, so that [`Self::files`] need not. The processes may run.
    ///
    /// # Errors
    /// When the iterator cannot be read.
    pub fn prefetch_paths(&mut self, tgids: &[i32]) -> Result<()> {
        self.write_paths(true)?;
        self.run(What::Files, &sorted(tgids))?;
        self.ahead.order = decode::file_order(&self.stream)?;
        // The next reading gets the old stream's room, which is as large as it needs.
        mem::swap(&mut self.ahead.stream, &mut self.stream);
        Ok(())
    }

    /// All descriptors of the processes, by process and number. The processes must not run.
    ///
    /// # Errors
    /// When the iterator, or procfs for a path or a file system that keeps attributes to itself, cannot be read.
    pub fn files(&mut self, tgids: &[i32]) -> Result<Vec<FdEntry>> {
        let tgids = sorted(tgids);
        let paths = self.ahead.order.is_empty();
        let mut reading = self.read_files(&tgids, paths)?;
        if !paths && reading.pathless.len() > SINGLE_PATHS {
            reading = self.read_files(&tgids, true)?;
        }
        reading.complete()
    }

    pub(super) fn read_files(&mut self, tgids: &[i32], paths: bool) -> Result<FileReading> {
        self.write_paths(paths)?;
        self.run(What::Files, tgids)?;
        let order = decode::file_order(&self.stream)?;
        let mut ids = Ids::with_capacity(order.len());
        let mut ahead = self.ahead.cursor();
        let mut reading = FileReading { entries: Vec::with_capacity(order.len()), ..Default::default() };
        for (_, at) in order {
            let Some((record, path)) = decode::file_record(&self.stream[at..]) else { continue };
            let path = path.or_else(|| ahead.path(&record)).map(PathBuf::from);
            if path.is_none() {
                reading.pathless.push(reading.entries.len());
            }
            if !PLAIN_FILE_SYSTEMS.contains(&record.magic) {
                reading.hidden.push(reading.entries.len());
            }
            reading.entries.push(decode::file(&record, path.unwrap_or_default(), &mut ids));
        }
        Ok(reading)
    }

    /// The processes with their threads, by number. The processes must not run.
    ///
    /// # Errors
    /// When the iterator cannot be read.
    pub fn processes(&mut self, tgids: &[i32]) -> Result<Vec<ProcessState>> {
        self.run(What::Tasks, &sorted(tgids))?;
        // What the kernel allows is its mask without the CPUs that are offline: asked once for each mask.
        let mut known = HashMap::new();
        let words = self.possible_cpus.filter(|&n| n <= CPUS).map(|n| n.div_ceil(64));
        decode::processes(&self.stream, &self.programs.layouts, &mut |tid, mask| {
            // A shorter mask of the kernel's is followed by something else.
            let mask = &mask[..words?];
            known.entry(mask.to_vec()).or_insert_with(|| kernel::sys::sched_getaffinity(tid).ok()).clone()
        })
    }

    /// What each process has, and may share with others.
    pub(super) fn belongings(&mut self, tgids: &[i32]) -> Result<HashMap<i32, Belongings>> {
        self.run(What::Tasks, &sorted(tgids))?;
        decode::belongings(&self.stream)
    }

    /// [`Self::processes`] and [`Self::belongings`] in one reading.
    pub(super) fn processes_and_belongings(
        &mut self,
        tgids: &[i32],
    ) -> Result<(Vec<ProcessState>, HashMap<i32, Belongings>)> {
        let processes = self.processes(tgids)?;
        Ok((processes, decode::belongings(&self.stream)?))
    }

    /// Every task that there is in our pid namespace, in no particular order. A task that exists all the time is among
    /// them.
    ///
    /// # Errors
    /// When the iterator cannot be read.
    pub fn lineage(&mut self) -> Result<Vec<Lineage>> {
        self.stream.clear();
        read(self.programs.lineage.as_fd(), None, &mut self.stream).map_err(iter_failed)?;
        decode::lineage(&self.stream)
    }

    /// The threads of the processes, by process, the leader first. The processes must not run.
    ///
    /// # Errors
    /// When the iterator cannot be read.
    pub fn threads(&mut self, tgids: &[i32]) -> Result<Vec<ThreadState>> {
        Ok(self.processes(tgids)?.into_iter().flat_map(|p| p.threads).collect())
    }

    /// The mappings of the processes, by process and address. The processes must not run.
    ///
    /// # Errors
    /// When the iterator, or procfs for mappings whose file only procfs knows (overlayfs), cannot be read.
    pub fn vmas(&mut self, tgids: &[i32]) -> Result<Vec<VmaEntry>> {
        self.run(What::Vmas, &sorted(tgids))?;
        let (mut all, unclear) = decode::vmas(&self.stream)?;
        all.extend(procfs::vmas(&unclear)?);
        all.sort_by_key(|v| (v.tgid, v.start));
        Ok(all)
    }

    /// Shared mappings of files on a device. The processes may run.
    ///
    /// # Errors
    /// When the iterator cannot be read.
    pub(crate) fn shared_mappings(&mut self, tgids: &[i32], dev: u64) -> Result<Vec<SharedMapping>> {
        self.run(What::Vmas, &sorted(tgids))?;
        decode::shared_mappings(&self.stream, dev)
    }

    /// The sockets of the processes, by process and descriptor, in whatever network namespace they are.
    ///
    /// # Errors
    /// When the iterator cannot be read.
    pub fn sockets(&mut self, tgids: &[i32]) -> Result<Vec<SocketEntry>> {
        self.run(What::Sockets, &sorted(tgids))?;
        decode::sockets(&self.stream)
    }

    /// Tells `iter/task_file` whether to write paths.
    pub(super) fn write_paths(&mut self, wanted: bool) -> Result<()> {
        self.programs.paths.set(0, u32::from(wanted), 0).map_err(map_failed)
    }

    /// Runs a program over the processes; its output is in `stream` then.
    pub(super) fn run(&mut self, what: What, tgids: &[i32]) -> Result<()> {
        self.set_tree(tgids)?;
        self.stream.clear();
        let program = match what {
            What::Files => &self.programs.task_file,
            What::Tasks => &self.programs.task,
            What::Vmas => &self.programs.task_vma,
            What::Sockets => &self.programs.sockets,
        };
        if self.restrictable && tgids.len() <= ONE_BY_ONE {
            for &tgid in tgids {
                match read(program.as_fd(), Some(tgid), &mut self.stream) {
                    // Older kernels do not know the restriction.
                    Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::E2BIG)) => {
                        self.restrictable = false;
                        self.stream.clear();
                        break;
                    }
                    result => result.map_err(iter_failed)?,
                }
            }
            if self.restrictable {
                return Ok(());
            }
        }
        read(program.as_fd(), None, &mut self.stream).map_err(iter_failed)
    }

    /// Makes `tgids` the processes that the programs look at.
    fn set_tree(&mut self, tgids: &[i32]) -> Result<()> {
        let wanted: HashSet<i32> = tgids.iter().copied().collect();
        for &gone in self.tree.difference(&wanted) {
            self.programs.tree.remove(&(gone as u32)).map_err(map_failed)?;
        }
        for &new in wanted.difference(&self.tree) {
            self.programs.tree.insert(new as u32, 1, 0).map_err(map_failed)?;
        }
        self.tree = wanted;
        Ok(())
    }
}

pub(super) fn map_failed(error: aya::maps::MapError) -> ObserveError {
    ObserveError::io("update a BPF map")(io::Error::other(error))
}

pub(super) fn iter_failed(error: io::Error) -> ObserveError {
    ObserveError::io("read a BPF iterator")(error)
}

/// Appends what an iterator writes.
pub(super) fn read(program: BorrowedFd<'_>, tgid: Option<i32>, to: &mut Vec<u8>) -> io::Result<()> {
    let link = sys::iter_link(program, tgid)?;
    let mut iterator = sys::iter_create(link.as_fd())?;
    loop {
        match iterator.read_to_end(to) {
            Ok(_) => return Ok(()),
            // The kernel pauses after a million objects without output. Whatever was read before is in `to`.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
}

/// A stream with paths that was read before the freeze.
#[derive(Default)]
pub(super) struct Ahead {
    stream: Vec<u8>,
    pub(super) order: Vec<((i32, i32), usize)>,
}

/// A walk through it in ascending order, beside the walk through the stream that is read under the freeze.
struct Cursor<'a> {
    ahead: &'a Ahead,
    next: usize,
}

impl Ahead {
    fn cursor(&self) -> Cursor<'_> {
        Cursor { ahead: self, next: 0 }
    }
}

impl<'a> Cursor<'a> {
    /// The path of a descriptor, if it is still the same file with the same names above it.
    fn path(&mut self, record: &FileRecord) -> Option<&'a Path> {
        let wanted = (record.tgid, record.fd);
        let at = loop {
            let &(key, at) = self.ahead.order.get(self.next)?;
            match key.cmp(&wanted) {
                Ordering::Less => self.next += 1,
                Ordering::Equal => break at,
                Ordering::Greater => return None,
            }
        };
        let (known, path) = decode::file_record(&self.ahead.stream[at..])?;
        (path_key(&known)? == path_key(record)?).then_some(path?)
    }
}

/// What a path is known by: addresses of dentry and inode, inode number, and the programs' digest of all names in it.
fn path_key(record: &FileRecord) -> Option<[u64; 4]> {
    let stable = record.name != 0 && record.magic != DMA_BUF;
    stable.then_some([record.dentry, record.inode, record.ino, record.name])
}

/// Descriptors as read, and what procfs has to add.
#[derive(Default)]
pub(super) struct FileReading {
    pub(super) entries: Vec<FdEntry>,
    /// Entries without path.
    pub(super) pathless: Vec<usize>,
    /// Entries on file systems that keep attributes to themselves.
    hidden: Vec<usize>,
}

impl FileReading {
    fn complete(mut self) -> Result<Vec<FdEntry>> {
        let mut process = Process::default();
        for at in self.pathless {
            let entry = &mut self.entries[at];
            entry.path = process.of(entry.tgid)?.path(entry.fd)?;
        }
        for at in self.hidden {
            let entry = &mut self.entries[at];
            let stat = process.of(entry.tgid)?.stat(entry.fd)?;
            (entry.dev, entry.ino, entry.mode) = (stat.dev, stat.ino, stat.mode);
            (entry.rdev, entry.size, entry.mtime, entry.nlink) = (stat.rdev, stat.size, stat.mtime, stat.nlink);
        }
        Ok(self.entries)
    }
}

/// The process asked last.
#[derive(Default)]
struct Process(Option<(i32, Descriptors)>);

impl Process {
    fn of(&mut self, tgid: i32) -> Result<&Descriptors> {
        if self.0.as_ref().is_some_and(|(current, _)| *current != tgid) {
            self.0 = None;
        }
        match &mut self.0 {
            Some((_, descriptors)) => Ok(descriptors),
            none => Ok(&none.insert((tgid, Descriptors::open(tgid)?)).1),
        }
    }
}
