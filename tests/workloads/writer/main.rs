//! A tree that writes memory at random at a chosen rate, and knows what each page must be: what came back old, torn or
//! in another place is found and named.
//!
//! Options:
//!
//! - `--heap MiB` (default 64), `--thp` (huge pages for it), `--unforked` (parts of it that a fork does not get)
//! - `--pages-per-second N|max` (default 0) that each process writes, `--threads N` (default 1) that share this work
//! - `--children N`: forked after half of the heap was written, with writes of their own
//! - `--shared MiB`: anonymous shared memory, and a memfd that is written through its descriptor too, both by everybody
//! - `--file MiB`: a private mapping of a file
//! - `--churn`: everything that makes pages vanish, move and come again with other content at the same address; a
//!   further child does it with its data segment
//! - `--seed N`, `--clock-us N` (sleep of the clock loop)

mod brief;
mod churn;
mod process;
mod stacks;

use std::fs::{self, File};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use standstill_tests::workload::{Args, Book, Control, Mapping, Meter, Pattern, SelfState, fork_child};

use process::{Part, Process, Rate};

/// Names of memories.
const HEAP: u32 = 1;
const SHARED: u32 = 0x100;
const MEMFD: u32 = 0x101;
const FILE: u32 = 0x102;

const WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

fn main() {
    let args = Args::parse();
    if args.flag("brief") {
        brief::run(&args);
    }
    let mut control = Control::new("writer", &args);
    let churn = args.flag("churn");
    let children: usize = args.value("children", 0);
    let members = 1 + children + usize::from(churn);
    assert!(members < 512, "at most 500 children");
    let setting = process::Setting {
        seed: args.value("seed", 1),
        rate: args.value("pages-per-second", Rate::Paced(0)),
        churn: churn.then(|| args.dir()),
        members,
    };
    let threads = args.value("threads", 1_usize).max(1);
    let mut memory = Memory::new(&args, threads, members);
    memory.write_heap(0, 2);
    for number in 1..members {
        let member = format!("child{number}");
        let child = control.for_child(&member);
        let pid = fork_child(|| {
            // The child that moves its data segment has no other thread that could do so.
            let alone = churn && number == members - 1;
            let process = Process::start(number, memory.parts_of(number), &setting, &child.checker, alone);
            process.serve(child, None);
        });
        control.adopt(pid, &member);
    }
    memory.write_heap(1, 2);
    let huge_kib = memory.huge_kib();
    control.checker.figure("huge_kib", huge_kib);
    let checker = Arc::clone(&control.checker);
    let mut process = Process::start(0, memory.parts_of(0), &setting, &checker, false);
    let meter = Meter::start(Duration::from_micros(args.value("clock-us", 1000)));
    if !churn {
        process.remember(SelfState::of_process().without(&["parent"]));
    }
    control.ready();
    process.serve(control, Some(&meter));
}

/// All memory of a tree before it is shared out.
struct Memory {
    heap: Vec<Book>,
    shared: Option<Mapping>,
    memfd: Option<(Mapping, Arc<File>)>,
    file: Option<Book>,
    members: usize,
}

impl Memory {
    fn new(args: &Args, threads: usize, members: usize) -> Self {
        let mib = |name, default: usize| args.value(name, default) << 20;
        let heap = heap(mib("heap", 64), args.flag("thp"));
        if args.flag("unforked") {
            let quarter = heap.length() / 4;
            let part = |number: usize| heap.part(number * quarter, quarter);
            part(1).advise(libc::MADV_DONTFORK).expect("advice about forks");
            part(2).advise(libc::MADV_WIPEONFORK).expect("advice about forks");
        }
        let each = (heap.length() / threads).next_multiple_of(2 << 20);
        let part = |thread: usize| {
            let start = (thread * each).min(heap.length());
            let part = heap.part(start, each.min(heap.length() - start));
            Book::new(part, HEAP + thread as u32)
        };
        assert!(threads < 0x80, "at most 127 threads");
        let shared = mib("shared", 0);
        let memfd = || {
            let file = File::from(memfd_create(c"writer", MFdFlags::MFD_CLOEXEC).expect("memfd"));
            file.set_len(shared as u64).expect("size of the memfd");
            (map_shared(shared, Some((&file, 0))), Arc::new(file))
        };
        Self {
            heap: (0..threads).map(part).collect(),
            shared: (shared > 0).then(|| map_shared(shared, None)),
            memfd: (shared > 0).then(memfd),
            file: Some(mib("file", 0)).filter(|length| *length > 0).map(|length| private_file(args, length)),
            members,
        }
    }

    /// Writes the pages of the heap whose number modulo `step` is `first`.
    fn write_heap(&mut self, first: usize, step: usize) {
        for book in &mut self.heap {
            (first..book.len()).step_by(step).for_each(|page| book.write(page, 0));
        }
    }

    /// What each thread of a process writes.
    fn parts_of(&self, number: usize) -> Vec<Part> {
        let part = |heap: &Book| Part { heap: Some(heap.clone()), ..Part::default() };
        let mut parts: Vec<Part> = self.heap.iter().map(part).collect();
        let first = &mut parts[0];
        let ours = (number, self.members);
        first.shared.extend(self.shared.map(|memory| Book::of_every(memory, SHARED, ours)));
        let memfd = self.memfd.as_ref();
        first.shared.extend(memfd.map(|(memory, file)| Book::of_every(*memory, MEMFD, ours).with_file(file.clone())));
        first.file.clone_from(&self.file);
        parts
    }

    /// How much of the heap are huge pages.
    fn huge_kib(&self) -> u64 {
        let text = fs::read_to_string("/proc/self/smaps_rollup").unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("AnonHugePages:"));
        line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
    }
}

fn map_shared(length: usize, file: Option<(&File, u64)>) -> Mapping {
    Mapping::new(length, WRITE, libc::MAP_SHARED, file).expect("map shared memory")
}

/// Private memory that begins at a huge page.
fn heap(length: usize, thp: bool) -> Mapping {
    const HUGE: usize = 2 << 20;
    let whole = Mapping::private(length + HUGE).expect("map the heap");
    let heap = whole.part(whole.start().next_multiple_of(HUGE) - whole.start(), length);
    let advice = if thp { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
    heap.advise(advice).expect("advice about huge pages");
    heap
}

/// A private mapping of a file with a pattern.
fn private_file(args: &Args, length: usize) -> Book {
    let path = args.dir().join("content");
    let pattern = Pattern::new(FILE.into());
    fs::write(&path, pattern.bytes(length)).expect("write the file");
    let file = File::open(&path).expect("open the file");
    let memory = Mapping::new(length, WRITE, libc::MAP_PRIVATE, Some((&file, 0))).expect("map the file");
    Book::new(memory, FILE).over_pattern(pattern)
}
