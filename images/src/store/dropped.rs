//! Pages of another image's store that an image does not need.

use super::{PAGE, PageReader, PageSet, PageStoreIndex, reader::bytes_of};
use crate::ImageError;
use nix::fcntl::{FallocateFlags, fallocate};
use std::{fs::OpenOptions, path::Path};
use twox_hash::XxHash3_64;

impl PageReader {
    /// The table of contents for an image that does not need the pages in `unused` either. Chunks of which nothing is
    /// left are not read, others that change are verified.
    ///
    /// # Errors
    /// Page data that are not what was written.
    ///
    /// # Panics
    /// When the store is compressed.
    pub fn without(&self, unused: &PageSet) -> Result<PageStoreIndex, ImageError> {
        assert!(self.is_raw(), "pages cannot be dropped from compressed data");
        let mut index = self.index().clone();
        let all = PageSet::from_pairs(&index.dropped).union(unused);
        index.dropped = all.to_pairs();
        let mut scratch = self.scratch()?;
        let mut raw = Vec::new();
        for (number, chunk) in index.chunks.iter_mut().enumerate() {
            let range = self.range(number);
            if !unused.overlaps(range.clone()) {
                continue;
            }
            raw.resize(chunk.raw as usize, 0);
            if all.gaps(range.clone()).next().is_some() {
                self.read_chunk(number, &mut scratch, &mut raw)?;
            }
            for part in all.within(range.clone()) {
                raw[bytes_of(&range, &part)].fill(0);
            }
            chunk.checksum = XxHash3_64::oneshot(&raw);
        }
        Ok(index)
    }
}

/// Gives the space of these pages of an uncompressed store back to the file system; reading them gives zeros from then
/// on. Only images whose table of contents says that they do not need them can be read afterwards.
///
/// # Errors
/// I/O errors; file systems that cannot do it.
pub fn punch(path: &Path, pages: &PageSet) -> Result<(), ImageError> {
    let file = OpenOptions::new().write(true).open(path).map_err(ImageError::io(path))?;
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    pages.ranges().iter().try_for_each(|range| {
        let (offset, length) = (range.start * PAGE as u64, (range.end - range.start) * PAGE as u64);
        fallocate(&file, flags, offset as i64, length as i64).map_err(|e| ImageError::io(path)(e.into()))
    })
}
