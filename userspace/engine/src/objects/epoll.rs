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
            // The number may mean another file by now, or the set may have come to this process by fork.
            let same = |e: &&FdEntry| e.ino == line.ino || line.ino == 0 && e.fd == line.fd;
            let target =
                entries.iter().filter(same).min_by_key(|e| (e.tgid != entry.tgid, e.fd != line.fd)).ok_or_else(
                    || {
                        refuse(
                            entry,
                            &format!("what it watches as descriptor {} is open in no process of the tree", line.fd),
                        )
                    },
                )?;
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

/// Registers one target, found at descriptor `from`, under its number. `scratch` is a free descriptor number to keep
/// what has that number now.
pub(crate) fn add(
    epoll: i32,
    target: &EpollTarget,
    from: i32,
    taken: Option<bool>,
    scratch: i32,
    program: &mut Program,
) {
    let mut event = target.events.to_ne_bytes().to_vec();
    event.extend_from_slice(&target.data.to_ne_bytes()); // struct epoll_event is packed on x86-64
    let block = program.data(&event);
    let dup = |program: &mut Program, from: i32, to: i32, cloexec: bool| {
        let flags = if cloexec { libc::O_CLOEXEC } else { 0 };
        program.call("lend a descriptor number to epoll", libc::SYS_dup3, &[from.into(), to.into(), flags.into()]);
    };
    let close = |program: &mut Program, fd: i32| program.call("close a lent number", libc::SYS_close, &[fd.into()]);
    let elsewhere = from != target.fd;
    if elsewhere {
        if taken.is_some() {
            dup(program, target.fd, scratch, false);
        }
        dup(program, from, target.fd, false);
    }
    // The set itself may be what has the number now.
    let epoll = if elsewhere && epoll == target.fd { scratch } else { epoll };
    let args = [epoll.into(), libc::EPOLL_CTL_ADD.into(), target.fd.into(), block];
    program.call(format!("watch descriptor {} by epoll", target.fd), libc::SYS_epoll_ctl, &args);
    match taken {
        Some(cloexec) if elsewhere => {
            dup(program, scratch, target.fd, cloexec);
            close(program, scratch);
        }
        None if elsewhere => close(program, target.fd),
        _ => {}
    }
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
