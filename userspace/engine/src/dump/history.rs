//! What the last dumps on this machine took, in a small file under `/run/standstill`: gone after a reboot, and no loss.

use super::Frozen;
use crate::observe::run_dir;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use standstill_images::types::{DumpCounts, DumpStats};
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};
use tracing::debug;

const NAME: &str = "dumps.json";
/// So many are kept.
const KEPT: usize = 32;
/// A file that is larger is not ours.
const LARGEST: u64 = 1 << 20;

/// How much there is of what costs something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Amounts {
    pub counts: DumpCounts,
    /// Private pages that are looked for.
    pub scanned: u64,
    /// It is looked which of them have changed since they were copied.
    pub tracked: bool,
    /// Pages that are read.
    pub copied: u64,
    /// Those of them that belong to shared memory.
    pub shared: u64,
}

/// What a dump on this machine took.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Observed {
    /// Root of the tree.
    pub root: i32,
    /// Who read: the costs of one reader say nothing of another.
    pub reader: String,
    pub amounts: Amounts,
    /// Microseconds by phase, with the names that the dump gives them.
    pub phases: Vec<(String, u64)>,
}

impl Observed {
    fn new(root: i32, stats: &DumpStats, done: &Frozen) -> Self {
        let amounts = Amounts {
            counts: stats.counts,
            scanned: done.scanned,
            tracked: done.tracked,
            copied: done.stored + done.zero,
            shared: 0,
        };
        let mut phases = vec![("freezing".to_owned(), stats.freezing_us)];
        phases.extend(stats.phases.iter().cloned());
        Self { root, reader: stats.reader.clone(), amounts, phases }
    }
}

/// The file's content. Other versions are left out: what they measured under the same names may be something else.
#[derive(Serialize, Deserialize)]
struct Content {
    version: String,
    dumps: Vec<Observed>,
}

fn version() -> String {
    env!("CARGO_PKG_VERSION").into()
}

/// The last dumps, the oldest first; none if there is no such file, or one that makes no sense.
pub(crate) fn load() -> Vec<Observed> {
    read(&Path::new(run_dir::PATH).join(NAME))
}

/// Notes what a dump took, for the predictions to come. That it cannot be noted is no reason to complain.
pub(super) fn remember(root: i32, stats: &DumpStats, done: &Frozen) {
    if let Err(e) = append(Path::new(run_dir::PATH), Observed::new(root, stats, done)) {
        debug!("the dump's times are not kept: {e}");
    }
}

fn read(path: &Path) -> Vec<Observed> {
    let text = || -> io::Result<Vec<u8>> {
        let mut text = Vec::new();
        File::open(path)?.take(LARGEST).read_to_end(&mut text)?;
        Ok(text)
    };
    let content = text().ok().and_then(|text| serde_json::from_slice::<Content>(&text).ok());
    content.filter(|c| c.version == version()).map_or_else(Vec::new, |c| c.dumps)
}

fn append(directory: &Path, dump: Observed) -> io::Result<()> {
    run_dir::make(directory)?;
    let file = |name: &str| directory.join(name);
    let create = |path: PathBuf| OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(path);
    // Two dumps may end at once. The lock is on a file of its own, because the other is replaced.
    let lock = create(file("dumps.lock"))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, e)| io::Error::from(e))?;
    let mut dumps = read(&file(NAME));
    dumps.push(dump);
    dumps.drain(..dumps.len().saturating_sub(KEPT));
    let partial = file("dumps.json.partial");
    create(partial.clone())?.write_all(&serde_json::to_vec(&Content { version: version(), dumps })?)?;
    fs::rename(partial, file(NAME))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{
        fs::DirBuilder,
        os::unix::fs::{DirBuilderExt, MetadataExt},
    };

    fn dump(root: i32) -> Observed {
        Observed { root, reader: "ebpf".into(), phases: vec![("pages".into(), 7)], ..Default::default() }
    }

    fn setup() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let inside = dir.path().join("standstill");
        (dir, inside)
    }

    #[test]
    fn the_last_dumps_are_kept() {
        let (_dir, inside) = setup();
        (0..KEPT as i32 + 5).for_each(|n| append(&inside, dump(n)).unwrap());
        let kept = read(&inside.join(NAME));
        assert_eq!((kept.len(), kept[0].root, kept.last().unwrap()), (KEPT, 5, &dump(KEPT as i32 + 4)));
        assert_eq!(fs::metadata(&inside).unwrap().mode() & 0o777, 0o700);
        assert_eq!(fs::metadata(inside.join(NAME)).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_directory_that_others_can_write_to_is_not_used() {
        let (_dir, inside) = setup();
        DirBuilder::new().mode(0o777).create(&inside).unwrap();
        fs::set_permissions(&inside, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        assert!(append(&inside, dump(1)).is_err());
        fs::remove_dir(&inside).unwrap();
        std::os::unix::fs::symlink("/tmp", &inside).unwrap();
        assert!(append(&inside, dump(1)).is_err());
    }

    #[test]
    fn another_version_says_nothing() {
        let (_dir, inside) = setup();
        append(&inside, dump(1)).unwrap();
        let path = inside.join(NAME);
        let text = fs::read_to_string(&path).unwrap().replace(&version(), "99.0.0");
        fs::write(&path, text).unwrap();
        assert_eq!(read(&path), []);
        append(&inside, dump(2)).unwrap();
        assert_eq!(read(&path), [dump(2)]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn damage_is_no_harm(at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<bool>()) {
            let (_dir, inside) = setup();
            append(&inside, dump(1)).unwrap();
            let path = inside.join(NAME);
            let mut bytes = fs::read(&path).unwrap();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            bytes.truncate(if cut { at } else { bytes.len() });
            fs::write(&path, bytes).unwrap();
            read(&path);
            append(&inside, dump(3)).unwrap();
            let read = read(&path);
            prop_assert_eq!(read.last(), Some(&dump(3)));
        }
    }
}
