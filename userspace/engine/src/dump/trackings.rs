//! Write tracking of the processes of a tree, and what is known of their pages.

use super::sharing::{Sharing, Unchanged};
use crate::{
    error::Result,
    kernel::{
        pagemap::Range,
        sys::{self, Kcmp},
    },
    memory::{copy::Parent, known::Known, ranges, tracking::Tracking},
    observe::{FdEntry, Iterators},
};
use std::{cmp::Ordering, collections::HashMap, time::Duration};
use tracing::{info, warn};

/// The tracked processes.
#[derive(Debug, Default)]
pub(super) struct Trackings {
    by_pid: HashMap<i32, Tracking>,
    /// Processes that could not be tracked. They are not asked again.
    unable: Vec<i32>,
    /// Processes whose memory is that of another, who comes first in the tree.
    firsts: HashMap<i32, i32>,
    /// Memory that they share.
    pub sharing: Sharing,
}

impl Trackings {
    /// Nothing is tracked.
    pub(super) fn is_empty(&self) -> bool {
        self.by_pid.is_empty()
    }

    /// All tracked processes.
    pub(super) fn iter(&self) -> impl Iterator<Item = (i32, &Tracking)> {
        self.by_pid.iter().map(|(pid, tracking)| (*pid, tracking))
    }

    /// Ends all tracking.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Nothing is known of the pages any more.
    pub(super) fn forget(&mut self) {
        self.known_mut().for_each(|known| *known = Known::default());
    }

    /// Memory that the next image compares with checksums can be written to without a fault until then.
    pub(super) fn release(&self) {
        self.by_pid.values().for_each(Tracking::release);
    }

    /// Whether it is of use to copy a process before the freeze.
    pub(super) fn is_able(&self, pid: i32) -> bool {
        self.by_pid.contains_key(&pid) && !self.unable.contains(&pid)
    }

    /// Whose number the tracking of a process's memory has.
    fn first(&self, pid: i32) -> i32 {
        self.firsts.get(&pid).copied().unwrap_or(pid)
    }

    /// Says which processes have the memory of another (CLONE_VM), and whose. It is tracked once.
    pub(super) fn share(&mut self, pairs: impl IntoIterator<Item = (i32, i32)>) {
        self.firsts = pairs.into_iter().collect();
        // One of them may be tracked since it was alone.
        for (&other, &first) in &self.firsts {
            if !self.by_pid.contains_key(&first)
                && let Some(tracking) = self.by_pid.remove(&other)
            {
                self.by_pid.insert(first, tracking);
            }
        }
    }

    /// Ends the tracking of memory that those who shared it do not share any more: one of them runs another program, and
    /// nobody knows which.
    pub(super) fn part(&mut self) {
        let parted = |(other, first): &(i32, i32)| sys::kcmp(*other, *first, Kcmp::Vm).is_ok_and(Ordering::is_ne);
        let parted: Vec<(i32, i32)> =
            self.firsts.iter().map(|(other, first)| (*other, *first)).filter(parted).collect();
        for (_, first) in parted {
            self.by_pid.remove(&first);
        }
    }

    /// The tracking of a process's memory.
    pub(super) fn of(&self, pid: i32) -> Option<&Tracking> {
        self.by_pid.get(&self.first(pid))
    }

    /// The same, to change what is known.
    pub(super) fn of_mut(&mut self, pid: i32) -> Option<&mut Tracking> {
        self.by_pid.get_mut(&self.first(pid))
    }

    /// What is known of all memory.
    pub(super) fn known(&self) -> impl Iterator<Item = &Known> {
        self.by_pid.values().map(|tracking| &tracking.known).chain(self.sharing.known())
    }

    /// The same, to change it.
    pub(super) fn known_mut(&mut self) -> impl Iterator<Item = &mut Known> {
        self.by_pid.values_mut().map(|tracking| &mut tracking.known).chain(self.sharing.known_mut())
    }

    /// What of the memory that processes share has not changed; see [`Sharing::look`]. Without iterators nobody knows.
    pub(super) fn look_at_shared(
        &mut self,
        pids: &[i32],
        iterators: Option<&mut Iterators>,
        protect: bool,
        threads: usize,
    ) -> Unchanged {
        let Some(iterators) = iterators else { return Unchanged::new() };
        let tracking = |pid| self.by_pid.get(&pid).filter(|_| !self.unable.contains(&pid));
        let unchanged = self.sharing.look(pids, iterators, &tracking, protect, threads);
        if protect {
            self.forget_what_was_shared();
        }
        unchanged
    }

    /// Forgets private pages at addresses where shared memory was just protected. A running process may have put private
    /// memory there meanwhile: that it was written to is known to nobody then.
    fn forget_what_was_shared(&mut self) {
        let mut protected: HashMap<i32, Vec<Range>> = HashMap::new();
        for place in self.sharing.objects().flat_map(|(_, object)| &object.places) {
            protected.entry(place.pid).or_default().push(place.range);
        }
        for (pid, ranges) in protected {
            if let Some(tracking) = self.by_pid.get_mut(&pid) {
                let kept = ranges::subtract(tracking.known.covered(), &ranges::set(ranges));
                tracking.known.keep(kept);
            }
        }
    }

    /// Begins to track a running process, unless it is tracked or cannot be. An error: the process has ended.
    pub(super) fn begin(&mut self, pid: i32, limit: Duration) -> Result<()> {
        if self.by_pid.contains_key(&pid) || self.unable.contains(&pid) {
            return Ok(());
        }
        match Tracking::begin(pid, limit) {
            Ok(tracking) => {
                self.by_pid.insert(pid, tracking);
            }
            Err(e) if e.is_death() => return Err(e),
            Err(e) => {
                warn!("writes of process {pid} cannot be tracked: {e}; all of its memory is copied under the freeze");
                self.unable.push(pid);
            }
        }
        Ok(())
    }

    /// Forgets a process.
    pub(super) fn remove(&mut self, pid: i32) {
        self.by_pid.remove(&pid);
        self.unable.retain(|p| *p != pid);
    }

    /// Forgets all processes but these.
    pub(super) fn retain(&mut self, pids: &[i32]) {
        self.by_pid.retain(|pid, _| pids.contains(pid));
        self.unable.retain(|pid| pids.contains(pid));
    }

    /// A tracked process as the parent of another.
    pub(super) fn parent(&self, pid: i32) -> Option<Parent<'_>> {
        self.of(pid).map(|tracking| Parent { pid: self.first(pid), runs: tracking.known.runs() })
    }

    /// Forgets the pages of processes with descriptors for direct I/O: a device may write into a page that was protected
    /// after it was given to the device, and nobody would know.
    pub(super) fn refuse_direct_io(&mut self, entries: &[FdEntry]) {
        // For a pipe the same flag means another thing.
        let direct = |e: &&FdEntry| e.flags & libc::O_DIRECT as u32 != 0 && e.mode & libc::S_IFMT != libc::S_IFIFO;
        for entry in entries.iter().filter(direct) {
            let first = self.first(entry.tgid);
            if !self.unable.contains(&first) {
                info!(
                    "process {} has descriptor {} for direct I/O: its writes cannot be tracked",
                    entry.tgid, entry.fd
                );
                self.unable.push(first);
            }
            if let Some(tracking) = self.by_pid.get_mut(&first) {
                tracking.known = Known::default();
            }
        }
    }
}

impl FromIterator<(i32, Tracking)> for Trackings {
    fn from_iter<T: IntoIterator<Item = (i32, Tracking)>>(trackings: T) -> Self {
        Self { by_pid: trackings.into_iter().collect(), ..Self::default() }
    }
}
