//! Memory with no name in the file system: memfd_create(2), deleted files, MAP_SHARED|MAP_ANONYMOUS.
//!
//! Their contents are part of the image. The restoring process makes each object once, fills it, and every task
//! inherits a descriptor of it, from which further ones are opened through procfs.

use super::{Collected, regular, system_v};
use crate::{
    error::{Context, Result},
    kernel::{PAGE, pagemap::Range, sys::Mapping},
    observe::FdEntry,
    restore::{files::Numbers, program::Program},
};
use nix::{
    fcntl::{FcntlArg, OFlag, SealFlag, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
    unistd::ftruncate,
};
use standstill_images::types::{Bytes, FileKind, OpenFile, OpenFileId, SharedMemory, SharedMemoryId, SharedMemoryKind};
use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    },
    path::Path,
};

const MEMFD_PREFIX: &[u8] = b"/memfd:";
const DELETED: &[u8] = b" (deleted)";

/// A descriptor of a deleted file or memfd.
pub(super) fn dump_deleted(entry: &FdEntry, all: &mut Collected) -> Result<FileKind> {
    let link = format!("/proc/{}/fd/{}", entry.tgid, entry.fd);
    let object = collect(&entry.path, Path::new(&link), entry.dev, entry.ino, all)?;
    Ok(FileKind::SharedMemory { object })
}

/// The object whose name is `name` and which the procfs link `link` opens.
pub(crate) fn collect(name: &Path, link: &Path, dev: u64, ino: u64, all: &mut Collected) -> Result<SharedMemoryId> {
    let known = all.known_sources.remove(&(dev, ino));
    all.shared_id(dev, ino, |id| {
        let context = || format!("open {} ({})", link.display(), name.display());
        let file = known.map_or_else(|| File::open(link).context(context), |fd| Ok(File::from(fd)))?;
        let meta = file.metadata().context(context)?;
        let bytes: Bytes = name.into();
        let name = bytes.0.strip_suffix(DELETED).unwrap_or(&bytes.0);
        let (mode, owner) = (meta.mode() & 0o7777, (meta.uid(), meta.gid()));
        let kind = if name == b"/dev/zero" {
            SharedMemoryKind::Anonymous
        } else if let Some(name) = name.strip_prefix(MEMFD_PREFIX) {
            let seals = fcntl(&file, FcntlArg::F_GET_SEALS).context(context)? as u32;
            SharedMemoryKind::Memfd { name: name.into(), seals, mode, owner }
        } else if let Some(segment) = system_v::segment(name, ino, meta.len()) {
            SharedMemoryKind::SystemV(segment)
        } else {
            SharedMemoryKind::DeletedFile { path: name.into(), mode, owner }
        };
        Ok((SharedMemory { id, size: meta.len(), kind, pages: Vec::new() }, file.into()))
    })
}

/// Ranges of a file that hold data, page aligned (lseek(2) SEEK_DATA).
pub(crate) fn data_ranges(file: &OwnedFd, size: u64) -> io::Result<Vec<Range>> {
    data_within(file, Range { start: 0, end: size.next_multiple_of(PAGE) })
}

/// The same of a part of it.
pub(crate) fn data_within(file: &OwnedFd, part: Range) -> io::Result<Vec<Range>> {
    use nix::{
        errno::Errno,
        unistd::{Whence, lseek},
    };
    let mut ranges = Vec::new();
    let mut at = part.start;
    while at < part.end {
        let start = match lseek(file, at as i64, Whence::SeekData) {
            Ok(offset) if (offset as u64) < part.end => offset as u64 / PAGE * PAGE,
            Ok(_) | Err(Errno::ENXIO) => break,
            Err(e) => return Err(e.into()),
        };
        let end = match lseek(file, start.max(at) as i64, Whence::SeekHole) {
            Ok(offset) => (offset as u64).max(start + 1).next_multiple_of(PAGE).min(part.end),
            // A running process has just thrown it away.
            Err(Errno::ENXIO) => break,
            Err(e) => return Err(e.into()),
        };
        ranges.push(Range { start, end });
        at = end;
    }
    Ok(ranges)
}

