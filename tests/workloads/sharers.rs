//! A tree whose processes write MAP_SHARED|MAP_ANONYMOUS memory, each its own pages, and do to it whatever makes writes
//! hard to see: what came back old, torn or in another place is found and named.
//!
//! Options:
//!
//! - `--mib N` of shared memory (default 16), `--children N` (default 1) besides the root
//! - `--pages-per-second N` (default 1000) that each process writes
//! - `--tricks NAME,NAME,…|all`: see [`TRICKS`]
//! - `--outsider`: another process has the memory, which is not of the tree
//! - `--noise`: each process allocates and frees memory all the time
//! - `--seed N`

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid};
use standstill_tests::workload::{
    Args, Book, Checker, Control, Mapping, Meter, PAGE, Random, Request, fork_child, now_us,
};

const READ: i32 = libc::PROT_READ;
const WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// A way to write, or to disturb whoever watches.
type Trick = fn(&mut Sharer) -> io::Result<()>;

const TRICKS: [(&str, Trick); 14] = [
    ("alias", Sharer::write_by_alias),
    ("child", Sharer::write_by_child),
    ("grandchild", Sharer::write_by_grandchild),
    ("remove", Sharer::remove),
    ("discard", Sharer::discard),
    ("protect", Sharer::protect),
    ("move", Sharer::relocate),
    ("replace", Sharer::replace),
    ("shrink", Sharer::shrink_and_grow),
    ("inject", Sharer::write_by_system_call),
    ("pageout", Sharer::page_out),
    ("member", Sharer::write_by_lasting_child),
    ("linger", Sharer::write_by_lasting_alias),
    ("grow", Sharer::write_by_growing_alias),
];

/// One process that writes.
struct Sharer {
    book: Book,
    writer: u16,
    random: Random,
    /// A child that lives for a while, and writes the last page of ours.
    lasting: Option<Pid>,
    /// Another mapping of the memory that is there for a while.
    alias: Option<Mapping>,
    /// Another mapping of its first half.
    half: Option<Mapping>,
}

fn main() {
    let args = Args::parse();
    let mut control = Control::new("sharers", &args);
    let length = args.value("mib", 16_usize) << 20;
    let children: usize = args.value("children", 1);
    let memory = Mapping::new(length, WRITE, libc::MAP_SHARED, None).expect("map shared memory");
    if args.flag("outsider") {
        let root = nix::unistd::getpid();
        let parent = fork_child(|| {
            fork_child(|| {
                // As long as the root lives, or what comes back with its number.
                while nix::sys::signal::kill(root, None).is_ok() {
                    thread::sleep(Duration::from_millis(5));
                }
            });
        });
        waitpid(parent, None).expect("wait for the parent of an outsider");
    }
    let sharer = |number: usize| {
        let mut book = Book::of_every(memory, 1, (number, children + 1));
        (0..book.len()).step_by(2).for_each(|page| book.write(page, number as u16));
        let random = Random::new(args.value::<u64>("seed", 1) << 16 | number as u64);
        Sharer { book, writer: number as u16, random, lasting: None, alias: None, half: None }
    };
    for number in 1..=children {
        let member = format!("child{number}");
        let child = control.for_child(&member);
        let pid = fork_child(|| serve(child, sharer(number), &args, None));
        control.adopt(pid, &member);
    }
    let root = sharer(0);
    let meter = Meter::start(Duration::from_millis(1));
    // A verdict of each child says that it has begun.
    control.collect();
    control.ready();
    serve(control, root, &args, Some(&meter));
}

fn serve(control: Control, mut sharer: Sharer, args: &Args, meter: Option<&Meter>) {
    // Orphans stay in the tree.
    // SAFETY: the call takes a number.
    unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) };
    let names: String = args.value("tricks", String::new());
    let tricks: Vec<(&str, Trick)> =
        TRICKS.into_iter().filter(|(name, _)| names == "all" || names.split(',').any(|other| other == *name)).collect();
    let (rate, noise): (u64, _) = (args.value("pages-per-second", 1000), args.flag("noise"));
    let checker = Arc::clone(&control.checker);
    let mut last = now_us();
    control.serve(meter, Duration::from_millis(2), |request| {
        let now = now_us();
        for _ in 0..((now - last).min(100_000) * rate).div_ceil(1_000_000) {
            sharer.one().for_each(|page| sharer.book.write(page, sharer.writer));
        }
        last = now;
        if noise {
            drop(std::hint::black_box(vec![1_u8; 160 << 10]));
        }
        if !tricks.is_empty() {
            let (name, trick) = tricks[sharer.random.below(tricks.len())];
            checker.works(name, trick(&mut sharer));
        }
        sharer.collect(&checker, request == Request::End);
        let pages = sharer.book.len() - usize::from(sharer.lasting.is_some());
        let pages = if request.thorough() { 0..pages } else { sharer.one() };
        pages.for_each(|page| sharer.book.check_page(&checker, "shared memory", page));
    });
}

