//! Processes: identity, working directory, and what threads of a process share.

use super::{signals, thread, timers};
use crate::{
    error::{Context, Error, Result},
    kernel::{proc, sys},
    objects::directory,
    observe::ProcessState,
    restore::program::Program,
    task::{FrozenProcess, Remote, Stopped},
};
use standstill_images::types::{
    AddressSpaceId, Bytes, FdTableId, ITimer, LiveTask, SigAction, Task, TaskState, Thread,
};
use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::LazyLock,
};

/// What only the process itself or the observer can tell.
struct Inner {
    brk: u64,
    dumpable: u32,
    child_subreaper: bool,
    sigactions: Vec<SigAction>,
    itimers: [ITimer; 3],
}

/// Reads a frozen process, all but its memory and files; also gives its brk(2). What procfs does not show comes from the
/// observer (`seen`), otherwise from system calls that the process makes for us.
pub(crate) fn collect(
    process: &FrozenProcess,
    seen: Option<&ProcessState>,
    address_space: AddressSpaceId,
    fd_table: FdTableId,
) -> Result<(Task, u64)> {
    let pid = process.pid;
    let stat = proc::stat(pid).context(|| format!("read /proc/{pid}/stat"))?;
    let status = proc::status(pid, pid).context(|| format!("read the status of {pid}"))?;
    refuse_unsupported(pid)?;
    let mut remote = Remote::new(pid);
    let inner = match seen.and_then(observed) {
        Some(inner) => inner,
        None => ask(pid, &status, &mut remote)?,
    };
    let posix_timers = timers::posix_timers(pid, &mut remote)?;
    let mut threads: Vec<Thread> = Vec::with_capacity(process.threads.len());
    for &(tid, _) in &process.threads {
        let of_thread = proc::status(pid, tid).context(|| format!("read the status of thread {tid}"))?;
        if of_thread.seccomp != 0 {
            let object = format!("thread {tid}, which is under seccomp,");
            return Err(Error::unsupported(pid, object, "run the program without seccomp"));
        }
        // Securebits differ between threads only where a thread changed its credentials on its own.
        let same = threads.first().map(|leader| leader.creds.securebits);
        let state = seen.and_then(|p| p.threads.iter().find(|t| t.tid == tid));
        threads.push(thread::collect(pid, tid, &of_thread, state, &mut remote, same)?);
    }
    remote.detach()?;
    let link = |name: &str| -> Result<Bytes> {
        let target = std::fs::read_link(proc::path(pid, name)).context(|| format!("read /proc/{pid}/{name}"))?;
        Ok(target.as_path().into())
    };
    let removed =
        std::fs::metadata(proc::path(pid, "cwd")).is_ok_and(|m| std::os::unix::fs::MetadataExt::nlink(&m) == 0);
    let (cwd, cwd_removed) = directory::path(link("cwd")?, removed);
    let small = |name: &str| std::fs::read_to_string(proc::path(pid, name)).unwrap_or_default();
    let pending = signals::pending(pid, true)?;
    let live = LiveTask {
        threads,
        address_space,
        fd_table,
        cwd,
        cwd_removed,
        root: link("root")?,
        umask: status.umask,
        sigactions: inner.sigactions,
        itimers: inner.itimers,
        posix_timers,
        pending,
        rlimits: proc::limits(pid).context(|| format!("read the limits of {pid}"))?,
        dumpable: inner.dumpable,
        child_subreaper: inner.child_subreaper,
        personality: u32::from_str_radix(small("personality").trim(), 16).unwrap_or(0),
        oom_score_adj: small("oom_score_adj").trim().parse().unwrap_or(0),
        loginuid: small("loginuid").trim().parse().unwrap_or(u32::MAX),
    };
    let stopped = process.threads.iter().find_map(|&(_, how)| match how {
        Stopped::ByJobControl(signal) => Some(signal),
        Stopped::ByUs => None,
    });
    let task = Task {
        pid,
        ppid: stat.ppid,
        pgid: stat.pgid,
        sid: stat.sid,
        state: stopped.map_or(TaskState::Running, TaskState::Stopped),
        exit_signal: stat.exit_signal,
        comm: stat.comm.as_slice().into(),
        live: Some(live),
    };
    Ok((task, inner.brk))
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
fn ask(pid: i32, status: &proc::Status, remote: &mut Remote) -> Result<Inner> {
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
        sigactions: signals::actions(pid, status, remote)?,
        itimers: timers::itimers(pid, remote)?,
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

/// Namespaces that the whole tree must share with this process.
const NAMESPACES: [&str; 10] =
    ["mnt", "net", "ipc", "uts", "user", "pid", "cgroup", "time", "pid_for_children", "time_for_children"];

fn refuse_unsupported(pid: i32) -> Result<()> {
    let ns = |pid: &str, name: &str| std::fs::read_link(format!("/proc/{pid}/ns/{name}")).ok();
    static OWN: LazyLock<[Option<PathBuf>; 10]> = LazyLock::new(|| {
        NAMESPACES.map(|name| {
            let own = name.trim_end_matches("_for_children");
            std::fs::read_link(format!("/proc/self/ns/{own}")).ok()
        })
    });
    for (name, ours) in NAMESPACES.into_iter().zip(&*OWN) {
        let its = ns(&pid.to_string(), name);
        if its.is_some() && ours.is_some() && its != *ours {
            return Err(Error::unsupported(
                pid,
                format!("a process in another {name} namespace"),
                format!("run standstill inside it: nsenter -t {pid} -a"),
            ));
        }
    }
    Ok(())
}

/// Refuses processes that share what only threads may share here.
pub(crate) fn refuse_sharing(processes: &[FrozenProcess]) -> Result<()> {
    use sys::Kcmp::{Files, Fs, Sighand, Vm};
    let parents: HashMap<i32, i32> =
        processes.iter().filter_map(|p| Some((p.pid, proc::stat(p.pid).ok()?.ppid))).collect();
    for (&pid, &parent) in &parents {
        if !parents.contains_key(&parent) {
            continue;
        }
        for (what, name) in [
            (Vm, "memory (CLONE_VM)"),
            (Files, "descriptors (CLONE_FILES)"),
            (Fs, "working directory (CLONE_FS)"),
            (Sighand, "signal handlers (CLONE_SIGHAND)"),
        ] {
            if sys::kcmp(pid, parent, what).context(|| format!("kcmp of {pid} and {parent}"))? {
                return Err(Error::unsupported(
                    pid,
                    format!("a process that shares its {name} with process {parent}"),
                    "wait until a vfork or posix_spawn in progress is over, or use threads",
                ));
            }
        }
    }
    Ok(())
}

/// Sets the login uid, which only the task itself may do, by way of the lowest free descriptor `fd`.
pub(crate) fn restore_loginuid(live: &LiveTask, own: u32, fd: i32, program: &mut Program) {
    if live.loginuid == own {
        return;
    }
    let path = program.string(b"/proc/self/loginuid");
    let args = [libc::AT_FDCWD.into(), path, libc::O_WRONLY.into()];
    program.call_expecting("open loginuid", libc::SYS_openat, &args, fd);
    program.write_full("set the login uid", fd, live.loginuid.to_string().as_bytes());
    program.call("close loginuid", libc::SYS_close, &[fd.into()]);
}

/// What the leader sets for the whole process, before its credentials.
pub(crate) fn restore(live: &LiveTask, own_personality: u32, program: &mut Program) {
    if live.root.as_path() != Path::new("/") {
        let root = program.string(&live.root.0);
        program.call(format!("change the root to {}", live.root.lossy()), libc::SYS_chroot, &[root]);
    }
    program.call("set the umask", libc::SYS_umask, &[live.umask.into()]);
    if live.child_subreaper {
        program.call("become a subreaper", libc::SYS_prctl, &[libc::PR_SET_CHILD_SUBREAPER.into(), 1.into()]);
    }
    if live.personality != own_personality {
        program.call("set the personality", libc::SYS_personality, &[live.personality.into()]);
    }
}

/// Changes to the working directory; before a chroot, whose paths it does not know.
pub(crate) fn restore_cwd(live: &LiveTask, program: &mut Program) {
    directory::around_removal(&live.cwd, live.cwd_removed, program, |program| {
        let cwd = program.string(&live.cwd.0);
        program.call(format!("change to {}", live.cwd.lossy()), libc::SYS_chdir, &[cwd]);
    });
}
