//! What is collected of a frozen tree, and the records that it becomes.

use super::{DumpOptions, Phases, observer::Observer, sharing::Unchanged, trackings::Trackings};
use crate::{
    error::{Context, Error, Result},
    image,
    kernel::{PAGE, pagemap, proc},
    memory::{
        self,
        private::{self, PrivatePages},
    },
    objects::{self, Collected, link_remap::Links, system_v},
    observe::FdEntry,
    restore::{births, environment},
    task::FrozenTree,
    tree::{cgroups, clocks::Moment, labels, process, sharing::Sharing},
};
use standstill_images::types::{
    AddressSpace, AddressSpaceId, Attributes, Backing, Cgroups, Clocks, Descriptor, DumpCounts, FdTable, FileKind,
    Inventory, Label, OpenFileId, Seccomp, SharedActions, SharedFs, Task, Vma,
};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::SystemTime,
};

/// Everything collected under the freeze.
pub(super) struct State {
    root: i32,
    pub tasks: Vec<Task>,
    /// In the order of the frozen processes that are the first to have them, as `private` is.
    pub spaces: Vec<AddressSpace>,
    pub private: Vec<PrivatePages>,
    /// Of shared memory, what need not be copied.
    pub shared: Unchanged,
    tables: Vec<FdTable>,
    shared_fs: Vec<SharedFs>,
    shared_actions: Vec<SharedActions>,
    pub seccomp: Option<Seccomp>,
    attributes: Vec<Attributes>,
    labels: Vec<Label>,
    pub cgroups: Option<Cgroups>,
    clocks: Clocks,
    pub objects: Collected,
    vdso: Vec<u8>,
}

/// Collects the state of a frozen tree. `trackings`: what is known of its pages. `protect`: their changes are tracked
/// further on.
pub(super) fn collect(
    tree: &FrozenTree,
    options: &DumpOptions,
    observer: &mut Observer,
    trackings: &mut Trackings,
    protect: bool,
    phases: &mut Phases,
) -> Result<State> {
    let pids = tree.pids();
    if let Some(pid) = tree.processes().iter().find_map(|p| p.dead_leader) {
        observer.use_procfs(pid);
    }
    trackings.part();
    let seen = observer.read(&pids, options.paranoid)?;
    let moment = Moment::now();
    let sharing = Sharing::of(tree.processes(), &seen.processes)?;
    let together = sharing.of_one_memory(tree.processes());
    trackings.share(together.iter().flat_map(|group| group[1..].iter().map(|p| (p.id(), group[0].id()))));
    phases.end("descriptors");
    let entries = &seen.files;
    trackings.refuse_direct_io(entries);
    let next = entries.iter().map(|e| e.file.0 + 1).max().unwrap_or(0);
    let mut state = State {
        root: options.pid,
        tasks: Vec::new(),
        spaces: Vec::new(),
        private: Vec::new(),
        shared: Unchanged::new(),
        tables: tables(&pids, &sharing, entries),
        shared_fs: sharing.shared_fs(tree.processes()),
        shared_actions: sharing.shared_actions(tree.processes()),
        seccomp: None,
        attributes: Vec::new(),
        clocks: Clocks::default(),
        labels: labels::collect(tree.processes())?,
        cgroups: None,
        objects: Collected::new(next, moment),
        vdso: Vec::new(),
    };
    state.objects.links = Links::new(options.link_remap);
    for (key, object) in trackings.sharing.objects() {
        let source = object.source.try_clone().context(|| "duplicate a descriptor".into())?;
        state.objects.known_sources.insert(key, source);
    }
    let mut done = HashSet::new();
    for entry in entries.iter().filter(|e| done.insert(e.file.0)) {
        objects::dump(entry, entries, &mut state.objects)?;
    }
    phases.end("files");
    let mut known = process::Known::default();
    known.namespaces.may_have_cgroups(options.cgroups);
    let mut mappings = Vec::with_capacity(pids.len());
    for (n, process) in tree.processes().iter().enumerate() {
        let id = sharing.memory[n] as u32;
        let observed = seen.processes.get(&process.pid).filter(|p| p.layout.is_some());
        // Memory that several have is told of by the first.
        let first = sharing.memory[n] == n;
        let mapped = seen.vmas.get(&process.pid).filter(|_| first).map_or(&[][..], Vec::as_slice);
        let (task, brk) = process::collect(process, observed, &mut known, id, sharing.files[n] as u32, mapped, moment)?;
        state.tasks.push(task);
        if first {
            let tracked = trackings.of(process.id()).is_some();
            let (space, areas) =
                memory::collect::collect(process.pid, id, brk, observed, mapped, &mut state.objects, tracked)?;
            state.spaces.push(space);
            mappings.push((process, areas));
        }
    }
    let firsts: Vec<i32> = mappings.iter().map(|(process, _)| process.pid).collect();
    memory::aio::collect(&firsts, &mut state.spaces, observer.aio.as_mut())?;
    if options.cgroups {
        state.cgroups = Some(cgroups::collect(tree.processes(), known.namespaces.cgroup())?);
    }
    state.clocks = moment.clocks(known.namespaces.time())?;
    state.seccomp = known.seccomp.into_record();
    state.attributes = known.attributes;
    state.vdso = vdso(pids[0], state.spaces.first())?;
    for &pid in tree.zombies() {
        state.tasks.push(process::collect_zombie(pid)?);
    }
    check_restorable(&state, options)?;
    phases.end("tasks");
    // Nobody else in the tree needs the processors now.
    let threads = pagemap::scanners();
    if trackings.sharing.objects().next().is_some() {
        state.shared = trackings.look_at_shared(&firsts, observer.iterators(), protect, threads);
    }
    for ((process, areas), space) in mappings.into_iter().zip(&mut state.spaces) {
        let tracking = trackings.of(process.id());
        let (private, guards) = private::look(process.pid, &areas, tracking, protect, threads)?;
        space.guards = guards.into_iter().map(|g| (g.start, g.end)).collect();
        state.private.push(private);
    }
    phases.end("scan");
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
    system_v::check(&state.tasks, &state.spaces, &state.objects.shared)?;
    for file in &state.objects.files {
        if let FileKind::PidFd { pid } = file.kind
            && !by_pid.contains_key(&pid)
        {
            let mut threads = state.tasks.iter().filter_map(|t| t.live.as_ref()).flat_map(|live| &live.threads);
            let whose = match threads.any(|t| t.tid == pid) {
                true => format!("a pidfd of thread {pid}, which is not the first of its process,"),
                false => format!("a pidfd of process {pid}, outside the tree,"),
            };
            return Err(Error::unsupported(options.pid, whose, "close it before the dump"));
        }
    }
    let births = births::order(&by_pid, &state.shared_fs, &state.shared_actions, options.pid)?;
    for step in births.values().flatten() {
        if let births::Step::StandIn { sid, .. } = step
            && proc::stat(*sid).is_ok()
        {
            return Err(Error::Target(format!(
                "the leader of session {sid} is outside the tree: dump the tree from the session's leader"
            )));
        }
    }
    Ok(())
}

