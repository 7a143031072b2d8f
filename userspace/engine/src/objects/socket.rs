//! Sockets: listening TCP and unix sockets without connections, connected unix sockets, and sockets nobody has used yet.

use super::{Collected, Referenced, refuse, unix};
use crate::{
    error::{Context, Result},
    kernel::sys,
    observe::FdEntry,
    restore::{files::Numbers, program::Program},
};
use standstill_images::types::{FileKind, OpenFile, Socket};
use std::{
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

/// Linux 6.5.
const SO_PASSPIDFD: i32 = 76;

/// Options carried over: level, name, bytes of the value.
const OPTIONS: &[(i32, i32)] = &[
    (libc::SOL_SOCKET, libc::SO_REUSEADDR),
    (libc::SOL_SOCKET, libc::SO_REUSEPORT),
    (libc::SOL_SOCKET, libc::SO_KEEPALIVE),
    (libc::SOL_SOCKET, libc::SO_BROADCAST),
    (libc::SOL_SOCKET, libc::SO_OOBINLINE),
    (libc::SOL_SOCKET, libc::SO_LINGER),
    (libc::SOL_SOCKET, libc::SO_PASSCRED),
    (libc::SOL_SOCKET, libc::SO_PASSSEC),
    (libc::SOL_SOCKET, SO_PASSPIDFD),
    (libc::SOL_SOCKET, libc::SO_PEEK_OFF),
    (libc::SOL_SOCKET, libc::SO_PRIORITY),
    (libc::SOL_SOCKET, libc::SO_RCVLOWAT),
    (libc::SOL_SOCKET, libc::SO_RCVTIMEO),
    (libc::SOL_SOCKET, libc::SO_SNDTIMEO),
    (libc::IPPROTO_TCP, libc::TCP_NODELAY),
    (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE),
    (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL),
    (libc::IPPROTO_TCP, libc::TCP_KEEPCNT),
    (libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT),
    (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY),
];

/// Process, user and group at the other end; only recorded of connections, and not set but taken on when they are made.
pub(super) const PEER_CREDENTIALS: (i32, i32) = (libc::SOL_SOCKET, libc::SO_PEERCRED);

/// As SO_PEEK_OFF is in the beginning.
const NO_PEEK_OFFSET: (i32, i32, &[u8]) = (libc::SOL_SOCKET, libc::SO_PEEK_OFF, &[0xff; 4]);

type AddressCall = unsafe extern "C" fn(i32, *mut libc::sockaddr, *mut libc::socklen_t) -> i32;

fn address(fd: &OwnedFd, call: AddressCall) -> io::Result<Vec<u8>> {
    let mut buffer = [0u8; 128];
    let mut len = buffer.len() as libc::socklen_t;
    // SAFETY: both calls store at most `len` bytes and the real length.
    let result = unsafe { call(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), &raw mut len) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(buffer[..len as usize].to_vec()) }
}

