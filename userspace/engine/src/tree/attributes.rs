//! Attributes that few processes have: most of them are those of prctl(2). Which ones a process has, the observer tells from
//! flags that it reads anyway; only then the process is asked.

use crate::{
    error::{Context, Error, Result},
    kernel::{
        proc::{self, Status},
        sys,
    },
    observe::{ProcessState, ThreadState},
    restore::program::{Arg, Program},
    task::{FrozenProcess, Remote},
};
use standstill_images::types::{AddressSpace, Attributes, Backing, MemoryPolicy, ThreadAttributes};

/// The usual `/proc/pid/coredump_filter`.
pub(crate) const COREDUMP_FILTER: u32 = 0x33;
/// Numbers of prctl(2) that the libc crate lacks.
const PR_SET_IO_FLUSHER: i32 = 57;
const PR_SET_MDWE: i32 = 65;
const PR_GET_MDWE: i32 = 66;
const PR_SET_MEMORY_MERGE: i32 = 67;
const PR_GET_MEMORY_MERGE: i32 = 68;
/// MEMBARRIER_CMD_GET_REGISTRATIONS, which the libc crate lacks.
const GET_REGISTRATIONS: u64 = 1 << 9;
/// Words of a node mask that get_mempolicy(2) is asked for: as many nodes as any kernel has.
const NODE_WORDS: usize = 16;

/// What most processes and threads have.
pub(crate) static USUAL: Attributes = Attributes {
    pid: 0,
    leader_exited: None,
    coredump_filter: None,
    thp_disable: 0,
    mdwe: 0,
    memory_merge: false,
    barriers: 0,
    memory_policies: Vec::new(),
    threads: Vec::new(),
};
static USUAL_THREAD: ThreadAttributes = ThreadAttributes {
    tid: 0,
    mce_kill: None,
    io_flusher: false,
    tsc_faults: false,
    speculation: [0; 2],
    memory_policy: None,
    deadline: None,
};

/// Those of a thread among those of its process.
pub(crate) fn of_thread(process: &Attributes, tid: i32) -> &ThreadAttributes {
    process.threads.binary_search_by_key(&tid, |t| t.tid).map_or(&USUAL_THREAD, |n| &process.threads[n])
}

/// Reads those of a process; its threads are left out. `policies`: mappings that have a memory policy.
pub(crate) fn collect(
    process: &FrozenProcess,
    seen: Option<&ProcessState>,
    policies: &[(u64, u64)],
    remote: &mut Remote,
) -> Result<Attributes> {
    let pid = process.pid;
    let mut all = Attributes { pid: process.id(), ..Default::default() };
    all.leader_exited = process.dead_leader.map(exited).transpose()?;
    let filter = seen.map_or_else(|| proc::coredump_filter(pid), |p| p.coredump_filter);
    all.coredump_filter = Some(filter).filter(|&filter| filter != COREDUMP_FILTER);
    if seen.is_none_or(|p| p.unusual_memory) {
        all.thp_disable = ask(pid, remote, libc::PR_GET_THP_DISABLE)?;
        all.mdwe = ask(pid, remote, PR_GET_MDWE)?;
        all.memory_merge = ask(pid, remote, PR_GET_MEMORY_MERGE)? != 0;
        all.barriers = barriers(pid, remote)?;
    }
    for &(start, end) in policies {
        if let Some(policy) = memory_policy(pid, Some(start), remote)? {
            all.memory_policies.push((start, end, policy));
        }
    }
    Ok(all)
}

/// The record, if there is anything to tell.
pub(crate) fn into_record(mut all: Attributes) -> Option<Attributes> {
    all.threads.retain(|t| *t != ThreadAttributes { tid: t.tid, ..Default::default() });
    all.threads.sort_unstable_by_key(|t| t.tid);
    (all != Attributes { pid: all.pid, ..Default::default() }).then_some(all)
}

/// The status of a leader that has exited.
fn exited(pid: i32) -> Result<i32> {
    let status = proc::stat(pid).context(|| format!("read /proc/{pid}/stat"))?.exit_code;
    match status & 0x7f {
        0 => Ok(status),
        signal => Err(Error::unsupported(
            pid,
            format!("a process whose first thread alone was ended by signal {signal} (seccomp)"),
            "let the other threads end first",
        )),
    }
}

