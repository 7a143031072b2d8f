//! Connections through listening sockets with a name.

use std::fs;
use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::Path;

use nix::sys::socket::{UnixCredentials, getsockopt, sockopt};
use standstill_tests::workload::Checker;

use super::pair::as_user;

/// A client, and who accepted it.
struct Connection {
    client: UnixStream,
    server: UnixStream,
    /// What each of them has sent, and the other one has not read yet.
    sent: [Vec<u8>; 2],
}

impl Connection {
    fn creds(&self) -> [UnixCredentials; 2] {
        [&self.client, &self.server].map(|end| getsockopt(end, sockopt::PeerCredentials).expect("SO_PEERCRED"))
    }
}

/// A listening socket and its connections.
struct Service {
    listener: Option<UnixListener>,
    address: SocketAddr,
    connections: Vec<Connection>,
    /// A client whose server is closed.
    widow: UnixStream,
    /// Who has the other end, by the first client and its server.
    creds: [UnixCredentials; 2],
}

impl Service {
    /// `user`: an id that listens.
    fn new(address: SocketAddr, keep: bool, user: u32) -> Self {
        let listener = as_user(user, user + 1, || UnixListener::bind_addr(&address).expect("listen"));
        let other = as_user(0, user + 2, || UnixStream::connect_addr(&address).expect("connect"));
        let mut connected = Some((other, listener.accept().expect("accept").0));
        let connect = || {
            let client = UnixStream::connect_addr(&address).expect("connect");
            (client, listener.accept().expect("accept").0)
        };
        let connections = (1..4).map(|n| {
            let (client, server) = connected.take().unwrap_or_else(connect);
            let sent = [vec![n; 1000 * usize::from(n)], vec![n + 100; usize::from(n)]];
            (&client).write_all(&sent[0]).and_then(|()| (&server).write_all(&sent[1])).expect("send");
            Connection { client, server, sent }
        });
        let connections: Vec<Connection> = connections.collect();
        let widow = connect().0;
        let creds = connections[0].creds();
        Self { listener: keep.then_some(listener), address, connections, widow, creds }
    }

    fn look(&self, checker: &Checker) {
        let name = |address: std::io::Result<SocketAddr>| address.map(|a| format!("{a:?}")).unwrap_or_default();
        let want = format!("{:?}", self.address);
        for c in &self.connections {
            checker.equal("name of an accepted socket", &name(c.server.local_addr()), &want);
            checker.equal("name of a client's peer", &name(c.client.peer_addr()), &want);
            let unnamed = (
                c.client.local_addr().is_ok_and(|a| a.is_unnamed()),
                c.server.peer_addr().is_ok_and(|a| a.is_unnamed()),
            );
            checker.equal("clients without a name", &unnamed, &(true, true));
        }
        checker.equal("SO_PEERCRED of a connection", &self.connections[0].creds(), &self.creds);
        checker.equal("name of a peer that is closed", &name(self.widow.peer_addr()), &want);
        let listening = self.listener.as_ref().map(|l| name(l.local_addr()));
        checker.that(listening.as_ref().is_none_or(|name| *name == want), || format!("{listening:?} listens"));
    }

    fn exercise(&mut self, checker: &Checker) {
        for c in &mut self.connections {
            for (to, from, sent) in [(&c.server, &c.client, &c.sent[0]), (&c.client, &c.server, &c.sent[1])] {
                let (mut to, mut from) = (to, from);
                let mut got = vec![0; sent.len()];
                checker.works("read a connection", to.read_exact(&mut got));
                checker.that(got == *sent, || format!("{} bytes of a connection are wrong", sent.len()));
                checker.works("write it back", from.write_all(sent));
            }
        }
        checker.equal("bytes of a closed peer", &self.widow.read(&mut [0; 8]).ok(), &Some(0));
        let Some(listener) = &self.listener else { return };
        let new = UnixStream::connect_addr(&self.address).and_then(|client| Ok((client, listener.accept()?.0)));
        let Some((mut client, mut server)) = checker.works("connect anew", new) else { return };
        let mut byte = [0];
        checker.works("talk", client.write_all(b"!").and_then(|()| server.read_exact(&mut byte)));
        checker.equal("what was said", &byte, b"!");
    }
}

pub(crate) struct Named {
    services: Vec<Service>,
    /// A client with a name of its own.
    bound: (UnixStream, UnixStream),
    bound_to: String,
}

impl Named {
    /// `label`: what tells its names from others.
    pub(crate) fn new(dir: &Path, label: &str) -> Self {
        let dir = &dir.join(label);
        fs::create_dir_all(dir).expect("make a directory");
        let abstract_name = |name: &str| {
            let name = format!("standstill {label} {name} {}", std::process::id());
            SocketAddr::from_abstract_name(name).expect("an abstract name")
        };
        let path = |name: &str| SocketAddr::from_pathname(dir.join(name)).expect("a path");
        let services = vec![
            Service::new(path("service"), true, 0),
            Service::new(path("ended service"), false, 0),
            Service::new(abstract_name("listening"), true, 500),
            Service::new(abstract_name("ended"), false, 600),
        ];
        let bound_to = abstract_name("client");
        let client = bound_client(&bound_to);
        let listener = UnixListener::bind(dir.join("for a bound client")).expect("listen");
        connect(&client, &dir.join("for a bound client"));
        let server = listener.accept().expect("accept").0;
        Self { services, bound: (client, server), bound_to: format!("{bound_to:?}") }
    }

    pub(crate) fn look(&self, checker: &Checker) {
        self.services.iter().for_each(|service| service.look(checker));
        let name = |address: std::io::Result<SocketAddr>| address.map(|a| format!("{a:?}")).unwrap_or_default();
        checker.equal("name of a client", &name(self.bound.0.local_addr()), &self.bound_to);
        checker.equal("name of a server's peer", &name(self.bound.1.peer_addr()), &self.bound_to);
    }

    pub(crate) fn exercise(&mut self, checker: &Checker) {
        self.services.iter_mut().for_each(|service| service.exercise(checker));
    }
}

/// A socket with a name that is not connected yet.
fn bound_client(address: &SocketAddr) -> UnixStream {
    // Only a listening one can be made with a name by the standard library.
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, bind, socket};
    use std::os::fd::AsRawFd;
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).expect("socket");
    let name = address.as_abstract_name().expect("an abstract name");
    bind(fd.as_raw_fd(), &UnixAddr::new_abstract(name).expect("an address")).expect("bind");
    fd.into()
}

fn connect(client: &UnixStream, path: &Path) {
    use nix::sys::socket::{UnixAddr, connect};
    use std::os::fd::AsRawFd;
    connect(client.as_raw_fd(), &UnixAddr::new(path).expect("an address")).expect("connect");
}
