//! Changes of address spaces. Whoever changes the list of mappings, a system call, a fault that lets a stack grow, or
//! another process, first locks it for writing.

use crate::{SPACES, access::Address, add, now, wake};
use standstill_ebpf_abi::track::part;

/// Arguments of the tracepoint mmap_lock_acquire_returned (CONFIG_TRACING, Linux 5.11).
#[repr(C)]
struct Locked {
    mm: Address,
    write: u64,
    success: u64,
}

#[unsafe(link_section = "tp_btf/mmap_lock_acquire_returned")]
#[unsafe(no_mangle)]
extern "C" fn locked(ctx: &Locked) -> i32 {
    // The kernel passes both as bool, of whose word only the lowest byte counts.
    if ctx.write as u8 == 0 || ctx.success as u8 == 0 {
        return 0;
    }
    if let Some(space) = SPACES.get_ptr_mut(ctx.mm as u64) {
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
