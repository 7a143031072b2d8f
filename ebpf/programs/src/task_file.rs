//! `iter/task_file`: the descriptors of a process.

use crate::{
    kernel::{Address, COMMON, Meta, Output, known, load, number, numbers, paths_wanted, probe_word, wanted, zero},
    name,
};
use aya_ebpf::{bindings::path, helpers::generated::bpf_d_path};
use standstill_ebpf_abi::{FileLayout, FileRecord, PATH_MAX};

#[unsafe(no_mangle)]
pub static FILE: FileLayout = zero();

/// `struct bpf_iter__task_file`.
#[repr(C)]
pub struct TaskFile {
    pub meta: *const Meta,
    pub task: Address,
    pub fd: u32,
    pub file: Address,
}

impl TaskFile {
    /// The process, if it is one of the tree; a thread that has a descriptor table of its own is not what /proc/pid/fd shows.
    #[inline(always)]
    pub fn process(&self) -> Option<i32> {
        if self.task.is_null() || self.file.is_null() {
            return None;
        }
        let (tgid, tid) = numbers(self.task);
        (tgid == tid && wanted(tgid)).then_some(tgid)
    }
}

/// Writes a [`FileRecord`].
#[unsafe(link_section = "iter/task_file")]
#[unsafe(no_mangle)]
extern "C" fn task_file(ctx: &TaskFile) -> i32 {
    let (task, file) = (ctx.task, ctx.file);
    let Some(tgid) = ctx.process() else { return 0 };
    let Some(mut output) = Output::<FileRecord>::new() else { return 0 };
    let f_path = known(&COMMON.file_path);
    // SAFETY: `ctx` is the iterator's context, and the fields are of the types loaded.
    unsafe {
        let inode: Address = load(file, known(&COMMON.file_inode));
        let sb: Address = load(inode, known(&COMMON.inode_sb));
        let r = output.record();
        r.tgid = tgid;
        r.fd = ctx.fd as i32;
        r.cloexec = cloexec(task, ctx.fd);
        r.file = number(&mut r.file, file);
        r.dentry = number(&mut r.dentry, load(file, f_path.wrapping_add(known(&FILE.path_dentry))));
        r.inode = number(&mut r.inode, inode);
        r.pos = load(file, known(&FILE.file_pos));
        r.flags = load(file, known(&FILE.file_flags));
        r.ino = load(inode, known(&COMMON.inode_ino));
        r.size = load(inode, known(&FILE.inode_size));
        r.mtime = load(inode, known(&FILE.inode_mtime));
        r.mtime_nsec = load(inode, known(&FILE.inode_mtime_nsec));
        r.nlink = load(inode, known(&FILE.inode_nlink));
        r.rdev = load(inode, known(&FILE.inode_rdev));
        r.mode = load::<u16>(inode, known(&FILE.inode_mode)).into();
        r.dev = load(sb, known(&COMMON.sb_dev));
        r.magic = load(sb, known(&FILE.sb_magic));
        r.name = name::digest(file, f_path, (*ctx.meta).session_id);
        let mut len = 0;
        if paths_wanted() {
            let f_path = file.add(f_path as usize).cast_mut().cast::<path>();
            len = bpf_d_path(f_path, output.tail().cast(), PATH_MAX as u32) as i32;
        }
        // The helper counts the NUL.
        let tail = if len > 0 { len as u32 - 1 } else { 0 };
        output.record().path_len = if len > 0 { tail as i32 } else { len };
        output.write(ctx.meta, tail);
    }
    0
}

/// Whether the descriptor's bit in `fdt->close_on_exec` is set.
///
/// # Safety
/// `task` points to a task_struct and the verifier knows it.
#[inline(always)]
unsafe fn cloexec(task: Address, fd: u32) -> u32 {
    // SAFETY: the caller's promise.
    let bits: Address = unsafe {
        let files: Address = load(task, known(&COMMON.task_files));
        load(load(files, known(&FILE.files_fdt)), known(&FILE.fdt_close_on_exec))
    };
    let word: u64 = probe_word(bits, fd / 64 * 8);
    (word >> (fd % 64) & 1) as u32
}
