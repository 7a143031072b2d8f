//! Second mappings of memory, and who refers to it.

use super::{super::Aliases, iterators, skip};
use std::{
    fs::File,
    io::{Read, Write},
    os::unix::fs::MetadataExt,
    ptr,
};

const LENGTH: usize = 8 << 12;

type Act = fn(*mut libc::c_void);

/// What the process does, and whether memory may be mapped a second time by it.
const STEPS: [(&str, bool, Act); 10] = [
    ("nothing", false, |_| ()),
    ("allocate", false, |_| _ = map(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)),
    ("share with nobody", false, |_| _ = map(libc::MAP_SHARED | libc::MAP_ANONYMOUS)),
    // SAFETY: nobody has a reference to the memory.
    ("protect", false, |at| _ = unsafe { libc::mprotect(at, LENGTH, libc::PROT_READ) }),
    ("shrink", false, |at| remap(at, LENGTH, LENGTH / 2)),
    ("grow", true, |at| remap(at, LENGTH / 2, LENGTH)),
    // SAFETY: nobody has a reference to the memory.
    ("unmap", false, |at| _ = unsafe { libc::munmap(at.wrapping_byte_add(LENGTH / 2), LENGTH / 2) }),
    ("duplicate", true, |at| remap(at, 0, LENGTH / 2)),
    ("duplicate by overflow", true, |at| remap(at, usize::MAX, LENGTH / 2)),
    ("fork", true, |_| {
        // SAFETY: the child makes one system call.
        if unsafe { libc::fork() } == 0 {
            // SAFETY: nothing of the test's runs in the child.
            unsafe { libc::_exit(0) }
        }
    }),
];

fn remap(at: *mut libc::c_void, from: usize, to: usize) {
    // SAFETY: nobody has a reference to the memory.
    unsafe { libc::mremap(at, from, to, libc::MREMAP_MAYMOVE) };
}

fn map(flags: i32) -> *mut libc::c_void {
    // SAFETY: the kernel places the mapping over nothing that exists.
    unsafe { libc::mmap(ptr::null_mut(), LENGTH, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) }
}

#[test]
fn second_mappings_are_seen() {
    let Some(mut iterators) = iterators() else { return };
    let mut aliases = match Aliases::load() {
        Ok(aliases) => aliases,
        Err(e) => return skip(&e.to_string()),
    };
    let memory = map(libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    let (mut go, mut done) = (std::io::pipe().unwrap(), std::io::pipe().unwrap());
    // SAFETY: the child makes system calls only.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let mut byte = [0];
        for (_, _, act) in STEPS {
            if !matches!(go.0.read(&mut byte), Ok(1)) {
                break;
            }
            act(memory);
            let _ = done.1.write_all(&byte);
        }
        // It ends with the test.
        drop(go.1);
        let _ = go.0.read(&mut byte);
        // SAFETY: nothing of the test's runs in the child.
        unsafe { libc::_exit(0) }
    }
    aliases.watch(&mut iterators, &[pid]).unwrap();
    for (name, may_alias, _) in STEPS {
        let before = aliases.of(pid).unwrap().unwrap();
        assert_eq!(before.owner, pid);
        go.1.write_all(b"x").unwrap();
        done.0.read_exact(&mut [0]).unwrap();
        let after = aliases.of(pid).unwrap().unwrap();
        assert_eq!(after.aliased != before.aliased, may_alias, "{name}");
        assert_eq!(after.changed != before.changed, name != "nothing", "{name}");
    }
    aliases.watch(&mut iterators, &[]).unwrap();
    assert_eq!(aliases.of(pid).unwrap(), None);
    drop(go);
    // SAFETY: the child is ours; the memory is mapped for nobody but this test.
    unsafe {
        libc::waitpid(pid, ptr::null_mut(), 0);
        libc::munmap(memory, LENGTH);
    }
}

#[test]
fn references_to_shared_memory_are_counted() {
    let Some(mut iterators) = iterators() else { return };
    let memory = map(libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    let link = |length| format!("/proc/self/map_files/{:x}-{:x}", memory as usize, memory as usize + length);
    let meta = std::fs::metadata(link(LENGTH)).unwrap();
    let pid = std::process::id() as i32;
    let mut found = || {
        let all = iterators.shared_mappings(&[pid], meta.dev()).unwrap();
        all.into_iter().filter(|m| m.ino == meta.ino()).collect::<Vec<_>>()
    };
    let one = found();
    assert_eq!(one.len(), 1);
    assert_eq!(
        (one[0].start as usize, one[0].end as usize, one[0].offset),
        (memory as usize, memory as usize + LENGTH, 0)
    );
    assert_eq!((one[0].file_users, one[0].dentry_users), (1, 1));
    // SAFETY: a part of the mapping, and another mapping of it.
    unsafe { libc::mprotect(memory.byte_add(4096), 4096, libc::PROT_READ) };
    let three = found();
    assert_eq!(three.len(), 3);
    assert!(three.iter().all(|m| m.file == three[0].file && (m.file_users, m.dentry_users) == (3, 1)), "{three:?}");
    let file = File::open(link(4096)).unwrap();
    assert!(found().iter().all(|m| (m.file_users, m.dentry_users) == (3, 2)));
    drop(file);
    assert!(found().iter().all(|m| (m.file_users, m.dentry_users) == (3, 1)));
    // SAFETY: nobody has a reference to the memory.
    unsafe { libc::munmap(memory, LENGTH) };
}
