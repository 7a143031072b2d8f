//! The tracker's copy is never wrong.

use super::{skip, victim::Victim};
use crate::{
    observe::{Lease, ObserveError, Scope, Serving, Tracker},
    task::{Family, FrozenTree},
};
use std::{
    os::fd::AsFd,
    path::Path,
    time::{Duration, Instant},
};

fn tracker(root: i32, scope: Scope) -> Option<Tracker> {
    match Tracker::start(root, scope) {
        Ok(tracker) => Some(tracker),
        Err(e @ (ObserveError::MissingCapability(_) | ObserveError::NotPermitted | ObserveError::NoBtf { .. })) => {
            skip(&e.to_string());
            None
        }
        Err(e) => panic!("{e}"),
    }
}

fn freeze(root: i32) -> FrozenTree {
    FrozenTree::freeze(root, Duration::from_secs(10), &mut Family::of(root, None).0).unwrap()
}

#[test]
fn what_stands_still_is_fresh() {
    let victim = Victim::start("fds rpsetbfm");
    let root = victim.pids[0];
    for (scope, parts) in [(Scope::Memory, 2), (Scope::Syscalls, 6)] {
        let Some(mut tracker) = tracker(root, scope) else { return };
        tracker.refresh().unwrap();
        let tree = freeze(root);
        let (fresh, differences) = tracker.paranoid(&tree.pids()).unwrap();
        assert_eq!(differences, []);
        assert_eq!((fresh.share(), fresh.parts), (1.0, parts));
    }
}

#[test]
fn the_copy_of_a_restless_tree_is_never_wrong() {
    restless(Scope::Memory);
}

#[test]
fn nor_with_system_calls() {
    restless(Scope::Syscalls);
}

fn restless(scope: Scope) {
    const FREEZES: u32 = 200;
    // Nine threads: 10,800 operations in all.
    let victim = Victim::start("restless 7 1200");
    let root = victim.pids[0];
    let Some(mut tracker) = tracker(root, scope) else { return };
    let (mut shares, mut least) = (0.0, 1.0f64);
    let begin = Instant::now();
    for n in 0..FREEZES {
        // Sometimes the copy is old, sometimes just made.
        if n % 3 != 0 {
            tracker.refresh().unwrap();
        }
        std::thread::sleep(Duration::from_micros(u64::from(n % 7) * 2000));
        if n % 3 == 0 {
            tracker.refresh().unwrap();
        }
        let tree = freeze(root);
        let (fresh, differences) = tracker.paranoid(&tree.pids()).unwrap();
        assert_eq!(differences, [], "at freeze {n}");
        shares += fresh.share();
        least = least.min(fresh.share());
    }
    let counters = tracker.counters().unwrap();
    println!(
        "{FREEZES} freezes in {:?}: {:.0} % of the parts were fresh, at least {:.0} %; {counters:?}",
        begin.elapsed(),
        100.0 * shares / f64::from(FREEZES),
        100.0 * least,
    );
    // The test says nothing if nothing happened, or if nothing was ever fresh.
    assert!(counters.forks > 50 && counters.execs > 20 && counters.threads > 20, "{counters:?}");
    assert!(counters.memory > 1000, "{counters:?}");
    assert_eq!(counters.calls.is_some(), scope == Scope::Syscalls);
    if let Some(calls) = counters.calls {
        assert!(calls.descriptors > 1000 && calls.signal_actions > 20, "{counters:?}");
    }
    assert_eq!(counters.lost, 0);
    assert!(shares > 0.0);
}

#[test]
fn what_others_share_is_never_fresh() {
    let victim = Victim::start("sharing .");
    let root = victim.pids[0];
    let Some(mut tracker) = tracker(root, Scope::Syscalls) else { return };
    for _ in 0..20 {
        tracker.refresh().unwrap();
        std::thread::sleep(Duration::from_millis(2));
        let tree = freeze(root);
        let (fresh, differences) = tracker.paranoid(&tree.pids()).unwrap();
        assert_eq!(tree.pids().len(), 2);
        assert_eq!(differences, []);
        assert!(fresh.files.is_empty() && fresh.sigactions.is_empty(), "{fresh:?}");
    }
}

