//! One process of the tree: its threads write, and it verifies itself when asked.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use standstill_tests::workload::{Book, Checker, Control, Meter, Random, Request, SelfState, now_us};

use crate::churn::Churn;

/// How much is written.
#[derive(Clone, Copy)]
pub(crate) enum Rate {
    /// Pages a second.
    Paced(u64),
    /// As many as possible.
    Max,
}

impl FromStr for Rate {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "max" { Ok(Self::Max) } else { text.parse().map(Self::Paced) }
    }
}

/// What all processes have in common.
pub(crate) struct Setting {
    pub(crate) seed: u64,
    pub(crate) rate: Rate,
    /// With churn, the directory of the workload.
    pub(crate) churn: Option<PathBuf>,
    /// Processes that write shared memory.
    pub(crate) members: usize,
}

/// What one thread writes.
#[derive(Default)]
pub(crate) struct Part {
    pub(crate) heap: Option<Book>,
    pub(crate) shared: Vec<Book>,
    pub(crate) file: Option<Book>,
}

impl Part {
    fn books(&self) -> impl Iterator<Item = (&'static str, &Book)> {
        let heap = self.heap.iter().map(|book| ("heap", book));
        heap.chain(self.shared.iter().map(|book| ("shared memory", book))).chain(self.file.iter().map(|b| ("file", b)))
    }

    /// Writes a page: of the heap half of the time, or as much of the rest as there is.
    fn write(&mut self, random: &mut Random, writer: u16) {
        let heap = self.heap.iter_mut().filter(|book| !book.is_empty());
        let mut books: [Option<&mut Book>; 4] = [const { None }; 4];
        let others = self.shared.iter_mut().chain(&mut self.file).filter(|book| !book.is_empty());
        let mut count = 0;
        for book in heap.chain(others).take(books.len()) {
            books[count] = Some(book);
            count += 1;
        }
        if count == 0 {
            return;
        }
        let chosen = if random.once_in(2) { 0 } else { random.below(count) };
        let Some(book) = &mut books[chosen] else { return };
        let page = random.below(book.len());
        match random.once_in(2) {
            true => book.write(page, writer),
            false => book.write_to_file(page, writer).expect("write to the file behind the memory"),
        }
    }
}

/// A part and who waits for it.
pub(crate) struct Shared {
    part: Mutex<Part>,
    /// Verifiers that wait: the thread that writes without a pause makes room for them.
    wanted: AtomicUsize,
    written: AtomicU64,
}