/// An option of prctl(2) whose value is the result; 0 if the kernel does not know it.
fn ask(tid: i32, remote: &mut Remote, option: i32) -> Result<u32> {
    match remote.syscall(tid, libc::SYS_prctl, [option as u64, 0, 0, 0, 0, 0]) {
        Err(Error::System { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => Ok(0),
        other => other.map(|value| value as u32),
    }
}

/// What membarrier(2) was registered for, Linux 6.3; nothing without CONFIG_MEMBARRIER.
fn barriers(tid: i32, remote: &mut Remote) -> Result<u32> {
    match remote.syscall(tid, libc::SYS_membarrier, [GET_REGISTRATIONS, 0, 0, 0, 0, 0]) {
        Err(Error::System { source, .. }) if matches!(source.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS)) => {
            Ok(0)
        }
        other => other.map(|commands| commands as u32),
    }
}

/// Reads those of a thread: what the observer saw of it, or the `status` of the thread and what itself says. `strict`: it is in
/// the strict mode of seccomp, which forbids the time stamp counter by itself. It is not asked about that: should we be
/// killed meanwhile, then the kernel would kill the thread for its answer.
pub(crate) fn collect_thread(
    tid: i32,
    seen: Option<&ThreadState>,
    status: Option<&Status>,
    strict: bool,
    remote: &mut Remote,
) -> Result<ThreadAttributes> {
    let (flags, speculation) = match (seen, status) {
        (Some(seen), _) => (seen.flags, seen.speculation),
        (None, status) => {
            let stat = proc::stat(tid).context(|| format!("read the stat of thread {tid}"))?;
            (stat.flags as u32, status.map_or([0; 2], |s| s.speculation))
        }
    };
    let mut all = ThreadAttributes { tid, speculation, ..of_flags(flags) };
    if !strict && seen.is_none_or(|t| t.tsc_faults) {
        let out = remote.scratch()?;
        remote.syscall(tid, libc::SYS_prctl, [libc::PR_GET_TSC as u64, out, 0, 0, 0, 0])?;
        let mut mode = [0; 4];
        remote.read(&mut mode)?;
        all.tsc_faults = i32::from_ne_bytes(mode) == libc::PR_TSC_SIGSEGV;
    }
    if seen.is_none_or(|t| t.memory_policy) {
        all.memory_policy = memory_policy(tid, None, remote)?;
    }
    Ok(all)
}

/// `PF_*` of include/linux/sched.h that prctl(2) sets: PR_MCE_KILL, and PR_SET_IO_FLUSHER.
#[cfg(feature = "ebpf")]
pub(crate) const FLAGS: u32 = MCE_PROCESS | MCE_EARLY | IO_FLUSHER;
const MCE_PROCESS: u32 = 0x80;
const MCE_EARLY: u32 = 0x0800_0000;
const IO_FLUSHER: u32 = 0x0018_0000;

/// What `flags` of a task say.
fn of_flags(flags: u32) -> ThreadAttributes {
    let early = if flags & MCE_EARLY == 0 { libc::PR_MCE_KILL_LATE } else { libc::PR_MCE_KILL_EARLY };
    ThreadAttributes {
        mce_kill: (flags & MCE_PROCESS != 0).then_some(early as u32),
        io_flusher: flags & IO_FLUSHER == IO_FLUSHER,
        ..Default::default()
    }
}

/// The policy of a thread, or of its memory at an address; `None`: the default.
fn memory_policy(tid: i32, address: Option<u64>, remote: &mut Remote) -> Result<Option<MemoryPolicy>> {
    const MPOL_F_ADDR: u64 = 2;
    let out = remote.scratch()?;
    let flags = address.map_or(0, |_| MPOL_F_ADDR);
    // The kernel counts one bit less than it is told.
    let bits = 64 * NODE_WORDS as u64 + 1;
    match remote.syscall(tid, libc::SYS_get_mempolicy, [out, out + 8, bits, address.unwrap_or(0), flags, 0]) {
        // CONFIG_NUMA.
        Err(Error::System { source, .. }) if source.raw_os_error() == Some(libc::ENOSYS) => return Ok(None),
        other => other?,
    };
    let mut bytes = [0; 8 + 8 * NODE_WORDS];
    remote.read(&mut bytes)?;
    let words = bytes.chunks_exact(8).map(|b| u64::from_ne_bytes(b.try_into().expect("eight bytes")));
    Ok(policy(&words.collect::<Vec<_>>()))
}

/// From a mode and a mask of nodes; `None`: the default.
fn policy(words: &[u64]) -> Option<MemoryPolicy> {
    let (mode, nodes) = (words[0] as u32, &words[1..]);
    let used = nodes.iter().rposition(|&word| word != 0).map_or(0, |last| last + 1);
    (mode != libc::MPOL_DEFAULT as u32).then(|| MemoryPolicy { mode, nodes: nodes[..used].to_vec() })
}

/// Those of this process, which every task begins with.
pub(crate) fn own() -> Attributes {
    let pid = std::process::id() as i32;
    let mut thread = ThreadAttributes::default();
    if let (Ok(stat), Ok(status)) = (proc::stat(pid), proc::status(pid, pid)) {
        thread = ThreadAttributes { speculation: status.speculation, ..of_flags(stat.flags as u32) };
    }
    let mut words = [0u64; 1 + NODE_WORDS];
    if sys::get_mempolicy(&mut words).is_ok() {
        thread.memory_policy = policy(&words);
    }
    thread.tid = pid;
    let get = |option| sys::prctl_get(option).unwrap_or(0);
    Attributes {
        pid,
        coredump_filter: Some(proc::coredump_filter(pid)),
        thp_disable: get(libc::PR_GET_THP_DISABLE),
        mdwe: get(PR_GET_MDWE),
        memory_merge: get(PR_GET_MEMORY_MERGE) != 0,
        threads: vec![thread],
        ..Default::default()
    }
}

fn prctl(program: &mut Program, label: &str, option: i32, args: [u64; 4]) {
    let args: Vec<Arg> = [option.into()].into_iter().chain(args.map(Arg::Value)).collect();
    program.call(label, libc::SYS_prctl, &args);
}

/// Before there is memory: what decides how it is allocated. `inherited`: what the process begins with.
pub(crate) fn restore_first(wanted: &Attributes, inherited: &Attributes, program: &mut Program) {
    if wanted.thp_disable != inherited.thp_disable {
        // The flags stand beside the bit that says whether it is set at all.
        let args = [u64::from(wanted.thp_disable & 1), u64::from(wanted.thp_disable & !1), 0, 0];
        prctl(program, "set or unset PR_SET_THP_DISABLE", libc::PR_SET_THP_DISABLE, args);
    }
}

/// Sets `/proc/self/coredump_filter`, by way of the lowest free descriptor `fd`.
pub(crate) fn restore_coredump_filter(wanted: &Attributes, own: &Attributes, fd: i32, program: &mut Program) {
    let filter = wanted.coredump_filter.unwrap_or(COREDUMP_FILTER);
    if own.coredump_filter != Some(filter) {
        super::process::write_own("coredump_filter", &filter.to_string(), fd, program);
    }
}

/// Once memory is complete. PR_SET_MEMORY_MERGE marks all mappings, and those that it gets later.
pub(crate) fn restore_memory_merge(wanted: &Attributes, own: &Attributes, space: &AddressSpace, program: &mut Program) {
    if wanted.memory_merge != own.memory_merge {
        let args = [u64::from(wanted.memory_merge), 0, 0, 0];
        prctl(program, "set or unset PR_SET_MEMORY_MERGE", PR_SET_MEMORY_MERGE, args);
    }
    if wanted.memory_merge {
        let kept = |flags: standstill_images::types::VmaFlags| flags.mergeable;
        for vma in space.vmas.iter().filter(|v| !kept(v.flags) && !matches!(v.backing, Backing::Kernel { .. })) {
            let args = [vma.start.into(), (vma.end - vma.start).into(), libc::MADV_UNMERGEABLE.into()];
            program.try_call("do not merge pages", libc::SYS_madvise, &args);
        }
    }
}

/// Once no process is forked any more, which would have the registrations too, and before there are threads, with which
/// they take longer.
pub(crate) fn restore_barriers(wanted: &Attributes, program: &mut Program) {
    for command in (0..u32::BITS).map(|bit| 1 << bit).filter(|command: &u32| wanted.barriers & command != 0) {
        program.call("register for membarrier(2)", libc::SYS_membarrier, &[command.into(), 0.into(), 0.into()]);
    }
}

/// Nothing can be made executable after this.
pub(crate) fn restore_last(wanted: &Attributes, own: &Attributes, program: &mut Program) {
    if wanted.mdwe != own.mdwe {
        prctl(program, "set PR_SET_MDWE", PR_SET_MDWE, [wanted.mdwe.into(), 0, 0, 0]);
    }
}

/// What a thread sets for itself while it has its privileges.
pub(crate) fn restore_thread(wanted: &ThreadAttributes, own: &ThreadAttributes, program: &mut Program) {
    if wanted.mce_kill != own.mce_kill {
        let policy = wanted.mce_kill.map_or(libc::PR_MCE_KILL_DEFAULT as u64, u64::from);
        let args = [libc::PR_MCE_KILL_SET as u64, policy, 0, 0];
        prctl(program, "set PR_MCE_KILL", libc::PR_MCE_KILL, args);
    }
    if wanted.io_flusher != own.io_flusher {
        let args = [wanted.io_flusher.into(), 0, 0, 0];
        prctl(program, "set PR_SET_IO_FLUSHER", PR_SET_IO_FLUSHER, args);
    }
    for (n, (wanted, own)) in wanted.speculation.into_iter().zip(own.speculation).enumerate() {
        if wanted != own {
            let value = if wanted == 0 { libc::PR_SPEC_ENABLE as u64 } else { wanted.into() };
            prctl(program, "set PR_SET_SPECULATION_CTRL", libc::PR_SET_SPECULATION_CTRL, [n as u64, value, 0, 0]);
        }
    }
    if wanted.memory_policy != own.memory_policy {
        let (mode, nodes, bits) = policy_arguments(wanted.memory_policy.as_ref(), program);
        program.call("set the memory policy", libc::SYS_set_mempolicy, &[mode, nodes, bits]);
    }
    if wanted.tsc_faults {
        prctl(program, "set PR_SET_TSC", libc::PR_SET_TSC, [libc::PR_TSC_SIGSEGV as u64, 0, 0, 0]);
    }
}

/// Mode, address of the mask of nodes and its length in bits, as set_mempolicy(2) and mbind(2) want them.
pub(crate) fn policy_arguments(policy: Option<&MemoryPolicy>, program: &mut Program) -> (Arg, Arg, Arg) {
    match policy {
        Some(policy) if !policy.nodes.is_empty() => {
            let nodes = program.words(&policy.nodes);
            (policy.mode.into(), nodes, (64 * policy.nodes.len() + 1).into())
        }
        other => (other.map_or(0, |p| p.mode).into(), 0.into(), 0.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_usual_is_not_recorded() {
        let usual = Attributes {
            pid: 7,
            threads: vec![ThreadAttributes { tid: 7, ..Default::default() }],
            ..Default::default()
        };
        assert_eq!(into_record(usual.clone()), None);
        let faults = ThreadAttributes { tid: 5, tsc_faults: true, ..Default::default() };
        let threads = vec![usual.threads[0].clone(), faults.clone()];
        let record = into_record(Attributes { threads, ..usual }).unwrap();
        assert_eq!(record.threads, [faults]);
    }

    #[test]
    fn flags_of_tasks() {
        assert_eq!(of_flags(0x40_0000), ThreadAttributes::default());
        let late = ThreadAttributes { mce_kill: Some(0), ..Default::default() };
        assert_eq!(of_flags(MCE_PROCESS), late);
        assert_eq!(of_flags(MCE_PROCESS | MCE_EARLY).mce_kill, Some(1));
        assert!(of_flags(IO_FLUSHER).io_flusher && !of_flags(0x8_0000).io_flusher);
    }

    #[test]
    fn policies_without_nodes() {
        assert_eq!(policy(&[0, 0, 0]), None);
        assert_eq!(policy(&[4, 0, 0]), Some(MemoryPolicy { mode: 4, nodes: Vec::new() }));
        assert_eq!(policy(&[2, 1, 0]), Some(MemoryPolicy { mode: 2, nodes: vec![1] }));
    }
}
