//! Address spaces and shared memory, without what is in them.

use super::output::text;
use serde::Serialize;
use serde_json::{Value, json};
use standstill_engine::Image;
use standstill_images::types::{
    AddressSpace, Backing, FileKind, MmLayout, OpenFileId, PageRun, SharedMemory, SharedMemoryKind, Vma, VmaFlags,
};

const PAGE: u64 = 4096;

/// An address space.
#[derive(Serialize)]
pub(crate) struct Memory<'a> {
    pub address_space: u32,
    pub exe: OpenFileId,
    pub layout: &'a MmLayout,
    /// Types and values.
    pub auxv: Vec<(u64, u64)>,
    pub mappings: Vec<Mapping>,
    /// Starts and ends.
    pub guards: &'a [(u64, u64)],
    /// Private pages in the image.
    pub stored_pages: u64,
}

/// A mapping.
#[derive(Serialize)]
pub(crate) struct Mapping {
    pub start: u64,
    pub end: u64,
    pub prot: String,
    pub shared: bool,
    pub kind: &'static str,
    /// Path, name of anonymous memory, or of one of the kernel's mappings.
    pub name: Option<String>,
    pub file: Option<OpenFileId>,
    pub shared_memory: Option<u32>,
    pub offset: u64,
    pub flags: Vec<String>,
    /// Private pages in the image.
    pub stored_pages: u64,
}

/// Memory of one kind.
#[derive(Serialize)]
pub(crate) struct KindTotal {
    pub kind: &'static str,
    pub mappings: usize,
    pub mapped_bytes: u64,
    /// Shared memory objects, mapped or not.
    pub objects: usize,
    /// Private pages, and those of the objects.
    pub stored_pages: u64,
}

/// Memory that several processes or descriptors can share.
#[derive(Serialize)]
pub(crate) struct SharedObject {
    pub id: u32,
    pub kind: &'static str,
    pub name: Option<String>,
    pub size: u64,
    pub page_size: u64,
    pub stored_pages: u64,
    pub details: Value,
}

impl SharedObject {
    pub(crate) fn new(object: &SharedMemory) -> Self {
        let (name, details) = match &object.kind {
            SharedMemoryKind::Anonymous => (None, json!({})),
            SharedMemoryKind::Memfd { name, seals, mode, owner, .. } => {
                (Some(name), json!({ "seals": seals, "mode": mode, "owner": owner }))
            }
            SharedMemoryKind::DeletedFile { path, mode, owner, .. } => {
                (Some(path), json!({ "mode": mode, "owner": owner }))
            }
            SharedMemoryKind::SystemV(segment) => (None, json!({ "segment": segment })),
        };
        Self {
            id: object.id,
            kind: object_kind(object),
            name: name.map(|n| text(&n.0)),
            size: object.size,
            page_size: object.page_size,
            stored_pages: object.pages.iter().map(|r| r.pages).sum(),
            details,
        }
    }
}

/// What a shared memory object is called.
pub(super) fn object_kind(object: &SharedMemory) -> &'static str {
    match object.kind {
        SharedMemoryKind::Anonymous => "shared anonymous",
        SharedMemoryKind::Memfd { .. } => "memfd",
        SharedMemoryKind::DeletedFile { .. } => "deleted file",
        SharedMemoryKind::SystemV(_) => "System V shared memory",
    }
}

impl<'a> Memory<'a> {
    pub(crate) fn new(space: &'a AddressSpace, image: &Image) -> Self {
        let word = |b: &[u8]| b.try_into().map_or(0, u64::from_ne_bytes);
        Self {
            address_space: space.id,
            exe: space.exe,
            layout: &space.layout,
            auxv: space.auxv.chunks_exact(16).map(|pair| (word(&pair[..8]), word(&pair[8..]))).collect(),
            mappings: space.vmas.iter().map(|vma| Mapping::new(vma, space, image)).collect(),
            guards: &space.guards,
            stored_pages: space.pages.iter().map(|r| r.pages).sum(),
        }
    }
}

impl Mapping {
    fn new(vma: &Vma, space: &AddressSpace, image: &Image) -> Self {
        let (name, file, shared_memory, offset, shared) = match &vma.backing {
            Backing::Anonymous { name, .. } => (name.as_ref().map(|n| text(&n.0)), None, None, 0, false),
            Backing::PrivateFile { file, offset, .. } => (path(*file, image), Some(*file), None, *offset, false),
            Backing::SharedFile { file, offset, .. } => (path(*file, image), Some(*file), None, *offset, true),
            Backing::HugePages { file, offset, shared, .. } => {
                (path(*file, image), Some(*file), None, *offset, *shared)
            }
            Backing::SharedAnonymous { object, offset, .. } | Backing::SystemV { object, offset, .. } => {
                (None, None, Some(*object), *offset, true)
            }
            Backing::AioRing { .. } => (None, None, None, 0, true),
            Backing::Kernel { name, .. } => (Some(text(&name.0)), None, None, 0, false),
        };
        let bit = |bit: i32, letter| if i32::from(vma.prot) & bit != 0 { letter } else { '-' };
        Self {
            start: vma.start,
            end: vma.end,
            prot: [bit(libc::PROT_READ, 'r'), bit(libc::PROT_WRITE, 'w'), bit(libc::PROT_EXEC, 'x')].iter().collect(),
            shared,
            kind: kind(vma, space, image),
            name,
            file,
            shared_memory,
            offset,
            flags: flags(&vma.flags),
            stored_pages: pages_within(&space.pages, vma),
        }
    }
}

