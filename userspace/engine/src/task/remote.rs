//! System calls made by a frozen thread on our behalf.
//!
//! Nothing of the target is borrowed without a way back: the thread runs a trampoline that makes one system call and
//! then restores every register it used by itself and jumps back to where the thread was. While we live we stop it at
//! the exit of the system call and put the registers back; when we die at any instruction, the trampoline does. The
//! trampoline lies in the unused zero bytes at the end of the `[vdso]`, so no mapping, descriptor, stack or file of the
//! target is needed. Those bytes are zeroed afterwards; one page of the vdso stays a private copy.

use crate::{
    error::{Context, Error, Result},
    kernel::{
        PAGE,
        arch::{self, Registers},
        proc, procmap,
        ptrace::{self, Wait},
        sys,
    },
    tree::seccomp,
};
use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
};

/// A process in whose threads system calls can be made. Nothing happens to it before the first one.
pub(crate) struct Remote {
    pid: i32,
    memory: Option<File>,
    trampoline: u64,
    scratch: u64,
    /// The thread whose registers are borrowed, and its own ones.
    borrowed: Option<(i32, Registers)>,
}

impl Remote {
    /// For a process that stays stopped by us as long as the result lives.
    pub(crate) fn new(pid: i32) -> Self {
        Self { pid, memory: None, trampoline: 0, scratch: 0, borrowed: None }
    }

    fn memory(&mut self) -> Result<&File> {
        let pid = self.pid;
        if self.memory.is_none() {
            let open = OpenOptions::new().read(true).write(true).open(proc::path(pid, "mem"));
            self.memory = Some(open.context(|| format!("open the memory of {pid}"))?);
        }
        Ok(self.memory.as_ref().expect("just opened"))
    }

    /// Makes the scratch page.
    fn attach(&mut self) -> Result<()> {
        if self.scratch != 0 {
            return Ok(());
        }
        self.find_room()?;
        let pid = self.pid;
        let prot = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        self.scratch = self.checked(pid, libc::SYS_mmap, [0, PAGE, prot, flags, u64::MAX, 0])? as u64;
        Ok(())
    }

    /// Finds room for the trampoline.
    fn find_room(&mut self) -> Result<()> {
        if self.trampoline != 0 {
            return Ok(());
        }
        let pid = self.pid;
        let no_room = || {
            Error::unsupported(
                pid,
                "a process without room for a trampoline in its [vdso]",
                "load the eBPF observers (scripts/setup, then `standstill check`), which need none",
            )
        };
        let vdso = procmap::vdso(pid).context(|| format!("look for the vdso of {pid}"))?.ok_or_else(no_room)?;
        let mut code = vec![0u8; (vdso.end - vdso.start) as usize];
        self.memory()?.read_exact_at(&mut code, vdso.start).context(|| format!("read the vdso of {pid}"))?;
        // Of a dump that was killed one may be there.
        if let Some(at) = arch::find_trampoline(&code).map(|at| vdso.start + at as u64)
            && is_left_alone(pid, at)
        {
            self.trampoline = at;
            return Ok(());
        }
        let used = code.iter().rposition(|&b| b != 0).map_or(0, |p| p + 1);
        let used = used.next_multiple_of(arch::TRAMPOLINE_ALIGNMENT);
        if code.len() < used + arch::TRAMPOLINE {
            return Err(no_room());
        }
        self.trampoline = vdso.start + used as u64;
        Ok(())
    }

    /// Address of a page of the target for arguments and results.
    pub(crate) fn scratch(&mut self) -> Result<u64> {
        self.attach()?;
        Ok(self.scratch)
    }

    /// A thread's own registers, whether they are borrowed at the moment or not.
    ///
    /// A thread inside a restartable sequence goes on at the sequence's abort handler, as after any preemption
    /// (rseq(2)): neither a kernel that restores the thread nor one that ran other code in it in between knows of the
    /// sequence any more.
    pub(crate) fn registers(&mut self, tid: i32) -> io::Result<Registers> {
        if let Some((borrowed, own)) = self.borrowed
            && borrowed == tid
        {
            return Ok(own);
        }
        let mut regs = ptrace::registers(tid)?;
        // A sequence may not contain system calls.
        if regs.is_in_syscall() {
            return Ok(regs);
        }
        let area = ptrace::rseq(tid)?.address;
        if area != 0
            && let Some(abort) = self.abort_handler(area, regs.ip())
        {
            regs.set_ip(abort);
        }
        Ok(regs)
    }

