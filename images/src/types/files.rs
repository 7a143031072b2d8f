//! Descriptor tables and open file descriptions.

use super::{Bytes, SharedMemoryId};
use serde::{Deserialize, Serialize};

/// Number of a descriptor table within the image.
pub type FdTableId = u32;
/// Number of an open file description within the image.
pub type OpenFileId = u32;
/// Number of a pipe within the image.
pub type PipeId = u32;

/// A descriptor table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FdTable {
    /// Its number.
    pub id: FdTableId,
    /// Descriptors by number.
    pub fds: Vec<Descriptor>,
}

/// A descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptor {
    /// Number.
    pub fd: i32,
    /// FD_CLOEXEC.
    pub cloexec: bool,
    /// What it refers to.
    pub file: OpenFileId,
}

/// An open file description, or a file that is only mapped or executed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenFile {
    /// Its number.
    pub id: OpenFileId,
    /// Access mode and status flags (`O_*`, without O_CLOEXEC).
    pub flags: u32,
    /// File offset.
    pub pos: i64,
    /// F_SETOWN and F_SETSIG.
    pub owner: Option<FileOwner>,
    /// What it is.
    pub kind: FileKind,
}

/// Receiver of I/O signals (fcntl(2) F_SETOWN_EX, F_SETSIG).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileOwner {
    /// `F_OWNER_*`.
    pub kind: i32,
    /// Thread, process or process group id.
    pub pid: i32,
    /// Signal; 0: SIGIO.
    pub signal: i32,
}

/// Kinds of open files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileKind {
    /// A regular file that has a name.
    Regular(RegularFile),
    /// A directory.
    Directory {
        /// Its path.
        path: Bytes,
        /// It was removed while open.
        removed: bool,
    },
    /// A character or block device without state of its own.
    Device {
        /// Its path.
        path: Bytes,
        /// Device number.
        rdev: u64,
    },
    /// An unlinked file, a memfd: contents are in the image.
    SharedMemory {
        /// The object.
        object: SharedMemoryId,
    },
    /// One end of a pipe or a FIFO.
    Pipe {
        /// The pipe.
        pipe: PipeId,
    },
    /// eventfd(2).
    EventFd {
        /// Counter.
        count: u64,
        /// EFD_SEMAPHORE.
        semaphore: bool,
    },
    /// timerfd_create(2).
    TimerFd {
        /// Clock.
        clock: i32,
        /// Expirations not read.
        ticks: u64,
        /// TFD_TIMER_* flags of the last timerfd_settime.
        settime_flags: u32,
        /// Nanoseconds to the next expiry; 0: not armed.
        value_ns: u64,
        /// Period in nanoseconds.
        interval_ns: u64,
    },
    /// pidfd_open(2).
    PidFd {
        /// The process.
        pid: i32,
    },
    /// signalfd(2).
    SignalFd {
        /// Accepted signals.
        mask: u64,
    },
    /// epoll_create(2).
    Epoll {
        /// Registered descriptors.
        targets: Vec<EpollTarget>,
    },
    /// A socket.
    Socket(Socket),
    /// A pidfd of a process that has been waited for.
    DeadPidFd {
        /// The process: descriptors of the same one have the same number.
        process: u32,
        /// Its wait status, if the kernel tells it.
        status: Option<i32>,
    },
    /// A file whose name was gone although it had others: found by a hard link that the dump made, and the restore removes.
    Linked {
        /// The file under the name of the link.
        file: RegularFile,
        /// The name that it had.
        name: Bytes,
    },
}

/// A pipe(2) or fifo(7), whatever ends of it are open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pipe {
    /// Its number.
    pub id: PipeId,
    /// Path of a FIFO; `None` for a pipe.
    pub fifo: Option<Bytes>,
    /// The FIFO was unlinked while open: its permission bits.
    pub unlinked: Option<u32>,
    /// F_GETPIPE_SZ in bytes.
    pub capacity: u32,
    /// What waits to be read; of an O_DIRECT pipe packet by packet.
    pub content: Vec<Vec<u8>>,
}

/// A regular file and how it looked at the dump.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegularFile {
    /// Path in the root directory of the dumping process.
    pub path: Bytes,
    /// Size in bytes.
    pub size: u64,
    /// Modification time: seconds and nanoseconds.
    pub mtime: (i64, u32),
    /// Type and permission bits.
    pub mode: u32,
}

/// One registration in an epoll set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpollTarget {
    /// Descriptor number it was added under.
    pub fd: i32,
    /// The file.
    pub file: OpenFileId,
    /// `EPOLL*` bits.
    pub events: u32,
    /// User data.
    pub data: u64,
}

/// A socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Socket {
    /// AF_*.
    pub family: i32,
    /// SOCK_* type.
    pub kind: i32,
    /// Protocol.
    pub protocol: i32,
    /// Local address as getsockname(2) gives it; empty: not bound.
    pub local: Vec<u8>,
    /// Peer address, for connected datagram sockets.
    pub peer: Vec<u8>,
    /// listen(2) backlog.
    pub backlog: Option<u32>,
    /// Options as (level, name, value).
    pub options: Vec<(i32, i32, Vec<u8>)>,
    /// Unix: permission bits and owner of the bound file, where it still exists.
    pub bound_file: Option<(u32, u32, u32)>,
    /// Unix: the other end and what waits to be read.
    pub pair: Option<SocketPair>,
}

/// The other end of a connected unix socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketPair {
    /// Open file of the peer within the image; `None`: the peer is closed.
    pub peer: Option<OpenFileId>,
    /// Data waiting to be read here: messages, or one run of bytes for streams.
    pub queue: Vec<Vec<u8>>,
    /// Bit 0: shut down for reading; bit 1: for writing; bit 2: the peer was closed before it had read everything, and
    /// nobody has been told yet (ECONNRESET).
    pub shutdown: u8,
}
