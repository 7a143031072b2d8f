//! From the programs' records to the types of this module.

use super::{
    FdEntry, FileId, Lineage, ObserveError, ProcessState, Result, SharedId, SharedMapping, SocketEntry, ThreadState,
    VmaEntry, flags,
    ids::Ids,
    layout::{CredLayout, Layouts},
    restart,
};
use crate::tree::attributes;
use standstill_ebpf_abi::{
    ABSENT, Action, CPUS, FileRecord, GROUPS, LineageRecord, NAMESPACES, Plain, ProcessRecord, SocketRecord,
    TaskLayout, ThreadRecord, UNIX_NAME, VmaRecord, vma_name,
};
use standstill_images::types::{AltStack, Bytes, Creds, ITimer, MmLayout, Rseq, Sched, SigAction};
use std::{
    collections::HashMap,
    ffi::OsStr,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

/// `SIGNAL_GROUP_EXIT` in `signal_struct.flags`.
const SIGNAL_GROUP_EXIT: u32 = 4;
/// `SA_IMMUTABLE`: the kernel's own, never shown by sigaction(2).
const SA_IMMUTABLE: u64 = 0x0080_0000;
/// ANON_INODE_FS_MAGIC.
pub(super) const ANON_INODE_FS: u64 = 0x0904_1934;

/// Splits off the text behind a record; `None` if the stream is damaged.
fn text(rest: &[u8], len: i32) -> Option<(&[u8], &[u8])> {
    rest.split_at_checked(len.max(0) as usize)
}

fn path(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}

/// Sockets by process and descriptor.
pub(super) fn sockets(stream: &[u8]) -> Result<Vec<SocketEntry>> {
    let mut all = Vec::with_capacity(stream.len() / size_of::<SocketRecord>());
    let mut rest = stream;
    while !rest.is_empty() {
        let (record, after) = SocketRecord::split(rest).ok_or(ObserveError::BadRecord("sockets"))?;
        rest = after;
        all.push(socket(&record));
    }
    all.sort_by_key(|s: &SocketEntry| (s.tgid, s.fd));
    Ok(all)
}

fn socket(r: &SocketRecord) -> SocketEntry {
    let address = |bytes: &[u8; 16], port: u16| -> Option<SocketAddr> {
        match i32::from(r.family) {
            libc::AF_INET => Some((Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]), port).into()),
            libc::AF_INET6 => Some((Ipv6Addr::from(*bytes), port).into()),
            _ => None,
        }
    };
    let name = &r.name[..(r.name_len as usize).min(UNIX_NAME)];
    // The length of a path counts its NUL.
    let end = if name.first() == Some(&0) { None } else { name.iter().position(|b| *b == 0) };
    let has_queues = [libc::AF_INET, libc::AF_INET6, libc::AF_UNIX].contains(&r.family.into());
    SocketEntry {
        tgid: r.tgid,
        fd: r.fd,
        ino: r.ino,
        family: r.family,
        sort: r.sort,
        protocol: r.protocol,
        state: r.state,
        local: address(&r.local, r.local_port),
        peer: address(&r.peer, r.peer_port).filter(|a| a.port() != 0),
        name: Bytes::from(&name[..end.unwrap_or(name.len())]),
        peer_ino: Some(r.peer_ino).filter(|ino| *ino != 0),
        receive: has_queues.then_some(r.receive.into()),
        send: has_queues.then_some(r.send.into()),
    }
}

/// The device number in stat's encoding.
pub(super) fn device(kernel: u32) -> u64 {
    // MKDEV of the kernel: 12 bits of major, 20 of minor.
    libc::makedev(kernel >> 20, kernel & 0xf_ffff)
}

/// A record of `iter/task_file` at the beginning of `stream`, and its path if it has one.
pub(super) fn file_record(stream: &[u8]) -> Option<(FileRecord, Option<&Path>)> {
    let (record, rest) = FileRecord::split(stream)?;
    let (name, _) = text(rest, record.path_len)?;
    Some((record, (record.path_len > 0).then(|| path(name))))
}

/// Process and descriptor of each record of `iter/task_file`, and where in the stream it is; in ascending order.
pub(super) fn file_order(stream: &[u8]) -> Result<Vec<((i32, i32), usize)>> {
    let mut order = Vec::with_capacity(stream.len() / size_of::<FileRecord>());
    let mut at = 0;
    while at < stream.len() {
        let (record, _) = file_record(&stream[at..]).ok_or(ObserveError::BadRecord("task_file"))?;
        order.push(((record.tgid, record.fd), at));
        at += size_of::<FileRecord>() + record.path_len.max(0) as usize;
    }
    // An iterator over all tasks follows their numbers in its own pid namespace; ours may differ.
    order.sort_by_key(|(key, _)| *key);
    Ok(order)
}

