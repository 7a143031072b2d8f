//! The image directory, which holds a complete image or none.
//!
//! The manifest is the image: what it does not name does not belong to it. It appears under its name in one step, after
//! everything it names is on disk.

mod chain;
mod superseded;

pub use chain::{MOST_PARENTS, PARENT};
pub use superseded::supersede;

use crate::{Flaw, ImageError};
use std::{
    ffi::OsStr,
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    hash::{BuildHasher, RandomState},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, symlink},
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
    /// Where the link to the parent will lead.
    parent: Option<PathBuf>,
    /// Names of page stores of others that were linked into the directory.
    linked: Vec<String>,
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
            let (parent, linked) = Default::default();
            let image = Self { path: path.into(), dir, created, committed: false, pages, parent, linked };
            if !fs::exists(path.join(MANIFEST)).map_err(ImageError::io(path))? {
                image.sweep(&[]);
            }
            return Ok(image);
        }
        Err(ImageError::io(path)(io::ErrorKind::NotFound.into()))
    }

    /// Where the page store goes.
    pub fn pages_path(&self) -> PathBuf {
        self.path.join(&self.pages)
    }

    /// Makes the image in `parent` the one whose directory page stores are looked for in that are not in this one. The
    /// link is made by [`commit`](Self::commit); without this, the image will have no parent.
    ///
    /// # Errors
    /// `parent` is no directory, or this one.
    pub fn set_parent(&mut self, parent: &Path) -> Result<(), ImageError> {
        let there = parent.canonicalize().map_err(ImageError::io(parent))?;
        let here = self.path.canonicalize().map_err(ImageError::io(&self.path))?;
        if !there.is_dir() {
            return Err(ImageError::io(parent)(io::ErrorKind::NotADirectory.into()));
        }
        if there == here {
            let reason = "an image cannot be its own parent: use another directory for one of them";
            return Err(ImageError::Chain { dir: self.path.clone(), reason: reason.into() });
        }
        let link = here.join(PARENT);
        if !link.is_symlink() && link.exists() {
            let reason = format!("{PARENT} is in it, which is not the link of an image: move it away");
            return Err(ImageError::Chain { dir: self.path.clone(), reason });
        }
        self.parent = Some(relative(&here, &there));
        Ok(())
    }

    /// Gives a page store of another directory the same name in this one, so that the image need not look for it
    /// elsewhere. Both names are of one file, so nobody may write to it any more.
    ///
    /// # Errors
    /// I/O errors: hard links do not lead to other file systems.
    pub fn link(&mut self, store: &Path) -> Result<(), ImageError> {
        let name = store.file_name().and_then(OsStr::to_str).filter(|name| is_page_store(name));
        let Some(name) = name else {
            let flaw = Flaw::Content("not the name of a page store".into());
            return Err(ImageError::invalid(store, 0, flaw));
        };
        let here = self.path.join(name);
        match fs::hard_link(store, &here) {
            Ok(()) => self.linked.push(name.into()),
            // Of an older image in this directory, which stays if the new one fails.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                let id = |path: &Path| fs::metadata(path).map(|m| (m.dev(), m.ino())).map_err(ImageError::io(path));
                if id(store)? != id(&here)? {
                    return Err(ImageError::io(&here)(e));
                }
            }
            Err(e) => return Err(ImageError::io(&here)(e)),
        }
        Ok(())
    }

    /// Publishes the image, in place of an older one if there is one. What the manifest names must be on disk; `stores`
    /// are the names of its page stores, wherever they are.
    ///
    /// # Errors
    /// I/O errors. There is no new image then, unless it is only its name that could not be made durable.
    pub fn commit(mut self, manifest: &[u8], stores: &[&str]) -> Result<(), ImageError> {
        let (aside, name) = (self.path.join(ASIDE), self.path.join(MANIFEST));
        let (parent_aside, parent_name) = (self.parent_aside(), self.path.join(PARENT));
        let written = remove(&aside).and_then(|()| {
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&aside)?;
            file.write_all(manifest)?;
            file.sync_all()?;
            if let Some(parent) = &self.parent {
                symlink(parent, &parent_aside)?;
            }
            self.dir.sync_all()?;
            fs::rename(&aside, &name)
        });
        written.map_err(ImageError::io(&name))?;
        self.committed = true;
        // Until here the old image had its parent. From here on readers find the new one's aside as well.
        let linked = match &self.parent {
            Some(_) => fs::rename(&parent_aside, &parent_name),
            None if parent_name.is_symlink() => remove(&parent_name),
            None => Ok(()),
        };
        linked.map_err(ImageError::io(&parent_name))?;
        self.dir.sync_all().map_err(ImageError::io(&self.path))?;
        if self.created {
            let parent = self.path.join("..");
            File::open(&parent).and_then(|d| d.sync_all()).map_err(ImageError::io(&parent))?;
        }
        self.sweep(stores);
        Ok(())
    }

    /// The link to the parent while the image is not published.
    fn parent_aside(&self) -> PathBuf {
        self.path.join(format!("{}{}", chain::ASIDE_PREFIX, self.pages))
    }

    /// Removes page stores other than ours and those to `keep`: those of the image that ours has replaced, and of
    /// writers that died; and what else these left. That it does not work is no reason to fail: the next dump does it.
    fn sweep(&self, keep: &[&str]) {
        let kept = |store: &str| store == self.pages || keep.contains(&store);
        for entry in fs::read_dir(&self.path).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            let store = superseded::store_of(name).unwrap_or(name);
            if is_page_store(store) && !kept(store) || name.starts_with(chain::ASIDE_PREFIX) {
                let _ = remove(&entry.path());
            }
        }
    }

    /// Removes what was made for an image that will not be.
    fn clear(&self) {
        let _ = remove(&self.path.join(ASIDE));
        let _ = remove(&self.parent_aside());
        let _ = remove(&self.pages_path());
        for store in &self.linked {
            let _ = remove(&self.path.join(store));
        }
        if self.created {
            // Files of others keep it.
            let _ = fs::remove_dir(&self.path);
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
        if !self.committed {
            self.clear();
        }
        // A process that was forked in between may have a duplicate, which would keep the lock.
        let _ = self.dir.unlock();
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

/// The way from one directory to another, both without links in their paths; the whole path if they have nothing in
/// common.
fn relative(from: &Path, to: &Path) -> PathBuf {
    let common = from.components().zip(to.components()).take_while(|(a, b)| a == b).count();
    if common <= 1 {
        return to.into();
    }
    let up = from.components().skip(common).map(|_| Path::new(".."));
    let down = to.components().skip(common).map(|part| Path::new(part.as_os_str()));
    up.chain(down).collect()
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
}

#[cfg(test)]
mod tests;
