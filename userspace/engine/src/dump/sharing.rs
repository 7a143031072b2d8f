//! Shared memory of a tree, tracked once for each object.
//!
//! The page tables of the tree tell which pages were written to, as for private memory (`memory/shared.rs`). That is a
//! proof only as long as nobody else can write to the object, which every look makes sure of:
//!
//! - It is memory without a name in any file system (MAP_SHARED|MAP_ANONYMOUS, memfd), and all references to it, as the
//!   kernel counts them, are mappings in processes of the tree: no descriptor, no mapping elsewhere.
//! - None of these processes has forked or mapped memory a second time since the last look, as an eBPF program tells. A
//!   mapping that came and went would have taken its page table with it.
//! - Nobody has opened it through procfs, as inotify tells.
//!
//! When anything of this fails, all of the object is copied under the freeze. The same memory with descriptors cannot be
//! tracked, because write(2) and fallocate(2) leave no trace that a store to a mapping would not leave, too.

use crate::{
    error::{Error, Result},
    kernel::{pagemap::Range, proc, sys},
    memory::{
        known::Known,
        shared::{Object, Place},
        tracking::Tracking,
    },
    observe::{Aliases, Iterators, ObserveError, SharedMapping, Space},
};
use nix::{
    errno::Errno,
    sys::{
        inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor},
        memfd::{MFdFlags, memfd_create},
    },
};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::{File, OpenOptions},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    time::Duration,
};
use tracing::{debug, info};

/// Device and inode of an object.
pub(super) type Key = (u64, u64);

/// Parts of objects that are known and have not changed; objects that are not there cannot be tracked.
pub(super) type Unchanged = HashMap<Key, Vec<Range>>;

/// The shared memory of a tree.
#[derive(Debug, Default)]
pub(super) struct Sharing {
    objects: BTreeMap<Key, Seen>,
    witnesses: Option<Witnesses>,
    /// There is something that keeps us from tracking any.
    unable: bool,
}

/// An object that was found in the tree.
#[derive(Debug)]
struct Seen {
    object: Object,
    /// Who opens it.
    opened: WatchDescriptor,
    /// Why it could not be tracked the last time.
    doubt: Option<&'static str>,
}

/// Who sees what page tables do not tell.
#[derive(Debug)]
struct Witnesses {
    /// Second mappings.
    aliases: Aliases,
    /// Opened objects.
    opens: Inotify,
}

impl Sharing {
    /// What is known of all objects.
    pub(super) fn known(&self) -> impl Iterator<Item = &Known> {
        self.objects.values().map(|seen| &seen.object.known)
    }

    /// The same, to change it.
    pub(super) fn known_mut(&mut self) -> impl Iterator<Item = &mut Known> {
        self.objects.values_mut().map(|seen| &mut seen.object.known)
    }

    /// All objects that were found.
    pub(super) fn objects(&self) -> impl Iterator<Item = (Key, &Object)> {
        self.objects.iter().map(|(key, seen)| (*key, &seen.object))
    }

    /// One of them.
    pub(super) fn object_mut(&mut self, key: Key) -> Option<&mut Object> {
        self.objects.get_mut(&key).map(|seen| &mut seen.object)
    }

