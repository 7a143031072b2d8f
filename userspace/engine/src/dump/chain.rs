//! The images that a session has made: their page stores, and how many there may be.

use super::trackings::Trackings;
use serde::{Deserialize, Serialize};
use standstill_images::store::{PageIndex, PageStoreIndex};
use std::path::PathBuf;
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

    /// If there are many stores, takes the newest of them out of the chain, and what they have is not known any more: to
    /// copy it again from memory costs less than to read it from the disk.
    ///
    /// A store goes only once those after it are half as large together, so that a page is copied again a logarithmic
    /// number of times.
    pub(super) fn shorten(&mut self, trackings: &mut Trackings) {
        if self.stores.len() < STORES {
            return;
        }
        let sizes: Vec<u64> = self.stores.iter().map(PageStoreIndex::pages).collect();
        let kept = suffix(&sizes);
        debug!(stores = self.stores.len() - kept, "page stores given up");
        self.stores.truncate(kept);
        let end = self.pages();
        trackings.known_mut().for_each(|known| known.forget_from(end));
    }
}

/// From which store on the stores are given up.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_stores_are_left_alone() {
        assert_eq!(suffix(&[1000, 1, 1, 1, 1, 1, 1, 1]), 1);
        assert_eq!(suffix(&[1000, 20, 1, 1, 1, 1, 1, 1]), 2);
        assert_eq!(suffix(&[8; 8]), 0);
        assert_eq!(suffix(&[0; 8]), 0);
    }
}
