//! How quickly memory is written to, as the kernel tells: writes are tracked between two looks, as for a checkpoint
//! (`memory/tracking.rs`). Each process is stopped for a moment at the beginning, and the first write to each page after a
//! look costs it about a microsecond, so this is done on request only.
//!
//! A tree's writes can be tracked by one at a time. Whoever makes an image of it goes first (`dump/turn.rs`): this ends its
//! tracking when asked, and begins anew when the turn is free again.

use super::processes::Seen;
use crate::{
    dump::Watcher,
    error::Result,
    kernel::pagemap::Range,
    memory::{
        area::{Area, View},
        private,
        tracking::Tracking,
    },
};
use nix::{
    fcntl::OFlag,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::pipe2,
};
use std::{
    collections::{BTreeMap, HashMap},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixListener,
    },
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};
use tracing::debug;

/// A process that does not stop within this time is left alone.
const STOP: Duration = Duration::from_secs(1);

/// Pages of a process that were written to.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Written {
    /// Since so many seconds.
    pub seconds: f64,
    /// By address.
    pub ranges: Vec<Range>,
}

/// A process that is tracked; `None`: it cannot be.
struct Tracked {
    tracking: Option<Tracking>,
    start_time: u64,
    start_stack: u64,
    looked: Option<Instant>,
}

/// `None` once it was ended for somebody else.
type Held = Arc<Mutex<Option<HashMap<i32, Tracked>>>>;

/// Nothing that panics holds it.
fn open(held: &Held) -> MutexGuard<'_, Option<HashMap<i32, Tracked>>> {
    held.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tracks the writes of a tree when it is its turn.
pub(super) struct Dirty {
    root: i32,
    turn: Option<Mine>,
    /// Why it is not.
    pub note: Option<String>,
}

/// The turn, and the thread that gives it away.
struct Mine {
    watcher: Watcher,
    held: Held,
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Dirty {
    pub(super) fn new(root: i32) -> Self {
        Self { root, turn: None, note: None }
    }

    /// Whether mappings can be under our protection.
    pub(super) fn is_tracking(&self) -> bool {
        self.turn.is_some()
    }

    /// Keeps the turn from being given away: processes that are forked meanwhile have our descriptors.
    pub(super) fn hold<T>(&self, what: impl FnOnce() -> T) -> T {
        let _held = self.turn.as_ref().map(|mine| open(&mine.held));
        what()
    }

    /// Which pages were written to since the last look, by process. None at the first look at a process.
    pub(super) fn look(&mut self, processes: &BTreeMap<i32, Seen>) -> HashMap<i32, Written> {
        if self.turn.as_ref().is_some_and(|mine| open(&mine.held).is_none()) {
            self.turn = None;
        }
        if self.turn.is_none() {
            match Mine::new(self.root) {
                Ok(Some(mine)) => (self.turn, self.note) = (Some(mine), None),
                Ok(None) => self.note = Some("another standstill tracks the writes of the tree".into()),
                Err(e) => self.note = Some(format!("writes are not tracked: {e}")),
            }
        }
        self.turn.as_ref().map(|mine| mine.look(processes)).unwrap_or_default()
    }
}

impl Mine {
    fn new(root: i32) -> io::Result<Option<Self>> {
        let Some((watcher, listener)) = Watcher::new(root)? else { return Ok(None) };
        let (stopped, stop) = pipe2(OFlag::O_CLOEXEC)?;
        let held = Arc::new(Mutex::new(Some(HashMap::new())));
        let shared = Arc::clone(&held);
        let thread = thread::spawn(move || give_way(root, &listener, &stopped, &shared));
        Ok(Some(Self { watcher, held, stop: Some(stop), thread: Some(thread) }))
    }

    fn look(&self, processes: &BTreeMap<i32, Seen>) -> HashMap<i32, Written> {
        let mut held = open(&self.held);
        let Some(tracked) = held.as_mut() else { return HashMap::new() };
        // Another program in the same process has another memory.
        let same = |pid: &i32, t: &Tracked| {
            processes.get(pid).is_some_and(|p| (p.start_time, p.start_stack) == (t.start_time, t.start_stack))
        };
        tracked.retain(|pid, t| same(pid, t));
        let new: Vec<(&i32, &Seen)> = processes.iter().filter(|(pid, _)| !tracked.contains_key(*pid)).collect();
        if !new.is_empty() {
            let begun =
                self.watcher.alone(|| tracked.extend(new.into_iter().map(|(pid, seen)| (*pid, begin(*pid, seen)))));
            if let Err(e) = begun {
                debug!("new processes are not tracked: {e}");
            }
        }
        let mut all = HashMap::new();
        for (&pid, one) in tracked.iter_mut() {
            match one.look(pid) {
                Ok(Some(written)) => drop(all.insert(pid, written)),
                Ok(None) => {}
                // It has ended, which the next list of processes will say.
                Err(e) => debug!("writes of {pid}: {e}"),
            }
        }
        all
    }
}

impl Drop for Mine {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn begin(pid: i32, seen: &Seen) -> Tracked {
    let tracking = Tracking::begin(pid, STOP).map_err(|e| debug!("process {pid} is not tracked: {e}")).ok();
    Tracked { tracking, start_time: seen.start_time, start_stack: seen.start_stack, looked: None }
}

impl Tracked {
    fn look(&mut self, pid: i32) -> Result<Option<Written>> {
        let Some(tracking) = &mut self.tracking else { return Ok(None) };
        let last = self.looked.replace(Instant::now());
        let areas = Area::of_running(pid)
            .map_err(|source| crate::Error::System { call: "read the mappings".into(), source })?;
        let (found, _) = private::look(pid, &View::all(&areas), Some(tracking), true, 1)?;
        tracking.known.keep(found.unchanged);
        tracking.known.learn(&found.ranges, Vec::new());
        Ok(last.map(|last| Written { seconds: last.elapsed().as_secs_f64(), ranges: found.ranges }))
    }
}

/// Waits until somebody wants to track, and ends our tracking for it, or until `stop` is closed.
fn give_way(root: i32, listener: &UnixListener, stop: &OwnedFd, held: &Held) {
    let asked = loop {
        let mut fds = [PollFd::new(stop.as_fd(), PollFlags::POLLIN), PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::NONE).is_err() {
            continue;
        }
        if fds[0].any().unwrap_or(true) {
            break None;
        }
        if let Ok((client, _)) = listener.accept() {
            break Some(client);
        }
    };
    // No process has our descriptors once this is done.
    *open(held) = None;
    Watcher::stop_listening(root);
    drop(asked);
}
