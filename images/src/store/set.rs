//! Sets of pages.

use super::PageIndex;
use std::ops::Range;

/// A set of pages, as ranges in their order that do not touch each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet(Vec<Range<PageIndex>>);

impl PageSet {
    /// All pages of these ranges, which may come in any order and overlap.
    pub fn new(ranges: impl IntoIterator<Item = Range<PageIndex>>) -> Self {
        let mut all: Vec<_> = ranges.into_iter().filter(|r| !r.is_empty()).collect();
        all.sort_unstable_by_key(|r| r.start);
        all.dedup_by(|next, last| {
            let joined = next.start <= last.end;
            if joined {
                last.end = last.end.max(next.end);
            }
            joined
        });
        Self(all)
    }

    /// The ranges.
    pub fn ranges(&self) -> &[Range<PageIndex>] {
        &self.0
    }

    /// How many pages there are.
    pub fn pages(&self) -> u64 {
        self.0.iter().map(|r| r.end - r.start).sum()
    }

    /// The parts of `range` that are in the set.
    pub fn within(&self, range: Range<PageIndex>) -> impl Iterator<Item = Range<PageIndex>> + '_ {
        let first = self.0.partition_point(|r| r.end <= range.start);
        let inside = self.0[first..].iter().take_while(move |r| r.start < range.end);
        inside.map(move |r| r.start.max(range.start)..r.end.min(range.end)).filter(|part| !part.is_empty())
    }

    /// The parts of `range` that are not in the set.
    pub fn gaps(&self, range: Range<PageIndex>) -> impl Iterator<Item = Range<PageIndex>> + '_ {
        let mut at = range.start;
        let end = range.end..range.end;
        self.within(range).chain([end]).filter_map(move |part| {
            let gap = at..part.start;
            at = part.end;
            (!gap.is_empty()).then_some(gap)
        })
    }

    /// Whether any page of `range` is in the set.
    pub fn overlaps(&self, range: Range<PageIndex>) -> bool {
        self.within(range).next().is_some()
    }

    /// Whether all pages of `other` are in the set.
    pub fn contains(&self, other: &Self) -> bool {
        other.0.iter().all(|range| self.gaps(range.clone()).next().is_none())
    }

    /// The pages that are in this set or in `other`.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        Self::new(self.0.iter().chain(&other.0).cloned())
    }

    /// First page and number of pages of each range, as records have them.
    pub fn to_pairs(&self) -> Vec<(PageIndex, u64)> {
        self.0.iter().map(|r| (r.start, r.end - r.start)).collect()
    }

    /// The set that such pairs describe; what goes beyond the last number that there is is cut off.
    pub fn from_pairs(pairs: &[(PageIndex, u64)]) -> Self {
        Self::new(pairs.iter().map(|&(first, pages)| first..first.saturating_add(pages)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, prelude::*};
    use std::collections::BTreeSet;

    fn pages(ranges: impl IntoIterator<Item = Range<u64>>) -> BTreeSet<u64> {
        ranges.into_iter().flatten().collect()
    }

    proptest! {
        #[test]
        fn a_set_has_the_pages_of_its_ranges(
            ranges in vec((0..40_u64, 0..9_u64), 0..12),
            others in vec((0..40_u64, 0..4_u64), 0..3),
            (at, length) in (0..50_u64, 0..30_u64),
        ) {
            let set = PageSet::from_pairs(&ranges);
            let all = pages(ranges.iter().map(|&(first, pages)| first..first + pages));
            prop_assert!(set.ranges().is_sorted_by(|a, b| a.end < b.start));
            prop_assert_eq!(pages(set.ranges().to_vec()), all.clone());
            prop_assert_eq!(set.pages(), all.len() as u64);
            prop_assert_eq!(PageSet::from_pairs(&set.to_pairs()), set.clone());
            let range = at..at + length;
            prop_assert_eq!(pages(set.within(range.clone())), all.range(range.clone()).copied().collect());
            prop_assert_eq!(pages(set.gaps(range.clone())), range.clone().filter(|p| !all.contains(p)).collect());
            prop_assert!(set.gaps(range.clone()).all(|r| !r.is_empty()));
            prop_assert_eq!(set.overlaps(range.clone()), all.range(range).next().is_some());
            let other = PageSet::from_pairs(&others);
            prop_assert_eq!(pages(set.union(&other).ranges().to_vec()), &all | &pages(other.ranges().to_vec()));
            prop_assert_eq!(set.contains(&other), pages(other.ranges().to_vec()).is_subset(&all));
        }
    }
}
