//! Bytes and descriptors sent over a unix socket (unix(7), SCM_RIGHTS).

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use std::{
    io::{self, IoSlice, IoSliceMut, Read, Write},
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::net::UnixStream,
    },
};

/// Descriptors of one message; the kernel takes up to 253 (SCM_MAX_FD).
const FDS: usize = 128;
/// The most that is believed to be a letter.
const LARGEST: u64 = 1 << 32;

/// Sends bytes and descriptors.
pub(crate) fn send(mut stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let head = [(bytes.len() as u64).to_le_bytes(), (fds.len() as u64).to_le_bytes()].concat();
    stream.write_all(&head)?;
    for part in fds.chunks(FDS) {
        let raw: Vec<i32> = part.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(&[0])], &rights, MsgFlags::empty(), None)?;
    }
    stream.write_all(bytes)
}

/// Receives what [`send`] has sent.
pub(crate) fn receive(stream: &UnixStream) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let word = || {
        let mut bytes = [0; 8];
        (&mut &*stream).read_exact(&mut bytes).map(|()| u64::from_le_bytes(bytes))
    };
    let (length, count) = (word()?, word()?);
    if length > LARGEST || count > LARGEST {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut fds = Vec::new();
    while (fds.len() as u64) < count {
        let had = fds.len();
        let mut byte = [0];
        let mut space = nix::cmsg_space!([i32; FDS]);
        let mut parts = [IoSliceMut::new(&mut byte)];
        let message = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(received) = control {
                // SAFETY: the kernel has just made these descriptors for us.
                fds.extend(received.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        if message.bytes == 0 || fds.len() == had {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    let mut bytes = Vec::new();
    stream.take(length).read_to_end(&mut bytes)?;
    if bytes.len() as u64 != length { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok((bytes, fds)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs::File, os::fd::AsFd};

    #[test]
    fn many_descriptors_arrive_in_their_order() {
        let (here, there) = UnixStream::pair().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        let null = File::open("/dev/null").unwrap();
        let mut fds = vec![null.as_fd(); 2 * FDS + 3];
        fds[FDS] = writer.as_fd();
        let bytes = vec![7; 100_000];
        let received = std::thread::scope(|scope| {
            let received = scope.spawn(|| receive(&there));
            send(&here, &bytes, &fds).unwrap();
            received.join().unwrap().unwrap()
        });
        assert_eq!((received.0, received.1.len()), (bytes, fds.len()));
        let mut writer_there = File::from(received.1.into_iter().nth(FDS).unwrap());
        drop(writer);
        writer_there.write_all(b"x").unwrap();
        drop(writer_there);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
    }

    #[test]
    fn nonsense_is_an_error() {
        let (mut here, there) = UnixStream::pair().unwrap();
        here.write_all(&[0xff; 16]).unwrap();
        assert_eq!(receive(&there).unwrap_err().kind(), io::ErrorKind::InvalidData);
        here.write_all(&[[1, 0, 0, 0, 0, 0, 0, 0], [0; 8]].concat()).unwrap();
        drop(here);
        assert_eq!(receive(&there).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
