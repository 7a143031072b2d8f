//! Pre-copy: memory is copied while the tree runs, again and again what has changed meanwhile, so that little is left for
//! the freeze.

use super::trackings::Trackings;
use crate::{
    error::{Context, Error, Result},
    kernel::{PAGE, proc},
    memory::{
        copy::Copier,
        private::{self, Area},
        ranges,
    },
};
use standstill_images::types::Round;
use std::time::{Duration, Instant};
use tracing::{debug, warn};

/// When memory is copied before the freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precopy {
    /// If the tree is so large that it is worth it.
    Auto,
    /// At most so many rounds; 0: never.
    Rounds(u32),
}

/// Limits of the pre-copy.
#[derive(Clone, Copy, Debug)]
pub struct PrecopyOptions {
    /// Whether at all.
    pub mode: Precopy,
    /// The freeze that is aimed at.
    pub max_freeze: Duration,
    /// Bytes of page data that may wait to be written while the tree runs.
    pub buffer: u64,
}

impl Default for PrecopyOptions {
    fn default() -> Self {
        Self { mode: Precopy::Auto, max_freeze: Duration::from_millis(5), buffer: 64 << 20 }
    }
}

/// Private memory from which on `Precopy::Auto` is worth another look at the tree.
const LARGE: u64 = 16 << 20;
/// Rounds of `Precopy::Auto` at most.
const ROUNDS: u32 = 12;

impl PrecopyOptions {
    /// How many rounds at most there are for a tree with so much memory.
    pub(super) fn rounds(&self, resident: u64) -> u32 {
        match self.mode {
            Precopy::Auto if resident >= LARGE => ROUNDS,
            Precopy::Auto => 0,
            Precopy::Rounds(n) => n,
        }
    }
}

/// Copies a running tree in rounds until little is left, or no less with another round.
pub(super) struct Rounds<'a, 'b> {
    pub trackings: &'a mut Trackings,
    pub copier: &'a mut Copier<'b>,
    /// For stopping a process.
    pub timeout: Duration,
}

impl Rounds<'_, '_> {
    /// `members`: the tree's processes at the moment, parents first.
    pub(super) fn run(
        &mut self,
        max: u32,
        max_freeze: Duration,
        mut members: impl FnMut() -> Vec<i32>,
    ) -> Result<Vec<Round>> {
        let mut rounds = Vec::new();
        let mut last = Instant::now();
        loop {
            let begin = Instant::now();
            let pids = members();
            let pages = self.round(&pids)?;
            let interval = std::mem::replace(&mut last, begin);
            let us = |from: Instant, to: Instant| (to - from).as_micros() as u64;
            rounds.push(Round { pages, us: us(begin, Instant::now()), since_us: us(interval, begin) });
            debug!(?pids, round = ?rounds.last(), "pre-copied");
            let next = decide(&rounds, max, max_freeze);
            if next == Next::Freeze {
                break;
            }
            if next == Next::GiveUp {
                warn!(
                    "the tree writes to its memory faster than it can be copied: the freeze will be longer than asked"
                );
                break;
            }
            // What waits to be written must not compete with the tree, nor with the copying under the freeze.
            self.copier.store.drain();
        }
        Ok(rounds)
    }

    /// Copies what has changed since the last round; pages.
    fn round(&mut self, pids: &[i32]) -> Result<u64> {
        self.trackings.retain(pids);
        let root = pids.first().copied();
        let mut pages = 0;
        for &pid in pids {
            match self.process(pid) {
                Ok(copied) => pages += copied,
                Err(e) if e.is_death() && Some(pid) != root => self.trackings.retain(&without(pids, pid)),
                Err(e) if e.is_death() => return Err(Error::Died(pid)),
                Err(e) => return Err(e),
            }
        }
        Ok(pages)
    }

    fn process(&mut self, pid: i32) -> Result<u64> {
        self.trackings.begin(pid, self.timeout)?;
        let Some(tracking) = self.trackings.of(pid) else { return Ok(0) };
        let maps = proc::maps(pid).context(|| format!("read the mappings of {pid}"))?;
        let areas: Vec<Area> = maps.iter().map(Area::from).collect();
        let (found, _) = private::look(pid, &areas, Some(tracking), true)?;
        let ppid = proc::stat(pid).context(|| format!("read /proc/{pid}/stat"))?.ppid;
        let copied = self.copier.private(&found, self.trackings.parent(ppid))?;
        if let Some(tracking) = self.trackings.of_mut(pid) {
            tracking.known.keep(found.unchanged);
            tracking.known.learn(&ranges::subtract(&found.ranges, &copied.gone), copied.runs);
        }
        Ok(ranges::size(&found.ranges) / PAGE)
    }
}

fn without(pids: &[i32], pid: i32) -> Vec<i32> {
    pids.iter().copied().filter(|p| *p != pid).collect()
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
    // All of the memory is new in the first round.
    let left = if rounds.len() < 2 { 0 } else { last.pages * last.us / last.since_us.max(1) };
    // Rounds that waited for the disk do not tell how long it takes.
    let costs = rounds.iter().filter(|r| r.pages >= 64).map(|r| 1000 * r.us / r.pages);
    (left, left * costs.min().unwrap_or(0) / 1000)
}

fn decide(rounds: &[Round], max: u32, max_freeze: Duration) -> Next {
    let [.., before, last] = rounds else { return if max > 1 { Next::Another } else { Next::Freeze } };
    let (_, us) = expect(rounds);
    let soon = us <= max_freeze.as_micros() as u64 / 4;
    let shrinking = last.pages < before.pages / 4 * 3;
    match (rounds.len() as u32) < max {
        // The first round that has little to do may have waited for the disk.
        true if soon && last.us > 4 * max_freeze.as_micros() as u64 && shrinking => Next::Another,
        _ if soon => Next::Freeze,
        true if shrinking => Next::Another,
        _ => Next::GiveUp,
    }
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
    fn rounds_end_when_they_do_not_help() {
        let mut rounds = vec![round(100_000, 100_000, 0), round(90_000, 90_000, 100_000)];
        assert_eq!(decide(&rounds, 12, LIMIT), Next::GiveUp);
        rounds[1].pages = 50_000;
        assert_eq!(decide(&rounds, 12, LIMIT), Next::Another);
        assert_eq!(decide(&rounds, 2, LIMIT), Next::GiveUp);
        assert_eq!(decide(&rounds[..1], 1, LIMIT), Next::Freeze);
    }
}
