//! Sets of addresses as ascending ranges that do not touch each other.

use crate::kernel::pagemap::Range;

/// Adds a range behind the others, to the last one if it begins where that ends or before.
pub(crate) fn push(set: &mut Vec<Range>, range: Range) {
    match set.last_mut() {
        Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
        _ if range.start < range.end => set.push(range),
        _ => {}
    }
}

/// What is in `a` and not in `b`.
pub(crate) fn subtract(a: &[Range], b: &[Range]) -> Vec<Range> {
    let mut left = Vec::new();
    let mut next = 0;
    for range in a {
        let mut start = range.start;
        while next < b.len() && b[next].end <= start {
            next += 1;
        }
        // The last one may reach into the next range of `a` as well.
        for hole in b[next..].iter().take_while(|hole| hole.start < range.end) {
            push(&mut left, Range { start, end: hole.start.max(start) });
            start = start.max(hole.end);
            next += usize::from(hole.end < range.end);
        }
        push(&mut left, Range { start: start.min(range.end), end: range.end });
    }
    left
}

/// What is in both.
pub(crate) fn intersect(a: &[Range], b: &[Range]) -> Vec<Range> {
    let mut both = Vec::new();
    let (mut a, mut b) = (a.iter().peekable(), b.iter().peekable());
    while let (Some(x), Some(y)) = (a.peek(), b.peek()) {
        push(&mut both, Range { start: x.start.max(y.start), end: x.end.min(y.end).max(x.start.max(y.start)) });
        if x.end < y.end {
            a.next();
        } else {
            b.next();
        }
    }
    both
}

/// Whether a range has anything in common with a set.
pub(crate) fn meet(set: &[Range], range: Range) -> bool {
    set.get(set.partition_point(|r| r.end <= range.start)).is_some_and(|r| r.start < range.end)
}

/// What is in one of them.
pub(crate) fn union(a: &[Range], b: &[Range]) -> Vec<Range> {
    set(a.iter().chain(b).copied().collect())
}

/// Ranges in any order, which may overlap.
pub(crate) fn set(mut ranges: Vec<Range>) -> Vec<Range> {
    // Most are the ascending ranges of two sets, which this sort notices.
    ranges.sort_by_key(|r| r.start);
    joined(ranges)
}

/// Ranges in the order of where they begin.
pub(crate) fn joined(ranges: impl IntoIterator<Item = Range>) -> Vec<Range> {
    let mut joined = Vec::new();
    ranges.into_iter().for_each(|range| push(&mut joined, range));
    joined
}

/// Bytes.
pub(crate) fn size(set: &[Range]) -> u64 {
    set.iter().map(|r| r.end - r.start).sum()
}

/// What is left without the first `bytes` bytes.
pub(crate) fn after(set: &[Range], mut bytes: u64) -> Vec<Range> {
    let rest = |range: &Range| {
        let passed = bytes.min(range.end - range.start);
        bytes -= passed;
        Range { start: range.start + passed, end: range.end }
    };
    set.iter().map(rest).filter(|range| range.start < range.end).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    pub(crate) fn sets() -> impl Strategy<Value = Vec<Range>> {
        proptest::collection::vec((1..4u64, 1..6u64), 0..12).prop_map(|parts| {
            let mut at = 0;
            parts
                .into_iter()
                .map(|(gap, length)| {
                    let start = at + gap;
                    at = start + length;
                    Range { start, end: at }
                })
                .collect()
        })
    }

    pub(crate) fn flat(set: &[Range]) -> BTreeSet<u64> {
        assert!(set.is_sorted_by(|a, b| a.end < b.start) && set.iter().all(|r| r.start < r.end), "{set:?}");
        set.iter().flat_map(|r| r.start..r.end).collect()
    }

    proptest! {
        #[test]
        fn ranges_are_sets(a in sets(), b in sets()) {
            let (x, y) = (flat(&a), flat(&b));
            prop_assert_eq!(flat(&subtract(&a, &b)), x.difference(&y).copied().collect::<BTreeSet<_>>());
            prop_assert_eq!(flat(&intersect(&a, &b)), x.intersection(&y).copied().collect::<BTreeSet<_>>());
            prop_assert_eq!(flat(&union(&a, &b)), x.union(&y).copied().collect::<BTreeSet<_>>());
            prop_assert_eq!(size(&a), x.len() as u64);
            for passed in 0..=x.len() {
                prop_assert_eq!(flat(&after(&a, passed as u64)), x.iter().skip(passed).copied().collect::<BTreeSet<_>>());
            }
        }
    }
}
