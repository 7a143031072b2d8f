//! Processes and threads: what a task has besides memory and files. Each module reads its part and emits the restorer
//! operations that bring it back.

pub(crate) mod attributes;
pub(crate) mod cgroup_properties;
pub(crate) mod cgroups;
pub(crate) mod clocks;
pub(crate) mod creds;
pub(crate) mod labels;
pub(crate) mod limits;
pub(crate) mod namespaces;
pub(crate) mod process;
pub(crate) mod sched;
pub(crate) mod seccomp;
pub(crate) mod sharing;
pub(crate) mod signals;
pub(crate) mod thread;
pub(crate) mod timers;
