//! The image of a tree of the model.

use super::{
    history::{History, ROOT},
    model::{File, OUTSIDE, Origin, PAGE, Page, Process, Space, What},
};
use crate::image::Image;
use standstill_images::{
    frame::RecordWriter,
    publish::{ImageDir, MANIFEST},
    store::{Compression, PageStoreIndex, PageWriter},
    types::*,
};
use std::collections::{BTreeMap, BTreeSet};

/// A directory with page stores that images of this test can share.
pub(super) struct Store {
    dir: tempfile::TempDir,
    indexes: Vec<PageStoreIndex>,
}

impl Store {
    /// So many stores with 512 pages together, each third one compressed.
    pub(super) fn new(count: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = |n: usize| {
            let path = dir.path().join(format!("pages-{n:016x}.img"));
            let compression = if n % 3 == 2 { Compression::Lz4 } else { Compression::None };
            let mut writer = PageWriter::create(&path, compression).unwrap();
            let pages = 512 * (n + 1) / count - 512 * n / count;
            writer.append(&vec![1; pages * PAGE as usize]).unwrap();
            writer.finish().unwrap()
        };
        Self { indexes: (0..count).map(store).collect(), dir }
    }

    /// Writes the image of a tree and reads it again, with all the checks that this implies. `vdso`: the bytes of the
    /// kernel's.
    pub(super) fn image(&self, history: &History, vdso: &[u8]) -> Image {
        let mut writer = RecordWriter::new();
        let inventory = Inventory {
            writer: String::new(),
            kernel: "6.0".into(),
            machine: String::new(),
            created: 0,
            root: ROOT,
            shell_job: history.world.processes[&ROOT].sid == OUTSIDE,
            vdso: vdso.to_vec(),
        };
        writer.push(&inventory).unwrap();
        self.indexes.iter().for_each(|index| writer.push(index).unwrap());
        let mut dump = Dump { history, records: Vec::new(), mapped: BTreeMap::new() };
        let opened: BTreeSet<usize> =
            history.world.processes.keys().flat_map(|pid| history.world.fds(*pid).values().map(|f| f.0)).collect();
        for &id in &opened {
            let file = &history.world.files[id];
            dump.records.push(open_file(id as u32, file, &history.world.gone));
            if let What::Pipe(pipe) = file.what {
                dump.pipe(pipe, &mut writer);
            }
        }
        let (mut tables, mut directories) = (BTreeSet::new(), BTreeMap::<usize, Vec<i32>>::new());
        let (mut spaces, mut actions) = (BTreeSet::new(), BTreeMap::<usize, Vec<i32>>::new());
        for (pid, process) in history.world.processes.iter().filter(|p| *p.0 != OUTSIDE) {
            writer.push(&task(*pid, process, &history.world.directories[process.fs])).unwrap();
            if process.dead.is_none() {
                if spaces.insert(process.space) {
                    let space = dump.space(process.space as u32, history.world.space(*pid));
                    writer.push(&space).unwrap();
                }
                actions.entry(process.actions).or_default().push(*pid);
                if tables.insert(process.table) {
                    let fds = history.world.fds(*pid).iter();
                    let fds = fds.map(|(&fd, &(file, cloexec))| Descriptor { fd, cloexec, file: file as u32 });
                    writer.push(&FdTable { id: process.table as u32, fds: fds.collect() }).unwrap();
                }
                directories.entry(process.fs).or_default().push(*pid);
            }
        }
        for pids in directories.into_values().filter(|pids| pids.len() > 1) {
            writer.push(&SharedFs { pids }).unwrap();
        }
        for pids in actions.into_values().filter(|pids| pids.len() > 1) {
            writer.push(&SharedActions { pids }).unwrap();
        }
        for (id, &memfd) in history.objects.iter().enumerate() {
            let kind = if memfd {
                SharedMemoryKind::Memfd { name: Bytes::default(), seals: 0, mode: 0o600, owner: (0, 0) }
            } else {
                SharedMemoryKind::Anonymous
            };
            let object = SharedMemory { id: id as u32, size: 64 * PAGE, kind, pages: Vec::new(), page_size: PAGE };
            writer.push(&object).unwrap();
        }
        dump.records.iter().for_each(|file| writer.push(file).unwrap());
        std::fs::write(self.dir.path().join(MANIFEST), writer.finish()).unwrap();
        assert!(ImageDir::open(self.dir.path()).is_ok());
        Image::open(self.dir.path()).unwrap()
    }
}

struct Dump<'a> {
    history: &'a History,
    records: Vec<OpenFile>,
    /// Files that are mapped: path or object, and whether for writing.
    mapped: BTreeMap<(String, bool), OpenFileId>,
}

