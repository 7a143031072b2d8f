//! A digest of everything that the text of a path is made of.
//!
//! Paths are read before the freeze. Under the freeze this digest says which of them are still true: it changes when the
//! file or a directory above it is renamed or removed, or when a mount moves. Renaming and unhashing bump the dentry's
//! `d_seq`; name, parent and mountpoint are in the digest, too.

use crate::{
    kernel::{Address, known, load, number, probe_word},
    task_file::FILE,
};
use aya_ebpf::{helpers::generated::bpf_probe_read_kernel, macros::map, maps::PerCpuArray};
use standstill_ebpf_abi::Plain;

/// Directories in a path and mounts below each other that are followed; beyond, there is no digest.
const STEPS: u32 = 40;
const MOUNT_STEPS: u32 = 24;
/// Bytes of the name of a file outside any directory that are in the digest.
const PSEUDO_NAME: usize = 40;

#[repr(C)]
#[derive(Clone, Copy)]
struct Scratch {
    room: u64,
    /// Digest of the mount `mount` as computed by the reading `session`: one reading sees mostly one mount.
    session: u64,
    mount: u64,
    mount_digest: u64,
    name: [u64; PSEUDO_NAME / 8],
}

// SAFETY: integers without gaps.
unsafe impl Plain for Scratch {}

#[map]
static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);

/// Adds a word to a digest.
#[inline(always)]
fn fold(digest: u64, word: u64) -> u64 {
    let mixed = (digest ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ (mixed >> 29)
}

/// Digest of a file's path; 0 if it has none.
///
/// # Safety
/// `file` points to a `struct file` and the verifier knows it.
#[inline(always)]
pub unsafe fn digest(file: Address, path: u32, session: u64) -> u64 {
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else { return 0 };
    // SAFETY: a per-CPU value, used by this program only; see `Output::new`.
    let scratch = unsafe { &mut *scratch };
    // SAFETY: the caller's promise; the fields are of the types loaded.
    let (mnt, dentry, root): (Address, Address, Address) = unsafe {
        let mnt = load(file, path.wrapping_add(known(&FILE.path_mnt)));
        (mnt, load(file, path.wrapping_add(known(&FILE.path_dentry))), load(mnt, known(&FILE.mnt_root)))
    };
    let mut digest = mount_digest(scratch, mnt, session);
    if digest == 0 {
        return 0;
    }
    let root = number(&mut scratch.room, root);
    let mut at = dentry;
    for step in 0..STEPS {
        let here = number(&mut scratch.room, at);
        // SAFETY: `at` is a dentry: the file's, or the parent of one.
        let (hash_len, parent) = unsafe {
            digest = fold(digest, here);
            digest = fold(digest, load::<u32>(at, known(&FILE.dentry_seq)).into());
            (load::<u64>(at, known(&FILE.dentry_hash_len)), load::<Address>(at, known(&FILE.dentry_parent)))
        };
        digest = fold(digest, hash_len);
        let above = number(&mut scratch.room, parent);
        if step == 0 {
            // SAFETY: as above.
            let hashed = number(&mut scratch.room, unsafe { load(at, known(&FILE.dentry_pprev)) }) != 0;
            digest = fold(digest, hashed.into());
            if above == here {
                // A pipe, a socket, a memfd: its name is in no directory, and has no hash.
                // SAFETY: as above.
                return unsafe { pseudo_name(scratch, at, (hash_len >> 32) as u32, digest) };
            }
        }
        if here == root || above == here {
            return digest | 1;
        }
        at = parent;
    }
    0
}

/// Adds the name of a dentry that has no parent; it never changes.
///
/// # Safety
/// `dentry` points to a `struct dentry` and the verifier knows it.
#[inline(always)]
unsafe fn pseudo_name(scratch: &mut Scratch, dentry: Address, len: u32, mut digest: u64) -> u64 {
    // A longer name is a memfd's, and its inode number, which goes with the digest, is its own. Only the one inode of
    // eventfd, epoll and the like has many names.
    let len = len.min(PSEUDO_NAME as u32);
    if len != 0 {
        scratch.name = [0; PSEUDO_NAME / 8];
        // SAFETY: the caller's promise; `len` is at most the size of the array.
        unsafe {
            let name: Address = load(dentry, known(&FILE.dentry_name));
            bpf_probe_read_kernel((&raw mut scratch.name).cast(), len, name.cast());
        }
        for word in scratch.name {
            digest = fold(digest, word);
        }
    }
    digest | 1
}

/// Digest of where a mount is: its own identity and the path to its mountpoint; 0 if it is too deep.
#[inline(always)]
fn mount_digest(scratch: &mut Scratch, mnt: Address, session: u64) -> u64 {
    let mnt = number(&mut scratch.room, mnt);
    if scratch.session == session && scratch.mount == mnt {
        return scratch.mount_digest;
    }
    let digest = walk_mounts(mnt);
    scratch.session = session;
    scratch.mount = mnt;
    scratch.mount_digest = digest;
    digest
}

#[inline(always)]
fn walk_mounts(vfsmount: u64) -> u64 {
    let mut mount = vfsmount.wrapping_sub(known(&FILE.mount_mnt).into());
    let mut digest = fold(1, mount);
    // The dentry whose parent is looked for; 0: at the root of `mount`.
    let mut dentry = 0;
    let mut root = 0;
    for _ in 0..MOUNT_STEPS {
        if dentry == 0 || dentry == root {
            let parent: u64 = probe_word(mount as Address, known(&FILE.mount_parent));
            if parent == mount || parent == 0 {
                return digest | 1;
            }
            dentry = probe_word(mount as Address, known(&FILE.mount_mountpoint));
            mount = parent;
            root = probe_word(mount as Address, known(&FILE.mount_mnt).wrapping_add(known(&FILE.mnt_root)));
            digest = fold(digest, mount);
        } else {
            let at = dentry as Address;
            digest = fold(digest, dentry);
            digest = fold(digest, probe_word::<u32>(at, known(&FILE.dentry_seq)).into());
            digest = fold(digest, probe_word(at, known(&FILE.dentry_hash_len)));
            let parent = probe_word(at, known(&FILE.dentry_parent));
            // A root that is not the mount's: detached, as deep as it goes.
            dentry = if parent == dentry { root } else { parent };
        }
    }
    0
}
