//! System calls of tracked processes that change something, if somebody wants to know: the tracepoint makes every system
//! call of the machine slower. What each of them changes is in a table that the loader fills; a call that it does not
//! know changes everything.

use crate::{
    LAYOUT, PROCESSES,
    access::{Address, known, load, zero},
    changed, current, log_context, process_of,
};
use aya_ebpf::helpers::generated::bpf_probe_read_user;
use aya_log_ebpf::debug;
use core::ptr;
use standstill_ebpf_abi::track::{SYSCALLS, part, when};

/// Arguments of the tracepoint sys_exit.
#[repr(C)]
struct SysExit {
    regs: Address,
    result: i64,
}

/// A system call is over, and what it changed has changed.
#[unsafe(link_section = "tp_btf/sys_exit")]
#[unsafe(no_mangle)]
extern "C" fn sys_exit(ctx: &SysExit) -> i32 {
    /// TS_COMPAT: a call with the numbers of 32-bit programs.
    const COMPAT: u32 = 2;
    let task = current();
    // SAFETY: the tracepoint passes registers, `task` is a task_struct, and the fields are of the types loaded.
    let (number, status): (u64, u32) =
        unsafe { (load(ctx.regs, known(&LAYOUT.regs_number)), load(task, known(&LAYOUT.task_status))) };
    // What the calls of 32-bit programs change is not told apart: such processes cannot be dumped.
    let rule = if status & COMPAT != 0 { part::ALL } else { rule(number) };
    if rule == 0 {
        return 0;
    }
    // SAFETY: as above.
    let process = unsafe { process_of(task) };
    if PROCESSES.get_ptr(process).is_some() {
        let parts = parts(rule, ctx);
        if parts != 0 {
            if parts == part::ALL {
                debug!(&log_context(ctx), "process {}: system call {} may have changed everything", process, number);
            }
            changed(process, parts);
        }
    }
    0
}

/// What the table says of a call.
#[inline(always)]
fn rule(number: u64) -> u16 {
    // -1: not a system call after all, or one that a tracer took away.
    if number == u64::MAX {
        return 0;
    }
    if number >= SYSCALLS as u64 {
        return part::ALL;
    }
    // A plain read would let the compiler take the zeros of the object file for the values.
    // SAFETY: the index is below the length.
    u16::from_le_bytes(unsafe { ptr::read_volatile((&raw const LAYOUT.syscalls[0]).add(number as usize)) })
}

/// What a call changed, as its arguments and result tell.
#[inline(always)]
fn parts(rule: u16, ctx: &SysExit) -> u16 {
    // SAFETY: the tracepoint passes registers.
    let second: u64 = unsafe { load(ctx.regs, known(&LAYOUT.regs_second)) };
    let failed = (-4095..0).contains(&ctx.result);
    let parts = rule & part::ALL;
    match rule & when::MASK {
        when::ALWAYS => parts,
        _ if failed => 0,
        when::FCNTL if !fcntl(second as u32) => 0,
        when::IOCTL if !ioctl(second as u32) => 0,
        when::RECVMSG if !received_control(second) => 0,
        _ => parts,
    }
}

/// Commands that change the table or the identity of descriptors; flags are read when they are wanted.
#[inline(always)]
fn fcntl(command: u32) -> bool {
    const F_DUPFD: u32 = 0;
    const F_SETFD: u32 = 2;
    const F_DUPFD_CLOEXEC: u32 = 1030;
    matches!(command, F_DUPFD | F_SETFD | F_DUPFD_CLOEXEC)
}

/// Many drivers have requests that open descriptors. Those of terminals do not, but for one; FIOCLEX and FIONCLEX are
/// in their range, too.
#[inline(always)]
fn ioctl(request: u32) -> bool {
    const TERMINALS: u32 = 0x54;
    const TIOCGPTPEER: u32 = 0x5441;
    const FIONCLEX: u32 = 0x5450;
    const FIOCLEX: u32 = 0x5451;
    request & 0xffff == TIOCGPTPEER || request >> 8 != TERMINALS || matches!(request, FIONCLEX | FIOCLEX)
}

/// Whether recvmsg(2) stored a control message, which may have brought descriptors.
#[inline(always)]
fn received_control(msghdr: u64) -> bool {
    /// Offset of `msg_controllen`.
    const CONTROL_LENGTH: u64 = 40;
    let mut length = zero::<u64>();
    // SAFETY: `length` is a word; the helper checks the other address.
    let result =
        unsafe { bpf_probe_read_user((&raw mut length).cast(), 8, msghdr.wrapping_add(CONTROL_LENGTH) as *const _) };
    result != 0 || length != 0
}
