//! Files whose name is gone although they have others (`--link-remap`): a hard link beside the old name, made by the dump and
//! removed by the restore.
//!
//! A link is called `.standstill-link.` and 16 hexadecimal digits that never come twice. If the dump fails it is removed again,
//! on any path. A dump that is killed leaves it: it takes no space and changes nothing for the tree, and a link that no image
//! names can be removed.

use crate::{
    error::{Context, Result},
    image::Image,
};
use nix::{
    fcntl::{AT_FDCWD, AtFlags},
    unistd::linkat,
};
use standstill_images::types::{FileKind, RegularFile};
use std::{
    collections::{BTreeSet, HashMap},
    fs::{File, OpenOptions},
    hash::{BuildHasher, RandomState},
    io,
    os::{
        fd::AsRawFd,
        unix::{
            ffi::OsStrExt,
            fs::{MetadataExt, OpenOptionsExt},
        },
    },
    path::{Path, PathBuf},
};

/// What to do about such a file.
pub(crate) const REMEDY: &str =
    "its name is gone although it has others: dump it with --link-remap, or give the file its name back";

const PREFIX: &str = ".standstill-link.";
const DELETED: &str = " (deleted)";

/// The links of a dump. Dropped before [`Links::keep`], they are removed.
#[derive(Default)]
pub(crate) struct Links {
    wanted: bool,
    made: HashMap<(u64, u64), PathBuf>,
}

impl Links {
    /// Whether links may be made.
    pub(crate) fn new(wanted: bool) -> Self {
        Self { wanted, made: HashMap::new() }
    }

    /// The record of a file that had the name `shown` and can be reached by `link` in procfs; `None`: links may not be made.
    pub(crate) fn record(&mut self, shown: &Path, link: &Path) -> io::Result<Option<FileKind>> {
        if !self.wanted {
            return Ok(None);
        }
        let found = std::fs::metadata(link)?;
        let key = (found.dev(), found.ino());
        let name = shown.to_string_lossy();
        let name = PathBuf::from(name.strip_suffix(DELETED).unwrap_or(&name));
        let path = match self.made.get(&key) {
            Some(path) => path.clone(),
            None => {
                let beside = name.parent().unwrap_or(Path::new("/")).join(unique());
                linkat(AT_FDCWD, link, AT_FDCWD, &beside, AtFlags::AT_SYMLINK_FOLLOW)?;
                self.made.insert(key, beside.clone());
                beside
            }
        };
        let file = RegularFile {
            path: path.as_path().into(),
            size: found.size(),
            mtime: (found.mtime(), found.mtime_nsec() as u32),
            mode: found.mode(),
        };
        Ok(Some(FileKind::Linked { file, name: name.as_path().into() }))
    }

    /// The links belong to an image.
    pub(crate) fn keep(mut self) {
        self.made.clear();
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        for path in self.made.values() {
            if let Err(e) = std::fs::remove_file(path) {
                tracing::warn!("cannot remove {}: {e}", path.display());
            }
        }
    }
}

/// A name that never comes twice. Hashers of the standard library have random keys.
fn unique() -> String {
    format!("{PREFIX}{:016x}", RandomState::new().hash_one(std::process::id()))
}

/// Whether a file has a name that [`Links`] gives.
pub(crate) fn is_link(path: &Path) -> bool {
    path.is_absolute() && path.file_name().is_some_and(|name| name.as_bytes().starts_with(PREFIX.as_bytes()))
}

/// The links of an image that is restored.
pub(crate) struct Removal {
    links: Vec<(PathBuf, File)>,
    /// So many of them are removed.
    removed: usize,
}

impl Removal {
    /// Holds the files, so that the links can be put back.
    pub(crate) fn prepare(image: &Image) -> Result<Self> {
        let paths = image.files.values().filter_map(|file| match &file.kind {
            FileKind::Linked { file, .. } => Some(file.path.as_path()),
            _ => None,
        });
        let open = |path: &Path| {
            let file = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path);
            Ok((path.to_path_buf(), file.context(|| format!("open {}", path.display()))?))
        };
        let links = paths.collect::<BTreeSet<_>>().into_iter().map(open).collect::<Result<_>>()?;
        Ok(Self { links, removed: 0 })
    }

    /// Removes the links, once everybody has opened them and before anybody can see them.
    pub(crate) fn remove(&mut self) -> Result<()> {
        for (path, _) in &self.links {
            std::fs::remove_file(path).context(|| format!("remove {}", path.display()))?;
            self.removed += 1;
        }
        Ok(())
    }

    /// The tree has its files: the links are not needed any more.
    pub(crate) fn done(mut self) {
        self.removed = 0;
    }
}

impl Drop for Removal {
    /// The restore has failed, and is tried again perhaps.
    fn drop(&mut self) {
        for (path, file) in &self.links[..self.removed] {
            let open = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
            if let Err(e) = linkat(AT_FDCWD, &open, AT_FDCWD, path, AtFlags::AT_SYMLINK_FOLLOW) {
                tracing::warn!("cannot put {} back: {e}", path.display());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_of_a_dump_that_fails_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let (name, other) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&name, "content").unwrap();
        std::fs::hard_link(&name, &other).unwrap();
        let file = File::open(&name).unwrap();
        std::fs::remove_file(&name).unwrap();
        let open = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let shown = std::fs::read_link(&open).unwrap();
        assert!(Links::new(false).record(&shown, &open).unwrap().is_none());
        let names = || std::fs::read_dir(dir.path()).unwrap().count();
        let mut links = Links::new(true);
        let Some(FileKind::Linked { file: record, name: old }) = links.record(&shown, &open).unwrap() else { panic!() };
        assert_eq!((record.size, old.as_path()), (7, &*name));
        assert!(is_link(record.path.as_path()));
        // Once for all that have it open.
        links.record(&shown, &open).unwrap();
        assert_eq!(names(), 2);
        drop(links);
        assert_eq!(names(), 1);
        let mut links = Links::new(true);
        links.record(&shown, &open).unwrap();
        links.keep();
        assert_eq!(names(), 2);
    }
}
