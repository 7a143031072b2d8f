//! Which pages hold what: PAGEMAP_SCAN (Linux 6.7) and the page frame numbers of `/proc/<pid>/pagemap`.
//!
//! Kernel doc: Documentation/admin-guide/mm/pagemap.rst.

use super::PAGE;
use crate::parallel;
use serde::{Deserialize, Serialize};
use std::{fs::File, io, num::NonZero, os::fd::AsRawFd, os::unix::fs::FileExt, thread};

/// Not protected against writing by a userfaultfd, or written to since.
const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;
/// Page guarded by MADV_GUARD_INSTALL; reported since Linux 6.16.
const PAGE_IS_GUARD: u64 = 1 << 8;
/// Protects what is found against writing.
const PM_SCAN_WP_MATCHING: u64 = 1;
/// Fails where that is not possible, instead of leaving it out.
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

#[repr(C)]
#[derive(Default)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

nix::ioctl_readwrite!(pagemap_scan, b'f', 16, PmScanArg);

/// A range of addresses of whole pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Range {
    pub start: u64,
    pub end: u64,
}

/// Pages that are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    pub range: Range,
    /// The pages are guards, not memory.
    pub guard: bool,
}

impl Region {
    fn new(found: &PageRegion) -> Self {
        let range = Range { start: found.start, end: found.end };
        Self { range, guard: found.categories & PAGE_IS_GUARD != 0 }
    }
}

/// Which pages a scan is for: those with all of some categories, and at least one of some others if there are any.
#[derive(Clone, Copy, Default)]
struct Wanted {
    flags: u64,
    /// Categories that are meant to be absent.
    inverted: u64,
    all_of: u64,
    any_of: u64,
    /// Categories that are told; pages with the same ones are one region.
    told: u64,
}

/// What a scan for written pages does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Writes {
    /// Looks.
    Seen,
    /// Looks, and fails with EPERM where a mapping is not registered with a userfaultfd.
    Tracked,
    /// The same, and protects pages from now on. What is absent is not marked: what comes there is not protected.
    Reset,
    /// The same, and marks what is absent in page tables, which are memory of the process.
    ResetAll,
}

impl Writes {
    fn flags(self) -> u64 {
        match self {
            Self::Seen => 0,
            Self::Tracked => PM_SCAN_CHECK_WPASYNC,
            Self::Reset | Self::ResetAll => PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
        }
    }
}

/// Regions asked for at once. The kernel gathers as many before it gives them; asked for more, it gathers again, and
/// when it reaches the end then it still says that it came as far as the first time (`walk_end`).
const REGIONS: usize = 512;

/// It costs less to read what the page table says of so many bytes more than to make another system call.
pub(crate) const NEAR: u64 = 16 * PAGE;

/// The page tables of a process.
pub(crate) struct Pagemap {
    file: File,
    threads: usize,
}

/// Parts begin at multiples of this, which no page reaches over.
const HUGE_PAGE: u64 = 2 << 20;

/// Mapped bytes from which on a thread of its own is worth while.
const WORTH_A_THREAD: u64 = 256 << 20;

/// The same for mappings, each of which takes as long as tens of pages.
const MAPPINGS_WORTH_A_THREAD: usize = 1000;

/// Threads for a scan at most.
const SCANNERS: usize = 8;

/// Threads for scans while nobody else needs the processors.
pub(crate) fn scanners() -> usize {
    thread::available_parallelism().map_or(1, NonZero::get).min(SCANNERS)
}

/// What scanning a mapping takes, in bytes.
fn work(mapping: &Range) -> u64 {
    mapping.end - mapping.start + WORTH_A_THREAD / MAPPINGS_WORTH_A_THREAD as u64
}

/// In how many parts mappings are scanned by `threads` threads.
pub(crate) fn parts(mapped: &[Range], threads: usize) -> usize {
    let worth = mapped.iter().map(work).sum::<u64>() / WORTH_A_THREAD;
    threads.min(worth as usize).max(1)
}

