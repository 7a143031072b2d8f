//! Looks at CLOCK_MONOTONIC and CLOCK_BOOTTIME all the time, and waits for absolute times of them in every way that there is.
//! Both must go on as if the process had been stopped for a short time only.
//!
//! Options: `--namespace` (it makes a time namespace of its own and lives in it), `--apart` (its child alone does so),
//! `--unborn` (it makes one for the children that it may have one day).

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::time::clock_gettime;
use standstill_tests::time_namespace;
use standstill_tests::workload::{Args, Checker, Control, fork_child, proc_stat_fields};

const CLOCKS: [(&str, libc::clockid_t); 2] =
    [("CLOCK_MONOTONIC", libc::CLOCK_MONOTONIC), ("CLOCK_BOOTTIME", libc::CLOCK_BOOTTIME)];

/// Longest time that may pass between two looks, by the clocks of the process.
const LONGEST: Duration = Duration::from_millis(2500);
/// How far a timer may be from the time that it was set to.
const SLACK: Duration = Duration::from_millis(5);
const HOUR: Duration = Duration::from_secs(3600);
/// Period of the timers that run all the time.
const PERIOD: Duration = Duration::from_millis(50);

fn main() {
    let args = Args::parse();
    let enter = || time_namespace::enter(c"monotonic 3000000 500\nboottime 7000000 999999999\n");
    if args.flag("namespace") {
        enter().expect("a time namespace");
    }
    let mut control = Control::new("clocks", &args);
    let child = control.for_child("child");
    let apart = args.flag("apart");
    let pid = fork_child(move || {
        if apart {
            enter().expect("a time namespace");
        }
        let checker = Arc::clone(&child.checker);
        let mut clocks = Clocks::start();
        child.serve(None, Duration::from_millis(20), |_| clocks.look(&checker));
    });
    control.adopt(pid, "child");
    if args.flag("unborn") {
        // SAFETY: the call takes a number only.
        let made = unsafe { libc::unshare(0x80) };
        assert_eq!(made, 0, "a time namespace");
    }
    let timers = Timers::start();
    let waits = Waits::start(&control.checker);
    let mut clocks = Clocks::start();
    let checker = Arc::clone(&control.checker);
    control.ready();
    control.serve(None, Duration::from_millis(20), |request| {
        clocks.look(&checker);
        if request.thorough() {
            timers.check(&checker);
            waits.await_round(&checker);
            check_start_time(&checker);
        }
        clocks.look(&checker);
    });
}

/// A clock by way of the vdso.
fn now(clock: libc::clockid_t) -> Duration {
    clock_gettime(clock.into()).expect("clock_gettime").into()
}

/// A clock by way of the kernel.
fn asked(clock: libc::clockid_t) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one timespec.
    let result = unsafe { libc::syscall(libc::SYS_clock_gettime, clock, &raw mut time) };
    assert_eq!(result, 0, "clock_gettime");
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// What the clocks showed last.
struct Clocks([Duration; 2]);

impl Clocks {
    fn start() -> Self {
        Self(CLOCKS.map(|(_, clock)| now(clock)))
    }

    fn look(&mut self, checker: &Checker) {
        for ((name, clock), last) in CLOCKS.iter().zip(&mut self.0) {
            let looks = [now(*clock), asked(*clock), now(*clock)];
            checker.that(looks.is_sorted(), || format!("{name}: vdso and kernel differ: {looks:?}"));
            let went = looks[0].checked_sub(*last);
            checker.that(went.is_some_and(|went| went < LONGEST), || format!("{name} went from {last:?} to {looks:?}"));
            *last = looks[2];
        }
    }
}

/// Timers that were set to absolute times.
struct Timers {
    far: [(TimerFd, Duration, libc::clockid_t); 2],
    periodic: (TimerFd, Duration),
    posix: [(u32, Duration, Duration, libc::clockid_t); 3],
}