/// The entry of a record.
pub(super) fn file(record: &FileRecord, path: PathBuf, ids: &mut Ids) -> FdEntry {
    // Files without type: the inode says "regular", stat(2) does not.
    let hidden = if record.magic == ANON_INODE_FS { libc::S_IFMT } else { 0 };
    FdEntry {
        tgid: record.tgid,
        fd: record.fd,
        cloexec: record.cloexec != 0,
        file: FileId(ids.of(record.file)),
        flags: record.flags & !(libc::O_CLOEXEC as u32),
        pos: record.pos,
        ino: record.ino,
        dev: device(record.dev),
        mode: record.mode & !hidden,
        rdev: device(record.rdev),
        size: record.size,
        mtime: (record.mtime, record.mtime_nsec),
        nlink: record.nlink,
        path,
    }
}

/// Numbers of what tasks share.
#[derive(Default)]
struct SharedIds {
    mm: Ids,
    files: Ids,
    fs: Ids,
    sighand: Ids,
    exe: Ids,
    mounts: Ids,
    dentries: Ids,
    directories: Ids,
}

impl SharedIds {
    /// Number of a directory, given by the addresses of mount and dentry.
    fn directory(&mut self, [mount, dentry]: [u64; 2]) -> Option<SharedId> {
        let place = u64::from(self.mounts.of(mount)) << 32 | u64::from(self.dentries.of(dentry));
        (dentry != 0).then(|| SharedId(self.directories.of(place)))
    }
}

/// CPUs that each thread may run on, given by the kernel's mask.
pub(super) type Affinity<'a> = &'a mut dyn FnMut(i32, &[u64; CPUS / 64]) -> Option<Vec<u8>>;

/// The records of a stream of `iter/task`.
fn tasks(mut stream: &[u8]) -> Result<Vec<(ThreadRecord, Option<ProcessRecord>)>> {
    let mut threads = Vec::new();
    while !stream.is_empty() {
        let bad = ObserveError::BadRecord("task");
        let Some((record, mut rest)) = ThreadRecord::split(stream) else { return Err(bad) };
        let mut process = None;
        if record.leader != 0 {
            let Some((record, after)) = ProcessRecord::split(rest) else { return Err(bad) };
            process = Some(record);
            rest = after;
        }
        threads.push((record, process));
        stream = rest;
    }
    Ok(threads)
}

/// Addresses of what a process has, as names for them that are never shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Belongings {
    /// Its memory.
    pub mm: u64,
    /// The descriptor table of all its threads; `None` if they have several.
    pub files: Option<u64>,
    /// Its signal handlers.
    pub sighand: u64,
    /// By which heap and stack are found among the mappings: `start_brk`, `brk`, `start_stack`.
    pub named: [u64; 3],
}

/// The belongings of each living process of a stream of `iter/task`.
pub(super) fn belongings(stream: &[u8]) -> Result<HashMap<i32, Belongings>> {
    let tasks = tasks(stream)?;
    let mut all: HashMap<i32, Belongings> = HashMap::new();
    for (leader, process) in tasks.iter().filter(|(t, _)| t.mm != 0) {
        let Some(process) = process else { continue };
        let [_, _, _, _, start_brk, brk, start_stack, ..] = process.layout;
        let (mm, files, sighand) = (leader.mm, Some(leader.files), leader.sighand);
        all.insert(leader.tgid, Belongings { mm, files, sighand, named: [start_brk, brk, start_stack] });
    }
    for (thread, _) in tasks.iter().filter(|(t, _)| t.exit_state == 0) {
        if let Some(process) = all.get_mut(&thread.tgid)
            && process.files != Some(thread.files)
        {
            process.files = None;
        }
    }
    Ok(all)
}

/// The processes of a stream of `iter/task`, by number.
pub(super) fn processes(stream: &[u8], layouts: &Layouts, affinity: Affinity<'_>) -> Result<Vec<ProcessState>> {
    let mut threads = tasks(stream)?;
    threads.sort_by_key(|(t, _)| (t.tgid, t.leader == 0, t.tid));
    let mut ids = SharedIds::default();
    let mut all: Vec<ProcessState> = Vec::new();
    for (record, process) in &threads {
        if let Some(process) = process {
            all.push(process_state(record, process, &mut ids, layouts));
        }
        // A thread whose leader is not there came after the leader was passed: its process has just been made.
        if let Some(last) = all.last_mut().filter(|p| p.tgid == record.tgid) {
            last.threads.push(thread(record, &mut ids, layouts, affinity));
        }
    }
    Ok(all)
}

