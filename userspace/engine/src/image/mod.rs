//! A whole image in memory: what the dump writes, what the restore reads, and the checks that its parts fit together.

pub(crate) mod dedup;
pub mod merge;
mod stores;

pub use stores::Store;
pub(crate) use stores::{locate, pages_of, push_run, split};

use crate::{
    error::{Error, Result},
    kernel::hugetlb,
    objects::unix,
};
use standstill_images::{
    frame::{Record, RecordReader, RecordWriter},
    publish::ImageDir,
    store::{PageSet, PageStoreIndex},
    types::{
        AddressSpace, AddressSpaceId, Attributes, AttributesV1, Backing, Cgroups, CgroupsV1, Clocks, DumpStats,
        DumpStatsV1, FdTable, FdTableId, FileKind, Inventory, Label, MemoryPolicy, OpenFile, OpenFileId, PageRun, Pipe,
        PipeId, PrecopyStats, PrecopyStatsV1, Seccomp, SeccompMode, SharedActions, SharedFs, SharedMemory,
        SharedMemoryId, SharedMemoryKind, SharedMemoryV1, Task, TaskState, Vma,
    },
};
use std::{
    collections::{BTreeMap, HashSet},
    path::{Component, Path, PathBuf},
};

/// The records of one dump.
pub(crate) struct Records {
    pub inventory: Inventory,
    pub tasks: Vec<Task>,
    pub spaces: Vec<AddressSpace>,
    pub tables: Vec<FdTable>,
    pub shared_fs: Vec<SharedFs>,
    pub shared_actions: Vec<SharedActions>,
    pub seccomp: Option<Seccomp>,
    pub attributes: Vec<Attributes>,
    pub labels: Vec<Label>,
    pub cgroups: Option<Cgroups>,
    pub clocks: Clocks,
    pub files: Vec<OpenFile>,
    pub pipes: Vec<Pipe>,
    pub shared: Vec<SharedMemory>,
}

/// Writes all records as the manifest and publishes the image. `stores`: those of its parents that it has pages in, oldest
/// first, and its own as the last.
pub(crate) fn publish(
    dir: ImageDir,
    records: &Records,
    stores: &[PageStoreIndex],
    stats: &DumpStats,
    precopy: Option<&PrecopyStats>,
) -> Result<()> {
    fn all<'a, T: Record + serde::Serialize + 'a>(
        writer: &mut RecordWriter,
        records: impl IntoIterator<Item = &'a T>,
    ) -> Result<()> {
        records.into_iter().try_for_each(|r| Ok(writer.push(r)?))
    }
    let mut writer = RecordWriter::new();
    writer.push(&records.inventory)?;
    writer.push(stats)?;
    all(&mut writer, precopy)?;
    all(&mut writer, stores)?;
    all(&mut writer, &records.tasks)?;
    all(&mut writer, &records.spaces)?;
    all(&mut writer, &records.tables)?;
    all(&mut writer, &records.shared_fs)?;
    all(&mut writer, &records.shared_actions)?;
    all(&mut writer, &records.seccomp)?;
    all(&mut writer, &records.attributes)?;
    all(&mut writer, &records.labels)?;
    all(&mut writer, &records.cgroups)?;
    writer.push(&records.clocks)?;
    all(&mut writer, &records.files)?;
    all(&mut writer, &records.pipes)?;
    all(&mut writer, &records.shared)?;
    let names: Vec<&str> = stores.iter().map(|store| &store.file[..]).collect();
    Ok(dir.commit(&writer.finish(), &names)?)
}

