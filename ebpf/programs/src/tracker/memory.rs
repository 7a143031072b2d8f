//! Changes of address spaces. Whoever changes the list of mappings, a system call, a fault that lets a stack grow, or
//! another process, first locks it for writing.

use crate::{
    SPACES,
    access::{Address, Locked},
    add, now, wake,
};
use standstill_ebpf_abi::track::part;

#[unsafe(link_section = "tp_btf/mmap_lock_acquire_returned")]
#[unsafe(no_mangle)]
extern "C" fn locked(ctx: &Locked) -> i32 {
    if let Some(space) = ctx.for_writing().and_then(|mm| SPACES.get_ptr_mut(mm)) {
        // SAFETY: the pointer is to a map value, which the kernel keeps until the program ends.
        unsafe { (&raw mut (*space).changed).write_volatile(now()) };
        add(part::MEMORY.trailing_zeros() as usize);
        wake();
    }
    0
}

/// Arguments of the tracepoint exit_mmap.
#[repr(C)]
struct Exit {
    mm: Address,
}

/// An address space ends.
#[unsafe(link_section = "tp_btf/exit_mmap")]
#[unsafe(no_mangle)]
extern "C" fn exit_mmap(ctx: &Exit) -> i32 {
    let _ = SPACES.remove(ctx.mm as u64);
    0
}
