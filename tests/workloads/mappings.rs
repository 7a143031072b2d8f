//! Every kind of private mapping: protections, gaps, growing stacks, file mappings clean and written, zero pages, heap.

use std::fs::{self, File, OpenOptions};
use std::io::IoSliceMut;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use standstill_tests::workload::{Args, Checker, Control, Mapping, Meter, Pattern, SelfState, smaps_entry};

const PAGE: usize = 4096;
const READ: i32 = libc::PROT_READ;
const WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;
const PRIVATE: i32 = libc::MAP_PRIVATE;
/// Flags of smaps' `VmFlags` line that belong to the mapping rather than to its content.
const VM_FLAGS: [&str; 19] =
    ["rd", "wr", "ex", "sh", "mr", "mw", "me", "ms", "gd", "lo", "sr", "rr", "dc", "dd", "hg", "nh", "mg", "wf", "dp"];
/// Takes the place of MAP_PRIVATE, Linux 6.11.
const MAP_DROPPABLE: i32 = 8;
/// Linux 6.13.
const MADV_GUARD_INSTALL: i32 = 102;

/// What a mapping should contain.
enum Content {
    /// A pattern with this seed.
    Pattern(u64),
    /// A pattern that can only be read after the protection was lifted.
    Hidden(u64),
    /// Nothing but zeros, and no memory behind it if `true`.
    Zeros(bool),
    /// The file's own content from this offset on, except for pages written (every fourth, with this seed).
    File { bytes: Vec<u8>, written: Option<u64> },
}

struct Region {
    name: &'static str,
    memory: Mapping,
    content: Content,
    /// Protection, path and flags as the kernel showed them at the start.
    shown: Vec<String>,
}

impl Region {
    fn new(name: &'static str, memory: Mapping, content: Content) -> Self {
        let shown = shown(&memory);
        Self { name, memory, content, shown }
    }

    /// Private memory with a pattern, then changed by `then`.
    fn anonymous(
        name: &'static str,
        seed: u64,
        flags: i32,
        then: impl FnOnce(&Mapping) -> std::io::Result<()>,
    ) -> Self {
        let memory = Mapping::new(256 << 10, WRITE, PRIVATE | flags, None).expect("map");
        Pattern::new(seed).fill(memory.words_mut(), 0);
        then(&memory).unwrap_or_else(|error| panic!("{name}: {error}"));
        Self::new(name, memory, Content::Pattern(seed))
    }

    fn check(&self, checker: &Checker) {
        checker.equal(&format!("{} in smaps", self.name), &shown(&self.memory), &self.shown);
        let wrong = match &self.content {
            Content::Pattern(seed) => Pattern::new(*seed).first_wrong(self.memory.words(), 0),
            Content::Hidden(seed) => {
                checker.works("lift the protection", self.memory.protect(READ));
                let wrong = Pattern::new(*seed).first_wrong(self.memory.words(), 0);
                checker.works("protect again", self.memory.protect(libc::PROT_NONE));
                wrong
            }
            Content::Zeros(untouched) => {
                let wrong = self.memory.words().iter().position(|word| *word != 0);
                if *untouched {
                    checker.equal(&format!("anonymous memory of {}", self.name), &anonymous_kib(&self.memory), &0);
                }
                wrong
            }
            Content::File { bytes, written } => first_wrong_in_file(&self.memory, bytes, *written),
        };
        checker.that(wrong.is_none(), || format!("{} is wrong from word {wrong:?}", self.name));
    }
}

fn main() {
    let args = Args::parse();
    let control = Control::new("mappings", &args);
    let checker = Arc::clone(&control.checker);
    let mut regions = anonymous_regions();
    regions.extend(file_regions(&args));
    let gaps = Gaps::new();
    let guarded = Guarded::new();
    let mut heap = Heap::new();
    let mut stack = GrowingStack::new();
    let mut depth = 32;
    recurse(depth);
    let meter = Meter::start(Duration::from_millis(1));
    nix::sys::prctl::set_name(c"renamed process").expect("rename");
    let before = SelfState::of_process().without(&["parent"]);
    control.ready();
    control.serve(Some(&meter), Duration::from_millis(300), |request| {
        SelfState::of_process().check(&checker, "process", &before);
        gaps.check(&checker);
        guarded.check(&checker);
        for region in &regions {
            region.check(&checker);
        }
        if request.thorough() {
            heap.check_and_grow(&checker);
            stack.check_and_grow(&checker);
            depth += 4;
            checker.equal("deep recursion", &recurse(depth), &depth);
        }
    });
}

