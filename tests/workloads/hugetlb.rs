//! Huge pages of hugetlbfs: private, shared, copied on write, of memfds, of System V segments (`--system-v`) and of files,
//! which are written to all the time.
//!
//! `--page-size` in bytes. `--few` leaves out most of it, `--untouched` has no page at all. `--mount DIR` is a hugetlbfs for files, of which
//! `--nameless` writes only to those that have no name. `--heap MIB` of ordinary
//! memory besides. `--odd-segment` makes a System V segment that does not consist of whole pages.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use standstill_tests::workload::{
    Args, Book, Checker, Control, Mapping, Meter, PAGE, Pattern, Random, Request, Segment, SelfState, fork_child,
    smaps_entry,
};

const WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;
const ANONYMOUS: i32 = libc::MAP_PRIVATE | libc::MAP_HUGETLB;
const CHILDREN: usize = 2;
/// Processes that write to shared memory.
const WRITERS: usize = CHILDREN + 1;
/// Of a huge page, so much is written to at most at either end.
const WRITTEN: usize = 1 << 20;
/// What smaps says of how much memory there is.
const AMOUNTS: [&str; 2] = ["Private_Hugetlb:", "Shared_Hugetlb:"];
/// Flags of smaps' `VmFlags` line that a mapping keeps.
const VM_FLAGS: [&str; 9] = ["rd", "wr", "mr", "mw", "sh", "ht", "nr", "dc", "dd"];

/// Bytes of the huge pages.
#[derive(Clone, Copy)]
struct Size(usize);

impl Size {
    /// As mmap(2) and the like take it among their flags.
    const fn flag(self) -> i32 {
        (self.0.trailing_zeros() << libc::MAP_HUGE_SHIFT).cast_signed()
    }

    fn anonymous(self, pages: usize, flags: i32) -> Mapping {
        Mapping::new(pages * self.0, WRITE, flags | libc::MAP_HUGETLB | self.flag(), None).expect("map huge pages")
    }

    fn memfd(self, name: &std::ffi::CStr, pages: usize) -> File {
        let flags = MFdFlags::MFD_HUGETLB | MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC;
        let flags = flags | MFdFlags::from_bits_retain(self.flag().cast_unsigned());
        let file = File::from(memfd_create(name, flags).expect("memfd of huge pages"));
        file.set_len((pages * self.0) as u64).expect("size of the memfd");
        file
    }
}

/// A mapping of which the first pages are in use, and the others untouched.
struct Region {
    name: &'static str,
    memory: Mapping,
    used: usize,
    size: Size,
    content: Content,
    /// What smaps says besides amounts.
    shown: Vec<String>,
}

enum Content {
    /// Pages at both ends of each huge page that this process writes.
    Books(Vec<Book>),
    /// A pattern that stays; `true`: it can only be read after the protection was lifted.
    Pattern(u64, bool),
    /// Zeros, all of them there.
    Zeros,
    /// The pattern of a file, and from the second huge page on one of our own with pages of zeros in it.
    OverFile(u64),
}

impl Region {
    fn new(name: &'static str, memory: Mapping, used: usize, size: Size, content: Content) -> Self {
        let shown = shown(&memory);
        Self { name, memory, used, size, content, shown }
    }

    /// Memory that this process, number `member` of `members`, writes all the time.
    fn written(
        name: &'static str,
        number: u32,
        memory: Mapping,
        used: usize,
        size: Size,
        member: (usize, usize),
    ) -> Self {
        let piece = size.0.min(2 * WRITTEN) / 2;
        let place = |at: usize| at / 2 * size.0 + at % 2 * (size.0 - piece);
        let book = |at: usize| {
            let name = number << 16 | u32::try_from(at).expect("a small number");
            let mut book = Book::of_every(memory.part(place(at), piece), name, member);
            (0..book.len()).step_by(3).for_each(|page| book.write(page, 1));
            book
        };
        Self::new(name, memory, used, size, Content::Books((0..2 * used).map(book).collect()))
    }

    fn pattern(name: &'static str, seed: u64, memory: Mapping, size: Size, prot: i32) -> Self {
        Pattern::new(seed).fill(memory.words_mut(), 0);
        memory.protect(prot).expect("protect");
        Self::new(name, memory, memory.length() / size.0, size, Content::Pattern(seed, prot == libc::PROT_NONE))
    }

    fn write(&mut self, random: &mut Random, writer: u16) {
        if let Content::Books(books) = &mut self.content
            && !books.is_empty()
        {
            let book = random.below(books.len());
            let page = random.below(books[book].len());
            books[book].write(page, writer);
        }
    }

