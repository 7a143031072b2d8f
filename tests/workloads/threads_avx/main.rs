//! Threads that hold values in every register across the checkpoint, and in their thread-local storage.
//!
//! Options: `--threads N` (default 64).

mod registers;

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use standstill_tests::workload::{Args, Checker, Control, Mapping, Meter, Pattern, SelfState, check_rseq, now_us};

use registers::{Registers, Width};

thread_local! {
    static PRIVATE: Cell<u64> = const { Cell::new(0) };
}

/// What the threads and the main thread share.
struct Shared {
    /// Threads hold their registers until this changes.
    generation: AtomicU32,
    /// Rounds each thread has finished.
    rounds: Vec<AtomicU64>,
    checker: Arc<Checker>,
}

fn main() {
    let args = Args::parse();
    let control = Control::new("threads_avx", &args);
    let checker = Arc::clone(&control.checker);
    let width = Width::of_this_cpu();
    checker.note(width.name(), 1);
    let count: usize = args.value("threads", 64);
    let shared = Arc::new(Shared {
        generation: AtomicU32::new(0),
        rounds: (0..count).map(|_| AtomicU64::new(0)).collect(),
        checker: Arc::clone(&checker),
    });
    for number in 0..count {
        let shared = Arc::clone(&shared);
        let name = format!("avx-{number}");
        thread::Builder::new().name(name).spawn(move || hold_forever(number, width, &shared)).expect("thread");
    }
    while shared.rounds.iter().any(|rounds| rounds.load(Ordering::Relaxed) == 0) {
        shared.generation.fetch_add(1, Ordering::Relaxed);
        thread::sleep(Duration::from_millis(100));
    }
    let meter = Meter::start(Duration::from_millis(1));
    let before = SelfState::of_process().without(&["parent"]);
    control.ready();
    control.serve(Some(&meter), Duration::from_millis(300), |request| {
        shared.generation.fetch_add(1, Ordering::Relaxed);
        SelfState::of_process().check(&checker, "process", &before);
        if request.thorough() {
            await_all(&shared);
            check_join(&checker);
        }
    });
}

/// Waits until every thread has compared the registers that it held when the request came.
fn await_all(shared: &Shared) {
    let limit = now_us() + 10_000_000;
    let before: Vec<u64> = shared.rounds.iter().map(|rounds| rounds.load(Ordering::Relaxed)).collect();
    for (number, before) in before.into_iter().enumerate() {
        let rounds = &shared.rounds[number];
        // A thread may have begun to hold the newest generation already.
        while rounds.load(Ordering::Relaxed) == before && now_us() < limit {
            shared.generation.fetch_add(1, Ordering::Relaxed);
            thread::sleep(Duration::from_millis(10));
        }
        shared.checker.that(rounds.load(Ordering::Relaxed) > before, || format!("thread {number} does not run"));
    }
}

/// A thread that ends must wake the one that joins it: the kernel clears its tid and wakes the futex.
fn check_join(checker: &Checker) {
    let value = thread::spawn(|| 42).join();
    checker.equal("joined thread", &value.ok(), &Some(42));
}

fn hold_forever(number: usize, width: Width, shared: &Shared) -> ! {
    let pattern = Pattern::new(number as u64);
    PRIVATE.set(pattern.word(0));
    mask_signals(number);
    let stack = Mapping::private(64 << 10).expect("map an alternate stack");
    set_altstack(&stack);
    set_gs_base(stack.start() as u64);
    let before = SelfState::of_thread();
    let checker = &shared.checker;
    // Some threads burn time in user mode, so that the checkpoint also meets registers outside of system calls.
    let spins = if number.is_multiple_of(8) { 20_000 } else { 0 };
    let mut held = Registers::new(width, spins);
    let mut round = 0;
    loop {
        held.hold(Pattern::new((number as u64) << 32 | round), &shared.generation);
        for wrong in held.wrong() {
            checker.that(false, || format!("thread {number}, round {round}: {wrong}"));
        }
        checker.that(true, String::new);
        checker.equal("thread-local value", &PRIVATE.get(), &pattern.word(0));
        checker.equal("gs base", &gs_base(), &(stack.start() as u64));
        SelfState::of_thread().check(checker, "thread", &before);
        if round.is_multiple_of(8) {
            check_rseq(checker);
        }
        round += 1;
        shared.rounds[number].fetch_add(1, Ordering::Relaxed);
    }
}

/// Gives each thread a signal mask of its own.
fn mask_signals(number: usize) {
    let choice = [Signal::SIGHUP, Signal::SIGWINCH, Signal::SIGURG, Signal::SIGALRM, Signal::SIGPROF];
    let mut set = SigSet::empty();
    for (bit, signal) in choice.into_iter().enumerate() {
        if number >> bit & 1 == 1 {
            set.add(signal);
        }
    }
    set.thread_block().expect("block signals");
}

fn set_altstack(memory: &Mapping) {
    let stack = libc::stack_t { ss_sp: memory.start() as *mut _, ss_flags: 0, ss_size: memory.length() };
    // SAFETY: the memory is mapped for ever and used by nothing else but this thread's signal handlers.
    let result = unsafe { libc::sigaltstack(&raw const stack, std::ptr::null_mut()) };
    assert_eq!(result, 0, "sigaltstack");
}

/// `ARCH_SET_GS` and `ARCH_GET_GS` of arch_prctl(2).
const ARCH_SET_GS: i32 = 0x1001;
const ARCH_GET_GS: i32 = 0x1004;

fn set_gs_base(value: u64) {
    // SAFETY: nothing in this process addresses memory through gs on x86_64.
    let result = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, value) };
    assert_eq!(result, 0, "ARCH_SET_GS");
}

fn gs_base() -> u64 {
    let mut value = 0_u64;
    // SAFETY: the kernel writes one word into `value`.
    let result = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_GET_GS, &raw mut value) };
    assert_eq!(result, 0, "ARCH_GET_GS");
    value
}
