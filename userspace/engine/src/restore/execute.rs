//! Carrying out a plan. This process traces every task from its birth (PTRACE_O_TRACEFORK and the like), so each one is
//! known, and dies with us (PTRACE_O_EXITKILL) until it is handed over.

use super::{
    handover,
    plan::{Plan, Stage},
    program::Layout,
};
use crate::{
    error::{Context, Error, Result},
    image::Image,
    kernel::{
        arch, proc,
        ptrace::{self, Wait},
        sys::{self, CloneArgs, Mapping},
    },
    memory::{huge, pages::OpenPages, verify::verify},
    objects::{directory::Held, link_remap, shared_memory, system_v::Segment},
    tree::cgroups::{CgroupOptions, Placement},
};
use standstill_images::types::SharedMemoryId;
use standstill_parasite_abi::stage;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    thread::ScopedJoinHandle,
    time::{Duration, Instant},
};
use tracing::{debug, info, trace, warn};

/// The restorer's code.
pub(crate) static BLOB: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/restorer.bin"));

/// Memory that all tasks of a restore share, and what is known of them.
pub(crate) struct Execution<'a> {
    pub image: &'a Image,
    pub plan: &'a Plan,
    layout: Layout,
    memory: Mapping,
    programs: BTreeMap<i32, usize>,
    /// Every task that exists because of us.
    created: BTreeSet<i32>,
}

impl Drop for Execution<'_> {
    /// Whatever was not handed over is killed: what we made and nothing else.
    fn drop(&mut self) {
        for &tid in &self.created {
            // SAFETY: kill takes no memory. The id belongs to a task traced by us, so it cannot have been reused.
            unsafe { libc::kill(tid, libc::SIGKILL) };
        }
        while !self.created.is_empty() {
            match ptrace::wait_any() {
                Ok((tid, Wait::Gone(_))) => {
                    self.created.remove(&tid);
                }
                Ok(_) => {}
                Err(_) => break,
            }
        }
    }
}

/// Creates the whole tree and brings it to [`Stage::Done`], then hands it over: all tasks run when this returns.
pub(crate) fn run(image: &Image, plan: &Plan, cgroups: &CgroupOptions) -> Result<()> {
    check_ids_are_free(plan)?;
    // Those of the dumped tree are free now.
    huge::check(image)?;
    let layout = Layout::new(plan.base, BLOB.len(), &plan.programs);
    let memory = Mapping::shared_executable_at(plan.base, layout.size()).context(|| "map the restorer".into())?;
    layout.write(memory.bytes_mut(), BLOB, &plan.programs);
    let pages = OpenPages::open(image, &plan.pages)?;
    let (shared, segments) = make_shared(image, &pages)?;
    let removed = Held::make(&plan.removed_fds)?;
    let mut links = link_remap::Removal::prepare(image)?;
    let mut placement = Placement::new(&image.cgroups, cgroups);
    let mut run = Execution { image, plan, layout, memory, programs: plan.program_of(), created: BTreeSet::new() };
    let root = run.create_root(pages.descriptors(), &shared, &removed, &mut placement)?;
    debug!(root, "root created");
    // The pages are checked before the kernel or a task changes one (registering a thread's rseq area does): in the
    // page cache while the tasks read them from there, otherwise where they were put, while these get their protections.
    std::thread::scope(|scope| {
        let cached = scope.spawn(|| pages.verify_cached());
        let reached = run.reach(Stage::Forked).and_then(|()| {
            placement.place_others(root)?;
            let check = scope.spawn(|| verify(image, &pages, &shared));
            let reached = run.reach(Stage::Groups);
            reached.and(join(check))
        });
        join(cached).and(reached)
    })?;
    drop((pages, shared));
    debug!("pages verified");
    [Stage::Joined, Stage::Done].into_iter().try_for_each(|stage| run.reach(stage))?;
    drop(removed);
    placement.place_threads(root)?;
    info!(tasks = plan.tasks.len(), "all tasks restored, handing over");
    links.remove()?;
    handover::hand_over(&run)?;
    links.done();
    run.created.clear();
    placement.keep();
    segments.into_iter().for_each(Segment::keep);
    Ok(())
}

