//! Probes for what dump and restore do with processes.

use super::{Failed, Outcome, child::Bench, sys};
use crate::kernel::{
    arch, proc, ptrace,
    sys::{Kcmp, kcmp, pidfd_getfd, pidfd_open},
};
use nix::{
    errno::Errno,
    sys::{
        signal::{Signal, kill},
        timerfd::{ClockId, TimerFd, TimerFlags},
        wait::{WaitPidFlag, waitpid},
    },
    unistd::{Pid, pipe, read},
};
use std::{
    os::fd::{AsFd, AsRawFd},
    path::Path,
};

fn yes() -> Outcome {
    Ok(String::new())
}

pub(super) fn seize(bench: &Bench) -> Outcome {
    bench.seized()?;
    yes()
}

/// Blocks all signals of the child, sends it one, and looks for it.
pub(super) fn signals(bench: &Bench) -> Outcome {
    let pid = bench.stopped()?.pid();
    let bit = 1 << (libc::SIGUSR1 - 1);
    ptrace::set_sigmask(pid, u64::MAX)?;
    Failed::unless(ptrace::sigmask(pid)? & bit != 0, "a signal mask that was set is not there")?;
    kill(Pid::from_raw(pid), Signal::SIGUSR1)?;
    let pending = ptrace::pending(pid, true)?;
    let signal = pending.first().and_then(|info| info.first()).copied();
    Failed::unless(signal == Some(libc::SIGUSR1 as u8), "a pending signal is not shown")?;
    yes()
}

pub(super) fn rseq_configuration(bench: &Bench) -> Outcome {
    let area = ptrace::rseq(bench.stopped()?.pid())?;
    Ok(if area.address == 0 { "the C library registers no area".into() } else { format!("{} bytes", area.size) })
}

pub(super) fn xstate(bench: &Bench) -> Outcome {
    let state = ptrace::regset(bench.stopped()?.pid(), arch::NT_X86_XSTATE)?;
    let machine = arch::xstate_size();
    let why = format!("ptrace gives {} bytes, the processor has {machine}", state.len());
    Failed::unless(state.len() == machine, &why)?;
    Ok(format!("{machine} bytes"))
}

pub(super) fn pidfd(bench: &Bench) -> Outcome {
    pidfd_open(bench.child()?.pid())?;
    yes()
}

pub(super) fn getfd(bench: &Bench) -> Outcome {
    let pidfd = pidfd_open(bench.child()?.pid())?;
    pidfd_getfd(pidfd.as_fd(), bench.descriptor()?)?;
    yes()
}

pub(super) fn same_object(bench: &Bench) -> Outcome {
    let own = std::process::id() as i32;
    let right = kcmp(own, own, Kcmp::Vm)?.is_eq() && kcmp(own, bench.child()?.pid(), Kcmp::Vm)?.is_ne();
    Failed::unless(right, "a child is said to share our memory")?;
    yes()
}

/// Makes a child with the highest process id that is free.
pub(super) fn set_tid(_: &Bench) -> Outcome {
    let end: i32 = proc::number(Path::new("/proc/sys/kernel/pid_max"))?;
    for pid in (2..end).rev().take(1000) {
        match sys::clone_with_pid(pid) {
            Ok(made) => {
                // ECHILD: it was reaped by the kernel, because SIGCHLD is ignored here.
                while waitpid(Pid::from_raw(made), Some(WaitPidFlag::__WALL)) == Err(Errno::EINTR) {}
                Failed::unless(made == pid, "the child has another process id than was asked for")?;
                return yes();
            }
            Err(Errno::EEXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Err(Failed::CannotTell("no process id is free".into()))
}

pub(super) fn children(bench: &Bench) -> Outcome {
    let own = std::process::id() as i32;
    let listed = proc::children(own, &proc::threads(own)?)?;
    Failed::unless(
        listed.contains(&bench.child()?.pid()),
        "this kernel does not list children (CONFIG_PROC_CHILDREN)",
    )?;
    yes()
}

pub(super) fn timers(bench: &Bench) -> Outcome {
    proc::timers(bench.child()?.pid())?;
    yes()
}

pub(super) fn timer_ids(_: &Bench) -> Outcome {
    sys::timer_restore_ids()?;
    yes()
}

pub(super) fn timerfd_ticks(_: &Bench) -> Outcome {
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)?;
    sys::timerfd_set_ticks(&timer.as_fd().as_raw_fd(), 7)?;
    let mut ticks = [0u8; 8];
    read(&timer, &mut ticks)?;
    Failed::unless(u64::from_ne_bytes(ticks) == 7, "ticks that were set are not there")?;
    yes()
}

pub(super) fn time_namespaces(_: &Bench) -> Outcome {
    std::fs::metadata("/proc/self/timens_offsets")?;
    yes()
}

pub(super) fn close_range(_: &Bench) -> Outcome {
    sys::close_range(pipe()?.0)?;
    yes()
}

pub(super) fn rseq(_: &Bench) -> Outcome {
    match sys::rseq() {
        Errno::EINVAL => yes(),
        errno => Err(errno.into()),
    }
}
