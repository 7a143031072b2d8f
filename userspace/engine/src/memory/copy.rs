//! Copying the pages of a frozen tree into the page store.

use super::{known, private::PrivatePages, ranges, source::Source};
use crate::{
    error::{Context, Error, Result},
    image::push_run,
    kernel::{
        PAGE, hugetlb,
        pagemap::{NEAR, Pagemap, Range, Writes},
    },
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
    /// Pages among them that the store had already, as their checksums say.
    pub same: u64,
}

/// Pages of zeros that are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Zeros {
    None,
    /// The first one of each huge page, so that a restore takes the same huge pages from the machine.
    First,
    /// They hide what is in a file.
    All,
}

impl Zeros {
    /// Whether a page need not be stored.
    fn is_left_out(self, address: u64, page: &[u8]) -> bool {
        match self {
            Self::All => false,
            Self::First if address.is_multiple_of(hugetlb::SMALLEST) => false,
            _ => is_zero(page),
        }
    }
}

/// Copies pages straight from the target into the buffers that are written to the store.
pub(crate) struct Copier<'a> {
    pub(crate) store: &'a mut PageWriter,
    /// What is being filled, and the number of its first page.
    buffer: Option<Buffer>,
    next: PageIndex,
    pub(super) counts: Counts,
    /// The processes may run.
    pub(super) running: bool,
}

