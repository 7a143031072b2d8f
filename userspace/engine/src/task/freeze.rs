//! A frozen tree is a guard: dropping it lets every task go on exactly as it was.
//!
//! Tasks are seized and interrupted (ptrace(2), PTRACE_SEIZE), so no signal is involved and nobody else notices. The
//! kernel detaches all of them when this process dies, however it dies.

use super::family::Family;
use crate::{
    error::{Context, Error, Result},
    kernel::{
        proc,
        ptrace::{self, Wait},
    },
};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::{Duration, Instant},
};
use tracing::{debug, warn};

/// So many threads take longer to stop than a short sleep does.
const MANY: usize = 16;

/// So long a thread may take, after the thaw, to be stopped by job control again.
const BACK_TO_ITS_STOP: Duration = Duration::from_millis(500);

/// How a thread was when it was frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stopped {
    /// It was running or sleeping.
    ByUs,
    /// Its process was stopped by job control with this signal, and will be again after the thaw.
    ByJobControl(i32),
}

/// A process whose threads are all stopped.
#[derive(Debug)]
pub(crate) struct FrozenProcess {
    /// The number under which it is reached: its process id or, if the leader has exited, the id of its first living
    /// thread. procfs shows nothing of memory, descriptors and directories under the number of such a leader.
    pub pid: i32,
    /// The process id, if the leader has exited while other threads live.
    pub dead_leader: Option<i32>,
    /// Living threads, the leader first, and how they were.
    pub threads: Vec<(i32, Stopped)>,
}

impl FrozenProcess {
    fn new(pid: i32, threads: &[i32]) -> Self {
        let first = threads[0];
        let threads = threads.iter().map(|&tid| (tid, Stopped::ByUs)).collect();
        Self { pid: first, dead_leader: (first != pid).then_some(pid), threads }
    }

    /// Process id.
    pub(crate) fn id(&self) -> i32 {
        self.dead_leader.unwrap_or(self.pid)
    }
}

/// A frozen tree.
#[derive(Debug)]
pub(crate) struct FrozenTree {
    root: i32,
    /// Parents before their children.
    processes: Vec<FrozenProcess>,
    zombies: Vec<i32>,
    seized: HashMap<i32, Option<Stopped>>,
    /// Processes found dead.
    dead: HashSet<i32>,
    deadline: Instant,
    limit: Duration,
}

impl FrozenTree {
    /// Freezes the process `root` and all its descendants.
    ///
    /// # Errors
    /// When a task cannot be seized (traced already, not permitted) or does not stop within `limit`; the tasks already
    /// frozen go on then.
    pub(crate) fn freeze(root: i32, limit: Duration, family: &mut Family<'_>) -> Result<Self> {
        let mut tree = Self::new(root, Vec::new(), limit);
        // A task that is not stopped yet can make new ones, and one that ends leaves its own to another; once all known
        // ones are stopped or were dead before, and the lists show nobody new, nobody new can come.
        while tree.seize_new(root, family)? {
            tree.wait_for_stops()?;
        }
        tree.forget_the_dead();
        if tree.processes.is_empty() {
            return Err(Error::Died(root));
        }
        Ok(tree)
    }

    /// Stops the leader of a process alone, for a system call that it makes for us.
    ///
    /// # Errors
    /// As [`Self::freeze`]; [`Error::Died`] also if only the leader has ended.
    pub(crate) fn stop_leader(pid: i32, limit: Duration) -> Result<Self> {
        let mut tree = Self::new(pid, vec![FrozenProcess::new(pid, &[pid])], limit);
        if tree.seize(pid, pid)? {
            tree.wait_for_stops()?;
        }
        tree.forget_the_dead();
        if tree.processes.is_empty() { Err(Error::Died(pid)) } else { Ok(tree) }
    }

    fn new(root: i32, processes: Vec<FrozenProcess>, limit: Duration) -> Self {
        let (seized, deadline) = (HashMap::new(), Instant::now() + limit);
        Self { root, processes, zombies: Vec::new(), seized, dead: HashSet::new(), deadline, limit }
    }

    /// The processes, parents before children.
    pub(crate) fn processes(&self) -> &[FrozenProcess] {
        &self.processes
    }

    /// Dead members of the tree that nobody waited for.
    pub(crate) fn zombies(&self) -> &[i32] {
        &self.zombies
    }

