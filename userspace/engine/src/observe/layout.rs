//! The offsets that the programs need, from the running kernel's BTF.

use super::{ObserveError, Result, btf::Btf};
use serde::{Deserialize, Serialize};
use standstill_ebpf_abi::{
    ABSENT, CRED_BYTES, CommonLayout, FileLayout, Plain, RESTART_BYTES, SocketLayout, TaskLayout, VmaLayout,
};

const STRUCTS: &[&str] = &[
    "anon_vma_name",
    "cpu_itimer",
    "cred",
    "dentry",
    "fdtable",
    "file",
    "files_struct",
    "fs_struct",
    "group_info",
    "hrtimer",
    "inode",
    "io_context",
    "k_sigaction",
    "mm_struct",
    "mount",
    "nsproxy",
    "path",
    "pid",
    "restart_block",
    "robust_list_head",
    "sighand_struct",
    "signal_struct",
    "sock",
    "sock_common",
    "socket",
    "socket_alloc",
    "super_block",
    "task_struct",
    "thread_info",
    "tcp_sock",
    "udp_sock",
    "unix_address",
    "unix_sock",
    "upid",
    "user_namespace",
    "vfsmount",
    "vm_area_struct",
    "vm_operations_struct",
    "vm_special_mapping",
];

/// Everything that is set in the programs before they are loaded, and what decoding needs.
pub(super) struct Layouts {
    pub common: CommonLayout,
    pub files: FileLayout,
    pub tasks: TaskLayout,
    pub vmas: VmaLayout,
    pub sockets: SocketLayout,
    pub restart: RestartLayout,
    pub cred: CredLayout,
    /// Size of `robust_list_head`, which get_robust_list(2) gives for every thread.
    pub robust_list_len: u64,
}

/// [`Layouts`] as it goes from one process to another.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct LayoutParts {
    plain: [Vec<u8>; 5],
    restart: RestartLayout,
    cred: CredLayout,
    robust_list_len: u64,
}

/// Offsets in the part of `cred` that a record has.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct CredLayout {
    /// Where that part begins in `cred`.
    start: u32,
    /// Real, effective, saved and file system user ids, then group ids.
    pub ids: [u32; 8],
    pub securebits: u32,
    /// Inheritable, permitted, effective, bounding and ambient sets.
    pub caps: [u32; 5],
}

/// Offsets in the union of `restart_block`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct RestartLayout {
    pub sleep_clock: usize,
    pub sleep_rmtp: usize,
    pub sleep_expires: usize,
    pub futex_uaddr: usize,
    pub futex_val: usize,
    pub futex_flags: usize,
    pub futex_bitset: usize,
    pub futex_time: usize,
    pub poll_ufds: usize,
    pub poll_nfds: usize,
    pub poll_has_timeout: usize,
    pub poll_sec: usize,
    pub poll_nsec: usize,
}

impl Layouts {
    /// For another process.
    pub(super) fn to_parts(&self) -> LayoutParts {
        let bytes =
            [self.common.bytes(), self.files.bytes(), self.tasks.bytes(), self.vmas.bytes(), self.sockets.bytes()];
        LayoutParts {
            plain: bytes.map(<[u8]>::to_vec),
            restart: self.restart,
            cred: self.cred,
            robust_list_len: self.robust_list_len,
        }
    }

    /// From another process; `None` if it is of another version.
    pub(super) fn from_parts(parts: &LayoutParts) -> Option<Self> {
        fn exactly<T: Plain>(bytes: &[u8]) -> Option<T> {
            T::split(bytes).and_then(|(value, rest)| rest.is_empty().then_some(value))
        }
        let [common, files, tasks, vmas, sockets] = &parts.plain;
        Some(Self {
            common: exactly(common)?,
            files: exactly(files)?,
            tasks: exactly(tasks)?,
            vmas: exactly(vmas)?,
            sockets: exactly(sockets)?,
            restart: parts.restart,
            cred: parts.cred,
            robust_list_len: parts.robust_list_len,
        })
    }

