//! Writing a page store: filled buffers go to threads that checksum, compress and write them.

use super::{
    CHUNK, Chunk, Compression, PAGE, PageIndex, PageStoreIndex, Progress,
    buffer::{Buffer, Pool},
    codec::Packer,
};
use crate::ImageError;
use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl},
};
use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    panic::resume_unwind,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread::{self, JoinHandle},
};
use twox_hash::XxHash3_64;

/// Memory for page data that waits to be written, unless another limit is given.
const BUFFER_LIMIT: u64 = 64 << 20;

/// Writes a page store.
///
/// Page data is copied with [`append`](Self::append), or read straight into a buffer that is handed over:
///
/// ```no_run
/// # use standstill_images::{ImageError, store::{Compression, PageWriter}};
/// # fn main() -> Result<(), ImageError> {
/// let mut writer = PageWriter::create("pages.img".as_ref(), Compression::None)?;
/// let mut buffer = writer.take_buffer();
/// buffer.spare_mut()[..8192].fill(7);
/// buffer.advance(8192);
/// let first = writer.append_buffer(buffer)?;
/// let index = writer.finish()?;
/// # Ok(())
/// # }
/// ```
pub struct PageWriter {
    output: Arc<Output>,
    pool: Arc<Pool>,
    /// What [`Self::append`] has not handed over yet.
    current: Option<Buffer>,
    pages: PageIndex,
    chunks: usize,
    jobs: Option<Sender<Job>>,
    workers: Vec<JoinHandle<()>>,
}

/// A chunk to be written.
struct Job {
    number: usize,
    first: PageIndex,
    data: Buffer,
}

/// What the threads share.
struct Output {
    path: PathBuf,
    file: File,
    compression: Compression,
    told: Arc<Progress>,
    /// Where the next compressed chunk goes.
    end: AtomicU64,
    /// So many bytes of the disk are the file's.
    allocated: Mutex<u64>,
    done: Mutex<Done>,
}

#[derive(Default)]
struct Done {
    chunks: Vec<(usize, Chunk)>,
    /// The rest is not written any more.
    stop: bool,
    error: Option<io::Error>,
}

impl PageWriter {
    /// Creates the file, readable for its owner only.
    ///
    /// # Errors
    /// I/O errors.
    pub fn create(path: &Path, compression: Compression) -> Result<Self, ImageError> {
        Self::create_telling(path, compression, Arc::default())
    }

