//! pipe(7) and fifo(7): all open ends of one pipe, its capacity and what waits in it.

use super::{Collected, directory};
use crate::{
    error::{Context, Result},
    kernel::sys,
    observe::FdEntry,
    restore::{files::Numbers, program::Program},
};
use nix::{
    fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, tee},
    unistd::{pipe2, read},
};
use standstill_images::types::{FileKind, OpenFile, Pipe};
use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

/// A descriptor of either end. The content is read with tee(2), which leaves it where it is.
pub(super) fn dump(entry: &FdEntry, all: &mut Collected) -> Result<FileKind> {
    let named = entry.path.is_absolute();
    let (id, new) = all.pipe_id(entry);
    if new {
        let fd = all.duplicate(entry)?;
        let context = || format!("read the pipe at descriptor {} of process {}", entry.fd, entry.tgid);
        let capacity = fcntl(&fd, FcntlArg::F_GETPIPE_SZ).context(context)? as u32;
        // Both ends show the same inode; only a reader may tee, so open one of our own.
        let reader = nix::fcntl::open(
            format!("/proc/{}/fd/{}", entry.tgid, entry.fd).as_str(),
            OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC,
            nix::sys::stat::Mode::empty(),
        )
        .context(context)?;
        let content = peek(&reader, capacity).context(context)?;
        let (fifo, gone) = directory::path(entry.path.as_path().into(), entry.nlink == 0);
        let unlinked = gone.then_some(entry.mode & 0o7777);
        all.pipes.insert(id, Pipe { id, fifo: named.then_some(fifo), unlinked, capacity, content });
    }
    Ok(FileKind::Pipe { pipe: id })
}

/// A copy of what waits in a pipe, buffer by buffer: packets of an O_DIRECT pipe stay apart.
fn peek(pipe: &OwnedFd, capacity: u32) -> io::Result<Vec<Vec<u8>>> {
    if sys::waiting_bytes(pipe.as_fd())? == 0 {
        return Ok(Vec::new());
    }
    // Packet mode: a read gives one packet, which for a stream pipe is no harm (its buffers come one by one).
    let (out, copy) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC | OFlag::O_DIRECT)?;
    fcntl(&copy, FcntlArg::F_SETPIPE_SZ(capacity as i32))?;
    let mut length = tee(pipe, &copy, capacity as usize, SpliceFFlags::SPLICE_F_NONBLOCK)?;
    let mut content = Vec::new();
    let mut buffer = vec![0u8; capacity as usize];
    while length > 0 {
        let n = read(&out, &mut buffer)?;
        content.push(buffer[..n].to_vec());
        length = length.saturating_sub(n);
        if n == 0 {
            break;
        }
    }
    Ok(content)
}

/// Creates the pipe, fills it, and makes all its ends.
pub(super) fn create(pipe: &Pipe, files: &[&OpenFile], numbers: &mut Numbers, program: &mut Program) -> Vec<i32> {
    let accmode = libc::O_ACCMODE as u32;
    let settable = (libc::O_NONBLOCK | libc::O_DIRECT) as u32;
    // One descriptor for reading and writing keeps a FIFO's opens from blocking and takes the content.
    let fifo = pipe.fifo.as_ref().map(|path| program.string(&path.0));
    if let (Some(name), Some(mode)) = (fifo, pipe.unlinked) {
        let mode = libc::S_IFIFO | mode;
        program.call("make the removed FIFO", libc::SYS_mknod, &[name, mode.into(), 0.into()]);
    }
    let (holders, path) = match &pipe.fifo {
        Some(path) => (vec![super::regular::open(&path.0, libc::O_RDWR as u32, numbers, program)], path.0.clone()),
        None => {
            let (read, write) = (numbers.lowest(), numbers.lowest());
            let out = program.data(&[0; 8]);
            program.call("pipe", libc::SYS_pipe2, &[out, 0.into()]);
            (vec![read, write], format!("/proc/self/fd/{read}").into_bytes())
        }
    };
    let writer = *holders.last().expect("one or two");
    program.call(
        "set the pipe's capacity",
        libc::SYS_fcntl,
        &[writer.into(), libc::F_SETPIPE_SZ.into(), pipe.capacity.into()],
    );
    let packets = pipe.fifo.is_none()
        && files.iter().any(|f| f.flags & accmode == libc::O_WRONLY as u32 && f.flags & libc::O_DIRECT as u32 != 0);
    if packets {
        program.call("packet mode", libc::SYS_fcntl, &[writer.into(), libc::F_SETFL.into(), libc::O_DIRECT.into()]);
    }
    for chunk in &pipe.content {
        program.write_full("fill the pipe", writer, chunk);
    }
    // The ends that pipe(2) made serve as the first of their kind; further ones are opened through procfs.
    let mut unused = if pipe.fifo.is_none() { holders.clone() } else { Vec::new() };
    let made = files
        .iter()
        .map(|file| {
            let end = match file.flags & accmode {
                f if f == libc::O_RDONLY as u32 => holders.first(),
                f if f == libc::O_WRONLY as u32 => holders.last(),
                _ => None,
            };
            if let Some(taken) = end.and_then(|e| unused.iter().position(|u| u == e)) {
                let fd = unused.swap_remove(taken);
                let flags = file.flags & settable;
                if flags != 0 || (packets && fd == writer) {
                    program.call("set pipe flags", libc::SYS_fcntl, &[fd.into(), libc::F_SETFL.into(), flags.into()]);
                }
                fd
            } else {
                super::regular::open(&path, file.flags, numbers, program)
            }
        })
        .collect();
    if let (Some(name), Some(_)) = (fifo, pipe.unlinked) {
        program.call("remove the FIFO again", libc::SYS_unlink, &[name]);
    }
    let left = if pipe.fifo.is_none() { unused } else { holders };
    for fd in left {
        program.call("close a spare end", libc::SYS_close, &[fd.into()]);
        numbers.release(fd);
    }
    made
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::write;

    #[test]
    fn peeking_leaves_the_content_in_place() {
        let (reader, writer) = pipe2(OFlag::O_NONBLOCK).unwrap();
        write(&writer, b"first").unwrap();
        write(&writer, b"second").unwrap();
        let content = peek(&reader, 65536).unwrap();
        assert_eq!(content.concat(), b"firstsecond");
        let mut buffer = [0; 32];
        assert_eq!(read(&reader, &mut buffer).unwrap(), 11);
    }

    #[test]
    fn packets_stay_apart() {
        let (reader, writer) = pipe2(OFlag::O_NONBLOCK | OFlag::O_DIRECT).unwrap();
        write(&writer, b"one").unwrap();
        write(&writer, b"two").unwrap();
        assert_eq!(peek(&reader, 65536).unwrap(), [b"one".to_vec(), b"two".to_vec()]);
    }

    #[test]
    fn an_empty_pipe_has_no_content() {
        let (reader, _writer) = pipe2(OFlag::O_NONBLOCK).unwrap();
        assert!(peek(&reader, 65536).unwrap().is_empty());
    }
}
