//! Processes to look at: this test binary, started again as the test `victim`.

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::{
        signal::{Signal, killpg},
        stat::Mode,
    },
    unistd::{ForkResult, Pid, fork},
};
use std::{
    ffi::CString,
    fs,
    io::{BufRead, BufReader, Write},
    os::{
        fd::{BorrowedFd, IntoRawFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

const SCRIPT: &str = "STANDSTILL_TEST_VICTIM";

/// A process tree that made what a script says and stands still now. Gone when dropped.
pub(super) struct Victim {
    leader: Child,
    /// Its processes, the first one first.
    pub pids: Vec<i32>,
    /// What it says about itself, line by line.
    pub words: Vec<String>,
    /// Where its files are.
    pub dir: tempfile::TempDir,
}

impl Victim {
    /// Starts a victim; `script` is for [`act`].
    pub(super) fn start(script: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        // Not ours: where that is a file, others write to it while the victim is looked at.
        let errors = dir.path().join("errors");
        let mut leader = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "observe::tests::victim::victim", "--nocapture", "--test-threads=1"])
            .env(SCRIPT, script)
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(&errors).unwrap())
            .process_group(0)
            .spawn()
            .unwrap();
        let mut pids = Vec::new();
        let mut words = Vec::new();
        let mut ready = false;
        for line in BufReader::new(leader.stdout.take().unwrap()).lines() {
            let line = line.unwrap();
            match line.split_once(": ") {
                Some(("pid", pid)) => pids.push(pid.parse().unwrap()),
                Some(("word", word)) => words.push(word.into()),
                Some(("ready", _)) => {
                    ready = true;
                    break;
                }
                // The test harness has a word, too.
                _ => {}
            }
        }
        assert!(ready, "the victim of {script:?} failed: {}", fs::read_to_string(&errors).unwrap_or_default());
        Self { leader, pids, words, dir }
    }

    /// Stops the whole tree as job control does.
    pub(super) fn stop(&self) {
        killpg(Pid::from_raw(self.leader.id() as i32), Signal::SIGSTOP).unwrap();
        for pid in &self.pids {
            let stopped = |task: PathBuf| fs::read_to_string(task.join("stat")).unwrap().contains(") T ");
            while !fs::read_dir(format!("/proc/{pid}/task")).unwrap().all(|task| stopped(task.unwrap().path())) {
                std::thread::yield_now();
            }
        }
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = killpg(Pid::from_raw(self.leader.id() as i32), Signal::SIGKILL);
        let _ = self.leader.wait();
    }
}

/// The victim's side. Without a script it is no victim, and has nothing to do.
#[test]
fn victim() {
    let Ok(script) = std::env::var(SCRIPT) else { return };
    end_with_parent();
    // From here on nothing is closed: the descriptors are what the victim is for.
    println!("\npid: {}", std::process::id());
    match script.split_once(' ') {
        Some(("fds", kinds)) => fds(kinds),
        Some(("sharing", _)) => super::restless::share(),
        Some(("renaming", _)) => super::restless::rename(),
        Some(("restless", script)) => super::restless::act(script),
        Some(("attributes", _)) => super::attributes::act(),
        Some(("threads", _)) => super::threads::act(),
        Some(("mappings", _)) => super::vmas::act(),
        Some(("sockets", kinds)) => super::sockets::act(kinds),
        Some(("mounts", _)) => super::files::act_on_mounts(),
        _ => panic!("no such script: {script}"),
    }
    println!("ready: 1");
    std::io::stdout().flush().unwrap();
    stand_still();
}

pub(super) fn stand_still() -> ! {
    loop {
        nix::unistd::pause();
    }
}

/// A test that is killed drops nothing.
pub(super) fn end_with_parent() {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).unwrap();
}

/// Says something to the test.
pub(super) fn say(word: impl std::fmt::Display) {
    println!("word: {word}");
}

/// Splits the tree: the child stands still, its parent goes on.
pub(super) fn branch() {
    std::io::stdout().flush().unwrap();
    // SAFETY: the child only waits for its end.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            end_with_parent();
            stand_still()
        }
        ForkResult::Parent { child } => println!("pid: {child}"),
    }
}

/// Makes one descriptor or two for each letter of `kinds`; an upper case one for the same with FD_CLOEXEC.
fn fds(kinds: &str) {
    let mut made: Vec<RawFd> = Vec::new();
    for (n, kind) in kinds.chars().enumerate() {
        let new = match kind.to_ascii_lowercase() {
            'f' => {
                branch();
                continue;
            }
            // Two descriptors, one description.
            'd' => {
                made.get(n / 2).copied().map(|fd| raw(fcntl(borrow(fd), FcntlArg::F_DUPFD(0)))).into_iter().collect()
            }
            kind => make(kind, n),
        };
        if kind.is_ascii_uppercase() {
            for &fd in &new {
                fcntl(borrow(fd), FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC)).unwrap();
            }
        }
        made.extend(new);
    }
}

