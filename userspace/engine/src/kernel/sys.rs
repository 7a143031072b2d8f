//! System calls without a wrapper elsewhere.

use super::{PAGE, hugetlb};
use nix::time::{ClockId, clock_gettime};
use std::{
    cmp::Ordering,
    ffi::{CStr, CString},
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    time::Duration,
};

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Whether the kernel's pages are those of the image format.
pub(crate) fn page_size_is_supported() -> bool {
    // SAFETY: sysconf only reads a number.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) == PAGE as libc::c_long }
}

/// CLOCK_MONOTONIC, which all processes of the machine share.
pub(crate) fn monotonic() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Into::into)
}

/// FIONREAD: bytes that wait in a pipe, in a stream, or in messages that keep their order (SOCK_SEQPACKET); of other sockets
/// those of the first message.
pub(crate) fn waiting_bytes(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut bytes = 0i32;
    // SAFETY: FIONREAD stores an int.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut bytes) }.into())?;
    Ok(bytes as usize)
}

/// getsockopt(2) of an option of at most 64 bytes.
pub(crate) fn socket_option(fd: BorrowedFd<'_>, level: i32, name: i32) -> io::Result<Vec<u8>> {
    let mut value = [0u8; 64];
    let mut len = value.len() as libc::socklen_t;
    // SAFETY: `value` is writable for `len` bytes; the kernel shortens `len` to what it stored.
    let result = unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut len) };
    check(result.into())?;
    Ok(value[..len as usize].to_vec())
}

/// The same of a number at the level SOL_SOCKET.
pub(crate) fn socket_number(fd: BorrowedFd<'_>, name: i32) -> io::Result<i32> {
    let bytes = socket_option(fd, libc::SOL_SOCKET, name)?;
    Ok(i32::from_ne_bytes(bytes.try_into().map_err(|_| io::Error::other("an option of another size"))?))
}

/// timerfd_gettime(2): interval and time left.
pub(crate) fn timerfd_gettime(timer: BorrowedFd<'_>) -> io::Result<libc::itimerspec> {
    let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let mut spec = libc::itimerspec { it_interval: none, it_value: none };
    // SAFETY: the kernel writes one itimerspec.
    check(unsafe { libc::timerfd_gettime(timer.as_raw_fd(), &raw mut spec) }.into())?;
    Ok(spec)
}

/// pidfd_open(2) of a process, Linux 5.3.
pub(crate) fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    open_pidfd(pid, 0)
}

/// pidfd_open(2) of any thread (PIDFD_THREAD), Linux 6.9.
pub(crate) fn pidfd_open_thread(tid: i32) -> io::Result<OwnedFd> {
    open_pidfd(tid, libc::O_EXCL)
}

/// The wait status of a process that has been waited for, by a pidfd of it; Linux 6.15.
pub(crate) fn pidfd_exit_status(pidfd: BorrowedFd<'_>) -> io::Result<i32> {
    const PIDFD_GET_INFO: libc::Ioctl = 0xc040_ff0b;
    const PIDFD_INFO_EXIT: u64 = 1 << 3;
    // struct pidfd_info: a mask of what is asked for, and told; the status is its last word.
    let mut info = [0u64; 8];
    info[0] = PIDFD_INFO_EXIT;
    // SAFETY: the size of the array is part of the number of the request.
    check(unsafe { libc::ioctl(pidfd.as_raw_fd(), PIDFD_GET_INFO, info.as_mut_ptr()) }.into())?;
    if info[0] & PIDFD_INFO_EXIT == 0 {
        return Err(io::ErrorKind::Unsupported.into());
    }
    Ok((info[7] >> 32) as i32)
}

fn open_pidfd(pid: i32, flags: i32) -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed; a returned descriptor is new and ours.
    unsafe { check(libc::syscall(libc::SYS_pidfd_open, pid, flags)).map(|fd| OwnedFd::from_raw_fd(fd as i32)) }
}

