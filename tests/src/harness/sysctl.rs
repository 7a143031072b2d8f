//! Settings of the kernel that a test changes.

use std::fs;
use std::path::{Path, PathBuf};

/// A file below `/proc/sys`, which has its value again when this is dropped.
pub struct Sysctl {
    path: PathBuf,
    before: String,
}

impl Sysctl {
    /// By its path below `/proc/sys`.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let path = Path::new("/proc/sys").join(name);
        let before = fs::read_to_string(&path).unwrap_or_else(|e| panic!("read {}: {e}", path.display()));
        Self { path, before }
    }

    /// Changes the value.
    ///
    /// # Panics
    /// If that is not permitted.
    pub fn set(&self, value: u64) {
        fs::write(&self.path, value.to_string()).unwrap_or_else(|e| panic!("write {}: {e}", self.path.display()));
    }
}

impl Drop for Sysctl {
    fn drop(&mut self) {
        // A failure here must not hide that of the test.
        let _ = fs::write(&self.path, &self.before);
    }
}
