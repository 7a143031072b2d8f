//! Copying the pages of a frozen tree into the page store.

use super::{known, private::PrivatePages, ranges, source::Source};
use crate::{
    error::{Context, Error, Result},
    image::push_run,
    kernel::{PAGE, hugetlb, pagemap::Pagemap, pagemap::Range, pagemap::Writes},
};
use standstill_images::{
    store::{Buffer, PageIndex, PageWriter},
    types::PageRun,
};
use std::{fs::File, io, os::fd::OwnedFd, os::unix::fs::FileExt};

/// What was copied and what was not, in pages.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub stored: u64,
    pub zero: u64,
    pub shared: u64,
}

/// A process from which another has inherited pages, copied before it.
#[derive(Clone, Copy)]
pub(crate) struct Parent<'a> {
    pub pid: i32,
    /// Where the store has its pages.
    pub runs: &'a [PageRun],
}

/// What became of the pages that were to be copied.
#[derive(Debug, Default)]
pub(crate) struct Copied {
    /// Where those are that hold something.
    pub runs: Vec<PageRun>,
    /// Pages that went while a running process was copied.
    pub gone: Vec<Range>,
}

/// Pages of zeros that are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Zeros {
    None,
    /// The first one of each huge page, so that a restore takes the same huge pages from the machine.
    First,
    /// They hide what is in a file.
    All,
}

/// Copies pages straight from the target into the buffers that are written to the store.
pub(crate) struct Copier<'a> {
    pub(crate) store: &'a mut PageWriter,
    /// What is being filled, and the number of its first page.
    buffer: Option<Buffer>,
    next: PageIndex,
    counts: Counts,
    /// Which pages of zeros are stored as well.
    zeros: Zeros,
    /// The processes may run.
    running: bool,
}

impl<'a> Copier<'a> {
    /// For processes that may run: pages may go before they are copied. `first`: number of the first page of the store.
    pub(crate) fn new(store: &'a mut PageWriter, first: PageIndex) -> Self {
        Self { store, buffer: None, next: first, counts: Counts::default(), zeros: Zeros::None, running: true }
    }

    /// From now on the processes do not run.
    pub(crate) fn stopped(&mut self) {
        self.running = false;
    }

    /// What was copied so far.
    pub(crate) fn counts(&self) -> Counts {
        self.counts
    }

    /// Hands over the rest; the totals.
    pub(crate) fn finish(mut self) -> Result<Counts> {
        if let Some(buffer) = self.buffer.take() {
            self.store.append_buffer(buffer)?;
        }
        Ok(self.counts)
    }

    /// Copies the pages of a process. Those whose frame `parent` has at the same address are stored once.
    pub(crate) fn private(&mut self, pages: &PrivatePages, parent: Option<Parent<'_>>) -> Result<Copied> {
        self.expecting(ranges::size(&pages.ranges), |copier| copier.each(pages, parent))
    }

    /// Tells of the bytes that `copy` may store before it does, and afterwards of those that it has not.
    fn expecting<T>(&mut self, bytes: u64, copy: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let before = self.counts.stored;
        self.store.told().expect(bytes);
        let copied = copy(self)?;
        self.store.told().drop_expected(bytes - (self.counts.stored - before) * PAGE);
        Ok(copied)
    }

    fn each(&mut self, pages: &PrivatePages, parent: Option<Parent<'_>>) -> Result<Copied> {
        let pid = pages.pid;
        if pages.ranges.is_empty() {
            return Ok(Copied::default());
        }
        let source = Source::open(pid)?;
        let theirs = match parent {
            Some(parent) => {
                let theirs = Pagemap::open(parent.pid).context(|| format!("open the pagemap of {}", parent.pid))?;
                Some((theirs, parent))
            }
            None => None,
        };
        let mut copied = Copied::default();
        for cluster in clusters(&parts(pages)) {
            let first = cluster[0].0.start;
            let mut inherited = Vec::new();
            if let Some((theirs, parent)) = &theirs {
                let whole = Range { start: first, end: cluster[cluster.len() - 1].0.end };
                inherited = self.inherited(source.pages(), theirs, *parent, whole)?;
            }
            // Neighbours that are alike are read at once, whatever mappings they are in.
            for group in cluster.chunk_by(|a, b| a.0.end == b.0.start && a.1 == b.1) {
                let range = Range { start: group[0].0.start, end: group[group.len() - 1].0.end };
                self.zeros = group[0].1;
                if inherited.is_empty() {
                    self.range(pid, range, &source, &mut copied)?;
                    continue;
                }
                let at = |address: u64| ((address - first) / PAGE) as usize;
                self.differing(pid, range, &inherited[at(range.start)..at(range.end)], &source, &mut copied)?;
            }
        }
        self.zeros = Zeros::None;
        Ok(copied)
    }

