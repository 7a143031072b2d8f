//! How often what changes: counted in the kernel where the tracker loads, else from the differences between samples.

use super::{descriptors::Names, processes::Seen, sample::Rates};
use crate::observe::Scope;
#[cfg(feature = "ebpf")]
use crate::observe::{Counters, Status, Tracker};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::Duration,
};

/// Events of a tree since some moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Events {
    pub forks: u64,
    pub threads: u64,
    pub execs: u64,
    pub exits: u64,
    pub mappings: Option<u64>,
    pub descriptors: u64,
    pub sockets: Option<u64>,
    pub connections: Option<u64>,
    pub signals: Option<u64>,
}

/// Counts the events of a tree.
pub(super) struct Counter {
    #[cfg(feature = "ebpf")]
    source: Source,
    #[cfg(feature = "ebpf")]
    root: i32,
    #[cfg(feature = "ebpf")]
    wanted: Scope,
    /// Differences seen so far.
    differences: Events,
}

#[cfg(feature = "ebpf")]
enum Source {
    /// The tree's tracker, a process of its own.
    Asked(Scope),
    /// One of ours.
    Own(Box<Tracker>),
    None,
}

impl Counter {
    /// Counts in the kernel what is in `scope`, or more, if `ebpf` and if that is possible.
    pub(super) fn start(root: i32, ebpf: bool, scope: Scope) -> Self {
        #[cfg(not(feature = "ebpf"))]
        let _ = (root, ebpf, scope);
        Self {
            #[cfg(feature = "ebpf")]
            source: if ebpf { source(root, scope) } else { Source::None },
            #[cfg(feature = "ebpf")]
            root,
            #[cfg(feature = "ebpf")]
            wanted: scope,
            differences: Events::default(),
        }
    }

    /// What is counted in the kernel, event by event.
    pub(super) fn scope(&self) -> Option<Scope> {
        #[cfg(feature = "ebpf")]
        return match &self.source {
            Source::Asked(scope) => Some(*scope),
            Source::Own(tracker) => Some(tracker.scope()),
            Source::None => None,
        };
        #[cfg(not(feature = "ebpf"))]
        None
    }

    /// Events so far. `differences` are those between the last two samples.
    pub(super) fn events(&mut self, differences: Events) -> Events {
        self.differences = add(&self.differences, &differences);
        #[cfg(feature = "ebpf")]
        if let Some(c) = self.counters() {
            return Events {
                forks: c.forks,
                threads: c.threads,
                execs: c.execs,
                exits: c.exits,
                mappings: Some(c.memory),
                descriptors: c.calls.map_or(self.differences.descriptors, |calls| calls.descriptors),
                sockets: c.calls.map(|calls| calls.sockets),
                connections: Some(c.connections),
                signals: Some(c.signals),
            };
        }
        self.differences
    }

    #[cfg(feature = "ebpf")]
    fn counters(&mut self) -> Option<Counters> {
        match &self.source {
            Source::Asked(_) => match Status::ask(self.root) {
                Ok(Some(status)) => Some(status.counters),
                // It has ended: from here on we count ourselves, from zero.
                _ => {
                    *self = Self { differences: self.differences, ..Self::start(self.root, true, self.wanted) };
                    None
                }
            },
            Source::Own(tracker) => tracker.counters().ok(),
            Source::None => None,
        }
    }
}

#[cfg(feature = "ebpf")]
fn source(root: i32, wanted: Scope) -> Source {
    match Status::ask(root) {
        Ok(Some(status)) if wanted == Scope::Memory || status.scope == wanted => Source::Asked(status.scope),
        _ => Tracker::start(root, wanted).map_or(Source::None, |tracker| Source::Own(Box::new(tracker))),
    }
}

fn add(a: &Events, b: &Events) -> Events {
    let maybe = |a: Option<u64>, b: Option<u64>| {
        if a.is_none() && b.is_none() { None } else { Some(a.unwrap_or(0) + b.unwrap_or(0)) }
    };
    Events {
        forks: a.forks + b.forks,
        threads: a.threads + b.threads,
        execs: a.execs + b.execs,
        exits: a.exits + b.exits,
        mappings: maybe(a.mappings, b.mappings),
        descriptors: a.descriptors + b.descriptors,
        sockets: maybe(a.sockets, b.sockets),
        connections: maybe(a.connections, b.connections),
        signals: maybe(a.signals, b.signals),
    }
}

