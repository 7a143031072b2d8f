//! What a viewer shows: plain values.

use crate::observe::Scope;
use serde::{Deserialize, Serialize};

/// A running tree at one moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Root of the tree.
    pub root: i32,
    /// Seconds since the epoch.
    pub time: f64,
    /// Who reads descriptors and mappings: `ebpf` or `procfs`.
    pub reader: String,
    /// Why not eBPF.
    pub reader_note: Option<String>,
    /// Processor time that this sample took, in microseconds.
    pub cost_us: u64,
    /// By pid.
    pub processes: Vec<ProcessRow>,
    /// Sums over the tree.
    pub totals: Totals,
    /// What is mapped, the most resident first.
    pub memory: Vec<MappingRow>,
    /// Seconds since `memory` was read: it is expensive.
    pub memory_age: f64,
    /// Why it is not known how quickly memory is written to, if that was asked for.
    pub dirty_note: Option<String>,
    /// Open descriptors by kind, the most frequent first.
    pub descriptors: Vec<DescriptorRow>,
    /// Sockets, those in which most waits first; 500 at most.
    pub sockets: Vec<SocketRow>,
    /// Seconds since `descriptors` and `sockets` were read.
    pub descriptors_age: f64,
    /// What changed since the sample before.
    pub rates: Rates,
    /// What a dump would cost now.
    pub prediction: Option<Prediction>,
    /// The same for one that copies nothing before the freeze (`--precopy=0`).
    pub prediction_without_precopy: Option<Prediction>,
    /// Why there is no prediction.
    pub prediction_note: Option<String>,
}

/// Sums over a tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Living processes.
    pub processes: u64,
    /// Their threads.
    pub threads: u64,
    /// Open descriptors.
    pub descriptors: u64,
    /// Mappings, when `memory` was read.
    pub mappings: u64,
    /// Resident bytes; what several processes share counts for each.
    pub resident: u64,
    /// Resident bytes that are no file's.
    pub anonymous: u64,
}

/// A process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRow {
    /// Process id.
    pub pid: i32,
    /// Parent's process id.
    pub ppid: i32,
    /// Name, as `/proc/pid/comm` shows it.
    pub comm: String,
    /// State letter of proc(5): R, S, D, T, Z, …
    pub state: char,
    /// Threads.
    pub threads: u64,
    /// Resident bytes.
    pub resident: u64,
    /// Resident bytes that are no file's.
    pub anonymous: u64,
    /// Open descriptors.
    pub descriptors: u64,
}

/// What kind of memory a mapping is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MappingKind {
    /// brk(2).
    Heap,
    /// The main thread's stack. Those of other threads are anonymous.
    Stack,
    /// Private anonymous memory.
    Anonymous,
    /// A file, mapped privately or shared.
    File,
    /// Shared anonymous memory, memfds, POSIX and System V shared memory.
    Shared,
    /// The kernel's: vdso and its data.
    Kernel,
}

/// Memory of one kind or of one file, summed over the tree.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MappingRow {
    /// Kind.
    pub kind: MappingKind,
    /// Path of the file or shared memory object; for other kinds their name.
    pub name: String,
    /// Mappings.
    pub count: u64,
    /// Mapped bytes.
    pub size: u64,
    /// Resident bytes.
    pub resident: u64,
    /// Bytes that the processes have changed and share with nobody.
    pub private_dirty: u64,
    /// Bytes of pages that were written to in a second, each page once between two readings; `None` where writes are not
    /// tracked.
    pub written_per_second: Option<f64>,
}

/// Descriptors of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescriptorRow {
    /// `regular`, `pipe`, `eventfd`, `tcp`, `unix`, …
    pub kind: String,
    /// State of the connection, for TCP and unix sockets.
    pub state: Option<String>,
    /// How many.
    pub count: u64,
}

/// A socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketRow {
    /// A process that has it.
    pub pid: i32,
    /// Its descriptor there.
    pub fd: i32,
    /// `tcp`, `udp6`, `unix`, …
    pub kind: String,
    /// State of the connection, for TCP and unix sockets.
    pub state: Option<String>,
    /// Bytes received and not read yet; of a listening socket connections, of a unix socket packets.
    pub receive: Option<u64>,
    /// Bytes sent and not acknowledged yet.
    pub send: Option<u64>,
    /// Address and port, or the name of a unix socket; empty: none.
    pub local: String,
    /// The same of the other side, if it is connected.
    pub peer: String,
}

/// Changes per second; `None`: cannot be told without the tracker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// New processes.
    pub forks: f64,
    /// New threads.
    pub threads: f64,
    /// New programs in old processes (execve(2)).
    pub execs: f64,
    /// Processes that ended.
    pub exits: f64,
    /// Changes of mappings.
    pub mappings: Option<f64>,
    /// Changes of descriptors.
    pub descriptors: f64,
    /// System calls that change sockets' states and options.
    pub sockets: Option<f64>,
    /// Changes of the state of TCP sockets that the tree made: listening, connecting, closing.
    pub connections: Option<f64>,
    /// Signals sent.
    pub signals: Option<f64>,
    /// What was counted in the kernel, change by change. The others are differences between samples: what came and went
    /// in between is not among them. Descriptors are counted with [`Scope::Syscalls`] only.
    pub counted: Option<Scope>,
}

/// What `dump -R` would cost now.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// How long the tree would stand still, from the first task stopped to the last one released.
    pub freeze_us: u64,
    /// How large the image would be, not compressed.
    pub image_bytes: u64,
    /// Whether memory would be copied before the freeze, as it is for large trees.
    pub precopied: bool,
    /// The phases of the dump, with the names that it gives them.
    pub parts: Vec<Part>,
    /// Earlier dumps on this machine that the prediction was corrected by.
    pub dumps: usize,
    /// Seconds since the costs were measured.
    pub age: f64,
}

/// One phase of the freeze.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// Name of the phase.
    pub phase: String,
    /// Its time.
    pub us: u64,
    /// What the measured costs were multiplied with, because earlier dumps took that much longer or shorter.
    pub correction: f64,
}
