//! How many pages of a tree are written to within a time, from two looks at some of them. Pure.

use super::{pages::Changed, predict::Costs};
use crate::dump::history::Amounts;
use crate::dump::{Foreseen, PrecopyOptions, foresee};
use standstill_images::types::DumpCounts;

/// Pages that were written to after a short and after a longer time. A page that gets the contents that it had counts as
/// not written to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Writes {
    soon: Changed,
    later: Changed,
}

fn share(of: &Changed) -> f64 {
    of.changed as f64 / of.pages.max(1) as f64
}

impl Writes {
    pub(super) fn new(soon: Changed, later: Changed) -> Self {
        Self { soon, later }
    }

    /// Which part of the pages is written to within so many seconds. The same pages are written to again and again, so the
    /// longer the time the fewer are new: a power of the time that both looks are on.
    pub(super) fn within(&self, seconds: f64) -> f64 {
        let (soon, later) = (share(&self.soon), share(&self.later));
        let longer = self.later.seconds / self.soon.seconds.max(1e-6);
        if later <= 0.0 {
            return 0.0;
        }
        if soon <= 0.0 || longer <= 1.0 {
            return (later * seconds / self.later.seconds.max(1e-6)).min(1.0);
        }
        let power = ((later / soon).ln() / longer.ln()).clamp(0.0, 1.0);
        (later * (seconds / self.later.seconds).powf(power)).min(1.0)
    }

    /// Ranges for each page that is written to.
    fn scattered(&self) -> f64 {
        if self.later.changed == 0 { 1.0 } else { self.later.ranges as f64 / self.later.changed as f64 }
    }

    /// What is left for the freeze of a dump that copies the tree before it, and how many of the pages are copied before.
    /// `plain`: without that. `before`: pages that were left the last times. Many pages get the contents that they had, as
    /// the stacks of threads that wake up for a moment, so it is not less.
    pub(super) fn after_precopy(&self, plain: &Amounts, costs: &Costs, rounds: u32, before: u64) -> (Amounts, u64) {
        let n = &plain.counts;
        let private = plain.copied - plain.shared;
        let (mappings, scanned) = (n.mappings as f64, plain.scanned as f64);
        let look = mappings * (costs.track_mapping + costs.mapping)
            + scanned * costs.track_page
            + n.processes as f64 * costs.copy_process;
        let took = |pages: u64| ((look + pages as f64 * (costs.copy_page + costs.copy_range)) / 1e3) as u64;
        let written = |us: u64| (self.within(us as f64 / 1e6) * private as f64) as u64;
        let freezing = n.processes as f64 * (2.0 * costs.list_process + costs.seize_process)
            + n.threads as f64 * costs.seize_thread;
        let options = PrecopyOptions::default();
        let Foreseen { early, late } = foresee(&options, rounds, private, took, written, (freezing / 1e3) as u64);
        let late = late.max(before.min(private));
        let counts = DumpCounts {
            ranges: (late as f64 * self.scattered()).ceil() as u64,
            pages: late,
            compared: (n.compared * late).checked_div(n.pages).unwrap_or(0),
            ..*n
        };
        (Amounts { counts, tracked: true, copied: late + plain.shared, ..*plain }, early)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn writes(soon: u64, later: u64) -> Writes {
        let look = |changed: u64, seconds: f64| Changed { pages: 1000, changed, ranges: changed / 2, seconds };
        Writes::new(look(soon, 0.01), look(later, 0.16))
    }

    #[test]
    fn the_longer_the_time_the_fewer_pages_are_new() {
        let near = |a: f64, b: f64| assert!((a / b - 1.0).abs() < 1e-6, "{a} {b}");
        assert_eq!(writes(0, 0).within(3.0), 0.0);
        // New ones all the time; always the same ones; a square root; too few to tell.
        near(writes(1, 16).within(0.02), 0.002);
        near(writes(5, 5).within(7.0), 0.005);
        near(writes(10, 40).within(0.04), 0.02);
        near(writes(0, 8).within(0.02), 0.001);
        near(writes(500, 1000).within(100.0), 1.0);
    }

    #[test]
    fn what_a_precopy_leaves() {
        let counts = DumpCounts { processes: 1, threads: 1, mappings: 10, pages: 100_000, ..Default::default() };
        let plain = Amounts { counts, scanned: 100_000, copied: 100_500, shared: 500, tracked: false };
        let costs = Costs { copy_page: 1000.0, track_page: 10.0, ..Default::default() };
        let (idle, early) = writes(0, 0).after_precopy(&plain, &costs, 12, 0);
        assert_eq!((idle.counts.pages, idle.copied, early), (0, 500, 100_000));
        assert!(idle.tracked && idle.scanned == 100_000 && idle.counts.mappings == 10);
        let (busy, early) = writes(10, 160).after_precopy(&plain, &costs, 12, 3);
        assert!(busy.counts.pages > 10 && busy.counts.pages < 5000, "{busy:?}");
        assert_eq!(writes(0, 0).after_precopy(&plain, &costs, 12, 80).0.counts.pages, 80);
        assert!(early > 105_000 && busy.counts.ranges.abs_diff(busy.counts.pages / 2) <= 1, "{early} {busy:?}");
    }
}
