//! Seizing, freezing and thawing a tree; system calls made by its tasks on our behalf.

mod family;
mod fork;
mod freeze;
mod remote;

pub(crate) use family::{Family, running};
pub(crate) use fork::Fork;
pub(crate) use freeze::{FrozenProcess, FrozenTree, Stopped};
pub(crate) use remote::Remote;