/// The tasks of a stream of `lineage`.
pub(super) fn lineage(mut stream: &[u8]) -> Result<Vec<Lineage>> {
    let mut all = Vec::with_capacity(stream.len() / size_of::<LineageRecord>());
    while !stream.is_empty() {
        let (r, rest) = LineageRecord::split(stream).ok_or(ObserveError::BadRecord("lineage"))?;
        all.push(Lineage { tgid: r.tgid, tid: r.tid, ppid: r.ppid, start_ns: r.start_time, exited: r.exit_state != 0 });
        stream = rest;
    }
    Ok(all)
}

fn foreign_namespaces(bits: u32) -> Vec<&'static str> {
    (0..).zip(NAMESPACES).filter(|(n, _)| bits & 1 << n != 0).map(|(_, name)| name).collect()
}

fn process_state(
    leader: &ThreadRecord,
    process: &ProcessRecord,
    ids: &mut SharedIds,
    layouts: &Layouts,
) -> ProcessState {
    let sigactions = process.actions.iter().zip(1..).filter(|(a, _)| a.handler != libc::SIG_DFL as u64);
    let [
        start_code,
        end_code,
        start_data,
        end_data,
        start_brk,
        brk,
        start_stack,
        arg_start,
        arg_end,
        env_start,
        env_end,
    ] = process.layout;
    let layout = MmLayout {
        start_code,
        end_code,
        start_data,
        end_data,
        start_brk,
        brk,
        start_stack,
        arg_start,
        arg_end,
        env_start,
        env_end,
    };
    let exit_status =
        if process.signal_flags & SIGNAL_GROUP_EXIT != 0 { process.group_exit_code } else { process.exit_code };
    ProcessState {
        tgid: leader.tgid,
        ppid: process.ppid,
        pgid: process.pgid,
        sid: process.sid,
        threads: Vec::new(),
        foreign_namespaces: foreign_namespaces(process.foreign),
        exited: (leader.exit_state != 0).then_some(exit_status),
        // The kernel keeps the signal for wait(2) there.
        stop_told: process.group_exit_code == 0,
        sigactions: sigactions.map(|(action, signal)| sigaction(signal, action)).collect(),
        itimer_real: itimer_real(process, leader.monotonic_ns),
        pending: process.shared_pending != 0,
        posix_timers: process.posix_timers != 0,
        cpu_itimers: process.cpu_timers != 0,
        rlimits: process.limits.iter().map(|&[soft, hard]| (soft, hard)).collect(),
        layout: (leader.mm != 0).then_some(layout),
        dumpable: (process.mm_flags & 3) as u32,
        coredump_filter: (process.mm_flags >> 2 & 0x1ff) as u32,
        unusual_memory: process.mm_flags & flags::MMF_UNUSUAL != 0 || process.membarrier != 0,
        umask: process.umask,
        child_subreaper: process.child_subreaper != 0,
        personality: process.personality,
        oom_score_adj: process.oom_score_adj,
        loginuid: (leader.initial_ids != 0 && layouts.tasks.loginuid != ABSENT).then_some(process.loginuid),
        auxv: if leader.mm != 0 { auxv(&process.auxv) } else { None },
        exe: shared(&mut ids.exe, process.exe_file),
        root: ids.directory(process.root),
        cwd: ids.directory(process.pwd),
    }
}

/// Pairs of words up to AT_NULL.
fn auxv(words: &[u64]) -> Option<Vec<u8>> {
    let end = words.chunks_exact(2).position(|pair| pair[0] == 0)?;
    Some(words[..2 * end + 2].iter().flat_map(|w| w.to_ne_bytes()).collect())
}

/// Number of an object; `None` if there is none.
fn shared(ids: &mut Ids, address: u64) -> Option<SharedId> {
    (address != 0).then(|| SharedId(ids.of(address)))
}

fn sigaction(signal: i32, action: &Action) -> SigAction {
    let Action { handler, flags, restorer, mask } = *action;
    SigAction { signal, handler, flags: flags & !SA_IMMUTABLE, restorer, mask }
}

fn itimer_real(process: &ProcessRecord, now: u64) -> Option<ITimer> {
    let value_us = match process.real_state {
        u32::MAX => return None,
        0 => 0,
        // A timer that is just firing is armed all the same, as for getitimer(2).
        _ => (process.real_expires_ns.saturating_sub(now) / 1000).max(1),
    };
    Some(ITimer { value_us, interval_us: process.real_interval_ns / 1000 })
}

