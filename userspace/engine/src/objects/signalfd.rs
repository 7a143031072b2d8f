//! signalfd(2).

use super::refuse;
use crate::{
    error::Result,
    kernel::proc,
    observe::FdEntry,
    restore::{files::Numbers, program::Program},
};
use standstill_images::types::FileKind;

/// Mask from fdinfo (proc_pid_fdinfo(5)).
pub(super) fn dump(entry: &FdEntry) -> Result<FileKind> {
    let text = proc::fdinfo(entry.tgid, entry.fd).map_err(|_| refuse(entry, "its fdinfo cannot be read"))?;
    let mask = proc::field(&text, "sigmask").and_then(|v| u64::from_str_radix(v, 16).ok());
    Ok(FileKind::SignalFd { mask: mask.ok_or_else(|| refuse(entry, "this kernel does not show its mask"))? })
}

pub(super) fn create(mask: u64, flags: u32, numbers: &mut Numbers, program: &mut Program) -> i32 {
    let fd = numbers.lowest();
    let block = program.words(&[mask]);
    let args = [(-1).into(), block, 8.into(), (flags as i32 & libc::O_NONBLOCK).into()];
    program.call_expecting("signalfd", libc::SYS_signalfd4, &args, fd);
    fd
}
