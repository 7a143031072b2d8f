//! Descriptors.

use super::{
    super::{FdEntry, procfs},
    among_many, iterators, skip,
    victim::{KINDS, Victim, say},
};
use nix::{
    sched::{CloneFlags, unshare},
    sys::{
        mman::{MapFlags, ProtFlags, mmap},
        signal::{SigHandler, Signal, signal},
    },
};
use proptest::prelude::*;
use std::{ffi::CStr, fs, num::NonZeroUsize};

/// Fails with the first entries that differ, not with thousands of lines.
fn assert_same(ours: &[FdEntry], procfs: &[FdEntry]) {
    for (a, b) in ours.iter().zip(procfs) {
        assert_eq!(a, b, "iterator first, procfs second");
    }
    assert_eq!(ours.len(), procfs.len());
}

fn kinds() -> impl Strategy<Value = String> {
    proptest::string::string_regex(&format!("[{KINDS}{}dDf]{{1,120}}", KINDS.to_ascii_uppercase())).unwrap()
}

proptest! {
    // Each case starts processes.
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 60, failure_persistence: None, ..Default::default() })]

    #[test]
    fn both_readers_see_the_same_descriptors(kinds in kinds()) {
        let Some(mut iterators) = iterators() else { return Ok(()) };
        let victim = Victim::start(&format!("fds {kinds}"));
        let truth = procfs::files(&victim.pids).unwrap();
        prop_assert!(truth.len() >= 3);
        assert_same(&iterators.files(&victim.pids).unwrap(), &truth);
        iterators.prefetch_paths(&victim.pids).unwrap();
        assert_same(&iterators.files(&victim.pids).unwrap(), &truth);
        assert_same(&iterators.files(&among_many(&victim.pids)).unwrap(), &truth);
    }
}

#[test]
fn every_kind_of_descriptor_in_one_process_and_in_many() {
    let Some(mut iterators) = iterators() else { return };
    // The second one with descriptions that all share.
    for script in [format!("fds {KINDS}"), format!("fds {KINDS}ffffffffffffd{}ff", KINDS.to_ascii_uppercase())] {
        let victim = Victim::start(&script);
        let truth = procfs::files(&victim.pids).unwrap();
        assert_same(&iterators.files(&victim.pids).unwrap(), &truth);
    }
}

/// What was read ahead is not believed when the name of a file has changed since.
#[test]
fn renamed_and_removed_after_reading_ahead() {
    let Some(mut iterators) = iterators() else { return };
    let victim = Victim::start("fds rrxxmmpse");
    iterators.prefetch_paths(&victim.pids).unwrap();
    let before = procfs::files(&victim.pids).unwrap();
    let known = |iterators: &mut super::super::Iterators| {
        let reading = iterators.read_files(&victim.pids, false).unwrap();
        reading.entries.len() - reading.pathless.len()
    };
    assert_eq!(known(&mut iterators), before.len(), "all paths should be known");
    let at = |name: &str| victim.dir.path().join(name);
    // The file itself, a directory above it, and back to the old name with another file in between.
    fs::rename(at("regular0"), at("other0")).unwrap();
    assert_eq!(known(&mut iterators), before.len() - 1);
    fs::remove_file(at("regular1")).unwrap();
    fs::rename(at("deep2"), at("shallow2")).unwrap();
    assert_eq!(known(&mut iterators), before.len() - 3);
    fs::rename(at("deep3"), at("shallow3")).unwrap();
    fs::rename(at("shallow3"), at("deep3")).unwrap();
    let truth = procfs::files(&victim.pids).unwrap();
    let paths = |entries: &[FdEntry]| -> Vec<_> { entries.iter().map(|e| e.path.clone()).collect() };
    assert_eq!(paths(&before).iter().zip(paths(&truth)).filter(|(a, b)| *a != b).count(), 3);
    assert_same(&iterators.files(&victim.pids).unwrap(), &truth);
}

/// A description of each file at a time, and a name that is used again.
#[test]
fn a_name_used_again_after_reading_ahead() {
    let Some(mut iterators) = iterators() else { return };
    let victim = Victim::start("fds ruf");
    iterators.prefetch_paths(&victim.pids).unwrap();
    for n in 0..50 {
        let again = Victim::start(if n % 2 == 0 { "fds gmev" } else { "fds rvsm" });
        assert_same(&iterators.files(&again.pids).unwrap(), &procfs::files(&again.pids).unwrap());
    }
}

