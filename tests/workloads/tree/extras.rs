//! Members with state beyond identity: pending signals, timers, limits, credentials.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use std::{fs, ptr};

use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SaFlags, SigAction, SigEvent, SigHandler, SigSet, SigevNotify, Signal, sigaction};
use nix::sys::time::TimeSpec;
use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
use nix::time::ClockId;
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use standstill_tests::workload::{Checker, Control, SelfState, fork_child};

use super::{EVERY, fork_member};

static TICKS: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];

extern "C" fn count_interval_timer(_: i32) {
    TICKS[0].fetch_add(1, Ordering::SeqCst);
}

extern "C" fn count_posix_timer(_: i32) {
    TICKS[1].fetch_add(1, Ordering::SeqCst);
}

pub(crate) fn fork_all(control: &mut Control) {
    fork_pending(control);
    fork_timers(control);
    fork_due_timer(control);
    fork_member(control, "limits", |_| {
        setrlimit(Resource::RLIMIT_NOFILE, 100, 200).expect("setrlimit");
        setrlimit(Resource::RLIMIT_STACK, 1 << 20, 4 << 20).expect("setrlimit");
        // SAFETY: setpriority takes no pointers.
        assert_eq!(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 7) }, 0, "setpriority");
    });
    fork_member(control, "no new privileges", |_| nix::sys::prctl::set_no_new_privs().expect("no_new_privs"));
}

/// A member that is another user and has lost its privileges.
pub(crate) fn fork_nobody(control: &mut Control, dir: &Path) {
    // It must be able to write its verdict.
    fs::set_permissions(dir, fs::Permissions::from_mode(0o777)).expect("open the directory");
    fork_member(control, "nobody", |_| {
        let (user, group) = (Uid::from_raw(65534), Gid::from_raw(65533));
        setgroups(&[Gid::from_raw(7), Gid::from_raw(1234)]).expect("setgroups");
        setresgid(group, group, Gid::from_raw(65532)).expect("setresgid");
        setresuid(user, user, user).expect("setresuid");
    });
}

/// A member to which signals have been sent that it has blocked.
fn fork_pending(control: &mut Control) {
    let child = control.for_child("pending");
    let pid = fork_child(move || {
        let queued = libc::SIGRTMIN() + 3;
        let mut set = SigSet::empty();
        set.add(Signal::SIGHUP);
        set.thread_block().expect("block");
        block_realtime(queued);
        let send = || {
            (1..=3).for_each(|value| queue(queued, value));
            nix::sys::signal::kill(nix::unistd::getpid(), Signal::SIGHUP).expect("kill");
        };
        send();
        let before = SelfState::of_process();
        let checker = Arc::clone(&child.checker);
        child.serve(None, EVERY, |request| {
            SelfState::of_process().check(&checker, "pending", &before);
            if request.thorough() {
                for value in 1..=3 {
                    checker.equal("value of a queued signal", &take(queued), &Some(value));
                }
                checker.equal("no further queued signal", &take(queued), &None);
                checker.equal("sender of a signal", &take(libc::SIGHUP), &Some(0));
                send();
            }
        });
    });
    control.adopt(pid, "pending");
}

fn block_realtime(signal: i32) {
    // SAFETY: the set is initialised by sigemptyset before use; the mask belongs to this thread.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, signal);
        assert_eq!(libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()), 0, "sigmask");
    }
}

fn queue(signal: i32, value: usize) {
    let value = libc::sigval { sival_ptr: value as *mut _ };
    // SAFETY: the value is a number in the shape of a pointer that nobody dereferences.
    assert_eq!(unsafe { libc::sigqueue(libc::getpid(), signal, value) }, 0, "sigqueue");
}