    fn check(&self, checker: &Checker) {
        match &self.content {
            Content::Books(books) => books.iter().for_each(|book| book.check(checker, self.name)),
            Content::Pattern(seed, hidden) => {
                if *hidden {
                    checker.works("lift the protection", self.memory.protect(libc::PROT_READ));
                }
                let wrong = Pattern::new(*seed).first_wrong(self.memory.words(), 0);
                checker.equal(&format!("first wrong word of {}", self.name), &wrong, &None);
                if *hidden {
                    checker.works("protect again", self.memory.protect(libc::PROT_NONE));
                }
            }
            Content::Zeros => {
                // Looked at after the amount, which reading must not be the reason for.
                self.check_amount(checker);
                let wrong = self.memory.words().iter().position(|word| *word != 0);
                checker.equal(&format!("first word of {} that is not zero", self.name), &wrong, &None);
            }
            Content::OverFile(seed) => {
                let (clean, own) = (self.memory.part(0, self.size.0), self.memory.part(self.size.0, self.size.0));
                let wrong = Pattern::new(*seed).first_wrong(clean.words(), 0);
                checker.equal(&format!("first wrong word of the file's part of {}", self.name), &wrong, &None);
                let wrong = wrong_in_own(&own, *seed);
                checker.equal(&format!("first wrong page of our part of {}", self.name), &wrong, &None);
            }
        }
        checker.equal(&format!("{} in smaps", self.name), &shown(&self.memory), &self.shown);
        self.check_amount(checker);
    }

    /// Pages that were never touched are not there.
    fn check_amount(&self, checker: &Checker) {
        let what = format!("huge pages of {} that are there", self.name);
        checker.equal(&what, &amount(&self.memory, self.size), &self.used);
    }
}

/// Every second page is of zeros.
fn write_own(own: &Mapping, seed: u64) {
    for page in 0..own.length() / PAGE {
        let part = own.part(page * PAGE, PAGE);
        match page % 2 {
            0 => part.words_mut().fill(0),
            _ => Pattern::new(seed + 1).fill(part.words_mut(), page as u64),
        }
    }
}

fn wrong_in_own(own: &Mapping, seed: u64) -> Option<usize> {
    (0..own.length() / PAGE).find(|page| {
        let part = own.part(page * PAGE, PAGE);
        match page % 2 {
            0 => part.words().iter().any(|word| *word != 0),
            _ => Pattern::new(seed + 1).first_wrong(part.words(), *page as u64).is_some(),
        }
    })
}

/// Page size, protection, path and flags as smaps has them.
fn shown(memory: &Mapping) -> Vec<String> {
    let Some(entry) = smaps_entry(memory.start()) else { return vec!["is not there".to_owned()] };
    let fields = entry[0].split_whitespace().enumerate().filter(|(at, _)| matches!(at, 1 | 2 | 5));
    let mut shown: Vec<String> = fields.map(|(_, field)| field.to_owned()).collect();
    for line in &entry[1..] {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            shown.extend(flags.split_whitespace().filter(|flag| VM_FLAGS.contains(flag)).map(str::to_owned));
        } else if line.starts_with("KernelPageSize:") || line.starts_with("Size:") {
            shown.push(line.split_whitespace().collect());
        }
    }
    shown
}

/// Huge pages in the page table of this process.
fn amount(memory: &Mapping, size: Size) -> usize {
    let entry = smaps_entry(memory.start()).unwrap_or_default();
    let kib = |line: &String| {
        let value = AMOUNTS.iter().find_map(|name| line.strip_prefix(name))?;
        value.trim().trim_end_matches(" kB").parse::<usize>().ok()
    };
    (entry.iter().filter_map(kib).sum::<usize>() << 10) / size.0
}

/// A memfd or file, and what is told of it.
struct Told {
    name: &'static str,
    file: File,
    told: (u64, u64, u64, Option<i32>),
}

impl Told {
    fn check(&self, checker: &Checker) {
        let what = format!("size, size of a page, blocks and seals of {}", self.name);
        checker.equal(&what, &tell(&self.file), &self.told);
    }
}

fn tell(file: &File) -> (u64, u64, u64, Option<i32>) {
    let meta = file.metadata().expect("fstat");
    (meta.size(), meta.blksize(), meta.blocks(), fcntl(file, FcntlArg::F_GET_SEALS).ok())
}

/// What one process has.
struct Member {
    regions: Vec<Region>,
    files: Vec<Told>,
    heap: Option<Book>,
    random: Random,
    writer: u16,
}

