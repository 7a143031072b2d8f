//! Sockets of a tree: what kind they are, how they are connected, and how much waits in them.
//!
//! The iterators follow each descriptor to its socket. procfs lists the sockets of a network namespace that are bound or
//! connected (`/proc/pid/net`), without what waits in unix sockets.

use super::{ObserveError, Result, sorted};
use crate::kernel::proc;
use serde::{Deserialize, Serialize};
use standstill_images::types::Bytes;
use std::{
    collections::{HashMap, HashSet},
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

/// A socket behind a descriptor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketEntry {
    /// Process.
    pub tgid: i32,
    /// Descriptor.
    pub fd: i32,
    /// Inode number, as in `socket:[7]`; unique on the machine.
    pub ino: u64,
    /// AF_*; 0: procfs does not tell.
    pub family: u16,
    /// SOCK_*; 0: procfs does not tell.
    pub sort: u16,
    /// Protocol of the family.
    pub protocol: u16,
    /// One of include/net/tcp_states.h, for sockets of all kinds; 0: procfs does not tell.
    pub state: u16,
    /// Its own address, of an internet socket.
    pub local: Option<SocketAddr>,
    /// The address of the other side, of a connected internet socket.
    pub peer: Option<SocketAddr>,
    /// Name of a unix socket. An abstract one begins with a NUL.
    pub name: Bytes,
    /// Inode number of the unix socket that it is connected to, if anybody has that open; only the iterators tell.
    pub peer_ino: Option<u64>,
    /// Bytes received and not read yet; connections not accepted yet, of a listening one; packets or connections, of a unix
    /// socket, where only the iterators tell.
    pub receive: Option<u64>,
    /// Bytes sent and not acknowledged yet; of a unix socket what the kernel needs for those not read yet.
    pub send: Option<u64>,
}

const TCP_ESTABLISHED: u16 = 1;
const TCP_CLOSE: u16 = 7;
const TCP_LISTEN: u16 = 10;
/// include/net/tcp_states.h.
const STATES: [&str; 14] = [
    "unknown",
    "established",
    "syn-sent",
    "syn-recv",
    "fin-wait-1",
    "fin-wait-2",
    "time-wait",
    "closed",
    "close-wait",
    "last-ack",
    "listen",
    "closing",
    "syn-recv",
    "bound",
];

impl SocketEntry {
    /// Name of its kind: `tcp`, `udp6`, `unix`, …
    pub fn kind(&self) -> &'static str {
        let six = i32::from(self.family) == libc::AF_INET6;
        match (i32::from(self.family), i32::from(self.sort)) {
            (libc::AF_INET | libc::AF_INET6, libc::SOCK_STREAM) if i32::from(self.protocol) == libc::IPPROTO_TCP => {
                if six {
                    "tcp6"
                } else {
                    "tcp"
                }
            }
            (libc::AF_INET | libc::AF_INET6, libc::SOCK_DGRAM) if i32::from(self.protocol) == libc::IPPROTO_UDP => {
                if six {
                    "udp6"
                } else {
                    "udp"
                }
            }
            (libc::AF_INET | libc::AF_INET6, libc::SOCK_RAW) => "raw",
            (libc::AF_UNIX, _) => "unix",
            (libc::AF_NETLINK, _) => "netlink",
            (libc::AF_PACKET, _) => "packet",
            (libc::AF_VSOCK, _) => "vsock",
            _ => "socket",
        }
    }

    /// Name of its state, if those of its kind have any.
    pub fn state_name(&self) -> Option<&'static str> {
        match self.kind() {
            "tcp" | "tcp6" => Some(STATES.get(usize::from(self.state)).unwrap_or(&STATES[0])),
            "unix" => Some(match self.state {
                TCP_LISTEN => "listen",
                TCP_ESTABLISHED => "connected",
                _ => "unconnected",
            }),
            _ => None,
        }
    }
}

