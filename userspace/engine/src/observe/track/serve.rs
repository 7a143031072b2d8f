//! A tracker that lends what it knows to others: a small process for each tree.
//!
//! It listens on `/run/standstill/track-PID.sock`, for root only. Who connects asks one question by a line: `status`
//! gets a line of JSON; `lease` gets programs, maps and the copy, and until it hangs up the tracker reads nothing itself,
//! because the programs have room for one reader only.

use super::{Counters, Tracker, lease};
use crate::{
    kernel::{proc, sys},
    observe::{ObserveError, Result, Scope, run_dir},
};
use nix::{
    fcntl::{Flock, FlockArg},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{getsockopt, sockopt::PeerCredentials},
    unistd::geteuid,
};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufRead, BufReader, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{
            fs::{MetadataExt, OpenOptionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use tracing::{debug, info, warn};

/// A tree that changes all the time is read this often at most.
const LEAST_PAUSE: Duration = Duration::from_millis(50);
/// Reading takes at most one part in so many of the time.
const READING_SHARE: u32 = 25;
/// A client that does not say what it wants within this time is dropped.
const PATIENCE: Duration = Duration::from_secs(2);

/// The socket of the tracker of a tree.
pub(super) fn socket(directory: &Path, root: i32) -> PathBuf {
    directory.join(format!("track-{root}.sock"))
}

/// What a tracker tells about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Root of the tree.
    pub root: i32,
    /// The tracker's own process.
    pub tracker: i32,
    /// Tracked processes.
    pub processes: usize,
    /// Seconds since tracking began.
    pub seconds: u64,
    /// What is watched.
    pub scope: Scope,
    /// What happened since.
    pub counters: Counters,
}

/// A tracker that serves others. Its files are gone when it is dropped.
#[derive(Debug)]
pub struct Serving {
    tracker: Tracker,
    root: OwnedFd,
    listener: UnixListener,
    socket: PathBuf,
    since: Instant,
    _lock: Lock,
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.socket);
    }
}

impl Serving {
    /// Begins to track a process and its descendants, for everybody of root.
    ///
    /// # Errors
    /// [`ObserveError::Tracked`] if another tracker does; those of [`Tracker::start`]; those of /run/standstill.
    pub fn start(root: i32, scope: Scope) -> Result<Self> {
        Self::start_in(Path::new(run_dir::PATH), root, scope)
    }

