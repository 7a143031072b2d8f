//! `--auto-dedup`: an image takes from its parents what it does not need of their pages. They cannot be restored then.

use super::{Image, pages_of};
use crate::error::{Context, Result};
use standstill_images::{
    publish::supersede,
    store::{self, PageSet, PageStoreIndex},
    types::PageRun,
};
use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// Pages of parents that an image does not need.
#[derive(Debug)]
pub(crate) struct Dedup {
    /// The parents' stores, for the image's records.
    pub stores: Vec<PageStoreIndex>,
    holes: Vec<(PathBuf, PageSet)>,
}

/// Finds what an image with these runs, whose first pages are those of `parent`, does not need of the parent's stores.
/// What is compressed stays, and files that other directories have links to: other images may need them.
///
/// # Errors
/// Page data that are not what was written.
pub(crate) fn drop_unused<'a>(parent: &Image, runs: impl IntoIterator<Item = &'a PageRun>) -> Result<Dedup> {
    let used = pages_of(runs);
    let mut dedup = Dedup { stores: Vec::new(), holes: Vec::new() };
    for store in &parent.stores {
        let gone = PageSet::from_pairs(&store.index.dropped);
        let needed = store.local(&used).union(&gone);
        let unused = PageSet::new(needed.gaps(0..store.pages));
        let links = fs::metadata(&store.path).context(|| format!("look at {}", store.path.display()))?.nlink();
        if unused.pages() == 0 || !store.is_raw() || links > 1 {
            dedup.stores.push(store.index.clone());
            continue;
        }
        dedup.stores.push(store.reader()?.without(&unused)?);
        dedup.holes.push((store.path.clone(), unused));
    }
    Ok(dedup)
}

impl Dedup {
    /// Takes the pages out of the files, once the image in `dir` is published. How many were taken.
    ///
    /// # Errors
    /// A file system that cannot do it; a parent's directory in which another dump is writing. The image is whole all the
    /// same, and only takes more space.
    pub(crate) fn punch(&self, dir: &Path) -> Result<u64> {
        let mut pages = 0;
        for (path, unused) in &self.holes {
            supersede(path, dir, unused)?;
            store::punch(path, unused)?;
            pages += unused.pages();
        }
        Ok(pages)
    }
}