/// The sockets of the processes by `/proc/pid/net`, by process and descriptor.
///
/// # Errors
/// When the descriptors of a process cannot be listed.
pub fn from_procfs(tgids: &[i32]) -> Result<Vec<SocketEntry>> {
    let mut all = Vec::new();
    let (mut read, mut known) = (HashSet::new(), HashMap::new());
    for tgid in sorted(tgids) {
        let of_process = sockets_of(tgid).map_err(ObserveError::io(format!("list the descriptors of {tgid}")))?;
        if !of_process.is_empty() {
            let namespace = fs::read_link(proc::path(tgid, "ns/net")).unwrap_or_default();
            if read.insert(namespace) {
                namespace_of(tgid, &mut known);
            }
        }
        for (fd, ino) in of_process {
            let found = known.get(&ino).cloned().unwrap_or_else(|| nothing(0, 0));
            all.push(SocketEntry { tgid, fd, ino, ..found });
        }
    }
    Ok(all)
}

/// Descriptors and inode numbers, by descriptor.
fn sockets_of(tgid: i32) -> io::Result<Vec<(i32, u64)>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(proc::path(tgid, "fd"))? {
        let entry = entry?;
        // One that was closed in between.
        let Ok(link) = fs::read_link(entry.path()) else { continue };
        let ino = link.to_str().and_then(|l| l.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
        let fd = entry.file_name().to_str().and_then(|n| n.parse().ok());
        all.extend(fd.zip(ino));
    }
    all.sort_unstable();
    Ok(all)
}

/// A socket of which nothing is known.
fn nothing(family: i32, sort: i32) -> SocketEntry {
    SocketEntry {
        tgid: 0,
        fd: 0,
        ino: 0,
        family: family as u16,
        sort: sort as u16,
        protocol: 0,
        state: 0,
        local: None,
        peer: None,
        name: Bytes::from(&[][..]),
        peer_ino: None,
        receive: None,
        send: None,
    }
}

/// Reads what a process's network namespace lists, by inode.
fn namespace_of(pid: i32, known: &mut HashMap<u64, SocketEntry>) {
    let mut add = |file: &str, parse: &dyn Fn(&[u8]) -> Option<SocketEntry>| {
        // Names of unix sockets may hold any bytes.
        let text = fs::read(proc::path(pid, &format!("net/{file}"))).unwrap_or_default();
        let lines = text.split(|b| *b == b'\n').skip(1).filter_map(parse);
        known.extend(lines.map(|entry| (entry.ino, entry)));
    };
    let internet = [
        ("tcp", libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_TCP),
        ("tcp6", libc::AF_INET6, libc::SOCK_STREAM, libc::IPPROTO_TCP),
        ("udp", libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_UDP),
        ("udp6", libc::AF_INET6, libc::SOCK_DGRAM, libc::IPPROTO_UDP),
    ];
    for (file, family, sort, protocol) in internet {
        add(file, &|line| internet_line(line, nothing(family, sort), protocol));
    }
    add("raw", &|line| last_but(line, 9, nothing(libc::AF_INET, libc::SOCK_RAW)));
    add("raw6", &|line| last_but(line, 9, nothing(libc::AF_INET6, libc::SOCK_RAW)));
    add("netlink", &|line| last_but(line, 9, nothing(libc::AF_NETLINK, libc::SOCK_RAW)));
    add("packet", &|line| last_but(line, 8, nothing(libc::AF_PACKET, 0)));
    add("unix", &unix_line);
}

fn words(line: &[u8]) -> Vec<&str> {
    std::str::from_utf8(line).map_or_else(|_| Vec::new(), |line| line.split_ascii_whitespace().collect())
}

/// A line of which only the inode, word number `n`, is of interest.
fn last_but(line: &[u8], n: usize, entry: SocketEntry) -> Option<SocketEntry> {
    Some(SocketEntry { ino: words(line).get(n)?.parse().ok()?, ..entry })
}

