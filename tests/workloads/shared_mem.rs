//! Three processes that talk to each other through shared memory: anonymous, of a file, (`--memfd`) of a memfd, and
//! (`--system-v`) of System V segments. The ids of those that stay are in the file `segments`; `--in-part` unmaps a part of
//! one.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use standstill_tests::workload::{
    Args, Checker, Control, Mapping, Meter, Pattern, Segment, SelfState, fork_child, now_us,
};

const LENGTH: usize = 1 << 20;
/// Where the mapping of the file starts, so that the offset matters.
const FILE_OFFSET: u64 = 64 << 10;
const CHILDREN: usize = 2;
/// Word that holds the question; a child's answer is eight words further on for each child.
const QUESTION: usize = 0;
/// The first page is for talking, the rest has a fixed content.
const FIXED: usize = 4096;

/// A piece of shared memory, and the file behind it if there is one.
#[derive(Clone)]
struct Shared {
    name: &'static str,
    memory: Mapping,
    file: Option<(Arc<File>, u64)>,
}

impl Shared {
    fn new(name: &'static str, file: Option<(File, u64)>) -> Self {
        let place = file.as_ref().map(|(file, offset)| (file, *offset));
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let memory = Mapping::new(LENGTH, prot, libc::MAP_SHARED, place).expect("map shared memory");
        let shared = Self { name, memory, file: file.map(|(file, offset)| (Arc::new(file), offset)) };
        shared.pattern().fill(shared.fixed().words_mut(), 0);
        shared
    }

    /// A System V segment, which is removed at once or stays.
    fn segment(name: &'static str, key: i32, stays: bool) -> (Self, Segment) {
        let segment = Segment::new(key, LENGTH);
        let shared = Self { name, memory: Mapping::adopt(segment.attach(0), LENGTH), file: None };
        if !stays {
            segment.remove();
        }
        shared.pattern().fill(shared.fixed().words_mut(), 0);
        (shared, segment)
    }

    fn pattern(&self) -> Pattern {
        Pattern::new(self.name.len() as u64)
    }

    fn fixed(&self) -> Mapping {
        self.memory.part(FIXED, LENGTH - FIXED)
    }

    fn check(&self, checker: &Checker) {
        let wrong = self.pattern().first_wrong(self.fixed().words(), 0);
        checker.equal(&format!("first wrong word of {}", self.name), &wrong, &None);
    }

    /// Asks all processes a question and waits for their answers.
    fn ask(&self, checker: &Checker) {
        let question = now_us() | 1;
        self.memory.store(QUESTION, question);
        let limit = now_us() + 5_000_000;
        for child in 1..=CHILDREN {
            while self.memory.load(8 * child) != answer(question, child) && now_us() < limit {
                thread::sleep(Duration::from_millis(1));
            }
            let got = self.memory.load(8 * child);
            checker.equal(&format!("answer of child {child} in {}", self.name), &got, &answer(question, child));
        }
        if let Some((file, offset)) = &self.file {
            let mut word = [0; 8];
            checker.works("read the file behind the memory", file.read_exact_at(&mut word, *offset));
            checker.equal(&format!("file behind {}", self.name), &u64::from_le_bytes(word), &question);
        }
    }

    fn reply(&self, child: usize) {
        self.memory.store(8 * child, answer(self.memory.load(QUESTION), child));
    }
}

fn answer(question: u64, child: usize) -> u64 {
    Pattern::new(question).word(child as u64)
}

fn main() {
    let args = Args::parse();
    let mut control = Control::new("shared_mem", &args);
    let checker = Arc::clone(&control.checker);
    let mut shared = vec![Shared::new("anonymous", None), Shared::new("file", Some((file(&args.dir()), FILE_OFFSET)))];
    if args.flag("memfd") {
        let file = File::from(memfd_create(c"shared_mem", MFdFlags::MFD_CLOEXEC).expect("memfd"));
        file.set_len(LENGTH as u64).expect("size of the memfd");
        shared.push(Shared::new("memfd", Some((file, 0))));
    }
    let mut segments = Vec::new();
    if args.flag("system-v") {
        let key = std::process::id().cast_signed() | 0x5353_0000;
        for (name, key, stays) in
            [("segment with a key", key, true), ("private segment", 0, true), ("removed segment", 0, false)]
        {
            let (memory, segment) = Shared::segment(name, key, stays);
            shared.push(memory);
            segments.push(segment);
        }
        // Once more, read-only and with other protections in the middle.
        let again = Mapping::adopt(segments[0].attach(libc::SHM_RDONLY), LENGTH);
        again.part(8192, 8192).protect(libc::PROT_NONE).expect("protect");
        let ids: String = segments[..2].iter().map(|segment| format!("{}\n", segment.id)).collect();
        std::fs::write(args.dir().join("segments"), ids).expect("write the ids");
        if args.flag("in-part") {
            // SAFETY: nobody has a reference to the page.
            unsafe { libc::munmap((again.start() + 65536) as *mut _, 4096) };
        }
    }
    let private = private_copy(&args.dir());
    for number in 1..=CHILDREN {
        let member = format!("child{number}");
        let child = control.for_child(&member);
        let shared = shared.clone();
        let pid = fork_child(move || answer_forever(child, number, &shared));
        control.adopt(pid, &member);
    }
    let meter = Meter::start(Duration::from_millis(1));
    let before = SelfState::of_process().without(&["parent"]);
    let told: Vec<_> = segments.iter().map(Segment::told).collect();
    control.ready();
    control.serve(Some(&meter), Duration::from_millis(100), |request| {
        SelfState::of_process().check(&checker, "parent", &before);
        if request.thorough() {
            for shared in &shared {
                shared.check(&checker);
                shared.ask(&checker);
            }
            let now: Vec<_> = segments.iter().map(Segment::told).collect();
            checker.equal("what the kernel tells of the segments", &now, &told);
            let wrong = Pattern::new(77).first_wrong(private.part(0, 8192).words(), 0);
            checker.equal("first wrong word of the private copy", &wrong, &None);
        }
    });
}

fn answer_forever(child: Control, number: usize, shared: &[Shared]) {
    let before = SelfState::of_process();
    let checker = Arc::clone(&child.checker);
    child.serve(None, Duration::from_millis(2), |request| {
        for shared in shared {
            shared.reply(number);
        }
        if request.thorough() {
            SelfState::of_process().check(&checker, "child", &before);
            for shared in shared {
                shared.check(&checker);
            }
        }
    });
}

fn file(dir: &Path) -> File {
    let file = open(dir);
    file.set_len(FILE_OFFSET + LENGTH as u64).expect("size of the file");
    file
}

fn open(dir: &Path) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    options.open(dir.join("shared")).expect("open the file")
}

/// A private mapping of the same file whose first two pages are our own.
fn private_copy(dir: &Path) -> Mapping {
    let file = open(dir);
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let memory = Mapping::new(LENGTH, prot, libc::MAP_PRIVATE, Some((&file, FILE_OFFSET))).expect("map privately");
    Pattern::new(77).fill(memory.part(0, 8192).words_mut(), 0);
    memory
}
