//! sock_diag(7) of unix sockets: who is connected to whom. Linux 3.3, CONFIG_UNIX_DIAG.

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use std::{
    collections::HashMap,
    io,
    os::fd::{AsRawFd, OwnedFd},
};

/// What the kernel knows of a unix socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct UnixSocket {
    /// Inode of the socket it is connected to; 0: nobody has that open. `None`: not connected.
    pub peer: Option<u32>,
    /// Bit 0: shut down for reading; bit 1: for writing.
    pub shutdown: u8,
    /// Of a listening socket: inodes of those that wait to be accepted, in their order; 0: closed since.
    pub waiting: Vec<u32>,
}

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const UDIAG_SHOW_PEER: u32 = 4;
const UDIAG_SHOW_ICONS: u32 = 8;
const UNIX_DIAG_PEER: u16 = 2;
const UNIX_DIAG_ICONS: u16 = 3;
const UNIX_DIAG_SHUTDOWN: u16 = 6;
/// Length of struct nlmsghdr, and of struct unix_diag_msg.
const HEADER: usize = 16;

/// All unix sockets of this process's network namespace by inode.
pub(crate) fn unix_sockets() -> io::Result<HashMap<u32, UnixSocket>> {
    let netlink =
        socket(AddressFamily::Netlink, SockType::Datagram, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkSockDiag)?;
    send(netlink.as_raw_fd(), &request(), MsgFlags::empty())?;
    let mut all = HashMap::new();
    let mut buffer = vec![0; 1 << 16];
    while read(&netlink, &mut buffer, &mut all)? {}
    Ok(all)
}

/// Asks for sockets in all states.
fn request() -> Vec<u8> {
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
    // struct nlmsghdr and struct unix_diag_req: family, protocol, states, inode, what to show, cookie.
    let family = [libc::AF_UNIX as u8, 0, 0, 0];
    let words = [u32::MAX, 0, UDIAG_SHOW_PEER | UDIAG_SHOW_ICONS, 0, 0];
    let body = [&family[..], words.map(u32::to_ne_bytes).as_flattened()].concat();
    let header = [
        &((HEADER + body.len()) as u32).to_ne_bytes()[..],
        &SOCK_DIAG_BY_FAMILY.to_ne_bytes(),
        &flags.to_ne_bytes(),
        &[0; 8],
    ];
    [header.concat(), body].concat()
}

/// Reads some messages; false: those were the last.
fn read(netlink: &OwnedFd, buffer: &mut [u8], all: &mut HashMap<u32, UnixSocket>) -> io::Result<bool> {
    let length = recv(netlink.as_raw_fd(), buffer, MsgFlags::empty())?;
    let mut rest = &buffer[..length];
    while let Some((length, kind)) = u32_at(rest, 0).zip(u16_at(rest, 4)) {
        let message = rest.get(HEADER..length as usize).ok_or(io::ErrorKind::InvalidData)?;
        match i32::from(kind) {
            libc::NLMSG_DONE => return Ok(false),
            libc::NLMSG_ERROR => {
                let errno = u32_at(message, 0).map_or(libc::EPROTO, |e| (e as i32).wrapping_neg());
                return Err(io::Error::from_raw_os_error(errno));
            }
            _ => all.extend(parse(message)),
        }
        rest = rest.get((length as usize).next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(true)
}

/// struct unix_diag_msg and its attributes.
fn parse(message: &[u8]) -> Option<(u32, UnixSocket)> {
    let (ino, mut found) = (u32_at(message, 4)?, UnixSocket::default());
    let mut rest = message.get(HEADER..)?;
    while let Some((length, kind)) = u16_at(rest, 0).zip(u16_at(rest, 2)) {
        let value = rest.get(4..usize::from(length))?;
        match kind {
            UNIX_DIAG_PEER => found.peer = u32_at(value, 0),
            UNIX_DIAG_SHUTDOWN => found.shutdown = *value.first()?,
            UNIX_DIAG_ICONS => found.waiting = (0..value.len() / 4).filter_map(|n| u32_at(value, 4 * n)).collect(),
            _ => {}
        }
        rest = rest.get(usize::from(length).next_multiple_of(4)..).unwrap_or_default();
    }
    Some((ino, found))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::{
        fd::AsFd,
        unix::net::{UnixListener, UnixStream},
    };

    fn inode(fd: &impl AsFd) -> u32 {
        nix::sys::stat::fstat(fd).unwrap().st_ino as u32
    }

    #[test]
    fn peers_and_their_states() {
        let (a, b) = UnixStream::pair().unwrap();
        let (widow, gone) = UnixStream::pair().unwrap();
        drop(gone);
        a.shutdown(std::net::Shutdown::Write).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("x")).unwrap();
        let clients = [0; 3].map(|_| UnixStream::connect(dir.path().join("x")).unwrap());
        let all = unix_sockets().unwrap();
        let of = |peer, shutdown| UnixSocket { peer, shutdown, waiting: Vec::new() };
        assert_eq!(all[&inode(&a)], of(Some(inode(&b)), 2));
        assert_eq!(all[&inode(&b)], of(Some(inode(&a)), 1));
        assert_eq!(all[&inode(&widow)], of(Some(0), 3));
        assert_eq!(all[&inode(&listener)].waiting, clients.each_ref().map(inode));
        assert_eq!(all[&inode(&clients[0])].peer, Some(0));
    }
}
