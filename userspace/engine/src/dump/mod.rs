//! The order of a dump; nothing but the order.

mod chain;
mod contents;
mod forks;
pub(crate) mod history;
mod keeper;
mod observer;
mod rounds;
mod sharing;
mod state;
mod target;
mod trackings;
mod turn;

pub use keeper::Keeper;
pub(crate) use keeper::is_kept;
pub use observer::Reader;
pub(crate) use observer::no_reader;
pub(crate) use rounds::{Foreseen, foresee};
pub use rounds::{MemorySnapshot, Precopy, PrecopyOptions};
pub(crate) use target::{InUse, check as check_target};
pub(crate) use turn::{Watcher, is_taken};

use crate::{
    error::{Context, Error, Result},
    image::{self, Image, dedup::Dedup},
    kernel::{PAGE, proc, sys, urgent::Urgent},
    memory::{copy::Copier, private::PrivatePages},
    objects::regular,
    task::{Family, FrozenTree},
    tree::cgroups,
};
use chain::Chain;
use contents::{copy_forks, copy_frozen, place_the_childless};
use forks::Forks;
use keeper::Told;
pub(crate) use observer::Observer;
use rounds::Rounds;
use serde::Serialize;
use standstill_images::{
    publish::ImageDir,
    store::{Compression, PageWriter, Progress},
    types::{DumpCounts, DumpStats, PrecopyStats},
};
use state::State;
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};
use tracing::{info, warn};
use trackings::Trackings;
use turn::Turn;

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
    /// Files whose name is gone although they have others get a hard link beside it.
    pub link_remap: bool,
    /// The cgroups of the processes are recorded.
    pub cgroups: bool,
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
    /// Directory of the image that this one goes on from, relative to `dir`. What has not changed since is not copied, if
    /// that was tracked.
    pub prev_images: Option<PathBuf>,
    /// Pages that this image replaces are punched out of its parents, which cannot be restored afterwards.
    pub auto_dedup: bool,
    /// Writes are tracked after the dump, so that the next one can go on from it; for trees that go on.
    pub track: bool,
    /// Is told how far the dump has come.
    pub progress: Arc<Progress>,
}

/// What a dump cost.
#[derive(Debug, Serialize)]
pub struct Dumped {
    /// Times and amounts.
    #[serde(flatten)]
    pub stats: DumpStats,
    /// What was copied before the freeze, if anything.
    pub precopy: Option<PrecopyStats>,
    /// If writes are tracked further on: who has to, in a process of its own.
    #[serde(skip)]
    pub keeper: Option<Keeper>,
}

/// What was done with memory under a freeze, in pages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frozen {
    /// It was told which pages had changed.
    pub tracked: bool,
    /// Pages that were looked for, copied or not.
    pub scanned: u64,
    /// Pages that were copied.
    pub stored: u64,
    /// Pages that were read, and hold only zeros.
    pub zero: u64,
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
    let mut session = Session::open(options, Observer::open(options.reader, options.pid)?);
    session.resume()?;
    let track = options.track && options.afterwards != Afterwards::Kill;
    let wanted = Wanted { dir: &options.dir, afterwards: options.afterwards, track, link: false };
    let mut dumped = session.checkpoint(dir, &wanted)?;
    if track {
        // The image is there, and the next one will be as well: only that one has to copy everything.
        match session.into_keeper() {
            Ok(keeper) => dumped.keeper = Some(keeper),
            Err(error) => warn!("the writes of process {} are not tracked further on: {error}", options.pid),
        }
    }
    Ok(dumped)
}

/// Makes one image of a tree after the other. What has not changed since the last one is not copied again.
pub(crate) struct Session<'a> {
    options: &'a DumpOptions,
    observer: Observer,
    trackings: Trackings,
    /// When it was last looked which pages have changed.
    looked: Option<Duration>,
    chain: Chain,
    /// The image that the next one goes on from, if somebody asked for it.
    parent: Option<Image>,
    /// The tracking is somebody else's, and must not be disturbed.
    guest: bool,
    turn: Option<Turn>,
    /// It was said that the tree writes too fast: once is enough.
    warned: bool,
}

/// An image that is to be made.
pub(crate) struct Wanted<'a> {
    /// Its directory.
    pub dir: &'a Path,
    /// What becomes of the tree.
    pub afterwards: Afterwards,
    /// Writes are tracked further on, for the next image.
    pub track: bool,
    /// The image gets links to the page stores of earlier ones, instead of a parent.
    pub link: bool,
}

impl<'a> Session<'a> {
    pub(crate) fn open(options: &'a DumpOptions, observer: Observer) -> Self {
        let (trackings, looked, chain, parent, guest, turn, warned) = Default::default();
        Self { options, observer, trackings, looked, chain, parent, guest, turn, warned }
    }

