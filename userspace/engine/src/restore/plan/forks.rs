//! Births, sessions and process groups of a plan, and the stand-ins that take the place of dead leaders meanwhile.

use super::{Begin, PlannedTask, PlannedThread, Planner, Stage};
use crate::{
    error::Result,
    image::Image,
    kernel::sys,
    restore::{births::Step, program::Program},
};
use standstill_images::types::{Task, TaskState};
use std::collections::{BTreeMap, BTreeSet};

/// Finds the groups that need a stand-in for their leader. That of a shell job's root may be led from outside.
/// `orphaned`: sessions that have one anyway, who leads a group, too.
pub(super) fn stand_ins(image: &Image, orphaned: &BTreeSet<i32>) -> BTreeMap<i32, i32> {
    let root = &image.tasks[&image.inventory.root];
    let mut by_group = BTreeMap::new();
    let is_led = |pgid: i32| pgid == root.pgid || image.tasks.contains_key(&pgid) || orphaned.contains(&pgid);
    for task in image.tasks.values().filter(|t| !is_led(t.pgid)) {
        by_group.entry(task.pgid).or_insert(task.pid);
    }
    by_group.into_iter().map(|(pgid, pid)| (pid, pgid)).collect()
}

impl PlannedTask {
    /// One that only stands in for another.
    fn that_ends(pid: i32, program: usize) -> Self {
        let threads = vec![PlannedThread { tid: pid, program, waits: false }];
        Self { pid, ends: true, stops: false, threads, shares_memory: false, syscall_at: 0 }
    }
}

impl<'a> Planner<'a> {
    /// The forks of a process, whose memory is in place.
    pub(super) fn births(&mut self, steps: &[Step], begin: Begin<'a, '_>, program: &mut Program) -> Result<()> {
        let image = self.image;
        for step in steps {
            match *step {
                Step::Setsid => program.call("setsid", libc::SYS_setsid, &[]),
                Step::Unshare(flag) => program.call("stop sharing", libc::SYS_unshare, &[flag.into()]),
                Step::StandIn { sid, ref children } => self.session(sid, children, begin, program)?,
                Step::Fork { pid, flags } => {
                    let child = &image.tasks[&pid];
                    if let Some(&pgid) = self.stand_ins.get(&pid) {
                        self.stand_in(pgid, 0, program);
                    }
                    let word = (flags & libc::CLONE_FILES != 0).then_some(self.words);
                    self.words += usize::from(word.is_some());
                    let shares = flags & libc::CLONE_VM != 0;
                    let index = self.process(child, Some(Begin { shares, ..begin }), word)?;
                    // Actions that are shared are the default ones still.
                    let clear = if flags & libc::CLONE_SIGHAND == 0 { sys::CLONE_CLEAR_SIGHAND } else { 0 };
                    // A sibling has the exit signal of who makes it.
                    let signal = if flags & libc::CLONE_PARENT == 0 { child.exit_signal } else { 0 };
                    program.clone_task(format!("fork process {pid}"), flags as u64 | clear, signal, pid, index);
                    if let Some(word) = word {
                        program.wait_for(format!("wait for process {pid}"), word, 1);
                    }
                }
            }
        }
        Ok(())
    }

    /// A process that leads the session of a dead and forgotten leader, and forks for its parent who is in it.
    fn session(&mut self, sid: i32, children: &[i32], begin: Begin<'a, '_>, program: &mut Program) -> Result<()> {
        const PARENT: u64 = libc::CLONE_PARENT as u64;
        let image = self.image;
        let index = self.programs.len();
        self.programs.push(Program::default());
        self.tasks.push(PlannedTask::that_ends(sid, index));
        let mut own = Program::default();
        own.call("setsid", libc::SYS_setsid, &[]);
        for pid in children {
            if let Some(&pgid) = self.stand_ins.get(pid) {
                self.stand_in(pgid, PARENT, &mut own);
            }
            let index = self.process(&image.tasks[pid], Some(begin), None)?;
            own.clone_task(format!("fork process {pid}"), PARENT | sys::CLONE_CLEAR_SIGHAND, 0, *pid, index);
        }
        [Stage::Forked, Stage::Groups, Stage::Joined].into_iter().for_each(|stage| own.trap(stage as u64));
        own.exit(0);
        self.programs[index] = own;
        let signal = image.tasks[&children[0]].exit_signal;
        program.clone_task(format!("fork process {sid}"), sys::CLONE_CLEAR_SIGHAND, signal, sid, index);
        Ok(())
    }

