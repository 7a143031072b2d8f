//! Memory with no name in the file system: memfd_create(2), deleted files, MAP_SHARED|MAP_ANONYMOUS.
//!
//! Their contents are part of the image. The restoring process makes each object once, fills it, and every task
//! inherits a descriptor of it, from which further ones are opened through procfs.
//!
//! Memory of huge pages (MAP_HUGETLB, private mappings included, MFD_HUGETLB, SHM_HUGETLB, deleted files of a hugetlbfs) is
//! the same with another page size; see `memory/huge.rs`.

use super::{Collected, regular, system_v};
use crate::{
    error::{Context, Error, Result},
    kernel::{PAGE, hugetlb, pagemap::Range, sys::Mapping},
    observe::FdEntry,
    restore::{files::Numbers, program::Program},
};
use nix::{
    fcntl::{FallocateFlags, FcntlArg, OFlag, SealFlag, fallocate, fcntl},
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
/// What the kernel calls the file behind MAP_ANONYMOUS|MAP_HUGETLB.
const HUGE: &[u8] = b"/anon_hugepage";
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
        let page_size = hugetlb::page_size_of(&file).context(context)?.unwrap_or(PAGE);
        let (mode, owner) = (meta.mode() & 0o7777, (meta.uid(), meta.gid()));
        let kind = if name == b"/dev/zero" || name == HUGE && page_size > PAGE {
            SharedMemoryKind::Anonymous
        } else if let Some(name) = name.strip_prefix(MEMFD_PREFIX) {
            let seals = fcntl(&file, FcntlArg::F_GET_SEALS).context(context)? as u32;
            SharedMemoryKind::Memfd { name: name.into(), seals, mode, owner }
        } else if let Some(segment) = system_v::segment(name, ino, meta.len()) {
            SharedMemoryKind::SystemV(segment)
        } else {
            SharedMemoryKind::DeletedFile { path: name.into(), mode, owner }
        };
        Ok((SharedMemory { id, size: meta.len(), kind, pages: Vec::new(), page_size }, file.into()))
    })
}

/// Ranges of an object that hold data, page aligned (lseek(2) SEEK_DATA).
pub(crate) fn data_ranges(file: &OwnedFd, object: &SharedMemory) -> io::Result<Vec<Range>> {
    let whole = Range { start: 0, end: object.size.next_multiple_of(object.page_size) };
    if is_huge(object) {
        // hugetlbfs does not tell where its holes are, but they are read as zeros and nothing is allocated for it.
        let empty = File::from(file.try_clone()?).metadata()?.blocks() == 0;
        return Ok(if empty { Vec::new() } else { vec![whole] });
    }
    data_within(file, whole)
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
            let length = object.size.max(1).next_multiple_of(object.page_size);
            let mapping = match is_huge(object) {
                true => Mapping::shared_huge(length, object.page_size),
                false => Mapping::shared(length),
            };
            let mapping = mapping.context(context)?;
            let link = format!("/proc/self/map_files/{:x}-{:x}", mapping.start(), mapping.start() + length);
            let file = std::fs::OpenOptions::new().read(true).write(true).open(link).context(context)?;
            Ok(file.into())
        }
        SharedMemoryKind::Memfd { name, mode, owner, .. } => {
            let context = || format!("memfd_create {}", name.lossy());
            let c_name = std::ffi::CString::new(name.0.clone()).map_err(io::Error::other).context(context)?;
            let mut flags = MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC;
            if is_huge(object) {
                flags |=
                    MFdFlags::MFD_HUGETLB | MFdFlags::from_bits_retain(hugetlb::size_flag(object.page_size) as u32);
            }
            let fd = memfd_create(c_name.as_c_str(), flags).context(context)?;
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
            if hugetlb::page_size_of(&file).context(context)?.unwrap_or(PAGE) != object.page_size {
                let reason = format!("was on a file system with pages of {} kB: mount it", object.page_size >> 10);
                return Err(Error::File { path: path.as_path().into(), reason });
            }
            file.set_len(object.size).context(context)?;
            file.set_permissions(PermissionsExt::from_mode(*mode)).context(context)?;
            std::os::unix::fs::fchown(&file, Some(owner.0), Some(owner.1)).context(context)?;
            Ok(file.into())
        }
    }
}

/// Writes one run of pages; the last page of a file may reach beyond its end.
pub(crate) fn fill(fd: &OwnedFd, object: &SharedMemory, offset: u64, pages: &[u8]) -> io::Result<()> {
    if is_huge(object) {
        return fill_huge(fd, object.page_size, offset, pages);
    }
    let room = match object.kind {
        SharedMemoryKind::Anonymous => pages.len(),
        _ => pages.len().min(object.size.saturating_sub(offset) as usize),
    };
    File::from(fd.try_clone()?).write_all_at(&pages[..room], offset)
}

/// hugetlbfs has no write(2). The pages are allocated before they are mapped: what the machine does not have is an error
/// (ENOSPC) then, and not a SIGBUS.
fn fill_huge(fd: &OwnedFd, page_size: u64, offset: u64, pages: &[u8]) -> io::Result<()> {
    let start = offset / page_size * page_size;
    let length = (offset + pages.len() as u64).next_multiple_of(page_size) - start;
    fallocate(fd, FallocateFlags::empty(), start as i64, length as i64)?;
    let mapping = Mapping::of_file(fd.as_fd(), start, length as usize, libc::PROT_READ | libc::PROT_WRITE)?;
    mapping.bytes_mut()[(offset - start) as usize..][..pages.len()].copy_from_slice(pages);
    Ok(())
}

/// Whether an object is in hugetlbfs.
fn is_huge(object: &SharedMemory) -> bool {
    object.page_size > PAGE
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
    // O_TMPFILE and its part O_DIRECTORY stay in a file's flags, but mean another file when opening. So does O_NOFOLLOW, which
    // descriptors of O_PATH keep: the name in procfs is a symbolic link.
    let flags = flags & !(libc::O_TMPFILE | libc::O_NOFOLLOW) as u32;
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