    /// Where the pages of a range are that a process has inherited from its parent.
    fn inherited(
        &self,
        own: &Pagemap,
        theirs: &Pagemap,
        parent: Parent<'_>,
        range: Range,
    ) -> Result<Vec<Option<PageIndex>>> {
        let count = (range.end - range.start) / PAGE;
        let context = || format!("compare page frames with process {}", parent.pid);
        let frames = own.frames(range.start, count).context(context)?;
        let parents = theirs.frames(range.start, count).context(context)?;
        let mut changed = Vec::new();
        if self.running {
            // What the parent has written to since it was copied is not what the store has. Asked after the frames, so
            // that all others are known to have been what they are when the frames were read.
            theirs.written(range, &[], Writes::Seen, &mut changed).context(context)?;
        }
        let mut changed = changed.into_iter().peekable();
        let shared = frames.iter().zip(&parents).zip((range.start..).step_by(PAGE as usize));
        Ok(shared
            .map(|((own, theirs), address)| {
                while changed.next_if(|c: &Range| c.end <= address).is_some() {}
                let same = *own != 0 && own == theirs && changed.peek().is_none_or(|c| c.start > address);
                same.then(|| known::find(parent.runs, address)).flatten()
            })
            .collect())
    }

    /// Copies the pages of a range that are not inherited.
    fn differing(
        &mut self,
        pid: i32,
        range: Range,
        inherited: &[Option<PageIndex>],
        source: &Source,
        copied: &mut Copied,
    ) -> Result<()> {
        let mut n = 0;
        for same in inherited.chunk_by(|a, b| a.is_some() == b.is_some()) {
            let start = range.start + n as u64 * PAGE;
            if same[0].is_some() {
                for (i, &store) in same.iter().flatten().enumerate() {
                    push_run(&mut copied.runs, PageRun { start: start + i as u64 * PAGE, pages: 1, store });
                }
                self.counts.shared += same.len() as u64;
            } else {
                let part = Range { start, end: start + same.len() as u64 * PAGE };
                self.range(pid, part, source, copied)?;
            }
            n += same.len();
        }
        Ok(())
    }

    fn range(&mut self, pid: i32, range: Range, source: &Source, copied: &mut Copied) -> Result<()> {
        let running = self.running;
        self.copy(range.start, range.end, copied, |at, buffer| match source.read(at, buffer) {
            Ok(n) if n >= PAGE as usize => Ok(n),
            Ok(_) => Err(Error::Died(pid)),
            Err(e) if running && e.raw_os_error() == Some(libc::EIO) => Ok(0),
            Err(e) => Err(e).context(|| format!("read the memory of {pid} at {at:x}")),
        })
    }

    /// Stores the pages from `start` to `end` that hold something. `read` fills a buffer from an address on and tells how
    /// much it read; not even a page: the first one is gone.
    fn copy(
        &mut self,
        start: u64,
        end: u64,
        copied: &mut Copied,
        read: impl Fn(u64, &mut [u8]) -> Result<usize>,
    ) -> Result<()> {
        let page = PAGE as usize;
        let mut at = start;
        while at < end {
            let mut buffer = self.buffer.take().unwrap_or_else(|| self.store.take_buffer());
            let first = self.next + (buffer.filled().len() / page) as u64;
            let spare = buffer.spare_mut();
            let len = spare.len().min((end - at) as usize);
            let got = match read(at, &mut spare[..len]) {
                Ok(got) => got / page * page,
                Err(e) => {
                    // A process has ended. What the buffer has is of others.
                    self.buffer = Some(buffer);
                    return Err(e);
                }
            };
            let kept = self.keep(at, &mut spare[..got], first, &mut copied.runs);
            buffer.advance(kept);
            if got == 0 {
                ranges::push(&mut copied.gone, Range { start: at, end: at + PAGE });
            }
            at += got.max(page) as u64;
            if buffer.spare_mut().is_empty() {
                self.next += (buffer.filled().len() / page) as u64;
                self.store.append_buffer(buffer)?;
            } else {
                self.buffer = Some(buffer);
            }
        }
        Ok(())
    }