    /// The abort handler of the restartable sequence that `ip` is in. `None` also if the area cannot be read: then the
    /// kernel could not either.
    fn abort_handler(&mut self, area: u64, ip: u64) -> Option<u64> {
        let memory = self.memory().ok()?;
        let word = |address: u64| {
            let mut bytes = [0; 8];
            memory.read_exact_at(&mut bytes, address).ok()?;
            Some(u64::from_ne_bytes(bytes))
        };
        let section = word(area + 8)?; // struct rseq: rseq_cs
        if section == 0 {
            return None;
        }
        // struct rseq_cs: version and flags, start_ip, post_commit_offset, abort_ip
        let (start, length, abort) = (word(section + 8)?, word(section + 16)?, word(section + 24)?);
        (ip.wrapping_sub(start) < length).then_some(abort)
    }

    /// Reads results from the scratch page.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> Result<()> {
        let (pid, at) = (self.pid, self.scratch()?);
        self.memory()?.read_exact_at(buffer, at).context(|| format!("read the memory of {pid}"))
    }

    /// Makes thread `tid` of the process execute one system call; an error if it fails.
    pub(crate) fn syscall(&mut self, tid: i32, nr: libc::c_long, args: [u64; 6]) -> Result<i64> {
        self.attach()?;
        self.checked(tid, nr, args)
    }

    /// Makes the leader execute a system call that opens a descriptor, which is duplicated and closed there. If we die
    /// in between, the trampoline closes it.
    pub(crate) fn open(&mut self, nr: libc::c_long, args: [u64; 6]) -> Result<OwnedFd> {
        let pid = self.pid;
        self.find_room()?;
        let there = self.raw(pid, nr, args, arch::TRAMPOLINE_OPEN)?;
        let there = self.succeeded(pid, nr, there)?;
        let duplicate = sys::pidfd_open(pid).and_then(|pidfd| sys::pidfd_getfd(pidfd.as_fd(), there as i32));
        self.checked(pid, libc::SYS_close, [there as u64, 0, 0, 0, 0, 0])?;
        duplicate.context(|| format!("duplicate a descriptor of process {pid}"))
    }

    /// Makes the leader clone itself, copying its memory and sharing its descriptors. The child, which this returns, is
    /// traced by us and stops before it does anything; let go, it ends, and nobody gets a signal for it.
    pub(super) fn fork(&mut self) -> Result<i32> {
        const ERESTARTNOINTR: i32 = 513;
        let pid = self.pid;
        self.find_room()?;
        let flags = (libc::CLONE_FILES | libc::CLONE_PTRACE) as u64;
        loop {
            let child = self.raw(pid, libc::SYS_clone, [flags, 0, 0, 0, 0, 0], arch::TRAMPOLINE_FORK)?;
            if child == -i64::from(ERESTARTNOINTR) {
                // A signal is to be handled first. The next attempt begins with it.
                self.give_back()?;
                continue;
            }
            return self.succeeded(pid, libc::SYS_clone, child).map(|child| child as i32);
        }
    }

    /// Makes the leader take the status of a child that has ended.
    pub(super) fn reap(&mut self, child: i32) -> Result<()> {
        let options = (libc::WEXITED | libc::__WALL) as u64;
        let args = [libc::P_PID.into(), child as u64, 0, options, 0, 0];
        self.checked(self.pid, libc::SYS_waitid, args).map(drop)
    }

    /// Where a child from [`Self::fork`] finds the code for system calls after which it ends.
    pub(super) fn last_call(&self) -> u64 {
        self.trampoline + arch::TRAMPOLINE_LAST
    }

    fn checked(&mut self, tid: i32, nr: libc::c_long, args: [u64; 6]) -> Result<i64> {
        let result = self.raw(tid, nr, args, arch::TRAMPOLINE_CALL)?;
        self.succeeded(tid, nr, result)
    }

    fn succeeded(&self, tid: i32, nr: libc::c_long, result: i64) -> Result<i64> {
        match result {
            error @ -4095..0 => Err(io::Error::from_raw_os_error(-error as i32))
                .context(|| format!("system call {nr} in thread {tid} of process {}", self.pid)),
            value => Ok(value),
        }
    }

    /// `entry`: where in the trampoline to begin.
    fn raw(&mut self, tid: i32, nr: libc::c_long, args: [u64; 6], entry: u64) -> Result<i64> {
        loop {
            let own = self.borrow(tid)?;
            let died = |pid| move |e: io::Error| if proc::is_gone(&e) { Error::Died(pid) } else { failed(tid, e) };
            let died = died(self.pid);
            ptrace::set_registers(tid, &own.for_syscall(self.trampoline + entry, nr, args)).map_err(died)?;
            ptrace::cont_to_syscall(tid).map_err(died)?;
            match ptrace::wait(tid).map_err(died)? {
                Wait::Syscall => {}
                Wait::Gone(_) => return Err(Error::Died(self.pid)),
                // A signal (or a stop) came first. It belongs to the target: let it have its effect on the thread's own
                // registers, as if it had come a moment before the freeze, and begin again.
                Wait::Signal(signal) => {
                    self.deliver(tid, signal)?;
                    continue;
                }
                _ => continue,
            }
            ptrace::cont_to_syscall(tid).map_err(died)?;
            return match ptrace::wait(tid).map_err(died)? {
                Wait::Syscall => Ok(ptrace::registers(tid).map_err(died)?.result()),
                _ => Err(Error::Died(self.pid)),
            };
        }
    }

    /// Makes `tid` the thread whose registers the trampoline would restore.
    fn borrow(&mut self, tid: i32) -> Result<Registers> {
        if let Some((current, own)) = self.borrowed {
            if current == tid {
                return Ok(own);
            }
            self.give_back()?;
        }
        let own = self.registers(tid).map_err(|e| failed(tid, e))?;
        if own.is_compat() {
            return Err(Error::unsupported(self.pid, "a 32-bit program", "dump 64-bit programs only"));
        }
        self.suspend_seccomp(tid)?;
        let (pid, at) = (self.pid, self.trampoline);
        self.memory()?.write_all_at(&arch::trampoline(&own), at).context(|| format!("write the vdso of {pid}"))?;
        self.borrowed = Some((tid, own));
        Ok(own)
    }

    /// Filters must not see the system calls that a thread makes for us. They are back when the thread is let go of,
    /// whether we do that or the kernel at our end; until then it makes no system call of its own.
    fn suspend_seccomp(&self, tid: i32) -> Result<()> {
        let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_SUSPEND_SECCOMP;
        match ptrace::set_options(tid, options) {
            // Not granted: of no importance for who has no filters.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EPERM | libc::EINVAL)) => {
                let status = proc::status(self.pid, tid).context(|| format!("read the status of thread {tid}"))?;
                if status.seccomp == 0 { Ok(()) } else { Err(seccomp::not_permitted(tid)) }
            }
            other => other.map_err(|e| failed(tid, e)),
        }
    }

    fn deliver(&mut self, tid: i32, signal: i32) -> Result<()> {
        if let Some((_, own)) = self.borrowed.take() {
            ptrace::set_registers(tid, &own).map_err(|e| failed(tid, e))?;
        }
        ptrace::interrupt(tid).map_err(|e| failed(tid, e))?;
        ptrace::cont(tid, signal).map_err(|e| failed(tid, e))?;
        settle(self.pid, tid)
    }

    /// Puts the borrowed thread back into the state the freeze left it in.
    fn give_back(&mut self) -> Result<()> {
        let Some((tid, own)) = self.borrowed.take() else { return Ok(()) };
        // The thread stands at the exit of a system call. Only a stop inside the kernel's signal handling makes it
        // restart an interrupted system call rightly, so go on to one: it is reached before any user instruction.
        ptrace::interrupt(tid).map_err(|e| failed(tid, e))?;
        ptrace::set_registers(tid, &own).map_err(|e| failed(tid, e))?;
        ptrace::cont(tid, 0).map_err(|e| failed(tid, e))?;
        settle(self.pid, tid)
    }

    /// Removes everything from the target.
    pub(crate) fn detach(mut self) -> Result<()> {
        self.clean()
    }

    fn clean(&mut self) -> Result<()> {
        if self.scratch != 0 {
            let scratch = std::mem::take(&mut self.scratch);
            let tid = self.borrowed.map_or(self.pid, |(tid, _)| tid);
            self.checked(tid, libc::SYS_munmap, [scratch, PAGE, 0, 0, 0, 0])?;
        }
        self.give_back()?;
        let (pid, at) = (self.pid, std::mem::take(&mut self.trampoline));
        if at != 0 {
            self.memory()?.write_all_at(&[0; arch::TRAMPOLINE], at).context(|| format!("write the vdso of {pid}"))?;
        }
        Ok(())
    }
}

