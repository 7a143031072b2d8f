//! How far the writing of a page store has come.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Bytes of page data that are to be written and that are, for somebody who looks from another thread.
#[derive(Debug, Default)]
pub struct Progress {
    expected: AtomicU64,
    written: AtomicU64,
    busy: AtomicBool,
}

impl Progress {
    /// So many bytes more are expected.
    pub fn expect(&self, bytes: u64) {
        self.expected.fetch_add(bytes, Ordering::Relaxed);
    }

    /// So many of those expected do not come.
    pub fn drop_expected(&self, bytes: u64) {
        self.expected.fetch_sub(bytes, Ordering::Relaxed);
    }

    pub(super) fn wrote(&self, bytes: u64) {
        self.written.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Whether something is under way that nobody should take processor time from.
    pub fn set_busy(&self, busy: bool) {
        self.busy.store(busy, Ordering::Relaxed);
    }

    /// Bytes written, and expected together with these; `None` while looking could disturb.
    pub fn look(&self) -> Option<(u64, u64)> {
        let written = self.written.load(Ordering::Relaxed);
        let busy = self.busy.load(Ordering::Relaxed);
        (!busy).then(|| (written, written.max(self.expected.load(Ordering::Relaxed))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Compression, PAGE, PageWriter};
    use std::sync::Arc;

    #[test]
    fn a_writer_tells_of_what_it_has_written() {
        let dir = tempfile::tempdir().expect("make a directory");
        let told = Arc::new(Progress::default());
        let path = dir.path().join("pages.img");
        let mut writer = PageWriter::create_telling(&path, Compression::Lz4, Arc::clone(&told)).expect("create");
        let page = PAGE as u64;
        told.expect(5 * page);
        assert_eq!(told.look(), Some((0, 5 * page)));
        writer.append(&[1; 3 * PAGE]).expect("append");
        told.drop_expected(page);
        writer.finish().expect("finish");
        assert_eq!(told.look(), Some((3 * page, 4 * page)));
        told.set_busy(true);
        assert_eq!(told.look(), None);
    }
}
