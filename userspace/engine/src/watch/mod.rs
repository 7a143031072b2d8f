//! What people want to know of a running tree, once a second: processes, memory, descriptors, how much changes, and
//! what a dump would cost now.
//!
//! ```no_run
//! # use standstill_engine::watch::{View, Viewer};
//! let mut viewer = Viewer::new(4711)?;
//! while let View::Running(sample) = viewer.sample()? {
//!     if let Some(p) = &sample.prediction {
//!         println!("if frozen now: {} us, {} bytes", p.freeze_us, p.image_bytes);
//!     }
//!     std::thread::sleep(std::time::Duration::from_secs(1));
//! }
//! # Ok::<(), standstill_engine::Error>(())
//! ```
//!
//! The tree is not disturbed: it is read by the iterators or procfs, and what nobody may try on a running process
//! (ptrace) is measured with processes of our own. What is expensive is read less often, so that all of it takes a few
//! hundredths of one processor at most.

mod descriptors;
mod dirty;
mod memory;
mod pages;
mod predict;
mod processes;
mod rates;
mod rehearse;
mod sample;
mod specimen;
mod stopwatch;
mod writes;

pub use sample::{
    DescriptorRow, MappingKind, MappingRow, Part, Prediction, ProcessRow, Rates, Sample, SocketRow, Totals,
};

use crate::{
    dump::{
        InUse, PrecopyOptions, Reader, check_target,
        history::{self, Amounts},
        is_kept, is_taken, no_reader,
    },
    error::{Context, Error, Result},
    kernel::sys,
    observe::{Iterators, Scope},
    task,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pages::Pages;
use predict::Costs;
use rates::{Counter, Events};
use rehearse::{Found, Member};
use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant, SystemTime},
};
use tracing::debug;

/// Each expensive reading takes at most one part in so many of the time.
const SHARE: u32 = 50;
/// It is not worth reading these more often.
const MEMORY_PAUSE: Duration = Duration::from_secs(2);
const PREDICTION_PAUSE: Duration = Duration::from_millis(900);
/// What our own processes cost changes with the load of the machine only.
const SPECIMEN_PAUSE: Duration = Duration::from_secs(10);
/// The middle one of so many measurements counts.
const MEASURED: usize = 5;

/// What a look at a tree shows.
#[derive(Clone, Debug, PartialEq)]
pub enum View {
    /// It runs.
    Running(Box<Sample>),
    /// Its root has ended.
    Ended,
}

/// Something that was read, and when it may be read again.
struct Paced<T> {
    value: T,
    read: Instant,
    due: Instant,
}

impl<T: Default> Paced<T> {
    fn new() -> Self {
        let now = Instant::now();
        Self { value: T::default(), read: now, due: now }
    }

    fn is_due(&self) -> bool {
        Instant::now() >= self.due
    }

    /// Takes a new value that was read since `begin`.
    fn set(&mut self, value: T, begin: Instant, pause: Duration) {
        self.value = value;
        self.read = Instant::now();
        self.due = self.read + pause.max((self.read - begin) * SHARE);
    }

    fn age(&self) -> f64 {
        self.read.elapsed().as_secs_f64()
    }
}

/// Looks at a tree again and again.
pub struct Viewer {
    root: i32,
    end: OwnedFd,
    iterators: Option<Iterators>,
    reader_note: Option<String>,
    counter: Counter,
    last: Option<(Instant, Events)>,
    processes: BTreeMap<i32, processes::Seen>,
    memory: Paced<memory::Mapped>,
    descriptors: Paced<(descriptors::Names, Vec<DescriptorRow>)>,
    sockets: Vec<SocketRow>,
    specimen: Paced<Option<Costs>>,
    rehearsal: Paced<Option<Found>>,
    /// As measured last: something else may run at any of these times.
    costs: VecDeque<Costs>,
    pages: Pages,
    dirty: Option<dirty::Dirty>,
    /// Who would read for a dump, which takes a tracker if there is one.
    dump_reader: &'static str,
    prediction_note: Option<String>,
}

impl fmt::Debug for Viewer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Viewer").field("root", &self.root).finish_non_exhaustive()
    }
}