    /// Of the running kernel.
    pub(super) fn read() -> Result<Self> {
        let btf = Btf::read(STRUCTS)?;
        Ok(Self {
            common: common(&btf)?,
            files: files(&btf)?,
            tasks: tasks(&btf)?,
            vmas: vmas(&btf)?,
            sockets: sockets(&btf)?,
            restart: restart(&btf)?,
            cred: cred(&btf)?,
            robust_list_len: btf.size_of("robust_list_head")?.into(),
        })
    }
}

/// Offset of the first field that the kernel has: names differ between versions.
fn any(btf: &Btf, structure: &'static str, names: &[&'static str]) -> Result<u32> {
    let found = names.iter().find_map(|name| btf.field(structure, name).ok());
    found.map(|f| f.byte()).ok_or(ObserveError::MissingField { structure, field: names[0] })
}

/// Offsets of several fields of a structure.
fn all<const N: usize>(btf: &Btf, structure: &'static str, fields: [&'static str; N]) -> Result<[u32; N]> {
    let mut offsets = [0; N];
    for (to, field) in offsets.iter_mut().zip(fields) {
        *to = btf.field(structure, field)?.byte();
    }
    Ok(offsets)
}

fn common(btf: &Btf) -> Result<CommonLayout> {
    let at = |structure, field| btf.field(structure, field).map(|f| f.byte());
    Ok(CommonLayout {
        task_pid: at("task_struct", "pid")?,
        task_tgid: at("task_struct", "tgid")?,
        task_group_leader: at("task_struct", "group_leader")?,
        task_thread_pid: at("task_struct", "thread_pid")?,
        task_mm: at("task_struct", "mm")?,
        task_files: at("task_struct", "files")?,
        task_cred: at("task_struct", "cred")?,
        task_nsproxy: at("task_struct", "nsproxy")?,
        pid_level: at("pid", "level")?,
        pid_numbers: at("pid", "numbers")?,
        upid_size: btf.size_of("upid")?,
        upid_ns: at("upid", "ns")?,
        cred_user_ns: at("cred", "user_ns")?,
        file_mode: at("file", "f_mode")?,
        file_inode: at("file", "f_inode")?,
        file_path: at("file", "f_path")?,
        inode_ino: at("inode", "i_ino")?,
        inode_sb: at("inode", "i_sb")?,
        sb_dev: at("super_block", "s_dev")?,
        mm_brk: at("mm_struct", "brk")?,
        mm_start_brk: at("mm_struct", "start_brk")?,
        mm_start_stack: at("mm_struct", "start_stack")?,
    })
}

fn files(btf: &Btf) -> Result<FileLayout> {
    let at = |structure, field| btf.field(structure, field).map(|f| f.byte());
    Ok(FileLayout {
        files_fdt: at("files_struct", "fdt")?,
        fdt_close_on_exec: at("fdtable", "close_on_exec")?,
        file_flags: at("file", "f_flags")?,
        file_pos: at("file", "f_pos")?,
        inode_mode: at("inode", "i_mode")?,
        inode_nlink: at("inode", "i_nlink")?,
        inode_rdev: at("inode", "i_rdev")?,
        inode_size: at("inode", "i_size")?,
        // Split in two in Linux 6.11, renamed in 6.7.
        inode_mtime: any(btf, "inode", &["i_mtime_sec", "__i_mtime.tv_sec", "i_mtime.tv_sec"])?,
        inode_mtime_nsec: any(btf, "inode", &["i_mtime_nsec", "__i_mtime.tv_nsec", "i_mtime.tv_nsec"])?,
        sb_magic: at("super_block", "s_magic")?,
        path_mnt: at("path", "mnt")?,
        path_dentry: at("path", "dentry")?,
        dentry_seq: any(btf, "dentry", &["d_seq.seqcount.sequence", "d_seq.sequence"])?,
        dentry_pprev: at("dentry", "d_hash.pprev")?,
        dentry_parent: at("dentry", "d_parent")?,
        dentry_hash_len: at("dentry", "d_name.hash_len")?,
        dentry_name: at("dentry", "d_name.name")?,
        mnt_root: at("vfsmount", "mnt_root")?,
        mount_mnt: at("mount", "mnt")?,
        mount_parent: at("mount", "mnt_parent")?,
        mount_mountpoint: at("mount", "mnt_mountpoint")?,
    })
}

