//! Everything a process can ask the kernel about itself and that a checkpoint must preserve.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::{fs, io, io::Read};

use super::{Checker, proc_stat_fields};

/// Facts about a process or a thread, by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SelfState(BTreeMap<String, String>);

/// Fields of `/proc/self/stat` that must stay, by their number in proc(5).
const STAT_FIELDS: [(usize, &str); 14] = [
    (5, "process group"),
    (6, "session"),
    (7, "tty"),
    (19, "nice"),
    (20, "threads"),
    (26, "startcode"),
    (27, "endcode"),
    (28, "startstack"),
    (45, "start_data"),
    (46, "end_data"),
    (47, "start_brk"),
    (48, "arg_start"),
    (49, "arg_end"),
    (51, "env_end"),
];

/// Lines of `/proc/thread-self/status` that must stay, for each thread.
const STATUS_LINES: [&str; 16] = [
    "Umask",
    "Uid",
    "Gid",
    "Groups",
    "SigBlk",
    "SigIgn",
    "SigCgt",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "NoNewPrivs",
    "Seccomp",
    "THP_enabled",
    "TracerPid",
];

/// Files below `/proc/self` that must stay.
const FILES: [&str; 7] = ["cmdline", "environ", "auxv", "limits", "oom_score_adj", "coredump_filter", "personality"];

impl SelfState {
    /// Facts about the calling thread: identity, signal state, what the kernel remembers for its exit.
    pub fn of_thread() -> Self {
        let mut facts = BTreeMap::new();
        fact(&mut facts, "tid", nix::unistd::gettid());
        fact(&mut facts, "comm", fs::read_to_string("/proc/thread-self/comm"));
        status_facts(&mut facts);
        fact(&mut facts, "altstack", altstack());
        fact(&mut facts, "robust list", robust_list());
        fact(&mut facts, "tid address", tid_address());
        // SAFETY: sched_getscheduler takes no pointers.
        fact(&mut facts, "sched policy", unsafe { libc::sched_getscheduler(0) });
        Self(facts)
    }

    /// Facts about the process, including those of the calling thread.
    pub fn of_process() -> Self {
        let Self(mut facts) = Self::of_thread();
        fact(&mut facts, "pid", nix::unistd::getpid());
        fact(&mut facts, "parent", nix::unistd::getppid());
        fact(&mut facts, "pgid", nix::unistd::getpgrp());
        fact(&mut facts, "sid", nix::unistd::getsid(None));
        for link in ["cwd", "root", "exe"] {
            fact(&mut facts, link, fs::read_link(format!("/proc/self/{link}")));
        }
        for file in FILES {
            fact(&mut facts, file, fs::read(format!("/proc/self/{file}")).map(|bytes| printable(&bytes)));
        }
        let stat = proc_stat_fields("/proc/self/stat").expect("read /proc/self/stat");
        for (number, name) in STAT_FIELDS {
            fact(&mut facts, name, &stat[number - 3]);
        }
        for signal in 1..=64 {
            fact(&mut facts, &format!("action {signal}"), action(signal));
        }
        for option in [
            (libc::PR_GET_DUMPABLE, "dumpable"),
            (libc::PR_GET_KEEPCAPS, "keepcaps"),
            (libc::PR_GET_NO_NEW_PRIVS, "no_new_privs"),
            (libc::PR_GET_SECUREBITS, "securebits"),
        ] {
            // SAFETY: these options take no pointers.
            fact(&mut facts, option.1, unsafe { libc::prctl(option.0, 0, 0, 0, 0) });
        }
        fact(&mut facts, "child_subreaper", subreaper());
        for timer in [libc::ITIMER_REAL, libc::ITIMER_VIRTUAL, libc::ITIMER_PROF] {
            fact(&mut facts, &format!("itimer {timer} interval"), itimer_interval(timer));
        }
        Self(facts)
    }

    /// The same without some facts that may change.
    pub fn without(mut self, names: &[&str]) -> Self {
        self.0.retain(|name, _| !names.contains(&name.as_str()));
        self
    }