    /// What of the shared memory of the processes has not changed since the last look. `tracking`: that of each process.
    /// `protect`: further writes are tracked.
    pub(super) fn look<'a>(
        &mut self,
        pids: &[i32],
        iterators: &mut Iterators,
        tracking: &impl Fn(i32) -> Option<&'a Tracking>,
        protect: bool,
        threads: usize,
    ) -> Unchanged {
        if self.unable {
            return Unchanged::new();
        }
        let found = self.attempt(pids, iterators, tracking, protect, threads).unwrap_or_else(|e| {
            info!("shared memory is not tracked: {e}; all of it is copied under the freeze");
            // What is missing now will be missing later.
            self.unable = self.witnesses.is_none();
            Unchanged::new()
        });
        // What is no proof today is not one tomorrow.
        for (_, seen) in self.objects.iter_mut().filter(|(key, _)| !found.contains_key(key)) {
            seen.object.known = Known::default();
        }
        found
    }

    fn attempt<'a>(
        &mut self,
        pids: &[i32],
        iterators: &mut Iterators,
        tracking: &impl Fn(i32) -> Option<&'a Tracking>,
        protect: bool,
        threads: usize,
    ) -> Result<Unchanged> {
        let failed = |e: &ObserveError| super::no_reader(e);
        let dev = device()?;
        if self.witnesses.is_none() {
            if iterators.shared_mappings(pids, dev).map_err(|e| failed(&e))?.is_empty() {
                return Ok(Unchanged::new());
            }
            self.witnesses = Some(Witnesses::new()?);
        }
        let Some(witnesses) = &mut self.witnesses else { return Ok(Unchanged::new()) };
        witnesses.aliases.watch(iterators, pids).map_err(|e| failed(&e))?;
        let begin = sys::monotonic();
        let mut mappings = witnesses.mappings(iterators, pids, dev).map_err(|e| failed(&e))?;
        if let Some(found) = &mappings
            && self.meet(found, dev)
        {
            // Our own descriptors count, too.
            let Some(witnesses) = &self.witnesses else { return Ok(Unchanged::new()) };
            mappings = witnesses.mappings(iterators, pids, dev).map_err(|e| failed(&e))?;
        }
        let (Some(witnesses), Some(mappings)) = (&self.witnesses, mappings) else { return Ok(Unchanged::new()) };
        let opened = witnesses.opened();
        let mut unchanged = Unchanged::new();
        for (key, seen) in &mut self.objects {
            let places: Vec<&SharedMapping> = mappings.iter().filter(|m| m.ino == key.1).collect();
            // Before the page tables are looked at: what comes later is seen by the next look.
            let disturbed = match &opened {
                Some(opened) => opened.contains(&seen.opened),
                None => true,
            } || witnesses.aliased(&seen.object, &places).map_err(|e| failed(&e))?;
            if disturbed {
                seen.object.known = Known::default();
            }
            let doubt = witnesses.doubt(&places, tracking).map_err(|e| failed(&e))?;
            if let Some(why) = doubt {
                if seen.doubt != doubt {
                    info!(ino = key.1, "shared memory is copied under the freeze: {why}");
                }
                seen.doubt = doubt;
                continue;
            }
            seen.doubt = None;
            let places = places.into_iter().map(place).collect();
            match seen.object.unchanged(places, tracking, protect, threads) {
                Ok(found) => {
                    seen.object.looked = begin;
                    unchanged.insert(*key, found);
                }
                Err(e) => debug!(ino = key.1, "writes to shared memory cannot be tracked: {e}"),
            }
        }
        Ok(unchanged)
    }

    /// Forgets the objects that are mapped no more, and gets to know new ones; whether there were any.
    fn meet(&mut self, mappings: &[SharedMapping], dev: u64) -> bool {
        let there: HashSet<Key> = mappings.iter().map(|m| (dev, m.ino)).collect();
        let Some(witnesses) = &self.witnesses else { return false };
        self.objects.retain(|key, seen| {
            let kept = there.contains(key);
            if !kept {
                let _ = witnesses.opens.rm_watch(seen.opened);
            }
            kept
        });
        let before = self.objects.len();
        for mapping in mappings {
            let key = (dev, mapping.ino);
            if let std::collections::btree_map::Entry::Vacant(vacant) = self.objects.entry(key) {
                match witnesses.see(mapping, key) {
                    Ok(seen) => _ = vacant.insert(seen),
                    Err(e) => debug!(ino = key.1, "shared memory cannot be opened: {e}"),
                }
            }
        }
        self.objects.len() > before
    }
}

