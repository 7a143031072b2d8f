use super::{
    CHUNK, PAGE,
    slab::{HALVES, Half},
};
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

    pub(super) fn bytes_mut(pages: &mut [Self]) -> &mut [u8] {
        // SAFETY: a Page is an array of PAGE bytes without padding (its alignment is its size), so the slice is that
        // many initialised bytes, borrowed exclusively for as long; any bytes make a valid Page.
        unsafe { slice::from_raw_parts_mut(pages.as_mut_ptr().cast(), size_of_val(pages)) }
    }
}

/// A bounded number of buffers.
pub(super) struct Pool {
    state: Mutex<State>,
    freed: Condvar,
}

struct State {
    free: Vec<Half>,
    made: usize,
    /// How many there may be.
    limit: usize,
}

impl Pool {
    /// At most so many bytes, in pairs of buffers, but one pair at least: one is filled while the other is written.
    pub(super) fn new(bytes: u64) -> Arc<Self> {
        let state = State { free: Vec::new(), made: 0, limit: 0 };
        let pool = Arc::new(Self { state: Mutex::new(state), freed: Condvar::new() });
        pool.set_limit(bytes);
        pool
    }

    /// Sets how many bytes there may be.
    pub(super) fn set_limit(&self, bytes: u64) {
        self.state().limit = (bytes as usize / CHUNK / HALVES).max(1) * HALVES;
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
            state.made += HALVES;
            drop(state);
            let made = Half::both();
            self.state().free.extend(made);
        }
    }

    /// Waits until there are buffers for so many bytes, or all but one that may be in use.
    pub(super) fn await_room(&self, bytes: u64) {
        let wanted = |limit: usize| bytes.div_ceil(CHUNK as u64).min(limit as u64 - 1) as usize;
        let room = |s: &mut State| s.free.len() + s.limit.saturating_sub(s.made);
        drop(self.freed.wait_while(self.state(), |s| room(s) < wanted(s.limit)).expect("see Pool::state"));
    }

    /// An empty buffer; waits until there is one.
    pub(super) fn take(self: &Arc<Self>) -> Buffer {
        let state = self.state();
        let mut state =
            self.freed.wait_while(state, |s| s.free.is_empty() && s.made >= s.limit).expect("see Pool::state");
        let memory = state.free.pop().unwrap_or_else(|| {
            state.made += HALVES;
            drop(state);
            let [first, second] = Half::both();
            self.state().free.push(second);
            self.freed.notify_one();
            first
        });
        Buffer { memory: Some(memory), filled: 0, pool: Arc::clone(self) }
    }
}

/// Memory of a page store's writer for up to 1 MiB of page data. It goes back to the writer when dropped.
pub struct Buffer {
    /// Nothing but while it is dropped.
    memory: Option<Half>,
    filled: usize,
    pool: Arc<Pool>,
}

impl Buffer {
    /// The page data so far.
    pub fn filled(&self) -> &[u8] {
        self.memory.as_ref().map_or(&[], |memory| &memory.bytes()[..self.filled])
    }

    /// The part without page data yet, whose contents are arbitrary.
    pub fn spare_mut(&mut self) -> &mut [u8] {
        self.memory.as_mut().map_or(&mut [], |memory| &mut memory.bytes_mut()[self.filled..])
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
        self.pool.state().free.extend(self.memory.take());
        self.pool.freed.notify_one();
    }
}
