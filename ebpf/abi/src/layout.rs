//! Offsets of fields in the running kernel's structures: read-only data of the programs, set before they are loaded.
//!
//! The verifier knows the contents of read-only data, so an address that is computed with such an offset is as constant
//! for it as one that the compiler knew.

use crate::{Plain, plain};
use core::mem;

/// Offset of a field that this kernel lacks and that the programs do without.
pub const ABSENT: u32 = u32::MAX;

plain! {
    /// What all programs need.
    pub struct CommonLayout {
        /// `task_struct.pid`
        pub task_pid: u32,
        /// `task_struct.tgid`
        pub task_tgid: u32,
        /// `task_struct.group_leader`
        pub task_group_leader: u32,
        /// `task_struct.thread_pid`
        pub task_thread_pid: u32,
        /// `task_struct.mm`
        pub task_mm: u32,
        /// `task_struct.files`
        pub task_files: u32,
        /// `task_struct.cred`
        pub task_cred: u32,
        /// `task_struct.nsproxy`
        pub task_nsproxy: u32,
        /// `pid.level`
        pub pid_level: u32,
        /// `pid.numbers`
        pub pid_numbers: u32,
        /// Size of `upid`, whose first field is the number.
        pub upid_size: u32,
        /// `upid.ns`
        pub upid_ns: u32,
        /// `cred.user_ns`
        pub cred_user_ns: u32,
        /// `file.f_mode`
        pub file_mode: u32,
        /// `file.f_inode`
        pub file_inode: u32,
        /// `file.f_path`
        pub file_path: u32,
        /// `inode.i_ino`
        pub inode_ino: u32,
        /// `inode.i_sb`
        pub inode_sb: u32,
        /// `super_block.s_dev`
        pub sb_dev: u32,
        /// `mm_struct.brk`
        pub mm_brk: u32,
        /// `mm_struct.start_brk`
        pub mm_start_brk: u32,
        /// `mm_struct.start_stack`
        pub mm_start_stack: u32,
    }
}

plain! {
    /// What `iter/task_file` needs besides.
    pub struct FileLayout {
        /// `files_struct.fdt`
        pub files_fdt: u32,
        /// `fdtable.close_on_exec`
        pub fdt_close_on_exec: u32,
        /// `file.f_flags`
        pub file_flags: u32,
        /// `file.f_pos`
        pub file_pos: u32,
        /// `inode.i_mode`
        pub inode_mode: u32,
        /// `inode.i_nlink`
        pub inode_nlink: u32,
        /// `inode.i_rdev`
        pub inode_rdev: u32,
        /// `inode.i_size`
        pub inode_size: u32,
        /// `inode.i_mtime_sec`, formerly `i_mtime.tv_sec`
        pub inode_mtime: u32,
        /// `inode.i_mtime_nsec`, formerly `i_mtime.tv_nsec`
        pub inode_mtime_nsec: u32,
        /// `super_block.s_magic`
        pub sb_magic: u32,
        /// `path.mnt`
        pub path_mnt: u32,
        /// `path.dentry`
        pub path_dentry: u32,
        /// `dentry.d_seq`, the count in it
        pub dentry_seq: u32,
        /// `dentry.d_hash.pprev`
        pub dentry_pprev: u32,
        /// `dentry.d_parent`
        pub dentry_parent: u32,
        /// `dentry.d_name.hash_len`
        pub dentry_hash_len: u32,
        /// `dentry.d_name.name`
        pub dentry_name: u32,
        /// `vfsmount.mnt_root`
        pub mnt_root: u32,
        /// `mount.mnt`
        pub mount_mnt: u32,
        /// `mount.mnt_parent`
        pub mount_parent: u32,
        /// `mount.mnt_mountpoint`
        pub mount_mountpoint: u32,
    }
}