fn thread(record: &ThreadRecord, ids: &mut SharedIds, layouts: &Layouts, affinity: Affinity<'_>) -> ThreadState {
    let restart = restart::block(record, &layouts.restart);
    let tasks = &layouts.tasks;
    let creds = creds(record, &layouts.cred);
    let complete = record.initial_ids != 0 && record.ngroups as usize <= GROUPS;
    let rseq = Rseq { address: record.rseq, size: record.rseq_len, signature: record.rseq_sig };
    ThreadState {
        tgid: record.tgid,
        tid: record.tid,
        comm: record.comm.split(|&b| b == 0).next().unwrap_or_default().into(),
        altstack: AltStack { sp: record.sas_ss_sp, flags: altstack_flags(record), size: record.sas_ss_size },
        clear_child_tid: record.clear_child_tid,
        robust_list: (record.robust_list, layouts.robust_list_len),
        rseq: (![tasks.rseq, tasks.rseq_len, tasks.rseq_sig].contains(&ABSENT)).then_some(rseq),
        pdeath_signal: record.pdeath_signal,
        exit_signal: record.exit_signal,
        blocked: (tasks.restore_sigmask != ABSENT).then_some(record.blocked),
        pending: record.pending != 0,
        securebits: creds.securebits,
        creds: complete.then_some(creds),
        sched: sched(record, tasks, affinity),
        timerslack_ns: record.timer_slack_ns,
        flags: record.flags & attributes::FLAGS,
        speculation: flags::speculation(record.atomic_flags),
        tsc_faults: record.thread_flags & flags::TIF_NOTSC != 0,
        memory_policy: record.mempolicy != 0,
        seccomp: (tasks.seccomp_mode != ABSENT).then_some(record.seccomp),
        remaining_ns: restart::remaining(&restart, record),
        restart,
        mm: shared(&mut ids.mm, record.mm),
        files: shared(&mut ids.files, record.files),
        fs: shared(&mut ids.fs, record.fs),
        sighand: shared(&mut ids.sighand, record.sighand),
    }
}

fn creds(record: &ThreadRecord, at: &CredLayout) -> Creds {
    /// `PFA_NO_NEW_PRIVS` in `atomic_flags`.
    const NO_NEW_PRIVS: u64 = 1;
    let half = |n: u32| u32::from_ne_bytes(record.cred[n as usize..][..4].try_into().expect("four bytes"));
    let word = |n: u32| u64::from_ne_bytes(record.cred[n as usize..][..8].try_into().expect("eight bytes"));
    let [ruid, euid, suid, fsuid, rgid, egid, sgid, fsgid] = at.ids.map(half);
    Creds {
        uids: [ruid, euid, suid, fsuid],
        gids: [rgid, egid, sgid, fsgid],
        groups: record.groups.iter().take(record.ngroups as usize).copied().collect(),
        caps: at.caps.map(word),
        securebits: half(at.securebits),
        no_new_privs: record.atomic_flags & NO_NEW_PRIVS != 0,
    }
}

/// What sched_getattr(2), sched_getaffinity(2) and ioprio_get(2) give.
fn sched(record: &ThreadRecord, tasks: &TaskLayout, affinity: Affinity<'_>) -> Option<Sched> {
    const SCHED_DEADLINE: u32 = 6;
    /// `DEFAULT_PRIO`: the static priority of nice 0.
    const DEFAULT_PRIO: i32 = 120;
    let real_time = matches!(record.policy as i32, libc::SCHED_FIFO | libc::SCHED_RR);
    let ioprio_known = ![tasks.io_context, tasks.ioprio].contains(&ABSENT);
    (ioprio_known && record.policy != SCHED_DEADLINE).then_some(())?;
    Some(Sched {
        policy: record.policy | if record.reset_on_fork != 0 { libc::SCHED_RESET_ON_FORK as u32 } else { 0 },
        nice: if real_time { 0 } else { record.static_prio - DEFAULT_PRIO },
        priority: if real_time { record.rt_priority } else { 0 },
        affinity: affinity(record.tid, &record.cpus)?,
        ioprio: record.ioprio,
    })
}

/// What sigaltstack(2) shows outside a handler: SS_DISABLE if there is no stack.
fn altstack_flags(record: &ThreadRecord) -> i32 {
    if record.sas_ss_size == 0 { libc::SS_DISABLE } else { record.sas_ss_flags as i32 & !libc::SS_ONSTACK }
}

