//! Seizing, freezing and thawing a tree; system calls made by its tasks on our behalf.

mod freeze;
mod remote;

pub(crate) use freeze::{FrozenProcess, FrozenTree, Stopped};
pub(crate) use remote::Remote;
