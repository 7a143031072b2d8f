//! Reading the private memory of another process without changing anything about it.

use super::ranges;
use crate::{
    error::{Context, Result},
    kernel::{
        PAGE,
        pagemap::{NEAR, Pagemap, Range},
        proc,
    },
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
        self.gather(&[Range { start: at, end: at + buffer.len() as u64 }], buffer)
    }

    /// Fills a buffer with parts of the memory, one behind the other, up to the first page that cannot be read; bytes. An
    /// error: that is the first one of all.
    pub(crate) fn gather(&self, parts: &[Range], buffer: &mut [u8]) -> io::Result<usize> {
        let mut n = 0;
        for alike in self.owned(parts).chunk_by(|a, b| a.1 == b.1) {
            let parts: Vec<Range> = alike.iter().map(|part| part.0).collect();
            let end = n + ranges::size(&parts) as usize;
            let own = alike[0].1;
            let quick = if own { self.read_own(&parts, &mut buffer[n..end]) } else { 0 };
            n += quick;
            // Otherwise the other way tells why a page cannot be read.
            for part in ranges::after(&parts, quick as u64) {
                let length = (part.end - part.start) as usize;
                match self.memory.read_at(&mut buffer[n..n + length], part.start) {
                    Ok(read) if read == length => n += read,
                    Ok(read) => return Ok(n + read),
                    Err(e) if n == 0 => return Err(e),
                    Err(_) => return Ok(n),
                }
            }
        }
        Ok(n)
    }

    /// Reads pages that nobody else has with one system call, up to the first one where that does not work; bytes.
    ///
    /// process_vm_readv(2) copies once, /proc/pid/mem twice. But it pins pages, for which the kernel gives a process that
    /// shares them copy-on-write copies of its own, and it keeps to the process's own protections.
    fn read_own(&self, parts: &[Range], buffer: &mut [u8]) -> usize {
        let remote = |part: &Range| RemoteIoVec { base: part.start as usize, len: (part.end - part.start) as usize };
        let remote: Vec<RemoteIoVec> = parts.iter().map(remote).collect();
        let local = &mut [IoSliceMut::new(buffer)];
        let page = PAGE as usize;
        process_vm_readv(Pid::from_raw(self.pid), local, &remote).map_or(0, |read| read / page * page)
    }

    /// The parts, cut where pages that only this process has meet others. Of few pages nobody is asked: that costs more
    /// than it saves.
    fn owned(&self, parts: &[Range]) -> Vec<(Range, bool)> {
        const FEW: u64 = 4 * PAGE;
        if ranges::size(parts) < FEW {
            return parts.iter().map(|part| (*part, false)).collect();
        }
        let mut all: Vec<(Range, bool)> = Vec::new();
        for near in parts.chunk_by(|a, b| b.start - a.end <= NEAR) {
            let (start, end) = (near[0].start, near[near.len() - 1].end);
            let owned = self.pages.exclusive(start, (end - start) / PAGE).unwrap_or_default();
            for part in near {
                let mut at = part.start;
                let first = ((part.start - start) / PAGE) as usize;
                let pages = ((part.end - part.start) / PAGE) as usize;
                let owned = owned.get(first..first + pages).map_or_else(|| vec![false; pages], <[bool]>::to_vec);
                for alike in owned.chunk_by(PartialEq::eq) {
                    let end = at + alike.len() as u64 * PAGE;
                    all.push((Range { start: at, end }, alike[0]));
                    at = end;
                }
            }
        }
        all
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
