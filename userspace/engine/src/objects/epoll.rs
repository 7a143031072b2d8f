//! epoll(7).

use super::refuse;
use crate::{
    error::Result,
    kernel::proc,
    observe::FdEntry,
    restore::{files::Numbers, program::Program},
};
use standstill_images::types::{EpollTarget, FileKind};

/// One `tfd:` line of fdinfo.
struct Line {
    fd: i32,
    events: u32,
    data: u64,
    ino: u64,
}

fn parse(text: &str) -> Option<Vec<Line>> {
    text.lines()
        .filter(|l| l.starts_with("tfd:"))
        .map(|line| {
            let mut words = line.split_ascii_whitespace();
            let mut after = |name: &str| words.find(|w| *w == name).and_then(|_| words.next());
            let fd = after("tfd:")?.parse().ok()?;
            let events = u32::from_str_radix(after("events:")?, 16).ok()?;
            let data = u64::from_str_radix(after("data:")?, 16).ok()?;
            let ino = line.split("ino:").nth(1)?.split_ascii_whitespace().next()?;
            Some(Line { fd, events, data, ino: u64::from_str_radix(ino, 16).ok()? })
        })
        .collect()
}

/// Registrations from fdinfo (proc_pid_fdinfo(5)); which file each means is looked up in the same descriptor table.
pub(super) fn dump(entry: &FdEntry, entries: &[FdEntry]) -> Result<FileKind> {
    let text = proc::fdinfo(entry.tgid, entry.fd).map_err(|_| refuse(entry, "its fdinfo cannot be read"))?;
    let lines = parse(&text).ok_or_else(|| refuse(entry, "this kernel does not show its registrations"))?;
    let targets = lines
        .into_iter()
        .map(|line| {
            // The set may have come to this process by fork: then the number is that of the process that registered.
            let target = entries
                .iter()
                .filter(|e| e.fd == line.fd && (line.ino == 0 || e.ino == line.ino))
                .min_by_key(|e| e.tgid != entry.tgid)
                .ok_or_else(|| {
                    refuse(
                        entry,
                        &format!("descriptor {}, which it watches, was closed but is still open elsewhere", line.fd),
                    )
                })?;
            Ok(EpollTarget { fd: line.fd, file: target.file.0, events: line.events, data: line.data })
        })
        .collect::<Result<_>>()?;
    Ok(FileKind::Epoll { targets })
}

pub(super) fn create(numbers: &mut Numbers, program: &mut Program) -> i32 {
    let fd = numbers.lowest();
    program.call_expecting("epoll_create", libc::SYS_epoll_create1, &[0.into()], fd);
    fd
}

/// Registers one target, which is in place at its number.
pub(crate) fn add(epoll: i32, target: &EpollTarget, program: &mut Program) {
    let mut event = target.events.to_ne_bytes().to_vec();
    event.extend_from_slice(&target.data.to_ne_bytes()); // struct epoll_event is packed on x86-64
    let block = program.data(&event);
    let args = [epoll.into(), libc::EPOLL_CTL_ADD.into(), target.fd.into(), block];
    program.call(format!("watch descriptor {} by epoll", target.fd), libc::SYS_epoll_ctl, &args);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fdinfo_of_a_set() {
        let text =
            "pos:\t0\nflags:\t02\ntfd:        5 events:       1d data: ffffffffffffffff  pos:0 ino:61af sdev:7\n";
        let lines = parse(text).unwrap();
        let line = &lines[0];
        assert_eq!((line.fd, line.events, line.data, line.ino), (5, 0x1d, u64::MAX, 0x61af));
        assert!(parse("tfd: x events: 1 data: 1\n").is_none());
    }
}
