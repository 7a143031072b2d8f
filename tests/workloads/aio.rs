//! Contexts of io_setup(2): a fresh one, one whose ring went round with events that nobody has reaped, and a large one.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use standstill_tests::workload::{Args, Checker, Control, Meter, SelfState};

const WRITE: u64 = 1;

/// struct io_event: cookie, request, result, second result.
type Event = [u64; 4];

struct Context {
    id: u64,
    file: File,
    /// Cookies of the events in the ring, the oldest first.
    waiting: Vec<u64>,
    /// Room, head and tail of the ring.
    ring: [u32; 3],
    next: u64,
}

impl Context {
    /// With a ring that was used for `used` requests, the last `left` of which were not reaped.
    fn new(requests: u64, used: usize, left: usize) -> Self {
        let mut id = 0_u64;
        // SAFETY: the call writes the id.
        let made = unsafe { libc::syscall(libc::SYS_io_setup, requests, &raw mut id) };
        assert_eq!(made, 0, "io_setup: {}", std::io::Error::last_os_error());
        let file = File::create("/dev/null").expect("open /dev/null");
        let mut context = Self { id, file, waiting: Vec::new(), ring: [0; 3], next: 0x1234_5678 };
        for n in 0..used {
            context.submit().expect("io_submit");
            if n < used - left {
                context.reap(1).expect("io_getevents");
            }
        }
        context.ring = context.header();
        context
    }

    /// Room, head and tail.
    fn header(&self) -> [u32; 3] {
        // SAFETY: the ring begins with these words, which the kernel changes only while somebody makes a system call.
        [1, 2, 3].map(|n| unsafe { (self.id as *const u32).add(n).read_volatile() })
    }

    /// Writes one byte to `/dev/null`.
    fn submit(&mut self) -> Result<(), Errno> {
        let byte = 7_u8;
        let file = (self.file.as_raw_fd() as u64) << 32;
        let request = [self.next, 0, file | WRITE, (&raw const byte) as u64, 1, 0, 0, 0];
        let requests = [&raw const request];
        // SAFETY: request and byte live until the call returns, and the write is complete then.
        Errno::result(unsafe { libc::syscall(libc::SYS_io_submit, self.id, 1, requests.as_ptr()) })?;
        self.waiting.push(self.next);
        self.next += 1;
        Ok(())
    }

    /// Takes at most so many events out of the ring.
    fn reap(&mut self, most: usize) -> Result<Vec<Event>, Errno> {
        let mut events = vec![[0; 4]; most];
        // SAFETY: there is room for as many events as are asked for.
        let got = unsafe { libc::syscall(libc::SYS_io_getevents, self.id, 0, most, events.as_mut_ptr(), 0_usize) };
        events.truncate(Errno::result(got)? as usize);
        self.waiting.drain(..events.len());
        Ok(events)
    }

    fn look(&self, checker: &Checker) {
        checker.equal("room, head and tail of a ring", &self.header(), &self.ring);
    }

    fn exercise(&mut self, checker: &Checker) {
        let (waiting, [room, _, tail]) = (self.waiting.clone(), self.ring);
        let events = self.reap(waiting.len() + 1).unwrap_or_default();
        checker.equal("cookies of events", &events.iter().map(|e| e[0]).collect::<Vec<_>>(), &waiting);
        checker.that(events.iter().all(|e| (e[2], e[3]) == (1, 0)), || format!("results of events: {events:x?}"));
        checker.equal("head of an empty ring", &self.header()[1], &tail);
        for _ in 0..waiting.len() {
            checker.works("io_submit", self.submit());
        }
        self.ring = [room, tail, (tail + waiting.len() as u32) % room];
        self.look(checker);
        // Once around: all places are usable.
        for _ in 0..room {
            checker.works("io_submit", self.submit());
            checker.equal("events", &self.reap(1).map(|events| events.len()), &Ok(1));
        }
        let [_, head, tail] = self.ring;
        self.ring = [room, head, tail];
        checker.equal("a ring that went round", &self.header(), &self.ring);
    }
}

fn main() {
    let args = Args::parse();
    let control = Control::new("aio", &args);
    let checker = Arc::clone(&control.checker);
    let mut contexts = [Context::new(1, 0, 0), Context::new(10, 1000, 70), Context::new(1000, 2900, 150)];
    let meter = Meter::start(Duration::from_millis(1));
    let before = SelfState::of_process().without(&["parent"]);
    control.ready();
    control.serve(Some(&meter), Duration::from_millis(100), |request| {
        SelfState::of_process().check(&checker, "process", &before);
        for context in &mut contexts {
            context.look(&checker);
            if request.thorough() {
                context.exercise(&checker);
            }
        }
    });
}
