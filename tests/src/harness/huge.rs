//! Huge pages for a test, which gives them back.

use std::path::Path;
use std::time::Duration;
use std::{fs, io};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tempfile::TempDir;

use super::{skip, wait_until};

/// Huge pages that the machine has during a test, besides those that it had before.
pub struct HugePages {
    dir: String,
    before: u64,
}

impl HugePages {
    /// Pages of a size in bytes that nobody uses; none, and a skip, where the machine does not have them.
    pub fn take(page_size: usize, pages: u64) -> Option<Self> {
        let dir = format!("/sys/kernel/mm/hugepages/hugepages-{}kB", page_size >> 10);
        let Ok(before) = figure(&dir, "nr_hugepages") else {
            skip(&format!("the machine has no huge pages of {} kB", page_size >> 10));
            return None;
        };
        let taken = Self { dir, before };
        // Memory that is in the way is moved, which may take more than one attempt.
        let wanted = pages + before;
        if !wait_until(Duration::from_secs(10), || taken.set(wanted).is_ok() && taken.total() >= wanted) {
            skip(&format!("the machine gives only {} of {wanted} huge pages of {} kB", taken.total(), page_size >> 10));
            return None;
        }
        Some(taken)
    }

    /// How many there are.
    pub fn total(&self) -> u64 {
        figure(&self.dir, "nr_hugepages").expect("pages in the pool")
    }

    /// How many nobody uses, nor may use without asking.
    pub fn free(&self) -> u64 {
        let figure = |name| figure(&self.dir, name).expect("pages in the pool");
        figure("free_hugepages") - figure("resv_hugepages")
    }

    /// Changes how many there are.
    pub fn set(&self, total: u64) -> io::Result<()> {
        fs::write(format!("{}/nr_hugepages", self.dir), total.to_string())
    }

    /// Leaves free only so many.
    #[track_caller]
    pub fn leave(&self, free: u64) {
        self.set(self.total() - self.free() + free).expect("change the pool");
        assert_eq!(self.free(), free, "free huge pages");
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        _ = self.set(self.before);
    }
}

fn figure(dir: &str, name: &str) -> io::Result<u64> {
    fs::read_to_string(format!("{dir}/{name}"))?.trim().parse().map_err(io::Error::other)
}

/// A mounted hugetlbfs; unmounted when this is dropped.
pub struct Hugetlbfs(TempDir);

impl Hugetlbfs {
    /// Mounts one.
    pub fn new(page_size: usize) -> Self {
        let dir = tempfile::Builder::new().prefix("standstill-").tempdir_in("/var/tmp").expect("make a directory");
        let made = Self(dir);
        made.mount(page_size);
        made
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Mounts it, empty.
    pub fn mount(&self, page_size: usize) {
        let options = format!("pagesize={page_size}");
        mount(Some("none"), self.path(), Some("hugetlbfs"), MsFlags::empty(), Some(options.as_str())).expect("mount");
    }

    /// Unmounts it, and with it goes what it has.
    pub fn unmount(&self) {
        umount2(self.path(), MntFlags::empty()).expect("unmount");
    }
}

impl Drop for Hugetlbfs {
    fn drop(&mut self) {
        _ = umount2(self.path(), MntFlags::MNT_DETACH);
    }
}
