//! A child process for the probes to work on.

use super::{Failed, sys};
use crate::kernel::{
    proc,
    ptrace::{self, Wait},
};
use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::{Pid, pipe},
};
use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

/// An idle copy of this process; killed and reaped on drop.
pub(super) struct Child(i32);

impl Child {
    fn start() -> nix::Result<Self> {
        sys::fork_idle().map(Self)
    }

    /// Process id.
    pub(super) fn pid(&self) -> i32 {
        self.0
    }

    /// Seizes it and waits until it has stopped.
    fn stop(&self) -> io::Result<()> {
        ptrace::seize(self.0, libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_EXITKILL)?;
        ptrace::interrupt(self.0)?;
        match ptrace::wait(self.0)? {
            Wait::EventStop(_) => Ok(()),
            _ => Err(Errno::ESRCH.into()),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // It is ours and not reaped, so nobody else can have its number.
        let _ = kill(Pid::from_raw(self.0), Signal::SIGKILL);
        while !matches!(ptrace::wait(self.0), Ok(Wait::Gone(_)) | Err(_)) {}
    }
}

/// What the probes work on.
pub(super) struct Bench {
    child: Result<Child, Failed>,
    stopped: Result<(), Failed>,
    pipe: Result<(OwnedFd, OwnedFd), Failed>,
    /// `/proc/self/status`.
    pub(super) status: Result<proc::Status, Failed>,
}

impl Bench {
    pub(super) fn new() -> Self {
        // The child has these descriptors too.
        let pipe = pipe().map_err(Failed::from);
        let child = Child::start().map_err(Failed::from);
        let stopped = child.as_ref().map_err(Clone::clone).and_then(|c| Ok(c.stop()?));
        let own = std::process::id() as i32;
        Self { child, stopped, pipe, status: proc::status(own, own).map_err(Failed::from) }
    }

    /// The child.
    pub(super) fn child(&self) -> Result<&Child, Failed> {
        self.child.as_ref().map_err(|e| unavailable("there is no child process to try it on", e))
    }

    /// The child, stopped by ptrace.
    pub(super) fn stopped(&self) -> Result<&Child, Failed> {
        self.stopped.as_ref().map_err(|e| unavailable("no process can be stopped to try it on", e))?;
        self.child()
    }

    /// Whether the child could be seized and stopped.
    pub(super) fn seized(&self) -> Result<(), Failed> {
        self.stopped.clone()
    }

    /// A descriptor that the child has under the same number.
    pub(super) fn descriptor(&self) -> Result<i32, Failed> {
        self.pipe.as_ref().map(|p| p.0.as_raw_fd()).map_err(Clone::clone)
    }
}

/// A probe that did not get as far as its question.
fn unavailable(what: &str, why: &Failed) -> Failed {
    let (Failed::No(why) | Failed::CannotTell(why)) = why;
    Failed::CannotTell(format!("{what}: {why}"))
}