impl Shared {
    /// Takes the part from its writer.
    pub(crate) fn take(&self) -> MutexGuard<'_, Part> {
        self.wanted.fetch_add(1, Ordering::SeqCst);
        let part = self.part.lock().unwrap_or_else(PoisonError::into_inner);
        self.wanted.fetch_sub(1, Ordering::SeqCst);
        part
    }

    fn write_forever(&self, rate: Rate, mut random: Random, writer: u16) {
        let mut pace = Pace::new(rate);
        loop {
            while self.wanted.load(Ordering::SeqCst) > 0 {
                thread::sleep(Duration::from_micros(100));
            }
            let due = pace.due();
            let mut part = self.part.lock().unwrap_or_else(PoisonError::into_inner);
            for _ in 0..due {
                part.write(&mut random, writer);
            }
            drop(part);
            self.written.fetch_add(due, Ordering::Relaxed);
            if let Rate::Paced(_) = rate {
                thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

/// Spreads writes over time.
struct Pace {
    rate: Rate,
    since_us: u64,
    done: u64,
}

impl Pace {
    /// What is due longer than this is not made up for.
    const MOST_US: u64 = 100_000;

    fn new(rate: Rate) -> Self {
        Self { rate, since_us: now_us(), done: 0 }
    }

    /// Pages to be written now.
    fn due(&mut self) -> u64 {
        let Rate::Paced(rate) = self.rate else { return 64 };
        let now = now_us();
        let due = (now.saturating_sub(self.since_us) * rate / 1_000_000).saturating_sub(self.done);
        self.done += due;
        if due > rate * Self::MOST_US / 1_000_000 + 1 {
            (self.since_us, self.done) = (now, 0);
            return rate * Self::MOST_US / 1_000_000;
        }
        due
    }
}

/// A process of the tree.
pub(crate) struct Process {
    number: usize,
    members: usize,
    checker: Arc<Checker>,
    parts: Vec<Arc<Shared>>,
    churn: Option<Churn>,
    random: Random,
    before: Option<SelfState>,
}

impl Process {
    /// Starts the threads that write. With `alone` there are none, and the control loop writes in their place.
    pub(crate) fn start(
        number: usize,
        parts: Vec<Part>,
        setting: &Setting,
        checker: &Arc<Checker>,
        alone: bool,
    ) -> Self {
        let shared = |part| Shared { part: Mutex::new(part), wanted: AtomicUsize::new(0), written: AtomicU64::new(0) };
        let parts: Vec<Arc<Shared>> = parts.into_iter().map(|part| Arc::new(shared(part))).collect();
        let seed = |thread: usize| Random::new(setting.seed << 32 | (number as u64) << 16 | thread as u64);
        let idle = matches!(setting.rate, Rate::Paced(0));
        let rate = match setting.rate {
            Rate::Paced(rate) => Rate::Paced(rate.div_ceil(parts.len() as u64)),
            Rate::Max => Rate::Max,
        };
        for (thread, part) in parts.iter().enumerate().filter(|_| !idle && !alone) {
            let (part, random) = (Arc::clone(part), seed(thread));
            let body = move || part.write_forever(rate, random, number as u16);
            let name = format!("writer{thread}");
            thread::Builder::new().name(name).stack_size(128 << 10).spawn(body).expect("start a writer");
        }
        let churn = setting.churn.as_deref().map(|dir| Churn::new(dir, number, seed(0x100), alone));
        let checker = Arc::clone(checker);
        Self { number, members: setting.members, checker, parts, churn, random: seed(0x101), before: None }
    }

    /// Facts that must stay.
    pub(crate) fn remember(&mut self, before: SelfState) {
        self.before = Some(before);
    }

    /// Serves requests until the end.
    pub(crate) fn serve(mut self, control: Control, meter: Option<&Meter>) -> ! {
        let every = if self.churn.is_some() { 3 } else { 20 };
        control.serve(meter, Duration::from_millis(every), |request| self.round(request));
    }

    fn round(&mut self, request: Request) {
        self.beat();
        if let Some(churn) = &mut self.churn {
            churn.go_on(&self.checker, &self.parts);
        }
        if !request.thorough() {
            return self.check_some();
        }
        for (thread, shared) in self.parts.iter().enumerate() {
            let part = shared.take();
            for (what, book) in part.books() {
                book.check(&self.checker, &format!("{what} of thread {thread}"));
            }
        }
        if let Some(before) = &self.before {
            SelfState::of_process().check(&self.checker, "process", before);
        }
        if let Some(churn) = &mut self.churn {
            churn.check(&self.checker, request == Request::End);
        }
        if request == Request::Verdict {
            self.check_others();
        }
        let written = self.parts.iter().map(|part| part.written.load(Ordering::Relaxed)).sum();
        self.checker.figure("pages_written", written);
    }

    /// Writes the first page of ours of each shared memory, which the others look at.
    fn beat(&mut self) {
        let mut part = self.parts[0].take();
        for book in part.shared.iter_mut().filter(|book| !book.is_empty()) {
            book.write(0, self.number as u16);
        }
    }

    /// Looks at a few pages.
    fn check_some(&mut self) {
        let number = self.random.below(self.parts.len());
        let part = self.parts[number].take();
        for (what, book) in part.books().filter(|(_, book)| !book.is_empty()) {
            for _ in 0..4 {
                book.check_page(&self.checker, what, self.random.below(book.len()));
            }
        }
    }

    /// What the others write in shared memory must be seen here.
    fn check_others(&mut self) {
        let books = self.parts[0].take().shared.clone();
        let limit = now_us() + 10_000_000;
        for book in &books {
            // The root waits for its children's verdicts meanwhile, and writes nothing.
            for other in 1..self.members {
                if other == self.number {
                    continue;
                }
                let mut version = None;
                let moved = loop {
                    let now = book.version_of(other);
                    if now.is_some() && version.is_some() && now != version {
                        break true;
                    }
                    version = version.or(now);
                    if now_us() > limit {
                        break false;
                    }
                    // Somebody may wait for us to write in turn.
                    self.beat();
                    thread::sleep(Duration::from_millis(1));
                };
                self.checker
                    .that(moved, || format!("nothing of process {other} is seen in shared memory ({version:?})"));
            }
        }
    }
}
