//! Notes when memory of a watched address space may have been mapped a second time, by fork or otherwise: who tracks
//! writes by the page tables of some processes must know of all page tables.
//!
//! Every such step locks the address space for writing first. Which system call it is tells whether it is of interest:
//! the harmless ones are listed, all others count.
#![no_std]
#![no_main]

mod access;
mod runtime;

use access::{Address, Locked, known, load, zero};
use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    helpers::generated::{bpf_get_current_task_btf, bpf_ktime_get_ns, bpf_task_pt_regs},
    macros::map,
    maps::HashMap,
};
use core::ptr;
use standstill_ebpf_abi::aliases::{AliasLayout, SYSCALLS, WatchedSpace, call};

/// Watched address spaces.
#[map]
static SPACES: HashMap<u64, WatchedSpace> = HashMap::with_max_entries(1 << 16, BPF_F_NO_PREALLOC);

#[unsafe(no_mangle)]
static LAYOUT: AliasLayout = zero();

#[unsafe(link_section = "tp_btf/mmap_lock_acquire_returned")]
#[unsafe(no_mangle)]
extern "C" fn locked(ctx: &Locked) -> i32 {
    let Some(mm) = ctx.for_writing() else { return 0 };
    let Some(space) = SPACES.get_ptr_mut(mm) else { return 0 };
    // SAFETY: nothing is passed; the pointer is to a map value, which the kernel keeps until the program ends.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: as above.
    unsafe { (&raw mut (*space).changed).write_volatile(now) };
    if may_alias(mm) {
        // SAFETY: as above.
        unsafe { (&raw mut (*space).aliased).write_volatile(now) };
    }
    0
}

/// Whether what the running task does may map memory of this address space a second time.
#[inline(always)]
fn may_alias(mm: u64) -> bool {
    /// TS_COMPAT: a call with the numbers of 32-bit programs.
    const COMPAT: u32 = 2;
    const MAP_TYPE: u64 = 0xf;
    const MAP_PRIVATE: u64 = 2;
    const MAP_ANONYMOUS: u64 = 0x20;
    const MREMAP_DONTUNMAP: u64 = 4;
    // SAFETY: nothing is passed.
    let task = unsafe { bpf_get_current_task_btf() };
    // SAFETY: `task` is a task_struct; the helper gives its pt_regs. The fields are of the types loaded.
    unsafe {
        // Somebody else looks after it: a tracer, a userfaultfd, the kernel. That shares no memory with anybody.
        if load::<u64>(task.cast_const().cast(), known(&LAYOUT.task_mm)) != mm {
            return false;
        }
        if load::<u32>(task.cast_const().cast(), known(&LAYOUT.task_status)) & COMPAT != 0 {
            return true;
        }
        let regs: Address = bpf_task_pt_regs(task.cast()) as Address;
        let number: u64 = load(regs, known(&LAYOUT.regs_number));
        // A page fault lets the stack grow.
        if number == u64::MAX {
            return false;
        }
        if number >= SYSCALLS as u64 {
            return true;
        }
        match ptr::read_volatile(&raw const LAYOUT.calls[number as usize & (SYSCALLS - 1)]) {
            call::HARMLESS => false,
            call::MMAP => {
                let flags: u64 = load(regs, known(&LAYOUT.regs_fourth));
                flags & MAP_ANONYMOUS == 0 && flags & MAP_TYPE != MAP_PRIVATE
            }
            call::MREMAP => {
                // As the kernel rounds them, which may overflow.
                let pages = |length: u64| length.wrapping_add(0xfff) >> 12;
                let (old, new) = (load(regs, known(&LAYOUT.regs_second)), load(regs, known(&LAYOUT.regs_third)));
                let flags: u64 = load(regs, known(&LAYOUT.regs_fourth));
                pages(old) == 0 || pages(new) > pages(old) || flags & MREMAP_DONTUNMAP != 0
            }
            _ => true,
        }
    }
}