fn tasks(btf: &Btf) -> Result<TaskLayout> {
    let at = |structure, field| btf.field(structure, field).map(|f| f.byte());
    let task = |field| at("task_struct", field);
    let signal = |field| at("signal_struct", field);
    let subreaper = btf.field("signal_struct", "is_child_subreaper")?;
    let reset_on_fork = btf.field("task_struct", "sched_reset_on_fork")?;
    // Not a field but a flag of the thread on some architectures.
    let restore_sigmask = btf.field("task_struct", "restore_sigmask").ok();
    // Gathered in a structure in Linux 6.19.
    let rseq = |inner, field| any(btf, "task_struct", &[inner, field]).unwrap_or(ABSENT);
    let action = btf.field("sighand_struct", "action")?;
    if btf.element_size(action) != Some(size_of::<standstill_ebpf_abi::Action>() as u32) {
        // Some architectures have no restorer.
        return Err(ObserveError::MissingField { structure: "k_sigaction", field: "sa.sa_restorer" });
    }
    let namespaces =
        ["mnt_ns", "net_ns", "ipc_ns", "uts_ns", "cgroup_ns", "time_ns", "pid_ns_for_children", "time_ns_for_children"];
    let mm = [
        "start_code",
        "end_code",
        "start_data",
        "end_data",
        "start_brk",
        "brk",
        "start_stack",
        "arg_start",
        "arg_end",
        "env_start",
        "env_end",
    ];
    Ok(TaskLayout {
        fs: task("fs")?,
        sighand: task("sighand")?,
        signal: task("signal")?,
        comm: task("comm")?,
        real_parent: task("real_parent")?,
        start_time: task("start_time")?,
        clear_child_tid: task("clear_child_tid")?,
        robust_list: task("robust_list")?,
        sas_ss_sp: task("sas_ss_sp")?,
        sas_ss_size: task("sas_ss_size")?,
        sas_ss_flags: task("sas_ss_flags")?,
        blocked: task("blocked")?,
        saved_sigmask: task("saved_sigmask")?,
        restore_sigmask: restore_sigmask.map_or(ABSENT, |f| f.byte()),
        restore_sigmask_bit: restore_sigmask.map_or(0, |f| f.bit % 8),
        pending: task("pending.signal")?,
        policy: task("policy")?,
        static_prio: task("static_prio")?,
        rt_priority: task("rt_priority")?,
        reset_on_fork: reset_on_fork.byte(),
        reset_on_fork_bit: reset_on_fork.bit % 8,
        cpus_mask: task("cpus_mask")?,
        // CONFIG_BLOCK.
        io_context: task("io_context").unwrap_or(ABSENT),
        ioprio: at("io_context", "ioprio").unwrap_or(ABSENT),
        timer_slack_ns: task("timer_slack_ns")?,
        // CONFIG_SECCOMP.
        seccomp_mode: task("seccomp.mode").unwrap_or(ABSENT),
        // CONFIG_RSEQ.
        rseq: rseq("rseq.usrptr", "rseq"),
        rseq_len: rseq("rseq.len", "rseq_len"),
        rseq_sig: rseq("rseq.sig", "rseq_sig"),
        atomic_flags: task("atomic_flags")?,
        flags: task("flags")?,
        thread_flags: task("thread_info.flags").unwrap_or(ABSENT),
        // CONFIG_NUMA.
        mempolicy: task("mempolicy").unwrap_or(ABSENT),
        personality: task("personality")?,
        // CONFIG_AUDIT.
        loginuid: task("loginuid").unwrap_or(ABSENT),
        pdeath_signal: task("pdeath_signal")?,
        exit_signal: task("exit_signal")?,
        exit_state: task("exit_state")?,
        exit_code: task("exit_code")?,
        restart_fn: task("restart_block.fn")?,
        restart: task("restart_block.futex")?,
        cred_start: cred(btf)?.start,
        cred_group_info: at("cred", "group_info")?,
        ngroups: at("group_info", "ngroups")?,
        group_ids: at("group_info", "gid")?,
        user_ns_level: at("user_namespace", "level")?,
        nsproxy: all(btf, "nsproxy", namespaces)?,
        sighand_action: action.byte(),
        signal_rlim: signal("rlim")?,
        signal_pids: signal("pids")?,
        shared_pending: signal("shared_pending.signal")?,
        // CONFIG_POSIX_TIMERS.
        posix_timers: signal("posix_timers").unwrap_or(ABSENT),
        oom_score_adj: signal("oom_score_adj")?,
        real_expires: signal("real_timer.node.expires")?,
        real_state: signal("real_timer.state").unwrap_or(ABSENT),
        real_incr: signal("it_real_incr")?,
        cpu_timers: signal("it")?,
        cpu_timer_size: btf.size_of("cpu_itimer")?,
        group_exit_code: signal("group_exit_code")?,
        signal_flags: signal("flags")?,
        subreaper: subreaper.byte(),
        subreaper_bit: subreaper.bit % 8,
        fs_umask: at("fs_struct", "umask")?,
        fs_root: at("fs_struct", "root")?,
        fs_pwd: at("fs_struct", "pwd")?,
        mm_auxv: at("mm_struct", "saved_auxv")?,
        mm_exe_file: at("mm_struct", "exe_file")?,
        mm_flags: at("mm_struct", "flags")?,
        // CONFIG_MEMBARRIER.
        mm_membarrier: at("mm_struct", "membarrier_state").unwrap_or(ABSENT),
        mm_layout: all(btf, "mm_struct", mm)?,
    })
}

