//! Whose turn it is to track the writes of a tree. The kernel lets one userfaultfd at a time protect a mapping, so whoever
//! only watches gives way to whoever makes an image.
//!
//! Each root has two bytes in `/run/standstill/writes.lock`, locked as fcntl(2) describes (F_OFD_SETLK). The first one is
//! shared by those who make images, as long as they do or track for the next one; a watcher has it to itself while it
//! begins to track. The second one is the watcher's. It listens on `/run/standstill/dirty-PID.sock`: whoever connects there
//! waits until the watcher has ended its tracking and closes the connection.

use crate::{
    error::{Error, Result},
    observe::run_dir,
};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
};
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read},
    os::unix::{
        fs::OpenOptionsExt,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use tracing::debug;

/// A watcher that takes longer to give way is an error.
const PATIENCE: Duration = Duration::from_secs(10);

fn socket(root: i32) -> PathBuf {
    Path::new(run_dir::PATH).join(format!("dirty-{root}.sock"))
}

fn range(byte: i64, kind: i32) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: byte, l_len: 1, l_pid: 0 }
}

/// Locks or unlocks a byte; false if somebody else has locked it.
fn lock(file: &File, byte: i64, kind: i32) -> io::Result<bool> {
    match fcntl(file, FcntlArg::F_OFD_SETLK(&range(byte, kind))) {
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        other => other.map(|_| true).map_err(Into::into),
    }
}

fn open() -> io::Result<File> {
    run_dir::make(Path::new(run_dir::PATH))?;
    let path = Path::new(run_dir::PATH).join("writes.lock");
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

fn of_images(root: i32) -> i64 {
    2 * i64::from(root)
}

fn of_watcher(root: i32) -> i64 {
    of_images(root) + 1
}

/// Whether somebody makes images of a tree, or tracks its writes for the next one.
pub(crate) fn is_taken(root: i32) -> bool {
    let mut range = range(of_images(root), libc::F_WRLCK);
    let asked = open().and_then(|file| Ok(fcntl(&file, FcntlArg::F_OFD_GETLK(&mut range))?));
    asked.is_ok() && i32::from(range.l_type) != libc::F_UNLCK
}

/// The turn of one who makes images, until this is dropped.
#[derive(Debug)]
pub(crate) struct Turn {
    _lock: Option<File>,
}

impl Turn {
    /// Takes it, from a watcher if need be.
    ///
    /// # Errors
    /// The watcher does not give way.
    pub(crate) fn take(root: i32) -> Result<Self> {
        let failed = |e: io::Error| Error::File {
            path: socket(root),
            reason: format!("a `standstill watch --dirty` tracks process {root} and does not give way: end it ({e})"),
        };
        let lock = match open() {
            Ok(file) => file,
            Err(e) => {
                // Then there is no watcher either.
                debug!("no turn to take: {e}");
                return Ok(Self { _lock: None });
            }
        };
        let limit = Instant::now() + PATIENCE;
        while !self::lock(&lock, of_images(root), libc::F_RDLCK).map_err(failed)? {
            if Instant::now() > limit {
                return Err(failed(io::ErrorKind::TimedOut.into()));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        match UnixStream::connect(socket(root)) {
            Ok(mut watcher) => {
                watcher.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
                watcher.read(&mut [0]).map_err(failed)?;
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {}
            Err(e) => return Err(failed(e)),
        }
        Ok(Self { _lock: Some(lock) })
    }
}

/// The only watcher of a tree.
#[derive(Debug)]
pub(crate) struct Watcher {
    root: i32,
    lock: File,
}

impl Watcher {
    /// Becomes it, and listens for those who want to track; `None`: somebody else is, or images are made.
    pub(crate) fn new(root: i32) -> io::Result<Option<(Self, UnixListener)>> {
        let watcher = Self { root, lock: open()? };
        if !lock(&watcher.lock, of_watcher(root), libc::F_WRLCK)? {
            return Ok(None);
        }
        // Whoever left a socket there is dead: the lock is ours.
        let listener = watcher.alone(|| run_dir::listen(&socket(root)))?.transpose()?;
        Ok(listener.map(|listener| (watcher, listener)))
    }

    /// Does what must not meet the making of an image; `None`: one is being made.
    pub(crate) fn alone<T>(&self, what: impl FnOnce() -> T) -> io::Result<Option<T>> {
        if !lock(&self.lock, of_images(self.root), libc::F_WRLCK)? {
            return Ok(None);
        }
        let done = what();
        lock(&self.lock, of_images(self.root), libc::F_UNLCK)?;
        Ok(Some(done))
    }

    /// Nobody needs to connect any more.
    pub(crate) fn stop_listening(root: i32) {
        let _ = fs::remove_file(socket(root));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        sync::atomic::{AtomicBool, Ordering},
        thread,
    };

    /// PID_MAX_LIMIT is 4 Mi: nobody has these.
    const ROOT: i32 = 5_100_000;

    #[test]
    fn a_watcher_gives_way() {
        let (watcher, listener) = Watcher::new(ROOT).unwrap().expect("nobody else");
        assert!(Watcher::new(ROOT).unwrap().is_none(), "one at a time");
        let ended = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                let (client, _) = listener.accept().unwrap();
                thread::sleep(Duration::from_millis(50));
                Watcher::stop_listening(ROOT);
                ended.store(true, Ordering::SeqCst);
                drop(client);
            });
            let turn = Turn::take(ROOT).unwrap();
            assert!(ended.load(Ordering::SeqCst), "it waits");
            assert_eq!(watcher.alone(|| 1).unwrap(), None);
            // Several can make images.
            drop(Turn::take(ROOT).unwrap());
            drop(turn);
            assert_eq!(watcher.alone(|| 1).unwrap(), Some(1));
        });
        drop(watcher);
        assert!(!is_taken(ROOT));
        let turn = Turn::take(ROOT).unwrap();
        assert!(is_taken(ROOT));
        assert!(Watcher::new(ROOT).unwrap().is_none(), "while images are made");
        drop(turn);
    }

    #[test]
    fn what_a_dead_watcher_left_is_no_hindrance() {
        let root = ROOT + 1;
        drop(Watcher::new(root).unwrap().expect("nobody else"));
        assert!(socket(root).exists());
        drop(Turn::take(root).unwrap());
        drop(Watcher::new(root).unwrap().expect("nobody else"));
        Watcher::stop_listening(root);
    }
}
