//! Processes and threads.

use super::{AddressSpaceId, Bytes, FdTableId};
use serde::{Deserialize, Serialize};

/// A process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// Process id.
    pub pid: i32,
    /// Parent's process id.
    pub ppid: i32,
    /// Process group.
    pub pgid: i32,
    /// Session.
    pub sid: i32,
    /// Running, stopped or dead.
    pub state: TaskState,
    /// Signal sent to the parent at exit (see clone(2)).
    pub exit_signal: i32,
    /// Everything a living process has; `None` for a zombie.
    pub live: Option<LiveTask>,
    /// Name of the leader (`/proc/pid/comm`).
    pub comm: Bytes,
}

/// Life state of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TaskState {
    /// Running or sleeping.
    Running,
    /// Stopped by job control; the signal that stopped it.
    Stopped(i32),
    /// Dead and not waited for; the status as wait(2) encodes it.
    Zombie(i32),
    /// As [`Self::Stopped`], and its parent has waited for the stop already (waitid(2), WSTOPPED).
    StoppedAndTold(i32),
}

/// The state of a living process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LiveTask {
    /// Threads, the leader first.
    pub threads: Vec<Thread>,
    /// The address space.
    pub address_space: AddressSpaceId,
    /// The descriptor table.
    pub fd_table: FdTableId,
    /// Working directory.
    pub cwd: Bytes,
    /// The working directory was removed.
    pub cwd_removed: bool,
    /// Root directory.
    pub root: Bytes,
    /// File mode creation mask.
    pub umask: u32,
    /// Actions of all signals whose action is not the default.
    pub sigactions: Vec<SigAction>,
    /// ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF.
    pub itimers: [ITimer; 3],
    /// POSIX timers (timer_create(2)).
    pub posix_timers: Vec<PosixTimer>,
    /// Signals pending for the process, oldest first: raw `siginfo_t`.
    pub pending: Vec<Vec<u8>>,
    /// Soft and hard resource limits by RLIMIT number.
    pub rlimits: Vec<(u64, u64)>,
    /// `PR_SET_DUMPABLE` value, where it differs from what the credentials imply.
    pub dumpable: u32,
    /// `PR_SET_CHILD_SUBREAPER`.
    pub child_subreaper: bool,
    /// personality(2).
    pub personality: u32,
    /// `/proc/pid/oom_score_adj`.
    pub oom_score_adj: i32,
    /// `/proc/pid/loginuid` (4294967295: unset).
    pub loginuid: u32,
}

/// The clocks of the tree at the freeze, as it saw them itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clocks {
    /// CLOCK_MONOTONIC, in nanoseconds.
    pub monotonic_ns: u64,
    /// CLOCK_BOOTTIME, in nanoseconds.
    pub boottime_ns: u64,
    /// The tree lived in another time namespace than whoever dumped it.
    pub namespace: bool,
}

/// The cgroups that processes and threads are in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroups {
    /// Sets of cgroups, one of each hierarchy; each set once.
    pub sets: Vec<Vec<Cgroup>>,
    /// Processes, with the number of their set.
    pub processes: Vec<(i32, u32)>,
    /// Threads that are elsewhere than their process, with the number of their set.
    pub threads: Vec<(i32, u32)>,
    /// If the tree has a cgroup namespace of its own: the set of its root directories.
    pub namespace: Option<u32>,
    /// All of these cgroups and what is above them, but for the roots of the hierarchies; parents first.
    pub directories: Vec<CgroupDirectory>,
}

/// A cgroup.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Cgroup {
    /// Controllers or name of its hierarchy, as in `/proc/pid/cgroup`: `cpu,cpuacct`, `name=systemd`; empty: version 2.
    pub hierarchy: Bytes,
    /// Path from the root of the dump's cgroup namespace.
    pub path: Bytes,
}

/// What a cgroup gets when it is made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CgroupDirectory {
    /// As in [`Cgroup`].
    pub hierarchy: Bytes,
    /// As in [`Cgroup`].
    pub path: Bytes,
    /// Who may do what with it.
    pub access: Vec<CgroupAccess>,
    /// Files and their contents, in the order in which they have to be written.
    pub properties: Vec<(Bytes, Bytes)>,
}

/// [`Cgroups`] before they had properties.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CgroupsV1 {
    sets: Vec<Vec<CgroupV1>>,
    processes: Vec<(i32, u32)>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct CgroupV1 {
    hierarchy: Bytes,
    path: Bytes,
    access: Vec<CgroupAccess>,
}

impl From<CgroupsV1> for Cgroups {
    fn from(old: CgroupsV1) -> Self {
        let mut new = Self { processes: old.processes, ..Self::default() };
        for set in old.sets {
            let mut cgroups = Vec::new();
            for CgroupV1 { hierarchy, path, access } in set {
                cgroups.push(Cgroup { hierarchy: hierarchy.clone(), path: path.clone() });
                new.directories.push(CgroupDirectory { hierarchy, path, access, properties: Vec::new() });
            }
            new.sets.push(cgroups);
        }
        new
    }
}

/// Permissions of a cgroup or of one of its files (see "Delegation" in cgroups(7)).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CgroupAccess {
    /// Name of the file; empty: the cgroup's directory.
    pub file: Bytes,
    /// Permission bits.
    pub mode: u32,
    /// User and group.
    pub owner: (u32, u32),
}

/// seccomp(2) of the threads that are under it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seccomp {
    /// Filters, each content once.
    pub filters: Vec<SeccompFilter>,
    /// Threads, by id.
    pub threads: Vec<SeccompThread>,
}

/// A filter of seccomp(2).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SeccompFilter {
    /// `SECCOMP_FILTER_FLAG_LOG`, if it was given.
    pub flags: u64,
    /// The program, as it was given to the kernel.
    pub program: Vec<BpfInstruction>,
}

