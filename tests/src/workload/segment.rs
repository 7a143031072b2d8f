//! System V shared memory.

use std::io;

/// A segment, which outlives this.
#[derive(Debug)]
pub struct Segment {
    /// Its id.
    pub id: i32,
}

impl Segment {
    /// Makes a segment. `key` 0: IPC_PRIVATE.
    pub fn new(key: i32, length: usize) -> Self {
        Self::with(key, length, 0)
    }

    /// Makes a private segment of huge pages, `size` as among the flags of mmap(2).
    pub fn huge(length: usize, size: i32) -> Self {
        Self::with(0, length, libc::SHM_HUGETLB | size)
    }

    fn with(key: i32, length: usize, flags: i32) -> Self {
        // SAFETY: no memory is passed.
        let id = unsafe { libc::shmget(key, length, libc::IPC_CREAT | libc::IPC_EXCL | 0o640 | flags) };
        assert!(id >= 0, "shmget: {}", io::Error::last_os_error());
        Self { id }
    }

    /// Attaches it. Returns the address.
    pub fn attach(&self, flags: i32) -> usize {
        // SAFETY: the kernel places the mapping over nothing that exists.
        let start = unsafe { libc::shmat(self.id, std::ptr::null(), flags) };
        assert!(start as isize != -1, "shmat: {}", io::Error::last_os_error());
        start as usize
    }

    /// Detaches it from where it was attached.
    pub fn detach(&self, address: usize) {
        // SAFETY: nobody has a reference into what was attached here.
        let result = unsafe { libc::shmdt(address as *const _) };
        assert_eq!(result, 0, "shmdt of segment {}: {}", self.id, io::Error::last_os_error());
    }

    /// Removes it, as soon as nobody has it attached; whether it was there.
    pub fn remove(&self) -> bool {
        // SAFETY: the command takes no structure.
        unsafe { libc::shmctl(self.id, libc::IPC_RMID, std::ptr::null_mut()) == 0 }
    }

    /// Key, mode, owner, group, size and number of mappings.
    pub fn told(&self) -> (i32, u32, u32, u32, usize, u64) {
        // SAFETY: the kernel fills the structure, of which all zeros is a value.
        let (result, found) = unsafe {
            let mut found: libc::shmid_ds = std::mem::zeroed();
            (libc::shmctl(self.id, libc::IPC_STAT, &raw mut found), found)
        };
        assert_eq!(result, 0, "shmctl: {}", io::Error::last_os_error());
        let perm = &found.shm_perm;
        (perm.__key, perm.mode.into(), perm.uid, perm.gid, found.shm_segsz, found.shm_nattch)
    }
}