    /// Compares every fact with what it was.
    pub fn check(&self, checker: &Checker, whose: &str, before: &Self) {
        for (name, was) in &before.0 {
            let is = self.0.get(name);
            checker.that(is == Some(was), || format!("{whose}: {name} is {is:?}, was {was:?}"));
        }
    }
}

fn fact(facts: &mut BTreeMap<String, String>, name: &str, value: impl Debug) {
    facts.insert(name.to_owned(), format!("{value:?}"));
}

/// Reads a file of procfs by one system call: what is read by and by can be torn by a dump in between, because a
/// thread gets its signal mask back last of all.
fn read_at_once(path: &str) -> io::Result<String> {
    let mut text = vec![0; 1 << 16];
    let length = fs::File::open(path)?.read(&mut text)?;
    text.truncate(length);
    String::from_utf8(text).map_err(io::Error::other)
}

fn status_facts(facts: &mut BTreeMap<String, String>) {
    let read = || read_at_once("/proc/thread-self/status").expect("read status");
    let mut status = read();
    // A thread is traced an instant before it is stopped, and may see it.
    for _ in 0..20 {
        if status.contains("TracerPid:\t0\n") {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
        status = read();
    }
    for (name, value) in status.lines().filter_map(|line| line.split_once(':')) {
        if STATUS_LINES.contains(&name) {
            fact(facts, name, value.trim());
        }
    }
}

/// Text as it is, anything longer as a hash.
fn printable(bytes: &[u8]) -> String {
    if bytes.len() <= 64 {
        return String::from_utf8_lossy(bytes).into_owned();
    }
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    format!("{} bytes, hash {:x}", bytes.len(), hasher.finish())
}

fn altstack() -> (usize, usize, i32) {
    let mut stack = libc::stack_t { ss_sp: std::ptr::null_mut(), ss_flags: 0, ss_size: 0 };
    // SAFETY: with a null new stack the call only writes the old one into `stack`.
    let result = unsafe { libc::sigaltstack(std::ptr::null(), &raw mut stack) };
    assert_eq!(result, 0, "sigaltstack");
    (stack.ss_sp as usize, stack.ss_size, stack.ss_flags)
}

fn robust_list() -> (i64, usize, usize) {
    let (mut head, mut length) = (0_usize, 0_usize);
    // SAFETY: the kernel writes a pointer and a size into the two words.
    let result = unsafe { libc::syscall(libc::SYS_get_robust_list, 0, &raw mut head, &raw mut length) };
    (result, head, length)
}

fn tid_address() -> (i32, usize) {
    let mut address = 0_usize;
    // SAFETY: the kernel writes a pointer into `address`.
    let result = unsafe { libc::prctl(libc::PR_GET_TID_ADDRESS, &raw mut address) };
    (result, address)
}

fn subreaper() -> i32 {
    let mut value = 0_i32;
    // SAFETY: the kernel writes an int into `value`.
    unsafe { libc::prctl(libc::PR_GET_CHILD_SUBREAPER, &raw mut value) };
    value
}

/// The kernel's view of a signal's action: handler, flags, restorer, mask.
fn action(signal: i32) -> Result<[u64; 4], i32> {
    let mut old = [0_u64; 4];
    // SAFETY: the kernel's struct sigaction on x86_64 is four 64-bit words, and a mask is 8 bytes.
    let result = unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, std::ptr::null::<u64>(), old.as_mut_ptr(), 8) };
    if result == 0 { Ok(old) } else { Err(io::Error::last_os_error().raw_os_error().unwrap_or(0)) }
}

fn itimer_interval(timer: i32) -> (i64, i64) {
    let zero = libc::timeval { tv_sec: 0, tv_usec: 0 };
    let mut value = libc::itimerval { it_interval: zero, it_value: zero };
    // SAFETY: the kernel writes an itimerval into `value`.
    let result = unsafe { libc::getitimer(timer, &raw mut value) };
    assert_eq!(result, 0, "getitimer");
    (value.it_interval.tv_sec, value.it_interval.tv_usec)
}
