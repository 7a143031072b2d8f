//! One file per kind of kernel object that a descriptor can refer to: its dump and its restore side by side.
//!
//! Dump: [`dump`] turns what a reader says of a descriptor into a record, looking at the object itself through a
//! duplicate (pidfd_getfd(2)) where the reader's words are not enough. Restore: [`create`] emits the operations that
//! make the object at a descriptor number the plan chose.

pub(crate) mod device;
pub(crate) mod directory;
pub(crate) mod epoll;
pub(crate) mod eventfd;
pub(crate) mod link_remap;
pub(crate) mod pidfd;
pub(crate) mod pipe;
pub(crate) mod regular;
pub(crate) mod shared_memory;
pub(crate) mod signalfd;
pub(crate) mod socket;
pub(crate) mod system_v;
pub(crate) mod timerfd;
pub(crate) mod unix;

use crate::{
    error::{Context, Error, Result},
    kernel::sys,
    observe::{FdEntry, SharedId},
    restore::{files::Numbers, program::Program},
    tree::clocks::{Continued, Moment},
};
use standstill_images::types::{
    Bytes, Creds, FileKind, FileOwner, OpenFile, OpenFileId, Pipe, PipeId, SharedMemory, SharedMemoryId,
    SharedMemoryKind,
};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

// fcntl(2) commands that the libc crate lacks.
const F_SETSIG: i32 = 10;
const F_GETSIG: i32 = 11;
const F_SETOWN_EX: i32 = 15;
const F_GETOWN_EX: i32 = 16;

/// Everything the dump has learnt of the tree's open files.
pub(crate) struct Collected {
    /// For which timers are recorded.
    moment: Moment,
    pub files: Vec<OpenFile>,
    pub pipes: BTreeMap<PipeId, Pipe>,
    /// Contents are copied later, with the memory.
    pub shared: Vec<SharedMemory>,
    /// For each shared object a way to its contents.
    pub shared_sources: Vec<OwnedFd>,
    /// Ways to contents of shared objects that somebody had before, by device and inode.
    pub known_sources: HashMap<(u64, u64), OwnedFd>,
    pipe_ids: HashMap<(u64, u64), PipeId>,
    shared_ids: HashMap<(u64, u64), SharedMemoryId>,
    pidfds: HashMap<i32, OwnedFd>,
    unix_sockets: Option<unix::Known>,
    /// Numbers of dead processes by the inodes of their pidfds.
    dead: HashMap<u64, u32>,
    /// Mapped and executed files by device, inode and access.
    mapped: HashMap<(u64, u64, bool), OpenFileId>,
    /// Executed files by the observer's number.
    pub(crate) executables: HashMap<SharedId, OpenFileId>,
    next_file: OpenFileId,
    /// Names of regular files, to be checked when there is time.
    names: Vec<regular::Name>,
    /// Of files whose names are gone.
    pub links: link_remap::Links,
}

impl Collected {
    /// Ids below `first` belong to descriptors.
    pub(crate) fn new(first: OpenFileId, moment: Moment) -> Self {
        Self {
            moment,
            files: Vec::new(),
            pipes: BTreeMap::new(),
            shared: Vec::new(),
            shared_sources: Vec::new(),
            known_sources: HashMap::new(),
            pipe_ids: HashMap::new(),
            shared_ids: HashMap::new(),
            pidfds: HashMap::new(),
            unix_sockets: None,
            dead: HashMap::new(),
            mapped: HashMap::new(),
            executables: HashMap::new(),
            next_file: first,
            names: Vec::new(),
            links: link_remap::Links::default(),
        }
    }

    /// A duplicate of a descriptor of the target.
    pub(crate) fn duplicate(&mut self, entry: &FdEntry) -> Result<OwnedFd> {
        let failed = |e| Error::System {
            call: format!("duplicate descriptor {} of process {}", entry.fd, entry.tgid),
            source: e,
        };
        if let std::collections::hash_map::Entry::Vacant(e) = self.pidfds.entry(entry.tgid) {
            // The number is that of another thread where the leader has exited.
            let pidfd = sys::pidfd_open(entry.tgid).or_else(|_| sys::pidfd_open_thread(entry.tgid));
            e.insert(pidfd.map_err(failed)?);
        }
        sys::pidfd_getfd(self.pidfds[&entry.tgid].as_fd(), entry.fd).map_err(failed)
    }

    /// Whether a shared object is System V shared memory.
    pub(crate) fn is_segment(&self, id: SharedMemoryId) -> bool {
        self.shared.iter().any(|o| o.id == id && matches!(o.kind, SharedMemoryKind::SystemV(_)))
    }

