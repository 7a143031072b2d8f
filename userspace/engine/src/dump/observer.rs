//! Who tells the dump about the tree: the tree's tracker, iterators of our own, or procfs.

use crate::{
    error::{Error, Result},
    memory::aio,
    observe::{self, AioContexts, FdEntry, Iterators, ObserveError, ProcessState, VmaEntry, vmas_by_process},
};
use std::collections::HashMap;
use tracing::{info, warn};

/// Who lists the descriptors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reader {
    /// The tree's tracker if it has one, the eBPF iterators where they load, procfs elsewhere.
    #[default]
    Auto,
    /// The eBPF iterators or nothing.
    Ebpf,
    /// procfs.
    Procfs,
}

/// A way to know the tree.
pub(crate) struct Observer {
    source: Source,
    reader: Reader,
    /// Tells of AIO contexts, if the tree had any before the freeze.
    pub(super) aio: Option<AioContexts>,
}

enum Source {
    #[cfg(feature = "ebpf")]
    Tracker(Box<observe::Lease>),
    Iterators(Box<Iterators>),
    Procfs,
}

/// What a reader says of the tree.
pub(super) struct Seen {
    pub files: Vec<FdEntry>,
    /// Empty, like `processes`, if only procfs was read.
    pub vmas: HashMap<i32, Vec<VmaEntry>>,
    pub processes: HashMap<i32, ProcessState>,
}

impl Seen {
    fn new(files: Vec<FdEntry>, vmas: HashMap<i32, Vec<VmaEntry>>, processes: Vec<ProcessState>) -> Self {
        Self { files, vmas, processes: processes.into_iter().map(|p| (p.tgid, p)).collect() }
    }
}

impl Observer {
    /// The best one there is for the tree of `root`.
    pub(crate) fn open(reader: Reader, root: i32) -> Result<Self> {
        Ok(Self { source: source(reader, root)?, reader, aio: None })
    }

    /// The same without a tracker.
    pub(crate) fn own(reader: Reader) -> Result<Self> {
        let source = if reader == Reader::Procfs { Source::Procfs } else { own(reader)? };
        Ok(Self { source, reader, aio: None })
    }

    /// Its name for people.
    pub(super) fn name(&self) -> &'static str {
        match &self.source {
            #[cfg(feature = "ebpf")]
            Source::Tracker(_) => "tracker",
            Source::Iterators(_) => "ebpf",
            Source::Procfs => "procfs",
        }
    }

    /// The iterators, if it has any.
    pub(super) fn iterators(&mut self) -> Option<&mut Iterators> {
        match &mut self.source {
            #[cfg(feature = "ebpf")]
            Source::Tracker(lease) => Some(lease.iterators()),
            Source::Iterators(iterators) => Some(iterators),
            Source::Procfs => None,
        }
    }

    /// Reads the paths of open files while the tree runs, and loads what AIO contexts need.
    pub(super) fn read_ahead(&mut self, pids: &[i32]) {
        if self.aio.is_none() {
            self.aio = aio::read_ahead(pids);
        }
        if let Some(iterators) = self.iterators()
            && let Err(e) = iterators.prefetch_paths(pids)
        {
            warn!("reading ahead: {e}");
        }
    }

    /// Reads procfs from now on: the iterators find what a process has by its leader, and one of the tree has none.
    pub(super) fn use_procfs(&mut self, pid: i32) {
        if !matches!(self.source, Source::Procfs) {
            info!("the leader of process {pid} has exited: reading procfs, which takes longer");
            self.source = Source::Procfs;
        }
    }

    /// Reads again, while the tree runs, what has changed since the tracker was asked, as mappings do that are registered
    /// for the pre-copy.
    pub(super) fn catch_up(&mut self) {
        #[cfg(feature = "ebpf")]
        if let Source::Tracker(lease) = &mut self.source
            && let Err(e) = lease.refresh()
        {
            warn!("what the tracker knows cannot be brought up to date: {e}");
        }
    }

    /// Reads the tree, or falls back to procfs. `paranoid`: what a tracker knows is compared with the truth.
    #[cfg_attr(not(feature = "ebpf"), expect(unused_variables, reason = "there are no trackers"))]
    pub(super) fn read(&mut self, pids: &[i32], paranoid: bool) -> Result<Seen> {
        let seen = match &mut self.source {
            #[cfg(feature = "ebpf")]
            Source::Tracker(lease) => tracked(lease, pids, paranoid),
            Source::Iterators(iterators) => observed(iterators, pids),
            Source::Procfs => return from_procfs(pids),
        };
        match seen {
            Err(e) if self.reader == Reader::Auto => {
                warn!("the eBPF iterators failed: {e}; reading procfs instead");
                self.source = Source::Procfs;
                from_procfs(pids)
            }
            other => other.map_err(|e| no_reader(&e)),
        }
    }
}

fn source(reader: Reader, root: i32) -> Result<Source> {
    if reader == Reader::Procfs {
        return Ok(Source::Procfs);
    }
    #[cfg(feature = "ebpf")]
    match observe::Lease::take(root) {
        Ok(Some(lease)) => return Ok(Source::Tracker(Box::new(lease))),
        Ok(None) => {}
        Err(e) => warn!("the tracker of process {root} is of no use: {e}"),
    }
    #[cfg(not(feature = "ebpf"))]
    let _ = root;
    own(reader)
}

/// Iterators of our own.
fn own(reader: Reader) -> Result<Source> {
    match Iterators::load() {
        Ok(iterators) => Ok(Source::Iterators(Box::new(iterators))),
        Err(e) if reader == Reader::Auto => {
            warn!("no eBPF iterators: {e}; reading procfs instead, which takes longer");
            Ok(Source::Procfs)
        }
        Err(e) => Err(no_reader(&e)),
    }
}

pub(crate) fn no_reader(e: &ObserveError) -> Error {
    Error::Missing { what: format!("the eBPF reader ({e})"), remedy: "use --reader procfs".into() }
}

#[cfg(feature = "ebpf")]
fn tracked(lease: &mut observe::Lease, pids: &[i32], paranoid: bool) -> observe::Result<Seen> {
    let (processes, mut fresh) = lease.check(pids)?;
    tracing::info!(fresh = format!("{:.0} %", 100.0 * fresh.share()), "what the tracker knows is checked");
    if paranoid {
        for difference in lease.compare(&fresh)? {
            warn!("the tracker is wrong about process {}: {}: {}", difference.pid, difference.part, difference.what);
            fresh.vmas.remove(&difference.pid);
        }
    }
    let vmas = lease.vmas(pids, &fresh)?;
    Ok(Seen::new(lease.iterators().files(pids)?, vmas, processes))
}

fn observed(iterators: &mut Iterators, pids: &[i32]) -> observe::Result<Seen> {
    Ok(Seen::new(iterators.files(pids)?, vmas_by_process(iterators.vmas(pids)?), iterators.processes(pids)?))
}

fn from_procfs(pids: &[i32]) -> Result<Seen> {
    let files = observe::procfs::files(pids)
        .map_err(|e| Error::System { call: "read procfs".into(), source: std::io::Error::other(e) })?;
    Ok(Seen::new(files, HashMap::new(), Vec::new()))
}
