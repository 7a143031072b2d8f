//! Sockets, in a network namespace of their own.

use super::{
    super::{SocketEntry, procfs},
    among_many, iterators,
    victim::{Victim, end_with_parent, say, stand_still},
};
use nix::{
    sched::{CloneFlags, unshare},
    sys::socket::{
        AddressFamily, Backlog, MsgFlags, Shutdown, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6,
        SockaddrLike, UnixAddr, accept, bind, connect, getsockname, listen, send, shutdown, socket, socketpair,
    },
    unistd::{ForkResult, dup, fork, pipe},
};
use proptest::prelude::*;
use std::{
    collections::HashMap,
    io::Write,
    mem,
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

const KINDS: &str = "lLcCwWbnuUvVxapdqrko";

/// A child makes one set of sockets for each letter, and stays.
pub(super) fn act(kinds: &str) {
    let (ready, tell) = pipe().unwrap();
    std::io::stdout().flush().unwrap();
    // SAFETY: nothing that another thread could hold is used: there is no other thread that does anything.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            end_with_parent();
            drop(ready);
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            loopback_up();
            kinds.chars().enumerate().for_each(|(n, kind)| make(kind, n));
            std::io::stdout().flush().unwrap();
            drop(tell);
            stand_still()
        }
        ForkResult::Parent { child } => {
            drop(tell);
            assert_eq!(nix::unistd::read(&ready, &mut [0]).unwrap(), 0);
            println!("pid: {child}");
        }
    }
}

fn loopback_up() {
    let any = new(AddressFamily::Inet, SockType::Datagram);
    // SAFETY: any bytes are a value of this structure.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = libc::IFF_UP as i16;
    // SAFETY: the kernel reads one ifreq.
    assert_eq!(unsafe { libc::ioctl(any.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) }, 0);
}

fn new(family: AddressFamily, sort: SockType) -> OwnedFd {
    socket(family, sort, SockFlag::SOCK_CLOEXEC, None).unwrap()
}

fn inode(fd: &OwnedFd) -> u64 {
    nix::sys::stat::fstat(fd).unwrap().st_ino
}

/// Bound to a free port of the loopback.
fn bound(six: bool, sort: SockType) -> OwnedFd {
    let fd = new(if six { AddressFamily::Inet6 } else { AddressFamily::Inet }, sort);
    match six {
        true => bind(fd.as_raw_fd(), &SockaddrIn6::from(std::net::SocketAddrV6::new(Ipv6Addr::LOCALHOST, 0, 0, 0))),
        false => bind(fd.as_raw_fd(), &SockaddrIn::from(std::net::SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0))),
    }
    .unwrap();
    fd
}

/// A new socket that is connected to another.
fn connected<A: SockaddrLike>(to: &OwnedFd, family: AddressFamily, sort: SockType) -> OwnedFd {
    let fd = new(family, sort);
    connect(fd.as_raw_fd(), &getsockname::<A>(to.as_raw_fd()).unwrap()).unwrap();
    fd
}

fn client(six: bool, to: &OwnedFd, sort: SockType) -> OwnedFd {
    match six {
        true => connected::<SockaddrIn6>(to, AddressFamily::Inet6, sort),
        false => connected::<SockaddrIn>(to, AddressFamily::Inet, sort),
    }
}

fn write(fd: &OwnedFd, times: usize, bytes: usize) {
    for _ in 0..times {
        assert_eq!(send(fd.as_raw_fd(), &vec![b'x'; bytes], MsgFlags::empty()).unwrap(), bytes);
    }
}