impl State {
    /// Where among the spaces the memory of each living process is.
    pub(super) fn homes(&self) -> HashMap<i32, usize> {
        let places: HashMap<AddressSpaceId, usize> = self.spaces.iter().map(|s| s.id).zip(0..).collect();
        self.tasks.iter().filter_map(|t| Some((t.pid, places[&t.live.as_ref()?.address_space]))).collect()
    }

    /// Parents by pid.
    pub(super) fn parents(&self) -> HashMap<i32, i32> {
        self.tasks.iter().map(|t| (t.pid, t.ppid)).collect()
    }

    /// How much there was to do.
    pub(super) fn counts(&self) -> DumpCounts {
        let pids: HashSet<i32> = self.tasks.iter().map(|t| t.pid).collect();
        let parents = self.parents();
        let inherits = |pid: i32| parents.get(&pid).is_some_and(|p| pids.contains(p));
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
            compared: self.private.iter().filter(|p| inherits(p.pid)).map(pages).sum(),
        }
    }

    pub(super) fn into_records(self, options: &DumpOptions) -> Result<image::Records> {
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
            shared_fs: self.shared_fs,
            shared_actions: self.shared_actions,
            seccomp: self.seccomp,
            attributes: self.attributes,
            labels: self.labels,
            cgroups: self.cgroups,
            clocks: self.clocks,
            files: self.objects.files,
            pipes: self.objects.pipes.into_values().collect(),
            shared: self.objects.shared,
        })
    }
}

/// The tables, each once.
fn tables(pids: &[i32], sharing: &Sharing, entries: &[FdEntry]) -> Vec<FdTable> {
    let mut by_pid: HashMap<i32, Vec<Descriptor>> = HashMap::new();
    for e in entries {
        by_pid.entry(e.tgid).or_default().push(Descriptor { fd: e.fd, cloexec: e.cloexec, file: e.file.0 });
    }
    pids.iter()
        .enumerate()
        .filter(|(n, _)| sharing.files[*n] == *n)
        .map(|(n, pid)| FdTable { id: n as u32, fds: by_pid.remove(pid).unwrap_or_default() })
        .collect()
}