/// Takes a pending signal and says which value came with it; zero for a signal sent by kill of this process itself.
fn take(signal: i32) -> Option<usize> {
    let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: all pointers are to live values, the set is initialised by sigemptyset; si_value is valid for queued
    // signals and si_pid for signals sent by kill.
    unsafe {
        let mut set = std::mem::zeroed();
        let mut info: libc::siginfo_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, signal);
        if libc::sigtimedwait(&raw const set, &raw mut info, &raw const now) != signal {
            return None;
        }
        match info.si_code {
            libc::SI_QUEUE => Some(info.si_value().sival_ptr as usize),
            libc::SI_USER if info.si_pid() == libc::getpid() => Some(0),
            _ => Some(usize::MAX),
        }
    }
}

/// A member with an interval timer and a POSIX timer, both periodic.
fn fork_timers(control: &mut Control) {
    let child = control.for_child("timers");
    let pid = fork_child(move || {
        let install = |signal, handler| {
            let action = SigAction::new(SigHandler::Handler(handler), SaFlags::SA_RESTART, SigSet::empty());
            // SAFETY: the handlers only add to an atomic.
            unsafe { sigaction(signal, &action) }.expect("sigaction");
        };
        install(Signal::SIGALRM, count_interval_timer);
        install(Signal::SIGVTALRM, count_posix_timer);
        start_interval_timer(70_000);
        let event = SigEvent::new(SigevNotify::SigevSignal { signal: Signal::SIGVTALRM, si_value: 9 });
        let mut timer = Timer::new(ClockId::CLOCK_MONOTONIC, event).expect("timer_create");
        let period = Expiration::Interval(TimeSpec::from_duration(Duration::from_millis(60)));
        timer.set(period, TimerSetTimeFlags::empty()).expect("timer_settime");
        let before = SelfState::of_process();
        let checker = Arc::clone(&child.checker);
        child.serve(None, EVERY, |request| {
            SelfState::of_process().check(&checker, "timers", &before);
            if request.thorough() {
                check_ticks(&checker);
            }
        });
    });
    control.adopt(pid, "timers");
}

/// A member whose periodic timer has fired and waits, unarmed, for its signal to be taken.
fn fork_due_timer(control: &mut Control) {
    let child = control.for_child("due timer");
    let pid = fork_child(move || {
        let action = SigAction::new(SigHandler::Handler(count_interval_timer), SaFlags::SA_RESTART, SigSet::empty());
        // SAFETY: the handler only adds to an atomic.
        unsafe { sigaction(Signal::SIGALRM, &action) }.expect("sigaction");
        let mut alarm = SigSet::empty();
        alarm.add(Signal::SIGALRM);
        let fire = || {
            alarm.thread_block().expect("block");
            std::thread::sleep(Duration::from_millis(100));
        };
        start_interval_timer(70_000);
        fire();
        let before = SelfState::of_process();
        let checker = Arc::clone(&child.checker);
        child.serve(None, EVERY, |request| {
            SelfState::of_process().check(&checker, "due timer", &before);
            if request.thorough() {
                let ticks = TICKS[0].load(Ordering::SeqCst);
                alarm.thread_unblock().expect("unblock");
                std::thread::sleep(Duration::from_millis(250));
                let ticks = TICKS[0].load(Ordering::SeqCst) - ticks;
                checker.that((2..=5).contains(&ticks), || format!("the due timer ticked {ticks} times"));
                fire();
            }
        });
    });
    control.adopt(pid, "due timer");
}

/// Starts ITIMER_REAL with a period in microseconds.
fn start_interval_timer(period_us: i64) {
    let period = libc::timeval { tv_sec: 0, tv_usec: period_us };
    let value = libc::itimerval { it_interval: period, it_value: period };
    // SAFETY: the value is live, and a null old value is allowed.
    assert_eq!(unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const value, ptr::null_mut()) }, 0, "setitimer");
}

fn check_ticks(checker: &Checker) {
    let now = || [TICKS[0].load(Ordering::SeqCst), TICKS[1].load(Ordering::SeqCst)];
    let before = now();
    std::thread::sleep(Duration::from_millis(250));
    for (number, (before, after)) in before.into_iter().zip(now()).enumerate() {
        checker.that((1..=8).contains(&(after - before)), || format!("timer {number} ticked {} times", after - before));
    }
}