plain! {
    /// What `iter/task` needs besides.
    pub struct TaskLayout {
        /// `task_struct.fs`
        pub fs: u32,
        /// `task_struct.sighand`
        pub sighand: u32,
        /// `task_struct.signal`
        pub signal: u32,
        /// `task_struct.comm`
        pub comm: u32,
        /// `task_struct.real_parent`
        pub real_parent: u32,
        /// `task_struct.start_time`
        pub start_time: u32,
        /// `task_struct.clear_child_tid`
        pub clear_child_tid: u32,
        /// `task_struct.robust_list`
        pub robust_list: u32,
        /// `task_struct.sas_ss_sp`
        pub sas_ss_sp: u32,
        /// `task_struct.sas_ss_size`
        pub sas_ss_size: u32,
        /// `task_struct.sas_ss_flags`
        pub sas_ss_flags: u32,
        /// `task_struct.blocked`
        pub blocked: u32,
        /// `task_struct.saved_sigmask`
        pub saved_sigmask: u32,
        /// `task_struct.restore_sigmask`: the byte it is in, or [`ABSENT`]
        pub restore_sigmask: u32,
        /// Its bit in that byte.
        pub restore_sigmask_bit: u32,
        /// `task_struct.pending.signal`
        pub pending: u32,
        /// `task_struct.policy`
        pub policy: u32,
        /// `task_struct.static_prio`
        pub static_prio: u32,
        /// `task_struct.rt_priority`
        pub rt_priority: u32,
        /// `task_struct.sched_reset_on_fork`: the byte it is in
        pub reset_on_fork: u32,
        /// Its bit in that byte.
        pub reset_on_fork_bit: u32,
        /// `task_struct.cpus_mask`
        pub cpus_mask: u32,
        /// `task_struct.io_context`, or [`ABSENT`]
        pub io_context: u32,
        /// `io_context.ioprio`
        pub ioprio: u32,
        /// `task_struct.timer_slack_ns`
        pub timer_slack_ns: u32,
        /// `task_struct.seccomp.mode`, or [`ABSENT`]
        pub seccomp_mode: u32,
        /// `task_struct.rseq`, or [`ABSENT`]
        pub rseq: u32,
        /// `task_struct.rseq_len`
        pub rseq_len: u32,
        /// `task_struct.rseq_sig`
        pub rseq_sig: u32,
        /// `task_struct.atomic_flags`
        pub atomic_flags: u32,
        /// `task_struct.flags`
        pub flags: u32,
        /// `task_struct.thread_info.flags`, or [`ABSENT`]
        pub thread_flags: u32,
        /// `task_struct.mempolicy`, or [`ABSENT`]
        pub mempolicy: u32,
        /// `task_struct.personality`
        pub personality: u32,
        /// `task_struct.loginuid`, or [`ABSENT`]
        pub loginuid: u32,
        /// `task_struct.pdeath_signal`
        pub pdeath_signal: u32,
        /// `task_struct.exit_signal`
        pub exit_signal: u32,
        /// `task_struct.exit_state`
        pub exit_state: u32,
        /// `task_struct.exit_code`
        pub exit_code: u32,
        /// `task_struct.restart_block.fn`
        pub restart_fn: u32,
        /// `task_struct.restart_block`, the union
        pub restart: u32,
        /// Where `ThreadRecord::cred` begins in `cred`.
        pub cred_start: u32,
        /// `cred.group_info`
        pub cred_group_info: u32,
        /// `group_info.ngroups`
        pub ngroups: u32,
        /// `group_info.gid`
        pub group_ids: u32,
        /// `user_namespace.level`
        pub user_ns_level: u32,
        /// Fields of `nsproxy` in the order of [`crate::NAMESPACES`].
        pub nsproxy: [u32; 8],
        /// `sighand_struct.action`
        pub sighand_action: u32,
        /// `signal_struct.rlim`
        pub signal_rlim: u32,
        /// `signal_struct.pids`
        pub signal_pids: u32,
        /// `signal_struct.shared_pending.signal`
        pub shared_pending: u32,
        /// `signal_struct.posix_timers`, or [`ABSENT`]
        pub posix_timers: u32,
        /// `signal_struct.oom_score_adj`
        pub oom_score_adj: u32,
        /// `signal_struct.real_timer.node.expires`
        pub real_expires: u32,
        /// `signal_struct.real_timer.state`
        pub real_state: u32,
        /// `signal_struct.it_real_incr`
        pub real_incr: u32,
        /// `signal_struct.it`: two of them, each beginning with the time of its expiry
        pub cpu_timers: u32,
        /// Size of one of these.
        pub cpu_timer_size: u32,
        /// `signal_struct.group_exit_code`
        pub group_exit_code: u32,
        /// `signal_struct.flags`
        pub signal_flags: u32,
        /// `signal_struct.is_child_subreaper`: the byte it is in
        pub subreaper: u32,
        /// Its bit in that byte.
        pub subreaper_bit: u32,
        /// `fs_struct.umask`
        pub fs_umask: u32,
        /// `fs_struct.root`: a mount, then a dentry
        pub fs_root: u32,
        /// `fs_struct.pwd`
        pub fs_pwd: u32,
        /// `mm_struct.saved_auxv`
        pub mm_auxv: u32,
        /// `mm_struct.exe_file`
        pub mm_exe_file: u32,
        /// `mm_struct.flags`
        pub mm_flags: u32,
        /// `mm_struct.membarrier_state`, if the kernel has it
        pub mm_membarrier: u32,
        /// Fields of `mm_struct` in the order of `ProcessRecord::layout`.
        pub mm_layout: [u32; 11],
    }
}

