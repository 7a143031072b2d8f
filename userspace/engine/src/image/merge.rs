//! Images that need no parents any more: the pages that they use, in fewer page stores.

use super::{Image, Store, push_run};
use crate::error::Result;
use standstill_images::{
    frame::{Record, RecordReader, RecordWriter},
    publish::ImageDir,
    store::{PAGE, PageIndex, PageSet, PageStoreIndex, PageWriter},
    types::{AddressSpace, PageRun, SharedMemory},
};
use std::{
    cmp::Reverse,
    ops::Range,
    path::{Path, PathBuf},
};

/// What became of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compacted {
    /// Its directory.
    pub dir: PathBuf,
    /// Page stores that it had.
    pub stores_before: usize,
    /// Page stores that it has.
    pub stores: usize,
    /// Pages that were written into a new one.
    pub pages_written: u64,
}

/// Makes each image complete in itself: one page store with the pages that it uses, and no parent. An image that builds
/// on one of them and is not among them can no longer be restored.
///
/// `progress` is told the directory, how many bytes are done, and how many there are.
///
/// # Errors
/// An image that cannot be read, or a directory that cannot be written to. Each image is the old or the new one, and
/// none is changed if one of them cannot be opened.
pub fn merge(dirs: &[PathBuf], progress: impl Fn(&Path, u64, u64)) -> Result<Vec<Compacted>> {
    // Whoever builds on another one takes what it needs from it first.
    let mut order = Vec::new();
    for dir in dirs {
        Image::open(dir)?;
        order.push((Reverse(ImageDir::open(dir)?.parents()?.len()), dir));
    }
    order.sort();
    let is_whole = |image: &Image, dir: &Path| {
        image.stores.len() == 1 && image.stores[0].pages == image.used().pages() && image.stores[0].is_in(dir)
    };
    let one = |dir: &PathBuf| rewrite(dir, |image, _| is_whole(image, dir), true, |done, all| progress(dir, done, all));
    order.into_iter().map(|(_, dir)| one(dir)).collect()
}

/// Writes the pages that the image in `dir` uses of all stores but those to `keep` into one new store, its own from then
/// on. Where a store to keep is in the directory of a parent, the image keeps its parent.
///
/// `progress` is told how many bytes are done, and how many there are.
///
/// # Errors
/// As those of [`merge`].
pub fn compact(dir: &Path, keep: impl Fn(&Store) -> bool, progress: impl Fn(u64, u64)) -> Result<Compacted> {
    rewrite(dir, |_, store| keep(store), false, progress)
}

/// Pages that move together.
#[derive(Clone, Debug)]
struct Move {
    old: Range<PageIndex>,
    new: PageIndex,
}

/// Where the pages of stores go when some are kept and what is used of the others goes to a new one behind them.
pub(crate) struct Moves {
    all: Vec<Move>,
    /// Pages of the new store.
    written: u64,
}

impl Moves {
    /// Stores that become the only ones: all their pages count, in the same order.
    pub(crate) fn keeping(stores: impl IntoIterator<Item = Range<PageIndex>>) -> Self {
        let mut next = 0;
        let all = stores.into_iter().map(|old| {
            let new = next;
            next += old.end - old.start;
            Move { old, new }
        });
        Self { all: all.collect(), written: 0 }
    }

    /// Of the stores `kept` all pages count, of the `rest` those that are `used`.
    fn new(kept: &[&Store], rest: &[&Store], used: &PageSet) -> Self {
        let mut moves = Self::keeping(kept.iter().map(|store| store.range()));
        let next = kept.iter().map(|store| store.pages).sum::<PageIndex>();
        for old in rest.iter().flat_map(|store| used.within(store.range())) {
            let new = next + moves.written;
            moves.written += old.end - old.start;
            moves.all.push(Move { old, new });
        }
        moves.all.sort_unstable_by_key(|m| m.old.start);
        moves
    }

    /// The same runs where their pages have moved to. Pages that are not among those that move are left out.
    pub(crate) fn runs(&self, runs: &[PageRun]) -> Vec<PageRun> {
        let mut new = Vec::new();
        for run in runs {
            let end = run.store + run.pages;
            let first = self.all.partition_point(|m| m.old.end <= run.store);
            for m in self.all[first..].iter().take_while(|m| m.old.start < end) {
                let part = m.old.start.max(run.store)..m.old.end.min(end);
                let start = run.start + (part.start - run.store) * PAGE as u64;
                let store = m.new + (part.start - m.old.start);
                push_run(&mut new, PageRun { start, pages: part.end - part.start, store });
            }
        }
        new
    }
}

