//! Copying only those pages whose checksum is another than that of what the store has.

use super::{
    copy::{Copied, Copier, Rest, Zeros, is_zero, read_private},
    known::{self, Known},
    private::PrivatePages,
    ranges,
    source::Source,
    sums::{self, Sums},
};
use crate::{
    error::Result,
    image::push_run,
    kernel::{PAGE, pagemap::Range},
};
use standstill_images::types::PageRun;

/// Bytes that are read and compared at once: so few that they stay in the processor's cache meanwhile.
const AT_ONCE: usize = 256 << 10;

impl Copier<'_> {
    /// Copies those pages of anonymous memory that are not what the store has: of `pages.ranges`, in which `before` has
    /// the checksums of pages that are `known`. The checksums afterwards, also of unchanged pages that had none.
    ///
    /// Those of a process that runs are true only as long as no later look finds that the page was written to.
    pub(crate) fn compared(&mut self, pages: &PrivatePages, known: &Known, before: &Sums) -> Result<(Copied, Sums)> {
        self.expecting(ranges::size(&pages.ranges), |copier| copier.compare(pages, known, before))
    }

    fn compare(&mut self, pages: &PrivatePages, known: &Known, before: &Sums) -> Result<(Copied, Sums)> {
        let source = Source::open(pages.pid)?;
        let mut sums = before.clone();
        sums.keep(&pages.unchanged);
        let new = sums.missing(&pages.unchanged);
        let parts: Vec<_> = ranges::union(&pages.ranges, &new).into_iter().map(|part| (part, Zeros::None)).collect();
        let mut rest = Rest { parts: &parts, done: 0 };
        let mut copied = Copied::default();
        let mut buffer = vec![0; AT_ONCE];
        while !rest.parts.is_empty() {
            let wanted: Vec<Range> = rest.split(AT_ONCE).0.iter().map(|part| part.0).collect();
            let length = ranges::size(&wanted) as usize;
            let got = read_private(&source, pages.pid, self.running, &wanted, &mut buffer[..length])?;
            let (done, left) = rest.split(got.max(PAGE as usize));
            rest = left;
            let addresses = done.iter().flat_map(|(range, _)| (range.start..range.end).step_by(PAGE as usize));
            if got == 0 {
                addresses.for_each(|start| ranges::push(&mut copied.gone, Range { start, end: start + PAGE }));
                continue;
            }
            for (address, page) in addresses.zip(buffer.chunks_exact(PAGE as usize)) {
                let is_unchanged = ranges::meet(&pages.unchanged, Range { start: address, end: address + PAGE });
                if is_zero(page) {
                    self.counts.zero += u64::from(!is_unchanged);
                    continue;
                }
                let sum = sums::sum(page);
                sums.set(address, sum);
                if is_unchanged {
                    continue;
                }
                let same = known::find(known.runs(), address).filter(|_| before.is(address, sum));
                copied.same += u64::from(same.is_some());
                let store = match same {
                    Some(store) => store,
                    None => self.store_page(page)?,
                };
                push_run(&mut copied.runs, PageRun { start: address, pages: 1, store });
            }
        }
        Ok((copied, sums))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::sys::Mapping;
    use standstill_images::store::{Compression, PageReader, PageWriter};

    const PAGES: u64 = 200;

    /// Fills a page with a number, which may be 0.
    fn fill(memory: &Mapping, page: u64, with: u8) {
        let bytes = &mut memory.bytes_mut()[(page * PAGE) as usize..][..PAGE as usize];
        bytes.fill(with);
    }

    #[test]
    fn only_what_has_changed_is_stored() {
        let memory = Mapping::anonymous(PAGES * PAGE).unwrap();
        (0..PAGES).for_each(|page| fill(&memory, page, page as u8));
        let at = |page: u64| memory.start() + page * PAGE;
        let part = |start: u64, end: u64| Range { start: at(start), end: at(end) };
        let whole = part(0, PAGES);
        let of = |ranges: Vec<Range>, unchanged: Vec<Range>| PrivatePages {
            pid: std::process::id() as i32,
            ranges,
            unchanged,
            ..Default::default()
        };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pages");
        let mut store = PageWriter::create(&path, Compression::None).unwrap();
        let mut copier = Copier::new(&mut store, 0);
        let mut known = Known::default();
        let learn = |known: &mut Known, pages: &PrivatePages, copied: Copied, sums: Sums| {
            known.keep(pages.unchanged.clone());
            known.learn(&pages.ranges, copied.runs);
            known.set_sums(vec![sums]);
            copied.same
        };

        // Without checksums all that is said to have changed is stored; what has not is read for its checksum.
        let first = of(vec![whole], Vec::new());
        let copied = copier.private(&first, None).unwrap();
        known.learn(&first.ranges, copied.runs);
        let second = of(vec![part(0, 10), part(90, 100)], vec![part(10, 90), part(100, PAGES)]);
        let (copied, sums) = copier.compared(&second, &known, &Sums::new(whole)).unwrap();
        assert_eq!(copied.runs.iter().map(|run| run.pages).sum::<u64>(), 19, "the first page is zeros");
        assert_eq!(learn(&mut known, &second, copied, sums), 0);
        assert_eq!(copier.counts().stored, PAGES - 1 + 19);

        // Three change, of which one is zeros now, and one was.
        [(0, 77), (20, 0), (150, 78)].into_iter().for_each(|(page, with)| fill(&memory, page, with));
        let third = of(vec![whole], Vec::new());
        let before = known.sums(whole).unwrap().clone();
        let (copied, sums) = copier.compared(&third, &known, &before).unwrap();
        assert_eq!(learn(&mut known, &third, copied, sums), PAGES - 3);
        assert_eq!(copier.counts().stored, PAGES - 1 + 19 + 2);

        // What a later look has found has no checksum, so that it is stored once more: 21 has changed back and forth.
        let later = of(vec![part(20, 22)], vec![part(0, 20), part(22, PAGES)]);
        fill(&memory, 21, 99);
        known.keep(later.unchanged.clone());
        let copied = copier.private(&later, None).unwrap();
        known.learn(&later.ranges, copied.runs);
        fill(&memory, 21, 21);
        let before = known.sums(whole).unwrap().clone();
        let (copied, sums) = copier.compared(&third, &known, &before).unwrap();
        assert_eq!(learn(&mut known, &third, copied, sums), PAGES - 2);

        copier.finish().unwrap();
        let index = store.finish().unwrap();
        let reader = PageReader::open(&path, &index).unwrap();
        let mut bytes = vec![0; (PAGES * PAGE) as usize];
        for run in known.runs() {
            let start = (run.start - memory.start()) as usize;
            reader.read_pages(run.store, &mut bytes[start..start + (run.pages * PAGE) as usize]).unwrap();
        }
        assert!(bytes == memory.bytes_mut());
        assert_eq!(known.covered(), [whole]);
    }
}
