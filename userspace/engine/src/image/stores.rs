//! The page stores of an image, whose pages are numbered through all of them.

use crate::error::Result;
use standstill_images::{
    publish::OpenDir,
    store::{Compression, PAGE, PageIndex, PageReader, PageSet, PageStoreIndex},
    types::PageRun,
};
use std::{
    ops::Range,
    path::{Path, PathBuf},
};

/// A page store of an image. It is opened when it is read: an image can have more of them than a process descriptors.
#[derive(Clone, Debug)]
pub struct Store {
    /// Its table of contents.
    pub index: PageStoreIndex,
    /// The file, in the directory of the image or of one of its parents.
    pub path: PathBuf,
    /// Number of its first page.
    pub first: PageIndex,
    /// How many pages it has.
    pub pages: u64,
}

impl Store {
    /// Numbers of its pages.
    pub fn range(&self) -> Range<PageIndex> {
        self.first..self.first + self.pages
    }

    /// Whether its pages are in the file as they are.
    pub fn is_raw(&self) -> bool {
        self.index.compression == Compression::None
    }

    /// Whether the file is in this directory, not in that of a parent.
    pub fn is_in(&self, dir: &Path) -> bool {
        self.path.parent() == Some(dir)
    }

    /// Opens the file.
    ///
    /// # Errors
    /// A file that has another length than it should; I/O errors.
    pub fn reader(&self) -> Result<PageReader> {
        Ok(PageReader::open(&self.path, &self.index)?)
    }

    /// The pages of `set`, by their numbers in the store.
    pub fn local(&self, set: &PageSet) -> PageSet {
        PageSet::new(set.within(self.range()).map(|part| part.start - self.first..part.end - self.first))
    }
}

/// Finds the files of stores and numbers their pages. Each file has the right length.
pub(crate) fn locate(dir: &OpenDir, indexes: Vec<PageStoreIndex>) -> Result<Vec<Store>> {
    let paths = dir.locate(&indexes)?;
    let mut first = 0;
    let mut stores = Vec::new();
    for (index, path) in indexes.into_iter().zip(paths) {
        let pages = index.pages();
        let store = Store { index, path, first, pages };
        drop(store.reader()?);
        stores.push(store);
        first += pages;
    }
    Ok(stores)
}

/// Calls `action` with the part of `range` that each of `stores` has.
pub(crate) fn split(stores: &[Store], range: Range<PageIndex>) -> impl Iterator<Item = (&Store, Range<PageIndex>)> {
    let first = stores.partition_point(|s| s.range().end <= range.start);
    let touched = stores[first..].iter().take_while(move |s| s.first < range.end);
    let parts = touched.map(move |s| (s, range.start.max(s.first)..range.end.min(s.range().end)));
    parts.filter(|(_, part)| !part.is_empty())
}

/// The pages that runs name.
pub(crate) fn pages_of<'a>(runs: impl IntoIterator<Item = &'a PageRun>) -> PageSet {
    PageSet::new(runs.into_iter().map(|run| run.store..run.store + run.pages))
}

/// Adds a run to others, as a part of the last one if it continues that.
pub(crate) fn push_run(runs: &mut Vec<PageRun>, run: PageRun) {
    const BYTES: u64 = PAGE as u64;
    match runs.last_mut() {
        Some(last) if last.start + last.pages * BYTES == run.start && last.store + last.pages == run.store => {
            last.pages += run.pages;
        }
        _ => runs.push(run),
    }
}
