//! Processes under seccomp(2): chains of filters, threads with filters of their own, filters installed with privileges
//! that are gone since, strict mode. Threads that make a forbidden system call all the time notice any moment in which
//! their filters are not there.
//!
//! Options: `--supervisor` (a filter that asks a supervisor).

mod filter;

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::unistd::{Gid, Pid, Uid, setgroups, setresgid, setresuid};
use standstill_tests::workload::{Args, Checker, Control, Meter, SelfState, fork_child};

use filter::{LOG, SYNC, ask_supervisor, deny, errno_of, synchronize};

const EVERY: Duration = Duration::from_millis(200);

/// System calls that nobody needs here, with the errno that a filter gives.
const FIRST: (i64, i32) = (libc::SYS_getpriority, 77);
const SECOND: (i64, i32) = (libc::SYS_sched_get_priority_max, 78);
const THIRD: (i64, i32) = (libc::SYS_sched_get_priority_min, 79);

fn main() {
    let args = Args::parse();
    let mut control = Control::new("seccomp", &args);
    let checker = Arc::clone(&control.checker);
    // They must be able to write their verdicts.
    fs::set_permissions(args.dir(), fs::Permissions::from_mode(0o777)).expect("open the directory");
    let members = [
        member(&mut control, "threads", threads_of_their_own),
        member(&mut control, "synchronized", threads_alike),
        member(&mut control, "unprivileged", without_privileges),
    ];
    let mut strict = Strict::new();
    if args.flag("supervisor") {
        ask_supervisor(THIRD.0);
    }
    control.collect();
    let meter = Meter::start(Duration::from_millis(1));
    let before = SelfState::of_process().without(&["parent"]);
    control.ready();
    control.serve(Some(&meter), EVERY, |request| {
        SelfState::of_process().check(&checker, "root", &before);
        let modes = members.map(|pid| status(pid, "Seccomp"));
        checker.equal("modes of members", &modes, &std::array::from_fn(|_| "2".to_owned()));
        strict.check(&checker);
        if request == standstill_tests::workload::Request::End {
            strict.end(&checker);
        }
    });
}

fn member(control: &mut Control, name: &'static str, run: fn(Control) -> !) -> Pid {
    let child = control.for_child(name);
    let pid = fork_child(move || run(child));
    control.adopt(pid, name);
    pid
}

fn status(pid: Pid, field: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let value = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    value.unwrap_or_default().trim().to_owned()
}

fn check_calls(checker: &Checker, who: &str, wanted: [i32; 3]) {
    let found = [FIRST, SECOND, THIRD].map(|(call, _)| errno_of(call));
    checker.equal(&format!("what the filters say to {who}"), &found, &wanted);
}

/// How many system calls got past a filter.
static ESCAPED: AtomicU64 = AtomicU64::new(0);

/// Makes forbidden calls all the time.
fn spin(forbidden: &[(i64, i32)], allowed: &[i64]) -> ! {
    loop {
        let wrong = forbidden.iter().any(|&(call, errno)| errno_of(call) != errno)
            || allowed.iter().any(|&call| errno_of(call) != 0);
        ESCAPED.fetch_add(u64::from(wrong), Ordering::Relaxed);
    }
}

fn serve(control: Control, who: &'static str, wanted: [i32; 3], each: impl Fn(&Checker)) -> ! {
    let checker = Arc::clone(&control.checker);
    let before = SelfState::of_process();
    control.serve(None, EVERY, |request| {
        SelfState::of_process().check(&checker, who, &before);
        check_calls(&checker, who, wanted);
        checker.equal("calls that got past a filter", &ESCAPED.load(Ordering::Relaxed), &0);
        if request.thorough() {
            each(&checker);
        }
    })
}