plain! {
    /// What `iter/task_vma` needs besides.
    pub struct VmaLayout {
        /// `vm_area_struct.vm_start`
        pub start: u32,
        /// `vm_area_struct.vm_end`
        pub end: u32,
        /// `vm_area_struct.vm_flags`
        pub flags: u32,
        /// `vm_area_struct.vm_pgoff`
        pub pgoff: u32,
        /// `vm_area_struct.vm_file`
        pub file: u32,
        /// `vm_area_struct.vm_ops`
        pub ops: u32,
        /// `vm_area_struct.vm_private_data`
        pub private_data: u32,
        /// `vm_area_struct.anon_vma`
        pub anon_vma: u32,
        /// `vm_area_struct.anon_name`, or [`ABSENT`]
        pub anon_name: u32,
        /// `anon_vma_name.name`, or [`ABSENT`]
        pub anon_name_name: u32,
        /// `vm_area_struct.vm_policy`, or [`ABSENT`]
        pub policy: u32,
        /// `vm_operations_struct.name`
        pub ops_name: u32,
        /// `vm_special_mapping.name`
        pub special_name: u32,
        /// `file.f_ref` or, up to Linux 6.12, `f_count`
        pub file_users: u32,
        /// Added to what is there it gives the number of references: 0, or 1 since `f_ref` counts from 0.
        pub file_users_more: u32,
        /// `path.dentry`
        pub path_dentry: u32,
        /// `dentry.d_lockref.count`
        pub dentry_users: u32,
        /// FMODE_BACKING, which is not an offset but differs between kernels, too.
        pub backing: u32,
    }
}

plain! {
    /// What `sockets` needs besides.
    pub struct SocketLayout {
        /// `file.private_data`
        pub file_private: u32,
        /// `socket.sk`
        pub socket_sk: u32,
        /// `sock_common.skc_family`
        pub family: u32,
        /// `sock.sk_type`
        pub sort: u32,
        /// `sock.sk_protocol`
        pub protocol: u32,
        /// `sock_common.skc_state`
        pub state: u32,
        /// `sock_common.skc_num`
        pub local_port: u32,
        /// `sock_common.skc_dport`
        pub peer_port: u32,
        /// `sock_common.skc_rcv_saddr`
        pub local4: u32,
        /// `sock_common.skc_daddr`
        pub peer4: u32,
        /// `sock_common.skc_v6_rcv_saddr`, or [`ABSENT`]
        pub local6: u32,
        /// `sock_common.skc_v6_daddr`, or [`ABSENT`]
        pub peer6: u32,
        /// `sock.sk_receive_queue.qlen`
        pub queue_len: u32,
        /// `sock.sk_backlog.rmem_alloc`
        pub rmem_alloc: u32,
        /// `sock.sk_wmem_alloc`
        pub wmem_alloc: u32,
        /// `sock.sk_ack_backlog`
        pub backlog: u32,
        /// `sock.sk_socket`
        pub sk_socket: u32,
        /// `tcp_sock.rcv_nxt`
        pub rcv_nxt: u32,
        /// `tcp_sock.copied_seq`
        pub copied_seq: u32,
        /// `tcp_sock.write_seq`
        pub write_seq: u32,
        /// `tcp_sock.snd_una`
        pub snd_una: u32,
        /// `udp_sock.forward_deficit`
        pub forward_deficit: u32,
        /// `unix_sock.addr`, or [`ABSENT`]
        pub unix_addr: u32,
        /// `unix_sock.peer`
        pub unix_peer: u32,
        /// `unix_address.len`
        pub address_len: u32,
        /// `unix_address.name`
        pub address_name: u32,
        /// `socket_alloc.socket`
        pub alloc_socket: u32,
        /// `socket_alloc.vfs_inode`
        pub alloc_inode: u32,
    }
}