/// An image that was read and whose records fit together.
#[derive(Debug)]
pub struct Image {
    /// Its directory.
    pub dir: PathBuf,
    /// Where and with what it was made.
    pub inventory: Inventory,
    /// What the dump cost.
    pub stats: DumpStats,
    /// What was copied before the freeze, if anything.
    pub precopy: Option<PrecopyStats>,
    /// Processes by pid.
    pub tasks: BTreeMap<i32, Task>,
    /// Address spaces.
    pub spaces: BTreeMap<AddressSpaceId, AddressSpace>,
    /// Descriptor tables.
    pub tables: BTreeMap<FdTableId, FdTable>,
    /// Processes that share their working directory.
    pub shared_fs: Vec<SharedFs>,
    /// Processes that share signal actions.
    pub shared_actions: Vec<SharedActions>,
    /// Threads under seccomp.
    pub seccomp: Seccomp,
    /// Unusual attributes of processes, by pid.
    pub attributes: BTreeMap<i32, Attributes>,
    /// Labels of processes, by pid, if a security module gave them any.
    pub labels: BTreeMap<i32, Label>,
    /// Cgroups, if they were recorded.
    pub cgroups: Cgroups,
    /// Clocks at the freeze; `None`: it is an old image.
    pub clocks: Option<Clocks>,
    /// Open file descriptions, and files that are mapped or executed.
    pub files: BTreeMap<OpenFileId, OpenFile>,
    /// Pipes.
    pub pipes: BTreeMap<PipeId, Pipe>,
    /// Shared memory objects.
    pub shared: BTreeMap<SharedMemoryId, SharedMemory>,
    /// Page stores, oldest first; the last one is the image's own.
    pub stores: Vec<Store>,
    used: PageSet,
}

impl Image {
    /// Reads the image in `dir` and checks that its records fit together; page contents are not read.
    ///
    /// # Errors
    /// Missing, truncated, corrupt or newer images.
    pub fn open(dir: &Path) -> Result<Self> {
        let open = ImageDir::open(dir)?;
        let bytes = open.manifest()?;
        let content = |reason: &str| Error::ImageContent { dir: dir.into(), reason: reason.into() };
        let (mut inventory, mut stats, mut precopy, mut stores) = (None, None, None, Vec::new());
        let (mut tasks, mut spaces, mut tables) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let (mut files, mut pipes, mut shared) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let (mut shared_fs, mut shared_actions) = (Vec::new(), Vec::new());
        let (mut seccomp, mut attributes) = (None, BTreeMap::new());
        let (mut cgroups, mut clocks, mut labels) = (None, None, BTreeMap::new());
        let mut twice = false;
        for record in RecordReader::new(&open.manifest_path(), &bytes)? {
            let record = record?;
            match record.kind() {
                Inventory::KIND => twice |= inventory.replace(record.decode::<Inventory>()?).is_some(),
                DumpStats::KIND if record.version() == DumpStatsV1::VERSION => {
                    twice |= stats.replace(record.decode::<DumpStatsV1>()?.into()).is_some();
                }
                DumpStats::KIND => twice |= stats.replace(record.decode::<DumpStats>()?).is_some(),
                PageStoreIndex::KIND => stores.push(PageStoreIndex::decode(&record)?),
                PrecopyStats::KIND if record.version() == PrecopyStatsV1::VERSION => {
                    precopy = Some(record.decode::<PrecopyStatsV1>()?.into());
                }
                PrecopyStats::KIND => precopy = Some(record.decode::<PrecopyStats>()?),
                Task::KIND => twice |= insert(&mut tasks, record.decode::<Task>()?, |t| t.pid),
                AddressSpace::KIND => twice |= insert(&mut spaces, record.decode::<AddressSpace>()?, |s| s.id),
                FdTable::KIND => twice |= insert(&mut tables, record.decode::<FdTable>()?, |t| t.id),
                SharedFs::KIND => shared_fs.push(record.decode::<SharedFs>()?),
                SharedActions::KIND => shared_actions.push(record.decode::<SharedActions>()?),
                Seccomp::KIND => twice |= seccomp.replace(record.decode::<Seccomp>()?).is_some(),
                Attributes::KIND if record.version() == AttributesV1::VERSION => {
                    twice |= insert(&mut attributes, record.decode::<AttributesV1>()?.into(), |a: &Attributes| a.pid);
                }
                Attributes::KIND => twice |= insert(&mut attributes, record.decode::<Attributes>()?, |a| a.pid),
                Label::KIND => twice |= insert(&mut labels, record.decode::<Label>()?, |l| l.pid),
                Cgroups::KIND if record.version() == CgroupsV1::VERSION => {
                    twice |= cgroups.replace(record.decode::<CgroupsV1>()?.into()).is_some();
                }
                Cgroups::KIND => twice |= cgroups.replace(record.decode::<Cgroups>()?).is_some(),
                Clocks::KIND => twice |= clocks.replace(record.decode::<Clocks>()?).is_some(),
                OpenFile::KIND => twice |= insert(&mut files, record.decode::<OpenFile>()?, |f| f.id),
                Pipe::KIND => twice |= insert(&mut pipes, record.decode::<Pipe>()?, |p| p.id),
                SharedMemory::KIND if record.version() == SharedMemoryV1::VERSION => {
                    twice |= insert(&mut shared, record.decode::<SharedMemoryV1>()?.into(), |s: &SharedMemory| s.id);
                }
                SharedMemory::KIND => twice |= insert(&mut shared, record.decode::<SharedMemory>()?, |s| s.id),
                _ => record.unknown()?,
            }
        }
        if twice {
            return Err(content("a record is there twice"));
        }
        if stores.is_empty() {
            return Err(content("the page store's index is missing"));
        }
        let stores = locate(&open, stores)?;
        let mut image = Self {
            dir: dir.into(),
            inventory: inventory.ok_or_else(|| content("the inventory is missing"))?,
            stats: stats.unwrap_or_default(),
            precopy,
            tasks,
            spaces,
            tables,
            shared_fs,
            shared_actions,
            seccomp: seccomp.unwrap_or_default(),
            attributes,
            labels,
            cgroups: cgroups.unwrap_or_default(),
            clocks,
            files,
            pipes,
            shared,
            stores,
            used: PageSet::default(),
        };
        image.check().map_err(|reason| content(&reason))?;
        image.used = pages_of(image.runs());
        image.check_dropped().map_err(|reason| content(&reason))?;
        Ok(image)
    }

