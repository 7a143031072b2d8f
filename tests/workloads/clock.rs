//! The pause meter, with ballast: heap, open files, mappings, threads and processes. The benchmark's target.
//!
//! Options: `--heap-mib N`, `--fds N`, `--vmas N`, `--threads N`, `--processes N`, `--clock-us N` (sleep of
//! the clock loop).

use std::cell::Cell;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use std::{os::unix::fs::MetadataExt, thread};

use standstill_tests::workload::{
    Args, Checker, Control, Mapping, Meter, Pattern, Request, SelfState, fork_child, now_us,
};

thread_local! {
    static PRIVATE: Cell<u64> = const { Cell::new(0) };
}

fn main() {
    let args = Args::parse();
    let mut control = Control::new("clock", &args);
    let checker = Arc::clone(&control.checker);
    fork_processes(args.value("processes", 1), &mut control);
    let heap = Heap::new(args.value("heap-mib", 0));
    let files = Files::new(&args.dir(), args.value("fds", 0));
    let mappings = Mappings::new(args.value("vmas", 0));
    let threads = Threads::start(args.value("threads", 1), &checker);
    let meter = Meter::start(Duration::from_micros(args.value("clock-us", 1000)));
    let before = SelfState::of_process().without(&["parent"]);
    control.ready();
    control.serve(Some(&meter), Duration::from_millis(100), |request| {
        SelfState::of_process().check(&checker, "clock", &before);
        heap.check(&checker, request);
        files.check(&checker, request);
        mappings.check(&checker, request);
        threads.check(&checker, request);
    });
}

/// Forks processes that have nothing but a page of their own and wait.
fn fork_processes(count: usize, control: &mut Control) {
    let page = Mapping::private(4096).expect("map a page");
    for number in 1..count as u64 {
        let member = format!("child{number}");
        let child = control.for_child(&member);
        let pid = fork_child(move || {
            Pattern::new(number).fill(page.words_mut(), 0);
            let before = SelfState::of_process();
            let checker = Arc::clone(&child.checker);
            child.serve(None, Duration::from_secs(1), |request| {
                if request.thorough() {
                    SelfState::of_process().check(&checker, "child", &before);
                    checker.equal("page", &Pattern::new(number).first_wrong(page.words(), 0), &None);
                }
            });
        });
        control.adopt(pid, &member);
    }
}

/// Memory filled with a pattern that does not compress.
struct Heap(Option<Mapping>);

impl Heap {
    const PATTERN: Pattern = Pattern::new(0x68_6561_7021);

    fn new(mib: usize) -> Self {
        if mib == 0 {
            return Self(None);
        }
        let mapping = Mapping::private(mib << 20).expect("map the heap");
        Self::PATTERN.fill(mapping.words_mut(), 0);
        Self(Some(mapping))
    }

    fn check(&self, checker: &Checker, request: Request) {
        let Some(mapping) = self.0 else { return };
        let words = mapping.words();
        if request.thorough() {
            checker.equal("first wrong word of the heap", &Self::PATTERN.first_wrong(words, 0), &None);
            return;
        }
        let sample = now_us() as usize % words.len();
        checker.equal("a word of the heap", &words[sample], &Self::PATTERN.word(sample as u64));
    }
}

/// Pages that are mappings of their own, because the protections of neighbours differ.
struct Mappings(Option<Mapping>);

impl Mappings {
    const PATTERN: Pattern = Pattern::new(0x76_6d61_7321);

    fn new(count: usize) -> Self {
        if count == 0 {
            return Self(None);
        }
        let mapping = Mapping::private(count * 4096).expect("map the pages");
        for (number, page) in mapping.words_mut().chunks_exact_mut(512).enumerate() {
            page[0] = Self::PATTERN.word(number as u64);
            if number % 2 == 0 {
                // SAFETY: the page is one of the mapping's, and nobody writes to it from here on.
                let result = unsafe { libc::mprotect(page.as_mut_ptr().cast(), 4096, libc::PROT_READ) };
                assert_eq!(result, 0, "protect a page");
            }
        }
        Self(Some(mapping))
    }