/// Changes per second between two counts.
pub(super) fn rates(before: &Events, after: &Events, between: Duration, counted: Option<Scope>) -> Rates {
    let seconds = between.as_secs_f64().max(1e-3);
    let rate = |before: u64, after: u64| after.saturating_sub(before) as f64 / seconds;
    let maybe = |before: Option<u64>, after: Option<u64>| Some(rate(before.unwrap_or(0), after?));
    Rates {
        forks: rate(before.forks, after.forks),
        threads: rate(before.threads, after.threads),
        execs: rate(before.execs, after.execs),
        exits: rate(before.exits, after.exits),
        mappings: maybe(before.mappings, after.mappings),
        descriptors: rate(before.descriptors, after.descriptors),
        sockets: maybe(before.sockets, after.sockets),
        connections: maybe(before.connections, after.connections),
        signals: maybe(before.signals, after.signals),
        counted,
    }
}

/// What two lists of processes say about what happened in between: at least so much.
pub(super) fn processes(before: &BTreeMap<i32, Seen>, after: &BTreeMap<i32, Seen>) -> Events {
    let mut events = Events::default();
    let same = |a: &Seen, b: &Seen| a.start_time == b.start_time;
    for (pid, now) in after {
        match before.get(pid).filter(|then| same(then, now)) {
            Some(then) => {
                events.execs += u64::from(then.start_stack != now.start_stack);
                events.threads += now.row.threads.saturating_sub(then.row.threads);
            }
            None => {
                events.forks += 1;
                events.threads += now.row.threads.saturating_sub(1);
            }
        }
    }
    events.exits =
        before.iter().filter(|(pid, then)| !after.get(pid).is_some_and(|now| same(then, now))).count() as u64;
    events
}

/// Descriptors that came or went.
pub(super) fn descriptors(before: &Names, after: &Names) -> u64 {
    let none = Vec::new();
    let pids: HashSet<&i32> = before.keys().chain(after.keys()).collect();
    let changed = |pid: &&i32| {
        let (a, b) = (before.get(pid).unwrap_or(&none), after.get(pid).unwrap_or(&none));
        if a == b {
            return 0;
        }
        let then: HashMap<i32, &str> = a.iter().map(|n| (n.fd, n.link.as_str())).collect();
        let kept = b.iter().filter(|n| then.get(&n.fd) == Some(&n.link.as_str())).count();
        (a.len() - kept) + (b.len() - kept)
    };
    pids.iter().map(changed).sum::<usize>() as u64
}

/// Mappings that came or went, at least: differences of the numbers of mappings.
pub(super) fn mappings(before: &BTreeMap<i32, u64>, after: &BTreeMap<i32, u64>) -> u64 {
    after.iter().filter_map(|(pid, now)| Some(before.get(pid)?.abs_diff(*now))).sum()
}

#[cfg(test)]
mod tests {
    use super::{super::descriptors::Name, super::sample::ProcessRow, *};

    fn seen(start_time: u64, start_stack: u64, threads: u64) -> Seen {
        Seen { row: ProcessRow { threads, ..Default::default() }, start_time, start_stack }
    }

    #[test]
    fn differences_of_processes() {
        let before = BTreeMap::from([(1, seen(1, 10, 1)), (2, seen(2, 20, 2)), (3, seen(3, 30, 1))]);
        // 1 has a new program, 2 three more threads, 3 is another process with the same number, 4 is new.
        let after = BTreeMap::from([(1, seen(1, 11, 1)), (2, seen(2, 20, 5)), (3, seen(9, 30, 1)), (4, seen(9, 1, 2))]);
        let events = processes(&before, &after);
        assert_eq!((events.forks, events.exits, events.execs, events.threads), (2, 1, 1, 4));
    }

    #[test]
    fn differences_of_descriptors() {
        let name = |fd, link: &str| Name { fd, link: link.into(), mode: None };
        let before = Names::from([(1, vec![name(0, "a"), name(1, "b"), name(2, "c")]), (2, vec![name(0, "a")])]);
        let after = Names::from([(1, vec![name(0, "a"), name(1, "x")]), (2, vec![name(0, "a")])]);
        assert_eq!(descriptors(&before, &after), 3);
        assert_eq!(descriptors(&after, &after), 0);
    }

    #[test]
    fn rates_are_per_second() {
        let before = Events { forks: 3, ..Default::default() };
        let after = Events { forks: 5, signals: Some(8), ..Default::default() };
        let rates = rates(&before, &after, Duration::from_secs(2), Some(Scope::Memory));
        assert_eq!(
            (rates.forks, rates.signals, rates.sockets, rates.counted),
            (1.0, Some(4.0), None, Some(Scope::Memory))
        );
    }
}
