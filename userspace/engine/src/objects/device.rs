//! Character devices without state: the memory devices (null(4), full(4), random(4)).

use super::{refuse, regular};
use crate::{
    error::Result,
    observe::FdEntry,
    restore::{files::Numbers, program::Program},
};
use nix::sys::stat::{major, minor};
use standstill_images::types::{Bytes, FileKind};

/// Major number of /dev/null, /dev/zero, /dev/full, /dev/random, /dev/urandom, /dev/kmsg.
const MEM_MAJOR: u64 = 1;

pub(super) fn dump(entry: &FdEntry) -> Result<FileKind> {
    let is_path = entry.flags & libc::O_PATH as u32 != 0;
    match (major(entry.rdev), minor(entry.rdev)) {
        _ if is_path => {}
        (MEM_MAJOR, 3 | 5 | 7 | 8 | 9 | 11) if entry.mode & libc::S_IFMT == libc::S_IFCHR => {}
        (136..=143, _) | (5, _) | (4, _) => {
            return Err(refuse(entry, "terminals: start the program with its input and output redirected"));
        }
        _ => return Err(refuse(entry, "close the device before the dump: its state belongs to its driver")),
    }
    Ok(FileKind::Device { path: entry.path.as_path().into(), rdev: entry.rdev })
}

pub(super) fn create(path: &Bytes, flags: u32, numbers: &mut Numbers, program: &mut Program) -> i32 {
    regular::open(&path.0, flags, numbers, program)
}
