//! Some of the pages of a running tree: what reading them costs, how many hold only zeros, and how many change.

use super::{
    predict::{Costs, fit},
    stopwatch::Stopwatch,
};
use crate::{
    kernel::{PAGE, pagemap::Range},
    memory::{copy::is_zero, private::PrivatePages, source::Source},
};
use std::time::Instant;

/// So many pages are read to find out what reading costs: more than a processor's caches hold of them.
const READ: usize = 4096;
/// At most so many in one go.
const SLICE: u64 = 64;

/// Reads some of the pages of a tree, others each time.
pub(super) struct Pages {
    /// In use already: a dump does not wait for page faults either.
    buffer: Vec<u8>,
    again: Vec<u8>,
    round: usize,
    /// What the buffer holds, one after the other.
    slices: Vec<Slice>,
}

/// Pages that were read.
#[derive(Clone, Copy, Debug)]
struct Slice {
    pid: i32,
    start: u64,
    length: usize,
    read: Instant,
}

/// How many of some pages have changed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Changed {
    /// Pages that were looked at.
    pub pages: u64,
    /// Those that have changed.
    pub changed: u64,
    /// In so many ranges.
    pub ranges: u64,
    /// Since so many seconds.
    pub seconds: f64,
}

impl Pages {
    pub(super) fn new() -> Self {
        // Not zeros, which would be memory that the kernel has yet to find.
        let (buffer, again) = (vec![0xff; READ * PAGE as usize], vec![0xff; (SLICE * PAGE) as usize]);
        Self { buffer, again, round: 0, slices: Vec::new() }
    }

    /// Reads pages as the dump does. Which share holds only zeros.
    pub(super) fn copy(&mut self, spaces: &[PrivatePages], costs: &mut Costs) -> f64 {
        let slices = choose(spaces, self.round);
        self.round += 1;
        self.slices.clear();
        let (mut samples, mut zeros, mut read) = (Vec::new(), 0, 0);
        let mut memory = Memory::default();
        let mut used = 0;
        for (pid, range) in slices {
            let length = (range.end - range.start) as usize;
            let Some(slice) = self.buffer.get_mut(used..used + length) else { break };
            let Some(source) = memory.of(pid) else { continue };
            let (read_at, begin) = (Instant::now(), Stopwatch::start());
            // The page can be gone by now; what is read of the others counts.
            let Ok(n) = source.read(range.start, slice) else { continue };
            let pages = slice[..n].chunks_exact(PAGE as usize);
            zeros += pages.clone().filter(|page| is_zero(page)).count();
            samples.push((1.0, pages.len() as f64, begin.nanoseconds()));
            read += pages.len();
            let length = pages.len() * PAGE as usize;
            self.slices.push(Slice { pid, start: range.start, length, read: read_at });
            used += length;
        }
        (costs.copy_range, costs.copy_page) = fit(&samples);
        if read == 0 { 0.0 } else { zeros as f64 / read as f64 }
    }

    /// How many of the pages that were read have changed since.
    pub(super) fn changed(&mut self) -> Changed {
        let mut all = Changed::default();
        let mut memory = Memory::default();
        let mut at = 0;
        for slice in &self.slices {
            let before = &self.buffer[at..at + slice.length];
            at += slice.length;
            let now = &mut self.again[..slice.length];
            let Some(source) = memory.of(slice.pid) else { continue };
            let seconds = slice.read.elapsed().as_secs_f64();
            let Ok(n) = source.read(slice.start, now) else { continue };
            let page = PAGE as usize;
            let mut last = false;
            for (a, b) in before.chunks_exact(page).zip(now[..n].chunks_exact(page)) {
                let differs = a != b;
                all.pages += 1;
                all.changed += u64::from(differs);
                all.ranges += u64::from(differs && !last);
                all.seconds += seconds;
                last = differs;
            }
        }
        all.seconds /= all.pages.max(1) as f64;
        all
    }
}

/// The memory of one process after the other.
#[derive(Default)]
struct Memory(Option<(i32, Source)>);

impl Memory {
    /// `None`: it is gone.
    fn of(&mut self, pid: i32) -> Option<&Source> {
        if self.0.as_ref().is_none_or(|(open, _)| *open != pid) {
            self.0 = Some((pid, Source::open(pid).ok()?));
        }
        self.0.as_ref().map(|(_, source)| source)
    }
}

/// Slices of ranges all over the tree, as many as there is room for.
fn choose(spaces: &[PrivatePages], round: usize) -> Vec<(i32, Range)> {
    let all: Vec<(i32, Range)> = spaces
        .iter()
        .flat_map(|s| s.ranges.iter().map(|r| (s.pid, *r)))
        .flat_map(|(pid, r)| {
            let starts = (r.start..r.end).step_by((SLICE * PAGE) as usize);
            starts.map(move |start| (pid, Range { start, end: r.end.min(start + SLICE * PAGE) }))
        })
        .collect();
    let pages: u64 = all.iter().map(|(_, r)| (r.end - r.start) / PAGE).sum();
    let step = (pages as usize).div_ceil(READ).max(1);
    // What was read the last time is in the processor's caches now.
    all.into_iter().skip(round % step).step_by(step).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::sys::Mapping;

    fn space(pid: i32, ranges: Vec<Range>) -> PrivatePages {
        PrivatePages { pid, ranges, ..Default::default() }
    }

    #[test]
    fn slices_are_from_all_over() {
        let range = |start: u64, pages: u64| Range { start, end: start + pages * PAGE };
        let few = choose(&[space(7, vec![range(0, 3), range(1 << 20, 300)])], 5);
        assert_eq!(few.iter().map(|(_, r)| (r.end - r.start) / PAGE).collect::<Vec<_>>(), [3, 64, 64, 64, 64, 44]);
        let many = choose(&[space(7, vec![range(0, 1 << 20)])], 0);
        let pages: u64 = many.iter().map(|(_, r)| (r.end - r.start) / PAGE).sum();
        assert!(pages as usize <= READ && pages as usize > READ / 2, "{pages}");
        assert!(many.last().unwrap().1.start > (1 << 31), "{many:?}");
        let others = choose(&[space(7, vec![range(0, 1 << 20)])], 1);
        assert!(others.iter().all(|slice| !many.contains(slice)));
        assert_eq!(choose(&[], 3), []);
    }

    #[test]
    fn changed_pages_are_counted() {
        let memory = Mapping::anonymous(300 * PAGE).unwrap();
        memory.bytes_mut().fill(1);
        let ours = space(
            std::process::id() as i32,
            vec![
                Range { start: memory.start(), end: memory.start() + 100 * PAGE },
                Range { start: memory.start() + 150 * PAGE, end: memory.start() + 300 * PAGE },
            ],
        );
        let mut pages = Pages::new();
        assert_eq!(pages.copy(&[ours], &mut Costs::default()), 0.0);
        let nothing = pages.changed();
        assert_eq!((nothing.pages, nothing.changed, nothing.ranges), (250, 0, 0));
        for page in [3, 4, 70, 120, 299] {
            memory.bytes_mut()[(page * PAGE) as usize + 9] = 2;
        }
        let some = pages.changed();
        assert_eq!((some.changed, some.ranges), (4, 3));
        assert!(some.seconds >= nothing.seconds && some.seconds < 60.0);
    }
}
