//! What the tracker's programs and its reader share.

use crate::{Plain, plain};
use core::mem;

/// What can change of a process, as bits.
pub mod part {
    /// Its threads, children and program.
    pub const TASKS: u16 = 1 << 0;
    /// Its mappings.
    pub const MEMORY: u16 = 1 << 1;
    /// Its descriptors.
    pub const FILES: u16 = 1 << 2;
    /// Root, working directory, umask.
    pub const FS: u16 = 1 << 3;
    /// Signal actions.
    pub const SIGNALS: u16 = 1 << 4;
    /// Timers.
    pub const TIMERS: u16 = 1 << 5;
    /// State and options of sockets.
    pub const SOCKETS: u16 = 1 << 6;
    /// Credentials, limits, scheduling, and what prctl(2) sets.
    pub const ATTRIBUTES: u16 = 1 << 7;
    /// How many there are.
    pub const COUNT: usize = 8;
    /// All of them: what an unknown system call changes.
    pub const ALL: u16 = (1 << COUNT) - 1;
}

/// Whether a system call changed something, as its arguments and result tell; above the bits of [`part`].
pub mod when {
    /// When it succeeded.
    pub const SUCCESS: u16 = 0;
    /// Even when it failed.
    pub const ALWAYS: u16 = 1 << 12;
    /// fcntl(2): some commands.
    pub const FCNTL: u16 = 2 << 12;
    /// ioctl(2): all requests but those of terminals, and a few more.
    pub const IOCTL: u16 = 3 << 12;
    /// recvmsg(2): when there was a control message.
    pub const RECVMSG: u16 = 4 << 12;
    /// Where these numbers are.
    pub const MASK: u16 = 0xf << 12;
}

/// System calls with a number below this can be known.
pub const SYSCALLS: usize = 512;

/// What is counted besides the parts, which have the first numbers.
pub mod count {
    use super::part;
    /// New processes.
    pub const FORKS: usize = part::COUNT;
    /// New threads.
    pub const THREADS: usize = part::COUNT + 1;
    /// execve(2).
    pub const EXECS: usize = part::COUNT + 2;
    /// Ends of processes.
    pub const EXITS: usize = part::COUNT + 3;
    /// Signals sent to tracked processes.
    pub const SIGNALS_SENT: usize = part::COUNT + 4;
    /// Changes of the state of TCP sockets that tracked processes made.
    pub const CONNECTIONS: usize = part::COUNT + 5;
    /// Processes that could not be tracked for want of room.
    pub const LOST: usize = part::COUNT + 6;
    /// How many there are.
    pub const COUNT: usize = part::COUNT + 7;
}

plain! {
    /// A tracked process, by its number. Times are those of CLOCK_MONOTONIC, in nanoseconds.
    pub struct TrackedProcess {
        /// When tracking began: tells processes with the same number apart.
        pub born: u64,
        /// When each part last changed, in the order of [`part`].
        pub changed: [u64; part::COUNT],
    }
}

plain! {
    /// A tracked address space, by the address of its `mm_struct`.
    pub struct TrackedSpace {
        /// When it was last locked for a change, or else when tracking began: no time comes again, so this also tells
        /// spaces apart that had the same address one after the other.
        pub changed: u64,
    }
}

plain! {
    /// What the tracker's programs know of the kernel.
    pub struct TrackLayout {
        /// `task_struct.tgid`
        pub task_tgid: u32,
        /// `task_struct.pid`
        pub task_pid: u32,
        /// `task_struct.mm`
        pub task_mm: u32,
        /// `task_struct.thread_info.status`
        pub task_status: u32,
        /// `pt_regs.orig_ax`
        pub regs_number: u32,
        /// `pt_regs.si`: the second argument
        pub regs_second: u32,
        /// `sock.sk_lock.owned`
        pub sock_owned: u32,
        /// What each system call changes: bits of [`part`], and one of [`when`].
        pub syscalls: [[u8; 2]; SYSCALLS],
    }
}
