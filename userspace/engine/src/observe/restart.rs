//! What an interrupted wait left behind, from the record of a thread.

use super::{RestartBlock, layout::RestartLayout};
use nix::time::{ClockId, clock_gettime};
use standstill_ebpf_abi::ThreadRecord;

/// The kernel's `restart_block`.
pub(super) fn block(record: &ThreadRecord, at: &RestartLayout) -> RestartBlock {
    let half = |n: usize| u32::from_ne_bytes(record.restart[n..n + 4].try_into().expect("four bytes"));
    let word = |n: usize| u64::from_ne_bytes(record.restart[n..n + 8].try_into().expect("eight bytes"));
    // Compilers add to the names of static functions after a dot.
    let name = record.restart_fn.split(|&b| b == 0 || b == b'.').next().unwrap_or_default();
    let nanosleep =
        |clock| RestartBlock::Nanosleep { clock, expires_ns: word(at.sleep_expires), rmtp: word(at.sleep_rmtp) };
    match name {
        b"do_no_restart_syscall" => RestartBlock::None,
        b"hrtimer_nanosleep_restart" | b"posix_cpu_nsleep_restart" => nanosleep(half(at.sleep_clock) as i32),
        // The block holds the kernel's own number of the alarm clock.
        b"alarm_timer_nsleep_restart" if half(at.sleep_clock) == 0 => nanosleep(libc::CLOCK_REALTIME_ALARM),
        b"alarm_timer_nsleep_restart" => nanosleep(libc::CLOCK_BOOTTIME_ALARM),
        b"futex_wait_restart" => {
            let flags = half(at.futex_flags);
            // FLAGS_HAS_TIMEOUT is always set here: 0x40 since Linux 6.7, 0x04 before; FLAGS_CLOCKRT is half of it.
            let clockrt = if flags & 0x40 != 0 { 0x20 } else { 0x02 };
            RestartBlock::Futex {
                uaddr: word(at.futex_uaddr),
                val: half(at.futex_val),
                bitset: half(at.futex_bitset),
                realtime: flags & clockrt != 0,
                expires_ns: word(at.futex_time),
            }
        }
        b"do_restart_poll" => {
            let expires = word(at.poll_sec).wrapping_mul(1_000_000_000).wrapping_add(word(at.poll_nsec));
            RestartBlock::Poll {
                ufds: word(at.poll_ufds),
                nfds: half(at.poll_nfds),
                expires_ns: (half(at.poll_has_timeout) != 0).then_some(expires),
            }
        }
        _ => RestartBlock::Unknown,
    }
}

/// How much of the wait was left when the record was written.
pub(super) fn remaining(restart: &RestartBlock, record: &ThreadRecord) -> Option<u64> {
    // The reader's CLOCK_MONOTONIC may be shifted (time_namespaces(7)); the kernel's own came with the record.
    let (clock, expires) = match *restart {
        RestartBlock::Nanosleep { clock, expires_ns, .. } => (clock, expires_ns),
        RestartBlock::Futex { realtime: true, expires_ns, .. } => (libc::CLOCK_REALTIME, expires_ns),
        RestartBlock::Futex { realtime: false, expires_ns, .. } => (libc::CLOCK_MONOTONIC, expires_ns),
        RestartBlock::Poll { expires_ns, .. } => (libc::CLOCK_MONOTONIC, expires_ns?),
        RestartBlock::None | RestartBlock::Unknown => return None,
    };
    let now = match clock {
        libc::CLOCK_MONOTONIC => record.monotonic_ns,
        libc::CLOCK_BOOTTIME | libc::CLOCK_BOOTTIME_ALARM => record.boottime_ns,
        libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_ALARM => now(libc::CLOCK_REALTIME)?,
        libc::CLOCK_TAI => now(clock)?,
        // CPU time: only the thread's own clock could say.
        _ => return None,
    };
    Some(expires.saturating_sub(now))
}

fn now(clock: i32) -> Option<u64> {
    let time = clock_gettime(ClockId::from_raw(clock)).ok()?;
    Some(time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use standstill_ebpf_abi::Plain;

    const LAYOUT: RestartLayout = RestartLayout {
        sleep_clock: 0,
        sleep_rmtp: 8,
        sleep_expires: 16,
        futex_uaddr: 0,
        futex_val: 8,
        futex_flags: 12,
        futex_bitset: 16,
        futex_time: 24,
        poll_ufds: 0,
        poll_nfds: 8,
        poll_has_timeout: 12,
        poll_sec: 16,
        poll_nsec: 24,
    };

    /// A thread with this function and these words in its restart_block, seen at 100 ns.
    fn waiting(function: &str, words: [u64; 5]) -> ThreadRecord {
        let (mut record, _) = ThreadRecord::split(&[0; size_of::<ThreadRecord>()]).unwrap();
        record.monotonic_ns = 100;
        record.boottime_ns = 1000;
        record.restart_fn[..function.len()].copy_from_slice(function.as_bytes());
        for (to, word) in record.restart.chunks_mut(8).zip(words) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        record
    }

    fn decoded(function: &str, words: [u64; 5]) -> (RestartBlock, Option<u64>) {
        let record = waiting(function, words);
        let restart = block(&record, &LAYOUT);
        (restart, remaining(&restart, &record))
    }

    #[test]
    fn sleeps() {
        let (sleep, left) = decoded("hrtimer_nanosleep_restart", [1, 0x7000, 350, 0, 0]);
        assert_eq!(sleep, RestartBlock::Nanosleep { clock: libc::CLOCK_MONOTONIC, expires_ns: 350, rmtp: 0x7000 });
        assert_eq!(left, Some(250));
        // Expired, but not yet told.
        assert_eq!(decoded("hrtimer_nanosleep_restart", [1, 0, 50, 0, 0]).1, Some(0));
        assert_eq!(decoded("alarm_timer_nsleep_restart", [1, 0, 1007, 0, 0]).1, Some(7));
        // The rest of a sleep on a CPU clock is not known.
        let cpu = decoded("posix_cpu_nsleep_restart", [2, 0, 350, 0, 0]);
        assert!(matches!(cpu, (RestartBlock::Nanosleep { clock: 2, .. }, None)));
    }

    #[test]
    fn futexes_of_old_and_new_kernels() {
        let futex = |flags: u64| decoded("futex_wait_restart", [0x5000, 7 | flags << 32, 0xff, 120, 0]);
        let real = |flags| matches!(futex(flags).0, RestartBlock::Futex { realtime: true, val: 7, bitset: 0xff, .. });
        assert!(real(0x72) && real(0x06) && !real(0x52) && !real(0x05));
        assert_eq!(futex(0x42).1, Some(20));
    }

    #[test]
    fn polls_and_others() {
        let poll = |timeout: u64| decoded("do_restart_poll", [0x5000, 3 | timeout << 32, 1, 5, 0]);
        assert_eq!(poll(1).1, Some(1_000_000_005 - 100));
        assert_eq!(poll(0), (RestartBlock::Poll { ufds: 0x5000, nfds: 3, expires_ns: None }, None));
        assert_eq!(decoded("do_no_restart_syscall", [9; 5]), (RestartBlock::None, None));
        assert_eq!(decoded("do_no_restart_syscall.llvm.123", [9; 5]), (RestartBlock::None, None));
        assert_eq!(decoded("futex_wait_restart2", [9; 5]), (RestartBlock::Unknown, None));
        assert_eq!(decoded("", [9; 5]), (RestartBlock::Unknown, None));
    }
}
