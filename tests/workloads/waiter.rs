//! A process that waits for its children in every way that there is, and would notice one that is not its own. Signals of
//! a timer come all the time.
//!
//! Options: `--memory MiB` (default 64), `--orphans` (orphans become its children), `--limit` (as a user who may have no
//! further process),
//! `--no-clones` (it waits for ordinary children only), `--filter` (under a filter that allows everything).

use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, Uid, pipe2, setresuid};
use standstill_tests::workload::{Args, Checker, Control, Mapping, Pattern, fork_child};

/// How many times SIGCHLD came.
static ENDS: AtomicU64 = AtomicU64::new(0);
/// How many times SIGALRM came.
static TICKS: AtomicU64 = AtomicU64::new(0);

extern "C" fn count(signal: libc::c_int) {
    let counter = if signal == libc::SIGCHLD { &ENDS } else { &TICKS };
    counter.fetch_add(1, Ordering::Relaxed);
}

fn main() {
    let args = Args::parse();
    let control = Control::new("waiter", &args);
    let memory = Mapping::private(args.value("memory", 64) << 20).expect("map memory");
    memory.advise(libc::MADV_NOHUGEPAGE).expect("advice about huge pages");
    let pattern = Pattern::new(9);
    pattern.fill(memory.words_mut(), 0);
    if args.flag("orphans") {
        nix::sys::prctl::set_child_subreaper(true).expect("become a subreaper");
    }
    let child = fork_child(|| {
        loop {
            nix::unistd::pause();
        }
    });
    let action = SigAction::new(SigHandler::Handler(count), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGCHLD, Signal::SIGALRM] {
        // SAFETY: the handler only adds to atomic numbers.
        unsafe { sigaction(signal, &action) }.expect("handle a signal");
    }
    let tick = libc::timeval { tv_sec: 0, tv_usec: 500 };
    let timer = libc::itimerval { it_interval: tick, it_value: tick };
    // SAFETY: `timer` is read, and the old value is not asked for.
    let set = unsafe { libc::syscall(libc::SYS_setitimer, libc::ITIMER_REAL, &raw const timer, 0) };
    assert_eq!(set, 0, "set a timer");
    let checker = Arc::clone(&control.checker);
    if args.flag("filter") {
        filter();
    }
    let flags = if args.flag("no-clones") { WaitPidFlag::empty() } else { WaitPidFlag::__WALL };
    std::thread::spawn(move || {
        let ended = waitpid(None, Some(flags));
        checker.that(ended == Ok(WaitStatus::StillAlive), || format!("waiting for any child has ended: {ended:?}"));
    });
    if args.flag("limit") {
        let nobody = Uid::from_raw(65_534);
        nix::unistd::chown(&args.dir(), Some(nobody), None).expect("give the directory away");
        setresuid(nobody, nobody, nobody).expect("become nobody");
        setrlimit(Resource::RLIMIT_NPROC, 1, 1).expect("limit processes");
    }
    control.ready();
    let checker = Arc::clone(&control.checker);
    let mut pipe = open();
    control.serve(None, Duration::from_millis(5), |request| {
        check_children(&checker, child);
        check_end(&checker, std::mem::replace(&mut pipe, open()));
        if request.thorough() {
            checker.figure("ticks", TICKS.load(Ordering::Relaxed));
            let wrong = pattern.first_wrong(memory.words(), 0);
            checker.equal("first wrong word", &wrong, &None);
        }
    });
}

/// Puts this process under a seccomp filter.
fn filter() {
    let mut allow =
        libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW };
    let program = libc::sock_fprog { len: 1, filter: &raw mut allow };
    nix::sys::prctl::set_no_new_privs().expect("set no_new_privs");
    // SAFETY: `program` is a filter of one instruction, which the kernel copies.
    let set = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
    assert_eq!(set, 0, "set a filter");
}

fn open() -> (OwnedFd, OwnedFd) {
    pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).expect("pipe")
}

/// There is one child, and nothing to be waited for.
fn check_children(checker: &Checker, child: Pid) {
    let threads = fs::read_dir("/proc/self/task").expect("list the threads").flatten();
    let lists = threads.map(|thread| fs::read_to_string(thread.path().join("children")).unwrap_or_default());
    checker.equal("children", &lists.collect::<String>().trim(), &child.to_string().as_str());
    let flags = WaitPidFlag::WNOHANG;
    checker.equal(
        "status of any child",
        &waitpid(None, Some(flags | WaitPidFlag::__WALL)),
        &Ok(WaitStatus::StillAlive),
    );
    checker.equal("status of a clone", &waitpid(None, Some(flags | WaitPidFlag::__WCLONE)), &Err(Errno::ECHILD));
    checker.equal("SIGCHLD", &ENDS.load(Ordering::Relaxed), &0);
}

/// A pipe ends when its writer closes it.
fn check_end(checker: &Checker, (read, write): (OwnedFd, OwnedFd)) {
    drop(write);
    let mut read = fs::File::from(read);
    let ended = (0..100).any(|_| {
        let result = read.read(&mut [0]);
        if result.is_err() {
            std::thread::sleep(Duration::from_millis(1));
        }
        matches!(result, Ok(0))
    });
    checker.that(ended, || "somebody else has the writing end of a pipe".to_owned());
}
