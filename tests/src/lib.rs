//! Shared parts of the end-to-end tests.
//!
//! [`workload`] is used by the programs that are checkpointed: they verify themselves and write a verdict.
//! [`harness`] is used by the tests and the benchmark: it starts the programs, runs the tool on them and compares what
//! can be seen from outside. [`verdict`] is the file both sides share.

pub mod harness;
pub mod time_namespace;
pub mod verdict;
pub mod workload;
