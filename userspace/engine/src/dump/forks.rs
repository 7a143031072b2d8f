//! Forks of the processes of a tree, from which memory is copied once the tree goes on.

use super::{state::State, target};
use crate::{
    error::{Error, Result},
    kernel::PAGE,
    memory::{private::PrivatePages, ranges},
    task::Fork,
};
use std::{collections::HashMap, time::Duration};
use tracing::{info, warn};

/// Of all processes of a tree.
pub(super) struct Forks {
    by_pid: HashMap<i32, Fork>,
}

impl Forks {
    /// Forks each address space of a frozen tree. `None`: what has to be copied should be copied under the freeze, because that
    /// takes less time, or because the tree cannot be forked.
    pub(super) fn make(state: &State) -> Option<Self> {
        let (forking, copying) = times(&state.private);
        if copying <= forking {
            info!(?forking, ?copying, "copying under the freeze takes less time than a fork");
            return None;
        }
        let made = refuse(state).and_then(|()| {
            let fork = |pid: i32| Ok((pid, lean(Fork::of(pid)?, pid, state)?));
            state.private.iter().map(|private| fork(private.pid)).collect::<Result<_>>()
        });
        match made {
            Ok(by_pid) => Some(Self { by_pid }),
            Err(e) => {
                warn!("no fork keeps the memory as it was: {e}; it is copied under the freeze");
                None
            }
        }
    }

    /// To be called once the tree goes on.
    pub(super) fn let_go(&self) -> Result<()> {
        self.by_pid.values().try_for_each(Fork::let_go)
    }

    /// The fork of a process.
    pub(super) fn of(&self, pid: i32) -> i32 {
        self.by_pid.get(&pid).map_or(pid, Fork::pid)
    }
}

/// Takes the huge pages from a fork: they would be missing if the target wrote to its own meanwhile, which is a SIGBUS for
/// whoever has no reservation.
fn lean(fork: Fork, pid: i32, state: &State) -> Result<Fork> {
    let pages = state.private.iter().find(|private| private.pid == pid);
    pages.into_iter().flat_map(|private| &private.huge).try_for_each(|r| fork.unmap(r.start, r.end - r.start))?;
    Ok(fork)
}

/// How long it would take to fork the processes, and to copy what has to be copied.
fn times(private: &[PrivatePages]) -> (Duration, Duration) {
    /// To make the processes of a fork.
    const PROCESS: Duration = Duration::from_micros(300);
    /// To copy the page table entry of a page, not counting huge pages.
    const ENTRY: Duration = Duration::from_nanos(150);
    /// To copy a page into memory that is not in use yet.
    const COPY: Duration = Duration::from_nanos(1000);
    let (mut forking, mut copying) = (Duration::ZERO, Duration::ZERO);
    for pages in private {
        let late = (ranges::size(&ranges::subtract(&pages.ranges, &pages.unforked)) / PAGE) as u32;
        let entries = late + (ranges::size(&pages.unchanged) / PAGE) as u32;
        forking += PROCESS + ENTRY * entries;
        copying += COPY * late;
    }
    (forking, copying)
}

/// Refuses what a fork would harm.
fn refuse(state: &State) -> Result<()> {
    if let Some(thread) = state.seccomp.as_ref().and_then(|seccomp| seccomp.threads.first()) {
        // A filter could keep a fork from ending.
        return Err(Error::unsupported(thread.tid, "the fork of a process under seccomp", "leave out --snapshot fork"));
    }
    for (pid, live) in state.tasks.iter().filter_map(|task| Some((task.pid, task.live.as_ref()?))) {
        if live.child_subreaper || pid == 1 {
            let object = "a process that gets the orphans of others, and would get the fork of its memory,";
            return Err(Error::unsupported(pid, object, "leave out --snapshot fork"));
        }
    }
    let wanted = state.private.iter().map(|p| ranges::size(&p.ranges) + ranges::size(&p.unchanged)).sum::<u64>();
    if wanted > target::available_memory() {
        let what = format!("{} MiB of free memory, for pages that the tree writes to meanwhile,", wanted >> 20);
        return Err(Error::Missing { what, remedy: "free some memory".into() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::pagemap::Range;

    fn process(late: u64, unchanged: u64) -> PrivatePages {
        let range = |pages: u64| vec![Range { start: PAGE, end: (1 + pages) * PAGE }];
        PrivatePages { ranges: range(late), unchanged: range(unchanged), ..Default::default() }
    }

    #[test]
    fn a_fork_pays_where_much_is_late() {
        let pays = |private: &[PrivatePages]| {
            let (forking, copying) = times(private);
            copying > forking
        };
        assert!(pays(&[process(100_000, 0)]));
        assert!(pays(&[process(100_000, 100_000), process(10, 0)]));
        assert!(!pays(&[process(1000, 1_000_000)]));
        assert!(!pays(&[process(20, 0), process(20, 0)]));
        assert!(!pays(&[]));
    }
}
