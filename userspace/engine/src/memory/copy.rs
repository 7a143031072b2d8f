//! Copying the pages of a frozen tree into the page store.

use super::private::PrivatePages;
use crate::{
    error::{Context, Error, Result},
    kernel::{PAGE, pagemap::Pagemap, pagemap::Range, proc},
    objects::shared_memory,
};
use standstill_images::{
    store::{Buffer, PageWriter},
    types::{PageRun, SharedMemory},
};
use std::{collections::HashMap, fs::File, io, os::fd::OwnedFd, os::unix::fs::FileExt};

/// What was copied and what was not, in pages.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub stored: u64,
    pub zero: u64,
    pub shared: u64,
}

/// Where the pages of one address space are: address → page frame and place in the store.
type Frames = HashMap<u64, (u64, u64)>;

/// Copies pages straight from the target into the buffers that are written to the store.
pub(crate) struct Copier<'a> {
    store: &'a mut PageWriter,
    /// What is being filled, and how many pages were handed over before it.
    buffer: Option<Buffer>,
    submitted: u64,
    counts: Counts,
    /// Pages of zeros are stored as well.
    zeros_count: bool,
    /// Frames of processes whose children are still to come.
    frames: HashMap<i32, Frames>,
}

impl<'a> Copier<'a> {
    pub(crate) fn new(store: &'a mut PageWriter) -> Self {
        Self {
            store,
            buffer: None,
            submitted: 0,
            counts: Counts::default(),
            zeros_count: false,
            frames: HashMap::new(),
        }
    }

    /// Hands over the rest; the totals.
    pub(crate) fn finish(mut self) -> Result<Counts> {
        if let Some(buffer) = self.buffer.take() {
            self.store.append_buffer(buffer)?;
        }
        Ok(self.counts)
    }

    /// Copies the pages of a process. Pages whose frame `parent`, copied before, has at the same address are stored
    /// once. `has_children`: remember the frames for them.
    pub(crate) fn private(
        &mut self,
        pages: &PrivatePages,
        parent: Option<i32>,
        has_children: bool,
    ) -> Result<Vec<PageRun>> {
        let pid = pages.pid;
        let theirs = parent.and_then(|p| self.frames.remove(&p));
        let open = || Pagemap::open(pid).context(|| format!("open the pagemap of {pid}"));
        let pagemap = (has_children || theirs.is_some()).then(open).transpose()?;
        let mut own = Frames::new();
        let mut runs = Vec::new();
        let memory = File::open(proc::path(pid, "mem")).context(|| format!("open the memory of {pid}"))?;
        let over_file = |range: &Range| pages.over_files.binary_search_by_key(&range.start, |r| r.start).is_ok();
        for cluster in clusters(&pages.ranges) {
            let first = cluster[0].start;
            let mut frames = Vec::new();
            if let Some(pagemap) = &pagemap {
                let count = (cluster[cluster.len() - 1].end - first) / PAGE;
                frames = pagemap.frames(first, count).context(|| format!("read the pagemap of {pid}"))?;
            }
            // Neighbours that are alike are read at once, whatever mappings they are in.
            for group in cluster.chunk_by(|a, b| a.end == b.start && over_file(a) == over_file(b)) {
                let range = Range { start: group[0].start, end: group[group.len() - 1].end };
                self.zeros_count = over_file(&range);
                if pagemap.is_none() {
                    self.range(pid, range, &memory, &mut runs)?;
                    continue;
                }
                let at = |address: u64| ((address - first) / PAGE) as usize;
                let frames = &frames[at(range.start)..at(range.end)];
                self.differing(pid, range, frames, theirs.as_ref(), &memory, &mut runs)?;
                if has_children {
                    remember(&mut own, &runs, range, frames);
                }
            }
        }
        if let (Some(parent), Some(theirs)) = (parent, theirs) {
            self.frames.insert(parent, theirs);
        }
        self.zeros_count = false;
        if has_children {
            self.frames.insert(pid, own);
        }
        Ok(runs)
    }

