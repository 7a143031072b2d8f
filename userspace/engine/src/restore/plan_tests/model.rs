//! A small model of what the kernel does with processes, descriptors and memory.

use standstill_images::types::VmaFlags;
use std::collections::{BTreeMap, BTreeSet};

pub(super) const PAGE: u64 = 4096;
/// The process from which a tree, or its restore, begins: it leads the session and the group around it.
pub(super) const OUTSIDE: i32 = 9000;
/// Status flags that an open file keeps.
pub(super) const KEPT: i32 = libc::O_ACCMODE | libc::O_NONBLOCK | libc::O_APPEND | libc::O_DIRECT;

/// A call's result or errno.
pub(super) type Outcome = Result<i64, i32>;

/// What an open file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum What {
    Path(String),
    Memory(u32),
    Pipe(usize),
    EventFd(u64),
    PidFd(i32),
    /// Of a process that is gone.
    DeadPidFd(u32),
    /// Registrations by number and file.
    Epoll(BTreeSet<(i32, usize)>),
    /// A file with pages: the one at its offset 0, and which of them it has.
    Pages(u64, std::ops::Range<u64>),
}

/// An open file description.
#[derive(Clone, Debug)]
pub(super) struct File {
    pub what: What,
    pub flags: i32,
    pub pos: i64,
}

/// What a page is mapped from; offsets in pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    Anonymous,
    Private {
        path: String,
        offset: u64,
    },
    /// `may_write`: the descriptor allowed it.
    Shared {
        path: String,
        offset: u64,
        may_write: bool,
    },
    Memory {
        object: u32,
        offset: u64,
    },
    Kernel {
        name: String,
        offset: u64,
    },
    /// Not of the tree: the restoring program, or the restorer if it must stay.
    Foreign {
        stays: bool,
    },
}

/// A page of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Page {
    pub from: Origin,
    pub prot: u8,
    pub flags: VmaFlags,
    pub guard: bool,
    /// Place in the page store; `None`: zeros or what the file has.
    pub content: Option<u64>,
}

impl Page {
    pub(super) fn new(from: Origin, prot: u8) -> Self {
        Self { from, prot, flags: VmaFlags::default(), guard: false, content: None }
    }

    pub(super) fn is_private(&self) -> bool {
        matches!(self.from, Origin::Anonymous | Origin::Private { .. })
    }
}

/// Descriptors: file and close-on-exec by number.
pub(super) type Table = BTreeMap<i32, (usize, bool)>;

/// A process.
#[derive(Clone, Debug, Default)]
pub(super) struct Process {
    pub ppid: i32,
    pub pgid: i32,
    pub sid: i32,
    /// Wait status of a dead one.
    pub dead: Option<i32>,
    pub tids: BTreeSet<i32>,
    /// Its descriptor table, and its place in the file system, by number.
    pub table: usize,
    pub fs: usize,
    /// Its memory and signal actions, by number.
    pub space: usize,
    pub actions: usize,
}

/// Memory of processes.
#[derive(Clone, Debug, Default)]
pub(super) struct Space {
    pub pages: BTreeMap<u64, Page>,
    pub exe: String,
}

/// All processes, and what they share.
#[derive(Clone, Debug, Default)]
pub(super) struct World {
    pub processes: BTreeMap<i32, Process>,
    pub tables: Vec<Table>,
    pub spaces: Vec<Space>,
    /// How many signal actions there are.
    actions: usize,
    /// Working directories.
    pub directories: Vec<String>,
    pub files: Vec<File>,
    /// Contents of pipes.
    pub pipes: Vec<Vec<u8>>,
    /// Wait statuses of processes that are gone.
    pub gone: Vec<i32>,
}

impl World {
    /// With nobody but [`OUTSIDE`].
    pub(super) fn new() -> Self {
        let outside = Process { ppid: 1, pgid: OUTSIDE, sid: OUTSIDE, ..Default::default() };
        let (tables, directories) = (vec![Table::new()], vec!["/".into()]);
        let spaces = vec![Space::default()];
        Self { processes: [(OUTSIDE, outside)].into(), tables, directories, spaces, ..Default::default() }
    }

    pub(super) fn process(&mut self, pid: i32) -> &mut Process {
        self.processes.get_mut(&pid).expect("callers name existing processes")
    }

    pub(super) fn table(&mut self, pid: i32) -> &mut Table {
        let table = self.process(pid).table;
        &mut self.tables[table]
    }

    /// The memory of a process.
    pub(super) fn space(&self, pid: i32) -> &Space {
        &self.spaces[self.processes[&pid].space]
    }

