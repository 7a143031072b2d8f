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

/// Whether it is worth while to read a part of the memory in order to find what has changed in it, so many of so many pages
/// between two images. `already`: that is how they were found.
///
/// A page takes about 1 us of ours to read and compare, and a fault 2 us of the target's. The limits are apart so that a
/// part does not change sides each time, for which all of it has to be read once.
pub(crate) fn pay(changed: u64, pages: u64, already: bool) -> bool {
    changed > pages / if already { 8 } else { 4 }
}

/// The checksums of the pages in a part of the memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sums {
    range: Range,
    /// 0: of a page that has none.
    sums: Vec<u128>,
}

impl Sums {
    /// Without any.
    pub(crate) fn new(range: Range) -> Self {
        Self { range, sums: vec![0; ((range.end - range.start) / PAGE) as usize] }
    }

    /// The part of the memory.
    pub(crate) fn range(&self) -> Range {
        self.range
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
    fn memory_does_not_change_sides_each_time() {
        let pages = 80;
        assert!(!pay(20, pages, false) && pay(21, pages, false));
        assert!(!pay(10, pages, true) && pay(11, pages, true));
        assert!(!pay(0, 0, true));
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
