//! Directories that are gone: the working directory and descriptors; and a symbolic link.
//!
//! Options: `--unlink` (the link, too, has lost its name), `--dead` (of a process that is gone, in procfs), `--reused` (as before, and another process has its number).

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::readlinkat;
use standstill_tests::workload::{Args, Checker, Control, Request};

fn main() {
    let args = Args::parse();
    let control = Control::new("directories", &args);
    let reused = args.flag("reused");
    let directories = match reused || args.flag("dead") {
        false => Directories { link: Some(Link::new(&args)), ..Directories::removed(&args.dir().join("gone")) },
        true => Directories::of_a_dead_process(),
    };
    let _other = reused.then(|| born_as(directories.process));
    let checker = Arc::clone(&control.checker);
    control.ready();
    control.serve(None, Duration::from_millis(100), |request| directories.check(&checker, request));
}

/// A process with a certain number: the next one that is born gets it.
fn born_as(pid: u32) -> Child {
    loop {
        fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).expect("choose a number");
        let mut child = Command::new("sleep").arg("1000").spawn().expect("start a process");
        if child.id() == pid {
            return child;
        }
        child.kill().and_then(|()| child.wait()).expect("end a process");
    }
}

/// A symbolic link that leads nowhere.
struct Link(File);

impl Link {
    fn new(args: &Args) -> Self {
        let path = args.dir().join("link");
        symlink(Self::target(), &path).expect("make a symbolic link");
        let link = OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW).open(&path);
        if args.flag("unlink") {
            fs::remove_file(path).expect("remove a symbolic link");
        }
        Self(link.expect("open a symbolic link"))
    }

    fn target() -> &'static Path {
        Path::new("to nowhere")
    }

    fn check(&self, checker: &Checker) {
        let leads = readlinkat(&self.0, "");
        checker.equal("symbolic link", &leads.ok().as_deref().map(Path::new), &Some(Self::target()));
    }
}

struct Directories {
    /// Where they were.
    path: PathBuf,
    /// Also the working directory.
    inner: File,
    /// What it was in.
    outer: File,
    /// The process that they are about, or 0.
    process: u32,
    link: Option<Link>,
}

impl Directories {
    fn removed(path: &Path) -> Self {
        let inner = path.join("inner");
        fs::create_dir_all(&inner).expect("make directories");
        let open = |path: &Path| File::open(path).expect("open a directory");
        let all = Self { inner: open(&inner), outer: open(path), path: path.into(), process: 0, link: None };
        std::env::set_current_dir(&inner).expect("change to a directory");
        fs::remove_dir(inner).and_then(|()| fs::remove_dir(path)).expect("remove directories");
        all
    }

    fn of_a_dead_process() -> Self {
        let mut child = Command::new("sleep").arg("1000").spawn().expect("start a process");
        let process = child.id();
        let path = PathBuf::from(format!("/proc/{process}"));
        let open = |path: &Path| File::open(path).expect("open a directory");
        std::env::set_current_dir(&path).expect("change to a directory");
        let all = Self { inner: open(&path), outer: open(&path.join("net")), path, process, link: None };
        child.kill().and_then(|()| child.wait()).expect("end a process");
        all
    }

    fn check(&self, checker: &Checker, _: Request) {
        let id = |m: fs::Metadata| (m.dev(), m.ino());
        let of = |file: &File| file.metadata().ok().map(id);
        let entered = fs::metadata("/proc/self/cwd").ok().map(id);
        checker.equal("inode of the working directory", &entered, &of(&self.inner));
        checker.equal("is a directory", &self.inner.metadata().is_ok_and(|m| m.is_dir()), &true);
        checker.equal("other inode", &(of(&self.outer) != of(&self.inner)), &true);
        checker.equal("name", &std::env::current_dir().is_err(), &true);
        let shown = fs::read_link("/proc/self/cwd").unwrap_or_default();
        let path = if self.process == 0 { self.path.join("inner") } else { self.path.clone() };
        checker.equal("path", &shown, &PathBuf::from(format!("{} (deleted)", path.display())));
        if let Some(link) = &self.link {
            link.check(checker);
        }
        if self.process == 0 {
            let outer = fs::metadata(format!("/proc/self/fd/{}/..", self.inner.as_raw_fd())).ok().map(id);
            checker.equal("the directory above", &outer, &of(&self.outer));
            for file in [&self.inner, &self.outer] {
                checker.equal("links", &file.metadata().map(|m| m.nlink()).ok(), &Some(0));
            }
            checker.equal("nothing is left", &self.path.exists(), &false);
        }
    }
}
