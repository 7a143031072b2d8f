//! Which pages hold what: PAGEMAP_SCAN (Linux 6.7) and the page frame numbers of `/proc/<pid>/pagemap`.
//!
//! Kernel doc: Documentation/admin-guide/mm/pagemap.rst.

use super::PAGE;
use std::{fs::File, io, os::fd::AsRawFd, os::unix::fs::FileExt};

const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;
/// Page guarded by MADV_GUARD_INSTALL; reported since Linux 6.16.
const PAGE_IS_GUARD: u64 = 1 << 8;

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

/// A range of pages that are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    pub start: u64,
    pub end: u64,
}

/// What [`Pagemap::scan`] finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    pub range: Range,
    /// The pages are guards, not memory.
    pub guard: bool,
}

/// The page tables of a process.
pub(crate) struct Pagemap(File);

impl Pagemap {
    /// `/proc/<pid>/pagemap`.
    pub(crate) fn open(pid: i32) -> io::Result<Self> {
        File::open(super::proc::path(pid, "pagemap")).map(Self)
    }

    /// Pages of `start..end` that exist nowhere but in this address space (anonymous, present or swapped, not the zero
    /// page), and those guarded with MADV_GUARD_INSTALL; ascending, without regard to where mappings begin and end.
    ///
    /// Kernels before 6.16 do not tell guards apart: there they are private pages.
    pub(crate) fn scan(&self, start: u64, end: u64, found: &mut Vec<Region>) -> io::Result<()> {
        let private = PAGE_IS_PRESENT | PAGE_IS_SWAPPED;
        match self.scan_for(start, end, private | PAGE_IS_GUARD, found) {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => self.scan_for(start, end, private, found),
            other => other,
        }
    }

    fn scan_for(&self, start: u64, end: u64, any_of: u64, found: &mut Vec<Region>) -> io::Result<()> {
        let without = PAGE_IS_FILE | PAGE_IS_PFNZERO;
        let mut regions = vec![PageRegion::default(); 1024];
        let mut at = start;
        while at < end {
            let mut arg = PmScanArg {
                size: size_of::<PmScanArg>() as u64,
                start: at,
                end,
                vec: regions.as_mut_ptr() as u64,
                vec_len: regions.len() as u64,
                category_inverted: without,
                category_mask: without,
                category_anyof_mask: any_of,
                // Guards look like swapped pages, but for this.
                return_mask: any_of & PAGE_IS_GUARD,
                ..Default::default()
            };
            // SAFETY: `arg` has the size it states, and `vec` is writable for `vec_len` regions.
            let n = unsafe { pagemap_scan(self.0.as_raw_fd(), &raw mut arg) }? as usize;
            found.extend(regions[..n].iter().map(|r| Region {
                range: Range { start: r.start, end: r.end },
                guard: r.categories & PAGE_IS_GUARD != 0,
            }));
            at = arg.walk_end;
        }
        Ok(())
    }

    /// Page frame numbers of `pages` pages from `start`; 0 for pages without a frame. Needs CAP_SYS_ADMIN: without it
    /// the kernel gives zeros.
    pub(crate) fn frames(&self, start: u64, pages: u64) -> io::Result<Vec<u64>> {
        const PRESENT: u64 = 1 << 63;
        const FRAME: u64 = (1 << 55) - 1;
        let mut bytes = vec![0u8; pages as usize * 8];
        self.0.read_exact_at(&mut bytes, start / PAGE * 8)?;
        Ok(bytes
            .chunks_exact(8)
            .map(|b| u64::from_ne_bytes(b.try_into().expect("chunks of eight")))
            .map(|entry| if entry & PRESENT != 0 { entry & FRAME } else { 0 })
            .collect())
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
        map.scan(area.start(), area.start() + pages * PAGE, &mut found).unwrap();
        let range = Range { start: area.start() + 3 * PAGE, end: area.start() + 5 * PAGE };
        assert_eq!(found, [Region { range, guard: false }]);
        let frames = map.frames(area.start(), pages).unwrap();
        assert_eq!(frames[0], 0);
    }

    #[test]
    fn more_regions_than_one_call_returns() {
        let pages = 5000u64;
        let area = crate::kernel::sys::Mapping::anonymous(pages * PAGE).unwrap();
        // A huge page would fill the gaps.
        // SAFETY: the range is the mapping just made.
        unsafe { libc::madvise(area.start() as *mut _, (pages * PAGE) as usize, libc::MADV_NOHUGEPAGE) };
        for page in (0..pages).step_by(2) {
            area.bytes_mut()[(page * PAGE) as usize] = 1;
        }
        let mut found = Vec::new();
        let map = Pagemap::open(std::process::id() as i32).unwrap();
        map.scan(area.start(), area.start() + pages * PAGE, &mut found).unwrap();
        let starts: Vec<u64> = found.iter().map(|r| (r.range.start - area.start()) / PAGE).collect();
        assert_eq!(starts, (0..pages).step_by(2).collect::<Vec<u64>>());
    }
}
