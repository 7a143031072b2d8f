//! A store of periodic checkpoints: a directory with an image for each, numbered. They share page stores by hard links, so
//! each is complete in itself, and one that is removed takes nothing with it that another needs.

use crate::{
    dump::{Afterwards, DumpOptions, Dumped, Observer, Session, Wanted, check_target},
    error::{Context, Error, Result},
    image::Image,
};
use nix::fcntl::{Flock, FlockArg};
use standstill_images::{
    ImageError,
    publish::{ImageDir, MANIFEST},
};
use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use tracing::debug;

/// Checkpoints that are made up for at most when one took longer than the interval.
const MISSED: u32 = 8;

/// Periodic checkpoints to make.
#[derive(Clone, Debug)]
pub struct SnapshotOptions {
    /// How each is made; `dir` is the store. The tree goes on in any case.
    pub dump: DumpOptions,
    /// Time from the beginning of one to that of the next.
    pub every: Duration,
    /// How many are kept; one at least.
    pub keep: usize,
    /// How many are made; `None`: until the tree ends.
    pub count: Option<u64>,
}

/// A checkpoint of a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its number.
    pub number: u64,
    /// Its directory.
    pub dir: PathBuf,
}

/// Which checkpoint of a store is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// The newest.
    Latest,
    /// The one with this number.
    Number(u64),
    /// The newest that was begun at this time, in seconds since the epoch, or before.
    Time(u64),
}

/// Checkpoints a tree again and again, and tells `done` of each.
///
/// # Errors
/// Those of [`dump`](crate::dump), after which the store has what it had before: [`Error::Died`] when the tree ends.
/// [`ImageError::Locked`] when another process writes to the store.
pub fn snapshot(options: &SnapshotOptions, mut done: impl FnMut(&Snapshot, &Dumped)) -> Result<()> {
    let store = &options.dump.dir;
    check_target(options.dump.pid)?;
    let _lock = lock(store)?;
    // A tracker that lends for so long could not track any more.
    let mut session = Session::open(&options.dump, Observer::own(options.dump.reader)?);
    session.resume()?;
    let first = list(store)?.last().map_or(1, |last| last.number + 1);
    let mut begin = Instant::now();
    for number in first..first.saturating_add(options.count.unwrap_or(u64::MAX)) {
        std::thread::sleep(begin.saturating_duration_since(Instant::now()));
        let snapshot = Snapshot { number, dir: store.join(format!("{number:06}")) };
        let wanted = Wanted { dir: &snapshot.dir, afterwards: Afterwards::Run, track: true, link: true };
        let dumped = session.checkpoint(ImageDir::create(&snapshot.dir)?, &wanted)?;
        done(&snapshot, &dumped);
        prune(store, options.keep.max(1))?;
        // One that takes longer than the interval is followed by the next at once, until a few that were missed are made up
        // for.
        let missed = Instant::now().checked_sub(options.every * MISSED);
        begin = (begin + options.every).max(missed.unwrap_or(begin));
    }
    Ok(())
}

/// The complete checkpoints of a store, the oldest first; none if there is no such directory.
///
/// # Errors
/// I/O errors.
pub fn list(store: &Path) -> Result<Vec<Snapshot>> {
    let entries = match fs::read_dir(store) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(ImageError::io(store))?,
    };
    let mut all = Vec::new();
    for entry in entries {
        let entry = entry.map_err(ImageError::io(store))?;
        if let Some(number) = entry.file_name().to_str().and_then(number)
            && entry.path().join(MANIFEST).exists()
        {
            all.push(Snapshot { number, dir: entry.path() });
        }
    }
    all.sort_unstable_by_key(|s| s.number);
    Ok(all)
}

