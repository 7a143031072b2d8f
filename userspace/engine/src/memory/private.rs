//! Which pages of a process belong to it alone, and which of them are not in the store yet.

use super::{
    area::{Area, Kind, REGISTERED, View},
    ranges,
    tracking::Tracking,
};
use crate::{
    error::{Context, Error, Result},
    kernel::{
        PAGE,
        pagemap::{Pagemap, Range, Region},
    },
    parallel,
};
use std::io;

/// What has to be copied of one address space.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct PrivatePages {
    pub pid: i32,
    /// Pages by address.
    pub ranges: Vec<Range>,
    /// Mappings of files: pages of zeros hide what is in the file, and have to be copied.
    pub over_files: Vec<Range>,
    /// Pages that were copied earlier and have not changed.
    pub unchanged: Vec<Range>,
    /// Mappings of which a fork of the process has nothing.
    pub unforked: Vec<Range>,
    /// Mappings of huge pages.
    pub huge: Vec<Range>,
}

impl PrivatePages {
    /// What has to be copied and is not in a fork.
    pub(crate) fn without_fork(&self) -> Self {
        self.part(self.pid, ranges::intersect(&self.ranges, &self.unforked))
    }

    /// What is to be copied from the fork `pid`.
    pub(crate) fn in_fork(&self, pid: i32) -> Self {
        self.part(pid, ranges::subtract(&self.ranges, &self.unforked))
    }

    fn part(&self, pid: i32, ranges: Vec<Range>) -> Self {
        Self { pid, ranges, over_files: self.over_files.clone(), huge: self.huge.clone(), ..Self::default() }
    }
}

impl PrivatePages {
    /// All pages that were looked for.
    pub(crate) fn scanned(&self) -> u64 {
        (ranges::size(&self.ranges) + ranges::size(&self.unchanged)) / PAGE
    }
}

/// Up to so many bytes of mappings are scanned although nothing in them is wanted: that takes no more time than another
/// system call.
const PASSED_OVER: u64 = 64 * PAGE;

/// The private pages of a process, which may run, and its guards, as far as they are in view. `tracking`: what is known of
/// its pages. `protect`: further writes are tracked. `threads`: for scans of large mappings.
pub(crate) fn look(
    pid: i32,
    view: &View<'_>,
    tracking: Option<&Tracking>,
    protect: bool,
    threads: usize,
) -> Result<(PrivatePages, Vec<Range>)> {
    let failed = || format!("scan the pages of {pid}");
    let pagemap = Pagemap::open(pid).context(|| format!("open the pagemap of {pid}"))?.with_threads(threads);
    // A page that is written to or goes after the first of these questions is found by the next dump.
    let unwritten = match tracking {
        Some(tracking) => match tracking.unwritten(&pagemap, view, protect) {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                return Err(Error::unsupported(pid, "a mapping", REGISTERED));
            }
            other => other.context(failed)?,
        },
        None => Vec::new(),
    };
    let areas = &view.clipped()[..];
    let (present, guards) = present(&pagemap, areas).context(failed)?;
    let unchanged = ranges::intersect(&unwritten, &present);
    let over_files = area_set(areas, |a| a.kind == Kind::File);
    let unforked = area_set(areas, |a| a.unforked);
    let huge = area_set(areas, |a| a.huge && a.is_private());
    let ranges = ranges::subtract(&present, &unchanged);
    Ok((PrivatePages { pid, ranges, over_files, unchanged, unforked, huge }, guards))
}

/// A process whose pages are looked for: its mappings, and what is known of its pages.
pub(crate) type Job<'a> = (i32, &'a [Area], Option<&'a Tracking>);

