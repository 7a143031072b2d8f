//! The records of an image: what a frozen tree consists of.
//!
//! Every type here is plain data. Ids (`OpenFileId`, …) are small numbers valid within one image; kernel addresses
//! never appear.

mod attributes;
mod files;
mod memory;
mod task;

pub use attributes::*;
pub use files::*;
pub use memory::*;
pub use task::*;

use serde::{Deserialize, Serialize};

/// A path or name as the kernel gives it: any bytes but NUL.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Default)]
pub struct Bytes(pub Vec<u8>);

impl Bytes {
    /// The bytes as a path.
    pub fn as_path(&self) -> &std::path::Path {
        use std::os::unix::ffi::OsStrExt;
        std::path::Path::new(std::ffi::OsStr::from_bytes(&self.0))
    }

    /// The text for people: invalid UTF-8 is replaced.
    pub fn lossy(&self) -> std::borrow::Cow<'_, str> {
        String::from_utf8_lossy(&self.0)
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.lossy())
    }
}

impl From<&std::path::Path> for Bytes {
    fn from(path: &std::path::Path) -> Self {
        use std::os::unix::ffi::OsStrExt;
        Self(path.as_os_str().as_bytes().to_vec())
    }
}

impl From<&[u8]> for Bytes {
    fn from(bytes: &[u8]) -> Self {
        Self(bytes.to_vec())
    }
}

/// Where and with what the image was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory {
    /// Version of the writing program.
    pub writer: String,
    /// `uname -r` of the machine of the dump.
    pub kernel: String,
    /// `uname -m` of the machine of the dump.
    pub machine: String,
    /// Seconds since the epoch at the start of the dump.
    pub created: u64,
    /// Pid of the root of the tree.
    pub root: i32,
    /// `--shell-job`: the root's session and terminal belong to a shell outside the tree.
    pub shell_job: bool,
    /// Contents of the dumping kernel's `[vdso]`, to tell whether the restoring kernel's is the same.
    pub vdso: Vec<u8>,
}

/// What the dump cost, phase by phase. Times in microseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DumpStats {
    /// Who listed the descriptors: `ebpf` or `procfs`.
    pub reader: String,
    /// Before the freeze: loading observers, reading ahead.
    pub prepare_us: u64,
    /// From the first task interrupted until the last one stopped.
    pub freezing_us: u64,
    /// From the last task stopped until the tree was released (or killed).
    pub frozen_us: u64,
    /// Named parts of the frozen time.
    pub phases: Vec<(String, u64)>,
    /// Whole dump up to the publishing of the image.
    pub total_us: u64,
    /// Pages of 4 KiB stored.
    pub pages_stored: u64,
    /// Pages skipped because they hold only zeros.
    pub pages_zero: u64,
    /// Pages that share a stored page with another process.
    pub pages_shared: u64,
    /// How much there was to do.
    pub counts: DumpCounts,
}

/// How much of what takes time a dump had to do with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DumpCounts {
    /// Living processes.
    pub processes: u64,
    /// Their threads.
    pub threads: u64,
    /// Open descriptors.
    pub descriptors: u64,
    /// Open file descriptions behind them.
    pub files: u64,
    /// Those of them whose state had to be asked for one by one: pipes, sockets, eventfds, …
    pub asked: u64,
    /// Mappings.
    pub mappings: u64,
    /// Contiguous ranges of private pages.
    pub ranges: u64,
    /// Private pages.
    pub pages: u64,
    /// Those of them in processes that have a parent or children in the tree, whose page frames were compared.
    pub compared: u64,
}

/// What a dump copied before the freeze.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrecopyStats {
    /// Each pass over the memory.
    pub rounds: Vec<Round>,
    /// Pages that were expected to be left for the freeze.
    pub expected_pages: u64,
    /// Microseconds that copying them was expected to take.
    pub expected_us: u64,
    /// Pages that were stored under the freeze.
    pub late_pages: u64,
    /// Objects of shared memory of which only what had changed was left for the freeze.
    pub shared_tracked: u64,
    /// Those that were copied under the freeze, all of them: that they had not changed could not be proven.
    pub shared_whole: u64,
}

/// [`PrecopyStats`] before shared memory was tracked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrecopyStatsV1 {
    rounds: Vec<Round>,
    expected_pages: u64,
    expected_us: u64,
    late_pages: u64,
}

impl From<PrecopyStatsV1> for PrecopyStats {
    fn from(old: PrecopyStatsV1) -> Self {
        Self {
            rounds: old.rounds,
            expected_pages: old.expected_pages,
            expected_us: old.expected_us,
            late_pages: old.late_pages,
            ..Self::default()
        }
    }
}

/// A pass over the memory of a running tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Round {
    /// Pages that were copied, because they had changed since the last round.
    pub pages: u64,
    /// Microseconds that it took.
    pub us: u64,
    /// Microseconds since it was last looked which pages had changed; 0: all had to be copied.
    pub since_us: u64,
}

/// [`DumpStats`] before it had counts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DumpStatsV1 {
    reader: String,
    prepare_us: u64,
    freezing_us: u64,
    frozen_us: u64,
    phases: Vec<(String, u64)>,
    total_us: u64,
    pages_stored: u64,
    pages_zero: u64,
    pages_shared: u64,
}

impl From<DumpStatsV1> for DumpStats {
    fn from(old: DumpStatsV1) -> Self {
        Self {
            reader: old.reader,
            prepare_us: old.prepare_us,
            freezing_us: old.freezing_us,
            frozen_us: old.frozen_us,
            phases: old.phases,
            total_us: old.total_us,
            pages_stored: old.pages_stored,
            pages_zero: old.pages_zero,
            pages_shared: old.pages_shared,
            counts: DumpCounts::default(),
        }
    }
}

