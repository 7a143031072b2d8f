use super::*;
use standstill_images::types::{LiveTask, TaskState};

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

fn order(tasks: &BTreeMap<i32, Task>, shared_fs: &[SharedFs], root: i32) -> Result<HashMap<i32, Vec<Step>>> {
    super::order(tasks, shared_fs, &[], root)
}

fn fork(pid: i32) -> Step {
    Step::Fork { pid, flags: 0 }
}

#[test]
fn a_child_of_the_old_session_is_forked_before_setsid() {
    // 1 leads; 2 became a leader after it had forked 3.
    let births = order(&tree(&[(1, 0, 1), (2, 1, 2), (3, 2, 1), (4, 2, 2)]), &[], 1).unwrap();
    assert_eq!(births[&2], [fork(3), Step::Setsid, fork(4)]);
    assert_eq!(births[&1], [Step::Setsid, fork(2)]);
}

#[test]
fn a_session_whose_leader_is_dead_gets_a_stand_in() {
    let stand_in = |children: &[i32]| Step::StandIn { sid: 9, children: children.to_vec() };
    let births = order(&tree(&[(1, 0, 1), (2, 1, 9), (3, 1, 9), (4, 2, 9)]), &[], 1).unwrap();
    assert_eq!(births[&1], [Step::Setsid, stand_in(&[2, 3])]);
    assert_eq!(births[&2], [fork(4)]);
    // 2 was in the session before it led its own.
    let births = order(&tree(&[(1, 0, 1), (2, 1, 2), (3, 2, 9)]), &[], 1).unwrap();
    assert_eq!((&births[&1][1..], &births[&2][..]), (&[stand_in(&[2])][..], &[fork(3), Step::Setsid][..]));
    // One leader cannot be a child of two.
    let divided = order(&tree(&[(1, 0, 1), (2, 1, 9), (3, 1, 1), (4, 3, 9)]), &[], 1).unwrap_err();
    assert!(divided.to_string().contains("the leader of session 9 is dead"), "{divided}");
    assert!(order(&tree(&[(1, 0, 1), (2, 7, 1)]), &[], 1).is_err());
}

#[test]
fn a_living_leader_elsewhere_is_refused() {
    assert!(order(&tree(&[(1, 0, 1), (2, 1, 2), (3, 1, 2)]), &[], 1).is_err());
}

#[test]
fn a_shell_job_keeps_the_session_it_came_from() {
    let births = order(&tree(&[(10, 0, 5), (11, 10, 5), (12, 10, 12)]), &[], 10).unwrap();
    assert_eq!(births[&10], [fork(11), fork(12)]);
    assert_eq!(births[&12], [Step::Setsid]);
}

#[test]
fn a_leader_that_left_its_group_is_refused() {
    let mut tasks = tree(&[(1, 0, 1), (2, 1, 1), (3, 2, 1)]);
    tasks.get_mut(&3).unwrap().pgid = 2;
    assert!(order(&tasks, &[], 1).is_ok());
    tasks.get_mut(&2).unwrap().pgid = 1;
    assert!(order(&tasks, &[], 1).is_err_and(|e| e.to_string().contains("process 2 has left the process group")));
}

#[test]
fn a_cycle_is_an_error_not_a_hang() {
    let tasks = tree(&[(1, 0, 1), (2, 3, 1), (3, 2, 1)]);
    let shared = [SharedFs { pids: vec![2, 3] }, SharedFs { pids: vec![1, 2] }];
    assert!(order(&tasks, &shared, 1).is_ok_and(|births| births.len() == 1));
}

#[test]
fn siblings_share_what_their_parent_gives_up() {
    let tasks = tree(&[(1, 0, 1), (2, 1, 1), (3, 1, 1), (4, 1, 1), (5, 1, 1)]);
    let shared = [SharedFs { pids: vec![2, 4] }, SharedFs { pids: vec![3, 5] }];
    let share = |pid| Step::Fork { pid, flags: libc::CLONE_FS };
    let leave = || Step::Unshare(libc::CLONE_FS);
    let births = order(&tasks, &shared, 1).unwrap();
    assert_eq!(births[&1], [Step::Setsid, share(2), share(4), leave(), share(3), share(5), leave()]);
}

#[test]
fn a_parent_that_shares_keeps_what_it_was_born_with() {
    let tasks = tree(&[(1, 0, 1), (2, 1, 1), (3, 2, 1), (4, 2, 1), (5, 4, 1)]);
    let share = |pid| Step::Fork { pid, flags: libc::CLONE_FS };
    let births = order(&tasks, &[SharedFs { pids: vec![1, 2, 3] }], 1).unwrap();
    assert_eq!((&births[&1][1..], &births[&2][..]), (&[share(2)][..], &[share(3), fork(4)][..]));
    // 2 hands on what it does not keep.
    let births = order(&tasks, &[SharedFs { pids: vec![1, 3] }], 1).unwrap();
    assert_eq!(births[&2], [share(3), Step::Unshare(libc::CLONE_FS), fork(4)]);
    // 2 would have to have two at a time: its own, which it was born with, and that of 3 and 4.
    let refused = order(&tasks, &[SharedFs { pids: vec![1, 2] }, SharedFs { pids: vec![3, 4] }], 1).unwrap_err();
    let text = refused.to_string();
    assert!(text.contains("process 3 shares its working directory (CLONE_FS) with process 4"), "{text}");
}

