//! What the program that sees contexts of io_setup(2) shares with its reader.

use crate::{Plain, plain};
use core::mem;

/// Contexts of a process that are looked at.
pub const CONTEXTS: u32 = 16;

plain! {
    /// A context.
    pub struct AioRecord {
        /// Its id: the address of its ring.
        pub id: u64,
        /// Process.
        pub tgid: i32,
        /// Room for contexts in the table of the process: not all are looked at if it is larger than [`CONTEXTS`].
        pub slots: u32,
        /// Events that there is room for in the ring.
        pub events: u32,
        /// Events in the ring that were not yet found to be reaped.
        pub completed: u32,
        /// Requests that may be made, without those that the CPUs have put aside.
        pub available: u32,
        /// Those that the CPU in question has put aside.
        pub here: u32,
    }
}

plain! {
    /// What the program knows of the kernel.
    pub struct AioLayout {
        /// `mm_struct.ioctx_table`
        pub mm_ioctx_table: u32,
        /// `kioctx_table.nr`
        pub table_nr: u32,
        /// `kioctx_table.table`
        pub table_table: u32,
        /// `kioctx.user_id`
        pub ctx_user_id: u32,
        /// `kioctx.nr_events`
        pub ctx_nr_events: u32,
        /// `kioctx.completed_events`
        pub ctx_completed_events: u32,
        /// `kioctx.reqs_available`
        pub ctx_reqs_available: u32,
        /// `kioctx.cpu`
        pub ctx_cpu: u32,
        /// `bpf_array.pptrs`
        pub array_pptrs: u32,
    }
}