    pub(super) fn space_mut(&mut self, pid: i32) -> &mut Space {
        let space = self.process(pid).space;
        &mut self.spaces[space]
    }

    fn pages(&mut self, pid: i32) -> &mut BTreeMap<u64, Page> {
        &mut self.space_mut(pid).pages
    }

    /// Gives a process memory of its own.
    pub(super) fn begin_space(&mut self, pid: i32, space: Space) {
        self.spaces.push(space);
        self.process(pid).space = self.spaces.len() - 1;
    }

    /// Gives a process signal actions of its own.
    pub(super) fn begin_actions(&mut self, pid: i32) {
        self.actions += 1;
        self.process(pid).actions = self.actions;
    }

    /// Descriptors of a process; none of a dead one.
    pub(super) fn fds(&self, pid: i32) -> &Table {
        static NONE: Table = Table::new();
        let process = &self.processes[&pid];
        if process.dead.is_some() { &NONE } else { &self.tables[process.table] }
    }

    /// All descriptors that anybody has.
    fn all_fds(&self) -> impl Iterator<Item = (usize, bool)> {
        let tables: BTreeSet<usize> = self.living().map(|p| p.table).collect();
        tables.into_iter().flat_map(|table| self.tables[table].values().copied())
    }

    fn living(&self) -> impl Iterator<Item = &Process> {
        self.processes.values().filter(|p| p.dead.is_none())
    }

    /// unshare(2).
    pub(super) fn unshare(&mut self, pid: i32, flags: i32) -> Outcome {
        let Process { table, fs, .. } = *self.process(pid);
        if flags & libc::CLONE_FILES != 0 {
            self.tables.push(self.tables[table].clone());
            self.process(pid).table = self.tables.len() - 1;
        }
        if flags & libc::CLONE_FS != 0 {
            self.directories.push(self.directories[fs].clone());
            self.process(pid).fs = self.directories.len() - 1;
        }
        Ok(0)
    }

    fn is_free(&self, pid: i32) -> bool {
        let used = |p: &Process| p.pgid == pid || p.sid == pid || p.tids.contains(&pid);
        !self.processes.contains_key(&pid) && !self.processes.values().any(used)
    }

    /// A child that shares what the `flags` of clone(2) say.
    pub(super) fn fork(&mut self, parent: i32, pid: i32, flags: i32) -> Outcome {
        if !self.is_free(pid) {
            return Err(libc::EEXIST);
        }
        let mut child = self.process(parent).clone();
        child.ppid = parent;
        child.tids.clear();
        if flags & libc::CLONE_SIGHAND != 0 && flags & libc::CLONE_VM == 0 {
            return Err(libc::EINVAL);
        }
        self.processes.insert(pid, child);
        if flags & libc::CLONE_SIGHAND == 0 {
            self.begin_actions(pid);
        }
        if flags & libc::CLONE_VM == 0 {
            let mut space = self.space(parent).clone();
            space.pages.retain(|_, p| !p.flags.dontfork);
            for page in space.pages.values_mut().filter(|p| p.flags.wipeonfork) {
                page.content = None;
            }
            self.begin_space(pid, space);
        }
        self.unshare(pid, (libc::CLONE_FILES | libc::CLONE_FS) & !flags)?;
        Ok(pid.into())
    }

    pub(super) fn thread(&mut self, pid: i32, tid: i32) -> Outcome {
        if !self.is_free(tid) {
            return Err(libc::EEXIST);
        }
        self.process(pid).tids.insert(tid);
        Ok(tid.into())
    }

    pub(super) fn setsid(&mut self, pid: i32) -> Outcome {
        if self.processes.values().any(|p| p.pgid == pid) {
            return Err(libc::EPERM);
        }
        let process = self.process(pid);
        (process.sid, process.pgid) = (pid, pid);
        Ok(pid.into())
    }

    pub(super) fn setpgid(&mut self, pid: i32, pgid: i32) -> Outcome {
        let pgid = if pgid == 0 { pid } else { pgid };
        let sid = self.process(pid).sid;
        let exists = self.processes.values().any(|p| p.pgid == pgid && p.sid == sid);
        if sid == pid || pgid != pid && !exists {
            return Err(libc::EPERM);
        }
        self.process(pid).pgid = pgid;
        Ok(0)
    }

    pub(super) fn exit(&mut self, pid: i32, status: i32) {
        let process = self.process(pid);
        process.dead = Some(status);
        process.tids.clear();
        self.begin_space(pid, Space::default());
        self.forget_closed();
    }