fn join<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// A dumped tree was killed a moment ago perhaps, and its parent may take a while to reap it.
const REAPING: Duration = Duration::from_secs(5);

fn check_ids_are_free(plan: &Plan) -> Result<()> {
    let deadline = Instant::now() + REAPING;
    for tid in plan.ids() {
        // /proc shows threads under their own id too, although no listing has them.
        while let Ok(stat) = proc::stat(tid) {
            if !matches!(stat.state, b'Z' | b'X') || Instant::now() > deadline {
                return Err(Error::PidInUse(tid));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    Ok(())
}

/// Shared memory objects, filled.
fn make_shared(image: &Image, pages: &OpenPages<'_>) -> Result<(HashMap<SharedMemoryId, OwnedFd>, Vec<Segment>)> {
    let (mut made, mut segments) = (HashMap::new(), Vec::new());
    let mut buffer = vec![0u8; 1 << 20];
    for object in image.shared.values() {
        let fd = shared_memory::make(object, &mut segments)?;
        for run in &object.pages {
            let total = run.pages * crate::kernel::PAGE;
            let mut done = 0;
            while done < total {
                let n = (total - done).min(buffer.len() as u64) as usize;
                pages.read(run.store + done / crate::kernel::PAGE, &mut buffer[..n])?;
                shared_memory::fill(&fd, object, run.start + done, &buffer[..n])
                    .context(|| format!("fill shared memory object {}", object.id))?;
                done += n as u64;
            }
        }
        shared_memory::seal(&fd, object)?;
        made.insert(object.id, fd);
    }
    Ok((made, segments))
}

impl Execution<'_> {
    /// clone3(2) of the root: a copy of this process that leaves it for the restorer at once.
    /// It gets descriptors of files with pages, of the shared memory and of removed directories.
    fn create_root(
        &mut self,
        pages: Vec<(&File, i32)>,
        shared: &HashMap<SharedMemoryId, OwnedFd>,
        removed: &Held,
        cgroups: &mut Placement<'_>,
    ) -> Result<i32> {
        let root = self.image.inventory.root;
        let context = || format!("create process {root}");
        let mut fds: Vec<(i32, i32)> =
            shared.iter().map(|(id, fd)| (fd.as_raw_fd(), self.plan.shared_fds[id])).collect();
        fds.extend(removed.files.iter().map(|(file, to)| (file.as_raw_fd(), *to)));
        fds.extend(pages.into_iter().map(|(file, to)| (file.as_raw_fd(), to)));
        // Sources must not be among the targets.
        let highest = fds.iter().map(|f| f.1).max().unwrap_or(0) + 1;
        let copies: Vec<(OwnedFd, i32)> = fds
            .into_iter()
            .map(|(from, to)| {
                // SAFETY: F_DUPFD_CLOEXEC makes a new descriptor of an open one, which nobody else owns.
                let copy = unsafe {
                    let fd = libc::fcntl(from, libc::F_DUPFD_CLOEXEC, highest);
                    (fd >= 0).then(|| OwnedFd::from_raw_fd(fd))
                };
                Ok((copy.ok_or_else(io::Error::last_os_error).context(context)?, to))
            })
            .collect::<Result<_>>()?;
        let moves: Vec<(i32, i32)> = copies.iter().map(|(fd, to)| (fd.as_raw_fd(), *to)).collect();
        let mut keep: Vec<i32> = moves.iter().map(|m| m.1).collect();
        keep.sort_unstable();
        let (gate, opener) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).context(context)?;
        let set_tid = [root];
        let args = CloneArgs {
            exit_signal: libc::SIGCHLD as u64,
            flags: sys::CLONE_CLEAR_SIGHAND,
            set_tid: set_tid.as_ptr() as u64,
            set_tid_size: 1,
            ..Default::default()
        };
        let entry = self.plan.base;
        let task = self.layout.task(0);
        // SAFETY: like fork(2) in a program with threads: until it jumps away the child makes system calls only, on
        // memory prepared here. The restorer and its program are mapped at `entry` and `task` in the child as well.
        let pid = unsafe {
            let pid = libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>());
            if pid == 0 {
                child(&moves, &keep, gate.as_raw_fd(), entry, task);
            }
            pid
        };
        match pid {
            -1 => match io::Error::last_os_error() {
                e if e.raw_os_error() == Some(libc::EEXIST) => return Err(Error::PidInUse(root)),
                e if e.raw_os_error() == Some(libc::EPERM) => {
                    return Err(Error::Missing {
                        what: "CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN, to choose process ids,".into(),
                        remedy: "run as root".into(),
                    });
                }
                e => return Err(e).context(context),
            },
            pid => debug!(pid, "cloned"),
        }
        self.created.insert(root);
        let mut options = libc::PTRACE_O_TRACESYSGOOD
            | libc::PTRACE_O_EXITKILL
            | libc::PTRACE_O_TRACEFORK
            | libc::PTRACE_O_TRACEVFORK
            | libc::PTRACE_O_TRACECLONE;
        if !self.image.seccomp.threads.is_empty() {
            options |= libc::PTRACE_O_SUSPEND_SECCOMP;
        }
        ptrace::seize(root, options).context(context)?;
        // glibc registered a restartable sequence for the thread that the child is a copy of: the child has to take it
        // back before the memory goes, and only the kernel can say where it is.
        ptrace::interrupt(root).context(context)?;
        ptrace::wait(root).context(context)?;
        // Before it has memory, which is accounted to where it is.
        cgroups.place_root(root)?;
        let rseq = ptrace::rseq(root).context(context)?;
        ptrace::cont(root, 0).context(context)?;
        let message = [rseq.address, u64::from(rseq.size), u64::from(rseq.signature)];
        let message: Vec<u8> = message.iter().flat_map(|w| w.to_ne_bytes()).collect();
        nix::unistd::write(&opener, &message).context(context)?;
        Ok(root)
    }

    /// Lets all tasks go on until each has reached `stage`; then all of them are stopped there.
    fn reach(&mut self, stage: Stage) -> Result<()> {
        let (dying, living): (Vec<_>, Vec<_>) = self.plan.tasks.iter().partition(|t| t.ends && stage == Stage::Done);
        let dying: BTreeSet<i32> = dying.iter().map(|t| t.pid).collect();
        self.go_on(&dying)?;
        self.wait_for(stage, BTreeSet::new(), dying)?;
        let expected: BTreeSet<i32> = living
            .iter()
            .flat_map(|t| {
                let n = if stage == Stage::Done { t.threads.len() } else { 1 };
                t.threads[..n].iter().map(|t| t.tid)
            })
            .collect();
        if stage != Stage::Forked {
            self.go_on(&living.iter().map(|t| t.pid).collect())?;
        }
        self.wait_for(stage, expected, BTreeSet::new())?;
        debug!(?stage, "all tasks arrived");
        Ok(())
    }

    fn go_on(&self, tasks: &BTreeSet<i32>) -> Result<()> {
        tasks.iter().try_for_each(|&pid| ptrace::cont(pid, 0).context(|| format!("continue process {pid}")))
    }

    /// Waits until all `expected` tasks stand at `stage` and all `dying` ones are gone.
    fn wait_for(&mut self, stage: Stage, mut expected: BTreeSet<i32>, mut dying: BTreeSet<i32>) -> Result<()> {
        while !expected.is_empty() || !dying.is_empty() {
            let (tid, what) = ptrace::wait_any().context(|| "wait for the tasks".into())?;
            match what {
                Wait::Signal(libc::SIGTRAP) if self.trapped(tid, stage)? => {
                    expected.remove(&tid);
                }
                // It goes on from the stop, as all do, but its process counts as stopped, and stops once it is let go of.
                Wait::Signal(libc::SIGSTOP) if self.plan.tasks.iter().any(|t| t.pid == tid && t.stops) => {
                    ptrace::cont(tid, libc::SIGSTOP).context(|| format!("stop task {tid}"))?;
                }
                // A task that died of a signal dies of it again.
                Wait::Signal(signal) if dying.contains(&tid) => {
                    ptrace::cont(tid, signal).context(|| format!("continue task {tid}"))?;
                }
                Wait::Signal(signal @ (libc::SIGSEGV | libc::SIGBUS | libc::SIGILL | libc::SIGFPE)) => {
                    return Err(self.crashed(tid, signal));
                }
                Wait::Gone(status) => {
                    self.created.remove(&tid);
                    if !dying.remove(&tid) {
                        warn!(tid, status, "task ended early");
                        return Err(self.failed(tid, libc::ESRCH));
                    }
                }
                // Births, their announcements, and signals of one of our tasks to another (SIGCHLD): nothing of the
                // tree's own is under way yet.
                other => {
                    trace!(tid, ?other, "goes on");
                    self.created.insert(tid);
                    ptrace::cont(tid, 0).context(|| format!("continue task {tid}"))?;
                }
            }
        }
        Ok(())
    }

    /// Whether `tid` stands at the breakpoint of `stage`; an error if it stands at that of a failed operation.
    fn trapped(&self, tid: i32, stage: Stage) -> Result<bool> {
        match ptrace::registers(tid).context(|| format!("read the registers of {tid}"))?.rax {
            stage::FAILED => Err(self.failed(tid, 0)),
            reached => Ok(reached == stage as u64),
        }
    }

    fn program(&self, tid: i32) -> Option<usize> {
        self.programs.get(&tid).copied()
    }

    fn failed(&self, tid: i32, errno: i32) -> Error {
        let Some(index) = self.program(tid) else {
            return Error::System { call: format!("task {tid}"), source: io::Error::from_raw_os_error(errno) };
        };
        let (at, error) = self.layout.state(self.memory.bytes_mut(), index);
        let errno = if error != 0 { error as i32 } else { errno };
        let step = self.plan.programs[index].label(at).to_string();
        if errno == libc::EEXIST
            && (step.starts_with("fork process") || step.starts_with("start thread"))
            && let Some(pid) = step.rsplit(' ').next().and_then(|n| n.parse().ok())
        {
            return Error::PidInUse(pid);
        }
        Error::Restore { pid: tid, step, source: io::Error::from_raw_os_error(errno) }
    }

    fn crashed(&self, tid: i32, signal: i32) -> Error {
        let regs = ptrace::registers(tid).unwrap_or_default();
        debug!(tid, signal, ?regs, "the restorer crashed");
        self.failed(tid, libc::EFAULT)
    }

    /// Size of the restorer's memory in every task.
    pub(crate) fn restorer_size(&self) -> u64 {
        self.layout.size()
    }
}

/// The root's first steps in our own code.
///
/// # Safety
/// Runs in a forked child: only system calls, and memory that was ready before the fork.
unsafe fn child(moves: &[(i32, i32)], keep: &[i32], gate: i32, entry: u64, task: u64) -> ! {
    const RSEQ_FLAG_UNREGISTER: i32 = 1;
    let mut rseq = [0u64; 3];
    // SAFETY: as the caller promises; all pointers are to memory of this function or its arguments.
    unsafe {
        // Wait until we are traced: then our end is sure to be noticed.
        while libc::read(gate, rseq.as_mut_ptr().cast(), 24) < 0 {}
        libc::syscall(libc::SYS_rseq, rseq[0], rseq[1], RSEQ_FLAG_UNREGISTER, rseq[2]);
        let none = 0u64;
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const none, 0, 8);
        for &(from, to) in moves {
            if libc::dup3(from, to, 0) < 0 {
                libc::_exit(1);
            }
        }
        let mut next = 0;
        for &fd in keep {
            if fd > next {
                libc::syscall(libc::SYS_close_range, next, fd - 1, 0);
            }
            next = fd + 1;
        }
        libc::syscall(libc::SYS_close_range, next, i32::MAX, 0);
        arch::enter(entry, task)
    }
}
