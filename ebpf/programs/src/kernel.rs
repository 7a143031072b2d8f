//! Looking into kernel structures, and writing records.
#![allow(dead_code, unused_imports, reason = "each binary uses a part of it")]

use aya_ebpf::{
    bindings::{BPF_F_NO_PREALLOC, seq_file},
    helpers::generated::{bpf_get_current_task_btf, bpf_seq_write},
    macros::map,
    maps::{Array, HashMap, PerCpuArray},
};
use core::mem;
use standstill_ebpf_abi::{CommonLayout, PATH_MAX, Plain};

pub use crate::access::{Address, bit, known, load, number, pointer, probe, probe_word, zero};

/// Processes that are of interest, by their numbers in the reader's pid namespace.
#[map]
static TREE: HashMap<u32, u8> = HashMap::with_max_entries(1 << 16, BPF_F_NO_PREALLOC);

/// Whether `iter/task_file` writes paths.
#[map]
static PATHS: Array<u32> = Array::with_max_entries(1, 0);

/// Room for a record and what follows it.
#[map]
static BUFFER: PerCpuArray<[u8; BUFFER_LEN]> = PerCpuArray::with_max_entries(1, 0);

const BUFFER_LEN: usize = 2 * PATH_MAX + 1024;

#[unsafe(no_mangle)]
pub static COMMON: CommonLayout = zero();

/// `struct bpf_iter_meta`.
#[repr(C)]
pub struct Meta {
    /// Where the output goes.
    pub seq: *mut seq_file,
    /// Number of the reading, different for each.
    pub session_id: u64,
}

/// `struct bpf_iter__task`.
#[repr(C)]
pub struct Task {
    /// The iterator.
    pub meta: *const Meta,
    /// A task, or null after the last one.
    pub task: Address,
}

/// A pid namespace.
#[derive(Clone, Copy)]
pub struct PidNamespace {
    /// Tells it from others.
    pub address: u64,
    /// How many namespaces are around it.
    level: u32,
}

/// Process and thread number in the reader's pid namespace; 0: it is not in there.
#[inline(always)]
pub fn numbers(task: Address) -> (i32, i32) {
    // SAFETY: `task` is a task_struct in all callers, and the fields are of the types loaded.
    unsafe {
        let reader: Address = bpf_get_current_task_btf().cast_const().cast();
        let level: u32 = load(load(reader, known(&COMMON.task_thread_pid)), known(&COMMON.pid_level));
        if level == 0 {
            return (load(task, known(&COMMON.task_tgid)), load(task, known(&COMMON.task_pid)));
        }
        let ours = pid_namespace(reader);
        let number = |task| number_in(ours, pointer(task, known(&COMMON.task_thread_pid)));
        (number(pointer(task, known(&COMMON.task_group_leader))), number(task))
    }
}

/// The task that reads.
#[inline(always)]
pub fn reader() -> Address {
    // SAFETY: nothing is passed.
    unsafe { bpf_get_current_task_btf().cast_const().cast() }
}

/// The pid namespace that a task is in.
#[inline(always)]
pub fn pid_namespace(task: Address) -> PidNamespace {
    let pid = pointer(task, known(&COMMON.task_thread_pid));
    let level = probe_word(pid, known(&COMMON.pid_level));
    PidNamespace { address: probe_word(pid, number_at(level).wrapping_add(known(&COMMON.upid_ns))), level }
}

/// Number of a `struct pid` in a namespace; 0: it has none.
#[inline(always)]
pub fn number_in(namespace: PidNamespace, pid: Address) -> i32 {
    // One of a namespace further out has fewer numbers. Behind them may be what is left of another `struct pid`, which
    // was in this namespace, or in one that had the same address.
    let offset = number_at(namespace.level);
    let inside = probe_word::<u32>(pid, known(&COMMON.pid_level)) >= namespace.level
        && probe_word::<u64>(pid, offset.wrapping_add(known(&COMMON.upid_ns))) == namespace.address;
    if inside { probe_word(pid, offset) } else { 0 }
}

/// Offset in a `struct pid` of its number in the namespaces of a level.
#[inline(always)]
fn number_at(level: u32) -> u32 {
    known(&COMMON.pid_numbers).wrapping_add(level.wrapping_mul(known(&COMMON.upid_size)))
}

/// Whether a process is of interest.
#[inline(always)]
pub fn wanted(tgid: i32) -> bool {
    TREE.get_ptr(tgid as u32).is_some()
}

/// Whether paths are asked for.
#[inline(always)]
pub fn paths_wanted() -> bool {
    PATHS.get(0).is_some_and(|&flag| flag != 0)
}

/// A record of type `T` under construction, with room for what follows it.
pub struct Output<T> {
    buffer: *mut u8,
    _record: core::marker::PhantomData<T>,
}

impl<T: Plain> Output<T> {
    /// This CPU's buffer, with what the last record left in it.
    ///
    /// The kernel keeps iterators on their CPU, and only one reader uses these maps, so nobody else writes into it.
    #[inline(always)]
    pub fn new() -> Option<Self> {
        Some(Self { buffer: BUFFER.get_ptr_mut(0)?.cast(), _record: core::marker::PhantomData })
    }

    /// The record.
    #[inline(always)]
    pub fn record(&mut self) -> &mut T {
        // SAFETY: the buffer is larger than any record, aligned like every map value, and only this one uses it.
        unsafe { &mut *self.buffer.cast() }
    }

    /// Room for PATH_MAX bytes behind the record.
    #[inline(always)]
    pub fn tail(&mut self) -> *mut u8 {
        // SAFETY: records are smaller than PATH_MAX, the buffer is larger than twice that.
        unsafe { self.buffer.add(mem::size_of::<T>()) }
    }

    /// Appends the record and `tail` bytes of what follows it to the output.
    #[inline(always)]
    pub fn write(&mut self, meta: *const Meta, tail: u32) {
        // The mask changes nothing: it shows the verifier that the buffer is large enough.
        let len = mem::size_of::<T>() as u32 + (tail & (2 * PATH_MAX as u32 - 1));
        // A full output is the caller's affair: the kernel sees it and calls again with an empty one.
        // SAFETY: `meta` comes from the iterator's context, and the buffer holds `len` bytes.
        unsafe { bpf_seq_write((*meta).seq, self.buffer.cast(), len) };
    }
}
