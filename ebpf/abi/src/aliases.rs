//! What the program that sees second mappings of the same memory shares with its reader.

use crate::{Plain, plain};
use core::mem;

/// System calls with a number below this can be known.
pub const SYSCALLS: usize = 512;

/// What a system call does to an address space, as far as it is known.
pub mod call {
    /// It may map memory a second time that is mapped already, here or in a new process.
    pub const UNKNOWN: u8 = 0;
    /// It maps nothing a second time.
    pub const HARMLESS: u8 = 1;
    /// mmap(2): harmless for memory of its own.
    pub const MMAP: u8 = 2;
    /// mremap(2): harmless when the memory does not grow, and leaves its old place.
    pub const MREMAP: u8 = 3;
}

plain! {
    /// A watched address space, by the address of its `mm_struct`. Times are those of CLOCK_MONOTONIC, in nanoseconds.
    pub struct WatchedSpace {
        /// When it was last locked for a change of its mappings.
        pub changed: u64,
        /// When memory of it may last have been mapped a second time.
        pub aliased: u64,
    }
}

plain! {
    /// What the program knows of the kernel.
    pub struct AliasLayout {
        /// `task_struct.mm`
        pub task_mm: u32,
        /// `task_struct.thread_info.status`
        pub task_status: u32,
        /// `pt_regs.orig_ax`
        pub regs_number: u32,
        /// `pt_regs.si`: the second argument
        pub regs_second: u32,
        /// `pt_regs.dx`: the third
        pub regs_third: u32,
        /// `pt_regs.r10`: the fourth
        pub regs_fourth: u32,
        /// What each system call does: one of [`call`].
        pub calls: [u8; SYSCALLS],
    }
}
