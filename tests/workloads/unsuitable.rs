//! Processes that cannot be checkpointed, and must be none the worse for an attempt.
//!
//! Options: `--kind io_uring`, `--kind userfaultfd` (hold such a descriptor), `--kind vfork` (a thread waits for a child
//! that shares its memory, and cannot be stopped meanwhile), `--kind CLONE_VM` (a grandchild that shares memory, whose parent does not), `--kind
//! CLONE_FILES`, `--kind CLONE_FS` (a thread that does not share), `--kind "pidfd of process"` (its parent), `--kind "pidfd
//! of thread"` (another than the first), `--kind "requests in flight"` (of io_submit, for what never happens), `--kind
//! SCM_RIGHTS`, `--kind SCM_CREDENTIALS`, `--kind "urgent data"` (wait in a socket), `--kind "outside the tree"` (the peer of
//! a socket belongs to an orphan).

use std::fs;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, recv, sendmsg, setsockopt, socketpair, sockopt,
};
use nix::sys::wait::waitpid;
use standstill_tests::workload::{Args, Control, Mapping, Meter, SelfState, fork_child};

fn main() {
    let args = Args::parse();
    let control = Control::new("unsuitable", &args);
    let checker = Arc::clone(&control.checker);
    let kind: String = args.value("kind", String::new());
    let held = match kind.as_str() {
        "io_uring" => Some(io_uring()),
        "userfaultfd" => Some(userfaultfd()),
        "vfork" => {
            std::thread::spawn(|| clone_with_memory(wait_for_ever, libc::CLONE_VFORK));
            std::thread::sleep(Duration::from_millis(200));
            None
        }
        "CLONE_VM" => {
            clone_with_memory(go_between, 0);
            std::thread::sleep(Duration::from_millis(300));
            None
        }
        "pidfd of process" => Some(pidfd(std::os::unix::process::parent_id().cast_signed(), 0)),
        "pidfd of thread" => {
            let (sender, receiver) = std::sync::mpsc::channel();
            std::thread::spawn(move || {
                sender.send(nix::unistd::gettid().as_raw()).expect("the main thread waits");
                loop {
                    std::thread::park();
                }
            });
            Some(pidfd(receiver.recv().expect("a thread id"), libc::O_EXCL))
        }
        "requests in flight" => Some(requests_in_flight()),
        "CLONE_FILES" => go_apart(libc::CLONE_FILES),
        "CLONE_FS" => go_apart(libc::CLONE_FS),
        "SCM_RIGHTS" => Some(socket(|from, _| {
            let fds = [from];
            say(from, &[ControlMessage::ScmRights(&fds)], MsgFlags::empty());
        })),
        "SCM_CREDENTIALS" => Some(socket(|from, to| {
            setsockopt(to, sockopt::PassCred, &true).expect("SO_PASSCRED");
            say(from, &[], MsgFlags::empty());
        })),
        "urgent data" => Some(socket(|from, _| say(from, &[], MsgFlags::MSG_OOB))),
        "outside the tree" => Some(with_a_peer_outside()),
        other => panic!("--kind {other:?} is unknown"),
    };
    let link = |fd: &OwnedFd| fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok();
    let name = held.as_ref().map(link);
    let meter = Meter::start(Duration::from_millis(1));
    let before = SelfState::of_process().without(&["parent"]);
    control.ready();
    control.serve(Some(&meter), Duration::from_millis(100), |_| {
        SelfState::of_process().check(&checker, "process", &before);
        checker.equal("name of the descriptor", &held.as_ref().map(link), &name);
    });
}

fn io_uring() -> OwnedFd {
    // struct io_uring_params: 120 bytes, all zero is valid.
    let mut parameters = [0_u64; 15];
    // SAFETY: the kernel reads and writes the parameters, which have their full size.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, parameters.as_mut_ptr()) };
    own(fd, "io_uring_setup")
}

fn userfaultfd() -> OwnedFd {
    // SAFETY: the call takes flags only.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    own(fd, "userfaultfd")
}

