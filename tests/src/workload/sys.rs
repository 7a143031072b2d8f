//! Thin wrappers for what the workloads need from the kernel.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::time::Duration;
use std::{io, slice};

use nix::unistd::{ForkResult, Pid};

/// Time since boot, not counting suspension.
pub fn monotonic() -> Duration {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).expect("clock_gettime");
    Duration::from(now)
}

/// [`monotonic`] in microseconds.
pub fn now_us() -> u64 {
    u64::try_from(monotonic().as_micros()).unwrap_or(u64::MAX)
}

/// Forks. The child runs `body` and never comes back. Only for a process that has a single thread so far, or for a body
/// that neither allocates nor takes locks.
pub fn fork_child(body: impl FnOnce()) -> Pid {
    // SAFETY: by the contract above the child can use everything a process with one thread can.
    match unsafe { nix::unistd::fork() }.expect("fork") {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            body();
            std::process::exit(0);
        }
    }
}

/// A mapping made by the workload, never unmapped.
#[derive(Clone, Copy)]
pub struct Mapping {
    start: usize,
    length: usize,
}

impl Mapping {
    /// Maps memory: `file` with an offset, or anonymous memory.
    pub fn new(length: usize, prot: i32, flags: i32, file: Option<(&File, u64)>) -> io::Result<Self> {
        let (fd, offset, kind) = match file {
            Some((file, offset)) => (file.as_raw_fd(), offset.cast_signed(), 0),
            None => (-1, 0, libc::MAP_ANONYMOUS),
        };
        // SAFETY: no address is asked for, so no existing memory is touched.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), length, prot, flags | kind, fd, offset) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { start: start as usize, length })
    }

    /// Maps anonymous memory at an address that must be free.
    pub fn at(address: usize, length: usize, prot: i32, flags: i32) -> io::Result<Self> {
        let flags = flags | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: MAP_FIXED_NOREPLACE fails rather than touch existing memory.
        let start = unsafe { libc::mmap(address as *mut _, length, prot, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        assert_eq!(start as usize, address, "the kernel does not know MAP_FIXED_NOREPLACE");
        Ok(Self { start: address, length })
    }

    /// Takes memory that the kernel gave in another way (brk, a growing stack) for a mapping.
    pub const fn adopt(start: usize, length: usize) -> Self {
        Self { start, length }
    }

    /// Private anonymous memory, readable and writable.
    pub fn private(length: usize) -> io::Result<Self> {
        Self::new(length, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE, None)
    }

    /// First address.
    pub const fn start(&self) -> usize {
        self.start
    }

    /// Bytes mapped.
    pub const fn length(&self) -> usize {
        self.length
    }

    /// A part of the mapping.
    pub fn part(&self, offset: usize, length: usize) -> Self {
        assert!(offset + length <= self.length, "part outside of the mapping");
        Self { start: self.start + offset, length }
    }

    /// Changes the protection.
    pub fn protect(&self, prot: i32) -> io::Result<()> {
        // SAFETY: the range belongs to this mapping, and callers use it only as the protection allows.
        let result = unsafe { libc::mprotect(self.start as *mut _, self.length, prot) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Gives advice about the mapping.
    pub fn advise(&self, advice: i32) -> io::Result<()> {
        // SAFETY: the range belongs to this mapping; no advice used by the workloads invalidates references to it.
        let result = unsafe { libc::madvise(self.start as *mut _, self.length, advice) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// The content, for reading. The mapping must be readable.
    pub fn words(&self) -> &[u64] {
        // SAFETY: mappings are never unmapped and are page-aligned; the caller knows the mapping to be readable, and a
        // workload changes memory only between rounds of verification.
        unsafe { slice::from_raw_parts(self.start as *const u64, self.length / 8) }
    }

    /// The content, for writing. The mapping must be writable.
    #[expect(
        clippy::mut_from_ref,
        reason = "memory is shared by design; a workload writes it from one place at a time"
    )]
    pub fn words_mut(&self) -> &mut [u64] {
        // SAFETY: as for `words`; each workload has one writer per part of a mapping.
        unsafe { slice::from_raw_parts_mut(self.start as *mut u64, self.length / 8) }
    }

    /// Reads one word that another process may be writing.
    pub fn load(&self, word: usize) -> u64 {
        self.atomic(word).load(std::sync::atomic::Ordering::SeqCst)
    }

    /// Writes one word that another process may be reading.
    pub fn store(&self, word: usize, value: u64) {
        self.atomic(word).store(value, std::sync::atomic::Ordering::SeqCst);
    }

    fn atomic(&self, word: usize) -> &std::sync::atomic::AtomicU64 {
        assert!(word < self.length / 8, "word outside of the mapping");
        // SAFETY: the word lies in the mapping, is aligned, and is only accessed atomically.
        unsafe { std::sync::atomic::AtomicU64::from_ptr((self.start as *mut u64).add(word)) }
    }

    /// Entries of `/proc/<pid>/pagemap` for this range.
    pub fn pagemap(&self, pid: Pid) -> io::Result<Vec<u64>> {
        use std::os::unix::fs::FileExt;
        let file = File::open(format!("/proc/{pid}/pagemap"))?;
        let mut bytes = vec![0; self.length / 4096 * 8];
        file.read_exact_at(&mut bytes, (self.start / 4096 * 8) as u64)?;
        Ok(bytes.as_chunks::<8>().0.iter().map(|entry| u64::from_le_bytes(*entry)).collect())
    }
}

/// The lines of `/proc/self/smaps` about the mapping that contains an address, the range line first.
///
/// The text comes in several reads, and a restore between two of them continues at the same offset of a text that may
/// have other lengths before it. So the entry counts once it was the same twice.
pub fn smaps_entry(address: usize) -> Option<Vec<String>> {
    let mut entry = smaps_entry_once(address);
    loop {
        let again = smaps_entry_once(address);
        if again == entry {
            return entry;
        }
        entry = again;
    }
}

fn smaps_entry_once(address: usize) -> Option<Vec<String>> {
    let text = fs::read_to_string("/proc/self/smaps").ok()?;
    let mut entry: Vec<String> = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        if let Some((start, end)) = range_of(line) {
            if inside {
                break;
            }
            inside = (start..end).contains(&address);
        }
        if inside {
            entry.push(line.to_owned());
        }
    }
    inside.then_some(entry)
}

fn range_of(line: &str) -> Option<(usize, usize)> {
    let (start, end) = line.split_once(' ')?.0.split_once('-')?;
    Some((usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?))
}

/// The fields of a `/proc/<pid>/stat` file from the state on, so that index 0 is what proc(5) calls field 3.
///
/// The file is read in one piece: of one that is read in pieces, those before a checkpoint tell of the process as it was
/// then, and those after a restore of the restored one, whose numbers have other lengths.
pub fn proc_stat_fields(path: &str) -> io::Result<Vec<String>> {
    let mut text = vec![0; 4096];
    let length = File::open(path)?.read(&mut text)?;
    let text = String::from_utf8_lossy(&text[..length]);
    let (_, rest) = text.rsplit_once(')').ok_or_else(|| io::Error::other("no comm in a stat file"))?;
    Ok(rest.split_whitespace().map(str::to_owned).collect())
}
