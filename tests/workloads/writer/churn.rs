//! Memory that vanishes, moves, and comes again with other content at the same address.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use std::{ptr, thread};

use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid};
use standstill_tests::workload::{Book, Checker, Mapping, PAGE, Random};

use crate::process::Shared;
use crate::stacks::{self, Threads};

/// Addresses at which memory comes and goes.
const SLOTS: usize = 24;
/// Pages of each.
const PAGES: usize = 32;
const LENGTH: usize = PAGES * PAGE;
/// Short-lived processes at a time.
const MOST_CHILDREN: usize = 3;
/// Changes in one round.
const CHANGES: usize = 6;

const READ: i32 = libc::PROT_READ;
const WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Memory at one of the addresses.
struct Island {
    book: Book,
    prot: i32,
    shared: bool,
}

/// Everything that changes in one process.
pub(crate) struct Churn {
    writer: u16,
    random: Random,
    slots: Vec<(usize, Option<Island>)>,
    /// Names given to memory so far.
    named: u32,
    threads: Threads,
    children: Vec<Pid>,
    /// Command line of a short-lived program.
    program: Vec<CString>,
    /// The data segment, in a process whose only thread we are.
    data: Option<Data>,
}

impl Churn {
    pub(crate) fn new(dir: &Path, number: usize, random: Random, alone: bool) -> Self {
        let area = Mapping::new(SLOTS * LENGTH, libc::PROT_NONE, libc::MAP_PRIVATE, None).expect("find free addresses");
        unmap(area).expect("unmap");
        let text = |bytes: &[u8]| CString::new(bytes).expect("no zero byte");
        let exe = std::env::current_exe().expect("path of the program");
        let program = [exe.as_os_str().as_bytes(), b"--dir", dir.as_os_str().as_bytes(), b"--brief", b"9", b"--rounds"];
        let mut program: Vec<CString> = program.into_iter().map(text).collect();
        program.push(text(b"8"));
        Self {
            writer: number as u16,
            random,
            slots: (0..SLOTS).map(|slot| (area.start() + slot * LENGTH, None)).collect(),
            named: 0x1000 * (number as u32 + 1),
            threads: Threads::default(),
            children: Vec::new(),
            program,
            data: alone.then(Data::default),
        }
    }

    /// A round of changes.
    pub(crate) fn go_on(&mut self, checker: &Checker, parts: &[Arc<Shared>]) {
        self.threads.collect(checker, false);
        self.reap(checker, false);
        for _ in 0..CHANGES {
            let (name, result) = self.change(checker, parts);
            checker.works(name, result);
        }
    }

    fn change(&mut self, checker: &Checker, parts: &[Arc<Shared>]) -> (&'static str, io::Result<()>) {
        let at = self.random.below(SLOTS);
        match self.random.below(16) {
            0 => ("map", self.map(at, false)),
            1 => ("map shared", self.map(at, true)),
            2 => ("unmap", self.unmap(at)),
            3 | 4 => ("move", self.relocate(at)),
            5 => ("replace", self.replace(at)),
            6 => ("discard", self.discard(at)),
            7 => ("protect", self.protect(at)),
            8 => ("shrink and grow", self.shrink_and_grow(at)),
            9 => ("discard a part of the heap", discard_of_part(&mut self.random, parts)),
            10 if self.random.once_in(8) => ("fork", self.fork(false)),
            11 if self.random.once_in(8) => ("execute", self.fork(true)),
            12 if self.data.is_none() && self.random.once_in(4) => {
                self.threads.start(&mut self.random);
                ("thread", Ok(()))
            }
            13 if self.random.once_in(4) => {
                let (depth, seed) = (self.random.below(64), self.random.next());
                let right = stacks::is_right(depth, seed, Duration::from_millis(1));
                checker.that(right, || "the stack of the first thread is wrong".to_owned());
                ("recursion", Ok(()))
            }
            14 => match &mut self.data {
                Some(data) => ("data segment", data.change(&mut self.random, &mut self.named, self.writer)),
                None => ("write", self.write(at)),
            },
            _ => ("write", self.write(at)),
        }
    }

    /// Compares everything; at the end also waits for whoever is still there.
    pub(crate) fn check(&mut self, checker: &Checker, end: bool) {
        self.threads.collect(checker, end);
        self.reap(checker, end);
        for island in self.slots.iter().filter_map(|(_, island)| island.as_ref()) {
            let memory = island.book.memory();
            if island.prot == libc::PROT_NONE {
                checker.works("lift the protection", memory.protect(READ));
            }
            island.book.check(checker, if island.shared { "shared island" } else { "island" });
            if island.prot == libc::PROT_NONE {
                checker.works("protect again", memory.protect(libc::PROT_NONE));
            }
        }
        if let Some(data) = &self.data {
            data.books.iter().for_each(|book| book.check(checker, "data segment"));
        }
    }

