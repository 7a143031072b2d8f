//! What each system call changes, for trackers that watch them. One list for each part of a process; a call may be in
//! several.
//!
//! A call that is younger than these lists changes everything, so a newer kernel costs time and nothing else.

use standstill_ebpf_abi::track::{SYSCALLS, part, when};

type Number = libc::c_long;

/// Mappings are watched through the lock of the address space, not here.
const FILES: &[Number] = &[
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_creat,
    libc::SYS_open_by_handle_at,
    libc::SYS_open_tree,
    libc::SYS_dup,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_pipe,
    libc::SYS_pipe2,
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_eventfd,
    libc::SYS_eventfd2,
    libc::SYS_signalfd,
    libc::SYS_signalfd4,
    libc::SYS_timerfd_create,
    libc::SYS_epoll_create,
    libc::SYS_epoll_create1,
    libc::SYS_inotify_init,
    libc::SYS_inotify_init1,
    libc::SYS_fanotify_init,
    libc::SYS_memfd_create,
    libc::SYS_memfd_secret,
    libc::SYS_userfaultfd,
    libc::SYS_perf_event_open,
    libc::SYS_bpf,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_mq_open,
    libc::SYS_fsopen,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_landlock_create_ruleset,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_recvmmsg,
    libc::SYS_unshare,
    libc::SYS_seccomp,
];

const FS: &[Number] = &[
    libc::SYS_chdir,
    libc::SYS_fchdir,
    libc::SYS_chroot,
    libc::SYS_umask,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_pivot_root,
];

const SIGNALS: &[Number] = &[libc::SYS_rt_sigaction];

const TIMERS: &[Number] = &[
    libc::SYS_alarm,
    libc::SYS_setitimer,
    libc::SYS_timer_create,
    libc::SYS_timer_delete,
    libc::SYS_timer_settime,
    libc::SYS_timerfd_settime,
];

const SOCKETS: &[Number] = &[
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_shutdown,
    libc::SYS_setsockopt,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_io_uring_enter,
];

const ATTRIBUTES: &[Number] = &[
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_setgroups,
    libc::SYS_capset,
    libc::SYS_setrlimit,
    libc::SYS_prlimit64,
    libc::SYS_setpriority,
    libc::SYS_ioprio_set,
    libc::SYS_sched_setparam,
    libc::SYS_sched_setscheduler,
    libc::SYS_sched_setattr,
    libc::SYS_sched_setaffinity,
    libc::SYS_personality,
    libc::SYS_setpgid,
    libc::SYS_setsid,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_seccomp,
    libc::SYS_landlock_restrict_self,
    libc::SYS_sigaltstack,
    libc::SYS_set_tid_address,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_prctl,
    libc::SYS_arch_prctl,
    libc::SYS_modify_ldt,
    libc::SYS_set_thread_area,
    libc::SYS_ioperm,
    libc::SYS_iopl,
];

/// The first call of later kernels: mseal(2) is the last that the lists know.
const UNKNOWN_FROM: usize = 463;
/// Numbers that x86-64 has never used: from here up to io_pgetevents' successor.
const UNUSED: std::ops::Range<usize> = 335..424;

/// For each number what the call changes: bits of [`part`] and one of [`when`].
pub(super) fn table() -> [u16; SYSCALLS] {
    let mut table = [0u16; SYSCALLS];
    table[UNKNOWN_FROM..].fill(part::ALL);
    table[UNUSED].fill(part::ALL);
    let lists = [
        (FILES, part::FILES),
        (FS, part::FS),
        (SIGNALS, part::SIGNALS),
        (TIMERS, part::TIMERS),
        (SOCKETS, part::SOCKETS),
        (ATTRIBUTES, part::ATTRIBUTES),
    ];
    for (list, what) in lists {
        for &number in list {
            table[number as usize] |= what;
        }
    }
    let special = [
        // A descriptor is gone whatever close(2) says; the others may have done a part.
        (libc::SYS_close, part::FILES | when::ALWAYS),
        (libc::SYS_close_range, part::FILES | when::ALWAYS),
        (libc::SYS_execve, part::ALL),
        (libc::SYS_execveat, part::ALL),
        (libc::SYS_fcntl, part::FILES | when::FCNTL),
        (libc::SYS_ioctl, part::FILES | when::IOCTL),
        (libc::SYS_recvmsg, part::FILES | when::RECVMSG),
        // Returning from a handler restores the alternate stack too.
        (libc::SYS_rt_sigreturn, 0),
        // restart_syscall(2) ends a wait, which changes nothing.
        (libc::SYS_restart_syscall, 0),
    ];
    for (number, what) in special {
        table[number as usize] = what;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_that_are_not_known_change_everything() {
        let table = table();
        assert_eq!(table[SYSCALLS - 1], part::ALL);
        assert_eq!(table[400], part::ALL);
        assert_eq!(table[libc::SYS_read as usize], 0);
        assert_eq!(table[libc::SYS_openat as usize], part::FILES);
        assert_eq!(table[libc::SYS_unshare as usize], part::FILES | part::FS | part::ATTRIBUTES);
    }

    #[test]
    fn a_call_has_one_condition_at_most() {
        for (number, rule) in table().into_iter().enumerate() {
            assert!(rule & when::MASK <= when::RECVMSG, "system call {number}");
            assert!(rule & when::MASK == 0 || rule & part::ALL != 0, "system call {number}");
        }
    }
}