/// Names of the flags that are set.
fn flags(flags: &VmaFlags) -> Vec<String> {
    let all = json!(flags);
    all.as_object().into_iter().flatten().filter(|f| f.1 == &json!(true)).map(|f| f.0.clone()).collect()
}

fn object_of(file: OpenFileId, image: &Image) -> Option<&SharedMemory> {
    match &image.files.get(&file)?.kind {
        FileKind::SharedMemory { object, .. } => image.shared.get(object),
        _ => None,
    }
}

fn path(file: OpenFileId, image: &Image) -> Option<String> {
    match &image.files.get(&file)?.kind {
        FileKind::Regular(regular) => Some(text(&regular.path.0)),
        FileKind::Linked { name, .. } => Some(text(&name.0)),
        FileKind::Device { path, .. } => Some(text(&path.0)),
        _ => object_of(file, image).and_then(|o| SharedObject::new(o).name),
    }
}

/// All kinds of mappings, in the order of the report.
const KINDS: [&str; 11] = [
    "anonymous",
    "[stack]",
    "[heap]",
    "private file",
    "shared file",
    "shared anonymous",
    "memfd",
    "deleted file",
    "System V shared memory",
    "huge pages",
    "kernel",
];

fn kind(vma: &Vma, space: &AddressSpace, image: &Image) -> &'static str {
    let of_file = |file, named| object_of(file, image).map_or(named, object_kind);
    let layout = &space.layout;
    match &vma.backing {
        Backing::Anonymous { .. } if (vma.start..vma.end).contains(&layout.start_stack) => "[stack]",
        Backing::Anonymous { .. } if vma.start < layout.brk && layout.start_brk < vma.end => "[heap]",
        Backing::Anonymous { .. } => "anonymous",
        Backing::PrivateFile { file, .. } => of_file(*file, "private file"),
        Backing::SharedFile { file, .. } => of_file(*file, "shared file"),
        Backing::SharedAnonymous { .. } => "shared anonymous",
        Backing::SystemV { .. } => "System V shared memory",
        Backing::HugePages { .. } => "huge pages",
        Backing::AioRing { .. } => "AIO ring",
        Backing::Kernel { .. } => "kernel",
    }
}

/// Pages of sorted runs that lie in a mapping.
fn pages_within(runs: &[PageRun], vma: &Vma) -> u64 {
    let end = |run: &PageRun| run.start + run.pages * PAGE;
    let first = runs.partition_point(|r| end(r) <= vma.start);
    let inside = runs[first..].iter().take_while(|r| r.start < vma.end);
    inside.map(|r| (end(r).min(vma.end) - r.start.max(vma.start)) / PAGE).sum()
}

/// What there is of each kind.
pub(crate) fn totals(image: &Image) -> Vec<KindTotal> {
    let empty = |kind| KindTotal { kind, mappings: 0, mapped_bytes: 0, objects: 0, stored_pages: 0 };
    let mut all = KINDS.map(empty);
    let mut add = |kind: &str, change: &dyn Fn(&mut KindTotal)| {
        all.iter_mut().filter(|t| t.kind == kind).for_each(change);
    };
    for space in image.spaces.values() {
        for vma in &space.vmas {
            add(kind(vma, space, image), &|total| {
                total.mappings += 1;
                total.mapped_bytes += vma.end - vma.start;
                total.stored_pages += pages_within(&space.pages, vma);
            });
        }
    }
    for object in image.shared.values() {
        add(object_kind(object), &|total| {
            total.objects += 1;
            total.stored_pages += object.pages.iter().map(|r| r.pages).sum::<u64>();
        });
    }
    all.into_iter().filter(|t| t.mappings + t.objects > 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_counted_where_they_lie() {
        let runs = [(1, 3), (6, 2), (9, 1)].map(|(at, pages)| PageRun { start: at * PAGE, pages, store: 0 });
        let vma = |start, end| Vma {
            start: start * PAGE,
            end: end * PAGE,
            prot: 0,
            backing: Backing::Anonymous { name: None },
            flags: VmaFlags::default(),
        };
        let counts = [(0, 1), (0, 2), (2, 7), (4, 6), (7, 20), (0, 20)].map(|(a, b)| pages_within(&runs, &vma(a, b)));
        assert_eq!(counts, [0, 1, 3, 0, 2, 6]);
    }
}
