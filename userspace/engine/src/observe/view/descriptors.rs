//! Rows for descriptors: kinds from names, states of sockets from `/proc/pid/net`.

use super::sample::DescriptorRow;
use crate::{
    kernel::proc,
    observe::{FdEntry, Iterators, Result},
};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs, io,
    path::Path,
};

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
pub(super) fn count(names: &Names) -> Vec<DescriptorRow> {
    let mut rows: HashMap<(String, Option<String>), u64> = HashMap::new();
    let mut sockets = Sockets::default();
    for (&pid, all) in names {
        for name in all {
            let key = match inode(&name.link, "socket:[") {
                Some(inode) => sockets.kind(pid, inode),
                None => (kind(name).to_owned(), None),
            };
            *rows.entry(key).or_default() += 1;
        }
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

/// States of TCP: include/net/tcp_states.h.
const TCP_STATES: [&str; 13] = [
    "unknown",
    "established",
    "syn-sent",
    "syn-recv",
    "fin-wait-1",
    "fin-wait-2",
    "time-wait",
    "closed",
    "close-wait",
    "last-ack",
    "listen",
    "closing",
    "syn-recv",
];

/// What the network namespaces of the processes say about their sockets.
#[derive(Default)]
struct Sockets {
    /// Those read so far, by their names.
    read: HashSet<String>,
    /// By inode, which is unique across namespaces.
    known: HashMap<u64, (&'static str, Option<String>)>,
    last: i32,
}

impl Sockets {
    fn kind(&mut self, pid: i32, inode: u64) -> (String, Option<String>) {
        if self.last != pid {
            self.last = pid;
            let namespace = fs::read_link(proc::path(pid, "ns/net")).unwrap_or_default();
            if self.read.insert(namespace.to_string_lossy().into_owned()) {
                self.read_namespace(pid);
            }
        }
        match self.known.get(&inode) {
            Some((family, state)) => ((*family).to_owned(), state.clone()),
            // A TCP socket that is neither bound nor connected is in no list, as are those of rarer families.
            None => ("socket".to_owned(), None),
        }
    }

    fn read_namespace(&mut self, pid: i32) {
        for (file, family, parse) in FILES {
            let text = fs::read_to_string(proc::path(pid, &format!("net/{file}"))).unwrap_or_default();
            let lines = text.lines().skip(1).filter_map(parse);
            self.known.extend(lines.map(|(inode, state)| (inode, (family, state))));
        }
    }
}

/// Parses a line: inode and state.
type Line = fn(&str) -> Option<(u64, Option<String>)>;

const FILES: [(&str, &str, Line); 8] = [
    ("tcp", "tcp", inet),
    ("tcp6", "tcp6", inet),
    ("udp", "udp", |line| Some((inet(line)?.0, None))),
    ("udp6", "udp6", |line| Some((inet(line)?.0, None))),
    ("raw", "raw", |line| Some((inet(line)?.0, None))),
    ("unix", "unix", unix),
    ("netlink", "netlink", last),
    ("packet", "packet", last),
];

fn inet(line: &str) -> Option<(u64, Option<String>)> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let state = usize::from_str_radix(fields.get(3)?, 16).ok()?;
    Some((fields.get(9)?.parse().ok()?, Some((*TCP_STATES.get(state).unwrap_or(&"unknown")).to_owned())))
}

fn unix(line: &str) -> Option<(u64, Option<String>)> {
    const SO_ACCEPTCON: u64 = 1 << 16; // include/linux/net.h
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let flags = u64::from_str_radix(fields.get(3)?, 16).ok()?;
    let state = match *fields.get(5)? {
        _ if flags & SO_ACCEPTCON != 0 => "listen",
        "03" => "connected",
        _ => "unconnected",
    };
    Some((fields.get(6)?.parse().ok()?, Some(state.to_owned())))
}

fn last(line: &str) -> Option<(u64, Option<String>)> {
    Some((line.split_ascii_whitespace().last()?.parse().ok()?, None))
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
    fn lines_of_sockets() {
        let tcp =
            "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4242 1 0 100";
        assert_eq!(inet(tcp), Some((4242, Some("listen".into()))));
        let line = "0000000000000000: 00000002 00000000 00010000 0001 01 77 /run/x";
        assert_eq!(unix(line), Some((77, Some("listen".into()))));
        assert_eq!(inet("sl local_address"), None);
    }

    #[test]
    fn our_own_sockets() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let names = read(&[std::process::id() as i32], &mut None).unwrap();
        let rows = count(&names);
        let tcp = |state: &str| rows.iter().any(|r| r.kind == "tcp" && r.state.as_deref() == Some(state));
        assert!(tcp("listen") && tcp("established"), "{rows:?}");
        assert!(rows.is_sorted_by_key(|r| std::cmp::Reverse(r.count)));
        drop(client);
    }
}
