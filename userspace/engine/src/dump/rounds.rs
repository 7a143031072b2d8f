//! Pre-copy: memory is copied while the tree runs, again and again what has changed meanwhile, so that little is left for
//! the freeze.

use super::{observer::Observer, target::InUse, trackings::Trackings};
use crate::{
    error::{Context, Error, Result},
    image::push_run,
    kernel::{PAGE, pagemap::Range, proc, sys},
    memory::{
        area::{Area, View},
        copy::Copier,
        known::Known,
        private::{self, PrivatePages},
        ranges,
        sums::{self, Sums},
    },
    task::Family,
    tree::sharing,
};
use standstill_images::types::Round;
use std::time::{Duration, Instant};
use tracing::{debug, warn};

/// When memory is copied before the freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precopy {
    /// If the tree is so large that it is worth it, and as often as it helps.
    Auto,
    /// At most so many rounds; 0: never.
    Rounds(u32),
}

/// How memory is kept as it was at the freeze.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MemorySnapshot {
    /// What has changed since the pre-copy is copied under the freeze.
    #[default]
    Copy,
    /// Processes are forked under the freeze, where that takes less time than to copy, and memory is copied from the
    /// forks while the tree goes on.
    Fork,
}

/// Limits of the pre-copy.
#[derive(Clone, Copy, Debug)]
pub struct PrecopyOptions {
    /// Whether at all.
    pub mode: Precopy,
    /// The freeze that is aimed at.
    pub max_freeze: Duration,
    /// Rounds of [`Precopy::Auto`] at most.
    pub max_rounds: u32,
    /// Bytes of page data that may wait to be written while the tree runs.
    pub buffer: u64,
    /// What becomes of what is left for the freeze, if the tree goes on afterwards.
    pub snapshot: MemorySnapshot,
}

impl Default for PrecopyOptions {
    fn default() -> Self {
        Self {
            mode: Precopy::Auto,
            max_freeze: Duration::from_millis(5),
            max_rounds: 12,
            buffer: 64 << 20,
            snapshot: MemorySnapshot::Copy,
        }
    }
}

/// Private memory from which on `Precopy::Auto` is worth another look at the tree.
const LARGE: u64 = 16 << 20;

/// Bytes of a large mapping that are looked at and copied before the next ones.
const PART: u64 = 64 << 20;

impl PrecopyOptions {
    /// How many rounds at most there are for a tree with so much memory.
    pub(crate) fn rounds(&self, resident: u64) -> u32 {
        match self.mode {
            Precopy::Auto if resident >= LARGE => self.max_rounds,
            Precopy::Auto => 0,
            Precopy::Rounds(n) => n,
        }
    }
}

/// Copies a running tree in rounds until little is left, or no less with another round.
pub(super) struct Rounds<'a, 'b> {
    pub trackings: &'a mut Trackings,
    pub copier: &'a mut Copier<'b>,
    pub observer: &'a mut Observer,
    /// The root of the tree.
    pub root: i32,
    /// For stopping a process.
    pub timeout: Duration,
    /// The next image is made by the same session: where most is written to, changes may be found by checksums.
    pub compare: bool,
    /// Whether it was said that the tree writes too fast.
    pub warned: &'a mut bool,
}

impl Rounds<'_, '_> {
    /// `looked`: when it was last looked which pages have changed.
    pub(super) fn run(
        &mut self,
        looked: &mut Option<Duration>,
        max: u32,
        options: &PrecopyOptions,
    ) -> Result<Vec<Round>> {
        let mut rounds = Vec::new();
        loop {
            let begin = Instant::now();
            let now = sys::monotonic();
            let (_, pids) = Family::of(self.root, self.observer.iterators());
            let pages = self.round(&pids, self.compare && rounds.is_empty())?;
            let since_us = looked.replace(now).map_or(0, |last| now.saturating_sub(last).as_micros() as u64);
            rounds.push(Round { pages, us: begin.elapsed().as_micros() as u64, since_us });
            debug!(?pids, round = ?rounds.last(), "pre-copied");
            match decide(&rounds, max, options.max_freeze) {
                Next::Another => {}
                Next::GiveUp if options.snapshot == MemorySnapshot::Copy && !*self.warned => {
                    *self.warned = true;
                    warn!(
                        "the tree writes to its memory faster than it can be copied: the freeze will be longer than asked \
                         (--snapshot fork copies after it, if the tree goes on)"
                    );
                    break;
                }
                Next::Freeze | Next::GiveUp => break,
            }
            // A round that waits for the disk is a long one, in which much is written to. And what follows the last one must
            // not wait for memory.
            let left = (rounds.len() > 1).then(|| PAGE * expect(&rounds).0);
            self.copier.store.await_room(left.map_or(u64::MAX, |left| 2 * left));
            self.copier.store.reserve(4 * left.unwrap_or(0));
        }
        Ok(rounds)
    }