fn raw(fd: nix::Result<RawFd>) -> RawFd {
    fd.unwrap()
}

fn borrow(fd: RawFd) -> BorrowedFd<'static> {
    // SAFETY: the victim closes nothing.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

fn open(path: impl AsRef<Path>, flags: OFlag) -> Vec<RawFd> {
    vec![nix::fcntl::open(path.as_ref(), flags, Mode::from_bits_truncate(0o640)).unwrap().into_raw_fd()]
}

fn owned(fds: impl IntoIterator<Item = OwnedFd>) -> Vec<RawFd> {
    fds.into_iter().map(IntoRawFd::into_raw_fd).collect()
}

/// Kinds that [`make`] knows.
pub(super) const KINDS: &str = "abceghijklmnopqrstuvwxy";

fn make(kind: char, n: usize) -> Vec<RawFd> {
    let file = |name: &str| {
        let path = format!("{name}{n}");
        fs::write(&path, vec![b'x'; n]).unwrap();
        path
    };
    let one = |fd: RawFd| {
        assert!(fd >= 0, "kind {kind}: {}", std::io::Error::last_os_error());
        vec![fd]
    };
    match kind {
        'r' => open(file("regular"), OFlag::O_RDWR),
        'a' => open(file("append"), OFlag::O_WRONLY | OFlag::O_APPEND | OFlag::O_NONBLOCK),
        'g' => {
            let fds = open(file("deleted"), OFlag::O_RDWR);
            fs::remove_file(format!("deleted{n}")).unwrap();
            fds
        }
        'o' => open(file("path"), OFlag::O_PATH),
        'l' => {
            std::os::unix::fs::symlink("nowhere", format!("link{n}")).unwrap();
            open(format!("link{n}"), OFlag::O_PATH | OFlag::O_NOFOLLOW)
        }
        'h' => {
            let path = file("hard");
            fs::hard_link(&path, format!("{path}-again")).unwrap();
            open(path, OFlag::O_RDONLY)
        }
        'x' => {
            let deep = PathBuf::from(format!("deep{n}")).join("directory with space/\n/ä");
            fs::create_dir_all(&deep).unwrap();
            open(deep, OFlag::O_DIRECTORY)
        }
        'i' => open(".", OFlag::O_DIRECTORY),
        'u' => open(".", OFlag::O_TMPFILE | OFlag::O_RDWR),
        'p' => {
            let (r, w) = nix::unistd::pipe2(OFlag::O_NONBLOCK).unwrap();
            owned([r, w])
        }
        'q' => {
            nix::unistd::mkfifo(format!("fifo{n}").as_str(), Mode::S_IRWXU).unwrap();
            open(format!("fifo{n}"), OFlag::O_RDWR)
        }
        's' => {
            let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
            owned([a.into(), b.into()])
        }
        't' => owned([std::net::TcpListener::bind("127.0.0.1:0").unwrap().into()]),
        // SAFETY: no memory is passed.
        'e' => one(unsafe { libc::eventfd(3, libc::EFD_SEMAPHORE) }),
        // SAFETY: no memory is passed.
        'v' => one(unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_NONBLOCK) }),
        // SAFETY: no memory is passed.
        'b' => one(unsafe { libc::epoll_create1(0) }),
        // SAFETY: no memory is passed.
        'y' => one(unsafe { libc::inotify_init1(0) }),
        // SAFETY: no memory is passed.
        'w' => one(unsafe { libc::syscall(libc::SYS_pidfd_open, std::process::id(), 0) } as RawFd),
        'm' => {
            // Long ones, too: a name up to 249 bytes.
            let name = CString::new("m".repeat(1 + n * 7 % 249)).unwrap();
            // SAFETY: the name ends with a NUL.
            let fd = one(unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_ALLOW_SEALING) });
            nix::unistd::ftruncate(borrow(fd[0]), n as i64).unwrap();
            fd
        }
        'n' => open("/dev/null", OFlag::O_RDWR),
        'c' => open("/proc/self/status", OFlag::O_RDONLY),
        'j' => open("/dev/ptmx", OFlag::O_RDWR | OFlag::O_NOCTTY),
        'k' => {
            let fd = open(file("moved"), OFlag::O_RDWR);
            nix::unistd::lseek(borrow(fd[0]), n as i64 * 1000, nix::unistd::Whence::SeekSet).unwrap();
            fd
        }
        _ => panic!("no such kind: {kind}"),
    }
}
