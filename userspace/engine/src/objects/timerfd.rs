//! timerfd_create(2).

use super::{Collected, refuse};
use crate::{
    error::{Context, Result},
    kernel::{proc, sys},
    observe::FdEntry,
    restore::{files::Numbers, program::Program},
    tree::{clocks::Continued, timers::timespecs},
};
use standstill_images::types::FileKind;
use std::os::fd::AsFd;

/// `TFD_IOC_SET_TICKS`, Linux 3.18 (CONFIG_CHECKPOINT_RESTORE).
const TFD_IOC_SET_TICKS: u64 = 0x4008_5400;

/// fdinfo has all of it (proc_pid_fdinfo(5)), but for when a periodic timer is due that has expired and was not read: the
/// kernel lets it stand until then. timerfd_gettime(2) starts it again, with all expirations counted, as a read does.
pub(super) fn dump(entry: &FdEntry, all: &mut Collected) -> Result<FileKind> {
    let shown = || {
        let text = proc::fdinfo(entry.tgid, entry.fd).map_err(|_| refuse(entry, "its fdinfo cannot be read"))?;
        parse(&text).ok_or_else(|| refuse(entry, "this kernel does not show its state"))
    };
    let mut kind = shown()?;
    if let FileKind::TimerFd { value_ns: 0, interval_ns: 1.., ticks: 1.., .. } = kind {
        let timer = all.duplicate(entry)?;
        sys::timerfd_gettime(timer.as_fd()).context(|| format!("timerfd_gettime of descriptor {}", entry.fd))?;
        kind = shown()?;
    }
    if let FileKind::TimerFd { value_ns, .. } = &mut kind {
        *value_ns = all.moment.left(*value_ns);
    }
    Ok(kind)
}

fn parse(text: &str) -> Option<FileKind> {
    let pair = |name: &str| -> Option<u64> {
        let (seconds, ns) = proc::field(text, name)?.trim_matches(['(', ')']).split_once(',')?;
        Some(seconds.trim().parse::<u64>().ok()? * 1_000_000_000 + ns.trim().parse::<u64>().ok()?)
    };
    Some(FileKind::TimerFd {
        clock: proc::field(text, "clockid")?.parse().ok()?,
        ticks: proc::field(text, "ticks")?.parse().ok()?,
        settime_flags: u32::from_str_radix(proc::field(text, "settime flags")?, 8).ok()?,
        value_ns: pair("it_value")?,
        interval_ns: pair("it_interval")?,
    })
}

pub(super) fn create(
    kind: &FileKind,
    flags: u32,
    clocks: Option<&Continued>,
    numbers: &mut Numbers,
    program: &mut Program,
) -> i32 {
    let FileKind::TimerFd { clock, ticks, settime_flags, value_ns, interval_ns } = *kind else {
        unreachable!("called for timerfds");
    };
    let fd = numbers.lowest();
    let nonblock = flags as i32 & libc::O_NONBLOCK;
    program.call_expecting("timerfd", libc::SYS_timerfd_create, &[clock.into(), nonblock.into()], fd);
    // A periodic timer with a short period can have expired again before it was looked at, and shows no time left; the same
    // without ticks is a timer that is not armed.
    let value_ns = if value_ns == 0 && interval_ns != 0 && ticks != 0 { 1 } else { value_ns };
    if value_ns != 0 {
        // The kernel shows the time that is left, also of timers set to an absolute time.
        let mut flags = settime_flags as i32 & !libc::TFD_TIMER_ABSTIME;
        let due = clocks.and_then(|clocks| clocks.due(clock, value_ns));
        if due.is_some() {
            flags |= libc::TFD_TIMER_ABSTIME;
        }
        let value_ns = due.unwrap_or(value_ns);
        let spec = program.words(&timespecs(interval_ns, value_ns));
        program.call("start the timerfd", libc::SYS_timerfd_settime, &[fd.into(), flags.into(), spec, 0.into()]);
    }
    if ticks != 0 {
        let block = program.words(&[ticks]);
        program.call("set the timerfd ticks", libc::SYS_ioctl, &[fd.into(), TFD_IOC_SET_TICKS.into(), block]);
    }
    fd
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fdinfo_of_an_armed_timer() {
        let text = "pos:\t0\nflags:\t02\nmnt_id:\t15\nino:\t1\nclockid: 1\nticks: 3\nsettime flags: 01\n\
                    it_value: (2, 500000000)\nit_interval: (1, 0)\n";
        assert_eq!(
            parse(text),
            Some(FileKind::TimerFd {
                clock: 1,
                ticks: 3,
                settime_flags: 1,
                value_ns: 2_500_000_000,
                interval_ns: 1_000_000_000
            })
        );
        assert_eq!(parse("clockid: 1\nticks: x\n"), None);
    }
}
