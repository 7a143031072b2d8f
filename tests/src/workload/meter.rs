//! How long the process did not run, as it sees it itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use super::sys::now_us;
use crate::verdict::Verdict;

/// A thread that looks at the clock in a loop and remembers the longest gap between two looks.
#[derive(Clone, Default)]
pub struct Meter {
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    longest_us: AtomicU64,
    paused_us: AtomicU64,
    looks: AtomicU64,
}

impl Meter {
    /// Starts the clock loop with the given sleep between two looks.
    pub fn start(sleep: Duration) -> Self {
        let meter = Self::default();
        let state = Arc::clone(&meter.state);
        let body = move || {
            let mut last = now_us();
            loop {
                thread::sleep(sleep);
                let now = now_us();
                let gap = now.saturating_sub(last);
                state.longest_us.fetch_max(gap, Ordering::Relaxed);
                if gap > Verdict::LONG_PAUSE_US {
                    state.paused_us.fetch_add(gap, Ordering::Relaxed);
                }
                last = now;
                state.looks.fetch_add(1, Ordering::Relaxed);
            }
        };
        thread::Builder::new().name("meter".to_owned()).spawn(body).expect("start the meter");
        meter
    }

    /// Waits until the clock loop has come round again, so that a gap which is just over is known.
    pub fn catch_up(&self) {
        let goal = self.state.looks.load(Ordering::Relaxed) + 2;
        let limit = now_us() + 10_000_000;
        while self.state.looks.load(Ordering::Relaxed) < goal && now_us() < limit {
            thread::sleep(Duration::from_micros(100));
        }
    }

    /// Longest gap since the last reset.
    pub fn longest_us(&self) -> u64 {
        self.state.longest_us.load(Ordering::Relaxed)
    }

    /// Sum of the long gaps since the start; never reset.
    pub fn paused_us(&self) -> u64 {
        self.state.paused_us.load(Ordering::Relaxed)
    }

    /// Forgets the longest gap.
    pub fn reset(&self) {
        self.state.longest_us.store(0, Ordering::Relaxed);
    }
}
