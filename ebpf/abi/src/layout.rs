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
        /// `pid.level`
        pub pid_level: u32,
        /// `pid.numbers`
        pub pid_numbers: u32,
        /// Size of `upid`, whose first field is the number.
        pub upid_size: u32,
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
        /// `task_struct.cred`
        pub cred: u32,
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
        /// `cred.securebits`
        pub cred_securebits: u32,
        /// `sighand_struct.action`
        pub sighand_action: u32,
        /// `signal_struct.rlim`
        pub signal_rlim: u32,
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
        /// `mm_struct.flags`
        pub mm_flags: u32,
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
        /// `vm_area_struct.anon_name`, or [`ABSENT`]
        pub anon_name: u32,
        /// `anon_vma_name.name`, or [`ABSENT`]
        pub anon_name_name: u32,
        /// `vm_operations_struct.name`
        pub ops_name: u32,
        /// `vm_special_mapping.name`
        pub special_name: u32,
        /// FMODE_BACKING, which is not an offset but differs between kernels, too.
        pub backing: u32,
    }
}
