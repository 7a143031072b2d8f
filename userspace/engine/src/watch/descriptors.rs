//! Rows for descriptors and sockets.

use super::sample::{DescriptorRow, SocketRow};
use crate::{
    kernel::proc,
    observe::{self, FdEntry, Iterators, Result, SocketEntry},
};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs, io,
    path::Path,
};

/// Rows for sockets at most.
const SOCKETS: usize = 500;

/// Descriptors by process.
pub(super) type Names = BTreeMap<i32, Vec<Name>>;

/// A descriptor as its link in `/proc/pid/fd` shows it. Number and name together tell a file that took the number of
/// another one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Name {
    pub fd: i32,
    pub link: String,
    /// Type bits of `st_mode`, if the reader tells; for names that are paths.
    pub mode: Option<u32>,
}

/// Reads the descriptors of all processes.
///
/// # Errors
/// When the iterators fail.
pub(super) fn read(pids: &[i32], iterators: &mut Option<Iterators>) -> Result<Names> {
    match iterators {
        Some(iterators) => Ok(names(&iterators.files(pids)?)),
        None => Ok(pids.iter().filter_map(|&pid| Some((pid, links(pid).ok()?))).collect()),
    }
}

/// What a reader said anyway.
pub(super) fn names(entries: &[FdEntry]) -> Names {
    let mut names = Names::new();
    for e in entries {
        let name = Name { fd: e.fd, link: e.path.to_string_lossy().into_owned(), mode: Some(e.mode & libc::S_IFMT) };
        names.entry(e.tgid).or_default().push(name);
    }
    names
}

/// By readlink(2), about 2 µs each.
fn links(pid: i32) -> io::Result<Vec<Name>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(proc::path(pid, "fd"))? {
        let entry = entry?;
        let Some(fd) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else { continue };
        let Ok(link) = fs::read_link(entry.path()) else { continue };
        all.push(Name { fd, link: link.to_string_lossy().into_owned(), mode: None });
    }
    all.sort_unstable_by_key(|n| n.fd);
    Ok(all)
}

/// Counts them by kind and state, the most frequent first.
pub(super) fn count(names: &Names, sockets: &[SocketEntry]) -> Vec<DescriptorRow> {
    let mut rows: HashMap<(String, Option<String>), u64> = HashMap::new();
    let known: HashMap<u64, &SocketEntry> = sockets.iter().map(|s| (s.ino, s)).collect();
    for name in names.values().flatten() {
        let key = match inode(&name.link, "socket:[") {
            Some(inode) => known.get(&inode).map_or_else(
                // Made since.
                || ("socket".to_owned(), None),
                |s| (s.kind().to_owned(), s.state_name().map(Into::into)),
            ),
            None => (kind(name).to_owned(), None),
        };
        *rows.entry(key).or_default() += 1;
    }
    let mut rows: Vec<_> =
        rows.into_iter().map(|((kind, state), count)| DescriptorRow { kind, state, count }).collect();
    rows.sort_by(|a, b| (b.count, &a.kind, &a.state).cmp(&(a.count, &b.kind, &b.state)));
    rows
}

/// The inode number in a name such as `socket:[7]`.
fn inode(link: &str, prefix: &str) -> Option<u64> {
    link.strip_prefix(prefix)?.strip_suffix(']')?.parse().ok()
}

fn kind(name: &Name) -> &str {
    let link = name.link.as_str();
    if let Some(kind) = link.strip_prefix("anon_inode:") {
        return match kind.trim_matches(['[', ']']) {
            "eventpoll" => "epoll",
            kind => kind,
        };
    }
    if link.starts_with("pipe:[") {
        return "pipe";
    }
    if link.starts_with("/memfd:") || link.starts_with("/dev/zero (deleted)") || link.starts_with("/dev/shm/") {
        return "shared memory";
    }
    if link.starts_with("/dev/pts/") || link.starts_with("/dev/tty") || link == "/dev/ptmx" {
        return "terminal";
    }
    match name.mode {
        Some(libc::S_IFREG) => "regular",
        Some(libc::S_IFDIR) => "directory",
        Some(libc::S_IFCHR | libc::S_IFBLK) => "device",
        Some(libc::S_IFIFO) => "fifo",
        Some(_) => "other",
        // Without a look at the file a path does not say more.
        None if link.starts_with("/dev/") => "device",
        None if Path::new(link).is_absolute() => "file",
        None => "other",
    }
}

