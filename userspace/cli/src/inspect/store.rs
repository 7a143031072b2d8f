//! Page stores, without what is in them.

use serde::Serialize;
use standstill_engine::Image;
use standstill_images::store::{Compression, PageSet};
use std::path::{Path, PathBuf};

/// The image's own page store, and what all of its stores have together.
#[derive(Serialize)]
pub(crate) struct Store<'a> {
    pub pages_file: &'a str,
    pub compression: &'static str,
    /// Level, of a compression that has them.
    pub level: Option<i32>,
    /// Pages stored, used or not.
    pub pages: u64,
    /// Pages that are stored once but belong to several processes.
    pub shared_pages: u64,
    /// Pages not stored because they hold only zeros.
    pub zero_pages: u64,
    pub page_bytes: u64,
    pub stored_bytes: u64,
}

/// Where the pages of the image are.
#[derive(Serialize)]
pub(crate) struct Chain<'a> {
    /// Oldest first; the last one is the image's own.
    pub stores: Vec<Link<'a>>,
    /// Directories of the parents, the nearest first.
    pub parents: Vec<String>,
}

/// One of the page stores.
#[derive(Serialize)]
pub(crate) struct Link<'a> {
    pub pages_file: &'a str,
    /// Where the file was found.
    pub directory: String,
    /// Pages that the store was written with.
    pub pages: u64,
    /// Those of them that this image uses.
    pub used_pages: u64,
    /// Those of them that it gave up.
    pub dropped_pages: u64,
    /// Bytes of the file.
    pub stored_bytes: u64,
}

impl<'a> Chain<'a> {
    pub(super) fn new(image: &'a Image, parents: &[PathBuf]) -> Self {
        let text = |path: &Path| path.display().to_string();
        let link = |store: &'a standstill_engine::Store| Link {
            pages_file: &store.index.file,
            directory: store.path.parent().map(text).unwrap_or_default(),
            pages: store.pages,
            used_pages: store.local(image.used()).pages(),
            dropped_pages: PageSet::from_pairs(&store.index.dropped).pages(),
            stored_bytes: store.index.chunks.iter().map(|c| u64::from(c.stored)).sum(),
        };
        Self { stores: image.stores.iter().map(link).collect(), parents: parents.iter().map(|p| text(p)).collect() }
    }
}

impl<'a> Store<'a> {
    pub(super) fn new(image: &'a Image) -> Self {
        let chunks = || image.stores.iter().flat_map(|store| &store.index.chunks);
        let (pages_file, compression) =
            image.stores.last().map_or(("", Compression::None), |own| (&own.index.file, own.index.compression));
        let (compression, level) = match compression {
            Compression::None => ("none", None),
            Compression::Lz4 => ("lz4", None),
            Compression::Zstd(level) => ("zstd", Some(level)),
        };
        Self {
            pages_file,
            compression,
            level,
            pages: image.pages(),
            shared_pages: image.stats.pages_shared,
            zero_pages: image.stats.pages_zero,
            page_bytes: chunks().map(|c| u64::from(c.raw)).sum(),
            stored_bytes: chunks().map(|c| u64::from(c.stored)).sum(),
        }
    }
}
