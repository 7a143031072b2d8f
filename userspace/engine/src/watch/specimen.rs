//! Processes of our own to freeze, for finding out what freezing, reading and thawing a process and a thread cost here
//! and now. The steps are those of a dump itself, so that the costs follow whatever becomes of them.

use super::{
    predict::{Costs, middle},
    rehearse,
    stopwatch::Stopwatch,
};
use crate::{
    error::{Context, Result},
    kernel::{sys::CLONE_AS_THREAD, sys::Mapping},
    objects::{self, Collected},
    observe::{self, FdEntry, Iterators, ProcessState},
    task::{Family, FrozenTree},
    tree::{clocks::Moment, process},
};
use nix::{
    fcntl::OFlag,
    sys::{
        eventfd::EventFd,
        signal::{SigSet, SigmaskHow, pthread_sigmask},
        socket::{AddressFamily, SockFlag, SockType, socketpair},
        wait::waitpid,
    },
    unistd::{Pid, pipe2},
};
use standstill_images::types::Context as Registers;
use std::{
    collections::HashSet,
    fs::File,
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    time::{Duration, Instant},
};

/// Threads besides the first of the specimen that threads are measured with.
const THREADS: u64 = 128;
/// Children of the specimen that processes are measured with.
const CHILDREN: u64 = 12;
/// Files of each sort.
const FILES: usize = 16;
/// The middle one of so many measurements counts: something else may run in between.
const REPEATS: usize = 5;
const STACK: u64 = 16 << 10;

/// A small tree that does nothing. It ends when this is dropped, or when we die: then its pipe is closed.
pub(super) struct Specimen {
    pub pid: i32,
    alive: Option<OwnedFd>,
    _stacks: Mapping,
}

impl Specimen {
    pub(super) fn start(threads: u64, children: u64) -> io::Result<Self> {
        let (wait, alive) = pipe2(OFlag::O_CLOEXEC)?;
        let (ready, tell) = pipe2(OFlag::O_CLOEXEC)?;
        let stacks = Mapping::shared(STACK * threads.max(1))?;
        let plan = Plan {
            threads,
            children,
            wait: wait.as_raw_fd(),
            alive: alive.as_raw_fd(),
            tell: tell.as_raw_fd(),
            stacks: stacks.start(),
        };
        // Our handlers must not run there.
        let mut own = SigSet::empty();
        pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), Some(&mut own))?;
        // SAFETY: the child makes nothing but system calls, on memory that was prepared here.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            // SAFETY: this is the child, alone in its process.
            unsafe { plan.live() }
        }
        pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&own), None)?;
        if pid < 0 {
            return Err(io::Error::last_os_error());
        }
        let specimen = Self { pid, alive: Some(alive), _stacks: stacks };
        drop(tell);
        let mut byte = [0];
        match nix::unistd::read(&ready, &mut byte)? {
            1 => Ok(specimen),
            _ => Err(io::Error::other("the specimen does not start")),
        }
    }
}

impl Drop for Specimen {
    fn drop(&mut self) {
        self.alive = None;
        // It ends by itself now.
        let _ = waitpid(Pid::from_raw(self.pid), None);
    }
}

/// What a specimen does, in numbers: it must not allocate.
struct Plan {
    threads: u64,
    children: u64,
    wait: RawFd,
    alive: RawFd,
    tell: RawFd,
    stacks: u64,
}

impl Plan {
    /// # Safety
    /// For the child of a fork only. Never returns.
    unsafe fn live(&self) -> ! {
        // SAFETY: system calls on descriptors and memory that belong to this process; each thread has a stack of its own
        // and touches nothing else.
        unsafe {
            libc::close(self.alive);
            for n in 1..=self.threads {
                let top = (self.stacks + n * STACK) as *mut libc::c_void;
                if libc::clone(idle, top, CLONE_AS_THREAD, std::ptr::null_mut()) < 0 {
                    libc::_exit(1);
                }
            }
            for _ in 0..self.children {
                // Not fork(3): handlers of the C library would run.
                if libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) == 0 {
                    await_end(self.wait);
                    libc::_exit(0);
                }
            }
            libc::write(self.tell, b"!".as_ptr().cast(), 1);
            libc::close(self.tell);
            await_end(self.wait);
            while libc::waitpid(-1, std::ptr::null_mut(), 0) > 0 {}
            libc::_exit(0)
        }
    }
}