    /// Device and inode of each shared object, with its number.
    pub(crate) fn shared_keys(&self) -> impl Iterator<Item = ((u64, u64), SharedMemoryId)> {
        self.shared_ids.iter().map(|(key, id)| (*key, *id))
    }

    /// Number of the pipe with this inode, and whether it is new.
    fn pipe_id(&mut self, entry: &FdEntry) -> (PipeId, bool) {
        let next = self.pipe_ids.len() as PipeId;
        let id = *self.pipe_ids.entry((entry.dev, entry.ino)).or_insert(next);
        (id, id == next)
    }

    /// Number of the shared object with this device and inode; `describe` makes it and a way to its contents.
    pub(crate) fn shared_id(
        &mut self,
        dev: u64,
        ino: u64,
        describe: impl FnOnce(SharedMemoryId) -> Result<(SharedMemory, OwnedFd)>,
    ) -> Result<SharedMemoryId> {
        if let Some(&id) = self.shared_ids.get(&(dev, ino)) {
            return Ok(id);
        }
        let id = self.shared.len() as SharedMemoryId;
        let (object, source) = describe(id)?;
        self.shared.push(object);
        self.shared_sources.push(source);
        self.shared_ids.insert((dev, ino), id);
        Ok(id)
    }

    /// Number of a file that is mapped or executed.
    pub(crate) fn mapped(
        &mut self,
        dev: u64,
        ino: u64,
        writable: bool,
        describe: impl FnOnce(&mut Self) -> Result<FileKind>,
    ) -> Result<OpenFileId> {
        if let Some(&id) = self.mapped.get(&(dev, ino, writable)) {
            return Ok(id);
        }
        let kind = describe(self)?;
        let id = self.next_file;
        self.next_file += 1;
        let flags = if writable { libc::O_RDWR } else { libc::O_RDONLY };
        self.files.push(OpenFile { id, flags: flags as u32, pos: 0, owner: None, kind });
        self.mapped.insert((dev, ino, writable), id);
        Ok(id)
    }
}

/// Records the open file description that `entry` refers to. `entries` are all descriptors of the tree.
pub(crate) fn dump(entry: &FdEntry, entries: &[FdEntry], all: &mut Collected) -> Result<()> {
    let kind = match entry.mode & libc::S_IFMT {
        // Linux 6.9 and later: pidfds are files of a file system of their own.
        libc::S_IFREG if entry.path == std::path::Path::new("anon_inode:[pidfd]") => pidfd::dump(entry, all)?,
        libc::S_IFREG => regular::dump(entry, all)?,
        libc::S_IFLNK => regular::dump_link(entry)?,
        libc::S_IFDIR => directory::dump(entry)?,
        libc::S_IFCHR | libc::S_IFBLK => device::dump(entry)?,
        libc::S_IFIFO => pipe::dump(entry, all)?,
        libc::S_IFSOCK => socket::dump(entry, entries, all)?,
        _ => match entry.path.to_str().unwrap_or("") {
            "anon_inode:[eventfd]" => eventfd::dump(entry)?,
            "anon_inode:[eventpoll]" => epoll::dump(entry, entries)?,
            "anon_inode:[timerfd]" => timerfd::dump(entry, all)?,
            "anon_inode:[pidfd]" => pidfd::dump(entry, all)?,
            "anon_inode:[signalfd]" => signalfd::dump(entry)?,
            "anon_inode:[io_uring]" => return Err(refuse(entry, "close the io_uring before the dump")),
            "anon_inode:[userfaultfd]" => return Err(refuse(entry, "end the use of userfaultfd before the dump")),
            _ => return Err(refuse(entry, "close it before the dump")),
        },
    };
    let owner = if entry.flags & libc::O_ASYNC as u32 != 0 { Some(owner(entry, all)?) } else { None };
    all.files.push(OpenFile { id: entry.file.0, flags: entry.flags, pos: entry.pos, owner, kind });
    Ok(())
}

/// Whether the record of such a file took a question of its own: what the reader lists does not say enough.
pub(crate) fn is_asked(kind: &FileKind) -> bool {
    !matches!(
        kind,
        FileKind::Regular(_) | FileKind::Linked { .. } | FileKind::Directory { .. } | FileKind::Device { .. }
    )
}

fn owner(entry: &FdEntry, all: &mut Collected) -> Result<FileOwner> {
    let fd = all.duplicate(entry)?;
    let mut owner = [0i32; 2];
    // SAFETY: F_GETOWN_EX stores the two words of struct f_owner_ex; F_GETSIG only returns a number.
    let (result, signal) = unsafe {
        (libc::fcntl(fd.as_raw_fd(), F_GETOWN_EX, owner.as_mut_ptr()), libc::fcntl(fd.as_raw_fd(), F_GETSIG))
    };
    nix::errno::Errno::result(result).context(|| format!("F_GETOWN_EX of descriptor {}", entry.fd))?;
    Ok(FileOwner { kind: owner[0], pid: owner[1], signal })
}

