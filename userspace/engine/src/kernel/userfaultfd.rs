//! userfaultfd(2) as a tracker of writes: protected pages lose their protection at the first write, which the kernel
//! resolves by itself (UFFD_FEATURE_WP_ASYNC, Linux 6.7), and [`Pagemap`](super::pagemap::Pagemap) tells which did.
//!
//! Kernel doc: Documentation/admin-guide/mm/userfaultfd.rst. Nothing is left of it once the descriptor is closed.

use super::pagemap::Range;
use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

const UFFD_API: u64 = 0xaa;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const REGISTER_MODE_WP: u64 = 1 << 1;

/// Flags of the system call. No fault ever waits for a handler, so those of the kernel need not be among the handled
/// ones, and no privilege is needed.
pub(crate) const FLAGS: u64 = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64 | UFFD_USER_MODE_ONLY;
const UFFD_USER_MODE_ONLY: u64 = 1;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct WriteProtect {
    start: u64,
    len: u64,
    mode: u64,
}

nix::ioctl_readwrite!(uffdio_api, 0xaa, 0x3f, Api);
nix::ioctl_readwrite!(uffdio_register, 0xaa, 0x00, Register);
nix::ioctl_readwrite!(uffdio_writeprotect, 0xaa, 0x06, WriteProtect);

/// A userfaultfd of the address space that it was made in.
#[derive(Debug)]
pub(crate) struct Userfault(OwnedFd);

impl Userfault {
    /// For a descriptor that userfaultfd(2) has just made.
    ///
    /// # Errors
    /// EINVAL: the kernel cannot track writes (it is older than 6.7).
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        let mut api = Api { api: UFFD_API, features: FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED, ioctls: 0 };
        // SAFETY: `api` is a struct uffdio_api.
        unsafe { uffdio_api(fd.as_raw_fd(), &raw mut api) }?;
        Ok(Self(fd))
    }

    /// For a descriptor that [`Self::new`] has had before.
    pub(crate) fn again(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Lets pages of all mappings in a range be protected. None of them is.
    ///
    /// A mapping that mremap(2) has moved, or joined with one that was moved, is registered no more, but the marks of its
    /// pages may still be there. They no longer mean anything: such pages can be written to unnoticed.
    ///
    /// # Errors
    /// ESRCH: the address space is no more. EBUSY: the range belongs to a userfaultfd of somebody else. Others: a mapping
    /// that cannot be tracked, or is gone.
    pub(crate) fn register(&self, range: Range) -> io::Result<()> {
        let mut arg = Register { start: range.start, len: range.end - range.start, mode: REGISTER_MODE_WP, ioctls: 0 };
        // SAFETY: `arg` is a struct uffdio_register.
        unsafe { uffdio_register(self.0.as_raw_fd(), &raw mut arg) }?;
        self.release(range)
    }

    /// Ends the protection of all pages in a range of registered mappings: they can be written to without a fault, and count
    /// as written to.
    ///
    /// # Errors
    /// ESRCH: the address space is no more. ENOENT: there is a mapping in the range that is not registered, or none. What is
    /// before it may have lost its protection.
    pub(crate) fn release(&self, range: Range) -> io::Result<()> {
        let mut arg = WriteProtect { start: range.start, len: range.end - range.start, mode: 0 };
        // SAFETY: `arg` is a struct uffdio_writeprotect.
        unsafe { uffdio_writeprotect(self.0.as_raw_fd(), &raw mut arg) }?;
        Ok(())
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{
        PAGE,
        pagemap::{Pagemap, Writes},
        sys::Mapping,
    };
    use std::os::fd::FromRawFd;

    const PAGES: u64 = 8;

    /// Moves the upper half of a mapping away and back.
    fn move_and_return(memory: &Mapping) {
        let aside = Mapping::anonymous(PAGES / 2 * PAGE).unwrap();
        let half = (memory.start() + PAGES / 2 * PAGE) as *mut libc::c_void;
        let (other, length) = (aside.start() as *mut libc::c_void, (PAGES / 2 * PAGE) as usize);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: both are mappings of the test, into which nobody has a reference.
        unsafe {
            assert_eq!(libc::mremap(half, length, length, flags, other), other);
            assert_eq!(libc::mremap(other, length, length, flags, half), half);
        }
        std::mem::forget(aside);
    }

    /// A mapping that joins one that was moved is registered no more, and its marks say nothing.
    #[test]
    fn marks_of_a_lost_registration_mean_nothing() {
        // SAFETY: no memory is passed; the descriptor is new and ours.
        let fd = unsafe { OwnedFd::from_raw_fd(libc::syscall(libc::SYS_userfaultfd, FLAGS) as i32) };
        let userfault = Userfault::new(fd).unwrap();
        let memory = Mapping::anonymous(PAGES * PAGE).unwrap();
        memory.bytes_mut().fill(1);
        let range = Range { start: memory.start(), end: memory.start() + PAGES * PAGE };
        let pagemap = Pagemap::open(std::process::id() as i32).unwrap();
        let written = |writes: Writes| {
            let mut found = Vec::new();
            pagemap.written(range, &[], writes, &mut found).map(|()| found)
        };
        userfault.register(range).unwrap();
        written(Writes::Reset).unwrap();
        assert_eq!(written(Writes::Tracked).unwrap(), []);
        move_and_return(&memory);
        memory.bytes_mut()[0] = 2;
        assert_eq!(written(Writes::Tracked).unwrap_err().raw_os_error(), Some(libc::EPERM));
        userfault.register(range).unwrap();
        assert_eq!(written(Writes::Tracked).unwrap(), [range]);
        // And from now on it is tracked again.
        written(Writes::Reset).unwrap();
        memory.bytes_mut()[0] = 3;
        assert_eq!(written(Writes::Tracked).unwrap(), [Range { end: range.start + PAGE, ..range }]);
    }
}
