//! A socket pair, what lies in it, and how it is set.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::prctl;
use nix::sys::socket::{
    AddressFamily, MsgFlags, Shutdown, SockFlag, SockType, UnixCredentials, getsockopt, recv, send, setsockopt,
    shutdown, socketpair, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use nix::unistd::{getpid, setegid, seteuid};
use standstill_tests::workload::Checker;

/// Who of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    A,
    B,
}

pub(crate) struct Pair {
    kind: SockType,
    /// A, and B while it is open.
    ends: (OwnedFd, Option<OwnedFd>),
    /// What waits in A, and in B: messages.
    queues: [Vec<Vec<u8>>; 2],
    /// Who was shut down by its owner.
    shut: Option<(End, Shutdown)>,
    options: bool,
    signals: bool,
    peek_offset: i32,
    /// Who A says has made the other end.
    creds: UnixCredentials,
    /// A's next reader is told that B did not read everything.
    reset: bool,
}

impl Pair {
    pub(crate) fn new(kind: SockType) -> Self {
        let (a, b) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).expect("socketpair");
        let creds = getsockopt(&a, sockopt::PeerCredentials).expect("SO_PEERCRED");
        let queues = Default::default();
        let (options, signals, reset) = (false, false, false);
        Self { kind, ends: (a, Some(b)), queues, shut: None, options, signals, peek_offset: -1, creds, reset }
    }

    /// The same sockets in another process.
    pub(crate) fn try_clone(&self) -> Self {
        let clone = |fd: &OwnedFd| fd.try_clone().expect("duplicate a descriptor");
        let ends = (clone(&self.ends.0), self.ends.1.as_ref().map(clone));
        Self { ends, queues: self.queues.clone(), ..*self }
    }

    /// A pair made by another user.
    pub(crate) fn of_user(kind: SockType, user: u32, group: u32) -> Self {
        as_user(user, group, || Self::new(kind))
    }

    fn end(&self, end: End) -> Option<&OwnedFd> {
        match end {
            End::A => Some(&self.ends.0),
            End::B => self.ends.1.as_ref(),
        }
    }

    /// Puts messages into an end.
    pub(crate) fn with(mut self, to: End, messages: Vec<Vec<u8>>) -> Self {
        self.put(to, &messages).expect("send");
        self.queues[to as usize] = messages;
        self
    }

    fn put(&self, to: End, messages: &[Vec<u8>]) -> nix::Result<()> {
        let from = self.end(if to == End::A { End::B } else { End::A }).ok_or(Errno::ENOTCONN)?;
        for message in messages {
            let sent = send(from.as_raw_fd(), message, MsgFlags::MSG_DONTWAIT)?;
            assert_eq!(sent, message.len(), "bytes sent");
        }
        Ok(())
    }

    pub(crate) fn with_options(mut self) -> Self {
        let a = &self.ends.0;
        setsockopt(a, sockopt::SndBuf, &30_000).expect("SO_SNDBUF");
        setsockopt(a, sockopt::RcvBuf, &50_000).expect("SO_RCVBUF");
        setsockopt(a, sockopt::PassCred, &true).expect("SO_PASSCRED");
        setsockopt(a, sockopt::ReceiveTimeout, &TimeVal::milliseconds(1500)).expect("SO_RCVTIMEO");
        setsockopt(a, sockopt::SendTimeout, &TimeVal::seconds(7)).expect("SO_SNDTIMEO");
        self.options = true;
        self
    }

    /// SIGURG for this process when something comes.
    pub(crate) fn signals(mut self) -> Self {
        let a = &self.ends.0;
        // SAFETY: fcntl with these commands takes numbers only.
        let set = unsafe {
            libc::fcntl(a.as_raw_fd(), libc::F_SETOWN, getpid().as_raw())
                | libc::fcntl(a.as_raw_fd(), F_SETSIG, libc::SIGURG)
        };
        assert_eq!(set, 0, "F_SETOWN, F_SETSIG");
        fcntl(a, FcntlArg::F_SETFL(OFlag::O_ASYNC | OFlag::O_NONBLOCK)).expect("F_SETFL");
        self.signals = true;
        self
    }

    pub(crate) fn peeked(mut self, offset: i32) -> Self {
        set_peek_offset(&self.ends.0, offset).expect("SO_PEEK_OFF");
        self.peek_offset = offset;
        self
    }

    pub(crate) fn shut_down(mut self, end: End, how: Shutdown) -> Self {
        shutdown(self.end(end).expect("both are open").as_raw_fd(), how).expect("shutdown");
        self.shut = Some((end, how));
        self
    }

    /// Closes B.
    pub(crate) fn widow(mut self) -> Self {
        self.reset = !self.queues[1].is_empty() && self.kind != SockType::Datagram;
        self.queues[1].clear();
        self.ends.1 = None;
        self
    }

    fn is_connection(&self) -> bool {
        self.kind != SockType::Datagram
    }

    /// Who cannot be written to any more by the other one.
    fn is_closed(&self, to: End) -> bool {
        let by = |end, hows: [Shutdown; 2]| self.shut.is_some_and(|(who, how)| who == end && hows.contains(&how));
        let other = if to == End::A { End::B } else { End::A };
        self.ends.1.is_none()
            || by(to, [Shutdown::Read, Shutdown::Both])
            || by(other, [Shutdown::Write, Shutdown::Both])
    }

    /// Compares without changing anything.
    pub(crate) fn look(&self, checker: &Checker) {
        let a = &self.ends.0;
        let kind = self.kind;
        for (end, fd) in [(End::A, Some(a)), (End::B, self.ends.1.as_ref())] {
            let Some(fd) = fd else { continue };
            let queue = &self.queues[end as usize];
            let want = match self.kind {
                SockType::Datagram => queue.first().map_or(0, Vec::len),
                _ => queue.iter().map(Vec::len).sum(),
            };
            checker.equal(&format!("bytes waiting in a {kind:?} socket"), &waiting(fd), &want);
            checker.equal("type of a socket", &getsockopt(fd, sockopt::SockType), &Ok(self.kind));
            checker.equal("SO_PEERCRED", &getsockopt(fd, sockopt::PeerCredentials), &Ok(self.creds));
        }
        let flags = fcntl(a, FcntlArg::F_GETFL).map(|flags| flags & (libc::O_ASYNC | libc::O_NONBLOCK));
        let want = if self.signals { libc::O_ASYNC | libc::O_NONBLOCK } else { 0 };
        checker.equal("flags of a socket", &flags, &Ok(want));
        if self.signals {
            // SAFETY: fcntl with these commands takes no pointers.
            let owner = unsafe { (libc::fcntl(a.as_raw_fd(), libc::F_GETOWN), libc::fcntl(a.as_raw_fd(), F_GETSIG)) };
            checker.equal("owner of a socket", &owner, &(getpid().as_raw(), libc::SIGURG));
        }
        if self.options {
            checker.equal("SO_SNDBUF", &getsockopt(a, sockopt::SndBuf), &Ok(60_000));
            checker.equal("SO_RCVBUF", &getsockopt(a, sockopt::RcvBuf), &Ok(100_000));
            checker.equal("SO_PASSCRED", &getsockopt(a, sockopt::PassCred), &Ok(true));
            let timeouts = (getsockopt(a, sockopt::ReceiveTimeout), getsockopt(a, sockopt::SendTimeout));
            checker.equal("timeouts", &timeouts, &(Ok(TimeVal::milliseconds(1500)), Ok(TimeVal::seconds(7))));
        }
        checker.equal("SO_PEEK_OFF", &peek_offset(a).ok(), &Some(self.peek_offset));
        let closed = poll(a) & libc::POLLRDHUP != 0;
        let want = self.is_closed(End::A) && (self.is_connection() || self.ends.1.is_some());
        let own = self.is_connection() || self.shut.is_some_and(|(who, how)| who == End::A && how != Shutdown::Write);
        checker.equal(&format!("{kind:?} socket is shut down for reading"), &closed, &(want && own));
        checker.equal("an error waits", &(poll(a) & libc::POLLERR != 0), &self.reset);
    }

    /// Takes everything out and puts it back, if that can be done.
    pub(crate) fn exercise(&mut self, checker: &Checker) {
        if self.peek_offset >= 0 {
            return self.exercise_peeking(checker);
        }
        for end in [End::A, End::B] {
            let Some(fd) = self.end(end) else { continue };
            let queue = self.queues[end as usize].clone();
            if self.reset && self.kind == SockType::SeqPacket {
                checker.equal("the reset", &receive(fd), &Err(Errno::ECONNRESET));
                self.reset = false;
                continue;
            }
            take(fd, self.kind, &queue, checker);
            let next = receive(fd);
            let want = match self.is_closed(end) {
                _ if self.reset && end == End::A => Err(Errno::ECONNRESET),
                true if self.is_connection() => Ok(Vec::new()),
                _ => Err(Errno::EAGAIN),
            };
            let want = match self.shut {
                // Without a connection only who was shut down notices.
                Some((who, how)) if !self.is_connection() && who == end && how != Shutdown::Write => Ok(Vec::new()),
                _ => want,
            };
            let datagram_end = self.kind == SockType::Datagram && want == Ok(Vec::new());
            let right = next == want || datagram_end && next == Err(Errno::EAGAIN);
            let kind = self.kind;
            checker.that(right, || format!("{kind:?} {end:?} after all was read: {next:?}, should be {want:?}"));
            if end == End::A {
                self.reset = false;
            }
            let put = self.put(end, &queue);
            if self.is_closed(end) {
                let want = if queue.is_empty() { Ok(()) } else { put };
                checker.that(queue.is_empty() || want.is_err(), || "a closed socket can be written to".into());
                self.queues[end as usize].clear();
            } else {
                checker.works("put messages back", put);
            }
        }
    }

    /// Looks at what lies behind the offset, and sets it back.
    fn exercise_peeking(&self, checker: &Checker) {
        let a = &self.ends.0;
        let mut buffer = vec![0; 1 << 20];
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let length = checker.works("peek", recv(a.as_raw_fd(), &mut buffer, flags)).unwrap_or(0);
        let all = self.queues[0].concat();
        let behind = &all[self.peek_offset as usize..];
        checker.that(buffer[..length] == *behind, || format!("{length} peeked bytes are wrong"));
        checker.works("set SO_PEEK_OFF", set_peek_offset(a, self.peek_offset));
    }
}