    /// How many pages its stores have.
    pub fn pages(&self) -> u64 {
        self.stores.last().map_or(0, |own| own.range().end)
    }

    /// The pages that it uses.
    pub fn used(&self) -> &PageSet {
        &self.used
    }

    /// All runs of pages, of address spaces and of shared memory.
    pub(crate) fn runs(&self) -> impl Iterator<Item = &PageRun> {
        self.spaces.values().flat_map(|s| &s.pages).chain(self.shared.values().flat_map(|o| &o.pages))
    }

    /// Every number refers to something, and every address is one.
    fn check(&self) -> Result<(), String> {
        let root = self.tasks.get(&self.inventory.root).ok_or("the root process is missing")?;
        if root.live.is_none() {
            return Err("the root process is dead".into());
        }
        let mut ids = HashSet::new();
        for task in self.tasks.values() {
            let pid = task.pid;
            if pid <= 0 || !ids.insert(pid) {
                return Err(format!("pid {pid} is there twice or no pid"));
            }
            if let TaskState::Zombie(status) = task.state
                && stops(status)
            {
                return Err(format!("process {pid} has ended by a signal that ends nobody"));
            }
            let Some(live) = &task.live else { continue };
            if live.threads.first().is_none_or(|t| t.tid != pid) {
                return Err(format!("process {pid} has no leader"));
            }
            if let Some(t) = live.threads[1..].iter().find(|t| t.tid <= 0 || !ids.insert(t.tid)) {
                return Err(format!("thread {} is there twice or no thread id", t.tid));
            }
            let short = |info: &Vec<u8>| info.len() != size_of::<libc::siginfo_t>();
            if live.pending.iter().chain(live.threads.iter().flat_map(|t| &t.pending)).any(short) {
                return Err(format!("process {pid} has a pending signal of an unknown format"));
            }
            self.spaces.get(&live.address_space).ok_or(format!("the memory of process {pid} is missing"))?;
            self.tables.get(&live.fd_table).ok_or(format!("the descriptors of process {pid} are missing"))?;
        }
        let mut sharers = HashSet::new();
        for &pid in self.shared_fs.iter().flat_map(|s| &s.pids) {
            if self.tasks.get(&pid).is_none_or(|t| t.live.is_none()) || !sharers.insert(pid) {
                return Err(format!(
                    "process {pid}, which shares its working directory, is dead, missing or there twice"
                ));
            }
        }
        self.check_shared_actions()?;
        self.check_seccomp(&ids)?;
        self.attributes.values().try_for_each(|a| self.check_attributes(a))?;
        if let Some(label) = self.labels.values().find(|l| !crate::tree::labels::is_whole(l)) {
            return Err(format!("process {} has a label of an unknown kind", label.pid));
        }
        self.check_cgroups(&ids)?;
        self.spaces.values().try_for_each(|s| self.check_space(s))?;
        for table in self.tables.values() {
            if !table.fds.is_sorted_by(|a, b| a.fd < b.fd) || table.fds.first().is_some_and(|d| d.fd < 0) {
                return Err(format!("descriptor table {} is out of order", table.id));
            }
            if let Some(d) = table.fds.iter().find(|d| !self.files.contains_key(&d.file)) {
                return Err(format!("file {} of descriptor {} is missing", d.file, d.fd));
            }
        }
        self.files.values().try_for_each(|f| self.check_file(f))?;
        for object in self.shared.values() {
            if object.page_size != 4096 && !huge_page_size(object.page_size) {
                return Err(format!("shared memory object {} has pages of {} bytes", object.id, object.page_size));
            }
            self.check_runs(&object.pages, 0, object.size.saturating_add(4095))
                .map_err(|e| format!("shared memory object {}: {e}", object.id))?;
        }
        Ok(())
    }

