//! What waits in a unix socket, read without taking anything out of it (MSG_PEEK).

use super::sys::{self, Mapping};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, setsockopt, socketpair, sockopt};
use std::{
    io, mem,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    ptr,
};

/// A message that waits, or one run of bytes of a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Message {
    pub bytes: Vec<u8>,
    /// Address of the sender; empty: it has none.
    pub source: Vec<u8>,
    /// SCM_CREDENTIALS: process, user and group; only known of a socket with SO_PASSCRED.
    pub creds: Option<[u32; 3]>,
    /// There is more with it: descriptors (SCM_RIGHTS), or other control data.
    pub control: bool,
}

/// Header of a control message, in a buffer for credentials and nothing else: descriptors that come with a message are cut
/// off, and not duplicated into this process.
#[repr(C)]
#[derive(Clone, Copy)]
struct Control {
    header: libc::cmsghdr,
    creds: [u32; 3],
    padding: u32,
}

/// One message as the child leaves it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Slot {
    length: u64,
    flags: i32,
    name_length: u32,
    control_length: u64,
    name: [u8; 112],
    control: Control,
}

/// So many messages are looked at.
const MESSAGES: u64 = 1 << 16;
const STACK: u64 = 1 << 16;
/// Bytes of memory for messages, at first and at most. Only what is used is taken from the machine.
const ROOM: u64 = 16 << 20;
const MOST_ROOM: u64 = 4 << 30;

/// What is to be read and where to. The child that reads shares the memory.
struct Job {
    fd: RawFd,
    /// Value of SO_PEEK_OFF to read with, and to leave behind.
    read_with: i32,
    leave: i32,
    /// A stream is read in one go.
    once: bool,
    /// Whether messages come with credentials. Without them there is no room for control data.
    creds: bool,
    slots: *mut Slot,
    bytes: *mut u8,
    room: usize,
    count: usize,
    errno: i32,
}

