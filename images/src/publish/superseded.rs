//! Notes beside page stores from which pages were taken.
//!
//! Whoever takes pages out of a store writes down first which ones. An image that does not know them as dropped needs
//! them, and is refused at once instead of failing at a checksum.

use super::lock;
use crate::{
    ImageError,
    frame::{Record, RecordReader, RecordWriter},
    store::{PageSet, PageStoreIndex},
    types::Bytes,
};
use serde::{Deserialize, Serialize};
use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

const SUFFIX: &str = ".superseded";
/// The same while the note is written.
const ASIDE_SUFFIX: &str = ".partial";

/// The only record of a note.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Superseded {
    /// Directory of the image that pages were taken for.
    by: Bytes,
    /// These pages, as first page and number of pages.
    dropped: Vec<(u64, u64)>,
}

impl Record for Superseded {
    const KIND: u16 = 11;
    const VERSION: u16 = 1;
}

/// Name of the note beside a page store.
pub(super) fn name_for(store: &str) -> OsString {
    format!("{store}{SUFFIX}").into()
}

/// Name of the page store that a file is a note for.
pub(super) fn store_of(name: &str) -> Option<&str> {
    name.strip_suffix(SUFFIX).or_else(|| name.strip_suffix(ASIDE_SUFFIX))
}

fn beside(store: &Path, suffix: &str) -> PathBuf {
    let mut path = OsString::from(store);
    path.push(suffix);
    path.into()
}

fn read(path: &Path) -> Result<Superseded, ImageError> {
    let file = File::open(path).map_err(ImageError::io(path))?;
    let mut note = None;
    for record in RecordReader::new(path, file)? {
        let record = record?;
        match record.kind() {
            Superseded::KIND => note = Some(record.decode()?),
            _ => record.unknown()?,
        }
    }
    note.ok_or_else(|| ImageError::NotAnImage(path.into()))
}

/// Refuses an image in `dir` that needs pages which were taken out of `store`.
pub(super) fn check(dir: &Path, store: &Path, index: &PageStoreIndex) -> Result<(), ImageError> {
    let note = read(&beside(store, SUFFIX))?;
    if PageSet::from_pairs(&index.dropped).contains(&PageSet::from_pairs(&note.dropped)) {
        return Ok(());
    }
    Err(ImageError::Superseded { dir: dir.into(), by: note.by.as_path().into(), store: index.file.clone() })
}

/// Writes down that `pages` are about to be taken out of `store` for the image in `by`. When this returns, the note is on
/// disk.
///
/// # Errors
/// Another process writes to the store's directory; I/O errors.
pub fn supersede(store: &Path, by: &Path, pages: &PageSet) -> Result<(), ImageError> {
    let path = beside(store, SUFFIX);
    let dir = store.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let dir = lock(dir)?;
    let before = match read(&path) {
        Ok(note) => PageSet::from_pairs(&note.dropped),
        Err(ImageError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => PageSet::default(),
        Err(e) => return Err(e),
    };
    let by = by.canonicalize().map_err(ImageError::io(by))?;
    let mut writer = RecordWriter::new();
    writer.push(&Superseded { by: by.as_path().into(), dropped: before.union(pages).to_pairs() })?;
    let aside = beside(store, ASIDE_SUFFIX);
    let write = || {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&aside)?;
        file.write_all(&writer.finish())?;
        file.sync_all()?;
        fs::rename(&aside, &path)?;
        dir.sync_all()
    };
    write().map_err(ImageError::io(&path))
}
