//! The image format of Standstill: record types, framing, the page store, and the directory that holds them.
//!
//! Layout, versions and integrity are described in `docs/image-format.md`.

mod error;
pub mod frame;
pub mod publish;
pub mod store;
pub mod types;

pub use error::{Flaw, ImageError};
