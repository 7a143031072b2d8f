//! CLOCK_MONOTONIC and CLOCK_BOOTTIME (time_namespaces(7)).
//!
//! They are recorded for one moment under the freeze, and so is what is left of every timer. A restore into a time namespace
//! lets them go on from there: its offsets are chosen before the tree is made, so the time that the restore takes passes as if
//! the tree had not been let run. Timers are then set to the time of these clocks at which they are due.

use super::{namespaces, process::write_own};
use crate::{
    error::{Context, Error, Result},
    kernel::proc,
    restore::program::Program,
};
use nix::time::{ClockId, clock_gettime};
use standstill_images::types::Clocks;
use std::time::{Duration, Instant};

const NS: i128 = 1_000_000_000;
const CLONE_NEWTIME: u64 = 0x80;

/// What to do about the tree's clocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TimeNamespace {
    /// They go on if the tree had a time namespace of its own.
    #[default]
    AsBefore,
    /// They go on, in a new time namespace.
    New,
    /// They are those of the restoring process.
    None,
}

/// CLOCK_MONOTONIC and CLOCK_BOOTTIME, or how far they are from those of the machine, in nanoseconds.
type Pair = [i128; 2];

/// A moment under the freeze.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    at: Instant,
    /// Our own clocks.
    clocks: Pair,
}

impl Moment {
    pub(crate) fn now() -> Self {
        Self { at: Instant::now(), clocks: own_clocks() }
    }

    /// What was left in that moment, if so much is left now; 0 (not in use) stays. Never less than it was: a timer must not be
    /// too early.
    pub(crate) fn left(&self, left_ns: u64) -> u64 {
        if left_ns == 0 { 0 } else { left_ns.saturating_add(self.at.elapsed().as_nanos() as u64) }
    }

    /// The clocks of a tree. `other`: a process of it, if it is in another time namespace than we are.
    pub(crate) fn clocks(&self, other: Option<i32>) -> Result<Clocks> {
        let mut clocks = self.clocks;
        if let Some(pid) = other {
            let theirs = offsets(pid).context(|| format!("read the offsets of the clocks of process {pid}"))?;
            for ((clock, own), theirs) in clocks.iter_mut().zip(own_offsets()?).zip(theirs) {
                *clock += theirs - own;
            }
        }
        let [monotonic_ns, boottime_ns] = clocks.map(|ns| ns.try_into().unwrap_or(0));
        Ok(Clocks { monotonic_ns, boottime_ns, namespace: other.is_some() })
    }
}

fn own_clocks() -> Pair {
    [ClockId::CLOCK_MONOTONIC, ClockId::CLOCK_BOOTTIME].map(|clock| {
        let now = clock_gettime(clock).map_or(Duration::ZERO, Duration::from);
        now.as_nanos() as i128
    })
}

/// The offsets of our own clocks.
fn own_offsets() -> Result<Pair> {
    if !namespaces::has_one_time() {
        let what = "a process whose children are in its own time namespace (Linux 5.5, CONFIG_TIME_NS),".into();
        return Err(Error::Missing {
            what,
            remedy: "start standstill without unshare --time, or without --timens".into(),
        });
    }
    offsets(std::process::id() as i32).context(|| "read the offsets of the own clocks".into())
}

fn offsets(pid: i32) -> std::io::Result<Pair> {
    let text = std::fs::read_to_string(proc::path(pid, "timens_offsets"))?;
    parse_offsets(&text).ok_or_else(|| std::io::ErrorKind::InvalidData.into())
}

/// Lines `clock seconds nanoseconds`.
fn parse_offsets(text: &str) -> Option<Pair> {
    let of = |name: &str| {
        let mut fields = text.lines().find_map(|line| line.strip_prefix(name))?.split_ascii_whitespace();
        Some(fields.next()?.parse::<i128>().ok()? * NS + fields.next()?.parse::<i128>().ok()?)
    };
    Some([of("monotonic")?, of("boottime")?])
}

/// How a tree's clocks go on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Continued {
    at_freeze: Clocks,
    /// Of the time namespace to be made.
    offsets: Pair,
}

impl Continued {
    /// Decides whether they do.
    pub(crate) fn choose(recorded: Option<Clocks>, wanted: TimeNamespace) -> Result<Option<Self>> {
        let at_freeze = match (wanted, recorded) {
            (TimeNamespace::New, None) => {
                return Err(Error::Target(
                    "the image is of an older version, which did not record the clocks: restore it without --timens"
                        .into(),
                ));
            }
            (TimeNamespace::New, Some(clocks)) => clocks,
            (TimeNamespace::AsBefore, Some(clocks)) if clocks.namespace => clocks,
            _ => return Ok(None),
        };
        let status = proc::status(std::process::id() as i32, std::process::id() as i32);
        let caps = status.context(|| "read own status".into())?.caps[2];
        const CAP_SYS_ADMIN: u32 = 21;
        const CAP_SYS_TIME: u32 = 25;
        if [CAP_SYS_ADMIN, CAP_SYS_TIME].iter().any(|n| caps & 1 << n == 0) {
            return Err(Error::Missing {
                what: "CAP_SYS_ADMIN and CAP_SYS_TIME, to make a time namespace in which the clocks go on,".into(),
                remedy: "run as root, or let the tree have the clocks of this machine with --timens=none".into(),
            });
        }
        Self::new(at_freeze, own_clocks(), own_offsets()?).map(Some)
    }

