//! Processes that share descriptor tables and working directories: parents and children, siblings, members of other
//! sessions.

use std::fs;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use nix::unistd::{Pid, chdir, getpid};
use standstill_tests::workload::{Args, Checker, Control, Mapping, Meter, SelfState};

const EVERY: Duration = Duration::from_millis(200);
/// Where descriptors lie that are looked for, above those that come and go.
const HIGH: i32 = 100;

/// Every process of the tree: name, and which descriptor table and which working directory it has.
const MEMBERS: [(&str, u8, u8); 9] = [
    ("root", 0, 0),
    ("descriptors", 0, 1),
    ("directory of a sharer", 2, 1),
    ("directory", 3, 0),
    ("parent of siblings", 4, 4),
    ("first sibling", 5, 5),
    ("second sibling", 5, 5),
    ("third sibling", 6, 5),
    ("another session", 0, 0),
];

/// The pids of [`MEMBERS`], for all of them to see.
#[derive(Clone, Copy)]
struct Pids(&'static [AtomicI32; MEMBERS.len()]);

impl Pids {
    fn new() -> Self {
        let flags = libc::MAP_SHARED;
        let memory = Mapping::new(4096, libc::PROT_READ | libc::PROT_WRITE, flags, None).expect("map");
        // SAFETY: the mapping is never unmapped, aligned and zeroed, and only used through atomics.
        Self(unsafe { &*(memory.start() as *const _) })
    }

    fn come(self, name: &str) {
        let number = MEMBERS.iter().position(|m| m.0 == name).expect("a member");
        self.0[number].store(getpid().as_raw(), Ordering::SeqCst);
    }

    fn get(self) -> [i32; MEMBERS.len()] {
        std::array::from_fn(|n| self.0[n].load(Ordering::SeqCst))
    }
}

fn main() {
    let args = Args::parse();
    let mut control = Control::new("sharing", &args);
    let checker = Arc::clone(&control.checker);
    let pids = Pids::new();
    pids.come("root");
    for (n, path) in (0..).zip(["/dev/zero", "/dev/full"]) {
        place(fs::File::open(path).expect("open").as_raw_fd(), HIGH + n);
    }

    member(&mut control, pids, "descriptors", libc::CLONE_FILES, |control| {
        chdir("/usr").expect("chdir");
        place(0, HIGH + 2);
        member(control, pids, "directory of a sharer", libc::CLONE_FS, |_| {
            nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o27));
        });
    });
    member(&mut control, pids, "directory", libc::CLONE_FS, |_| {});
    member(&mut control, pids, "parent of siblings", 0, |control| {
        chdir("/etc").expect("chdir");
        member(control, pids, "first sibling", libc::CLONE_FILES | libc::CLONE_FS, |_| place(0, HIGH + 3));
        member(control, pids, "second sibling", libc::CLONE_FILES | libc::CLONE_FS, |_| {});
        unshare(libc::CLONE_FILES);
        member(control, pids, "third sibling", libc::CLONE_FILES | libc::CLONE_FS, |_| {});
        unshare(libc::CLONE_FILES | libc::CLONE_FS);
        chdir("/").expect("chdir");
        nix::unistd::close(HIGH).expect("close");
    });
    member(&mut control, pids, "another session", libc::CLONE_FILES | libc::CLONE_FS, |_| {
        nix::unistd::setsid().expect("setsid");
    });
    control.collect();
    let meter = Meter::start(Duration::from_millis(1));
    let before = SelfState::of_process().without(&["parent"]);
    let fds = pids.get().map(high_descriptors);
    let directories = pids.get().map(|pid| link(pid, "cwd"));
    control.ready();
    control.serve(Some(&meter), EVERY, |request| {
        SelfState::of_process().check(&checker, "root", &before);
        for (kind, name) in [(libc::CLONE_FILES, "descriptor table"), (libc::CLONE_FS, "working directory")] {
            check_partition(&checker, pids, kind, name);
        }
        for (n, (name, ..)) in MEMBERS.iter().enumerate() {
            let pid = pids.get()[n];
            checker.equal(&format!("descriptors of {name}"), &high_descriptors(pid), &fds[n]);
            checker.equal(&format!("directory of {name}"), &link(pid, "cwd"), &directories[n]);
        }
        if request.thorough() {
            change_together(&checker, pids);
        }
    });
}

