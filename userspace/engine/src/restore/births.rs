//! When each process forks its children.
//!
//! A process is born into the session that its parent is in at that moment, and shares with it (CLONE_FILES, CLONE_FS)
//! what the parent has at that moment. A parent can begin anew, by setsid(2) or unshare(2), but never go back. So the
//! order of these calls and of the forks decides what everybody has.

mod makers;

use crate::error::{Error, Result};
use makers::{Maker, makers};
use standstill_images::types::{SharedActions, SharedFs, Task};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

/// What a process does until its children exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// It forks a child, or a sibling (CLONE_PARENT), that shares what these clone(2) flags say.
    Fork { pid: i32, flags: i32 },
    /// It becomes a session leader.
    Setsid,
    /// It stops sharing: CLONE_FILES or CLONE_FS.
    Unshare(i32),
    /// It forks a process that leads a session whose own leader is dead, and makes children of its parent (CLONE_PARENT)
    /// that are in that session. Their exit signals are the same.
    StandIn { sid: i32, children: Vec<i32> },
}

/// Sessions, or what is shared by one clone(2) flag.
struct Kind {
    /// 0: sessions.
    flag: i32,
    name: &'static str,
    /// What each process belongs to, where that matters.
    of: HashMap<i32, i32>,
    /// The lowest process that all members of a group are made by, or are; a session begins with its leader.
    top: HashMap<i32, i32>,
}

impl Kind {
    fn sessions(tasks: &BTreeMap<i32, Task>) -> Self {
        let of: HashMap<i32, i32> = tasks.values().map(|t| (t.pid, t.sid)).collect();
        let top = of.values().map(|&sid| (sid, sid)).collect();
        Self { flag: 0, name: "session", of, top }
    }

    /// `groups`: pairs of processes and what they have.
    fn shared(
        flag: i32,
        name: &'static str,
        makers: &HashMap<i32, Maker>,
        groups: impl Iterator<Item = (i32, i32)>,
    ) -> Self {
        let mut members: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
        groups.for_each(|(pid, group)| members.entry(group).or_default().push(pid));
        members.retain(|_, pids| pids.len() > 1);
        let mut kind = Self { flag, name, of: HashMap::new(), top: HashMap::new() };
        for (group, pids) in members {
            let mut below: HashMap<i32, usize> = HashMap::new();
            for &pid in &pids {
                kind.of.insert(pid, group);
                let mut next = Some(pid);
                // A hostile image may have circles.
                for _ in 0..=makers.len() {
                    let Some(at) = next else { break };
                    let count = below.entry(at).or_default();
                    *count += 1;
                    if *count == pids.len() {
                        kind.top.entry(group).or_insert(at);
                        break;
                    }
                    next = makers.get(&at).map(|maker| maker.pid);
                }
            }
        }
        kind
    }

    /// Takes from the sessions that children must be born with those whose leader is dead and that the process cannot be in
    /// itself.
    fn stand_ins(&self, pid: i32, is_root: bool, wanted: &mut [(i32, [Option<i32>; 3])]) -> BTreeMap<i32, Vec<i32>> {
        let own = self.of.get(&pid).copied();
        let leads = own == Some(pid);
        let mut born = None;
        let mut orphans: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
        for (child, [session, ..]) in wanted {
            let Some(sid) = session.filter(|&sid| Some(sid) != own) else { continue };
            if leads && !is_root && *born.get_or_insert(sid) == sid {
                continue;
            }
            if !self.of.contains_key(&sid) {
                orphans.entry(sid).or_default().push(*child);
                *session = None;
            }
        }
        orphans
    }

    /// What a process has one after the other, given what its children must be born with; and what it must be born with
    /// itself.
    fn phases(&self, pid: i32, wanted: &[(i32, Option<i32>)]) -> Result<(Vec<Option<i32>>, Option<i32>)> {
        let own = self.of.get(&pid).copied();
        let begins = |group: i32| self.top.get(&group) == Some(&pid);
        let given = own.filter(|&own| !begins(own));
        let mut born = given.map(|group| (pid, group));
        let mut begun = BTreeSet::new();
        for (child, group) in wanted.iter().filter_map(|&(child, group)| Some((child, group?))) {
            if Some(group) == own {
                continue;
            }
            if given.is_none() && begins(group) {
                begun.insert(group);
            } else if born.is_none_or(|(_, other)| other == group) && given.is_none() {
                born = Some((child, group));
            } else {
                return Err(self.impossible(child, group, born));
            }
        }
        let born = born.map(|(_, group)| group);
        let mut phases: Vec<Option<i32>> = born.into_iter().chain(begun).map(Some).collect();
        if self.flag == 0 && phases.is_empty() {
            phases.push(None); // whatever session its parent is in
        }
        if given.is_none() {
            phases.push(own);
        }
        Ok((phases, born))
    }

