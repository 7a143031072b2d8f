//! Reading a page store.

use super::{Chunk, PAGE, PageIndex, PageStoreIndex, codec::Unpacker};
use crate::{Flaw, ImageError};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
    thread,
};
use twox_hash::XxHash3_64;

/// Reads a page store.
#[derive(Debug)]
pub struct PageReader {
    path: PathBuf,
    file: File,
    index: PageStoreIndex,
    /// Number of each chunk's first page.
    starts: Vec<PageIndex>,
    pages: u64,
}

/// What a thread needs to read chunks.
struct Scratch {
    unpacker: Unpacker,
    stored: Vec<u8>,
    raw: Vec<u8>,
}

impl PageReader {
    /// Opens the file and compares its length with the index.
    ///
    /// # Errors
    /// An index that makes no sense, a file that is missing or not of the length that the index gives.
    pub fn open(path: &Path, index: &PageStoreIndex) -> Result<Self, ImageError> {
        let expected = index.file_length(path)?;
        let file = File::open(path).map_err(ImageError::io(path))?;
        let length = file.metadata().map_err(ImageError::io(path))?.len();
        if length < expected {
            return Err(ImageError::invalid(path, length, Flaw::Truncated));
        }
        if length > expected {
            return Err(ImageError::invalid(path, expected, Flaw::Leftovers));
        }
        let (mut starts, mut pages) = (Vec::with_capacity(index.chunks.len()), 0);
        for chunk in &index.chunks {
            starts.push(pages);
            pages += chunk.pages();
        }
        Ok(Self { path: path.into(), file, index: index.clone(), starts, pages })
    }

    /// Whether page n is at offset n × 4096 of the file.
    pub fn is_raw(&self) -> bool {
        self.index.compression == super::Compression::None
    }

    /// The file as it is.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// A file with page n at offset n × 4096: the store itself, unchecked, or else a checked copy in memory.
    ///
    /// # Errors
    /// I/O errors; a copy fails as [`Self::decompress_into`] does.
    pub fn raw(&self) -> Result<File, ImageError> {
        if self.is_raw() {
            return self.file.try_clone().map_err(ImageError::io(&self.path));
        }
        let copy = memfd_create(c"standstill-pages", MFdFlags::MFD_CLOEXEC);
        let copy = File::from(copy.map_err(|e| ImageError::io(&self.path)(e.into()))?);
        self.decompress_into(&copy)?;
        Ok(copy)
    }

    /// Reads pages and verifies them. It costs a whole chunk of up to 1 MiB at each end.
    ///
    /// # Errors
    /// Pages that are not in the store, or not what was written.
    ///
    /// # Panics
    /// When `pages` are not whole pages.
    pub fn read_pages(&self, first: PageIndex, pages: &mut [u8]) -> Result<(), ImageError> {
        assert!(pages.len().is_multiple_of(PAGE), "{} bytes are not whole pages", pages.len());
        let end = first.checked_add((pages.len() / PAGE) as u64);
        if end.is_none_or(|end| end > self.pages) {
            let reason = format!("page {first} and the {} bytes from there on are not in the store", pages.len());
            return Err(ImageError::invalid(&self.path, 0, Flaw::Content(reason)));
        }
        let mut scratch = self.scratch()?;
        let (mut rest, mut page, mut raw) = (pages, first, Vec::new());
        while !rest.is_empty() {
            let number = self.starts.partition_point(|&start| start <= page) - 1;
            let chunk = &self.index.chunks[number];
            let skip = (page - self.starts[number]) as usize * PAGE;
            let length = (chunk.raw as usize - skip).min(rest.len());
            let (now, later) = rest.split_at_mut(length);
            if length == chunk.raw as usize {
                self.read_chunk(chunk, &mut scratch, now)?;
            } else {
                raw.resize(chunk.raw as usize, 0);
                self.read_chunk(chunk, &mut scratch, &mut raw)?;
                now.copy_from_slice(&raw[skip..skip + length]);
            }
            page += (length / PAGE) as u64;
            rest = later;
        }
        Ok(())
    }

    /// Compares all checksums with the page data where they were put: `read` gets them from there, by the number of
    /// their first page.
    ///
    /// # Errors
    /// The first page data found that are not what was written, and the errors of `read`.
    ///
    /// # Panics
    /// When the store is compressed: its checksums are of the compressed data.
    pub fn verify_copy(
        &self,
        threads: usize,
        read: impl Fn(PageIndex, &mut [u8]) -> Result<(), ImageError> + Sync,
    ) -> Result<(), ImageError> {
        assert!(self.is_raw(), "the checksums are of compressed data");
        self.each(threads, |number, chunk, scratch| {
            scratch.raw.resize(chunk.raw as usize, 0);
            read(self.starts[number], &mut scratch.raw)?;
            self.compare(chunk, &scratch.raw)
        })
    }