fn vmas(btf: &Btf) -> Result<VmaLayout> {
    let at = |structure, field| btf.field(structure, field).map(|f| f.byte());
    let vma = |field| at("vm_area_struct", field);
    Ok(VmaLayout {
        start: vma("vm_start")?,
        end: vma("vm_end")?,
        flags: vma("vm_flags")?,
        pgoff: vma("vm_pgoff")?,
        file: vma("vm_file")?,
        ops: vma("vm_ops")?,
        private_data: vma("vm_private_data")?,
        anon_vma: vma("anon_vma")?,
        // CONFIG_ANON_VMA_NAME.
        anon_name: vma("anon_name").unwrap_or(ABSENT),
        anon_name_name: at("anon_vma_name", "name").unwrap_or(ABSENT),
        // CONFIG_NUMA.
        policy: vma("vm_policy").unwrap_or(ABSENT),
        ops_name: at("vm_operations_struct", "name")?,
        special_name: at("vm_special_mapping", "name")?,
        file_users: any(btf, "file", &["f_ref", "f_count"])?,
        file_users_more: btf.field("file", "f_ref").is_ok().into(),
        path_dentry: at("path", "dentry")?,
        dentry_users: at("dentry", "d_lockref.count")?,
        backing: fmode_backing(),
    })
}

fn sockets(btf: &Btf) -> Result<SocketLayout> {
    let at = |structure, field| btf.field(structure, field).map(|f| f.byte());
    let common = |field| at("sock_common", field);
    let sock = |field| at("sock", field);
    let tcp = |field| at("tcp_sock", field);
    // A module has BTF of its own.
    let unix = |structure, field| at(structure, field).unwrap_or(ABSENT);
    Ok(SocketLayout {
        file_private: at("file", "private_data")?,
        socket_sk: at("socket", "sk")?,
        family: common("skc_family")?,
        sort: sock("sk_type")?,
        protocol: sock("sk_protocol")?,
        state: common("skc_state")?,
        local_port: common("skc_num")?,
        peer_port: common("skc_dport")?,
        local4: common("skc_rcv_saddr")?,
        peer4: common("skc_daddr")?,
        // CONFIG_IPV6.
        local6: common("skc_v6_rcv_saddr").unwrap_or(ABSENT),
        peer6: common("skc_v6_daddr").unwrap_or(ABSENT),
        queue_len: sock("sk_receive_queue.qlen")?,
        rmem_alloc: sock("sk_backlog.rmem_alloc")?,
        wmem_alloc: sock("sk_wmem_alloc")?,
        backlog: sock("sk_ack_backlog")?,
        sk_socket: sock("sk_socket")?,
        rcv_nxt: tcp("rcv_nxt")?,
        copied_seq: tcp("copied_seq")?,
        write_seq: tcp("write_seq")?,
        snd_una: tcp("snd_una")?,
        forward_deficit: at("udp_sock", "forward_deficit")?,
        unix_addr: unix("unix_sock", "addr"),
        unix_peer: unix("unix_sock", "peer"),
        address_len: unix("unix_address", "len"),
        address_name: unix("unix_address", "name"),
        alloc_socket: at("socket_alloc", "socket")?,
        alloc_inode: at("socket_alloc", "vfs_inode")?,
    })
}