impl Dump<'_> {
    fn pipe(&self, pipe: usize, writer: &mut RecordWriter) {
        let first = |f: &OpenFile| matches!(f.kind, FileKind::Pipe { pipe: p } if p == pipe as u32);
        if self.records.iter().filter(|f| first(f)).count() == 1 {
            let content = self.history.world.pipes[pipe].clone();
            let content = if content.is_empty() { Vec::new() } else { vec![content] };
            let record = Pipe { id: pipe as u32, fifo: None, unlinked: None, capacity: 65536, content };
            writer.push(&record).unwrap();
        }
    }

    fn mapped(&mut self, name: String, writable: bool, kind: FileKind) -> OpenFileId {
        let next = (self.history.world.files.len() + self.mapped.len()) as u32;
        let flags = if writable { libc::O_RDWR } else { libc::O_RDONLY } as u32;
        *self.mapped.entry((name, writable)).or_insert_with(|| {
            self.records.push(OpenFile { id: next, flags, pos: 0, owner: None, kind });
            next
        })
    }

    fn backing(&mut self, page: &Page) -> Backing {
        match &page.from {
            Origin::Anonymous => Backing::Anonymous { name: None },
            Origin::Private { path, offset } => {
                Backing::PrivateFile { file: self.mapped(path.clone(), false, regular(path)), offset: offset * PAGE }
            }
            Origin::Shared { path, offset, may_write } => Backing::SharedFile {
                file: self.mapped(path.clone(), *may_write, regular(path)),
                offset: offset * PAGE,
            },
            Origin::Memory { object, offset } if self.history.objects[*object as usize] => {
                let kind = FileKind::SharedMemory { object: *object };
                Backing::SharedFile { file: self.mapped(format!("memfd {object}"), true, kind), offset: offset * PAGE }
            }
            Origin::Memory { object, offset } => Backing::SharedAnonymous { object: *object, offset: offset * PAGE },
            Origin::Kernel { name, .. } => Backing::Kernel { name: name.as_bytes().into() },
            Origin::Foreign { .. } => unreachable!("a tree has its own pages only"),
        }
    }

    fn space(&mut self, id: u32, space: &Space) -> AddressSpace {
        let (mut vmas, mut pages, mut guards) = (Vec::<Vma>::new(), Vec::<PageRun>::new(), Vec::<(u64, u64)>::new());
        for (&at, page) in &space.pages {
            let vma =
                Vma { start: at, end: at + PAGE, prot: page.prot, backing: self.backing(page), flags: page.flags };
            match vmas.last_mut() {
                Some(last) if last.end == at && continues(last, &vma) => last.end += PAGE,
                _ => vmas.push(vma),
            }
            if let Some(store) = page.content {
                match pages.last_mut() {
                    Some(last) if last.start + last.pages * PAGE == at && last.store + last.pages == store => {
                        last.pages += 1
                    }
                    _ => pages.push(PageRun { start: at, pages: 1, store }),
                }
            }
            if page.guard {
                match guards.last_mut() {
                    Some(last) if last.1 == at => last.1 += PAGE,
                    _ => guards.push((at, at + PAGE)),
                }
            }
        }
        let exe = self.mapped(space.exe.clone(), false, regular(&space.exe));
        AddressSpace { id, layout: MmLayout::default(), auxv: vec![0; 16], exe, vmas, pages, guards }
    }
}

/// Whether the kernel would show the two as one mapping.
fn continues(last: &Vma, next: &Vma) -> bool {
    let len = last.end - last.start;
    let backing = match (&last.backing, &next.backing) {
        (Backing::PrivateFile { file: a, offset: x }, Backing::PrivateFile { file: b, offset: y })
        | (Backing::SharedFile { file: a, offset: x }, Backing::SharedFile { file: b, offset: y })
        | (Backing::SharedAnonymous { object: a, offset: x }, Backing::SharedAnonymous { object: b, offset: y }) => {
            a == b && x + len == *y
        }
        (a, b) => a == b,
    };
    backing && last.prot == next.prot && last.flags == next.flags
}

fn regular(path: &str) -> FileKind {
    FileKind::Regular(RegularFile { path: path.as_bytes().into(), size: 0, mtime: (0, 0), mode: libc::S_IFREG })
}

fn open_file(id: u32, file: &File, gone: &[i32]) -> OpenFile {
    let kind = match &file.what {
        What::Path(path) => regular(path),
        What::Memory(object) => FileKind::SharedMemory { object: *object },
        What::Pipe(pipe) => FileKind::Pipe { pipe: *pipe as u32 },
        What::PidFd(pid) => FileKind::PidFd { pid: *pid },
        What::DeadPidFd(process) => FileKind::DeadPidFd { process: *process, status: Some(gone[*process as usize]) },
        What::EventFd(count) => FileKind::EventFd { count: *count, semaphore: false },
        What::Epoll(targets) => {
            let target = |&(fd, file): &(i32, usize)| EpollTarget { fd, file: file as u32, events: 1, data: 0 };
            FileKind::Epoll { targets: targets.iter().map(target).collect() }
        }
        What::Pages(..) => unreachable!("only a restore has it"),
    };
    OpenFile { id, flags: file.flags as u32, pos: file.pos, owner: None, kind }
}

fn task(pid: i32, process: &Process, cwd: &str) -> Task {
    let thread = |&tid: &i32| Thread {
        tid,
        comm: Bytes::default(),
        context: Context::X86_64 { regs: [0; 27], xstate: Vec::new() },
        restart: Restart::Registers,
        blocked: 0,
        pending: Vec::new(),
        altstack: AltStack::default(),
        clear_child_tid: 0,
        robust_list: (0, 0),
        rseq: None,
        pdeath_signal: 0,
        creds: Creds::default(),
        sched: Sched::default(),
        timerslack_ns: 50_000,
    };
    let live = LiveTask {
        threads: std::iter::once(&pid).chain(&process.tids).map(thread).collect(),
        address_space: process.space as u32,
        fd_table: process.table as u32,
        cwd: cwd.as_bytes().into(),
        cwd_removed: false,
        root: b"/"[..].into(),
        umask: 0o22,
        sigactions: Vec::new(),
        itimers: Default::default(),
        posix_timers: Vec::new(),
        pending: Vec::new(),
        rlimits: Vec::new(),
        dumpable: 1,
        child_subreaper: pid == ROOT,
        personality: 0,
        oom_score_adj: 0,
        loginuid: u32::MAX,
    };
    Task {
        pid,
        ppid: process.ppid,
        pgid: process.pgid,
        sid: process.sid,
        state: process.dead.map_or(TaskState::Running, TaskState::Zombie),
        exit_signal: libc::SIGCHLD,
        live: process.dead.is_none().then_some(live),
        comm: Bytes::default(),
    }
}