/// Finds a checkpoint.
///
/// # Errors
/// There is none; I/O errors.
pub fn find(store: &Path, at: At) -> Result<Snapshot> {
    let mut all = list(store)?;
    let none = |reason: String| Error::ImageContent { dir: store.into(), reason };
    match at {
        At::Latest => all.pop().ok_or_else(|| none("there is no checkpoint in it".into())),
        At::Number(n) => {
            let found = all.into_iter().find(|s| s.number == n);
            found.ok_or_else(|| none(format!("there is no checkpoint {n} in it")))
        }
        At::Time(limit) => {
            for snapshot in all.into_iter().rev() {
                if Image::open(&snapshot.dir)?.inventory.created <= limit {
                    return Ok(snapshot);
                }
            }
            Err(none("all checkpoints in it are newer".into()))
        }
    }
}

/// The number that a name is.
fn number(name: &str) -> Option<u64> {
    (name.len() >= 6 && name.bytes().all(|b| b.is_ascii_digit())).then(|| name.parse().ok()).flatten()
}

/// Makes the store if there is none, and keeps others from writing to it.
fn lock(store: &Path) -> Result<Flock<File>> {
    match DirBuilder::new().mode(0o700).create(store) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        other => other.map_err(ImageError::io(store))?,
    }
    let dir = File::open(store).map_err(ImageError::io(store))?;
    match Flock::lock(dir, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => Err(ImageError::Locked(store.into()).into()),
        Err((_, e)) => Err(e).context(|| format!("lock {}", store.display())),
    }
}

/// Removes the oldest checkpoints, and what those left behind that did not become complete.
fn prune(store: &Path, keep: usize) -> Result<()> {
    let all = list(store)?;
    let kept = &all[all.len().saturating_sub(keep)..];
    for entry in fs::read_dir(store).map_err(ImageError::io(store))? {
        let dir = entry.map_err(ImageError::io(store))?.path();
        let Some(number) = dir.file_name().and_then(|n| n.to_str()).and_then(number) else { continue };
        if kept.iter().any(|s| s.number == number) {
            continue;
        }
        debug!(number, "checkpoint removed");
        remove(&dir).map_err(ImageError::io(&dir))?;
    }
    Ok(())
}

/// Removes an image, first of all that which makes it one.
fn remove(dir: &Path) -> io::Result<()> {
    match fs::remove_file(dir.join(MANIFEST)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        other => other?,
    }
    fs::remove_dir_all(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(numbers: &[u64], incomplete: u64) -> tempfile::TempDir {
        let store = tempfile::tempdir().unwrap();
        for number in numbers.iter().chain([&incomplete]) {
            let dir = store.path().join(format!("{number:06}"));
            fs::create_dir(&dir).unwrap();
            fs::write(dir.join("pages-0123456789abcdef.img"), "").unwrap();
            if *number != incomplete {
                fs::write(dir.join(MANIFEST), "").unwrap();
            }
        }
        fs::create_dir(store.path().join("mine")).unwrap();
        store
    }

    fn numbers(store: &Path) -> Vec<u64> {
        list(store).unwrap().into_iter().map(|s| s.number).collect()
    }

    #[test]
    fn the_newest_are_kept() {
        let store = store(&[3, 9, 10, 1_000_000], 8);
        prune(store.path(), 2).unwrap();
        assert_eq!(numbers(store.path()), [10, 1_000_000]);
        assert_eq!(fs::read_dir(store.path()).unwrap().count(), 3);
        assert_eq!(find(store.path(), At::Latest).unwrap().number, 1_000_000);
        assert_eq!(find(store.path(), At::Number(10)).unwrap().dir, store.path().join("000010"));
        assert!(find(store.path(), At::Number(9)).unwrap_err().to_string().contains("no checkpoint 9"));
    }

    #[test]
    fn a_store_has_one_writer() {
        let store = store(&[1], 2);
        let held = lock(store.path()).unwrap();
        assert!(matches!(lock(store.path()), Err(Error::Image(ImageError::Locked(_)))));
        drop(held);
        lock(store.path()).unwrap();
        assert_eq!(list(&store.path().join("none")).unwrap(), []);
    }
}
