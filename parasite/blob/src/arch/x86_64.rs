//! x86-64: entry, system calls, clone, trap.

use core::arch::{asm, global_asm};
use standstill_parasite_abi::Task;

pub(crate) const NR_WRITE: u64 = 1;
pub(crate) const NR_PREAD64: u64 = 17;
pub(crate) const NR_EXIT: u64 = 60;
pub(crate) const NR_FUTEX: u64 = 202;
const NR_CLONE3: u64 = 435;

// The first bytes of the blob. rdi: the Task; its stack top is at offset 32.
global_asm!(
    ".section .text.start, \"ax\"",
    ".globl start",
    "start:",
    "mov rsp, [rdi + {stack}]",
    "xor ebp, ebp",
    "call {interpret}",
    "ud2",
    stack = const core::mem::offset_of!(Task, stack),
    interpret = sym super::interpret,
);

/// A system call; the result as the kernel returns it.
pub(crate) fn syscall(nr: u64, args: [u64; 6]) -> i64 {
    let result: i64;
    // SAFETY: the program was made by the engine for exactly this task; the interpreter's own memory (blob, programs,
    // stacks) is outside every address the engine lets a program unmap or map over.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") nr => result,
            in("rdi") args[0],
            in("rsi") args[1],
            in("rdx") args[2],
            in("r10") args[3],
            in("r8") args[4],
            in("r9") args[5],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}

/// clone3(2); the child, thread or process, begins at `interpret(child)` on the child's own stack.
pub(crate) fn clone(args: u64, size: u64, child: u64) -> i64 {
    let result: i64;
    // SAFETY: the child leaves this frame at once for its own stack; the parent goes on as after any system call.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "mov rdi, r12",
            "mov rsp, [rdi + {stack}]",
            "xor ebp, ebp",
            "call {interpret}",
            "ud2",
            "2:",
            stack = const core::mem::offset_of!(Task, stack),
            interpret = sym super::interpret,
            inlateout("rax") NR_CLONE3 => result,
            in("rdi") args,
            in("rsi") size,
            in("r12") child,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    result
}

/// Breakpoint: the tracer finds `stage` in rax.
pub(crate) fn trap(stage: u64) {
    // SAFETY: int3 only raises SIGTRAP, which the tracer swallows; no register but rax is read or written.
    unsafe {
        asm!("int3", inlateout("rax") stage => _, options(nostack));
    }
}

/// The compiler may ask for these four; the blob links no library.
mod mem {
    use core::arch::asm;

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
        // SAFETY: the caller owns `n` bytes at both addresses, as memcpy(3) demands.
        unsafe {
            asm!("rep movsb", inout("rcx") n => _, inout("rdi") to => _, inout("rsi") from => _, options(nostack));
        }
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memset(to: *mut u8, byte: i32, n: usize) -> *mut u8 {
        // SAFETY: the caller owns `n` bytes at `to`, as memset(3) demands.
        unsafe {
            asm!("rep stosb", inout("rcx") n => _, inout("rdi") to => _, in("al") byte as u8, options(nostack));
        }
        to
    }
}
