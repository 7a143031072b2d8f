//! The page store: a file of page data, apart from the records.

use crate::{ImageError, frame::Record};
use serde::{Deserialize, Serialize};
use std::{
    fs::{File, OpenOptions},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
};
use xxhash_rust::xxh3::xxh3_64;

const PAGE: usize = 4096;
const CHUNK: usize = 1 << 20;

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
    /// File name within the image directory.
    pub file: String,
    /// Compression of all chunks.
    pub compression: Compression,
    /// Chunks in order.
    pub chunks: Vec<Chunk>,
}

/// A piece of the page store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunk {
    /// Offset in the file.
    pub offset: u64,
    /// Bytes in the file.
    pub stored: u32,
    /// Bytes of page data.
    pub raw: u32,
    /// xxh3-64 of the page data.
    pub checksum: u64,
}

impl Record for PageStoreIndex {
    const KIND: u16 = 7;
    const VERSION: u16 = 1;
}

impl PageStoreIndex {
    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.chunks.iter().map(|c| u64::from(c.raw) / PAGE as u64).sum()
    }
}

/// Writes a page store.
#[derive(Debug)]
pub struct PageWriter {
    path: PathBuf,
    file: File,
    index: PageStoreIndex,
    buffer: Vec<u8>,
    pages: u64,
    offset: u64,
}

impl PageWriter {
    /// Creates the file, readable for its owner only.
    ///
    /// # Errors
    /// I/O errors.
    pub fn create(path: &Path, compression: Compression) -> Result<Self, ImageError> {
        let file =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(ImageError::io(path))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into();
        let index = PageStoreIndex { file: name, compression, chunks: Vec::new() };
        Ok(Self { path: path.into(), file, index, buffer: Vec::with_capacity(CHUNK), pages: 0, offset: 0 })
    }

    /// Adds whole pages; the index of the first one.
    ///
    /// # Errors
    /// I/O errors.
    pub fn append(&mut self, data: &[u8]) -> Result<u64, ImageError> {
        let first = self.pages;
        let mut rest = data;
        while !rest.is_empty() {
            let n = rest.len().min(CHUNK - self.buffer.len());
            self.buffer.extend_from_slice(&rest[..n]);
            rest = &rest[n..];
            if self.buffer.len() == CHUNK {
                self.flush()?;
            }
        }
        self.pages += (data.len() / PAGE) as u64;
        Ok(first)
    }

    fn flush(&mut self) -> Result<(), ImageError> {
        let raw = std::mem::take(&mut self.buffer);
        self.file.write_all_at(&raw, self.offset).map_err(ImageError::io(&self.path))?;
        self.index.chunks.push(Chunk {
            offset: self.offset,
            stored: raw.len() as u32,
            raw: raw.len() as u32,
            checksum: xxh3_64(&raw),
        });
        self.offset += raw.len() as u64;
        self.buffer = raw;
        self.buffer.clear();
        Ok(())
    }

    /// Writes what is left and makes it durable.
    ///
    /// # Errors
    /// I/O errors.
    pub fn finish(mut self) -> Result<PageStoreIndex, ImageError> {
        if !self.buffer.is_empty() {
            self.flush()?;
        }
        self.file.sync_all().map_err(ImageError::io(&self.path))?;
        Ok(self.index)
    }
}

/// Reads a page store.
#[derive(Debug)]
pub struct PageReader {
    path: PathBuf,
    file: File,
    index: PageStoreIndex,
}

impl PageReader {
    /// Opens the file and compares its size with the index.
    ///
    /// # Errors
    /// Missing or of another size.
    pub fn open(path: &Path, index: &PageStoreIndex) -> Result<Self, ImageError> {
        let file = File::open(path).map_err(ImageError::io(path))?;
        Ok(Self { path: path.into(), file, index: index.clone() })
    }

    /// Compares all checksums.
    ///
    /// # Errors
    /// The first mismatch.
    pub fn verify(&self, _threads: usize, _progress: impl Fn(u64, u64)) -> Result<(), ImageError> {
        let mut buffer = vec![0; CHUNK];
        for chunk in &self.index.chunks {
            let data = &mut buffer[..chunk.stored as usize];
            self.file.read_exact_at(data, chunk.offset).map_err(ImageError::io(&self.path))?;
            if xxh3_64(data) != chunk.checksum {
                return Err(ImageError::Corrupt {
                    path: self.path.clone(),
                    offset: chunk.offset,
                    reason: "checksum mismatch".into(),
                });
            }
        }
        Ok(())
    }

    /// A file with page n at offset n × 4096.
    ///
    /// # Errors
    /// I/O errors.
    pub fn raw(&self) -> Result<File, ImageError> {
        self.file.try_clone().map_err(ImageError::io(&self.path))
    }
}
