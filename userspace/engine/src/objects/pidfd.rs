//! pidfd_open(2).

use super::{Collected, refuse};
use crate::{
    error::Result,
    kernel::{proc, sys},
    observe::FdEntry,
    restore::{files::Numbers, program::Program},
};
use nix::sys::statfs::{FsType, fstatfs};
use standstill_images::types::{FileKind, OpenFile};
use std::os::fd::AsFd;

/// The file system of pidfds.
const PID_FS_MAGIC: FsType = FsType(0x5049_4446);

/// The process from fdinfo. That it belongs to the tree is checked with the other references.
pub(super) fn dump(entry: &FdEntry, all: &mut Collected) -> Result<FileKind> {
    let text = proc::fdinfo(entry.tgid, entry.fd).map_err(|_| refuse(entry, "its fdinfo cannot be read"))?;
    match proc::field(&text, "Pid").and_then(|v| v.parse().ok()) {
        Some(pid) if pid > 0 => Ok(FileKind::PidFd { pid }),
        Some(-1) => {
            let fd = all.duplicate(entry)?;
            // Before Linux 6.9 all pidfds have the same inode.
            if !fstatfs(&fd).is_ok_and(|s| s.filesystem_type() == PID_FS_MAGIC) {
                return Err(refuse(entry, "close it before the dump: its process is gone"));
            }
            let next = all.dead.len() as u32;
            let process = *all.dead.entry(entry.ino).or_insert(next);
            Ok(FileKind::DeadPidFd { process, status: sys::pidfd_exit_status(fd.as_fd()).ok() })
        }
        _ => Err(refuse(entry, "close it before the dump: its process is in another pid namespace")),
    }
}

/// Opens it again: by then every process exists.
pub(super) fn create(pid: i32, flags: u32, numbers: &mut Numbers, program: &mut Program) -> i32 {
    let fd = numbers.lowest();
    let label = format!("pidfd of process {pid}");
    program.call_expecting(label, libc::SYS_pidfd_open, &[pid.into(), open_flags(flags).into()], fd);
    keep_open(fd, program);
    fd
}

/// Makes the descriptors of one dead process: of a child that runs the program `ends`, and is waited for.
pub(super) fn create_dead(files: &[&OpenFile], ends: usize, numbers: &mut Numbers, program: &mut Program) -> Vec<i32> {
    let id = program.clone_untraced("fork a process that ends", ends);
    let open = |file: &&OpenFile| {
        let fd = numbers.lowest();
        let flags = [open_flags(file.flags).into()];
        program.call_with("pidfd of a process that ends", libc::SYS_pidfd_open, id, &flags, Some(fd as u64));
        keep_open(fd, program);
        fd
    };
    let made = files.iter().map(open).collect();
    let wait = [0.into(), libc::__WALL.into(), 0.into()];
    program.call_with("wait for the end of a process", libc::SYS_wait4, id, &wait, None);
    made
}

/// What a process does whose pidfds shall be those of a dead one.
pub(crate) fn end(status: Option<i32>) -> Program {
    let mut program = Program::default();
    // A signal to its group then reaches nobody else.
    program.call("lead a process group", libc::SYS_setpgid, &[0.into(), 0.into()]);
    crate::tree::process::end(status.unwrap_or(0), 0, &mut program);
    program
}

/// PIDFD_NONBLOCK and PIDFD_THREAD have the values of O_NONBLOCK and O_EXCL.
fn open_flags(flags: u32) -> i32 {
    flags as i32 & (libc::O_NONBLOCK | libc::O_EXCL)
}

/// Unlike all others these descriptors are close-on-exec unasked.
fn keep_open(fd: i32, program: &mut Program) {
    program.call("no close-on-exec yet", libc::SYS_fcntl, &[fd.into(), libc::F_SETFD.into(), 0.into()]);
}
