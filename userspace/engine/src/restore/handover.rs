//! The last step of a restore, and the only one a task does not do itself: the restorer is unmapped, registers, signal
//! masks and interrupted waits are set by ptrace, and all tasks go on at once.

use super::execute::Execution;
use crate::{
    error::{Context, Error, Result},
    kernel::{
        arch, proc,
        ptrace::{self, Wait},
    },
    tree::{signals, thread},
};
use standstill_images::types::{LiveTask, Restart, Task, TaskState, Thread};
use std::{
    collections::HashMap,
    io,
    time::{Duration, Instant},
};

/// Gives every task its own state and lets it go.
pub(crate) fn hand_over(run: &Execution<'_>) -> Result<()> {
    let image = run.image;
    let (mut tids, mut stopping) = (Vec::new(), HashMap::new());
    let living = || run.plan.tasks.iter().filter(|t| !t.ends);
    let mut results = Vec::new();
    for planned in living() {
        outside(planned.pid, live(&image.tasks[&planned.pid])?)?;
        // Waits are entered by the restorer's code, so while it is still there for all that share their memory.
        let waits = planned.threads.iter().map(|t| if t.waits { enter_wait(t.tid) } else { Ok(None) });
        results.push(waits.collect::<Result<Vec<_>>>()?);
    }
    for (planned, results) in living().zip(results) {
        let task = &image.tasks[&planned.pid];
        let live = live(task)?;
        if !planned.shares_memory {
            unmap_restorer(run, planned.pid, planned.syscall_at)?;
        }
        let exited = image.attributes.get(&task.pid).and_then(|a| a.leader_exited);
        if let Some(status) = exited {
            end_leader(task.pid, planned.syscall_at, status)?;
        }
        let dead = usize::from(exited.is_some());
        let living = &live.threads[dead..];
        if let Some(signal) = stop_signal(task, live).filter(|_| !planned.stops) {
            let first = living[0].tid;
            stopping.insert(first, begin_stop(task.pid, first, living.len(), signal)?);
        }
        for (thread, result) in living.iter().zip(results.into_iter().skip(dead)) {
            set_state(thread, result)?;
        }
        tids.extend(living.iter().rev().map(|t| t.tid));
    }
    // From here on nothing can fail but the detaching itself, and tasks run.
    for tid in tids {
        match ptrace::detach(tid, stopping.get(&tid).copied().unwrap_or(0)) {
            Ok(()) => {}
            // Already handed-over siblings may have ended their process.
            Err(e) if proc::is_gone(&e) => {}
            Err(e) => return Err(e).context(|| format!("detach from thread {tid}")),
        }
    }
    Ok(())
}

/// Lets a leader exit as it had exited, while its other threads stand still. It is let go of: nobody is told of its end
/// before that of the others, and a tracer would have to take note of it instead of the parent.
fn end_leader(pid: i32, syscall_at: u64, status: i32) -> Result<()> {
    let context = || format!("end the first thread of process {pid}");
    let regs = ptrace::registers(pid).context(context)?;
    let code = (status >> 8 & 0xff) as u64;
    ptrace::set_registers(pid, &regs.for_syscall(syscall_at, libc::SYS_exit, [code, 0, 0, 0, 0, 0]))
        .context(context)?;
    ptrace::detach(pid, 0).context(context)?;
    let end = Instant::now() + Duration::from_secs(5);
    while !proc::stat(pid).context(context)?.is_dead_leader() {
        if Instant::now() > end {
            return Err(io::Error::from(io::ErrorKind::TimedOut)).context(context);
        }
        std::thread::sleep(Duration::from_micros(50));
    }
    Ok(())
}

/// What stops a process that was stopped, or about to.
fn stop_signal(task: &Task, live: &LiveTask) -> Option<i32> {
    let caught = |signal: i32| live.sigactions.iter().any(|a| a.signal == signal);
    let blocked = |signal: i32| live.threads.iter().any(|t| t.blocked & 1 << (signal - 1) != 0);
    match task.state {
        TaskState::Stopped(signal) | TaskState::StoppedAndTold(signal) => {
            Some(if caught(signal) || blocked(signal) { libc::SIGSTOP } else { signal })
        }
        _ => signals::is_about_to_stop(live).then_some(libc::SIGSTOP),
    }
}

