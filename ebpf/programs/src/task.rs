//! `iter/task`: the threads of a process, and what they share.

use crate::{
    kernel::{Address, Output, COMMON, load, number, numbers, known, probe, probe_word, wanted, zero},
    task_file::Meta,
};
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
    // SAFETY: `ctx` is the iterator's context, and the fields are of the types loaded.
    unsafe {
        let r = output.record();
        r.tgid = tgid;
        r.tid = tid;
        r.leader = (tgid == tid).into();
        r.clear_child_tid = number(&mut r.clear_child_tid, load(task, known(&TASK.clear_child_tid)));
        r.robust_list = number(&mut r.robust_list, load(task, known(&TASK.robust_list)));
        r.sas_ss_sp = load(task, known(&TASK.sas_ss_sp));
        r.sas_ss_size = load(task, known(&TASK.sas_ss_size));
        r.sas_ss_flags = load(task, known(&TASK.sas_ss_flags));
        r.blocked = load(task, known(&TASK.blocked));
        r.pdeath_signal = load(task, known(&TASK.pdeath_signal));
        r.exit_signal = load(task, known(&TASK.exit_signal));
        r.exit_state = load(task, known(&TASK.exit_state));
        r.mm = number(&mut r.mm, load(task, known(&COMMON.task_mm)));
        r.files = number(&mut r.files, load(task, known(&COMMON.task_files)));
        r.fs = number(&mut r.fs, load(task, known(&TASK.fs)));
        r.sighand = number(&mut r.sighand, load(task, known(&TASK.sighand)));
        let cred: Address = load(task, known(&TASK.cred));
        r.securebits = load(cred, known(&TASK.cred_securebits));
        r.monotonic_ns = bpf_ktime_get_ns();
        r.boottime_ns = bpf_ktime_get_boot_ns();
        probe(&mut r.restart, task, known(&TASK.restart));
        let function: Address = load(task, known(&TASK.restart_fn));
        symbol(&mut r.restart_fn, function);
        let mut tail = 0;
        if tgid == tid {
            tail = size_of::<ProcessRecord>() as u32;
            process(&mut *output.tail().cast(), task);
        }
        output.write((*ctx.meta).seq, tail);
    }
    0
}

/// Name of the kernel function at an address; a number in hexadecimal if there is none.
#[inline(always)]
pub fn symbol(name: &mut [u8; SYMBOL_MAX], address: Address) {
    // The helper wants its format in a read-only map.
    static FORMAT: [u8; 4] = *b"%ps\0";
    let mut data = 0;
    // SAFETY: the pointers are valid for the lengths given with them.
    unsafe {
        core::ptr::write_volatile((&raw mut data).cast(), address);
        bpf_snprintf(name.as_mut_ptr().cast(), SYMBOL_MAX as u32, FORMAT.as_ptr().cast(), &raw mut data, 8);
    }
}

/// # Safety
/// `task` points to a task_struct and the verifier knows it.
#[inline(always)]
unsafe fn process(r: &mut ProcessRecord, task: Address) {
    // SAFETY: the caller's promise.
    unsafe {
        let signal: Address = load(task, known(&TASK.signal));
        let sighand: Address = load(task, known(&TASK.sighand));
        let fs: Address = load(task, known(&TASK.fs));
        let mm: Address = load(task, known(&COMMON.task_mm));
        probe(&mut r.actions, sighand, known(&TASK.sighand_action));
        probe(&mut r.limits, signal, known(&TASK.signal_rlim));
        for (n, word) in r.layout.iter_mut().enumerate() {
            *word = load(mm, core::ptr::read_volatile((&raw const TASK.mm_layout).cast::<u32>().add(n)));
        }
        r.mm_flags = probe_word(mm, known(&TASK.mm_flags));
        r.real_expires_ns = load(signal, known(&TASK.real_expires));
        r.real_interval_ns = load(signal, known(&TASK.real_incr));
        r.real_state = match known(&TASK.real_state) {
            ABSENT => u32::MAX,
            state => load::<u8>(signal, state).into(),
        };
        let timers = known(&TASK.cpu_timers);
        let virt: u64 = load(signal, timers);
        let prof: u64 = load(signal, timers.wrapping_add(known(&TASK.cpu_timer_size)));
        r.cpu_timers = (virt | prof != 0).into();
        r.exit_code = load(task, known(&TASK.exit_code));
        r.group_exit_code = load(signal, known(&TASK.group_exit_code));
        r.signal_flags = load(signal, known(&TASK.signal_flags));
        r.umask = load(fs, known(&TASK.fs_umask));
        let byte: u8 = probe_word(signal, known(&TASK.subreaper));
        r.child_subreaper = (u32::from(byte) >> (known(&TASK.subreaper_bit) & 7)) & 1;
    }
}