    /// Copies the pages of a range whose frames are not the parent's.
    fn differing(
        &mut self,
        pid: i32,
        range: Range,
        frames: &[u64],
        theirs: Option<&Frames>,
        memory: &File,
        runs: &mut Vec<PageRun>,
    ) -> Result<()> {
        let shared = |n: usize| {
            let at = theirs?.get(&(range.start + n as u64 * PAGE))?;
            (frames[n] != 0 && at.0 == frames[n]).then_some(at.1)
        };
        let shared: Vec<Option<u64>> = (0..frames.len()).map(shared).collect();
        let mut n = 0;
        for same in shared.chunk_by(|a, b| a.is_some() == b.is_some()) {
            let start = range.start + n as u64 * PAGE;
            if same[0].is_some() {
                for (i, store) in same.iter().flatten().enumerate() {
                    push(runs, start + i as u64 * PAGE, 1, *store);
                }
                self.counts.shared += same.len() as u64;
            } else {
                let part = Range { start, end: start + same.len() as u64 * PAGE };
                self.range(pid, part, memory, runs)?;
            }
            n += same.len();
        }
        Ok(())
    }

    fn range(&mut self, pid: i32, range: Range, memory: &File, runs: &mut Vec<PageRun>) -> Result<()> {
        // Not process_vm_readv(2): it pins pages, for which the kernel gives a process that shares them copy-on-write
        // copies of its own, and it keeps to the process's own protections.
        self.copy(range.start, range.end, runs, |at, buffer| {
            match memory.read_at(buffer, at).context(|| format!("read the memory of {pid} at {at:x}"))? {
                n if n < PAGE as usize => Err(Error::Died(pid)),
                n => Ok(n),
            }
        })
    }

    /// Stores the pages from `start` to `end` that hold something. `read` fills a buffer from an address on and tells how
    /// much it read: a page at least.
    fn copy(
        &mut self,
        start: u64,
        end: u64,
        runs: &mut Vec<PageRun>,
        read: impl Fn(u64, &mut [u8]) -> Result<usize>,
    ) -> Result<()> {
        let page = PAGE as usize;
        let mut at = start;
        while at < end {
            let mut buffer = self.buffer.take().unwrap_or_else(|| self.store.take_buffer());
            let first = self.submitted + (buffer.filled().len() / page) as u64;
            let spare = buffer.spare_mut();
            let len = spare.len().min((end - at) as usize);
            let got = read(at, &mut spare[..len])? / page * page;
            let kept = self.keep(at, &mut spare[..got], first, runs);
            buffer.advance(kept);
            at += got as u64;
            if buffer.spare_mut().is_empty() {
                self.submitted += (buffer.filled().len() / page) as u64;
                self.store.append_buffer(buffer)?;
            } else {
                self.buffer = Some(buffer);
            }
        }
        Ok(())
    }

    /// Moves the pages that hold something to the front and notes where they go; how many bytes they are.
    fn keep(&mut self, start: u64, pages: &mut [u8], first: u64, runs: &mut Vec<PageRun>) -> usize {
        let page = PAGE as usize;
        let is_zero = |page: &[u8]| !self.zeros_count && is_zero(page);
        let (mut from, mut kept) = (0, 0);
        while from < pages.len() {
            let zero = is_zero(&pages[from..from + page]);
            let mut to = from + page;
            while to < pages.len() && is_zero(&pages[to..to + page]) == zero {
                to += page;
            }
            let count = ((to - from) / page) as u64;
            if zero {
                self.counts.zero += count;
            } else {
                if kept != from {
                    pages.copy_within(from..to, kept);
                }
                push(runs, start + from as u64, count, first + (kept / page) as u64);
                self.counts.stored += count;
                kept += to - from;
            }
            from = to;
        }
        kept
    }

