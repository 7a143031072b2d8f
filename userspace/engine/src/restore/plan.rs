//! The plan of a restore: who forks whom, who opens what, in which stage. A pure function of the image and the
//! [`Environment`]; what cannot be ordered is rejected here, before any process exists.

mod forks;

use super::{
    births::{self, Step},
    descriptors::{Distribution, HighNumbers},
    environment::Environment,
    files::Numbers,
    machine,
    program::{Layout, Program},
    shares::{self, Share},
    vdso::Vdso,
};
use crate::{
    error::{Error, Result},
    image::Image,
    kernel::{PAGE, arch, sys::CLONE_AS_THREAD},
    memory::{
        aio,
        map::{self, Inherited, MapFds, MemoryPolicies, Prots},
        pages::PageFiles,
    },
    objects::{self, Referenced, directory, pidfd, shared_memory, unix},
    tree::{attributes, clocks::Continued, creds, labels, limits, process, seccomp, signals, thread, timers},
};
use standstill_images::types::{
    AddressSpace, Attributes, Bytes, FileKind, LiveTask, OpenFileId, SharedMemoryId, Task, TaskState,
};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

/// Points at which every task waits for all others. What is promised when all have arrived:
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u64)]
pub(crate) enum Stage {
    /// Every process exists, in its session, with its memory mapped and filled.
    Forked = 1,
    /// Every process group has its leader.
    Groups = 2,
    /// Every process is in its group. The dead die now, before anybody else goes on: nobody gets a signal for it.
    Joined = 3,
    /// Memory, files, threads, signals, timers and credentials are in place; only the registers and signal masks are
    /// missing, and the restorer itself is still mapped.
    Done = 4,
}

/// A thread of the plan.
#[derive(Debug)]
pub(crate) struct PlannedThread {
    pub tid: i32,
    /// Index of its program.
    pub program: usize,
    /// It enters a wait again after [`Stage::Done`].
    pub waits: bool,
}

/// A process of the plan.
#[derive(Debug)]
pub(crate) struct PlannedTask {
    pub pid: i32,
    /// It ends before [`Stage::Done`].
    pub ends: bool,
    /// It stops itself before [`Stage::Joined`], and its parent is told then.
    pub stops: bool,
    /// Threads, the leader first.
    pub threads: Vec<PlannedThread>,
    /// It shares the memory of another task, which is before it in the plan.
    pub shares_memory: bool,
    /// Address of a `syscall` instruction in its final memory.
    pub syscall_at: u64,
}

/// What a process begins with.
#[derive(Clone, Copy)]
struct Begin<'a, 'b> {
    /// The memory of who makes it.
    space: &'a AddressSpace,
    prots: &'b Prots,
    /// Attributes of that memory.
    attributes: &'a Attributes,
    /// It shares that memory (CLONE_VM).
    shares: bool,
}

/// A complete plan.
pub(crate) struct Plan {
    pub programs: Vec<Program>,
    /// By order of creation; the root first.
    pub tasks: Vec<PlannedTask>,
    /// Where the restorer lies in every task.
    pub base: u64,
    /// Files with pages that every task inherits.
    pub pages: PageFiles,
    /// Numbers at which every task inherits shared memory objects.
    pub shared_fds: HashMap<SharedMemoryId, i32>,
    /// The same of removed directories.
    pub removed_fds: BTreeMap<Bytes, i32>,
}