/// Whether no thread of a process stands in the trampoline at an address, as far as can be seen: of one that runs it
/// cannot.
fn is_left_alone(pid: i32, trampoline: u64) -> bool {
    let place = |tid: i32| -> Option<u64> {
        // The last field is the program counter, whether the thread is in a system call or not.
        let text = std::fs::read_to_string(proc::path(pid, &format!("task/{tid}/syscall"))).ok()?;
        u64::from_str_radix(text.trim_end().rsplit(' ').next()?.strip_prefix("0x")?, 16).ok()
    };
    let within = trampoline..=trampoline + arch::TRAMPOLINE as u64;
    // A leader that has exited stands nowhere.
    let gone = |tid: i32| tid == pid && proc::stat(pid).is_ok_and(|stat| stat.is_dead_leader());
    let alone = |tid: i32| place(tid).map_or_else(|| gone(tid), |place| !within.contains(&place));
    proc::threads(pid).is_ok_and(|threads| threads.into_iter().all(alone))
}

impl Drop for Remote {
    fn drop(&mut self) {
        if let Err(e) = self.clean() {
            tracing::debug!(pid = self.pid, "clean-up after a remote call: {e}");
        }
    }
}

fn failed(tid: i32, source: io::Error) -> Error {
    Error::System { call: format!("ptrace of thread {tid}"), source }
}

