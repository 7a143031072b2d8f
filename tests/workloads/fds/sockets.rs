//! Listening sockets without connections.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{self as unix, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;

use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use standstill_tests::workload::Checker;

use super::Group;

pub(crate) struct Sockets {
    tcp: TcpListener,
    tcp6: Option<TcpListener>,
    address: SocketAddr,
    path: PathBuf,
    by_path: UnixListener,
    name: String,
    by_name: UnixListener,
}

impl Sockets {
    pub(crate) fn new(dir: &Path) -> Self {
        let tcp = TcpListener::bind("127.0.0.1:0").expect("listen on TCP");
        setsockopt(&tcp, sockopt::KeepAlive, &true).expect("SO_KEEPALIVE");
        setsockopt(&tcp, sockopt::RcvBuf, &50_000).expect("SO_RCVBUF");
        let path = dir.join("listening");
        let name = format!("standstill fds {}", std::process::id());
        let abstract_name = unix::SocketAddr::from_abstract_name(&name).expect("an abstract address");
        let address = tcp.local_addr().expect("address");
        std::fs::write(dir.join("port"), address.port().to_string()).expect("write the port");
        Self {
            address,
            tcp,
            tcp6: TcpListener::bind("[::1]:0").ok(),
            by_path: UnixListener::bind(&path).expect("listen at a path"),
            path,
            by_name: UnixListener::bind_addr(&abstract_name).expect("listen at a name"),
            name,
        }
    }
}

impl Group for Sockets {
    fn look(&self, checker: &Checker) {
        checker.equal("address of a socket", &self.tcp.local_addr().ok(), &Some(self.address));
        checker.equal("SO_KEEPALIVE", &getsockopt(&self.tcp, sockopt::KeepAlive), &Ok(true));
        checker.equal("SO_RCVBUF", &getsockopt(&self.tcp, sockopt::RcvBuf), &Ok(100_000));
        checker.equal("SO_REUSEADDR", &getsockopt(&self.tcp, sockopt::ReuseAddr), &Ok(true));
        let address = self.by_path.local_addr().ok().and_then(|address| address.as_pathname().map(Path::to_owned));
        checker.equal("path of a socket", &address.as_ref(), &Some(&self.path));
        let address = self.by_name.local_addr().ok();
        let name = address.as_ref().and_then(SocketAddrExt::as_abstract_name);
        checker.equal("name of a socket", &name, &Some(self.name.as_bytes()));
        let listening = [self.tcp.as_fd(), self.by_path.as_fd(), self.by_name.as_fd()]
            .map(|socket| getsockopt(&socket, sockopt::AcceptConn));
        checker.equal("SO_ACCEPTCONN", &listening, &[Ok(true); 3]);
    }

    fn exercise(&mut self, checker: &Checker) {
        for listener in [Some(&self.tcp), self.tcp6.as_ref()].into_iter().flatten() {
            let connect = listener.local_addr().and_then(TcpStream::connect);
            talk(checker, "TCP", connect, || listener.accept().map(|(stream, _)| stream));
        }
        let accept = |listener: &UnixListener| listener.accept().map(|(stream, _)| stream);
        talk(checker, "a path", UnixStream::connect(&self.path), || accept(&self.by_path));
        let address = unix::SocketAddr::from_abstract_name(&self.name);
        let connect = address.and_then(|address| UnixStream::connect_addr(&address));
        talk(checker, "a name", connect, || accept(&self.by_name));
    }
}

/// Connects to a listening socket and sends a byte there and back.
fn talk<S: Read + Write + Send>(
    checker: &Checker,
    how: &str,
    connect: std::io::Result<S>,
    accept: impl FnOnce() -> std::io::Result<S> + Send,
) {
    let Some(mut client) = checker.works(&format!("connect through {how}"), connect) else { return };
    let Some(mut server) = checker.works(&format!("accept through {how}"), accept()) else { return };
    let answer = thread::scope(|scope| {
        scope.spawn(|| {
            let mut byte = [0];
            server.read_exact(&mut byte).and_then(|()| server.write_all(&[byte[0] + 1]))
        });
        let mut byte = [0];
        client.write_all(&[41]).and_then(|()| client.read_exact(&mut byte)).map(|()| byte[0])
    });
    checker.equal(&format!("answer through {how}"), &answer.ok(), &Some(42));
}
