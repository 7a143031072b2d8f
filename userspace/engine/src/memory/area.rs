//! Mappings as the search for pages sees them.

use super::smaps::Mapped;
use crate::kernel::{
    PAGE, hugetlb,
    pagemap::Range,
    proc::{self, MapLine},
};
use standstill_images::types::{Backing, Vma};
use std::{collections::HashMap, io};

/// Why a mapping is refused that the target tracks itself.
pub(crate) const REGISTERED: &str = "it is registered with userfaultfd: end that use, or the `watch --dirty` or `snapshot` of a tree it is in, before the dump";

/// A mapping, as far as its pages are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Area {
    pub range: Range,
    pub kind: Kind,
    /// It has certainly neither pages of its own nor guards.
    pub untouched: bool,
    /// Somebody tracks writes to it, as far as that was looked for.
    pub registered: bool,
    /// A fork lacks what is in it, as far as that was looked for.
    pub unforked: bool,
    /// A scan that does not look at each page pays.
    pub bulk: bool,
    /// Its pages are those of hugetlbfs.
    pub huge: bool,
}

const LARGE: u64 = 32 << 20;

/// Mappings of a process, of which some are looked at.
#[derive(Clone, Debug)]
pub(crate) struct View<'a> {
    /// All of them.
    pub areas: &'a [Area],
    /// Where those are that meet `range`.
    pub seen: std::ops::Range<usize>,
    /// What is looked at. It begins and ends between mappings or in large ones.
    range: Range,
}

impl<'a> View<'a> {
    /// Everything.
    pub(crate) fn all(areas: &'a [Area]) -> Self {
        Self { areas, seen: 0..areas.len(), range: Range { start: 0, end: u64::MAX } }
    }

    /// One view after the other: parts of large mappings with so many bytes each, and what is between those. Who copies what one shows before he looks at
    /// the next does not leave pages protected for long before they are copied, which others write to meanwhile.
    pub(crate) fn parts(areas: &'a [Area], bytes: u64) -> Vec<Self> {
        let large = areas.iter().filter(|area| area.is_private() && area.is_large());
        let edges =
            large.flat_map(|area| (area.range.start..area.range.end).step_by(bytes as usize).chain([area.range.end]));
        let mut edges: Vec<u64> = std::iter::once(0).chain(edges).chain([u64::MAX]).collect();
        edges.dedup();
        let part = |edges: &[u64]| {
            let range = Range { start: edges[0], end: edges[1] };
            let first = areas.partition_point(|area| area.range.end <= range.start);
            let end = areas.partition_point(|area| area.range.start < range.end);
            Self { areas, seen: first..end, range }
        };
        edges.windows(2).map(part).filter(|part| !part.seen.is_empty()).collect()
    }

    /// The memory in view, if it is part of one large anonymous mapping.
    pub(crate) fn of_one(&self) -> Option<Range> {
        let [area] = &self.areas[self.seen.clone()] else { return None };
        (area.kind == Kind::Anonymous && area.is_large()).then(|| self.clip(area.range))
    }

    /// What of a range is looked at.
    pub(crate) fn clip(&self, range: Range) -> Range {
        Range { start: range.start.max(self.range.start), end: range.end.min(self.range.end) }
    }

    /// What is looked at of mappings that follow each other.
    pub(crate) fn whole(&self, span: &[Area]) -> Range {
        self.clip(Range { start: span[0].range.start, end: span[span.len() - 1].range.end })
    }

    /// The mappings as far as they are looked at.
    pub(crate) fn clipped(&self) -> Vec<Area> {
        self.areas[self.seen.clone()].iter().map(|area| Area { range: self.clip(area.range), ..*area }).collect()
    }
}

/// Kinds of mappings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Private memory without a file.
    Anonymous,
    /// Private memory that the kernel may empty at any time: a dump is such a time.
    Droppable,
    /// Private memory over a file.
    File,
    /// Shared, or the kernel's.
    Other,
}

impl Area {
    pub(super) fn new(range: Range, kind: Kind, untouched: bool, registered: bool) -> Self {
        let bulk = kind == Kind::Anonymous && range.end - range.start >= 256 * PAGE;
        Self { range, kind, untouched, registered, unforked: false, bulk, huge: false }
    }

