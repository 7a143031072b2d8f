//! Checksums of pages that are in the store. Memory that is written to everywhere between two images need not be protected
//! meanwhile, which costs its owner a page fault for each page: what has changed is found by reading it all, in the time of
//! somebody else.
//!
//! Two contents of a page with the same checksum would be taken for the same. With 128 bits that does not happen by
//! chance, and the seed, which nobody is told, leaves nothing to calculate them from (decision 64).

use super::ranges;
use crate::kernel::{PAGE, pagemap::Range};
use std::{
    collections::hash_map::RandomState,
    hash::{BuildHasher, Hasher},
    sync::LazyLock,
};
use twox_hash::XxHash3_128;

/// The checksum of a page; never 0.
pub(crate) fn sum(page: &[u8]) -> u128 {
    static SEED: LazyLock<u64> = LazyLock::new(|| RandomState::new().build_hasher().finish());
    XxHash3_128::oneshot_with_seed(*SEED, page).max(1)
}

/// The checksums of the pages in a part of the memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sums {
    range: Range,
    /// The part is not protected between two images.
    released: bool,
    /// 0: of a page that has none.
    sums: Vec<u128>,
}

impl Sums {
    /// Without any.
    pub(crate) fn new(range: Range) -> Self {
        Self { range, released: false, sums: vec![0; ((range.end - range.start) / PAGE) as usize] }
    }

    /// The part of the memory.
    pub(crate) fn range(&self) -> Range {
        self.range
    }

    /// Whether the part is not protected between two images.
    pub(crate) fn is_released(&self) -> bool {
        self.released
    }

    /// Decides how the next image finds what has changed in a part of so many pages, of which so many have since the last
    /// one. `None`: without checksums.
    ///
    /// To read and compare a page takes about 1 us of ours, and a fault 2 us of the target's. Of what was protected it is
    /// not known how many pages really have changed, because a huge page is written to as a whole. So the checksums of what
    /// is protected again are kept for once.
    pub(crate) fn next(self, changed: u64, pages: u64) -> Option<Self> {
        let limit = if self.released { pages / 8 } else { pages / 4 };
        let released = changed > limit;
        (released || self.released).then_some(Self { released, ..self })
    }

    fn index(&self, address: u64) -> usize {
        ((address - self.range.start) / PAGE) as usize
    }

    /// Whether the page at an address of the part has the checksum `sum`.
    pub(crate) fn is(&self, address: u64, sum: u128) -> bool {
        self.sums[self.index(address)] == sum
    }

    /// Notes the checksum of the page at an address of the part.
    pub(crate) fn set(&mut self, address: u64, sum: u128) {
        let index = self.index(address);
        self.sums[index] = sum;
    }

    /// Forgets those of all but the pages of a set.
    pub(crate) fn keep(&mut self, kept: &[Range]) {
        let kept = &kept[kept.partition_point(|range| range.end <= self.range.start)..];
        for range in ranges::subtract(&[self.range], kept) {
            let (start, end) = (self.index(range.start), self.index(range.end));
            self.sums[start..end].fill(0);
        }
    }

    /// Those pages of a set that have none.
    pub(crate) fn missing(&self, set: &[Range]) -> Vec<Range> {
        let set = ranges::intersect(set, &[self.range]);
        let pages = set.iter().flat_map(|range| (range.start..range.end).step_by(PAGE as usize));
        ranges::joined(pages.filter(|page| self.is(*page, 0)).map(|start| Range { start, end: start + PAGE }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::ranges::tests::{flat, sets};
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        /// Against a map.
        #[test]
        fn sums_are_of_the_pages_that_were_kept(steps in proptest::collection::vec((sets(), sets()), 1..6)) {
            let range = |start: u64, end: u64| Range { start: start * PAGE, end: end * PAGE };
            let mut sums = Sums::new(range(5, 40));
            let mut model = BTreeMap::new();
            for (n, (set, kept)) in (1_u128..).zip(steps) {
                let pages: Vec<u64> = flat(&set).into_iter().filter(|page| (5..40).contains(page)).collect();
                for page in pages {
                    sums.set(page * PAGE, n);
                    model.insert(page, n);
                }
                let all: Vec<Range> = kept.iter().map(|r| range(r.start, r.end)).collect();
                sums.keep(&all);
                model.retain(|page, _| flat(&kept).contains(page));
                let missing = ranges::intersect(&[range(0, 100)], &sums.missing(&[range(0, 100)]));
                for page in 5..40 {
                    let expected = model.get(&page).copied().unwrap_or(0);
                    prop_assert!(sums.is(page * PAGE, expected));
                    prop_assert_eq!(ranges::meet(&missing, range(page, page + 1)), expected == 0);
                }
            }
        }
    }

    #[test]
    fn what_is_written_to_everywhere_is_not_protected() {
        let new = Sums::new(Range { start: 0, end: 8 * PAGE });
        let decide = |sums: &Sums, changed| sums.clone().next(changed, 8).map(|sums| sums.is_released());
        assert_eq!((decide(&new, 2), decide(&new, 3)), (None, Some(true)));
        let released = new.next(3, 8).unwrap();
        assert_eq!((decide(&released, 2), decide(&released, 1)), (Some(true), Some(false)));
        // Protected again, but all of its huge page was written to.
        let protected = released.next(1, 8).unwrap();
        assert_eq!((decide(&protected, 8), decide(&protected, 2)), (Some(true), None));
    }

    #[test]
    fn the_sum_is_of_each_byte() {
        let mut page = vec![0; PAGE as usize];
        let zeros = sum(&page);
        for at in 0..page.len() {
            page[at] = 1;
            assert_ne!(sum(&page), zeros);
            page[at] = 0;
        }
        assert_eq!(sum(&page), zeros);
    }
}