    /// Copies the contents of a shared object.
    pub(crate) fn shared(&mut self, object: &mut SharedMemory, source: &OwnedFd) -> Result<()> {
        let context = || format!("read shared memory object {}", object.id);
        let file = File::from(source.try_clone().context(context)?);
        let ranges = shared_memory::data_ranges(source, object.size).context(context)?;
        let mut runs = Vec::new();
        for (start, end) in ranges {
            self.copy(start, end, &mut runs, |at, buffer| {
                // The last page of a file may be cut short: the rest of it is zeros.
                let n = read_all(&file, at, buffer).context(context)?;
                buffer[n..].fill(0);
                Ok(buffer.len())
            })?;
        }
        object.pages = runs;
        Ok(())
    }
}

/// Ranges so near to each other that the page frames of all of them, and of what is between, are read at once.
fn clusters(ranges: &[Range]) -> impl Iterator<Item = &[Range]> {
    /// Page table entries that are read as quickly as a system call is made.
    const NEAR: u64 = 16 * PAGE;
    ranges.chunk_by(|a, b| b.start - a.end <= NEAR)
}

/// Reads until the buffer is full or the file ends.
pub(super) fn read_all(file: &File, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let mut n = 0;
    while n < buffer.len() {
        match file.read_at(&mut buffer[n..], offset + n as u64)? {
            0 => break,
            read => n += read,
        }
    }
    Ok(n)
}

/// Adds pages to a list of runs.
fn push(runs: &mut Vec<PageRun>, start: u64, pages: u64, store: u64) {
    match runs.last_mut() {
        Some(last) if last.start + last.pages * PAGE == start && last.store + last.pages == store => {
            last.pages += pages
        }
        _ => runs.push(PageRun { start, pages, store }),
    }
}

/// Notes where the pages of `range` went.
fn remember(own: &mut Frames, runs: &[PageRun], range: Range, frames: &[u64]) {
    for run in runs.iter().rev().take_while(|r| r.start + r.pages * PAGE > range.start) {
        for n in 0..run.pages {
            let address = run.start + n * PAGE;
            if address >= range.start && address < range.end {
                let frame = frames[((address - range.start) / PAGE) as usize];
                own.insert(address, (frame, run.store + n));
            }
        }
    }
}

/// Whether a page holds only zeros.
pub(crate) fn is_zero(page: &[u8]) -> bool {
    // The first word decides for most pages; the rest is compared as fast as memcmp goes.
    static ZEROS: [u8; PAGE as usize] = [0; PAGE as usize];
    page[..8] == ZEROS[..8] && page == ZEROS
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::sys::Mapping;
    use standstill_images::store::Compression;

    #[test]
    fn near_ranges_are_one_cluster() {
        let range = |start: u64, end: u64| Range { start: start * PAGE, end: end * PAGE };
        let ranges = [range(0, 1), range(1, 4), range(20, 21), range(38, 39)];
        assert_eq!(clusters(&ranges).map(<[Range]>::len).collect::<Vec<_>>(), [3, 1]);
        assert_eq!(clusters(&[]).count(), 0);
    }

    #[test]
    fn zeros_are_stored_where_they_hide_a_file() {
        let memory = Mapping::anonymous(2 * PAGE).unwrap();
        memory.bytes_mut().fill(0);
        let (start, middle) = (memory.start(), memory.start() + PAGE);
        let ranges = vec![Range { start, end: middle }, Range { start: middle, end: middle + PAGE }];
        let over_files = vec![ranges[1]];
        let pages = PrivatePages { pid: std::process::id() as i32, ranges, over_files };
        let dir = tempfile::tempdir().unwrap();
        let mut store = PageWriter::create(&dir.path().join("pages"), Compression::None).unwrap();
        let mut copier = Copier::new(&mut store);
        let runs = copier.private(&pages, None, false).unwrap();
        assert_eq!(runs, [PageRun { start: middle, pages: 1, store: 0 }]);
        assert_eq!((copier.finish().unwrap().zero, runs.len()), (1, 1));
    }
}