/// pidfd_getfd(2), Linux 5.6: a duplicate of descriptor `fd` of another process.
pub(crate) fn pidfd_getfd(pidfd: BorrowedFd<'_>, fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed; a returned descriptor is new and ours.
    unsafe {
        check(libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0)).map(|fd| OwnedFd::from_raw_fd(fd as i32))
    }
}

/// What threads of a process have in common, for clone(2).
pub(crate) const CLONE_AS_THREAD: i32 = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM;

/// What two tasks may share, for [`kcmp`].
#[derive(Clone, Copy, Debug)]
#[repr(i32)]
pub(crate) enum Kcmp {
    Vm = 1,
    Files = 2,
    Fs = 3,
    Sighand = 4,
}

/// kcmp(2): compares what two tasks have, in an order that the kernel chose at boot.
pub(crate) fn kcmp(a: i32, b: i32, what: Kcmp) -> io::Result<Ordering> {
    // SAFETY: no memory is passed.
    kcmp_order(unsafe { libc::syscall(libc::SYS_kcmp, a, b, what as i32, 0, 0) })
}

/// The same of the open file descriptions of two descriptors, each given as (process, descriptor).
pub(crate) fn kcmp_file(a: (i32, i32), b: (i32, i32)) -> io::Result<Ordering> {
    const KCMP_FILE: i32 = 0;
    // SAFETY: no memory is passed.
    kcmp_order(unsafe { libc::syscall(libc::SYS_kcmp, a.0, b.0, KCMP_FILE, a.1, b.1) })
}

fn kcmp_order(result: libc::c_long) -> io::Result<Ordering> {
    match check(result)? {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// clone3(2), Linux 5.5: all signal actions of the child are the default ones.
pub(crate) const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;

/// `struct clone_args` of clone3(2).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct CloneArgs {
    pub flags: u64,
    pub pidfd: u64,
    pub child_tid: u64,
    pub parent_tid: u64,
    pub exit_signal: u64,
    pub stack: u64,
    pub stack_size: u64,
    pub tls: u64,
    pub set_tid: u64,
    pub set_tid_size: u64,
    pub cgroup: u64,
}

/// clone3(2) of a child with this id that does nothing until it is killed, or this thread ends.
pub(crate) fn stand_in(pid: i32) -> io::Result<()> {
    let args = CloneArgs { set_tid: (&raw const pid) as u64, set_tid_size: 1, ..Default::default() };
    // SAFETY: like fork(2) in a program with threads: the child makes system calls only.
    unsafe {
        let made = check(libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()))?;
        if made == 0 {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            loop {
                libc::pause();
            }
        }
    }
    Ok(())
}

/// sched_getattr(2): policy, flags, nice, priority of a task.
pub(crate) fn sched_getattr(tid: i32) -> io::Result<libc::sched_attr> {
    let size = size_of::<libc::sched_attr>() as u32;
    // SAFETY: all fields are integers, for which zero is valid.
    let mut attr: libc::sched_attr = unsafe { std::mem::zeroed() };
    // SAFETY: `attr` is writable for `size` bytes, which the kernel does not exceed.
    unsafe { check(libc::syscall(libc::SYS_sched_getattr, tid, &raw mut attr, size, 0))? };
    Ok(attr)
}

/// sched_getaffinity(2) as a byte mask, without trailing zeros.
pub(crate) fn sched_getaffinity(tid: i32) -> io::Result<Vec<u8>> {
    let mut mask = vec![0u8; 1024];
    // SAFETY: `mask` is writable for the length given.
    let n = unsafe { check(libc::syscall(libc::SYS_sched_getaffinity, tid, mask.len(), mask.as_mut_ptr()))? };
    mask.truncate(n as usize);
    let used = mask.iter().rposition(|&b| b != 0).map_or(0, |p| p + 1);
    mask.truncate(used);
    Ok(mask)
}

/// A value that prctl(2) gives as its result.
pub(crate) fn prctl_get(option: i32) -> io::Result<u32> {
    // SAFETY: the options that this is used for take no memory.
    unsafe { check(libc::prctl(option, 0u64, 0u64, 0u64, 0u64).into()).map(|value| value as u32) }
}

