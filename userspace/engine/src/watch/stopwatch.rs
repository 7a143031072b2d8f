//! How long steps of a dump would take if they did not have to wait for a processor.

use nix::time::{ClockId, clock_gettime};
use std::time::Duration;

/// Counts processor time. Whoever only watches gives way to others, a dump does not: on a busy machine the time that has
/// passed tells nothing.
pub(super) struct Stopwatch {
    clock: ClockId,
    begin: Duration,
}

impl Stopwatch {
    /// The calling thread's time.
    pub(super) fn start() -> Self {
        Self::of(ClockId::CLOCK_THREAD_CPUTIME_ID)
    }

    /// The time of all our threads.
    pub(super) fn of_all_threads() -> Self {
        Self::of(ClockId::CLOCK_PROCESS_CPUTIME_ID)
    }

    fn of(clock: ClockId) -> Self {
        Self { clock, begin: now(clock) }
    }

    pub(super) fn nanoseconds(&self) -> f64 {
        now(self.clock).saturating_sub(self.begin).as_nanos() as f64
    }
}

fn now(clock: ClockId) -> Duration {
    clock_gettime(clock).map_or(Duration::ZERO, Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn waiting_does_not_count() {
        let (own, begin) = (Stopwatch::start(), Instant::now());
        std::thread::sleep(Duration::from_millis(50));
        let slept = own.nanoseconds();
        while begin.elapsed() < Duration::from_millis(100) {}
        let worked = own.nanoseconds();
        assert!(slept < 2e7 && worked > slept && worked < 1e8, "{slept} {worked}");
    }
}