    /// Seizes every task that is not yet; whether there was any, or somebody was alive until now.
    fn seize_new(&mut self, root: i32, family: &mut Family<'_>) -> Result<bool> {
        family.look();
        let mut new = false;
        self.processes.clear();
        self.zombies.clear();
        let mut queue = vec![root];
        let mut next = 0;
        let mut seen = HashSet::from([root]);
        while let Some(&pid) = queue.get(next) {
            next += 1;
            if Instant::now() > self.deadline {
                return Err(self.timeout("new tasks keep appearing"));
            }
            let tids = family.threads(pid).context(|| format!("list the threads of {pid}"))?;
            let mut living = Vec::new();
            for &tid in &tids {
                if self.seized.contains_key(&tid) {
                    living.push(tid);
                } else if self.seize(pid, tid)? {
                    new = true;
                    living.push(tid);
                }
            }
            if living.first().is_some_and(|&tid| tid != pid) {
                let before = living.len();
                living = self.survivors(pid, living)?;
                new |= living.len() < before;
            }
            if living.is_empty() {
                // Children that it had go to somebody whose list we may have read already.
                new |= self.dead.insert(pid);
                if proc::stat(pid).is_ok_and(|s| s.state == b'Z') {
                    self.zombies.push(pid);
                }
                continue;
            }
            let children = family.children(pid, &living).context(|| format!("list the children of {pid}"))?;
            queue.extend(children.into_iter().filter(|&c| seen.insert(c)));
            self.processes.push(FrozenProcess::new(pid, &living));
        }
        Ok(new)
    }

