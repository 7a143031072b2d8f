//! Directories opened for reading or as O_PATH anchors.

use super::{refuse, regular};
use crate::{
    error::Result,
    observe::FdEntry,
    restore::{files::Numbers, program::Program},
};
use standstill_images::types::{Bytes, FileKind};

pub(super) fn dump(entry: &FdEntry) -> Result<FileKind> {
    if entry.nlink == 0 {
        return Err(refuse(entry, "close it before the dump: the directory was removed"));
    }
    Ok(FileKind::Directory { path: entry.path.as_path().into() })
}

pub(super) fn create(path: &Bytes, flags: u32, numbers: &mut Numbers, program: &mut Program) -> i32 {
    regular::open(&path.0, flags, numbers, program)
}