    pub(in crate::observe) fn start_in(directory: &Path, root: i32, scope: Scope) -> Result<Self> {
        let pidfd = match sys::pidfd_open(root) {
            Err(e) if proc::is_gone(&e) || e.raw_os_error() == Some(libc::EINVAL) => {
                return Err(ObserveError::NoProcess(root));
            }
            other => other.map_err(ObserveError::io(format!("open a pidfd of process {root}")))?,
        };
        run_dir::make(directory).map_err(ObserveError::io(format!("make {}", directory.display())))?;
        let lock = Lock::take(directory, root)?;
        let socket = socket(directory, root);
        let tracker = Tracker::start(root, scope)?;
        // Whoever left a socket there is dead: we have the lock.
        let listen = || {
            let listener = run_dir::listen(&socket)?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        let listener = listen().map_err(ObserveError::io(format!("listen on {}", socket.display())))?;
        // Reading the kernel's types took tens of MiB that are not needed again.
        trim();
        Ok(Self { tracker, root: pidfd, listener, socket, since: Instant::now(), _lock: lock })
    }

    /// Serves until the root of the tree ends or `stop` becomes readable.
    ///
    /// # Errors
    /// When the programs or their maps fail.
    pub fn run(&mut self, stop: BorrowedFd<'_>) -> Result<()> {
        let mut next_reading = Instant::now();
        loop {
            let wait = next_reading.saturating_duration_since(Instant::now());
            let mut fds = vec![
                PollFd::new(stop, PollFlags::POLLIN),
                PollFd::new(self.root.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
            ];
            let mut timeout = PollTimeout::NONE;
            if wait.is_zero() {
                fds.push(PollFd::new(self.tracker.as_fd(), PollFlags::POLLIN));
            } else {
                timeout = PollTimeout::try_from(wait + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            }
            match poll(&mut fds, timeout) {
                Err(nix::errno::Errno::EINTR) => continue,
                other => other.map_err(|e| ObserveError::io("poll")(e.into()))?,
            };
            let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
            if ready[0] || ready[1] {
                info!(root = self.tracker.root(), ended = ready[1], "tracking ends");
                return Ok(());
            }
            if ready[2]
                && let Ok((client, _)) = self.listener.accept()
                && let Err(e) = self.serve(&client)
            {
                debug!("a client got no answer: {e}");
            }
            if ready.get(3) == Some(&true) {
                let begin = Instant::now();
                self.tracker.refresh()?;
                next_reading = Instant::now() + (begin.elapsed() * READING_SHARE).max(LEAST_PAUSE);
            }
        }
    }

    fn serve(&mut self, client: &UnixStream) -> io::Result<()> {
        let peer = getsockopt(client, PeerCredentials)?;
        if peer.uid() != 0 && peer.uid() != geteuid().as_raw() {
            warn!(pid = peer.pid(), uid = peer.uid(), "refused a client");
            return Ok(());
        }
        client.set_nonblocking(false)?;
        client.set_read_timeout(Some(PATIENCE))?;
        client.set_write_timeout(Some(PATIENCE))?;
        let mut wish = String::new();
        BufReader::new(client.take(64)).read_line(&mut wish)?;
        match wish.trim_end() {
            "status" => {
                let status = self.status().map_err(io::Error::other)?;
                let mut line = serde_json::to_string(&status).map_err(io::Error::other)?;
                line.push('\n');
                (&mut &*client).write_all(line.as_bytes())
            }
            "lease" => {
                self.tracker.refresh().map_err(io::Error::other)?;
                lease::grant(&self.tracker, client)?;
                // Until the client is done, or dead.
                client.set_read_timeout(None)?;
                let _ = (&mut &*client).read(&mut [0]);
                trim();
                self.tracker.iterators.learn_tree().map_err(io::Error::other)
            }
            other => {
                debug!("a client wants {other:?}");
                Ok(())
            }
        }
    }

    fn status(&self) -> Result<Status> {
        Ok(Status {
            root: self.tracker.root(),
            tracker: std::process::id() as i32,
            processes: self.tracker.programs.maps.pids()?.len(),
            seconds: self.since.elapsed().as_secs(),
            scope: self.tracker.scope(),
            counters: self.tracker.counters()?,
        })
    }
}

/// Gives memory that is free back to the kernel.
fn trim() {
    // SAFETY: malloc_trim takes no memory and may be called at any time.
    unsafe { libc::malloc_trim(0) };
}

/// The place of the tree's only tracker, held as long as it lives; a dead tracker's is free.
#[derive(Debug)]
struct Lock {
    path: PathBuf,
    file: Flock<File>,
}

impl Drop for Lock {
    fn drop(&mut self) {
        // While it is still locked: it cannot be another's.
        let _ = fs::remove_file(&self.path);
    }
}

impl Lock {
    fn take(directory: &Path, root: i32) -> Result<Self> {
        let path = directory.join(format!("track-{root}.lock"));
        let failed = || ObserveError::io(format!("lock {}", path.display()));
        loop {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)
                .map_err(failed())?;
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(file) => {
                    let mine = file.metadata().map_err(failed())?.ino();
                    // The last tracker may have removed the file between the two calls.
                    if fs::metadata(&path).is_ok_and(|there| there.ino() == mine) {
                        let mut lock = Self { path, file };
                        let pid = std::process::id().to_string();
                        let written = lock.file.set_len(0).and_then(|()| lock.file.write_all(pid.as_bytes()));
                        written.map_err(ObserveError::io(format!("write to {}", lock.path.display())))?;
                        return Ok(lock);
                    }
                }
                Err((mut file, nix::errno::Errno::EWOULDBLOCK)) => {
                    let mut pid = String::new();
                    let _ = file.read_to_string(&mut pid);
                    return Err(ObserveError::Tracked { root, tracker: pid.trim().parse().unwrap_or(0) });
                }
                Err((_, e)) => return Err(failed()(e.into())),
            }
        }
    }
}