    fn name(&mut self) -> u32 {
        self.named += 1;
        self.named
    }

    /// Makes memory at an address that may have had some before.
    fn map(&mut self, at: usize, shared: bool) -> io::Result<()> {
        if self.slots[at].1.is_some() {
            return self.write(at);
        }
        let kind = if shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
        let memory = match Mapping::at(self.slots[at].0, LENGTH, WRITE, kind) {
            Ok(memory) => memory,
            // Somebody else in this process has it now: also good.
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => return Ok(()),
            Err(error) => return Err(error),
        };
        let book = Book::new(memory, self.name());
        self.slots[at].1 = Some(Island { book, prot: WRITE, shared });
        self.write(at)
    }

    fn unmap(&mut self, at: usize) -> io::Result<()> {
        match self.slots[at].1.take() {
            Some(island) => unmap(island.book.memory()),
            None => Ok(()),
        }
    }

    /// Moves memory to another address, over nothing or over other memory.
    fn relocate(&mut self, from: usize) -> io::Result<()> {
        let to = self.random.below(SLOTS);
        if to == from || self.slots[from].1.is_none() {
            return Ok(());
        }
        if self.slots[to].1.is_none() {
            self.map(to, false)?;
        }
        if self.slots[to].1.take().is_none() {
            return Ok(()); // the address is somebody else's
        }
        let Some(mut island) = self.slots[from].1.take() else { return Ok(()) };
        let target = Mapping::adopt(self.slots[to].0, LENGTH);
        remap(island.book.memory(), LENGTH, Some(target.start()))?;
        island.book.moved(target);
        self.slots[to].1 = Some(island);
        Ok(())
    }