/// Does what [`compact`] says. `alone`: the image shall have no parent.
fn rewrite(
    dir: &Path,
    keep: impl Fn(&Image, &Store) -> bool,
    alone: bool,
    progress: impl Fn(u64, u64),
) -> Result<Compacted> {
    // A directory without an image is left as it is.
    let open = ImageDir::open(dir)?;
    let mut target = ImageDir::create(dir)?;
    let image = Image::open(dir)?;
    let (kept, rest): (Vec<&Store>, Vec<&Store>) = image.stores.iter().partition(|store| keep(&image, store));
    let stores_before = image.stores.len();
    let unchanged = Compacted { dir: dir.into(), stores_before, stores: stores_before, pages_written: 0 };
    if rest.is_empty() && !(alone && open.parent().is_some()) {
        return Ok(unchanged);
    }
    let moves = Moves::new(&kept, &rest, image.used());
    let mut indexes: Vec<PageStoreIndex> = kept.iter().map(|store| store.index.clone()).collect();
    if let Some(last) = rest.last() {
        let mut writer = PageWriter::create(&target.pages_path(), last.index.compression)?;
        let bytes = |pages: u64| pages * PAGE as u64;
        let mut done = 0;
        for store in &rest {
            copy(store, image.used(), &mut writer, |pages| {
                done += pages;
                progress(bytes(done), bytes(moves.written));
            })?;
        }
        indexes.push(writer.finish()?);
    }
    let manifest = manifest(&image, &indexes, &moves)?;
    if !alone
        && let Some(parent) = open.parent()
        && !kept.iter().all(|store| store.is_in(dir))
    {
        target.set_parent(&parent)?;
    }
    let names: Vec<&str> = indexes.iter().map(|index| &index.file[..]).collect();
    target.commit(&manifest, &names)?;
    Ok(Compacted { stores: indexes.len(), pages_written: moves.written, ..unchanged })
}

/// Appends the pages of a store that are `used`, in their order. `done` is told how many were.
fn copy(store: &Store, used: &PageSet, writer: &mut PageWriter, mut done: impl FnMut(u64)) -> Result<()> {
    let used = store.local(used);
    if used.pages() == 0 {
        return Ok(());
    }
    store.reader()?.only(&used).in_order(|first, chunk| {
        for part in used.within(first..first + (chunk.len() / PAGE) as u64) {
            let at = |page: PageIndex| (page - first) as usize * PAGE;
            writer.append(&chunk[at(part.start)..at(part.end)])?;
            done(part.end - part.start);
        }
        Ok(())
    })
}

/// The image's manifest with other stores, to which its pages have moved. What names no pages is copied as it is.
fn manifest(image: &Image, indexes: &[PageStoreIndex], moves: &Moves) -> Result<Vec<u8>> {
    let open = ImageDir::open(&image.dir)?;
    let mut writer = RecordWriter::new();
    indexes.iter().try_for_each(|index| writer.push(index))?;
    for record in RecordReader::new(&open.manifest_path(), std::io::BufReader::new(open.manifest()?))? {
        let record = record?;
        match record.kind() {
            PageStoreIndex::KIND | AddressSpace::KIND | SharedMemory::KIND => {}
            _ => writer.copy(&record),
        }
    }
    for space in image.spaces.values() {
        writer.push(&AddressSpace { pages: moves.runs(&space.pages), ..space.clone() })?;
    }
    for object in image.shared.values() {
        writer.push(&SharedMemory { pages: moves.runs(&object.pages), ..object.clone() })?;
    }
    Ok(writer.finish())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::known;
    use proptest::prelude::*;

    proptest! {
        /// Pages that moved are found where they went, the others where they were.
        #[test]
        fn runs_are_renumbered(
            start in 0u64..30, pages in 1u64..30, first in 0u64..40, parts in proptest::collection::vec((0u64..2, 1u64..8), 1..12),
        ) {
            let bytes = PAGE as u64;
            let (mut at, mut to, mut moved) = (first, 100, Vec::new());
            for (gap, length) in parts {
                moved.push((at + gap..at + gap + length, to));
                at += gap + length;
                to += length;
            }
            let mut all = vec![Move { old: 0..first, new: 0 }];
            all.extend(moved.iter().map(|(old, new)| Move { old: old.clone(), new: *new }));
            // All pages of a run from `first` on are among those that were moved.
            let end = moved.iter().fold(start.max(first), |end, (from, _)| if from.contains(&end) { from.end } else { end });
            let pages = pages.min(end - start).max(1);
            prop_assume!(start < first || end > start);
            let new = Moves { all, written: 0 }.runs(&[PageRun { start: 0, pages, store: start }]);
            for page in 0..pages {
                let old = start + page;
                let place = moved.iter().find(|(from, _)| from.contains(&old)).map(|(from, to)| to + old - from.start);
                prop_assert_eq!(known::find(&new, page * bytes), if old < first { Some(old) } else { place });
            }
        }
    }
}