    /// Stand-ins that become children of a process by a step of its births.
    pub(super) fn stand_ins_of(&self, step: &Step) -> Vec<i32> {
        match step {
            Step::Fork { pid, .. } => self.stand_ins.get(pid).copied().into_iter().collect(),
            Step::StandIn { sid, children } => std::iter::once(*sid)
                .chain(children.iter().filter_map(|pid| self.stand_ins.get(pid).copied()))
                .collect(),
            Step::Setsid | Step::Unshare(_) => Vec::new(),
        }
    }

    pub(super) fn groups(&self, task: &Task, program: &mut Program) {
        if task.pgid == task.pid && task.sid != task.pid {
            program.call("lead a process group", libc::SYS_setpgid, &[0.into(), 0.into()]);
        }
        program.trap(Stage::Groups as u64);
        let led = self.image.tasks.contains_key(&task.pgid)
            || self.orphaned.contains(&task.pgid)
            || self.stand_ins.values().any(|&pgid| pgid == task.pgid);
        if task.pgid != task.pid && led {
            program.call("join its process group", libc::SYS_setpgid, &[0.into(), task.pgid.into()]);
        }
        if self.stops(task) {
            program.call("stop", libc::SYS_kill, &[task.pid.into(), libc::SIGSTOP.into()]);
        }
        program.trap(Stage::Joined as u64);
    }

    /// Whether a process is to be stopped while its parent can be made to wait for that.
    pub(super) fn stops(&self, task: &Task) -> bool {
        // A leader that still has to exit could not do so in a stopped process.
        let exits = self.image.attributes.get(&task.pid).is_some_and(|a| a.leader_exited.is_some());
        matches!(task.state, TaskState::StoppedAndTold(_)) && task.pid != self.image.inventory.root && !exits
    }

    /// Waits for the stops of children that the process `pid` has been told of. Nothing of their signals is left: the tracer
    /// keeps them away, and the stops happened before the last stage.
    pub(super) fn take_stops(&self, pid: i32, program: &mut Program) {
        for child in self.image.tasks.values().filter(|t| t.ppid == pid && self.stops(t)) {
            let options = libc::WSTOPPED | libc::__WALL;
            let args = [libc::P_PID.into(), child.pid.into(), 0.into(), options.into(), 0.into()];
            program.call(format!("wait for the stop of process {}", child.pid), libc::SYS_waitid, &args);
        }
    }

    /// A process that leads the group of a dead and forgotten leader until all members have joined.
    /// `flags`: CLONE_PARENT if the parent of who forks it shall wait for it.
    fn stand_in(&mut self, pgid: i32, flags: u64, program: &mut Program) {
        let index = self.programs.len();
        let mut own = Program::default();
        own.trap(Stage::Forked as u64);
        own.call("lead a process group", libc::SYS_setpgid, &[0.into(), 0.into()]);
        own.trap(Stage::Groups as u64);
        own.trap(Stage::Joined as u64);
        own.exit(0);
        self.programs.push(own);
        self.tasks.push(PlannedTask::that_ends(pgid, index));
        let label = format!("fork process {pgid}");
        let signal = if flags == 0 { libc::SIGCHLD } else { 0 };
        program.clone_task(label, flags | sys::CLONE_CLEAR_SIGHAND, signal, pgid, index);
    }
}
