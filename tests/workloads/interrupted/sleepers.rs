//! Threads that sleep for a fixed time in every way there is.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use standstill_tests::workload::{Checker, Meter, monotonic};

/// How much later than asked a sleep may end on a busy machine.
const SLACK: Duration = Duration::from_millis(700);

/// One way to sleep: makes the system call and says what it returned.
type Sleep = fn(Duration) -> Result<i64, Errno>;

/// The sleeps and what each returns when its time has passed.
const SLEEPS: [(&str, Sleep, Result<i64, Errno>); 7] = [
    ("nanosleep", nanosleep, Ok(0)),
    ("clock_nanosleep until", sleep_until, Ok(0)),
    ("poll", poll, Ok(0)),
    ("pselect", pselect, Ok(0)),
    ("futex with a timeout", futex, Err(Errno::ETIMEDOUT)),
    ("epoll_wait with a timeout", epoll, Ok(0)),
    ("read of a timerfd", timerfd, Ok(8)),
];

/// Ways to sleep that the kernel itself ends with EINTR when the process is stopped, see signal(7).
const ENDED_BY_STOPS: [&str; 1] = ["epoll_wait with a timeout"];

pub(crate) struct Sleepers {
    checker: Arc<Checker>,
    length: Duration,
    rounds: Arc<Vec<AtomicU64>>,
}

impl Sleepers {
    pub(crate) fn start(checker: &Arc<Checker>, meter: &Meter, length: Duration, lenient: bool) -> Self {
        let rounds: Arc<Vec<AtomicU64>> = Arc::new(SLEEPS.iter().map(|_| AtomicU64::new(0)).collect());
        for (number, (name, sleep, expected)) in SLEEPS.into_iter().enumerate() {
            let (checker, meter, rounds) = (Arc::clone(checker), meter.clone(), Arc::clone(&rounds));
            let body = move || {
                loop {
                    let (start, paused) = (monotonic(), meter.paused_us());
                    let result = sleep(length);
                    let took = monotonic() - start;
                    rounds[number].fetch_add(1, Ordering::Relaxed);
                    if result == Err(Errno::EINTR) && (lenient || ENDED_BY_STOPS.contains(&name)) {
                        checker.note(&format!("{name} interrupted"), 1);
                        continue;
                    }
                    checker.equal(name, &result, &expected);
                    meter.catch_up();
                    let stopped = Duration::from_micros(meter.paused_us() - paused);
                    checker.that(took >= length && took <= length + stopped + SLACK, || {
                        format!("{name}: asked for {length:?}, took {took:?} of which {stopped:?} stopped")
                    });
                }
            };
            let short: String = name.chars().take(15).collect();
            thread::Builder::new().name(short).spawn(body).expect("thread");
        }
        Self { checker: Arc::clone(checker), length, rounds }
    }

    /// Waits until every sleep that has begun by now has ended.
    pub(crate) fn await_round(&self) {
        let limit = monotonic() + self.length + 3 * SLACK;
        let before: Vec<u64> = self.rounds.iter().map(|rounds| rounds.load(Ordering::Relaxed)).collect();
        for (number, before) in before.into_iter().enumerate() {
            while self.rounds[number].load(Ordering::Relaxed) == before && monotonic() < limit {
                thread::sleep(Duration::from_millis(5));
            }
            let ended = self.rounds[number].load(Ordering::Relaxed) > before;
            self.checker.that(ended, || format!("{} does not end", SLEEPS[number].0));
        }
        // The last one still has to compare its figures.
        thread::sleep(Duration::from_millis(50));
    }
}

fn timespec(time: Duration) -> libc::timespec {
    libc::timespec { tv_sec: time.as_secs().cast_signed(), tv_nsec: time.subsec_nanos().into() }
}

fn nanosleep(length: Duration) -> Result<i64, Errno> {
    let time = timespec(length);
    // SAFETY: the kernel reads one timespec; a null remainder is allowed.
    Errno::result(unsafe { libc::syscall(libc::SYS_nanosleep, &raw const time, 0_usize) })
}

fn sleep_until(length: Duration) -> Result<i64, Errno> {
    let time = timespec(monotonic() + length);
    let (clock, flags) = (libc::CLOCK_MONOTONIC, libc::TIMER_ABSTIME);
    // SAFETY: the kernel reads one timespec; a null remainder is allowed.
    Errno::result(unsafe { libc::syscall(libc::SYS_clock_nanosleep, clock, flags, &raw const time, 0_usize) })
}

fn poll(length: Duration) -> Result<i64, Errno> {
    // SAFETY: with no descriptors the kernel reads no memory.
    Errno::result(unsafe { libc::syscall(libc::SYS_poll, 0_usize, 0_usize, length.as_millis() as usize) })
}

fn pselect(length: Duration) -> Result<i64, Errno> {
    let mut time = timespec(length);
    // SAFETY: no sets are given; the kernel reads the timespec and writes what remains of it.
    Errno::result(unsafe {
        libc::syscall(libc::SYS_pselect6, 0_usize, 0_usize, 0_usize, 0_usize, &raw mut time, 0_usize)
    })
}

fn futex(length: Duration) -> Result<i64, Errno> {
    let word = AtomicU32::new(0);
    let time = timespec(length);
    let operation = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the word lives on this stack for the whole call, and the kernel reads one timespec.
    Errno::result(unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, 0_usize, &raw const time) })
}

fn epoll(length: Duration) -> Result<i64, Errno> {
    thread_local! {
        static EPOLL: nix::sys::epoll::Epoll =
            nix::sys::epoll::Epoll::new(nix::sys::epoll::EpollCreateFlags::EPOLL_CLOEXEC).expect("epoll");
    }
    let timeout = u16::try_from(length.as_millis()).expect("a short sleep");
    let wait = |epoll: &nix::sys::epoll::Epoll| {
        epoll.wait(&mut [nix::sys::epoll::EpollEvent::empty()], nix::sys::epoll::EpollTimeout::from(timeout))
    };
    EPOLL.with(wait).map(|count| count as i64)
}

fn timerfd(length: Duration) -> Result<i64, Errno> {
    use nix::sys::time::TimeSpec;
    use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
    thread_local! {
        static TIMER: TimerFd = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC).expect("timerfd");
    }
    TIMER.with(|timer| {
        timer.set(Expiration::OneShot(TimeSpec::from_duration(length)), TimerSetTimeFlags::empty())?;
        let mut count = [0; 8];
        nix::unistd::read(timer, &mut count).map(|length| length as i64)
    })
}
