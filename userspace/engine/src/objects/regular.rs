//! Regular files and symbolic links (open(2)): restored by path, after a check that the file is still the same.

use super::{Collected, link_remap, refuse, shared_memory};
use crate::{
    error::{Context, Error, Result},
    observe::FdEntry,
    restore::{files::Numbers, program::Program},
};
use nix::sys::statfs;
use standstill_images::types::{Bytes, FileKind, OpenFileId, RegularFile};
use std::{
    collections::HashMap,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// A descriptor of a regular file, deleted ones and memfds included.
pub(super) fn dump(entry: &FdEntry, all: &mut Collected) -> Result<FileKind> {
    let path = &entry.path;
    if entry.nlink == 0 {
        return shared_memory::dump_deleted(entry, all);
    }
    // It may be called so, of course.
    let is_it = |m: std::fs::Metadata| m.ino() == entry.ino;
    if path.to_string_lossy().ends_with(" (deleted)") && !std::fs::symlink_metadata(path).is_ok_and(is_it) {
        let link = PathBuf::from(format!("/proc/{}/fd/{}", entry.tgid, entry.fd));
        let linked =
            all.links.record(path, &link).context(|| format!("link {} beside its old name", path.display()))?;
        return linked.ok_or_else(|| refuse(entry, link_remap::REMEDY));
    }
    if let Some(path) = own_namespace(path) {
        return Ok(FileKind::Regular(RegularFile { path, size: 0, mtime: (0, 0), mode: entry.mode }));
    }
    all.names.push(Name { file: entry.file.0, entry: entry.clone() });
    let (size, mtime) = (entry.size, entry.mtime);
    Ok(FileKind::Regular(RegularFile { path: path.as_path().into(), size, mtime, mode: entry.mode }))
}

/// A descriptor of a symbolic link (O_PATH and O_NOFOLLOW).
pub(super) fn dump_link(entry: &FdEntry) -> Result<FileKind> {
    let is_it = std::fs::symlink_metadata(&entry.path).is_ok_and(|m| m.ino() == entry.ino);
    let (path, size, mtime, mode) = (entry.path.as_path().into(), entry.size, entry.mtime, entry.mode);
    let link = is_it.then_some(FileKind::Regular(RegularFile { path, size, mtime, mode }));
    link.ok_or_else(|| refuse(entry, "its name is gone or leads elsewhere: give the link its name back, or close it"))
}

/// A name under which a file is recorded, not checked yet.
pub(super) struct Name {
    file: OpenFileId,
    entry: FdEntry,
}

/// Checks the names of all recorded files. Whoever renames a file does not care whether the tree is frozen, so neither
/// need we.
pub(crate) fn check_names(all: &mut Collected) -> Result<()> {
    let names: HashMap<OpenFileId, FdEntry> = all.names.drain(..).map(|n| (n.file, n.entry)).collect();
    for file in &mut all.files {
        let Some(e) = names.get(&file.id) else { continue };
        file.kind = describe(&e.path, e.size, e.mtime, e.mode, e.dev, e.ino)
            .ok_or_else(|| refuse(e, "its name is gone or leads elsewhere: give the file its name back"))?;
    }
    Ok(())
}

/// The procfs name of a namespace descriptor (`net:[4026531840]`), if it is one that the tree itself lives in: trees in
/// other namespaces than ours are refused.
fn own_namespace(name: &Path) -> Option<Bytes> {
    let (kind, _) = name.to_str()?.split_once(":[")?;
    let link = PathBuf::from(format!("/proc/self/ns/{kind}"));
    (std::fs::read_link(&link).ok()? == name).then(|| link.as_path().into())
}

/// The record of the file at `path`, provided that the name still leads to this inode.
pub(crate) fn describe(path: &Path, size: u64, mtime: (i64, u32), mode: u32, dev: u64, ino: u64) -> Option<FileKind> {
    let found = std::fs::metadata(path).ok()?;
    // Overlay and btrfs give files other device numbers than their inodes have: the inode number must do there.
    if found.ino() != ino && found.dev() == dev {
        return None;
    }
    // Size and time of files that the kernel makes up mean nothing.
    let pseudo = [
        statfs::PROC_SUPER_MAGIC,
        statfs::SYSFS_MAGIC,
        statfs::CGROUP_SUPER_MAGIC,
        statfs::CGROUP2_SUPER_MAGIC,
        statfs::DEBUGFS_MAGIC,
        statfs::TRACEFS_MAGIC,
    ];
    let made_up = statfs::statfs(path).is_ok_and(|s| pseudo.contains(&s.filesystem_type()));
    let (size, mtime) = if made_up { (0, (0, 0)) } else { (size, mtime) };
    Some(FileKind::Regular(RegularFile { path: path.into(), size, mtime, mode }))
}

/// Checks that the file is the one of the dump, before any process exists.
pub(crate) fn check(file: &RegularFile) -> Result<()> {
    let path = file.path.as_path();
    if file.mtime == (0, 0) {
        return Ok(()); // made up by the kernel, perhaps only once the tree exists (/proc/<pid>)
    }
    let changed = |reason: String| Error::File { path: path.into(), reason };
    let is_link = file.mode & libc::S_IFMT == libc::S_IFLNK;
    let found = if is_link { std::fs::symlink_metadata(path) } else { std::fs::metadata(path) };
    let found = found.map_err(|e| changed(format!("cannot be restored: {e}")))?;
    if found.mode() & libc::S_IFMT != file.mode & libc::S_IFMT {
        let what = if is_link { "symbolic link" } else { "regular file" };
        return Err(changed(format!("is not a {what} any more")));
    }
    if found.size() != file.size {
        return Err(changed(format!(
            "has changed since the dump: {} bytes, was {}; put the file of the dump back",
            found.size(),
            file.size
        )));
    }
    if (found.mtime(), found.mtime_nsec() as u32) != file.mtime {
        return Err(changed("was modified since the dump; put the file of the dump back".into()));
    }
    Ok(())
}

/// Opens the file.
pub(super) fn create(file: &RegularFile, flags: u32, numbers: &mut Numbers, program: &mut Program) -> i32 {
    open(&file.path.0, flags, numbers, program)
}

/// Opens a path at the lowest free number.
pub(super) fn open(path: &[u8], flags: u32, numbers: &mut Numbers, program: &mut Program) -> i32 {
    open_at(libc::AT_FDCWD, path, flags, numbers, program)
}

/// The same from a directory.
pub(super) fn open_at(dir: i32, path: &[u8], flags: u32, numbers: &mut Numbers, program: &mut Program) -> i32 {
    let fd = numbers.lowest();
    let name = program.string(path);
    // O_NOCTTY: opening a terminal must not make it the controlling one.
    let flags = flags & !(libc::O_ASYNC as u32) | libc::O_NOCTTY as u32;
    let args = [dir.into(), name, u64::from(flags).into()];
    program.call_expecting(format!("open {}", String::from_utf8_lossy(path)), libc::SYS_openat, &args, fd);
    fd
}