impl<'a> Copier<'a> {
    /// For processes that may run: pages may go before they are copied. `first`: number of the first page of the store.
    pub(crate) fn new(store: &'a mut PageWriter, first: PageIndex) -> Self {
        Self { store, buffer: None, next: first, counts: Counts::default(), running: true }
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
    pub(super) fn expecting<T>(&mut self, bytes: u64, copy: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
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
        let mut parts = parts(pages);
        let mut inherited = Vec::new();
        if let Some((theirs, parent)) = theirs {
            let all = std::mem::take(&mut parts);
            for cluster in all.chunk_by(|a, b| b.0.start - a.0.end <= NEAR) {
                let whole = Range { start: cluster[0].0.start, end: cluster[cluster.len() - 1].0.end };
                let pages = self.inherited(source.pages(), &theirs, parent, whole)?;
                for (range, zeros) in cluster {
                    let at = |address: u64| ((address - whole.start) / PAGE) as usize;
                    let pages = &pages[at(range.start)..at(range.end)];
                    let own = inherit(range.start, pages, &mut inherited);
                    parts.extend(own.into_iter().map(|own| (own, *zeros)));
                    self.counts.shared += pages.iter().flatten().count() as u64;
                }
            }
        }
        let running = self.running;
        let mut copied = self.copy(&parts, |parts, buffer| read_private(&source, pid, running, parts, buffer))?;
        copied.runs = known::merge(copied.runs, inherited);
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

    /// Stores the pages of some parts that hold something. `read` fills a buffer with parts, one behind the other, and tells
    /// how much it read; not even a page: the first one is gone.
    fn copy(&mut self, parts: &[Part], read: impl Fn(&[Range], &mut [u8]) -> Result<usize>) -> Result<Copied> {
        let page = PAGE as usize;
        let mut copied = Copied::default();
        let mut rest = Rest { parts, done: 0 };
        while !rest.parts.is_empty() {
            let mut buffer = self.buffer.take().unwrap_or_else(|| self.store.take_buffer());
            let first = self.next + (buffer.filled().len() / page) as u64;
            let spare = buffer.spare_mut();
            let wanted: Vec<Range> = rest.split(spare.len()).0.iter().map(|part| part.0).collect();
            let length = ranges::size(&wanted) as usize;
            let got = match read(&wanted, &mut spare[..length]) {
                Ok(got) => got,
                Err(e) => {
                    // A process has ended. What the buffer has is of others.
                    self.buffer = Some(buffer);
                    return Err(e);
                }
            };
            let (done, left) = rest.split(got.max(page));
            rest = left;
            let mut kept = 0;
            if got > 0 {
                kept = self.keep(&done, spare, first, &mut copied.runs);
            } else {
                done.iter().for_each(|gone| ranges::push(&mut copied.gone, gone.0));
            }
            self.fill(buffer, kept)?;
        }
        Ok(copied)
    }

    /// So many more bytes of a buffer are filled: hands it over when it is full.
    fn fill(&mut self, mut buffer: Buffer, bytes: usize) -> Result<()> {
        buffer.advance(bytes);
        if buffer.spare_mut().is_empty() {
            self.next += (buffer.filled().len() / PAGE as usize) as u64;
            self.store.append_buffer(buffer)?;
        } else {
            self.buffer = Some(buffer);
        }
        Ok(())
    }

    /// Stores one page; its number.
    pub(super) fn store_page(&mut self, page: &[u8]) -> Result<PageIndex> {
        let mut buffer = self.buffer.take().unwrap_or_else(|| self.store.take_buffer());
        let number = self.next + (buffer.filled().len() / PAGE as usize) as u64;
        buffer.spare_mut()[..page.len()].copy_from_slice(page);
        self.counts.stored += 1;
        self.fill(buffer, page.len())?;
        Ok(number)
    }

    /// Moves the pages that hold something to the front and notes where they go; how many bytes they are.
    fn keep(&mut self, parts: &[Part], pages: &mut [u8], first: PageIndex, runs: &mut Vec<PageRun>) -> usize {
        let page = PAGE as usize;
        let (mut at, mut kept) = (0, 0);
        for (range, zeros) in parts {
            let end = at + (range.end - range.start) as usize;
            let address = |at: usize| range.end - (end - at) as u64;
            while at < end {
                let from = at;
                let zero = zeros.is_left_out(address(from), &pages[from..from + page]);
                at += page;
                while at < end && zeros.is_left_out(address(at), &pages[at..at + page]) == zero {
                    at += page;
                }
                let count = ((at - from) / page) as u64;
                if zero {
                    self.counts.zero += count;
                    continue;
                }
                if kept != from {
                    pages.copy_within(from..at, kept);
                }
                let store = first + (kept / page) as u64;
                push_run(runs, PageRun { start: address(from), pages: count, store });
                self.counts.stored += count;
                kept += at - from;
            }
        }
        kept
    }

    /// Copies parts of a shared object; where its pages are.
    pub(crate) fn shared(&mut self, source: &OwnedFd, parts: &[Range]) -> Result<Vec<PageRun>> {
        let context = || "read shared memory".to_string();
        let file = File::from(source.try_clone().context(context)?);
        let bytes = ranges::size(parts);
        let parts: Vec<Part> = parts.iter().map(|part| (*part, Zeros::None)).collect();
        let copied = self.expecting(bytes, |copier| {
            copier.copy(&parts, |parts, mut buffer| {
                for part in parts {
                    let now;
                    (now, buffer) = buffer.split_at_mut((part.end - part.start) as usize);
                    // The last page of a file may be cut short: the rest of it is zeros.
                    let n = read_all(|part, at| file.read_at(part, at), part.start, now).context(context)?;
                    now[n..].fill(0);
                }
                Ok(ranges::size(parts) as usize)
            })
        })?;
        Ok(copied.runs)
    }
}

/// Reads parts of a process's memory, one behind the other; bytes, of whole pages. 0: the first page is gone, which can
/// happen to a process that runs.
pub(super) fn read_private(
    source: &Source,
    pid: i32,
    running: bool,
    parts: &[Range],
    buffer: &mut [u8],
) -> Result<usize> {
    let page = PAGE as usize;
    match source.gather(parts, buffer) {
        Ok(n) if n >= page => Ok(n / page * page),
        Ok(_) => Err(Error::Died(pid)),
        Err(e) if running && e.raw_os_error() == Some(libc::EIO) => Ok(0),
        Err(e) => Err(e).context(|| format!("read the memory of {pid} at {:x}", parts[0].start)),
    }
}

/// Pages to copy, and which of them are stored although they are zeros.
type Part = (Range, Zeros);

/// Parts that are still to be copied.
#[derive(Clone, Copy)]
pub(super) struct Rest<'a> {
    pub parts: &'a [Part],
    /// Bytes of the first one that are not.
    pub done: u64,
}

impl Rest<'_> {
    /// The next `bytes` bytes, as far as there are so many, and what follows.
    pub(super) fn split(mut self, bytes: usize) -> (Vec<Part>, Self) {
        let mut bytes = bytes as u64;
        let mut next = Vec::new();
        while let Some(((range, zeros), others)) = self.parts.split_first()
            && bytes > 0
        {
            let start = range.start + self.done;
            let end = range.end.min(start + bytes);
            next.push((Range { start, end }, *zeros));
            bytes -= end - start;
            self.done += end - start;
            if end == range.end {
                (self.parts, self.done) = (others, 0);
            }
        }
        (next, self)
    }
}

/// Says where the pages from `start` on are that are inherited; those that are not.
fn inherit(start: u64, inherited: &[Option<PageIndex>], runs: &mut Vec<PageRun>) -> Vec<Range> {
    let mut own = Vec::new();
    for (at, store) in (start..).step_by(PAGE as usize).zip(inherited) {
        match *store {
            Some(store) => push_run(runs, PageRun { start: at, pages: 1, store }),
            None => ranges::push(&mut own, Range { start: at, end: at + PAGE }),
        }
    }
    own
}

/// The pages to copy, cut where mappings of another kind begin.
fn parts(pages: &PrivatePages) -> Vec<Part> {
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