#[test]
fn orders_that_contradict_each_other_are_refused() {
    // 2 led its session after it had forked 3, and stopped sharing its directory with 3; and the other way round with 4.
    let tasks = tree(&[(1, 0, 1), (2, 1, 2), (3, 2, 1), (4, 2, 2), (5, 2, 2)]);
    let shared = |a, b| [SharedFs { pids: a }, SharedFs { pids: b }];
    assert!(order(&tasks, &shared(vec![1, 3], vec![2, 4]), 1).is_ok());
    assert!(
        order(&tasks, &shared(vec![1, 4], vec![2, 3]), 1).is_err_and(|e| e.to_string().contains("no order of forks"))
    );
}

#[test]
fn tables_are_shared_by_number() {
    let mut tasks = tree(&[(1, 0, 1), (2, 1, 1), (3, 1, 1)]);
    for (pid, fd_table) in [(1, 0), (2, 1), (3, 0)] {
        tasks.get_mut(&pid).unwrap().live =
            Some(LiveTask { fd_table, address_space: pid as u32, ..LiveTask::default() });
    }
    let births = order(&tasks, &[], 1).unwrap();
    assert_eq!(births[&1], [Step::Setsid, fork(2), Step::Fork { pid: 3, flags: libc::CLONE_FILES }]);
}

/// A tree and which memory each process has.
fn with_memory(tasks: &[(i32, i32, i32)], spaces: &[u32]) -> BTreeMap<i32, Task> {
    let mut tasks = tree(tasks);
    for (task, &address_space) in tasks.values_mut().zip(spaces) {
        let fd_table = task.pid as u32;
        task.live = Some(LiveTask { fd_table, address_space, ..LiveTask::default() });
    }
    tasks
}

fn made(pid: i32, flags: i32) -> Step {
    Step::Fork { pid, flags }
}

const MEMORY: i32 = libc::CLONE_VM;
const ACTIONS: i32 = libc::CLONE_VM | libc::CLONE_SIGHAND;

#[test]
fn memory_is_had_from_parents() {
    let tasks = with_memory(&[(1, 0, 1), (2, 1, 1), (3, 2, 1), (4, 2, 1), (5, 3, 1)], &[0, 0, 0, 4, 0]);
    let actions = [SharedActions { pids: vec![1, 2] }, SharedActions { pids: vec![3, 5] }];
    let births = super::order(&tasks, &[], &actions, 1).unwrap();
    assert_eq!(births[&1], [Step::Setsid, made(2, ACTIONS)]);
    assert_eq!(births[&2], [made(3, MEMORY), fork(4)]);
    assert_eq!(births[&3], [made(5, ACTIONS)]);
}

#[test]
fn memory_is_had_from_siblings() {
    let mut tasks = with_memory(&[(1, 0, 1), (2, 1, 2), (3, 1, 1), (4, 1, 1), (5, 4, 1)], &[0, 7, 7, 7, 7]);
    let actions = [SharedActions { pids: vec![3, 4] }];
    let births = super::order(&tasks, &[], &actions, 1).unwrap();
    assert_eq!(births[&1], [Step::Setsid, fork(2)]);
    // While it was in their session still.
    assert_eq!(births[&2], [made(3, MEMORY | libc::CLONE_PARENT), Step::Setsid]);
    assert_eq!(births[&3], [made(4, ACTIONS | libc::CLONE_PARENT)]);
    assert_eq!(births[&4], [made(5, MEMORY)]);
    tasks.get_mut(&3).unwrap().exit_signal = 0;
    let text = order(&tasks, &[], 1).unwrap_err().to_string();
    assert!(text.contains("process 3: memory (CLONE_VM) that it shares with its sibling 2"), "{text}");
}

#[test]
fn memory_of_distant_relatives_is_refused() {
    let tasks = with_memory(&[(1, 0, 1), (2, 1, 1), (3, 2, 1)], &[0, 1, 0]);
    let text = order(&tasks, &[], 1).unwrap_err().to_string();
    assert!(text.contains("process 3: memory (CLONE_VM) that it shares with process 1"), "{text}");
    let tasks = with_memory(&[(1, 0, 1), (2, 1, 1), (3, 2, 1)], &[0, 0, 0]);
    let text = super::order(&tasks, &[], &[SharedActions { pids: vec![1, 3] }], 1).unwrap_err().to_string();
    assert!(text.contains("process 3: signal actions (CLONE_SIGHAND) that it shares with process 1"), "{text}");
}
