//! Connections of unix sockets: socketpair(2), unix(7).
//!
//! Both ends must belong to the tree, or the other one be closed. What waits in an end is read with MSG_PEEK
//! ([`peek`]), who is connected to whom by sock_diag(7).

use super::{Collected, refuse, socket};
use crate::{
    error::{Context, Result},
    kernel::{
        peek,
        sock_diag::{self, UnixSocket},
    },
    observe::FdEntry,
    restore::{files::Numbers, program::Program},
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use standstill_images::types::{FileKind, OpenFile, OpenFileId, Socket, SocketPair};
use std::{
    collections::{HashMap, HashSet},
    io,
    os::fd::{AsFd, OwnedFd},
};

// Bits of `SocketPair::shutdown`.
const READING: u8 = 1;
const WRITING: u8 = 2;
const RESET: u8 = 4;

/// All unix sockets of the machine's network namespace, by inode.
pub(crate) struct Known {
    sockets: HashMap<u32, UnixSocket>,
    /// Clients that nobody has accepted yet.
    waiting: HashSet<u32>,
    /// Open files of the tree.
    files: HashMap<u32, OpenFileId>,
}

impl Known {
    fn new(entries: &[FdEntry]) -> io::Result<Self> {
        let sockets = sock_diag::unix_sockets()?;
        let waiting = sockets.values().flat_map(|s| &s.waiting).copied().collect();
        let is_socket = |e: &&FdEntry| e.mode & libc::S_IFMT == libc::S_IFSOCK;
        let files = entries.iter().filter(is_socket).map(|e| (e.ino as u32, e.file.0)).collect();
        Ok(Self { sockets, waiting, files })
    }
}

/// The connection of a connected socket. `kind`: SOCK_*.
pub(super) fn dump(
    entry: &FdEntry,
    entries: &[FdEntry],
    fd: &OwnedFd,
    kind: i32,
    all: &mut Collected,
) -> Result<SocketPair> {
    let known = match &all.unix_sockets {
        Some(known) => known,
        None => {
            let known = Known::new(entries).context(|| "ask the kernel for its unix sockets (sock_diag)".into())?;
            all.unix_sockets.insert(known)
        }
    };
    let ino = entry.ino as u32;
    let Some(own) = known.sockets.get(&ino) else {
        return Err(refuse(entry, "it belongs to another network namespace: close it before the dump"));
    };
    let peer = match own.peer {
        Some(0) if known.waiting.contains(&ino) => {
            return Err(refuse(entry, "its connection waits to be accepted: accept it before the dump"));
        }
        Some(0) => None,
        Some(peer) => match known.files.get(&peer) {
            Some(_) if known.sockets.get(&peer).and_then(|s| s.peer) != Some(ino) => {
                return Err(refuse(entry, "its peer is connected to another socket: close it before the dump"));
            }
            Some(&file) => Some(file),
            None => {
                let remedy = format!("its peer, socket:[{peer}], is outside the tree: close the connection");
                return Err(refuse(entry, &remedy));
            }
        },
        None => return Err(refuse(entry, "it is not connected any more: close it before the dump")),
    };
    let (queue, reset) = waiting(entry, fd, kind)?;
    let shutdown = own.shutdown & (READING | WRITING) | if reset { RESET } else { 0 };
    Ok(SocketPair { peer, queue, shutdown })
}

/// What waits to be read, and whether whoever asks next is told that the peer has not read everything (ECONNRESET).
fn waiting(entry: &FdEntry, fd: &OwnedFd, kind: i32) -> Result<(Vec<Vec<u8>>, bool)> {
    let context = || format!("read what waits in descriptor {} of process {}", entry.fd, entry.tgid);
    let mut ready = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    poll(&mut ready, PollTimeout::ZERO).context(context)?;
    let ready = ready[0].revents().unwrap_or(PollFlags::empty());
    let (stream, reset) = (kind == libc::SOCK_STREAM, ready.contains(PollFlags::POLLERR));
    let bytes = if ready.contains(PollFlags::POLLIN) { peek::waiting_bytes(fd.as_fd()).context(context)? } else { 0 };
    if reset && (kind == libc::SOCK_DGRAM || bytes > 0 && !stream) {
        // Whoever reads messages is given the error first, also if he only looks.
        return Err(refuse(entry, "an error waits to be read (SO_ERROR): read it before the dump"));
    }
    // Reading from an empty stream takes the error.
    if !ready.contains(PollFlags::POLLIN) || bytes == 0 && (stream || reset) {
        return Ok((Vec::new(), reset));
    }
    let messages = peek::queue(fd.as_fd(), stream).context(context)?;
    if messages.iter().any(|m| m.control) {
        return Err(refuse(entry, "descriptors wait to be received (SCM_RIGHTS): receive them before the dump"));
    }
    if messages.iter().any(|m| m.creds.is_some_and(|[pid, ..]| pid != 0)) {
        return Err(refuse(entry, "credentials wait to be received (SCM_CREDENTIALS): receive them before the dump"));
    }
    let queue: Vec<Vec<u8>> = messages.into_iter().map(|m| m.bytes).collect();
    if kind != libc::SOCK_DGRAM && queue.iter().map(Vec::len).sum::<usize>() != bytes {
        return Err(refuse(
            entry,
            "urgent data, or data of several senders, wait to be read: read them before the dump",
        ));
    }
    Ok((queue, reset))
}

/// Makes the ends of one connection that `files` are. One that is not among them is closed again.
pub(super) fn create(files: &[&OpenFile], numbers: &mut Numbers, program: &mut Program) -> Vec<i32> {
    let ends: Vec<(&Socket, &SocketPair)> = files.iter().filter_map(|file| end(file)).collect();
    let kind = ends[0].0.kind;
    let made = [numbers.lowest(), numbers.lowest()];
    let out = program.data(&[0; 8]);
    let args = [libc::AF_UNIX.into(), (kind | libc::SOCK_NONBLOCK).into(), 0.into(), out];
    program.call("socketpair", libc::SYS_socketpair, &args);
    for ((_, pair), from) in ends.iter().zip([made[1], made[0]]) {
        if !pair.queue.is_empty() {
            send_all(&pair.queue, kind, from, program);
        }
    }
    if ends.iter().any(|(_, pair)| pair.shutdown & RESET != 0) {
        program.write_full("leave something unread", made[0], &[0]);
    }
    for ((_, pair), fd) in ends.iter().zip(made) {
        let how = match pair.shutdown & (READING | WRITING) {
            0 => continue,
            READING => libc::SHUT_RD,
            WRITING => libc::SHUT_WR,
            _ => libc::SHUT_RDWR,
        };
        program.call("shut down", libc::SYS_shutdown, &[fd.into(), how.into()]);
    }
    for fd in &made[ends.len()..] {
        program.call("close the other end", libc::SYS_close, &[(*fd).into()]);
        numbers.release(*fd);
    }
    for ((file, (socket, _)), fd) in files.iter().zip(&ends).zip(made) {
        socket::set_options(socket, fd, program);
        if file.flags & libc::O_NONBLOCK as u32 == 0 {
            program.call("block", libc::SYS_fcntl, &[fd.into(), libc::F_SETFL.into(), 0.into()]);
        }
    }
    made[..ends.len()].to_vec()
}

/// A connected socket, with its connection.
pub(crate) fn end(file: &OpenFile) -> Option<(&Socket, &SocketPair)> {
    let FileKind::Socket(socket) = &file.kind else { return None };
    Some((socket, socket.pair.as_ref()?))
}

/// Sends what waits at the other end. Nobody waits for room: the socket does not block.
fn send_all(queue: &[Vec<u8>], kind: i32, from: i32, program: &mut Program) {
    let most = program.data(&i32::MAX.to_ne_bytes());
    let args = [from.into(), libc::SOL_SOCKET.into(), libc::SO_SNDBUFFORCE.into(), most, 4.into()];
    program.try_call("make room", libc::SYS_setsockopt, &args);
    for message in queue {
        if kind == libc::SOCK_STREAM {
            program.write_full("fill the socket", from, message);
        } else {
            let data = program.data(message);
            let args = [from.into(), data, message.len().into(), 0.into(), 0.into(), 0.into()];
            program.call_expecting("fill the socket", libc::SYS_sendto, &args, message.len());
        }
    }
}
