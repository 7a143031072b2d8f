//! Open files and pipes, without what is in them.

use super::{memory::SharedObject, output::text, sockets};
use serde::Serialize;
use serde_json::{Value, json};
use standstill_engine::Image;
use standstill_images::types::{FileKind, FileOwner, OpenFile};
use std::collections::BTreeMap;

/// An open file description, or a file that is only mapped or executed.
#[derive(Serialize)]
pub(crate) struct File<'a> {
    pub id: u32,
    pub kind: &'static str,
    pub flags: u32,
    pub pos: i64,
    pub owner: &'a Option<FileOwner>,
    pub details: Value,
    /// All descriptors for it.
    pub held_by: Vec<Holder>,
    /// What it is, for people.
    #[serde(skip)]
    pub summary: String,
    /// Whether it is a socket that accepts connections.
    #[serde(skip)]
    pub listening: bool,
    #[serde(skip)]
    pipe: Option<u32>,
}

/// A descriptor.
#[derive(Clone, Copy, Serialize)]
pub(crate) struct Holder {
    pub pid: i32,
    pub fd: i32,
}

/// A pipe or FIFO.
#[derive(Serialize)]
pub(crate) struct Pipe {
    pub id: u32,
    /// Path of a FIFO.
    pub fifo: Option<String>,
    pub capacity: u32,
    pub waiting_bytes: usize,
    pub messages: usize,
    pub readers: Vec<Holder>,
    pub writers: Vec<Holder>,
}

impl<'a> File<'a> {
    pub(crate) fn all(image: &'a Image) -> Vec<Self> {
        let mut holders: BTreeMap<u32, Vec<Holder>> = BTreeMap::new();
        for task in image.tasks.values() {
            let table = task.live.as_ref().and_then(|live| image.tables.get(&live.fd_table));
            for d in table.iter().flat_map(|t| &t.fds) {
                holders.entry(d.file).or_default().push(Holder { pid: task.pid, fd: d.fd });
            }
        }
        let all = image.files.values();
        all.map(|file| Self::new(file, image, holders.remove(&file.id).unwrap_or_default())).collect()
    }

    fn new(file: &'a OpenFile, image: &Image, held_by: Vec<Holder>) -> Self {
        let (kind, summary, details) = describe(&file.kind, image);
        Self {
            id: file.id,
            kind,
            flags: file.flags,
            pos: file.pos,
            owner: &file.owner,
            details,
            held_by,
            summary,
            listening: matches!(&file.kind, FileKind::Socket(socket) if socket.backlog.is_some()),
            pipe: match file.kind {
                FileKind::Pipe { pipe, .. } => Some(pipe),
                _ => None,
            },
        }
    }

    fn reads(&self) -> bool {
        self.flags as i32 & libc::O_ACCMODE != libc::O_WRONLY
    }

    fn writes(&self) -> bool {
        self.flags as i32 & libc::O_ACCMODE != libc::O_RDONLY
    }

    /// Access mode and status flags, for people.
    pub(crate) fn mode(&self) -> String {
        const NAMES: [(i32, &str); 8] = [
            (libc::O_APPEND, "append"),
            (libc::O_NONBLOCK, "nonblock"),
            (libc::O_DSYNC, "dsync"),
            (libc::O_ASYNC, "async"),
            (libc::O_DIRECT, "direct"),
            (libc::O_DIRECTORY, "directory"),
            (libc::O_NOATIME, "noatime"),
            (libc::O_PATH, "path"),
        ];
        let access = match (self.reads(), self.writes()) {
            (true, true) => "rw",
            (true, false) => "r",
            _ => "w",
        };
        let set = NAMES.iter().filter(|n| self.flags as i32 & n.0 != 0).map(|n| n.1);
        [access].into_iter().chain(set).collect::<Vec<_>>().join(" ")
    }
}

