//! The page store: a file of page data, apart from the records.
//!
//! Pages are stored in chunks of up to 1 MiB, each with a checksum and, where it saves space, compressed.

mod buffer;
mod codec;
mod dropped;
mod progress;
mod reader;
mod set;
mod slab;
mod writer;

pub use buffer::Buffer;
pub use dropped::punch;
pub use progress::Progress;
pub use reader::PageReader;
pub use set::PageSet;
pub use writer::PageWriter;

use crate::{
    Flaw, ImageError,
    frame::{RawRecord, Record},
};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// The most page data that a chunk holds.
pub const CHUNK: usize = 1 << 20;

/// Number of a page within the page store.
pub type PageIndex = u64;

/// How page data is compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Compression {
    /// Not at all: page n is at offset n × 4096.
    #[default]
    None,
    /// LZ4, block by block.
    Lz4,
    /// Zstandard with this level.
    Zstd(i32),
}

/// Table of contents of a page store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageStoreIndex {
    /// Name of the file, within the image's directory or that of one of its parents.
    pub file: String,
    /// Compression of the chunks.
    pub compression: Compression,
    /// Chunks in the order of their pages.
    pub chunks: Vec<Chunk>,
    /// Pages that this image does not need, as first page and number of pages in their order. Their data may be gone
    /// from the file, whose chunks have the checksums that they have with zeros in their place. None where the store is
    /// compressed.
    pub dropped: Vec<(PageIndex, u64)>,
}

/// [`PageStoreIndex`] before pages could be dropped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageStoreIndexV1 {
    file: String,
    compression: Compression,
    chunks: Vec<Chunk>,
}

impl From<PageStoreIndexV1> for PageStoreIndex {
    fn from(old: PageStoreIndexV1) -> Self {
        Self { file: old.file, compression: old.compression, chunks: old.chunks, dropped: Vec::new() }
    }
}

/// A piece of the page store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunk {
    /// Offset in the file, a multiple of 4096.
    pub offset: u64,
    /// Bytes in the file; zeros follow up to the next multiple of 4096. The same as `raw`: not compressed.
    pub stored: u32,
    /// Bytes of page data.
    pub raw: u32,
    /// xxh3-64 of the bytes in the file, the zeros included.
    pub checksum: u64,
}

impl Record for PageStoreIndex {
    const KIND: u16 = 7;
    const VERSION: u16 = 2;
}

impl Record for PageStoreIndexV1 {
    const KIND: u16 = 7;
    const VERSION: u16 = 1;
}

impl Chunk {
    /// Pages in the chunk.
    fn pages(&self) -> u64 {
        u64::from(self.raw) / PAGE as u64
    }

    /// Bytes that the chunk takes in the file, the padding included.
    fn padded(&self) -> usize {
        (self.stored as usize).next_multiple_of(PAGE)
    }

    /// Offset of the byte after the chunk.
    fn end(&self) -> Option<u64> {
        self.offset.checked_add(self.padded() as u64)
    }
}

impl PageStoreIndex {
    /// Decodes the record in any of its versions.
    ///
    /// # Errors
    /// As those of [`RawRecord::decode`].
    pub fn decode(record: &RawRecord<'_>) -> Result<Self, ImageError> {
        if record.version() == PageStoreIndexV1::VERSION {
            return record.decode::<PageStoreIndexV1>().map(Self::from);
        }
        record.decode()
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.chunks.iter().map(Chunk::pages).sum()
    }

    /// The length that the file must have, if the table makes sense.
    fn file_length(&self, path: &Path) -> Result<u64, ImageError> {
        let nonsense = || Flaw::Content("the page store's table of contents makes no sense".into());
        let (mut at, mut length) = (0, 0);
        for chunk in &self.chunks {
            let invalid = |flaw| Err(ImageError::invalid(path, chunk.offset, flaw));
            if chunk.raw as usize > CHUNK {
                return invalid(Flaw::TooLong { length: chunk.raw.into(), limit: CHUNK as u64 });
            }
            let raw = chunk.raw as usize;
            let sizes = raw > 0 && raw.is_multiple_of(PAGE) && chunk.stored > 0 && chunk.stored <= chunk.raw;
            let place = match self.compression {
                Compression::None => chunk.offset == at && chunk.stored == chunk.raw,
                Compression::Lz4 | Compression::Zstd(_) => chunk.offset.is_multiple_of(PAGE as u64),
            };
            match chunk.end() {
                Some(end) if sizes && place => length = length.max(end),
                _ => return invalid(nonsense()),
            }
            at += u64::from(chunk.raw);
        }
        let (mut page, pages) = (0, at / PAGE as u64);
        for &(first, count) in &self.dropped {
            let end = first.checked_add(count).filter(|&end| first >= page && end > first && end <= pages);
            match end {
                Some(end) if self.compression == Compression::None => page = end,
                _ => return Err(ImageError::invalid(path, 0, nonsense())),
            }
        }
        Ok(length)
    }
}

#[cfg(test)]
mod tests;
