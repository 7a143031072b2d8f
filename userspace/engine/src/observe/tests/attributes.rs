//! What the iterator says of threads and processes, and what procfs, system calls and ptrace(2) say of the same ones.

use super::{
    super::{ProcessState, ThreadState},
    iterators, skip,
    victim::{Victim, stand_still},
};
use crate::{
    kernel::{proc, ptrace, sys},
    task::{Family, FrozenTree, Remote},
    tree::{attributes, creds, sched},
};
use std::{collections::HashMap, fs, time::Duration};

const SIGSET: usize = 8;
/// The first CPU alone.
static ONE: u64 = 1;

/// Threads and processes that differ from each other in one thing each.
pub(super) fn act() {
    thread(|| {
        let ids = |n: u32| [n, n + 1, n + 2];
        let groups = [70_000u32, 3, 80_000];
        let ([ru, eu, su], [rg, eg, sg]) = (ids(1001), ids(2001));
        call(libc::SYS_setgroups, [3, groups.as_ptr() as u64, 0, 0, 0]);
        call(libc::SYS_setresgid, [rg.into(), eg.into(), sg.into(), 0, 0]);
        call(libc::SYS_setfsgid, [2002, 0, 0, 0, 0]);
        call(libc::SYS_setresuid, [ru.into(), eu.into(), su.into(), 0, 0]);
        call(libc::SYS_setfsuid, [1003, 0, 0, 0, 0]);
        call(libc::SYS_prctl, [libc::PR_SET_NO_NEW_PRIVS as u64, 1, 0, 0, 0]);
    });
    thread(|| {
        let groups: Vec<u32> = (5000..5032).collect();
        call(libc::SYS_setgroups, [32, groups.as_ptr() as u64, 0, 0, 0]);
    });
    thread(|| {
        let groups: Vec<u32> = (5000..5033).collect();
        call(libc::SYS_setgroups, [33, groups.as_ptr() as u64, 0, 0, 0]);
    });
    thread(|| {
        call(libc::SYS_prctl, [libc::PR_SET_SECUREBITS as u64, libc::SECBIT_KEEP_CAPS as u64, 0, 0, 0]);
        call(libc::SYS_prctl, [libc::PR_CAPBSET_DROP as u64, 22, 0, 0, 0]);
        // Version 3, this thread; effective, permitted, inheritable of the lower capabilities, then of the others.
        let (header, data) = ([0x2008_0522u32, 0], [0x8fu32, 0xff, 0x3c, 0, 1, 0]);
        call(libc::SYS_capset, [header.as_ptr() as u64, data.as_ptr() as u64, 0, 0, 0]);
        call(libc::SYS_prctl, [libc::PR_CAP_AMBIENT as u64, 2, 3, 0, 0]);
    });
    thread(|| schedule(libc::SCHED_BATCH, 0));
    thread(|| schedule(libc::SCHED_IDLE, 0));
    thread(|| schedule(libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, 7));
    thread(|| schedule(libc::SCHED_RR, 3));
    thread(|| call(libc::SYS_setpriority, [0, 0, 11, 0, 0]));
    thread(|| call(libc::SYS_setpriority, [0, 0, -7i64 as u64, 0, 0]));
    thread(|| call(libc::SYS_sched_setaffinity, [0, 8, (&raw const ONE) as u64, 0, 0]));
    thread(|| call(libc::SYS_ioprio_set, [1, 0, 2 << 13 | 6, 0, 0]));
    thread(|| call(libc::SYS_ioprio_set, [1, 0, 3 << 13, 0, 0]));
    thread(|| call(libc::SYS_prctl, [libc::PR_SET_TIMERSLACK as u64, 123_456, 0, 0, 0]));
    thread(|| call(libc::SYS_prctl, [libc::PR_SET_NAME as u64, c"a) \xff (b\n ".as_ptr() as u64, 0, 0, 0]));
    for policy in [libc::PR_MCE_KILL_EARLY, libc::PR_MCE_KILL_LATE] {
        let set = libc::PR_MCE_KILL_SET as u64;
        thread(move || call(libc::SYS_prctl, [libc::PR_MCE_KILL as u64, set, policy as u64, 0, 0]));
    }
    thread(|| call(libc::SYS_prctl, [libc::PR_SET_TSC as u64, libc::PR_TSC_SIGSEGV as u64, 0, 0, 0]));
    thread(|| {
        drop_result(call_result(libc::SYS_set_mempolicy, [libc::MPOL_BIND as u64, (&raw const ONE) as u64, 65, 0, 0]))
    });
    thread(|| {
        let program = [libc::sock_filter { code: 6, jt: 0, jf: 0, k: 0x7fff_0000 }];
        let filter = libc::sock_fprog { len: 1, filter: program.as_ptr().cast_mut() };
        call(libc::SYS_prctl, [libc::PR_SET_SECCOMP as u64, 2, &raw const filter as u64, 0, 0]);
    });
    thread(|| {
        block(&[libc::SIGUSR1, libc::SIGRTMAX()]);
        call(libc::SYS_tkill, [nix::unistd::gettid().as_raw() as u64, libc::SIGUSR1 as u64, 0, 0, 0]);
    });
    thread(|| {
        block(&[libc::SIGHUP]);
        let other = 1u64 << (libc::SIGTERM - 1);
        call(libc::SYS_rt_sigsuspend, [&raw const other as u64, SIGSET as u64, 0, 0, 0]);
    });
    thread(|| {
        block(&[libc::SIGINT]);
        let other = 1u64 << (libc::SIGTERM - 1);
        call(libc::SYS_ppoll, [0, 0, 0, &raw const other as u64, SIGSET as u64]);
    });
    process(|| {
        block(&[libc::SIGUSR2, libc::SIGRTMIN()]);
        for signal in [libc::SIGUSR2, libc::SIGRTMIN()] {
            call(libc::SYS_kill, [std::process::id().into(), signal as u64, 0, 0, 0]);
        }
    });
    process(|| call(libc::SYS_setsid, [0; 5]));
    process(|| call(libc::SYS_setpgid, [0; 5]));
    process(|| call(libc::SYS_personality, [libc::ADDR_NO_RANDOMIZE as u64, 0, 0, 0, 0]));
    process(|| fs::write("/proc/self/oom_score_adj", "345").unwrap());
    process(|| drop(fs::write("/proc/self/loginuid", "4711")));
    process(|| fs::write("/proc/self/coredump_filter", "0x1f4").unwrap());
    for [option, value, flags] in UNUSUAL {
        process(move || drop_result(call_result(libc::SYS_prctl, [option, value, flags, 0, 0])));
    }
    process(|| drop_result(call_result(libc::SYS_membarrier, [1 << 4, 0, 0, 0, 0])));
    process(|| call(libc::SYS_umask, [0o123, 0, 0, 0, 0]));
    process(|| std::env::set_current_dir("/usr").unwrap());
    process(|| std::os::unix::fs::chroot(".").unwrap());
    process(|| {
        let mut id = 0i32;
        call(libc::SYS_timer_create, [libc::CLOCK_MONOTONIC as u64, 0, &raw mut id as u64, 0, 0]);
    });
    for kind in [libc::CLONE_NEWUTS, libc::CLONE_NEWNET, libc::CLONE_NEWPID, libc::CLONE_NEWCGROUP, NEWTIME] {
        process(move || drop_result(call_result(libc::SYS_unshare, [kind as u64, 0, 0, 0, 0])));
    }
    process(|| drop_result(call_result(libc::SYS_unshare, [libc::CLONE_NEWUSER as u64, 0, 0, 0, 0])));
}

