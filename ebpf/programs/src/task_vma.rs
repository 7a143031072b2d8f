//! `iter/task_vma`: the mappings of a process.

use crate::{
    kernel::{Address, COMMON, Meta, Output, known, load, number, numbers, pointer, probe_word, wanted, zero},
    task,
};
use aya_ebpf::{
    bindings::path,
    helpers::generated::{bpf_d_path, bpf_probe_read_kernel_str},
};
use standstill_ebpf_abi::{ABSENT, PATH_MAX, VmaLayout, VmaRecord, vma_name};

#[unsafe(no_mangle)]
static VMA: VmaLayout = zero();

/// Stores through the mapping change the file.
const VM_SHARED: u64 = 8;

/// `struct bpf_iter__task_vma`.
#[repr(C)]
pub struct TaskVma {
    meta: *const Meta,
    task: Address,
    vma: Address,
}

/// Writes a [`VmaRecord`].
#[unsafe(link_section = "iter/task_vma")]
#[unsafe(no_mangle)]
extern "C" fn task_vma(ctx: &TaskVma) -> i32 {
    let (task, vma) = (ctx.task, ctx.vma);
    if task.is_null() || vma.is_null() {
        return 0;
    }
    let (tgid, tid) = numbers(task);
    if tgid != tid || !wanted(tgid) {
        return 0;
    }
    let Some(mut output) = Output::<VmaRecord>::new() else { return 0 };
    // SAFETY: `ctx` is the iterator's context, and the fields are of the types loaded.
    unsafe {
        let r = output.record();
        r.tgid = tgid;
        r.start = load(vma, known(&VMA.start));
        r.end = load(vma, known(&VMA.end));
        r.flags = load(vma, known(&VMA.flags));
        r.pgoff = load(vma, known(&VMA.pgoff));
        r.anon_vma = probe_word(vma, known(&VMA.anon_vma));
        r.policy = match known(&VMA.policy) {
            ABSENT => 0,
            policy => probe_word(vma, policy),
        };
        r.ino = 0;
        r.dev = 0;
        r.name_fn[0] = 0;
        (r.file, r.file_users, r.dentry_users) = (0, 0, 0);
        let file: Address = load(vma, known(&VMA.file));
        if !file.is_null() {
            if r.flags & VM_SHARED != 0 {
                number(&mut r.file, file);
                let dentry = pointer(file, known(&COMMON.file_path).wrapping_add(known(&VMA.path_dentry)));
                r.file_users =
                    probe_word::<u64>(file, known(&VMA.file_users)).wrapping_add(known(&VMA.file_users_more).into());
                r.dentry_users = probe_word::<u32>(dentry, known(&VMA.dentry_users)).into();
            }
            let inode: Address = load(file, known(&COMMON.file_inode));
            let sb: Address = load(inode, known(&COMMON.inode_sb));
            r.ino = load(inode, known(&COMMON.inode_ino));
            r.dev = load(sb, known(&COMMON.sb_dev));
        }
        let (kind, len) = name(&mut output, task, vma, file);
        let r = output.record();
        r.kind = kind;
        // The helpers count the NUL.
        let tail = if len > 0 { len as u32 - 1 } else { 0 };
        r.name_len = if len > 0 { tail as i32 } else { len };
        output.write(ctx.meta, tail);
    }
    0
}

/// Puts the name behind the record, as far as it is not one of a few words; the order is that of `/proc/pid/maps`.
///
/// # Safety
/// The addresses are what their names say, and the verifier knows it.
#[inline(always)]
unsafe fn name(output: &mut Output<VmaRecord>, task: Address, vma: Address, file: Address) -> (u32, i32) {
    // SAFETY: the caller's promise.
    unsafe {
        let anon_name: Address = match known(&VMA.anon_name) {
            ABSENT => core::ptr::null(),
            anon_name => pointer(vma, anon_name),
        };
        let anon_text = anon_name.wrapping_add(known(&VMA.anon_name_name) as usize);
        if !file.is_null() {
            if !anon_name.is_null() {
                return (vma_name::ANON_SHARED, string(output, anon_text));
            }
            if load::<u32>(file, known(&COMMON.file_mode)) & known(&VMA.backing) != 0 {
                return (vma_name::BACKING, 0);
            }
            let f_path = file.add(known(&COMMON.file_path) as usize).cast_mut().cast::<path>();
            return (vma_name::PATH, bpf_d_path(f_path, output.tail().cast(), PATH_MAX as u32) as i32);
        }
        let ops = pointer(vma, known(&VMA.ops));
        if !ops.is_null() {
            let function = pointer(ops, known(&VMA.ops_name));
            if !function.is_null() {
                task::symbol(&mut output.record().name_fn, function);
                let mapping = pointer(vma, known(&VMA.private_data));
                return (vma_name::SPECIAL, string(output, pointer(mapping, known(&VMA.special_name))));
            }
        }
        let mm: Address = load(task, known(&COMMON.task_mm));
        let (start, end) = (output.record().start, output.record().end);
        if start < load(mm, known(&COMMON.mm_brk)) && end > load(mm, known(&COMMON.mm_start_brk)) {
            return (vma_name::HEAP, 0);
        }
        let stack: u64 = load(mm, known(&COMMON.mm_start_stack));
        if start <= stack && end >= stack {
            return (vma_name::STACK, 0);
        }
        if !anon_name.is_null() {
            return (vma_name::ANON, string(output, anon_text));
        }
        (vma_name::NONE, 0)
    }
}

/// Copies a string that ends with a NUL; its length with it, or an errno.
#[inline(always)]
fn string(output: &mut Output<VmaRecord>, from: Address) -> i32 {
    // SAFETY: there is room for PATH_MAX bytes; the helper checks the other address.
    unsafe { bpf_probe_read_kernel_str(output.tail().cast(), PATH_MAX as u32, from.cast()) as i32 }
}