    /// The parent waits for a dead child.
    pub(super) fn wait(&mut self, parent: i32, pid: i32) -> Outcome {
        match self.processes.get(&pid) {
            Some(p) if p.ppid == parent && p.dead.is_some() => {
                self.gone.extend(self.processes.remove(&pid).and_then(|p| p.dead));
                for file in self.files.iter_mut().filter(|f| f.what == What::PidFd(pid)) {
                    file.what = What::DeadPidFd(self.gone.len() as u32 - 1);
                }
                Ok(pid.into())
            }
            _ => Err(libc::ECHILD),
        }
    }

    /// A file that nobody has open any more leaves all epoll sets.
    pub(super) fn forget_closed(&mut self) {
        let open: BTreeSet<usize> = self.all_fds().map(|fd| fd.0).collect();
        for file in &mut self.files {
            if let What::Epoll(targets) = &mut file.what {
                targets.retain(|(_, target)| open.contains(target));
            }
        }
    }

    pub(super) fn open(&mut self, pid: i32, what: What, flags: i32) -> i32 {
        self.files.push(File { what, flags: flags & KEPT, pos: 0 });
        let file = self.files.len() - 1;
        self.install(pid, file, flags & libc::O_CLOEXEC != 0)
    }

    fn install(&mut self, pid: i32, file: usize, cloexec: bool) -> i32 {
        let fds = self.table(pid);
        let fd = (0..).find(|n| !fds.contains_key(n)).expect("numbers do not end");
        fds.insert(fd, (file, cloexec));
        fd
    }

    /// Both ends, read end first.
    pub(super) fn pipe(&mut self, pid: i32) -> (i32, i32) {
        self.pipes.push(Vec::new());
        let pipe = self.pipes.len() - 1;
        let read = self.open(pid, What::Pipe(pipe), libc::O_RDONLY);
        (read, self.open(pid, What::Pipe(pipe), libc::O_WRONLY))
    }

    pub(super) fn file(&mut self, pid: i32, fd: i32) -> Result<&mut File, i32> {
        let &(file, _) = self.table(pid).get(&fd).ok_or(libc::EBADF)?;
        Ok(&mut self.files[file])
    }

    /// Opens what a descriptor refers to once more.
    pub(super) fn reopen(&mut self, pid: i32, fd: i32, flags: i32) -> Outcome {
        let what = self.file(pid, fd)?.what.clone();
        Ok(self.open(pid, what, flags).into())
    }

    pub(super) fn dup(&mut self, pid: i32, fd: i32) -> Outcome {
        let &(file, _) = self.table(pid).get(&fd).ok_or(libc::EBADF)?;
        Ok(self.install(pid, file, false).into())
    }

    pub(super) fn dup3(&mut self, pid: i32, from: i32, to: i32, cloexec: bool) -> Outcome {
        let fds = self.table(pid);
        let &(file, _) = fds.get(&from).ok_or(libc::EBADF)?;
        if from == to {
            return Err(libc::EINVAL);
        }
        fds.insert(to, (file, cloexec));
        self.forget_closed();
        Ok(to.into())
    }

    pub(super) fn close(&mut self, pid: i32, fd: i32) -> Outcome {
        self.table(pid).remove(&fd).ok_or(libc::EBADF)?;
        self.forget_closed();
        Ok(0)
    }

    pub(super) fn epoll_add(&mut self, pid: i32, epoll: i32, fd: i32) -> Outcome {
        let &(target, _) = self.table(pid).get(&fd).ok_or(libc::EBADF)?;
        if !matches!(self.files[target].what, What::Pipe(_) | What::EventFd(_) | What::PidFd(_) | What::DeadPidFd(_)) {
            return Err(libc::EPERM);
        }
        match &mut self.file(pid, epoll)?.what {
            What::Epoll(targets) => {
                if targets.insert((fd, target)) {
                    Ok(0)
                } else {
                    Err(libc::EEXIST)
                }
            }
            _ => Err(libc::EINVAL),
        }
    }

    /// Maps pages where nothing is mapped.
    pub(super) fn map(&mut self, pid: i32, start: u64, pages: impl Iterator<Item = Page>) -> Outcome {
        let memory = self.pages(pid);
        for (n, page) in pages.enumerate() {
            if memory.insert(start + n as u64 * PAGE, page).is_some() {
                return Err(libc::EEXIST);
            }
        }
        Ok(start as i64)
    }

