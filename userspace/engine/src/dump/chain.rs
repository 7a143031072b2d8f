//! The images that a session has made: their page stores, and how many there may be.

use super::trackings::Trackings;
use crate::{
    error::Result,
    image::{
        self, Store,
        merge::{self, Moves},
    },
    memory::known::Known,
};
use serde::{Deserialize, Serialize};
use standstill_images::{
    publish::ImageDir,
    store::{PageIndex, PageStoreIndex, PageWriter},
};
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
        let all = image::locate(&ImageDir::open(&self.dir)?, self.stores.clone())?;
        let kept = suffix(&all.iter().map(|store| store.pages).collect::<Vec<u64>>());
        let used = image::pages_of(trackings.known().flat_map(Known::runs));
        let (kept, joined): (Vec<&Store>, Vec<&Store>) = (all[..kept].iter().collect(), all[kept..].iter().collect());
        for store in &joined {
            merge::copy(store, &used, writer, |_| ())?;
        }
        let moves = Moves::new(&kept, &joined, &used);
        trackings.known_mut().for_each(|known| known.renumber(|runs| moves.runs(runs)));
        self.stores.truncate(kept.len());
        debug!(stores = joined.len(), pages = moves.written, "page stores joined");
        Ok(self.pages() + moves.written)
    }
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
