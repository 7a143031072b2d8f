//! A process that waits for a file system that does not answer: a FUSE server that says what it is, and nothing more. Such a
//! wait ends with the answer or with the connection, and no signal but SIGKILL interrupts it.
//!
//! The file system is mounted nowhere. A child opens a file in it, and learns at the end that the server is gone.

use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::wait::{WaitStatus, waitpid};
use standstill_tests::workload::{Args, Control, Meter, Request, SelfState, fork_child};

fn main() {
    let args = Args::parse();
    let mut control = Control::new("unanswered", &args);
    let checker = Arc::clone(&control.checker);
    let mut server = Some(device());
    let mount = mount(server.as_ref().expect("just opened"));
    let reader = fork_child(|| {
        drop(server.take());
        open_there(&mount);
    });
    let member = control.for_child("member");
    let other = fork_child(|| {
        drop(server.take());
        let before = SelfState::of_process();
        let checker = Arc::clone(&member.checker);
        member.serve(None, Duration::from_millis(100), |_| SelfState::of_process().check(&checker, "member", &before));
    });
    control.adopt(other, "member");
    drop(mount);
    let opcodes = [INIT, LOOKUP].map(|_| serve(server.as_mut().expect("the parent has it")));
    assert_eq!(opcodes, [INIT, LOOKUP], "requests");
    let meter = Meter::start(Duration::from_millis(1));
    let before = SelfState::of_process().without(&["parent"]);
    control.ready();
    control.serve(Some(&meter), Duration::from_millis(100), |request| {
        SelfState::of_process().check(&checker, "root", &before);
        if request == Request::End {
            drop(server.take());
            checker.equal("end of who waited", &waitpid(reader, None), &Ok(WaitStatus::Exited(reader, 7)));
        }
    });
}

const INIT: u32 = 26;
const LOOKUP: u32 = 1;

fn device() -> File {
    File::options().read(true).write(true).open("/dev/fuse").unwrap_or_else(|e| unavailable("/dev/fuse", &e))
}

fn unavailable(what: &str, error: &std::io::Error) -> ! {
    println!("UNAVAILABLE {what}: {error}");
    std::process::exit(4);
}

/// A mount of a file system with this server, which no directory leads to.
fn mount(server: &File) -> OwnedFd {
    const SET_STRING: u32 = 1;
    const CREATE: u32 = 6;
    let check = |what: &str, result: i64| match result {
        0.. => result as i32,
        _ => unavailable(what, &std::io::Error::last_os_error()),
    };
    let null = std::ptr::null::<libc::c_char>();
    // SAFETY: all texts are strings that live during the calls; returned descriptors are new and ours.
    unsafe {
        let context = check("fsopen", libc::syscall(libc::SYS_fsopen, c"fuse".as_ptr(), 1));
        let context = OwnedFd::from_raw_fd(context);
        let configure = |command: u32, key: *const libc::c_char, value: *const libc::c_char| {
            check("fsconfig", libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, key, value, 0));
        };
        let server = CString::new(server.as_raw_fd().to_string()).expect("a number");
        let options = [(c"fd", &*server), (c"rootmode", c"40000"), (c"user_id", c"0"), (c"group_id", c"0")];
        for (key, value) in options {
            configure(SET_STRING, key.as_ptr(), value.as_ptr());
        }
        configure(CREATE, null, null);
        let mount = check("fsmount", libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), 1, 0));
        OwnedFd::from_raw_fd(mount)
    }
}

/// Waits until somebody answers, or nobody can any more.
fn open_there(mount: &OwnedFd) {
    // SAFETY: the name is a string.
    let fd = unsafe { libc::openat(mount.as_raw_fd(), c"file".as_ptr(), libc::O_RDONLY) };
    let error = std::io::Error::last_os_error().raw_os_error();
    let ended = fd < 0 && matches!(error, Some(libc::ENOTCONN | libc::ECONNABORTED));
    std::process::exit(if ended { 7 } else { 8 });
}

/// Takes a request, and answers if it is the first; what it was.
fn serve(server: &mut File) -> u32 {
    let mut request = vec![0; 1 << 17];
    let length = server.read(&mut request).expect("read a request");
    let word = |n: usize| u32::from_ne_bytes(request[4 * n..4 * n + 4].try_into().expect("four bytes"));
    assert!(length >= 40, "a request of {length} bytes");
    // struct fuse_in_header: len, opcode, unique, …
    let opcode = word(1);
    if opcode == INIT {
        // struct fuse_out_header (len, error, unique) and fuse_init_out (major, minor, …, max_write as the sixth word).
        let mut answer = [0_u32; 20];
        answer[0] = 80;
        (answer[2], answer[3]) = (word(2), word(3));
        (answer[4], answer[5], answer[9]) = (7, 31, 4096);
        let bytes: Vec<u8> = answer.iter().flat_map(|w| w.to_ne_bytes()).collect();
        server.write_all(&bytes).expect("answer");
    }
    opcode
}
