//! Threads and processes: what they did themselves, and what is seen of it.

use super::{
    super::{ProcessState, RestartBlock, ThreadState},
    among_many, iterators,
    victim::{Victim, say},
};
use nix::{
    sys::wait::{Id, WaitPidFlag, waitid},
    unistd::Pid,
};
use standstill_images::types::SigAction;
use std::{collections::HashMap, mem, ptr, time::Duration};

const SECOND: u64 = 1_000_000_000;
const ALTSTACK: usize = 0x8000;

/// Does to itself what [`processes_and_threads`] looks for.
pub(super) fn act() {
    zombies();
    // A process that shares descriptors and directories.
    // SAFETY: like fork(2), but for what is shared; the child only waits for its end.
    let sharer =
        unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_FILES | libc::CLONE_FS | libc::SIGCHLD, 0, 0, 0, 0) };
    if sharer == 0 {
        super::victim::stand_still();
    }
    println!("pid: {sharer}");
    waits();
    say(format!("main={}", nix::unistd::gettid()));
    let stack = Box::leak(vec![0u8; ALTSTACK].into_boxed_slice());
    let altstack = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 1 << 31, ss_size: ALTSTACK };
    say(format!("altstack={}", stack.as_ptr() as u64));
    let tid_address = Box::leak(Box::new(0u32));
    say(format!("tid_address={}", ptr::from_ref(tid_address) as u64));
    let timer = libc::itimerval {
        it_interval: libc::timeval { tv_sec: 5, tv_usec: 250_000 },
        it_value: libc::timeval { tv_sec: 3000, tv_usec: 0 },
    };
    let mut prof = timer;
    prof.it_value.tv_sec = 4000;
    // SAFETY: the structures live on; nothing of the process depends on what is changed.
    unsafe {
        assert_eq!(libc::sigaltstack(&altstack, ptr::null_mut()), 0);
        libc::syscall(libc::SYS_set_tid_address, ptr::from_mut(tid_address));
        assert_eq!(libc::setitimer(libc::ITIMER_REAL, &timer, ptr::null_mut()), 0);
        assert_eq!(libc::setitimer(libc::ITIMER_PROF, &prof, ptr::null_mut()), 0);
        assert_eq!(libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1), 0);
        assert_eq!(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGUSR2), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECUREBITS, libc::SECBIT_NO_SETUID_FIXUP), 0);
        libc::umask(0o137);
        let limit = libc::rlimit { rlim_cur: 123, rlim_max: 456 };
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &limit), 0);
        let mut set: libc::sigset_t = mem::zeroed();
        libc::sigaddset(&mut set, libc::SIGHUP);
        libc::sigaddset(&mut set, 64);
        assert_eq!(libc::pthread_sigmask(libc::SIG_BLOCK, &set, ptr::null_mut()), 0);
        let mut action: libc::sigaction = mem::zeroed();
        action.sa_sigaction = libc::SIG_IGN;
        libc::sigaction(libc::SIGUSR2, &action, ptr::null_mut());
        action.sa_sigaction = super::victim::stand_still as *const () as usize;
        action.sa_flags = libc::SA_RESTART | libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaddset(&mut action.sa_mask, libc::SIGTERM);
        libc::sigaction(libc::SIGUSR1, &action, ptr::null_mut());
        assert_eq!(libc::prctl(libc::PR_SET_DUMPABLE, 0), 0);
    }
    for signal in 1..=64 {
        let mut action = [0u64; 4];
        // SAFETY: the kernel's structure has four words here, and its signal set one.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, 0, action.as_mut_ptr(), 8) };
        say(format!("action{signal}={} {} {} {}", action[0], action[1], action[2], action[3]));
    }
}

/// One child that ended by itself and one that was killed, neither waited for.
fn zombies() {
    for name in ["exited", "killed"] {
        // SAFETY: the child makes nothing but one system call.
        let child = match unsafe { libc::fork() } {
            // SAFETY: it ends here.
            0 if name == "exited" => unsafe { libc::_exit(7) },
            // SAFETY: it ends here.
            0 => unsafe { libc::kill(libc::getpid(), libc::SIGKILL) },
            child => child,
        };
        let left = waitid(Id::Pid(Pid::from_raw(child)), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT);
        left.unwrap();
        say(format!("{name}={child}"));
    }
}