impl Viewer {
    /// Begins to look at a process and its descendants.
    ///
    /// # Errors
    /// When there is no such process, or it can never be dumped.
    pub fn new(root: i32) -> Result<Self> {
        Self::with(root, Reader::Auto, Scope::Memory, false)
    }

    /// The same, read by eBPF or procfs only, and with so much counted in the kernel. `dirty`: writes to memory are tracked
    /// (Linux 6.7), for which each process is stopped for a moment, and which delays the first write to each page.
    ///
    /// # Errors
    /// As [`Self::new`], and when the iterators do not load although nothing else is wanted.
    pub fn with(root: i32, reader: Reader, scope: Scope, dirty: bool) -> Result<Self> {
        check_target(root)?;
        let end = sys::pidfd_open(root).context(|| format!("pidfd_open of {root}"))?;
        let (iterators, reader_note) = match (reader != Reader::Procfs).then(Iterators::load) {
            None => (None, None),
            Some(Ok(iterators)) => (Some(iterators), None),
            Some(Err(e)) if reader == Reader::Auto => (None, Some(e.to_string())),
            Some(Err(e)) => return Err(no_reader(&e)),
        };
        Ok(Self {
            root,
            end,
            counter: Counter::start(root, iterators.is_some(), scope),
            iterators,
            reader_note,
            last: None,
            processes: BTreeMap::new(),
            memory: Paced::new(),
            descriptors: Paced::new(),
            sockets: Vec::new(),
            specimen: Paced::new(),
            rehearsal: Paced::new(),
            costs: VecDeque::new(),
            pages: Pages::new(),
            dirty: dirty.then(|| dirty::Dirty::new(root)),
            dump_reader: "",
            prediction_note: None,
        })
    }

    /// The root of the tree.
    pub fn root(&self) -> i32 {
        self.root
    }

    /// Looks at the tree now.
    ///
    /// # Errors
    /// When nothing can be read at all.
    pub fn sample(&mut self) -> Result<View> {
        let begin = Instant::now();
        // Parents before their children, as in a dump.
        let order = task::running(self.root);
        let seen = processes::read(&order);
        if !seen.contains_key(&self.root) || self.wait_for_end(Duration::ZERO) {
            return Ok(View::Ended);
        }
        let pids: Vec<i32> = seen.keys().copied().collect();
        let mut events = match self.processes.is_empty() {
            true => Events::default(),
            false => rates::processes(&self.processes, &seen),
        };
        self.processes = seen;
        if self.rehearsal.is_due() {
            self.rehearse(&order, &mut events);
        }
        self.read_memory(&pids, &mut events);
        self.read_descriptors(&pids, &mut events);
        let now = Instant::now();
        let events = self.counter.events(events);
        let rates = match &self.last {
            Some((then, before)) => rates::rates(before, &events, now - *then, self.counter.scope()),
            None => Rates { counted: self.counter.scope(), ..Rates::default() },
        };
        self.last = Some((now, events));
        let mut sample = self.show(rates);
        sample.cost_us = begin.elapsed().as_micros() as u64;
        Ok(View::Running(Box::new(sample)))
    }

