//! Processes: identity, working directory, and what threads of a process share.

use super::{attributes, clocks::Moment, namespaces, seccomp, signals, thread, timers};
use crate::{
    error::{Context, Error, Result},
    kernel::proc,
    objects::directory,
    observe::{ProcessState, SharedId, VmaEntry},
    restore::program::Program,
    task::{FrozenProcess, Remote, Stopped},
};
use standstill_images::types::{
    AddressSpaceId, Attributes, Bytes, FdTableId, ITimer, LiveTask, SigAction, Task, TaskState, Thread,
};
use std::{collections::HashMap, os::unix::fs::MetadataExt, path::Path};

/// What was read for one process and is the same for others with the same number of the observer's.
#[derive(Default)]
pub(crate) struct Known {
    cwd: HashMap<SharedId, (Bytes, bool)>,
    root: HashMap<SharedId, Bytes>,
    /// Filters, and who is under which.
    pub seccomp: seccomp::Collected,
    /// Unusual attributes of those that have any.
    pub attributes: Vec<Attributes>,
    pub namespaces: namespaces::Collected,
}

/// What only the process itself or the observer can tell.
struct Inner {
    brk: u64,
    dumpable: u32,
    child_subreaper: bool,
    sigactions: Vec<SigAction>,
    itimers: [ITimer; 3],
}

/// What procfs or the observer tells.
struct Outer {
    ppid: i32,
    pgid: i32,
    sid: i32,
    exit_signal: i32,
    comm: Bytes,
    umask: u32,
    rlimits: Vec<(u64, u64)>,
    personality: u32,
    oom_score_adj: i32,
    loginuid: u32,
    /// If it is stopped: its parent knows.
    told: bool,
}

/// Reads a frozen process, all but its memory and files; also gives its brk(2). What the observer saw (`seen`) is
/// believed; the rest comes from procfs, ptrace and system calls that the process makes for us. `moment`: for which timers
/// are recorded.
pub(crate) fn collect(
    process: &FrozenProcess,
    seen: Option<&ProcessState>,
    known: &mut Known,
    address_space: AddressSpaceId,
    fd_table: FdTableId,
    mappings: &[VmaEntry],
    moment: Moment,
) -> Result<(Task, u64)> {
    let (pid, id) = (process.pid, process.id());
    known.namespaces.process(pid, seen)?;
    let mut remote = Remote::new(pid);
    let inner = match seen.and_then(observed) {
        Some(inner) => inner,
        None => ask(pid, &mut remote, moment)?,
    };
    let outer = outer(process, seen)?;
    let mut posix_timers = Vec::new();
    if seen.is_none_or(|p| p.posix_timers) {
        posix_timers = timers::posix_timers(pid, &mut remote, moment)?;
    }
    // Timers go on: what the observer did not see pending can be by now, after the time left was asked.
    let timed = seen.is_none_or(|p| p.posix_timers || p.cpu_itimers);
    let mut pending = Vec::new();
    if timed || seen.is_some_and(|p| p.pending) {
        pending = signals::pending(pid, true)?;
    }
    let policies: Vec<_> = mappings.iter().filter(|m| m.policy).map(|m| (m.start, m.end)).collect();
    let mut attributes = attributes::collect(process, seen, &policies, &mut remote)?;
    let mut threads: Vec<Thread> = Vec::with_capacity(process.threads.len());
    for &(tid, _) in &process.threads {
        // Securebits differ between threads only where a thread changed its credentials on its own.
        let same = threads.first().map(|leader| leader.creds.securebits);
        let (thread, unusual) =
            thread::collect(pid, tid, seen.and_then(|p| p.thread(tid)), &mut remote, same, timed, &mut known.seccomp)?;
        threads.push(thread);
        attributes.threads.push(unusual);
    }
    remote.detach()?;
    known.attributes.extend(attributes::into_record(attributes));
    if process.dead_leader.is_some() {
        threads.insert(0, thread::collect_dead(id, &threads[0])?);
    }
    let (cwd, cwd_removed) = match seen.and_then(|p| known.cwd.get(&p.cwd?)) {
        Some(cwd) => cwd.clone(),
        None => cwd(pid)?,
    };
    let root = match seen.and_then(|p| known.root.get(&p.root?)) {
        Some(root) => root.clone(),
        None => link(pid, "root")?,
    };
    if let Some(ProcessState { cwd: Some(cwd_id), root: Some(root_id), .. }) = seen {
        known.cwd.entry(*cwd_id).or_insert_with(|| (cwd.clone(), cwd_removed));
        known.root.entry(*root_id).or_insert_with(|| root.clone());
    }
    let live = LiveTask {
        threads,
        address_space,
        fd_table,
        cwd,
        cwd_removed,
        root,
        umask: outer.umask,
        sigactions: inner.sigactions,
        itimers: inner.itimers,
        posix_timers,
        pending,
        rlimits: outer.rlimits,
        dumpable: inner.dumpable,
        child_subreaper: inner.child_subreaper,
        personality: outer.personality,
        oom_score_adj: outer.oom_score_adj,
        loginuid: outer.loginuid,
    };
    let stopped = process.threads.iter().find_map(|&(_, how)| match how {
        Stopped::ByJobControl(signal) => Some(signal),
        Stopped::ByUs => None,
    });
    if let (Some(_), Some(leader)) = (stopped, process.dead_leader) {
        // Its status is not to be seen then, and it could not exit in a process that is stopped again.
        let object = "a stopped process whose first thread has exited";
        return Err(Error::unsupported(leader, object, "let it go on (SIGCONT) before the dump"));
    }
    let state = match stopped {
        None => TaskState::Running,
        Some(signal) if outer.told => TaskState::StoppedAndTold(signal),
        Some(signal) => TaskState::Stopped(signal),
    };
    let task = Task {
        pid: id,
        ppid: outer.ppid,
        pgid: outer.pgid,
        sid: outer.sid,
        state,
        exit_signal: outer.exit_signal,
        comm: outer.comm,
        live: Some(live),
    };
    Ok((task, inner.brk))
}

