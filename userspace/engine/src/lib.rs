//! The Standstill engine: freeze, collect, restore and observe Linux process trees.

pub mod observe;