/// Does something with other effective ids.
pub(crate) fn as_user<T>(user: u32, group: u32, action: impl FnOnce() -> T) -> T {
    setegid(group.into()).and_then(|()| seteuid(user.into())).expect("take on ids");
    let result = action();
    seteuid(0.into()).and_then(|()| setegid(0.into())).expect("take them back");
    prctl::set_dumpable(true).expect("PR_SET_DUMPABLE");
    result
}

const F_SETSIG: i32 = 10;
const F_GETSIG: i32 = 11;

fn receive(fd: &OwnedFd) -> nix::Result<Vec<u8>> {
    let mut buffer = vec![0; 1 << 16];
    let length = recv(fd.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT)?;
    buffer.truncate(length);
    Ok(buffer)
}

fn take(fd: &OwnedFd, kind: SockType, queue: &[Vec<u8>], checker: &Checker) {
    if kind == SockType::Stream {
        let want = queue.concat();
        let mut content = Vec::new();
        while content.len() < want.len() {
            let Some(part) = checker.works("read a socket", receive(fd)) else { return };
            if part.is_empty() {
                break;
            }
            content.extend(part);
        }
        checker.that(content == want, || format!("{} of {} bytes in a socket", content.len(), want.len()));
        return;
    }
    for message in queue {
        let got = receive(fd);
        checker.that(got.as_ref() == Ok(message), || {
            format!("a message of {} bytes is {:?}", message.len(), got.map(|m| m.len()))
        });
    }
}

fn waiting(fd: &OwnedFd) -> usize {
    let mut bytes = 0_i32;
    // SAFETY: FIONREAD writes an int.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut bytes) };
    if result == 0 { bytes as usize } else { usize::MAX }
}

fn poll(fd: &OwnedFd) -> i16 {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN | libc::POLLRDHUP, revents: 0 };
    // SAFETY: one pollfd, no timeout.
    unsafe { libc::poll(&raw mut poll, 1, 0) };
    poll.revents
}

fn set_peek_offset(fd: &OwnedFd, offset: i32) -> io::Result<()> {
    let value = (&raw const offset).cast();
    // SAFETY: the value is an int of 4 bytes.
    let result = unsafe { libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEEK_OFF, value, 4) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn peek_offset(fd: &OwnedFd) -> io::Result<i32> {
    let (mut offset, mut length) = (0_i32, 4);
    let value = (&raw mut offset).cast();
    // SAFETY: the value is an int of 4 bytes.
    let result =
        unsafe { libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEEK_OFF, value, &raw mut length) };
    if result == 0 { Ok(offset) } else { Err(io::Error::last_os_error()) }
}
