//! A copy of a frozen process's memory that stays as it is when the process goes on: fork(2) without a child that anybody
//! notices.
//!
//! The process clones itself, which copies its page tables. That first child clones a second one that shares the copy and
//! ends, and the process takes its status, all while it is frozen. So the copy belongs to an orphan: it is no child of the
//! target's, and its end is reported to init, or to whoever collects orphans (PR_SET_CHILD_SUBREAPER).
//!
//! Neither child ever runs code of the target: both are traced from their birth and stand before an exit_group(2), so they
//! end when we do. Should we die while the process has a child, its trampoline waits for it before it goes on.

use super::remote::Remote;
use crate::{
    error::{Context, Error, Result},
    kernel::{
        proc,
        ptrace::{self, Wait},
    },
};
use std::io;

/// A process that holds the memory of another as it was, and does nothing else. It is killed on drop.
#[derive(Debug)]
pub(crate) struct Fork {
    pid: i32,
    /// Where it finds the code for a system call.
    call: u64,
}

impl Fork {
    /// Of a process that is frozen with all its threads.
    ///
    /// # Errors
    /// What keeps the process from it: limits of processes or memory, a 32-bit program. It is as it was then.
    pub(crate) fn of(pid: i32) -> Result<Self> {
        let mut remote = Remote::new(pid);
        let first = remote.fork()?;
        let first = Self::begin(first, remote.last_call());
        let child = first.pid;
        let fork = first.stopped().and_then(|()| first.share());
        drop(first);
        remote.reap(child)?;
        remote.detach()?;
        fork
    }

    fn begin(pid: i32, call: u64) -> Self {
        Self { pid, call }
    }

    /// Waits for the stop at its birth.
    fn stopped(&self) -> Result<()> {
        loop {
            match ptrace::wait(self.pid).context(|| self.doing("wait for"))? {
                Wait::EventStop(_) => break,
                Wait::Gone(_) => return Err(Error::Died(self.pid)),
                _ => ptrace::cont(self.pid, 0).context(|| self.doing("continue"))?,
            }
        }
        // It would end by itself when we do; this also ends it within a system call that takes long.
        let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_EXITKILL;
        ptrace::set_options(self.pid, options).context(|| self.doing("trace"))
    }

    /// A second process with the same memory and descriptors.
    fn share(&self) -> Result<Self> {
        let flags = (libc::CLONE_VM | libc::CLONE_FILES | libc::CLONE_PTRACE) as u64;
        let pid = self.syscall(libc::SYS_clone, [flags, 0, 0, 0, 0, 0]).context(|| self.doing("clone"))?;
        let fork = Self::begin(pid as i32, self.call);
        fork.stopped()?;
        Ok(fork)
    }

    /// Its id: what `/proc` shows of its memory is what the process had.
    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// Unmaps a part of its memory.
    pub(crate) fn unmap(&self, start: u64, length: u64) -> Result<()> {
        let done = self.syscall(libc::SYS_munmap, [start, length, 0, 0, 0, 0]);
        done.context(|| self.doing("unmap a part of")).map(drop)
    }

    /// Gives up the descriptors, which it shares with the process until then, so that what that closes is closed. If
    /// memory runs out it is the first to go.
    pub(crate) fn let_go(&self) -> Result<()> {
        const CLOSE_RANGE_UNSHARE: u64 = 1 << 1;
        let adjust = proc::path(self.pid, "oom_score_adj");
        std::fs::write(adjust, "1000").context(|| self.doing("adjust the OOM score of"))?;
        self.syscall(libc::SYS_close_range, [0, u32::MAX.into(), CLOSE_RANGE_UNSHARE, 0, 0, 0])
            .context(|| self.doing("close the descriptors of"))
            .map(drop)
    }

    /// Makes one system call in it.
    fn syscall(&self, nr: libc::c_long, args: [u64; 6]) -> io::Result<i64> {
        let gone = || io::Error::from_raw_os_error(libc::ESRCH);
        let regs = ptrace::registers(self.pid)?;
        ptrace::set_registers(self.pid, &regs.for_syscall(self.call, nr, args))?;
        for _ in ["entry", "exit"] {
            loop {
                ptrace::cont_to_syscall(self.pid)?;
                match ptrace::wait(self.pid)? {
                    Wait::Syscall => break,
                    Wait::Gone(_) => return Err(gone()),
                    // A signal to the whole process group is not for it.
                    _ => {}
                }
            }
        }
        match ptrace::registers(self.pid)?.result() {
            error @ -4095..0 => Err(io::Error::from_raw_os_error(-error as i32)),
            value => Ok(value),
        }
    }

    fn doing(&self, what: &str) -> String {
        format!("{what} the fork {}", self.pid)
    }
}

impl Drop for Fork {
    fn drop(&mut self) {
        // SAFETY: kill takes no memory. The pid cannot have been reused: we trace the process and have not seen its end.
        unsafe { libc::kill(self.pid, libc::SIGKILL) };
        while !matches!(ptrace::wait(self.pid), Ok(Wait::Gone(_)) | Err(_)) {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::{Family, FrozenTree};
    use std::{
        fs::{self, File},
        os::unix::fs::FileExt,
        process::Command,
        time::Duration,
    };

    /// The bytes of a process's stack.
    fn stack(pid: i32) -> Vec<u8> {
        let maps = proc::maps(pid).unwrap();
        let stack = maps.iter().find(|m| m.name == "[stack]").unwrap();
        let mut bytes = vec![0; (stack.end - stack.start) as usize];
        File::open(proc::path(pid, "mem")).unwrap().read_exact_at(&mut bytes, stack.start).unwrap();
        bytes
    }

    #[test]
    fn a_fork_has_the_memory_and_nothing_else() {
        let mut target = Command::new("sleep").arg("100").spawn().unwrap();
        let pid = target.id() as i32;
        let tree = FrozenTree::freeze(pid, Duration::from_secs(10), &mut Family::procfs()).unwrap();
        let forks = [Fork::of(pid).unwrap(), Fork::of(pid).unwrap()];
        assert!(proc::children(pid, &[pid]).unwrap().is_empty());
        for fork in &forks {
            assert_ne!(proc::stat(fork.pid()).unwrap().ppid, pid);
            assert_eq!(stack(fork.pid()), stack(pid));
        }
        drop(tree);
        for fork in &forks {
            fork.let_go().unwrap();
            assert_eq!(fs::read_dir(proc::path(fork.pid(), "fd")).unwrap().count(), 0);
            assert_eq!(fs::read_to_string(proc::path(fork.pid(), "oom_score_adj")).unwrap(), "1000\n");
        }
        let pids = forks.each_ref().map(Fork::pid);
        drop(forks);
        // Whoever collects orphans may not have come to it yet.
        assert!(pids.iter().all(|pid| proc::stat(*pid).map_or(true, |s| s.is_ending())));
        assert_eq!(target.try_wait().unwrap(), None);
        target.kill().unwrap();
        target.wait().unwrap();
    }
}