/// Waits until the pipe's other end is closed.
///
/// # Safety
/// None needed: a system call with memory of its own.
unsafe fn await_end(pipe: RawFd) {
    let mut byte = [0u8];
    // SAFETY: the buffer has the size given.
    while unsafe { libc::read(pipe, byte.as_mut_ptr().cast(), 1) } != 0 {}
}

extern "C" fn idle(_: *mut libc::c_void) -> i32 {
    loop {
        // SAFETY: takes no memory.
        unsafe { libc::pause() };
    }
}

/// Files for the specimens to inherit.
fn files() -> io::Result<(Vec<File>, Vec<OwnedFd>)> {
    let plain = (0..FILES).map(|_| File::open("/proc/self/exe")).collect::<io::Result<_>>()?;
    let mut asked = Vec::new();
    for _ in 0..FILES / 4 {
        let (a, b) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)?;
        let (c, d) = pipe2(OFlag::O_CLOEXEC)?;
        asked.extend([a, b, c, d, EventFd::new()?.into()]);
    }
    Ok((plain, asked))
}

/// Times of one specimen, in nanoseconds.
#[derive(Default)]
struct Times {
    /// Without looking who is there, which is measured on the tree itself.
    freeze: f64,
    thaw: f64,
    /// Of the first process with all its threads, and of all other processes.
    first: f64,
    others: f64,
    plain: f64,
    asked: f64,
    thread_bytes: f64,
}

fn elapsed(since: Instant) -> f64 {
    since.elapsed().as_nanos() as f64
}

fn measure(specimen: &Specimen, iterators: &mut Option<Iterators>) -> Result<Times> {
    let mut times = Times::default();
    let (mut family, _) = Family::of(specimen.pid, iterators.as_mut());
    let begin = Instant::now();
    let tree = FrozenTree::freeze(specimen.pid, Duration::from_secs(2), &mut family)?;
    times.freeze = elapsed(begin);
    drop(family);
    let pids = tree.pids();
    times.freeze -= rehearse::list(specimen.pid, &pids, iterators.as_mut());
    let (entries, states) = read(&pids, iterators)?;
    let moment = Moment::now();
    let mut known = process::Known::default();
    for (n, of) in tree.processes().iter().enumerate() {
        let seen = states.iter().find(|s| s.tgid == of.pid && s.layout.is_some());
        let begin = Stopwatch::start();
        let (task, _) = process::collect(of, seen, &mut known, n as u32, n as u32, &[], moment)?;
        *(if n == 0 { &mut times.first } else { &mut times.others }) += begin.nanoseconds();
        if let Some(thread) = task.live.as_ref().and_then(|l| l.threads.first()) {
            let Registers::X86_64 { regs, xstate } = &thread.context;
            times.thread_bytes = (xstate.len() + regs.len() * 5) as f64 + 200.0;
        }
    }
    let first = |e: &&FdEntry| e.tgid == specimen.pid;
    let mut all = Collected::new(entries.len() as u32, moment);
    let (mut plain, mut asked, mut known) = (Vec::new(), Vec::new(), HashSet::new());
    for entry in entries.iter().filter(first).filter(|e| known.insert(e.file)) {
        let begin = Stopwatch::start();
        // Others of our descriptors, as the terminal, may be such as no dump can keep.
        if objects::dump(entry, &entries, &mut all).is_err() {
            continue;
        }
        let took = begin.nanoseconds();
        match all.files.last().is_some_and(|f| objects::is_asked(&f.kind)) {
            true => asked.push(took),
            false => plain.push(took),
        }
    }
    // The first ones wait for memory that the others of many find in the caches.
    (times.plain, times.asked) = (middle(plain), middle(asked));
    let begin = Instant::now();
    drop(tree);
    times.thaw = elapsed(begin);
    Ok(times)
}

