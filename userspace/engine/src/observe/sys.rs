//! System calls that observing needs.

use std::{
    ffi::CString,
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// What statx(2) says about a file, as stat(2) encodes it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stat {
    pub dev: u64,
    pub ino: u64,
    pub mode: u32,
    pub nlink: u32,
    pub rdev: u64,
    pub size: u64,
    pub mtime: (i64, u32),
}

/// statx(2) of `name` in the directory `dir`, following links.
///
/// The file's server is not asked (AT_STATX_DONT_SYNC): it can be in the tree that is frozen.
pub(super) fn stat_at(dir: BorrowedFd<'_>, name: &str) -> io::Result<Stat> {
    let name = CString::new(name)?;
    // SAFETY: any bytes are a value of this structure of integers.
    let mut out: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the name ends with a NUL, and `out` is one statx structure.
    let result = unsafe {
        libc::statx(dir.as_raw_fd(), name.as_ptr(), libc::AT_STATX_DONT_SYNC, libc::STATX_BASIC_STATS, &raw mut out)
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Stat {
        dev: libc::makedev(out.stx_dev_major, out.stx_dev_minor),
        ino: out.stx_ino,
        mode: out.stx_mode.into(),
        nlink: out.stx_nlink,
        rdev: libc::makedev(out.stx_rdev_major, out.stx_rdev_minor),
        size: out.stx_size,
        mtime: (out.stx_mtime.tv_sec, out.stx_mtime.tv_nsec),
    })
}

#[cfg(feature = "ebpf")]
pub(super) use bpf::*;

#[cfg(feature = "ebpf")]
mod bpf {
    use std::{
        fs::File,
        io, mem,
        os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        ptr,
    };

    // Numbers and structures of linux/bpf.h. aya creates iterator links, too, but only such that see every process.
    const BPF_LINK_CREATE: i32 = 28;
    const BPF_ITER_CREATE: i32 = 33;
    const BPF_TRACE_ITER: u32 = 28;

    /// `struct { … } link_create` of `union bpf_attr`.
    #[repr(C)]
    struct LinkCreate {
        prog_fd: u32,
        target_fd: u32,
        attach_type: u32,
        flags: u32,
        iter_info: u64,
        iter_info_len: u32,
        reserved: u32,
    }

    /// `struct { … } task` of `union bpf_iter_link_info`.
    #[repr(C)]
    struct IterInfo {
        tid: u32,
        pid: u32,
        pid_fd: u32,
    }

    /// `struct { … } iter_create` of `union bpf_attr`.
    #[repr(C)]
    struct IterCreate {
        link_fd: u32,
        flags: u32,
    }

    fn bpf<T>(command: i32, attr: &T) -> io::Result<OwnedFd> {
        // SAFETY: the attributes are the command's, and what they point to is alive in the caller.
        let fd = unsafe { libc::syscall(libc::SYS_bpf, command, ptr::from_ref(attr), mem::size_of::<T>()) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: both commands return a new descriptor.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }

    /// Makes an iterator of a loaded program, over one process (Linux 6.1) or all.
    pub(in super::super) fn iter_link(program: BorrowedFd<'_>, tgid: Option<i32>) -> io::Result<OwnedFd> {
        let info = IterInfo { tid: 0, pid: tgid.unwrap_or(0) as u32, pid_fd: 0 };
        let attr = LinkCreate {
            prog_fd: program.as_raw_fd() as u32,
            target_fd: 0,
            attach_type: BPF_TRACE_ITER,
            flags: 0,
            iter_info: if tgid.is_some() { ptr::from_ref(&info) as u64 } else { 0 },
            iter_info_len: if tgid.is_some() { mem::size_of::<IterInfo>() as u32 } else { 0 },
            reserved: 0,
        };
        bpf(BPF_LINK_CREATE, &attr)
    }

    /// Begins a reading.
    pub(in super::super) fn iter_create(link: BorrowedFd<'_>) -> io::Result<File> {
        bpf(BPF_ITER_CREATE, &IterCreate { link_fd: link.as_raw_fd() as u32, flags: 0 }).map(File::from)
    }
}
