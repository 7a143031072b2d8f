//! A process whose first thread has exited while two others live.

use std::cell::RefCell;
use std::fs::File;
use std::io::{Read, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getpid, gettid, pipe};
use standstill_tests::workload::{Checker, fork_child, proc_stat_fields};

/// What the first thread leaves as its status.
const STATUS: i32 = 5;
/// What the others leave, of whom the last one decides what the parent is told.
const LAST: i32 = 9;

static TICKS: AtomicU64 = AtomicU64::new(0);
static ENDING: AtomicU64 = AtomicU64::new(0);

pub(crate) struct Leaderless {
    pid: Pid,
    /// Descriptors to ask it by, and for its answers.
    pipes: RefCell<Option<(File, File)>>,
}

impl Leaderless {
    pub(crate) fn new() -> Self {
        let (its_input, to) = pipe().expect("pipe");
        let (from, its_output) = pipe().expect("pipe");
        let (ours, its) = ((File::from(to), File::from(from)), (File::from(its_input), File::from(its_output)));
        // The descriptors of the other side are closed in each.
        let (pid, ours) = {
            let mut ours = Some(ours);
            let mut its = Some(its);
            let pid = fork_child(|| {
                drop(ours.take());
                let (input, output) = its.take().expect("not used yet");
                run(input, output);
            });
            drop(its);
            (pid, ours)
        };
        let child = Self { pid, pipes: RefCell::new(ours) };
        while child.not_led_by_the_dead().is_some() {
            std::thread::sleep(Duration::from_millis(1));
        }
        child
    }

    /// The state, number of threads and exit status that its stat file tells, if they are not the expected ones.
    fn not_led_by_the_dead(&self) -> Option<String> {
        let stat = match proc_stat_fields(&format!("/proc/{}/stat", self.pid)) {
            Ok(stat) => stat,
            Err(error) => return Some(error.to_string()),
        };
        // Fields 3, 20 and 52 of proc(5).
        let found = [3, 20, 52].map(|n: usize| stat.get(n - 3).cloned().unwrap_or_default());
        (found != ["Z".to_owned(), "3".to_owned(), (STATUS << 8).to_string()]).then(|| found.join(" "))
    }

    pub(crate) fn check(&self, checker: &Checker, end: bool) {
        let mut pipes = self.pipes.borrow_mut();
        let Some((to, from)) = pipes.as_mut() else { return };
        checker.equal("what is not as it was of the leader", &self.not_led_by_the_dead(), &None);
        let waited = waitpid(self.pid, Some(WaitPidFlag::WNOHANG));
        checker.equal("nobody has ended", &waited, &Ok(WaitStatus::StillAlive));
        let mut answer = [0];
        let asked = to.write_all(b"?").and_then(|()| from.read_exact(&mut answer));
        checker.works("ask a process without its leader", asked);
        checker.equal("what it finds", &answer, b"y");
        if end {
            drop(pipes.take());
            let status = waitpid(self.pid, None);
            checker.equal("status of a process without its leader", &status, &Ok(WaitStatus::Exited(self.pid, LAST)));
        }
    }
}

/// Starts the other threads and ends the first.
fn run(mut input: File, mut output: File) {
    let heap = vec![7_u64; 100_000];
    let leader = getpid();
    std::thread::spawn(move || {
        while ENDING.load(Ordering::SeqCst) == 0 {
            TICKS.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(1));
        }
        leave(LAST);
    });
    std::thread::spawn(move || {
        let (own, mut byte) = (gettid(), [0]);
        while input.read_exact(&mut byte).is_ok() {
            let ticks = TICKS.load(Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(20));
            let well = getpid() == leader
                && gettid() == own
                && heap.iter().all(|&word| word == 7)
                && TICKS.load(Ordering::SeqCst) > ticks;
            output.write_all(if well { b"y" } else { b"n" }).expect("answer");
        }
        ENDING.store(1, Ordering::SeqCst);
        leave(LAST);
    });
    std::thread::sleep(Duration::from_millis(20));
    leave(STATUS);
}

/// exit(2) of this thread alone.
fn leave(status: i32) {
    // SAFETY: nothing on the stack of this thread is used by others.
    unsafe { libc::syscall(libc::SYS_exit, status) };
}