    /// The same, and `told` is told of what is written.
    ///
    /// # Errors
    /// I/O errors.
    pub fn create_telling(path: &Path, compression: Compression, told: Arc<Progress>) -> Result<Self, ImageError> {
        let io = || ImageError::io(path);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(io())?;
        // Where the file system has no direct I/O, the page cache does as well.
        let _ = fcntl(&file, FcntlArg::F_SETFL(OFlag::O_DIRECT));
        let (end, allocated, done) = Default::default();
        let output = Arc::new(Output { path: path.into(), file, compression, told, end, allocated, done });
        let (jobs, receiver) = channel();
        let receiver = Arc::new(Mutex::new(receiver));
        let threads = thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 8));
        let mut writer = Self {
            output,
            pool: Pool::new(BUFFER_LIMIT),
            current: None,
            pages: 0,
            chunks: 0,
            jobs: Some(jobs),
            workers: Vec::with_capacity(threads),
        };
        for _ in 0..threads {
            let mut packer = Packer::new(compression).map_err(io())?;
            let (output, receiver) = (Arc::clone(&writer.output), Arc::clone(&receiver));
            let worker = thread::Builder::new().name("page-writer".into());
            let worker = worker.spawn(move || output.work(&receiver, &mut packer)).map_err(io())?;
            writer.workers.push(worker);
        }
        Ok(writer)
    }

    /// Sets how many bytes of page data may wait to be written; two chunks at least. Buffers that were made stay.
    pub fn set_limit(&self, bytes: u64) {
        self.pool.set_limit(bytes);
    }

    /// Who is told of what is written.
    pub fn told(&self) -> &Progress {
        &self.output.told
    }

    /// Waits until so many bytes can be taken in without waiting for the disk; more than the limit allows count as all of it.
    /// Nothing but a buffer that is being filled may be in use meanwhile.
    pub fn await_room(&self, bytes: u64) {
        self.pool.await_room(bytes);
    }

    /// Makes the buffers for so many bytes now, as far as the limit allows: no page fault has to be paid for later.
    pub fn reserve(&self, bytes: u64) {
        self.pool.reserve(bytes);
    }

    /// Adds whole pages; the number of the first one, the others follow.
    ///
    /// # Errors
    /// When anything could not be written so far.
    ///
    /// # Panics
    /// When `data` are not whole pages.
    pub fn append(&mut self, mut data: &[u8]) -> Result<PageIndex, ImageError> {
        assert!(data.len().is_multiple_of(PAGE), "{} bytes are not whole pages", data.len());
        let current = self.current.as_ref().map_or(0, |b| b.filled().len());
        let first = self.pages + (current / PAGE) as u64;
        while !data.is_empty() {
            let mut buffer = self.current.take().unwrap_or_else(|| self.pool.take());
            let spare = buffer.spare_mut();
            let (now, rest) = data.split_at(data.len().min(spare.len()));
            spare[..now.len()].copy_from_slice(now);
            buffer.advance(now.len());
            data = rest;
            if buffer.filled().len() == CHUNK {
                self.submit(buffer)?;
            } else {
                self.current = Some(buffer);
            }
        }
        Ok(first)
    }

    /// An empty buffer for [`Self::append_buffer`]; waits until one is free, so one thread must not hold them all.
    pub fn take_buffer(&self) -> Buffer {
        self.pool.take()
    }

    /// Adds the page data of a buffer as a chunk of its own; the number of the first page, the others follow.
    ///
    /// # Errors
    /// When anything could not be written so far.
    pub fn append_buffer(&mut self, buffer: Buffer) -> Result<PageIndex, ImageError> {
        if let Some(current) = self.current.take() {
            self.submit(current)?;
        }
        self.submit(buffer)
    }

    fn submit(&mut self, data: Buffer) -> Result<PageIndex, ImageError> {
        self.output.check()?;
        let first = self.pages;
        if !data.filled().is_empty() {
            self.pages += (data.filled().len() / PAGE) as u64;
            let job = Job { number: self.chunks, first, data };
            self.chunks += 1;
            let jobs = self.jobs.as_ref().expect("only finish and drop close the queue");
            jobs.send(job).expect("the threads end after the queue is closed");
        }
        Ok(first)
    }

    /// Writes what is left and makes it durable; the table of contents.
    ///
    /// # Errors
    /// When anything could not be written.
    pub fn finish(mut self) -> Result<PageStoreIndex, ImageError> {
        if let Some(current) = self.current.take() {
            self.submit(current)?;
        }
        self.close().unwrap_or_else(|panic| resume_unwind(panic));
        let Output { path, file, compression, .. } = &*self.output;
        self.output.check()?;
        if *self.output.allocated() > 0 {
            let end = match compression {
                Compression::None => self.pages * PAGE as u64,
                Compression::Lz4 | Compression::Zstd(_) => self.output.end.load(Ordering::Relaxed),
            };
            file.set_len(end).map_err(ImageError::io(path))?;
        }
        file.sync_all().map_err(ImageError::io(path))?;
        let mut chunks = std::mem::take(&mut self.output.done().chunks);
        chunks.sort_unstable_by_key(|(number, _)| *number);
        Ok(PageStoreIndex {
            file: path.file_name().unwrap_or_default().to_string_lossy().into(),
            compression: *compression,
            chunks: chunks.into_iter().map(|(_, chunk)| chunk).collect(),
            dropped: Vec::new(),
        })
    }

    /// Ends the threads; the panic of one that panicked.
    fn close(&mut self) -> thread::Result<()> {
        self.jobs = None;
        self.workers.drain(..).map(JoinHandle::join).fold(Ok(()), thread::Result::and)
    }
}

impl std::fmt::Debug for PageWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageWriter")
            .field("path", &self.output.path)
            .field("pages", &self.pages)
            .finish_non_exhaustive()
    }
}

/// The file is left as it is: an [`ImageDir`](crate::publish::ImageDir) removes it.
impl Drop for PageWriter {
    fn drop(&mut self) {
        self.output.done().stop = true;
        let _ = self.close();
    }
}

