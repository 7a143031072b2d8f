//! Which pages of a process belong to it alone: found by few scans over many mappings, then sorted by mapping.

use crate::{
    error::{Context, Result},
    kernel::{
        PAGE,
        pagemap::{Pagemap, Range, Region},
    },
};
use standstill_images::types::{Backing, Vma};

/// What has to be copied of one address space.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct PrivatePages {
    pub pid: i32,
    /// Pages by address. No range is part of two mappings.
    pub ranges: Vec<Range>,
    /// Those of `ranges` that hide a file: without them its contents would show.
    pub over_files: Vec<Range>,
}

/// Mappings of up to so many bytes are scanned although nothing in them is wanted: a page table's worth takes less time
/// than a system call.
const PASSED_OVER: u64 = 512 * PAGE;

/// The private pages of a process with the mappings `vmas`, and its guards. `untouched`: which mappings have neither.
pub(super) fn find(pid: i32, vmas: &[Vma], untouched: &[bool]) -> Result<(PrivatePages, Vec<(u64, u64)>)> {
    let pagemap = Pagemap::open(pid).context(|| format!("open the pagemap of {pid}"))?;
    let mut regions = Vec::new();
    for span in spans(vmas, untouched) {
        pagemap.scan(span.start, span.end, &mut regions).context(|| format!("scan the pages of {pid}"))?;
    }
    Ok(split(pid, vmas, &regions))
}

/// Whether a mapping can have private pages.
fn is_private(vma: &Vma) -> bool {
    matches!(vma.backing, Backing::Anonymous { .. } | Backing::PrivateFile { .. })
}

/// Parts of the address space that hold all private mappings but the untouched ones, and of the others only small ones.
/// Gaps between mappings cost nothing.
fn spans(vmas: &[Vma], untouched: &[bool]) -> Vec<Range> {
    let mut all: Vec<Range> = Vec::new();
    let mut joined = false;
    for (vma, &untouched) in vmas.iter().zip(untouched) {
        if untouched || !is_private(vma) {
            joined &= vma.end - vma.start <= PASSED_OVER;
            continue;
        }
        match all.last_mut() {
            Some(last) if joined => last.end = vma.end,
            _ => all.push(Range { start: vma.start, end: vma.end }),
        }
        joined = true;
    }
    all
}

/// Sorts regions by the mappings they are in.
fn split(pid: i32, vmas: &[Vma], regions: &[Region]) -> (PrivatePages, Vec<(u64, u64)>) {
    let mut pages = PrivatePages { pid, ..Default::default() };
    let mut guards = Vec::new();
    let mut rest = regions;
    for vma in vmas.iter().filter(|v| is_private(v)) {
        while let [first, others @ ..] = rest
            && first.range.start < vma.end
        {
            let (start, end) = (first.range.start.max(vma.start), first.range.end.min(vma.end));
            if start < end {
                let range = Range { start, end };
                if first.guard {
                    push(&mut guards, vma.start, range);
                } else if !vma.flags.droppable {
                    // The kernel may drop the contents of droppable memory at any time: a dump is such a time.
                    push(&mut pages.ranges, vma.start, range);
                }
            }
            if first.range.end > vma.end {
                break; // the next mapping has a part of it, too
            }
            rest = others;
        }
        if matches!(vma.backing, Backing::PrivateFile { .. }) {
            let first = pages.ranges.partition_point(|r| r.start < vma.start);
            pages.over_files.extend_from_slice(&pages.ranges[first..]);
        }
    }
    (pages, guards.into_iter().map(|g| (g.start, g.end)).collect())
}