fn anonymous_regions() -> Vec<Region> {
    let zeros = Mapping::private(32 << 20).expect("map");
    zeros.advise(libc::MADV_NOHUGEPAGE).expect("small pages");
    let explicit = Mapping::private(16 << 20).expect("map");
    explicit.words_mut().iter_mut().step_by(PAGE / 8).for_each(|word| *word = 0);
    let hidden = Mapping::private(64 << 10).expect("map");
    Pattern::new(3).fill(hidden.words_mut(), 0);
    hidden.protect(libc::PROT_NONE).expect("protect");
    let low = fixed(0x10000, 16 * PAGE, 0);
    Pattern::new(4).fill(low.words_mut(), 0);
    let lock = |memory: &Mapping| {
        // SAFETY: the range is a mapping of ours; locking changes neither content nor protection.
        let result = unsafe { libc::mlock(memory.start() as *const _, memory.length()) };
        if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    let lock_on_fault = |memory: &Mapping| {
        // SAFETY: as above.
        let result = unsafe { libc::mlock2(memory.start() as *const _, memory.length(), libc::MLOCK_ONFAULT) };
        if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    let droppable = Mapping::new(64 << 10, WRITE, MAP_DROPPABLE, None).expect("map memory that the kernel may drop");
    vec![
        Region::anonymous("plain", 1, 0, |_| Ok(())),
        Region::anonymous("read-only", 2, 0, |memory| memory.protect(READ)),
        Region::new("no access", hidden, Content::Hidden(3)),
        Region::new("low", low, Content::Pattern(4)),
        Region::anonymous("executable", 5, 0, |memory| memory.protect(READ | libc::PROT_EXEC)),
        Region::anonymous("dontfork", 6, 0, |memory| memory.advise(libc::MADV_DONTFORK)),
        Region::anonymous("dontdump", 7, 0, |memory| memory.advise(libc::MADV_DONTDUMP)),
        Region::anonymous("wipeonfork", 8, 0, |memory| memory.advise(libc::MADV_WIPEONFORK)),
        Region::anonymous("nohugepage", 9, 0, |memory| memory.advise(libc::MADV_NOHUGEPAGE)),
        Region::anonymous("random access", 10, 0, |memory| memory.advise(libc::MADV_RANDOM)),
        Region::anonymous("sequential access", 13, 0, |memory| memory.advise(libc::MADV_SEQUENTIAL)),
        Region::anonymous("hugepage", 14, 0, |memory| memory.advise(libc::MADV_HUGEPAGE)),
        Region::anonymous("mergeable", 15, 0, |memory| memory.advise(libc::MADV_MERGEABLE)),
        Region::anonymous("locked on fault", 16, 0, lock_on_fault),
        Region::new("droppable", droppable, Content::Zeros(false)),
        Region::anonymous("noreserve", 11, libc::MAP_NORESERVE, |_| Ok(())),
        Region::anonymous("locked", 12, 0, lock),
        Region::new("read but never written", zeros, Content::Zeros(true)),
        Region::new("written with zeros", explicit, Content::Zeros(false)),
    ]
}

fn file_regions(args: &Args) -> Vec<Region> {
    let path = args.dir().join("mapped");
    let bytes = Pattern::new(20).bytes(64 * PAGE + 100);
    fs::write(&path, &bytes).expect("write the mapped file");
    let file = OpenOptions::new().read(true).write(true).open(&path).expect("open the mapped file");
    let read_only = File::open(&path).expect("open the mapped file");
    let map = |prot, file: &File, first: usize, pages: usize| {
        Mapping::new(pages * PAGE, prot, PRIVATE, Some((file, (first * PAGE) as u64))).expect("map a file")
    };
    let content = |first: usize, written| Content::File { bytes: bytes[first * PAGE..].to_vec(), written };
    let dirty = map(WRITE, &file, 2, 16);
    write_every_fourth(&dirty, 21);
    let sealed = map(WRITE, &file, 8, 16);
    write_every_fourth(&sealed, 22);
    sealed.protect(READ).expect("protect");
    vec![
        Region::new("clean file mapping", map(READ, &read_only, 1, 16), content(1, None)),
        Region::new("writable but clean file mapping", map(WRITE, &read_only, 1, 16), content(1, None)),
        Region::new("written file mapping", dirty, content(2, Some(21))),
        Region::new("written, then read-only file mapping", sealed, content(8, Some(22))),
        Region::new("executable file mapping", map(READ | libc::PROT_EXEC, &read_only, 3, 4), content(3, None)),
        Region::new("file mapping beyond the end", map(READ, &read_only, 60, 16), content(60, None)),
    ]
}

fn write_every_fourth(memory: &Mapping, seed: u64) {
    for page in memory.words_mut().chunks_mut(PAGE / 8).step_by(4) {
        Pattern::new(seed).fill(page, 0);
    }
}

/// Compares a mapping with the file's bytes, as far as they go, and with the pages written since.
fn first_wrong_in_file(memory: &Mapping, bytes: &[u8], written: Option<u64>) -> Option<usize> {
    let pages = memory.length().min(bytes.len().next_multiple_of(PAGE)) / PAGE;
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().next_multiple_of(PAGE).max(pages * PAGE), 0);
    let words = memory.part(0, pages * PAGE);
    for (number, page) in words.words().chunks(PAGE / 8).enumerate() {
        let wrong = match written {
            Some(seed) if number % 4 == 0 => Pattern::new(seed).first_wrong(page, 0),
            _ => {
                let want = bytes[number * PAGE..].as_chunks::<8>().0;
                page.iter().zip(want).position(|(word, want)| *word != u64::from_le_bytes(*want))
            }
        };
        if let Some(word) = wrong {
            return Some(number * PAGE / 8 + word);
        }
    }
    None
}

/// What the kernel says about a mapping that does not depend on its neighbours.
fn shown(memory: &Mapping) -> Vec<String> {
    let Some(entry) = smaps_entry(memory.start()) else {
        return vec!["is not there".to_owned()];
    };
    let mut shown: Vec<String> =
        entry[0].split_whitespace().enumerate().filter(|(at, _)| matches!(at, 1 | 5)).map(|(_, s)| s.into()).collect();
    let flags = entry.iter().find_map(|line| line.strip_prefix("VmFlags:")).unwrap_or_default();
    shown.extend(flags.split_whitespace().filter(|flag| VM_FLAGS.contains(flag)).map(str::to_owned));
    shown
}

fn anonymous_kib(memory: &Mapping) -> u64 {
    let entry = smaps_entry(memory.start()).unwrap_or_default();
    let line = entry.iter().find_map(|line| line.strip_prefix("Anonymous:")).unwrap_or("? kB");
    line.trim().trim_end_matches(" kB").parse().unwrap_or(u64::MAX)
}

/// Maps memory at an address that must be free.
fn fixed(address: usize, length: usize, flags: i32) -> Mapping {
    Mapping::at(address, length, WRITE, PRIVATE | flags).expect("map at a fixed address")
}

/// A mapping whose odd pages cannot be accessed and that has a hole in the middle.
struct Gaps {
    memory: Mapping,
}

impl Gaps {
    const PAGES: usize = 32;
    const HOLE: std::ops::Range<usize> = 12..16;

    fn new() -> Self {
        let memory = Mapping::at(0x2100_0000_0000, Self::PAGES * PAGE, WRITE, PRIVATE).expect("map");
        for page in 0..Self::PAGES {
            let part = memory.part(page * PAGE, PAGE);
            if Self::HOLE.contains(&page) {
                // SAFETY: the page belongs to the mapping and nothing refers to it.
                assert_eq!(unsafe { libc::munmap(part.start() as *mut _, PAGE) }, 0, "munmap");
            } else if page % 2 == 0 {
                Pattern::new(page as u64).fill(part.words_mut(), 0);
            } else {
                part.protect(libc::PROT_NONE).expect("protect");
            }
        }
        Self { memory }
    }

    fn check(&self, checker: &Checker) {
        for page in 0..Self::PAGES {
            let part = self.memory.part(page * PAGE, PAGE);
            let protection = smaps_entry(part.start()).and_then(|entry| entry[0].get(26..30).map(str::to_owned));
            let want = match page {
                _ if Self::HOLE.contains(&page) => None,
                _ if page % 2 == 0 => Some("rw-p"),
                _ => Some("---p"),
            };
            checker.equal(&format!("protection of page {page}"), &protection.as_deref(), &want);
            if want == Some("rw-p") {
                let wrong = Pattern::new(page as u64).first_wrong(part.words(), 0);
                checker.equal(&format!("first wrong word of page {page}"), &wrong, &None);
            }
        }
    }
}

/// A mapping with a guard page in it.
struct Guarded {
    memory: Mapping,
}

impl Guarded {
    const PAGES: usize = 8;
    const GUARD: usize = 3;

    fn new() -> Self {
        let memory = Mapping::private(Self::PAGES * PAGE).expect("map");
        Pattern::new(50).fill(memory.words_mut(), 0);
        memory.part(Self::GUARD * PAGE, PAGE).advise(MADV_GUARD_INSTALL).expect("make a page a guard");
        Self { memory }
    }

    fn check(&self, checker: &Checker) {
        let first_wrong = |page: usize| {
            let part = self.memory.part(page * PAGE, PAGE);
            let mut bytes = vec![0; PAGE];
            let remote = [RemoteIoVec { base: part.start(), len: PAGE }];
            // What would be a signal is an error here.
            let read = process_vm_readv(Pid::this(), &mut [IoSliceMut::new(&mut bytes)], &remote);
            let words: Vec<u64> = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
            read.map(|_| Pattern::new(50).first_wrong(&words, (page * PAGE / 8) as u64))
        };
        for page in 0..Self::PAGES {
            let want = if page == Self::GUARD { Err(Errno::EFAULT) } else { Ok(None) };
            checker.equal(&format!("page {page} beside a guard"), &first_wrong(page), &want);
        }
    }
}

/// The heap behind brk(2), used next to the allocator's.
struct Heap(Vec<Mapping>);

impl Heap {
    fn new() -> Self {
        Self(vec![Self::grow(1 << 20)])
    }

    fn grow(length: usize) -> Mapping {
        // SAFETY: growing the heap touches no memory that is in use, and the allocator copes with a break moved by others.
        let start = unsafe { libc::sbrk(length.cast_signed()) } as usize;
        assert_ne!(start, usize::MAX, "sbrk");
        let memory = Mapping::adopt(start.next_multiple_of(8), length - 8);
        Pattern::new(30).fill(memory.words_mut(), 0);
        memory
    }

    fn check_and_grow(&mut self, checker: &Checker) {
        for memory in &self.0 {
            checker.equal("first wrong word of the heap", &Pattern::new(30).first_wrong(memory.words(), 0), &None);
        }
        self.0.push(Self::grow(PAGE));
    }
}

/// A mapping that grows downwards when the page below it is touched.
struct GrowingStack {
    top: Mapping,
    grown: usize,
}

impl GrowingStack {
    fn new() -> Self {
        let top = fixed(0x2200_0000_0000, 16 * PAGE, libc::MAP_GROWSDOWN);
        Pattern::new(40).fill(top.words_mut(), 0);
        let mut stack = Self { top, grown: 0 };
        stack.touch_below();
        stack
    }

    fn touch_below(&mut self) {
        self.grown += 1;
        let page = Mapping::adopt(self.top.start() - self.grown * PAGE, PAGE);
        Pattern::new(self.grown as u64).fill(page.words_mut(), 0);
    }

    fn check_and_grow(&mut self, checker: &Checker) {
        checker.equal("top of the stack", &Pattern::new(40).first_wrong(self.top.words(), 0), &None);
        for number in 1..=self.grown {
            let page = Mapping::adopt(self.top.start() - number * PAGE, PAGE);
            let wrong = Pattern::new(number as u64).first_wrong(page.words(), 0);
            checker.equal(&format!("page {number} below the stack"), &wrong, &None);
        }
        self.touch_below();
    }
}

/// Uses 64 KiB of the main thread's stack for each level.
#[inline(never)]
fn recurse(depth: usize) -> usize {
    let block = std::hint::black_box([depth as u64; 8192]);
    if depth == 0 {
        return 0;
    }
    let below = recurse(depth - 1);
    if std::hint::black_box(&block).iter().all(|word| *word == depth as u64) { below + 1 } else { 0 }
}