    fn impossible(&self, pid: i32, group: i32, other: Option<(i32, i32)>) -> Error {
        if self.flag == 0 {
            return Error::Target(format!(
                "process {pid} is in session {group}, which no living ancestor belongs to: end it, or dump the tree from \
                 a common ancestor"
            ));
        }
        let partner = self.of.iter().filter(|(p, g)| **g == group && **p != pid).map(|(p, _)| *p).min().unwrap_or(pid);
        let parent = other.map_or(pid, |(p, _)| p);
        Error::Target(format!(
            "process {pid} shares its {} with process {partner}, but process {parent} between them has others: end one of \
             them",
            self.name
        ))
    }

    fn step(&self) -> Step {
        if self.flag == 0 { Step::Setsid } else { Step::Unshare(self.flag) }
    }
}

/// Orders the births of all processes. `tasks` by pid.
pub(crate) fn order(
    tasks: &BTreeMap<i32, Task>,
    shared_fs: &[SharedFs],
    shared_actions: &[SharedActions],
    root: i32,
) -> Result<HashMap<i32, Vec<Step>>> {
    if let Some(task) = tasks.values().find(|t| t.pid != root && !tasks.contains_key(&t.ppid)) {
        return Err(Error::Target(format!("process {} has a parent outside the tree", task.pid)));
    }
    let makers = makers(tasks, shared_actions, root)?;
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    tasks.keys().filter_map(|pid| Some((pid, makers.get(pid)?))).for_each(|(pid, maker)| {
        children.entry(maker.pid).or_default().push(*pid);
    });
    let groups: HashSet<i32> = tasks.values().map(|t| t.pgid).collect();
    if let Some(task) = tasks.values().find(|t| t.pgid != t.pid && groups.contains(&t.pid)) {
        return Err(Error::Target(format!(
            "process {} has left the process group {0} that it led, but others have not: end them, or move them too",
            task.pid
        )));
    }
    let tables = tasks.values().filter_map(|t| Some((t.pid, t.live.as_ref()?.fd_table as i32)));
    let directories = shared_fs.iter().zip(0..).flat_map(|(s, n)| s.pids.iter().map(move |&pid| (pid, n)));
    let kinds = [
        Kind::sessions(tasks),
        Kind::shared(libc::CLONE_FILES, "descriptors (CLONE_FILES)", &makers, tables),
        Kind::shared(libc::CLONE_FS, "working directory (CLONE_FS)", &makers, directories),
    ];
    let mut births = HashMap::new();
    let tree = Tree { kinds, makers, children };
    let [session, ..] = born_with(root, &tree, &mut births, 0)?;
    check_stand_ins(tasks, root, &births)?;
    let outside = tasks[&root].sid;
    if let Some(sid) = session.filter(|&sid| sid != outside) {
        return Err(Error::Target(format!(
            "the leader of session {sid} is dead or outside the tree: dump the tree from the session's leader"
        )));
    }
    Ok(births)
}

/// There is one process for each number, and it has one exit signal, which those that it forks inherit.
fn check_stand_ins(tasks: &BTreeMap<i32, Task>, root: i32, births: &HashMap<i32, Vec<Step>>) -> Result<()> {
    let mut seen = HashSet::new();
    for step in births.values().flatten() {
        let Step::StandIn { sid, children } = step else { continue };
        let mut signals = children.iter().map(|child| tasks[child].exit_signal);
        let first = signals.next();
        if *sid == tasks[&root].sid {
            return Err(Error::Target(format!(
                "processes {children:?} are in the session around the tree, although they descend from members of others: \
                 end them"
            )));
        }
        if !seen.insert(sid) || signals.any(|signal| Some(signal) != first) {
            return Err(Error::Target(format!(
                "the leader of session {sid} is dead, and processes {children:?} in it have another parent or exit signal \
                 than others: end them"
            )));
        }
    }
    Ok(())
}

