//! Whether the pages that a restore read into place are those that were written, by the store's checksums. They are
//! taken from the memory of the tasks: reading the store a second time would cost more.

use crate::{
    error::{Context, Result},
    image::Image,
    kernel::{PAGE, proc},
    memory::{copy::read_all, pages::OpenPages, source::Source},
};
use standstill_images::{ImageError, types::SharedMemoryId};
use std::{
    collections::{HashMap, HashSet},
    fs::File,
    os::{fd::OwnedFd, unix::fs::FileExt},
};

/// Pages of the store that follow each other where they were put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    store: u64,
    pages: u64,
    /// Number of the memory that they are in; 0 is the store itself.
    memory: usize,
    /// Byte address there.
    at: u64,
}

/// Where pages were put.
enum Memory {
    Process(Source),
    Shared(File),
}

/// Checks all pages. Nothing writes to the memory of the tree's processes since it was filled.
///
/// # Errors
/// A page that is not what was written.
pub(crate) fn verify(image: &Image, pages: &OpenPages<'_>, shared: &HashMap<SharedMemoryId, OwnedFd>) -> Result<()> {
    if pages.uncached().next().is_none() {
        return Ok(());
    }
    let mut memories = Vec::new();
    let mut pieces = Vec::new();
    let mut seen = HashSet::new();
    for (pid, live) in image.tasks.iter().filter_map(|(pid, task)| Some((*pid, task.live.as_ref()?))) {
        let space = &image.spaces[&live.address_space];
        if space.pages.is_empty() || !seen.insert(space.id) {
            continue;
        }
        memories.push((proc::path(pid, "mem"), Memory::Process(Source::open(pid)?)));
        pieces.extend(space.pages.iter().map(|r| Piece {
            store: r.store,
            pages: r.pages,
            memory: memories.len(),
            at: r.start,
        }));
    }
    for (id, fd) in shared {
        let file = File::from(fd.try_clone().context(|| "duplicate a descriptor".into())?);
        memories.push((format!("shared memory object {id}").into(), Memory::Shared(file)));
        let runs = image.shared[id].pages.iter();
        pieces.extend(runs.map(|r| Piece { store: r.store, pages: r.pages, memory: memories.len(), at: r.start }));
    }
    let pieces = once_each(pieces);
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let read = |first: u64, buffer: &mut [u8]| {
        each_piece(&pieces, first, buffer.len() as u64 / PAGE, |piece, place| {
            let part = &mut buffer[(place * PAGE) as usize..][..(piece.pages * PAGE) as usize];
            let Some((path, memory)) = piece.memory.checked_sub(1).map(|n| &memories[n]) else {
                return pages.read(piece.store, part);
            };
            let read = |part: &mut [u8], at: u64| match memory {
                Memory::Process(source) => source.read(at, part),
                Memory::Shared(file) => file.read_at(part, at),
            };
            let n = read_all(read, piece.at, part).map_err(|source| ImageError::Io { path: path.clone(), source })?;
            // The last page of a shared file may reach beyond the file's end.
            part[n..].fill(0);
            Ok(())
        })
    };
    for (origin, reader) in pages.uncached() {
        reader.verify_copy(threads, |first, buffer| read(origin + first, buffer))?;
    }
    Ok(())
}

/// The same in the order of the store, without pages that were put in several places.
fn once_each(mut pieces: Vec<Piece>) -> Vec<Piece> {
    pieces.sort_unstable_by_key(|p| p.store);
    let mut end = 0u64;
    pieces.retain_mut(|p| {
        let skip = end.saturating_sub(p.store).min(p.pages);
        *p = Piece { store: p.store + skip, pages: p.pages - skip, memory: p.memory, at: p.at + skip * PAGE };
        end = end.max(p.store + p.pages);
        p.pages > 0
    });
    pieces
}

/// Calls `action` for every part of `pages` pages from `first` on, with the page number within them where it goes. What
/// is in no piece is a piece of memory 0, the store.
fn each_piece<E>(
    pieces: &[Piece],
    first: u64,
    pages: u64,
    mut action: impl FnMut(Piece, u64) -> Result<(), E>,
) -> Result<(), E> {
    let (mut at, end) = (first, first + pages);
    let mut next = pieces.partition_point(|p| p.store + p.pages <= first);
    while at < end {
        let piece = match pieces.get(next) {
            Some(p) if p.store <= at => {
                next += 1;
                let skip = at - p.store;
                let pages = (p.pages - skip).min(end - at);
                Piece { store: at, pages, memory: p.memory, at: p.at + skip * PAGE }
            }
            other => {
                let until = other.map_or(end, |p| p.store.min(end));
                Piece { store: at, pages: until - at, memory: 0, at: at * PAGE }
            }
        };
        action(piece, at - first)?;
        at += piece.pages;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Every page is asked for once and in order, from a place where it was put.
        #[test]
        fn pages_are_found_where_they_were_put(
            runs in proptest::collection::vec((0u64..60, 1u64..10, 1usize..4), 0..20),
            first in 0u64..40,
            pages in 0u64..40,
        ) {
            let place = |store: u64, memory: usize| store * PAGE + ((memory as u64) << 32);
            let put: Vec<Piece> = runs
                .iter()
                .map(|&(store, pages, memory)| Piece { store, pages, memory, at: place(store, memory) })
                .collect();
            let mut at = first;
            each_piece(&once_each(put.clone()), first, pages, |piece, offset| {
                prop_assert_eq!((piece.store, piece.store - first), (at, offset));
                prop_assert_eq!(piece.at, place(piece.store, piece.memory));
                for page in at..at + piece.pages {
                    let here = |p: &&Piece| p.store <= page && page < p.store + p.pages;
                    let mut holders = put.iter().filter(here).map(|p| p.memory).peekable();
                    let found = if holders.peek().is_some() { holders.any(|m| m == piece.memory) } else { piece.memory == 0 };
                    prop_assert!(found);
                }
                at += piece.pages;
                Ok(())
            })?;
            prop_assert_eq!(at, first + pages);
        }
    }
}