/// Lets a process begin to stop, before any pending signal is handled: all are still blocked. Returns the signal with
/// which its first living thread, `first` of so many, is to be let go.
///
/// The parent is told of the stop when the last thread takes part in it. That has to wait until the parent was let go
/// itself, because a traced process gets SIGCHLD even where it ignores it.
fn begin_stop(pid: i32, first: i32, threads: usize, signal: i32) -> Result<i32> {
    let context = || format!("stop process {pid}");
    // SAFETY: tgkill takes no memory; the process is ours and stopped.
    unsafe { libc::syscall(libc::SYS_tgkill, pid, first, libc::SIGSTOP) };
    ptrace::cont(first, 0).context(context)?;
    match ptrace::wait(first).context(context)? {
        Wait::Signal(libc::SIGSTOP) => {}
        other => return Err(unexpected(first, other)),
    }
    if threads == 1 {
        return Ok(signal);
    }
    // The others shall not run before the first has stopped. Should the signal be ignored, as SIGTSTP is in an orphaned
    // process group, then the interruption stops the thread.
    ptrace::set_sigmask(first, !(1 << (signal - 1))).context(context)?;
    ptrace::interrupt(first).context(context)?;
    ptrace::cont(first, signal).context(context)?;
    match ptrace::wait(first).context(context)? {
        Wait::EventStop(by) if by == signal => Ok(0),
        Wait::EventStop(libc::SIGTRAP) if signal != libc::SIGSTOP => begin_stop(pid, first, threads, libc::SIGSTOP),
        other => Err(unexpected(first, other)),
    }
}

fn live(task: &Task) -> Result<&LiveTask> {
    task.live.as_ref().ok_or_else(|| Error::Target(format!("process {} has no state in the image", task.pid)))
}

/// What is set through procfs.
fn outside(pid: i32, live: &LiveTask) -> Result<()> {
    let set = |name: &str, value: String| -> Result<()> {
        let path = proc::path(pid, name);
        match std::fs::read_to_string(&path) {
            Ok(now) if now.trim() == value => Ok(()),
            Ok(_) => std::fs::write(&path, &value).context(|| format!("set {} to {value}", path.display())),
            Err(_) => Ok(()), // not built into this kernel
        }
    };
    set("oom_score_adj", live.oom_score_adj.to_string())
}

/// Makes the leader, from an instruction that stays, unmap the restorer: its own code could not.
fn unmap_restorer(run: &Execution<'_>, pid: i32, syscall_at: u64) -> Result<()> {
    let context = || format!("unmap the restorer of process {pid}");
    let regs = ptrace::registers(pid).context(context)?;
    let args = [run.plan.base, run.restorer_size(), 0, 0, 0, 0];
    ptrace::set_registers(pid, &regs.for_syscall(syscall_at, libc::SYS_munmap, args)).context(context)?;
    for _ in ["entry", "exit"] {
        ptrace::cont_to_syscall(pid).context(context)?;
        match ptrace::wait(pid).context(context)? {
            Wait::Syscall => {}
            other => return Err(unexpected(pid, other)),
        }
    }
    let result = ptrace::registers(pid).context(context)?.result();
    if result < 0 {
        return Err(io::Error::from_raw_os_error(-result as i32)).context(context);
    }
    stop_in_signal_handling(pid)
}

/// From a stop at a system call to one where the kernel, when the task goes on, looks at how an interrupted system call
/// is to be restarted.
fn stop_in_signal_handling(tid: i32) -> Result<()> {
    let context = || format!("stop thread {tid}");
    ptrace::interrupt(tid).context(context)?;
    ptrace::cont(tid, 0).context(context)?;
    match ptrace::wait(tid).context(context)? {
        Wait::EventStop(_) => Ok(()),
        other => Err(unexpected(tid, other)),
    }
}

/// Registers, extended state and signal mask. `wait_result`: the wait that was entered again is over.
fn set_state(thread: &Thread, wait_result: Option<i64>) -> Result<()> {
    let tid = thread.tid;
    let context = || format!("set the registers of thread {tid}");
    let (mut regs, xstate) = thread::registers(&thread.context);
    let interrupted = (thread.restart == Restart::Unknown).then_some(-i64::from(libc::EINTR));
    if let Some(result) = wait_result.or(interrupted) {
        regs.return_from_syscall(result);
    }
    ptrace::set_regset(tid, arch::NT_X86_XSTATE, xstate).context(context)?;
    ptrace::set_registers(tid, &regs).context(context)?;
    ptrace::set_sigmask(tid, thread.blocked).context(context)
}

/// Lets the thread enter its interrupted wait again, so that the kernel fills its restart_block, and stops it there.
/// The result of the call if it came to an end.
fn enter_wait(tid: i32) -> Result<Option<i64>> {
    let context = || format!("let thread {tid} wait again");
    ptrace::cont_to_syscall(tid).context(context)?;
    match ptrace::wait(tid).context(context)? {
        Wait::Syscall => {}
        other => return Err(unexpected(tid, other)),
    }
    ptrace::interrupt(tid).context(context)?;
    ptrace::cont(tid, 0).context(context)?;
    match ptrace::wait(tid).context(context)? {
        Wait::EventStop(_) => {
            let regs = ptrace::registers(tid).context(context)?;
            Ok((!regs.uses_restart_block()).then(|| regs.result()))
        }
        other => Err(unexpected(tid, other)),
    }
}

fn unexpected(tid: i32, what: Wait) -> Error {
    Error::System { call: format!("thread {tid}"), source: io::Error::other(format!("stopped unexpectedly: {what:?}")) }
}
