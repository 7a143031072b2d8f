//! The order of a dump; nothing but the order.

mod observer;
mod rounds;
mod state;
mod target;
mod trackings;

pub use observer::Reader;
pub(crate) use observer::no_reader;
pub use rounds::{Precopy, PrecopyOptions};
pub(crate) use target::check as check_target;

use crate::{
    error::{Error, Result},
    image,
    kernel::{PAGE, proc},
    memory::{
        copy::{Copier, Parent},
        private::PrivatePages,
    },
    objects::regular,
    observe,
    task::{Family, FrozenTree},
};
use observer::Observer;
use rounds::Rounds;
use serde::Serialize;
use standstill_images::{
    publish::ImageDir,
    store::{Compression, PageStoreIndex, PageWriter},
    types::{AddressSpace, DumpCounts, DumpStats, PrecopyStats},
};
use state::State;
use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    time::{Duration, Instant},
};
use tracing::info;
use trackings::Trackings;

/// Memory for page data that is touched before the freeze, in bytes.
const MIN_RESERVE: u64 = 4 << 20;

/// What becomes of the tree after a successful dump.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Afterwards {
    /// It is killed.
    #[default]
    Kill,
    /// It goes on.
    Run,
    /// It goes on after a SIGCONT.
    Stop,
}

/// A dump to make.
#[derive(Clone, Debug)]
pub struct DumpOptions {
    /// Root of the tree.
    pub pid: i32,
    /// Directory of the image.
    pub dir: PathBuf,
    /// What becomes of the tree.
    pub afterwards: Afterwards,
    /// The root is the job of a shell that stays outside.
    pub shell_job: bool,
    /// Time limit of the freeze.
    pub timeout: Duration,
    /// Compression of the pages.
    pub compression: Compression,
    /// Who lists the descriptors.
    pub reader: Reader,
    /// Compare what a tracker knows with the truth, under the freeze, and believe the truth.
    pub paranoid: bool,
    /// What is copied before the freeze.
    pub precopy: PrecopyOptions,
}

/// What a dump cost.
#[derive(Clone, Debug, Serialize)]
pub struct Dumped {
    /// Times and amounts.
    #[serde(flatten)]
    pub stats: DumpStats,
    /// What was copied before the freeze, if anything.
    pub precopy: Option<PrecopyStats>,
}

/// Measures named parts of the frozen time.
struct Phases {
    last: Instant,
    phases: Vec<(String, u64)>,
}

impl Phases {
    fn end(&mut self, name: &str) {
        let now = Instant::now();
        self.phases.push((name.into(), (now - self.last).as_micros() as u64));
        self.last = now;
    }
}

/// Dumps the tree of `options.pid`. It goes on as it was if anything fails.
///
/// # Errors
/// See [`Error`]; nothing is left in the image directory then.
pub fn dump(options: &DumpOptions) -> Result<Dumped> {
    target::check(options.pid)?;
    let dir = ImageDir::create(&options.dir)?;
    Session::open(options, Instant::now())?.checkpoint(dir, options.afterwards, false)
}

/// Makes one image of a tree after the other. What has not changed since the last one is not copied again.
struct Session<'a> {
    options: &'a DumpOptions,
    observer: Observer,
    trackings: Trackings,
    /// Page stores of the last image, to which the known pages refer.
    stores: Vec<PageStoreIndex>,
    /// When the work for the next image began.
    begin: Instant,
}

impl<'a> Session<'a> {
    fn open(options: &'a DumpOptions, begin: Instant) -> Result<Self> {
        let observer = Observer::open(options.reader, options.pid)?;
        Ok(Self { options, observer, trackings: Trackings::default(), stores: Vec::new(), begin })
    }

    /// Makes an image. `track`: writes are tracked further on, for the next one.
    fn checkpoint(&mut self, dir: ImageDir, afterwards: Afterwards, track: bool) -> Result<Dumped> {
        let result = self.attempt(dir, afterwards, track);
        if result.is_err() || !track {
            // What was copied for an image that failed is in no store.
            self.trackings.clear();
            self.stores.clear();
        }
        result
    }