    /// `ids`: all threads.
    fn check_seccomp(&self, ids: &HashSet<i32>) -> Result<(), String> {
        let Seccomp { filters, threads } = &self.seccomp;
        if !threads.is_sorted_by(|a, b| a.tid < b.tid) {
            return Err("the threads under seccomp are out of order".into());
        }
        if filters.iter().any(|f| f.program.is_empty() || f.program.len() > 4096) {
            return Err("a seccomp filter has no or too many instructions".into());
        }
        for thread in threads {
            let whole = match &thread.mode {
                SeccompMode::Strict => true,
                SeccompMode::Filter(chain) => {
                    !chain.is_empty() && chain.iter().all(|&number| (number as usize) < filters.len())
                }
            };
            if !whole || !ids.contains(&thread.tid) {
                return Err(format!("thread {}, which is under seccomp, or a filter of it is missing", thread.tid));
            }
        }
        Ok(())
    }

    /// `ids`: all threads.
    fn check_cgroups(&self, ids: &HashSet<i32>) -> Result<(), String> {
        let Cgroups { sets, processes, threads, namespace, directories } = &self.cgroups;
        let missing = |set: &u32| *set as usize >= sets.len();
        if processes.iter().any(|(pid, set)| !self.tasks.contains_key(pid) || missing(set))
            || threads.iter().any(|(tid, set)| !ids.contains(tid) || missing(set))
            || namespace.as_ref().is_some_and(missing)
        {
            return Err("a cgroup or the process in it is missing".into());
        }
        let paths = sets.iter().flatten().map(|c| &c.path).chain(directories.iter().map(|d| &d.path));
        for path in paths.map(|path| path.as_path()) {
            if !path.is_absolute() || path.components().any(|part| part == Component::ParentDir) {
                return Err("a cgroup has a path that leads upwards".into());
            }
        }
        Ok(())
    }

