//! Which pages of a running process have changed since they were copied.
//!
//! A userfaultfd made in the process protects its private mappings. A page that is written to loses its protection and
//! is copied again, and so is one that never had any: mappings that are new, moved, unmapped and mapped again. So nothing
//! has to be known of what the process did to its mappings. Once the descriptor is closed nothing is left of it all.
//!
//! Not seen are writes of devices into pages that they were given before (direct I/O under way), which is why trees with
//! such descriptors are not tracked (`dump/rounds.rs`).

use super::{
    area::{Area, Kind},
    known::Known,
    ranges,
};
use crate::{
    error::{Error, Result},
    kernel::{
        pagemap::{Pagemap, Range},
        userfaultfd::{self, Userfault},
    },
    task::{FrozenTree, Remote},
};
use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

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

    /// Known pages that have not been written to. `protect`: further writes are tracked.
    ///
    /// What changes while this looks counts as written to the next time. EBUSY: the process itself tracks some of them.
    pub(super) fn unwritten(&self, pagemap: &Pagemap, areas: &[Area], protect: bool) -> io::Result<Vec<Range>> {
        let mut written = Vec::new();
        let mut tracked = Vec::new();
        for span in spans(areas) {
            for part in self.register(span)? {
                let (from, to) = (part[0].range.start, part[part.len() - 1].range.end);
                let range = Range { start: from, end: to };
                let scanned = match part[0].kind {
                    Kind::File => pagemap.written_over_files(range, protect, &mut written),
                    _ => pagemap.written(range, part.len(), protect, &mut written),
                };
                match scanned {
                    // A mapping has just been made there.
                    Err(e) if e.raw_os_error() == Some(libc::EPERM) => {}
                    other => {
                        other?;
                        ranges::push(&mut tracked, range);
                    }
                }
            }
        }
        let known = ranges::intersect(self.known.covered(), &tracked);
        // Parts of a span in which a scan failed came twice.
        Ok(ranges::subtract(&known, &ranges::set(written)))
    }

    /// Lets the pages of mappings that follow each other be protected. Gives them back, without those that cannot be.
    fn register<'a>(&self, span: &'a [Area]) -> io::Result<Vec<&'a [Area]>> {
        let whole = Range { start: span[0].range.start, end: span[span.len() - 1].range.end };
        let gone = match self.userfault.register(whole) {
            Ok(()) => return Ok(vec![span]),
            // Another program is run, or the process is gone: nothing that is known of its memory is true.
            Err(e) => e.raw_os_error() == Some(libc::ESRCH),
        };
        let mut able = Vec::new();
        for area in span.chunks(1) {
            match gone || self.userfault.register(area[0].range).is_err() {
                true if area[0].registered => return Err(io::Error::from_raw_os_error(libc::EBUSY)),
                true => {}
                false => able.push(area),
            }
        }
        Ok(able)
    }
}

impl AsFd for Tracking {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.userfault.as_fd()
    }
}

/// Private mappings of the same kind between which there is no other.
fn spans(areas: &[Area]) -> impl Iterator<Item = &[Area]> {
    areas
        .chunk_by(|a, b| can_be_tracked(a) && can_be_tracked(b) && a.kind == b.kind)
        .filter(|span| can_be_tracked(&span[0]))
}

fn can_be_tracked(area: &Area) -> bool {
    area.is_private() && area.kind != Kind::Droppable
}
