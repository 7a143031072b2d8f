//! What is measured.

/// One kind of target.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) workload: &'static str,
    /// Options of the workload.
    pub(crate) args: &'static [&'static str],
    /// Takes long: measured only when it is named.
    pub(crate) only_named: bool,
}

impl Case {
    const fn clock(name: &'static str, args: &'static [&'static str]) -> Self {
        Self { name, workload: "clock", args, only_named: false }
    }

    const fn writer(name: &'static str, args: &'static [&'static str]) -> Self {
        Self { name, workload: "writer", args, only_named: true }
    }
}

pub(crate) const ALL: [Case; 11] = [
    Case::clock("heap-64m", &["--heap-mib", "64"]),
    Case::clock("heap-1g", &["--heap-mib", "1024"]),
    Case::clock("fds-1000", &["--fds", "1000"]),
    Case::clock("fds-15000", &["--fds", "15000"]),
    Case::clock("vmas-20000", &["--vmas", "20000"]),
    Case::clock("threads-100", &["--threads", "100"]),
    Case::clock("threads-1000", &["--threads", "1000"]),
    Case::clock("processes-300", &["--processes", "300"]),
    Case::writer("heap-1g-idle", &["--heap", "1024"]),
    Case::writer("writer-4g", &["--heap", "4096", "--pages-per-second", "2000"]),
    Case {
        name: "shared-512m",
        workload: "sharers",
        args: &["--mib", "512", "--children", "1", "--pages-per-second", "1000"],
        only_named: true,
    },
];

/// What is measured in a way of its own, and only when it is named.
pub(crate) const OTHERS: [&str; 4] = ["server", "small-20hz", "tracking-curve", "redis-idle"];