    /// Waits, at most so long, for the end of the tree's root; whether it has come. Its parent need not have noticed.
    pub fn wait_for_end(&self, limit: Duration) -> bool {
        let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(self.end.as_fd(), PollFlags::POLLIN)];
        // A signal ends the wait early.
        poll(&mut fds, limit).is_ok_and(|ready| ready > 0)
    }

    fn read_memory(&mut self, pids: &[i32], events: &mut Events) {
        if !self.memory.is_due() {
            return;
        }
        let begin = Instant::now();
        let written = self.dirty.as_mut().map(|dirty| dirty.look(&self.processes)).unwrap_or_default();
        let mapped = memory::read(pids, &written);
        if !self.memory.value.counts.is_empty() {
            events.mappings = Some(rates::mappings(&self.memory.value.counts, &mapped.counts));
        }
        self.memory.set(mapped, begin, MEMORY_PAUSE);
    }

    fn read_descriptors(&mut self, pids: &[i32], events: &mut Events) {
        if !self.descriptors.is_due() {
            return;
        }
        let begin = Instant::now();
        match descriptors::read(pids, &mut self.iterators) {
            Ok(names) => self.take_descriptors(names, begin, events),
            // One that was closed in between: the next look is soon.
            Err(e) => debug!("descriptors: {e}"),
        }
    }

    fn take_descriptors(&mut self, names: descriptors::Names, begin: Instant, events: &mut Events) {
        if !self.descriptors.value.0.is_empty() {
            events.descriptors += rates::descriptors(&self.descriptors.value.0, &names);
        }
        let pids: Vec<i32> = names.keys().copied().collect();
        let sockets = descriptors::sockets(&pids, &mut self.iterators).unwrap_or_else(|e| {
            debug!("sockets: {e}");
            Vec::new()
        });
        self.sockets = descriptors::socket_rows(&sockets);
        let rows = descriptors::count(&names, &sockets);
        self.descriptors.set((names, rows), begin, Duration::from_millis(900));
    }

    /// Measures what a dump would cost.
    fn rehearse(&mut self, order: &[i32], events: &mut Events) {
        if self.specimen.is_due() {
            let begin = Instant::now();
            let iterators = &mut self.iterators;
            let costs = match &self.dirty {
                Some(dirty) => dirty.hold(|| specimen::costs(iterators)),
                None => specimen::costs(iterators),
            };
            match costs {
                Ok(costs) => self.specimen.set(Some(costs), begin, SPECIMEN_PAUSE),
                Err(e) => {
                    self.specimen.set(None, begin, SPECIMEN_PAUSE);
                    self.prediction_note = Some(e.to_string());
                }
            }
        }
        let Some(own) = self.specimen.value else { return };
        let members = self.members(order);
        let begin = Instant::now();
        let tracked = self.dirty.as_ref().is_some_and(dirty::Dirty::is_tracking) || is_taken(self.root);
        match rehearse::rehearse(self.root, &members, tracked, &mut self.iterators, &mut self.pages) {
            Ok(found) => {
                if self.dump_reader != found.reader {
                    // What one reader costs says nothing of another.
                    self.costs.clear();
                    self.dump_reader = found.reader;
                }
                self.costs.push_back(merge(own, found.costs));
                if self.costs.len() > MEASURED {
                    self.costs.pop_front();
                }
                let names = descriptors::names(&found.descriptors);
                self.rehearsal.set(Some(found), begin, PREDICTION_PAUSE);
                self.prediction_note = None;
                self.take_descriptors(names, begin, events);
            }
            // Of a busy tree, the last figures are better than none.
            Err(e @ Error::System { .. }) => {
                debug!("rehearsal: {e}");
                if self.rehearsal.value.is_none() {
                    self.prediction_note = Some(e.to_string());
                }
            }
            Err(e) => {
                self.rehearsal.set(None, begin, PREDICTION_PAUSE);
                self.prediction_note = Some(e.to_string());
            }
        }
    }

    /// What a dump would cost now, and what one that copies nothing before the freeze.
    fn predict(&self, found: &Found) -> (Prediction, Prediction) {
        let costs = Costs::median(self.costs.iter());
        let history = history::load();
        let predict = |amounts: &Amounts, pages: u64| {
            let stored = (pages as f64 * (1.0 - found.zeros)) as u64;
            let prediction = predict::predict(self.root, self.dump_reader, amounts, stored, &costs, &history);
            Prediction { age: self.rehearsal.age(), ..prediction }
        };
        let plain = predict(&found.amounts, found.amounts.copied);
        let pids: Vec<i32> = self.processes.keys().copied().collect();
        let rounds = PrecopyOptions::default().rounds(InUse::by(&pids).resident);
        if is_kept(self.root) {
            // It looks at the marks of somebody else, all the same.
            let plain = predict(&Amounts { tracked: true, ..found.amounts }, found.amounts.copied);
            let plain = Prediction { precopied: false, ..plain };
            return (plain.clone(), plain);
        }
        if rounds == 0 {
            return (plain.clone(), plain);
        }
        let (amounts, early) =
            found.writes.after_precopy(&found.amounts, &costs, rounds, predict::left_before(self.root, &history));
        (predict(&amounts, early + amounts.copied), plain)
    }

    fn members(&self, order: &[i32]) -> Vec<Member> {
        let member = |pid| {
            let row = &self.processes.get(pid)?.row;
            Some(Member { pid: row.pid, ppid: row.ppid, threads: row.threads })
        };
        order.iter().filter_map(member).collect()
    }

    fn reader(&self) -> &'static str {
        if self.iterators.is_some() { "ebpf" } else { "procfs" }
    }

    fn show(&self, rates: Rates) -> Sample {
        let rows: Vec<ProcessRow> = self.processes.values().map(|s| s.row.clone()).collect();
        let sum = |of: fn(&ProcessRow) -> u64| rows.iter().map(of).sum();
        let totals = Totals {
            processes: rows.len() as u64,
            threads: sum(|r| r.threads),
            descriptors: sum(|r| r.descriptors),
            mappings: self.memory.value.counts.values().sum(),
            resident: sum(|r| r.resident),
            anonymous: sum(|r| r.anonymous),
        };
        let predictions = self.rehearsal.value.as_ref().map(|found| self.predict(found));
        let (prediction, prediction_without_precopy) = predictions.unzip();
        Sample {
            root: self.root,
            time: SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64(),
            reader: self.reader().into(),
            reader_note: self.reader_note.clone(),
            cost_us: 0,
            totals,
            memory: self.memory.value.rows.clone(),
            memory_age: self.memory.age(),
            dirty_note: self.dirty.as_ref().and_then(|dirty| dirty.note.clone()),
            descriptors: self.descriptors.value.1.clone(),
            sockets: self.sockets.clone(),
            descriptors_age: self.descriptors.age(),
            rates,
            prediction,
            prediction_without_precopy,
            prediction_note: self.prediction_note.clone(),
            processes: rows,
        }
    }
}

