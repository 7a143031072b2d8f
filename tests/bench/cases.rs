//! What is measured.

/// One kind of target.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    /// Options of the `clock` workload.
    pub(crate) args: &'static [&'static str],
}

pub(crate) const ALL: [Case; 8] = [
    Case { name: "heap-64m", args: &["--heap-mib", "64"] },
    Case { name: "heap-1g", args: &["--heap-mib", "1024"] },
    Case { name: "fds-1000", args: &["--fds", "1000"] },
    Case { name: "fds-15000", args: &["--fds", "15000"] },
    Case { name: "vmas-20000", args: &["--vmas", "20000"] },
    Case { name: "threads-100", args: &["--threads", "100"] },
    Case { name: "threads-1000", args: &["--threads", "1000"] },
    Case { name: "processes-300", args: &["--processes", "300"] },
];