/// Where a range is cut so that the parts take about as long, one for each of `threads` at most.
fn edges(range: Range, mapped: &[Range], threads: usize) -> Vec<u64> {
    let all: u64 = mapped.iter().map(work).sum();
    let parts = parts(mapped, threads) as u64;
    let mut edges = vec![range.start];
    let mut done = 0;
    for m in mapped {
        while (edges.len() as u64) < parts && all * edges.len() as u64 / parts < done + work(m) {
            let within = (all * edges.len() as u64 / parts).saturating_sub(done);
            edges.push((m.start + within).next_multiple_of(HUGE_PAGE).min(m.end));
        }
        done += work(m);
    }
    edges.push(range.end);
    edges
}

impl Pagemap {
    /// `/proc/<pid>/pagemap`.
    pub(crate) fn open(pid: i32) -> io::Result<Self> {
        Ok(Self { file: File::open(super::proc::path(pid, "pagemap"))?, threads: 1 })
    }

    /// Large ranges are scanned by so many threads.
    #[must_use]
    pub(crate) fn with_threads(self, threads: usize) -> Self {
        Self { threads, ..self }
    }

    /// Scans the parts of a range that holds much memory or many mappings at the same time. `mapped`: the mappings in it,
    /// ascending; none if it is one itself.
    fn in_parts<T: Send>(
        &self,
        range: Range,
        mapped: &[Range],
        found: &mut Vec<T>,
        scan: impl Fn(Range, &mut Vec<T>) -> io::Result<()> + Sync,
    ) -> io::Result<()> {
        let edges = edges(range, if mapped.is_empty() { std::slice::from_ref(&range) } else { mapped }, self.threads);
        let parts: Vec<Range> = edges.windows(2).map(|edge| Range { start: edge[0], end: edge[1] }).collect();
        if parts.len() < 2 {
            return scan(range, found);
        }
        let part = |part: &Range| {
            let mut found = Vec::new();
            scan(*part, &mut found).map(|()| found)
        };
        parallel::map(&parts, parts.len(), part)?.into_iter().for_each(|part| found.extend(part));
        Ok(())
    }

    /// Pages of a range that exist nowhere but in this address space (anonymous, present or swapped, not the zero page),
    /// and those guarded with MADV_GUARD_INSTALL; ascending, without regard to where mappings begin and end.
    ///
    /// Kernels before 6.16 do not tell guards apart: there they are private pages. `mapped`: the mappings
    /// in the range, ascending; none if it is one itself.
    pub(crate) fn private(&self, range: Range, mapped: &[Range], found: &mut Vec<Region>) -> io::Result<()> {
        self.in_parts(range, mapped, found, |range, found| self.private_part(range, found))
    }

    fn private_part(&self, range: Range, found: &mut Vec<Region>) -> io::Result<()> {
        let without = PAGE_IS_FILE | PAGE_IS_PFNZERO;
        self.guards_apart(|guard| {
            let any_of = PAGE_IS_PRESENT | PAGE_IS_SWAPPED | guard;
            // Guards look like swapped pages, but for this.
            let told = PAGE_IS_SWAPPED | guard;
            let wanted = Wanted { inverted: without, all_of: without, any_of, told, ..Default::default() };
            self.scan_marks_apart(range, wanted, false, found)
        })
    }

    /// Pages of mappings in a range of anonymous memory that hold nothing: absent, the zero page, or guards. Takes a
    /// tenth of the time of [`Self::private`], because no page has to be looked at.
    pub(crate) fn empty(&self, range: Range, found: &mut Vec<Region>) -> io::Result<()> {
        self.in_parts(range, &[], found, |range, found| self.empty_part(range, found))
    }

    fn empty_part(&self, range: Range, found: &mut Vec<Region>) -> io::Result<()> {
        self.guards_apart(|guard| {
            let any_of = PAGE_IS_PRESENT | PAGE_IS_PFNZERO;
            let told = PAGE_IS_SWAPPED | guard;
            let wanted = Wanted { inverted: PAGE_IS_PRESENT, any_of, told, ..Default::default() };
            self.scan_marks_apart(range, wanted, true, found)
        })
    }

