//! `iter/task`: the threads of a process, and what they share.

use crate::kernel::{Address, COMMON, Meta, Output, known, numbers, pointer, probe, probe_word, wanted, zero};
use aya_ebpf::helpers::generated::{bpf_ktime_get_boot_ns, bpf_ktime_get_ns, bpf_snprintf};
use standstill_ebpf_abi::{ABSENT, ProcessRecord, SYMBOL_MAX, TaskLayout, ThreadRecord};

#[unsafe(no_mangle)]
static TASK: TaskLayout = zero();

/// `struct bpf_iter__task`.
#[repr(C)]
pub struct Task {
    meta: *const Meta,
    task: Address,
}

/// Writes a [`ThreadRecord`], and a [`ProcessRecord`] for a leader.
#[unsafe(link_section = "iter/task")]
#[unsafe(no_mangle)]
extern "C" fn task(ctx: &Task) -> i32 {
    let task = ctx.task;
    if task.is_null() {
        return 0;
    }
    let (tgid, tid) = numbers(task);
    if !wanted(tgid) {
        return 0;
    }
    let Some(mut output) = Output::<ThreadRecord>::new() else { return 0 };
    let r = output.record();
    r.tgid = tgid;
    r.tid = tid;
    r.leader = (tgid == tid).into();
    // All fields through the helper: a typed load of a pointer makes the verifier search all of BTF, and there are many.
    r.clear_child_tid = probe_word(task, known(&TASK.clear_child_tid));
    r.robust_list = probe_word(task, known(&TASK.robust_list));
    r.sas_ss_sp = probe_word(task, known(&TASK.sas_ss_sp));
    r.sas_ss_size = probe_word(task, known(&TASK.sas_ss_size));
    r.sas_ss_flags = probe_word(task, known(&TASK.sas_ss_flags));
    r.blocked = probe_word(task, known(&TASK.blocked));
    r.pdeath_signal = probe_word(task, known(&TASK.pdeath_signal));
    r.exit_signal = probe_word(task, known(&TASK.exit_signal));
    r.exit_state = probe_word(task, known(&TASK.exit_state));
    r.mm = probe_word(task, known(&COMMON.task_mm));
    r.files = probe_word(task, known(&COMMON.task_files));
    r.fs = probe_word(task, known(&TASK.fs));
    r.sighand = probe_word(task, known(&TASK.sighand));
    r.securebits = probe_word(pointer(task, known(&TASK.cred)), known(&TASK.cred_securebits));
    probe(&mut r.restart, task, known(&TASK.restart));
    symbol(&mut r.restart_fn, pointer(task, known(&TASK.restart_fn)));
    // SAFETY: nothing is passed.
    (r.monotonic_ns, r.boottime_ns) = unsafe { (bpf_ktime_get_ns(), bpf_ktime_get_boot_ns()) };
    let mut tail = 0;
    if tgid == tid {
        tail = size_of::<ProcessRecord>() as u32;
        // SAFETY: there is room for PATH_MAX bytes behind the record, more than a ProcessRecord takes, and both have
        // the alignment of a word.
        process(unsafe { &mut *output.tail().cast() }, task);
    }
    output.write(ctx.meta, tail);
    0
}

/// Name of the kernel function at an address; a number in hexadecimal if there is none.
#[inline(always)]
pub fn symbol(name: &mut [u8; SYMBOL_MAX], address: Address) {
    // The helper wants its format in a read-only map.
    static FORMAT: [u8; 4] = *b"%ps\0";
    let mut data = address as u64;
    // SAFETY: the pointers are valid for the lengths given with them.
    unsafe {
        bpf_snprintf(name.as_mut_ptr().cast(), SYMBOL_MAX as u32, FORMAT.as_ptr().cast(), &raw mut data, 8);
    }
}

/// What the threads share, as the leader `task` shows it.
#[inline(always)]
fn process(r: &mut ProcessRecord, task: Address) {
    let signal = pointer(task, known(&TASK.signal));
    let mm = pointer(task, known(&COMMON.task_mm));
    probe(&mut r.actions, pointer(task, known(&TASK.sighand)), known(&TASK.sighand_action));
    probe(&mut r.limits, signal, known(&TASK.signal_rlim));
    for (word, offset) in r.layout.iter_mut().zip(&TASK.mm_layout) {
        *word = probe_word(mm, known(offset));
    }
    r.mm_flags = probe_word(mm, known(&TASK.mm_flags));
    r.real_expires_ns = probe_word(signal, known(&TASK.real_expires));
    r.real_interval_ns = probe_word(signal, known(&TASK.real_incr));
    r.real_state = match known(&TASK.real_state) {
        ABSENT => u32::MAX,
        state => probe_word::<u8>(signal, state).into(),
    };
    let timers = known(&TASK.cpu_timers);
    let virt: u64 = probe_word(signal, timers);
    let prof: u64 = probe_word(signal, timers.wrapping_add(known(&TASK.cpu_timer_size)));
    r.cpu_timers = (virt | prof != 0).into();
    r.exit_code = probe_word(task, known(&TASK.exit_code));
    r.group_exit_code = probe_word(signal, known(&TASK.group_exit_code));
    r.signal_flags = probe_word(signal, known(&TASK.signal_flags));
    r.umask = probe_word(pointer(task, known(&TASK.fs)), known(&TASK.fs_umask));
    let byte: u8 = probe_word(signal, known(&TASK.subreaper));
    r.child_subreaper = (u32::from(byte) >> (known(&TASK.subreaper_bit) & 7)) & 1;
}
