//! What of an address space is in the store already, and true as long as nobody writes to it.

use super::{ranges, sums::Sums};
use crate::{
    image::push_run,
    kernel::{PAGE, pagemap::Range},
};
use serde::{Deserialize, Serialize};
use standstill_images::types::PageRun;

/// Pages whose contents are known.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Known {
    /// All of them.
    covered: Vec<Range>,
    /// Where the store has them, by address; those that hold only zeros are not there.
    runs: Vec<PageRun>,
    /// Of memory that is not protected between two images: its pages are known to be what the store has if they have these
    /// checksums, which without whoever made them are of no use.
    #[serde(skip)]
    sums: Vec<Sums>,
}

impl Known {
    /// All known pages.
    pub(crate) fn covered(&self) -> &[Range] {
        &self.covered
    }

    /// Where the pages are.
    pub(crate) fn runs(&self) -> &[PageRun] {
        &self.runs
    }

    /// The checksums of the pages in this range, if it is one for which there are any.
    pub(crate) fn sums(&self, range: Range) -> Option<&Sums> {
        self.sums.iter().find(|sums| sums.range() == range)
    }

    /// The ranges for which there are checksums.
    pub(crate) fn summed(&self) -> impl Iterator<Item = Range> {
        self.sums.iter().map(Sums::range)
    }

    /// The checksums of known pages, instead of all that there were.
    pub(crate) fn set_sums(&mut self, sums: Vec<Sums>) {
        self.sums = sums;
    }

    /// Forgets all but `kept`, which are known.
    pub(crate) fn keep(&mut self, kept: Vec<Range>) {
        if kept != self.covered {
            self.sums.iter_mut().for_each(|sums| sums.keep(&kept));
            self.runs = cut(&self.runs, &kept);
            self.covered = kept;
        }
    }

    /// Adds pages that were not known; `runs` says where those are that hold something.
    pub(crate) fn learn(&mut self, pages: &[Range], runs: Vec<PageRun>) {
        self.covered = ranges::union(&self.covered, pages);
        self.runs = merge(std::mem::take(&mut self.runs), runs);
    }

    /// The pages are at other places of the store, as `moved` says; those that it leaves out are forgotten.
    pub(crate) fn renumber(&mut self, moved: impl Fn(&[PageRun]) -> Vec<PageRun>) {
        let pages = |runs: &[PageRun]| {
            ranges::joined(runs.iter().map(|run| Range { start: run.start, end: run.start + run.pages * PAGE }))
        };
        let before = pages(&self.runs);
        self.runs = moved(&self.runs);
        let forgotten = ranges::subtract(&before, &pages(&self.runs));
        self.covered = ranges::subtract(&self.covered, &forgotten);
    }
}

/// Runs of different pages, by address.
pub(crate) fn merge(a: Vec<PageRun>, b: Vec<PageRun>) -> Vec<PageRun> {
    let mut all = Vec::with_capacity(a.len() + b.len());
    let (mut a, mut b) = (a.into_iter().peekable(), b.into_iter().peekable());
    loop {
        let next = match (a.peek(), b.peek()) {
            (Some(x), Some(y)) if x.start < y.start => a.next(),
            (_, Some(_)) => b.next(),
            _ => a.next(),
        };
        let Some(run) = next else { return all };
        push_run(&mut all, run);
    }
}

/// Where the page at an address is.
pub(crate) fn find(runs: &[PageRun], address: u64) -> Option<u64> {
    let run = runs.get(runs.partition_point(|r| r.start + r.pages * PAGE <= address))?;
    (run.start <= address).then(|| run.store + (address - run.start) / PAGE)
}

/// The parts of runs that are in a set.
fn cut(runs: &[PageRun], set: &[Range]) -> Vec<PageRun> {
    let mut all = Vec::with_capacity(runs.len());
    let mut next = 0;
    for run in runs {
        let end = run.start + run.pages * PAGE;
        while next < set.len() && set[next].end <= run.start {
            next += 1;
        }
        for range in set[next..].iter().take_while(|r| r.start < end) {
            let (start, end) = (range.start.max(run.start), range.end.min(end));
            push_run(
                &mut all,
                PageRun { start, pages: (end - start) / PAGE, store: run.store + (start - run.start) / PAGE },
            );
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        image::merge::Moves,
        memory::ranges::tests::{flat, sets},
    };
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// In bytes instead of pages.
    fn bytes(set: &[Range]) -> Vec<Range> {
        set.iter().map(|r| Range { start: r.start * PAGE, end: r.end * PAGE }).collect()
    }

    proptest! {
        /// A sequence of rounds: some pages change or vanish, others are copied, every third of which are zeros.
        #[test]
        fn knowledge_is_what_was_last_copied(rounds in proptest::collection::vec((sets(), sets(), (0..100u64, 0..40u64)), 1..6)) {
            let mut known = Known::default();
            let mut model: BTreeMap<u64, Option<u64>> = BTreeMap::new();
            let mut store = 0;
            for (gone, copied, kept) in rounds {
                // A part of the store is given up, mostly nothing that is known.
                let (first, end) = (kept.0 * 4, kept.0 * 4 + kept.1);
                let moves = Moves::keeping([0..first, end..u64::MAX]);
                known.renumber(|runs| moves.runs(runs));
                model.retain(|_, place| place.is_none_or(|place| !(first..end).contains(&place)));
                let moved = |place: u64| if place < first { place } else { place - (end - first) };
                model.values_mut().flatten().for_each(|place| *place = moved(*place));
                known.keep(ranges::subtract(known.covered(), &bytes(&gone)));
                model.retain(|page, _| !flat(&gone).contains(page));
                let copied = ranges::subtract(&bytes(&copied), known.covered());
                let mut runs = Vec::new();
                for page in copied.iter().flat_map(|r| r.start / PAGE..r.end / PAGE) {
                    if page % 3 == 0 {
                        model.insert(page, None);
                        continue;
                    }
                    push_run(&mut runs, PageRun { start: page * PAGE, pages: 1, store });
                    model.insert(page, Some(store));
                    store += 1;
                }
                known.learn(&copied, runs);
                let covered: Vec<u64> = known.covered().iter().flat_map(|r| r.start / PAGE..r.end / PAGE).collect();
                prop_assert_eq!(covered, model.keys().copied().collect::<Vec<_>>());
                for page in 0..100 {
                    let place = model.get(&page).copied().flatten();
                    prop_assert_eq!(find(known.runs(), page * PAGE), place);
                }
                prop_assert!(known.runs().is_sorted_by(|a, b| a.start + a.pages * PAGE <= b.start));
            }
        }
    }
}
