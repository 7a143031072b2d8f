//! The image directory, which holds a complete image or none.
//!
//! The manifest is the image: what it does not name does not belong to it. It appears under its name in one step, after
//! everything it names is on disk.

use crate::{Flaw, ImageError, store::PageStoreIndex};
use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    hash::{BuildHasher, RandomState},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// Name of the manifest, whose presence makes a directory a complete image.
pub const MANIFEST: &str = "standstill.img";
/// Name of the manifest while it is written.
const ASIDE: &str = ".standstill.img.partial";

/// A directory that is becoming an image. Everything made in it is removed when this is dropped without
/// [`commit`](Self::commit), and so is the directory if it was made for the image.
#[derive(Debug)]
pub struct ImageDir {
    path: PathBuf,
    /// Locked against other writers as long as it is open.
    dir: File,
    created: bool,
    committed: bool,
    pages: String,
}

impl ImageDir {
    /// Makes the directory if there is none, and locks it against other writers. Other files in it are left alone, and
    /// a complete image in it stays one until it is replaced by [`commit`](Self::commit).
    ///
    /// # Errors
    /// Another process writes there; I/O errors.
    pub fn create(path: &Path) -> Result<Self, ImageError> {
        // The directory can vanish before it is locked: its maker may have given up. A dangling link stays one, though.
        for _ in 0..16 {
            let created = match DirBuilder::new().mode(0o700).create(path) {
                Ok(()) => true,
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => false,
                Err(e) => return Err(ImageError::io(path)(e)),
            };
            let dir = match lock(path) {
                Err(ImageError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => continue,
                result => result?,
            };
            let pages = format!("pages-{:016x}.img", RandomState::new().hash_one(std::process::id()));
            let image = Self { path: path.into(), dir, created, committed: false, pages };
            if !fs::exists(path.join(MANIFEST)).map_err(ImageError::io(path))? {
                image.sweep();
            }
            return Ok(image);
        }
        Err(ImageError::io(path)(io::ErrorKind::NotFound.into()))
    }

    /// Where the page store goes.
    pub fn pages_path(&self) -> PathBuf {
        self.path.join(&self.pages)
    }

    /// Publishes the image, in place of an older one if there is one. What the manifest names must be on disk.
    ///
    /// # Errors
    /// I/O errors. There is no new image then, unless it is only its name that could not be made durable.
    pub fn commit(mut self, manifest: &[u8]) -> Result<(), ImageError> {
        let (aside, name) = (self.path.join(ASIDE), self.path.join(MANIFEST));
        let written = remove(&aside).and_then(|()| {
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&aside)?;
            file.write_all(manifest)?;
            file.sync_all()?;
            self.dir.sync_all()?;
            fs::rename(&aside, &name)
        });
        written.map_err(ImageError::io(&name))?;
        self.committed = true;
        self.dir.sync_all().map_err(ImageError::io(&self.path))?;
        if self.created {
            let parent = self.path.join("..");
            File::open(&parent).and_then(|d| d.sync_all()).map_err(ImageError::io(&parent))?;
        }
        self.sweep();
        Ok(())
    }

    /// Removes page stores other than ours: those of the image that ours has replaced, and of writers that died. That
    /// it does not work is no reason to fail: the next dump does it.
    fn sweep(&self) {
        for entry in fs::read_dir(&self.path).into_iter().flatten().flatten() {
            if entry.file_name().to_str().is_some_and(|name| is_page_store(name) && name != self.pages) {
                let _ = remove(&entry.path());
            }
        }
    }

    /// Opens a complete image.
    ///
    /// # Errors
    /// No complete image; I/O errors.
    pub fn open(path: &Path) -> Result<OpenDir, ImageError> {
        match fs::exists(path.join(MANIFEST)) {
            Ok(true) => Ok(OpenDir { path: path.into() }),
            Ok(false) => Err(ImageError::Missing(path.into())),
            Err(e) => Err(ImageError::io(path)(e)),
        }
    }
}

impl Drop for ImageDir {
    fn drop(&mut self) {
        if self.committed {
            return;
        }
        let _ = remove(&self.path.join(ASIDE));
        let _ = remove(&self.pages_path());
        if self.created {
            // Files of others keep it.
            let _ = fs::remove_dir(&self.path);
        }
    }
}

/// Opens and locks a directory. Not found: it was removed, possibly in between.
fn lock(path: &Path) -> Result<File, ImageError> {
    let io = |e| ImageError::io(path)(e);
    let dir = File::open(path).map_err(io)?;
    let locked = dir.metadata().map_err(io)?;
    if !locked.is_dir() {
        return Err(io(io::ErrorKind::NotADirectory.into()));
    }
    match dir.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(ImageError::Locked(path.into())),
        Err(TryLockError::Error(e)) => return Err(io(e)),
    }
    let there = fs::metadata(path).map_err(io)?;
    if (there.dev(), there.ino()) != (locked.dev(), locked.ino()) {
        return Err(io(io::ErrorKind::NotFound.into()));
    }
    Ok(dir)
}

/// Removes a file that need not be there.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Whether a file has a name that [`ImageDir`] gives to page stores.
fn is_page_store(name: &str) -> bool {
    let middle = name.strip_prefix("pages-").and_then(|n| n.strip_suffix(".img"));
    middle.is_some_and(|m| m.len() == 16 && m.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)))
}

/// A complete image.
#[derive(Debug)]
pub struct OpenDir {
    path: PathBuf,
}

impl OpenDir {
    /// Path of the manifest.
    pub fn manifest_path(&self) -> PathBuf {
        self.path.join(MANIFEST)
    }

    /// The manifest, for a [`RecordReader`](crate::frame::RecordReader).
    ///
    /// # Errors
    /// I/O errors.
    pub fn manifest(&self) -> Result<File, ImageError> {
        File::open(self.manifest_path()).map_err(ImageError::io(self.manifest_path()))
    }

    /// Path of the page store.
    ///
    /// # Errors
    /// A name that is none of a page store, which could lead anywhere.
    pub fn pages_path(&self, index: &PageStoreIndex) -> Result<PathBuf, ImageError> {
        if is_page_store(&index.file) {
            return Ok(self.path.join(&index.file));
        }
        let flaw = Flaw::Content(format!("{:?} is not the name of a page store", index.file));
        Err(ImageError::invalid(&self.manifest_path(), 0, flaw))
    }
}

#[cfg(test)]
mod tests;