/// Waits for a pipe by AIO.
fn requests_in_flight() -> OwnedFd {
    const POLL: u64 = 5;
    let (reader, writer) = nix::unistd::pipe().expect("pipe");
    let mut context = 0_u64;
    // SAFETY: the calls read and write the words given to them.
    unsafe {
        let made = libc::syscall(libc::SYS_io_setup, 4, &raw mut context);
        assert_eq!(made, 0, "io_setup");
        let request = [1, 0, (reader.as_raw_fd() as u64) << 32 | POLL, libc::POLLIN as u64, 0, 0, 0, 0_u64];
        let requests = [&raw const request];
        assert_eq!(libc::syscall(libc::SYS_io_submit, context, 1, requests.as_ptr()), 1, "io_submit");
    }
    std::mem::forget(writer);
    reader
}

fn pidfd(pid: i32, flags: i32) -> OwnedFd {
    // SAFETY: the call takes numbers.
    own(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, flags) }, "pidfd_open")
}

fn own(fd: i64, call: &str) -> OwnedFd {
    if fd < 0 {
        // The test that asked for the descriptor reads this and skips.
        println!("UNAVAILABLE {call}: {}", std::io::Error::last_os_error());
        std::process::exit(4);
    }
    // SAFETY: the descriptor was just made and belongs to nobody else.
    unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).expect("a descriptor")) }
}

/// One end of a socket pair, of which the other one stays open. `prepare` gets both.
fn socket(prepare: impl FnOnce(RawFd, &OwnedFd)) -> OwnedFd {
    let (held, other) = pair();
    prepare(other.into_raw_fd(), &held);
    held
}

fn pair() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC).expect("socketpair")
}

fn say(from: RawFd, control: &[ControlMessage<'_>], flags: MsgFlags) {
    sendmsg::<()>(from, &[IoSlice::new(b"x")], control, flags, None).expect("send");
}

/// One end of a socket pair, of which an orphan has the other one. It ends when ours is closed.
fn with_a_peer_outside() -> OwnedFd {
    let (held, other) = pair();
    let child = fork_child(|| {
        _ = fork_child(|| {
            // SAFETY: the descriptor is a copy of the parent's and not used here.
            unsafe { libc::close(held.as_raw_fd()) };
            _ = recv(other.as_raw_fd(), &mut [0], MsgFlags::empty());
        });
    });
    waitpid(child, None).expect("wait for the orphan's parent");
    held
}

extern "C" fn wait_for_ever(_: *mut libc::c_void) -> i32 {
    loop {
        // SAFETY: pause takes nothing, and the child of a vfork may call it.
        unsafe { libc::pause() };
    }
}

/// Has a child that shares the memory, and another program for itself.
extern "C" fn go_between(stack: *mut libc::c_void) -> i32 {
    let arguments = [c"sleep".as_ptr(), c"900".as_ptr(), std::ptr::null()];
    // SAFETY: the child has the lower half of the stack for itself; execve takes over nothing of this memory.
    unsafe {
        let half = stack.wrapping_byte_sub(32 << 10);
        libc::clone(wait_for_ever, half, libc::CLONE_VM | libc::SIGCHLD, std::ptr::null_mut());
        libc::execv(c"/bin/sleep".as_ptr(), arguments.as_ptr())
    }
}

/// Makes a child that shares the memory, with a stack of its own. With CLONE_VFORK, as vfork(2) does, the kernel keeps
/// this thread waiting until the child ends.
fn clone_with_memory(body: extern "C" fn(*mut libc::c_void) -> i32, flags: i32) {
    let stack = Mapping::private(64 << 10).expect("map a stack");
    let top = (stack.start() + stack.length()) as *mut libc::c_void;
    let flags = flags | libc::CLONE_VM | libc::SIGCHLD;
    // SAFETY: the child runs on its own stack and makes system calls only; it is killed by the test.
    let child = unsafe { libc::clone(body, top, flags, top) };
    assert!(child > 0, "clone");
}

/// Starts a thread that has something of its own.
fn go_apart(flags: i32) -> Option<OwnedFd> {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        // SAFETY: the call takes flags only.
        sender.send(unsafe { libc::unshare(flags) }).expect("the main thread waits");
        loop {
            std::thread::park();
        }
    });
    assert_eq!(receiver.recv(), Ok(0), "unshare");
    None
}
