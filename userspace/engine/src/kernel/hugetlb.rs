//! Huge pages of hugetlbfs: sizes and pools.
//!
//! Kernel doc: Documentation/admin-guide/mm/hugetlbpage.rst.

use super::proc;
use nix::sys::statfs::{HUGETLBFS_MAGIC, Statfs, fstatfs, statfs};
use std::{io, os::fd::AsFd, path::Path};

/// Smallest huge page: every other one is a multiple of it.
pub(crate) const SMALLEST: u64 = 2 << 20;

fn page_size(found: &Statfs) -> Option<u64> {
    (found.filesystem_type() == HUGETLBFS_MAGIC).then(|| found.block_size() as u64)
}

/// Bytes of a page of a file, if it is one of huge pages.
pub(crate) fn page_size_of(file: impl AsFd) -> io::Result<Option<u64>> {
    Ok(page_size(&fstatfs(file)?))
}

/// The same for a path.
pub(crate) fn page_size_at(path: &Path) -> io::Result<Option<u64>> {
    Ok(page_size(&statfs(path)?))
}

/// A page size as mmap(2), memfd_create(2) and shmget(2) take it among their flags.
pub(crate) fn size_flag(page_size: u64) -> i32 {
    const SHIFT: u32 = 26; // MAP_HUGE_SHIFT
    (page_size.trailing_zeros() << SHIFT) as i32
}

/// The huge pages of a size that the machine has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pool {
    /// In the pool for good (`nr_hugepages`).
    pub total: u64,
    /// In use by nobody and promised to nobody.
    pub free: u64,
    /// What the kernel may make on demand (`nr_overcommit_hugepages`).
    pub spare: u64,
}

/// The directory with the figures of a pool.
pub(crate) fn pool_dir(page_size: u64) -> String {
    format!("/sys/kernel/mm/hugepages/hugepages-{}kB", page_size >> 10)
}

/// The pool of a page size; not found: the machine has no such pages.
pub(crate) fn pool(page_size: u64) -> io::Result<Pool> {
    let dir = pool_dir(page_size);
    let figure = |name: &str| proc::number::<u64>(Path::new(&format!("{dir}/{name}")));
    let (total, surplus) = (figure("nr_hugepages")?, figure("surplus_hugepages")?);
    Ok(Pool {
        total,
        free: figure("free_hugepages")?.saturating_sub(figure("resv_hugepages")?),
        spare: figure("nr_overcommit_hugepages")?.saturating_sub(surplus),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_as_flags() {
        assert_eq!(size_flag(2 << 20), libc::MAP_HUGE_2MB);
        assert_eq!(size_flag(1 << 30), libc::MAP_HUGE_1GB);
    }

    #[test]
    fn other_files_have_no_huge_pages() {
        assert_eq!(page_size_at(Path::new("/proc")).unwrap(), None);
        assert_eq!(page_size_of(std::fs::File::open("/dev/null").unwrap()).unwrap(), None);
        assert!(pool(12 << 10).is_err());
    }
}
