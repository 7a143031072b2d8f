//! Stacks that come and go.

use std::hint::black_box;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use standstill_tests::workload::{Checker, Pattern, Random};

/// Threads at a time.
const MOST: usize = 4;

/// Short-lived threads: the C library gives their stacks to later ones.
#[derive(Default)]
pub(crate) struct Threads(Vec<JoinHandle<bool>>);

impl Threads {
    /// Starts one more.
    pub(crate) fn start(&mut self, random: &mut Random) {
        if self.0.len() < MOST {
            let (depth, seed) = (1 + random.below(30), random.next());
            let size = (256 << 10) << random.below(3);
            let body = move || is_right(depth, seed, Duration::from_millis(1 + seed % 20));
            self.0.extend(thread::Builder::new().name("brief".to_owned()).stack_size(size).spawn(body));
        }
    }

    /// Looks how those have fared that have ended, or all.
    pub(crate) fn collect(&mut self, checker: &Checker, all: bool) {
        for thread in self.0.extract_if(.., |thread| all || thread.is_finished()) {
            checker.that(thread.join().is_ok_and(|right| right), || "the stack of a thread is wrong".to_owned());
        }
    }
}

/// Frames of four KiB each with a content, and whether it is still there on the way back.
pub(crate) fn is_right(depth: usize, seed: u64, pause: Duration) -> bool {
    let mut frame = [0; 512];
    let pattern = Pattern::new(seed ^ depth as u64);
    pattern.fill(black_box(&mut frame), 0);
    let below = match depth {
        0 => {
            thread::sleep(pause);
            true
        }
        _ => is_right(depth - 1, seed, pause),
    };
    below && pattern.first_wrong(black_box(&frame), 0).is_none()
}
