//! Who goes on tracking the writes of a tree between two dumps: a small process that holds the userfaultfds and what is
//! known of the memory, on `/run/standstill/writes-PID.sock` for root only. The next dump takes both, or only looks.

use super::{chain::Chain, trackings::Trackings, turn::Turn};
use crate::{
    error::{Context, Error, Result},
    kernel::{letter, sys},
    memory::{known::Known, tracking::Tracking},
    observe::run_dir,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};
use std::{
    fs, io,
    io::{Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    time::Duration,
};
use tracing::debug;

/// A client that takes longer is dropped.
const PATIENCE: Duration = Duration::from_secs(10);
/// What a client answers that goes on with the tracking itself.
const TAKEN: u8 = 1;

/// What is known of the tree.
#[derive(Serialize, Deserialize)]
struct Knowledge {
    /// Both sides must be of one version: this is not a format for others.
    version: String,
    chain: Chain,
    looked: Option<Duration>,
    /// Pids and their pages, in the order of the userfaultfds.
    processes: Vec<(i32, Known)>,
}

/// The tracked writes of a tree, of which [`Self::run`] takes care until somebody takes them. Tracking ends when this is
/// dropped.
#[derive(Debug)]
pub struct Keeper {
    root: OwnedFd,
    listener: UnixListener,
    socket: PathBuf,
    knowledge: Vec<u8>,
    trackings: Trackings,
    _turn: Option<Turn>,
}

fn socket(root: i32) -> PathBuf {
    Path::new(run_dir::PATH).join(format!("writes-{root}.sock"))
}

/// Whether the writes of a tree are tracked for its next image. Other dumps copy nothing before the freeze then.
pub(crate) fn is_kept(root: i32) -> bool {
    socket(root).exists()
}

impl Keeper {
    /// Prepares to keep what a session knows.
    pub(super) fn new(
        root: i32,
        trackings: Trackings,
        chain: Chain,
        looked: Option<Duration>,
        turn: Option<Turn>,
    ) -> Result<Self> {
        let processes = trackings.iter().map(|(pid, tracking)| (pid, tracking.known.clone())).collect();
        let knowledge = Knowledge { version: env!("CARGO_PKG_VERSION").into(), chain, looked, processes };
        let knowledge = postcard::to_stdvec(&knowledge).map_err(io::Error::other).context(|| "encode".into())?;
        let socket = socket(root);
        // Whoever has a socket there is dead, or was told to end.
        let listen = || run_dir::make(Path::new(run_dir::PATH)).and_then(|()| run_dir::listen(&socket));
        let listener = listen().context(|| format!("listen on {}", socket.display()))?;
        let root = sys::pidfd_open(root).context(|| format!("open a pidfd of process {root}"))?;
        Ok(Self { root, listener, socket, knowledge, trackings, _turn: turn })
    }

    /// Keeps it all until the root of the tree ends or somebody takes it.
    ///
    /// # Errors
    /// When poll(2) fails.
    pub fn run(self) -> Result<()> {
        loop {
            let mut fds = [
                PollFd::new(self.root.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Err(nix::errno::Errno::EINTR) => continue,
                other => other.context(|| "poll".into())?,
            };
            if fds[0].any().unwrap_or(true) {
                let _ = fs::remove_file(&self.socket);
                return Ok(());
            }
            match self.listener.accept().and_then(|(client, _)| self.tell(&client)) {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(e) => debug!("a client got no answer: {e}"),
            }
        }
    }

    /// Tells all that is known; whether the client goes on from there.
    fn tell(&self, client: &UnixStream) -> io::Result<bool> {
        client.set_read_timeout(Some(PATIENCE))?;
        client.set_write_timeout(Some(PATIENCE))?;
        let fds: Vec<BorrowedFd<'_>> = self.trackings.iter().map(|(_, tracking)| tracking.as_fd()).collect();
        letter::send(client, &self.knowledge, &fds)?;
        let mut answer = [0];
        let taken = (&mut &*client).read(&mut answer)? == 1 && answer == [TAKEN];
        if taken {
            // Before the client hears of our end: it may soon listen there itself.
            fs::remove_file(&self.socket)?;
        }
        Ok(taken)
    }
}

/// What a keeper has told, while it waits for an answer.
pub(super) struct Told {
    pub trackings: Trackings,
    pub chain: Chain,
    pub looked: Option<Duration>,
    keeper: UnixStream,
}

impl Told {
    /// Asks the keeper of a tree; `None`: it has none.
    pub(super) fn ask(root: i32) -> Result<Option<Self>> {
        let path = socket(root);
        let failed = || format!("ask {} for tracked writes", path.display());
        let keeper = match UnixStream::connect(&path) {
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                return Ok(None);
            }
            other => other.context(failed)?,
        };
        keeper.set_read_timeout(Some(PATIENCE)).context(failed)?;
        let (bytes, fds) = letter::receive(&keeper).context(failed)?;
        let knowledge: Option<Knowledge> = postcard::from_bytes(&bytes).ok();
        let Some(knowledge) =
            knowledge.filter(|k| k.version == env!("CARGO_PKG_VERSION") && k.processes.len() == fds.len())
        else {
            let reason = "it is of another version of standstill: end that process".to_string();
            return Err(Error::File { path, reason });
        };
        let trackings = knowledge.processes.into_iter().zip(fds);
        let trackings = trackings.map(|((pid, known), fd)| (pid, Tracking::again(fd, known))).collect();
        Ok(Some(Self { trackings, chain: knowledge.chain, looked: knowledge.looked, keeper }))
    }

    /// Goes on with the tracking: the keeper ends.
    pub(super) fn take(mut self) -> Result<(Trackings, Chain, Option<Duration>)> {
        self.keeper.write_all(&[TAKEN]).context(|| "take over tracked writes".into())?;
        // Its socket is gone when it closes the connection.
        let _ = self.keeper.read(&mut [0]);
        Ok((self.trackings, self.chain, self.looked))
    }

    /// Looks only: nothing that the keeper knows changes.
    pub(super) fn look(mut self) -> Trackings {
        self.trackings.forget();
        self.trackings
    }
}
