//! Descriptors of many kinds, with their flags, positions, contents and sharing.
//!
//! Options: `--chroot` (adds a process whose root directory is not ours), `--packets` (adds a pipe in packet mode),
//! `--sockets` (adds listening sockets).

mod events;
mod files;
mod pipes;
mod sockets;

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{MetadataExt, chroot};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use std::{env, fs};

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::stat::{Mode, umask};
use standstill_tests::workload::{Args, Checker, Control, Meter, SelfState, fork_child};

/// A group of descriptors that verifies itself.
trait Group {
    /// Compares without changing anything.
    fn look(&self, checker: &Checker);
    /// Uses the descriptors and leaves everything as it was.
    fn exercise(&mut self, checker: &Checker);
}

fn main() {
    let args = Args::parse();
    let mut control = Control::new("fds", &args);
    let checker = Arc::clone(&control.checker);
    let dir = args.dir();
    let working = dir.join("working directory");
    fs::create_dir_all(&working).expect("make the working directory");
    env::set_current_dir(&working).expect("change directory");
    umask(Mode::from_bits_truncate(0o027));
    let mut groups: Vec<Box<dyn Group>> = vec![
        Box::new(files::Files::new(&dir, &mut control)),
        Box::new(pipes::Pipes::new(args.flag("packets"))),
        Box::new(events::Events::new()),
    ];
    if args.flag("sockets") {
        groups.push(Box::new(sockets::Sockets::new(&dir)));
    }
    if args.flag("chroot") {
        fork_jailed(&mut control, &dir);
    }
    let meter = Meter::start(Duration::from_millis(1));
    let before = SelfState::of_process().without(&["parent"]);
    let flags = all_flags();
    control.ready();
    control.serve(Some(&meter), Duration::from_millis(200), |request| {
        SelfState::of_process().check(&checker, "process", &before);
        for group in &groups {
            group.look(&checker);
        }
        checker.equal("flags of all descriptors", &all_flags(), &flags);
        if request.thorough() {
            for group in &mut groups {
                group.exercise(&checker);
            }
        }
    });
}

/// Number, close-on-exec flag and status flags of every open descriptor.
fn all_flags() -> Vec<(i32, i32, i32)> {
    // The descriptor that reads the directory is in the list as well, and always the lowest free one.
    let entries = fs::read_dir("/proc/self/fd").expect("list the descriptors");
    let mut flags: Vec<(i32, i32, i32)> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok()?.parse().ok())
        .map(|fd| {
            // SAFETY: fcntl with these commands takes no pointers; a closed descriptor is an error, no harm.
            unsafe { (fd, libc::fcntl(fd, libc::F_GETFD), libc::fcntl(fd, libc::F_GETFL)) }
        })
        .collect();
    flags.sort_unstable();
    flags
}

/// Status flags of a descriptor.
fn status_flags(fd: impl AsFd) -> i32 {
    fcntl(fd, FcntlArg::F_GETFL).unwrap_or(-1)
}

/// What the name of a descriptor in `/proc` points to.
fn name_of(fd: &impl AsRawFd) -> String {
    let link = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    link.map_or_else(|error| error.to_string(), |path| path.display().to_string())
}

/// Forks a process that has our directory as its root, and no `/proc`.
fn fork_jailed(control: &mut Control, dir: &Path) {
    let child = control.for_jailed_child("jailed");
    let inode = fs::metadata(dir).expect("stat").ino();
    let dir = dir.to_owned();
    let pid = fork_child(move || {
        chroot(&dir).expect("chroot");
        env::set_current_dir("/files").expect("change directory");
        umask(Mode::from_bits_truncate(0o077));
        let checker = Arc::clone(&child.checker);
        child.serve(None, Duration::from_millis(200), |_| {
            let root = fs::metadata("/").map(|root| root.ino()).ok();
            checker.equal("root directory", &root, &Some(inode));
            let cwd = env::current_dir().ok();
            checker.equal("working directory", &cwd.as_deref(), &Some(Path::new("/files")));
            let mask = umask(Mode::from_bits_truncate(0o077));
            checker.equal("umask", &mask, &Mode::from_bits_truncate(0o077));
        });
    });
    control.adopt(pid, "jailed");
}