    /// The leader is dead: which of the other threads live on. A process that was killed just now loses them a moment
    /// later.
    fn survivors(&mut self, pid: i32, mut others: Vec<i32>) -> Result<Vec<i32>> {
        const KILLED: u64 = 1 << (libc::SIGKILL - 1);
        loop {
            for &tid in &others {
                self.has_stopped(tid)?;
            }
            others.retain(|tid| self.seized.contains_key(tid));
            // Whoever ends a process has sent SIGKILL to all of its threads before it is dead itself.
            let is_ending = |&tid: &i32| {
                proc::stat(tid).map_or(true, |s| s.is_ending())
                    || proc::status(pid, tid).map_or(true, |s| s.pending & KILLED != 0)
            };
            if !others.iter().any(is_ending) {
                return Ok(others);
            }
            // Giving back a lot of memory takes a while.
            if Instant::now() > self.deadline {
                return Err(self.timeout(&format!("process {pid} does not end")));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Seizes and interrupts one thread; false if it is dead.
    fn seize(&mut self, pid: i32, tid: i32) -> Result<bool> {
        match ptrace::seize(tid, libc::PTRACE_O_TRACESYSGOOD) {
            Ok(()) => {}
            Err(e) if proc::is_gone(&e) => return Ok(false),
            Err(e) => {
                if proc::stat(tid).map_or(true, |s| matches!(s.state, b'Z' | b'X')) {
                    return Ok(false);
                }
                let tracer = proc::status(pid, tid).map_or(0, |s| s.tracer);
                return Err(if tracer != 0 {
                    Error::Target(format!(
                        "process {pid} (thread {tid}) is traced by process {tracer}: detach that debugger first"
                    ))
                } else if e.raw_os_error() == Some(libc::EPERM) {
                    Error::Missing {
                        what: format!("permission to trace process {pid}"),
                        remedy: "run as root, with CAP_SYS_PTRACE".into(),
                    }
                } else {
                    Error::System { call: format!("PTRACE_SEIZE of thread {tid}"), source: e }
                });
            }
        }
        self.seized.insert(tid, None);
        match ptrace::interrupt(tid) {
            Ok(()) => Ok(true),
            Err(e) if proc::is_gone(&e) => Ok(true), // wait_for_stops sees its end
            Err(e) => Err(e).context(|| format!("PTRACE_INTERRUPT of thread {tid}")),
        }
    }

    /// Whether a seized thread has stopped, or is gone, since it was last asked.
    fn has_stopped(&mut self, tid: i32) -> Result<bool> {
        match ptrace::try_wait(tid) {
            Ok(Wait::EventStop(libc::SIGTRAP)) => {
                self.seized.insert(tid, Some(Stopped::ByUs));
            }
            Ok(Wait::EventStop(signal)) => {
                self.seized.insert(tid, Some(Stopped::ByJobControl(signal)));
            }
            // The interrupt stays pending while the signal is delivered as if we were not there.
            Ok(Wait::Signal(signal)) => {
                ptrace::cont(tid, signal).context(|| format!("deliver signal {signal} to thread {tid}"))?;
                return Ok(false);
            }
            Ok(Wait::Nothing) => return Ok(false),
            Ok(Wait::Event(_) | Wait::Syscall) => {
                ptrace::cont(tid, 0).context(|| format!("continue thread {tid}"))?;
                return Ok(false);
            }
            Ok(Wait::Gone(_)) => {
                self.seized.remove(&tid);
            }
            Err(e) if e.raw_os_error() == Some(libc::ECHILD) => {
                self.seized.remove(&tid);
            }
            Err(e) => return Err(e).context(|| format!("wait for thread {tid}")),
        }
        Ok(true)
    }

    fn wait_for_stops(&mut self) -> Result<()> {
        let mut running: Vec<i32> = self.seized.iter().filter(|(_, s)| s.is_none()).map(|(&t, _)| t).collect();
        let mut idle = 0u32;
        while !running.is_empty() {
            let before = running.len();
            let mut still = Vec::with_capacity(before);
            for tid in running {
                if !self.has_stopped(tid)? {
                    still.push(tid);
                }
            }
            running = still;
            if let (Some(&tid), true) = (running.first(), Instant::now() > self.deadline) {
                let state = proc::stat(tid).map_or('?', |s| s.state as char);
                return Err(self.timeout(&format!("thread {tid} (state {state}) does not stop")));
            }
            if running.len() < before {
                idle = 0;
            }
            if running.len() > MANY {
                // They need the processors, too: asking each of them again and again would only delay them.
                std::thread::sleep(Duration::from_micros(50));
            } else if idle < 100 {
                idle += 1;
                std::thread::yield_now();
            } else {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        Ok(())
    }

    fn timeout(&self, reason: &str) -> Error {
        Error::Timeout { seconds: self.limit.as_secs(), reason: reason.into() }
    }

    /// Leaves in `processes` only threads that are stopped, with how they stopped.
    fn forget_the_dead(&mut self) {
        for process in &mut self.processes {
            process.threads.retain_mut(|(tid, how)| match self.seized.get(tid) {
                Some(Some(stopped)) => {
                    *how = *stopped;
                    true
                }
                _ => false,
            });
        }
        self.processes.retain(|p| !p.threads.is_empty());
    }

    /// The numbers under which all living processes are reached.
    pub(crate) fn pids(&self) -> Vec<i32> {
        self.processes.iter().map(|p| p.pid).collect()
    }

    /// Ends the whole tree with SIGKILL, the root last, so that nobody sees a child die first and acts on it: every
    /// task is still stopped when its signal arrives.
    pub(crate) fn kill(mut self) {
        for process in self.processes.iter().rev() {
            // SAFETY: kill takes no memory. The pid cannot have been reused: its process is stopped and traced by us.
            unsafe { libc::kill(process.id(), libc::SIGKILL) };
        }
        self.seized.clear();
        // The end of each task is reported to its tracer before it is to its parent, and that of a leader only after
        // those of its other threads.
        for process in self.processes.iter().rev() {
            for &(tid, _) in process.threads.iter().rev() {
                while !matches!(ptrace::wait(tid), Ok(Wait::Gone(_)) | Err(_)) {}
            }
        }
        debug!(root = self.root, "tree killed");
    }

    /// Thaws the tree but leaves its processes stopped by SIGSTOP.
    pub(crate) fn leave_stopped(mut self) {
        for process in &self.processes {
            // SAFETY: kill takes no memory.
            unsafe { libc::kill(process.id(), libc::SIGSTOP) };
        }
        for stopped in self.seized.values_mut() {
            *stopped = Some(Stopped::ByJobControl(libc::SIGSTOP));
        }
        self.thaw();
    }

    fn thaw(&mut self) {
        let order: BTreeMap<_, _> = std::mem::take(&mut self.seized).into_iter().collect();
        for (&tid, stopped) in &order {
            if stopped.is_none() {
                // Not stopped yet (we gave up on it): a running task cannot be detached. Give it a moment; otherwise
                // the kernel detaches it when this thread ends.
                let end = Instant::now() + Duration::from_millis(20);
                while Instant::now() < end && matches!(ptrace::try_wait(tid), Ok(Wait::Nothing)) {
                    std::thread::yield_now();
                }
            }
            match ptrace::detach(tid, 0) {
                Ok(()) => {}
                Err(e) if proc::is_gone(&e) => debug!(tid, "gone before the thaw"),
                Err(e) => warn!(tid, "cannot detach: {e}; the kernel does it when this process ends"),
            }
        }
        // Inside of the kernel a thread runs from our stop to that of job control. Nobody shall see it on its way.
        let end = Instant::now() + BACK_TO_ITS_STOP;
        for (tid, _) in order.into_iter().filter(|(_, stopped)| matches!(stopped, Some(Stopped::ByJobControl(_)))) {
            while proc::stat(tid).is_ok_and(|s| matches!(s.state, b'R' | b't')) && Instant::now() < end {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    }
}

impl Drop for FrozenTree {
    fn drop(&mut self) {
        self.thaw();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::Iterators;
    use std::{
        fs,
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering::Relaxed},
        },
    };

    /// A process whose children die at once and leave it their own children.
    fn collector_of_orphans() -> i32 {
        // SAFETY: the children of this fork make system calls only.
        unsafe {
            let pid = libc::fork();
            if pid != 0 {
                return pid;
            }
            libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1);
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            loop {
                if libc::fork() == 0 {
                    if libc::fork() == 0 {
                        libc::usleep(1000);
                    }
                    libc::_exit(0);
                }
                libc::usleep(100);
                while libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) > 0 {}
            }
        }
    }

    /// A process of many threads that sleep.
    fn sleepers() -> i32 {
        const THREADS: usize = 100;
        // SAFETY: the child makes system calls and threads, for which it allocates memory: the C library allows that.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            // SAFETY: prctl takes no memory.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            for _ in 1..THREADS {
                std::thread::spawn(|| std::thread::sleep(Duration::from_secs(1000)));
            }
            std::thread::sleep(Duration::from_secs(1000));
        }
        while proc::threads(pid).unwrap().len() < THREADS {
            std::thread::sleep(Duration::from_millis(1));
        }
        pid
    }

    /// Threads of a process that are not stopped; those that go on last are looked at first.
    fn running(pid: i32) -> Vec<i32> {
        let mut tids = proc::threads(pid).unwrap();
        tids.reverse();
        tids.retain(|tid| proc::stat(*tid).unwrap().state != b'T');
        tids
    }

    #[test]
    fn who_is_stopped_after_the_thaw_is_so_at_once() {
        let pid = sleepers();
        let freeze = || FrozenTree::freeze(pid, Duration::from_secs(10), &mut Family::procfs()).unwrap();
        // Where nobody else wants a processor they are back too soon to be seen.
        let over = Arc::new(AtomicBool::new(false));
        for _ in 0..2 * std::thread::available_parallelism().unwrap().get() {
            let over = over.clone();
            std::thread::spawn(move || while !over.load(Relaxed) {});
        }
        for round in 0..20 {
            freeze().leave_stopped();
            assert_eq!(running(pid), [0; 0], "left stopped, round {round}");
            drop(freeze());
            assert_eq!(running(pid), [0; 0], "stopped before, round {round}");
            // SAFETY: kill takes no memory.
            unsafe { libc::kill(pid, libc::SIGCONT) };
        }
        over.store(true, Relaxed);
        // SAFETY: kill and waitpid take no memory; the process is a child of ours that nobody has waited for.
        unsafe {
            libc::kill(pid, libc::SIGKILL);
            libc::waitpid(pid, std::ptr::null_mut(), 0);
        }
    }

    /// Members of the tree that were not frozen, seen after a while.
    fn escaped(tree: &FrozenTree) -> Vec<i32> {
        let frozen: HashSet<i32> = tree.pids().into_iter().chain(tree.zombies().iter().copied()).collect();
        std::thread::sleep(Duration::from_micros(500));
        let all = fs::read_dir("/proc").unwrap().filter_map(|e| e.unwrap().file_name().to_str()?.parse().ok());
        let is_lost = |pid: &i32| proc::stat(*pid).is_ok_and(|s| frozen.contains(&s.ppid) && !frozen.contains(pid));
        all.filter(is_lost).collect()
    }

    #[test]
    fn children_of_a_task_that_dies_meanwhile_are_found() {
        let root = collector_of_orphans();
        let mut iterators = Iterators::load().ok();
        for round in 0..300 {
            let mut family = match round % 2 {
                0 => Family::procfs(),
                _ => Family::of(root, iterators.as_mut()).0,
            };
            let tree = FrozenTree::freeze(root, Duration::from_secs(10), &mut family).unwrap();
            assert_eq!(escaped(&tree), [0; 0], "round {round}");
            drop(tree);
            std::thread::sleep(Duration::from_micros(round % 1000));
        }
        // SAFETY: kill and waitpid take no memory; the process is a child of ours that nobody has waited for.
        unsafe {
            libc::kill(root, libc::SIGKILL);
            libc::waitpid(root, std::ptr::null_mut(), 0);
        }
    }
}
