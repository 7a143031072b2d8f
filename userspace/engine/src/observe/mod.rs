//! What eBPF iterators and procfs tell about a tree, in types that do not say who told it.
//!
//! [`Iterators`] asks the kernel through BPF iterators (`iter/task_file`, `iter/task`, `iter/task_vma`); [`procfs`]
//! answers the same questions without BPF, more slowly. Both give equal values for the same tree, so a caller can take
//! whichever works. Numbers of processes and threads are those of the reader's pid namespace.
//!
//! Kernel addresses decide which objects are the same. They are turned into small numbers here and go no further.

#[cfg(feature = "ebpf")]
mod aio;
#[cfg(feature = "ebpf")]
mod aliases;
#[cfg(feature = "ebpf")]
mod btf;
#[cfg(feature = "ebpf")]
mod decode;
#[cfg(feature = "ebpf")]
mod flags;
#[cfg(feature = "ebpf")]
mod ids;
#[cfg(feature = "ebpf")]
mod iter;
#[cfg(not(feature = "ebpf"))]
#[path = "absent.rs"]
mod iter;
#[cfg(feature = "ebpf")]
mod layout;
#[cfg(feature = "ebpf")]
mod loader;
pub mod procfs;
#[cfg(feature = "ebpf")]
mod restart;
pub(crate) mod run_dir;
mod sockets;
mod sys;
#[cfg(all(test, feature = "ebpf"))]
mod tests;
#[cfg(feature = "ebpf")]
mod track;

#[cfg(feature = "ebpf")]
pub(crate) use aio::AioContexts;
#[cfg(feature = "ebpf")]
pub(crate) use aliases::Aliases;
pub use iter::Iterators;
#[cfg(not(feature = "ebpf"))]
pub(crate) use iter::{AioContexts, Aliases};
pub use sockets::SocketEntry;
#[cfg(feature = "ebpf")]
pub use track::{Calls, Counters, Difference, Freshness, Lease, Serving, Shadow, Status, Tracker};

use serde::{Deserialize, Serialize};
use standstill_images::types::{AltStack, Bytes, Creds, ITimer, MmLayout, Rseq, Sched, SigAction};
use std::{collections::HashMap, io, path::PathBuf};

/// How much a tracker watches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Mappings, and births and deaths. Everything else is stale at any time.
    #[default]
    Memory,
    /// Descriptors and signal actions too. Each system call of each process of the machine is about 0.1 µs slower.
    Syscalls,
}

/// Identity of an open file description within one reading: same description, same number.
///
/// Numbered from 0 by first appearance in the order of (process, descriptor).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FileId(pub u32);

/// A shared mapping of a file, and how many refer to the file besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SharedMapping {
    pub pid: i32,
    pub start: u64,
    pub end: u64,
    /// Of the mapping's first byte in the file.
    pub offset: u64,
    pub ino: u64,
    /// The open file description, numbered within one reading.
    pub file: u32,
    /// References to that: mappings, descriptors, and whoever looks at it at the moment.
    pub file_users: u64,
    /// References to its name, from each of its open file descriptions.
    pub dentry_users: u64,
}

/// What happened to the mappings of an address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Space {
    /// The smallest process that has it.
    pub owner: i32,
    /// When its mappings last changed, or when it was first watched (CLOCK_MONOTONIC).
    pub changed: std::time::Duration,
    /// When memory of it may last have been mapped a second time, or when it was first watched.
    pub aliased: std::time::Duration,
}

/// A descriptor and the open file description (`struct file`) behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FdEntry {
    /// Process.
    pub tgid: i32,
    /// Number of the descriptor.
    pub fd: i32,
    /// FD_CLOEXEC.
    pub cloexec: bool,
    /// The open file description.
    pub file: FileId,
    /// `f_flags` as `/proc/pid/fdinfo` shows them, O_CLOEXEC removed; O_LARGEFILE is among them.
    pub flags: u32,
    /// File offset.
    pub pos: i64,
    /// `st_ino`.
    pub ino: u64,
    /// `st_dev`.
    pub dev: u64,
    /// `st_mode`: type and permission bits.
    pub mode: u32,
    /// `st_rdev`.
    pub rdev: u64,
    /// `st_size`.
    pub size: u64,
    /// `st_mtim`: seconds and nanoseconds.
    pub mtime: (i64, u32),
    /// `st_nlink`.
    pub nlink: u32,
    /// What readlink(2) of `/proc/pid/fd/N` says: `/x`, `/x (deleted)`, `pipe:[7]`, `anon_inode:[eventfd]`.
    pub path: PathBuf,
}

