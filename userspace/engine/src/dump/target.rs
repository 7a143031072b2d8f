//! The target before the freeze: whether it can be one, and how large it is.

use crate::{
    error::{Context, Error, Result},
    kernel::{proc, sys},
    tree::sharing,
};
use std::collections::HashSet;

/// Refuses what can never be a target.
pub(crate) fn check(pid: i32) -> Result<()> {
    const PF_KTHREAD: u64 = 0x0020_0000;
    if !sys::page_size_is_supported() {
        return Err(Error::Missing { what: "a kernel with pages of 4 KiB".into(), remedy: "use such a kernel".into() });
    }
    if pid <= 0 {
        return Err(Error::Target(format!("{pid} is not a process id")));
    }
    let stat = match proc::stat(pid) {
        Ok(stat) => stat,
        Err(e) if proc::is_gone(&e) => return Err(Error::Target(format!("no such process: {pid}"))),
        Err(e) => return Err(e).context(|| format!("read /proc/{pid}/stat")),
    };
    let leader = proc::status(pid, pid).map(|s| s.tgid).unwrap_or(pid);
    if leader != pid {
        return Err(Error::Target(format!("{pid} is a thread of process {leader}: give that pid")));
    }
    if stat.flags & PF_KTHREAD != 0 {
        return Err(Error::Target(format!("process {pid} is a kernel thread")));
    }
    if stat.state == b'Z' && !stat.is_dead_leader() {
        return Err(Error::Target(format!("process {pid} is dead, only its parent has to notice")));
    }
    let mut ancestor = std::process::id() as i32;
    while ancestor > 0 {
        if ancestor == pid {
            return Err(Error::Target(format!(
                "process {pid} is this standstill process or an ancestor of it, which it cannot freeze: run it from elsewhere"
            )));
        }
        ancestor = proc::stat(ancestor).map_or(0, |s| s.ppid);
    }
    Ok(())
}

/// Memory that processes have in use, in bytes: a hint.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct InUse {
    /// Ordinary memory. Shared memory counts for the process that has most of it.
    pub resident: u64,
    /// Huge pages of hugetlbfs, none of which is copied before the freeze.
    pub huge: u64,
}

impl InUse {
    /// That of some processes.
    pub(crate) fn by(pids: &[i32]) -> Self {
        let (mut anonymous, mut shared, mut huge) = (0, 0, 0);
        // Memory that several have counts once.
        let others: HashSet<i32> = sharing::of_running(pids).into_iter().map(|(other, _)| other).collect();
        for &pid in pids.iter().filter(|pid| !others.contains(pid)) {
            let status = std::fs::read_to_string(proc::path(pid, "status")).unwrap_or_default();
            anonymous += amount(&status, "RssAnon");
            shared = amount(&status, "RssShmem").max(shared);
            huge += amount(&status, "HugetlbPages");
        }
        Self { resident: anonymous + shared, huge }
    }
}

/// Memory that the machine can spare, in bytes.
pub(super) fn available_memory() -> u64 {
    amount(&std::fs::read_to_string("/proc/meminfo").unwrap_or_default(), "MemAvailable")
}

/// An amount of memory in a file of procfs, in bytes.
fn amount(text: &str, name: &str) -> u64 {
    proc::field(text, name).and_then(|v| v.trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) << 10
}