    fn attempt(&mut self, dir: ImageDir, afterwards: Afterwards, track: bool) -> Result<Dumped> {
        let options = self.options;
        let (_, running) = Family::of(options.pid, self.observer.iterators());
        self.observer.read_ahead(&running);
        let first = self.stores.iter().map(PageStoreIndex::pages).sum();
        let mut pages = PageWriter::create(&dir.pages_path(), options.compression)?;
        let resident = target::resident_bytes(&running);
        let rounds = options.precopy.rounds(resident);
        pages.set_limit(options.precopy.buffer);
        let mut copier = Copier::new(&mut pages, first);
        let precopy = match rounds > 0 || track || !self.trackings.is_empty() {
            true => Some(self.precopy(&mut copier, rounds.max(1))?),
            false => None,
        };
        if afterwards != Afterwards::Kill {
            // The thaw must not wait for the disk: what the memory of the machine allows is copied first and written
            // later. Rounds leave little, so that memory for it need not be touched before.
            let expected = precopy.as_ref().map_or(resident, |p| 4 * PAGE * p.expected_pages);
            copier.store.set_limit(resident.min(target::available_memory() / 2).max(options.precopy.buffer));
            copier.store.reserve(expected.max(MIN_RESERVE));
        }
        let (mut family, _) = Family::of(options.pid, self.observer.iterators());
        let prepare_us = self.begin.elapsed().as_micros() as u64;

        let freezing = Instant::now();
        let tree = FrozenTree::freeze(options.pid, options.timeout, &mut family)?;
        let frozen = Instant::now();
        let mut phases = Phases { last: frozen, phases: Vec::new() };
        let mut state = state::collect(&tree, options, &mut self.observer, &mut self.trackings, track, &mut phases)
            .map_err(|e| unless_dead(&tree, e))?;
        let before = copier.counts();
        copy_pages(&tree, &mut state, &mut self.trackings, &mut copier).map_err(|e| unless_dead(&tree, e))?;
        let counts = copier.finish()?;
        phases.end("pages");
        let mut stats = DumpStats {
            reader: self.observer.name().into(),
            prepare_us,
            freezing_us: (frozen - freezing).as_micros() as u64,
            frozen_us: 0,
            phases: Vec::new(),
            total_us: 0,
            pages_stored: counts.stored,
            pages_zero: counts.zero,
            pages_shared: counts.shared,
            counts: DumpCounts::default(),
        };
        // A tree that goes on has waited long enough; one that is killed must not run before its image is safe.
        let tree = match afterwards {
            Afterwards::Kill => Some(tree),
            Afterwards::Run => {
                drop(tree);
                phases.end("thaw");
                stats.frozen_us = frozen.elapsed().as_micros() as u64;
                None
            }
            Afterwards::Stop => {
                tree.leave_stopped();
                phases.end("thaw");
                stats.frozen_us = frozen.elapsed().as_micros() as u64;
                None
            }
        };
        regular::check_names(&mut state.objects)?;
        place_the_childless(&mut state, &mut self.trackings);
        self.stores.push(pages.finish()?);
        phases.end("write");
        if tree.is_some() {
            stats.frozen_us = frozen.elapsed().as_micros() as u64;
        }
        stats.phases = phases.phases;
        stats.counts = state.counts();
        stats.total_us = self.begin.elapsed().as_micros() as u64;
        let precopy = precopy.map(|p| PrecopyStats { late_pages: counts.stored - before.stored, ..p });
        image::publish(dir, &state.into_records(options)?, &self.stores, &stats, precopy.as_ref())?;
        if let Some(tree) = tree {
            tree.kill();
        } else {
            // A dump that kills writes under the freeze: its times say nothing of one that does not.
            observe::view::remember(options.pid, &stats);
        }
        info!(total_us = stats.total_us, frozen_us = stats.frozen_us, "dump published");
        Ok(Dumped { stats, precopy })
    }

    /// Copies memory while the tree runs.
    fn precopy(&mut self, copier: &mut Copier<'_>, max: u32) -> Result<PrecopyStats> {
        let options = self.options;
        let observer = &mut self.observer;
        let (_, members) = Family::of(options.pid, observer.iterators());
        if let Some(iterators) = observer.iterators()
            && let Ok(entries) = iterators.files(&members)
        {
            self.trackings.refuse_direct_io(&entries);
        }
        let members = || Family::of(options.pid, observer.iterators()).1;
        let mut rounds = Rounds { trackings: &mut self.trackings, copier, timeout: options.timeout };
        let rounds = rounds.run(max, options.precopy.max_freeze, members)?;
        let (expected_pages, expected_us) = rounds::expect(&rounds);
        Ok(PrecopyStats { rounds, expected_pages, expected_us, late_pages: 0 })
    }
}

/// Copies under the freeze what is not known yet.
fn copy_pages(tree: &FrozenTree, state: &mut State, trackings: &mut Trackings, copier: &mut Copier<'_>) -> Result<()> {
    copier.stopped();
    let parents = state.parents();
    let with_children: HashSet<i32> = parents.values().copied().collect();
    let numbers: HashMap<i32, usize> = tree.pids().into_iter().zip(0..).collect();
    for (n, private) in state.private.iter().enumerate() {
        let (earlier, rest) = state.spaces.split_at_mut(n);
        let parent = parents.get(&private.pid).and_then(|p| Some((*p, earlier.get(*numbers.get(p)?)?)));
        let parent = parent.map(|(pid, space)| Parent { pid, runs: &space.pages });
        rest[0].pages = copier.private(private, parent)?.runs;
        if with_children.contains(&private.pid) {
            place(private, &mut rest[0], trackings);
        }
    }
    for (object, source) in state.objects.shared.iter_mut().zip(&state.objects.shared_sources) {
        copier.shared(object, source)?;
    }
    Ok(())
}

/// Completes the lists of pages that no other process needed under the freeze.
fn place_the_childless(state: &mut State, trackings: &mut Trackings) {
    let parents: HashSet<i32> = state.parents().into_values().collect();
    for (private, space) in state.private.iter().zip(&mut state.spaces).filter(|(p, _)| !parents.contains(&p.pid)) {
        place(private, space, trackings);
    }
}

/// Adds to a process's list of pages, which has those copied under the freeze, what was known before.
fn place(private: &PrivatePages, space: &mut AddressSpace, trackings: &mut Trackings) {
    if let Some(tracking) = trackings.of_mut(private.pid) {
        tracking.known.keep(private.unchanged.clone());
        tracking.known.learn(&private.ranges, std::mem::take(&mut space.pages));
        space.pages = tracking.known.runs().to_vec();
    }
}

/// A frozen process can still be killed, and whatever is asked of it then fails in its own way.
fn unless_dead(tree: &FrozenTree, error: Error) -> Error {
    let ending = |pid: &i32| proc::stat(*pid).map_or(true, |s| s.is_ending());
    match tree.pids().into_iter().find(ending) {
        Some(pid) => Error::Died(pid),
        None => error,
    }
}