/// A socket. `entries`: all descriptors of the tree.
pub(super) fn dump(entry: &FdEntry, entries: &[FdEntry], all: &mut Collected) -> Result<FileKind> {
    let fd = all.duplicate(entry)?;
    let context = || format!("read the options of descriptor {} of process {}", entry.fd, entry.tgid);
    let family = sys::socket_number(fd.as_fd(), libc::SO_DOMAIN).context(context)?;
    let kind = sys::socket_number(fd.as_fd(), libc::SO_TYPE).context(context)?;
    let protocol = sys::socket_number(fd.as_fd(), libc::SO_PROTOCOL).context(context)?;
    let listening = sys::socket_number(fd.as_fd(), libc::SO_ACCEPTCONN).context(context)? != 0;
    let stream = matches!(kind, libc::SOCK_STREAM | libc::SOCK_SEQPACKET);
    match (family, kind) {
        (libc::AF_UNIX, _) | (libc::AF_INET | libc::AF_INET6, libc::SOCK_STREAM | libc::SOCK_DGRAM) => {}
        _ => {
            return Err(refuse(entry, &format!("sockets of family {family}, type {kind} are not supported: close it")));
        }
    }
    let peer = address(&fd, libc::getpeername).ok();
    let pair = match &peer {
        Some(_) if family == libc::AF_UNIX => Some(unix::dump(entry, entries, &fd, kind, all)?),
        Some(_) => return Err(refuse(entry, "the socket is connected: close the connection before the dump")),
        None => None,
    };
    let mut waiting = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, no timeout.
    unsafe { libc::poll(&raw mut waiting, 1, 0) };
    let pending = waiting.revents & libc::POLLIN != 0;
    if pending && listening {
        return Err(refuse(entry, "a connection waits to be accepted: accept it before the dump"));
    }
    if pending && !stream && pair.is_none() {
        return Err(refuse(entry, "datagrams wait to be read: read them before the dump"));
    }
    let bare = if family == libc::AF_UNIX { 2 } else { usize::MAX };
    let local = address(&fd, libc::getsockname).context(context)?;
    // An internet socket that is not bound has port 0.
    let bound = if family == libc::AF_UNIX { local.len() > bare } else { local[2..4] != [0, 0] };
    let local = if bound { local } else { Vec::new() };
    let peer = peer.filter(|name| name.len() > bare).unwrap_or_default();
    if kind == libc::SOCK_DGRAM && pair.is_some() && (bound || !peer.is_empty()) {
        return Err(refuse(entry, "the socket is connected by a name: close the connection before the dump"));
    }
    let mut options = Vec::new();
    if pair.is_some() {
        let (level, name) = PEER_CREDENTIALS;
        options.push((level, name, sys::socket_option(fd.as_fd(), level, name).context(context)?));
    }
    for &(level, name) in OPTIONS {
        if let Ok(value) = sys::socket_option(fd.as_fd(), level, name)
            && (level, name, value.as_slice()) != NO_PEEK_OFFSET
            && (name == libc::SO_REUSEADDR || value.iter().any(|&b| b != 0) || level != libc::SOL_SOCKET)
        {
            options.push((level, name, value));
        }
    }
    for (name, force) in [(libc::SO_SNDBUF, libc::SO_SNDBUFFORCE), (libc::SO_RCVBUF, libc::SO_RCVBUFFORCE)] {
        // The kernel doubles what is set, and reports the doubled value.
        let value = sys::socket_number(fd.as_fd(), name).context(context)? / 2;
        options.push((libc::SOL_SOCKET, force, value.to_ne_bytes().to_vec()));
    }
    // The name of a connection is of no use to others.
    let path = unix_path(&local).filter(|_| pair.is_none());
    let bound_file = match path.as_deref().map(|p| bound_path(p, entry.tgid)) {
        Some(p) => {
            let meta = std::fs::metadata(&p).map_err(|_| refuse(entry, "its name was removed from the file system"))?;
            Some((meta.mode() & 0o7777, meta.uid(), meta.gid()))
        }
        None => None,
    };
    Ok(FileKind::Socket(Socket {
        family,
        kind,
        protocol,
        local,
        // Otherwise it is that of another file.
        peer: if pair.as_ref().is_some_and(|p| p.peer.is_none()) { peer } else { Vec::new() },
        backlog: if listening { Some(backlog(entry, family)) } else { None },
        options,
        bound_file,
        pair,
    }))
}

pub(super) fn unix_path(address: &[u8]) -> Option<PathBuf> {
    let name =
        address.get(2..).filter(|n| address.starts_with(&(libc::AF_UNIX as u16).to_ne_bytes()) && !n.is_empty())?;
    if name[0] == 0 {
        return None;
    }
    let end = name.iter().position(|&b| b == 0).unwrap_or(name.len());
    Some(PathBuf::from(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(&name[..end])))
}

/// A relative name counts from where the process was at bind; the best guess is where it is now.
fn bound_path(path: &Path, pid: i32) -> PathBuf {
    if path.is_absolute() { path.into() } else { crate::kernel::proc::path(pid, "cwd").join(path) }
}