    /// Maps new memory over the old.
    fn replace(&mut self, at: usize) -> io::Result<()> {
        if self.slots[at].1.is_none() {
            return self.map(at, false);
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        // SAFETY: the range is an island of ours, to which nobody has a reference.
        let result = unsafe { libc::mmap(self.slots[at].0 as *mut _, LENGTH, WRITE, flags, -1, 0) };
        if result == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let book = Book::new(Mapping::adopt(self.slots[at].0, LENGTH), self.name());
        self.slots[at].1 = Some(Island { book, prot: WRITE, shared: false });
        if self.random.once_in(2) { self.write(at) } else { Ok(()) }
    }

    /// Throws some pages away.
    fn discard(&mut self, at: usize) -> io::Result<()> {
        let pages = some_pages(&mut self.random, PAGES);
        let Some(island) = self.slots[at].1.as_mut().filter(|island| island.prot == WRITE) else { return Ok(()) };
        let advice = if island.shared { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
        discard(&mut island.book, pages, advice)
    }

    fn protect(&mut self, at: usize) -> io::Result<()> {
        let prot = [libc::PROT_NONE, READ, WRITE][self.random.below(3)];
        let Some(island) = &mut self.slots[at].1 else { return Ok(()) };
        island.prot = prot;
        island.book.memory().protect(prot)
    }

    /// Takes half of the memory away and puts an empty half in its place.
    fn shrink_and_grow(&mut self, at: usize) -> io::Result<()> {
        let Some(island) = self.slots[at].1.as_mut().filter(|island| !island.shared) else { return Ok(()) };
        let memory = island.book.memory();
        remap(memory, LENGTH / 2, None)?;
        match remap(memory.part(0, LENGTH / 2), LENGTH, None) {
            Ok(()) => island.book.forget(PAGES / 2..PAGES),
            // The upper half is somebody else's now; the rest goes as well.
            Err(_) => {
                self.slots[at].1 = None;
                unmap(memory.part(0, LENGTH / 2))?;
            }
        }
        Ok(())
    }

    fn write(&mut self, at: usize) -> io::Result<()> {
        let Some(island) = self.slots[at].1.as_mut().filter(|island| island.prot == WRITE) else { return Ok(()) };
        for page in some_pages(&mut self.random, PAGES) {
            island.book.write(page, self.writer);
        }
        Ok(())
    }

    /// Starts a short-lived process: a copy of this one that writes its copy of our memory, or a program.
    fn fork(&mut self, execute: bool) -> io::Result<()> {
        if self.children.len() >= MOST_CHILDREN {
            return Ok(());
        }
        let mut arguments: Vec<*const libc::c_char> = self.program.iter().map(|text| text.as_ptr()).collect();
        arguments.push(ptr::null());
        let pause = Duration::from_millis(self.random.next() % 15);
        // SAFETY: the child allocates nothing and takes no lock: it executes a program, or works on memory that exists.
        match unsafe { nix::unistd::fork() }? {
            ForkResult::Parent { child } => {
                self.children.push(child);
                Ok(())
            }
            ForkResult::Child => {
                let status = if execute {
                    // SAFETY: path and arguments are strings that end with zero, their list ends with null.
                    unsafe { libc::execv(arguments[0], arguments.as_ptr()) };
                    100 + io::Error::last_os_error().raw_os_error().unwrap_or(0)
                } else if self.live_briefly(pause) {
                    0
                } else {
                    2
                };
                // SAFETY: it takes a number, and runs nothing of the parent's.
                unsafe { libc::_exit(status) }
            }
        }
    }

    /// What a forked process does.
    fn live_briefly(&mut self, pause: Duration) -> bool {
        let mut right = true;
        let all = self.slots.iter_mut().filter_map(|(_, island)| island.as_mut());
        for island in all.filter(|island| island.prot == WRITE && !island.shared) {
            (0..PAGES / 2).for_each(|page| island.book.write(page, u16::MAX));
            thread::sleep(pause);
            right &= (0..PAGES).all(|page| island.book.is_right(page));
        }
        right
    }

    /// Looks how the short-lived processes have fared that have ended, or all.
    fn reap(&mut self, checker: &Checker, all: bool) {
        let flags = if all { WaitPidFlag::empty() } else { WaitPidFlag::WNOHANG };
        self.children.retain(|child| {
            let status = loop {
                match waitpid(*child, Some(flags)) {
                    Err(nix::errno::Errno::EINTR) => {}
                    status => break status,
                }
            };
            if status == Ok(WaitStatus::StillAlive) {
                return true;
            }
            let well = status == Ok(WaitStatus::Exited(*child, 0));
            checker.that(well, || format!("a short-lived process ends with {status:?}"));
            false
        });
    }
}

/// The end of the data segment, moved up and down.
#[derive(Default)]
struct Data {
    /// Memory that was the end of the segment once, from below; the last may still be.
    books: Vec<Book>,
}

impl Data {
    const MOST: usize = 64;
    const LENGTH: usize = 16 * PAGE;

    fn change(&mut self, random: &mut Random, named: &mut u32, writer: u16) -> io::Result<()> {
        // SAFETY: sbrk with 0 tells the end only; nothing allocates until the end is moved, as no other thread is there.
        let end = unsafe { libc::sbrk(0) } as usize;
        let is_last = |book: &Book| book.memory().start() + Self::LENGTH == end;
        if self.books.last().is_some_and(is_last) && random.once_in(2) {
            // SAFETY: what is cut off is the memory of our last book, to which nobody has a reference.
            let result = unsafe { libc::sbrk(-(Self::LENGTH as isize)) };
            self.books.pop();
            return if result as isize == -1 { Err(io::Error::last_os_error()) } else { Ok(()) };
        }
        if self.books.len() < Self::MOST {
            let start = end.next_multiple_of(PAGE);
            // SAFETY: growing the segment touches nothing that exists; the C library notices that the end has moved.
            let result = unsafe { libc::sbrk((start + Self::LENGTH - end) as isize) };
            if result as isize == -1 {
                return Err(io::Error::last_os_error());
            }
            *named += 1;
            self.books.push(Book::new(Mapping::adopt(start, Self::LENGTH), *named));
        }
        if let Some(book) = self.books.last_mut() {
            some_pages(random, book.len()).for_each(|page| book.write(page, writer));
        }
        Ok(())
    }
}

fn some_pages(random: &mut Random, pages: usize) -> std::ops::Range<usize> {
    let start = random.below(pages);
    start..start + 1 + random.below(pages - start)
}

/// Throws away pages of what a thread writes: of its heap, or of a file, whose content comes back then.
fn discard_of_part(random: &mut Random, parts: &[Arc<Shared>]) -> io::Result<()> {
    let mut part = parts[random.below(parts.len())].take();
    let part = &mut *part;
    let file = part.file.as_mut().filter(|_| random.once_in(2));
    let Some(book) = file.or(part.heap.as_mut()).filter(|book| !book.is_empty()) else { return Ok(()) };
    let start = random.below(book.len());
    let pages = start..book.len().min(start + 1 + random.below(8));
    discard(book, pages, libc::MADV_DONTNEED)
}

fn discard(book: &mut Book, pages: std::ops::Range<usize>, advice: i32) -> io::Result<()> {
    book.memory().part(pages.start * PAGE, pages.len() * PAGE).advise(advice)?;
    book.forget(pages);
    Ok(())
}

fn unmap(memory: Mapping) -> io::Result<()> {
    // SAFETY: the memory is an island of ours, to which nobody has a reference any more.
    match unsafe { libc::munmap(memory.start() as *mut _, memory.length()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Changes the length of an island in its place, or moves it over another one of ours.
fn remap(memory: Mapping, length: usize, to: Option<usize>) -> io::Result<()> {
    let flags = if to.is_some() { libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED } else { 0 };
    let target = to.unwrap_or_default() as *mut libc::c_void;
    // SAFETY: both ranges are islands of ours, to which nobody has a reference.
    let result = unsafe { libc::mremap(memory.start() as *mut _, memory.length(), length, flags, target) };
    if result == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}