/// Who makes whom, and what they have in common.
struct Tree {
    kinds: [Kind; 3],
    makers: HashMap<i32, Maker>,
    /// Whom each process makes.
    children: HashMap<i32, Vec<i32>>,
}

/// Orders the births of those that a process makes; what it must be born with itself, as far as that matters.
fn born_with(pid: i32, tree: &Tree, births: &mut HashMap<i32, Vec<Step>>, depth: usize) -> Result<[Option<i32>; 3]> {
    if depth > tree.kinds[0].of.len() {
        return Err(Error::Target(format!("process {pid} is its own ancestor")));
    }
    let Tree { kinds, makers, children } = tree;
    let children_of = children.get(&pid).map_or(&[][..], Vec::as_slice);
    let wanted = children_of.iter().map(|&child| Ok((child, born_with(child, tree, births, depth + 1)?)));
    let mut wanted: Vec<(i32, [Option<i32>; 3])> = wanted.collect::<Result<_>>()?;
    let orphans = kinds[0].stand_ins(pid, depth == 0, &mut wanted);
    let shares = |child: &i32| {
        makers[child].flags != 0 || wanted.iter().any(|(pid, [_, files, fs])| pid == child && files.or(*fs).is_some())
    };
    if let Some(child) = orphans.values().flatten().find(|child| shares(child)) {
        return Err(Error::Target(format!(
            "process {child} is in a session whose leader is dead, and shares memory, descriptors or working directory: end it"
        )));
    }
    let mut born = [None; 3];
    let mut phases: [Vec<Option<i32>>; 3] = Default::default();
    for (n, kind) in kinds.iter().enumerate() {
        let wanted: Vec<_> = wanted.iter().map(|(child, wanted)| (*child, wanted[n])).collect();
        (phases[n], born[n]) = kind.phases(pid, &wanted)?;
    }
    wanted.retain(|(child, _)| !orphans.values().flatten().any(|orphan| orphan == child));
    let mut own = steps(pid, tree, &phases, &wanted)?;
    own.extend(orphans.into_iter().map(|(sid, children)| Step::StandIn { sid, children }));
    births.insert(pid, own);
    Ok(born)
}

/// Brings forks and new beginnings into an order: each child after the beginning of what it is born with, and before the
/// end of it.
fn steps(
    pid: i32,
    Tree { kinds, makers, .. }: &Tree,
    phases: &[Vec<Option<i32>>; 3],
    wanted: &[(i32, [Option<i32>; 3])],
) -> Result<Vec<Step>> {
    let mut nodes: Vec<Step> = Vec::new();
    let mut after: Vec<Vec<usize>> = Vec::new(); // by node: what has to come after it
    let mut first = [0; 3];
    for (n, kind) in kinds.iter().enumerate() {
        first[n] = nodes.len();
        for beginning in 1..phases[n].len() {
            let at = nodes.len();
            after.push(if beginning + 1 < phases[n].len() { vec![at + 1] } else { Vec::new() });
            nodes.push(kind.step());
        }
    }
    for &(child, wanted) in wanted {
        let node = nodes.len();
        let mut flags = makers[&child].flags;
        after.push(Vec::new());
        for (n, group) in wanted.into_iter().enumerate().filter(|(_, group)| group.is_some()) {
            flags |= kinds[n].flag;
            let phase = phases[n].iter().position(|p| *p == group).unwrap_or(0);
            if phase > 0 {
                after[first[n] + phase - 1].push(node);
            }
            if phase + 1 < phases[n].len() {
                after[node].push(first[n] + phase);
            }
        }
        nodes.push(Step::Fork { pid: child, flags });
    }
    let mut before = vec![0; nodes.len()];
    after.iter().flatten().for_each(|&node| before[node] += 1);
    let mut ready: BTreeSet<usize> = (0..nodes.len()).filter(|&node| before[node] == 0).collect();
    let mut ordered = Vec::with_capacity(nodes.len());
    while let Some(node) = ready.pop_first() {
        ordered.push(nodes[node].clone());
        for &next in &after[node] {
            before[next] -= 1;
            if before[next] == 0 {
                ready.insert(next);
            }
        }
    }
    if ordered.len() < nodes.len() {
        return Err(Error::Target(format!(
            "the children of process {pid} are in sessions and share descriptors (CLONE_FILES) and working directories \
             (CLONE_FS) in a way that no order of forks brings about: end some of them"
        )));
    }
    Ok(ordered)
}

#[cfg(test)]
#[path = "births_tests.rs"]
mod tests;
