//! The images that a session has made: their page stores, and how many there may be.

use super::trackings::Trackings;
use crate::{error::Result, kernel::PAGE};
use serde::{Deserialize, Serialize};
use standstill_images::{
    ImageError,
    store::{PageIndex, PageReader, PageSet, PageStoreIndex, PageWriter},
    types::PageRun,
};
use std::{ops::Range, path::PathBuf};
use tracing::debug;

/// So many page stores are left alone.
const STORES: usize = 8;

/// Page stores of the last image, to which the known pages refer.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Chain {
    /// Oldest first.
    pub stores: Vec<PageStoreIndex>,
    /// Directory of the image.
    pub dir: PathBuf,
}

impl Chain {
    /// Number of the first page that the next store has.
    pub(super) fn pages(&self) -> PageIndex {
        self.stores.iter().map(PageStoreIndex::pages).sum()
    }

    /// If there are many stores, copies what is still of use in the newest of them to the next one, whose first pages
    /// these are, and takes them out of the chain. All stores must be in the image's directory. The number of the page
    /// that follows.
    ///
    /// A store is copied again only once those after it are half as large together, so that a page is copied a
    /// logarithmic number of times.
    pub(super) fn absorb(&mut self, trackings: &mut Trackings, writer: &mut PageWriter) -> Result<PageIndex> {
        if self.stores.len() < STORES {
            return Ok(self.pages());
        }
        let sizes: Vec<u64> = self.stores.iter().map(PageStoreIndex::pages).collect();
        let kept = suffix(&sizes);
        let old = self.stores.split_off(kept);
        let first = self.pages();
        let used = PageSet::new(trackings.known().flat_map(|known| stored(known.runs(), first)));
        let (mut start, mut moved) = (first, Vec::new());
        for index in &old {
            let range = start..start + index.pages();
            start = range.end;
            let local = |page: PageIndex| page - range.start;
            let live = PageSet::new(used.within(range.clone()).map(|r| local(r.start)..local(r.end)));
            let reader = PageReader::open(&self.dir.join(&index.file), index)?.only(&live);
            reader.in_order(|chunk, bytes| {
                for part in live.within(chunk..chunk + bytes.len() as u64 / PAGE) {
                    let at = |page: PageIndex| ((page - chunk) * PAGE) as usize;
                    let to = first + writer.append(&bytes[at(part.start)..at(part.end)])?;
                    moved.push((part.start + range.start..part.end + range.start, to));
                }
                Ok::<(), ImageError>(())
            })?;
        }
        trackings.known_mut().for_each(|known| known.renumber(|run| renumbered(run, first, &moved)));
        let next = first + moved.iter().map(|(r, _)| r.end - r.start).sum::<u64>();
        debug!(stores = old.len(), pages = next - first, "page stores joined");
        Ok(next)
    }
}

/// Pages of runs from `first` on.
fn stored(runs: &[PageRun], first: PageIndex) -> impl Iterator<Item = Range<PageIndex>> {
    runs.iter().map(move |r| r.store.max(first)..(r.store + r.pages).max(first)).filter(|r| !r.is_empty())
}

/// From which store on the stores are joined.
fn suffix(sizes: &[u64]) -> usize {
    let half = sizes.len() / 2;
    let mut total: u64 = sizes[half..].iter().sum();
    let small = sizes[..half].iter().rev().take_while(|&&size| {
        let small = size <= 2 * total;
        total += size;
        small
    });
    half - small.count()
}

/// A run of the chain as it was, in the chain as it is.
fn renumbered(run: PageRun, first: PageIndex, moved: &[(Range<PageIndex>, PageIndex)]) -> Vec<PageRun> {
    if run.store + run.pages <= first {
        return vec![run];
    }
    let (mut parts, mut store, end) = (Vec::new(), run.store, run.store + run.pages);
    let mut next = moved.partition_point(|(from, _)| from.end <= store);
    while store < end {
        let (until, to) = match moved.get(next) {
            _ if store < first => (first.min(end), store),
            Some((from, to)) => {
                next += 1;
                (from.end.min(end), to + (store - from.start))
            }
            None => break,
        };
        parts.push(PageRun { start: run.start + (store - run.store) * PAGE, pages: until - store, store: to });
        store = until;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::known;
    use proptest::prelude::*;

    #[test]
    fn large_stores_are_left_alone() {
        assert_eq!(suffix(&[1000, 1, 1, 1, 1, 1, 1, 1]), 1);
        assert_eq!(suffix(&[1000, 20, 1, 1, 1, 1, 1, 1]), 2);
        assert_eq!(suffix(&[8; 8]), 0);
        assert_eq!(suffix(&[0; 8]), 0);
    }

    proptest! {
        /// Pages that moved are found where they went, the others where they were.
        #[test]
        fn runs_are_renumbered(
            start in 0u64..30, pages in 1u64..30, first in 0u64..40, parts in proptest::collection::vec((0u64..2, 1u64..8), 1..12),
        ) {
            let (mut at, mut to, mut moved) = (first, 100, Vec::new());
            for (gap, length) in parts {
                moved.push((at + gap..at + gap + length, to));
                at += gap + length;
                to += length;
            }
            // All pages of a run from `first` on are among those that were moved.
            let end = moved.iter().fold(start.max(first), |end, (from, _)| if from.contains(&end) { from.end } else { end });
            let pages = pages.min(end - start).max(1);
            prop_assume!(start < first || end > start);
            let new = renumbered(PageRun { start: 0, pages, store: start }, first, &moved);
            for page in 0..pages {
                let old = start + page;
                let place = moved.iter().find(|(from, _)| from.contains(&old)).map(|(from, to)| to + old - from.start);
                prop_assert_eq!(known::find(&new, page * PAGE), if old < first { Some(old) } else { place });
            }
        }
    }
}