    /// Goes on with what the keeper of the tree knows, if the image that it knows of is to be the parent. Whoever watches the
    /// writes of the tree ends that first.
    pub(crate) fn resume(&mut self) -> Result<()> {
        let options = self.options;
        self.turn = Some(Turn::take(options.pid)?);
        let told = Told::ask(options.pid)?;
        let parent = match &options.prev_images {
            // As in CRIU, from the directory of the image.
            Some(prev) => Some(Image::open(&options.dir.join(prev))?),
            None => None,
        };
        match (parent, told) {
            (None, None) => {}
            (None, Some(told)) if options.track => {
                self.trackings = told.take()?.0;
                self.trackings.forget();
            }
            (None, Some(told)) => {
                self.trackings = told.look();
                self.guest = true;
            }
            (Some(parent), told) => {
                let content = |reason: String| Err(Error::ImageContent { dir: parent.dir.clone(), reason });
                if parent.inventory.root != options.pid {
                    return content(format!(
                        "it is of the tree of process {}, not {}: give the image of this tree that was made last",
                        parent.inventory.root, options.pid
                    ));
                }
                let Some(told) = told else {
                    warn!(
                        "nobody has tracked the writes of process {} since {} was made: all of its memory is copied",
                        options.pid,
                        parent.dir.display()
                    );
                    return Ok(());
                };
                let known = |chain: &Chain| chain.stores.last().map(|s| s.file.clone());
                if known(&told.chain) != parent.stores.last().map(|s| s.index.file.clone()) {
                    let dir = told.chain.dir.display();
                    return content(format!(
                        "the writes of process {} are tracked since another image was made, in {dir}: give that one as the \
                         parent, or none",
                        options.pid
                    ));
                }
                (self.trackings, self.chain, self.looked) = told.take()?;
                self.chain.dir = parent.dir.clone();
                self.parent = Some(parent);
            }
        }
        Ok(())
    }

    /// What the next dump goes on with.
    fn into_keeper(self) -> Result<Keeper> {
        let Self { trackings, mut chain, looked, turn, .. } = self;
        chain.dir = chain.dir.canonicalize().context(|| format!("resolve {}", chain.dir.display()))?;
        Keeper::new(self.options.pid, trackings, chain, looked, turn)
    }

    /// Makes an image in `dir`, which is that of `wanted`.
    pub(crate) fn checkpoint(&mut self, dir: ImageDir, wanted: &Wanted<'_>) -> Result<Dumped> {
        let result = self.attempt(dir, wanted);
        if result.is_err() || !wanted.track {
            // What was copied for an image that failed is in no store.
            self.trackings.clear();
            self.chain = Chain::default();
            (self.looked, self.parent) = (None, None);
        }
        result
    }

