//! pidfd_open(2).

use super::refuse;
use crate::{
    error::Result,
    kernel::proc,
    observe::FdEntry,
    restore::{files::Numbers, program::Program},
};
use standstill_images::types::FileKind;

/// The process from fdinfo. That it belongs to the tree is checked with the other references.
pub(super) fn dump(entry: &FdEntry) -> Result<FileKind> {
    let text = proc::fdinfo(entry.tgid, entry.fd).map_err(|_| refuse(entry, "its fdinfo cannot be read"))?;
    match proc::field(&text, "Pid").and_then(|v| v.parse().ok()) {
        Some(pid) if pid > 0 => Ok(FileKind::PidFd { pid }),
        _ => Err(refuse(entry, "close it before the dump: its process is gone")),
    }
}

/// Opens it again: by then every process exists.
pub(super) fn create(pid: i32, flags: u32, numbers: &mut Numbers, program: &mut Program) -> i32 {
    let fd = numbers.lowest();
    // PIDFD_NONBLOCK has the value of O_NONBLOCK.
    let flags = flags as i32 & libc::O_NONBLOCK;
    program.call_expecting(format!("pidfd of process {pid}"), libc::SYS_pidfd_open, &[pid.into(), flags.into()], fd);
    // Unlike all others this call makes the descriptor close-on-exec unasked.
    program.call("no close-on-exec yet", libc::SYS_fcntl, &[fd.into(), libc::F_SETFD.into(), 0.into()]);
    fd
}
