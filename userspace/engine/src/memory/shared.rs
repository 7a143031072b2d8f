//! Which pages of a shared memory object have changed since they were copied.
//!
//! A page has not changed if every mapping through which somebody could have written to it was there all the time and
//! shows it protected (`tracking.rs`), and if it is the same page still. That all mappings are known is for the caller to
//! make sure (`dump/sharing.rs`); here is what their page tables say.
//!
//! What throws pages of an object away (MADV_REMOVE) leaves their protection where it is: a page of zeros that comes in
//! its place would look like the old one, unwritten. But it takes the page out of all page tables first, so a mapping of
//! our own, which we never touch, tells: a page that is in its page table is the one that was copied.

use super::{copy::Copier, known::Known, ranges, tracking::Tracking};
use crate::{
    error::{Context, Result},
    kernel::{
        PAGE,
        pagemap::{Pagemap, Range},
        sys::View,
    },
    objects::shared_memory,
};
use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

/// A mapping of an object in a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub pid: i32,
    /// Addresses.
    pub range: Range,
    /// Of the first byte in the object.
    pub offset: u64,
}

impl Place {
    /// The part of the object that is mapped.
    fn part(&self) -> Range {
        Range { start: self.offset, end: self.offset + (self.range.end - self.range.start) }
    }

    /// Addresses as parts of the object.
    fn offsets(&self, addresses: &[Range]) -> Vec<Range> {
        let offset = |address: u64| address - self.range.start + self.offset;
        addresses.iter().map(|r| Range { start: offset(r.start), end: offset(r.end) }).collect()
    }
}

/// An object whose writes are tracked.
#[derive(Debug)]
pub(crate) struct Object {
    /// What is in the store, by offset in the object.
    pub known: Known,
    /// Where it was mapped when it was last looked, successfully or not.
    pub places: Vec<Place>,
    /// When that look began.
    pub looked: Duration,
    /// A way to its contents.
    pub source: OwnedFd,
    view: View,
    /// Parts that the view did not have at the last look.
    absent: Vec<Range>,
}

impl Object {
    /// Of an object of `size` bytes, of which nothing is known.
    pub(crate) fn new(source: OwnedFd, size: u64) -> io::Result<Self> {
        let view = View::new(source.as_fd(), size.next_multiple_of(PAGE))?;
        Ok(Self {
            known: Known::default(),
            places: Vec::new(),
            looked: Duration::ZERO,
            source,
            view,
            absent: Vec::new(),
        })
    }

    /// Known parts that have not changed since the last look, if there were no mappings but those of then and `places`,
    /// where it is mapped now. `protect`: further writes are tracked.
    ///
    /// # Errors
    /// A mapping that is not there any more, or cannot be tracked.
    pub(crate) fn unchanged<'a>(
        &mut self,
        places: Vec<Place>,
        tracking: impl Fn(i32) -> Option<&'a Tracking>,
        protect: bool,
        threads: usize,
    ) -> io::Result<Vec<Range>> {
        let mut changed = Vec::new();
        changed.extend(lost(&self.places, &places));
        self.places = places;
        for place in &self.places {
            let tracking = tracking(place.pid).ok_or(io::ErrorKind::NotFound)?;
            let pagemap = Pagemap::open(place.pid)?.with_threads(threads);
            changed.extend(place.offsets(&tracking.unprotected(&pagemap, place.range, protect)?));
        }
        self.absent = self.view_without_pages(threads)?;
        changed.extend(&self.absent);
        Ok(ranges::subtract(self.known.covered(), &ranges::set(changed)))
    }

    /// Parts of the object whose pages our own page table does not have.
    fn view_without_pages(&self, threads: usize) -> io::Result<Vec<Range>> {
        let mut absent = Vec::new();
        let range = Range { start: self.view.start(), end: self.view.start() + self.view.len() };
        Pagemap::open(std::process::id() as i32)?.with_threads(threads).absent(range, &mut absent)?;
        Ok(ranges::set(Place { pid: 0, range, offset: 0 }.offsets(&absent)))
    }

    /// Copies all but `unchanged`; pages.
    pub(crate) fn copy(&mut self, unchanged: Vec<Range>, copier: &mut Copier<'_>) -> Result<u64> {
        let whole = [Range { start: 0, end: self.view.len() }];
        let changed = ranges::subtract(&whole, &unchanged);
        let mut new = Vec::new();
        for part in ranges::intersect(&changed, &self.absent) {
            new.extend(shared_memory::data_within(&self.source, part).context(|| "look for shared memory".into())?);
        }
        // Before the copying: what is thrown away from now on is noticed. A page that cannot be had is copied next time, too.
        for part in &new {
            let _ = self.view.populate(self.source.as_fd(), part.start, part.end - part.start);
        }
        let parts = ranges::union(&ranges::subtract(&changed, &self.absent), &new);
        let runs = copier.shared(&self.source, &parts)?;
        self.known.keep(unchanged);
        self.known.learn(&parts, runs);
        Ok(ranges::size(&parts) / PAGE)
    }
}