/// Makes the object, empty and of its size, in the restoring process. Returns a descriptor that reads and writes it.
pub(crate) fn make(object: &SharedMemory, segments: &mut Vec<system_v::Segment>) -> Result<OwnedFd> {
    match &object.kind {
        SharedMemoryKind::SystemV(segment) => {
            let made = system_v::make(segment, object)?;
            let fd = made.open(object)?;
            segments.push(made);
            Ok(fd)
        }
        SharedMemoryKind::Anonymous => {
            let context = || "make shared anonymous memory".to_string();
            let mapping = Mapping::shared(object.size.max(1).next_multiple_of(PAGE)).context(context)?;
            let link = format!(
                "/proc/self/map_files/{:x}-{:x}",
                mapping.start(),
                mapping.start() + object.size.next_multiple_of(PAGE)
            );
            let file = std::fs::OpenOptions::new().read(true).write(true).open(link).context(context)?;
            Ok(file.into())
        }
        SharedMemoryKind::Memfd { name, mode, owner, .. } => {
            let context = || format!("memfd_create {}", name.lossy());
            let c_name = std::ffi::CString::new(name.0.clone()).map_err(io::Error::other).context(context)?;
            let fd = memfd_create(c_name.as_c_str(), MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC)
                .context(context)?;
            ftruncate(&fd, object.size as i64).context(context)?;
            let file = File::from(fd.try_clone().context(context)?);
            file.set_permissions(PermissionsExt::from_mode(*mode)).context(context)?;
            std::os::unix::fs::fchown(&fd, Some(owner.0), Some(owner.1)).context(context)?;
            Ok(fd)
        }
        SharedMemoryKind::DeletedFile { path, mode, owner } => {
            let context = || format!("make the deleted file {} again", path.lossy());
            // Under its own name if that is free, so that procfs shows the same as before.
            let dir = path.as_path().parent().unwrap_or(Path::new("/"));
            let other = dir.join(format!(".standstill-{}-{}", std::process::id(), object.id));
            let create = |name: &Path| {
                std::fs::OpenOptions::new()
                    .read(true)
                    .write(true)
                    .create_new(true)
                    .mode(*mode)
                    .custom_flags(OFlag::O_NOFOLLOW.bits())
                    .open(name)
            };
            let (file, name) = match create(path.as_path()) {
                Ok(file) => (file, path.as_path().to_path_buf()),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => (create(&other).context(context)?, other),
                Err(e) => return Err(e).context(context),
            };
            std::fs::remove_file(&name).context(context)?;
            file.set_len(object.size).context(context)?;
            file.set_permissions(PermissionsExt::from_mode(*mode)).context(context)?;
            std::os::unix::fs::fchown(&file, Some(owner.0), Some(owner.1)).context(context)?;
            Ok(file.into())
        }
    }
}

/// Writes one run of pages; the last page of a file may reach beyond its end.
pub(crate) fn fill(fd: &OwnedFd, object: &SharedMemory, offset: u64, pages: &[u8]) -> io::Result<()> {
    let room = match object.kind {
        SharedMemoryKind::Anonymous => pages.len(),
        _ => pages.len().min(object.size.saturating_sub(offset) as usize),
    };
    File::from(fd.try_clone()?).write_all_at(&pages[..room], offset)
}

/// Seals a memfd as it was, once its content is complete.
pub(crate) fn seal(fd: &OwnedFd, object: &SharedMemory) -> Result<()> {
    if let SharedMemoryKind::Memfd { seals, name, .. } = &object.kind {
        let seals = SealFlag::from_bits_truncate(*seals as i32);
        fcntl(fd.as_fd(), FcntlArg::F_ADD_SEALS(seals)).context(|| format!("seal memfd {}", name.lossy()))?;
    }
    Ok(())
}

/// Opens the object once more, from the descriptor that every task inherits. `first`: nobody has it for reading and
/// writing yet; the inherited description itself serves, because a memfd reopened for writing cannot be executed.
pub(super) fn create(inherited: i32, first: bool, flags: u32, numbers: &mut Numbers, program: &mut Program) -> i32 {
    if first {
        let fd = numbers.lowest();
        program.call_expecting("duplicate the memfd", libc::SYS_dup, &[inherited.into()], fd);
        program.call("set file flags", libc::SYS_fcntl, &[fd.into(), libc::F_SETFL.into(), flags.into()]);
        return fd;
    }
    // O_TMPFILE and its part O_DIRECTORY stay in a file's flags, but mean another file when opening.
    let flags = flags & !(libc::O_TMPFILE as u32);
    regular::open(format!("/proc/self/fd/{inherited}").as_bytes(), flags, numbers, program)
}

/// The open file that takes over the description made by memfd_create(2), for each memfd.
pub(crate) fn first_writers<'a>(
    files: impl Iterator<Item = &'a OpenFile>,
    shared: &BTreeMap<SharedMemoryId, SharedMemory>,
) -> HashMap<SharedMemoryId, OpenFileId> {
    let mut first = HashMap::new();
    for file in files {
        let FileKind::SharedMemory { object } = file.kind else { continue };
        let memfd = matches!(shared.get(&object), Some(SharedMemory { kind: SharedMemoryKind::Memfd { .. }, .. }));
        if memfd && file.flags & libc::O_ACCMODE as u32 == libc::O_RDWR as u32 {
            first.entry(object).or_insert(file.id);
        }
    }
    first
}