/// The sockets of the processes, as whoever reads for us tells.
pub(super) fn sockets(pids: &[i32], iterators: &mut Option<Iterators>) -> Result<Vec<SocketEntry>> {
    match iterators {
        Some(iterators) => iterators.sockets(pids),
        None => observe::procfs::sockets(pids),
    }
}

/// Rows for those sockets in which most waits, or that are first by process and descriptor. One that several descriptors
/// lead to is one row.
pub(super) fn socket_rows(sockets: &[SocketEntry]) -> Vec<SocketRow> {
    let mut seen = HashSet::new();
    let mut once: Vec<&SocketEntry> = sockets.iter().filter(|s| seen.insert(s.ino)).collect();
    let waiting = |s: &SocketEntry| s.receive.unwrap_or(0) + s.send.unwrap_or(0);
    once.sort_by_key(|s| std::cmp::Reverse(waiting(s)));
    once.truncate(SOCKETS);
    let text = |address: Option<std::net::SocketAddr>| address.map(|a| a.to_string()).unwrap_or_default();
    let row = |s: &SocketEntry| SocketRow {
        pid: s.tgid,
        fd: s.fd,
        kind: s.kind().into(),
        state: s.state_name().map(Into::into),
        receive: s.receive,
        send: s.send,
        local: match s.name.0.first() {
            None => text(s.local),
            Some(0) => format!("@{}", String::from_utf8_lossy(&s.name.0[1..])),
            Some(_) => String::from_utf8_lossy(&s.name.0).into_owned(),
        },
        peer: s.peer_ino.map_or_else(|| text(s.peer), |ino| format!("socket:[{ino}]")),
    };
    once.into_iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(link: &str, mode: Option<u32>) -> Name {
        Name { fd: 0, link: link.into(), mode }
    }

    #[test]
    fn kinds() {
        for (link, mode, want) in [
            ("pipe:[7]", Some(libc::S_IFIFO), "pipe"),
            ("/tmp/fifo", Some(libc::S_IFIFO), "fifo"),
            ("anon_inode:[eventfd]", Some(0), "eventfd"),
            ("anon_inode:[eventpoll]", None, "epoll"),
            ("anon_inode:inotify", None, "inotify"),
            ("/memfd:x (deleted)", Some(libc::S_IFREG), "shared memory"),
            ("/dev/null", Some(libc::S_IFCHR), "device"),
            ("/dev/null", None, "device"),
            ("/dev/pts/3", Some(libc::S_IFCHR), "terminal"),
            ("/etc", Some(libc::S_IFDIR), "directory"),
            ("/etc/passwd", None, "file"),
            ("net:[4026531840]", None, "other"),
        ] {
            assert_eq!(kind(&name(link, mode)), want, "{link}");
        }
    }

    #[test]
    fn our_own_sockets() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let ours = [std::process::id() as i32];
        let names = read(&ours, &mut None).unwrap();
        let sockets = sockets(&ours, &mut None).unwrap();
        let rows = count(&names, &sockets);
        let tcp = |state: &str| rows.iter().any(|r| r.kind == "tcp" && r.state.as_deref() == Some(state));
        assert!(tcp("listen") && tcp("established"), "{rows:?}");
        assert!(rows.is_sorted_by_key(|r| std::cmp::Reverse(r.count)));
        let local = client.local_addr().unwrap().to_string();
        let row = socket_rows(&sockets).into_iter().find(|r| r.local == local).unwrap();
        assert_eq!((row.kind.as_str(), row.peer), ("tcp", listener.local_addr().unwrap().to_string()));
        let again = sockets.iter().chain(&sockets).cloned().collect::<Vec<_>>();
        assert_eq!(socket_rows(&again).len(), socket_rows(&sockets).len());
    }
}
