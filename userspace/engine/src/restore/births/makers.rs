//! Who makes each process by clone(2).
//!
//! Memory (CLONE_VM) and signal actions (CLONE_SIGHAND) that processes share can be had only from who has them, at birth,
//! and never be given up. So a process is made by its parent if that has the same, or else by a sibling (CLONE_PARENT).

use crate::error::{Error, Result};
use standstill_images::types::{SharedActions, Task};
use std::collections::{BTreeMap, HashMap};

/// Who makes a process, and with which of CLONE_VM, CLONE_SIGHAND and CLONE_PARENT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Maker {
    pub pid: i32,
    pub flags: i32,
}

const MEMORY: i32 = libc::CLONE_VM;
const ALL: i32 = libc::CLONE_VM | libc::CLONE_SIGHAND;

/// Finds the maker of each process but the root; the parents of all are in the tree.
pub(super) fn makers(
    tasks: &BTreeMap<i32, Task>,
    shared_actions: &[SharedActions],
    root: i32,
) -> Result<HashMap<i32, Maker>> {
    let spaces = tasks.values().filter_map(|t| Some((t.pid, t.live.as_ref()?.address_space as usize)));
    let memory = Groups::new(spaces);
    let actions = Groups::new(shared_actions.iter().enumerate().flat_map(|(n, s)| s.pids.iter().map(move |&p| (p, n))));
    let mut siblings: HashMap<i32, Vec<i32>> = HashMap::new();
    tasks.values().filter(|t| t.pid != root).for_each(|t| siblings.entry(t.ppid).or_default().push(t.pid));
    let maker = |task: &Task| {
        let (pid, parent) = (task.pid, task.ppid);
        let elder =
            |groups: &Groups| siblings[&parent].iter().copied().find(|&s| s < pid && groups.are_together(s, pid));
        let by_elder = |pid, flags| Maker { pid, flags: flags | libc::CLONE_PARENT };
        match memory.are_together(parent, pid) {
            true if actions.are_together(parent, pid) => Maker { pid: parent, flags: ALL },
            true => elder(&actions).map_or(Maker { pid: parent, flags: MEMORY }, |elder| by_elder(elder, ALL)),
            false => match (elder(&actions), elder(&memory)) {
                (Some(elder), _) => by_elder(elder, ALL),
                (None, Some(elder)) => by_elder(elder, MEMORY),
                (None, None) => Maker { pid: parent, flags: 0 },
            },
        }
    };
    let makers: HashMap<i32, Maker> = tasks.values().filter(|t| t.pid != root).map(|t| (t.pid, maker(t))).collect();
    for (groups, flag, what) in [
        (&memory, libc::CLONE_VM, "memory (CLONE_VM)"),
        (&actions, libc::CLONE_SIGHAND, "signal actions (CLONE_SIGHAND)"),
    ] {
        for pids in groups.members.values() {
            let mut alone = pids.iter().filter(|pid| makers.get(pid).is_none_or(|maker| maker.flags & flag == 0));
            if let (Some(first), Some(pid)) = (alone.next(), alone.next()) {
                let object = format!(
                    "{what} that it shares with process {first}, but neither with its parent nor with a child of it,"
                );
                return Err(Error::unsupported(*pid, object, "end one of them"));
            }
        }
    }
    for (pid, maker) in makers.iter().filter(|(_, maker)| maker.flags & libc::CLONE_PARENT != 0) {
        if tasks[pid].exit_signal != tasks[&maker.pid].exit_signal {
            let object = format!(
                "memory (CLONE_VM) that it shares with its sibling {}, which has another exit signal,",
                maker.pid
            );
            return Err(Error::unsupported(*pid, object, "end one of them"));
        }
    }
    Ok(makers)
}

/// Processes that have something in common: groups of at least two.
struct Groups {
    of: HashMap<i32, usize>,
    members: BTreeMap<usize, Vec<i32>>,
}

impl Groups {
    fn new(processes: impl Iterator<Item = (i32, usize)>) -> Self {
        let mut members: BTreeMap<usize, Vec<i32>> = BTreeMap::new();
        processes.for_each(|(pid, group)| members.entry(group).or_default().push(pid));
        members.retain(|_, pids| pids.len() > 1);
        let of = members.iter().flat_map(|(group, pids)| pids.iter().map(|pid| (*pid, *group))).collect();
        Self { of, members }
    }

    fn are_together(&self, a: i32, b: i32) -> bool {
        self.of.get(&a).is_some_and(|group| self.of.get(&b) == Some(group))
    }
}