/// A thread for each kind of wait that leaves a restart_block when it is interrupted.
fn waits() {
    let start = |name: &'static str, wait: fn()| {
        let (to, from) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            to.send(nix::unistd::gettid()).unwrap();
            wait();
        });
        say(format!("{name}={}", from.recv().unwrap()));
    };
    start("sleep", || std::thread::sleep(Duration::from_secs(1000)));
    start("futex", || {
        let word = 5u32;
        let limit = libc::timespec { tv_sec: 2000, tv_nsec: 0 };
        // SAFETY: the word and the limit outlive the call.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                &raw const word,
                libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
                5,
                &raw const limit,
                0,
                0,
            )
        };
    });
    start("futex_real", || {
        let word = 6u32;
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_REALTIME).unwrap();
        let limit = libc::timespec { tv_sec: now.tv_sec() + 2500, tv_nsec: 0 };
        let op = libc::FUTEX_WAIT_BITSET | libc::FUTEX_CLOCK_REALTIME;
        // SAFETY: the word and the limit outlive the call.
        unsafe { libc::syscall(libc::SYS_futex, &raw const word, op, 6, &raw const limit, 0, 0xff) };
    });
    start("poll", || {
        // SAFETY: no descriptors are given.
        unsafe { libc::syscall(libc::SYS_poll, 0, 0, 1_500_000) };
    });
    start("clock", || {
        let limit = libc::timespec { tv_sec: 1700, tv_nsec: 0 };
        let mut rest = limit;
        // SAFETY: both outlive the call.
        unsafe { libc::clock_nanosleep(libc::CLOCK_BOOTTIME, 0, &limit, &mut rest) };
    });
    start("forever", || {
        std::thread::park();
    });
}

struct Words(HashMap<String, String>);

impl Words {
    fn of(victim: &Victim) -> Self {
        Self(victim.words.iter().map(|w| w.split_once('=').unwrap()).map(|(k, v)| (k.into(), v.into())).collect())
    }

    fn number(&self, name: &str) -> u64 {
        self.0[name].parse().unwrap()
    }
}

#[test]
fn processes_and_threads() {
    let Some(mut iterators) = iterators() else { return };
    let victim = Victim::start("threads -");
    victim.stop();
    let words = Words::of(&victim);
    let zombies = [words.number("exited") as i32, words.number("killed") as i32];
    let all = iterators.processes(&[&victim.pids[..], &zombies].concat()).unwrap();
    let process = |pid: i32| all.iter().find(|p| p.tgid == pid).unwrap();
    let main = process(victim.pids[0]);
    assert_process(main, &words);
    assert_threads(main, &words);
    assert_eq!(process(zombies[0]).exited, Some(7 << 8));
    assert_eq!(process(zombies[1]).exited, Some(libc::SIGKILL));
    assert_eq!(process(zombies[0]).threads[0].mm, None);
    let (ours, theirs) = (&main.threads[0], &process(victim.pids[1]).threads[0]);
    assert!(ours.files == theirs.files && ours.fs == theirs.fs && ours.files.is_some());
    assert!(ours.mm != theirs.mm && ours.sighand != theirs.sighand);
    // The same through the iterator over everything.
    let pids: Vec<i32> = all.iter().map(|p| p.tgid).collect();
    let again = iterators.processes(&among_many(&pids)).unwrap();
    let steady = |p: &ProcessState| (p.tgid, p.sigactions.clone(), p.layout, p.threads.len(), p.rlimits.clone());
    assert_eq!(again.iter().map(steady).collect::<Vec<_>>(), all.iter().map(steady).collect::<Vec<_>>());
}