/// One filter for all threads, others for one thread each.
fn threads_of_their_own(control: Control) -> ! {
    deny(FIRST.0, FIRST.1, 0);
    std::thread::spawn(|| spin(&[FIRST], &[SECOND.0, THIRD.0]));
    let (sender, installed) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        deny(THIRD.0, THIRD.1, 0);
        sender.send(()).expect("the first thread waits");
        spin(&[FIRST, THIRD], &[SECOND.0])
    });
    installed.recv().expect("the third thread answers");
    deny(SECOND.0, SECOND.1, LOG);
    // The same filter twice is two of a chain.
    deny(SECOND.0, SECOND.1, LOG);
    serve(control, "threads", [FIRST.1, SECOND.1, 0], |_| {})
}

/// The same filters for all threads, which stay the same.
fn threads_alike(control: Control) -> ! {
    std::thread::spawn(|| {
        loop {
            std::thread::park();
        }
    });
    deny(FIRST.0, FIRST.1, SYNC);
    deny(THIRD.0, THIRD.1, SYNC);
    serve(control, "synchronized", [FIRST.1, 0, THIRD.1], |checker| {
        checker.works("synchronize the filters of all threads", synchronize());
    })
}

/// Filters that only root could install, whose privileges are gone.
fn without_privileges(control: Control) -> ! {
    deny(SECOND.0, SECOND.1, 0);
    let (user, group) = (Uid::from_raw(65534), Gid::from_raw(65534));
    setgroups(&[]).expect("setgroups");
    setresgid(group, group, group).expect("setresgid");
    setresuid(user, user, user).expect("setresuid");
    // SAFETY: the option takes no pointers.
    assert_eq!(unsafe { libc::prctl(libc::PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) }, 0, "no_new_privs");
    serve(control, "unprivileged", [0, SECOND.1, 0], |checker| {
        let refused = synchronize().map_err(|e| e.raw_os_error());
        checker.equal("a further filter", &refused, &Err(Some(libc::EACCES)));
    })
}

/// A child in strict mode, which gives back each byte that it is sent.
struct Strict {
    pid: Pid,
    to: Option<fs::File>,
    from: fs::File,
}

impl Strict {
    fn new() -> Self {
        let (its_input, to) = nix::unistd::pipe().expect("pipe");
        let (from, its_output) = nix::unistd::pipe().expect("pipe");
        let numbers = (to.as_raw_fd(), its_input.as_raw_fd(), its_output.as_raw_fd());
        let pid = fork_child(move || echo(numbers));
        drop((its_input, its_output));
        let mut strict = Self { pid, to: Some(to.into()), from: from.into() };
        assert_eq!(strict.ask(), Ok(7), "the first echo"); // from then on it is in strict mode
        strict
    }

    fn ask(&mut self) -> Result<u8, std::io::ErrorKind> {
        let mut byte = [7];
        let to = self.to.as_mut().expect("not at its end");
        to.write_all(&byte).and_then(|()| self.from.read_exact(&mut byte)).map_err(|e| e.kind())?;
        Ok(byte[0])
    }

    fn check(&mut self, checker: &Checker) {
        if self.to.is_some() {
            checker.equal("mode of the strict one", &status(self.pid, "Seccomp").as_str(), &"1");
            checker.equal("echo of the strict one", &self.ask(), &Ok(7));
        }
    }

    /// The end of its input is its end.
    fn end(&mut self, checker: &Checker) {
        self.to = None;
        let ended = nix::sys::wait::waitpid(self.pid, None);
        let wanted = Ok(nix::sys::wait::WaitStatus::Exited(self.pid, 5));
        checker.equal("end of the strict one", &ended, &wanted);
    }
}

/// `numbers`: the writing end to close, where to read from, where to write to.
fn echo((close, from, to): (i32, i32, i32)) {
    let mut byte = 0_u8;
    // SAFETY: the descriptors are this process's own copies; memory is of this frame. In strict mode only these calls
    // are allowed, and exit(2), which exit(3) does not make.
    unsafe {
        libc::close(close);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_STRICT, 0, 0, 0), 0, "strict mode");
        while libc::read(from, (&raw mut byte).cast(), 1) == 1 {
            libc::write(to, (&raw const byte).cast(), 1);
        }
        libc::syscall(libc::SYS_exit, 5);
    }
}