    /// Copies what has changed since the last round; pages. `compare`: it is the first one of an image, before which memory
    /// with checksums was not protected.
    fn round(&mut self, pids: &[i32], compare: bool) -> Result<u64> {
        self.trackings.retain(pids);
        self.trackings.part();
        let others = sharing::of_running(pids);
        let firsts: Vec<i32> = pids.iter().copied().filter(|pid| others.iter().all(|other| other.0 != *pid)).collect();
        self.trackings.share(others);
        let root = pids.first().copied();
        let mut pages = 0;
        for &pid in &firsts {
            match self.process(pid, compare) {
                Ok(copied) => pages += copied,
                Err(e) if e.is_death() && (Some(pid) != root || is_led_by_the_dead(pid)) => self.trackings.remove(pid),
                Err(e) if e.is_death() => return Err(Error::Died(pid)),
                Err(e) => return Err(e),
            }
        }
        let unchanged = self.trackings.look_at_shared(&firsts, self.observer.iterators(), true, 1);
        for (key, unchanged) in unchanged {
            if let Some(object) = self.trackings.sharing.object_mut(key) {
                pages += object.copy(unchanged, self.copier)?;
            }
        }
        Ok(pages)
    }

    fn process(&mut self, pid: i32, compare: bool) -> Result<u64> {
        self.trackings.begin(pid, self.timeout)?;
        let Some(tracking) = self.trackings.of(pid).filter(|_| self.trackings.is_able(pid)) else { return Ok(0) };
        // Of memory of which nothing is known all may have to be copied. Who looks how far this has come wants to know that
        // from the beginning on, and not part by part.
        let mut ahead = if tracking.known.covered().is_empty() { InUse::by(&[pid]).resident } else { 0 };
        self.copier.store.told().expect(ahead);
        let pages = self.parts(pid, &mut ahead, compare);
        self.copier.store.told().drop_expected(ahead);
        pages
    }

    /// Looks at a tracked process and copies what has changed, part by part. `ahead`: bytes that are expected already.
    fn parts(&mut self, pid: i32, ahead: &mut u64, compare: bool) -> Result<u64> {
        let Some(tracking) = self.trackings.of(pid) else { return Ok(0) };
        let areas = Area::of_running(pid).context(|| format!("read the mappings of {pid}"))?;
        let ppid = proc::stat(pid).context(|| format!("read /proc/{pid}/stat"))?.ppid;
        let parent = self.trackings.parent(ppid);
        let (mut unchanged, mut found, mut gone, mut runs) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut summed, mut same) = (Vec::new(), 0);
        for view in View::parts(&areas, PART) {
            let (pages, _) = private::look(pid, &view, Some(tracking), true, 1)?;
            let now = ranges::size(&pages.ranges).min(*ahead);
            self.copier.store.told().drop_expected(now);
            *ahead -= now;
            let range = view.of_one().filter(|_| compare);
            let copied = match range.and_then(|range| before(&tracking.known, range, &pages)) {
                Some(before) => {
                    let (copied, now) = self.copier.compared(&pages, &tracking.known, &before)?;
                    debug!(pid, start = now.range().start, pages = pages.scanned(), same = copied.same, "compared");
                    let changed = ranges::size(&pages.ranges) / PAGE - copied.same;
                    if sums::pay(changed, pages.scanned(), true) {
                        summed.push(now);
                    }
                    copied
                }
                None => self.copier.private(&pages, parent)?,
            };
            same += copied.same;
            copied.runs.into_iter().for_each(|run| push_run(&mut runs, run));
            for (all, part) in [(&mut unchanged, pages.unchanged), (&mut found, pages.ranges), (&mut gone, copied.gone)]
            {
                part.into_iter().for_each(|range| ranges::push(all, range));
            }
        }
        let pages = ranges::size(&found) / PAGE - same;
        if let Some(tracking) = self.trackings.of_mut(pid) {
            tracking.known.keep(unchanged);
            tracking.known.learn(&ranges::subtract(&found, &gone), runs);
            if compare {
                tracking.known.set_sums(summed);
            }
        }
        Ok(pages)
    }
}

/// The checksums to compare the memory of a range with. There may be none yet, if much of what is known was written to.
fn before(known: &Known, range: Range, pages: &PrivatePages) -> Option<Sums> {
    let much = || sums::pay(ranges::size(&pages.ranges) / PAGE, pages.scanned(), false);
    let is_known = ranges::meet(known.covered(), range);
    known.sums(range).cloned().or_else(|| (is_known && much()).then(|| Sums::new(range)))
}

/// Whether a process lives on without its leader, which would have to make a system call to have it tracked.
fn is_led_by_the_dead(pid: i32) -> bool {
    proc::stat(pid).is_ok_and(|s| s.is_dead_leader())
}

/// What comes after a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Another,
    Freeze,
    /// The freeze, though more is left than there should be.
    GiveUp,
}