impl Timers {
    fn start() -> Self {
        let far = |id: ClockId, clock| {
            let timer = TimerFd::new(id, TimerFlags::TFD_CLOEXEC).expect("timerfd");
            let due = now(clock) + HOUR;
            let expiration = Expiration::OneShot(TimeSpec::from_duration(due));
            timer.set(expiration, TimerSetTimeFlags::TFD_TIMER_ABSTIME).expect("set a timerfd");
            (timer, due, clock)
        };
        let periodic = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC).expect("timerfd");
        let first = now(libc::CLOCK_MONOTONIC) + PERIOD;
        let times = Expiration::IntervalDelayed(TimeSpec::from_duration(first), TimeSpec::from_duration(PERIOD));
        periodic.set(times, TimerSetTimeFlags::TFD_TIMER_ABSTIME).expect("set a timerfd");
        Self {
            far: [
                far(ClockId::CLOCK_MONOTONIC, libc::CLOCK_MONOTONIC),
                far(ClockId::CLOCK_BOOTTIME, libc::CLOCK_BOOTTIME),
            ],
            periodic: (periodic, first),
            posix: [
                posix_timer(libc::CLOCK_MONOTONIC, HOUR, Duration::ZERO),
                posix_timer(libc::CLOCK_BOOTTIME, HOUR, Duration::ZERO),
                posix_timer(libc::CLOCK_MONOTONIC, PERIOD, PERIOD),
            ],
        }
    }

    fn check(&self, checker: &Checker) {
        for (timer, due, clock) in &self.far {
            let left = || match timer.get() {
                Ok(Some(Expiration::OneShot(left))) => Some(Duration::from(left)),
                _ => None,
            };
            check_due(checker, "timerfd", *clock, left, |at| at.abs_diff(*due));
        }
        let (periodic, first) = &self.periodic;
        let left = || match periodic.get() {
            Ok(Some(Expiration::IntervalDelayed(left, period))) if Duration::from(period) == PERIOD => {
                Some(left.into())
            }
            _ => None,
        };
        // One that nobody reads shows no time left: it begins anew with this.
        let mut count = [0; 8];
        checker.equal("read of a periodic timerfd", &nix::unistd::read(periodic, &mut count), &Ok(8));
        check_due(checker, "periodic timerfd", libc::CLOCK_MONOTONIC, left, |at| phase(at, *first));
        for (id, due, period, clock) in self.posix {
            let name = format!("timer {id}");
            let left = || timer_left(id, period);
            let wrong = |at: Duration| if period.is_zero() { at.abs_diff(due) } else { phase(at, due) };
            check_due(checker, &name, clock, left, wrong);
        }
    }
}

/// How far a moment is from the nearest one at which a periodic timer is due.
fn phase(at: Duration, first: Duration) -> Duration {
    let off = (at.saturating_sub(first)).as_nanos() % PERIOD.as_nanos();
    Duration::from_nanos(off.min(PERIOD.as_nanos() - off) as u64)
}

/// Now and what is left give when a timer is due. The best of several looks counts: the process may have to wait between the
/// two.
fn check_due(
    checker: &Checker,
    name: &str,
    clock: libc::clockid_t,
    left: impl Fn() -> Option<Duration>,
    wrong: impl Fn(Duration) -> Duration,
) {
    let looks = (0..20).map(|_| {
        let before = now(clock);
        left().map(|left| wrong(before + left))
    });
    let best = looks.min_by_key(|wrong| wrong.unwrap_or(Duration::MAX)).flatten();
    checker.that(best.is_some_and(|wrong| wrong < SLACK), || format!("{name} of clock {clock} is off by {best:?}"));
}

/// A timer without signal: its number, when it is due first, its period and clock.
fn posix_timer(
    clock: libc::clockid_t,
    after: Duration,
    period: Duration,
) -> (u32, Duration, Duration, libc::clockid_t) {
    let mut id = 0u32;
    // SAFETY: a sigevent of zeros is a valid one.
    let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
    event.sigev_notify = libc::SIGEV_NONE;
    // SAFETY: the kernel reads a sigevent and writes a number.
    let made = unsafe { libc::syscall(libc::SYS_timer_create, clock, &raw const event, &raw mut id) };
    assert_eq!(made, 0, "timer_create");
    let due = now(clock) + after;
    let times = [timespec(period), timespec(due)];
    // SAFETY: the kernel reads an itimerspec, which is two timespecs.
    let set = unsafe {
        libc::syscall(libc::SYS_timer_settime, id, libc::TIMER_ABSTIME, times.as_ptr(), std::ptr::null::<u8>())
    };
    assert_eq!(set, 0, "timer_settime");
    (id, due, period, clock)
}

fn timer_left(id: u32, period: Duration) -> Option<Duration> {
    let mut times = [timespec(Duration::ZERO); 2];
    // SAFETY: the kernel writes an itimerspec, which is two timespecs.
    let result = unsafe { libc::syscall(libc::SYS_timer_gettime, id, times.as_mut_ptr()) };
    let [every, left] = times.map(|t| Duration::new(t.tv_sec as u64, t.tv_nsec as u32));
    (result == 0 && every == period).then_some(left)
}

fn timespec(time: Duration) -> libc::timespec {
    libc::timespec { tv_sec: time.as_secs().cast_signed(), tv_nsec: time.subsec_nanos().into() }
}

/// One way to wait until a time of a clock.
type Wait = fn(libc::clockid_t, Duration) -> Result<i64, Errno>;