/// The backlog of listen(2): the iterators and sock_diag know it for TCP; unix sockets keep theirs to themselves.
fn backlog(_: &FdEntry, _: i32) -> u32 {
    // net.core.somaxconn caps every backlog, so this is what a server asked for or more.
    crate::kernel::proc::number(Path::new("/proc/sys/net/core/somaxconn")).unwrap_or(4096)
}

/// Makes the sockets of one group.
pub(super) fn create(
    files: &[&OpenFile],
    refs: &Referenced<'_>,
    numbers: &mut Numbers,
    program: &mut Program,
) -> Vec<i32> {
    if unix::end(files[0]).is_some() {
        return unix::create(files, refs, numbers, program);
    }
    files
        .iter()
        .map(|file| {
            let FileKind::Socket(socket) = &file.kind else { unreachable!("called for sockets") };
            one(socket, file.flags, numbers, program)
        })
        .collect()
}

fn one(socket: &Socket, flags: u32, numbers: &mut Numbers, program: &mut Program) -> i32 {
    let fd = numbers.lowest();
    let kind = socket.kind | flags as i32 & libc::O_NONBLOCK;
    let args = [socket.family.into(), kind.into(), socket.protocol.into()];
    program.call_expecting("socket", libc::SYS_socket, &args, fd);
    set_options(socket, fd, program);
    if !socket.local.is_empty() {
        let address = program.data(&socket.local);
        if let (Some(path), Some(_)) = (unix_path(&socket.local), socket.bound_file) {
            // The dead server's name is still there, as after a crash.
            use std::os::unix::ffi::OsStrExt;
            let name = program.string(path.as_os_str().as_bytes());
            program.try_call("remove the old socket name", libc::SYS_unlink, &[name]);
        }
        let label = format!("bind to {}", describe(&socket.local));
        program.call(label, libc::SYS_bind, &[fd.into(), address, socket.local.len().into()]);
        if let (Some(path), Some((mode, uid, gid))) = (unix_path(&socket.local), socket.bound_file) {
            use std::os::unix::ffi::OsStrExt;
            let name = program.string(path.as_os_str().as_bytes());
            let at = libc::AT_FDCWD;
            program.call("socket file mode", libc::SYS_fchmodat, &[at.into(), name, mode.into()]);
            program.call("socket file owner", libc::SYS_fchownat, &[at.into(), name, uid.into(), gid.into(), 0.into()]);
        }
    }
    if let Some(backlog) = socket.backlog {
        program.call("listen", libc::SYS_listen, &[fd.into(), backlog.into()]);
    }
    fd
}

/// Sets the options of a socket.
pub(super) fn set_options(socket: &Socket, fd: i32, program: &mut Program) {
    for (level, name, value) in socket.options.iter().filter(|o| (o.0, o.1) != PEER_CREDENTIALS) {
        let block = program.data(value);
        let args = [fd.into(), (*level).into(), (*name).into(), block, value.len().into()];
        program.try_call(format!("socket option {level}/{name}"), libc::SYS_setsockopt, &args);
    }
}

/// An address for people.
pub(super) fn describe(address: &[u8]) -> String {
    let family = i32::from(u16::from_ne_bytes([address[0], address[1]]));
    let port = || u16::from_be_bytes([address[2], address[3]]);
    match family {
        libc::AF_INET if address.len() >= 8 => {
            let ip: [u8; 4] = address[4..8].try_into().expect("four bytes");
            format!("{}:{}", std::net::Ipv4Addr::from(ip), port())
        }
        libc::AF_INET6 if address.len() >= 24 => {
            let ip: [u8; 16] = address[8..24].try_into().expect("sixteen bytes");
            format!("[{}]:{}", std::net::Ipv6Addr::from(ip), port())
        }
        _ => String::from_utf8_lossy(&address[2..]).replace('\0', "@"),
    }
}