/// A context of io_setup(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AioContext {
    /// Process.
    pub pid: i32,
    /// Its id: the address of its ring.
    pub id: u64,
    /// Requests that may be made and that the CPUs looked at have put aside.
    aside: u32,
    /// Requests that the kernel works on, once all CPUs were looked at.
    pub in_flight: u32,
}

/// Where a task stands among others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lineage {
    /// Process.
    pub tgid: i32,
    /// Thread.
    pub tid: i32,
    /// Parent process; 0: outside the reader's pid namespace.
    pub ppid: i32,
    /// When it began, on CLOCK_MONOTONIC.
    pub start_ns: u64,
    /// Whether it is dead.
    pub exited: bool,
}

/// Identity of an object that tasks can share (CLONE_VM, CLONE_FILES, CLONE_FS, CLONE_SIGHAND, CLONE_THREAD) within one
/// reading: same kind and same number, same object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SharedId(pub u32);

/// What a wait with a timeout left in the kernel's `restart_block` when it was interrupted.
///
/// Old until the next such interruption: it means something only if the thread's registers say that it is about to make
/// restart_syscall(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RestartBlock {
    /// Nothing.
    None,
    /// nanosleep(2), clock_nanosleep(2).
    Nanosleep {
        /// Clock that `expires_ns` is on.
        clock: i32,
        /// End of the sleep.
        expires_ns: u64,
        /// Where the rest is stored if a handler interrupts the sleep; 0: nowhere.
        rmtp: u64,
    },
    /// futex(2) FUTEX_WAIT and FUTEX_WAIT_BITSET.
    Futex {
        /// The futex word.
        uaddr: u64,
        /// Value expected in it.
        val: u32,
        /// Wake-up mask.
        bitset: u32,
        /// Whether `expires_ns` is on CLOCK_REALTIME, not CLOCK_MONOTONIC.
        realtime: bool,
        /// End of the wait.
        expires_ns: u64,
    },
    /// poll(2).
    Poll {
        /// Array of `struct pollfd`.
        ufds: u64,
        /// Its length.
        nfds: u32,
        /// End of the wait on CLOCK_MONOTONIC; `None`: no limit.
        expires_ns: Option<u64>,
    },
    /// A wait of a kind that this version does not know.
    Unknown,
}

/// A thread, apart from its registers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ThreadState {
    /// Process.
    pub tgid: i32,
    /// Thread.
    pub tid: i32,
    /// Name.
    pub comm: Bytes,
    /// sigaltstack(2), without SS_ONSTACK.
    pub altstack: AltStack,
    /// set_tid_address(2).
    pub clear_child_tid: u64,
    /// Head and length of the robust list, as get_robust_list(2) gives them; head 0: none.
    pub robust_list: (u64, u64),
    /// rseq(2) registration, address 0: none; `None`: this kernel does not let it be seen.
    pub rseq: Option<Rseq>,
    /// PR_SET_PDEATHSIG.
    pub pdeath_signal: i32,
    /// Signal sent to the parent at exit; -1 for threads other than the leader.
    pub exit_signal: i32,
    /// Blocked signals, as PTRACE_GETSIGMASK gives them; `None`: this kernel does not let it be seen.
    pub blocked: Option<u64>,
    /// Whether signals are pending for the thread alone.
    pub pending: bool,
    /// PR_SET_SECUREBITS.
    pub securebits: u32,
    /// Credentials; `None` if the reader or the thread is in a user namespace, or there are more groups than a record
    /// has room for.
    pub creds: Option<Creds>,
    /// Scheduling; `None` with SCHED_DEADLINE, whose parameters are not read, or if part of it cannot be seen.
    pub sched: Option<Sched>,
    /// PR_SET_TIMERSLACK.
    pub timerslack_ns: u64,
    /// Those of the kernel's `PF_*` flags that PR_MCE_KILL and PR_SET_IO_FLUSHER set.
    pub flags: u32,
    /// What PR_SET_SPECULATION_CTRL was given for each kind of misfeature; 0: nothing.
    pub speculation: [u32; 2],
    /// Whether reading the time stamp counter may raise SIGSEGV (PR_SET_TSC).
    pub tsc_faults: bool,
    /// Whether it may have a memory policy of its own (set_mempolicy(2)).
    pub memory_policy: bool,
    /// Mode of seccomp(2); `None`: this kernel does not let it be seen.
    pub seccomp: Option<u32>,
    /// What an interrupted wait left behind.
    pub restart: RestartBlock,
    /// How much of that wait was left when this was read, in nanoseconds; `None`: no such wait, or without limit.
    pub remaining_ns: Option<u64>,
    /// Memory; `None` once it has exited.
    pub mm: Option<SharedId>,
    /// Descriptor table; `None` once it has exited.
    pub files: Option<SharedId>,
    /// Working directory, root and umask; `None` once it has exited.
    pub fs: Option<SharedId>,
    /// Signal handlers; `None` once it has exited.
    pub sighand: Option<SharedId>,
}

