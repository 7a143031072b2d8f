//! Descriptors of processes: of one that has been waited for (several, also in a child), of one that was killed, of a zombie,
//! and of the process itself, with all flags, and watched by epoll.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::fstat;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::{Pid, dup, getpid};
use standstill_tests::workload::{Args, Checker, Control, fork_child};

const NONBLOCK: i32 = libc::O_NONBLOCK;
const THREAD: i32 = libc::O_EXCL;

fn pidfd_open(pid: Pid, flags: i32) -> OwnedFd {
    // SAFETY: the call takes numbers, and what it returns is owned by nobody else.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), flags);
        assert!(fd >= 0, "pidfd_open: {}", io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd as i32)
    }
}

/// The wait status of a process that has been waited for.
fn exit_status(fd: &OwnedFd) -> Result<i32, Errno> {
    let mut info = [0_u64; 8];
    info[0] = 8; // PIDFD_INFO_EXIT
    // SAFETY: PIDFD_GET_INFO of this size writes 64 bytes.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), 0xc040_ff0b, info.as_mut_ptr()) })?;
    if info[0] & 8 == 0 { Err(Errno::ENODATA) } else { Ok((info[7] >> 32) as i32) }
}

fn same_file(a: &OwnedFd, b: &OwnedFd) -> bool {
    let pid = std::process::id();
    // SAFETY: kcmp takes numbers.
    unsafe { libc::syscall(libc::SYS_kcmp, pid, pid, 0, a.as_raw_fd(), b.as_raw_fd()) == 0 }
}

struct PidFds {
    /// Of a process that ended with status 7: one, another, and the first once more.
    exited: [OwnedFd; 3],
    /// Of one that was killed.
    killed: OwnedFd,
    /// Of one that nobody has waited for, who is the child of this one.
    zombie: OwnedFd,
    parent: Pid,
    /// Of this process or its parent.
    root: [OwnedFd; 2],
    watch: Epoll,
}

impl PidFds {
    fn new() -> Self {
        let exited = fork_child(|| std::process::exit(7));
        let first = pidfd_open(exited, 0);
        let second = pidfd_open(exited, NONBLOCK);
        assert_eq!(waitpid(exited, None), Ok(WaitStatus::Exited(exited, 7)));
        let third = dup(&first).expect("dup");
        let killed = fork_child(nix::unistd::pause);
        let fd = pidfd_open(killed, THREAD);
        kill(killed, Signal::SIGKILL).expect("kill");
        waitpid(killed, None).expect("wait");
        let zombie = fork_child(|| std::process::exit(3));
        waitid(Id::Pid(zombie), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT).expect("await a zombie");
        let watch = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("epoll");
        let root = [pidfd_open(getpid(), 0), pidfd_open(getpid(), THREAD | NONBLOCK)];
        for (data, of) in [&second, &root[0]].into_iter().enumerate() {
            watch.add(of, EpollEvent::new(EpollFlags::EPOLLIN, data as u64)).expect("add to epoll");
        }
        let zombie = pidfd_open(zombie, 0);
        Self { exited: [first, second, third], killed: fd, zombie, parent: getpid(), root, watch }
    }

    fn check(&self, checker: &Checker) {
        let field = |fd: &OwnedFd, name: &str| {
            let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).unwrap_or_default();
            text.lines().find_map(|l| Some(l.strip_prefix(name)?.trim_start_matches(':').trim().to_owned()))
        };
        let ino = |fd: &OwnedFd| fstat(fd).map(|s| s.st_ino);
        let ready = |fd: &OwnedFd| {
            let mut fds = [PollFd::new(std::os::fd::AsFd::as_fd(fd), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::ZERO)
        };
        let flags = |fd: &OwnedFd| fcntl(fd, FcntlArg::F_GETFL).map(|f| f & (NONBLOCK | THREAD));
        let [first, second, third] = &self.exited;
        for (what, fd, status) in [
            ("exited", first, 7 << 8),
            ("exited", second, 7 << 8),
            ("exited", third, 7 << 8),
            ("killed", &self.killed, 9),
        ] {
            checker.equal(&format!("process of {what}"), &field(fd, "Pid").as_deref(), &Some("-1"));
            checker.equal(&format!("status of {what}"), &exit_status(fd), &Ok(status));
            checker.equal(&format!("poll of {what}"), &ready(fd), &Ok(1));
            // SAFETY: no signal information is given.
            let sent = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd.as_raw_fd(), 0, 0_usize, 0) };
            checker.equal(&format!("signal to {what}"), &Errno::result(sent), &Err(Errno::ESRCH));
        }
        checker.equal("flags", &[first, second, &self.killed].map(flags), &[Ok(0), Ok(NONBLOCK), Ok(THREAD)]);
        checker.equal(
            "flags of the living",
            &[&self.root[0], &self.root[1]].map(flags),
            &[Ok(0), Ok(NONBLOCK | THREAD)],
        );
        checker.equal("inodes of one process", &[ino(second), ino(third)], &[ino(first), ino(first)]);
        checker.that(ino(first) != ino(&self.killed), || "two processes have become one".into());
        checker.equal("open files", &(same_file(first, third), same_file(first, second)), &(true, false));
        for fd in &self.root {
            checker.equal("process of the root", &field(fd, "Pid"), &Some(self.parent.to_string()));
            checker.equal("poll of the root", &ready(fd), &Ok(0));
        }
        checker.equal("poll of a zombie", &ready(&self.zombie), &Ok(1));
        if getpid() == self.parent {
            let options = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT | WaitPidFlag::WNOHANG;
            let status = waitid(Id::PIDFd(std::os::fd::AsFd::as_fd(&self.zombie)), options);
            checker.that(matches!(status, Ok(WaitStatus::Exited(_, 3))), || format!("the zombie is {status:?}"));
        }
        let mut events = [EpollEvent::empty(); 4];
        let events =
            self.watch.wait(&mut events, EpollTimeout::ZERO).map(|n| events[..n].iter().map(|e| e.data()).collect());
        checker.equal("events", &events, &Ok(vec![0_u64]));
    }
}

fn main() {
    let args = Args::parse();
    let mut control = Control::new("pidfds", &args);
    let fds = PidFds::new();
    let child = control.for_child("child");
    let child = fork_child(|| serve(child, &fds));
    control.adopt(child, "child");
    control.ready();
    serve(control, &fds);
}

fn serve(control: Control, fds: &PidFds) {
    let checker = std::sync::Arc::clone(&control.checker);
    control.serve(None, Duration::from_millis(200), |_| fds.check(&checker));
}