fn link(pid: i32, name: &str) -> Result<Bytes> {
    let target = std::fs::read_link(proc::path(pid, name)).context(|| format!("read /proc/{pid}/{name}"))?;
    Ok(target.as_path().into())
}

/// The working directory, and whether it was removed.
fn cwd(pid: i32) -> Result<(Bytes, bool)> {
    let (nlink, ino) = std::fs::metadata(proc::path(pid, "cwd")).map_or((1, 0), |m| (m.nlink(), m.ino()));
    let shown = link(pid, "cwd")?;
    let object = || format!("working directory {}", shown.lossy());
    directory::record(shown.clone(), nlink, ino).ok_or_else(|| Error::unsupported(pid, object(), directory::REMEDY))
}

fn outer(process: &FrozenProcess, seen: Option<&ProcessState>) -> Result<Outer> {
    let (pid, id) = (process.pid, process.id());
    let small = |name: &str| std::fs::read_to_string(proc::path(pid, name)).unwrap_or_default();
    let loginuid = || small("loginuid").trim().parse().unwrap_or(u32::MAX);
    if let Some(seen) = seen
        && let Some(leader) = seen.thread(pid)
    {
        return Ok(Outer {
            ppid: seen.ppid,
            pgid: seen.pgid,
            sid: seen.sid,
            exit_signal: leader.exit_signal,
            comm: leader.comm.clone(),
            umask: seen.umask,
            rlimits: seen.rlimits.clone(),
            personality: seen.personality,
            oom_score_adj: seen.oom_score_adj,
            loginuid: seen.loginuid.unwrap_or_else(loginuid),
            told: seen.stop_told,
        });
    }
    let stat = proc::stat(id).context(|| format!("read /proc/{id}/stat"))?;
    Ok(Outer {
        ppid: stat.ppid,
        pgid: stat.pgid,
        sid: stat.sid,
        exit_signal: stat.exit_signal,
        comm: stat.comm.as_slice().into(),
        umask: proc::status(pid, pid).context(|| format!("read the status of {pid}"))?.umask,
        rlimits: proc::limits(pid).context(|| format!("read the limits of {pid}"))?,
        personality: u32::from_str_radix(small("personality").trim(), 16).unwrap_or(0),
        oom_score_adj: small("oom_score_adj").trim().parse().unwrap_or(0),
        loginuid: loginuid(),
        // The signal that stopped it is there until somebody has waited for it.
        told: stat.exit_code == 0,
    })
}

/// What the observer saw; `None` if that is not all.
fn observed(seen: &ProcessState) -> Option<Inner> {
    let itimers = match (seen.itimer_real, seen.cpu_itimers) {
        (Some(real), false) => [real, ITimer::default(), ITimer::default()],
        _ => return None,
    };
    Some(Inner {
        brk: seen.layout?.brk,
        dumpable: seen.dumpable,
        child_subreaper: seen.child_subreaper,
        sigactions: seen.sigactions.clone(),
        itimers,
    })
}

