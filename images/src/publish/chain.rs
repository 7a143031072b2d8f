//! The chain of an image: its directory, that of its parent, that of the parent's parent, and so on.

use super::{OpenDir, is_page_store, superseded};
use crate::{Flaw, ImageError, store::PageStoreIndex};
use std::{
    collections::{HashMap, HashSet, VecDeque},
    ffi::OsString,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// Name of the link to the directory of the parent.
pub const PARENT: &str = "parent";
/// Beginning of that link's name until the image is published; the name of its page store follows. A writer can be
/// killed just after that, so readers follow these links too. It does no harm: no two page stores have the same name.
pub(super) const ASIDE_PREFIX: &str = ".parent-";
/// No chain is longer than this.
pub const MOST_PARENTS: usize = 4096;

/// The directories of a chain, one after the other.
struct Walk {
    own: PathBuf,
    next: VecDeque<PathBuf>,
    seen: HashSet<(u64, u64)>,
    /// Where it did not go on: at links that lead nowhere, or to where it had been.
    ends: Vec<String>,
}

impl Walk {
    fn new(own: &Path) -> Self {
        Self { own: own.into(), next: [own.into()].into(), seen: HashSet::new(), ends: Vec::new() }
    }

    fn error(&self, reason: String) -> ImageError {
        ImageError::Chain { dir: self.own.clone(), reason }
    }

    /// The next directory and the names in it.
    fn step(&mut self) -> Result<Option<(PathBuf, HashSet<OsString>)>, ImageError> {
        while let Some(path) = self.next.pop_front() {
            let is_own = self.seen.is_empty();
            // Resolved at each step: the kernel follows no more than 40 links in a path.
            let (dir, meta) = match path.canonicalize().and_then(|dir| fs::metadata(&dir).map(|meta| (dir, meta))) {
                Err(e) if e.kind() == io::ErrorKind::NotFound && !is_own => {
                    self.ends.push(format!("{} leads nowhere", path.display()));
                    continue;
                }
                result => result.map_err(ImageError::io(&path))?,
            };
            if !self.seen.insert((meta.dev(), meta.ino())) {
                self.ends.push(format!("{} leads back to {}", path.display(), dir.display()));
                continue;
            }
            if self.seen.len() > MOST_PARENTS + 1 {
                return Err(self.error(format!("the image has more than {MOST_PARENTS} parents")));
            }
            let dir = if is_own { path } else { dir };
            let list = || fs::read_dir(&dir)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<HashSet<_>>>();
            let names = list().map_err(ImageError::io(&dir))?;
            let is_aside = |name: &&OsString| name.to_str().is_some_and(|name| name.starts_with(ASIDE_PREFIX));
            let links = names.iter().filter(|&name| name == PARENT || is_aside(&name));
            self.next.extend(links.map(|name| dir.join(name)));
            return Ok(Some((dir, names)));
        }
        Ok(None)
    }
}

impl OpenDir {
    /// Finds page stores: each in this directory or else in the nearest of its parents.
    ///
    /// # Errors
    /// A name that is none of a page store, which could lead anywhere; a store that is nowhere, or from which pages that
    /// this image needs were taken for a newer one; a chain that is too long.
    pub fn locate(&self, stores: &[PageStoreIndex]) -> Result<Vec<PathBuf>, ImageError> {
        if let Some(index) = stores.iter().find(|index| !is_page_store(&index.file)) {
            let flaw = Flaw::Content(format!("{:?} is not the name of a page store", index.file));
            return Err(ImageError::invalid(&self.manifest_path(), 0, flaw));
        }
        let mut missing: HashMap<&str, usize> =
            stores.iter().enumerate().map(|(n, index)| (&index.file[..], n)).collect();
        let mut found = vec![PathBuf::new(); stores.len()];
        let mut walk = Walk::new(&self.path);
        if missing.len() < stores.len() {
            return Err(walk.error("the image names a page store twice".into()));
        }
        while !missing.is_empty()
            && let Some((dir, names)) = walk.step()?
        {
            let here: Vec<usize> = missing
                .iter()
                .filter(|(name, _)| names.contains(name.as_ref() as &std::ffi::OsStr))
                .map(|m| *m.1)
                .collect();
            for n in here {
                let index = &stores[n];
                missing.remove(&index.file[..]);
                found[n] = dir.join(&index.file);
                if names.contains(&superseded::name_for(&index.file)) {
                    superseded::check(&self.path, &found[n], index)?;
                }
            }
        }
        // The newest of those that are missing is the one to look for.
        let Some(&n) = missing.values().max() else { return Ok(found) };
        let file = &stores[n].file;
        if n + 1 == stores.len() {
            return Err(walk.error(format!("the page store {file} is missing")));
        }
        let ends = walk.ends.iter().map(|end| format!(" ({end})")).collect::<String>();
        Err(walk.error(format!(
            "the page store {file} of a parent image is missing{ends}: the parent was removed, replaced, or belongs to \
             another tree; put it back, or make the link {PARENT} lead to it"
        )))
    }

    /// The directories of the parents, the nearest first.
    ///
    /// # Errors
    /// A chain that is too long; I/O errors.
    pub fn parents(&self) -> Result<Vec<PathBuf>, ImageError> {
        let mut walk = Walk::new(&self.path);
        let mut parents = Vec::new();
        while let Some((dir, _)) = walk.step()? {
            parents.push(dir);
        }
        parents.remove(0);
        Ok(parents)
    }

    /// Where the link to the parent leads, if there is one.
    pub fn parent(&self) -> Option<PathBuf> {
        let link = self.path.join(PARENT);
        link.is_symlink().then_some(link)
    }
}