    /// Moves the pages that hold something to the front and notes where they go; how many bytes they are.
    fn keep(&mut self, start: u64, pages: &mut [u8], first: PageIndex, runs: &mut Vec<PageRun>) -> usize {
        let page = PAGE as usize;
        let zeros = self.zeros;
        let is_zero = |at: usize, pages: &[u8]| match zeros {
            Zeros::All => false,
            Zeros::First if (start + at as u64).is_multiple_of(hugetlb::SMALLEST) => false,
            _ => is_zero(&pages[at..at + page]),
        };
        let (mut from, mut kept) = (0, 0);
        while from < pages.len() {
            let zero = is_zero(from, pages);
            let mut to = from + page;
            while to < pages.len() && is_zero(to, pages) == zero {
                to += page;
            }
            let count = ((to - from) / page) as u64;
            if zero {
                self.counts.zero += count;
            } else {
                if kept != from {
                    pages.copy_within(from..to, kept);
                }
                let store = first + (kept / page) as u64;
                push_run(runs, PageRun { start: start + from as u64, pages: count, store });
                self.counts.stored += count;
                kept += to - from;
            }
            from = to;
        }
        kept
    }

    /// Copies parts of a shared object; where its pages are.
    pub(crate) fn shared(&mut self, source: &OwnedFd, parts: &[Range]) -> Result<Vec<PageRun>> {
        let context = || "read shared memory".to_string();
        let file = File::from(source.try_clone().context(context)?);
        let mut copied = Copied::default();
        let bytes = parts.iter().map(|part| part.end - part.start).sum();
        self.expecting(bytes, |copier| {
            parts.iter().try_for_each(|part| {
                copier.copy(part.start, part.end, &mut copied, |at, buffer| {
                    // The last page of a file may be cut short: the rest of it is zeros.
                    let n = read_all(|part, at| file.read_at(part, at), at, buffer).context(context)?;
                    buffer[n..].fill(0);
                    Ok(buffer.len())
                })
            })
        })?;
        Ok(copied.runs)
    }
}

/// The pages to copy, cut where mappings of another kind begin.
fn parts(pages: &PrivatePages) -> Vec<(Range, Zeros)> {
    let others = ranges::subtract(&pages.ranges, &pages.over_files);
    let sets = [
        (ranges::intersect(&pages.ranges, &pages.over_files), Zeros::All),
        (ranges::intersect(&others, &pages.huge), Zeros::First),
        (ranges::subtract(&others, &pages.huge), Zeros::None),
    ];
    let mut parts: Vec<_> =
        sets.into_iter().flat_map(|(set, zeros)| set.into_iter().map(move |r| (r, zeros))).collect();
    parts.sort_unstable_by_key(|part| part.0.start);
    parts
}

/// Ranges so near to each other that the page frames of all of them, and of what is between, are read at once.
fn clusters(parts: &[(Range, Zeros)]) -> impl Iterator<Item = &[(Range, Zeros)]> {
    /// Page table entries that are read as quickly as a system call is made.
    const NEAR: u64 = 16 * PAGE;
    parts.chunk_by(|a, b| b.0.start - a.0.end <= NEAR)
}