/// PR_SET_THP_DISABLE, for all and for what was not advised (Linux 6.18), PR_SET_MDWE, for children as well and not,
/// PR_SET_MEMORY_MERGE.
const UNUSUAL: [[u64; 3]; 5] = [[41, 1, 0], [41, 1, 2], [65, 1, 0], [65, 3, 0], [67, 1, 0]];

/// CLONE_NEWTIME
const NEWTIME: i32 = 0x80;

/// What a machine does not permit makes no difference, then.
fn drop_result(result: i64) {
    if result < 0 {
        eprintln!("refused: {}", std::io::Error::last_os_error());
    }
}

fn call_result(nr: libc::c_long, [a, b, c, d, e]: [u64; 5]) -> i64 {
    // SAFETY: the pointers among the arguments are to live memory of the sizes that the calls want.
    unsafe { libc::syscall(nr, a, b, c, d, e) }
}

fn call(nr: libc::c_long, args: [u64; 5]) {
    let result = call_result(nr, args);
    assert!(result >= 0, "system call {nr}: {}", std::io::Error::last_os_error());
}

fn schedule(policy: i32, priority: i32) {
    // Control groups without real-time budget refuse it.
    drop_result(call_result(libc::SYS_sched_setscheduler, [0, policy as u64, (&raw const priority) as u64, 0, 0]));
}