struct Planner<'a> {
    image: &'a Image,
    env: &'a Environment,
    clocks: Option<&'a Continued>,
    births: HashMap<i32, Vec<Step>>,
    /// Who shares a descriptor table, and who a working directory.
    tables: HashMap<i32, Share>,
    directories: HashMap<i32, Share>,
    /// How many words tasks wait for.
    words: usize,
    /// Process groups whose leader is gone, by the first of their members.
    stand_ins: BTreeMap<i32, i32>,
    /// Sessions whose leader is gone.
    orphaned: BTreeSet<i32>,
    files: Distribution<'a>,
    shared_fds: HashMap<SharedMemoryId, i32>,
    removed_fds: BTreeMap<Bytes, i32>,
    first_writers: HashMap<SharedMemoryId, OpenFileId>,
    shared_names: HashSet<Vec<u8>>,
    /// Programs of processes whose pidfds outlive them.
    ends: HashMap<u32, usize>,
    pages: PageFiles,
    /// All numbers above the tree's own.
    high: BTreeSet<i32>,
    vdso: Vdso<'a>,
    /// Where the restorer goes; set once the layout is known.
    base: u64,
    programs: Vec<Program>,
    tasks: Vec<PlannedTask>,
}

/// Makes the plan for an image. `clocks`: how those of the tree go on, if they do. `blob` is the size of the restorer's code.
pub(crate) fn plan(image: &Image, env: &Environment, clocks: Option<&Continued>, blob: usize) -> Result<Plan> {
    machine::check(image, env)?;
    // The size of the programs does not depend on their addresses: lay everything out at zero, then for good.
    let draft = build(image, env, clocks, (0, 0))?;
    let size = Layout::size_for(blob, &draft.programs);
    let base = find_gap(image, env, size + Vdso::parking_size(env))?;
    build(image, env, clocks, (base, size))
}

fn build(
    image: &Image,
    env: &Environment,
    clocks: Option<&Continued>,
    (base, programs_size): (u64, u64),
) -> Result<Plan> {
    let births = births::order(&image.tasks, &image.shared_fs, &image.shared_actions, image.inventory.root)?;
    let orphaned = births.values().flatten().filter_map(|step| match step {
        Step::StandIn { sid, .. } => Some(*sid),
        _ => None,
    });
    let orphaned: BTreeSet<i32> = orphaned.collect();
    let mut words = 0;
    let tables = Share::number(shares::tables(image.tasks.values()), &mut words);
    let directories = (0..).zip(&image.shared_fs).flat_map(|(n, s)| s.pids.iter().map(move |&pid| (n, pid)));
    let directories = Share::number(directories, &mut words);
    let mut high = HighNumbers::new(image.tables.values(), image.files.values(), env.fd_limit);
    let pages = PageFiles::plan(image, || high.take())?;
    let shared_fds: HashMap<_, _> = image.shared.keys().map(|&id| Ok((id, high.take()?))).collect::<Result<_>>()?;
    let removed = directory::removed(image.files.values(), image.tasks.values());
    let removed_fds: BTreeMap<_, _> =
        removed.into_iter().map(|path| Ok((path.clone(), high.take()?))).collect::<Result<_>>()?;
    let opened: BTreeSet<OpenFileId> = image.tables.values().flat_map(|t| t.fds.iter().map(|d| d.file)).collect();
    let first_writers = shared_memory::first_writers(opened.iter().map(|id| &image.files[id]), &image.shared);
    let files = Distribution::new(&image.files, &image.tables, &mut high)?;
    let high = pages.numbers().chain(shared_fds.values().copied()).chain(removed_fds.values().copied()).collect();
    let mut planner = Planner {
        image,
        env,
        clocks,
        births,
        tables,
        directories,
        words,
        stand_ins: forks::stand_ins(image, &orphaned),
        orphaned,
        files,
        shared_fds,
        removed_fds,
        first_writers,
        shared_names: unix::shared_names(image.files.values()),
        ends: HashMap::new(),
        pages,
        high,
        vdso: Vdso::plan(image, env, base + programs_size)?,
        base,
        programs: Vec::new(),
        tasks: Vec::new(),
    };
    let root = &image.tasks[&image.inventory.root];
    planner.process(root, None, None)?;
    if planner.tasks.len() != image.tasks.len() + planner.stand_ins.len() + planner.orphaned.len() {
        return Err(Error::ImageContent {
            dir: image.dir.clone(),
            reason: "some processes are not descendants of the root".into(),
        });
    }
    let Planner { programs, tasks, pages, shared_fds, removed_fds, .. } = planner;
    Ok(Plan { programs, tasks, base, pages, shared_fds, removed_fds })
}