    /// The mappings of a process that runs. Huge pages are looked at under the freeze only (decision 42).
    pub(crate) fn of_running(pid: i32) -> io::Result<Vec<Self>> {
        let maps = proc::maps(pid)?;
        // Whether the files of a device are hugetlbfs's. Those of a mapping that is gone again may have been.
        let mut devices: HashMap<&str, bool> = HashMap::new();
        let mut areas = Vec::with_capacity(maps.len());
        for line in &maps {
            let mut area = Self::from(line);
            if area.kind == Kind::File {
                let link = || proc::path(pid, &format!("map_files/{:x}-{:x}", line.start, line.end));
                let is_huge = || !matches!(hugetlb::page_size_at(&link()), Ok(None));
                if *devices.entry(&line.dev).or_insert_with(is_huge) {
                    area.kind = Kind::Other;
                }
            }
            areas.push(area);
        }
        Ok(areas)
    }

    /// Large enough to be looked at alone and in parts: a look that protects its pages asks once instead of twice, and for
    /// that nothing is known of it if it is another mapping meanwhile.
    pub(crate) fn is_large(&self) -> bool {
        self.range.end - self.range.start >= LARGE
    }

    pub(crate) fn is_private(&self) -> bool {
        self.kind != Kind::Other
    }

    /// Of a mapping as it was recorded and as the kernel shows it.
    pub(super) fn of(vma: &Vma, map: &Mapped) -> Self {
        let kind = match vma.backing {
            Backing::Anonymous { .. } if vma.flags.droppable => Kind::Droppable,
            Backing::Anonymous { .. } => Kind::Anonymous,
            Backing::PrivateFile { .. } => Kind::File,
            // The file behind memory without a name is empty.
            Backing::HugePages { shared: false, .. } if map.name.starts_with(b"/anon_hugepage") => Kind::Anonymous,
            Backing::HugePages { shared: false, .. } => Kind::File,
            _ => Kind::Other,
        };
        let range = Range { start: vma.start, end: vma.end };
        let huge = map.has(b"ht");
        let unforked = vma.flags.dontfork || vma.flags.wipeonfork || huge;
        let area = Self::new(range, kind, map.untouched, map.has(b"uw"));
        Self { unforked, huge, bulk: area.bulk && !huge, ..area }
    }
}

/// But for huge pages, which a line does not tell from those of other files.
impl From<&MapLine> for Area {
    fn from(line: &MapLine) -> Self {
        let kernels = ["[vdso]", "[vsyscall]", "[uprobes]", "[vectors]"].contains(&line.name.as_str());
        let kind = match line.shared || kernels || line.name.starts_with("[vvar") {
            true => Kind::Other,
            false if line.ino != 0 => Kind::File,
            false => Kind::Anonymous,
        };
        Self::new(Range { start: line.start, end: line.end }, kind, false, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::ranges;
    use proptest::prelude::*;

    proptest! {
        /// All views together show each mapping once, small ones uncut, and of large ones not much at a time.
        #[test]
        fn parts_are_the_whole(sizes in proptest::collection::vec((0..3u64, 1..5u64, any::<bool>()), 0..12)) {
            const STEP: u64 = LARGE / 2;
            let mut at = 0;
            let areas: Vec<Area> = sizes
                .iter()
                .map(|(gap, steps, shared)| {
                    let start = at + gap * PAGE;
                    at = start + steps * STEP;
                    let kind = if *shared { Kind::Other } else { Kind::Anonymous };
                    Area::new(Range { start, end: at }, kind, false, false)
                })
                .collect();
            let parts = View::parts(&areas, STEP);
            let shown: Vec<Area> = parts.iter().flat_map(View::clipped).collect();
            let joined = |areas: &[Area]| ranges::joined(areas.iter().map(|area| area.range));
            let size = |areas: &[Area]| areas.iter().map(|area| area.range.end - area.range.start).sum::<u64>();
            prop_assert_eq!(joined(&shown), joined(&areas));
            prop_assert_eq!(size(&shown), size(&areas));
            for area in areas.iter().filter(|area| !area.is_private() || !area.is_large()) {
                prop_assert_eq!(shown.iter().filter(|part| *part == area).count(), 1, "{:?}", area);
            }
            for part in &parts {
                let large: Vec<Area> = part.clipped().into_iter().filter(|a| !areas.contains(a)).collect();
                prop_assert!(size(&large) <= STEP);
            }
        }
    }
}
