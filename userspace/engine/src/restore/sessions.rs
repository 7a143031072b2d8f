//! Who forks whom before or after becoming a session leader.
//!
//! A process can only be born into the session its parent is in at that moment, so the order of setsid(2) and the forks
//! of the children decides everybody's session.

use crate::error::{Error, Result};
use standstill_images::types::Task;
use std::collections::{BTreeMap, HashMap, HashSet};

/// The children of one process, by when it forks them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Births {
    /// Before it calls setsid(2).
    pub before: Vec<i32>,
    /// Afterwards, or with no setsid at all.
    pub after: Vec<i32>,
    /// Whether it becomes a session leader.
    pub setsid: bool,
}

/// Orders all births. `tasks` by pid.
pub(crate) fn order(tasks: &BTreeMap<i32, Task>, root: i32) -> Result<HashMap<i32, Births>> {
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    for task in tasks.values().filter(|t| t.pid != root) {
        if !tasks.contains_key(&task.ppid) {
            return Err(Error::Target(format!("process {} has a parent outside the tree", task.pid)));
        }
        children.entry(task.ppid).or_default().push(task.pid);
    }
    let groups: HashSet<i32> = tasks.values().map(|t| t.pgid).collect();
    if let Some(task) = tasks.values().find(|t| t.pgid != t.pid && groups.contains(&t.pid)) {
        return Err(Error::Target(format!(
            "process {} has left the process group {0} that it led, but others have not: end them, or move them too",
            task.pid
        )));
    }
    let mut births = HashMap::new();
    let wanted = need(root, tasks, &children, &mut births, 0)?;
    let outside = tasks[&root].sid;
    if let Some(sid) = wanted.filter(|&sid| sid != outside) {
        return Err(Error::Target(format!(
            "the leader of session {sid} is dead or outside the tree: dump the tree from the session's leader"
        )));
    }
    Ok(births)
}

/// The session `pid` must be born into, if it matters.
fn need(
    pid: i32,
    tasks: &BTreeMap<i32, Task>,
    children: &HashMap<i32, Vec<i32>>,
    births: &mut HashMap<i32, Births>,
    depth: usize,
) -> Result<Option<i32>> {
    if depth > tasks.len() {
        return Err(Error::Target(format!("process {pid} is its own ancestor")));
    }
    let task = &tasks[&pid];
    let leader = task.sid == task.pid;
    let mut own = Births { setsid: leader, ..Default::default() };
    // A session that a child needs and that is not this process's final one must be the one it was born into.
    let mut born = if leader { None } else { Some(task.sid) };
    for &child in children.get(&pid).map_or(&[][..], Vec::as_slice) {
        let wanted = need(child, tasks, children, births, depth + 1)?;
        match wanted {
            None => own.after.push(child),
            Some(sid) if sid == task.sid => own.after.push(child),
            Some(sid) if leader && born.is_none_or(|b| b == sid) => {
                born = Some(sid);
                own.before.push(child);
            }
            Some(sid) => {
                return Err(Error::Target(format!(
                    "process {child} is in session {sid}, which no living ancestor belongs to: end it, or dump the \
                     tree from a common ancestor"
                )));
            }
        }
    }
    births.insert(pid, own);
    Ok(born)
}

#[cfg(test)]
mod tests {
    use super::*;
    use standstill_images::types::TaskState;

    fn tree(tasks: &[(i32, i32, i32)]) -> BTreeMap<i32, Task> {
        tasks
            .iter()
            .map(|&(pid, ppid, sid)| {
                let task = Task {
                    pid,
                    ppid,
                    pgid: pid,
                    sid,
                    state: TaskState::Running,
                    exit_signal: 17,
                    live: None,
                    comm: Default::default(),
                };
                (pid, task)
            })
            .collect()
    }

    #[test]
    fn a_child_of_the_old_session_is_forked_before_setsid() {
        // 1 leads; 2 became a leader after it had forked 3.
        let births = order(&tree(&[(1, 0, 1), (2, 1, 2), (3, 2, 1), (4, 2, 2)]), 1).unwrap();
        assert_eq!(births[&2], Births { before: vec![3], after: vec![4], setsid: true });
        assert_eq!(births[&1].after, [2]);
    }

    #[test]
    fn a_session_without_living_ancestor_is_refused() {
        assert!(order(&tree(&[(1, 0, 1), (2, 1, 9)]), 1).is_err());
        assert!(order(&tree(&[(1, 0, 1), (2, 7, 1)]), 1).is_err());
    }

    #[test]
    fn a_shell_job_keeps_the_session_it_came_from() {
        let births = order(&tree(&[(10, 0, 5), (11, 10, 5), (12, 10, 12)]), 10).unwrap();
        assert_eq!(births[&10], Births { before: vec![], after: vec![11, 12], setsid: false });
    }

    #[test]
    fn a_leader_that_left_its_group_is_refused() {
        let mut tasks = tree(&[(1, 0, 1), (2, 1, 1), (3, 2, 1)]);
        tasks.get_mut(&3).unwrap().pgid = 2;
        assert!(order(&tasks, 1).is_ok());
        tasks.get_mut(&2).unwrap().pgid = 1;
        assert!(order(&tasks, 1).is_err_and(|e| e.to_string().contains("process 2 has left the process group")));
    }

    #[test]
    fn a_cycle_is_an_error_not_a_hang() {
        assert!(order(&tree(&[(1, 0, 1), (2, 3, 1), (3, 2, 1)]), 1).is_ok_and(|b| b.len() == 1));
    }
}
