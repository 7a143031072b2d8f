//! Reading a page store.

use super::{Chunk, PAGE, PageIndex, PageSet, PageStoreIndex, codec::Unpacker};
use crate::{Flaw, ImageError};
use std::{
    fs::File,
    io,
    ops::Range,
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
    dropped: PageSet,
    /// Numbers of the chunks that are of interest.
    chosen: Vec<usize>,
}

/// What a thread needs to read chunks.
pub(super) struct Scratch {
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
        let (dropped, chosen) = (PageSet::from_pairs(&index.dropped), (0..starts.len()).collect());
        Ok(Self { path: path.into(), file, index: index.clone(), starts, pages, dropped, chosen })
    }

    /// The same, but what goes through all chunks goes only through those with pages that are `needed`.
    #[must_use]
    pub fn only(mut self, needed: &PageSet) -> Self {
        self.chosen = (0..self.starts.len()).filter(|&number| needed.overlaps(self.range(number))).collect();
        self
    }

    /// The pages of a chunk.
    pub(super) fn range(&self, number: usize) -> Range<PageIndex> {
        self.starts[number]..self.starts[number] + self.index.chunks[number].pages()
    }

    /// The table of contents.
    pub fn index(&self) -> &PageStoreIndex {
        &self.index
    }

    /// Whether page n is at offset n × 4096 of the file.
    pub fn is_raw(&self) -> bool {
        self.index.compression == super::Compression::None
    }

    /// The file as it is.
    pub fn file(&self) -> &File {
        &self.file
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
                self.read_chunk(number, &mut scratch, now)?;
            } else {
                raw.resize(chunk.raw as usize, 0);
                self.read_chunk(number, &mut scratch, &mut raw)?;
                now.copy_from_slice(&raw[skip..skip + length]);
            }
            page += (length / PAGE) as u64;
            rest = later;
        }
        Ok(())
    }

    /// Compares the checksums with the page data where they were put: `read` gets them from there, by the number of
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
        self.each(threads, |number, scratch| {
            scratch.raw.resize(self.index.chunks[number].raw as usize, 0);
            read(self.starts[number], &mut scratch.raw)?;
            self.blank(number, &mut scratch.raw);
            self.compare(&self.index.chunks[number], &scratch.raw)
        })
    }

    /// Reads everything and compares all checksums. `progress` is told how many bytes of page data are done, and how
    /// many there are.
    ///
    /// # Errors
    /// The first page data found that are not what was written.
    pub fn verify(&self, threads: usize, progress: impl Fn(u64, u64) + Sync) -> Result<(), ImageError> {
        let done = AtomicU64::new(0);
        let total = self.chosen.iter().map(|&number| u64::from(self.index.chunks[number].raw)).sum();
        self.each_chunk(threads, |_, raw| {
            let before = done.fetch_add(raw.len() as u64, Ordering::Relaxed);
            progress(before + raw.len() as u64, total);
            Ok(())
        })
    }

    /// Writes page n to offset (`at` + n) × 4096 of a file, verified.
    ///
    /// # Errors
    /// Page data that are not what was written, or a `target` that cannot be written.
    pub fn copy_into(&self, target: &File, at: PageIndex) -> Result<(), ImageError> {
        let threads = thread::available_parallelism().map_or(1, |n| n.get());
        self.each_chunk(threads, |first, raw| {
            target.write_all_at(raw, (at + first) * PAGE as u64).map_err(ImageError::io(&self.path))
        })
    }

    /// Calls `action` with each chunk's first page and verified page data, in their order.
    ///
    /// # Errors
    /// Page data that are not what was written, and the errors of `action`.
    pub fn in_order<E: From<ImageError>>(
        &self,
        mut action: impl FnMut(PageIndex, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let (mut scratch, mut raw) = (self.scratch()?, Vec::new());
        self.chosen.iter().try_for_each(|&number| {
            raw.resize(self.index.chunks[number].raw as usize, 0);
            self.read_chunk(number, &mut scratch, &mut raw)?;
            action(self.starts[number], &raw)
        })
    }

    /// Calls `action` with each chunk's first page and verified page data, in several threads.
    fn each_chunk(
        &self,
        threads: usize,
        action: impl Fn(PageIndex, &[u8]) -> Result<(), ImageError> + Sync,
    ) -> Result<(), ImageError> {
        self.each(threads, |number, scratch| {
            let mut raw = std::mem::take(&mut scratch.raw);
            raw.resize(self.index.chunks[number].raw as usize, 0);
            self.read_chunk(number, scratch, &mut raw)?;
            action(self.starts[number], &raw)?;
            scratch.raw = raw;
            Ok(())
        })
    }

    /// Calls `action` with the number of each chunk, in several threads.
    fn each(
        &self,
        threads: usize,
        action: impl Fn(usize, &mut Scratch) -> Result<(), ImageError> + Sync,
    ) -> Result<(), ImageError> {
        let next = AtomicUsize::new(0);
        let work = || {
            let mut scratch = self.scratch()?;
            while let Some(&number) = self.chosen.get(next.fetch_add(1, Ordering::Relaxed)) {
                action(number, &mut scratch).inspect_err(|_| {
                    // The others need not go on.
                    next.store(self.chosen.len(), Ordering::Relaxed);
                })?;
            }
            Ok(())
        };
        thread::scope(|scope| {
            let others: Vec<_> = (1..threads.min(self.chosen.len())).map(|_| scope.spawn(work)).collect();
            let mut result = work();
            for other in others {
                let theirs = other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                result = result.and(theirs);
            }
            result
        })
    }

    pub(super) fn scratch(&self) -> Result<Scratch, ImageError> {
        let unpacker = Unpacker::new(self.index.compression).map_err(ImageError::io(&self.path))?;
        Ok(Scratch { unpacker, stored: Vec::new(), raw: Vec::new() })
    }

    /// Reads and verifies the page data of a chunk.
    pub(super) fn read_chunk(&self, number: usize, scratch: &mut Scratch, raw: &mut [u8]) -> Result<(), ImageError> {
        let chunk = &self.index.chunks[number];
        let invalid = |flaw| Err(ImageError::invalid(&self.path, chunk.offset, flaw));
        let compressed = chunk.stored < chunk.raw;
        scratch.stored.resize(if compressed { chunk.padded() } else { 0 }, 0);
        let bytes = if compressed { &mut scratch.stored[..] } else { &mut *raw };
        self.read_at(bytes, chunk.offset)?;
        self.blank(number, bytes);
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

    /// Puts zeros in the place of dropped pages. A compressed store has none.
    fn blank(&self, number: usize, raw: &mut [u8]) {
        let range = self.range(number);
        for part in self.dropped.within(range.clone()) {
            raw[bytes_of(&range, &part)].fill(0);
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

/// Where the pages of `part` are in the page data of a chunk with the pages of `chunk`.
pub(super) fn bytes_of(chunk: &Range<PageIndex>, part: &Range<PageIndex>) -> Range<usize> {
    (part.start - chunk.start) as usize * PAGE..(part.end - chunk.start) as usize * PAGE
}
