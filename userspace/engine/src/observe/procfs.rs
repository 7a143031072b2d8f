//! Descriptors and mappings from procfs and kcmp(2), for machines without BPF.

use super::{
    FdEntry, FileId, ObserveError, Result, VmaEntry,
    sys::{self, Stat},
};
use crate::{kernel::sys::kcmp_file, memory::smaps};
use nix::fcntl::{OFlag, open, openat, readlinkat};
use nix::sys::stat::Mode;
use std::{
    collections::HashMap,
    fs::{self, File},
    io::Read,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStringExt,
    },
    path::PathBuf,
};

/// All descriptors of the processes, by process and number.
///
/// The processes must not run: what one call reads of a descriptor and what the next reads would not fit together.
///
/// # Errors
/// When procfs cannot be read, or kcmp(2) is missing (CONFIG_KCMP) or not permitted.
pub fn files(tgids: &[i32]) -> Result<Vec<FdEntry>> {
    let mut all = Vec::new();
    let mut identities = Identities::default();
    for tgid in super::sorted(tgids) {
        let process = Descriptors::open(tgid)?;
        for fd in numbers(tgid)? {
            all.push(process.read(fd, &mut identities)?);
        }
    }
    Ok(all)
}

pub use super::sockets::from_procfs as sockets;

/// All mappings of the processes, by process and address.
///
/// # Errors
/// When `/proc/pid/smaps` cannot be read.
pub fn vmas(tgids: &[i32]) -> Result<Vec<VmaEntry>> {
    let mut all = Vec::new();
    for tgid in super::sorted(tgids) {
        let mapped = smaps::read(tgid).map_err(ObserveError::io(format!("read /proc/{tgid}/smaps")))?;
        all.extend(mapped.into_iter().filter(|m| m.name != b"[vsyscall]").map(|m| vma(tgid, m)));
    }
    Ok(all)
}

fn vma(tgid: i32, mapped: smaps::Mapped) -> VmaEntry {
    VmaEntry {
        tgid,
        start: mapped.start,
        end: mapped.end,
        prot: mapped.prot,
        shared: mapped.shared,
        offset: mapped.offset,
        dev: mapped.dev,
        ino: mapped.ino,
        name: PathBuf::from(std::ffi::OsString::from_vec(mapped.name)),
        flags: mapped.flags,
        unusual: !mapped.others.is_empty(),
        key: mapped.key,
        policy: false,
        untouched: false,
    }
}

/// Numbers of a process's descriptors, ascending.
fn numbers(tgid: i32) -> Result<Vec<i32>> {
    let what = || format!("list /proc/{tgid}/fd");
    let mut fds = Vec::new();
    for entry in fs::read_dir(format!("/proc/{tgid}/fd")).map_err(ObserveError::io(what()))? {
        let name = entry.map_err(ObserveError::io(what()))?.file_name();
        fds.extend(name.to_str().and_then(|n| n.parse::<i32>().ok()));
    }
    fds.sort_unstable();
    Ok(fds)
}

/// The files of a process that tell about its descriptors.
pub(super) struct Descriptors {
    tgid: i32,
    fd: OwnedFd,
    fdinfo: OwnedFd,
}

impl Descriptors {
    pub(super) fn open(tgid: i32) -> Result<Self> {
        let directory = |name: &str| {
            let path = format!("/proc/{tgid}/{name}");
            let flags = OFlag::O_DIRECTORY | OFlag::O_PATH | OFlag::O_CLOEXEC;
            open(path.as_str(), flags, Mode::empty()).map_err(|e| ObserveError::io(format!("open {path}"))(e.into()))
        };
        Ok(Self { tgid, fd: directory("fd")?, fdinfo: directory("fdinfo")? })
    }

    /// What readlink(2) says about a descriptor.
    pub(super) fn path(&self, fd: i32) -> Result<PathBuf> {
        let path = readlinkat(&self.fd, fd.to_string().as_str());
        path.map(PathBuf::from).map_err(|e| ObserveError::io(format!("readlink /proc/{}/fd/{fd}", self.tgid))(e.into()))
    }

    /// What stat(2) says about the file of a descriptor.
    pub(super) fn stat(&self, fd: i32) -> Result<Stat> {
        sys::stat_at(self.fd.as_fd(), &fd.to_string())
            .map_err(ObserveError::io(format!("stat /proc/{}/fd/{fd}", self.tgid)))
    }

