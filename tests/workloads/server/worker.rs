//! A thread that makes requests and answers them.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use standstill_tests::workload::{Checker, Histogram, Random, monotonic};

use crate::table::Table;

/// What the control loop wants of a worker.
#[derive(Clone, Copy)]
pub(crate) enum Ask {
    /// Nothing.
    Nothing,
    /// Make the figures known.
    Report,
    /// Forget the figures.
    Reset,
    /// Look at every entry, and begin the figures anew.
    Verify,
}

/// How many requests, and of what kind.
#[derive(Clone, Copy)]
pub(crate) struct Load {
    pub(crate) writes_percent: usize,
    /// Time from one request to the next, if they come at a fixed pace.
    pub(crate) every_ns: Option<u64>,
}

/// What a worker and the control loop share.
pub(crate) struct Worker {
    ask: AtomicU64,
    figures: Mutex<(Histogram, u64)>,
}

impl Worker {
    /// Starts a thread that serves a table.
    pub(crate) fn start(number: usize, table: Table, load: Load, seed: u64, checker: Arc<Checker>) -> Arc<Self> {
        let worker = Arc::new(Self { ask: AtomicU64::new(Ask::Nothing as u64), figures: Mutex::default() });
        let shared = Arc::clone(&worker);
        let body = move || Loop { table, load, random: Random::new(seed), checker, shared }.run();
        thread::Builder::new().name(format!("worker{number}")).spawn(body).expect("start a worker");
        worker
    }

    /// Asks for something and waits until it is done.
    pub(crate) fn ask(&self, what: Ask) {
        self.ask.store(what as u64, Ordering::SeqCst);
        while self.ask.load(Ordering::SeqCst) != Ask::Nothing as u64 {
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Durations of the requests since the last reset, and how long ago that is in microseconds.
    pub(crate) fn figures(&self) -> (Histogram, u64) {
        self.figures.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

struct Loop {
    table: Table,
    load: Load,
    random: Random,
    checker: Arc<Checker>,
    shared: Arc<Worker>,
}

/// What was measured since a moment.
struct Measured {
    histogram: Histogram,
    since_ns: u64,
    /// When the next request is due.
    due_ns: u64,
}

impl Measured {
    fn begin(&mut self) {
        self.histogram.clear();
        self.since_ns = now_ns();
        self.due_ns = self.since_ns;
    }
}

impl Loop {
    fn run(mut self) {
        let mut measured = Measured { histogram: Histogram::default(), since_ns: 0, due_ns: 0 };
        measured.begin();
        loop {
            self.answer(&mut measured);
            let begin = match self.load.every_ns {
                None => now_ns(),
                Some(every) => {
                    measured.due_ns += every;
                    await_ns(measured.due_ns);
                    measured.due_ns
                }
            };
            self.request();
            measured.histogram.record(now_ns().saturating_sub(begin));
        }
    }

    /// One request: a look at an entry and all its words, or its next version.
    fn request(&mut self) {
        let key = 1 + self.random.below(self.table.keys() as usize) as u64;
        if self.random.below(100) < self.load.writes_percent {
            self.table.put(key);
            return;
        }
        match self.table.get(key) {
            Ok(value) => _ = black_box(value),
            Err(wrong) => _ = self.checker.that(false, || wrong),
        }
    }

    /// Does what the control loop wants.
    fn answer(&mut self, measured: &mut Measured) {
        let ask = self.shared.ask.load(Ordering::Relaxed);
        if ask == Ask::Nothing as u64 {
            return;
        }
        if ask == Ask::Report as u64 {
            let us = (now_ns() - measured.since_ns) / 1000;
            let mut figures = self.shared.figures.lock().unwrap_or_else(PoisonError::into_inner);
            *figures = (measured.histogram.clone(), us);
        } else {
            if ask == Ask::Verify as u64 {
                self.verify();
            }
            measured.begin();
        }
        self.shared.ask.store(Ask::Nothing as u64, Ordering::SeqCst);
    }

    fn verify(&self) {
        for key in 1..=self.table.keys() {
            let result = self.table.get(key);
            self.checker.that(result.is_ok(), || result.err().unwrap_or_default());
        }
    }
}

/// Sleeps until a moment. Waking up takes some 60 microseconds: requests that became due meanwhile follow at once.
fn await_ns(moment: u64) {
    let left = moment.saturating_sub(now_ns());
    if left > 0 {
        thread::sleep(Duration::from_nanos(left));
    }
}

fn now_ns() -> u64 {
    u64::try_from(monotonic().as_nanos()).unwrap_or(u64::MAX)
}