/// FMODE_BACKING: overlayfs maps such a file in place of the one that the user opened (Linux 6.6; moved in 6.14).
/// It is a macro, which BTF does not tell.
fn fmode_backing() -> u32 {
    let version = nix::sys::utsname::uname().map(|u| u.release().to_string_lossy().into_owned()).unwrap_or_default();
    if kernel_version(&version) >= (6, 14) { 1 << 24 } else { 1 << 25 }
}

fn kernel_version(release: &str) -> (u32, u32) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

fn cred(btf: &Btf) -> Result<CredLayout> {
    let mut ids = all(btf, "cred", ["uid", "euid", "suid", "fsuid", "gid", "egid", "sgid", "fsgid"])?;
    let caps = ["cap_inheritable", "cap_permitted", "cap_effective", "cap_bset", "cap_ambient"];
    let mut caps = all(btf, "cred", caps)?;
    let [mut securebits] = all(btf, "cred", ["securebits"])?;
    let start = ids.iter().chain(&caps).copied().min().map_or(securebits, |first| first.min(securebits));
    for (offsets, size) in [(&mut ids[..], 4), (&mut caps[..], 8), (std::slice::from_mut(&mut securebits), 4)] {
        for offset in offsets {
            *offset -= start;
            if *offset as usize + size > CRED_BYTES {
                return Err(ObserveError::MissingField { structure: "cred", field: "(near the others)" });
            }
        }
    }
    Ok(CredLayout { start, ids, securebits, caps })
}

fn restart(btf: &Btf) -> Result<RestartLayout> {
    let base = btf.field("restart_block", "futex")?.byte();
    let at = |names: &[&'static str], size: u32| {
        let offset = any(btf, "restart_block", names)?.wrapping_sub(base);
        match offset.checked_add(size) {
            Some(end) if end as usize <= RESTART_BYTES => Ok(offset as usize),
            _ => Err(ObserveError::MissingField { structure: "restart_block", field: names[0] }),
        }
    };
    Ok(RestartLayout {
        sleep_clock: at(&["nanosleep.clockid"], 4)?,
        sleep_rmtp: at(&["nanosleep.rmtp"], 8)?,
        sleep_expires: at(&["nanosleep.expires"], 8)?,
        futex_uaddr: at(&["futex.uaddr"], 8)?,
        futex_val: at(&["futex.val"], 4)?,
        futex_flags: at(&["futex.flags"], 4)?,
        futex_bitset: at(&["futex.bitset"], 4)?,
        futex_time: at(&["futex.time"], 8)?,
        poll_ufds: at(&["poll.ufds"], 8)?,
        poll_nfds: at(&["poll.nfds"], 4)?,
        poll_has_timeout: at(&["poll.has_timeout"], 4)?,
        poll_sec: at(&["poll.tv_sec", "poll.end_time.tv_sec"], 8)?,
        poll_nsec: at(&["poll.tv_nsec", "poll.end_time.tv_nsec"], 8)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        assert_eq!(kernel_version("6.18.44-fc-v595"), (6, 18));
        assert_eq!(kernel_version("7.0"), (7, 0));
        assert_eq!(kernel_version("strange"), (0, 0));
        assert!(kernel_version("6.8.0-45-generic") < (6, 14));
    }
}
