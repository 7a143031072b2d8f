//! Parent, children and a grandchild that share pages copy-on-write; each measures nothing itself, the parent compares
//! page frames: what was one page before the checkpoint must be one page after it.
//!
//! Options: `--mib N` (size of the memory, default 32), `--merged` (in the parent, the kernel makes one mapping of the
//! memory and a neighbour of it).

use std::sync::Arc;
use std::time::Duration;

use nix::unistd::{Pid, getpid};
use standstill_tests::workload::{Args, Checker, Control, Mapping, Meter, Pattern, SelfState, fork_child, smaps_entry};

const PAGE_WORDS: usize = 512;
const BASE: Pattern = Pattern::new(0xc0);
/// A process writes the pages whose number modulo this is its own.
const STEP: usize = 8;
const CHILDREN: usize = 3;
/// Marks pages written by nobody but the first parent.
const NOBODY: usize = usize::MAX;

/// The memory as one process sees it: who wrote each page last, by page number modulo [`STEP`].
#[derive(Clone)]
struct View {
    memory: Mapping,
    writers: [usize; STEP],
}

impl View {
    fn new(memory: Mapping) -> Self {
        BASE.fill(memory.words_mut(), 0);
        Self { memory, writers: [NOBODY; STEP] }
    }

    fn pattern(&self, page: usize) -> Pattern {
        match self.writers[page % STEP] {
            NOBODY => BASE,
            writer => Pattern::new(writer as u64),
        }
    }

    /// Writes every page of a class, so that it is no longer shared with anybody.
    fn write(&mut self, class: usize, writer: usize) {
        self.writers[class] = writer;
        for (page, words) in self.memory.words_mut().chunks_mut(PAGE_WORDS).enumerate() {
            if page % STEP == class {
                Pattern::new(writer as u64).fill(words, (page * PAGE_WORDS) as u64);
            }
        }
    }

    fn check(&self, checker: &Checker) {
        for (page, words) in self.memory.words().chunks(PAGE_WORDS).enumerate() {
            let wrong = self.pattern(page).first_wrong(words, (page * PAGE_WORDS) as u64);
            checker.that(wrong.is_none(), || format!("page {page} is wrong from word {wrong:?}"));
        }
    }
}

/// The memory between two pages that nobody can access, so that the kernel does not make one mapping of it and a
/// neighbour.
struct Guarded {
    memory: Mapping,
    above: Mapping,
}

impl Guarded {
    fn new(length: usize) -> Self {
        const PAGE: usize = 8 * PAGE_WORDS;
        let whole = Mapping::new(length + 2 * PAGE, libc::PROT_NONE, libc::MAP_PRIVATE, None).expect("map");
        whole.advise(libc::MADV_NOHUGEPAGE).expect("small pages");
        let memory = whole.part(PAGE, length);
        memory.protect(libc::PROT_READ | libc::PROT_WRITE).expect("lift the protection");
        Self { memory, above: whole.part(PAGE + length, PAGE) }
    }
}

/// Two processes and how many pages they have in common.
struct Pair {
    who: String,
    pids: (Pid, Pid),
    shared: usize,
}

fn main() {
    let args = Args::parse();
    let mut control = Control::new("cow_tree", &args);
    let checker = Arc::clone(&control.checker);
    let guarded = Guarded::new(args.value("mib", 32_usize) << 20);
    let memory = guarded.memory;
    let mut view = View::new(memory);
    let mut pairs = Vec::new();
    for number in 0..CHILDREN {
        let child = fork_member(&mut control, &format!("child{number}"), view.clone(), number, number == 0);
        pairs.push((format!("parent and child {number}"), getpid(), child));
    }
    view.write(CHILDREN + 1, 100);
    wait_for_children(&mut control, &checker);
    let grandchild = grandchild_pid(pairs[0].2);
    pairs.push(("child 0 and grandchild".to_owned(), pairs[0].2, grandchild));
    pairs.push(("parent and grandchild".to_owned(), getpid(), grandchild));
    if args.flag("merged") {
        guarded.above.protect(libc::PROT_READ | libc::PROT_WRITE).expect("lift the guard");
    }
    let pairs: Vec<Pair> = pairs
        .into_iter()
        .map(|(who, one, two)| Pair { who, pids: (one, two), shared: shared_pages(&memory, one, two) })
        .collect();
    for pair in &pairs {
        checker.that(pair.shared > memory.length() / 4096 / 2, || format!("{} share {}", pair.who, pair.shared));
    }
    let pss = pss_kib(&memory);

    let meter = Meter::start(Duration::from_millis(1));
    let before = SelfState::of_process().without(&["parent"]);
    control.ready();
    control.serve(Some(&meter), Duration::from_millis(200), |request| {
        SelfState::of_process().check(&checker, "parent", &before);
        if request.thorough() {
            view.check(&checker);
            for pair in &pairs {
                let now = shared_pages(&memory, pair.pids.0, pair.pids.1);
                checker.that(now >= pair.shared - pair.shared / 50, || {
                    format!("{} share {now} pages, shared {} before", pair.who, pair.shared)
                });
            }
            let now = pss_kib(&memory);
            checker.that(now <= pss + pss / 10, || format!("Pss of the memory is {now} KiB, was {pss} KiB"));
        }
    });
}

/// Forks a process that writes its own class of pages; with `fork_again` it forks a grandchild that does the same.
fn fork_member(control: &mut Control, member: &str, mut view: View, number: usize, fork_again: bool) -> Pid {
    let mut child = control.for_child(member);
    let pid = fork_child(move || {
        view.write(number, number + 1);
        if fork_again {
            fork_member(&mut child, "grandchild", view.clone(), CHILDREN, false);
        }
        let before = SelfState::of_process();
        let checker = Arc::clone(&child.checker);
        child.serve(None, Duration::from_millis(500), |request| {
            SelfState::of_process().check(&checker, "child", &before);
            if request.thorough() {
                view.check(&checker);
            }
        });
    });
    control.adopt(pid, member);
    pid
}

/// A verdict from every child says that all of them have written their pages.
fn wait_for_children(control: &mut Control, checker: &Checker) {
    control.collect();
    let verdict = checker.verdict("cow_tree");
    assert!(verdict.ok, "children are wrong from the start: {:?}", verdict.failures);
}

fn grandchild_pid(child: Pid) -> Pid {
    let path = format!("/proc/{child}/task/{child}/children");
    let children = std::fs::read_to_string(path).expect("read the children");
    Pid::from_raw(children.trim().parse().expect("one grandchild"))
}

/// Pages of the memory that are the same page frame in both processes.
fn shared_pages(memory: &Mapping, one: Pid, two: Pid) -> usize {
    const PRESENT: u64 = 1 << 63;
    const FRAME: u64 = (1 << 55) - 1;
    let read = |pid| memory.pagemap(pid).expect("read pagemap");
    let same = |(one, two): (u64, u64)| one & two & PRESENT != 0 && one & FRAME != 0 && one & FRAME == two & FRAME;
    read(one).into_iter().zip(read(two)).filter(|pair| same(*pair)).count()
}

fn pss_kib(memory: &Mapping) -> u64 {
    let entry = smaps_entry(memory.start()).expect("the mapping is in smaps");
    let line = entry.iter().find_map(|line| line.strip_prefix("Pss:")).expect("a Pss line");
    line.trim().trim_end_matches(" kB").parse().expect("a number of KiB")
}
