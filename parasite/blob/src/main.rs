//! The restorer: an interpreter of system call lists, position independent, without relocations or data.
//!
//! It is entered at `start` (the first byte of the blob) with the address of a [`Task`] in the first argument register,
//! and runs on the task's own stack. Errors are left in the [`Task`] and reported by a breakpoint trap: a tracer is
//! always there during a restore, and its death kills the task (`PTRACE_O_EXITKILL`).
#![no_std]
#![no_main]

#[cfg_attr(target_arch = "x86_64", path = "arch/x86_64.rs")]
mod arch;

use arch::{clone, syscall, trap};
use core::sync::atomic::{AtomicU32, Ordering};
use standstill_parasite_abi::{EXPECT, Kind, LOAD, MAY_FAIL, Op, Task, stage};

const EBADFD: u64 = 77;
const ENODATA: u64 = 61;
const EINVAL: u64 = 22;
const EINTR: i64 = -4;
const FUTEX_WAIT: u64 = 0;
const FUTEX_WAKE: u64 = 1;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {
        trap(stage::FAILED);
    }
}

/// Runs the program of `task`; never returns.
///
/// # Safety
/// `task` points to a complete [`Task`] whose operations and stack stay mapped at their addresses as long as it runs.
#[unsafe(no_mangle)]
unsafe extern "C" fn interpret(task: *mut Task) -> ! {
    // SAFETY: the caller keeps the task alive and only this thread runs it; the tracer reads it while we are stopped.
    let task = unsafe { &mut *task };
    while task.at < task.len {
        // SAFETY: `ops` has `len` entries, and `at` is below it.
        let op = unsafe { *(task.ops as *const Op).add(task.at as usize) };
        match run(&op) {
            Ok(()) => task.at += 1,
            Err(errno) => {
                task.error = errno;
                loop {
                    trap(stage::FAILED);
                }
            }
        }
    }
    loop {
        trap(stage::FAILED);
    }
}

fn run(op: &Op) -> Result<(), u64> {
    let mut args = op.args;
    if op.flags & LOAD != 0 {
        // SAFETY: the engine placed the word, aligned, in the memory of the restorer; the kernel has written it in an earlier
        // operation of this program.
        args[0] = unsafe { (args[0] as *const u64).read_volatile() };
    }
    let result = match op.kind {
        k if k == Kind::Syscall as u32 => syscall(op.nr, args),
        k if k == Kind::Trap as u32 => {
            trap(args[0]);
            0
        }
        k if k == Kind::Clone as u32 => clone(args[0], args[1], args[2]),
        k if k == Kind::ReadFull as u32 => return transfer_full(arch::NR_PREAD64, args),
        k if k == Kind::WriteFull as u32 => return transfer_full(arch::NR_WRITE, args),
        k if k == Kind::Post as u32 => post(args[0]),
        k if k == Kind::Await as u32 => wait_until(args[0], args[1]),
        k if k == Kind::Exit as u32 => syscall(arch::NR_EXIT, args),
        _ => return Err(EINVAL),
    };
    if (-4095..0).contains(&result) && op.flags & MAY_FAIL == 0 {
        return Err(-result as u64);
    }
    if op.flags & EXPECT != 0 && result as u64 != op.expected { Err(EBADFD) } else { Ok(()) }
}

/// A word that tasks wait for.
fn word(address: u64) -> &'static AtomicU32 {
    // SAFETY: the engine placed the word, aligned, in the memory of the restorer, which outlives every program; all
    // accesses to it are atomic.
    unsafe { AtomicU32::from_ptr(address as *mut u32) }
}

fn post(address: u64) -> i64 {
    word(address).fetch_add(1, Ordering::Release);
    syscall(arch::NR_FUTEX, [address, FUTEX_WAKE, i32::MAX as u64, 0, 0, 0])
}

fn wait_until(address: u64, least: u64) -> i64 {
    loop {
        let now = u64::from(word(address).load(Ordering::Acquire));
        if now >= least {
            return 0;
        }
        // Whatever ends the wait, the word is looked at again.
        syscall(arch::NR_FUTEX, [address, FUTEX_WAIT, now, 0, 0, 0]);
    }
}

/// One long read or write: the kernel moves at most 2 GiB per call, and signals cut transfers short.
fn transfer_full(nr: u64, [fd, address, length, offset, ..]: [u64; 6]) -> Result<(), u64> {
    let mut done = 0;
    while done < length {
        match syscall(nr, [fd, address + done, length - done, offset + done, 0, 0]) {
            EINTR => {}
            0 => return Err(ENODATA),
            n if n < 0 => return Err(-n as u64),
            n => done += n as u64,
        }
    }
    Ok(())
}
