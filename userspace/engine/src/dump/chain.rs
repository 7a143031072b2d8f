//! The images that a session has made: their page stores, and how many there may be.

use super::trackings::Trackings;
use crate::{
    image::{self, merge::Moves},
    memory::known::Known,
};
use serde::{Deserialize, Serialize};
use standstill_images::store::{PageIndex, PageStoreIndex};
use std::{cmp::Reverse, ops::Range, path::PathBuf};
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

    /// If there are many stores, takes those out of the chain of which the fewest pages are still of use. These are not known
    /// any more: to copy them again from memory costs less than to read them from the disk.
    ///
    /// So small stores become large ones, and a page is copied again a logarithmic number of times.
    pub(super) fn shorten(&mut self, trackings: &mut Trackings) {
        if self.stores.len() < STORES {
            return;
        }
        let used = image::pages_of(trackings.known().flat_map(Known::runs));
        let mut end = 0;
        let ranges: Vec<_> = self
            .stores
            .iter()
            .map(|store| {
                let start = end;
                end += store.pages();
                start..end
            })
            .collect();
        let of_use = |range: &Range<PageIndex>| used.within(range.clone()).map(|part| part.end - part.start).sum();
        let kept = most(&ranges.iter().map(of_use).collect::<Vec<u64>>(), STORES / 2);
        debug!(stores = self.stores.len(), kept = kept.len(), "page stores given up");
        self.stores = kept.iter().map(|&n| self.stores[n].clone()).collect();
        let moves = Moves::keeping(kept.iter().map(|&n| ranges[n].clone()));
        trackings.known_mut().for_each(|known| known.renumber(|runs| moves.runs(runs)));
    }
}

/// Where the `count` greatest of some numbers are.
fn most(numbers: &[u64], count: usize) -> Vec<usize> {
    let mut places: Vec<usize> = (0..numbers.len()).collect();
    places.sort_by_key(|&n| Reverse(numbers[n]));
    places.truncate(count);
    places.sort_unstable();
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_of_use_stays() {
        assert_eq!(most(&[1000, 1, 7, 1, 0, 5, 6, 9], 4), [0, 2, 6, 7]);
        assert_eq!(most(&[3; 4], 2), [0, 1], "the older ones");
        assert_eq!(most(&[3], 2), [0]);
    }
}