    fn check(&self, checker: &Checker, request: Request) {
        if let Some(mapping) = self.0.filter(|_| request.thorough()) {
            let wrong =
                (0u64..).zip(mapping.words().chunks_exact(512)).find(|(n, page)| page[0] != Self::PATTERN.word(*n));
            checker.equal("first wrong page of the mappings", &wrong.map(|(n, _)| n), &None);
        }
    }
}

/// Regular files, each with a content and a position of its own.
struct Files(Vec<(File, u64)>);

impl Files {
    fn new(dir: &Path, count: u64) -> Self {
        let dir = dir.join("files");
        fs::create_dir_all(&dir).expect("make the directory for the files");
        let open = |number: u64| {
            let path = dir.join(number.to_string());
            fs::write(&path, Pattern::new(number).bytes(64)).expect("write a file");
            let mut file = File::open(path).expect("open a file");
            file.seek(SeekFrom::Start(number % 32)).expect("seek");
            let inode = file.metadata().expect("stat").ino();
            (file, inode)
        };
        Self((0..count).map(open).collect())
    }

    fn check(&self, checker: &Checker, request: Request) {
        if self.0.is_empty() {
            return;
        }
        let step = if request.thorough() { 1 } else { self.0.len() };
        let first = now_us() as usize % step.min(self.0.len());
        for (number, (file, inode)) in self.0.iter().enumerate().skip(first).step_by(step) {
            let mut file = file;
            let start = number as u64 % 32;
            let mut content = [0; 32];
            checker.equal("position of a file", &file.stream_position().ok(), &Some(start));
            checker.equal("inode of a file", &file.metadata().ok().map(|data| data.ino()), &Some(*inode));
            checker.works("read a file", file.read_exact(&mut content));
            let want = &Pattern::new(number as u64).bytes(64)[start as usize..start as usize + 32];
            checker.equal("content of a file", &content.as_slice(), &want);
            checker.works("seek back", file.seek(SeekFrom::Start(start)));
        }
    }
}

/// Sleeping threads that look after a value of their own.
struct Threads {
    rounds: Arc<Vec<AtomicU64>>,
}

impl Threads {
    fn start(count: usize, checker: &Arc<Checker>) -> Self {
        let rounds: Arc<Vec<AtomicU64>> = Arc::new((1..count).map(|_| AtomicU64::new(0)).collect());
        for number in 0..rounds.len() {
            let (rounds, checker) = (Arc::clone(&rounds), Arc::clone(checker));
            let body = move || {
                PRIVATE.set(Pattern::new(number as u64).word(0));
                let before = SelfState::of_thread();
                loop {
                    thread::sleep(Duration::from_millis(500));
                    checker.equal("thread-local value", &PRIVATE.get(), &Pattern::new(number as u64).word(0));
                    SelfState::of_thread().check(&checker, "thread", &before);
                    rounds[number].fetch_add(1, Ordering::Relaxed);
                }
            };
            thread::Builder::new().name(format!("ballast{number}")).stack_size(128 << 10).spawn(body).expect("thread");
        }
        Self { rounds }
    }

    /// For a verdict, waits until every thread has been round once more.
    fn check(&self, checker: &Checker, request: Request) {
        if !request.thorough() {
            return;
        }
        let before: Vec<u64> = self.rounds.iter().map(|round| round.load(Ordering::Relaxed)).collect();
        let limit = now_us() + 10_000_000;
        for (number, (round, before)) in self.rounds.iter().zip(before).enumerate() {
            while round.load(Ordering::Relaxed) == before && now_us() < limit {
                thread::sleep(Duration::from_millis(5));
            }
            checker.that(round.load(Ordering::Relaxed) > before, || format!("thread {number} does not run"));
        }
    }
}
