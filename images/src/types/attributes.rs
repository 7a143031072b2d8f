//! What few processes and threads have.

use super::Bytes;
use serde::{Deserialize, Serialize};

/// Attributes of a process that are not the usual ones. Most processes have no such record.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attributes {
    /// The process.
    pub pid: i32,
    /// Its leader has exited while other threads live; the status as wait(2) encodes it.
    pub leader_exited: Option<i32>,
    /// `/proc/pid/coredump_filter`; `None`: 0x33, as usual.
    pub coredump_filter: Option<u32>,
    /// `PR_GET_THP_DISABLE`.
    pub thp_disable: u32,
    /// `PR_GET_MDWE`.
    pub mdwe: u32,
    /// `PR_GET_MEMORY_MERGE`.
    pub memory_merge: bool,
    /// What membarrier(2) was registered for (MEMBARRIER_CMD_GET_REGISTRATIONS).
    pub barriers: u32,
    /// Memory policies of mappings (mbind(2)): start, end and policy.
    pub memory_policies: Vec<(u64, u64, MemoryPolicy)>,
    /// Threads that have unusual attributes.
    pub threads: Vec<ThreadAttributes>,
}

/// [`Attributes`] before they had registrations for membarrier(2).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttributesV1 {
    pid: i32,
    leader_exited: Option<i32>,
    coredump_filter: Option<u32>,
    thp_disable: u32,
    mdwe: u32,
    memory_merge: bool,
    memory_policies: Vec<(u64, u64, MemoryPolicy)>,
    threads: Vec<ThreadAttributes>,
}

impl From<AttributesV1> for Attributes {
    fn from(old: AttributesV1) -> Self {
        let AttributesV1 { pid, leader_exited, coredump_filter, thp_disable, mdwe, memory_merge, .. } = old;
        let AttributesV1 { memory_policies, threads, .. } = old;
        let barriers = 0;
        Self {
            pid,
            leader_exited,
            coredump_filter,
            thp_disable,
            mdwe,
            memory_merge,
            barriers,
            memory_policies,
            threads,
        }
    }
}

/// Label that a security module has given to a process (`/proc/pid/attr`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Label {
    /// The process.
    pub pid: i32,
    /// Its label.
    pub current: Bytes,
    /// What it has asked for its objects: `exec`, `fscreate`, `keycreate`, `sockcreate`, as far as it has.
    pub others: Vec<(Bytes, Bytes)>,
}

/// Attributes of a thread that are not the usual ones.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadAttributes {
    /// The thread.
    pub tid: i32,
    /// `PR_MCE_KILL_GET`; `None`: PR_MCE_KILL_DEFAULT.
    pub mce_kill: Option<u32>,
    /// `PR_SET_IO_FLUSHER`.
    pub io_flusher: bool,
    /// `PR_SET_TSC`: reading the time stamp counter raises SIGSEGV.
    pub tsc_faults: bool,
    /// What `PR_SET_SPECULATION_CTRL` was given for each kind of misfeature, by its number; 0: nothing.
    pub speculation: [u32; 2],
    /// Its memory policy (set_mempolicy(2)).
    pub memory_policy: Option<MemoryPolicy>,
    /// Parameters of SCHED_DEADLINE, if that is its policy.
    pub deadline: Option<Deadline>,
}

/// A memory policy, as get_mempolicy(2) gives it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryPolicy {
    /// `MPOL_*` with its `MPOL_F_*` flags.
    pub mode: u32,
    /// Nodes, as words of a bit mask.
    pub nodes: Vec<u64>,
}

/// Parameters of SCHED_DEADLINE (sched_setattr(2)), in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deadline {
    /// `SCHED_FLAG_*`, without SCHED_FLAG_RESET_ON_FORK.
    pub flags: u64,
    /// Processor time in each period.
    pub runtime: u64,
    /// Until when it is given, from the beginning of a period.
    pub deadline: u64,
    /// Length of a period.
    pub period: u64,
}
