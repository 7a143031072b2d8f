//! Address spaces: what is mapped, which pages hold something, and how both come back.

pub(crate) mod aio;
pub(crate) mod area;
pub(crate) mod collect;
pub(crate) mod compare;
pub(crate) mod copy;
pub(crate) mod huge;
pub(crate) mod known;
pub(crate) mod map;
pub(crate) mod pages;
pub(crate) mod private;
pub(crate) mod ranges;
pub(crate) mod shared;
pub(crate) mod smaps;
pub(crate) mod source;
pub(crate) mod sums;
pub(crate) mod tracking;
pub(crate) mod verify;
