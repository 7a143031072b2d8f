//! Processes that do not run: zombies and a stopped one.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill, raise};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;
use standstill_tests::workload::{Checker, Control, Family, Request, fork_child};

use super::{check_state, serve};

/// Children that have ended and that nobody has waited for.
pub(crate) struct Zombies([WaitStatus; 2]);

impl Zombies {
    pub(crate) fn new() -> Self {
        let exited = fork_child(|| std::process::exit(42));
        let killed = fork_child(|| {
            _ = raise(Signal::SIGKILL);
        });
        let zombies = Self([WaitStatus::Exited(exited, 42), WaitStatus::Signaled(killed, Signal::SIGKILL, false)]);
        for status in zombies.0 {
            let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
            waitid(Id::Pid(status.pid().expect("a pid")), flags).expect("wait for a zombie");
        }
        zombies
    }

    pub(crate) fn check(&self, checker: &Checker) {
        for status in self.0 {
            let pid = status.pid().expect("a pid");
            let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT | WaitPidFlag::WNOHANG;
            checker.equal("status of a zombie", &waitid(Id::Pid(pid), flags), &Ok(status));
            check_state(checker, pid, "Z");
        }
    }
}

/// A child that has been stopped.
pub(crate) struct Stopped {
    pid: Pid,
    dir: PathBuf,
    family: std::cell::RefCell<Family>,
}

impl Stopped {
    pub(crate) fn new(control: &Control, dir: &Path) -> Self {
        let child = control.for_child("stopped");
        let pid = fork_child(move || {
            raise(Signal::SIGSTOP).expect("stop");
            serve(child);
        });
        waitpid(pid, Some(WaitPidFlag::WUNTRACED)).expect("wait for the stop");
        let mut family = Family::default();
        family.adopt(pid, "stopped".to_owned());
        Self { pid, dir: dir.to_owned(), family: family.into() }
    }

    /// Compares the state; for a verdict lets the child go on, asks it, and stops it again.
    pub(crate) fn check(&self, checker: &Checker, request: Request) {
        check_state(checker, self.pid, "T");
        match request {
            Request::Idle => {}
            Request::Verdict => {
                checker.works("continue the stopped child", kill(self.pid, Signal::SIGCONT));
                self.family.borrow_mut().collect(&self.dir, checker);
                checker.works("stop the child", kill(self.pid, Signal::SIGSTOP));
                let limit = 500;
                for _ in 0..limit {
                    let status = waitpid(self.pid, Some(WaitPidFlag::WUNTRACED | WaitPidFlag::WNOHANG));
                    if status == Ok(WaitStatus::Stopped(self.pid, Signal::SIGSTOP)) {
                        return;
                    }
                    thread::sleep(Duration::from_millis(10));
                }
                checker.that(false, || "the child does not stop again".to_owned());
            }
            Request::End => {
                checker.works("continue the stopped child", kill(self.pid, Signal::SIGCONT));
                self.family.borrow_mut().end(&self.dir, checker);
            }
        }
    }
}