    /// `own` clocks, with these offsets from the machine's.
    fn new(at_freeze: Clocks, own: Pair, own_offsets: Pair) -> Result<Self> {
        // As the kernel has it: half of the seconds that fit into 64 bits of nanoseconds.
        const LATEST: u64 = i64::MAX as u64 / 2;
        let then = [at_freeze.monotonic_ns, at_freeze.boottime_ns];
        if then.iter().any(|&ns| ns >= LATEST) {
            return Err(Error::Target("the clocks of the image are beyond what the kernel allows".into()));
        }
        let offsets = [0, 1].map(|n| i128::from(then[n]) - (own[n] - own_offsets[n]));
        Ok(Self { at_freeze, offsets })
    }

    /// The time of a clock at which something is due of which `left_ns` were left at the freeze; `None`: this clock is the
    /// same in all time namespaces.
    pub(crate) fn due(&self, clock: i32, left_ns: u64) -> Option<u64> {
        match clock {
            libc::CLOCK_MONOTONIC => Some(self.at_freeze.monotonic_ns.saturating_add(left_ns)),
            libc::CLOCK_BOOTTIME | libc::CLOCK_BOOTTIME_ALARM => {
                Some(self.at_freeze.boottime_ns.saturating_add(left_ns))
            }
            _ => None,
        }
    }

    /// Lets a process that has only one thread make the time namespace and enter it, by way of the lowest free descriptor
    /// `fd`. Its children follow.
    pub(crate) fn restore(&self, fd: i32, program: &mut Program) {
        program.call("make a time namespace", libc::SYS_unshare, &[CLONE_NEWTIME.into()]);
        write_own("timens_offsets", &self.text(), fd, program);
        let path = program.string(b"/proc/self/ns/time_for_children");
        let args = [libc::AT_FDCWD.into(), path, libc::O_RDONLY.into()];
        program.call_expecting("open the time namespace", libc::SYS_openat, &args, fd);
        program.call("enter the time namespace", libc::SYS_setns, &[fd.into(), CLONE_NEWTIME.into()]);
        program.call("close the time namespace", libc::SYS_close, &[fd.into()]);
    }

    fn text(&self) -> String {
        let line = |name: &str, ns: i128| format!("{name} {} {}\n", ns.div_euclid(NS), ns.rem_euclid(NS));
        line("monotonic", self.offsets[0]) + &line("boottime", self.offsets[1])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn offsets_as_the_kernel_shows_them() {
        let text = "monotonic           5  10\nboottime           -2  999999999\n";
        assert_eq!(parse_offsets(text), Some([5 * NS + 10, -NS - 1]));
        assert_eq!(parse_offsets("monotonic 1 x\nboottime 0 0\n"), None);
        assert_eq!(parse_offsets("monotonic 1 2\n"), None);
    }

    #[test]
    fn what_is_not_armed_stays_so() {
        let moment = Moment::now();
        assert_eq!(moment.left(0), 0);
        assert!(moment.left(5) > 5);
        assert_eq!(moment.left(u64::MAX), u64::MAX);
    }

    #[test]
    fn clocks_that_nobody_asked_to_go_on_do_not() {
        let plain = Clocks { monotonic_ns: 1, boottime_ns: 2, namespace: false };
        let own = Clocks { namespace: true, ..plain };
        for (recorded, wanted) in [
            (None, TimeNamespace::AsBefore),
            (None, TimeNamespace::None),
            (Some(plain), TimeNamespace::AsBefore),
            (Some(own), TimeNamespace::None),
        ] {
            assert!(Continued::choose(recorded, wanted).unwrap().is_none(), "{recorded:?} {wanted:?}");
        }
        assert!(Continued::choose(None, TimeNamespace::New).is_err());
    }

    #[test]
    fn clocks_beyond_the_end_of_time() {
        let clocks = Clocks { monotonic_ns: u64::MAX, ..Default::default() };
        assert!(Continued::new(clocks, [0, 0], [0, 0]).is_err());
    }

    proptest! {
        /// In the new namespace the clocks show what they showed at the freeze, plus what has passed since.
        #[test]
        fn clocks_go_on(
            then in (0..1u64 << 60, 0..1u64 << 60), machine in (0..1i128 << 60, 0..1i128 << 60),
            shifts in (-(1i128 << 60)..1 << 60, -(1i128 << 60)..1 << 60), passed in 0..1i128 << 40, left in 1..1u64 << 60,
        ) {
            let clocks = Clocks { monotonic_ns: then.0, boottime_ns: then.1, namespace: false };
            let own = [machine.0 + shifts.0, machine.1 + shifts.1];
            let continued = Continued::new(clocks, own, [shifts.0, shifts.1]).unwrap();
            let offsets = parse_offsets(&continued.text()).unwrap();
            prop_assert_eq!(machine.0 + passed + offsets[0], i128::from(then.0) + passed);
            prop_assert_eq!(machine.1 + passed + offsets[1], i128::from(then.1) + passed);
            prop_assert_eq!(continued.due(libc::CLOCK_MONOTONIC, left), Some(then.0 + left));
            prop_assert_eq!(continued.due(libc::CLOCK_BOOTTIME_ALARM, left), Some(then.1 + left));
            prop_assert_eq!(continued.due(libc::CLOCK_REALTIME, left), None);
        }
    }
}
