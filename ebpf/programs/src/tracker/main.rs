//! Programs that note which parts of tracked processes change.
//!
//! A change puts its time beside the part in [`PROCESSES`] or [`SPACES`]: a burst of changes costs the reader no more
//! than one, nothing can overflow, and of two CPUs that write at once either may win, because no time comes again. The
//! ring only wakes the reader up. New processes are tracked from their birth, before they run.
#![no_std]
#![no_main]

#[path = "../access.rs"]
mod access;
mod life;
mod memory;
#[path = "../runtime.rs"]
mod runtime;
mod sockets;
mod syscalls;

use access::{Address, known, load, zero};
use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    helpers::generated::{bpf_get_current_task_btf, bpf_ktime_get_ns},
    macros::map,
    maps::{Array, HashMap, PerCpuArray, RingBuf},
    programs::BtfTracePointContext,
};
use standstill_ebpf_abi::track::{TrackLayout, TrackedProcess, TrackedSpace, count, part};

/// Tracked processes by their numbers in the initial pid namespace.
#[map]
static PROCESSES: HashMap<u32, TrackedProcess> = HashMap::with_max_entries(1 << 16, BPF_F_NO_PREALLOC);

/// Tracked address spaces.
#[map]
static SPACES: HashMap<u64, TrackedSpace> = HashMap::with_max_entries(1 << 16, BPF_F_NO_PREALLOC);

/// What happened so far; see [`count`].
#[map]
static COUNTS: PerCpuArray<[u64; count::COUNT]> = PerCpuArray::with_max_entries(1, 0);

/// Not 0: the reader knows that something changed. It sets this to 0 before it looks.
#[map]
static TOLD: Array<u32> = Array::with_max_entries(1, 0);

/// Wakes the reader up; what it holds is of no interest.
#[map]
static WAKE: RingBuf = RingBuf::with_byte_size(4096, 0);

#[unsafe(no_mangle)]
static LAYOUT: TrackLayout = zero();

/// Number of the process that a task belongs to.
///
/// # Safety
/// `task` points to a task_struct and the verifier knows it.
#[inline(always)]
unsafe fn process_of(task: Address) -> u32 {
    // SAFETY: the caller's promise.
    unsafe { load(task, known(&LAYOUT.task_tgid)) }
}

/// Number of a thread.
///
/// # Safety
/// `task` points to a task_struct and the verifier knows it.
#[inline(always)]
unsafe fn thread_of(task: Address) -> u32 {
    // SAFETY: the caller's promise.
    unsafe { load(task, known(&LAYOUT.task_pid)) }
}

/// The running task.
#[inline(always)]
fn current() -> Address {
    // SAFETY: nothing is passed.
    unsafe { bpf_get_current_task_btf() }.cast_const().cast()
}

/// What the logging macros want to see.
#[inline(always)]
fn log_context<T>(ctx: &T) -> BtfTracePointContext {
    BtfTracePointContext::new(core::ptr::from_ref(ctx).cast_mut().cast())
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: nothing is passed.
    unsafe { bpf_ktime_get_ns() }
}

/// Counts something.
#[inline(always)]
fn add(what: usize) {
    if let Some(counts) = COUNTS.get_ptr_mut(0) {
        // SAFETY: the pointer is to this CPU's value. A program that interrupts this one may make the count miss one.
        unsafe { (*counts)[what] += 1 };
    }
}

/// Notes that parts of a process changed, if it is tracked.
#[inline(always)]
fn changed(process: u32, parts: u16) {
    let Some(tracked) = PROCESSES.get_ptr_mut(process) else { return };
    let now = now();
    for n in 0..part::COUNT {
        if parts & (1 << n) != 0 {
            // SAFETY: the pointer is to a map value, which the kernel keeps until the program ends.
            unsafe { (&raw mut (*tracked).changed[n]).write_volatile(now) };
            add(n);
        }
    }
    wake();
}

/// Tells the reader that something changed, unless it knows.
#[inline(always)]
fn wake() {
    let Some(told) = TOLD.get_ptr_mut(0) else { return };
    // SAFETY: the pointer is to a map value. A race costs the reader one look too many: it is only ever set here.
    unsafe {
        if told.read_volatile() == 0 {
            told.write_volatile(1);
            // A full ring wakes the reader as well.
            let _ = WAKE.output::<u64>(0u64, 0);
        }
    }
}
