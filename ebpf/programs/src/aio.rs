//! The contexts of io_setup(2) that processes have, and how many requests of each the kernel still works on.
//!
//! A context counts the requests that may still be made, for the most part per CPU (`fs/aio.c`), so the reader asks for each
//! CPU in turn: a loop over them would take the verifier longer. Where a CPU has its counts nobody tells: it is found from an
//! object of our own that each CPU has.
#![no_std]
#![no_main]

mod access;
mod kernel;
mod runtime;

use aya_ebpf::{
    helpers::generated::bpf_map_lookup_percpu_elem,
    macros::map,
    maps::{Array, PerCpuArray},
};
use kernel::{Address, COMMON, Output, Task, known, number, numbers, pointer, probe_word, wanted, zero};
use standstill_ebpf_abi::aio::{AioLayout, AioRecord, CONTEXTS};

#[unsafe(no_mangle)]
static LAYOUT: AioLayout = zero();

/// Tells where each CPU has its own objects.
#[map]
static BEACON: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// The CPU whose counts are asked for.
#[map]
static CPU: Array<u32> = Array::with_max_entries(1, 0);

/// Writes an [`AioRecord`] for each context of a process.
#[unsafe(link_section = "iter/task")]
#[unsafe(no_mangle)]
extern "C" fn aio(ctx: &Task) -> i32 {
    let task = ctx.task;
    if task.is_null() {
        return 0;
    }
    let (tgid, tid) = numbers(task);
    if tgid != tid || !wanted(tgid) {
        return 0;
    }
    let table = pointer(pointer(task, known(&COMMON.task_mm)), known(&LAYOUT.mm_ioctx_table));
    if table.is_null() {
        return 0;
    }
    let slots: u32 = probe_word(table, known(&LAYOUT.table_nr));
    let mut slot = 0;
    while slot < CONTEXTS {
        if slot >= slots {
            return 0;
        }
        context(ctx, tgid, slots, pointer(table, known(&LAYOUT.table_table).wrapping_add(8 * slot)));
        slot += 1;
    }
    0
}

#[inline(always)]
fn context(ctx: &Task, tgid: i32, slots: u32, context: Address) {
    if context.is_null() {
        return;
    }
    let Some(mut output) = Output::<AioRecord>::new() else { return };
    let r = output.record();
    (r.tgid, r.slots) = (tgid, slots);
    r.id = probe_word(context, known(&LAYOUT.ctx_user_id));
    r.events = probe_word(context, known(&LAYOUT.ctx_nr_events));
    r.completed = probe_word(context, known(&LAYOUT.ctx_completed_events));
    r.available = probe_word(context, known(&LAYOUT.ctx_reqs_available));
    let Some(room) = BEACON.get_ptr_mut(0) else { return };
    // SAFETY: the map's value for this CPU, which nobody else uses.
    let room = unsafe { &mut *room };
    let map = number(room, (&raw const BEACON).cast());
    let base: u64 = probe_word(map as Address, known(&LAYOUT.array_pptrs));
    let (key, Some(&cpu)) = (0u32, CPU.get(0)) else { return };
    // SAFETY: the map and a key of its type; what comes back is checked.
    let beacon =
        unsafe { bpf_map_lookup_percpu_elem((&raw const BEACON).cast_mut().cast(), (&raw const key).cast(), cpu) };
    if beacon.is_null() {
        return;
    }
    let offset = number(room, beacon.cast_const().cast()).wrapping_sub(base);
    let counts = probe_word::<u64>(context, known(&LAYOUT.ctx_cpu));
    r.here = probe_word(counts.wrapping_add(offset) as Address, 0);
    output.write(ctx.meta, 0);
}
