//! Records that the iterators write, and the layout of kernel structures that they are given at load.
//!
//! A stream is a sequence of records of one type; [`FileRecord`], [`ThreadRecord`] and [`VmaRecord`] say themselves what
//! follows them. Addresses of kernel objects serve to tell which objects are the same. The reader turns them into small
//! numbers and forgets them.
#![no_std]

pub mod aio;
pub mod aliases;
mod layout;
pub mod track;

pub use layout::*;

use core::{mem, ptr, slice};

/// Types that any bytes are a value of, and that have no padding.
///
/// # Safety
/// Implemented only for `#[repr(C)]` structures of integers and arrays of them whose fields leave no gap.
pub unsafe trait Plain: Copy + 'static {
    /// The first value in `bytes`, and the rest; `None` if there are too few.
    fn split(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (head, rest) = bytes.split_at_checked(mem::size_of::<Self>())?;
        // SAFETY: `head` has the size of Self, any bytes are a value, and the read does not ask for alignment.
        Some((unsafe { ptr::read_unaligned(head.as_ptr().cast()) }, rest))
    }

    /// The value's bytes.
    fn bytes(&self) -> &[u8] {
        // SAFETY: without padding, all bytes of the value are initialised; they are borrowed as long as the value.
        unsafe { slice::from_raw_parts(ptr::from_ref(self).cast(), mem::size_of::<Self>()) }
    }
}

// SAFETY: integers have no padding, and any bytes are one.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for u16 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for i32 {}
// SAFETY: as above.
unsafe impl Plain for u64 {}
// SAFETY: as above.
unsafe impl Plain for i64 {}
// SAFETY: nothing is between the elements of an array.
unsafe impl<T: Plain, const N: usize> Plain for [T; N] {}

