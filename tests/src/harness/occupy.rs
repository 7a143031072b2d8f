//! A process with a pid of our choice, to be in somebody's way.

use std::io;
use std::time::Duration;

use nix::unistd::Pid;

use super::{Pidfd, proc};

/// A process that does nothing but have a certain pid; gone when dropped.
pub struct Occupier(Pid);

impl Occupier {
    /// Takes a pid that is free.
    pub fn take(pid: Pid) -> io::Result<Self> {
        let wanted = pid.as_raw();
        // struct clone_args, see clone3(2): only exit_signal, set_tid and set_tid_size are not zero.
        let mut arguments = [0_u64; 11];
        arguments[4] = libc::SIGCHLD as u64;
        arguments[8] = &raw const wanted as u64;
        arguments[9] = 1;
        // SAFETY: the arguments have their full size and point to a live pid. Without a stack this is a fork: the child
        // has a copy of everything and calls nothing but pause, as the child of a threaded process must.
        let result = unsafe { libc::syscall(libc::SYS_clone3, arguments.as_ptr(), size_of_val(&arguments)) };
        match result {
            0 => loop {
                // SAFETY: pause takes nothing and is async-signal-safe.
                unsafe { libc::pause() };
            },
            child if child > 0 => Ok(Self(pid)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// True while the process is there.
    pub fn is_alive(&self) -> bool {
        proc::state(self.0).is_some_and(|state| state != 'Z')
    }
}

impl Drop for Occupier {
    fn drop(&mut self) {
        if let Ok(pidfd) = Pidfd::open(self.0) {
            pidfd.kill();
            pidfd.await_end(Duration::from_secs(5));
            pidfd.reap();
        }
    }
}