    /// mmap(2) of a descriptor, with MAP_FIXED_NOREPLACE.
    pub(super) fn mmap(&mut self, pid: i32, [start, len, prot, flags, fd, at]: [u64; 6]) -> Outcome {
        let (prot, flags, fd) = (prot as u8, flags as i32, fd as i32);
        let shared = flags & libc::MAP_TYPE == libc::MAP_SHARED;
        let from: Box<dyn Fn(u64) -> Origin> = if flags & libc::MAP_ANONYMOUS != 0 {
            Box::new(|_| Origin::Anonymous)
        } else {
            let file = self.file(pid, fd)?.clone();
            let may_write = file.flags & libc::O_ACCMODE == libc::O_RDWR;
            if shared && !may_write && prot & libc::PROT_WRITE as u8 != 0 {
                return Err(libc::EACCES);
            }
            match file.what {
                What::Memory(object) => Box::new(move |n| Origin::Memory { object, offset: at / PAGE + n }),
                What::Path(path) if shared => {
                    Box::new(move |n| Origin::Shared { path: path.clone(), offset: at / PAGE + n, may_write })
                }
                What::Path(path) => Box::new(move |n| Origin::Private { path: path.clone(), offset: at / PAGE + n }),
                _ => return Err(libc::ENODEV),
            }
        };
        let flags = VmaFlags { noreserve: flags & libc::MAP_NORESERVE != 0, ..VmaFlags::default() };
        self.map(pid, start, (0..len / PAGE).map(|n| Page { flags, ..Page::new(from(n), prot) }))
    }

    /// Unmaps a range; what must stay may not be in it.
    pub(super) fn munmap(&mut self, pid: i32, start: u64, len: u64) -> Outcome {
        let memory = self.pages(pid);
        let gone: Vec<u64> = memory.range(start..start + len).map(|(at, _)| *at).collect();
        for at in gone {
            if memory.remove(&at).is_some_and(|p| p.from == Origin::Foreign { stays: true }) {
                return Err(libc::EFAULT);
            }
        }
        Ok(0)
    }

    /// Moves the whole of one of the kernel's mappings.
    pub(super) fn mremap(&mut self, pid: i32, from: u64, len: u64, to: u64) -> Outcome {
        let memory = self.pages(pid);
        let mut pages = Vec::new();
        for at in (from..from + len).step_by(PAGE as usize) {
            pages.push(memory.remove(&at).ok_or(libc::EFAULT)?);
        }
        self.map(pid, to, pages.into_iter())
    }

    /// Changes every page of a range, all of which must be mapped.
    pub(super) fn change(&mut self, pid: i32, start: u64, len: u64, change: impl Fn(u64, &mut Page)) -> Outcome {
        let memory = self.pages(pid);
        for (n, at) in (start..start + len).step_by(PAGE as usize).enumerate() {
            let page = memory.get_mut(&at).filter(|p| p.from != Origin::Foreign { stays: true });
            change(n as u64, page.ok_or(libc::ENOMEM)?);
        }
        Ok(0)
    }

    pub(super) fn mprotect(&mut self, pid: i32, start: u64, len: u64, prot: u8) -> Outcome {
        let read_only = |p: &Page| matches!(p.from, Origin::Shared { may_write: false, .. });
        let writes = prot & libc::PROT_WRITE as u8 != 0;
        if writes && self.pages(pid).range(start..start + len).any(|(_, p)| read_only(p)) {
            return Err(libc::EACCES);
        }
        self.change(pid, start, len, |_, page| page.prot = prot)
    }

    /// Fills pages from the store.
    pub(super) fn fill(&mut self, pid: i32, start: u64, len: u64, store: u64) -> Outcome {
        let writable = |p: &Page| p.is_private() && p.prot & libc::PROT_WRITE as u8 != 0 && !p.guard;
        if !self.pages(pid).range(start..start + len).all(|(_, p)| writable(p)) {
            return Err(libc::EFAULT);
        }
        self.change(pid, start, len, |n, page| page.content = Some(store + n))
    }
}