fn assert_process(main: &ProcessState, words: &Words) {
    let pid = main.tgid;
    assert_eq!(main.exited, None);
    let timer = main.itimer_real.unwrap();
    assert_eq!(timer.interval_us, 5_250_000);
    assert!((2_900_000_000..=3_000_000_000).contains(&timer.value_us), "{timer:?}");
    assert!(main.cpu_itimers && main.child_subreaper);
    assert_eq!((main.umask, main.dumpable), (0o137, 0));
    assert_eq!(main.rlimits[libc::RLIMIT_NOFILE as usize], (123, 456));
    let actions: Vec<SigAction> = (1..=64)
        .map(|signal| {
            let words: Vec<u64> = words.0[&format!("action{signal}")].split(' ').map(|w| w.parse().unwrap()).collect();
            SigAction { signal, handler: words[0], flags: words[1], restorer: words[2], mask: words[3] }
        })
        .filter(|a| a.handler != 0)
        .collect();
    assert_eq!(main.sigactions, actions);
    assert!(actions.iter().any(|a| a.signal == libc::SIGUSR1 && a.mask == 1 << (libc::SIGTERM - 1)));
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let field = |n: usize| stat.rsplit(") ").next().unwrap().split(' ').nth(n - 3).unwrap().parse::<u64>().unwrap();
    let layout = main.layout.unwrap();
    let ours = [
        layout.start_code,
        layout.end_code,
        layout.start_stack,
        layout.start_data,
        layout.end_data,
        layout.start_brk,
        layout.arg_start,
        layout.arg_end,
        layout.env_start,
        layout.env_end,
    ];
    assert_eq!(ours, [26, 27, 28, 45, 46, 47, 48, 49, 50, 51].map(field));
    assert!(layout.brk >= layout.start_brk);
}

fn assert_threads(main: &ProcessState, words: &Words) {
    let thread =
        |name: &str| -> &ThreadState { main.threads.iter().find(|t| t.tid == words.number(name) as i32).unwrap() };
    assert_eq!(main.threads[0].tid, main.tgid);
    assert!(main.threads.iter().all(|t| (t.exit_signal == libc::SIGCHLD) == (t.tid == main.tgid)));
    assert!(main.threads.iter().all(|t| t.mm == main.threads[0].mm && t.sighand == main.threads[0].sighand));
    let acted = thread("main");
    assert_eq!((acted.altstack.sp, acted.altstack.size), (words.number("altstack"), ALTSTACK as u64));
    // SS_AUTODISARM.
    assert_eq!(acted.altstack.flags, 1 << 31);
    assert_eq!(acted.clear_child_tid, words.number("tid_address"));
    assert_eq!(acted.pdeath_signal, libc::SIGUSR2);
    assert!(acted.blocked.is_none_or(|b| b == 1 << (libc::SIGHUP - 1) | 1 << 63));
    assert_eq!(acted.securebits, libc::SECBIT_NO_SETUID_FIXUP as u32);
    assert_ne!(acted.robust_list.0, 0);
    let left = |name: &str, seconds: u64| {
        let left = thread(name).remaining_ns.unwrap();
        assert!(left <= seconds * SECOND && left > (seconds - 100) * SECOND, "{name}: {left} ns of {seconds} s");
    };
    left("sleep", 1000);
    left("futex", 2000);
    left("futex_real", 2500);
    left("poll", 1500);
    left("clock", 1700);
    let monotonic = libc::CLOCK_MONOTONIC;
    assert!(matches!(thread("sleep").restart, RestartBlock::Nanosleep { clock, rmtp: 1.., .. } if clock == monotonic));
    let boottime = libc::CLOCK_BOOTTIME;
    assert!(matches!(thread("clock").restart, RestartBlock::Nanosleep { clock, .. } if clock == boottime));
    let futex = |name: &str| match thread(name).restart {
        RestartBlock::Futex { uaddr: 1.., val, bitset, realtime, .. } => (val, bitset, realtime),
        other => panic!("{name}: {other:?}"),
    };
    assert_eq!(futex("futex"), (5, u32::MAX, false));
    assert_eq!(futex("futex_real"), (6, 0xff, true));
    assert!(matches!(thread("poll").restart, RestartBlock::Poll { ufds: 0, nfds: 0, expires_ns: Some(_) }));
    assert_eq!((thread("forever").restart, thread("forever").remaining_ns), (RestartBlock::None, None));
}