/// get_mempolicy(2) of this thread: mode, and a mask of nodes.
pub(crate) fn get_mempolicy(words: &mut [u64]) -> io::Result<()> {
    let (mode, nodes) = words.split_at_mut(1);
    let bits = 64 * nodes.len() + 1;
    let (mode, nodes) = (mode.as_mut_ptr(), nodes.as_mut_ptr());
    // SAFETY: there is room for an int and for so many bits, of which the kernel counts one less.
    unsafe { check(libc::syscall(libc::SYS_get_mempolicy, mode, nodes, bits, 0, 0)).map(drop) }
}

/// ioprio_get(2) of one thread.
pub(crate) fn ioprio_get(tid: i32) -> io::Result<u32> {
    const IOPRIO_WHO_PROCESS: i32 = 1;
    // SAFETY: no memory is passed.
    unsafe { check(libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, tid)).map(|p| p as u32) }
}

/// get_robust_list(2) of any thread: head and length.
pub(crate) fn get_robust_list(tid: i32) -> io::Result<(u64, u64)> {
    let (mut head, mut len) = (0u64, 0u64);
    // SAFETY: both pointers are to writable words of the size the kernel stores.
    unsafe { check(libc::syscall(libc::SYS_get_robust_list, tid, &raw mut head, &raw mut len))? };
    Ok((head, len))
}

/// cachestat(2), Linux 6.5: how many pages of the file's first `length` bytes are in the page cache.
pub(crate) fn cached_pages(file: BorrowedFd<'_>, length: u64) -> io::Result<u64> {
    const SYS_CACHESTAT: libc::c_long = 451;
    let range = [0u64, length];
    let mut stat = [0u64; 5];
    // SAFETY: `range` and `stat` have the size and layout of struct cachestat_range and struct cachestat.
    unsafe { check(libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), range.as_ptr(), stat.as_mut_ptr(), 0))? };
    Ok(stat[0])
}

/// Mounts a hierarchy of cgroups, named as in `/proc/pid/cgroup`, where nobody sees it: fsmount(2), Linux 5.2.
pub(crate) fn mount_cgroups(hierarchy: &[u8]) -> io::Result<OwnedFd> {
    const FSCONFIG_SET_FLAG: i32 = 0;
    const FSCONFIG_SET_STRING: i32 = 1;
    const FSCONFIG_CMD_CREATE: i32 = 6;
    const FSOPEN_CLOEXEC: i32 = 1;
    const FSMOUNT_CLOEXEC: i32 = 1;
    let kind = if hierarchy.is_empty() { c"cgroup2" } else { c"cgroup" };
    // SAFETY: the name is a string; a returned descriptor is new and ours.
    let context = unsafe {
        let fd = check(libc::syscall(libc::SYS_fsopen, kind.as_ptr(), FSOPEN_CLOEXEC))?;
        OwnedFd::from_raw_fd(fd as i32)
    };
    let configure = |command: i32, key: Option<&CStr>, value: Option<&CStr>| {
        let pointer = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
        // SAFETY: both are null or strings, as the command wants.
        check(unsafe {
            libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, pointer(key), pointer(value), 0)
        })
    };
    for part in hierarchy.split(|&b| b == b',').filter(|part| !part.is_empty()) {
        let text = |bytes: &[u8]| CString::new(bytes).map_err(io::Error::from);
        match part.strip_prefix(b"name=") {
            Some(name) => {
                if hierarchy == part {
                    configure(FSCONFIG_SET_FLAG, Some(c"none"), None)?;
                }
                configure(FSCONFIG_SET_STRING, Some(c"name"), Some(&text(name)?))?;
            }
            None => _ = configure(FSCONFIG_SET_FLAG, Some(&text(part)?), None)?,
        }
    }
    configure(FSCONFIG_CMD_CREATE, None, None)?;
    // SAFETY: numbers only; a returned descriptor is new and ours.
    unsafe {
        check(libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, 0))
            .map(|fd| OwnedFd::from_raw_fd(fd as i32))
    }
}