/// Lets the process tell itself.
fn ask(pid: i32, remote: &mut Remote, moment: Moment) -> Result<Inner> {
    let status = proc::status(pid, pid).context(|| format!("read the status of {pid}"))?;
    let scratch = remote.scratch()?;
    let prctl = |remote: &mut Remote, option: i32, arg: u64| {
        remote.syscall(pid, libc::SYS_prctl, [option as u64, arg, 0, 0, 0, 0])
    };
    prctl(remote, libc::PR_GET_CHILD_SUBREAPER, scratch)?;
    let mut subreaper = [0u8; 4];
    remote.read(&mut subreaper)?;
    Ok(Inner {
        brk: remote.syscall(pid, libc::SYS_brk, [0; 6])? as u64,
        dumpable: prctl(remote, libc::PR_GET_DUMPABLE, 0)? as u32,
        child_subreaper: i32::from_ne_bytes(subreaper) != 0,
        sigactions: signals::actions(pid, &status, remote)?,
        itimers: timers::itimers(pid, remote, moment)?,
    })
}

/// A process that is dead and not waited for.
pub(crate) fn collect_zombie(pid: i32) -> Result<Task> {
    let stat = proc::stat(pid).context(|| format!("read /proc/{pid}/stat"))?;
    Ok(Task {
        pid,
        ppid: stat.ppid,
        pgid: stat.pgid,
        sid: stat.sid,
        state: TaskState::Zombie(stat.exit_code),
        exit_signal: stat.exit_signal,
        comm: stat.comm.as_slice().into(),
        live: None,
    })
}

/// Ends the process with a wait status. `pid`: its number, or 0 if it is alone in its process group.
pub(crate) fn end(status: i32, pid: i32, program: &mut Program) {
    let signal = status & 0x7f;
    if signal != 0 {
        let none = program.words(&[0, 0]);
        program.call("no core dump", libc::SYS_prlimit64, &[0.into(), libc::RLIMIT_CORE.into(), none, 0.into()]);
        let mask = program.words(&[0]);
        let args = [libc::SIG_SETMASK.into(), mask, 0.into(), 8.into()];
        program.call("unblock signals", libc::SYS_rt_sigprocmask, &args);
        program.call("die by the signal", libc::SYS_kill, &[pid.into(), signal.into()]);
    }
    program.exit(status >> 8 & 0xff);
}

/// Sets the login uid, which only the task itself may do, by way of the lowest free descriptor `fd`.
pub(crate) fn restore_loginuid(live: &LiveTask, own: u32, fd: i32, program: &mut Program) {
    if live.loginuid == own {
        return;
    }
    write_own("loginuid", &live.loginuid.to_string(), fd, program);
}

/// Writes to a file of its own in procfs, by way of the lowest free descriptor `fd`.
pub(super) fn write_own(file: &str, text: &str, fd: i32, program: &mut Program) {
    let path = program.string(format!("/proc/self/{file}").as_bytes());
    let args = [libc::AT_FDCWD.into(), path, libc::O_WRONLY.into()];
    program.call_expecting(format!("open {file}"), libc::SYS_openat, &args, fd);
    program.write_full(format!("write {text} to {file}"), fd, text.as_bytes());
    program.call(format!("close {file}"), libc::SYS_close, &[fd.into()]);
}

/// Root directory and umask, once nobody opens files any more.
pub(crate) fn restore_fs(live: &LiveTask, program: &mut Program) {
    if live.root.as_path() != Path::new("/") {
        let root = program.string(&live.root.0);
        program.call(format!("change the root to {}", live.root.lossy()), libc::SYS_chroot, &[root]);
    }
    program.call("set the umask", libc::SYS_umask, &[live.umask.into()]);
}

/// What the leader sets for the whole process, before its credentials.
pub(crate) fn restore(live: &LiveTask, own_personality: u32, program: &mut Program) {
    if live.child_subreaper {
        program.call("become a subreaper", libc::SYS_prctl, &[libc::PR_SET_CHILD_SUBREAPER.into(), 1.into()]);
    }
    if live.personality != own_personality {
        program.call("set the personality", libc::SYS_personality, &[live.personality.into()]);
    }
}
