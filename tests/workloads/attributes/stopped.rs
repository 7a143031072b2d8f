//! Parents of stopped children: what they have been told of, and what not yet.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, kill, raise, sigaction};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use standstill_tests::workload::{Checker, Control, Request, fork_child};

use super::EVERY;

/// How many SIGCHLD have come.
static HEARD: AtomicU64 = AtomicU64::new(0);

extern "C" fn hear(_: i32) {
    HEARD.fetch_add(1, Ordering::SeqCst);
}

/// A parent that has waited for the stop of two children, and itself, the parent of a child whose stop nobody has waited
/// for.
pub(crate) struct Parents {
    untold: Pid,
}

impl Parents {
    pub(crate) fn new(control: &mut Control) -> Self {
        let child = control.for_child("told parent");
        let pid = fork_child(move || told_parent(child));
        control.adopt(pid, "told parent");
        let untold = stopped_child(1);
        await_stop(untold, WaitPidFlag::WNOWAIT);
        Self { untold }
    }

    pub(crate) fn check(&self, checker: &Checker, request: Request) {
        let flags = WaitPidFlag::WSTOPPED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        let stop = Ok(WaitStatus::Stopped(self.untold, Signal::SIGSTOP));
        let found = || waitid(Id::Pid(self.untold), flags);
        eventually(|| found() == stop);
        checker.equal("a stop that nobody has waited for", &found(), &stop);
        if request == Request::End {
            end(self.untold, checker);
        }
    }
}

fn told_parent(control: Control) {
    let action = SigAction::new(SigHandler::Handler(hear), SaFlags::SA_RESTART, SigSet::empty());
    // SAFETY: the handler only adds to an atomic.
    unsafe { sigaction(Signal::SIGCHLD, &action) }.expect("sigaction");
    let children = [stopped_child(1), stopped_child(3)];
    children.into_iter().for_each(|pid| await_stop(pid, WaitPidFlag::empty()));
    // The signals of both stops.
    std::thread::sleep(Duration::from_millis(20));
    let heard = HEARD.load(Ordering::SeqCst);
    let checker = Arc::clone(&control.checker);
    control.serve(None, EVERY, |request| {
        for pid in children {
            let flags = WaitPidFlag::WSTOPPED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
            checker.equal("a stop that was told of", &waitid(Id::Pid(pid), flags), &Ok(WaitStatus::StillAlive));
            let stopped = || std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|s| s.contains(") T "));
            checker.that(eventually(stopped), || "the stopped child is not".to_owned());
        }
        checker.equal("signals of children", &HEARD.load(Ordering::SeqCst), &heard);
        if request == Request::End {
            children.into_iter().for_each(|pid| end(pid, &checker));
        }
    });
}

/// Whether something is so soon: not all processes are let go of at the same instant.
fn eventually(is_so: impl Fn() -> bool) -> bool {
    (0..200).any(|_| {
        let so = is_so();
        if !so {
            std::thread::sleep(Duration::from_millis(5));
        }
        so
    })
}

/// A child with so many threads that has stopped itself.
fn stopped_child(threads: usize) -> Pid {
    fork_child(move || {
        for _ in 1..threads {
            std::thread::spawn(|| {
                loop {
                    std::thread::park();
                }
            });
        }
        raise(Signal::SIGSTOP).expect("stop");
        std::process::exit(3);
    })
}

fn await_stop(pid: Pid, flags: WaitPidFlag) {
    let stopped = waitid(Id::Pid(pid), WaitPidFlag::WSTOPPED | flags);
    assert_eq!(stopped, Ok(WaitStatus::Stopped(pid, Signal::SIGSTOP)), "wait for the stop");
}

/// Once it goes on it ends.
fn end(pid: Pid, checker: &Checker) {
    checker.works("continue the stopped child", kill(pid, Signal::SIGCONT));
    let status = nix::sys::wait::waitpid(pid, None);
    checker.equal("status of a child that was stopped", &status, &Ok(WaitStatus::Exited(pid, 3)));
}