/// The same for several processes that do not run, by `threads` threads.
pub(crate) fn look_at_all(jobs: &[Job<'_>], protect: bool, threads: usize) -> Result<Vec<(PrivatePages, Vec<Range>)>> {
    let workers = parallel::workers(jobs.len(), threads);
    parallel::map(jobs, workers, |&(pid, areas, tracking)| look(pid, &View::all(areas), tracking, protect, threads))
}

/// Pages that hold something, and guards.
fn present(pagemap: &Pagemap, areas: &[Area]) -> io::Result<(Vec<Range>, Vec<Range>)> {
    let (mut full, mut empty) = (Vec::new(), Vec::new());
    for (span, bulk) in spans(areas) {
        if bulk {
            pagemap.empty(span, &mut empty)?;
            continue;
        }
        let at = |address: u64| areas.partition_point(|area| area.range.start < address);
        let mapped: Vec<Range> = areas[at(span.start)..at(span.end)].iter().map(|area| area.range).collect();
        pagemap.private(span, &mapped, &mut full)?;
    }
    let set = |regions: &[Region], guard: Option<bool>| {
        ranges::joined(regions.iter().filter(|r| guard.is_none_or(|guard| guard == r.guard)).map(|r| r.range))
    };
    let touched = |a: &Area| a.is_private() && !a.untouched;
    let bulk = area_set(areas, |a| touched(a) && a.bulk);
    let others = area_set(areas, |a| touched(a) && !a.bulk);
    let guards = ranges::union(
        &ranges::intersect(&set(&full, Some(true)), &others),
        &ranges::intersect(&set(&empty, Some(true)), &bulk),
    );
    let others = area_set(areas, |a| touched(a) && !a.bulk && a.kind != Kind::Droppable);
    let present = ranges::union(
        &ranges::subtract(&bulk, &set(&empty, None)),
        &ranges::intersect(&set(&full, Some(false)), &others),
    );
    Ok((present, guards))
}

/// The addresses of some mappings.
fn area_set(areas: &[Area], wanted: impl Fn(&Area) -> bool) -> Vec<Range> {
    ranges::joined(areas.iter().filter(|a| wanted(a)).map(|a| a.range))
}

/// Parts of the address space that hold all private mappings but the untouched ones, and of the others only little; with
/// whether they are of the bulk kind. Gaps between mappings cost nothing.
fn spans(areas: &[Area]) -> Vec<(Range, bool)> {
    let mut all: Vec<(Range, bool)> = Vec::new();
    let mut passed = 0;
    for area in areas {
        if area.untouched || !area.is_private() {
            passed += area.range.end - area.range.start;
            continue;
        }
        match all.last_mut() {
            Some((last, bulk)) if passed <= PASSED_OVER && *bulk == area.bulk => last.end = area.range.end,
            _ => all.push((area.range, area.bulk)),
        }
        passed = 0;
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::sys::Mapping;

    const ANONYMOUS: Kind = Kind::Anonymous;

    fn range(start: u64, end: u64) -> Range {
        Range { start: start * PAGE, end: end * PAGE }
    }

    fn area(page: u64, pages: u64, kind: Kind) -> Area {
        Area::new(range(page, page + pages), kind, false, false)
    }

    #[test]
    fn spans_leave_out_what_is_large_and_shared() {
        let mut areas = vec![
            area(0, 1, ANONYMOUS),
            area(5, 64, Kind::Other),
            area(600, 1, Kind::File),
            area(601, 65, Kind::Other),
            area(2000, 1, Kind::Other),
            area(2001, 1, ANONYMOUS),
            area(2002, 256, ANONYMOUS),
            area(2300, 300, ANONYMOUS),
        ];
        let last = [(range(2001, 2002), false), (range(2002, 2600), true)];
        assert_eq!(spans(&areas), [&[(range(0, 601), false)], &last[..]].concat());
        assert!(spans(&areas[3..5]).is_empty());
        areas[2].untouched = true;
        assert_eq!(spans(&areas), [&[(range(0, 1), false)], &last[..]].concat());
    }

    /// A mapping of `pages` pages in which some are written to, some only read, and some guards.
    fn sample(pages: u64) -> (Mapping, bool) {
        const MADV_GUARD_INSTALL: i32 = 102;
        let memory = Mapping::anonymous(pages * PAGE).unwrap();
        let at = |page: u64| (memory.start() + page * PAGE) as *mut libc::c_void;
        // A huge page would fill the gaps.
        // SAFETY: the range is the mapping just made.
        unsafe { libc::madvise(at(0), (pages * PAGE) as usize, libc::MADV_NOHUGEPAGE) };
        for page in (0..pages).filter(|page| page % 8 < 6) {
            memory.bytes_mut()[(page * PAGE) as usize] = u8::from(page % 8 < 5);
        }
        assert_eq!(memory.bytes_mut()[(6 * PAGE) as usize], 0, "a read maps the zero page");
        // SAFETY: the pages are part of the mapping just made.
        let guarded = unsafe { libc::madvise(at(4), PAGE as usize, MADV_GUARD_INSTALL) } == 0;
        (memory, guarded)
    }

    /// Both kinds of scans see the same, and the parts of two mappings that meet are told apart.
    #[test]
    fn guards_and_pages_of_live_memory() {
        for pages in [8, 2048] {
            let (memory, guarded) = sample(pages);
            let first = memory.start() / PAGE;
            let areas = [area(first, 2, Kind::File), area(first + 2, pages - 2, ANONYMOUS)];
            let pid = std::process::id() as i32;
            let (found, guards) = look(pid, &View::all(&areas), None, false, 1).unwrap();
            assert_eq!(found.over_files, [range(first, first + 2)]);
            assert_eq!(found.unchanged, []);
            // Without guards in the kernel, or without its telling them apart, there is nothing to see.
            if !guarded || guards.is_empty() {
                continue;
            }
            assert_eq!(guards, [range(first + 4, first + 5)]);
            let mut expected = vec![range(first, first + 4), range(first + 5, first + 6)];
            expected.extend((first + 8..first + pages).step_by(8).map(|page| range(page, page + 6)));
            assert_eq!(found.ranges, expected);
        }
    }

    #[test]
    fn what_a_fork_lacks_is_apart() {
        let ranges = vec![range(1, 5), range(8, 10)];
        let pages = PrivatePages { pid: 7, ranges, unforked: vec![range(4, 9)], ..Default::default() };
        assert_eq!((pages.without_fork().pid, pages.without_fork().ranges), (7, vec![range(4, 5), range(8, 9)]));
        assert_eq!((pages.in_fork(8).pid, pages.in_fork(8).ranges), (8, vec![range(1, 4), range(9, 10)]));
    }

    #[test]
    fn contents_that_the_kernel_may_drop_are_left_out() {
        let (memory, _) = sample(8);
        let areas = [area(memory.start() / PAGE, 8, Kind::Droppable)];
        let (found, _) = look(std::process::id() as i32, &View::all(&areas), None, false, 1).unwrap();
        assert_eq!(found.ranges, []);
    }
}
