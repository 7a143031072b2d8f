//! Connections of unix sockets: socketpair(2), unix(7).
//!
//! Names come from bind(2), or from the listening socket that a connection was accepted from.
//!
//! Both ends must belong to the tree, or the other one be closed. What waits in an end is read with MSG_PEEK
//! ([`peek`]), who is connected to whom by sock_diag(7).

use super::{Collected, Referenced, refuse, socket};
use crate::{
    error::{Context, Result},
    kernel::{
        peek,
        sock_diag::{self, UnixSocket},
        sys,
    },
    observe::FdEntry,
    restore::{
        files::Numbers,
        program::{Arg, Program},
    },
    tree::creds,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use standstill_images::types::{Creds, FileKind, OpenFile, Socket, SocketPair};
use std::{
    collections::{HashMap, HashSet},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::PathBuf,
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
    /// Places of the tree's sockets among its descriptors.
    places: HashMap<u32, usize>,
}

impl Known {
    fn new(entries: &[FdEntry]) -> io::Result<Self> {
        let sockets = sock_diag::unix_sockets()?;
        let waiting = sockets.values().flat_map(|s| &s.waiting).copied().collect();
        let is_socket = |(_, e): &(usize, &FdEntry)| e.mode & libc::S_IFMT == libc::S_IFSOCK;
        let places = entries.iter().enumerate().filter(is_socket).map(|(n, e)| (e.ino as u32, n)).collect();
        Ok(Self { sockets, waiting, places })
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
        Some(peer) => match known.places.get(&peer) {
            Some(_) if known.sockets.get(&peer).and_then(|s| s.peer) != Some(ino) => {
                return Err(refuse(entry, "its peer is connected to another socket: close it before the dump"));
            }
            Some(&place) => Some(&entries[place]),
            None => {
                let remedy = format!("its peer, socket:[{peer}], is outside the tree: close the connection");
                return Err(refuse(entry, &remedy));
            }
        },
        None => return Err(refuse(entry, "it is not connected any more: close it before the dump")),
    };
    let shutdown = own.shutdown & (READING | WRITING);
    let (queue, reset) = waiting(entry, fd, kind)?;
    if let Some(sender) = peer
        && kind != libc::SOCK_STREAM
    {
        let sender = all.duplicate(sender)?;
        let hidden = peek::hides_empty_messages(sender.as_fd(), kind, &queue);
        if hidden.context(|| format!("look for messages in descriptor {} of process {}", entry.fd, entry.tgid))? {
            let remedy =
                "messages without bytes wait in it that somebody has looked at and that cannot be seen any more";
            return Err(refuse(entry, &format!("{remedy}: read them before the dump")));
        }
    }
    let shutdown = shutdown | if reset { RESET } else { 0 };
    Ok(SocketPair { peer: peer.map(|e| e.file.0), queue, shutdown })
}

/// What waits to be read, and whether whoever asks next is told that the peer has not read everything (ECONNRESET).
fn waiting(entry: &FdEntry, fd: &OwnedFd, kind: i32) -> Result<(Vec<Vec<u8>>, bool)> {
    let context = || format!("read what waits in descriptor {} of process {}", entry.fd, entry.tgid);
    let mut ready = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    poll(&mut ready, PollTimeout::ZERO).context(context)?;
    let ready = ready[0].revents().unwrap_or(PollFlags::empty());
    let (stream, reset) = (kind == libc::SOCK_STREAM, ready.contains(PollFlags::POLLERR));
    let bytes = if ready.contains(PollFlags::POLLIN) { sys::waiting_bytes(fd.as_fd()).context(context)? } else { 0 };
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
pub(super) fn create(
    files: &[&OpenFile],
    refs: &Referenced<'_>,
    numbers: &mut Numbers,
    program: &mut Program,
) -> Vec<i32> {
    let ends: Vec<(&Socket, &SocketPair)> = files.iter().filter_map(|file| end(file)).collect();
    let kind = ends[0].0.kind;
    let names = [&ends[0].0.local, ends.get(1).map_or(&ends[0].0.peer, |(other, _)| &other.local)];
    // Of whom each end says that he has the other one.
    let peers = [Some(&ends[0]), ends.get(1)].map(|end| end.and_then(|(socket, _)| peer_ids(socket)));
    let peers = [peers[0], peers[1].or(peers[0])];
    let shared = names.iter().position(|name| refs.shared_names.contains(*name));
    let accepted = shared.or_else(|| names.iter().position(|name| !name.is_empty() && peers[0] != peers[1]));
    let made = match accepted {
        Some(end) => connect(kind, names[end], (end, peers), refs.creds, numbers, program),
        None => pair(kind, peers[0], refs.creds, numbers, program),
    };
    for (n, (name, fd)) in names.iter().zip(made).enumerate() {
        if !name.is_empty() && accepted != Some(n) {
            bind(name, fd, program);
        }
    }
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

/// Effective user and group that SO_PEERCRED shows.
fn peer_ids(socket: &Socket) -> Option<[u32; 2]> {
    let (_, _, value) = socket.options.iter().find(|(level, name, _)| (*level, *name) == socket::PEER_CREDENTIALS)?;
    let word = |at: usize| Some(u32::from_ne_bytes(*value.get(at..)?.first_chunk()?));
    Some([word(4)?, word(8)?])
}

/// A step that the kernel takes the ids of whoever makes it from. `own` are those of the restorer.
fn with_ids(ids: Option<[u32; 2]>, own: &Creds, program: &mut Program, step: impl FnOnce(&mut Program)) {
    let Some([user, group]) = ids.filter(|ids| *ids != [own.uids[1], own.gids[1]]) else { return step(program) };
    let same: Arg = (-1).into();
    let take_on = |program: &mut Program, [user, group]: [u32; 2]| {
        program.call("take on a group id", libc::SYS_setresgid, &[same, u64::from(group).into(), same]);
        program.call("take on a user id", libc::SYS_setresuid, &[same, u64::from(user).into(), same]);
    };
    let securebits = |program: &mut Program, bits: u64| {
        program.call("securebits", libc::SYS_prctl, &[libc::PR_SET_SECUREBITS.into(), bits.into()]);
    };
    securebits(program, creds::SECBIT_NO_SETUID_FIXUP as u64);
    take_on(program, [user, group]);
    step(program);
    take_on(program, [own.uids[1], own.gids[1]]);
    securebits(program, own.securebits.into());
    program.call("set dumpable", libc::SYS_prctl, &[libc::PR_SET_DUMPABLE.into(), 1.into()]);
}

fn pair(kind: i32, ids: Option<[u32; 2]>, own: &Creds, numbers: &mut Numbers, program: &mut Program) -> [i32; 2] {
    let made = [numbers.lowest(), numbers.lowest()];
    let out = program.data(&[0; 8]);
    let args = [libc::AF_UNIX.into(), (kind | libc::SOCK_NONBLOCK).into(), 0.into(), out];
    with_ids(ids, own, program, |program| program.call("socketpair", libc::SYS_socketpair, &args));
    made
}

/// Both ends of a connection, of which number `accepted` has its name from a listening socket, as others have: a name that
/// is in use cannot be given by bind(2). Somebody else may connect at the same moment, which is noticed. `peers`: the ids that
/// each end has of the other one.
fn connect(
    kind: i32,
    name: &[u8],
    (accepted, peers): (usize, [Option<[u32; 2]>; 2]),
    own: &Creds,
    numbers: &mut Numbers,
    program: &mut Program,
) -> [i32; 2] {
    const TOKEN: &[u8] = &[0x5a; 61];
    let [listener, client, server] = [0; 3].map(|_| numbers.lowest());
    let address = program.data(name);
    let socket = |program: &mut Program, fd: i32| {
        let args = [libc::AF_UNIX.into(), (kind | libc::SOCK_NONBLOCK).into(), 0.into()];
        program.call_expecting("socket", libc::SYS_socket, &args, fd);
    };
    socket(program, listener);
    let path = bind_in_place(name, listener, program);
    with_ids(peers[1 - accepted], own, program, |program| {
        program.call("listen", libc::SYS_listen, &[listener.into(), 1.into()]);
    });
    socket(program, client);
    let args = [client.into(), address, name.len().into()];
    with_ids(peers[accepted], own, program, |program| program.call("connect", libc::SYS_connect, &args));
    remove(path, program);
    let args = [listener.into(), 0.into(), 0.into(), libc::SOCK_NONBLOCK.into()];
    program.call_expecting("accept", libc::SYS_accept4, &args, server);
    program.write_full("send a token", client, TOKEN);
    let room = program.data(&[0; 64]);
    let args = [server.into(), room, 64.into(), 0.into(), 0.into(), 0.into()];
    program.call_expecting("receive the token", libc::SYS_recvfrom, &args, TOKEN.len());
    program.call("close the listening socket", libc::SYS_close, &[listener.into()]);
    numbers.release(listener);
    if accepted == 0 { [server, client] } else { [client, server] }
}

/// Gives a socket its name. One in the file system leaves nothing there: see [`apart`].
fn bind(name: &[u8], fd: i32, program: &mut Program) {
    let path = bind_in_place(name, fd, program);
    remove(path, program);
}

/// The same, and what is to be removed.
fn bind_in_place(name: &[u8], fd: i32, program: &mut Program) -> Option<PathBuf> {
    let address = program.data(name);
    let path = socket::unix_path(name);
    for dir in path.iter().flat_map(|path| path.ancestors().skip(1).collect::<Vec<_>>().into_iter().rev()) {
        let dir = program.string(dir.as_os_str().as_bytes());
        // It may be there.
        program.try_call("make a directory for a name", libc::SYS_mkdir, &[dir, 0o777.into()]);
    }
    let label = format!("bind to {}", socket::describe(name));
    program.call(label, libc::SYS_bind, &[fd.into(), address, name.len().into()]);
    path
}

fn remove(path: Option<PathBuf>, program: &mut Program) {
    if let Some(path) = path {
        let path = program.string(path.as_os_str().as_bytes());
        program.call("remove the name", libc::SYS_unlink, &[path]);
    }
}

/// Abstract names that several sockets have: a listening one, and those that were accepted from it.
pub(crate) fn shared_names<'a>(files: impl Iterator<Item = &'a OpenFile>) -> HashSet<Vec<u8>> {
    let (mut once, mut shared) = (HashSet::new(), HashSet::new());
    for file in files {
        let FileKind::Socket(socket) = &file.kind else { continue };
        for name in [&socket.local, &socket.peer] {
            if name.get(2) == Some(&0) && socket.family == libc::AF_UNIX && !once.insert(name) {
                shared.insert(name.clone());
            }
        }
    }
    shared
}

/// Whether a connection has a name, and has to be made [`apart`], before anybody else may use the name.
pub(crate) fn is_named(group: &[&OpenFile]) -> bool {
    group.iter().filter_map(|file| end(file)).any(|(s, _)| !s.local.is_empty() || !s.peer.is_empty())
}

/// Emits steps of a process that is alone in a file system that is empty and that nobody else sees (fsmount(2), Linux
/// 5.2): names of sockets can be anything there. The sockets keep it until they are closed.
pub(crate) fn apart(
    numbers: &mut Numbers,
    program: &mut Program,
    steps: impl FnOnce(&mut Numbers, &mut Program) -> Result<()>,
) -> Result<()> {
    const FSCONFIG_CMD_CREATE: i32 = 6;
    let [root, cwd, context, mount] = [0; 4].map(|_| numbers.lowest());
    let chroot = |program: &mut Program, to: i32| {
        let here = program.string(b".");
        program.call("go to a root directory", libc::SYS_fchdir, &[to.into()]);
        program.call("change the root directory", libc::SYS_chroot, &[here]);
    };
    for (fd, path) in [(root, &b"/"[..]), (cwd, b".")] {
        let path = program.string(path);
        let args = [libc::AT_FDCWD.into(), path, (libc::O_PATH | libc::O_DIRECTORY).into(), 0.into()];
        program.call_expecting("remember a directory", libc::SYS_openat, &args, fd);
    }
    let name = program.string(b"tmpfs");
    program.call_expecting("open a file system", libc::SYS_fsopen, &[name, 0.into()], context);
    let args = [context.into(), FSCONFIG_CMD_CREATE.into(), 0.into(), 0.into(), 0.into()];
    program.call("make the file system", libc::SYS_fsconfig, &args);
    program.call_expecting("mount it", libc::SYS_fsmount, &[context.into(), 0.into(), 0.into()], mount);
    chroot(program, mount);
    steps(numbers, program)?;
    chroot(program, root);
    program.call("go back", libc::SYS_fchdir, &[cwd.into()]);
    for fd in [root, cwd, context, mount] {
        program.call("close", libc::SYS_close, &[fd.into()]);
        numbers.release(fd);
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    fn socket(id: u32, local: &[u8], peer: Option<u32>) -> OpenFile {
        let pair = peer.map(|peer| SocketPair { peer: Some(peer), queue: vec![vec![1; 9]], shutdown: 0 });
        let socket = Socket {
            family: libc::AF_UNIX,
            kind: libc::SOCK_STREAM,
            protocol: 0,
            local: local.to_vec(),
            peer: Vec::new(),
            backlog: pair.is_none().then_some(5),
            options: vec![(libc::SOL_SOCKET, libc::SO_PEERCRED, [7u32, 1000, 100].map(u32::to_ne_bytes).concat())],
            bound_file: None,
            pair,
        };
        OpenFile { id, flags: 0, pos: 0, owner: None, kind: FileKind::Socket(socket) }
    }

    fn steps(files: &[&OpenFile], names: &HashSet<Vec<u8>>) -> Vec<String> {
        let creds = Creds { uids: [0; 4], gids: [0; 4], ..Default::default() };
        let refs = Referenced {
            pipes: &Default::default(),
            first_writers: &Default::default(),
            shared_fds: &Default::default(),
            removed_fds: &Default::default(),
            shared_names: names,
            creds: &creds,
            clocks: None,
            ends: &Default::default(),
        };
        let (mut numbers, mut program) = (Numbers::new([0, 1, 2]), Program::default());
        let made = create(files, &refs, &mut numbers, &mut program);
        assert_eq!(made.len(), files.len());
        assert_eq!(Some(numbers.lowest()), (3..).find(|fd| !made.contains(fd)), "all others are closed");
        program.listing().map(str::to_owned).collect()
    }

    #[test]
    fn names_that_are_in_use_are_those_of_accepted_sockets() {
        let (abstract_name, path) = (b"\x01\0\0name", b"\x01\0/dir/name\0");
        let files = [
            socket(0, abstract_name, None),
            socket(1, abstract_name, Some(2)),
            socket(2, b"", Some(1)),
            socket(3, path, Some(4)),
            socket(4, path, Some(3)),
            socket(5, b"\x01\0\0client", None),
        ];
        let names = shared_names(files.iter());
        assert_eq!(names, HashSet::from([abstract_name.to_vec()]));
        let has = |steps: &[String], label: &str| steps.iter().any(|step| step.starts_with(label));
        let accepted = steps(&[&files[1], &files[2]], &names);
        assert!(has(&accepted, "listen") && has(&accepted, "receive the token") && !has(&accepted, "socketpair"));
        let bound = steps(&[&files[3], &files[4]], &names);
        assert!(has(&bound, "socketpair") && has(&bound, "remove the name") && has(&bound, "take on a user id"));
        // The other end is gone.
        let widow = steps(&[&files[2]], &names);
        assert!(has(&widow, "close the other end"));
    }
}