    fn check_attributes(&self, attributes: &Attributes) -> Result<(), String> {
        let pid = attributes.pid;
        let live = self.tasks.get(&pid).and_then(|t| t.live.as_ref());
        let live = live.ok_or(format!("process {pid}, which has unusual attributes, is dead or missing"))?;
        if attributes.leader_exited.is_some() && live.threads.len() < 2 {
            return Err(format!("process {pid} has no living thread"));
        }
        if !attributes.threads.is_sorted_by(|a, b| a.tid < b.tid)
            || attributes.threads.iter().any(|a| live.threads.iter().all(|t| t.tid != a.tid))
        {
            return Err(format!("a thread of process {pid} with unusual attributes is missing or out of order"));
        }
        let policies = &attributes.memory_policies;
        let in_order = policies.is_sorted_by(|a, b| a.1 <= b.0) && policies.iter().all(|p| p.0 < p.1);
        let threads = attributes.threads.iter().filter_map(|t| t.memory_policy.as_ref());
        // The kernel takes a page of mask at most (set_mempolicy(2)).
        let too_long = |policy: &MemoryPolicy| policy.nodes.len() > 512;
        if !in_order || policies.iter().map(|p| &p.2).chain(threads).any(too_long) {
            return Err(format!("the memory policies of process {pid} are out of order or too long"));
        }
        Ok(())
    }

    /// Who shares signal actions is alive and shares its memory, and nobody is there twice.
    fn check_shared_actions(&self) -> Result<(), String> {
        let mut seen = HashSet::new();
        for SharedActions { pids } in &self.shared_actions {
            let space = |pid: &i32| self.tasks.get(pid).and_then(|t| Some(t.live.as_ref()?.address_space));
            let first = pids.first().and_then(space);
            if let Some(pid) = pids.iter().find(|&pid| first.is_none() || space(pid) != first || !seen.insert(*pid)) {
                return Err(format!(
                    "process {pid}, which shares its signal actions, is dead, missing, there twice or has other memory"
                ));
            }
        }
        Ok(())
    }

    fn check_file(&self, file: &OpenFile) -> Result<(), String> {
        let whole = match &file.kind {
            FileKind::Pipe { pipe } => self.pipes.contains_key(pipe),
            FileKind::SharedMemory { object } => self.shared.contains_key(object),
            FileKind::Linked { file, .. } => crate::objects::link_remap::is_link(file.path.as_path()),
            FileKind::PidFd { pid } => self.tasks.contains_key(pid),
            FileKind::DeadPidFd { status, .. } => !stops(status.unwrap_or(0)),
            FileKind::Epoll { targets } => targets.iter().all(|t| self.files.contains_key(&t.file)),
            FileKind::Socket(s) => {
                let whole = |name: &[u8]| {
                    name.is_empty()
                        || (8..=128).contains(&name.len())
                        || s.family == libc::AF_UNIX && (3..=128).contains(&name.len())
                };
                whole(&s.local) && whole(&s.peer) && self.is_mutual(file)
            }
            _ => true,
        };
        if whole { Ok(()) } else { Err(format!("what open file {} refers to is missing", file.id)) }
    }

    /// Whether the peer of a connected socket is connected to it, by the same kind of socket.
    fn is_mutual(&self, file: &OpenFile) -> bool {
        let Some((socket, pair)) = unix::end(file) else { return true };
        let Some(peer) = pair.peer else { return socket.family == libc::AF_UNIX };
        let other = self.files.get(&peer).and_then(unix::end);
        other.is_some_and(|(other, back)| {
            socket.family == libc::AF_UNIX && socket.kind == other.kind && back.peer == Some(file.id) && peer != file.id
        })
    }