/// Whether two trees are the same but for the numbers of files and pipes; what differs otherwise.
pub(super) fn compare(wanted: &World, found: &World) -> Result<(), String> {
    let pids = |w: &World| w.processes.keys().copied().collect::<Vec<_>>();
    if pids(wanted) != pids(found) {
        return Err(format!("processes {:?} instead of {:?}", pids(found), pids(wanted)));
    }
    let mut files = BTreeMap::new();
    let (mut pipes, mut dead) = (BTreeMap::new(), BTreeMap::new());
    for (pid, a) in wanted.processes.iter().filter(|p| *p.0 != OUTSIDE) {
        let b = &found.processes[pid];
        let facts = |p: &Process| (p.ppid, p.pgid, p.sid, p.dead, p.tids.clone());
        if facts(a) != facts(b) {
            return Err(format!("process {pid}: {:?} instead of {:?}", facts(b), facts(a)));
        }
        let sharers = |w: &World, same: &dyn Fn(&Process) -> usize| {
            let own = same(&w.processes[pid]);
            let others = w.processes.iter().filter(|(_, p)| p.dead.is_none() && same(p) == own);
            others.map(|p| *p.0).collect::<Vec<_>>()
        };
        if a.dead.is_none() {
            let shared = |w: &World| {
                [|p: &Process| p.table, |p: &Process| p.fs, |p: &Process| p.space, |p: &Process| p.actions]
                    .map(|same| sharers(w, &same))
            };
            if shared(wanted) != shared(found) {
                return Err(format!("process {pid} shares with {:?} instead of {:?}", shared(found), shared(wanted)));
            }
            let directory = |w: &World, p: &Process| w.directories[p.fs].clone();
            if directory(wanted, a) != directory(found, b) {
                return Err(format!("process {pid} is in {:?}", directory(found, b)));
            }
        }
        let numbers = |w: &World| w.fds(*pid).iter().map(|(fd, f)| (*fd, f.1)).collect::<Vec<_>>();
        if numbers(wanted) != numbers(found) {
            return Err(format!("process {pid}: descriptors {:?} instead of {:?}", numbers(found), numbers(wanted)));
        }
        for ((fd, (a, _)), (b, _)) in wanted.fds(*pid).iter().zip(found.fds(*pid).values()) {
            // Each process gets a pidfd of its own, which nobody notices.
            if matches!(wanted.files[*a].what, What::PidFd(_)) {
                if wanted.files[*a].what != found.files[*b].what {
                    return Err(format!("process {pid}: descriptor {fd} is {:?}", found.files[*b]));
                }
            } else if *files.entry(*a).or_insert(*b) != *b {
                return Err(format!("process {pid}: descriptor {fd} has lost its brothers"));
            }
        }
        let (a, b) = (wanted.space(*pid), found.space(*pid));
        if a.exe != b.exe {
            return Err(format!("process {pid} runs {} instead of {}", b.exe, a.exe));
        }
        let all: BTreeSet<u64> = a.pages.keys().chain(b.pages.keys()).copied().collect();
        for at in all {
            let (a, b) = (a.pages.get(&at), b.pages.get(&at));
            if a != b && b.is_none_or(|p| p.from != Origin::Foreign { stays: true }) {
                return Err(format!("process {pid}: page {at:x} is {b:?} instead of {a:?}"));
            }
        }
    }
    if files.values().collect::<BTreeSet<_>>().len() != files.len() {
        return Err("different open files have become one".into());
    }
    for (a, b) in &files {
        let (a, b) = (&wanted.files[*a], &found.files[*b]);
        let same = match (&a.what, &b.what) {
            (What::Pipe(a), What::Pipe(b)) => {
                *pipes.entry(*a).or_insert(*b) == *b && wanted.pipes[*a] == found.pipes[*b]
            }
            (What::DeadPidFd(a), What::DeadPidFd(b)) => {
                *dead.entry(*a).or_insert(*b) == *b && wanted.gone[*a as usize] == found.gone[*b as usize]
            }
            (What::Epoll(a), What::Epoll(b)) => {
                let target = |world: &World, file: usize, same: usize| match world.files[file].what {
                    What::PidFd(pid) => Err(pid),
                    _ => Ok(same),
                };
                let a = a.iter().map(|&(fd, f)| (fd, target(wanted, f, files.get(&f).copied().unwrap_or(usize::MAX))));
                let b = b.iter().map(|&(fd, f)| (fd, target(found, f, f)));
                a.collect::<BTreeSet<_>>() == b.collect::<BTreeSet<_>>()
            }
            (a, b) => a == b,
        };
        if !same || (a.flags, a.pos) != (b.flags, b.pos) {
            return Err(format!("{b:?} instead of {a:?}"));
        }
    }
    if pipes.values().collect::<BTreeSet<_>>().len() != pipes.len() {
        return Err("different pipes have become one".into());
    }
    if dead.values().collect::<BTreeSet<_>>().len() != dead.len() {
        return Err("pidfds of different processes have become those of one".into());
    }
    Ok(())
}