/// A range that is free in every task and in this process.
fn find_gap(image: &Image, env: &Environment, size: u64) -> Result<u64> {
    const LOWEST: u64 = 0x1_0000;
    // Stacks that grow down may not come closer than their guard gap (mmap(2), MAP_GROWSDOWN).
    const DISTANCE: u64 = 16 << 20;
    let mut used: Vec<(u64, u64)> = image
        .spaces
        .values()
        .flat_map(|s| s.vmas.iter().map(|v| (v.start, v.end)))
        .chain(env.used.iter().copied())
        .filter(|range| range.1 <= arch::TASK_SIZE) // [vsyscall] lies above
        .collect();
    used.sort_unstable();
    let mut free_from = LOWEST;
    let mut best = None;
    for (start, end) in used.into_iter().chain([(arch::TASK_SIZE, arch::TASK_SIZE)]) {
        if start > free_from && start - free_from >= size + 2 * DISTANCE {
            best = Some((free_from + DISTANCE).next_multiple_of(PAGE));
        }
        free_from = free_from.max(end);
    }
    best.ok_or_else(|| Error::Target("no free range of addresses is common to all processes of the tree".into()))
}

impl<'a> Planner<'a> {
    /// Plans a process and all its descendants; the index of its program. `waiting`: the word that its parent waits for
    /// until the table that they share is as it was.
    fn process(&mut self, task: &'a Task, begin: Option<Begin<'a, '_>>, waiting: Option<usize>) -> Result<usize> {
        let index = self.programs.len();
        self.programs.push(Program::default());
        let mut program = Program::default();
        let births = self.births.get(&task.pid).cloned().unwrap_or_default();
        let slot = self.tasks.len();
        let stops = self.stops(task);
        let ends = task.live.is_none();
        let shares_memory = begin.is_some_and(|b| b.shares);
        self.tasks.push(PlannedTask { pid: task.pid, ends, stops, threads: Vec::new(), shares_memory, syscall_at: 0 });
        let Some(live) = &task.live else {
            self.zombie(task, &births, &mut program);
            self.tasks[slot].threads.push(PlannedThread { tid: task.pid, program: index, waits: false });
            self.programs[index] = program;
            return Ok(index);
        };
        let space = &self.image.spaces[&live.address_space];
        let mut numbers = Numbers::new(self.high.iter().copied());
        match begin {
            None => {
                self.ends();
                self.root_begin(&mut numbers, &mut program)?;
            }
            Some(_) => self.files.inherited.values().for_each(|&fd| numbers.occupy(fd)),
        }
        let unusual = self.unusual(task.pid);
        let (prots, attributes) = match begin {
            Some(Begin { prots, attributes, shares: true, .. }) => (prots.clone(), attributes),
            begin => (self.own_memory((space, unusual), begin, &mut numbers, &mut program)?, unusual),
        };
        self.births(&births, Begin { space, prots: &prots, attributes, shares: false }, &mut program)?;
        if let Some(word) = waiting {
            program.post("let the parent go on", word);
        }
        program.trap(Stage::Forked as u64);
        if !shares_memory {
            map::finish(space, &prots, &mut program);
        }
        self.groups(task, &mut program);
        for pid in births.iter().flat_map(|step| self.stand_ins_of(step)) {
            let args = [pid.into(), 0.into(), libc::__WALL.into(), 0.into()];
            program.call_expecting("reap the stand-in", libc::SYS_wait4, &args, pid);
        }
        self.take_stops(task.pid, &mut program);
        if !shares_memory {
            // All processes exist: nobody is made a copy of it any more.
            self.vdso.restore(task.pid, space, &mut program);
        }
        Share::wait(self.tables.get(&task.pid), "descriptors", &mut program);
        if !shares_memory {
            self.layout(task.pid, space, &mut numbers, &mut program)?;
            attributes::restore_memory_merge(unusual, &self.env.attributes, space, &mut program);
            attributes::restore_barriers(unusual, &mut program);
        }
        self.descriptors(task.pid, live, &mut numbers, &mut program)?;
        if let Some(label) = self.image.labels.get(&task.pid) {
            let fd = numbers.lowest();
            labels::restore(label, self.env.label.as_ref(), fd, &mut program)?;
            numbers.release(fd);
        }
        // Before there are threads: none of them may take a signal that is queued for the process.
        signals::restore_block(&mut program);
        let filters = seccomp::common(&self.image.seccomp, live.threads.iter().map(|t| t.tid));
        seccomp::restore_common(&self.image.seccomp, task.pid, filters, &mut program);
        let threads = self.threads(live, filters, &mut program);
        let waits = self.attributes(task, live, filters, &mut numbers, &mut program)?;
        self.tasks[slot].threads.push(PlannedThread { tid: task.pid, program: index, waits });
        self.tasks[slot].threads.extend(threads);
        self.tasks[slot].syscall_at = self.vdso.syscall_instruction(task.pid, space)?;
        self.programs[index] = program;
        Ok(index)
    }