const WAITS: [(&str, libc::clockid_t, Wait, Result<i64, Errno>); 5] = [
    ("clock_nanosleep until", libc::CLOCK_MONOTONIC, sleep_until, Ok(0)),
    ("clock_nanosleep until", libc::CLOCK_BOOTTIME, sleep_until, Ok(0)),
    ("futex until", libc::CLOCK_MONOTONIC, futex_until, Err(Errno::ETIMEDOUT)),
    ("clock_nanosleep for", libc::CLOCK_MONOTONIC, sleep_for, Ok(0)),
    ("read of a timerfd until", libc::CLOCK_MONOTONIC, timerfd_until, Ok(8)),
];

/// Threads that wait for absolute times, over and over.
struct Waits(Arc<Vec<AtomicU64>>);

impl Waits {
    const LENGTH: Duration = Duration::from_millis(1500);
    /// How late they may end: a restore may come between.
    const LATE: Duration = Duration::from_millis(1500);

    fn start(checker: &Arc<Checker>) -> Self {
        let rounds: Arc<Vec<AtomicU64>> = Arc::new(WAITS.iter().map(|_| AtomicU64::new(0)).collect());
        for (number, (name, clock, wait, expected)) in WAITS.into_iter().enumerate() {
            let (checker, rounds) = (Arc::clone(checker), Arc::clone(&rounds));
            thread::spawn(move || {
                loop {
                    let end = now(clock) + Self::LENGTH;
                    let result = wait(clock, end);
                    let late = now(clock).checked_sub(end);
                    checker.equal(name, &result, &expected);
                    checker.that(late.is_some_and(|late| late < Self::LATE), || {
                        format!("{name} {end:?} of clock {clock} ended at {:?}", now(clock))
                    });
                    rounds[number].fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        Self(rounds)
    }

    /// Waits until every wait that has begun by now has ended.
    fn await_round(&self, checker: &Checker) {
        let limit = now(libc::CLOCK_MONOTONIC) + Self::LENGTH + Self::LATE;
        let before: Vec<u64> = self.0.iter().map(|rounds| rounds.load(Ordering::Relaxed)).collect();
        for (number, before) in before.into_iter().enumerate() {
            while self.0[number].load(Ordering::Relaxed) == before && now(libc::CLOCK_MONOTONIC) < limit {
                thread::sleep(Duration::from_millis(5));
            }
            let ended = self.0[number].load(Ordering::Relaxed) > before;
            checker.that(ended, || format!("{} of clock {} does not end", WAITS[number].0, WAITS[number].1));
        }
    }
}

fn sleep_until(clock: libc::clockid_t, end: Duration) -> Result<i64, Errno> {
    let time = timespec(end);
    // SAFETY: the kernel reads one timespec; a null remainder is allowed.
    Errno::result(unsafe {
        libc::syscall(libc::SYS_clock_nanosleep, clock, libc::TIMER_ABSTIME, &raw const time, 0_usize)
    })
}

fn sleep_for(clock: libc::clockid_t, end: Duration) -> Result<i64, Errno> {
    let time = timespec(end.saturating_sub(now(clock)));
    // SAFETY: the kernel reads one timespec; a null remainder is allowed.
    Errno::result(unsafe { libc::syscall(libc::SYS_clock_nanosleep, clock, 0, &raw const time, 0_usize) })
}

fn futex_until(_: libc::clockid_t, end: Duration) -> Result<i64, Errno> {
    let word = AtomicU32::new(0);
    let time = timespec(end);
    let operation = libc::FUTEX_WAIT_BITSET | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the word lives on this stack for the whole call, and the kernel reads one timespec.
    Errno::result(unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), operation, 0, &raw const time, 0_usize, u32::MAX)
    })
}

fn timerfd_until(_: libc::clockid_t, end: Duration) -> Result<i64, Errno> {
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC)?;
    let expiration = Expiration::OneShot(TimeSpec::from_duration(end));
    timer.set(expiration, TimerSetTimeFlags::TFD_TIMER_ABSTIME)?;
    nix::unistd::read(&timer, &mut [0; 8]).map(|count| count as i64)
}

/// When the process began, which is a time of CLOCK_BOOTTIME in its time namespace, is not in the future.
fn check_start_time(checker: &Checker) {
    let Some(fields) = checker.works("read the own stat", proc_stat_fields("/proc/self/stat")) else { return };
    let began = fields[19].parse::<u64>().unwrap_or(u64::MAX) / 100;
    let now = now(libc::CLOCK_BOOTTIME).as_secs();
    checker.that(began <= now && now - began < 900, || format!("it began at {began} s, and now it is {now} s"));
}
