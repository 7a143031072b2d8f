//! System V shared memory (shmget(2)) that the tree has attached.
//!
//! A segment is an object of the IPC namespace: it outlives the tree unless it was removed (IPC_RMID), and others can
//! attach it at any time. It comes back with its id, key, owner and mode. One that is still there after a dump that killed
//! the tree is used again, with the content of the image, provided that nobody has it attached.
//!
//! Restoring ids takes `/proc/sys/kernel/shm_next_id` (CONFIG_CHECKPOINT_RESTORE).

use crate::{
    error::{Context, Error, Result},
    kernel::shm::{self, Attached},
    restore::program::Program,
};
use nix::fcntl::{FallocateFlags, fallocate};
use standstill_images::types::{
    AddressSpace, Backing, SharedMemory, SharedMemoryId, SharedMemoryKind, SystemV, Task, Vma,
};
use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File, OpenOptions},
    io,
    os::fd::OwnedFd,
};

/// The segment that a mapped file without a name is: its inode number is the id, and its name contains the key.
pub(super) fn segment(name: &[u8], ino: u64, size: u64) -> Option<SystemV> {
    let key = u32::from_str_radix(std::str::from_utf8(name.strip_prefix(b"/SYSV")?).ok()?, 16).ok()?;
    let id = i32::try_from(ino).ok()?;
    let found = shm::status(id).ok().filter(|found| found.size == size)?;
    // One that was removed has lost its key.
    let removed = found.mode & shm::REMOVED != 0;
    (removed || found.key as u32 == key).then_some(SystemV {
        id,
        key: found.key,
        mode: found.mode,
        owner: found.owner,
        creator: found.creator,
    })
}

/// An object that is not attached as a whole: the first mapping begins it, others follow where one ends. Attaching is
/// the only way to such mappings, so nothing else can be restored.
pub(crate) fn attached_in_part(
    vmas: &[Vma],
    shared: &BTreeMap<SharedMemoryId, SharedMemory>,
) -> Option<SharedMemoryId> {
    // Object, address and offset of what has to come next.
    let mut rest: Option<(SharedMemoryId, u64, u64)> = None;
    for vma in vmas {
        let found = match vma.backing {
            Backing::SystemV { object, offset, .. } => Some((object, vma.start, offset)),
            _ => None,
        };
        match (rest.take(), found) {
            (None, None) => {}
            (None, Some((_, _, 0))) => {}
            (Some(wanted), Some(found)) if wanted == found => {}
            (Some((object, ..)), _) | (None, Some((object, ..))) => return Some(object),
        }
        if let Some((object, _, offset)) = found {
            let end = offset + (vma.end - vma.start);
            let whole = shared.get(&object).is_none_or(|o| end >= length(o));
            rest = (!whole).then_some((object, vma.end, end));
        }
    }
    rest.map(|(object, ..)| object)
}

/// Bytes that an attached object takes.
fn length(object: &SharedMemory) -> u64 {
    object.size.next_multiple_of(object.page_size)
}

/// Refuses what could not be restored: segments that others have attached, and those attached in part.
pub(crate) fn check(tasks: &[Task], spaces: &[AddressSpace], shared: &[SharedMemory]) -> Result<()> {
    let shared: BTreeMap<SharedMemoryId, SharedMemory> = shared
        .iter()
        .filter(|object| matches!(object.kind, SharedMemoryKind::SystemV(_)))
        .map(|object| (object.id, object.clone()))
        .collect();
    let refuse = |pid: i32, object: SharedMemoryId, remedy: &str| {
        let name = match shared.get(&object).map(|o| &o.kind) {
            Some(SharedMemoryKind::SystemV(segment)) => segment.id,
            _ => -1,
        };
        Err(Error::unsupported(pid, format!("System V shared memory {name}"), remedy))
    };
    let mut ours: HashMap<SharedMemoryId, (u64, i32)> = HashMap::new();
    for space in spaces {
        let lives_in = |task: &&Task| task.live.as_ref().is_some_and(|live| live.address_space == space.id);
        let pid = tasks.iter().find(lives_in).map_or(0, |task| task.pid);
        if let Some(object) = attached_in_part(&space.vmas, &shared) {
            return refuse(pid, object, "a part of it is unmapped: attach it as a whole");
        }
        for vma in &space.vmas {
            if let Backing::SystemV { object, .. } = vma.backing {
                ours.entry(object).or_insert((0, pid)).0 += 1;
            }
        }
    }
    for object in shared.values() {
        let SharedMemoryKind::SystemV(segment) = &object.kind else { continue };
        let now = shm::status(segment.id).context(|| format!("look at System V shared memory {}", segment.id))?;
        let (mappings, pid) = ours.get(&object.id).copied().unwrap_or_default();
        if now.attached > mappings {
            let remedy = "it is attached outside of the tree: dump all processes that have it, or detach it there";
            return refuse(pid, object.id, remedy);
        }
    }
    Ok(())
}

