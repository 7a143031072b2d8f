//! System V shared memory segments: shmget(2), shmat(2), shmctl(2).

use super::{PAGE, hugetlb};
use std::io;

/// What shmctl(2) IPC_STAT tells of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Status {
    pub key: i32,
    /// Bytes.
    pub size: u64,
    pub owner: (u32, u32),
    /// Permission bits, and [`REMOVED`] and [`LOCKED`].
    pub mode: u32,
    /// Process that made it.
    pub creator: i32,
    /// Mappings of it.
    pub attached: u64,
}

/// SHM_DEST: it is destroyed when nobody has it attached any more.
pub(crate) const REMOVED: u32 = 0o1000;
/// SHM_LOCKED: it is not swapped.
pub(crate) const LOCKED: u32 = 0o2000;

fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn stat(id: i32) -> io::Result<libc::shmid_ds> {
    let mut found = std::mem::MaybeUninit::zeroed();
    // SAFETY: the kernel fills the structure it is given, of which all zeros is a value.
    unsafe { check(libc::shmctl(id, libc::IPC_STAT, found.as_mut_ptr())).map(|_| found.assume_init()) }
}

/// Looks at a segment; EINVAL if there is none of this id.
pub(crate) fn status(id: i32) -> io::Result<Status> {
    let found = stat(id)?;
    let perm = &found.shm_perm;
    Ok(Status {
        key: perm.__key,
        size: found.shm_segsz as u64,
        owner: (perm.uid, perm.gid),
        mode: u32::from(perm.mode),
        creator: found.shm_cpid,
        attached: found.shm_nattch,
    })
}

/// Makes a segment; EEXIST if there is one of this key.
pub(crate) fn create(key: i32, size: u64, mode: u32, page_size: u64) -> io::Result<i32> {
    let huge = if page_size > PAGE { libc::SHM_HUGETLB | hugetlb::size_flag(page_size) } else { 0 };
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | (mode & 0o777) as i32 | huge;
    // SAFETY: no memory is passed.
    check(unsafe { libc::shmget(key, size as usize, flags) })
}

/// Sets owner and permission bits.
pub(crate) fn set(id: i32, owner: (u32, u32), mode: u32) -> io::Result<()> {
    let mut found = stat(id)?;
    (found.shm_perm.uid, found.shm_perm.gid) = owner;
    found.shm_perm.mode = (mode & 0o777) as _;
    // SAFETY: the structure is one that the kernel has filled.
    check(unsafe { libc::shmctl(id, libc::IPC_SET, &raw mut found) }).map(drop)
}

/// Keeps a segment from being swapped.
pub(crate) fn lock(id: i32) -> io::Result<()> {
    const SHM_LOCK: i32 = 11;
    // SAFETY: the command takes no structure.
    check(unsafe { libc::shmctl(id, SHM_LOCK, std::ptr::null_mut()) }).map(drop)
}

/// Removes a segment, as soon as nobody has it attached.
pub(crate) fn remove(id: i32) -> io::Result<()> {
    // SAFETY: the command takes no structure.
    check(unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) }).map(drop)
}

/// A segment in our address space, until this is dropped.
#[derive(Debug)]
pub(crate) struct Attached(*mut libc::c_void);

impl Attached {
    /// Attaches a segment where the kernel likes.
    pub(crate) fn new(id: i32) -> io::Result<Self> {
        // SAFETY: the kernel places the mapping over nothing that exists.
        let start = unsafe { libc::shmat(id, std::ptr::null(), 0) };
        if start as isize == -1 { Err(io::Error::last_os_error()) } else { Ok(Self(start)) }
    }

    /// First address.
    pub(crate) fn start(&self) -> u64 {
        self.0 as u64
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // SAFETY: the segment was attached there, and nobody has a reference into it.
        unsafe { libc::shmdt(self.0) };
    }
}
