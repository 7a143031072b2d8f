//! Writes memory from one end to the other, again and again, as fast as it goes, and reports MiB/s of each 100 ms.
//!
//! Options: `--mib N` (default 1024), `--track-ms N` (the program's writes are tracked as for a checkpoint, with the
//! written pages looked up every N ms; 0: not tracked), `--thp`, `--seconds N` (measure so long, print JSON and end).
//!
//! A request for a verdict prints the figures, a reset forgets them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use serde_json::json;
use standstill_tests::workload::{Args, Checker, Control, Mapping, Request, Tracking, now_us};

/// Words written between two looks at the clock.
const BLOCK: usize = 32 << 10;
const WINDOW_US: u64 = 100_000;

/// What was measured since the last reset.
#[derive(Default)]
struct Figures {
    /// MiB/s of each window.
    windows: Vec<f64>,
    /// Whether every page had been written since the last look-up when the window began, and none came in it.
    settled: Vec<bool>,
    /// How long each look-up of written pages took, in microseconds, and how many it found.
    looks: Vec<(u64, usize)>,
    begin_us: u64,
    end_us: u64,
    bytes: u64,
}

impl Figures {
    fn json(&self) -> serde_json::Value {
        let seconds = self.end_us.saturating_sub(self.begin_us) as f64 / 1e6;
        let mean = self.bytes as f64 / f64::from(1 << 20) / seconds;
        let (us, pages): (Vec<u64>, Vec<usize>) = self.looks.iter().copied().unzip();
        json!({ "seconds": seconds, "mib_per_second": mean, "windows": self.windows, "settled": self.settled, "look_us": us, "written": pages })
    }
}

#[derive(Clone, Default)]
struct State {
    figures: Arc<Mutex<Figures>>,
    /// Passes over the memory that are complete.
    passes: Arc<AtomicU64>,
    /// The pass that was under way at the last look-up.
    looked: Arc<AtomicU64>,
}

impl State {
    fn figures(&self) -> MutexGuard<'_, Figures> {
        self.figures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The loop that is measured. The value written is the number of the pass.
    fn write_forever(&self, memory: Mapping) {
        let (mut begin, mut bytes, mut settled) = (now_us(), 0, false);
        for pass in 1.. {
            for block in memory.words_mut().chunks_mut(BLOCK) {
                block.fill(pass);
                bytes += block.len() as u64 * 8;
                let now = now_us();
                if now - begin >= WINDOW_US {
                    // The pass of the look-up and the next one may meet pages for the first time since.
                    let now_settled = pass > self.looked.load(Ordering::Relaxed) + 1;
                    self.window(begin, now, bytes, settled && now_settled);
                    settled = now_settled;
                    (begin, bytes) = (now, 0);
                }
            }
            self.passes.store(pass, Ordering::Release);
        }
    }

    fn window(&self, begin: u64, now: u64, bytes: u64, settled: bool) {
        let mut figures = self.figures();
        if figures.begin_us == 0 {
            figures.begin_us = begin;
        }
        figures.end_us = now;
        figures.bytes += bytes;
        figures.settled.push(settled);
        figures.windows.push(bytes as f64 / f64::from(1 << 20) / ((now - begin) as f64 / 1e6));
    }

    /// Looks up the written pages at a fixed pace.
    fn track_forever(&self, mut tracking: Tracking, every: Duration) {
        loop {
            let begin = now_us();
            let pages = tracking.take().expect("look up the written pages");
            self.looked.store(self.passes.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
            let took = now_us() - begin;
            self.figures().looks.push((took, pages));
            thread::sleep(every.saturating_sub(Duration::from_micros(took)));
        }
    }

    /// Each word is the number of the pass that is under way, or of the one before it, in this order.
    fn check(&self, memory: Mapping, checker: &Checker) {
        let words = memory.length() / 8;
        let before = self.passes.load(Ordering::Acquire);
        let seen: Vec<u64> = (0..words).step_by(511).map(|at| memory.load(at)).collect();
        let after = self.passes.load(Ordering::Acquire) + 1;
        let wrong = seen.iter().find(|pass| !(before..=after).contains(*pass));
        checker.that(wrong.is_none(), || format!("a word of pass {wrong:?} among passes {before} to {after}"));
    }
}

fn main() {
    let args = Args::parse();
    let mut control = Control::new("stream", &args);
    let checker = Arc::clone(&control.checker);
    let memory = Mapping::private(args.value("mib", 1024_usize) << 20).expect("map");
    memory.advise(if args.flag("thp") { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE }).expect("advise");
    memory.words_mut().fill(0);
    let state = State::default();
    let every = args.value("track-ms", 0);
    if every > 0 {
        let tracking = Tracking::start(memory).expect("track");
        let state = state.clone();
        thread::spawn(move || state.track_forever(tracking, Duration::from_millis(every)));
    }
    let writer = state.clone();
    thread::spawn(move || writer.write_forever(memory));
    let reset = state.clone();
    control.on_reset(move || *reset.figures() = Figures::default());
    control.ready();
    if let Some(seconds) = Some(args.value("seconds", 0)).filter(|seconds| *seconds > 0) {
        thread::sleep(Duration::from_millis(500));
        *state.figures() = Figures::default();
        thread::sleep(Duration::from_secs(seconds));
        println!("{}", state.figures().json());
        std::process::exit(0);
    }
    control.serve(None, Duration::from_millis(200), |request| {
        state.check(memory, &checker);
        if request == Request::Verdict {
            println!("{}", state.figures().json());
        }
    });
}
