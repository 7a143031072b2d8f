//! What the self-verifying programs have in common.
//!
//! A workload is started with `--dir DIR`, prints `READY` once its state is set up, and then verifies itself until it
//! is told to end. `SIGUSR1` makes it verify everything once more and write a [`crate::verdict::Verdict`], `SIGUSR2`
//! resets its pause meter (and is answered by a verdict without verification), `SIGTERM` ends it with status 0 (1 when
//! something was wrong).

mod args;
mod book;
mod checker;
mod computation;
mod control;
mod family;
mod histogram;
mod meter;
mod pattern;
mod random;
mod rseq;
mod segment;
mod selfstate;
mod sys;
mod wp;

pub use args::Args;
pub use book::{Book, PAGE};
pub use checker::Checker;
pub use computation::Computation;
pub use control::{Control, Request};
pub use family::Family;
pub use histogram::Histogram;
pub use meter::Meter;
pub use pattern::Pattern;
pub use random::Random;
pub use rseq::check_rseq;
pub use segment::Segment;
pub use selfstate::SelfState;
pub use sys::{Mapping, fork_child, monotonic, now_us, proc_stat_fields, smaps_entry};
pub use wp::Tracking;
