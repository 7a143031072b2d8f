//! x86-64: registers, interrupted system calls, the self-restoring trampoline.

mod vdso;

pub(crate) use vdso::*;

use standstill_images::types::Context;

/// Regset of the extended state.
pub(crate) const NT_X86_XSTATE: i32 = 0x202;
/// First address above user space with four-level page tables.
pub(crate) const TASK_SIZE: u64 = 0x7fff_ffff_f000;

/// `struct user_regs_struct`, in the kernel's order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Registers {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub orig_rax: u64,
    pub rip: u64,
    pub cs: u64,
    pub eflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub ds: u64,
    pub es: u64,
    pub fs: u64,
    pub gs: u64,
}

const USER32_CS: u64 = 0x23;
const ERESTARTSYS: i64 = -512;
const ERESTARTNOINTR: i64 = -513;
const ERESTARTNOHAND: i64 = -514;
const ERESTART_RESTARTBLOCK: i64 = -516;
const NR_RESTART_SYSCALL: u64 = 219;
const SYSCALL_INSTRUCTION: [u8; 2] = [0x0f, 0x05];

impl Registers {
    /// As the image stores them.
    pub(crate) fn to_words(self) -> [u64; 27] {
        let r = self;
        [
            r.r15, r.r14, r.r13, r.r12, r.rbp, r.rbx, r.r11, r.r10, r.r9, r.r8, r.rax, r.rcx, r.rdx, r.rsi, r.rdi,
            r.orig_rax, r.rip, r.cs, r.eflags, r.rsp, r.ss, r.fs_base, r.gs_base, r.ds, r.es, r.fs, r.gs,
        ]
    }

    /// From an image.
    pub(crate) fn from_words(w: &[u64; 27]) -> Self {
        let [r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi, orig_rax, rip, ..] = *w;
        let [.., cs, eflags, rsp, ss, fs_base, gs_base, ds, es, fs, gs] = *w;
        Self {
            r15,
            r14,
            r13,
            r12,
            rbp,
            rbx,
            r11,
            r10,
            r9,
            r8,
            rax,
            rcx,
            rdx,
            rsi,
            rdi,
            orig_rax,
            rip,
            cs,
            eflags,
            rsp,
            ss,
            fs_base,
            gs_base,
            ds,
            es,
            fs,
            gs,
        }
    }

    /// Instruction pointer.
    pub(crate) fn ip(&self) -> u64 {
        self.rip
    }

    /// Sets the instruction pointer.
    pub(crate) fn set_ip(&mut self, ip: u64) {
        self.rip = ip;
    }

    /// Whether the task runs 32-bit code.
    pub(crate) fn is_compat(&self) -> bool {
        self.cs == USER32_CS
    }

    /// The number of the system call that the stop interrupted, if any.
    pub(crate) fn interrupted_syscall(&self) -> Option<i64> {
        let nr = self.orig_rax as i64;
        let restarts = matches!(self.rax as i64, ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND | ERESTART_RESTARTBLOCK);
        (nr >= 0 && restarts).then_some(nr)
    }

    /// Whether the stop came at the end of a system call, interrupted or not.
    pub(crate) fn is_in_syscall(&self) -> bool {
        self.orig_rax as i64 >= 0
    }

    /// Arguments of the system call under way.
    pub(crate) fn arguments(&self) -> [u64; 6] {
        [self.rdi, self.rsi, self.rdx, self.r10, self.r8, self.r9]
    }

    /// Whether the interrupted system call goes on by way of the kernel's restart_block.
    pub(crate) fn uses_restart_block(&self) -> bool {
        self.interrupted_syscall().is_some() && self.rax as i64 == ERESTART_RESTARTBLOCK
    }

    /// The same state, written so that user code without the kernel's help goes on rightly from it.
    fn restarted_by_hand(mut self) -> Self {
        if let Some(nr) = self.interrupted_syscall() {
            self.rax = if self.uses_restart_block() { NR_RESTART_SYSCALL } else { nr as u64 };
            self.rip -= SYSCALL_INSTRUCTION.len() as u64;
            self.orig_rax = u64::MAX;
        }
        self
    }

    /// Registers that make one system call at `ip`, everything else unchanged.
    pub(crate) fn for_syscall(&self, ip: u64, nr: libc::c_long, args: [u64; 6]) -> Self {
        let [rdi, rsi, rdx, r10, r8, r9] = args;
        Self { rip: ip, rax: nr as u64, orig_rax: u64::MAX, rdi, rsi, rdx, r10, r8, r9, ..*self }
    }

    /// Goes on behind the interrupted system call, which had this result.
    pub(crate) fn return_from_syscall(&mut self, result: i64) {
        self.rax = result as u64;
        self.orig_rax = u64::MAX;
    }

    /// Result of the system call that just returned.
    pub(crate) fn result(&self) -> i64 {
        self.rax as i64
    }

    /// The context record of a thread.
    pub(crate) fn context(self, xstate: Vec<u8>) -> Context {
        Context::X86_64 { regs: self.to_words(), xstate }
    }
}

/// Length of [`trampoline`].
pub(crate) const TRAMPOLINE: usize = 224;
/// It begins at a multiple of this.
pub(crate) const TRAMPOLINE_ALIGNMENT: usize = 16;
/// Length of the part of it that is always the same.
const TRAMPOLINE_CODE: usize = 144;

/// Where the code of [`trampoline`] begins for a clone(2) whose child waits for nothing but its end: it exits, and the
/// caller waits for it.
pub(crate) const TRAMPOLINE_FORK: u64 = 0;
/// Where it begins for a system call after which the process exits.
pub(crate) const TRAMPOLINE_LAST: u64 = 45;
/// Where it begins for a system call whose result is a descriptor that it closes again.
pub(crate) const TRAMPOLINE_OPEN: u64 = 61;
/// Where it begins for any other system call.
pub(crate) const TRAMPOLINE_CALL: u64 = 70;