const MOVE_FROM: &CStr = c"mounted";
const MOVE_TO: &CStr = c"moved";

extern "C" fn move_mount(_: i32) {
    // SAFETY: the paths end with a NUL.
    unsafe { libc::mount(MOVE_FROM.as_ptr(), MOVE_TO.as_ptr(), std::ptr::null(), libc::MS_MOVE, std::ptr::null()) };
}

/// Opens files on file systems that keep attributes to themselves, in a mount namespace of its own. SIGUSR1: a mount
/// moves.
pub(super) fn act_on_mounts() {
    // The namespace is the thread's alone.
    say(nix::unistd::gettid());
    if let Err(e) = unshare(CloneFlags::CLONE_NEWNS) {
        return say(format!("no mount namespace: {e}"));
    }
    let mount = |target: &CStr, kind: &CStr, flags: libc::c_ulong, data: &CStr| {
        // SAFETY: all strings end with a NUL.
        unsafe { libc::mount(c"none".as_ptr(), target.as_ptr(), kind.as_ptr(), flags, data.as_ptr().cast()) == 0 }
    };
    assert!(mount(c"/", c"", libc::MS_REC | libc::MS_PRIVATE, c""));
    for dir in ["mounted", "moved", "lower", "upper", "work", "merged"] {
        fs::create_dir(dir).unwrap();
    }
    assert!(mount(MOVE_FROM, c"tmpfs", 0, c""));
    fs::write("mounted/file", "x").unwrap();
    fs::create_dir("mounted/inner").unwrap();
    assert!(mount(c"mounted/inner", c"tmpfs", 0, c""));
    fs::write("mounted/inner/file", "x").unwrap();
    let mut paths = vec!["mounted/file", "mounted/inner/file", "/proc/self/maps", "/sys/kernel", "/proc/self/ns/mnt"];
    fs::write("lower/below", vec![1; 5000]).unwrap();
    // Not in every kernel, and not on every file system.
    if mount(c"merged", c"overlay", 0, c"lowerdir=lower,upperdir=upper,workdir=work") {
        fs::write("merged/above", vec![2; 6000]).unwrap();
        paths.extend(["merged/below", "merged/above", "merged"]);
        say("overlay");
    }
    for path in paths {
        let file = fs::File::open(path).unwrap();
        if path.starts_with("merged/") {
            let len = NonZeroUsize::new(4096).unwrap();
            // SAFETY: a new mapping that nothing points into.
            unsafe { mmap(None, len, ProtFlags::PROT_READ, MapFlags::MAP_PRIVATE, &file, 0) }.unwrap();
        }
        std::mem::forget(file);
    }
    // SAFETY: the handler makes one system call.
    unsafe { signal(Signal::SIGUSR1, SigHandler::Handler(move_mount)) }.unwrap();
}

#[test]
fn file_systems_that_keep_attributes_to_themselves_and_a_mount_that_moves() {
    let Some(mut iterators) = iterators() else { return };
    let victim = Victim::start("mounts -");
    match &victim.words[1..] {
        [overlay] if overlay == "overlay" => {}
        words => skip(&format!("{words:?}, no overlayfs")),
    }
    let truth = procfs::files(&victim.pids).unwrap();
    iterators.prefetch_paths(&victim.pids).unwrap();
    assert_same(&iterators.files(&victim.pids).unwrap(), &truth);
    super::vmas::assert_same(&iterators.vmas(&victim.pids).unwrap(), &procfs::vmas(&victim.pids).unwrap());

    let tid: i32 = victim.words[0].parse().unwrap();
    if !fs::read_to_string(format!("/proc/{tid}/mountinfo")).unwrap().contains("/mounted ") {
        return;
    }
    // SAFETY: no memory is passed.
    unsafe { libc::syscall(libc::SYS_tgkill, victim.pids[0], tid, libc::SIGUSR1) };
    let moved = || fs::read_to_string(format!("/proc/{tid}/mountinfo")).unwrap().contains("/moved ");
    while !moved() {
        std::thread::yield_now();
    }
    let truth = procfs::files(&victim.pids).unwrap();
    assert!(truth.iter().any(|e| e.path.ends_with("moved/inner/file")));
    assert_same(&iterators.files(&victim.pids).unwrap(), &truth);
}
