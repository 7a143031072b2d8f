//! Looks at the tree in a thread of its own: the view must answer keys while a large tree is being read.

use super::metrics::Metrics;
use nix::sys::signal::SigSet;
use standstill_engine::{
    Error,
    watch::{Sample, View, Viewer},
};
use std::{
    sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// What a look gave.
pub(super) enum Told {
    Sample(Box<Sample>),
    /// The tree's root has ended.
    Ended,
    Failed(Error),
}

/// The thread and its news.
pub(super) struct Sampler {
    news: Receiver<Told>,
    thread: JoinHandle<()>,
}

impl Sampler {
    pub(super) fn start(viewer: Viewer, interval: Duration, metrics: Option<Metrics>) -> Self {
        // A reader that is slow gets fewer samples, not old ones.
        let (sender, news) = sync_channel(1);
        Self { news, thread: thread::spawn(move || look(viewer, interval, metrics, &sender)) }
    }

    /// The next news, if there are any within this time.
    ///
    /// # Panics
    /// When the thread has.
    pub(super) fn next(&self, limit: Duration) -> Option<Told> {
        match self.news.recv_timeout(limit) {
            Ok(told) => Some(told),
            Err(RecvTimeoutError::Disconnected) if self.thread.is_finished() => {
                panic!("the thread that looks at the tree is gone")
            }
            Err(_) => None,
        }
    }
}

fn look(mut viewer: Viewer, interval: Duration, metrics: Option<Metrics>, news: &SyncSender<Told>) {
    // They are for the thread that shows: here they would only disturb.
    let _ = SigSet::all().thread_block();
    let mut due = Instant::now();
    loop {
        let (told, last) = match viewer.sample() {
            Ok(View::Running(sample)) => {
                if let Some(metrics) = &metrics {
                    metrics.show(&sample);
                }
                (Told::Sample(sample), false)
            }
            Ok(View::Ended) => (Told::Ended, true),
            Err(e) => (Told::Failed(e), true),
        };
        if news.send(told).is_err() || last {
            return;
        }
        // Ticks that were missed are not made up for.
        due = (due + interval).max(Instant::now());
        // The tree's end is to be seen soon, also with a long interval.
        while let Some(rest) = due.checked_duration_since(Instant::now()).filter(|rest| !rest.is_zero()) {
            if viewer.wait_for_end(rest) {
                break;
            }
        }
    }
}