/// Memory mapped into this process; unmapped on drop.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: *mut libc::c_void,
    len: usize,
}

impl Mapping {
    /// Private anonymous memory.
    pub(crate) fn anonymous(len: u64) -> io::Result<Self> {
        Self::map(0, len, libc::MAP_PRIVATE)
    }

    /// Shared anonymous memory, where the kernel likes.
    pub(crate) fn shared(len: u64) -> io::Result<Self> {
        Self::map(0, len, libc::MAP_SHARED)
    }

    /// Shared anonymous memory of huge pages, none of which is taken from the machine yet.
    pub(crate) fn shared_huge(len: u64, page_size: u64) -> io::Result<Self> {
        Self::map(0, len, libc::MAP_SHARED | libc::MAP_HUGETLB | hugetlb::size_flag(page_size))
    }

    /// Shared anonymous, executable memory at an address where nothing is mapped.
    pub(crate) fn shared_executable_at(start: u64, len: u64) -> io::Result<Self> {
        let mapping = Self::map(start, len, libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE)?;
        // SAFETY: the range is the mapping just made.
        unsafe { check(libc::mprotect(mapping.start, mapping.len, 7).into())? };
        Ok(mapping)
    }

    fn map(start: u64, len: u64, flags: i32) -> io::Result<Self> {
        // SAFETY: without MAP_FIXED the kernel places the mapping over nothing that exists.
        let start = unsafe {
            libc::mmap(
                start as *mut _,
                len as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                flags | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Self { start, len: len as usize }) }
    }

    /// A part of a file. Reserves nothing.
    pub(crate) fn of_file(file: BorrowedFd<'_>, offset: u64, len: usize, prot: i32) -> io::Result<Self> {
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        // SAFETY: the kernel places the mapping over nothing that exists.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, file.as_raw_fd(), offset as libc::off_t) };
        if start == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Self { start, len }) }
    }

    /// First address.
    pub(crate) fn start(&self) -> u64 {
        self.start as u64
    }

    /// The memory. Tasks that share it are stopped whenever this process looks at it.
    #[expect(clippy::mut_from_ref, reason = "the mapping is raw memory; callers never hold two overlapping slices")]
    pub(crate) fn bytes_mut(&self) -> &mut [u8] {
        // SAFETY: the mapping is readable and writable for its whole length and lives as long as `self`.
        unsafe { std::slice::from_raw_parts_mut(self.start.cast(), self.len) }
    }
}

/// A mapping of a file whose contents are of no interest, but whether its pages are there.
#[derive(Debug)]
pub(crate) struct View(Mapping);

impl View {
    /// The first `len` bytes of a file. No page is there yet.
    pub(crate) fn new(file: BorrowedFd<'_>, len: u64) -> io::Result<Self> {
        Mapping::of_file(file, 0, len as usize, libc::PROT_READ).map(Self)
    }

    /// First address.
    pub(crate) fn start(&self) -> u64 {
        self.0.start()
    }

    /// Its length in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.0.len as u64
    }

    /// Fills the page table for a part of the file, and for nothing else (MADV_POPULATE_READ, Linux 5.14).
    pub(crate) fn populate(&mut self, file: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
        const MADV_POPULATE_READ: i32 = 22;
        let len = len.min(self.len().saturating_sub(offset)) as usize;
        // A page fault also maps what is around, as far as the mapping goes: so this is done in one that is no larger.
        let part = Mapping::of_file(file, offset, len, libc::PROT_READ)?;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: both ranges are mappings of ours into which nobody has a pointer.
        unsafe {
            check(libc::madvise(part.start, len, MADV_POPULATE_READ).into())?;
            if libc::mremap(part.start, len, len, flags, self.0.start.byte_add(offset as usize)) == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
        }
        // Its addresses are free.
        std::mem::forget(part);
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is ours, and no slice of it outlives `self`.
        unsafe { libc::munmap(self.start, self.len) };
    }
}