fn block(signals: &[i32]) {
    let mask = signals.iter().fold(0u64, |mask, s| mask | 1 << (s - 1));
    call(libc::SYS_rt_sigprocmask, [libc::SIG_BLOCK as u64, &raw const mask as u64, 0, SIGSET as u64, 0]);
}

/// A thread that does something to itself alone and then waits.
fn thread(what: impl FnOnce() + Send + 'static) {
    let (to, from) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        // Some never return from what they do.
        to.send(()).unwrap();
        what();
        stand_still();
    });
    from.recv().unwrap();
}

fn process(what: impl FnOnce()) {
    // SAFETY: the child makes system calls and waits for its end.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: no memory is passed.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        what();
        stand_still();
    }
    println!("pid: {child}");
}

#[test]
fn the_iterator_says_what_procfs_and_ptrace_say() {
    let Some(mut iterators) = iterators() else { return };
    let victim = Victim::start("attributes -");
    let tids = proc::threads(victim.pids[0]).unwrap();
    settled(&[&victim.pids[..], &tids].concat());
    let tree = FrozenTree::freeze(victim.pids[0], Duration::from_secs(10), &mut Family::procfs()).unwrap();
    let pids = tree.pids();
    assert_eq!(pids.len(), victim.pids.len());
    let all = iterators.processes(&pids).unwrap();
    assert_eq!(all.iter().map(|p| p.tgid).collect::<Vec<_>>(), super::super::sorted(&pids));
    let mut links = HashMap::new();
    for process in &all {
        check_process(process, &mut links);
        let mut remote = Remote::new(process.tgid);
        let frozen = tree.processes().iter().find(|p| p.pid == process.tgid).unwrap();
        let asked = attributes::collect(frozen, None, &[], &mut remote).unwrap();
        assert_eq!(attributes::collect(frozen, Some(process), &[], &mut remote).unwrap(), asked);
        assert_eq!(process.threads.len(), proc::threads(process.tgid).unwrap().len());
        for thread in &process.threads {
            check_thread(process.tgid, thread);
            check_asked(process.tgid, thread, &mut remote);
            assert_eq!(process.thread(thread.tid), Some(thread));
        }
        assert_eq!(process.thread(1), None);
        remote.detach().unwrap();
    }
    // That all of this was there to be seen.
    assert!(all.iter().any(|p| p.coredump_filter == 0x1f4));
    // Who is usual is not asked.
    assert!(all.iter().any(|p| p.unusual_memory) && all.iter().any(|p| !p.unusual_memory));
    let threads = &all.iter().find(|p| p.tgid == victim.pids[0]).unwrap().threads;
    let creds: Vec<_> = threads.iter().filter_map(|t| t.creds.as_ref()).collect();
    assert!(creds.iter().any(|c| c.uids == [1001, 1002, 1003, 1003] && c.groups == [3, 70_000, 80_000]));
    assert!(creds.iter().any(|c| c.groups.len() == 32) && threads.iter().any(|t| t.creds.is_none()));
    assert!(creds.iter().any(|c| c.caps[4] == 8 && c.securebits != 0) && creds.iter().any(|c| c.no_new_privs));
    let scheds: Vec<_> = threads.iter().filter_map(|t| t.sched.as_ref()).collect();
    for policy in [libc::SCHED_BATCH, libc::SCHED_IDLE] {
        assert!(scheds.iter().any(|s| s.policy == policy as u32));
    }
    assert!(scheds.iter().any(|s| s.nice == 11) && scheds.iter().any(|s| s.nice == -7));
    assert!(scheds.iter().any(|s| s.affinity == [1]) && scheds.iter().any(|s| s.ioprio == (2 << 13 | 6)));
    if !scheds.iter().any(|s| s.priority == 7) {
        skip("no real-time scheduling");
    }
    assert!(threads.iter().any(|t| !t.tsc_faults) && threads.iter().any(|t| t.flags != 0));
    assert!(threads.iter().any(|t| t.pending) && all.iter().any(|p| p.pending) && all.iter().any(|p| p.posix_timers));
    let blocked = |signal: i32| threads.iter().any(|t| t.blocked.is_none_or(|b| b & 1 << (signal - 1) != 0));
    assert!(blocked(libc::SIGHUP) && blocked(libc::SIGINT) && !threads.iter().any(|t| t.blocked == Some(1 << 14)));
    assert!(threads.iter().any(|t| t.seccomp.is_none_or(|mode| mode == 2)));
}