fn internet_line(line: &[u8], entry: SocketEntry, protocol: i32) -> Option<SocketEntry> {
    let words = words(line);
    let (send, receive) = words.get(4)?.split_once(':')?;
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    Some(SocketEntry {
        ino: words.get(9)?.parse().ok()?,
        protocol: protocol as u16,
        state: hex(words.get(3)?)? as u16,
        local: Some(address(words.get(1)?)?),
        peer: Some(address(words.get(2)?)?).filter(|a| a.port() != 0),
        receive: hex(receive),
        send: hex(send),
        ..entry
    })
}

/// `0100007F:1F90`: words of the address as this machine reads them, and the port.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let word = |n: usize| u32::from_str_radix(ip.get(8 * n..8 * n + 8)?, 16).ok().map(u32::to_ne_bytes);
    let ip: IpAddr = match ip.len() {
        8 => Ipv4Addr::from(word(0)?).into(),
        32 => {
            let bytes = [word(0)?, word(1)?, word(2)?, word(3)?].concat();
            Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

/// `address: refcount protocol flags type state inode name`.
fn unix_line(line: &[u8]) -> Option<SocketEntry> {
    const SO_ACCEPTCON: u64 = 1 << 16; // include/linux/net.h
    let mut rest = line;
    let mut word = || {
        let start = rest.iter().position(|b| *b != b' ')?;
        let end = rest[start..].iter().position(|b| *b == b' ').map_or(rest.len(), |n| start + n);
        let (word, after) = (&rest[start..end], &rest[end..]);
        rest = after;
        std::str::from_utf8(word).ok()
    };
    let (_, _, _, flags, sort, state, ino) = (word()?, word()?, word()?, word()?, word()?, word()?, word()?);
    let flags = u64::from_str_radix(flags, 16).ok()?;
    let mut name = rest.strip_prefix(b" ").unwrap_or_default().to_vec();
    if name.first() == Some(&b'@') {
        // Shown for the NULs of an abstract name.
        name.iter_mut().filter(|b| **b == b'@').for_each(|b| *b = 0);
    }
    Some(SocketEntry {
        ino: ino.parse().ok()?,
        state: match state {
            _ if flags & SO_ACCEPTCON != 0 => TCP_LISTEN,
            "03" => TCP_ESTABLISHED,
            _ => TCP_CLOSE,
        },
        name: Bytes::from(name.as_slice()),
        ..nothing(libc::AF_UNIX, i32::from_str_radix(sort, 16).ok()?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_internet_sockets() {
        let line =
            b"   0: 0100007F:1F90 00000000:0000 0A 00000000:00000003 00:00000000 00000000     0        0 4242 1 0 100";
        let entry = internet_line(line, nothing(libc::AF_INET, libc::SOCK_STREAM), libc::IPPROTO_TCP).unwrap();
        assert_eq!((entry.ino, entry.kind(), entry.state_name()), (4242, "tcp", Some("listen")));
        assert_eq!((entry.local.unwrap().to_string(), entry.peer), ("127.0.0.1:8080".into(), None));
        assert_eq!((entry.send, entry.receive), (Some(0), Some(3)));
        let six = address("00000000000000000000000001000000:0050").unwrap();
        assert_eq!(six.to_string(), "[::1]:80");
        assert!(internet_line(b"sl local_address", nothing(0, 0), 6).is_none());
    }

    #[test]
    fn lines_of_unix_sockets() {
        let line = |rest: &str| unix_line(format!("0000000000000000: 00000002 00000000 {rest}").as_bytes()).unwrap();
        let listening = line("00010000 0001 01 77 /run/x y");
        assert_eq!((listening.ino, listening.state_name()), (77, Some("listen")));
        assert_eq!(listening.name.0, b"/run/x y");
        assert_eq!(line("00000000 0001 03    78 @a@b").name.0, b"\0a\0b");
        let nameless = line("00000000 0002 01 79");
        assert_eq!((nameless.state_name(), nameless.name.0.as_slice()), (Some("unconnected"), &b""[..]));
        assert!(unix_line(b"Num       RefCount Protocol Flags    Type St Inode Path").is_none());
    }
}
