//! In a pid namespace of its own a reader sees who is in it, and nobody else.

use super::{super::Lineage, iterators};
use nix::{
    sys::wait::{WaitStatus, waitpid},
    unistd::{ForkResult, Pid, fork},
};

/// Processes of each namespace, its first one aside.
const MEMBERS: i32 = 20;

/// A child that waits for its end, which comes with that of its parent.
fn sleeper() -> Pid {
    // SAFETY: the child makes system calls only.
    match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            // SAFETY: prctl takes no memory.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            loop {
                nix::unistd::pause();
            }
        }
    }
}

/// What the first process of a new pid namespace, with so many children, returns of a look from within.
fn from_within(look: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the child makes system calls, allocates memory, which the C library allows, and ends by _exit(2). Children
    // of this thread alone are in the new namespace.
    let outside = unsafe { fork() }.unwrap();
    if let ForkResult::Parent { child } = outside {
        return ended(child);
    }
    // SAFETY: as above.
    unsafe {
        if libc::unshare(libc::CLONE_NEWPID) != 0 {
            libc::_exit(100);
        }
        match fork() {
            Ok(ForkResult::Parent { child }) => libc::_exit(ended(child)),
            Ok(ForkResult::Child) => {
                for _ in 0..MEMBERS {
                    sleeper();
                }
                libc::_exit(look());
            }
            Err(_) => libc::_exit(101),
        }
    }
}

fn ended(child: Pid) -> i32 {
    match waitpid(child, None) {
        Ok(WaitStatus::Exited(_, status)) => status,
        other => panic!("{other:?}"),
    }
}

/// The numbers of dead processes of one namespace stay in the memory that the next processes outside get theirs in.
#[test]
fn nobody_outside_is_seen_from_within() {
    let Some(mut iterators) = iterators() else { return };
    for round in 0..40 {
        let strangers: Vec<Pid> = (0..MEMBERS).map(|_| sleeper()).collect();
        let status = from_within(|| {
            let Ok(tasks) = iterators.lineage() else { return 102 };
            let is_member = |t: &&Lineage| t.tgid != 0 || t.tid != 0;
            let seen: Vec<&Lineage> = tasks.iter().filter(is_member).collect();
            let is_right = |t: &Lineage| t.tgid == t.tid && t.ppid == i32::from(t.tgid != 1);
            match seen.iter().all(|t| is_right(t)) {
                true => seen.len() as i32,
                false => 103,
            }
        });
        for pid in strangers {
            // SAFETY: kill takes no memory; the process is a child of ours that nobody has waited for.
            unsafe { libc::kill(pid.as_raw(), libc::SIGKILL) };
            _ = waitpid(pid, None);
        }
        assert_eq!(status, MEMBERS + 1, "round {round}");
    }
}