/// Waits until the thread stops for the interrupt; signals on the way are delivered.
fn settle(pid: i32, tid: i32) -> Result<()> {
    loop {
        match ptrace::wait(tid).map_err(|e| failed(tid, e))? {
            Wait::EventStop(_) => return Ok(()),
            Wait::Gone(_) => return Err(Error::Died(pid)),
            Wait::Signal(signal) => ptrace::cont(tid, signal).map_err(|e| failed(tid, e))?,
            _ => ptrace::cont(tid, 0).map_err(|e| failed(tid, e))?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::FrozenTree;
    use nix::{
        sys::signal::{Signal, kill},
        sys::wait::waitpid,
        unistd::{ForkResult, fork, pause},
    };
    use std::{fs::OpenOptions, time::Duration};

    /// Dumps that were killed have left no room, and the next one takes theirs and gives it back empty.
    #[test]
    fn the_room_of_killed_dumps_is_used_again() {
        // SAFETY: the child waits until it is killed.
        let child = match unsafe { fork() }.unwrap() {
            ForkResult::Child => loop {
                pause();
            },
            ForkResult::Parent { child } => child,
        };
        let pid = child.as_raw();
        let vdso = procmap::vdso(pid).unwrap().unwrap();
        let memory = OpenOptions::new().read(true).write(true).open(proc::path(pid, "mem")).unwrap();
        let code = || {
            let mut code = vec![0; (vdso.end - vdso.start) as usize];
            memory.read_exact_at(&mut code, vdso.start).unwrap();
            code
        };
        let empty = code();
        let used = empty.iter().rposition(|&b| b != 0).unwrap() + 1;
        let mut at = used.next_multiple_of(arch::TRAMPOLINE_ALIGNMENT);
        let mut left = 0;
        while at + arch::TRAMPOLINE <= empty.len() {
            memory.write_all_at(&arch::trampoline(&Registers::default()), vdso.start + at as u64).unwrap();
            at += arch::TRAMPOLINE;
            left += 1;
        }
        for _ in 0..left {
            let stopped = FrozenTree::stop_leader(pid, Duration::from_secs(5)).unwrap();
            let mut remote = Remote::new(pid);
            assert_eq!(remote.syscall(pid, libc::SYS_getpid, [0; 6]).unwrap() as i32, pid);
            remote.detach().unwrap();
            drop(stopped);
        }
        let cleaned = code() == empty;
        kill(child, Signal::SIGKILL).unwrap();
        waitpid(child, None).unwrap();
        assert!(left > 0 && cleaned, "{left} were left");
    }
}
