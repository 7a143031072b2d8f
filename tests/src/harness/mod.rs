//! What the end-to-end tests and the benchmark have in common.
//!
//! A test takes its [`Turn`], starts a [`Target`], runs the [`Tool`] on it and compares [`Snapshot`]s. Whatever it
//! started is gone when it ends, also when it fails.

mod cycle;
mod huge;
pub mod left;
mod occupy;
mod pidfd;
pub mod proc;
mod snapshot;
mod split;
mod sysctl;
mod target;
mod tmux;
mod tool;
mod turn;

pub use cycle::{
    dump_and_restore, dump_and_restore_stopped, dump_and_restore_twice, full_cycle, kept, snapshots_and_back,
    take_back, take_back_at,
};
pub use huge::{HugePages, Hugetlbfs};
pub use occupy::Occupier;
pub use pidfd::Pidfd;
pub use snapshot::{Memory, Snapshot};
pub use split::split_image;
pub use sysctl::Sysctl;
pub use target::{Setting, Target, workload};
pub use tmux::Tmux;
pub use tool::{Outcome, Run, Running, Tool};
pub use turn::{Turn, say, skip, standstill, wait_until};
