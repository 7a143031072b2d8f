//! Processes and threads, without their registers.

use super::{memory::Memory, output::text};
use serde::Serialize;
use standstill_engine::Image;
use standstill_images::types::{
    AltStack, Attributes, Creds, Descriptor, ITimer, LiveTask, PosixTimer, Restart, Rseq, Sched, SeccompMode,
    SigAction, Task, TaskState, Thread,
};

/// A process.
#[derive(Serialize)]
pub(crate) struct Process<'a> {
    pub pid: i32,
    pub ppid: i32,
    pub pgid: i32,
    pub sid: i32,
    pub comm: String,
    pub state: State,
    pub exit_signal: i32,
    /// Everything a living process has.
    #[serde(flatten)]
    pub live: Option<Live<'a>>,
}

/// Life state of a process.
#[derive(Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(crate) enum State {
    Running,
    Stopped {
        signal: i32,
        /// Its parent has waited for the stop.
        told: bool,
    },
    /// Dead and not waited for; the status is that of wait(2).
    Dead {
        status: i32,
    },
}

/// The state of a living process.
#[derive(Serialize)]
pub(crate) struct Live<'a> {
    pub threads: Vec<ThreadView<'a>>,
    pub cwd: String,
    pub root: String,
    pub umask: u32,
    /// Hierarchy and path, if they were recorded.
    pub cgroups: Vec<String>,
    /// Other processes that have the same working directory, root and umask (CLONE_FS).
    pub shares_directories_with: Vec<i32>,
    /// Other processes that have the same memory (CLONE_VM), and the same signal actions (CLONE_SIGHAND).
    pub shares_memory_with: Vec<i32>,
    pub shares_signal_actions_with: Vec<i32>,
    pub descriptor_table: u32,
    pub descriptors: &'a [Descriptor],
    /// Of all signals whose action is not the default.
    pub signal_actions: &'a [SigAction],
    pub pending: Vec<Pending>,
    /// ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF.
    pub itimers: &'a [ITimer; 3],
    pub posix_timers: &'a [PosixTimer],
    /// Soft and hard limit by RLIMIT number.
    pub rlimits: &'a [(u64, u64)],
    pub dumpable: u32,
    pub child_subreaper: bool,
    pub personality: u32,
    pub oom_score_adj: i32,
    pub loginuid: u32,
    /// Those that are not the usual ones.
    pub attributes: Option<&'a Attributes>,
    pub memory: Option<Memory<'a>>,
}

/// A thread.
#[derive(Serialize)]
pub(crate) struct ThreadView<'a> {
    pub tid: i32,
    pub comm: String,
    pub restart: &'a Restart,
    pub blocked: u64,
    pub pending: Vec<Pending>,
    pub altstack: &'a AltStack,
    pub clear_child_tid: u64,
    pub robust_list: (u64, u64),
    pub rseq: &'a Option<Rseq>,
    pub pdeath_signal: i32,
    pub creds: &'a Creds,
    pub sched: &'a Sched,
    pub timerslack_ns: u64,
    pub seccomp: Option<&'a SeccompMode>,
}

/// A pending signal, without what was sent along.
#[derive(Serialize)]
pub(crate) struct Pending {
    pub signal: i32,
    pub code: i32,
}

impl Pending {
    /// From a raw `siginfo_t`: signal, errno and code come first.
    fn new(info: &[u8]) -> Self {
        let word = |n: usize| info.get(n..n + 4).and_then(|b| b.try_into().ok()).map_or(0, i32::from_ne_bytes);
        Self { signal: word(0), code: word(8) }
    }
}

impl<'a> Process<'a> {
    pub(crate) fn new(task: &'a Task, image: &'a Image) -> Self {
        Self {
            pid: task.pid,
            ppid: task.ppid,
            pgid: task.pgid,
            sid: task.sid,
            comm: text(&task.comm.0),
            state: match task.state {
                TaskState::Running => State::Running,
                TaskState::Stopped(signal) => State::Stopped { signal, told: false },
                TaskState::StoppedAndTold(signal) => State::Stopped { signal, told: true },
                TaskState::Zombie(status) => State::Dead { status },
            },
            exit_signal: task.exit_signal,
            live: task.live.as_ref().map(|live| Live::new(task.pid, live, image)),
        }
    }
}

impl<'a> Live<'a> {
    fn new(pid: i32, live: &'a LiveTask, image: &'a Image) -> Self {
        let set = image
            .cgroups
            .processes
            .iter()
            .find(|(of, _)| *of == pid)
            .map(|(_, set)| &image.cgroups.sets[*set as usize]);
        let others = |pids: Option<&Vec<i32>>| pids.into_iter().flatten().copied().filter(|&o| o != pid).collect();
        let directories = image.shared_fs.iter().map(|s| &s.pids).find(|pids| pids.contains(&pid));
        let actions = image.shared_actions.iter().map(|s| &s.pids).find(|pids| pids.contains(&pid));
        let same_memory = |t: &&Task| t.live.as_ref().is_some_and(|other| other.address_space == live.address_space);
        let memory = image.tasks.values().filter(same_memory).map(|t| t.pid).collect();
        Self {
            threads: live.threads.iter().map(|thread| ThreadView::new(thread, image)).collect(),
            cwd: text(&live.cwd.0),
            root: text(&live.root.0),
            umask: live.umask,
            cgroups: set
                .into_iter()
                .flatten()
                .map(|c| format!("{}:{}", text(&c.hierarchy.0), text(&c.path.0)))
                .collect(),
            shares_directories_with: others(directories),
            shares_memory_with: others(Some(&memory)),
            shares_signal_actions_with: others(actions),
            descriptor_table: live.fd_table,
            descriptors: image.tables.get(&live.fd_table).map_or(&[], |t| &t.fds),
            signal_actions: &live.sigactions,
            pending: live.pending.iter().map(|info| Pending::new(info)).collect(),
            itimers: &live.itimers,
            posix_timers: &live.posix_timers,
            rlimits: &live.rlimits,
            dumpable: live.dumpable,
            child_subreaper: live.child_subreaper,
            personality: live.personality,
            oom_score_adj: live.oom_score_adj,
            loginuid: live.loginuid,
            attributes: image.attributes.get(&pid),
            memory: image.spaces.get(&live.address_space).map(|space| Memory::new(space, image)),
        }
    }
}

impl<'a> ThreadView<'a> {
    fn new(thread: &'a Thread, image: &'a Image) -> Self {
        let seccomp = image.seccomp.threads.iter().find(|t| t.tid == thread.tid);
        Self {
            tid: thread.tid,
            comm: text(&thread.comm.0),
            restart: &thread.restart,
            blocked: thread.blocked,
            pending: thread.pending.iter().map(|info| Pending::new(info)).collect(),
            altstack: &thread.altstack,
            clear_child_tid: thread.clear_child_tid,
            robust_list: thread.robust_list,
            rseq: &thread.rseq,
            pdeath_signal: thread.pdeath_signal,
            creds: &thread.creds,
            sched: &thread.sched,
            timerslack_ns: thread.timerslack_ns,
            seccomp: seccomp.map(|t| &t.mode),
        }
    }
}