    /// Pages of a range that are not protected against writing, or were written to since; but for [`Writes::Reset`] also those
    /// of which there is nothing but a page table. `mapped`: the mappings in the range, ascending; none if
    /// it is one itself.
    pub(crate) fn written(
        &self,
        range: Range,
        mapped: &[Range],
        writes: Writes,
        found: &mut Vec<Range>,
    ) -> io::Result<()> {
        // Without another condition the kernel has a shorter way.
        let any_of = if writes == Writes::Reset { PAGE_IS_PRESENT | PAGE_IS_SWAPPED } else { 0 };
        let (all_of, told) = (PAGE_IS_WRITTEN, PAGE_IS_WRITTEN);
        let wanted = Wanted { flags: writes.flags(), all_of, any_of, told, ..Default::default() };
        self.in_parts(range, mapped, found, |range, found| {
            self.scan(range, wanted, |r| found.push(Range { start: r.start, end: r.end }))
        })
    }

    /// The same for private mappings of files: without pages that are the file's.
    pub(crate) fn written_over_files(&self, range: Range, writes: Writes, found: &mut Vec<Range>) -> io::Result<()> {
        let wanted = Wanted {
            flags: writes.flags(),
            inverted: PAGE_IS_FILE,
            all_of: PAGE_IS_FILE | PAGE_IS_WRITTEN,
            any_of: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            ..Default::default()
        };
        self.scan(range, wanted, |r| found.push(Range { start: r.start, end: r.end }))
    }

    /// Pages of a mapping of which the page table says nothing: neither a page, nor that it is swapped or protected.
    pub(crate) fn blank(&self, range: Range, found: &mut Vec<Range>) -> io::Result<()> {
        self.without(range, PAGE_IS_PRESENT | PAGE_IS_SWAPPED, found)
    }

    /// Pages of a range that are not mapped.
    pub(crate) fn absent(&self, range: Range, found: &mut Vec<Range>) -> io::Result<()> {
        self.without(range, PAGE_IS_PRESENT, found)
    }

    fn without(&self, range: Range, categories: u64, found: &mut Vec<Range>) -> io::Result<()> {
        let wanted = Wanted { inverted: categories, all_of: categories, ..Default::default() };
        self.in_parts(range, &[], found, |range, found| {
            self.scan(range, wanted, |r| found.push(Range { start: r.start, end: r.end }))
        })
    }

    /// Scans for regions that tell swapped pages and guards; of the swapped ones it gives those that are marks only, or those
    /// that are not.
    fn scan_marks_apart(&self, range: Range, wanted: Wanted, marks: bool, found: &mut Vec<Region>) -> io::Result<()> {
        let first = found.len();
        let mut swapped: Vec<Range> = Vec::new();
        self.scan(range, wanted, |r| match r.categories & wanted.told == PAGE_IS_SWAPPED {
            true => swapped.push(Range { start: r.start, end: r.end }),
            false => found.push(Region::new(r)),
        })?;
        for near in swapped.chunk_by(|a, b| b.start - a.end <= NEAR) {
            self.swapped(near, |range, mark| {
                if mark == marks {
                    found.push(Region { range, guard: false });
                }
            })?;
        }
        found[first..].sort_by_key(|region| region.range.start);
        Ok(())
    }

    /// Tells swapped pages from the marks that say of absent pages that they are protected against writing, which scans
    /// do not: those have the last of the swap types, where the kernel keeps what is no swap. Those of huge pages, which
    /// are never swapped, have nothing but the mark.
    fn swapped(&self, regions: &[Range], mut part: impl FnMut(Range, bool)) -> io::Result<()> {
        const TYPE: u64 = 0x1f;
        const PROTECTED: u64 = 1 << 57;
        let is_mark = |entry: u64| entry & TYPE == TYPE || entry == PROTECTED;
        let (Some(first), Some(last)) = (regions.first(), regions.last()) else { return Ok(()) };
        let entries = self.entries(first.start, (last.end - first.start) / PAGE)?;
        for start in regions.iter().flat_map(|r| (r.start..r.end).step_by(PAGE as usize)) {
            let entry = entries[((start - first.start) / PAGE) as usize];
            part(Range { start, end: start + PAGE }, is_mark(entry));
        }
        Ok(())
    }

    /// Scans with PAGE_IS_GUARD, or without where the kernel does not know it.
    fn guards_apart(&self, mut scan: impl FnMut(u64) -> io::Result<()>) -> io::Result<()> {
        match scan(PAGE_IS_GUARD) {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => scan(0),
            other => other,
        }
    }

