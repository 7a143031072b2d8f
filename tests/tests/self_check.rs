//! The tests are worth something: what is changed behind a target's back is noticed.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use nix::sys::ptrace;
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use standstill_tests::harness::{Memory, Snapshot, Target, Turn, proc, wait_until};
use standstill_tests::workload::Pattern;

#[test]
fn a_changed_register_is_noticed() {
    let _turn = Turn::take();
    let target = Target::workload("threads_avx", &["--threads", "4"]);
    target.assert_well();
    let named = |pid: &Pid| proc::text(target.pid(), &format!("task/{pid}/comm")).trim() == "avx-1";
    let thread = proc::threads(target.pid()).into_iter().find(named).expect("a thread that holds registers");
    ptrace::seize(thread, ptrace::Options::empty()).expect("trace the thread");
    ptrace::interrupt(thread).and_then(|()| waitpid(thread, None)).expect("stop the thread");
    let mut registers = ptrace::getregs(thread).expect("read the registers");
    registers.r14 ^= 1;
    registers.r10 ^= 1;
    ptrace::setregs(thread, registers).expect("write the registers");
    ptrace::detach(thread, None).expect("let go of the thread");
    let verdict = target.verdict();
    assert!(!verdict.ok, "nobody noticed a changed register");
    assert!(verdict.failures[0].contains("general registers"), "{:#?}", verdict.failures);
}

#[test]
fn a_changed_byte_is_noticed_from_inside_and_from_outside() {
    let _turn = Turn::take();
    let mut target = Target::workload("clock", &["--heap-mib", "3"]);
    target.assert_well();
    target.stop();
    let processes = target.processes();
    let (facts, memory) = (Snapshot::take(&processes), Memory::take(&processes));
    assert!(memory.changes(&Memory::take(&processes)).is_empty(), "a stopped target changes by itself");
    assert!(facts.changes(&Snapshot::take(&processes), true).is_empty(), "a stopped target changes by itself");
    let file =
        OpenOptions::new().read(true).write(true).open(proc::path(target.pid(), "mem")).expect("open the memory");
    let heap = heap_of(target.pid(), &file);
    let mut byte = [0];
    for page in 0..9 {
        let address = heap + 4096 * page + 123;
        file.read_exact_at(&mut byte, address).expect("read a byte");
        file.write_all_at(&[!byte[0]], address).expect("write a byte");
    }
    let changes = memory.changes(&Memory::take(&processes));
    assert_eq!(changes.len(), 9, "{changes:#?}");
    target.go_on();
    let verdict = target.verdict();
    assert!(!verdict.ok, "nobody noticed a changed byte");
}

/// What an incremental dump may do wrong: a page comes back as it was at an earlier moment.
#[test]
fn an_old_page_is_noticed() {
    let _turn = Turn::take();
    let mut target = Target::workload("writer", &["--heap", "1", "--pages-per-second", "500"]);
    target.assert_well();
    let path = proc::path(target.pid(), "mem");
    let memory = OpenOptions::new().read(true).write(true).open(path).expect("open the memory");
    let page = first_page(target.pid(), &memory);
    let read = || {
        let mut words = [0; 4096];
        memory.read_exact_at(&mut words, page).expect("read a page");
        words
    };
    let mut failures = Vec::new();
    // The page may be written once more before anybody looks at it.
    for _ in 0..10 {
        target.stop();
        let old = read();
        target.go_on();
        assert!(wait_until(Duration::from_secs(30), || read() != old), "the page is not written");
        target.stop();
        memory.write_all_at(&old, page).expect("write the old page");
        target.go_on();
        failures = target.verdict().failures;
        if !failures.is_empty() {
            break;
        }
    }
    let noticed = failures.iter().any(|failure| failure.contains("page 0") && failure.contains("another one: version"));
    assert!(noticed, "nobody noticed an old page: {failures:#?}");
}

/// Where the writer's heap begins: with page 0 of memory 1.
fn first_page(pid: Pid, memory: &File) -> u64 {
    let is_first = |address: &u64| {
        let mut words = [0; 16];
        let read = memory.read_exact_at(&mut words, *address).is_ok();
        read && words[..8] == (1_u64 << 32).to_ne_bytes()
    };
    let pages = |line: &str| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        Some((u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?).step_by(4096))
    };
    let maps = proc::text(pid, "maps");
    let writable = maps.lines().filter(|line| line.contains(" rw-p 00000000 00:00 "));
    let found = writable.filter_map(pages).flatten().find(is_first);
    found.expect("the heap begins somewhere")
}

/// Where the workload's pattern begins: on a page of its own, but maybe inside of a larger mapping.
fn heap_of(pid: Pid, memory: &File) -> u64 {
    let first = Pattern::new(0x68_6561_7021).word(0).to_le_bytes();
    let pages = |line: &str| {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
        rest.starts_with("rw-p").then(|| (start..end).step_by(4096))
    };
    let begins = |address: &u64| {
        let mut word = [0; 8];
        memory.read_exact_at(&mut word, *address).is_ok() && word == first
    };
    proc::text(pid, "maps").lines().filter_map(pages).flatten().find(begins).expect("the workload's heap")
}

#[test]
fn a_tracer_is_noticed() {
    let _turn = Turn::take();
    let mut target = Target::workload("clock", &[]);
    ptrace::seize(target.pid(), ptrace::Options::empty()).expect("trace the target");
    let traced = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| target.assert_free()));
    ptrace::interrupt(target.pid()).and_then(|()| waitpid(target.pid(), None)).expect("stop the target");
    ptrace::detach(target.pid(), None).expect("let go of the target");
    assert!(traced.is_err(), "nobody noticed a tracer");
}