/// A process, as far as its threads share it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessState {
    /// Process.
    pub tgid: i32,
    /// Parent; 0: outside the reader's pid namespace.
    pub ppid: i32,
    /// Process group.
    pub pgid: i32,
    /// Session.
    pub sid: i32,
    /// Its threads by number, the leader first.
    pub threads: Vec<ThreadState>,
    /// The namespaces in which it is and the reader is not, by their names in `/proc/pid/ns`.
    pub foreign_namespaces: Vec<&'static str>,
    /// Status for wait(2) if the leader has exited.
    pub exited: Option<i32>,
    /// If it is stopped by job control: whether its parent has waited for that.
    pub stop_told: bool,
    /// Actions of all signals whose action is not the default.
    pub sigactions: Vec<SigAction>,
    /// ITIMER_REAL; `None`: this kernel does not let it be seen.
    pub itimer_real: Option<ITimer>,
    /// Whether signals are pending for the process as a whole.
    pub pending: bool,
    /// Whether there may be POSIX timers.
    pub posix_timers: bool,
    /// Whether ITIMER_VIRTUAL or ITIMER_PROF is armed; only the process itself can say how much is left of them.
    pub cpu_itimers: bool,
    /// Soft and hard resource limits by RLIMIT number.
    pub rlimits: Vec<(u64, u64)>,
    /// Addresses of the parts of the program; `None` once the leader has exited.
    pub layout: Option<MmLayout>,
    /// PR_GET_DUMPABLE.
    pub dumpable: u32,
    /// `/proc/pid/coredump_filter`.
    pub coredump_filter: u32,
    /// Whether PR_SET_THP_DISABLE, PR_SET_MDWE or PR_SET_MEMORY_MERGE may be in effect, or a membarrier(2) registration.
    pub unusual_memory: bool,
    /// File mode creation mask.
    pub umask: u32,
    /// PR_SET_CHILD_SUBREAPER.
    pub child_subreaper: bool,
    /// personality(2).
    pub personality: u32,
    /// `/proc/pid/oom_score_adj`.
    pub oom_score_adj: i32,
    /// `/proc/pid/loginuid`; `None`: not to be seen, see [`ThreadState::creds`].
    pub loginuid: Option<u32>,
    /// What `/proc/pid/auxv` gives; `None` once the leader has exited, or if it is longer than a record has room for.
    pub auxv: Option<Vec<u8>>,
    /// The executed file; `None` once the leader has exited.
    pub exe: Option<SharedId>,
    /// Root directory: same number, same path. `None` once the leader has exited.
    pub root: Option<SharedId>,
    /// Working directory: same number, same path. `None` once the leader has exited.
    pub cwd: Option<SharedId>,
}

/// A mapping.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmaEntry {
    /// Process.
    pub tgid: i32,
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// `PROT_*` bits.
    pub prot: u8,
    /// MAP_SHARED.
    pub shared: bool,
    /// Offset in the file, in bytes.
    pub offset: u64,
    /// Device of the file as `/proc/pid/maps` shows it, in stat's encoding; 0: no file.
    pub dev: u64,
    /// Inode number of the file; 0: no file.
    pub ino: u64,
    /// The name in `/proc/pid/maps`: a path, `[heap]`, `[stack]`, `[vdso]`, `[anon:x]`; empty: none.
    pub name: PathBuf,
    /// The kernel's `VM_*` attributes of bits 0 to 31, as far as smaps shows them; see [`Self::has`].
    pub flags: u32,
    /// Whether it has attributes beyond these (shadow stack, sealed, droppable, userfaultfd minor faults, …); smaps names
    /// them.
    pub unusual: bool,
    /// Its protection key (pkeys(7)).
    pub key: u8,
    /// Whether it has a memory policy of its own (mbind(2)); false: it has none, or nobody knows.
    pub policy: bool,
    /// Whether there is certainly no page that this address space alone has, nor a guard; false: nobody knows. True only
    /// as long as the process stands still.
    pub untouched: bool,
}

impl ProcessState {
    /// A thread by its number.
    pub fn thread(&self, tid: i32) -> Option<&ThreadState> {
        match self.threads.split_first()? {
            (leader, _) if leader.tid == tid => Some(leader),
            (_, others) => others.binary_search_by_key(&tid, |t| t.tid).ok().map(|n| &others[n]),
        }
    }
}

impl VmaEntry {
    /// Whether an attribute is set, by its two letters in smaps (`VmFlags`): `b"lo"` for locked memory.
    pub fn has(&self, letters: &[u8; 2]) -> bool {
        vma_bit(letters).is_some_and(|bit| self.flags & bit != 0)
    }
}

