//! Processes that cannot be checkpointed, and must be none the worse for an attempt.
//!
//! Options: `--kind io_uring`, `--kind userfaultfd` (hold such a descriptor), `--kind vfork` (a thread waits for a child
//! that shares its memory, and cannot be stopped meanwhile).

use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use standstill_tests::workload::{Args, Control, Mapping, Meter, SelfState};

fn main() {
    let args = Args::parse();
    let control = Control::new("unsuitable", &args);
    let checker = Arc::clone(&control.checker);
    let kind: String = args.value("kind", String::new());
    let held = match kind.as_str() {
        "io_uring" => Some(io_uring()),
        "userfaultfd" => Some(userfaultfd()),
        "vfork" => {
            std::thread::spawn(wait_for_vfork);
            std::thread::sleep(Duration::from_millis(200));
            None
        }
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

fn own(fd: i64, call: &str) -> OwnedFd {
    if fd < 0 {
        // The test that asked for the descriptor reads this and skips.
        println!("UNAVAILABLE {call}: {}", std::io::Error::last_os_error());
        std::process::exit(4);
    }
    // SAFETY: the descriptor was just made and belongs to nobody else.
    unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).expect("a descriptor")) }
}

extern "C" fn wait_for_ever(_: *mut libc::c_void) -> i32 {
    loop {
        // SAFETY: pause takes nothing, and the child of a vfork may call it.
        unsafe { libc::pause() };
    }
}

/// Makes a child as vfork(2) does, with a stack of its own; the kernel keeps this thread waiting until the child ends.
fn wait_for_vfork() {
    let stack = Mapping::private(64 << 10).expect("map a stack");
    let top = (stack.start() + stack.length()) as *mut libc::c_void;
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: the child runs on its own stack and only calls pause; it is killed by the test.
    let child = unsafe { libc::clone(wait_for_ever, top, flags, std::ptr::null_mut()) };
    assert!(child > 0, "clone");
}