macro_rules! records {
    ($($ty:ty = $kind:literal v $version:literal;)*) => {
        $(impl crate::frame::Record for $ty {
            const KIND: u16 = $kind;
            const VERSION: u16 = $version;
        })*
    };
}

records! {
    Inventory = 1 v 1;
    Task = 2 v 1;
    AddressSpace = 3 v 1;
    FdTable = 4 v 1;
    OpenFile = 5 v 1;
    SharedMemoryV1 = 6 v 1;
    SharedMemory = 6 v 2;
    DumpStatsV1 = 8 v 1;
    DumpStats = 8 v 2;
    Pipe = 9 v 1;
    PrecopyStatsV1 = 10 v 1;
    PrecopyStats = 10 v 2;
    SharedFs = 12 v 1;
    Seccomp = 13 v 1;
    CgroupsV1 = 14 v 1;
    Cgroups = 14 v 2;
    AttributesV1 = 15 v 1;
    Attributes = 15 v 2;
    Clocks = 16 v 1;
    SharedActions = 18 v 1;
    Label = 20 v 1;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{Record, RecordReader, RecordWriter};

    #[test]
    fn old_precopies_say_nothing_of_shared_memory() {
        let round = Round { pages: 3, us: 4, since_us: 5 };
        let old = PrecopyStatsV1 { rounds: vec![round], expected_pages: 6, expected_us: 7, late_pages: 8 };
        let mut writer = RecordWriter::new();
        writer.push(&old).unwrap();
        let bytes = writer.finish();
        let record = RecordReader::new("old".as_ref(), &bytes[..]).unwrap().next().unwrap().unwrap();
        assert_eq!((record.kind(), record.version()), (PrecopyStats::KIND, 1));
        let stats = PrecopyStats::from(record.decode::<PrecopyStatsV1>().unwrap());
        let same = (stats.rounds, stats.expected_pages, stats.expected_us, stats.late_pages);
        assert_eq!((same, stats.shared_tracked, stats.shared_whole), ((vec![round], 6, 7, 8), 0, 0));
    }

    #[test]
    fn old_shared_memory_has_small_pages() {
        let pages = vec![PageRun { start: 4096, pages: 2, store: 7 }];
        let kind = SharedMemoryKind::Anonymous;
        let old = SharedMemoryV1 { id: 3, size: 12288, kind: kind.clone(), pages: pages.clone() };
        let mut writer = RecordWriter::new();
        writer.push(&old).unwrap();
        let bytes = writer.finish();
        let record = RecordReader::new("old".as_ref(), &bytes[..]).unwrap().next().unwrap().unwrap();
        assert_eq!((record.kind(), record.version()), (SharedMemory::KIND, 1));
        let new = SharedMemory::from(record.decode::<SharedMemoryV1>().unwrap());
        assert_eq!(new, SharedMemory { id: 3, size: 12288, kind, pages, page_size: 4096 });
    }

    #[test]
    fn old_attributes_have_no_barriers() {
        // As version 1 wrote it.
        type Old = (i32, Option<i32>, Option<u32>, u32, u32, bool, Vec<()>, Vec<()>);
        let old: Old = (7, Some(256), Some(0x1f4), 3, 1, true, Vec::new(), Vec::new());
        let bytes = postcard::to_allocvec(&old).unwrap();
        let new = Attributes::from(postcard::from_bytes::<AttributesV1>(&bytes).unwrap());
        let expected = Attributes {
            pid: 7,
            leader_exited: Some(256),
            coredump_filter: Some(0x1f4),
            thp_disable: 3,
            mdwe: 1,
            memory_merge: true,
            ..Default::default()
        };
        assert_eq!(new, expected);
    }

    #[test]
    fn old_cgroups_have_permissions_only() {
        // As version 1 wrote it: one set of one cgroup with a mode, and a process in it.
        type Old = (Vec<Vec<(Bytes, Bytes, Vec<CgroupAccess>)>>, Vec<(i32, u32)>);
        let (hierarchy, path) = (Bytes(b"cpu".to_vec()), Bytes(b"/a".to_vec()));
        let access = vec![CgroupAccess { file: Bytes::default(), mode: 0o755, owner: (1, 2) }];
        let old: Old = (vec![vec![(hierarchy.clone(), path.clone(), access.clone())]], vec![(7, 0)]);
        let bytes = postcard::to_allocvec(&old).unwrap();
        let new = Cgroups::from(postcard::from_bytes::<CgroupsV1>(&bytes).unwrap());
        assert_eq!(new.sets, [[Cgroup { hierarchy: hierarchy.clone(), path: path.clone() }]]);
        assert_eq!((new.processes, new.threads, new.namespace), (vec![(7, 0)], Vec::new(), None));
        assert_eq!(new.directories, [CgroupDirectory { hierarchy, path, access, properties: Vec::new() }]);
    }

    #[test]
    fn old_stats_have_no_counts() {
        let old = DumpStatsV1 {
            reader: "ebpf".into(),
            frozen_us: 7,
            phases: vec![("files".into(), 3)],
            ..Default::default()
        };
        let mut writer = RecordWriter::new();
        writer.push(&old).unwrap();
        let bytes = writer.finish();
        let record = RecordReader::new("old".as_ref(), &bytes[..]).unwrap().next().unwrap().unwrap();
        assert_eq!((record.kind(), record.version()), (DumpStats::KIND, 1));
        let stats = DumpStats::from(record.decode::<DumpStatsV1>().unwrap());
        assert_eq!((stats.frozen_us, stats.phases, stats.counts), (7, old.phases, DumpCounts::default()));
    }
}