/// An instruction of classic BPF (`struct sock_filter`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BpfInstruction {
    /// Operation.
    pub code: u16,
    /// Instructions to jump over if the condition holds.
    pub jt: u8,
    /// The same if it does not.
    pub jf: u8,
    /// Operand.
    pub k: u32,
}

/// A thread under seccomp(2).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeccompThread {
    /// Thread id.
    pub tid: i32,
    /// Its mode.
    pub mode: SeccompMode,
}

/// Mode of a thread.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SeccompMode {
    /// `SECCOMP_MODE_STRICT`.
    Strict,
    /// `SECCOMP_MODE_FILTER`: numbers of its filters, the oldest first.
    Filter(Vec<u32>),
}

/// Processes that share working directory, root directory and umask (CLONE_FS).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedFs {
    /// The processes.
    pub pids: Vec<i32>,
}

/// Processes that share signal actions (CLONE_SIGHAND), and so their memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedActions {
    /// The processes.
    pub pids: Vec<i32>,
}

/// A thread.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Thread {
    /// Thread id.
    pub tid: i32,
    /// Name.
    pub comm: Bytes,
    /// Registers and extended state.
    pub context: Context,
    /// What the interrupted system call needs to go on, where the registers do not say it.
    pub restart: Restart,
    /// Blocked signals.
    pub blocked: u64,
    /// Signals pending for this thread, oldest first: raw `siginfo_t`.
    pub pending: Vec<Vec<u8>>,
    /// Alternate signal stack.
    pub altstack: AltStack,
    /// `set_tid_address(2)`.
    pub clear_child_tid: u64,
    /// Head and length given to `set_robust_list(2)`.
    pub robust_list: (u64, u64),
    /// Registered restartable sequence area.
    pub rseq: Option<Rseq>,
    /// `PR_SET_PDEATHSIG`.
    pub pdeath_signal: i32,
    /// Credentials.
    pub creds: Creds,
    /// Scheduling.
    pub sched: Sched,
    /// `/proc/tid/timerslack_ns`.
    pub timerslack_ns: u64,
}

/// Registers and extended state, by architecture.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Context {
    /// x86-64: `struct user_regs_struct` and the XSAVE area (`NT_X86_XSTATE`).
    X86_64 {
        /// In the order of `struct user_regs_struct`.
        regs: [u64; 27],
        /// As ptrace gives it, size from the kernel.
        xstate: Vec<u8>,
    },
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Register values can be secrets, and nobody reads an XSAVE area in hex.
        match self {
            Self::X86_64 { xstate, .. } => write!(f, "X86_64 {{ xstate: {} bytes }}", xstate.len()),
        }
    }
}

/// How an interrupted system call goes on (the kernel's `restart_block`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Restart {
    /// The registers say it all.
    Registers,
    /// A wait with a timeout: the call that enters it again.
    Call {
        /// System call number.
        nr: i64,
        /// Its arguments.
        args: [u64; 6],
        /// What was left of the timeout at the freeze, in nanoseconds; `None`: not known, it begins again.
        remaining_ns: Option<u64>,
    },
    /// A wait that had been interrupted before, and nobody knows which: it ends with EINTR.
    Unknown,
}

/// One signal action, as rt_sigaction(2) takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SigAction {
    /// Signal number.
    pub signal: i32,
    /// Handler address, or SIG_IGN.
    pub handler: u64,
    /// `SA_*` flags.
    pub flags: u64,
    /// Return trampoline.
    pub restorer: u64,
    /// Signals blocked while the handler runs.
    pub mask: u64,
}

/// sigaltstack(2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AltStack {
    /// Lowest address.
    pub sp: u64,
    /// `SS_*` flags.
    pub flags: i32,
    /// Bytes.
    pub size: u64,
}

/// rseq(2) registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rseq {
    /// Address of the area.
    pub address: u64,
    /// Its size in bytes.
    pub size: u32,
    /// Signature before abort handlers.
    pub signature: u32,
}

/// setitimer(2), in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ITimer {
    /// Time to the next expiry; 0: not armed.
    pub value_us: u64,
    /// Period; 0: once.
    pub interval_us: u64,
}

/// A timer of timer_create(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PosixTimer {
    /// Timer id.
    pub id: i32,
    /// Clock.
    pub clock: i32,
    /// `SIGEV_*` kind.
    pub notify: i32,
    /// Signal.
    pub signal: i32,
    /// `sigev_value`.
    pub value: u64,
    /// Thread to notify (`SIGEV_THREAD_ID`).
    pub tid: i32,
    /// Nanoseconds to the next expiry; 0: not armed.
    pub value_ns: u64,
    /// Period in nanoseconds.
    pub interval_ns: u64,
}

/// Credentials of a thread.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Creds {
    /// Real, effective, saved and file system user id.
    pub uids: [u32; 4],
    /// Real, effective, saved and file system group id.
    pub gids: [u32; 4],
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Inheritable, permitted, effective, bounding, ambient capability sets.
    pub caps: [u64; 5],
    /// `PR_SET_SECUREBITS`.
    pub securebits: u32,
    /// `PR_SET_NO_NEW_PRIVS`.
    pub no_new_privs: bool,
}

/// Scheduling of a thread.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sched {
    /// `SCHED_*` policy, with `SCHED_RESET_ON_FORK` where set.
    pub policy: u32,
    /// Nice value.
    pub nice: i32,
    /// Static priority of the real-time policies.
    pub priority: u32,
    /// CPUs allowed, as a bit mask in bytes; empty: all.
    pub affinity: Vec<u8>,
    /// I/O priority (ioprio_get(2)).
    pub ioprio: u32,
}