/// Code that makes one system call and then, if nobody took the registers back, restores all registers that a system
/// call needs from constants beside it and jumps back to where the task was. Runs at any address.
///
/// Flags and stack are not restored, so none of it may change them.
pub(crate) fn trampoline(saved: &Registers) -> Vec<u8> {
    let saved = saved.restarted_by_hand();
    // mov r64, [rip + disp32], for the registers that carry arguments or that `syscall` overwrites.
    let loads: [([u8; 3], u64); 9] = [
        ([0x48, 0x8b, 0x05], saved.rax),
        ([0x48, 0x8b, 0x3d], saved.rdi),
        ([0x48, 0x8b, 0x35], saved.rsi),
        ([0x48, 0x8b, 0x15], saved.rdx),
        ([0x4c, 0x8b, 0x15], saved.r10),
        ([0x4c, 0x8b, 0x05], saved.r8),
        ([0x4c, 0x8b, 0x0d], saved.r9),
        ([0x48, 0x8b, 0x0d], saved.rcx),
        ([0x4c, 0x8b, 0x1d], saved.r11),
    ];
    let jump = [0xff, 0x25]; // jmp [rip + disp32]
    let data = TRAMPOLINE - 8 * (loads.len() + 1);
    // WEXITED | __WALL, little endian.
    let any_end = (libc::WEXITED | libc::__WALL).to_le_bytes();
    let mut code = [
        &SYSCALL_INSTRUCTION[..],
        &[0x89, 0xc1],                                                 // mov ecx, eax
        &[0xe3, 41],                                                   // jrcxz exit
        &[0x89, 0xc6],                                                 // mov esi, eax
        &[0xbf, libc::P_PID as u8, 0, 0, 0],                           // mov edi, P_PID
        &[0xba, 0, 0, 0, 0],                                           // mov edx, 0
        &[0x41, 0xba, any_end[0], any_end[1], any_end[2], any_end[3]], // mov r10d, WEXITED | __WALL
        &[0x41, 0xb8, 0, 0, 0, 0],                                     // mov r8d, 0
        &[0xb8, libc::SYS_waitid as u8, 0, 0, 0],                      // wait: mov eax, SYS_waitid
        &SYSCALL_INSTRUCTION,                                          // fails if there is no child
        &[0x48, 0x8d, 0x48, libc::EINTR as u8],                        // lea rcx, [rax + EINTR]
        &[0xe3, 0xf3],                                                 // jrcxz wait
        &[0xeb, 27],                                                   // jmp restore
        &SYSCALL_INSTRUCTION,                                          // TRAMPOLINE_LAST
        &[0xbf, 0, 0, 0, 0],                                           // exit: mov edi, 0
        &[0xb8, libc::SYS_exit_group as u8, 0, 0, 0],                  // mov eax, SYS_exit_group
        &SYSCALL_INSTRUCTION,
        &[0xeb, 0xf2],                           // jmp exit: nothing behind is for it
        &SYSCALL_INSTRUCTION,                    // TRAMPOLINE_OPEN
        &[0x89, 0xc7],                           // mov edi, eax
        &[0xb8, libc::SYS_close as u8, 0, 0, 0], // mov eax, SYS_close
        &SYSCALL_INSTRUCTION,                    // TRAMPOLINE_CALL
    ]
    .concat(); // restore:
    let emit = |code: &mut Vec<u8>, opcode: &[u8], index: usize| {
        let next = code.len() + opcode.len() + 4;
        code.extend_from_slice(opcode);
        code.extend_from_slice(&((data + 8 * index - next) as u32).to_le_bytes());
    };
    for (index, (opcode, _)) in loads.iter().enumerate() {
        emit(&mut code, opcode, index);
    }
    emit(&mut code, &jump, loads.len());
    code.resize(data, 0xcc);
    assert_eq!(code.len(), TRAMPOLINE_CODE);
    for value in loads.iter().map(|l| l.1).chain([saved.rip]) {
        code.extend_from_slice(&value.to_le_bytes());
    }
    assert_eq!(code.len(), TRAMPOLINE);
    code
}

/// Offset of a trampoline that is still in the code of a process, at the place for one that nobody took away.
pub(crate) fn find_trampoline(code: &[u8]) -> Option<usize> {
    let ours = &trampoline(&Registers::default())[..TRAMPOLINE_CODE];
    let last = code.len().checked_sub(TRAMPOLINE)?;
    (0..=last).step_by(TRAMPOLINE_ALIGNMENT).find(|&at| code[at..].starts_with(ours))
}

/// Offset of a `syscall` instruction in code.
pub(crate) fn find_syscall(code: &[u8]) -> Option<usize> {
    code.windows(2).position(|w| w == SYSCALL_INSTRUCTION)
}

/// Size of the XSAVE area that ptrace(2) exchanges on this machine (CPUID leaf 0xd).
pub(crate) fn xstate_size() -> usize {
    std::arch::x86_64::__cpuid_count(0xd, 0).ebx as usize
}

/// Leaves this program for the restorer.
///
/// # Safety
/// `entry` is the first byte of the restorer, and `task` its complete program.
pub(crate) unsafe fn enter(entry: u64, task: u64) -> ! {
    // SAFETY: the caller vouches for both addresses; nothing of this program is needed any more.
    unsafe { std::arch::asm!("jmp {}", in(reg) entry, in("rdi") task, options(noreturn)) }
}