impl Sharer {
    /// Some pages of ours, but not the last.
    fn some(&mut self) -> Range<usize> {
        let start = self.random.below(self.book.len() - 1);
        start..(start + 1 + self.random.below(8)).min(self.book.len() - 1)
    }

    /// One of them.
    fn one(&mut self) -> Range<usize> {
        let page = self.random.below(self.book.len() - 1);
        page..page + 1
    }

    /// Through another mapping of the same memory, which goes again.
    fn write_by_alias(&mut self) -> io::Result<()> {
        let memory = self.book.memory();
        let alias = duplicate(memory)?;
        self.book.moved(alias);
        for page in self.some() {
            self.book.write(page, self.writer);
        }
        self.book.moved(memory);
        unmap(alias)
    }

    /// Through another mapping, which has been there for a while and goes right after.
    fn write_by_lasting_alias(&mut self) -> io::Result<()> {
        let memory = self.book.memory();
        let Some(alias) = self.alias.take() else {
            self.alias = Some(duplicate(memory)?);
            return Ok(());
        };
        if self.random.once_in(2) {
            self.alias = Some(alias);
            return Ok(());
        }
        self.book.moved(alias);
        self.some().for_each(|page| self.book.write(page, self.writer));
        self.book.moved(memory);
        unmap(alias)
    }

    /// Through another mapping of the first half, which has the second half only for this moment.
    fn write_by_growing_alias(&mut self) -> io::Result<()> {
        let memory = self.book.memory();
        let half = memory.length() / 2;
        let Some(window) = self.half else {
            let alias = duplicate(memory)?;
            unmap(alias.part(half, half))?;
            self.half = Some(alias.part(0, half));
            return Ok(());
        };
        let start = remap(window.start(), half, memory.length(), libc::MREMAP_MAYMOVE, None)?;
        self.book.moved(Mapping::adopt(start, memory.length()));
        for page in self.book.len() / 2 + 1..self.book.len() - 1 {
            if self.random.once_in(32) {
                self.book.write(page, self.writer);
            }
        }
        self.book.moved(memory);
        remap(start, memory.length(), half, 0, None)?;
        self.half = Some(Mapping::adopt(start, half));
        Ok(())
    }

    /// By a process that ends at once.
    fn write_by_child(&mut self) -> io::Result<()> {
        let pages = self.some();
        let child = self.fork(|sharer| pages.clone().for_each(|page| sharer.book.write(page, sharer.writer)))?;
        self.reap(child, pages)
    }

    /// By a process whose parent ends before it.
    fn write_by_grandchild(&mut self) -> io::Result<()> {
        let pages = self.some();
        let child = self.fork(|sharer| {
            let write = |sharer: &mut Self| {
                thread::sleep(Duration::from_millis(1));
                pages.clone().for_each(|page| sharer.book.write(page, sharer.writer));
            };
            let _ = sharer.fork(write);
        })?;
        self.reap(child, 0..0)?;
        // Its own child is ours now.
        loop {
            match waitpid(Pid::from_raw(-1), None) {
                Err(Errno::EINTR) => {}
                Ok(WaitStatus::Exited(pid, 0)) if Some(pid) == self.lasting => self.lasting_has_written(),
                Ok(WaitStatus::Exited(_, 0)) => break,
                other => return Err(io::Error::other(format!("an orphan ends with {other:?}"))),
            }
        }
        pages.for_each(|page| self.book.was_written(page, self.writer));
        Ok(())
    }

    /// By a process that lives for a while, so that it is tracked before it writes and ends.
    fn write_by_lasting_child(&mut self) -> io::Result<()> {
        if self.lasting.is_some() {
            return Ok(());
        }
        let mut pause = || Duration::from_millis(self.random.next() % 40);
        let pauses = [pause(), pause()];
        let child = self.fork(|sharer| {
            thread::sleep(pauses[0]);
            sharer.book.write(sharer.book.len() - 1, sharer.writer);
            thread::sleep(pauses[1]);
        })?;
        self.lasting = Some(child);
        Ok(())
    }

    fn lasting_has_written(&mut self) {
        self.lasting = None;
        self.book.was_written(self.book.len() - 1, self.writer);
    }

    /// Throws pages away for everybody.
    fn remove(&mut self) -> io::Result<()> {
        for page in self.some() {
            let memory = self.book.memory_of(page);
            advise(memory, libc::MADV_REMOVE)?;
            self.book.forget(page..page + 1);
            if self.random.once_in(2) {
                // A page of zeros comes in its place.
                memory.load(0);
            }
        }
        Ok(())
    }

    /// Empties the page table; the memory keeps its content.
    fn discard(&mut self) -> io::Result<()> {
        advise(self.book.memory(), libc::MADV_DONTNEED)
    }

    fn page_out(&mut self) -> io::Result<()> {
        const MADV_PAGEOUT: i32 = 21;
        for page in self.some() {
            advise(self.book.memory_of(page), MADV_PAGEOUT)?;
        }
        Ok(())
    }

