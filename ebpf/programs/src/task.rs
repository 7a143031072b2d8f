//! `iter/task`: the threads of a process, and what they share; and who descends from whom.

use crate::kernel::{
    Address, COMMON, Output, PidNamespace, Task, bit, known, number_in, numbers, pid_namespace, pointer, probe,
    probe_word, reader, wanted, zero,
};
use aya_ebpf::{
    helpers::generated::{bpf_ktime_get_boot_ns, bpf_ktime_get_ns, bpf_snprintf},
    macros::map,
    maps::PerCpuArray,
};
use standstill_ebpf_abi::{ABSENT, GROUPS, LineageRecord, ProcessRecord, SYMBOL_MAX, TaskLayout, ThreadRecord};

#[unsafe(no_mangle)]
static TASK: TaskLayout = zero();

/// The function whose name was looked up last.
#[repr(C)]
struct Last {
    function: u64,
    name: [u8; SYMBOL_MAX],
}

#[map]
static LAST: PerCpuArray<Last> = PerCpuArray::with_max_entries(1, 0);

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
    r.blocked = match known(&TASK.restore_sigmask) {
        ABSENT => 0,
        byte if bit(task, byte, known(&TASK.restore_sigmask_bit)) != 0 => probe_word(task, known(&TASK.saved_sigmask)),
        _ => probe_word(task, known(&TASK.blocked)),
    };
    r.pending = probe_word(task, known(&TASK.pending));
    probe(&mut r.comm, task, known(&TASK.comm));
    r.pdeath_signal = probe_word(task, known(&TASK.pdeath_signal));
    r.exit_signal = probe_word(task, known(&TASK.exit_signal));
    r.exit_state = probe_word(task, known(&TASK.exit_state));
    r.mm = probe_word(task, known(&COMMON.task_mm));
    r.files = probe_word(task, known(&COMMON.task_files));
    r.fs = probe_word(task, known(&TASK.fs));
    r.sighand = probe_word(task, known(&TASK.sighand));
    credentials(r, task);
    scheduling(r, task);
    r.flags = probe_word(task, known(&TASK.flags));
    (r.thread_flags, r.mempolicy) = (0, 0);
    if known(&TASK.thread_flags) != ABSENT {
        r.thread_flags = probe_word(task, known(&TASK.thread_flags));
    }
    if known(&TASK.mempolicy) != ABSENT {
        r.mempolicy = (!pointer(task, known(&TASK.mempolicy)).is_null()).into();
    }
    if known(&TASK.seccomp_mode) != ABSENT {
        r.seccomp = probe_word(task, known(&TASK.seccomp_mode));
    }
    if known(&TASK.rseq) != ABSENT {
        r.rseq = probe_word(task, known(&TASK.rseq));
        r.rseq_len = probe_word(task, known(&TASK.rseq_len));
        r.rseq_sig = probe_word(task, known(&TASK.rseq_sig));
    }
    probe(&mut r.restart, task, known(&TASK.restart));
    let function = pointer(task, known(&TASK.restart_fn));
    if let Some(last) = LAST.get_ptr_mut(0) {
        // SAFETY: the map's value for this CPU, which nobody else uses.
        let last = unsafe { &mut *last };
        // Threads that never were in such a wait have the same one, and looking up its name takes longest of all.
        if last.function != function as u64 {
            symbol(&mut last.name, function);
            last.function = function as u64;
        }
        r.restart_fn = last.name;
    }
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

/// Writes a [`LineageRecord`] for every task that the reader can see, whichever tree it is in.
#[unsafe(link_section = "iter/task")]
#[unsafe(no_mangle)]
extern "C" fn lineage(ctx: &Task) -> i32 {
    let task = ctx.task;
    if task.is_null() {
        return 0;
    }
    let Some(mut output) = Output::<LineageRecord>::new() else { return 0 };
    let r = output.record();
    (r.tgid, r.tid) = numbers(task);
    r.ppid = parent(task, pid_namespace(reader()));
    r.start_time = probe_word(task, known(&TASK.start_time));
    r.exit_state = probe_word(task, known(&TASK.exit_state));
    output.write(ctx.meta, 0);
    0
}

/// The parent process.
#[inline(always)]
fn parent(task: Address, namespace: PidNamespace) -> i32 {
    let leader = pointer(pointer(task, known(&TASK.real_parent)), known(&COMMON.task_group_leader));
    number_in(namespace, pointer(leader, known(&COMMON.task_thread_pid)))
}

#[inline(always)]
fn credentials(r: &mut ThreadRecord, task: Address) {
    let cred = pointer(task, known(&COMMON.task_cred));
    probe(&mut r.cred, cred, known(&TASK.cred_start));
    let groups = pointer(cred, known(&TASK.cred_group_info));
    r.ngroups = probe_word(groups, known(&TASK.ngroups));
    if r.ngroups <= GROUPS as u32 {
        // The list may be shorter than the room and end at an address that is not readable.
        for (n, group) in r.groups.iter_mut().enumerate() {
            if n as u32 >= r.ngroups {
                break;
            }
            *group = probe_word(groups, known(&TASK.group_ids).wrapping_add(4 * n as u32));
        }
    }
    r.atomic_flags = probe_word(task, known(&TASK.atomic_flags));
    let its = pointer(cred, known(&COMMON.cred_user_ns));
    let ours = pointer(pointer(reader(), known(&COMMON.task_cred)), known(&COMMON.cred_user_ns));
    r.initial_ids = (its == ours && probe_word::<u32>(ours, known(&TASK.user_ns_level)) == 0).into();
}