    /// The attributes of a process, unusual ones or not.
    fn unusual(&self, pid: i32) -> &'a Attributes {
        self.image.attributes.get(&pid).unwrap_or(&attributes::USUAL)
    }

    fn zombie(&self, task: &Task, births: &[Step], program: &mut Program) {
        if births.contains(&Step::Setsid) {
            program.call("setsid", libc::SYS_setsid, &[]);
        }
        program.trap(Stage::Forked as u64);
        self.groups(task, program);
        let name = program.string(&task.comm.0);
        program.call("set the name", libc::SYS_prctl, &[libc::PR_SET_NAME.into(), name]);
        let TaskState::Zombie(status) = task.state else { return };
        process::end(status, task.pid, program);
    }

    /// The root begins as a copy of this process: everything of it goes, and what all share is made.
    fn root_begin(&self, numbers: &mut Numbers, program: &mut Program) -> Result<()> {
        // CLONE_CLEAR_SIGHAND leaves ignored signals ignored.
        signals::restore_default(self.env.ignored, program);
        self.vdso.park(program);
        let end = self.vdso.parking().end;
        program.call("unmap everything below the restorer", libc::SYS_munmap, &[0.into(), self.base.into()]);
        let rest = arch::TASK_SIZE - end;
        program.call("unmap everything above the restorer", libc::SYS_munmap, &[end.into(), rest.into()]);
        if self.image.cgroups.namespace.is_some() {
            // It was put where the roots of the namespace are to be.
            program.call("make a cgroup namespace", libc::SYS_unshare, &[libc::CLONE_NEWCGROUP.into()]);
        }
        if let Some(clocks) = self.clocks {
            let fd = numbers.lowest();
            clocks.restore(fd, program);
            numbers.release(fd);
        }
        self.files.make_inherited(&self.references(), numbers, program)
    }

    /// Makes the programs of processes that only end.
    fn ends(&mut self) {
        for file in self.image.files.values() {
            if let FileKind::DeadPidFd { process, status } = file.kind
                && !self.ends.contains_key(&process)
            {
                self.ends.insert(process, self.programs.len());
                self.programs.push(pidfd::end(status));
            }
        }
    }

    fn references(&self) -> Referenced<'_> {
        Referenced {
            pipes: &self.image.pipes,
            first_writers: &self.first_writers,
            shared_fds: &self.shared_fds,
            removed_fds: &self.removed_fds,
            shared_names: &self.shared_names,
            creds: &self.env.creds,
            ends: &self.ends,
            clocks: self.clocks,
        }
    }

    /// Makes the memory of a process that shares it with nobody who is there already.
    fn own_memory(
        &self,
        (space, unusual): (&AddressSpace, &Attributes),
        begin: Option<Begin<'_, '_>>,
        numbers: &mut Numbers,
        program: &mut Program,
    ) -> Result<Prots> {
        for (start, end) in begin.map_or(Vec::new(), |b| map::to_unmap(space, b.space)) {
            let args = [start.into(), (end - start).into()];
            program.call("unmap what only the parent has", libc::SYS_munmap, &args);
        }
        let theirs = begin.map_or(&self.env.attributes, |b| b.attributes);
        attributes::restore_first(unusual, theirs, program);
        let inherited = begin.map(|b| Inherited { space: b.space, prots: b.prots, policies: &theirs.memory_policies });
        self.memory((space, &unusual.memory_policies), inherited, numbers, program)
    }

    fn memory(
        &self,
        (space, policies): (&AddressSpace, &MemoryPolicies),
        inherited: Option<Inherited<'_>>,
        numbers: &mut Numbers,
        program: &mut Program,
    ) -> Result<Prots> {
        let mut fds: HashMap<OpenFileId, i32> = HashMap::new();
        for id in map::files_needed(space, inherited) {
            fds.insert(id, self.open(id, numbers, program)?);
        }
        let map_fds = MapFds { files: &fds, shared: &self.shared_fds, objects: &self.image.shared, pages: &self.pages };
        let prots = map::restore((space, policies), inherited, &map_fds, program);
        for fd in fds.into_values().collect::<BTreeSet<_>>() {
            program.call("close a mapped file", libc::SYS_close, &[fd.into()]);
            numbers.release(fd);
        }
        Ok(prots)
    }

    fn open(&self, id: OpenFileId, numbers: &mut Numbers, program: &mut Program) -> Result<i32> {
        let file = &self.image.files[&id];
        Ok(objects::create(&[file], &self.references(), numbers, program)?[0])
    }

    fn layout(&self, pid: i32, space: &AddressSpace, numbers: &mut Numbers, program: &mut Program) -> Result<()> {
        aio::restore(pid, space, numbers, program);
        let fd = self.open(space.exe, numbers, program)?;
        let auxv = program.data(&space.auxv);
        let l = &space.layout;
        let block = program.words(&[
            l.start_code,
            l.end_code,
            l.start_data,
            l.end_data,
            l.start_brk,
            l.brk,
            l.start_stack,
            l.arg_start,
            l.arg_end,
            l.env_start,
            l.env_end,
            0,
            (space.auxv.len() as u64) | (fd as u64) << 32,
        ]);
        program.point(block, 88, auxv);
        const PR_SET_MM: i32 = 35;
        const PR_SET_MM_MAP: i32 = 14;
        program.call(
            "set the layout of the address space",
            libc::SYS_prctl,
            &[PR_SET_MM.into(), PR_SET_MM_MAP.into(), block, 104.into(), 0.into()],
        );
        program.call("close the executable", libc::SYS_close, &[fd.into()]);
        numbers.release(fd);
        Ok(())
    }

    fn descriptors(&self, pid: i32, live: &LiveTask, numbers: &mut Numbers, program: &mut Program) -> Result<()> {
        if Share::restores(self.directories.get(&pid)) {
            let held = live.cwd_removed.then(|| self.removed_fds[&live.cwd]);
            directory::enter(&live.cwd, held, program);
        }
        let fd = numbers.lowest();
        process::restore_loginuid(live, self.env.loginuid, fd, program);
        attributes::restore_coredump_filter(self.unusual(pid), &self.env.attributes, fd, program);
        numbers.release(fd);
        let share = self.tables.get(&pid);
        if !Share::restores(share) {
            Share::pass(share, "descriptors", program);
            return Ok(());
        }
        self.files.make_table(&self.image.tables[&live.fd_table], &self.references(), numbers, program)?;
        let mut close: Vec<i32> = self.high.iter().chain(self.files.inherited.values()).copied().collect();
        close.sort_unstable();
        for run in close.chunk_by(|a, b| a + 1 == *b) {
            let (first, last) = (run[0], run[run.len() - 1]);
            program.call("close inherited descriptors", libc::SYS_close_range, &[first.into(), last.into(), 0.into()]);
            run.iter().for_each(|&fd| numbers.release(fd));
        }
        Ok(())
    }

    /// Starts the threads. `filters`: how many seccomp filters they inherit.
    fn threads(&mut self, live: &LiveTask, filters: usize, program: &mut Program) -> Vec<PlannedThread> {
        let pid = live.threads[0].tid;
        let unusual = self.unusual(pid);
        live.threads[1..]
            .iter()
            .map(|t| {
                let index = self.programs.len();
                let mut own = Program::default();
                thread::restore((t, attributes::of_thread(unusual, t.tid)), self.env.thread(), &mut own);
                signals::restore_pending(pid, Some(t.tid), &t.pending, &mut own);
                seccomp::restore_own(&self.image.seccomp, t.tid, filters, &mut own);
                creds::restore(&t.creds, &self.env.creds, &mut own);
                thread::restore_pdeath_signal(t, &mut own);
                let waits = Self::done(t, &mut own);
                self.programs.push(own);
                program.clone_task(format!("start thread {}", t.tid), CLONE_AS_THREAD as u64, 0, t.tid, index);
                PlannedThread { tid: t.tid, program: index, waits }
            })
            .collect()
    }

    /// What comes last for the leader: everything that needs all threads, or after which privileges are gone.
    fn attributes(
        &self,
        task: &Task,
        live: &LiveTask,
        filters: usize,
        numbers: &mut Numbers,
        program: &mut Program,
    ) -> Result<bool> {
        let leader = &live.threads[0];
        let unusual = self.unusual(task.pid);
        thread::restore((leader, attributes::of_thread(unusual, task.pid)), self.env.thread(), program);
        signals::restore_actions(&live.sigactions, program);
        let table = &self.image.tables[&live.fd_table];
        if Share::restores(self.tables.get(&task.pid)) && self.files.has_late(table) {
            signals::restore_mask(leader.blocked, program);
            self.files.make_late(table, &self.references(), numbers, program)?;
            signals::restore_block(program);
        }
        let directory = self.directories.get(&task.pid);
        if Share::restores(directory) {
            // Until then, what is opened lies below the restorer's root.
            Share::wait(directory, "working directory", program);
            process::restore_fs(live, program);
        } else {
            Share::pass(directory, "working directory", program);
        }
        process::restore(live, self.env.personality, program);
        timers::restore_posix_timers(&live.posix_timers, self.clocks, program);
        timers::restore_itimers(&live.itimers, program);
        signals::restore_pending(task.pid, None, &live.pending, program);
        signals::restore_pending(task.pid, Some(task.pid), &leader.pending, program);
        limits::restore(&live.rlimits, &self.env.limits, program);
        seccomp::restore_own(&self.image.seccomp, task.pid, filters, program);
        creds::restore(&leader.creds, &self.env.creds, program);
        if live.dumpable < 2 {
            program.call("set dumpable", libc::SYS_prctl, &[libc::PR_SET_DUMPABLE.into(), live.dumpable.into()]);
        }
        thread::restore_pdeath_signal(leader, program);
        attributes::restore_last(unusual, &self.env.attributes, program);
        Ok(Self::done(leader, program))
    }

    fn done(t: &standstill_images::types::Thread, program: &mut Program) -> bool {
        program.trap(Stage::Done as u64);
        thread::restore_wait(t, program)
    }
}

impl Plan {
    /// All ids the restore needs free.
    pub(crate) fn ids(&self) -> impl Iterator<Item = i32> {
        self.tasks.iter().flat_map(|t| t.threads.iter().map(|t| t.tid))
    }

    /// Program of a thread.
    pub(crate) fn program_of(&self) -> BTreeMap<i32, usize> {
        self.tasks.iter().flat_map(|t| t.threads.iter().map(|t| (t.tid, t.program))).collect()
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
