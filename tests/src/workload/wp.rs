//! Tracking of a program's own writes by the kernel, in the way a checkpoint does it: userfaultfd with asynchronous
//! write protection, and PAGEMAP_SCAN that finds the written pages and protects them again.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::{Mapping, PAGE};

/// struct uffdio_api.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// struct uffdio_register.
#[repr(C)]
struct Register {
    start: u64,
    length: u64,
    mode: u64,
    ioctls: u64,
}

/// struct pm_scan_arg.
#[repr(C)]
#[derive(Default)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    regions: u64,
    regions_length: u64,
    most_pages: u64,
    inverted: u64,
    all_of: u64,
    any_of: u64,
    return_of: u64,
}

/// struct page_region.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

// linux/userfaultfd.h
const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
const UFFDIO_REGISTER_MODE_WP: u64 = 2;
const UFFDIO_API: u64 = request(0xaa, 0x3f, size_of::<Api>());
const UFFDIO_REGISTER: u64 = request(0xaa, 0x00, size_of::<Register>());
// linux/fs.h
const PAGEMAP_SCAN: u64 = request(b'f', 16, size_of::<Scan>());
const PM_SCAN_WP_MATCHING: u64 = 1;
const PM_SCAN_CHECK_WPASYNC: u64 = 2;
const PAGE_IS_WRITTEN: u64 = 1 << 1;

/// _IOWR of asm-generic/ioctl.h.
const fn request(kind: u8, number: u64, size: usize) -> u64 {
    3 << 30 | (size as u64) << 16 | (kind as u64) << 8 | number
}

/// Memory of this process whose writes the kernel notes. Registered until dropped.
pub struct Tracking {
    _fd: OwnedFd,
    pagemap: File,
    memory: Mapping,
    regions: Vec<Region>,
}

impl Tracking {
    /// Starts to track. Until the first [`Tracking::take`], every page counts as written.
    pub fn start(memory: Mapping) -> io::Result<Self> {
        // SAFETY: the call takes flags only.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and belongs to nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).map_err(io::Error::other)?) };
        let features = UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
        let mut api = Api { api: UFFD_API, features, ioctls: 0 };
        // SAFETY: the kernel reads and writes one struct uffdio_api.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) })?;
        let (start, length) = (memory.start() as u64, memory.length() as u64);
        let mut register = Register { start, length, mode: UFFDIO_REGISTER_MODE_WP, ioctls: 0 };
        // SAFETY: the kernel reads and writes one struct uffdio_register.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_REGISTER, &raw mut register) })?;
        let pagemap = File::open("/proc/self/pagemap")?;
        Ok(Self { _fd: fd, pagemap, memory, regions: vec![Region::default(); 4096] })
    }

    /// How many pages were written since the last call; from now on they count as not written.
    pub fn take(&mut self) -> io::Result<usize> {
        let end = (self.memory.start() + self.memory.length()) as u64;
        let mut scan = Scan {
            size: size_of::<Scan>() as u64,
            flags: PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
            start: self.memory.start() as u64,
            end,
            regions: self.regions.as_mut_ptr() as u64,
            regions_length: self.regions.len() as u64,
            all_of: PAGE_IS_WRITTEN,
            return_of: PAGE_IS_WRITTEN,
            ..Scan::default()
        };
        let mut bytes = 0;
        while scan.start < end {
            // SAFETY: the kernel reads and writes one struct pm_scan_arg, and writes at most as many regions as it says.
            let found = unsafe { libc::ioctl(self.pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) };
            check(found)?;
            bytes += self.regions[..found as usize].iter().map(|region| region.end - region.start).sum::<u64>();
            scan.start = scan.walk_end;
        }
        Ok(bytes as usize / PAGE)
    }
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_pages_are_counted_once() {
        let memory = Mapping::private(64 * PAGE).unwrap();
        memory.advise(libc::MADV_NOHUGEPAGE).unwrap();
        memory.words_mut().fill(1);
        // A kernel without it, or a user who may not.
        let Ok(mut tracking) = Tracking::start(memory) else { return };
        tracking.take().unwrap();
        assert_eq!(tracking.take().unwrap(), 0);
        for page in [3, 4, 60] {
            memory.store(page * PAGE / 8, 2);
        }
        assert_eq!(tracking.take().unwrap(), 3);
        assert_eq!(tracking.take().unwrap(), 0);
    }
}
