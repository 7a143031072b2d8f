//! ptrace(2) requests. All of them must come from the thread that seized the task.

use super::arch::Registers;
use std::{cell::RefCell, io, os::raw::c_void};

/// A task stopped because of PTRACE_INTERRUPT, a group stop, or its birth under PTRACE_O_TRACE*.
pub(crate) const EVENT_STOP: i32 = libc::PTRACE_EVENT_STOP;

fn request(request: libc::c_uint, tid: i32, addr: usize, data: usize) -> io::Result<libc::c_long> {
    // SAFETY: callers pass, for the requests that read or write memory, the address of a live object of the right size.
    let result = unsafe { libc::ptrace(request as _, tid, addr as *mut c_void, data as *mut c_void) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// PTRACE_SEIZE, Linux 3.4: attaches without stopping the task.
pub(crate) fn seize(tid: i32, options: i32) -> io::Result<()> {
    request(libc::PTRACE_SEIZE, tid, 0, options as usize).map(drop)
}

/// PTRACE_SETOPTIONS of a stopped task.
pub(crate) fn set_options(tid: i32, options: i32) -> io::Result<()> {
    request(libc::PTRACE_SETOPTIONS, tid, 0, options as usize).map(drop)
}

/// PTRACE_INTERRUPT: makes a seized task stop soon; see [`wait`].
pub(crate) fn interrupt(tid: i32) -> io::Result<()> {
    request(libc::PTRACE_INTERRUPT, tid, 0, 0).map(drop)
}

/// PTRACE_CONT with a signal to deliver (0: none).
pub(crate) fn cont(tid: i32, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_CONT, tid, 0, signal as usize).map(drop)
}

/// PTRACE_SYSCALL: continues to the next entry to or exit from a system call.
pub(crate) fn cont_to_syscall(tid: i32) -> io::Result<()> {
    request(libc::PTRACE_SYSCALL, tid, 0, 0).map(drop)
}

/// PTRACE_DETACH with a signal to deliver (0: none).
pub(crate) fn detach(tid: i32, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_DETACH, tid, 0, signal as usize).map(drop)
}

/// The general registers.
pub(crate) fn registers(tid: i32) -> io::Result<Registers> {
    let mut regs = Registers::default();
    request(libc::PTRACE_GETREGS, tid, 0, &raw mut regs as usize)?;
    Ok(regs)
}

/// Sets the general registers.
pub(crate) fn set_registers(tid: i32, regs: &Registers) -> io::Result<()> {
    request(libc::PTRACE_SETREGS, tid, 0, &raw const *regs as usize).map(drop)
}

/// PTRACE_GETREGSET of a set whose size the kernel decides.
pub(crate) fn regset(tid: i32, set: i32) -> io::Result<Vec<u8>> {
    // The largest xstate so far (AMX) is 11 KiB; the kernel shortens iov_len to what there is. Clearing so much for
    // each of many threads would take longer than reading their registers.
    thread_local! {
        static ROOM: RefCell<Vec<u8>> = RefCell::new(vec![0; 64 * 1024]);
    }
    ROOM.with_borrow_mut(|room| {
        let mut iov = libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: room.len() };
        request(libc::PTRACE_GETREGSET, tid, set as usize, &raw mut iov as usize)?;
        Ok(room[..iov.iov_len].to_vec())
    })
}

/// PTRACE_SETREGSET.
pub(crate) fn set_regset(tid: i32, set: i32, data: &[u8]) -> io::Result<()> {
    let mut iov = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    request(libc::PTRACE_SETREGSET, tid, set as usize, &raw mut iov as usize).map(drop)
}

/// PTRACE_GETSIGMASK, Linux 3.11: blocked signals.
pub(crate) fn sigmask(tid: i32) -> io::Result<u64> {
    let mut mask = 0u64;
    request(0x420a, tid, size_of::<u64>(), &raw mut mask as usize)?;
    Ok(mask)
}

/// PTRACE_SETSIGMASK, Linux 3.11.
pub(crate) fn set_sigmask(tid: i32, mask: u64) -> io::Result<()> {
    request(0x420b, tid, size_of::<u64>(), &raw const mask as usize).map(drop)
}