    fn attempt(&mut self, mut dir: ImageDir, wanted: &Wanted<'_>) -> Result<Dumped> {
        let begin = Instant::now();
        let Wanted { afterwards, track, .. } = *wanted;
        let options = self.options;
        let (_, running) = Family::of(options.pid, self.observer.iterators());
        self.observer.read_ahead(&running);
        let told = Arc::clone(&options.progress);
        let mut pages = PageWriter::create_telling(&dir.pages_path(), options.compression, told)?;
        if wanted.link {
            self.chain.shorten(&mut self.trackings);
            self.chain.stores.iter().try_for_each(|store| dir.link(&self.chain.dir.join(&store.file)))?;
        } else if !self.chain.stores.is_empty() {
            dir.set_parent(&self.chain.dir)?;
        }
        let InUse { resident, huge } = InUse::by(&running);
        let rounds = options.precopy.rounds(resident);
        pages.set_limit(options.precopy.buffer);
        let mut copier = Copier::new(&mut pages, self.chain.pages());
        let precopy = match !self.guest && (rounds > 0 || track || !self.trackings.is_empty()) {
            true => Some(self.precopy(&mut copier, rounds.max(1), &running, wanted.link)?),
            false => None,
        };
        if afterwards != Afterwards::Kill {
            // The thaw must not wait for the disk: what the memory of the machine allows is copied first and written
            // later. Rounds leave little, so that memory for it need not be touched before.
            let mut expected = huge + precopy.as_ref().map_or(resident, |p| 4 * PAGE * p.expected_pages);
            if options.precopy.snapshot == MemorySnapshot::Fork {
                // More than that is copied after the thaw.
                expected = expected.min(huge + resident / 8);
            }
            copier.store.set_limit((resident + huge).min(target::available_memory() / 2).max(options.precopy.buffer));
            copier.store.reserve(expected.max(MIN_RESERVE));
        }
        self.observer.catch_up();
        let (mut family, _) = Family::of(options.pid, self.observer.iterators());
        let prepare_us = begin.elapsed().as_micros() as u64;

        options.progress.set_busy(true);
        let freezing = Instant::now();
        let tree = FrozenTree::freeze(options.pid, options.timeout, &mut family)?;
        let frozen = Instant::now();
        // A tree that is killed waits for the disk, not for us.
        let urgent = (afterwards != Afterwards::Kill).then(Urgent::begin);
        self.looked = Some(sys::monotonic());
        let mut phases = Phases { last: frozen, phases: Vec::new() };
        let mut state = state::collect(&tree, options, &mut self.observer, &mut self.trackings, track, &mut phases)
            .map_err(|e| unless_dead(&tree, e))?;
        // One that is killed waits for the disk anyway.
        options.progress.set_busy(afterwards != Afterwards::Kill);
        let before = copier.counts();
        copier.stopped();
        let mut forks = None;
        if options.precopy.snapshot == MemorySnapshot::Fork && afterwards != Afterwards::Kill {
            forks = Forks::make(&state);
            phases.end("fork");
        }
        let shared = copy_frozen(&mut state, &mut self.trackings, &mut copier, forks.is_some())
            .map_err(|e| unless_dead(&tree, e))?;
        let late = copier.counts();
        phases.end("pages");
        let mut stats = DumpStats {
            reader: self.observer.name().into(),
            prepare_us,
            freezing_us: (frozen - freezing).as_micros() as u64,
            frozen_us: 0,
            phases: Vec::new(),
            total_us: 0,
            pages_stored: 0,
            pages_zero: 0,
            pages_shared: 0,
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
        drop(urgent);
        self.trackings.release();
        options.progress.set_busy(false);
        let forked = forks.is_some();
        if let Some(forks) = forks {
            copier.store.set_limit(options.precopy.buffer);
            forks.let_go()?;
            copy_forks(&mut state, &mut self.trackings, &mut copier, &forks)?;
            phases.end("forks");
        }
        let counts = copier.finish()?;
        (stats.pages_stored, stats.pages_zero, stats.pages_shared) = (counts.stored, counts.zero, counts.shared);
        regular::check_names(&mut state.objects)?;
        state.cgroups.as_mut().map_or(Ok(()), cgroups::describe)?;
        place_the_childless(&mut state, &mut self.trackings);
        let dedup = self.dedup(&state)?;
        self.chain.stores.push(pages.finish()?);
        self.chain.dir = wanted.dir.to_path_buf();
        phases.end("write");
        if tree.is_some() {
            stats.frozen_us = frozen.elapsed().as_micros() as u64;
        }
        stats.phases = phases.phases;
        stats.counts = state.counts();
        stats.total_us = begin.elapsed().as_micros() as u64;
        let done = Frozen {
            tracked: precopy.is_some(),
            scanned: state.private.iter().map(PrivatePages::scanned).sum(),
            stored: late.stored - before.stored,
            zero: late.zero - before.zero,
        };
        let precopy = precopy.map(|p| PrecopyStats {
            late_pages: done.stored,
            shared_tracked: shared.tracked,
            shared_whole: shared.whole,
            ..p
        });
        let links = std::mem::take(&mut state.objects.links);
        image::publish(dir, &state.into_records(options)?, &self.chain.stores, &stats, precopy.as_ref())?;
        links.keep();
        if let Some(tree) = tree {
            tree.kill();
        } else if !forked {
            // A dump that kills writes under the freeze, and one with forks leaves most to do after it: their times say
            // nothing of others.
            history::remember(options.pid, &stats, &done);
        }
        info!(total_us = stats.total_us, frozen_us = stats.frozen_us, "dump published");
        // The image is complete without: what goes wrong now costs space only.
        match dedup.map(|dedup| dedup.punch(wanted.dir)) {
            Some(Ok(pages)) => info!(pages, "given up in the parents"),
            Some(Err(e)) => warn!("the parents keep what they need no more: {e}"),
            None => {}
        }
        Ok(Dumped { stats, precopy, keeper: None })
    }

    /// Which pages of the parents are not needed any more, if they are to be given up.
    fn dedup(&mut self, state: &State) -> Result<Option<Dedup>> {
        let Some(parent) = self.parent.as_ref().filter(|_| self.options.auto_dedup) else { return Ok(None) };
        let runs = state.spaces.iter().flat_map(|s| &s.pages).chain(state.objects.shared.iter().flat_map(|o| &o.pages));
        let dedup = image::dedup::drop_unused(parent, runs)?;
        self.chain.stores.clone_from(&dedup.stores);
        Ok(Some(dedup))
    }

    /// Copies memory while the tree runs. `running`: its processes a moment ago. `compare`: this session makes the next image,
    /// too.
    fn precopy(&mut self, copier: &mut Copier<'_>, max: u32, running: &[i32], compare: bool) -> Result<PrecopyStats> {
        let options = self.options;
        let observer = &mut self.observer;
        if let Some(iterators) = observer.iterators()
            && let Ok(entries) = iterators.files(running)
        {
            self.trackings.refuse_direct_io(&entries);
        }
        let (trackings, timeout) = (&mut self.trackings, options.timeout);
        let mut rounds =
            Rounds { trackings, copier, observer, root: options.pid, timeout, compare, warned: &mut self.warned };
        let rounds = rounds.run(&mut self.looked, max, &options.precopy)?;
        let (expected_pages, expected_us) = rounds::expect(&rounds);
        Ok(PrecopyStats { rounds, expected_pages, expected_us, ..Default::default() })
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
