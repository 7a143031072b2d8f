//! Huge pages of hugetlbfs: whether the machine has those that a restore takes.
//!
//! The kernel has a pool of them for each size. A mapping reserves what it may need when it is made, unless it has
//! MAP_NORESERVE; one that a process has inherited from its parent has no reservation, and takes a page at the first write
//! to it. A page that is in none of the pools is a SIGBUS for whoever touches it, so it is counted before.
//!
//! Mappings of huge pages are those of a file: of a name in hugetlbfs, a memfd, a System V segment, or of one that the
//! kernel makes for MAP_ANONYMOUS, private mappings included. That file is an object like other memory without a name
//! (`objects/shared_memory.rs`), so parents and children have the same one, and reservations come back as they were.

use super::{
    map::{cut, differing, huge, is_inherited},
    ranges,
};
use crate::{
    error::{Error, Result},
    image::Image,
    kernel::{
        PAGE,
        hugetlb::{self, Pool},
        pagemap::Range,
        shm,
    },
};
use standstill_images::types::{AddressSpace, Backing, FileKind, PageRun, SharedMemoryId, SharedMemoryKind, Vma};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io,
};

/// Refuses a restore for which there are not enough huge pages.
///
/// # Errors
/// Which ones are missing, and how many.
pub(crate) fn check(image: &Image) -> Result<()> {
    for (page_size, wanted) in needed(image) {
        let kib = page_size >> 10;
        let pool = match hugetlb::pool(page_size) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Pool::default(),
            other => other.map_err(|source| Error::System { call: format!("count huge pages of {kib} kB"), source })?,
        };
        let free = pool.free + pool.spare;
        if wanted > free {
            let total = pool.total + wanted - free;
            return Err(Error::Missing {
                what: format!("room for {wanted} huge pages of {kib} kB, {free} of which are free,"),
                remedy: format!("write {total} to {}/nr_hugepages", hugetlb::pool_dir(page_size)),
            });
        }
    }
    Ok(())
}

/// How many huge pages a restore takes, by size.
fn needed(image: &Image) -> BTreeMap<u64, u64> {
    let mut needed = BTreeMap::new();
    let mut add = |page_size: u64, pages: u64| *needed.entry(page_size).or_default() += pages;
    // What of each object is reserved.
    let mut reserved: HashMap<SharedMemoryId, Vec<Range>> = HashMap::new();
    let space_of = |pid: i32| Some(&image.spaces[&image.tasks.get(&pid)?.live.as_ref()?.address_space]);
    let mut counted = HashSet::new();
    for task in image.tasks.values() {
        let Some(space) = space_of(task.pid).filter(|space| counted.insert(space.id)) else { continue };
        let parent = space_of(task.ppid).filter(|_| task.pid != image.inventory.root);
        for vma in &space.vmas {
            let Backing::HugePages { file, offset, page_size, shared } = vma.backing else { continue };
            if !shared {
                add(page_size, own_pages(vma, page_size, space, parent));
            } else if let (FileKind::SharedMemory { object }, false) = (&image.files[&file].kind, vma.flags.noreserve) {
                let part = Range { start: offset, end: offset + (vma.end - vma.start) };
                reserved.entry(*object).or_default().push(part);
            }
        }
    }
    for object in image.shared.values().filter(|object| object.page_size > PAGE) {
        let mut parts = reserved.remove(&object.id).unwrap_or_default();
        parts.extend(touched(&object.pages, object.page_size));
        if let SharedMemoryKind::SystemV(segment) = &object.kind {
            if shm::status(segment.id).is_ok() {
                continue; // what it has reserved is used again
            }
            parts.push(Range { start: 0, end: object.size.next_multiple_of(object.page_size) });
        }
        add(object.page_size, ranges::size(&ranges::set(parts)) / object.page_size);
    }
    needed
}

/// Huge pages that a private mapping takes.
fn own_pages(vma: &Vma, page_size: u64, space: &AddressSpace, parent: Option<&AddressSpace>) -> u64 {
    let own = cut(&space.pages, vma);
    let pages = match parent.filter(|parent| is_inherited(vma, parent)) {
        Some(parent) => differing(vma, &own, &cut(&parent.pages, vma)).0,
        None if vma.flags.noreserve => own,
        None => return (vma.end - vma.start) / page_size,
    };
    ranges::size(&touched(&pages, page_size)) / page_size
}

/// The huge pages that something lies in.
fn touched(runs: &[PageRun], page_size: u64) -> Vec<Range> {
    ranges::joined(runs.iter().map(|run| huge(run.start, run.pages, page_size)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use standstill_images::types::VmaFlags;

    const SIZE: u64 = 2 << 20;

    fn run(start: u64, pages: u64, store: u64) -> PageRun {
        PageRun { start, pages, store }
    }

    fn space(vma: &Vma, pages: Vec<PageRun>) -> AddressSpace {
        let (id, layout, auxv, exe, guards) = Default::default();
        AddressSpace { id, layout, auxv, exe, vmas: vec![vma.clone()], pages, guards }
    }

    #[test]
    fn pages_are_counted_as_the_kernel_takes_them() {
        let backing = Backing::HugePages { file: 0, offset: 0, page_size: SIZE, shared: false };
        let mut vma = Vma { start: SIZE, end: 9 * SIZE, prot: 3, backing, flags: VmaFlags::default() };
        let parents = vec![run(SIZE, 1, 0), run(2 * SIZE, 3, 1), run(2 * SIZE + 9 * PAGE, 3, 4)];
        let parent = space(&vma, parents.clone());
        assert_eq!(own_pages(&vma, SIZE, &parent, None), 8, "all of it is reserved");
        // Inherited: what differs.
        let mut childs = parents;
        childs[2].store = 99;
        childs.push(run(8 * SIZE, 512, 200));
        let child = space(&vma, childs);
        assert_eq!(own_pages(&vma, SIZE, &child, Some(&parent)), 2);
        // Mapped by itself, without a reservation.
        vma.flags.noreserve = true;
        assert_eq!(own_pages(&vma, SIZE, &child, Some(&parent)), 3);
    }

    #[test]
    fn runs_lie_in_huge_pages() {
        let runs = [run(SIZE - PAGE, 2, 0), run(3 * SIZE, 1, 2), run(3 * SIZE + 5 * PAGE, 1, 3)];
        let range = |start: u64, end: u64| Range { start: start * SIZE, end: end * SIZE };
        assert_eq!(touched(&runs, SIZE), [range(0, 2), range(3, 4)]);
    }
}
