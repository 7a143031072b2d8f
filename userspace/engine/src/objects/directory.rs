//! Directories opened for reading or as O_PATH anchors, and working directories; removed ones too.

use super::regular;
use crate::{
    error::Result,
    observe::FdEntry,
    restore::{files::Numbers, program::Program},
};
use standstill_images::types::{Bytes, FileKind};

const DELETED: &[u8] = b" (deleted)";

/// A path as procfs shows it, and whether the directory was removed.
pub(crate) fn path(shown: Bytes, removed: bool) -> (Bytes, bool) {
    match shown.0.strip_suffix(DELETED) {
        Some(path) if removed => (path.into(), true),
        _ => (shown, removed),
    }
}

pub(super) fn dump(entry: &FdEntry) -> Result<FileKind> {
    let (path, removed) = path(entry.path.as_path().into(), entry.nlink == 0);
    Ok(FileKind::Directory { path, removed })
}

pub(super) fn create(path: &Bytes, removed: bool, flags: u32, numbers: &mut Numbers, program: &mut Program) -> i32 {
    let mut fd = 0;
    around_removal(path, removed, program, |program| fd = regular::open(&path.0, flags, numbers, program));
    fd
}

/// Does something with a directory; one that was removed exists only meanwhile. The path may be taken by another
/// directory now: that one is left alone.
pub(crate) fn around_removal(path: &Bytes, removed: bool, program: &mut Program, act: impl FnOnce(&mut Program)) {
    if !removed {
        return act(program);
    }
    let name = program.string(&path.0);
    program.call(format!("make the removed directory {}", path.lossy()), libc::SYS_mkdir, &[name, 0o700.into()]);
    act(program);
    program.call(format!("remove {} again", path.lossy()), libc::SYS_rmdir, &[name]);
}