/// The mappings of a stream of `iter/task_vma`, by process and address, and the processes of which the names or the
/// files could not be told.
pub(super) fn vmas(mut stream: &[u8]) -> Result<(Vec<VmaEntry>, Vec<i32>)> {
    let mut all = Vec::new();
    let mut unclear = Vec::new();
    while !stream.is_empty() {
        let record = VmaRecord::split(stream).and_then(|(r, rest)| Some((r, text(rest, r.name_len)?)));
        let (record, (name, rest)) = record.ok_or(ObserveError::BadRecord("task_vma"))?;
        stream = rest;
        match vma_name(&record, name) {
            Some(name) => all.push(vma(&record, name)),
            None if unclear.last() == Some(&record.tgid) => {}
            None => unclear.push(record.tgid),
        }
    }
    all.retain(|v| !unclear.contains(&v.tgid));
    Ok((all, unclear))
}

/// Shared mappings of a file system, in a stream of `iter/task_vma`; their address spaces are left to the caller.
pub(super) fn shared_mappings(mut stream: &[u8], dev: u64) -> Result<Vec<SharedMapping>> {
    let mut all = Vec::new();
    let mut files = Ids::default();
    while !stream.is_empty() {
        let record = VmaRecord::split(stream).and_then(|(r, rest)| Some((r, text(rest, r.name_len)?)));
        let (record, (_, rest)) = record.ok_or(ObserveError::BadRecord("task_vma"))?;
        stream = rest;
        if record.file != 0 && device(record.dev) == dev {
            all.push(SharedMapping {
                pid: record.tgid,
                start: record.start,
                end: record.end,
                offset: record.pgoff << 12,
                ino: record.ino,
                file: files.of(record.file),
                file_users: record.file_users,
                dentry_users: record.dentry_users,
            });
        }
    }
    Ok(all)
}

/// The name as `/proc/pid/maps` has it; `None` if only procfs knows.
fn vma_name(record: &VmaRecord, name: &[u8]) -> Option<PathBuf> {
    if record.name_len < 0 {
        return None;
    }
    let named = |kind: &str| path(&[kind.as_bytes(), name, b"]"].concat()).into();
    match record.kind {
        vma_name::NONE => Some(PathBuf::new()),
        vma_name::PATH => Some(path(name).into()),
        vma_name::SPECIAL if record.name_fn.starts_with(b"special_mapping_name\0") => Some(path(name).into()),
        vma_name::HEAP => Some("[heap]".into()),
        vma_name::STACK => Some("[stack]".into()),
        vma_name::ANON => Some(named("[anon:")),
        vma_name::ANON_SHARED => Some(named("[anon_shmem:")),
        _ => None,
    }
}

fn vma(record: &VmaRecord, name: PathBuf) -> VmaEntry {
    // Bits 0 to 3 are VM_READ, VM_WRITE, VM_EXEC and VM_SHARED; smaps takes the `s` in the permissions from VM_MAYSHARE.
    const VM_MAYSHARE: u64 = 0x80;
    /// Memory protection keys (VM_PKEY_BIT*), not an attribute smaps has letters for.
    const VM_PKEY: u64 = 0xf << 32;
    /// Since Linux 6.19; up to then guards came with an anon_vma.
    const VM_MAYBE_GUARD: u64 = 1 << 11;
    VmaEntry {
        tgid: record.tgid,
        start: record.start,
        end: record.end,
        prot: (record.flags & 7) as u8,
        shared: record.flags & VM_MAYSHARE != 0,
        offset: if matches!(record.kind, vma_name::PATH | vma_name::ANON_SHARED) { record.pgoff << 12 } else { 0 },
        dev: device(record.dev),
        ino: record.ino,
        name,
        flags: record.flags as u32 & !super::VMA_LEFT_OUT,
        unusual: record.flags & !VM_PKEY & !u64::from(u32::MAX) != 0,
        key: (record.flags >> 32 & 0xf) as u8,
        policy: record.policy != 0,
        untouched: record.anon_vma == 0 && record.flags & VM_MAYBE_GUARD == 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_streams_are_errors() {
        let mut stream = vec![0; size_of::<FileRecord>()];
        assert_eq!(file_order(&stream).unwrap().len(), 1);
        stream.push(0);
        assert!(file_order(&stream).is_err());
        // A path that is longer than what follows.
        let at = std::mem::offset_of!(FileRecord, path_len);
        stream[at..at + 4].copy_from_slice(&2i32.to_ne_bytes());
        assert!(file_order(&stream).is_err());
        assert!(vmas(&stream[..10]).is_err());
    }

    #[test]
    fn devices_in_both_encodings() {
        assert_eq!(device(254 << 20 | 3), libc::makedev(254, 3));
        assert_eq!(device(u32::MAX), libc::makedev(0xfff, 0xf_ffff));
    }
}