fn read(pids: &[i32], iterators: &mut Option<Iterators>) -> Result<(Vec<FdEntry>, Vec<ProcessState>)> {
    let what = || "read a specimen".into();
    let other = io::Error::other::<observe::ObserveError>;
    Ok(match iterators {
        Some(iterators) => (
            iterators.files(pids).map_err(other).context(what)?,
            iterators.processes(pids).map_err(other).context(what)?,
        ),
        None => (observe::procfs::files(pids).map_err(other).context(what)?, Vec::new()),
    })
}

/// Measures what the steps of a dump that nobody may try on a running tree cost.
///
/// # Errors
/// When processes cannot be made or frozen, as without CAP_SYS_PTRACE.
pub(super) fn costs(iterators: &mut Option<Iterators>) -> Result<Costs> {
    let made = || "make processes to measure with".into();
    let _files = files().context(made)?;
    let median = |specimen: &Specimen, iterators: &mut Option<Iterators>| -> Result<Times> {
        let all = (0..REPEATS).map(|_| measure(specimen, iterators)).collect::<Result<Vec<_>>>()?;
        let middle = |of: fn(&Times) -> f64| middle(all.iter().map(of).collect());
        Ok(Times {
            freeze: middle(|t| t.freeze),
            thaw: middle(|t| t.thaw),
            first: middle(|t| t.first),
            others: middle(|t| t.others),
            plain: middle(|t| t.plain),
            asked: middle(|t| t.asked),
            thread_bytes: middle(|t| t.thread_bytes),
        })
    };
    let threads = median(&Specimen::start(THREADS, 0).context(made)?, iterators)?;
    let processes = median(&Specimen::start(0, CHILDREN).context(made)?, iterators)?;
    // One equation for each specimen: so many processes and so many threads took so long.
    let solve = |many_threads: f64, each_process: f64| {
        let thread = ((many_threads - each_process) / THREADS as f64).max(0.0);
        (thread, (each_process - thread).max(0.0))
    };
    let (seize_thread, seize_process) = solve(threads.freeze, processes.freeze / (CHILDREN + 1) as f64);
    let (thread, process) = solve(threads.first, processes.others / CHILDREN as f64);
    Ok(Costs {
        seize_thread,
        seize_process,
        process,
        thread,
        plain_file: threads.plain,
        asked_file: threads.asked,
        thaw_thread: threads.thaw / (THREADS + 1) as f64,
        thread_bytes: threads.thread_bytes,
        ..Costs::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specimens_end_when_they_are_dropped() {
        let specimen = Specimen::start(3, 2).unwrap();
        let pid = specimen.pid;
        let tids = crate::kernel::proc::threads(pid).unwrap();
        assert_eq!(tids.len(), 4);
        let children = crate::kernel::proc::children(pid, &tids).unwrap();
        assert_eq!(children.len(), 2);
        drop(specimen);
        for pid in children.into_iter().chain([pid]) {
            assert!(crate::kernel::proc::stat(pid).is_err(), "process {pid} is still there");
        }
    }

    #[test]
    fn every_step_costs_something() {
        let mut seen = Vec::new();
        let plausible = (0..5).any(|_| {
            let costs = costs(&mut None).unwrap();
            // What a thread costs can hide what a process does.
            let process = costs.process + costs.thread;
            let steps = [costs.seize_thread, costs.thread, process, costs.thaw_thread, costs.asked_file];
            let all = steps.iter().all(|cost| (100.0..1e8).contains(cost));
            seen.push(costs);
            all
        });
        // One measurement is a difference of two, and on a busy machine may say anything.
        assert!(plausible, "{seen:?}");
    }
}
