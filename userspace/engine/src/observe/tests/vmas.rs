//! Mappings.

use super::{
    super::{VmaEntry, procfs},
    among_many, iterators,
    victim::Victim,
};
use std::{fs, num::NonZeroUsize, os::fd::AsFd};

use crate::kernel::pagemap::{Pagemap, Range};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mlock, mmap, mmap_anonymous};

const PAGE: usize = 4096;

/// Maps what a process can map.
pub(super) fn act() {
    let len = NonZeroUsize::new(4 * PAGE).unwrap();
    let rw = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: new mappings that nothing points into.
    let anonymous = |prot, flags| unsafe { mmap_anonymous(None, len, prot, flags) }.unwrap();
    for prot in [ProtFlags::PROT_NONE, ProtFlags::PROT_READ, rw, rw | ProtFlags::PROT_EXEC] {
        anonymous(prot, MapFlags::MAP_PRIVATE);
        anonymous(prot, MapFlags::MAP_SHARED);
    }
    anonymous(rw, MapFlags::MAP_PRIVATE | MapFlags::MAP_GROWSDOWN);
    anonymous(rw, MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE);
    for advice in [
        MmapAdvise::MADV_DONTFORK,
        MmapAdvise::MADV_DONTDUMP,
        MmapAdvise::MADV_SEQUENTIAL,
        MmapAdvise::MADV_RANDOM,
        MmapAdvise::MADV_HUGEPAGE,
        MmapAdvise::MADV_NOHUGEPAGE,
        MmapAdvise::MADV_MERGEABLE,
        MmapAdvise::MADV_WIPEONFORK,
    ] {
        let at = anonymous(rw, MapFlags::MAP_PRIVATE);
        // SAFETY: nobody uses the mapping. What a kernel is built without is refused, and no loss.
        let _ = unsafe { madvise(at, len.get(), advice) };
    }
    // SAFETY: the mapping is there.
    unsafe { mlock(anonymous(rw, MapFlags::MAP_PRIVATE), PAGE) }.unwrap();
    for name in ["plain", "with\nnewline", "gone"] {
        fs::write(name, vec![1; 8 * PAGE]).unwrap();
        let file = fs::OpenOptions::new().read(true).write(true).open(name).unwrap();
        for flags in [MapFlags::MAP_PRIVATE, MapFlags::MAP_SHARED] {
            // SAFETY: as above.
            unsafe { mmap(None, len, rw, flags, file.as_fd(), PAGE as i64) }.unwrap();
            let readable = fs::File::open(name).unwrap();
            // SAFETY: as above.
            unsafe { mmap(None, len, ProtFlags::PROT_READ, flags, readable.as_fd(), 0) }.unwrap();
        }
    }
    fs::remove_file("gone").unwrap();
    // SAFETY: no memory but the new mapping is touched.
    unsafe {
        let segment = libc::shmget(libc::IPC_PRIVATE, PAGE, 0o600 | libc::IPC_CREAT);
        assert_ne!(libc::shmat(segment, std::ptr::null(), 0) as isize, -1);
        libc::shmctl(segment, libc::IPC_RMID, std::ptr::null_mut());
        // MAP_DROPPABLE (Linux 6.11), mseal(2) (Linux 6.10): attributes without a fixed bit. Refused by older kernels.
        libc::mmap(std::ptr::null_mut(), PAGE, libc::PROT_READ, 0x08 | libc::MAP_ANONYMOUS, -1, 0);
        let sealed = anonymous(rw, MapFlags::MAP_PRIVATE);
        // MADV_GUARD_INSTALL (Linux 6.13).
        libc::madvise(anonymous(rw, MapFlags::MAP_PRIVATE).as_ptr(), PAGE, 102);
        libc::syscall(462, sealed.as_ptr(), len.get(), 0);
    }
    super::victim::branch();
}

pub(super) fn assert_same(ours: &[VmaEntry], procfs: &[VmaEntry]) {
    for (a, b) in ours.iter().zip(procfs) {
        // procfs does not tell this, but which pages there are.
        if a.untouched && !a.shared && !a.name.to_string_lossy().starts_with("[v") {
            let mut found = Vec::new();
            Pagemap::open(a.tgid).unwrap().private(Range { start: a.start, end: a.end }, &[], &mut found).unwrap();
            assert_eq!(found, [], "{a:?}");
        }
        let a = VmaEntry { untouched: false, ..a.clone() };
        assert_eq!(a, *b, "iterator first, procfs second");
    }
    assert_eq!(ours.len(), procfs.len());
}

#[test]
fn both_readers_see_the_same_mappings() {
    let Some(mut iterators) = iterators() else { return };
    let victim = Victim::start("mappings -");
    let truth = procfs::vmas(&victim.pids).unwrap();
    for word in [b"lo", b"dc", b"gd", b"nr", b"dd", b"sr", b"rr"] {
        assert!(truth.iter().any(|v| v.has(word)), "no mapping has {}", word.escape_ascii());
    }
    for name in ["[heap]", "[stack]", "[vdso]", "[vvar]"] {
        assert!(truth.iter().any(|v| v.name.as_os_str() == name), "no mapping is {name}");
    }
    assert_same(&iterators.vmas(&victim.pids).unwrap(), &truth);
    let ours = iterators.vmas(&victim.pids).unwrap();
    assert!(ours.iter().any(|v| v.untouched && v.dev != 0) && ours.iter().any(|v| !v.untouched && v.dev != 0));
    // The same through the iterator over everything.
    assert_same(&iterators.vmas(&among_many(&victim.pids)).unwrap(), &truth);
}