impl Member {
    fn serve(mut self, control: Control, meter: Option<&Meter>) -> ! {
        let checker = Arc::clone(&control.checker);
        let before = SelfState::of_process().without(&["parent"]);
        control.serve(meter, Duration::from_millis(2), |request| {
            for region in &mut self.regions {
                region.write(&mut self.random, self.writer);
            }
            if let Some(heap) = &mut self.heap {
                for _ in 0..50 {
                    let page = self.random.below(heap.len());
                    heap.write(page, self.writer);
                }
            }
            if request != Request::Idle {
                self.check(&checker);
                SelfState::of_process().check(&checker, "process", &before);
            }
        })
    }

    fn check(&self, checker: &Checker) {
        self.regions.iter().for_each(|region| region.check(checker));
        self.files.iter().for_each(|file| file.check(checker));
        if let Some(heap) = &self.heap {
            heap.check(checker, "heap");
        }
    }
}

fn main() {
    let args = Args::parse();
    let mut control = Control::new("hugetlb", &args);
    let size = Size(args.value("page-size", 2 << 20));
    if args.flag("odd-segment") {
        let segment = Segment::huge(size.0 / 2, size.flag());
        segment.attach(0);
        segment.remove();
    }
    if args.flag("untouched") {
        untouched(size, control);
    }
    let few = args.flag("few");
    let (shared, mut files) = shared(size, &args);
    let all = |member: usize| -> Vec<Region> {
        let region = |(number, shared): (u32, &Shared)| {
            Region::written(shared.name, number, shared.memory, shared.used, size, (member, WRITERS))
        };
        (100..).zip(&shared).map(region).collect()
    };
    let cow = || Region::written("copied on write", 50, size.anonymous(4, ANONYMOUS), 3, size, (0, 1));
    let mut cow = (!few).then(cow);
    for number in 1..=CHILDREN {
        let name = format!("child{number}");
        let child = control.for_child(&name);
        let pid = fork_child(|| {
            let regions = all(number).into_iter().chain(cow.take()).collect();
            let writer = u16::try_from(1 + number).expect("a small number");
            Member { regions, files: Vec::new(), heap: None, random: Random::new(number as u64), writer }
                .serve(child, None)
        });
        control.adopt(pid, &name);
    }
    let mut regions = private(size, few);
    regions.extend(cow);
    regions.extend(all(0));
    regions.extend(over_files(size, &args, &mut files));
    let heap = match args.value("heap", 0) {
        0 => None,
        mib => Some(Book::new(Mapping::private(mib << 20).expect("map a heap"), 1)),
    };
    // Only now all that they have is there.
    let files = files.into_iter().map(|(name, file)| Told { name, told: tell(&file), file }).collect();
    let meter = Meter::start(Duration::from_millis(1));
    control.ready();
    Member { regions, files, heap, random: Random::new(99), writer: 1 }.serve(control, Some(&meter))
}

/// Memory that takes no page from the machine.
fn untouched(size: Size, control: Control) -> ! {
    let region = |name, flags| {
        let memory = size.anonymous(2, flags | libc::MAP_NORESERVE);
        Region::new(name, memory, 0, size, Content::Books(Vec::new()))
    };
    let regions = vec![region("private", libc::MAP_PRIVATE), region("shared", libc::MAP_SHARED)];
    let file = size.memfd(c"empty", 3);
    let files = vec![Told { name: "memfd", told: tell(&file), file }];
    control.ready();
    Member { regions, files, heap: None, random: Random::new(1), writer: 1 }.serve(control, None)
}

/// Private memory without a file.
fn private(size: Size, few: bool) -> Vec<Region> {
    let written = |name, number, pages, used, flags| {
        Region::written(name, number, size.anonymous(pages, ANONYMOUS | flags), used, size, (0, 1))
    };
    if few {
        return vec![written("private", 1, 1, 1, 0), written("without reservation", 2, 2, 0, libc::MAP_NORESERVE)];
    }
    let zeros = size.anonymous(2, ANONYMOUS);
    zeros.words_mut().iter_mut().step_by(PAGE / 8).for_each(|word| *word = 0);
    // Three mappings of one file.
    let split = size.anonymous(3, ANONYMOUS);
    let part = |at: usize| split.part(at * size.0, size.0);
    let undumped = size.anonymous(1, ANONYMOUS);
    undumped.advise(libc::MADV_DONTDUMP).expect("advise");
    let mut regions = vec![
        Region::pattern("read-only", 20, part(0), size, libc::PROT_READ),
        Region::pattern("no access", 21, part(1), size, libc::PROT_NONE),
        Region::pattern("behind them", 22, part(2), size, WRITE),
    ];
    // Only now they are mappings of their own.
    regions.iter_mut().for_each(|region| region.shown = shown(&region.memory));
    regions.extend([
        written("private", 1, 6, 4, 0),
        written("without reservation", 2, 8, 2, libc::MAP_NORESERVE),
        Region::new("zeros", zeros, 2, size, Content::Zeros),
        Region::new("untouched", size.anonymous(3, ANONYMOUS), 0, size, Content::Books(Vec::new())),
        Region::written("not in core files", 3, undumped, 1, size, (0, 1)),
    ]);
    regions
}

