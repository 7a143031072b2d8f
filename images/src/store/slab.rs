//! Memory of buffers.

use super::{CHUNK, PAGE};
use nix::{
    libc::c_void,
    sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap},
};
use std::{
    alloc::{Layout, handle_alloc_error},
    num::NonZeroUsize,
    ptr::NonNull,
    slice,
    sync::Arc,
};

/// Memory for two buffers, which is one huge page where the kernel has one: it is touched with one page fault instead of
/// hundreds, and direct I/O has one piece of memory to look after.
struct Slab(NonNull<c_void>);

// SAFETY: the mapping is no thread's own, and nobody but its halves goes to it, each to its own part.
unsafe impl Send for Slab {}
// SAFETY: the same.
unsafe impl Sync for Slab {}

/// Buffers of a slab.
pub(super) const HALVES: usize = 2;

impl Slab {
    const LENGTH: NonZeroUsize = NonZeroUsize::new(HALVES * CHUNK).expect("two chunks are more than nothing");

    /// It is touched: using it later causes no page faults.
    fn allocate() -> Self {
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses concerns no other memory.
        let mapped = unsafe { mmap_anonymous(None, Self::LENGTH, protection, MapFlags::MAP_PRIVATE) };
        let Ok(start) = mapped else {
            handle_alloc_error(Layout::new::<[u8; HALVES * CHUNK]>());
        };
        // SAFETY: the range is the mapping just made. Without huge pages it stays one of small ones.
        let _ = unsafe { madvise(start, Self::LENGTH.get(), MmapAdvise::MADV_HUGEPAGE) };
        for page in 0..Self::LENGTH.get() / PAGE {
            // SAFETY: the page is part of the mapping just made, of which nobody knows yet.
            unsafe { start.cast::<u8>().add(page * PAGE).write(0) };
        }
        Self(start)
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // SAFETY: the range is the mapping that this made, and its halves hold on to it as long as they are used.
        let _ = unsafe { munmap(self.0, Self::LENGTH.get()) };
    }
}

/// Memory of one buffer.
pub(super) struct Half {
    slab: Arc<Slab>,
    number: usize,
}

impl Half {
    /// The two of a new slab.
    pub(super) fn both() -> [Self; HALVES] {
        let slab = Arc::new(Slab::allocate());
        std::array::from_fn(|number| Self { slab: Arc::clone(&slab), number })
    }

    fn start(&self) -> NonNull<u8> {
        // SAFETY: the mapping has so many chunks.
        unsafe { self.slab.0.cast::<u8>().add(self.number * CHUNK) }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: the half's chunk is mapped and initialised, and nobody else's.
        unsafe { slice::from_raw_parts(self.start().as_ptr(), CHUNK) }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the same, and the borrow is exclusive.
        unsafe { slice::from_raw_parts_mut(self.start().as_ptr(), CHUNK) }
    }
}
