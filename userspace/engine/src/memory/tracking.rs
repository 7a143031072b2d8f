//! Which pages of a running process have changed since they were copied.
//!
//! A userfaultfd made in the process protects its private mappings. A page that is written to loses its protection and
//! is copied again, and so is one that never had any: mappings that are new, moved, unmapped and mapped again. So nothing
//! has to be known of what the process did to its mappings, but that those looked at are registered still: marks of others
//! mean nothing. Once the descriptor is closed nothing is left of it all.
//!
//! Not seen are writes of devices into pages that they were given before (direct I/O under way), which is why trees with
//! such descriptors are not tracked (`dump/rounds.rs`).

use super::{
    area::{Area, Kind, View},
    known::Known,
    ranges,
};
use crate::{
    error::{Error, Result},
    kernel::{
        arch,
        pagemap::{Pagemap, Range, Writes},
        userfaultfd::{self, Userfault},
    },
    task::{FrozenTree, Remote},
};
use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};
use tracing::debug;

/// Tracks the writes to one address space until it is dropped.
#[derive(Debug)]
pub(crate) struct Tracking {
    userfault: Userfault,
    /// What is in the store.
    pub known: Known,
}

impl Tracking {
    /// Begins to track a running process, whose leader is stopped for a moment. Linux 6.7.
    ///
    /// # Errors
    /// What keeps the kernel or the process from it, which goes on as it was.
    pub(crate) fn begin(pid: i32, limit: Duration) -> Result<Self> {
        let stopped = FrozenTree::stop_leader(pid, limit)?;
        let mut remote = Remote::new(pid);
        let made = remote.open(libc::SYS_userfaultfd, [userfaultfd::FLAGS, 0, 0, 0, 0, 0]);
        remote.detach()?;
        drop(stopped);
        let userfault = Userfault::new(made?).map_err(|_| Error::Missing {
            what: "a kernel that tracks writes (userfaultfd with UFFD_FEATURE_WP_ASYNC, Linux 6.7)".into(),
            remedy: "use such a kernel".into(),
        })?;
        Ok(Self { userfault, known: Known::default() })
    }

    /// Goes on with what another process has begun.
    pub(crate) fn again(fd: OwnedFd, known: Known) -> Self {
        Self { userfault: Userfault::again(fd), known }
    }

    /// Ends the protection of the memory that the next image compares by checksums. That it may not end everywhere does no harm.
    pub(crate) fn release(&self) {
        for range in self.known.summed() {
            if let Err(e) = self.userfault.release(range) {
                debug!("pages at {:x} stay protected: {e}", range.start);
            }
        }
    }

    /// Known pages that have not been written to. `protect`: further writes are tracked.
    ///
    /// What changes while this looks counts as written to the next time. EBUSY: the process itself tracks some of them.
    pub(super) fn unwritten(&self, pagemap: &Pagemap, view: &View<'_>, protect: bool) -> io::Result<Vec<Range>> {
        let mut look = Look { tracking: self, pagemap, view, protect, written: Vec::new(), tracked: Vec::new() };
        for span in spans(view) {
            let part = &view.areas[span.clone()];
            match (ranges::meet(self.known.covered(), view.whole(part)), protect) {
                // Mappings that are new to us all at once.
                (false, true) if look.ready(&span) => _ = look.protect(part)?,
                // Under the freeze nothing is to be done for those.
                (false, false) if part.iter().all(|area| !area.registered) => {}
                _ => look.at(span)?,
            }
        }
        let known = ranges::intersect(self.known.covered(), &ranges::set(look.tracked));
        // Parts of a span in which a scan failed came twice.
        Ok(ranges::subtract(&known, &ranges::set(look.written)))
    }

    /// Pages of a shared mapping that are not protected against writing. `protect`: they are from now on.
    ///
    /// What changes while this looks counts as written to the next time. An error: the mapping is not there, or cannot be
    /// tracked.
    pub(super) fn unprotected(&self, pagemap: &Pagemap, range: Range, protect: bool) -> io::Result<Vec<Range>> {
        let mut found = Vec::new();
        match pagemap.written(range, &[], Writes::Tracked, &mut found) {
            Err(e) if e.raw_os_error() == Some(libc::EPERM) && protect => {
                self.userfault.register(range)?;
                pagemap.written(range, &[], Writes::ResetAll, &mut found)?;
                return Ok(vec![range]);
            }
            other => other?,
        }
        if protect {
            pagemap.written(range, &[], Writes::ResetAll, &mut found)?;
        }
        // Only what is seen to be protected counts: addresses without a page table are taken for unwritten.
        pagemap.blank(range, &mut found)?;
        Ok(ranges::set(found))
    }
}

/// A search for written pages.
struct Look<'a> {
    tracking: &'a Tracking,
    pagemap: &'a Pagemap,
    view: &'a View<'a>,
    protect: bool,
    written: Vec<Range>,
    /// Mappings that have been registered since the last look.
    tracked: Vec<Range>,
}