/// What was measured with our own processes and what was measured on the tree.
fn merge(own: Costs, tree: Costs) -> Costs {
    Costs {
        list_process: tree.list_process,
        read_process: tree.read_process,
        read_descriptor: tree.read_descriptor,
        read_mapping: tree.read_mapping,
        mapping: tree.mapping,
        scan_mapping: tree.scan_mapping,
        scan_page: tree.scan_page,
        track_mapping: tree.track_mapping,
        track_page: tree.track_page,
        copy_process: tree.copy_process,
        copy_range: tree.copy_range,
        copy_page: tree.copy_page,
        compare_page: tree.compare_page,
        ..own
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(viewer: &mut Viewer) -> Box<Sample> {
        match viewer.sample().unwrap() {
            View::Running(sample) => sample,
            View::Ended => panic!("it runs"),
        }
    }

    #[test]
    fn a_child_and_its_end() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id() as i32;
        for reader in [Reader::Procfs, Reader::Auto] {
            let mut viewer = Viewer::with(pid, reader, Scope::Memory, false).unwrap();
            let sample = first(&mut viewer);
            assert_eq!((sample.totals.processes, sample.totals.threads), (1, 1));
            assert!(sample.processes[0].comm == "sleep" && sample.totals.descriptors >= 3, "{sample:?}");
            assert!(sample.memory.iter().any(|m| m.kind == MappingKind::Stack), "{:?}", sample.memory);
            assert!(!sample.descriptors.is_empty(), "{sample:?}");
            let prediction = sample.prediction.as_ref().unwrap_or_else(|| panic!("{:?}", sample.prediction_note));
            assert!(prediction.freeze_us > 50 && prediction.freeze_us < 1_000_000, "{prediction:?}");
            assert!(prediction.image_bytes > 50_000 && prediction.image_bytes < 50 << 20, "{prediction:?}");
            let sample = first(&mut viewer);
            assert_eq!((sample.rates.forks, sample.rates.exits), (0.0, 0.0));
        }
        let mut viewer = Viewer::with(pid, Reader::Procfs, Scope::Memory, false).unwrap();
        child.kill().unwrap();
        // Dead, and its parent has not noticed yet.
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(viewer.sample().unwrap(), View::Ended);
        child.wait().unwrap();
        assert_eq!(viewer.sample().unwrap(), View::Ended);
        assert!(matches!(Viewer::new(pid), Err(Error::Target(_))));
    }
}
