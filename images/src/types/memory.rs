//! Address spaces and shared memory.

use super::{Bytes, OpenFileId};
use serde::{Deserialize, Serialize};

/// Number of an address space within the image.
pub type AddressSpaceId = u32;
/// Number of a shared memory object within the image.
pub type SharedMemoryId = u32;

/// The memory of one process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressSpace {
    /// Its number.
    pub id: AddressSpaceId,
    /// What `PR_SET_MM_MAP` takes.
    pub layout: MmLayout,
    /// `/proc/pid/auxv`.
    pub auxv: Vec<u8>,
    /// The executable (`/proc/pid/exe`).
    pub exe: OpenFileId,
    /// Mappings by address.
    pub vmas: Vec<Vma>,
    /// Contents of private pages by address: runs of consecutive pages.
    pub pages: Vec<PageRun>,
    /// Ranges guarded with `MADV_GUARD_INSTALL`: start and end.
    pub guards: Vec<(u64, u64)>,
}

/// Addresses of the parts of a program (`struct prctl_mm_map`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the fields are those of struct prctl_mm_map, see prctl(2)")]
pub struct MmLayout {
    pub start_code: u64,
    pub end_code: u64,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub brk: u64,
    pub start_stack: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
}

/// A mapping.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vma {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// `PROT_*` bits.
    pub prot: u8,
    /// What is mapped.
    pub backing: Backing,
    /// Attributes.
    pub flags: VmaFlags,
}

/// What a mapping maps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Backing {
    /// Private anonymous memory.
    Anonymous {
        /// `PR_SET_VMA_ANON_NAME`.
        name: Option<Bytes>,
    },
    /// Private mapping of a file.
    PrivateFile {
        /// The file.
        file: OpenFileId,
        /// Offset in bytes.
        offset: u64,
    },
    /// Shared mapping of a file.
    SharedFile {
        /// The file.
        file: OpenFileId,
        /// Offset in bytes.
        offset: u64,
    },
    /// Shared anonymous memory.
    SharedAnonymous {
        /// The object.
        object: SharedMemoryId,
        /// Offset in bytes.
        offset: u64,
    },
    /// One of the kernel's own pages: `[vdso]`, `[vvar]`, …
    Kernel {
        /// Its name in `/proc/pid/maps`.
        name: Bytes,
    },
    /// An attached System V shared memory segment, or a part of it.
    SystemV {
        /// The object.
        object: SharedMemoryId,
        /// Offset in bytes.
        offset: u64,
        /// It was not attached with SHM_RDONLY.
        writable: bool,
    },
    /// Huge pages of hugetlbfs, with a name in a file system or without (MAP_HUGETLB, MFD_HUGETLB).
    HugePages {
        /// The file.
        file: OpenFileId,
        /// Offset in bytes.
        offset: u64,
        /// Bytes of a page.
        page_size: u64,
        /// MAP_SHARED.
        shared: bool,
    },
    /// The ring of an io_setup(2) context with nothing in flight.
    AioRing {
        /// Its place among the contexts of the process.
        slot: u32,
        /// Where the oldest event is that was not reaped.
        head: u32,
        /// Where the next event goes.
        tail: u32,
        /// Events, also those that were reaped: `struct io_event`. What is missing at the end is zeros.
        events: Vec<[u64; 4]>,
    },
}

/// Attributes of a mapping that mmap(2), mlock(2) and madvise(2) give it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmaFlags {
    /// MAP_GROWSDOWN.
    pub growsdown: bool,
    /// MAP_NORESERVE.
    pub noreserve: bool,
    /// MAP_DROPPABLE.
    pub droppable: bool,
    /// mlock(2).
    pub locked: bool,
    /// mlock2(2) MLOCK_ONFAULT.
    pub lock_on_fault: bool,
    /// MADV_DONTFORK.
    pub dontfork: bool,
    /// MADV_WIPEONFORK.
    pub wipeonfork: bool,
    /// MADV_DONTDUMP.
    pub dontdump: bool,
    /// MADV_MERGEABLE.
    pub mergeable: bool,
    /// MADV_HUGEPAGE.
    pub hugepage: bool,
    /// MADV_NOHUGEPAGE.
    pub nohugepage: bool,
    /// MADV_SEQUENTIAL.
    pub sequential: bool,
    /// MADV_RANDOM.
    pub random: bool,
}

/// Consecutive pages of one address space or object, and where the page store has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageRun {
    /// Address, or offset within a shared object, in bytes.
    pub start: u64,
    /// Number of 4 KiB pages.
    pub pages: u64,
    /// Index of the first page in the page store.
    pub store: u64,
}

/// Memory that several processes or descriptors can share: MAP_SHARED|MAP_ANONYMOUS, a memfd, a deleted file, a System V segment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedMemory {
    /// Its number.
    pub id: SharedMemoryId,
    /// Bytes.
    pub size: u64,
    /// What it is.
    pub kind: SharedMemoryKind,
    /// Contents; what is missing is a hole.
    pub pages: Vec<PageRun>,
    /// Bytes of a page: 4096, or those of a huge page of hugetlbfs.
    pub page_size: u64,
}

/// [`SharedMemory`] before there were huge pages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedMemoryV1 {
    pub(super) id: SharedMemoryId,
    pub(super) size: u64,
    pub(super) kind: SharedMemoryKind,
    pub(super) pages: Vec<PageRun>,
}

impl From<SharedMemoryV1> for SharedMemory {
    fn from(old: SharedMemoryV1) -> Self {
        Self { id: old.id, size: old.size, kind: old.kind, pages: old.pages, page_size: 4096 }
    }
}

/// Kinds of shared memory objects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SharedMemoryKind {
    /// mmap(MAP_SHARED | MAP_ANONYMOUS).
    Anonymous,
    /// memfd_create(2).
    Memfd {
        /// The name given to memfd_create.
        name: Bytes,
        /// `F_SEAL_*`.
        seals: u32,
        /// Permission bits.
        mode: u32,
        /// Owner and group.
        owner: (u32, u32),
    },
    /// A regular file that was unlinked while open.
    DeletedFile {
        /// Where it was, without " (deleted)".
        path: Bytes,
        /// Permission bits.
        mode: u32,
        /// Owner and group.
        owner: (u32, u32),
    },
    /// shmget(2).
    SystemV(SystemV),
}

/// A System V shared memory segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SystemV {
    /// Its id.
    pub id: i32,
    /// Its key; 0: IPC_PRIVATE, or removed.
    pub key: i32,
    /// Permission bits, SHM_DEST and SHM_LOCKED.
    pub mode: u32,
    /// Owner and group.
    pub owner: (u32, u32),
    /// Process that made it.
    pub creator: i32,
}
