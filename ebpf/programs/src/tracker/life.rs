//! Births, new programs and ends of processes.

use crate::{
    LAYOUT, PROCESSES, SPACES, access::Address, access::known, access::pointer, add, changed, log_context, now,
    process_of, wake,
};
use aya_log_ebpf::{debug, warn};
use standstill_ebpf_abi::track::{TrackedProcess, TrackedSpace, count, part};

/// Arguments of the tracepoint sched_process_fork.
#[repr(C)]
struct Fork {
    parent: Address,
    child: Address,
}

/// The new task does not run yet.
#[unsafe(link_section = "tp_btf/sched_process_fork")]
#[unsafe(no_mangle)]
extern "C" fn fork(ctx: &Fork) -> i32 {
    // SAFETY: the tracepoint passes tasks.
    let (parent, child) = unsafe { (process_of(ctx.parent), process_of(ctx.child)) };
    if PROCESSES.get_ptr(parent).is_none() {
        return 0;
    }
    changed(parent, part::TASKS);
    if child == parent {
        add(count::THREADS);
        return 0;
    }
    add(count::FORKS);
    let born = now();
    let process = TrackedProcess { born, changed: [born; part::COUNT] };
    if PROCESSES.insert(child, process, 0).is_err() {
        add(count::LOST);
        warn!(&log_context(ctx), "no room to track process {}, a child of {}", child, parent);
        return 0;
    }
    debug!(&log_context(ctx), "process {} is a child of {}", child, parent);
    track_space(ctx.child);
    0
}

/// Begins to track the address space of a task.
#[inline(always)]
fn track_space(task: Address) {
    let mm = pointer(task, known(&LAYOUT.task_mm)) as u64;
    // A space that is not in the map counts as changed.
    if mm != 0 {
        let _ = SPACES.insert(mm, TrackedSpace { changed: now() }, 0);
    }
}

/// Arguments of the tracepoint sched_process_exec, the first of them.
#[repr(C)]
struct Exec {
    task: Address,
}

/// The new program's memory is complete and the old one's gone.
#[unsafe(link_section = "tp_btf/sched_process_exec")]
#[unsafe(no_mangle)]
extern "C" fn exec(ctx: &Exec) -> i32 {
    // SAFETY: the tracepoint passes a task.
    let process = unsafe { process_of(ctx.task) };
    if PROCESSES.get_ptr(process).is_some() {
        add(count::EXECS);
        track_space(ctx.task);
        changed(process, part::ALL);
    }
    0
}

/// Arguments of the tracepoint sched_process_exit (Linux 6.16 and later pass a second one).
#[repr(C)]
struct Exit {
    task: Address,
}

/// A thread ends.
#[unsafe(link_section = "tp_btf/sched_process_exit")]
#[unsafe(no_mangle)]
extern "C" fn exit(ctx: &Exit) -> i32 {
    // SAFETY: the tracepoint passes a task.
    changed(unsafe { process_of(ctx.task) }, part::TASKS);
    0
}

/// Arguments of the tracepoint sched_process_free.
#[repr(C)]
struct Free {
    task: Address,
}

/// The last that is heard of a task: somebody waited for it. Its number can be used again.
#[unsafe(link_section = "tp_btf/sched_process_free")]
#[unsafe(no_mangle)]
extern "C" fn free(ctx: &Free) -> i32 {
    // SAFETY: the tracepoint passes a task.
    let (process, thread) = unsafe { (process_of(ctx.task), crate::thread_of(ctx.task)) };
    // A leader is freed after its threads.
    if process == thread && PROCESSES.remove(process).is_ok() {
        add(count::EXITS);
        wake();
    }
    0
}

/// Arguments of the tracepoint signal_generate, the first of them.
#[repr(C)]
struct Signal {
    number: u64,
    info: Address,
    task: Address,
}

/// A signal is sent.
#[unsafe(link_section = "tp_btf/signal_generate")]
#[unsafe(no_mangle)]
extern "C" fn signal_sent(ctx: &Signal) -> i32 {
    // SAFETY: the tracepoint passes a task.
    if PROCESSES.get_ptr(unsafe { process_of(ctx.task) }).is_some() {
        add(count::SIGNALS_SENT);
    }
    0
}
