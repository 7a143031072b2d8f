//! The features, what they are for, and who probes them.
//!
//! The versions are those of the first mainline kernel with the feature.

use super::{Feature, Probe, machine, memory, process};

const PTRACE: &str = "CAP_SYS_PTRACE, and kernel.yama.ptrace_scope below 3";
const RESTORE: &str = "CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN";
const USERFAULTFD: &str = "CAP_SYS_PTRACE or vm.unprivileged_userfaultfd=1";

impl Feature {
    const fn new(name: &'static str, since: Option<&'static str>, lost: &'static str, probe: Probe) -> Self {
        Self { name, required: false, since, lost, needs: None, probe }
    }

    /// Dump or restore need it for every tree.
    const fn required(self) -> Self {
        Self { required: true, ..self }
    }

    const fn needs(self, needs: &'static str) -> Self {
        Self { needs: Some(needs), ..self }
    }
}

/// All of them, in the order of the report.
pub(super) const ALL: &[Feature] = &[
    Feature::new("ptrace-seize", Some("3.8"), "every dump and restore: no process can be stopped", process::seize)
        .required()
        .needs(PTRACE),
    Feature::new("ptrace-signals", Some("3.11"), "pending and blocked signals", process::signals)
        .required()
        .needs(PTRACE),
    Feature::new(
        "ptrace-rseq",
        Some("5.13"),
        "threads with a restartable sequence, that is, all of glibc 2.35 and newer",
        process::rseq_configuration,
    )
    .required()
    .needs(PTRACE),
    Feature::new("ptrace-xstate", Some("2.6.35"), "floating point and vector registers", process::xstate)
        .required()
        .needs(PTRACE),
    Feature::new("proc-mem-read", Some("2.2"), "reading the memory of a tree", memory::vm_read)
        .required()
        .needs(PTRACE),
    Feature::new("proc-mem-write", Some("2.6.39"), "system calls in a process on its own behalf", memory::forced_write)
        .required()
        .needs(PTRACE),
    Feature::new("vdso-room", None, "system calls in a process on its own behalf", memory::vdso_room).required(),
    Feature::new("pidfd-open", Some("5.3"), "contents of pipes and state of sockets", process::pidfd).required(),
    Feature::new("pidfd-getfd", Some("5.6"), "contents of pipes and state of sockets", process::getfd)
        .required()
        .needs(PTRACE),
    Feature::new(
        "kcmp",
        Some("3.5"),
        "telling whether processes share a descriptor or memory (CONFIG_KCMP)",
        process::same_object,
    )
    .required()
    .needs(PTRACE),
    Feature::new("clone3-set-tid", Some("5.5"), "every restore: processes cannot have their old ids", process::set_tid)
        .required()
        .needs(RESTORE),
    Feature::new(
        "proc-children",
        Some("3.5"),
        "finding the processes of a tree (CONFIG_PROC_CHILDREN)",
        process::children,
    )
    .required(),
    Feature::new("proc-map-files", Some("3.3"), "mapped files", memory::map_files).required().needs(RESTORE),
    Feature::new("proc-timers", Some("3.10"), "POSIX timers (CONFIG_CHECKPOINT_RESTORE)", process::timers).required(),
    Feature::new("pagemap-scan", Some("6.7"), "finding the pages that hold something", memory::scan).required(),
    Feature::new(
        "prctl-mm-map",
        Some("3.18"),
        "every restore: address spaces cannot be rebuilt (CONFIG_CHECKPOINT_RESTORE)",
        memory::mm_map,
    )
    .required(),
    Feature::new(
        "close-range",
        Some("5.9"),
        "every restore: inherited descriptors cannot be closed",
        process::close_range,
    )
    .required(),
    Feature::new("page-size", None, "everything: images have pages of 4 KiB", machine::page_size).required(),
    Feature::new(
        "cap-sys-ptrace",
        Some("2.2"),
        "processes of other users, and those that are not dumpable",
        machine::cap_sys_ptrace,
    )
    .required(),
    Feature::new(
        "cap-sys-admin",
        Some("2.2"),
        "page frame numbers; without CAP_CHECKPOINT_RESTORE also process ids and mapped files",
        machine::cap_sys_admin,
    ),
    Feature::new(
        "cap-checkpoint-restore",
        Some("5.9"),
        "process ids and mapped files, unless there is CAP_SYS_ADMIN",
        machine::cap_checkpoint_restore,
    ),
    Feature::new(
        "cap-sys-resource",
        Some("2.2"),
        "raising hard limits: trees with higher ones than ours cannot be restored",
        machine::cap_sys_resource,
    ),
    Feature::new("cap-bpf", Some("5.8"), "eBPF observers, unless there is CAP_SYS_ADMIN", machine::cap_bpf),
    Feature::new("cap-perfmon", Some("5.8"), "eBPF observers, unless there is CAP_SYS_ADMIN", machine::cap_perfmon),
    Feature::new("btf", Some("5.4"), "eBPF observers (CONFIG_DEBUG_INFO_BTF)", machine::btf),
    Feature::new(
        "ebpf-iterators",
        Some("5.8"),
        "short freezes: descriptors and threads are read from procfs, which takes longer",
        machine::iterators,
    )
    .needs("CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN"),
    Feature::new(
        "ebpf-tracker",
        Some("5.11"),
        "`track`, counted changes in `watch`, copying shared memory before the freeze (CONFIG_TRACING)",
        machine::tracker,
    )
    .needs("CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN"),
    Feature::new("no-lockdown", Some("5.4"), "eBPF observers", machine::lockdown),
    Feature::new(
        "page-frames",
        Some("2.6.25"),
        "sharing of copy-on-write pages between parent and child: stored twice, and no longer shared after a restore",
        memory::frames,
    )
    .needs("CAP_SYS_ADMIN"),
    Feature::new("guard-pages", Some("6.16"), "guard pages (MADV_GUARD_INSTALL)", memory::guards),
    Feature::new("memfd", Some("3.17"), "memfds (CONFIG_MEMFD_CREATE)", memory::memfd),
    Feature::new("rseq", Some("4.18"), "restoring threads with a restartable sequence (CONFIG_RSEQ)", process::rseq),
    Feature::new("timer-restore-ids", Some("6.15"), "restoring POSIX timers", process::timer_ids),
    Feature::new(
        "timerfd-set-ticks",
        Some("3.18"),
        "expirations of a timerfd that were not read (CONFIG_CHECKPOINT_RESTORE)",
        process::timerfd_ticks,
    ),
    Feature::new(
        "time-namespaces",
        Some("5.6"),
        "clocks that go on after a restore (CONFIG_TIME_NS)",
        process::time_namespaces,
    )
    .needs("CAP_SYS_ADMIN and CAP_SYS_TIME"),
    Feature::new(
        "userfaultfd",
        Some("4.3"),
        "copying memory before the freeze (CONFIG_USERFAULTFD)",
        memory::userfaultfd,
    )
    .needs(USERFAULTFD),
    Feature::new(
        "userfaultfd-wp-async",
        Some("6.7"),
        "copying memory before the freeze: writes cannot be tracked",
        memory::write_tracking,
    )
    .needs(USERFAULTFD),
    Feature::new(
        "open-files",
        None,
        "trees with higher descriptor limits than ours, unless there is CAP_SYS_RESOURCE",
        machine::open_files,
    ),
];