impl Witnesses {
    fn new() -> Result<Self> {
        let opens = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK);
        let opens = opens.map_err(|e| Error::System { call: "inotify_init".into(), source: e.into() })?;
        Ok(Self { aliases: Aliases::load().map_err(|e| super::no_reader(&e))?, opens })
    }

    /// Opens an object.
    fn see(&self, mapping: &SharedMapping, key: Key) -> io::Result<Seen> {
        let link = proc::path(mapping.pid, &format!("map_files/{:x}-{:x}", mapping.start, mapping.end));
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NOATIME).open(link)?;
        let meta = file.metadata()?;
        if (meta.dev(), meta.ino()) != key {
            return Err(io::ErrorKind::NotFound.into());
        }
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let opened = self.opens.add_watch(path.as_str(), AddWatchFlags::IN_OPEN)?;
        Ok(Seen { object: Object::new(file.into(), meta.len())?, opened, doubt: None })
    }

    /// Objects that were opened since this was last asked; `None`: nobody knows.
    fn opened(&self) -> Option<HashSet<WatchDescriptor>> {
        let mut opened = HashSet::new();
        loop {
            match self.opens.read_events() {
                Ok(events) if events.iter().any(|e| e.mask.contains(AddWatchFlags::IN_Q_OVERFLOW)) => return None,
                Ok(events) => opened.extend(events.into_iter().map(|e| e.wd)),
                Err(Errno::EAGAIN) => return Some(opened),
                Err(_) => return None,
            }
        }
    }

    /// Shared memory that the processes map, all at one moment; `None`: they change their mappings all the time.
    fn mappings(
        &self,
        iterators: &mut Iterators,
        pids: &[i32],
        dev: u64,
    ) -> std::result::Result<Option<Vec<SharedMapping>>, ObserveError> {
        const LOOKS: usize = 5;
        let changed = || -> std::result::Result<Vec<Option<Duration>>, ObserveError> {
            pids.iter().map(|pid| Ok(self.aliases.of(*pid)?.map(|space| space.changed))).collect()
        };
        let mut before = changed()?;
        for _ in 0..LOOKS {
            let found = iterators.shared_mappings(pids, dev)?;
            let after = changed()?;
            if after == before {
                return Ok(Some(found));
            }
            before = after;
        }
        Ok(None)
    }

    /// Whether there may have been other mappings of an object since the last look than those of then and of now.
    fn aliased(&self, object: &Object, now: &[&SharedMapping]) -> std::result::Result<bool, ObserveError> {
        for pid in object.places.iter().map(|place| place.pid).chain(now.iter().map(|m| m.pid)) {
            // A process that has ended, or runs another program, cannot be asked any more.
            if self.aliases.of(pid)?.is_none_or(|space| space.aliased >= object.looked) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Why somebody besides these mappings may write to an object, or writes through them cannot be tracked.
    fn doubt<'a>(
        &self,
        mappings: &[&SharedMapping],
        tracking: &impl Fn(i32) -> Option<&'a Tracking>,
    ) -> std::result::Result<Option<&'static str>, ObserveError> {
        let mut by_file: BTreeMap<u32, u64> = BTreeMap::new();
        for mapping in mappings {
            *by_file.entry(mapping.file).or_default() += 1;
            // Mappings of a space that two processes share would count twice.
            if self.aliases.of(mapping.pid)?.is_none_or(|Space { owner, .. }| owner != mapping.pid) {
                return Ok(Some("processes share their address space"));
            }
            if tracking(mapping.pid).is_none() {
                return Ok(Some("a process that maps it is not tracked"));
            }
        }
        // Each file refers to the name once, ours too.
        let files = by_file.len() as u64 + 1;
        if mappings.iter().any(|m| m.file_users != by_file[&m.file] || m.dentry_users != files) {
            return Ok(Some("it is used by a descriptor or a process outside the tree"));
        }
        Ok(None)
    }
}

fn place(mapping: &SharedMapping) -> Place {
    let range = Range { start: mapping.start, end: mapping.end };
    Place { pid: mapping.pid, range, offset: mapping.offset }
}

/// The device that memory without a name is on.
fn device() -> Result<u64> {
    let failed = |source| Error::System { call: "look for memory without a name".into(), source };
    let memfd = memfd_create(c"standstill", MFdFlags::MFD_CLOEXEC).map_err(|e| failed(e.into()))?;
    Ok(File::from(memfd).metadata().map_err(failed)?.dev())
}
