//! Reading the private memory of another process without changing anything about it.

use crate::{
    error::{Context, Result},
    kernel::{PAGE, pagemap::Pagemap, proc},
};
use nix::{
    sys::uio::{RemoteIoVec, process_vm_readv},
    unistd::Pid,
};
use std::{
    fs::File,
    io::{self, IoSliceMut},
    os::unix::fs::FileExt,
};

/// The memory of a process.
pub(crate) struct Source {
    pid: i32,
    memory: File,
    pages: Pagemap,
}

impl Source {
    pub(crate) fn open(pid: i32) -> Result<Self> {
        let memory = File::open(proc::path(pid, "mem")).context(|| format!("open the memory of {pid}"))?;
        let pages = Pagemap::open(pid).context(|| format!("open the pagemap of {pid}"))?;
        Ok(Self { pid, memory, pages })
    }

    /// Its page tables.
    pub(crate) fn pages(&self) -> &Pagemap {
        &self.pages
    }

    /// Fills a buffer of whole pages from `at` on, as far as it can; bytes.
    pub(crate) fn read(&self, at: u64, buffer: &mut [u8]) -> io::Result<usize> {
        /// Pages from which on it costs less to ask first who has them.
        const BULK: u64 = 32;
        let count = buffer.len() as u64 / PAGE;
        if count >= BULK {
            // process_vm_readv(2) copies once, /proc/pid/mem twice. But it pins pages, for which the kernel gives a process
            // that shares them copy-on-write copies of its own, and it keeps to the process's own protections.
            let own = self.pages.exclusive(at, count).unwrap_or(0) * PAGE;
            if own >= BULK * PAGE {
                let remote = RemoteIoVec { base: at as usize, len: own as usize };
                let local = &mut [IoSliceMut::new(&mut buffer[..own as usize])];
                // Otherwise the other way tells why it cannot be read.
                if let Ok(read) = process_vm_readv(Pid::from_raw(self.pid), local, &[remote])
                    && read >= PAGE as usize
                {
                    return Ok(read);
                }
            }
        }
        self.memory.read_at(buffer, at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::sys::Mapping;
    use nix::{
        sys::signal::{Signal, kill},
        sys::wait::waitpid,
        unistd::{ForkResult, fork, pause},
    };

    const PAGES: u64 = 600;

    fn filled() -> Mapping {
        let memory = Mapping::anonymous(PAGES * PAGE).unwrap();
        let page = PAGE as usize;
        memory.bytes_mut().chunks_mut(page).enumerate().for_each(|(n, bytes)| bytes.fill(n as u8 | 1));
        memory
    }

    fn read_whole(pid: i32, memory: &Mapping) -> Vec<u8> {
        let source = Source::open(pid).unwrap();
        let mut bytes = vec![0; (PAGES * PAGE) as usize];
        let mut n = 0;
        while n < bytes.len() {
            let read = source.read(memory.start() + n as u64, &mut bytes[n..]).unwrap();
            assert!(read > 0 && read.is_multiple_of(PAGE as usize), "{read}");
            n += read;
        }
        bytes
    }

    #[test]
    fn what_processes_share_stays_shared() {
        let memory = filled();
        // SAFETY: the child waits until it is killed.
        let child = match unsafe { fork() }.unwrap() {
            ForkResult::Child => loop {
                pause();
            },
            ForkResult::Parent { child } => child,
        };
        // Some pages are each one's own.
        memory.bytes_mut()[(100 * PAGE) as usize..(300 * PAGE) as usize].fill(7);
        let frames = |pid: i32| Pagemap::open(pid).unwrap().frames(memory.start(), PAGES).unwrap();
        let own = std::process::id() as i32;
        let before = (frames(own), frames(child.as_raw()));
        let mine = read_whole(own, &memory);
        let theirs = read_whole(child.as_raw(), &memory);
        let after = (frames(own), frames(child.as_raw()));
        kill(child, Signal::SIGKILL).unwrap();
        waitpid(child, None).unwrap();
        assert!(mine == memory.bytes_mut());
        assert_eq!((theirs[(50 * PAGE) as usize], theirs[(150 * PAGE) as usize]), (51, 151));
        assert!(before == after, "pages were copied for a process that was read");
        assert!(before.0[..100] == before.1[..100] && before.0[100..300] != before.1[100..300]);
    }

    #[test]
    fn protection_does_not_matter() {
        let memory = filled();
        let (start, length) = (memory.start() + 200 * PAGE, (100 * PAGE) as usize);
        // SAFETY: the range is part of the mapping just made, of which nothing is used meanwhile.
        assert_eq!(unsafe { libc::mprotect(start as *mut _, length, libc::PROT_NONE) }, 0);
        let read = read_whole(std::process::id() as i32, &memory);
        // SAFETY: the same.
        assert_eq!(unsafe { libc::mprotect(start as *mut _, length, libc::PROT_READ) }, 0);
        assert!(read == memory.bytes_mut());
    }

    #[test]
    fn what_is_not_mapped_cannot_be_read() {
        let source = Source::open(std::process::id() as i32).unwrap();
        assert_eq!(source.read(PAGE, &mut vec![0; 64 * PAGE as usize]).unwrap_err().raw_os_error(), Some(libc::EIO));
    }
}