/// What is left for the freeze, as the last round lets expect: the pages that are written to while a round of this length
/// lasts, and how long it takes to copy them, in microseconds.
pub(super) fn expect(rounds: &[Round]) -> (u64, u64) {
    let Some(last) = rounds.last() else { return (0, 0) };
    // Where nothing was known, all pages had to be copied, changed or not.
    let left = (last.pages * last.us).checked_div(last.since_us).unwrap_or(0);
    // Rounds that waited for the disk do not tell how long it takes.
    let costs = rounds.iter().filter(|r| r.pages >= 64).map(|r| 1000 * r.us / r.pages);
    (left, left * costs.min().unwrap_or(0) / 1000)
}

fn decide(rounds: &[Round], max: u32, max_freeze: Duration) -> Next {
    let Some(last) = rounds.last() else { return Next::Another };
    let max_us = max_freeze.as_micros() as u64;
    let (_, left_us) = expect(rounds);
    let soon = last.since_us != 0 && left_us <= max_us / 4;
    // Once little enough is left, another round must pay for the writes that it slows down.
    let much = if left_us > max_us { 3 } else { 2 };
    let shrinking = rounds.len() < 2 || last.pages < rounds[rounds.len() - 2].pages / 4 * much;
    match (rounds.len() as u32) < max {
        // A long round may have waited for the disk: another is short.
        true if soon && last.us > 4 * max_us && shrinking => Next::Another,
        true if !soon && shrinking => Next::Another,
        _ if last.since_us == 0 || left_us <= max_us => Next::Freeze,
        _ => Next::GiveUp,
    }
}

/// What a pre-copy of a tree that is only looked at would come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Foreseen {
    /// Pages that are copied while the tree runs.
    pub early: u64,
    /// Pages that are left for the freeze.
    pub late: u64,
}

/// Goes through the rounds of a pre-copy without copying: `all` pages at first, then what `written` says is written to
/// within so many microseconds. `took`: how long a round of so many pages takes. `freezing_us`: from the last round to
/// the moment in which nobody writes any more.
pub(crate) fn foresee(
    options: &PrecopyOptions,
    max: u32,
    all: u64,
    took: impl Fn(u64) -> u64,
    written: impl Fn(u64) -> u64,
    freezing_us: u64,
) -> Foreseen {
    let mut rounds = vec![Round { pages: all, us: took(all), since_us: 0 }];
    while decide(&rounds, max, options.max_freeze) == Next::Another {
        let since_us = rounds[rounds.len() - 1].us.max(1);
        let pages = written(since_us).min(all);
        rounds.push(Round { pages, us: took(pages), since_us });
    }
    let last = rounds[rounds.len() - 1];
    Foreseen { early: rounds.iter().map(|r| r.pages).sum(), late: written(last.us + freezing_us).min(all) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_millis(5);

    fn round(pages: u64, us: u64, since_us: u64) -> Round {
        Round { pages, us, since_us }
    }

    #[test]
    fn rounds_end_when_little_is_left() {
        let mut rounds = vec![round(1_000_000, 4_000_000, 0)];
        assert_eq!(decide(&rounds, 12, LIMIT), Next::Another);
        // 2,000 pages a second.
        rounds.push(round(8_000, 30_000, 4_000_000));
        assert_eq!(expect(&rounds).0, 60);
        assert_eq!(decide(&rounds, 12, LIMIT), Next::Another);
        rounds.push(round(60, 5_000, 30_000));
        assert_eq!(decide(&rounds, 12, LIMIT), Next::Freeze);
    }

    #[test]
    fn a_precopy_is_foreseen() {
        let options = PrecopyOptions::default();
        let took = |pages: u64| 1000 + pages;
        let idle = foresee(&options, 12, 100_000, took, |_| 0, 2000);
        assert_eq!(idle, Foreseen { early: 100_000, late: 0 });
        // 2,000 pages a second: 202 in the first round, one in the second, and so few that it freezes after the third.
        let busy = foresee(&options, 12, 100_000, took, |us| us / 500, 2000);
        assert!((100_200..100_220).contains(&busy.early) && (5..10).contains(&busy.late), "{busy:?}");
        // As many as can be copied: all that one round gains is what the next one loses.
        let hopeless = foresee(&options, 12, 100_000, took, |us| us, 2000);
        assert_eq!((hopeless.early, hopeless.late), (200_000, 100_000));
    }

    #[test]
    fn rounds_end_when_they_do_not_help() {
        let mut rounds = vec![round(100_000, 100_000, 0), round(90_000, 90_000, 100_000)];
        assert_eq!(decide(&rounds, 12, LIMIT), Next::GiveUp);
        rounds[1].pages = 50_000;
        assert_eq!(decide(&rounds, 12, LIMIT), Next::Another);
        assert_eq!(decide(&rounds, 2, LIMIT), Next::GiveUp);
        assert_eq!(decide(&rounds[..1], 1, LIMIT), Next::Freeze);
    }
}