    fn scan(&self, range: Range, wanted: Wanted, mut found: impl FnMut(&PageRegion)) -> io::Result<()> {
        let mut regions = vec![PageRegion::default(); REGIONS];
        let mut at = range.start;
        while at < range.end {
            let mut arg = PmScanArg {
                size: size_of::<PmScanArg>() as u64,
                flags: wanted.flags,
                start: at,
                end: range.end,
                vec: regions.as_mut_ptr() as u64,
                vec_len: regions.len() as u64,
                category_inverted: wanted.inverted,
                category_mask: wanted.all_of,
                category_anyof_mask: wanted.any_of,
                return_mask: wanted.told,
                ..Default::default()
            };
            // SAFETY: `arg` has the size it states, and `vec` is writable for `vec_len` regions.
            let n = unsafe { pagemap_scan(self.file.as_raw_fd(), &raw mut arg) }? as usize;
            regions[..n].iter().for_each(&mut found);
            if arg.walk_end <= at {
                // It stands before a huge page of 1 GiB, of which it can protect no part.
                return Err(io::Error::from_raw_os_error(libc::EPERM));
            }
            at = arg.walk_end;
        }
        Ok(())
    }

    /// Page frame numbers of `pages` pages from `start`; 0 for pages without a frame. Needs CAP_SYS_ADMIN: without it
    /// the kernel gives zeros.
    pub(crate) fn frames(&self, start: u64, pages: u64) -> io::Result<Vec<u64>> {
        const PRESENT: u64 = 1 << 63;
        const FRAME: u64 = (1 << 55) - 1;
        let frame = |entry: u64| if entry & PRESENT != 0 { entry & FRAME } else { 0 };
        Ok(self.entries(start, pages)?.into_iter().map(frame).collect())
    }

    /// Which of the `pages` pages from `start` on are present and mapped nowhere else.
    pub(crate) fn exclusive(&self, start: u64, pages: u64) -> io::Result<Vec<bool>> {
        const EXCLUSIVE: u64 = 1 << 56;
        Ok(self.entries(start, pages)?.iter().map(|entry| entry & EXCLUSIVE != 0).collect())
    }

