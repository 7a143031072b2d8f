//! eventfd(2).

use super::refuse;
use crate::{
    error::Result,
    kernel::proc,
    observe::FdEntry,
    restore::{files::Numbers, program::Program},
};
use standstill_images::types::FileKind;

/// Counter and kind from fdinfo (proc_pid_fdinfo(5); `eventfd-semaphore` since Linux 6.5).
pub(super) fn dump(entry: &FdEntry) -> Result<FileKind> {
    let gone = |_| refuse(entry, "its fdinfo cannot be read");
    let text = proc::fdinfo(entry.tgid, entry.fd).map_err(gone)?;
    let count = proc::field(&text, "eventfd-count").and_then(|v| u64::from_str_radix(v, 16).ok());
    let semaphore = proc::field(&text, "eventfd-semaphore").is_some_and(|v| v != "0");
    let count = count.ok_or_else(|| refuse(entry, "this kernel does not show its counter"))?;
    Ok(FileKind::EventFd { count, semaphore })
}

pub(crate) fn create(count: u64, semaphore: bool, flags: u32, numbers: &mut Numbers, program: &mut Program) -> i32 {
    let fd = numbers.lowest();
    let flags = flags as i32 & libc::O_NONBLOCK | if semaphore { libc::EFD_SEMAPHORE } else { 0 };
    program.call_expecting("eventfd", libc::SYS_eventfd2, &[0.into(), flags.into()], fd);
    if count != 0 {
        program.write_full("set the eventfd counter", fd, &count.to_ne_bytes());
    }
    fd
}