/// Memory that all processes share.
struct Shared {
    name: &'static str,
    memory: Mapping,
    /// Huge pages in use.
    used: usize,
}

/// Files to be watched.
type Files = Vec<(&'static str, File)>;

fn map(size: Size, file: &File, flags: i32, first: usize, pages: usize) -> Mapping {
    Mapping::new(pages * size.0, WRITE, flags, Some((file, (first * size.0) as u64))).expect("map a file")
}

fn shared(size: Size, args: &Args) -> (Vec<Shared>, Files) {
    let new = |name, memory, used| Shared { name, memory, used };
    if args.flag("few") {
        return (vec![new("shared", size.anonymous(1, libc::MAP_SHARED), 1)], Vec::new());
    }
    let memfd = size.memfd(c"written", 4);
    let mut all = vec![
        new("shared", size.anonymous(5, libc::MAP_SHARED), 3),
        new("shared without reservation", size.anonymous(5, libc::MAP_SHARED | libc::MAP_NORESERVE), 1),
        new("memfd", map(size, &memfd, libc::MAP_SHARED, 1, 3), 2),
    ];
    fcntl(&memfd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK)).expect("seal");
    let mut files = vec![("written memfd", memfd)];
    if args.flag("system-v") {
        let segment = Segment::huge(3 * size.0, size.flag());
        all.push(new("System V segment", Mapping::adopt(segment.attach(0), 3 * size.0), 2));
        segment.remove();
    }
    // What others do to a file with a name after a dump is not taken back by a restore.
    let names = [("deleted file", true), ("named file", false)];
    for (name, deleted) in names.into_iter().take(if args.flag("nameless") { 1 } else { 2 }) {
        let Some((file, path)) = create(args, name, 3 * size.0) else { continue };
        all.push(new(name, map(size, &file, libc::MAP_SHARED, 0, 3), 2));
        if deleted {
            fs::remove_file(path).expect("remove the file");
        }
        files.push((name, file));
    }
    (all, files)
}

/// Private mappings of files with content.
fn over_files(size: Size, args: &Args, files: &mut Files) -> Vec<Region> {
    if args.flag("few") {
        return Vec::new();
    }
    let sealed = size.memfd(c"sealed", 2);
    let mut all = vec![over_file("over a memfd", 30, size, &sealed)];
    fcntl(&sealed, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).expect("seal");
    files.push(("sealed memfd", sealed));
    if let Some((file, _)) = create(args, "static file", 2 * size.0) {
        all.push(over_file("over a named file", 32, size, &file));
        files.push(("static file", file));
    }
    all
}

fn over_file(name: &'static str, seed: u64, size: Size, file: &File) -> Region {
    let content = map(size, file, libc::MAP_SHARED, 0, 2);
    Pattern::new(seed).fill(content.words_mut(), 0);
    // SAFETY: nobody has a reference into the mapping.
    assert_eq!(unsafe { libc::munmap(content.start() as *mut _, content.length()) }, 0, "munmap");
    let memory = map(size, file, libc::MAP_PRIVATE, 0, 2);
    write_own(&memory.part(size.0, size.0), seed);
    Region::new(name, memory, 2, size, Content::OverFile(seed))
}

/// A file in the hugetlbfs of `--mount`, if there is one.
fn create(args: &Args, name: &str, length: usize) -> Option<(File, PathBuf)> {
    let mount: PathBuf = args.value("mount", PathBuf::new());
    let path = mount.join(name.replace(' ', "-"));
    let mut options = OpenOptions::new();
    let file = mount.is_absolute().then(|| options.read(true).write(true).create_new(true).open(&path))?;
    let file = file.expect("create a file");
    file.set_len(length as u64).expect("size of the file");
    Some((file, path))
}