/// Reads until the buffer is full or `read` finds nothing more.
pub(super) fn read_all(
    read: impl Fn(&mut [u8], u64) -> io::Result<usize>,
    offset: u64,
    buffer: &mut [u8],
) -> io::Result<usize> {
    let mut n = 0;
    while n < buffer.len() {
        match read(&mut buffer[n..], offset + n as u64)? {
            0 => break,
            read => n += read,
        }
    }
    Ok(n)
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
        let part = |start: u64, end: u64| (Range { start: start * PAGE, end: end * PAGE }, Zeros::None);
        let parts = [part(0, 1), part(1, 4), part(20, 21), part(38, 39)];
        assert_eq!(clusters(&parts).map(<[_]>::len).collect::<Vec<_>>(), [3, 1]);
        assert_eq!(clusters(&[]).count(), 0);
    }

    #[test]
    fn pages_are_cut_where_another_kind_of_mapping_begins() {
        let range = |start: u64, end: u64| Range { start: start * PAGE, end: end * PAGE };
        let pages = PrivatePages {
            ranges: vec![range(0, 10), range(12, 20)],
            over_files: vec![range(4, 6)],
            huge: vec![range(5, 13)],
            ..Default::default()
        };
        let expected = [
            (range(0, 4), Zeros::None),
            (range(4, 6), Zeros::All),
            (range(6, 10), Zeros::First),
            (range(12, 13), Zeros::First),
            (range(13, 20), Zeros::None),
        ];
        assert_eq!(parts(&pages), expected);
    }

    #[test]
    fn of_each_huge_page_something_is_stored() {
        // Two huge pages of zeros, with something in the middle of the first one.
        let memory = Mapping::anonymous(3 * hugetlb::SMALLEST).unwrap();
        memory.bytes_mut().fill(0);
        let start = memory.start().next_multiple_of(hugetlb::SMALLEST);
        let middle = start + 7 * PAGE;
        memory.bytes_mut()[(middle - memory.start()) as usize] = 1;
        let ranges = vec![Range { start, end: start + 2 * hugetlb::SMALLEST }];
        let pages = PrivatePages { pid: std::process::id() as i32, huge: ranges.clone(), ranges, ..Default::default() };
        let dir = tempfile::tempdir().unwrap();
        let mut store = PageWriter::create(&dir.path().join("pages"), Compression::None).unwrap();
        let runs = Copier::new(&mut store, 0).private(&pages, None).unwrap().runs;
        let run = |start: u64, store: u64| PageRun { start, pages: 1, store };
        assert_eq!(runs, [run(start, 0), run(middle, 1), run(start + hugetlb::SMALLEST, 2)]);
    }

    #[test]
    fn zeros_are_stored_where_they_hide_a_file() {
        let memory = Mapping::anonymous(2 * PAGE).unwrap();
        memory.bytes_mut().fill(0);
        let (start, middle) = (memory.start(), memory.start() + PAGE);
        let ranges = vec![Range { start, end: middle + PAGE }];
        let over_files = vec![Range { start: middle, end: middle + PAGE }];
        let pages = PrivatePages { pid: std::process::id() as i32, ranges, over_files, ..Default::default() };
        let dir = tempfile::tempdir().unwrap();
        let mut store = PageWriter::create(&dir.path().join("pages"), Compression::None).unwrap();
        let mut copier = Copier::new(&mut store, 0);
        let runs = copier.private(&pages, None).unwrap().runs;
        assert_eq!(runs, [PageRun { start: middle, pages: 1, store: 0 }]);
        assert_eq!((copier.finish().unwrap().zero, runs.len()), (1, 1));
    }

    #[test]
    fn a_process_that_cannot_be_read_costs_the_others_nothing() {
        let memory = Mapping::anonymous(3 * PAGE).unwrap();
        let page = PAGE as usize;
        [1, 2, 3].into_iter().zip(memory.bytes_mut().chunks_mut(page)).for_each(|(n, page)| page.fill(n));
        let at = |n: u64| memory.start() + n * PAGE;
        let of = |ranges: Vec<Range>| PrivatePages { pid: std::process::id() as i32, ranges, ..Default::default() };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pages");
        let mut store = PageWriter::create(&path, Compression::None).unwrap();
        let mut copier = Copier::new(&mut store, 0);
        copier.stopped();
        let first = copier.private(&of(vec![Range { start: at(0), end: at(2) }]), None).unwrap().runs;
        copier.private(&of(vec![Range { start: PAGE, end: 2 * PAGE }]), None).unwrap_err();
        let second = copier.private(&of(vec![Range { start: at(2), end: at(3) }]), None).unwrap().runs;
        copier.finish().unwrap();
        let index = store.finish().unwrap();
        let reader = standstill_images::store::PageReader::open(&path, &index).unwrap();
        for run in first.iter().chain(&second) {
            let mut pages = vec![0; (run.pages * PAGE) as usize];
            reader.read_pages(run.store, &mut pages).unwrap();
            let expected = &memory.bytes_mut()[(run.start - memory.start()) as usize..][..pages.len()];
            assert_eq!(pages, expected);
        }
    }
}