    fn check_space(&self, space: &AddressSpace) -> Result<(), String> {
        let in_space = |e: String| format!("address space {}: {e}", space.id);
        let file = |id: &OpenFileId| self.files.contains_key(id);
        if !file(&space.exe) {
            return Err(in_space("the executable is missing".into()));
        }
        let mut end = 0;
        for vma in &space.vmas {
            let aligned = vma.start % 4096 == 0 && vma.end % 4096 == 0;
            if !aligned || vma.start < end || vma.end <= vma.start || vma.end > crate::kernel::arch::TASK_SIZE {
                return Err(in_space(format!("mapping {:x}-{:x} is out of order", vma.start, vma.end)));
            }
            end = vma.end;
            let whole = match &vma.backing {
                Backing::PrivateFile { file: id, .. } | Backing::SharedFile { file: id, .. } => file(id),
                Backing::SharedAnonymous { object, .. } => self.shared.contains_key(object),
                Backing::SystemV { object, .. } => {
                    self.shared.get(object).is_some_and(|o| matches!(o.kind, SharedMemoryKind::SystemV(_)))
                }
                Backing::HugePages { file: id, offset, page_size, .. } => {
                    let aligned = |at: &u64| at.is_multiple_of(*page_size);
                    huge_page_size(*page_size) && [vma.start, vma.end, *offset].iter().all(aligned) && file(id)
                }
                Backing::AioRing { head, tail, events, .. } => {
                    crate::memory::aio::fits(vma, *head, *tail, events.len())
                }
                Backing::Anonymous { .. } | Backing::Kernel { .. } => true,
            };
            if !whole {
                return Err(in_space(format!("what mapping {:x}-{:x} maps is missing", vma.start, vma.end)));
            }
        }
        if let Some(object) = crate::objects::system_v::attached_in_part(&space.vmas, &self.shared) {
            return Err(in_space(format!("shared memory object {object} is attached in part")));
        }
        self.check_runs(&space.pages, 0, crate::kernel::arch::TASK_SIZE).map_err(in_space)?;
        // Every page must lie in a private mapping, or it would be written over something else.
        let mut vmas = space.vmas.iter().peekable();
        for run in &space.pages {
            let (mut at, end) = (run.start, run.start + run.pages * 4096);
            while at < end {
                while vmas.next_if(|v| v.end <= at).is_some() {}
                match vmas.peek() {
                    Some(v) if v.start <= at && is_private(v) => at = v.end,
                    _ => return Err(in_space(format!("page {at:x} is in no private mapping"))),
                }
            }
        }
        Ok(())
    }

    /// No page that is used may be gone.
    fn check_dropped(&self) -> Result<(), String> {
        for store in &self.stores {
            let dropped = PageSet::from_pairs(&store.index.dropped);
            if store.local(&self.used).ranges().iter().any(|r| dropped.overlaps(r.clone())) {
                return Err(format!("it needs pages that it gave up in {}", store.index.file));
            }
        }
        Ok(())
    }

    fn check_runs(&self, runs: &[PageRun], start: u64, end: u64) -> Result<(), String> {
        let (mut at, pages) = (start, self.pages());
        for run in runs {
            let run_end = run.pages.checked_mul(4096).and_then(|len| run.start.checked_add(len));
            let in_store = run.store.checked_add(run.pages).is_some_and(|last| last <= pages);
            match run_end {
                Some(run_end)
                    if run.pages > 0 && run.start % 4096 == 0 && run.start >= at && run_end <= end && in_store =>
                {
                    at = run_end;
                }
                _ => return Err(format!("the pages at {:x} are out of order or not in the page store", run.start)),
            }
        }
        Ok(())
    }
}

/// Whether a wait status has a signal that stops instead of ending: nobody may be made to wait for such an end.
fn stops(status: i32) -> bool {
    [libc::SIGSTOP, libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU].contains(&(status & 0x7f))
}

/// Whether huge pages can be of this size.
fn huge_page_size(bytes: u64) -> bool {
    bytes.is_power_of_two() && (hugetlb::SMALLEST..=1 << 40).contains(&bytes)
}

/// Whether a mapping has pages of its own.
pub(crate) fn is_private(vma: &Vma) -> bool {
    matches!(
        vma.backing,
        Backing::Anonymous { .. } | Backing::PrivateFile { .. } | Backing::HugePages { shared: false, .. }
    )
}

fn insert<K: Ord, T>(map: &mut BTreeMap<K, T>, record: T, key: impl Fn(&T) -> K) -> bool {
    map.insert(key(&record), record).is_some()
}

#[cfg(test)]
mod tests;