/// A segment in the restoring process. One that was made is removed again unless the restore succeeds.
#[derive(Debug)]
pub(crate) struct Segment {
    id: i32,
    /// Was not there before.
    new: bool,
    attached: Attached,
}

impl Drop for Segment {
    fn drop(&mut self) {
        if self.new {
            // Nothing can be done about a failure.
            let _ = shm::remove(self.id);
        }
    }
}

impl Segment {
    /// The restore has succeeded.
    pub(crate) fn keep(mut self) {
        self.new = false;
    }

    /// A descriptor of its content.
    pub(crate) fn open(&self, object: &SharedMemory) -> Result<OwnedFd> {
        let start = self.attached.start();
        let link = format!("/proc/self/map_files/{start:x}-{:x}", start + length(object));
        let open = || OpenOptions::new().read(true).write(true).open(&link);
        Ok(open().context(|| format!("open System V shared memory {}", self.id))?.into())
    }
}

/// Makes a segment, empty. One that is removed already is so at once, and lives as long as somebody has it attached.
pub(crate) fn make(segment: &SystemV, object: &SharedMemory) -> Result<Segment> {
    let id = segment.id;
    let context = || format!("make System V shared memory {id} (key {:#x})", segment.key);
    let taken = |why: &str| {
        let source = io::Error::new(io::ErrorKind::AlreadyExists, why.to_string());
        Err(Error::System { call: context(), source })
    };
    let new = match shm::status(id) {
        Ok(there) => {
            let same = (there.key, there.size, there.creator) == (segment.key, object.size, segment.creator);
            if !same || there.mode & shm::REMOVED != 0 {
                return taken("another segment has this id: remove it with ipcrm");
            }
            if there.attached > 0 {
                return taken("the segment is there and in use: end the processes that have it attached");
            }
            false
        }
        Err(_) => {
            fs::write("/proc/sys/kernel/shm_next_id", id.to_string()).context(context)?;
            let got = match shm::create(segment.key, object.size, segment.mode, object.page_size) {
                Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {
                    return taken("another segment has this key: remove it with ipcrm");
                }
                other => other.context(context)?,
            };
            if got != id {
                shm::remove(got).context(context)?;
                return taken("the kernel does not give this id: remove the segment that has its place with ipcrm");
            }
            true
        }
    };
    let attached = match Attached::new(id) {
        Err(e) if new => {
            shm::remove(id).context(context)?;
            return Err(e).context(context);
        }
        other => other.context(context)?,
    };
    let made = Segment { id, new, attached };
    shm::set(id, segment.owner, segment.mode).context(context)?;
    if segment.mode & shm::LOCKED != 0 {
        shm::lock(id).context(context)?;
    }
    if segment.mode & shm::REMOVED != 0 {
        shm::remove(id).context(context)?;
    }
    if !new {
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let file = File::from(made.open(object)?);
        fallocate(&file, hole, 0, length(object) as i64).context(context)?;
    }
    Ok(made)
}

/// Attaches the segment that begins with `vma`, if one does. Returns the protection that its mappings have then.
pub(crate) fn attach(vma: &Vma, segment: &SystemV, offset: u64, writable: bool, program: &mut Program) -> u8 {
    if offset == 0 {
        let flags = if writable { 0 } else { libc::SHM_RDONLY };
        let args = [segment.id.into(), vma.start.into(), flags.into()];
        program.call_expecting(format!("attach segment {:x}", vma.start), libc::SYS_shmat, &args, vma.start);
    }
    let prot = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
    prot as u8
}
