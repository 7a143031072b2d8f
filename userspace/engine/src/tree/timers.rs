//! Interval timers (setitimer(2)) and POSIX timers (timer_create(2)).

use super::clocks::{Continued, Moment};
use crate::{
    error::{Context, Result},
    kernel::proc,
    restore::program::{Arg, Program},
    task::Remote,
};
use standstill_images::types::{ITimer, PosixTimer};

const NS: u64 = 1_000_000_000;

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.chunks_exact(8).map(|b| u64::from_ne_bytes(b.try_into().expect("eight bytes")))
}

/// The three interval timers: only the process itself can read them.
pub(crate) fn itimers(pid: i32, remote: &mut Remote, moment: Moment) -> Result<[ITimer; 3]> {
    let scratch = remote.scratch()?;
    for which in 0..3 {
        let out = scratch + 32 * which;
        remote.syscall(pid, libc::SYS_getitimer, [which, out, 0, 0, 0, 0])?;
    }
    let mut bytes = [0u8; 96];
    remote.read(&mut bytes)?;
    let w: Vec<u64> = words(&bytes).collect();
    let mut timers = [0, 4, 8]
        .map(|n| ITimer { interval_us: w[n] * 1_000_000 + w[n + 1], value_us: w[n + 2] * 1_000_000 + w[n + 3] });
    // The others count what the process itself uses.
    let real = &mut timers[libc::ITIMER_REAL as usize].value_us;
    *real = moment.left(*real * 1000).div_ceil(1000);
    Ok(timers)
}

/// Microseconds until a timer is due; `None`: it is not in use. A periodic ITIMER_REAL that has fired has no time left:
/// the kernel starts it again when its signal is taken, which is one of the pending signals then. One that is started
/// without time left would be stopped for good, so it begins a new period.
fn left(timer: &ITimer) -> Option<u64> {
    [timer.value_us, timer.interval_us].into_iter().find(|&us| us != 0)
}

/// POSIX timers: procfs has the definitions, the process itself the time left.
pub(crate) fn posix_timers(pid: i32, remote: &mut Remote, moment: Moment) -> Result<Vec<PosixTimer>> {
    let lines = proc::timers(pid).context(|| format!("read the timers of {pid}"))?;
    let mut all = Vec::with_capacity(lines.len());
    for line in lines {
        let out = remote.scratch()?;
        remote.syscall(pid, libc::SYS_timer_gettime, [line.id as u64, out, 0, 0, 0, 0])?;
        let mut bytes = [0u8; 32];
        remote.read(&mut bytes)?;
        let w: Vec<u64> = words(&bytes).collect();
        all.push(PosixTimer {
            id: line.id,
            clock: line.clock,
            notify: line.notify,
            signal: line.signal,
            value: line.value,
            tid: line.tid,
            interval_ns: w[0] * NS + w[1],
            // Clocks of processes and threads have negative numbers; like the clocks 2 and 3 they stand still under a freeze.
            value_ns: match line.clock {
                ..0 | libc::CLOCK_PROCESS_CPUTIME_ID | libc::CLOCK_THREAD_CPUTIME_ID => w[2] * NS + w[3],
                _ => moment.left(w[2] * NS + w[3]),
            },
        });
    }
    Ok(all)
}

/// Starts the interval timers again with the time that was left.
pub(crate) fn restore_itimers(timers: &[ITimer; 3], program: &mut Program) {
    for (which, timer) in timers.iter().enumerate() {
        let Some(left) = left(timer) else { continue };
        let us = 1_000_000;
        let block = program.words(&[timer.interval_us / us, timer.interval_us % us, left / us, left % us]);
        program.call("start an interval timer", libc::SYS_setitimer, &[which.into(), block, 0.into()]);
    }
}

/// Creates the POSIX timers under their old ids and starts them with the time that was left, or, where the tree's clocks go
/// on, when they are due.
///
/// `PR_TIMER_CREATE_RESTORE_IDS` (Linux 6.16) lets timer_create(2) take the id from its third argument.
pub(crate) fn restore_posix_timers(timers: &[PosixTimer], clocks: Option<&Continued>, program: &mut Program) {
    const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
    if timers.is_empty() {
        return;
    }
    let label = "let timers have their old ids (PR_TIMER_CREATE_RESTORE_IDS, Linux 6.16)";
    program.call(label, libc::SYS_prctl, &[PR_TIMER_CREATE_RESTORE_IDS.into(), 1.into()]);
    for timer in timers {
        let mut event = [0u64; 8];
        event[0] = timer.value;
        event[1] = u64::from(timer.signal as u32) | (timer.notify as u64) << 32;
        event[2] = timer.tid as u64;
        let event = program.words(&event);
        let id = program.data(&timer.id.to_ne_bytes());
        let label = format!("create timer {}", timer.id);
        program.call(label, libc::SYS_timer_create, &[timer.clock.into(), event, id]);
    }
    program.call("timer ids", libc::SYS_prctl, &[PR_TIMER_CREATE_RESTORE_IDS.into(), 0.into()]);
    for timer in timers.iter().filter(|t| t.value_ns != 0) {
        let due = clocks.and_then(|clocks| clocks.due(timer.clock, timer.value_ns));
        let flags = if due.is_some() { libc::TIMER_ABSTIME } else { 0 };
        let spec = program.words(&timespecs(timer.interval_ns, due.unwrap_or(timer.value_ns)));
        let args: [Arg; 4] = [timer.id.into(), flags.into(), spec, 0.into()];
        program.call(format!("start timer {}", timer.id), libc::SYS_timer_settime, &args);
    }
}

/// `struct itimerspec`.
pub(crate) fn timespecs(interval_ns: u64, value_ns: u64) -> [u64; 4] {
    [interval_ns / NS, interval_ns % NS, value_ns / NS, value_ns % NS]
}
