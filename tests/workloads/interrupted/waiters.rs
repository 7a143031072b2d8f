//! Threads that wait for something to happen, for ever if need be.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, kill, sigaction};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use standstill_tests::workload::{Checker, fork_child, now_us};

/// Handled by the threads in pause and sigsuspend, which count it here.
const WAKE: Signal = Signal::SIGALRM;
static HANDLED: AtomicU64 = AtomicU64::new(0);

extern "C" fn count_signal(_: i32) {
    HANDLED.fetch_add(1, Ordering::SeqCst);
}

/// What wakes the threads, and what they report.
struct Shared {
    checker: Arc<Checker>,
    futex: AtomicU32,
    events: EventFd,
    child: AtomicI32,
    /// No further child is to be made.
    ending: AtomicBool,
    rounds: [AtomicU64; Kind::ALL.len()],
}

/// What a thread waits in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Futex,
    EpollWait,
    PipeRead,
    WaitPid,
    Pause,
    SigSuspend,
    Accept,
}

impl Kind {
    const ALL: [Self; 7] =
        [Self::Futex, Self::EpollWait, Self::PipeRead, Self::WaitPid, Self::Pause, Self::SigSuspend, Self::Accept];
}

pub(crate) struct Waiters {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    pipe: File,
    address: std::os::unix::net::SocketAddr,
}