/// Parts of the object whose mappings of old are not at their places any more. With them went what their page tables knew.
fn lost(before: &[Place], now: &[Place]) -> Vec<Range> {
    let mut lost = Vec::new();
    for place in before {
        // Mappings that were split or have grown are still there.
        let same = |other: &&Place| {
            other.pid == place.pid
                && other.range.start.wrapping_sub(other.offset) == place.range.start.wrapping_sub(place.offset)
        };
        let still = ranges::set(now.iter().filter(same).map(Place::part).collect());
        lost.extend(ranges::subtract(&[place.part()], &still));
    }
    ranges::set(lost)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::sys::Mapping;

    fn place(pid: i32, start: u64, end: u64, offset: u64) -> Place {
        Place { pid, range: Range { start: start * PAGE, end: end * PAGE }, offset: offset * PAGE }
    }

    fn part(start: u64, end: u64) -> Range {
        Range { start: start * PAGE, end: end * PAGE }
    }

    #[test]
    fn mappings_that_went() {
        let before = [place(1, 100, 110, 0), place(2, 50, 60, 5)];
        assert_eq!(lost(&before, &before), []);
        // Split in two, and one more elsewhere.
        let split = [place(1, 100, 104, 0), place(1, 104, 110, 4), place(2, 50, 60, 5), place(3, 100, 110, 0)];
        assert_eq!(lost(&before, &split), []);
        // A hole, and the other one begins later.
        let less = [place(1, 100, 103, 0), place(1, 104, 110, 4), place(2, 52, 60, 7)];
        assert_eq!(lost(&before, &less), [part(3, 4), part(5, 7)]);
        // Moved, in another process, or another part of the object at the same addresses.
        assert_eq!(lost(&before, &[place(1, 200, 210, 0), place(2, 50, 60, 5)]), [part(0, 10)]);
        assert_eq!(lost(&before, &[place(1, 100, 110, 0), place(3, 50, 60, 5)]), [part(5, 15)]);
        assert_eq!(lost(&before, &[place(1, 100, 110, 1), place(2, 50, 60, 5)]), [part(0, 10)]);
    }

    #[test]
    fn offsets_of_addresses() {
        let place = place(1, 100, 110, 7);
        assert_eq!(place.part(), part(7, 17));
        assert_eq!(place.offsets(&[part(101, 102), part(109, 110)]), [part(8, 9), part(16, 17)]);
    }

    /// A page that was thrown away and comes again as zeros is not the page that was copied.
    #[test]
    fn thrown_away_pages_are_absent_from_the_view() {
        let memory = Mapping::shared(8 * PAGE).unwrap();
        memory.bytes_mut().fill(7);
        let link = format!("/proc/self/map_files/{:x}-{:x}", memory.start(), memory.start() + 8 * PAGE);
        let source: OwnedFd = std::fs::File::open(link).unwrap().into();
        let mut object = Object::new(source, 8 * PAGE).unwrap();
        let absent = |object: &Object| object.view_without_pages(1).unwrap();
        assert_eq!(absent(&object), [part(0, 8)]);
        object.view.populate(object.source.as_fd(), 2 * PAGE, 3 * PAGE).unwrap();
        assert_eq!(absent(&object), [part(0, 2), part(5, 8)], "neighbours are not asked for");
        object.view.populate(object.source.as_fd(), 0, 8 * PAGE).unwrap();
        assert_eq!(absent(&object), []);
        // SAFETY: the pages are part of the mapping.
        unsafe { libc::madvise((memory.start() + 3 * PAGE) as *mut _, PAGE as usize, libc::MADV_REMOVE) };
        assert_eq!(memory.bytes_mut()[3 * PAGE as usize], 0, "a read brings a page of zeros");
        assert_eq!(absent(&object), [part(3, 4)]);
    }
}