    /// Reads everything and compares all checksums. `progress` is told how many bytes of page data are done, and how
    /// many there are.
    ///
    /// # Errors
    /// The first page data found that are not what was written.
    pub fn verify(&self, threads: usize, progress: impl Fn(u64, u64) + Sync) -> Result<(), ImageError> {
        let done = AtomicU64::new(0);
        self.each_chunk(threads, |_, raw| {
            let before = done.fetch_add(raw.len() as u64, Ordering::Relaxed);
            progress(before + raw.len() as u64, self.pages * PAGE as u64);
            Ok(())
        })
    }

    /// Makes `target` a file with page n at offset n × 4096, verified.
    ///
    /// # Errors
    /// Page data that are not what was written, or a `target` that cannot be written.
    pub fn decompress_into(&self, target: &File) -> Result<(), ImageError> {
        let threads = thread::available_parallelism().map_or(1, |n| n.get());
        target.set_len(self.pages * PAGE as u64).map_err(ImageError::io(&self.path))?;
        self.each_chunk(threads, |first, raw| {
            target.write_all_at(raw, first * PAGE as u64).map_err(ImageError::io(&self.path))
        })
    }

    /// Calls `action` with each chunk's first page and verified page data, in several threads.
    fn each_chunk(
        &self,
        threads: usize,
        action: impl Fn(PageIndex, &[u8]) -> Result<(), ImageError> + Sync,
    ) -> Result<(), ImageError> {
        self.each(threads, |number, chunk, scratch| {
            let mut raw = std::mem::take(&mut scratch.raw);
            raw.resize(chunk.raw as usize, 0);
            self.read_chunk(chunk, scratch, &mut raw)?;
            action(self.starts[number], &raw)?;
            scratch.raw = raw;
            Ok(())
        })
    }

    /// Calls `action` with each chunk and its number, in several threads.
    fn each(
        &self,
        threads: usize,
        action: impl Fn(usize, &Chunk, &mut Scratch) -> Result<(), ImageError> + Sync,
    ) -> Result<(), ImageError> {
        let chunks = &self.index.chunks;
        let next = AtomicUsize::new(0);
        let work = || {
            let mut scratch = self.scratch()?;
            while let number = next.fetch_add(1, Ordering::Relaxed)
                && let Some(chunk) = chunks.get(number)
            {
                action(number, chunk, &mut scratch).inspect_err(|_| {
                    // The others need not go on.
                    next.store(chunks.len(), Ordering::Relaxed);
                })?;
            }
            Ok(())
        };
        thread::scope(|scope| {
            let others: Vec<_> = (1..threads.min(chunks.len())).map(|_| scope.spawn(work)).collect();
            let mut result = work();
            for other in others {
                let theirs = other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                result = result.and(theirs);
            }
            result
        })
    }

    fn scratch(&self) -> Result<Scratch, ImageError> {
        let unpacker = Unpacker::new(self.index.compression).map_err(ImageError::io(&self.path))?;
        Ok(Scratch { unpacker, stored: Vec::new(), raw: Vec::new() })
    }

    /// Reads and verifies the page data of a chunk.
    fn read_chunk(&self, chunk: &Chunk, scratch: &mut Scratch, raw: &mut [u8]) -> Result<(), ImageError> {
        let invalid = |flaw| Err(ImageError::invalid(&self.path, chunk.offset, flaw));
        let compressed = chunk.stored < chunk.raw;
        scratch.stored.resize(if compressed { chunk.padded() } else { 0 }, 0);
        let bytes = if compressed { &mut scratch.stored[..] } else { &mut *raw };
        self.read_at(bytes, chunk.offset)?;
        self.compare(chunk, bytes)?;
        if !compressed {
            return Ok(());
        }
        match scratch.unpacker.unpack(&scratch.stored[..chunk.stored as usize], raw) {
            Ok(length) if length == raw.len() => Ok(()),
            Ok(length) => invalid(Flaw::Content(format!("{length} bytes of page data instead of {}", raw.len()))),
            Err(reason) => invalid(Flaw::Content(format!("page data that cannot be decompressed: {reason}"))),
        }
    }

    fn compare(&self, chunk: &Chunk, bytes: &[u8]) -> Result<(), ImageError> {
        match XxHash3_64::oneshot(bytes) == chunk.checksum {
            true => Ok(()),
            false => Err(ImageError::invalid(&self.path, chunk.offset, Flaw::Checksum)),
        }
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> Result<(), ImageError> {
        self.file.read_exact_at(bytes, offset).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => ImageError::invalid(&self.path, offset, Flaw::Truncated),
            _ => ImageError::io(&self.path)(e),
        })
    }
}