/// Kind, description for people, and everything else. There is no arm for other kinds: whoever adds one decides what of
/// it may be shown.
fn describe(kind: &FileKind, image: &Image) -> (&'static str, String, Value) {
    match kind {
        FileKind::Regular(f) => {
            let path = text(&f.path.0);
            let details = json!({ "path": path, "size": f.size, "mtime": f.mtime, "mode": f.mode });
            ("regular file", path, details)
        }
        FileKind::Linked { file, name, .. } => {
            let (path, name) = (text(&file.path.0), text(&name.0));
            let details =
                json!({ "path": name, "link": path, "size": file.size, "mtime": file.mtime, "mode": file.mode });
            ("regular file", format!("{name} (linked to as {path})"), details)
        }
        FileKind::Directory { path, removed, .. } => {
            let path = text(&path.0);
            let note = if *removed { " (removed)" } else { "" };
            ("directory", format!("{path}{note}"), json!({ "path": path, "removed": removed }))
        }
        FileKind::Device { path, rdev, .. } => {
            let path = text(&path.0);
            let number = format!("{}:{}", libc::major(*rdev), libc::minor(*rdev));
            ("device", format!("{path} ({number})"), json!({ "path": path, "rdev": number }))
        }
        FileKind::SharedMemory { object, .. } => {
            let details = json!({ "shared_memory": object });
            match image.shared.get(object).map(SharedObject::new) {
                Some(object) => (object.kind, object.name.unwrap_or_default(), details),
                None => ("shared memory", String::new(), details),
            }
        }
        FileKind::Pipe { pipe, .. } => {
            let fifo = image.pipes.get(pipe).and_then(|p| p.fifo.as_ref());
            let details = json!({ "pipe": pipe });
            match fifo {
                Some(path) => ("fifo", format!("pipe {pipe}, {}", text(&path.0)), details),
                None => ("pipe", format!("pipe {pipe}"), details),
            }
        }
        FileKind::EventFd { count, semaphore, .. } => {
            let note = if *semaphore { " (semaphore)" } else { "" };
            ("eventfd", format!("count {count}{note}"), json!({ "count": count, "semaphore": semaphore }))
        }
        FileKind::TimerFd { clock, ticks, settime_flags, value_ns, interval_ns, .. } => {
            let details = json!({
                "clock": clock, "ticks": ticks, "settime_flags": settime_flags,
                "value_ns": value_ns, "interval_ns": interval_ns,
            });
            let armed = if *value_ns == 0 { "not armed" } else { "armed" };
            ("timerfd", format!("{armed}, {ticks} expirations not read"), details)
        }
        FileKind::PidFd { pid, .. } => ("pidfd", format!("process {pid}"), json!({ "pid": pid })),
        FileKind::DeadPidFd { process, status } => {
            ("pidfd", "a process that is gone".into(), json!({ "process": process, "status": status }))
        }
        FileKind::SignalFd { mask, .. } => ("signalfd", format!("signals {mask:#x}"), json!({ "mask": mask })),
        FileKind::Epoll { targets, .. } => {
            ("epoll", format!("watches {}", targets.len()), json!({ "targets": targets }))
        }
        FileKind::Socket(socket) => {
            let (summary, details) = sockets::describe(socket);
            ("socket", summary, details)
        }
    }
}

impl Pipe {
    pub(crate) fn all(image: &Image, files: &[File]) -> Vec<Self> {
        let mut ends: BTreeMap<u32, (Vec<Holder>, Vec<Holder>)> = BTreeMap::new();
        for file in files {
            let Some(pipe) = file.pipe else { continue };
            let (readers, writers) = ends.entry(pipe).or_default();
            if file.reads() {
                readers.extend_from_slice(&file.held_by);
            }
            if file.writes() {
                writers.extend_from_slice(&file.held_by);
            }
        }
        let pipes = image.pipes.values().map(|pipe| {
            let (readers, writers) = ends.remove(&pipe.id).unwrap_or_default();
            Self {
                id: pipe.id,
                fifo: pipe.fifo.as_ref().map(|path| text(&path.0)),
                capacity: pipe.capacity,
                waiting_bytes: pipe.content.iter().map(Vec::len).sum(),
                messages: pipe.content.len(),
                readers,
                writers,
            }
        });
        pipes.collect()
    }
}