impl Look<'_> {
    /// Whether pages of mappings can be protected; those that are not registered are from now on.
    fn ready(&mut self, span: &Span) -> bool {
        let room = self.room(span);
        self.scan(&self.view.areas[span.clone()], Writes::Tracked).is_ok()
            || self.tracking.userfault.register(room).is_ok()
    }

    /// Mappings that follow each other. Nothing is known of those that are not registered; if further writes are tracked,
    /// they are from now on.
    fn at(&mut self, span: Span) -> io::Result<()> {
        let areas = &self.view.areas[span.clone()];
        if self.protect && areas[0].is_large() {
            if self.protect(areas)? {
                self.tracked.push(self.view.whole(areas));
                return Ok(());
            }
            // It is another one than it was. All of it counts as written to.
            self.written.push(self.view.whole(areas));
        }
        // A scan that protects pages and fails in the middle has not told which of them were written to.
        match self.scan(areas, Writes::Tracked) {
            Ok(()) if !self.protect || self.protect(areas)? => self.tracked.push(self.view.whole(areas)),
            Ok(()) => {}
            Err(e) if e.raw_os_error() != Some(libc::EPERM) => return Err(e),
            Err(_) if areas.len() > 1 => {
                let middle = usize::midpoint(span.start, span.end);
                self.at(span.start..middle)?;
                self.at(middle..span.end)?;
            }
            Err(_) if !self.protect && !areas[0].registered => {}
            Err(_) => match self.tracking.userfault.register(self.room(&span)) {
                // Another program is run, or the process is gone.
                Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {}
                Err(_) if areas[0].registered => return Err(io::Error::from_raw_os_error(libc::EBUSY)),
                Err(_) => {}
                Ok(()) if self.protect => _ = self.protect(areas)?,
                Ok(()) => {}
            },
        }
        Ok(())
    }

    /// Mappings with the free addresses behind them, into which they may have grown meanwhile. One that is registered in
    /// part would be two, and mremap(2) of both at once fails. What is before them is for others to grow into.
    fn room(&self, span: &Span) -> Range {
        let own = whole(&self.view.areas[span.clone()]);
        let after = self.view.areas.get(span.end).map_or(own.end, |next| next.range.start);
        // The last one is the machine's.
        Range { start: own.start, end: after.min(arch::TASK_SIZE) }
    }

    /// Protects all pages of mappings; not if one has just been made there that is not registered.
    fn protect(&mut self, span: &[Area]) -> io::Result<bool> {
        match self.scan(span, Writes::Reset) {
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => Ok(false),
            other => other.map(|()| true),
        }
    }

    fn scan(&mut self, span: &[Area], writes: Writes) -> io::Result<()> {
        scan(self.pagemap, self.view, span, writes, &mut self.written)
    }
}

fn scan(pagemap: &Pagemap, view: &View<'_>, span: &[Area], writes: Writes, written: &mut Vec<Range>) -> io::Result<()> {
    match span[0].kind {
        Kind::File => pagemap.written_over_files(view.whole(span), writes, written),
        _ => {
            let mapped: Vec<Range> = span.iter().map(|area| view.clip(area.range)).collect();
            pagemap.written(view.whole(span), &mapped, writes, written)
        }
    }
}

/// Asks of a process that need not be tracked what is asked of one that is, for what it costs.
pub(crate) fn rehearse(pid: i32, areas: &[Area], threads: usize) -> io::Result<()> {
    let pagemap = Pagemap::open(pid)?.with_threads(threads);
    let mut written = Vec::new();
    let view = View::all(areas);
    spans(&view).try_for_each(|span| scan(&pagemap, &view, &areas[span], Writes::Seen, &mut written))
}

/// Addresses of mappings that follow each other.
fn whole(span: &[Area]) -> Range {
    Range { start: span[0].range.start, end: span[span.len() - 1].range.end }
}

impl AsFd for Tracking {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.userfault.as_fd()
    }
}

/// Places in a list of mappings.
type Span = std::ops::Range<usize>;

/// Private mappings in view of the same kind between which there is no other; large ones alone.
fn spans(view: &View<'_>) -> impl Iterator<Item = Span> {
    let alike = |a: &Area, b: &Area| a.kind == b.kind && !a.is_large() && !b.is_large();
    let seen = &view.areas[view.seen.clone()];
    let chunks = seen.chunk_by(move |a, b| can_be_tracked(a) && can_be_tracked(b) && alike(a, b));
    let mut next = view.seen.start;
    let places = chunks.map(move |chunk| {
        next += chunk.len();
        next - chunk.len()..next
    });
    places.filter(|span| can_be_tracked(&view.areas[span.start]))
}

fn can_be_tracked(area: &Area) -> bool {
    area.is_private() && area.kind != Kind::Droppable && !area.huge
}