/// The refusal of a descriptor, by name.
pub(crate) fn refuse(entry: &FdEntry, remedy: &str) -> Error {
    Error::unsupported(entry.tgid, format!("descriptor {} ({})", entry.fd, entry.path.display()), remedy)
}

/// Records that others refer to by number.
pub(crate) struct Referenced<'a> {
    pub pipes: &'a BTreeMap<PipeId, Pipe>,
    /// Open file that takes over the first description of each memfd.
    pub first_writers: &'a HashMap<SharedMemoryId, OpenFileId>,
    /// Descriptor that the restoring process holds of each shared object, inherited by every task.
    pub shared_fds: &'a HashMap<SharedMemoryId, i32>,
    /// The same of each removed directory.
    pub removed_fds: &'a BTreeMap<Bytes, i32>,
    /// Abstract names of several unix sockets.
    pub shared_names: &'a HashSet<Vec<u8>>,
    /// Credentials of whoever makes files.
    pub creds: &'a Creds,
    /// How the clocks go on, if they do.
    pub clocks: Option<&'a Continued>,
    /// Programs of processes that end, by the number of the dead one that they stand for.
    pub ends: &'a HashMap<u32, usize>,
}

/// Emits the creation of `files`: one open file description, all ends of one pipe or socket pair, or all pidfds of a dead
/// process. Each gets the
/// number `numbers` hands out; they are returned in order.
pub(crate) fn create(
    files: &[&OpenFile],
    refs: &Referenced<'_>,
    numbers: &mut Numbers,
    program: &mut Program,
) -> Result<Vec<i32>> {
    let file = files[0];
    let made = match &file.kind {
        FileKind::Pipe { pipe } => pipe::create(&refs.pipes[pipe], files, numbers, program),
        FileKind::Socket(_) => socket::create(files, refs, numbers, program),
        FileKind::DeadPidFd { process, .. } => pidfd::create_dead(files, refs.ends[process], numbers, program),
        kind => vec![match kind {
            FileKind::Regular(f) | FileKind::Linked { file: f, .. } => regular::create(f, file.flags, numbers, program),
            FileKind::Directory { path, removed } => {
                let held = removed.then(|| refs.removed_fds[path]);
                directory::create(path, held, file.flags, numbers, program)
            }
            FileKind::Device { path, .. } => device::create(path, file.flags, numbers, program),
            FileKind::SharedMemory { object } => {
                let first = refs.first_writers.get(object) == Some(&file.id);
                shared_memory::create(refs.shared_fds[object], first, file.flags, numbers, program)
            }
            FileKind::PidFd { pid } => pidfd::create(*pid, file.flags, numbers, program),
            FileKind::EventFd { count, semaphore } => eventfd::create(*count, *semaphore, file.flags, numbers, program),
            FileKind::TimerFd { .. } => timerfd::create(kind, file.flags, refs.clocks, numbers, program),
            FileKind::SignalFd { mask } => signalfd::create(*mask, file.flags, numbers, program),
            FileKind::Epoll { .. } => epoll::create(numbers, program),
            FileKind::Pipe { .. } | FileKind::Socket(_) | FileKind::DeadPidFd { .. } => unreachable!("handled above"),
        }],
    };
    for (file, &fd) in files.iter().zip(&made) {
        let seekable = matches!(
            file.kind,
            FileKind::Regular(_) | FileKind::Linked { .. } | FileKind::SharedMemory { .. } | FileKind::Directory { .. }
        );
        if seekable && file.pos != 0 && file.flags & libc::O_PATH as u32 == 0 {
            program.call_expecting(
                "set the file offset",
                libc::SYS_lseek,
                &[fd.into(), file.pos.into(), libc::SEEK_SET.into()],
                file.pos,
            );
        }
        if let Some(owner) = &file.owner {
            let words = [owner.kind, owner.pid].iter().flat_map(|w| w.to_ne_bytes()).collect::<Vec<u8>>();
            let block = program.data(&words);
            program.try_call("set the I/O owner", libc::SYS_fcntl, &[fd.into(), F_SETOWN_EX.into(), block]);
            program.call("set the I/O signal", libc::SYS_fcntl, &[fd.into(), F_SETSIG.into(), owner.signal.into()]);
            program.call("set O_ASYNC", libc::SYS_fcntl, &[fd.into(), libc::F_SETFL.into(), file.flags.into()]);
        }
    }
    Ok(made)
}