/// Bits that are left out: the nameless one, and soft-dirty (`sd`), which comes and goes by itself.
#[cfg(feature = "ebpf")]
const VMA_LEFT_OUT: u32 = 1 << 11 | 1 << 27;

/// The bit of `vm_flags` that smaps has two letters for, 0 if it is left out; `None`: not among the first 32. The bits
/// beyond differ between kernels.
#[inline]
pub(crate) fn vma_bit(letters: &[u8; 2]) -> Option<u32> {
    Some(match letters {
        b"rd" => 1 << 0,
        b"wr" => 1 << 1,
        b"ex" => 1 << 2,
        b"sh" => 1 << 3,
        b"mr" => 1 << 4,
        b"mw" => 1 << 5,
        b"me" => 1 << 6,
        b"ms" => 1 << 7,
        b"gd" => 1 << 8,
        b"um" => 1 << 9,
        b"pf" => 1 << 10,
        b"uw" => 1 << 12,
        b"lo" => 1 << 13,
        b"io" => 1 << 14,
        b"sr" => 1 << 15,
        b"rr" => 1 << 16,
        b"dc" => 1 << 17,
        b"de" => 1 << 18,
        b"lf" => 1 << 19,
        b"ac" => 1 << 20,
        b"nr" => 1 << 21,
        b"ht" => 1 << 22,
        b"sf" => 1 << 23,
        b"ar" => 1 << 24,
        b"wf" => 1 << 25,
        b"dd" => 1 << 26,
        b"mm" => 1 << 28,
        b"hg" => 1 << 29,
        b"nh" => 1 << 30,
        b"mg" => 1 << 31,
        // Bit 11 in Linux 6.19 and up to 5.14: guard pages may have been there; writing to the file is denied.
        b"gu" | b"dw" | b"sd" => 0,
        _ => return None,
    })
}

/// Mappings by process.
pub(crate) fn vmas_by_process(vmas: Vec<VmaEntry>) -> HashMap<i32, Vec<VmaEntry>> {
    let mut by_pid: HashMap<i32, Vec<VmaEntry>> = HashMap::new();
    for vma in vmas {
        by_pid.entry(vma.tgid).or_default().push(vma);
    }
    by_pid
}

/// Each process once, ascending.
fn sorted(tgids: &[i32]) -> Vec<i32> {
    let mut tgids = tgids.to_vec();
    tgids.sort_unstable();
    tgids.dedup();
    tgids
}

/// Why something could not be observed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ObserveError {
    /// Built without the feature `ebpf`.
    #[error("this build has no eBPF programs (feature `ebpf`)")]
    NotBuilt,
    /// The kernel does not describe its types.
    #[error("the kernel has no BTF (CONFIG_DEBUG_INFO_BTF): {path}: {source}")]
    NoBtf {
        /// Where it should be.
        path: PathBuf,
        /// Why it cannot be read.
        source: io::Error,
    },
    /// The kernel's BTF is damaged or of an unknown version.
    #[error("the kernel's BTF cannot be read: {0}")]
    BadBtf(&'static str),
    /// A structure of this kernel lacks a field that the programs read.
    #[error("struct {structure} of this kernel has no field {field}")]
    MissingField {
        /// Structure.
        structure: &'static str,
        /// Field.
        field: &'static str,
    },
    /// A privilege is missing.
    #[error("{0} is missing")]
    MissingCapability(&'static str),
    /// The kernel refuses although the capabilities are there.
    #[error(
        "the kernel refuses BPF: CAP_BPF and CAP_PERFMON count in the initial user namespace only, and not under lockdown"
    )]
    NotPermitted,
    /// Tracking from within another pid namespace.
    #[error("processes are tracked from the initial pid namespace only")]
    PidNamespace,
    /// There is nobody to observe.
    #[error("no such process: {0}")]
    NoProcess(i32),
    /// Another process tracks the tree.
    #[error("process {root} is tracked already, by process {tracker}")]
    Tracked {
        /// Root of the tree.
        root: i32,
        /// The tracker.
        tracker: i32,
    },
    /// The programs, or one of them, do not load.
    #[error("the eBPF programs do not load ({program}): {reason}")]
    Load {
        /// Program or map; `all` if it is not about one.
        program: &'static str,
        /// What the kernel or the loader says, with the end of the verifier's log.
        reason: String,
    },
    /// A program wrote something that makes no sense.
    #[error("unexpected record from eBPF program {0}")]
    BadRecord(&'static str),
    /// A system call or a file of procfs failed.
    #[error("{what}: {source}")]
    Io {
        /// Call and object.
        what: String,
        /// Its errno.
        source: io::Error,
    },
}

impl ObserveError {
    fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// Result of an observation.
pub type Result<T, E = ObserveError> = std::result::Result<T, E>;