/// Waits until all tasks sleep.
fn settled(tids: &[i32]) {
    let mut quiet = 0;
    while quiet < 20 {
        quiet = if tids.iter().all(|&t| proc::stat(t).unwrap().state == b'S') { quiet + 1 } else { 0 };
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What a thread says itself.
fn check_asked(pid: i32, seen: &ThreadState, remote: &mut Remote) {
    let status = proc::status(pid, seen.tid).unwrap();
    let asked = attributes::collect_thread(seen.tid, None, Some(&status), false, remote).unwrap();
    let told = attributes::collect_thread(seen.tid, Some(seen), None, false, remote).unwrap();
    assert_eq!(told, asked);
    assert_eq!(seen.memory_policy, asked.memory_policy.is_some());
}

fn check_thread(pid: i32, seen: &ThreadState) {
    let tid = seen.tid;
    let status = proc::status(pid, tid).unwrap();
    let comm = fs::read(proc::path(pid, &format!("task/{tid}/comm"))).unwrap();
    assert_eq!(seen.comm.0, comm[..comm.len() - 1]);
    if let Some(seen) = &seen.creds {
        assert_eq!(*seen, creds::of(&status, seen.securebits), "thread {tid}");
    } else {
        assert!(status.groups.len() > 32 || fs::read_link(proc::path(tid, "ns/user")).unwrap() != own("user"));
    }
    if let Some(seen) = &seen.sched {
        assert_eq!(*seen, sched::collect(tid).unwrap(), "thread {tid}");
    }
    assert_eq!(seen.timerslack_ns, proc::number::<u64>(&proc::path(tid, "timerslack_ns")).unwrap());
    assert_eq!(seen.robust_list, sys::get_robust_list(tid).unwrap());
    assert!(seen.seccomp.is_none_or(|mode| mode == status.seccomp));
    assert!(seen.blocked.is_none_or(|mask| mask == ptrace::sigmask(tid).unwrap()), "mask of thread {tid}");
    assert_eq!(seen.pending, !ptrace::pending(tid, false).unwrap().is_empty());
    if let Some(seen) = seen.rseq {
        let rseq = ptrace::rseq(tid).unwrap();
        assert_eq!((seen.address, seen.size, seen.signature), (rseq.address, rseq.size, rseq.signature));
    }
}

fn own(namespace: &str) -> std::path::PathBuf {
    fs::read_link(format!("/proc/self/ns/{}", namespace.trim_end_matches("_for_children"))).unwrap()
}

/// `links`: what was seen under each number.
fn check_process(seen: &ProcessState, links: &mut HashMap<(&'static str, u32), std::path::PathBuf>) {
    let pid = seen.tgid;
    let stat = proc::stat(pid).unwrap();
    assert_eq!((seen.ppid, seen.pgid, seen.sid), (stat.ppid, stat.pgid, stat.sid));
    assert_eq!((&seen.threads[0].comm.0, seen.threads[0].exit_signal), (&stat.comm, stat.exit_signal));
    let status = proc::status(pid, pid).unwrap();
    assert_eq!(seen.umask, status.umask);
    assert_eq!(seen.rlimits, proc::limits(pid).unwrap());
    let pending = ptrace::pending(pid, true).unwrap();
    assert_eq!(seen.pending, !pending.is_empty());
    assert_eq!(seen.posix_timers, !proc::timers(pid).unwrap().is_empty());
    let text = |name: &str| fs::read_to_string(proc::path(pid, name)).unwrap().trim().to_string();
    assert_eq!(seen.personality, u32::from_str_radix(&text("personality"), 16).unwrap());
    assert_eq!(seen.oom_score_adj.to_string(), text("oom_score_adj"));
    assert!(seen.loginuid.is_none_or(|uid| uid.to_string() == text("loginuid")));
    assert_eq!(seen.auxv.as_ref().unwrap(), &fs::read(proc::path(pid, "auxv")).unwrap());
    let link = |name: &str| fs::read_link(proc::path(pid, name)).unwrap();
    for (name, id) in [("exe", seen.exe), ("root", seen.root), ("cwd", seen.cwd)] {
        let known = links.entry((name, id.unwrap().0)).or_insert_with(|| link(name));
        assert_eq!(*known, link(name));
    }
    // One for children that has no process yet has no name either.
    let differs = |name: &&&str| fs::read_link(proc::path(pid, &format!("ns/{name}"))).ok() != Some(own(name));
    let foreign: Vec<_> = standstill_ebpf_abi::NAMESPACES.iter().filter(differs).copied().collect();
    assert_eq!(seen.foreign_namespaces, foreign);
}
