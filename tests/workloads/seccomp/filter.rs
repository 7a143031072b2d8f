//! Filters of seccomp(2) that answer one system call each with an errno of their own.

use std::io;

/// SECCOMP_FILTER_FLAG_TSYNC
pub(crate) const SYNC: u64 = 1;
/// SECCOMP_FILTER_FLAG_LOG
pub(crate) const LOG: u64 = 2;

/// A filter for the calling thread; with [`SYNC`] for all threads.
pub(crate) fn deny(call: i64, errno: i32, flags: u64) {
    install(call, libc::SECCOMP_RET_ERRNO | errno.unsigned_abs(), flags).expect("install a filter");
}

/// A filter that asks nobody: there is no listener.
pub(crate) fn ask_supervisor(call: i64) {
    install(call, libc::SECCOMP_RET_USER_NOTIF, 0).expect("install a filter");
}

/// A filter that allows everything, for all threads whose filters this thread has, too.
pub(crate) fn synchronize() -> io::Result<()> {
    install(-1, libc::SECCOMP_RET_ALLOW, SYNC)
}

fn install(call: i64, action: u32, flags: u64) -> io::Result<()> {
    let instruction =
        |code: u32, jf, k| libc::sock_filter { code: u16::try_from(code).expect("16 bits"), jt: 0, jf, k };
    let call = u32::try_from(call).unwrap_or(u32::MAX);
    let mut program = [
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0), // seccomp_data.nr
        instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, call),
        instruction(libc::BPF_RET | libc::BPF_K, 0, action),
        instruction(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: 4, filter: program.as_mut_ptr() };
    // SAFETY: the program is live and as long as it says; the kernel copies it.
    match unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) } {
        0 => Ok(()),
        failed if failed > 0 => Err(io::Error::other(format!("thread {failed} cannot be synchronized"))),
        _ => Err(io::Error::last_os_error()),
    }
}

/// errno of a system call without arguments that matter; 0: it succeeded.
pub(crate) fn errno_of(call: i64) -> i32 {
    // SAFETY: the calls that the workload makes take numbers only.
    match unsafe { libc::syscall(call, 0, 0, 0) } {
        -1 => io::Error::last_os_error().raw_os_error().unwrap_or(-1),
        _ => 0,
    }
}
