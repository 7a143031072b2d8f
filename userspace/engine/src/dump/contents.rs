//! The contents of the memory: what is copied under the freeze, what from forks after it, and where the image has each
//! page.

use super::{forks::Forks, state::State, trackings::Trackings};
use crate::{
    error::{Context, Result},
    memory::{
        copy::{Copier, Parent},
        known,
        private::PrivatePages,
    },
    objects::shared_memory,
};
use standstill_images::types::{AddressSpace, PageRun};
use std::{
    collections::{HashMap, HashSet},
    io,
};

/// How many objects of shared memory were copied in part, and how many in full.
#[derive(Default)]
pub(super) struct SharedCounts {
    pub tracked: u64,
    pub whole: u64,
}

/// Copies under the freeze what is not known yet; with forks, only what they do not have.
pub(super) fn copy_frozen(
    state: &mut State,
    trackings: &mut Trackings,
    copier: &mut Copier<'_>,
    forked: bool,
) -> Result<SharedCounts> {
    if forked {
        for (private, space) in state.private.iter().zip(&mut state.spaces) {
            // No parent has these pages either.
            space.pages = copier.private(&private.without_fork(), None)?.runs;
        }
    } else {
        copy_private(state, trackings, |pages, parent| Ok(copier.private(pages, parent)?.runs))?;
    }
    copy_shared(state, trackings, copier)
}

/// Copies what is not known yet of shared memory, which forks do not keep as it was.
fn copy_shared(state: &mut State, trackings: &mut Trackings, copier: &mut Copier<'_>) -> Result<SharedCounts> {
    let mut counts = SharedCounts::default();
    let keys: HashMap<_, _> = state.objects.shared_keys().map(|(key, id)| (id, key)).collect();
    for (object, source) in state.objects.shared.iter_mut().zip(&state.objects.shared_sources) {
        let key = keys[&object.id];
        match state.shared.remove(&key).zip(trackings.sharing.object_mut(key)) {
            Some((unchanged, tracked)) => {
                tracked.copy(unchanged, copier)?;
                object.pages = tracked.known.runs().to_vec();
                counts.tracked += 1;
            }
            None => {
                let failed = || format!("look for shared memory object {}", object.id);
                let parts = shared_memory::data_ranges(source, object).context(failed)?;
                object.pages = copier.shared(source, &parts)?;
                counts.whole += 1;
            }
        }
    }
    Ok(counts)
}

/// Copies the rest from forks of the processes.
pub(super) fn copy_forks(
    state: &mut State,
    trackings: &mut Trackings,
    copier: &mut Copier<'_>,
    forks: &Forks,
) -> Result<()> {
    copy_private(state, trackings, |pages, parent| {
        let parent = parent.map(|parent| Parent { pid: forks.of(parent.pid), ..parent });
        match copier.private(&pages.in_fork(forks.of(pages.pid)), parent) {
            // Not the target has ended, but what was to keep its memory.
            Err(e) if e.is_death() => Err(io::Error::from_raw_os_error(libc::ESRCH))
                .context(|| format!("read the fork of process {}, which somebody has killed", pages.pid)),
            other => Ok(other?.runs),
        }
    })
}

/// Copies the private pages of all processes, parents before their children, as `copy` does it for one.
fn copy_private(
    state: &mut State,
    trackings: &mut Trackings,
    mut copy: impl FnMut(&PrivatePages, Option<Parent<'_>>) -> Result<Vec<PageRun>>,
) -> Result<()> {
    let (parents, homes) = (state.parents(), state.homes());
    let with_children = with_children(state);
    for (n, private) in state.private.iter().enumerate() {
        let (earlier, rest) = state.spaces.split_at_mut(n);
        let parent = parents.get(&private.pid).and_then(|p| homes.get(p)).filter(|home| **home < n);
        let parent = parent.map(|&home| Parent { pid: state.private[home].pid, runs: &earlier[home].pages });
        let copied = copy(private, parent)?;
        rest[0].pages = known::merge(std::mem::take(&mut rest[0].pages), copied);
        if with_children.contains(&n) {
            place(private, &mut rest[0], trackings);
        }
    }
    Ok(())
}

/// Completes the lists of pages that no other process needed under the freeze.
pub(super) fn place_the_childless(state: &mut State, trackings: &mut Trackings) {
    let with_children = with_children(state);
    let all = state.private.iter().zip(&mut state.spaces).enumerate();
    for (_, (private, space)) in all.filter(|(n, _)| !with_children.contains(n)) {
        place(private, space, trackings);
    }
}

/// Where among the spaces those of parents are.
fn with_children(state: &State) -> HashSet<usize> {
    let homes = state.homes();
    state.parents().into_values().filter_map(|parent| homes.get(&parent).copied()).collect()
}

/// Adds to a process's list of pages, which has those copied under the freeze, what was known before.
fn place(private: &PrivatePages, space: &mut AddressSpace, trackings: &mut Trackings) {
    if let Some(tracking) = trackings.of_mut(private.pid) {
        tracking.known.keep(private.unchanged.clone());
        tracking.known.learn(&private.ranges, std::mem::take(&mut space.pages));
        space.pages = tracking.known.runs().to_vec();
    }
}