impl Waiters {
    pub(crate) fn start(checker: &Arc<Checker>) -> Self {
        let action = SigAction::new(SigHandler::Handler(count_signal), SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler only adds to an atomic.
        unsafe { sigaction(WAKE, &action) }.expect("sigaction");
        let mut mask = SigSet::empty();
        mask.add(WAKE);
        mask.thread_block().expect("block the wake signal");
        let (pipe_out, pipe_in) = nix::unistd::pipe().expect("pipe");
        let name = format!("interrupted-{}", std::process::id());
        let address = <std::os::unix::net::SocketAddr as std::os::linux::net::SocketAddrExt>::from_abstract_name(name)
            .expect("an abstract address");
        let listener = UnixListener::bind_addr(&address).expect("bind");
        let shared = Arc::new(Shared {
            checker: Arc::clone(checker),
            futex: AtomicU32::new(0),
            events: EventFd::from_flags(EfdFlags::EFD_CLOEXEC).expect("eventfd"),
            child: AtomicI32::new(0),
            ending: AtomicBool::new(false),
            rounds: Default::default(),
        });
        let mut pipe_out = Some(pipe_out);
        let mut listener = Some(listener);
        let threads = Kind::ALL
            .into_iter()
            .map(|kind| {
                let shared = Arc::clone(&shared);
                let pipe = pipe_out.take_if(|_| kind == Kind::PipeRead);
                let listener = listener.take_if(|_| kind == Kind::Accept);
                let body = move || match kind {
                    Kind::Futex => shared.run(kind, wait_futex),
                    Kind::EpollWait => wait_epoll_forever(&shared),
                    Kind::PipeRead => read_forever(&shared, pipe.expect("the pipe")),
                    Kind::WaitPid => shared.run(kind, wait_child),
                    Kind::Pause => shared.run(kind, wait_pause),
                    Kind::SigSuspend => shared.run(kind, wait_suspend),
                    Kind::Accept => accept_forever(&shared, &listener.expect("the listener")),
                };
                thread::Builder::new().name(format!("{kind:?}")).spawn(body).expect("thread")
            })
            .collect();
        Self { shared, threads, pipe: File::from(pipe_in), address }
    }

    /// Wakes every thread and waits until each has been round once more.
    pub(crate) fn wake_all(&self) {
        let before = self.shared.rounds.each_ref().map(|rounds| rounds.load(Ordering::SeqCst));
        for kind in Kind::ALL {
            self.wake(kind);
        }
        let limit = now_us() + 5_000_000;
        for kind in Kind::ALL {
            let rounds = &self.shared.rounds[kind as usize];
            while rounds.load(Ordering::SeqCst) == before[kind as usize] && now_us() < limit {
                thread::sleep(Duration::from_millis(1));
            }
            let now = rounds.load(Ordering::SeqCst);
            self.shared.checker.equal(&format!("rounds of {kind:?}"), &now, &(before[kind as usize] + 1));
        }
    }

    /// Ends the child that one of the threads waits for.
    pub(crate) fn end(&self) {
        self.shared.ending.store(true, Ordering::SeqCst);
        self.wake(Kind::WaitPid);
    }

    fn wake(&self, kind: Kind) {
        let checker = &self.shared.checker;
        match kind {
            Kind::Futex => {
                let futex = &self.shared.futex;
                futex.fetch_add(1, Ordering::SeqCst);
                // SAFETY: waking touches no memory.
                let woken = unsafe { libc::syscall(libc::SYS_futex, futex.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
                // After a restore the thread may be on its way back into the call.
                checker.that((0..=1).contains(&woken), || format!("{woken} threads woken on the futex"));
            }
            Kind::EpollWait => {
                checker.works("write the eventfd", self.shared.events.write(1));
            }
            Kind::PipeRead => {
                checker.works("write the pipe", (&self.pipe).write_all(b"x"));
            }
            Kind::WaitPid => {
                let child = Pid::from_raw(self.shared.child.load(Ordering::SeqCst));
                checker.works("end the child", kill(child, Signal::SIGKILL));
            }
            Kind::Pause | Kind::SigSuspend => {
                let thread = self.threads[kind as usize].as_pthread_t();
                // SAFETY: the thread never ends, so its handle is valid.
                let result = unsafe { libc::pthread_kill(thread, WAKE as i32) };
                checker.equal("pthread_kill", &result, &0);
            }
            Kind::Accept => {
                checker.works("connect", UnixStream::connect_addr(&self.address));
            }
        }
    }
}

impl Shared {
    /// Calls `wait` over and over; it returns when it was woken as intended.
    fn run(&self, kind: Kind, wait: fn(&Self)) {
        loop {
            wait(self);
            self.done(kind);
        }
    }

    fn done(&self, kind: Kind) {
        self.rounds[kind as usize].fetch_add(1, Ordering::SeqCst);
    }
}

fn wait_futex(shared: &Shared) {
    let seen = shared.futex.load(Ordering::SeqCst);
    let word = shared.futex.as_ptr();
    // SAFETY: the word lives as long as the process, and a null timeout is allowed.
    let result = Errno::result(unsafe { libc::syscall(libc::SYS_futex, word, libc::FUTEX_WAIT, seen, 0_usize) });
    let woken = matches!(result, Ok(0) | Err(Errno::EAGAIN));
    shared.checker.that(woken, || format!("futex without a timeout: {result:?}"));
    shared.checker.that(shared.futex.load(Ordering::SeqCst) != seen, || "futex woken for nothing".to_owned());
}

/// A child of its own that waits to be killed.
fn wait_child(shared: &Shared) {
    let child = fork_child(|| {
        // Not the connection that another thread may have open just now.
        // SAFETY: the child needs no descriptor; close_range is a plain system call.
        unsafe { libc::close_range(3, u32::MAX, 0) };
        loop {
            // SAFETY: pause takes nothing; it is async-signal-safe, as the child of a threaded process needs.
            unsafe { libc::pause() };
        }
    });
    shared.child.store(child.as_raw(), Ordering::SeqCst);
    let status = waitpid(child, None);
    shared.checker.equal("waitpid", &status, &Ok(WaitStatus::Signaled(child, Signal::SIGKILL, false)));
    while shared.ending.load(Ordering::SeqCst) {
        thread::park();
    }
}

fn wait_pause(shared: &Shared) {
    let mut mask = SigSet::empty();
    mask.add(WAKE);
    mask.thread_unblock().expect("unblock the wake signal");
    let before = HANDLED.load(Ordering::SeqCst);
    // SAFETY: pause takes nothing.
    let result = Errno::result(unsafe { libc::pause() });
    shared.checker.equal("pause", &result, &Err(Errno::EINTR));
    shared.checker.that(HANDLED.load(Ordering::SeqCst) > before, || "pause ended without a signal".to_owned());
}

fn wait_suspend(shared: &Shared) {
    let before = HANDLED.load(Ordering::SeqCst);
    let outer = SigSet::thread_get_mask().expect("mask");
    // The control signals stay blocked: they are not for this thread.
    let mut inner = outer;
    inner.remove(WAKE);
    // SAFETY: the set is live for the call.
    let result = Errno::result(unsafe { libc::sigsuspend(inner.as_ref()) });
    shared.checker.equal("sigsuspend", &result, &Err(Errno::EINTR));
    shared.checker.that(HANDLED.load(Ordering::SeqCst) > before, || "sigsuspend ended without a signal".to_owned());
    shared.checker.equal("mask after sigsuspend", &SigSet::thread_get_mask(), &Ok(outer));
}

fn wait_epoll_forever(shared: &Shared) {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("epoll");
    epoll.add(&shared.events, EpollEvent::new(EpollFlags::EPOLLIN, 4711)).expect("epoll add");
    loop {
        let mut events = [EpollEvent::empty()];
        match epoll.wait(&mut events, EpollTimeout::NONE) {
            // The kernel ends epoll_wait with EINTR when the process is stopped, see signal(7).
            Err(Errno::EINTR) => shared.checker.note("epoll_wait interrupted", 1),
            result => {
                shared.checker.equal("epoll_wait", &result, &Ok(1));
                shared.checker.equal("data of the event", &events[0].data(), &4711);
                shared.checker.equal("value of the eventfd", &shared.events.read(), &Ok(1));
                shared.done(Kind::EpollWait);
            }
        }
    }
}

fn read_forever(shared: &Shared, pipe: OwnedFd) {
    let mut pipe = File::from(pipe);
    loop {
        let mut byte = [0];
        let result = pipe.read(&mut byte).map_err(|error| error.kind());
        shared.checker.equal("read of a pipe", &(result, byte), &(Ok(1), *b"x"));
        shared.done(Kind::PipeRead);
    }
}

fn accept_forever(shared: &Shared, listener: &UnixListener) {
    loop {
        let result = listener.accept().map_err(|error| error.kind());
        shared.checker.that(result.is_ok(), || format!("accept: {result:?}"));
        shared.done(Kind::Accept);
    }
}