    /// What the file has for `pages` pages from `start`.
    fn entries(&self, start: u64, pages: u64) -> io::Result<Vec<u64>> {
        let mut bytes = vec![0u8; pages as usize * 8];
        self.file.read_exact_at(&mut bytes, start / PAGE * 8).map_err(|e| match e.kind() {
            // The file of a process that has ended is empty.
            io::ErrorKind::UnexpectedEof => io::Error::from_raw_os_error(libc::ESRCH),
            _ => e,
        })?;
        Ok(bytes.chunks_exact(8).map(|b| u64::from_ne_bytes(b.try_into().expect("chunks of eight"))).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_pages_are_found_and_untouched_ones_are_not() {
        let pages = 16u64;
        let area = crate::kernel::sys::Mapping::anonymous(pages * PAGE).unwrap();
        area.bytes_mut()[3 * PAGE as usize] = 1;
        area.bytes_mut()[4 * PAGE as usize] = 1;
        assert_eq!(area.bytes_mut()[9 * PAGE as usize], 0, "a read maps the zero page");
        let map = Pagemap::open(std::process::id() as i32).unwrap();
        let mut found = Vec::new();
        map.private(Range { start: area.start(), end: area.start() + pages * PAGE }, &[], &mut found).unwrap();
        let range = Range { start: area.start() + 3 * PAGE, end: area.start() + 5 * PAGE };
        assert_eq!(found, [Region { range, guard: false }]);
        let frames = map.frames(area.start(), pages).unwrap();
        assert_eq!(frames[0], 0);
    }

    #[test]
    fn more_regions_than_one_call_returns() {
        for pages in [1000, 1023, 1024, 1025, 1200, 1900, 2050, 3000, 5000] {
            scattered(pages);
        }
    }

    fn scattered(pages: u64) {
        let area = crate::kernel::sys::Mapping::anonymous(pages * PAGE).unwrap();
        // A huge page would fill the gaps.
        // SAFETY: the range is the mapping just made.
        unsafe { libc::madvise(area.start() as *mut _, (pages * PAGE) as usize, libc::MADV_NOHUGEPAGE) };
        for page in (0..pages).step_by(2) {
            area.bytes_mut()[(page * PAGE) as usize] = 1;
        }
        let mut found = Vec::new();
        let map = Pagemap::open(std::process::id() as i32).unwrap();
        map.private(Range { start: area.start(), end: area.start() + pages * PAGE }, &[], &mut found).unwrap();
        let starts: Vec<u64> = found.iter().map(|r| (r.range.start - area.start()) / PAGE).collect();
        assert_eq!(starts, (0..pages).step_by(2).collect::<Vec<u64>>());
    }

    #[test]
    fn several_threads_find_the_same() {
        let length = 3 * WORTH_A_THREAD + 7 * PAGE;
        let area = crate::kernel::sys::Mapping::anonymous(length).unwrap();
        // Some of them at the edges of the parts.
        for at in (0..length / PAGE).step_by(16 * 1024 - 1) {
            area.bytes_mut()[(at * PAGE) as usize] = 1;
        }
        let range = Range { start: area.start(), end: area.start() + length };
        let pid = std::process::id() as i32;
        let holes = |threads: usize| {
            let mut found = Vec::new();
            Pagemap::open(pid).unwrap().with_threads(threads).empty(range, &mut found).unwrap();
            let mut joined = Vec::new();
            found.iter().for_each(|r| crate::memory::ranges::push(&mut joined, r.range));
            joined
        };
        let expected = holes(1);
        assert!(expected.len() > 10);
        for threads in 2..6 {
            assert_eq!(holes(threads), expected);
        }
    }

    #[test]
    fn work_is_cut_where_it_is() {
        let range = |start: u64, end: u64| Range { start: start << 20, end: end << 20 };
        let cut = |mapped: &[Range], threads| {
            edges(range(0, 1 << 20), mapped, threads).iter().map(|e| e >> 20).collect::<Vec<_>>()
        };
        // Gaps are no work: no thread is started for the length of the range alone.
        assert_eq!(cut(&[range(1, 2), range(900_000, 900_100)], 8), [0, 1 << 20]);
        assert_eq!(cut(&[range(1, 2), range(900_000, 901_000)], 2), [0, 900_500, 1 << 20]);
        assert_eq!(cut(&[range(0, 1 << 20)], 4), [0, 262_146, 524_290, 786_434, 1 << 20]);
        assert_eq!(cut(&[range(0, 400), range(500, 900)], 8), [0, 268, 634, 1 << 20]);
    }

    /// Most mappings are far away from the middle of the range.
    #[test]
    fn several_threads_find_the_same_in_many_mappings() {
        let pages = 5 * MAPPINGS_WORTH_A_THREAD as u64;
        let gap = 4 << 30;
        let area = crate::kernel::sys::Mapping::anonymous(gap + pages * PAGE).unwrap();
        let at = |page: u64| area.start() + page * PAGE;
        let mapped: Vec<Range> = (0..pages).map(|p| Range { start: gap + at(p), end: gap + at(p + 1) }).collect();
        for (page, mapping) in mapped.iter().enumerate() {
            let protection = libc::PROT_READ | if page % 2 == 0 { libc::PROT_WRITE } else { 0 };
            // SAFETY: the page is part of the mapping just made.
            unsafe { *(mapping.start as *mut u8) = u8::from(page % 5 != 0) };
            // SAFETY: the same.
            assert_eq!(unsafe { libc::mprotect(mapping.start as *mut _, PAGE as usize, protection) }, 0);
        }
        let cuts = edges(Range { start: area.start(), end: gap + at(pages) }, &mapped, 2);
        assert!(cuts.len() == 3 && cuts[1] > gap + at(pages / 3) && cuts[1] < gap + at(pages), "{cuts:x?}");
        let range = Range { start: area.start(), end: gap + at(pages) };
        let find = |threads: usize| {
            let map = Pagemap::open(std::process::id() as i32).unwrap().with_threads(threads);
            let (mut found, mut written) = (Vec::new(), Vec::new());
            map.private(range, &mapped, &mut found).unwrap();
            map.written(range, &mapped, Writes::Seen, &mut written).unwrap();
            (crate::memory::ranges::joined(found.iter().map(|r| r.range)), crate::memory::ranges::joined(written))
        };
        assert_eq!(find(1).0, [Range { start: at(0) + gap, end: range.end }]);
        for threads in 2..7 {
            assert_eq!(find(threads), find(1));
        }
    }
}
