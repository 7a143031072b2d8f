//! The image format of Standstill.
