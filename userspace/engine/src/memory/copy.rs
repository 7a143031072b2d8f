//! Copying the pages of a frozen tree into the page store.

use super::collect::PrivatePages;
use crate::{
    error::{Context, Error, Result},
    kernel::{PAGE, pagemap::Pagemap, pagemap::Range, proc, sys},
    objects::shared_memory,
};
use standstill_images::{
    store::PageWriter,
    types::{PageRun, SharedMemory},
};
use std::{collections::HashMap, fs::File, os::fd::OwnedFd, os::unix::fs::FileExt};

/// What was copied and what was not, in pages.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub stored: u64,
    pub zero: u64,
    pub shared: u64,
}

/// Where the pages of one address space are: address → page frame and place in the store.
type Frames = HashMap<u64, (u64, u64)>;

/// Copies private pages, process by process.
pub(crate) struct Copier<'a> {
    store: &'a mut PageWriter,
    counts: Counts,
    /// Frames of processes whose children are still to come.
    frames: HashMap<i32, Frames>,
    buffer: Vec<u8>,
}

impl<'a> Copier<'a> {
    pub(crate) fn new(store: &'a mut PageWriter) -> Self {
        Self { store, counts: Counts::default(), frames: HashMap::new(), buffer: vec![0; 1 << 20] }
    }

    /// The totals.
    pub(crate) fn counts(&self) -> Counts {
        self.counts
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
        let with_frames = has_children || parent.is_some_and(|p| self.frames.contains_key(&p));
        let pagemap = Pagemap::open(pid).context(|| format!("open the pagemap of {pid}"))?;
        let mut own = Frames::new();
        let mut runs = Vec::new();
        let memory = File::open(proc::path(pid, "mem")).context(|| format!("open the memory of {pid}"))?;
        for range in &pages.ranges {
            if !with_frames {
                self.range(pid, *range, pages, &memory, &mut runs)?;
                continue;
            }
            let count = (range.end - range.start) / PAGE;
            let frames = pagemap.frames(range.start, count).context(|| format!("read the pagemap of {pid}"))?;
            let theirs = parent.and_then(|p| self.frames.get(&p));
            let shared: Vec<Option<u64>> = frames
                .iter()
                .enumerate()
                .map(|(n, &frame)| {
                    let at = theirs?.get(&(range.start + n as u64 * PAGE))?;
                    (frame != 0 && at.0 == frame).then_some(at.1)
                })
                .collect();
            let mut n = 0;
            for same in shared.chunk_by(|a, b| a.is_some() == b.is_some()) {
                let start = range.start + n as u64 * PAGE;
                if same[0].is_some() {
                    for (i, store) in same.iter().enumerate() {
                        push(&mut runs, start + i as u64 * PAGE, 1, store.expect("chunked by is_some"));
                    }
                    self.counts.shared += same.len() as u64;
                } else {
                    let part = Range { start, end: start + same.len() as u64 * PAGE };
                    self.range(pid, part, pages, &memory, &mut runs)?;
                }
                n += same.len();
            }
            if has_children {
                remember(&mut own, &runs, *range, &frames);
            }
        }
        if has_children {
            self.frames.insert(pid, own);
        }
        Ok(runs)
    }

    fn range(
        &mut self,
        pid: i32,
        range: Range,
        pages: &PrivatePages,
        memory: &File,
        runs: &mut Vec<PageRun>,
    ) -> Result<()> {
        // process_vm_readv(2) keeps to the process's own protections; /proc/pid/mem does not.
        let unreadable = pages.unreadable.iter().any(|u| u.start < range.end && range.start < u.end);
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut at = range.start;
        while at < range.end {
            let len = (range.end - at).min(buffer.len() as u64) as usize;
            let read = if unreadable {
                memory.read_exact_at(&mut buffer[..len], at).map(|()| len)
            } else {
                sys::process_vm_read(pid, at, &mut buffer[..len])
            };
            let n = read.context(|| format!("read the memory of {pid} at {at:x}"))? / PAGE as usize * PAGE as usize;
            if n == 0 {
                return Err(Error::Died(pid));
            }
            self.append(at, &mut buffer[..n], runs)?;
            at += n as u64;
        }
        self.buffer = buffer;
        Ok(())
    }

    /// Stores the pages of `buffer` that hold something.
    fn append(&mut self, start: u64, buffer: &mut [u8], runs: &mut Vec<PageRun>) -> Result<()> {
        let page = PAGE as usize;
        let mut from = 0;
        while from < buffer.len() {
            let zero = is_zero(&buffer[from..from + page]);
            let mut to = from + page;
            while to < buffer.len() && is_zero(&buffer[to..to + page]) == zero {
                to += page;
            }
            let count = ((to - from) / page) as u64;
            if zero {
                self.counts.zero += count;
            } else {
                let store = self.store.append(&buffer[from..to])?;
                push(runs, start + from as u64, count, store);
                self.counts.stored += count;
            }
            from = to;
        }
        Ok(())
    }

    /// Copies the contents of a shared object.
    pub(crate) fn shared(&mut self, object: &mut SharedMemory, source: &OwnedFd) -> Result<()> {
        let context = || format!("read shared memory object {}", object.id);
        let file = File::from(source.try_clone().context(context)?);
        let ranges = shared_memory::data_ranges(source, object.size).context(context)?;
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut runs = Vec::new();
        for (start, end) in ranges {
            let mut at = start;
            while at < end {
                let len = (end - at).min(buffer.len() as u64) as usize;
                // The last page of a file may be cut short: the rest of it is zeros.
                let mut n = 0;
                while n < len {
                    match file.read_at(&mut buffer[n..len], at + n as u64).context(context)? {
                        0 => break,
                        read => n += read,
                    }
                }
                buffer[n..len].fill(0);
                self.append(at, &mut buffer[..len], &mut runs)?;
                at += len as u64;
            }
        }
        self.buffer = buffer;
        object.pages = runs;
        Ok(())
    }
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

fn is_zero(page: &[u8]) -> bool {
    // The first word decides for most pages; the rest is compared as fast as memcmp goes.
    static ZEROS: [u8; PAGE as usize] = [0; PAGE as usize];
    page[..8] == ZEROS[..8] && page == ZEROS
}
