//! Tracking: eBPF programs note when each part of each process of a tree last changed, so that a copy read earlier is
//! known to be true still, or not.
//!
//! A part is read between two looks at its time of change. If the same time is there at the freeze, the copy is
//! *fresh*. Whatever the programs cannot tell makes the part *stale*, and it is read again: an unknown system call, a
//! process that they do not know, a table that others share.
//!
//! Mappings and the lives of processes cost hardly anything to watch. Descriptors and signal actions change by system
//! calls only, and watching those makes every system call of the machine slower: see [`Scope`].

mod lease;
mod programs;
mod serve;
mod shadow;
mod syscalls;

pub use lease::Lease;
pub use serve::{Serving, Status};
pub use shadow::{Difference, Freshness, Shadow};

use super::{Iterators, ObserveError, Result, Scope};
use crate::kernel::proc;
use programs::Programs;
use serde::{Deserialize, Serialize};
use standstill_ebpf_abi::track::{count, part};
use std::{
    collections::BTreeSet,
    fmt,
    os::fd::{AsFd, BorrowedFd},
};

/// The pid namespace whose numbers the programs use.
const INITIAL_PID_NAMESPACE: &str = "pid:[4026531836]";

/// What happened in a tree since tracking began. Each is a number of events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// New processes.
    pub forks: u64,
    /// New threads.
    pub threads: u64,
    /// New programs (execve(2)).
    pub execs: u64,
    /// Processes that are gone.
    pub exits: u64,
    /// Changes of mappings, roughly: locks of an address space for a change.
    pub memory: u64,
    /// Signals sent to the tree.
    pub signals: u64,
    /// TCP sockets that the tree let listen, connect or close: changes of their state.
    pub connections: u64,
    /// Processes that could not be tracked for want of room.
    pub lost: u64,
    /// What system calls changed; `None`: they are not watched.
    pub calls: Option<Calls>,
}

/// Successful system calls since tracking began, by what they may have changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Calls {
    /// Descriptors.
    pub descriptors: u64,
    /// The state or options of sockets.
    pub sockets: u64,
    /// Signal actions.
    pub signal_actions: u64,
    /// Timers.
    pub timers: u64,
    /// Root, working directory or umask.
    pub fs: u64,
    /// Credentials, limits, scheduling and the like.
    pub attributes: u64,
}

/// Tracks a tree until it is dropped.
///
/// Needs Linux 6.1 with BTF, CAP_BPF and CAP_PERFMON, and the initial pid namespace. Children are tracked from before
/// their first instruction.
///
/// ```no_run
/// # use standstill_engine::observe::{ObserveError, Scope, Tracker};
/// let mut tracker = Tracker::start(4711, Scope::Memory)?;
/// tracker.refresh()?;
/// println!("{} processes, {:?}", tracker.shadow().pids().count(), tracker.counters()?);
/// # Ok::<(), ObserveError>(())
/// ```
pub struct Tracker {
    root: i32,
    scope: Scope,
    programs: Programs,
    iterators: Iterators,
    shadow: Shadow,
}

impl fmt::Debug for Tracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracker").field("root", &self.root).finish_non_exhaustive()
    }
}

impl Tracker {
    /// Begins to track a process and its descendants.
    ///
    /// # Errors
    /// Those of [`Iterators::load`], and [`ObserveError::PidNamespace`].
    pub fn start(root: i32, scope: Scope) -> Result<Self> {
        let own = std::fs::read_link("/proc/self/ns/pid").map_err(ObserveError::io("read the own pid namespace"))?;
        if own.as_os_str() != INITIAL_PID_NAMESPACE {
            return Err(ObserveError::PidNamespace);
        }
        let mut tracker = Self {
            root,
            scope,
            programs: Programs::load(scope)?,
            iterators: Iterators::load()?,
            shadow: Shadow::new(scope),
        };
        tracker.track_descendants(root)?;
        Ok(tracker)
    }

    /// The root of the tree.
    pub fn root(&self) -> i32 {
        self.root
    }

    /// What it watches.
    pub fn scope(&self) -> Scope {
        self.scope
    }

    /// Tracks `root` and what descends from it. Each process is tracked before its children are listed: those that it
    /// gets from then on are tracked by the programs.
    fn track_descendants(&mut self, root: i32) -> Result<()> {
        let mut queue = vec![root];
        let mut seen = BTreeSet::from([root]);
        let mut next = 0;
        while let Some(&pid) = queue.get(next) {
            next += 1;
            self.programs.maps.track(pid)?;
            let tids = proc::threads(pid).unwrap_or_default();
            let children = proc::children(pid, &tids).unwrap_or_default();
            queue.extend(children.into_iter().filter(|&child| seen.insert(child)));
        }
        for process in self.iterators.belongings(&queue)?.values() {
            self.programs.maps.track_space(process.mm)?;
        }
        Ok(())
    }

    /// Becomes readable when something changed after the last [`Self::refresh`]: for poll(2).
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.programs.wake.as_fd()
    }

    /// Reads what changed. The processes may run: what changes in the meantime is stale.
    ///
    /// # Errors
    /// When the iterators or maps cannot be read.
    pub fn refresh(&mut self) -> Result<()> {
        self.programs.rearm()?;
        let result = self.shadow.refresh(&self.programs.maps, &mut self.iterators);
        // It may be long until the next reading.
        self.iterators.release();
        result
    }

    /// The copy of the tree's state.
    pub fn shadow(&self) -> &Shadow {
        &self.shadow
    }

    /// Which parts of the copy are true now. The processes must not run.
    ///
    /// # Errors
    /// When the iterators or maps cannot be read.
    pub fn check(&mut self, pids: &[i32]) -> Result<Freshness> {
        let belongings = self.iterators.belongings(pids)?;
        self.shadow.check(pids, &belongings, &self.programs.maps)
    }

    /// Compares every fresh part of the copy with what procfs and the iterators say. The processes must not run.
    ///
    /// # Errors
    /// When the truth cannot be read.
    pub fn paranoid(&mut self, pids: &[i32]) -> Result<(Freshness, Vec<Difference>)> {
        let fresh = self.check(pids)?;
        let differences = self.shadow.compare(&fresh, &mut self.iterators)?;
        Ok((fresh, differences))
    }

    /// What happened so far.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn counters(&self) -> Result<Counters> {
        let counts = self.programs.counts()?;
        let of = |part: u16| counts[part.trailing_zeros() as usize];
        Ok(Counters {
            forks: counts[count::FORKS],
            threads: counts[count::THREADS],
            execs: counts[count::EXECS],
            exits: counts[count::EXITS],
            memory: of(part::MEMORY),
            signals: counts[count::SIGNALS_SENT],
            connections: counts[count::CONNECTIONS],
            lost: counts[count::LOST],
            calls: (self.scope == Scope::Syscalls).then(|| Calls {
                descriptors: of(part::FILES),
                sockets: of(part::SOCKETS),
                signal_actions: of(part::SIGNALS),
                timers: of(part::TIMERS),
                fs: of(part::FS),
                attributes: of(part::ATTRIBUTES),
            }),
        })
    }
}
