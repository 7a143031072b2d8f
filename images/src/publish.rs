//! The image directory.

use crate::{ImageError, store::PageStoreIndex};
use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::Write,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// Name of the manifest, whose presence makes a directory a complete image.
pub const MANIFEST: &str = "standstill.img";

/// A directory that is becoming an image.
#[derive(Debug)]
pub struct ImageDir {
    path: PathBuf,
    created: bool,
    pages: PathBuf,
}

impl ImageDir {
    /// Prepares the directory.
    ///
    /// # Errors
    /// I/O errors.
    pub fn create(path: &Path) -> Result<Self, ImageError> {
        let created = match DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => true,
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => false,
            Err(e) => return Err(ImageError::io(path)(e)),
        };
        let pages = path.join(format!("pages-{:016x}.img", std::process::id()));
        let _ = fs::remove_file(&pages);
        Ok(Self { path: path.into(), created, pages })
    }

    /// Where the page store goes.
    pub fn pages_path(&self) -> PathBuf {
        self.pages.clone()
    }

    /// Publishes the image.
    ///
    /// # Errors
    /// I/O errors.
    pub fn commit(mut self, manifest: &[u8]) -> Result<(), ImageError> {
        let aside = self.path.join(".standstill.img.partial");
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&aside)
            .map_err(ImageError::io(&aside))?;
        file.write_all(manifest).and_then(|()| file.sync_all()).map_err(ImageError::io(&aside))?;
        fs::rename(&aside, self.path.join(MANIFEST)).map_err(ImageError::io(&aside))?;
        File::open(&self.path).and_then(|d| d.sync_all()).map_err(ImageError::io(&self.path))?;
        self.pages = PathBuf::new();
        self.created = false;
        Ok(())
    }

    /// Opens a complete image.
    ///
    /// # Errors
    /// No complete image.
    pub fn open(path: &Path) -> Result<OpenDir, ImageError> {
        if !path.join(MANIFEST).exists() {
            return Err(ImageError::Missing(path.into()));
        }
        Ok(OpenDir { path: path.into() })
    }
}

impl Drop for ImageDir {
    fn drop(&mut self) {
        if !self.pages.as_os_str().is_empty() {
            let _ = fs::remove_file(&self.pages);
        }
        if self.created {
            let _ = fs::remove_dir(&self.path);
        }
    }
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

    /// The manifest.
    ///
    /// # Errors
    /// I/O errors.
    pub fn manifest(&self) -> Result<Vec<u8>, ImageError> {
        fs::read(self.manifest_path()).map_err(ImageError::io(self.manifest_path()))
    }

    /// Path of the page store, which must be a plain name.
    ///
    /// # Errors
    /// A name that leads elsewhere.
    pub fn pages_path(&self, index: &PageStoreIndex) -> Result<PathBuf, ImageError> {
        if index.file.contains('/') || index.file.starts_with('.') {
            return Err(ImageError::Corrupt {
                path: self.manifest_path(),
                offset: 0,
                reason: "the page store's name is a path".into(),
            });
        }
        Ok(self.path.join(&index.file))
    }
}
