//! The Standstill engine: freeze, collect, restore and observe Linux process trees.
//!
//! Data flows one way. [`dump`]: freeze → collect → images. [`restore()`]: images → plan → execute.

pub mod check;
mod dump;
mod error;
mod image;
mod kernel;
mod memory;
mod objects;
pub mod observe;
mod parallel;
mod restore;
mod snapshot;
mod task;
mod tree;
pub mod watch;

pub use dump::{Afterwards, DumpOptions, Dumped, Keeper, MemorySnapshot, Precopy, PrecopyOptions, Reader, dump};
pub use error::{Error, Result};
pub use image::{Image, Store, merge};
pub use restore::{RestoreOptions, restore};
pub use snapshot::{At, Snapshot, SnapshotOptions, find, list, snapshot};
pub use standstill_images::store::Progress;
pub use tree::{
    cgroups::{CgroupMode, CgroupOptions},
    clocks::TimeNamespace,
};