fn make(kind: char, n: usize) {
    let six = kind.is_ascii_uppercase();
    let mut keep = Vec::new();
    // What procfs does not tell is said: what waits in a unix socket, and where a TCP socket is bound.
    let expect = |fd: &OwnedFd, waiting: usize| say(format!("{} {waiting} 0", inode(fd)));
    match kind.to_ascii_lowercase() {
        'l' => {
            let listening = bound(six, SockType::Stream);
            listen(&listening, Backlog::new(16).unwrap()).unwrap();
            keep.extend((0..n % 4).map(|_| client(six, &listening, SockType::Stream)));
            keep.push(dup(&listening).unwrap());
            keep.push(listening);
        }
        'c' | 'w' => {
            let listening = bound(six, SockType::Stream);
            listen(&listening, Backlog::new(1).unwrap()).unwrap();
            let one = client(six, &listening, SockType::Stream);
            // SAFETY: accept(2) has just made it.
            let other = unsafe { OwnedFd::from_raw_fd(accept(listening.as_raw_fd()).unwrap()) };
            write(&one, 1, 1 + 7 * n);
            if kind.eq_ignore_ascii_case(&'w') {
                shutdown(one.as_raw_fd(), Shutdown::Write).unwrap();
            }
            keep.extend([one, other]);
        }
        'b' => {
            let bound = bound(six, SockType::Stream);
            say(format!("{} 0 {}", inode(&bound), getsockname::<SockaddrIn>(bound.as_raw_fd()).unwrap().port()));
            keep.push(bound);
        }
        'n' => keep.push(new(AddressFamily::Inet, SockType::Stream)),
        'u' | 'v' => {
            let receiver = bound(six, SockType::Datagram);
            let sender = client(six, &receiver, SockType::Datagram);
            write(&sender, n % 5, 100);
            keep.push(receiver);
            if kind.eq_ignore_ascii_case(&'v') {
                keep.push(sender);
            }
        }
        'x' | 'a' => {
            let name = format!("name {n}");
            let address = match kind {
                'x' => UnixAddr::new(name.as_str()),
                _ => UnixAddr::new_abstract(name.as_bytes()),
            };
            let listening = new(AddressFamily::Unix, SockType::Stream);
            bind(listening.as_raw_fd(), &address.unwrap()).unwrap();
            listen(&listening, Backlog::new(16).unwrap()).unwrap();
            keep.extend((0..n % 4).map(|_| connected::<UnixAddr>(&listening, AddressFamily::Unix, SockType::Stream)));
            expect(&listening, n % 4);
            keep.push(listening);
        }
        'p' | 'd' | 'q' => {
            let sort = match kind {
                'p' => SockType::Stream,
                'd' => SockType::Datagram,
                _ => SockType::SeqPacket,
            };
            let (one, other) = socketpair(AddressFamily::Unix, sort, None, SockFlag::SOCK_CLOEXEC).unwrap();
            write(&one, n % 6, 100);
            expect(&other, n % 6);
            keep.extend([one, other]);
        }
        'r' => {
            keep.push(socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Icmp).unwrap())
        }
        'k' => keep.push(new(AddressFamily::Netlink, SockType::Raw)),
        'o' => keep.push(new(AddressFamily::Packet, SockType::Datagram)),
        other => panic!("no such kind: {other}"),
    }
    mem::forget(keep);
}

/// What procfs knows of a socket is what the iterators see. The rest is left out of `ours`.
fn as_procfs(ours: &SocketEntry, theirs: &SocketEntry) -> SocketEntry {
    if theirs.state == 0 {
        // Neither listening nor connected, or of a rarer family.
        assert!(ours.peer.is_none() && (ours.kind() != "tcp" || ours.state_name() == Some("closed")), "{ours:?}");
        assert!(ours.family != 0 && (theirs.family == 0 || theirs.family == ours.family), "{ours:?} {theirs:?}");
        return theirs.clone();
    }
    let waiting = |n: Option<u64>, known: Option<u64>| known.and(n);
    SocketEntry {
        peer_ino: None,
        receive: waiting(ours.receive, theirs.receive),
        send: waiting(ours.send, theirs.send),
        ..ours.clone()
    }
}

fn check(kinds: &str) {
    let Some(mut iterators) = iterators() else { return };
    let victim = Victim::start(&format!("sockets {kinds}"));
    // What was sent is acknowledged a moment later.
    let quiet =
        |sockets: &[SocketEntry]| sockets.iter().all(|s| s.kind().starts_with("unix") || s.send.unwrap_or(0) == 0);
    let begin = std::time::Instant::now();
    let mut theirs = procfs::sockets(&victim.pids).unwrap();
    while !quiet(&theirs) {
        assert!(begin.elapsed().as_secs() < 10, "{theirs:?}");
        theirs = procfs::sockets(&victim.pids).unwrap();
    }
    let ours = iterators.sockets(&victim.pids).unwrap();
    assert_eq!(ours.len(), theirs.len(), "{ours:#?} {theirs:#?}");
    for (a, b) in ours.iter().zip(&theirs) {
        assert_eq!((a.tgid, a.fd, a.ino), (b.tgid, b.fd, b.ino));
        assert_eq!(&as_procfs(a, b), b, "iterator first, procfs second");
    }
    let by_ino: HashMap<u64, &SocketEntry> = ours.iter().map(|s| (s.ino, s)).collect();
    for word in &victim.words {
        let numbers: Vec<u64> = word.split(' ').map(|n| n.parse().unwrap()).collect();
        let seen = by_ino[&numbers[0]];
        let port = seen.local.map_or(0, |a| a.port());
        assert_eq!((seen.receive, u64::from(port)), (Some(numbers[1]), numbers[2]), "{word}");
    }
    for pair in ours.iter().filter(|s| s.kind() == "unix" && s.name.0.is_empty()) {
        // One whose connection waits to be accepted is connected to what nobody has open yet.
        if let Some(peer) = pair.peer_ino {
            assert_eq!(by_ino[&peer].peer_ino, Some(pair.ino));
        }
    }
    assert_eq!(iterators.sockets(&among_many(&victim.pids)).unwrap(), ours);
}

#[test]
fn every_kind_of_socket() {
    check(KINDS);
    check(&KINDS.chars().rev().collect::<String>());
}

proptest! {
    // Each case starts processes.
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 40, failure_persistence: None, ..Default::default() })]

    #[test]
    fn both_readers_see_the_same_sockets(kinds in proptest::string::string_regex(&format!("[{KINDS}]{{1,60}}")).unwrap()) {
        check(&kinds);
    }
}
