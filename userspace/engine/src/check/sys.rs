//! System calls that only the probes make, one thin safe function each.

use crate::kernel::{PAGE, sys::CloneArgs};
use nix::{Result, errno::Errno};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};

/// An argument that is not used but must be zero in all its bits.
const NONE: libc::c_ulong = 0;

/// A child that does nothing until it is killed, or until this process ends.
pub(super) fn fork_idle() -> Result<i32> {
    let parent = std::process::id() as i32;
    // SAFETY: the child of a program with threads must not touch locks or the heap; this one makes system calls only.
    unsafe {
        let pid = Errno::result(libc::fork())?;
        if pid == 0 {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            while libc::getppid() == parent {
                libc::pause();
            }
            libc::_exit(0);
        }
        Ok(pid)
    }
}

/// clone3(2) of a child with a given process id, that exits at once. To be waited for.
pub(super) fn clone_with_pid(pid: i32) -> Result<i32> {
    let set_tid = [pid];
    let args = CloneArgs {
        flags: crate::kernel::sys::CLONE_CLEAR_SIGHAND,
        exit_signal: libc::SIGCHLD as u64,
        set_tid: set_tid.as_ptr() as u64,
        set_tid_size: 1,
        ..Default::default()
    };
    // SAFETY: without CLONE_VM this is a fork; `args` and `set_tid` outlive the call, and the child only exits.
    unsafe {
        let child = Errno::result(libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()))?;
        if child == 0 {
            libc::_exit(0);
        }
        Ok(child as i32)
    }
}

/// close_range(2) of one descriptor.
pub(super) fn close_range(fd: OwnedFd) -> Result<()> {
    let number = fd.as_raw_fd();
    // SAFETY: the only descriptor in the range is `fd`, owned by this function and forgotten once it is closed.
    unsafe { Errno::result(libc::syscall(libc::SYS_close_range, number, number, 0))? };
    let _ = fd.into_raw_fd();
    Ok(())
}

/// `PR_SET_MM_MAP_SIZE`: size of the `struct prctl_mm_map` that `PR_SET_MM_MAP` takes.
pub(super) fn mm_map_size() -> Result<u32> {
    const PR_SET_MM_MAP_SIZE: i32 = 15;
    let mut size = 0u32;
    // SAFETY: the request stores one 32-bit number at the address given.
    unsafe { Errno::result(libc::prctl(libc::PR_SET_MM, PR_SET_MM_MAP_SIZE, &raw mut size, NONE, NONE))? };
    Ok(size)
}

/// `PR_TIMER_CREATE_RESTORE_IDS_GET`: changes nothing.
pub(super) fn timer_restore_ids() -> Result<()> {
    const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
    const GET: libc::c_ulong = 2;
    // SAFETY: no memory is passed.
    unsafe { Errno::result(libc::prctl(PR_TIMER_CREATE_RESTORE_IDS, GET, NONE, NONE, NONE)).map(drop) }
}

/// rseq(2) with arguments that every kernel with rseq refuses by EINVAL.
pub(super) fn rseq() -> Errno {
    // SAFETY: a null area of no size is never registered.
    match Errno::result(unsafe { libc::syscall(libc::SYS_rseq, NONE, NONE, NONE, NONE) }) {
        Ok(_) => Errno::UnknownErrno,
        Err(errno) => errno,
    }
}

/// A system call that no kernel has.
#[cfg(test)]
pub(super) fn absent() -> Result<()> {
    // SAFETY: no memory is passed, and the number belongs to no system call.
    Errno::result(unsafe { libc::syscall(0xffff) }).map(drop)
}

nix::ioctl_write_ptr!(tfd_set_ticks, b'T', 0, u64);

/// `TFD_IOC_SET_TICKS`.
pub(super) fn timerfd_set_ticks(timer: &impl AsRawFd, ticks: u64) -> Result<()> {
    // SAFETY: the kernel reads one 64-bit number.
    unsafe { tfd_set_ticks(timer.as_raw_fd(), &raw const ticks) }.map(drop)
}

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

nix::ioctl_readwrite!(uffdio_api, 0xaa, 0x3f, UffdioApi);

/// userfaultfd(2) and the handshake for `features`; everything that the kernel offers.
pub(super) fn userfaultfd(features: u64) -> Result<u64> {
    // SAFETY: no memory is passed; a returned descriptor is new and ours.
    let fd = unsafe {
        let fd = Errno::result(libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK))?;
        OwnedFd::from_raw_fd(fd as i32)
    };
    let mut api = UffdioApi { api: 0xaa, features, ioctls: 0 };
    // SAFETY: the kernel reads and writes one `struct uffdio_api`.
    unsafe { uffdio_api(fd.as_raw_fd(), &raw mut api)? };
    Ok(api.features)
}

/// Private anonymous memory, every page of it written to; unmapped on drop.
pub(super) struct Pages {
    start: *mut u8,
    len: usize,
}

impl Pages {
    pub(super) fn new(pages: usize) -> Result<Self> {
        let len = pages * PAGE as usize;
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: without MAP_FIXED the mapping replaces nothing; it is written to within its length.
        unsafe {
            let start = libc::mmap(std::ptr::null_mut(), len, prot, flags, -1, 0);
            if start == libc::MAP_FAILED {
                return Err(Errno::last());
            }
            std::ptr::write_bytes(start.cast::<u8>(), 1, len);
            Ok(Self { start: start.cast(), len })
        }
    }

    /// First address.
    pub(super) fn start(&self) -> u64 {
        self.start as u64
    }

    /// madvise(2) of one page.
    pub(super) fn advise(&self, page: usize, advice: i32) -> Result<()> {
        let offset = page * PAGE as usize;
        assert!(offset < self.len, "no such page");
        // SAFETY: the page belongs to this mapping, which nobody has a reference into.
        unsafe { Errno::result(libc::madvise(self.start.add(offset).cast(), PAGE as usize, advice)).map(drop) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nobody has a reference into it.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}
