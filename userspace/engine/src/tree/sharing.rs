//! What processes share: memory (CLONE_VM), signal actions (CLONE_SIGHAND), descriptor tables (CLONE_FILES), and working
//! directory, root and umask (CLONE_FS). What threads must share, they do, or are refused.

use crate::{
    error::{Context, Error, Result},
    kernel::sys::{self, Kcmp},
    observe::{ProcessState, ThreadState},
    task::FrozenProcess,
};
use standstill_images::types::{SharedActions, SharedFs};
use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
};

const KINDS: [(Kcmp, &str); 4] = [
    (Kcmp::Vm, "memory (CLONE_VM)"),
    (Kcmp::Files, "descriptors (CLONE_FILES)"),
    (Kcmp::Fs, "working directory (CLONE_FS)"),
    (Kcmp::Sighand, "signal actions (CLONE_SIGHAND)"),
];

/// Who shares what: for each process of a tree the first one that has the same, by its place among the frozen processes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Sharing {
    pub memory: Vec<usize>,
    pub files: Vec<usize>,
    pub fs: Vec<usize>,
    pub actions: Vec<usize>,
}

impl Sharing {
    /// Compares all tasks of a tree, by what the observer saw or else by kcmp(2).
    ///
    /// # Errors
    /// Refuses threads that have something of their own.
    pub(crate) fn of(processes: &[FrozenProcess], seen: &HashMap<i32, ProcessState>) -> Result<Self> {
        let all: Option<Vec<&ProcessState>> = processes.iter().map(|p| seen.get(&p.pid)).collect();
        match all.filter(|all| all.iter().all(|p| p.threads.first().is_some_and(|leader| leader.files.is_some()))) {
            Some(all) => Self::seen(&all),
            None => Self::compared(processes),
        }
    }

    fn seen(processes: &[&ProcessState]) -> Result<Self> {
        let shared = |t: &ThreadState| [t.mm, t.files, t.fs, t.sighand];
        let mut found = Vec::new();
        for (n, (_, name)) in KINDS.into_iter().enumerate() {
            let of = |p: &&ProcessState| Some(shared(p.threads.first()?)[n]);
            found.push(first_with_the_same(&processes.iter().map(of).collect::<Vec<_>>()));
            for process in processes {
                let Some((leader, others)) = process.threads.split_first() else { continue };
                // A thread that ends has none left.
                let differs = |t: &&ThreadState| shared(t)[n].is_some_and(|its| Some(its) != shared(leader)[n]);
                if let Some(own) = others.iter().find(differs) {
                    return Err(not_sharing(process.tgid, name, own.tid));
                }
            }
        }
        Ok(Self::new(found))
    }

    fn compared(processes: &[FrozenProcess]) -> Result<Self> {
        let pids: Vec<i32> = processes.iter().map(|p| p.pid).collect();
        let found = KINDS.map(|(what, _)| by_order(&pids, what)).into_iter().collect::<Result<_>>()?;
        for process in processes {
            for &(tid, _) in process.threads.iter().skip(1) {
                // The threads of a process have its memory and signal handlers.
                for (what, name) in &KINDS[1..3] {
                    if compare(process.pid, tid, *what)?.is_ne() {
                        return Err(not_sharing(process.pid, name, tid));
                    }
                }
            }
        }
        Ok(Self::new(found))
    }

    /// `found`: for each kind, the first process that has the same.
    fn new(found: Vec<Vec<usize>>) -> Self {
        let [memory, files, fs, actions] = found.try_into().expect("one list for each kind");
        Self { memory, files, fs, actions }
    }

    /// The processes that have the same memory as the first of them, for each such group.
    pub(crate) fn of_one_memory<'a>(&self, processes: &'a [FrozenProcess]) -> Vec<Vec<&'a FrozenProcess>> {
        groups(processes, &self.memory)
    }

    /// The records for working directories that several processes have.
    pub(crate) fn shared_fs(&self, processes: &[FrozenProcess]) -> Vec<SharedFs> {
        groups(processes, &self.fs).iter().map(|group| SharedFs { pids: ids(group) }).collect()
    }

    /// The records for signal actions that several processes have.
    pub(crate) fn shared_actions(&self, processes: &[FrozenProcess]) -> Vec<SharedActions> {
        groups(processes, &self.actions).iter().map(|group| SharedActions { pids: ids(group) }).collect()
    }
}