/// Adds a range, which may go on one of the same mapping: the kernel's buffer may have ended in between.
fn push(found: &mut Vec<Range>, mapping: u64, range: Range) {
    match found.last_mut() {
        Some(last) if last.end == range.start && range.start != mapping => last.end = range.end,
        _ => found.push(range),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::sys::Mapping;
    use proptest::prelude::*;
    use standstill_images::types::VmaFlags;

    /// A mapping of `pages` pages; `kind`: anonymous, droppable, private or shared file, the kernel's.
    fn vma(start: u64, pages: u64, kind: u8) -> Vma {
        let backing = match kind {
            0 | 1 => Backing::Anonymous { name: None },
            2 => Backing::PrivateFile { file: 0, offset: 0 },
            3 => Backing::SharedFile { file: 0, offset: 0 },
            _ => Backing::Kernel { name: (&b"[vvar]"[..]).into() },
        };
        let flags = VmaFlags { droppable: kind == 1, ..Default::default() };
        Vma { start, end: start + pages * PAGE, prot: 3, backing, flags }
    }

    fn range(start: u64, end: u64) -> Range {
        Range { start: start * PAGE, end: end * PAGE }
    }

    #[test]
    fn spans_leave_out_what_is_large_and_shared() {
        let at = |page: u64, pages, kind| vma(page * PAGE, pages, kind);
        let vmas = [at(0, 1, 0), at(5, 512, 3), at(600, 1, 2), at(601, 513, 3), at(2000, 1, 4), at(2001, 1, 0)];
        assert_eq!(spans(&vmas, &[false; 6]), [range(0, 601), range(2001, 2002)]);
        assert!(spans(&vmas[3..5], &[false; 2]).is_empty());
        assert_eq!(spans(&vmas, &[false, false, true, false, false, false]), [range(0, 1), range(2001, 2002)]);
    }

    #[test]
    fn guards_and_pages_of_live_memory() {
        const MADV_GUARD_INSTALL: i32 = 102;
        let area = Mapping::anonymous(8 * PAGE).unwrap();
        let start = area.start();
        area.bytes_mut()[..6 * PAGE as usize].fill(1);
        // SAFETY: the range is part of the mapping just made.
        let guarded = unsafe { libc::madvise((start + 4 * PAGE) as *mut _, PAGE as usize, MADV_GUARD_INSTALL) } == 0;
        let pid = std::process::id() as i32;
        // As if two mappings met in the middle.
        let (pages, guards) = find(pid, &[vma(start, 2, 2), vma(start + 2 * PAGE, 6, 0)], &[false; 2]).unwrap();
        let at = |from, to| Range { start: start + from * PAGE, end: start + to * PAGE };
        assert_eq!(pages.over_files, [at(0, 2)]);
        // Without guards in the kernel, or without its telling them apart, there is nothing to see.
        if guarded && !guards.is_empty() {
            assert_eq!(pages.ranges, [at(0, 2), at(2, 4), at(5, 6)]);
            assert_eq!(guards, [(start + 4 * PAGE, start + 5 * PAGE)]);
        }
    }

    /// Mappings with gaps between them, and for each page of the address space whether it is absent, held or a guard.
    fn layouts() -> impl Strategy<Value = (Vec<Vma>, Vec<u8>)> {
        let mappings = proptest::collection::vec((0..3u64, 1..6u64, 0..5u8), 0..12);
        (mappings, proptest::collection::vec(0..3u8, 100)).prop_map(|(mappings, pages)| {
            let mut at = 0;
            let place = |(gap, pages, kind): (u64, u64, u8)| {
                let start = at + gap * PAGE;
                at = start + pages * PAGE;
                vma(start, pages, kind)
            };
            (mappings.into_iter().map(place).collect(), pages)
        })
    }

    proptest! {
        #[test]
        fn each_page_is_found_once_and_in_its_mapping((vmas, pages) in layouts(), cut in 1..8u64) {
            // What a scan gives: neighbours that are alike are one region, unless a call ended between them.
            let mut regions: Vec<Region> = Vec::new();
            for (page, &kind) in (0u64..).zip(&pages).filter(|(_, k)| **k != 0) {
                let guard = kind == 2;
                match regions.last_mut() {
                    Some(last) if last.range.end == page * PAGE && last.guard == guard && page % cut != 0 => {
                        last.range.end += PAGE;
                    }
                    _ => regions.push(Region { range: range(page, page + 1), guard }),
                }
            }
            let (found, guards) = split(1, &vmas, &regions);
            let expected = |vma: &Vma, wanted: u8| -> Vec<Range> {
                let mut all: Vec<Range> = Vec::new();
                for page in vma.start / PAGE..vma.end / PAGE {
                    if pages[page as usize] == wanted {
                        match all.last_mut() {
                            Some(last) if last.end == page * PAGE => last.end += PAGE,
                            _ => all.push(range(page, page + 1)),
                        }
                    }
                }
                all
            };
            let of = |wanted: u8, filter: &dyn Fn(&&Vma) -> bool| -> Vec<Range> {
                vmas.iter().filter(|v| is_private(v)).filter(filter).flat_map(|v| expected(v, wanted)).collect()
            };
            prop_assert_eq!(found.ranges, of(1, &|v| !v.flags.droppable));
            prop_assert_eq!(found.over_files, of(1, &|v| matches!(v.backing, Backing::PrivateFile { .. })));
            let guards: Vec<Range> = guards.into_iter().map(|(start, end)| Range { start, end }).collect();
            prop_assert_eq!(guards, of(2, &|_| true));
        }
    }
}
