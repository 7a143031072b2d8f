//! Who belongs to a tree: from procfs, or from the iterator over all tasks, which takes one pass for everybody.

use crate::{
    kernel::proc,
    observe::{Iterators, Lineage},
};
use std::{
    collections::{HashMap, HashSet},
    io,
};
use tracing::warn;

/// Tasks of the machine for each task of the tree up to which one pass over all of them is quicker than procfs.
const WORTH_A_PASS: usize = 20;

/// Where to look for the members of a tree.
pub(crate) struct Family<'a> {
    iterators: Option<&'a mut Iterators>,
    /// What the last pass showed.
    snapshot: Option<Snapshot>,
}

/// Threads and children of every process, in the order in which they began.
#[derive(Default)]
struct Snapshot {
    threads: HashMap<i32, Vec<i32>>,
    children: HashMap<i32, Vec<i32>>,
}

impl Snapshot {
    fn new(mut tasks: Vec<Lineage>) -> Self {
        let mut all = Self::default();
        // A task whose end was noticed in the middle of the pass has no numbers any more; it can be parent and child of
        // other such ones.
        tasks.retain(|t| t.tgid != 0 && t.tid != 0);
        // The leader leads also when its number is not the smallest.
        tasks.sort_unstable_by_key(|t| (t.tid != t.tgid, t.start_ns, t.tid));
        for task in tasks {
            all.threads.entry(task.tgid).or_default().push(task.tid);
            if task.tid == task.tgid {
                all.children.entry(task.ppid).or_default().push(task.tgid);
            }
        }
        all
    }

    /// The processes of a tree, parents before children.
    fn tree(&self, root: i32) -> Vec<i32> {
        descendants(root, |pid| self.children.get(&pid).cloned().unwrap_or_default())
    }
}

impl<'a> Family<'a> {
    /// Looks into procfs.
    pub(crate) fn procfs() -> Self {
        Self { iterators: None, snapshot: None }
    }

    /// Uses the iterator where the tree `root` is not a small part of the machine. Also gives its processes while it
    /// runs: a hint.
    pub(crate) fn of(root: i32, iterators: Option<&'a mut Iterators>) -> (Self, Vec<i32>) {
        let mut family = Self { iterators, snapshot: None };
        family.look();
        let Some(snapshot) = &family.snapshot else { return (Self::procfs(), running(root)) };
        let pids = snapshot.tree(root);
        let members: usize = pids.iter().filter_map(|pid| snapshot.threads.get(pid)).map(Vec::len).sum();
        let all: usize = snapshot.threads.values().map(Vec::len).sum();
        if all > WORTH_A_PASS * members {
            family = Self::procfs();
        }
        (family, pids)
    }

    /// Begins a round: what is asked next is true at some moment after now.
    pub(crate) fn look(&mut self) {
        self.snapshot = self.iterators.as_mut().and_then(|iterators| match iterators.lineage() {
            Ok(tasks) => Some(Snapshot::new(tasks)),
            Err(e) => {
                warn!("the iterator over all tasks failed: {e}; reading procfs instead, which takes longer");
                None
            }
        });
    }

    /// Thread ids of a process, the leader first, dead or not; none if the process is gone.
    pub(crate) fn threads(&self, pid: i32) -> io::Result<Vec<i32>> {
        match &self.snapshot {
            Some(snapshot) => Ok(snapshot.threads.get(&pid).cloned().unwrap_or_default()),
            None => match proc::threads(pid) {
                Err(e) if proc::is_gone(&e) => Ok(Vec::new()),
                other => other,
            },
        }
    }

    /// Children of all threads of a process.
    pub(crate) fn children(&self, pid: i32, tids: &[i32]) -> io::Result<Vec<i32>> {
        match &self.snapshot {
            Some(snapshot) => Ok(snapshot.children.get(&pid).cloned().unwrap_or_default()),
            None => proc::children(pid, tids),
        }
    }
}

/// Pids of a tree while it runs, by procfs: a hint.
pub(crate) fn running(root: i32) -> Vec<i32> {
    descendants(root, |pid| {
        let tids = proc::threads(pid).unwrap_or_default();
        proc::children(pid, &tids).unwrap_or_default()
    })
}

/// A process and its descendants, parents before children, each once: what is read while numbers are given up and taken
/// again need not be a tree.
fn descendants(root: i32, children: impl Fn(i32) -> Vec<i32>) -> Vec<i32> {
    let mut pids = vec![root];
    let mut seen = HashSet::from([root]);
    let mut next = 0;
    while let Some(&pid) = pids.get(next) {
        next += 1;
        pids.extend(children(pid).into_iter().filter(|&child| seen.insert(child)));
    }
    pids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_and_children_in_the_order_of_their_beginning() {
        let task = |tgid, tid, ppid, start_ns| Lineage { tgid, tid, ppid, start_ns, exited: false };
        // The process numbers began anew after 70: 5 is younger than 60.
        let tasks = vec![
            task(5, 5, 50, 40),
            task(50, 7, 1, 30),
            task(50, 50, 1, 10),
            task(50, 52, 1, 20),
            task(60, 60, 50, 35),
            task(6, 6, 60, 50),
            task(9, 9, 2, 1),
        ];
        let snapshot = Snapshot::new(tasks);
        assert_eq!(snapshot.threads[&50], [50, 52, 7]);
        assert_eq!(snapshot.children[&50], [60, 5]);
        assert_eq!(snapshot.tree(50), [50, 60, 5, 6]);
        assert_eq!(snapshot.tree(77), [77]);
    }

    #[test]
    fn what_ends_meanwhile_makes_no_circle() {
        let task = |tgid, ppid| Lineage { tgid, tid: tgid, ppid, start_ns: 0, exited: true };
        // Two that have lost their numbers, and numbers that were taken again while the pass went on.
        let snapshot = Snapshot::new(vec![task(50, 60), task(0, 50), task(0, 0), task(60, 50), task(61, 60)]);
        assert_eq!(snapshot.tree(50), [50, 60, 61]);
        assert!(!snapshot.threads.contains_key(&0));
    }

    #[test]
    fn both_ways_show_the_same_of_this_process() {
        let pid = std::process::id() as i32;
        let sleeper = || std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let mut children = [sleeper(), sleeper()];
        let mut iterators = Iterators::load().ok();
        let known = iterators.is_some();
        let (mut family, hint) = Family::of(pid, iterators.as_mut());
        assert!(hint.contains(&(children[1].id() as i32)));
        // Other tests start threads and processes meanwhile.
        let same = |family: &mut Family<'_>| {
            family.look();
            let tids = proc::threads(pid).unwrap();
            let threads = family.threads(pid).unwrap() == tids;
            threads && family.children(pid, &tids).unwrap() == proc::children(pid, &tids).unwrap()
        };
        assert!(!known || (0..1000).any(|_| same(&mut family)));
        assert!(family.threads(5_000_000).unwrap().is_empty());
        for child in &mut children {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}