/// All that waits in a socket for datagrams, or in a stream. Nothing may take from the socket meanwhile.
///
/// More than the first of several messages can only be seen with SO_PEEK_OFF, which all processes that have the socket share.
/// So it is a child that reads, whom a SIGKILL for this process does not reach, and that puts the option back.
pub(crate) fn queue(fd: BorrowedFd<'_>, stream: bool) -> io::Result<Vec<Message>> {
    let offset = sys::socket_number(fd, libc::SO_PEEK_OFF)?;
    let creds = sys::socket_number(fd, libc::SO_PASSCRED)? != 0;
    let mut room = ROOM;
    loop {
        let (slots, bytes) = (Mapping::anonymous(MESSAGES * size_of::<Slot>() as u64)?, Mapping::anonymous(room)?);
        let mut job = Job {
            fd: fd.as_raw_fd(),
            read_with: if stream { -1 } else { 0 },
            leave: offset,
            once: stream,
            creds,
            slots: slots.start() as *mut Slot,
            bytes: bytes.start() as *mut u8,
            room: room as usize,
            count: 0,
            errno: 0,
        };
        if stream && offset < 0 {
            job.read()
        } else {
            job.read_in_child()?
        }
        match job.errno {
            0 => return Ok(job.messages()),
            libc::EMSGSIZE if room < MOST_ROOM => room *= 8,
            errno => return Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

/// Whether what a socket has sent to its peer is more than these messages. Once a message without bytes was looked at with
/// SO_PEEK_OFF, it cannot be seen any more; but the sender is charged for it, as for the same messages in a pair of ours.
pub(crate) fn hides_empty_messages(sender: BorrowedFd<'_>, kind: i32, messages: &[Vec<u8>]) -> io::Result<bool> {
    let charged = sent_bytes(sender)?;
    if charged == 0 {
        return Ok(false);
    }
    let kind = SockType::try_from(kind)?;
    let (from, _to) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
    let send = |message: &[u8]| {
        // Without the privilege there is room for less, and the comparison fails as an error.
        _ = setsockopt(&from, sockopt::SndBufForce, &(i32::MAX as usize));
        send(from.as_raw_fd(), message, MsgFlags::empty())?;
        sent_bytes(from.as_fd())
    };
    let empty = send(&[])?;
    let ours = messages.iter().try_fold(empty, |_, message| send(message))? - empty;
    Ok(charged > ours && (charged - ours).is_multiple_of(empty))
}

/// Memory that a unix socket is charged for what it has sent and nobody has read.
fn sent_bytes(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut bytes = 0u32;
    // SAFETY: TIOCOUTQ stores an int.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(bytes) }
}

impl Job {
    fn read_in_child(&mut self) -> io::Result<()> {
        extern "C" fn child(job: *mut libc::c_void) -> i32 {
            // SAFETY: the parent, which made the job, is stopped until this ends; both share all memory.
            let job = unsafe { &mut *job.cast::<Job>() };
            // SAFETY: takes nothing. A signal for the group of the dump is none for us.
            unsafe { libc::setsid() };
            if job.set_peek_offset(job.read_with) {
                job.read();
                job.set_peek_offset(job.leave);
            }
            0
        }
        let stack = Mapping::anonymous(STACK)?;
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_FILES;
        // SAFETY: the child has a stack of its own, makes system calls only, and ends before this returns. If this process
        // is killed meanwhile, the memory stays until the child has ended.
        let child = unsafe {
            let top = (stack.start() + STACK) as *mut libc::c_void;
            libc::clone(child, top, flags, ptr::from_mut(self).cast())
        };
        if child < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the child is ours, and nobody else waits for it: it sends no signal.
        while unsafe { libc::waitpid(child, ptr::null_mut(), libc::__WALL) } < 0 {
            match nix::errno::Errno::last() {
                nix::errno::Errno::EINTR => {}
                errno => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Whether that worked.
    fn set_peek_offset(&mut self, offset: i32) -> bool {
        let (value, length) = ((&raw const offset).cast(), size_of::<i32>() as libc::socklen_t);
        // SAFETY: `value` is readable for `length` bytes.
        let result = unsafe { libc::setsockopt(self.fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, value, length) };
        if result < 0 {
            self.errno = nix::errno::Errno::last_raw();
        }
        result == 0
    }

    fn read(&mut self) {
        let mut at = 0;
        while self.count < MESSAGES as usize {
            // SAFETY: there are so many slots, zeroed, and nobody else looks at them.
            let slot = unsafe { &mut *self.slots.add(self.count) };
            // SAFETY: `at` is within the room for messages.
            let base = unsafe { self.bytes.add(at) };
            let mut part = libc::iovec { iov_base: base.cast(), iov_len: self.room - at };
            // SAFETY: of integers and pointers, for which zeros are valid.
            let mut header: libc::msghdr = unsafe { mem::zeroed() };
            (header.msg_name, header.msg_namelen) = (slot.name.as_mut_ptr().cast(), slot.name.len() as u32);
            (header.msg_iov, header.msg_iovlen) = (&raw mut part, 1);
            if self.creds {
                header.msg_control = (&raw mut slot.control).cast();
                header.msg_controllen = size_of::<Control>() as _;
            }
            // SAFETY: all that the header points to is writable for the lengths in it.
            let length = unsafe { libc::recvmsg(self.fd, &raw mut header, libc::MSG_PEEK | libc::MSG_DONTWAIT) };
            if length < 0 {
                let errno = nix::errno::Errno::last_raw();
                self.errno = if errno == libc::EAGAIN { 0 } else { errno };
                return;
            }
            let ended = length == 0 && self.ended();
            if ended {
                return;
            }
            at += length as usize;
            if header.msg_flags & libc::MSG_TRUNC != 0 || at == self.room {
                self.errno = libc::EMSGSIZE;
                return;
            }
            (slot.length, slot.flags, slot.name_length) = (length as u64, header.msg_flags, header.msg_namelen);
            slot.control_length = header.msg_controllen as u64;
            self.count += 1;
            if self.once {
                return;
            }
        }
        self.errno = libc::E2BIG;
    }

    /// Whether a message without bytes is none: a connection that is shut down reads so for ever.
    fn ended(&self) -> bool {
        let mut poll = libc::pollfd { fd: self.fd, events: libc::POLLRDHUP, revents: 0 };
        // SAFETY: one pollfd, no timeout.
        unsafe { libc::poll(&raw mut poll, 1, 0) };
        poll.revents & libc::POLLRDHUP != 0
    }

    fn messages(&self) -> Vec<Message> {
        let mut at = 0;
        let read = (0..self.count).map(|n| {
            // SAFETY: the child has filled so many slots, and so many bytes after each other; it has ended.
            let (slot, bytes) = unsafe {
                let slot = &*self.slots.add(n);
                (slot, std::slice::from_raw_parts(self.bytes.add(at), slot.length as usize))
            };
            at += slot.length as usize;
            let control = slot.control.header;
            let creds = slot.control_length as usize >= mem::offset_of!(Control, padding)
                && (control.cmsg_level, control.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_CREDENTIALS);
            Message {
                bytes: bytes.to_vec(),
                source: slot.name[..slot.name.len().min(slot.name_length as usize)].to_vec(),
                creds: creds.then_some(slot.control.creds),
                control: slot.flags & libc::MSG_CTRUNC != 0 || slot.control_length > 0 && !creds,
            }
        });
        read.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{ControlMessage, sendmsg};
    use std::{
        io::{IoSlice, Read},
        os::{
            fd::OwnedFd,
            unix::net::{UnixDatagram, UnixStream},
        },
    };

    fn pair(kind: SockType) -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, kind, None, SockFlag::empty()).unwrap()
    }

    fn bytes(fd: &impl AsFd, stream: bool) -> Vec<Vec<u8>> {
        queue(fd.as_fd(), stream).unwrap().into_iter().map(|m| m.bytes).collect()
    }

    #[test]
    fn messages_stay_where_they_are() {
        for kind in [SockType::Datagram, SockType::SeqPacket] {
            let (a, b) = pair(kind);
            let messages: Vec<Vec<u8>> = (1..9).map(|n| vec![n; usize::from(n) * 5000]).collect();
            for message in &messages {
                send(a.as_raw_fd(), message, MsgFlags::MSG_DONTWAIT).unwrap();
            }
            for _ in 0..2 {
                assert_eq!(bytes(&b, false), messages);
                assert_eq!(sys::socket_number(b.as_fd(), libc::SO_PEEK_OFF).unwrap(), -1);
            }
            assert!(bytes(&a, false).is_empty());
            drop(a);
            assert_eq!(bytes(&b, false), messages);
        }
    }

    #[test]
    fn empty_messages_do_not_get_lost() {
        for kind in [SockType::Datagram, SockType::SeqPacket] {
            let (a, b) = pair(kind);
            let messages = [vec![1; 5], vec![], vec![2; 70_000], vec![], vec![3; 1]];
            for (n, message) in messages.iter().enumerate() {
                assert!(!hides_empty_messages(a.as_fd(), kind as i32, &messages[..n]).unwrap());
                send(a.as_raw_fd(), message, MsgFlags::MSG_DONTWAIT).unwrap();
            }
            let seen = bytes(&b, false);
            assert_eq!(seen, messages);
            assert!(!hides_empty_messages(a.as_fd(), kind as i32, &seen).unwrap());
            let seen = bytes(&b, false);
            assert_eq!(seen.len(), 3);
            assert!(hides_empty_messages(a.as_fd(), kind as i32, &seen).unwrap());
        }
    }

    #[test]
    fn a_stream_is_one_run() {
        let (mut a, mut b) = UnixStream::pair().unwrap();
        let data: Vec<u8> = (0..150_000u32).map(|n| n as u8).collect();
        for part in data.chunks(50_000) {
            io::Write::write_all(&mut a, part).unwrap();
        }
        b.read_exact(&mut [0; 100]).unwrap();
        assert_eq!(bytes(&b, true), [&data[100..]]);
        // Also one that somebody looks at with an offset.
        let offset = 7i32;
        // SAFETY: the value is an int.
        unsafe { libc::setsockopt(b.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEEK_OFF, (&raw const offset).cast(), 4) };
        assert_eq!(bytes(&b, true), [&data[100..]]);
        assert_eq!(sys::socket_number(b.as_fd(), libc::SO_PEEK_OFF).unwrap(), 7);
        let mut rest = vec![0; data.len() - 100];
        b.read_exact(&mut rest).unwrap();
        assert!(rest == data[100..]);
    }

    #[test]
    fn senders_credentials_and_descriptors() {
        let dir = tempfile::tempdir().unwrap();
        let [here, there] = ["here", "there"].map(|name| UnixDatagram::bind(dir.path().join(name)).unwrap());
        here.send_to(b"x", dir.path().join("there")).unwrap();
        let found = queue(there.as_fd(), false).unwrap().remove(0);
        assert!(found.source.ends_with(b"here\0") && found.creds.is_none() && !found.control);
        let (a, b) = pair(SockType::SeqPacket);
        setsockopt(&b, sockopt::PassCred, &true).unwrap();
        send(a.as_raw_fd(), b"y", MsgFlags::empty()).unwrap();
        let fds = [a.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&fds)];
        sendmsg::<()>(b.as_raw_fd(), &[IoSlice::new(b"z")], &rights, MsgFlags::empty(), None).unwrap();
        assert!(queue(a.as_fd(), false).unwrap()[0].control);
        sendmsg::<()>(a.as_raw_fd(), &[IoSlice::new(b"z")], &rights, MsgFlags::empty(), None).unwrap();
        let found = queue(b.as_fd(), false).unwrap();
        assert_eq!(found[0].creds, Some([std::process::id(), 0, 0]));
        assert_eq!(found.iter().map(|m| m.control).collect::<Vec<_>>(), [false, true]);
    }
}
