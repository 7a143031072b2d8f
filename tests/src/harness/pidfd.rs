//! A process that cannot be mistaken for a later one with the same pid.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

/// Refers to one process, whether it is our child or not.
pub struct Pidfd(OwnedFd);

impl Pidfd {
    /// Opens a process that exists.
    pub fn open(pid: Pid) -> io::Result<Self> {
        // SAFETY: the call takes numbers only.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and belongs to nobody else.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).map_err(io::Error::other)?) }))
    }

    /// Sends SIGKILL; a process that is gone already is fine.
    pub fn kill(&self) {
        // SAFETY: the descriptor is live, and a null siginfo is allowed.
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.0.as_raw_fd(), libc::SIGKILL, 0_usize, 0) };
    }

    /// Waits until the process has ended; false when it has not within the limit.
    pub fn await_end(&self, limit: Duration) -> bool {
        let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        matches!(poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)], timeout), Ok(1))
    }

    /// Takes the exit status of a child that has ended; none for somebody else's child.
    pub fn reap(&self) -> Option<WaitStatus> {
        waitid(Id::PIDFd(self.0.as_fd()), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG).ok()
    }
}