#[inline(always)]
fn scheduling(r: &mut ThreadRecord, task: Address) {
    r.policy = probe_word(task, known(&TASK.policy));
    r.static_prio = probe_word(task, known(&TASK.static_prio));
    r.rt_priority = probe_word(task, known(&TASK.rt_priority));
    r.reset_on_fork = bit(task, known(&TASK.reset_on_fork), known(&TASK.reset_on_fork_bit));
    // Behind a shorter mask there are other fields.
    probe(&mut r.cpus, task, known(&TASK.cpus_mask));
    r.ioprio = 0;
    if known(&TASK.io_context) != ABSENT {
        let context = pointer(task, known(&TASK.io_context));
        r.ioprio = probe_word::<u16>(context, known(&TASK.ioprio)).into();
    }
    r.timer_slack_ns = probe_word(task, known(&TASK.timer_slack_ns));
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
    r.membarrier = match known(&TASK.mm_membarrier) {
        ABSENT => 0,
        state => probe_word::<u32>(mm, state).into(),
    };
    r.real_expires_ns = probe_word(signal, known(&TASK.real_expires));
    r.real_interval_ns = probe_word(signal, known(&TASK.real_incr));
    r.real_state = match known(&TASK.real_state) {
        ABSENT => u32::MAX,
        state => probe_word::<u8>(signal, state).into(),
    };
    let timers = known(&TASK.cpu_timers);
    let virt: u64 = probe_word(signal, timers);
    let prof: u64 = probe_word(signal, timers.wrapping_add(known(&TASK.cpu_timer_size)));
    r.cpu_timers = virt | prof;
    r.exit_code = probe_word(task, known(&TASK.exit_code));
    r.group_exit_code = probe_word(signal, known(&TASK.group_exit_code));
    r.signal_flags = probe_word(signal, known(&TASK.signal_flags));
    r.umask = probe_word(pointer(task, known(&TASK.fs)), known(&TASK.fs_umask));
    r.child_subreaper = bit(signal, known(&TASK.subreaper), known(&TASK.subreaper_bit));
    r.shared_pending = probe_word(signal, known(&TASK.shared_pending));
    r.posix_timers = match known(&TASK.posix_timers) {
        ABSENT => 1,
        list => {
            // Either kind of list: the head is null or points to itself if it is empty.
            let first = pointer(signal, list);
            (!first.is_null() && first != signal.wrapping_add(list as usize)).into()
        }
    };
    r.personality = probe_word(task, known(&TASK.personality));
    r.oom_score_adj = probe_word::<u16>(signal, known(&TASK.oom_score_adj)) as i16 as i32;
    if known(&TASK.loginuid) != ABSENT {
        r.loginuid = probe_word(task, known(&TASK.loginuid));
    }
    probe(&mut r.auxv, mm, known(&TASK.mm_auxv));
    r.exe_file = probe_word(mm, known(&TASK.mm_exe_file));
    let fs = pointer(task, known(&TASK.fs));
    probe(&mut r.root, fs, known(&TASK.fs_root));
    probe(&mut r.pwd, fs, known(&TASK.fs_pwd));
    identity(r, task, signal);
}

/// Whose child it is, in which group and session, and whether in namespaces other than the reader's.
#[inline(always)]
fn identity(r: &mut ProcessRecord, task: Address, signal: Address) {
    // PIDTYPE_PGID and PIDTYPE_SID of `enum pid_type`.
    const PGID: u32 = 2;
    const SID: u32 = 3;
    let reader = reader();
    let ours = pid_namespace(reader);
    r.ppid = parent(task, ours);
    r.pgid = number_in(ours, pointer(signal, known(&TASK.signal_pids).wrapping_add(8 * PGID)));
    r.sid = number_in(ours, pointer(signal, known(&TASK.signal_pids).wrapping_add(8 * SID)));
    let (its_proxy, our_proxy) =
        (pointer(task, known(&COMMON.task_nsproxy)), pointer(reader, known(&COMMON.task_nsproxy)));
    let user = |task| pointer(pointer(task, known(&COMMON.task_cred)), known(&COMMON.cred_user_ns));
    let mut foreign =
        u32::from(user(task) != user(reader)) << 8 | u32::from(pid_namespace(task).address != ours.address) << 9;
    let mut time = 0;
    for (n, offset) in TASK.nsproxy.iter().enumerate() {
        // What is for children is compared with what we are in ourselves: that of time comes before, that of pids is known.
        let own: u64 = match n {
            6 => ours.address,
            7 => time,
            _ => probe_word(our_proxy, known(offset)),
        };
        if n == 5 {
            time = own;
        }
        foreign |= u32::from(probe_word::<u64>(its_proxy, known(offset)) != own) << n;
    }
    r.foreign = foreign;
}