    fn protect(&mut self) -> io::Result<()> {
        self.book.memory().protect(READ)?;
        thread::sleep(Duration::from_micros(self.random.next() % 2000));
        self.book.memory().protect(WRITE)
    }

    /// Moves the mapping elsewhere.
    fn relocate(&mut self) -> io::Result<()> {
        let memory = self.book.memory();
        let room = Mapping::new(memory.length(), libc::PROT_NONE, libc::MAP_PRIVATE, None)?;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        remap(memory.start(), memory.length(), memory.length(), flags, Some(room.start()))?;
        self.book.moved(room);
        Ok(())
    }

    /// Maps the memory a second time, and takes the first mapping away; sometimes the second one comes to its place.
    fn replace(&mut self) -> io::Result<()> {
        let memory = self.book.memory();
        for page in self.some() {
            self.book.write(page, self.writer);
        }
        let other = duplicate(memory)?;
        unmap(memory)?;
        self.book.moved(other);
        for page in self.some() {
            self.book.write(page, self.writer);
        }
        if self.random.once_in(2) {
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            remap(other.start(), other.length(), other.length(), flags, Some(memory.start()))?;
            self.book.moved(memory);
        }
        Ok(())
    }

    /// Takes the end of the mapping away, and lets it grow again.
    fn shrink_and_grow(&mut self) -> io::Result<()> {
        let memory = self.book.memory();
        let half = memory.length() / 2;
        for page in self.some() {
            self.book.write(page, self.writer);
        }
        remap(memory.start(), memory.length(), half, 0, None)?;
        let start = remap(memory.start(), half, memory.length(), libc::MREMAP_MAYMOVE, None)?;
        self.book.moved(Mapping::adopt(start, memory.length()));
        Ok(())
    }

    /// Through the kernel instead of the page table.
    fn write_by_system_call(&mut self) -> io::Result<()> {
        for page in self.some() {
            let memory = self.book.memory_of(page);
            let mut copy = self.book.next_version(page, self.writer);
            let local = libc::iovec { iov_base: copy.as_mut_ptr().cast(), iov_len: PAGE };
            let remote = libc::iovec { iov_base: memory.start() as *mut _, iov_len: PAGE };
            // SAFETY: both ranges are a page of ours.
            let written =
                unsafe { libc::process_vm_writev(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0) };
            if written != PAGE as isize {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }

    fn fork(&mut self, body: impl FnOnce(&mut Self)) -> io::Result<Pid> {
        // SAFETY: the child writes memory that exists, sleeps or forks: it allocates nothing and takes no lock.
        match unsafe { nix::unistd::fork() }? {
            ForkResult::Parent { child } => Ok(child),
            ForkResult::Child => {
                body(self);
                // SAFETY: it takes a number, and runs nothing of the parent's.
                unsafe { libc::_exit(0) }
            }
        }
    }

    /// Waits for a process, which has written some pages then.
    fn reap(&mut self, child: Pid, pages: Range<usize>) -> io::Result<()> {
        loop {
            match waitpid(child, None) {
                Err(Errno::EINTR) => {}
                Ok(WaitStatus::Exited(_, 0)) => break,
                other => return Err(io::Error::other(format!("a child ends with {other:?}"))),
            }
        }
        pages.for_each(|page| self.book.was_written(page, self.writer));
        Ok(())
    }

    /// Looks whether the lasting child has ended, or waits for it.
    fn collect(&mut self, checker: &Checker, wait: bool) {
        use nix::sys::wait::WaitPidFlag;
        let Some(child) = self.lasting else { return };
        let flags = if wait { WaitPidFlag::empty() } else { WaitPidFlag::WNOHANG };
        match waitpid(child, Some(flags)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::EINTR) => {}
            Ok(WaitStatus::Exited(_, 0)) => self.lasting_has_written(),
            other => _ = checker.that(false, || format!("a child ends with {other:?}")),
        }
    }
}

/// Another mapping of the same memory.
fn duplicate(memory: Mapping) -> io::Result<Mapping> {
    let start = remap(memory.start(), 0, memory.length(), libc::MREMAP_MAYMOVE, None)?;
    Ok(Mapping::adopt(start, memory.length()))
}

fn remap(start: usize, from: usize, to: usize, flags: i32, target: Option<usize>) -> io::Result<usize> {
    let target = target.unwrap_or(0) as *mut libc::c_void;
    // SAFETY: the memory is a mapping of ours to which nobody has a reference, and so is what is at the target.
    let result = unsafe { libc::mremap(start as *mut _, from, to, flags, target) };
    if result == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(result as usize) }
}

fn unmap(memory: Mapping) -> io::Result<()> {
    // SAFETY: nobody has a reference to the memory.
    check(unsafe { libc::munmap(memory.start() as *mut _, memory.length()) })
}

/// For advice that throws pages away.
fn advise(memory: Mapping, advice: i32) -> io::Result<()> {
    // SAFETY: the range is a mapping of ours to which nobody has a reference.
    check(unsafe { libc::madvise(memory.start() as *mut _, memory.length(), advice) })
}

fn check(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
