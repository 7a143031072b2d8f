use super::{CHUNK, PAGE};
use std::{
    fmt, slice,
    sync::{Arc, Condvar, Mutex},
};

/// A page of memory where one must be aligned, as direct I/O wants it.
#[derive(Clone)]
#[repr(C, align(4096))]
pub(super) struct Page([u8; PAGE]);

impl Page {
    /// Memory for so many bytes, rounded up to whole pages. It is touched: using it later causes no page faults.
    pub(super) fn allocate(bytes: usize) -> Box<[Self]> {
        vec![Self([0; PAGE]); bytes.div_ceil(PAGE)].into()
    }

    pub(super) fn bytes(pages: &[Self]) -> &[u8] {
        // SAFETY: a Page is an array of PAGE bytes without padding (its alignment is its size), so the slice is that
        // many initialised bytes, borrowed for as long.
        unsafe { slice::from_raw_parts(pages.as_ptr().cast(), size_of_val(pages)) }
    }

    pub(super) fn bytes_mut(pages: &mut [Self]) -> &mut [u8] {
        // SAFETY: as in `bytes`, and the borrow is exclusive; any bytes make a valid Page.
        unsafe { slice::from_raw_parts_mut(pages.as_mut_ptr().cast(), size_of_val(pages)) }
    }
}

/// A bounded number of buffers.
pub(super) struct Pool {
    state: Mutex<State>,
    freed: Condvar,
}

struct State {
    free: Vec<Box<[Page]>>,
    made: usize,
    /// How many there may be.
    limit: usize,
}

impl Pool {
    /// At most so many bytes, but two buffers at least: one is filled while the other is written.
    pub(super) fn new(bytes: u64) -> Arc<Self> {
        let state = State { free: Vec::new(), made: 0, limit: 0 };
        let pool = Arc::new(Self { state: Mutex::new(state), freed: Condvar::new() });
        pool.set_limit(bytes);
        pool
    }

    /// Sets how many bytes there may be.
    pub(super) fn set_limit(&self, bytes: u64) {
        self.state().limit = (bytes as usize / CHUNK).max(2);
        self.freed.notify_all();
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no thread panics while it holds the pool")
    }

    /// Makes the buffers for so many bytes now, as far as the limit allows.
    pub(super) fn reserve(&self, bytes: u64) {
        loop {
            let mut state = self.state();
            if state.free.len() as u64 * CHUNK as u64 >= bytes || state.made >= state.limit {
                return;
            }
            state.made += 1;
            drop(state);
            let memory = Page::allocate(CHUNK);
            self.state().free.push(memory);
        }
    }

    /// An empty buffer; waits until there is one.
    pub(super) fn take(self: &Arc<Self>) -> Buffer {
        let state = self.state();
        let mut state =
            self.freed.wait_while(state, |s| s.free.is_empty() && s.made >= s.limit).expect("see Pool::state");
        let memory = state.free.pop().unwrap_or_else(|| {
            state.made += 1;
            drop(state);
            Page::allocate(CHUNK)
        });
        Buffer { memory, filled: 0, pool: Arc::clone(self) }
    }
}

/// Memory of a page store's writer for up to 1 MiB of page data. It goes back to the writer when dropped.
pub struct Buffer {
    memory: Box<[Page]>,
    filled: usize,
    pool: Arc<Pool>,
}

impl Buffer {
    /// The page data so far.
    pub fn filled(&self) -> &[u8] {
        &Page::bytes(&self.memory)[..self.filled]
    }

    /// The part without page data yet, whose contents are arbitrary.
    pub fn spare_mut(&mut self) -> &mut [u8] {
        &mut Page::bytes_mut(&mut self.memory)[self.filled..]
    }

    /// Declares the first bytes of [`Self::spare_mut`] page data.
    ///
    /// # Panics
    /// When `bytes` are not whole pages or more than there are.
    pub fn advance(&mut self, bytes: usize) {
        assert!(bytes.is_multiple_of(PAGE) && bytes <= CHUNK - self.filled, "{bytes} bytes after {}", self.filled);
        self.filled += bytes;
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer").field("filled", &self.filled).finish_non_exhaustive()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.pool.state().free.push(std::mem::take(&mut self.memory));
        self.pool.freed.notify_one();
    }
}
