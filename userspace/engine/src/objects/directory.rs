//! Directories opened for reading or as O_PATH anchors, and working directories.
//!
//! Those that were removed, and those of procfs whose process is gone, are made again by the restoring process, which hands
//! them to all tasks; the names are gone again before the tree runs.

use super::{refuse, regular};
use crate::{
    error::{Context, Error, Result},
    kernel::{proc, sys},
    observe::FdEntry,
    restore::{files::Numbers, program::Program},
};
use standstill_images::types::{Bytes, FileKind, OpenFile, Task};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, DirBuilder, File, OpenOptions},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

const DELETED: &[u8] = b" (deleted)";

/// What procfs knows of directories that it cannot give back.
pub(crate) const REMEDY: &str = "leave it before the dump: its process or thread is gone, and another has the number";

/// A path as procfs shows it, and whether what it led to was removed.
pub(crate) fn path(shown: Bytes, removed: bool) -> (Bytes, bool) {
    match shown.0.strip_suffix(DELETED) {
        Some(path) if removed => (path.into(), true),
        _ => (shown, removed),
    }
}

/// The same of a directory. `None`: it is about a process that is gone and whose number another has now, or a thread that is
/// gone.
pub(crate) fn record(shown: Bytes, nlink: u64, ino: u64) -> Option<(Bytes, bool)> {
    let Some(pid) = process_of(&shown) else { return Some(path(shown, nlink == 0)) };
    let (path, _) = path(shown, true);
    match fs::metadata(path.as_path()) {
        Ok(found) => (found.ino() == ino).then_some((path, false)),
        Err(_) => proc::stat(pid).is_err().then_some((path, true)),
    }
}

/// The process that a directory of procfs is about.
fn process_of(path: &Bytes) -> Option<i32> {
    let rest = path.0.strip_prefix(b"/proc/")?;
    let number = rest.split(|b| !b.is_ascii_digit()).next()?;
    std::str::from_utf8(number).ok()?.parse().ok()
}

pub(super) fn dump(entry: &FdEntry) -> Result<FileKind> {
    let recorded = record(entry.path.as_path().into(), entry.nlink.into(), entry.ino);
    let (path, removed) = recorded.ok_or_else(|| refuse(entry, REMEDY))?;
    Ok(FileKind::Directory { path, removed })
}

/// Opens a directory; one that was removed by way of the descriptor that every task inherits.
pub(super) fn create(path: &Bytes, held: Option<i32>, flags: u32, numbers: &mut Numbers, program: &mut Program) -> i32 {
    match held {
        None => regular::open(&path.0, flags, numbers, program),
        Some(held) => regular::open_at(held, b".", flags, numbers, program),
    }
}

/// Changes to the working directory, in the same way.
pub(crate) fn enter(path: &Bytes, held: Option<i32>, program: &mut Program) {
    let label = format!("change to {}", path.lossy());
    match held {
        None => {
            let name = program.string(&path.0);
            program.call(label, libc::SYS_chdir, &[name]);
        }
        Some(held) => program.call(label, libc::SYS_fchdir, &[held.into()]),
    }
}

/// The removed directories of an image. Those with the same path count as one.
pub(crate) fn removed<'a>(
    files: impl Iterator<Item = &'a OpenFile>,
    tasks: impl Iterator<Item = &'a Task>,
) -> BTreeSet<&'a Bytes> {
    let opened = files.filter_map(|file| match &file.kind {
        FileKind::Directory { path, removed: true } => Some(path),
        _ => None,
    });
    let entered = tasks.filter_map(|task| task.live.as_ref()).filter(|live| live.cwd_removed).map(|live| &live.cwd);
    opened.chain(entered).collect()
}

/// Removed directories in the restoring process. Those of dead processes can be used as long as this lives.
#[derive(Default)]
pub(crate) struct Held {
    pub files: Vec<(File, i32)>,
    /// What is to be removed, parents first.
    made: Vec<PathBuf>,
    /// Processes in the place of those that are gone.
    stand_ins: BTreeSet<i32>,
}

impl Held {
    /// Makes them; each shall be inherited at its number.
    pub(crate) fn make(wanted: &BTreeMap<Bytes, i32>) -> Result<Self> {
        let mut held = Self::default();
        for (path, number) in wanted {
            match process_of(path) {
                Some(pid) => held.stand_in(pid)?,
                None => held.directory(path.as_path())?,
            }
            let file =
                OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(path.as_path());
            held.files.push((file.context(|| format!("open the removed directory {}", path.lossy()))?, *number));
        }
        while let Some(path) = held.made.pop() {
            fs::remove_dir(&path).context(|| format!("remove {} again", path.display()))?;
        }
        Ok(held)
    }

    /// Makes a directory, and those above it that are missing.
    fn directory(&mut self, path: &Path) -> Result<()> {
        let missing: Vec<&Path> = path.ancestors().take_while(|p| fs::symlink_metadata(p).is_err()).collect();
        if missing.is_empty() {
            let reason = "was removed before the dump and is there again: give it another name for the restore";
            return Err(Error::File { path: path.into(), reason: reason.into() });
        }
        for path in missing.into_iter().rev() {
            let made = DirBuilder::new().mode(0o700).create(path);
            made.context(|| format!("make the removed directory {}", path.display()))?;
            self.made.push(path.into());
        }
        Ok(())
    }

    /// Makes a process that waits for its end.
    fn stand_in(&mut self, pid: i32) -> Result<()> {
        if !self.stand_ins.contains(&pid) {
            sys::stand_in(pid).map_err(|e| match e.raw_os_error() {
                Some(libc::EEXIST) => Error::PidInUse(pid),
                _ => Error::System { call: format!("create process {pid}, which a directory is about"), source: e },
            })?;
            self.stand_ins.insert(pid);
        }
        Ok(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        for path in self.made.iter().rev() {
            _ = fs::remove_dir(path);
        }
        for &pid in &self.stand_ins {
            // SAFETY: neither takes memory; the process is a child of ours that nobody has waited for.
            unsafe {
                libc::kill(pid, libc::SIGKILL);
                libc::waitpid(pid, std::ptr::null_mut(), libc::__WALL);
            }
        }
    }
}