/// PTRACE_PEEKSIGINFO, Linux 3.10: signals pending for the thread, or those for its process, as raw `siginfo_t`.
pub(crate) fn pending(tid: i32, shared: bool) -> io::Result<Vec<Vec<u8>>> {
    const BATCH: usize = 32;
    let mut all = Vec::new();
    loop {
        let args = libc::ptrace_peeksiginfo_args { off: all.len() as u64, flags: u32::from(shared), nr: BATCH as i32 };
        let mut buffer = vec![0u8; BATCH * size_of::<libc::siginfo_t>()];
        let n = request(0x4209, tid, &raw const args as usize, buffer.as_mut_ptr() as usize)? as usize;
        all.extend(buffer.chunks(size_of::<libc::siginfo_t>()).take(n).map(<[u8]>::to_vec));
        if n < BATCH {
            return Ok(all);
        }
    }
}

/// `struct ptrace_rseq_configuration`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RseqConfiguration {
    pub address: u64,
    pub size: u32,
    pub signature: u32,
    pub flags: u32,
    pub pad: u32,
}

/// PTRACE_GET_RSEQ_CONFIGURATION, Linux 5.13.
pub(crate) fn rseq(tid: i32) -> io::Result<RseqConfiguration> {
    let mut conf = RseqConfiguration::default();
    request(0x420f, tid, size_of::<RseqConfiguration>(), &raw mut conf as usize)?;
    Ok(conf)
}

/// PTRACE_SECCOMP_GET_FILTER, Linux 4.4: a filter of the thread as it was given to the kernel; the oldest has number 0.
/// `None`: there are not so many.
pub(crate) fn seccomp_filter(tid: i32, number: usize) -> io::Result<Option<Vec<libc::sock_filter>>> {
    const MAXIMUM: usize = 4096; // BPF_MAXINSNS
    let mut program = vec![libc::sock_filter { code: 0, jt: 0, jf: 0, k: 0 }; MAXIMUM];
    match request(0x420c, tid, number, program.as_mut_ptr() as usize) {
        Ok(length) => {
            program.truncate(length as usize);
            Ok(Some(program))
        }
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(e) => Err(e),
    }
}

/// PTRACE_SECCOMP_GET_METADATA, Linux 4.16: the flags a filter was installed with, as far as the kernel remembers them.
pub(crate) fn seccomp_flags(tid: i32, number: usize) -> io::Result<u64> {
    let mut metadata = [number as u64, 0]; // struct seccomp_metadata: which one, flags
    request(0x420d, tid, size_of_val(&metadata), metadata.as_mut_ptr() as usize)?;
    Ok(metadata[1])
}

/// A state change that wait4(2) reports of a traced task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Nothing yet (only with [`try_wait`]).
    Nothing,
    /// PTRACE_EVENT_STOP: SIGTRAP, or the signal of a group stop.
    EventStop(i32),
    /// Another PTRACE_EVENT_*.
    Event(i32),
    /// Entry to or exit from a system call.
    Syscall,
    /// A signal is about to be delivered.
    Signal(i32),
    /// The task is gone; status as wait(2) encodes it.
    Gone(i32),
}

fn decode(status: i32) -> Wait {
    if !libc::WIFSTOPPED(status) {
        return Wait::Gone(status);
    }
    match (status >> 16, libc::WSTOPSIG(status)) {
        (EVENT_STOP, signal) => Wait::EventStop(signal),
        (0, signal) if signal == libc::SIGTRAP | 0x80 => Wait::Syscall,
        (0, signal) => Wait::Signal(signal),
        (event, _) => Wait::Event(event),
    }
}

fn wait4(tid: i32, flags: i32) -> io::Result<(i32, Wait)> {
    let mut status = 0;
    loop {
        // SAFETY: `status` is writable; no resource usage is asked for.
        let pid = unsafe { libc::waitpid(tid, &raw mut status, flags | libc::__WALL) };
        if pid > 0 {
            return Ok((pid, decode(status)));
        }
        if pid == 0 {
            return Ok((0, Wait::Nothing));
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EINTR) {
            return Err(error);
        }
    }
}

/// Waits for the next state change of `tid`.
pub(crate) fn wait(tid: i32) -> io::Result<Wait> {
    wait4(tid, 0).map(|(_, what)| what)
}

/// Like [`wait`], without blocking.
pub(crate) fn try_wait(tid: i32) -> io::Result<Wait> {
    wait4(tid, libc::WNOHANG).map(|(_, what)| what)
}

/// Waits for the next state change of any child or traced task of this thread.
pub(crate) fn wait_any() -> io::Result<(i32, Wait)> {
    wait4(-1, libc::__WNOTHREAD)
}