/// Makes a child that shares what `flags` say, and waits until it has prepared itself.
fn member(control: &mut Control, pids: Pids, name: &'static str, flags: i32, prepare: impl FnOnce(&mut Control)) {
    let mut child = control.for_child(name);
    let flags = flags | libc::SIGCHLD;
    // SAFETY: without CLONE_VM this is fork(2) of a process with one thread.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    if pid == 0 {
        prepare(&mut child);
        let checker = Arc::clone(&child.checker);
        let before = SelfState::of_process();
        pids.come(name);
        child.serve(None, EVERY, |_| SelfState::of_process().check(&checker, name, &before));
    }
    let pid = i32::try_from(pid).expect("a pid");
    assert!(pid > 0, "clone: {}", std::io::Error::last_os_error());
    while !pids.get().contains(&pid) {
        std::thread::sleep(Duration::from_millis(1));
    }
    control.adopt(Pid::from_raw(pid), name);
}

fn unshare(flags: i32) {
    // SAFETY: the call takes flags only.
    assert_eq!(unsafe { libc::unshare(flags) }, 0, "unshare");
}

fn place(fd: i32, at: i32) {
    // SAFETY: descriptors from HIGH on are not owned by anything.
    assert_eq!(unsafe { libc::dup3(fd, at, 0) }, at, "dup3");
}

fn link(pid: i32, name: &str) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/{name}")).ok()
}

fn high_descriptors(pid: i32) -> Vec<(i32, Option<PathBuf>)> {
    (HIGH..HIGH + 8).map(|fd| (fd, link(pid, &format!("fd/{fd}")))).filter(|(_, file)| file.is_some()).collect()
}

/// Compares who shares with whom with what should be.
fn check_partition(checker: &Checker, pids: Pids, kind: i32, name: &str) {
    const KCMP_FILES: i32 = 2;
    const KCMP_FS: i32 = 3;
    let pids = pids.get();
    for (a, (name_a, table_a, fs_a)) in MEMBERS.iter().enumerate() {
        for (b, (name_b, table_b, fs_b)) in MEMBERS.iter().enumerate().take(a) {
            let (what, want) =
                if kind == libc::CLONE_FILES { (KCMP_FILES, table_a == table_b) } else { (KCMP_FS, fs_a == fs_b) };
            // SAFETY: kcmp takes numbers only.
            let order = unsafe { libc::syscall(libc::SYS_kcmp, pids[a], pids[b], what, 0, 0) };
            checker.equal(&format!("{name} of {name_a} and {name_b} is the same"), &(order == 0), &want);
        }
    }
}

/// What one does to a table or directory, those do that share it.
fn change_together(checker: &Checker, pids: Pids) {
    let all = || pids.get().into_iter().zip(MEMBERS);
    place(0, HIGH + 7);
    for (pid, (name, table, _)) in all() {
        let has = link(pid, &format!("fd/{}", HIGH + 7)).is_some();
        checker.equal(&format!("{name} has the new descriptor"), &has, &(table == 0));
    }
    checker.works("close", nix::unistd::close(HIGH + 7));
    let home = std::env::current_dir().expect("getcwd");
    checker.works("chdir", chdir("/bin/.."));
    let here = link(getpid().as_raw(), "cwd");
    for (pid, (name, _, fs)) in all().filter(|m| m.1.2 == 0) {
        checker.equal(&format!("directory of {name}, place {fs}"), &link(pid, "cwd"), &here);
    }
    checker.works("chdir back", chdir(&home));
}