impl Output {
    fn done(&self) -> MutexGuard<'_, Done> {
        self.done.lock().expect("no thread panics while it holds the results")
    }

    fn allocated(&self) -> MutexGuard<'_, u64> {
        self.allocated.lock().expect("no thread panics while it holds it")
    }

    /// The first error, as often as it is asked for.
    fn check(&self) -> Result<(), ImageError> {
        let done = self.done();
        let Some(error) = &done.error else { return Ok(()) };
        let again = error.raw_os_error().map_or_else(|| error.kind().into(), io::Error::from_raw_os_error);
        Err(ImageError::io(&self.path)(again))
    }

    /// One thread: writes chunks until there will be no more.
    fn work(&self, jobs: &Mutex<Receiver<Job>>, packer: &mut Packer) {
        /// Whoever's memory is written out needs the processors more.
        const NICE: i32 = 10;
        // SAFETY: no memory is passed. Only this thread is meant (0), and that it fails does no harm.
        unsafe { nix::libc::setpriority(nix::libc::PRIO_PROCESS, 0, NICE) };
        let next = || jobs.lock().expect("recv does not panic").recv();
        while let Ok(job) = next() {
            if self.done().stop {
                continue;
            }
            let result = self.write(&job, packer);
            let mut done = self.done();
            match result {
                Ok(chunk) => done.chunks.push((job.number, chunk)),
                Err(error) => {
                    done.stop = true;
                    done.error.get_or_insert(error);
                }
            }
        }
    }

    fn write(&self, job: &Job, packer: &mut Packer) -> io::Result<Chunk> {
        let raw = job.data.filled();
        let (stored, bytes) = packer.pack(raw)?.unwrap_or((raw.len(), raw));
        let checksum = XxHash3_64::oneshot(bytes);
        let offset = match self.compression {
            Compression::None => job.first * PAGE as u64,
            Compression::Lz4 | Compression::Zstd(_) => self.end.fetch_add(bytes.len() as u64, Ordering::Relaxed),
        };
        self.write_at(bytes, offset)?;
        self.told.wrote(raw.len() as u64);
        Ok(Chunk { offset, stored: stored as u32, raw: raw.len() as u32, checksum })
    }

    /// Takes disk space ahead of what is written, which makes direct I/O a quarter faster: writes behind the end of a file
    /// wait for each other.
    fn allocate(&self, end: u64) {
        /// Files that stay smaller are not worth it.
        const LARGE: u64 = 32 << 20;
        const STEP: u64 = 128 << 20;
        let mut allocated = self.allocated();
        if end > LARGE.max(*allocated) {
            let to = end.next_multiple_of(STEP);
            // Without it the writes tell what is wrong, if anything is.
            let done = fallocate(&self.file, FallocateFlags::empty(), *allocated as i64, (to - *allocated) as i64);
            *allocated = if done.is_ok() { to } else { u64::MAX };
        }
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.allocate(offset + bytes.len() as u64);
        let result = self.file.write_all_at(bytes, offset);
        if result.as_ref().is_err_and(|e| e.raw_os_error() == Some(Errno::EINVAL as i32)) {
            // Direct I/O with other alignments than ours: through the page cache instead.
            fcntl(&self.file, FcntlArg::F_SETFL(OFlag::empty()))?;
            return self.file.write_all_at(bytes, offset);
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_writer_ends_its_threads_and_gives_up_its_memory() {
        let dir = tempfile::tempdir().expect("make a directory");
        let mut writer = PageWriter::create(&dir.path().join("pages.img"), Compression::Zstd(19)).expect("create");
        for n in 0..4000 {
            writer.append(&[n as u8; PAGE]).expect("append");
        }
        let (output, pool) = (Arc::downgrade(&writer.output), Arc::downgrade(&writer.pool));
        drop(writer);
        assert_eq!((output.strong_count(), pool.strong_count()), (0, 0));
    }

    #[test]
    fn a_large_file_ends_with_its_last_page() {
        let dir = tempfile::tempdir().expect("make a directory");
        let path = dir.path().join("pages.img");
        let mut writer = PageWriter::create(&path, Compression::None).expect("create");
        for n in 0..70u8 {
            writer.append(&vec![n; CHUNK - PAGE]).expect("append");
        }
        let output = Arc::clone(&writer.output);
        let index = writer.finish().expect("finish");
        assert!(*output.allocated() > 70 << 20, "no space was taken ahead");
        assert_eq!(std::fs::metadata(&path).expect("it is there").len(), 70 * (CHUNK - PAGE) as u64);
        let reader = crate::store::PageReader::open(&path, &index).expect("open");
        let mut last = vec![0; PAGE];
        reader.read_pages(70 * (CHUNK / PAGE - 1) as u64 - 1, &mut last).expect("read");
        assert_eq!(last, [69; PAGE]);
    }

    #[test]
    fn an_error_is_told_again_and_again() {
        let dir = tempfile::tempdir().expect("make a directory");
        let mut writer = PageWriter::create(&dir.path().join("pages.img"), Compression::None).expect("create");
        writer.output.done().error = Some(Errno::ENOSPC.into());
        for _ in 0..2 {
            let error = writer.append(&vec![1; 2 * CHUNK]).expect_err("it failed before");
            assert!(matches!(error, ImageError::NoSpace(_)), "{error}");
        }
        let error = writer.finish().expect_err("it failed before");
        assert!(matches!(error, ImageError::NoSpace(_)), "{error}");
    }
}