/// Declares a `Plain` structure; compilation fails if its fields leave a gap.
macro_rules! plain {
    ($(#[$attr:meta])* pub struct $name:ident { $($(#[$doc:meta])* pub $field:ident: $ty:ty,)* }) => {
        $(#[$attr])*
        #[derive(Clone, Copy, Debug)]
        #[repr(C)]
        pub struct $name { $($(#[$doc])* pub $field: $ty,)* }

        const _: () = assert!(mem::size_of::<$name>() == 0 $(+ mem::size_of::<$ty>())*);

        const _: fn() = || {
            fn is_plain<T: Plain>() {}
            $(is_plain::<$ty>();)*
        };

        // SAFETY: the fields are Plain, and the size shows that no gap is between or behind them.
        unsafe impl Plain for $name {}
    };
}
pub(crate) use plain;

/// Longest path that the kernel gives, with its NUL (PATH_MAX).
pub const PATH_MAX: usize = 4096;
/// Longest name of a kernel symbol that is of interest here.
pub const SYMBOL_MAX: usize = 32;
/// Signals (`_NSIG`).
pub const SIGNALS: usize = 64;
/// Resource limits (`RLIM_NLIMITS`).
pub const LIMITS: usize = 16;
/// Bytes of `cred` from the first to the last of the fields that are read.
pub const CRED_BYTES: usize = 100;
/// Supplementary groups that a record has room for.
pub const GROUPS: usize = 32;
/// CPUs that a record has room for.
pub const CPUS: usize = 1024;
/// Words of the auxiliary vector that a record has room for; the kernel's own limit is lower.
pub const AUXV: usize = 64;
/// Names of a process's namespaces, by their bit in `ProcessRecord::foreign`. The first eight are in `nsproxy`.
pub const NAMESPACES: [&str; 10] =
    ["mnt", "net", "ipc", "uts", "cgroup", "time", "pid_for_children", "time_for_children", "user", "pid"];
/// Bytes of `restart_block` after `fn`, as many as any kind of wait uses.
pub const RESTART_BYTES: usize = 40;

plain! {
    /// A descriptor, from `iter/task_file`. `path_len` bytes of the path follow.
    pub struct FileRecord {
        /// Process.
        pub tgid: i32,
        /// Number.
        pub fd: i32,
        /// Address of the `struct file`.
        pub file: u64,
        /// Address of its dentry.
        pub dentry: u64,
        /// Address of its inode.
        pub inode: u64,
        /// Digest of all that its path is made of; 0: could not be computed.
        pub name: u64,
        /// `f_pos`.
        pub pos: i64,
        /// `i_ino`.
        pub ino: u64,
        /// `i_size`.
        pub size: u64,
        /// Modification time, seconds.
        pub mtime: i64,
        /// Magic number of the file system.
        pub magic: u64,
        /// Modification time, nanoseconds.
        pub mtime_nsec: u32,
        /// `i_nlink`.
        pub nlink: u32,
        /// `s_dev` in the kernel's encoding.
        pub dev: u32,
        /// `i_rdev` in the kernel's encoding.
        pub rdev: u32,
        /// `i_mode`.
        pub mode: u32,
        /// `f_flags`.
        pub flags: u32,
        /// FD_CLOEXEC.
        pub cloexec: u32,
        /// Bytes of the path that follow, or an errno, negated, that there is none; 0 if paths were not asked for.
        pub path_len: i32,
    }
}

/// Longest name of a unix socket (`sun_path`).
pub const UNIX_NAME: usize = 108;

plain! {
    /// A socket, from the program `sockets`.
    pub struct SocketRecord {
        /// Process.
        pub tgid: i32,
        /// Number of the descriptor.
        pub fd: i32,
        /// `i_ino`.
        pub ino: u64,
        /// `i_ino` of the unix socket that it is connected to; 0: none, or nobody has it open.
        pub peer_ino: u64,
        /// Address of its own and that of the other side; IPv4 has the first four bytes.
        pub local: [u8; 16],
        /// The other side's.
        pub peer: [u8; 16],
        /// `skc_num`.
        pub local_port: u16,
        /// `skc_dport`.
        pub peer_port: u16,
        /// `skc_family`.
        pub family: u16,
        /// `sk_type`.
        pub sort: u16,
        /// `sk_protocol`.
        pub protocol: u16,
        /// `skc_state`.
        pub state: u16,
        /// Bytes received and not read yet; of a listening socket connections, of a unix socket packets or connections.
        pub receive: u32,
        /// Bytes sent and not acknowledged or received yet.
        pub send: u32,
        /// Bytes of `name`.
        pub name_len: u32,
        /// Name of a unix socket, in whole words.
        pub name: [u8; UNIX_NAME.next_multiple_of(8)],
    }
}

plain! {
    /// A thread, from `iter/task`. A [`ProcessRecord`] follows if it is the leader.
    pub struct ThreadRecord {
        /// Process.
        pub tgid: i32,
        /// Thread.
        pub tid: i32,
        /// `clear_child_tid`.
        pub clear_child_tid: u64,
        /// `robust_list`.
        pub robust_list: u64,
        /// `sas_ss_sp`.
        pub sas_ss_sp: u64,
        /// `sas_ss_size`.
        pub sas_ss_size: u64,
        /// What PTRACE_GETSIGMASK gives: `blocked`, or what it becomes again once a call that changed it returns.
        pub blocked: u64,
        /// `pending.signal`.
        pub pending: u64,
        /// `atomic_flags`: the first is no_new_privs.
        pub atomic_flags: u64,
        /// `thread_info.flags`.
        pub thread_flags: u64,
        /// `timer_slack_ns`.
        pub timer_slack_ns: u64,
        /// `rseq`.
        pub rseq: u64,
        /// `cpus_mask`, and other fields if it is shorter.
        pub cpus: [u64; CPUS / 64],
        /// Address of the memory.
        pub mm: u64,
        /// Address of the descriptor table.
        pub files: u64,
        /// Address of root and working directory.
        pub fs: u64,
        /// Address of the signal handlers.
        pub sighand: u64,
        /// CLOCK_MONOTONIC at this moment.
        pub monotonic_ns: u64,
        /// CLOCK_BOOTTIME at this moment.
        pub boottime_ns: u64,
        /// The union in `restart_block`.
        pub restart: [u8; RESTART_BYTES],
        /// Name of the function in `restart_block`, ended by a NUL.
        pub restart_fn: [u8; SYMBOL_MAX],
        /// `sas_ss_flags`.
        pub sas_ss_flags: u32,
        /// `pdeath_signal`.
        pub pdeath_signal: i32,
        /// `exit_signal`.
        pub exit_signal: i32,
        /// `exit_state`.
        pub exit_state: u32,
        /// Supplementary groups, as far as there is room.
        pub groups: [u32; GROUPS],
        /// How many there are.
        pub ngroups: u32,
        /// Whether reader and thread are in the initial user namespace.
        pub initial_ids: u32,
        /// Part of the credentials: ids, securebits and capabilities.
        pub cred: [u8; CRED_BYTES],
        /// `comm`.
        pub comm: [u8; 16],
        /// `policy`.
        pub policy: u32,
        /// `static_prio`.
        pub static_prio: i32,
        /// `rt_priority`.
        pub rt_priority: u32,
        /// `sched_reset_on_fork`.
        pub reset_on_fork: u32,
        /// `ioprio` of the I/O context; 0 without one.
        pub ioprio: u32,
        /// `seccomp.mode`.
        pub seccomp: u32,
        /// `rseq_len`.
        pub rseq_len: u32,
        /// `rseq_sig`.
        pub rseq_sig: u32,
        /// 1: the leader.
        pub leader: u32,
        /// `flags`.
        pub flags: u32,
        /// Whether it has a memory policy.
        pub mempolicy: u32,
    }
}

plain! {
    /// Where a thread stands among others, from the program `lineage`.
    pub struct LineageRecord {
        /// `start_time`.
        pub start_time: u64,
        /// Process.
        pub tgid: i32,
        /// Thread.
        pub tid: i32,
        /// Parent process; 0: outside the reader's pid namespace.
        pub ppid: i32,
        /// `exit_state`.
        pub exit_state: u32,
    }
}

plain! {
    /// A signal action (`struct sigaction` of the kernel).
    pub struct Action {
        /// `sa_handler`.
        pub handler: u64,
        /// `sa_flags`.
        pub flags: u64,
        /// `sa_restorer`.
        pub restorer: u64,
        /// `sa_mask`.
        pub mask: u64,
    }
}

plain! {
    /// What the threads of a process share.
    pub struct ProcessRecord {
        /// Signal actions by number, from 1.
        pub actions: [Action; SIGNALS],
        /// Soft and hard limits.
        pub limits: [[u64; 2]; LIMITS],
        /// The auxiliary vector up to its AT_NULL, and whatever follows.
        pub auxv: [u64; AUXV],
        /// `shared_pending.signal`.
        pub shared_pending: u64,
        /// Address of the executed file.
        pub exe_file: u64,
        /// Addresses of mount and dentry of the root directory.
        pub root: [u64; 2],
        /// Addresses of mount and dentry of the working directory.
        pub pwd: [u64; 2],
        /// The parts of the program, in the order of `MmLayout` in the images.
        pub layout: [u64; 11],
        /// `mm->flags`: what PR_GET_DUMPABLE gives, the filter of core dumps, and options of prctl(2).
        pub mm_flags: u64,
        /// `mm->membarrier_state`: what membarrier(2) was registered for.
        pub membarrier: u64,
        /// End of ITIMER_REAL on CLOCK_MONOTONIC.
        pub real_expires_ns: u64,
        /// Its period.
        pub real_interval_ns: u64,
        /// 0: neither ITIMER_VIRTUAL nor ITIMER_PROF is armed.
        pub cpu_timers: u64,
        /// Whether it is armed: `state` of the timer.
        pub real_state: u32,
        /// `exit_code` of the leader.
        pub exit_code: i32,
        /// `group_exit_code`.
        pub group_exit_code: i32,
        /// `flags` of the signal struct.
        pub signal_flags: u32,
        /// `umask`.
        pub umask: u32,
        /// PR_GET_CHILD_SUBREAPER.
        pub child_subreaper: u32,
        /// Parent process; 0: outside the reader's pid namespace.
        pub ppid: i32,
        /// Process group.
        pub pgid: i32,
        /// Session.
        pub sid: i32,
        /// Whether there are POSIX timers.
        pub posix_timers: u32,
        /// `personality` of the leader.
        pub personality: u32,
        /// `oom_score_adj`.
        pub oom_score_adj: i32,
        /// `loginuid` of the leader.
        pub loginuid: u32,
        /// Namespaces other than the reader's, by their bit in [`NAMESPACES`].
        pub foreign: u32,
    }
}

plain! {
    /// A mapping, from `iter/task_vma`. `name_len` bytes of a name follow.
    pub struct VmaRecord {
        /// `vm_start`.
        pub start: u64,
        /// `vm_end`.
        pub end: u64,
        /// `vm_flags`.
        pub flags: u64,
        /// `vm_pgoff`.
        pub pgoff: u64,
        /// `i_ino` of the file.
        pub ino: u64,
        /// `anon_vma`; 0: the mapping never had a page of its own.
        pub anon_vma: u64,
        /// Address of the memory policy; 0: none.
        pub policy: u64,
        /// Address of the file of a shared mapping; 0: it is private, or has none.
        pub file: u64,
        /// References to that file, as the kernel counts them.
        pub file_users: u64,
        /// References to its dentry.
        pub dentry_users: u64,
        /// Name of the function that names a mapping without file (`vm_ops->name`), ended by a NUL.
        pub name_fn: [u8; SYMBOL_MAX],
        /// Process.
        pub tgid: i32,
        /// `s_dev` of the file in the kernel's encoding.
        pub dev: u32,
        /// One of [`vma_name`].
        pub kind: u32,
        /// Bytes of the name that follow, or an errno, negated, that there is none.
        pub name_len: i32,
    }
}

/// Where a mapping has its name from.
pub mod vma_name {
    /// It has none.
    pub const NONE: u32 = 0;
    /// Path of its file.
    pub const PATH: u32 = 1;
    /// The kernel's own mapping; only `special_mapping_name` is understood.
    pub const SPECIAL: u32 = 2;
    /// It lies in the heap.
    pub const HEAP: u32 = 3;
    /// It lies in the first thread's stack.
    pub const STACK: u32 = 4;
    /// PR_SET_VMA_ANON_NAME.
    pub const ANON: u32 = 5;
    /// PR_SET_VMA_ANON_NAME on shared memory.
    pub const ANON_SHARED: u32 = 6;
    /// The file stands for another one (overlayfs): procfs knows which.
    pub const BACKING: u32 = 7;
}
