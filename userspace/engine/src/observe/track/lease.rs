//! What a tracker lends: its programs and maps by descriptors, its copy of the tree by value.

use super::{Difference, Freshness, Shadow, Status, Tracker, programs::Maps, serve::socket};
use crate::{
    kernel::letter,
    observe::{
        Iterators, ObserveError, ProcessState, Result, VmaEntry,
        layout::{LayoutParts, Layouts},
        loader, run_dir, vmas_by_process,
    },
};
use serde::{Deserialize, Serialize};
use std::{
    collections::HashMap,
    fmt,
    io::{self, BufRead, BufReader, Write},
    os::{fd::BorrowedFd, unix::net::UnixStream},
    path::Path,
    time::Duration,
};

/// Descriptors that are passed.
const FDS: usize = 9;

/// What goes with the descriptors.
#[derive(Serialize, Deserialize)]
struct Letter {
    /// Both sides must be of one version: the copy is not a format for others.
    version: String,
    layouts: LayoutParts,
}

/// The use of a tree's tracker, until it is dropped.
pub struct Lease {
    maps: Maps,
    iterators: Iterators,
    shadow: Shadow,
    /// The tracker waits for its end.
    _client: UnixStream,
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease").field("processes", &self.shadow.pids().count()).finish_non_exhaustive()
    }
}

/// Lends everything to a client.
pub(super) fn grant(tracker: &Tracker, client: &UnixStream) -> io::Result<()> {
    let letter =
        Letter { version: env!("CARGO_PKG_VERSION").into(), layouts: tracker.iterators.programs().layouts.to_parts() };
    let bytes = postcard::to_stdvec(&(&letter, &tracker.shadow)).map_err(io::Error::other)?;
    let fds = tracker.programs.maps.fds().into_iter().chain(tracker.iterators.programs().fds());
    let fds: Vec<BorrowedFd<'_>> = fds.collect();
    letter::send(client, &bytes, &fds)
}

/// Connects to the tracker of a tree and tells it what is wanted; `None`: there is none.
fn connect(directory: &Path, root: i32, wish: &str) -> Result<Option<UnixStream>> {
    let path = socket(directory, root);
    let failed = || ObserveError::io(format!("talk to the tracker at {}", path.display()));
    let mut stream = match UnixStream::connect(&path) {
        // Nobody listens where a tracker was killed.
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => return Ok(None),
        other => other.map_err(failed())?,
    };
    // A dump must not hang because a tracker does.
    stream.set_read_timeout(Some(Duration::from_secs(5))).map_err(failed())?;
    stream.write_all(wish.as_bytes()).map_err(failed())?;
    Ok(Some(stream))
}

impl Status {
    /// Asks the tracker of a tree; `None`: there is none.
    ///
    /// # Errors
    /// When the tracker does not answer.
    pub fn ask(root: i32) -> Result<Option<Self>> {
        let Some(stream) = connect(Path::new(run_dir::PATH), root, "status\n")? else { return Ok(None) };
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).map_err(ObserveError::io("read the tracker's status"))?;
        serde_json::from_str(&line).map(Some).map_err(|_| ObserveError::BadRecord("tracker"))
    }
}

impl Lease {
    /// Takes over the observation of a tree from its tracker; `None`: it has none.
    ///
    /// # Errors
    /// When the tracker does not answer, or is of another version.
    pub fn take(root: i32) -> Result<Option<Self>> {
        Self::take_in(Path::new(run_dir::PATH), root)
    }

    pub(in crate::observe) fn take_in(directory: &Path, root: i32) -> Result<Option<Self>> {
        let Some(client) = connect(directory, root, "lease\n")? else { return Ok(None) };
        let (bytes, fds) = letter::receive(&client).map_err(ObserveError::io("receive from the tracker"))?;
        let bad = || ObserveError::BadRecord("tracker");
        if fds.len() != FDS {
            return Err(bad());
        }
        let (letter, rest): (Letter, _) = postcard::take_from_bytes(&bytes).map_err(|_| bad())?;
        if letter.version != env!("CARGO_PKG_VERSION") {
            return Err(bad());
        }
        let shadow: Shadow = postcard::from_bytes(rest).map_err(|_| bad())?;
        let layouts = Layouts::from_parts(&letter.layouts).ok_or_else(bad)?;
        let mut fds = fds.into_iter();
        let maps = Maps::from_fds(&mut fds)?;
        let iterators = Iterators::from_programs(loader::Programs::from_fds(&mut fds, layouts)?)?;
        Ok(Some(Self { maps, iterators, shadow, _client: client }))
    }

    /// The tracker's copy.
    pub fn shadow(&self) -> &Shadow {
        &self.shadow
    }

    /// The tracker's iterators.
    pub fn iterators(&mut self) -> &mut Iterators {
        &mut self.iterators
    }

    /// Reads again what has changed since the tracker lent its copy; the processes may run.
    ///
    /// # Errors
    /// When the iterators or maps cannot be read.
    pub fn refresh(&mut self) -> Result<()> {
        self.shadow.refresh(&self.maps, &mut self.iterators)
    }

    /// The processes, and which parts of the copy are true now. The processes must not run.
    ///
    /// # Errors
    /// When the iterators or maps cannot be read.
    pub fn check(&mut self, pids: &[i32]) -> Result<(Vec<ProcessState>, Freshness)> {
        let (processes, belongings) = self.iterators.processes_and_belongings(pids)?;
        let fresh = self.shadow.check(pids, &belongings, &self.maps)?;
        Ok((processes, fresh))
    }

    /// The mappings of the processes, by process: from the copy where it is fresh, which loses them.
    ///
    /// # Errors
    /// When the iterators cannot be read.
    pub fn vmas(&mut self, pids: &[i32], fresh: &Freshness) -> Result<HashMap<i32, Vec<VmaEntry>>> {
        let stale: Vec<i32> = pids.iter().copied().filter(|pid| !fresh.vmas.contains(pid)).collect();
        let read = if stale.is_empty() { Vec::new() } else { self.iterators.vmas(&stale)? };
        let mut vmas = vmas_by_process(read);
        vmas.extend(fresh.vmas.iter().filter_map(|&pid| Some((pid, self.shadow.take_vmas(pid)?))));
        Ok(vmas)
    }

    /// Compares the fresh parts of the copy with what procfs and the iterators say. The processes must not run.
    ///
    /// # Errors
    /// When the truth cannot be read.
    pub fn compare(&mut self, fresh: &Freshness) -> Result<Vec<Difference>> {
        self.shadow.compare(fresh, &mut self.iterators)
    }
}