    /// Flags and position.
    fn info(&self, fd: i32) -> Result<(u32, i64)> {
        let what = || format!("read /proc/{}/fdinfo/{fd}", self.tgid);
        let file = openat(&self.fdinfo, fd.to_string().as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
            .map_err(|e| ObserveError::io(what())(e.into()))?;
        // Position and flags are the first lines; what follows can be long (epoll, inotify).
        let mut text = [0; 256];
        let len = File::from(file).read(&mut text).map_err(ObserveError::io(what()))?;
        parse_info(&text[..len]).ok_or_else(|| ObserveError::io(what())(std::io::ErrorKind::InvalidData.into()))
    }

    fn read(&self, fd: i32, identities: &mut Identities) -> Result<FdEntry> {
        let (flags, pos) = self.info(fd)?;
        let stat = self.stat(fd)?;
        Ok(FdEntry {
            tgid: self.tgid,
            fd,
            cloexec: flags & libc::O_CLOEXEC as u32 != 0,
            file: identities.of(self.tgid, fd, flags, &stat)?,
            flags: flags & !(libc::O_CLOEXEC as u32),
            pos,
            ino: stat.ino,
            dev: stat.dev,
            mode: stat.mode,
            rdev: stat.rdev,
            size: stat.size,
            mtime: stat.mtime,
            nlink: stat.nlink,
            path: self.path(fd)?,
        })
    }
}

fn parse_info(text: &[u8]) -> Option<(u32, i64)> {
    let text = std::str::from_utf8(text).ok()?;
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    Some((u32::from_str_radix(field("flags:")?, 8).ok()?, field("pos:")?.parse().ok()?))
}

/// Which descriptors share an open file description.
///
/// kcmp(2) orders descriptions, so each is looked up among its likes by bisection. Likes have what no system call
/// changes in common: file and access mode.
#[derive(Default)]
struct Identities {
    likes: HashMap<(u64, u64, u32), Vec<Known>>,
    next: u32,
}

struct Known {
    tgid: i32,
    fd: i32,
    id: FileId,
}

impl Identities {
    fn of(&mut self, tgid: i32, fd: i32, flags: u32, stat: &Stat) -> Result<FileId> {
        let access = flags & (libc::O_ACCMODE | libc::O_PATH) as u32;
        let likes = self.likes.entry((stat.dev, stat.ino, access)).or_default();
        let mut failed = None;
        let found = likes.binary_search_by(|known| {
            kcmp_file((known.tgid, known.fd), (tgid, fd)).unwrap_or_else(|e| {
                failed.get_or_insert(e);
                std::cmp::Ordering::Equal
            })
        });
        if let Some(e) = failed {
            return Err(ObserveError::io(format!("kcmp of descriptor {fd} of process {tgid}"))(e));
        }
        Ok(match found {
            Ok(at) => likes[at].id,
            Err(at) => {
                let id = FileId(self.next);
                self.next += 1;
                likes.insert(at, Known { tgid, fd, id });
                id
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn fdinfo_of_a_file() {
        let text = b"pos:\t4096\nflags:\t02100002\nmnt_id:\t25\nino:\t7\n";
        assert_eq!(parse_info(text), Some((0o2100002, 4096)));
        assert_eq!(parse_info(b"pos:\t1\n"), None);
        assert_eq!(parse_info(b"pos:\tx\nflags:\t02\n"), None);
    }

    #[test]
    fn own_descriptors() {
        let file = tempfile::tempfile().unwrap();
        let same = file.try_clone().unwrap();
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let other = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
        // Other tests of this process open and close descriptors meanwhile: read only these.
        let process = Descriptors::open(std::process::id() as i32).unwrap();
        let mut identities = Identities::default();
        let mut read = |f: &File| process.read(f.as_raw_fd(), &mut identities).unwrap();
        let (a, b, c) = (read(&file), read(&same), read(&other));
        assert_eq!(a.file, b.file);
        assert_ne!(a.file, c.file);
        assert_eq!((a.nlink, a.size, a.cloexec), (0, 0, true));
        assert!(a.path.to_str().unwrap().ends_with(" (deleted)"));
    }

    #[test]
    fn own_mappings() {
        let all = vmas(&[std::process::id() as i32]).unwrap();
        let stack = all.iter().find(|v| v.name.as_os_str() == "[stack]").unwrap();
        assert!(stack.has(b"gd") && stack.has(b"wr") && !stack.shared && stack.ino == 0);
        assert!(all.iter().all(|v| v.name.as_os_str() != "[vsyscall]"));
    }
}