fn ids(processes: &[&FrozenProcess]) -> Vec<i32> {
    processes.iter().map(|p| p.id()).collect()
}

/// Groups of at least two. `firsts`: for each process the first one that has the same.
fn groups<'a>(processes: &'a [FrozenProcess], firsts: &[usize]) -> Vec<Vec<&'a FrozenProcess>> {
    let mut groups: BTreeMap<usize, Vec<&FrozenProcess>> = BTreeMap::new();
    processes.iter().zip(firsts).for_each(|(process, first)| groups.entry(*first).or_default().push(process));
    groups.into_values().filter(|group| group.len() > 1).collect()
}

fn first_with_the_same<T: Eq + Hash>(values: &[T]) -> Vec<usize> {
    let mut firsts = HashMap::new();
    values.iter().enumerate().map(|(n, value)| *firsts.entry(value).or_insert(n)).collect()
}

/// Running processes with the first of them that has the same memory, where that is another. Who ends meanwhile has none.
pub(crate) fn of_running(pids: &[i32]) -> Vec<(i32, i32)> {
    let mut pids = pids.to_vec();
    loop {
        match by_order(&pids, Kcmp::Vm) {
            Ok(firsts) => {
                let others = firsts.into_iter().enumerate().filter(|(n, first)| n != first);
                return others.map(|(n, first)| (pids[n], pids[first])).collect();
            }
            Err(_) => {
                let before = pids.len();
                pids.retain(|pid| compare(*pid, *pid, Kcmp::Vm).is_ok());
                if pids.len() == before {
                    return Vec::new();
                }
            }
        }
    }
}

/// The kernel orders what tasks have, so each is looked up among the earlier ones by bisection.
fn by_order(pids: &[i32], what: Kcmp) -> Result<Vec<usize>> {
    let mut known: Vec<usize> = Vec::new();
    let mut firsts = Vec::with_capacity(pids.len());
    for (n, &pid) in pids.iter().enumerate() {
        let mut failed = None;
        let found = known.binary_search_by(|&other| {
            compare(pids[other], pid, what).unwrap_or_else(|e| {
                failed.get_or_insert(e);
                std::cmp::Ordering::Equal
            })
        });
        if let Some(e) = failed {
            return Err(e);
        }
        firsts.push(found.map_or(n, |at| known[at]));
        if let Err(at) = found {
            known.insert(at, n);
        }
    }
    Ok(firsts)
}

fn compare(a: i32, b: i32, what: Kcmp) -> Result<std::cmp::Ordering> {
    sys::kcmp(a, b, what).context(|| format!("kcmp of {a} and {b}"))
}

fn not_sharing(pid: i32, what: &str, tid: i32) -> Error {
    Error::unsupported(
        pid,
        format!("thread {tid}, which does not share the {what} of its process,"),
        "run what needs its own in a process of its own",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    /// A process that shares with its maker what `flags` say.
    struct Child(i32);

    impl Child {
        fn new(flags: i32) -> Self {
            // SAFETY: without CLONE_VM this is a fork; the child only waits for its end.
            let pid = unsafe {
                let pid = libc::syscall(libc::SYS_clone, flags | libc::SIGCHLD, 0, 0, 0, 0);
                if pid == 0 {
                    loop {
                        libc::pause();
                    }
                }
                pid
            };
            assert!(pid > 0, "clone");
            Self(pid as i32)
        }
    }

    impl Drop for Child {
        fn drop(&mut self) {
            let pid = nix::unistd::Pid::from_raw(self.0);
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
            nix::sys::wait::waitpid(pid, None).unwrap();
        }
    }

    #[test]
    fn kcmp_finds_siblings_that_share() {
        let (files, fs) = (libc::CLONE_FILES, libc::CLONE_FS);
        let children = [0, files, fs, files | fs, 0].map(Child::new);
        let pids: Vec<i32> = std::iter::once(std::process::id() as i32).chain(children.iter().map(|c| c.0)).collect();
        assert_eq!(by_order(&pids, Kcmp::Files).unwrap(), [0, 1, 0, 3, 0, 5]);
        assert_eq!(by_order(&pids, Kcmp::Fs).unwrap(), [0, 1, 2, 0, 0, 5]);
        assert_eq!(by_order(&pids, Kcmp::Vm).unwrap(), [0, 1, 2, 3, 4, 5]);
        // Without the one who made them.
        assert_eq!(by_order(&pids[1..], Kcmp::Files).unwrap(), [0, 1, 2, 1, 4]);
    }
}