#[test]
fn other_names_for_the_same_mappings_are_noticed() {
    let victim = Victim::start("renaming .");
    let root = victim.pids[0];
    let Some(mut tracker) = tracker(root, Scope::Memory) else { return };
    let mut fresh = 0;
    for _ in 0..50 {
        tracker.refresh().unwrap();
        std::thread::sleep(Duration::from_micros(500));
        let tree = freeze(root);
        let (now, differences) = tracker.paranoid(&tree.pids()).unwrap();
        assert_eq!(differences, []);
        fresh += now.vmas.len();
    }
    assert!(fresh > 0 && fresh < 50, "{fresh} of 50 were fresh");
}

/// A tracker that runs beside the test until it is told to stop.
struct Beside {
    stop: Option<std::io::PipeWriter>,
    thread: Option<std::thread::JoinHandle<crate::observe::Result<()>>>,
}

impl Beside {
    fn start(mut serving: Serving) -> Self {
        let (stop, stopper) = std::io::pipe().unwrap();
        let thread = std::thread::spawn(move || serving.run(stop.as_fd()));
        Self { stop: Some(stopper), thread: Some(thread) }
    }

    fn end(mut self) {
        drop(self.stop.take());
        self.thread.take().unwrap().join().unwrap().unwrap();
    }
}

fn serving(dir: &Path, root: i32) -> Option<Serving> {
    match Serving::start_in(dir, root, Scope::Syscalls) {
        Ok(serving) => Some(serving),
        Err(e @ (ObserveError::MissingCapability(_) | ObserveError::NotPermitted | ObserveError::NoBtf { .. })) => {
            skip(&e.to_string());
            None
        }
        Err(e) => panic!("{e}"),
    }
}

#[test]
fn a_tracker_lends_what_it_knows() {
    let victim = Victim::start("fds rpsetbfmf");
    let root = victim.pids[0];
    let dir = victim.dir.path().join("run");
    assert!(Lease::take_in(&dir, root).unwrap().is_none());
    let Some(first) = serving(&dir, root) else { return };
    let other = Serving::start_in(&dir, root, Scope::Memory).unwrap_err();
    let own = std::process::id() as i32;
    assert!(matches!(other, ObserveError::Tracked { tracker, .. } if tracker == own), "{other}");
    let beside = Beside::start(first);
    for _ in 0..2 {
        let mut lease = Lease::take_in(&dir, root).unwrap().expect("it is tracked");
        let tree = freeze(root);
        let pids = tree.pids();
        let (processes, fresh) = lease.check(&pids).unwrap();
        assert_eq!((processes.len(), fresh.share(), fresh.parts), (3, 1.0, 9));
        assert_eq!(lease.compare(&fresh).unwrap(), []);
        let mut vmas = lease.vmas(&pids, &fresh).unwrap();
        assert_eq!(vmas.remove(&root).unwrap(), crate::observe::procfs::vmas(&[root]).unwrap());
        assert_eq!(vmas.len(), 2);
    }
    beside.end();
    assert!(Lease::take_in(&dir, root).unwrap().is_none());
    // A killed tracker leaves its socket behind.
    let socket = dir.join(format!("track-{root}.sock"));
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    assert!(Lease::take_in(&dir, root).unwrap().is_none());
    let again = Beside::start(serving(&dir, root).expect("the first one's place is free"));
    let lease = Lease::take_in(&dir, root).unwrap().expect("it is tracked again");
    assert_eq!(lease.shadow().pids().count(), 3);
    drop(lease);
    // It ends with its tree.
    drop(victim);
    again.thread.expect("it was started").join().unwrap().unwrap();
}
