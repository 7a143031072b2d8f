//! A process tree to be checkpointed.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tempfile::TempDir;

use super::{Pidfd, Snapshot, proc, wait_until};
use crate::verdict::Verdict;

/// How long a workload may take to start, or for a verdict.
const LIMIT: Duration = Duration::from_secs(60);

/// Directory of the binaries that were built together with the running one.
pub(super) fn bin_dir() -> PathBuf {
    let exe = std::env::current_exe().expect("path of the running binary");
    let dir = exe.parent().expect("a directory");
    if dir.ends_with("deps") { dir.parent().expect("a directory").to_owned() } else { dir.to_owned() }
}

/// Command line of a workload: a binary of this crate by its name, or a script in `tests/workloads` by its file name.
pub fn workload(name: &str) -> Command {
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("workloads");
    match Path::new(name).extension().and_then(|extension| extension.to_str()) {
        Some("py") => {
            let mut command = Command::new("/usr/bin/python3");
            command.arg(scripts.join(name));
            command
        }
        Some("sh") => Command::new(scripts.join(name)),
        _ => Command::new(bin_dir().join(name)),
    }
}

/// Lets no descriptor of whoever runs the tests get into a target.
fn close_inherited() -> std::io::Result<()> {
    // SAFETY: the call takes numbers only; marked close-on-exec, the descriptors stay usable until then.
    match unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Where and how a target is started.
pub struct Setting {
    /// Directory in which the target's own directory is made.
    pub base: PathBuf,
    /// Whether it leads a session of its own, or stays in that of the tests as a job of a shell does.
    pub own_session: bool,
}

impl Default for Setting {
    fn default() -> Self {
        Self { base: "/var/tmp".into(), own_session: true }
    }
}

/// A running process tree with a directory of its own; both are gone when it is dropped.
pub struct Target {
    pid: Pid,
    name: String,
    dir: TempDir,
    /// Processes seen last, for the clean-up.
    seen: Vec<Pid>,
    /// Processes that [`Target::stop`] stopped.
    stopped: Vec<Pid>,
    /// The root as our child, so that the standard library does not wait for it behind our back.
    _child: Child,
}

impl Target {
    /// Starts a workload of this crate with its directory as `--dir`, and waits until it is ready.
    pub fn workload(name: &str, args: &[&str]) -> Self {
        Self::launch(&Setting::default(), name, args)
    }

    /// The same in a setting of its own.
    pub fn launch(setting: &Setting, name: &str, args: &[&str]) -> Self {
        let command = |dir: &Path| {
            let mut command = workload(name);
            match name.contains('.') {
                true => command.arg(dir),
                false => command.arg("--dir").arg(dir),
            };
            command.args(args);
            command
        };
        Self::start_in(setting, name, command).await_ready()
    }

    /// Starts any program; `command` is given the directory of the target.
    pub fn start(name: &str, command: impl FnOnce(&Path) -> Command) -> Self {
        Self::start_in(&Setting::default(), name, command)
    }

    fn start_in(setting: &Setting, name: &str, command: impl FnOnce(&Path) -> Command) -> Self {
        let dir = tempfile::Builder::new().prefix("standstill-").tempdir_in(&setting.base).expect("make a directory");
        let mut command = command(dir.path());
        let output = File::create(dir.path().join("output")).expect("create the output file");
        // One heap for all threads: a change of the address space is then somebody else's doing.
        command.env("MALLOC_ARENA_MAX", "1");
        command.stdin(Stdio::null()).stderr(output.try_clone().expect("dup")).stdout(output);
        let own_session = setting.own_session;
        let prepare = move || {
            if own_session {
                nix::unistd::setsid()?;
            }
            close_inherited()
        };
        // SAFETY: setsid and close_range are async-signal-safe and the closure allocates nothing.
        unsafe { command.pre_exec(prepare) };
        let child = command.spawn().unwrap_or_else(|error| panic!("start {command:?}: {error}"));
        let pid = Pid::from_raw(child.id().cast_signed());
        Self { pid, name: name.to_owned(), dir, seen: vec![pid], stopped: Vec::new(), _child: child }
    }

    /// Waits until the program has printed `READY`.
    #[track_caller]
    pub fn await_ready(self) -> Self {
        wait_until(LIMIT, || self.output().contains("READY\n") || !self.is_alive());
        assert!(self.output().contains("READY\n"), "{} does not get ready: {}", self.name, self.output());
        self
    }

    /// Root of the tree.
    pub const fn pid(&self) -> Pid {
        self.pid
    }

    /// Directory of the target.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Makes an empty directory for images.
    pub fn images(&self, name: &str) -> PathBuf {
        let path = self.dir().join("images").join(name);
        _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).expect("make a directory for images");
        path
    }

    /// What the program has printed.
    pub fn output(&self) -> String {
        fs::read_to_string(self.dir().join("output")).unwrap_or_default()
    }

    /// All processes of the tree as it is now.
    pub fn processes(&mut self) -> Vec<Pid> {
        let now = if self.is_alive() { proc::tree(self.pid) } else { Vec::new() };
        self.seen.extend(&now);
        self.seen.sort_unstable();
        self.seen.dedup();
        now
    }

    /// What can be seen of the tree from outside.
    pub fn snapshot(&mut self) -> Snapshot {
        let processes = self.processes();
        Snapshot::take(&processes)
    }

    /// True while the root exists and is no zombie.
    pub fn is_alive(&self) -> bool {
        proc::state(self.pid).is_some_and(|state| state != 'Z')
    }

    /// Fails unless every process of the tree is alive, not traced and not stopped by force.
    #[track_caller]
    pub fn assert_free(&mut self) {
        let name = self.name.clone();
        assert!(self.is_alive(), "{name} is gone: {}", self.output());
        for pid in self.processes() {
            for thread in proc::threads(pid) {
                let line = |what| proc::status_line(thread, what);
                // A thread may have ended since it was listed.
                assert!(matches!(line("TracerPid").as_deref(), Some("0") | None), "{name}: {thread} is traced");
                assert!(!line("State").is_some_and(|state| state.starts_with('t')), "{name}: {thread} is held");
            }
        }
    }

    /// Where every thread is, for messages.
    pub fn whereabouts(&mut self) -> String {
        let line = |pid: Pid, thread: Pid| {
            let file = |name: &str| proc::text(pid, &format!("task/{thread}/{name}")).trim().to_owned();
            let status = |name: &str| proc::status_line(thread, name).unwrap_or_default();
            let (state, blocked, pending) = (status("State"), status("SigBlk"), status("SigPnd"));
            let (name, syscall, place) = (file("comm"), file("syscall"), file("wchan"));
            format!(
                "{pid}/{thread} {name}: {state}, in {place}, syscall {syscall}, blocks {blocked}, pending {pending}\n"
            )
        };
        let threads = |pid: Pid| proc::threads(pid).into_iter().map(move |thread| line(pid, thread));
        self.processes().into_iter().flat_map(threads).collect()
    }

    /// Asks for a verdict.
    #[track_caller]
    pub fn verdict(&self) -> Verdict {
        self.answer(Signal::SIGUSR1)
    }

    /// Makes the target's pause meter forget what it has seen.
    #[track_caller]
    pub fn reset_meter(&self) {
        self.answer(Signal::SIGUSR2);
    }

    #[track_caller]
    fn answer(&self, signal: Signal) -> Verdict {
        let read = || Verdict::read(self.dir(), "root").expect("read the verdict");
        let before = read().map_or(0, |verdict| verdict.seq);
        self.signal(signal);
        let newer = || read().is_some_and(|verdict| verdict.seq > before);
        wait_until(LIMIT, || newer() || !self.is_alive());
        assert!(newer(), "{} gives no verdict (state {:?}): {}", self.name, proc::state(self.pid), self.output());
        read().expect("a verdict")
    }

    /// Fails unless the target finds itself to be well.
    #[track_caller]
    pub fn assert_well(&self) -> Verdict {
        let verdict = self.verdict();
        assert!(verdict.ok, "{} finds itself changed: {:#?}", self.name, verdict.failures);
        assert!(verdict.checks > 0, "{} has checked nothing", self.name);
        verdict
    }

    /// Sends a signal to the root.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        kill(self.pid, signal).unwrap_or_else(|error| panic!("signal {}: {error}", self.name));
    }

    /// Stops every process of the tree as a user would, and waits until all are stopped.
    #[track_caller]
    pub fn stop(&mut self) {
        // A process that is being stopped may still fork.
        for _ in 0..3 {
            for pid in self.processes() {
                // Once only: a second SIGSTOP that comes after the stop stays pending.
                let runs = !self.stopped.contains(&pid) && !matches!(proc::state(pid), Some('T' | 'Z'));
                if runs && kill(pid, Signal::SIGSTOP).is_ok() {
                    self.stopped.push(pid);
                }
            }
        }
        self.await_stop();
    }

    /// Waits until every process of the tree is stopped.
    #[track_caller]
    pub fn await_stop(&mut self) {
        let processes = self.processes();
        let still = || {
            let mut threads = processes.iter().flat_map(|pid| proc::threads(*pid));
            threads.all(|thread| matches!(proc::state(thread), Some('T' | 'Z') | None))
        };
        assert!(wait_until(LIMIT, still), "{} does not stop", self.name);
    }

    /// Lets the processes go on that were stopped by [`Target::stop`].
    pub fn go_on(&mut self) {
        for pid in self.stopped.drain(..) {
            _ = kill(pid, Signal::SIGCONT);
        }
    }

    /// Waits until the whole tree is gone, as after a dump that kills, and reaps what is our child.
    #[track_caller]
    pub fn await_gone(&mut self) {
        let gone = wait_until(LIMIT, || {
            reap();
            self.seen.iter().all(|pid| proc::state(*pid).is_none())
        });
        assert!(gone, "{} is still there: {:?}", self.name, self.seen);
    }

    /// Kills the whole tree the hard way, and waits until it is gone. Commands that end with it are taken for orphans of
    /// it: use [`Self::kill_all`] while one runs.
    #[track_caller]
    pub fn kill_tree(&mut self) {
        self.kill_all();
        self.await_gone();
    }

    /// Kills the whole tree the hard way.
    pub fn kill_all(&mut self) {
        // While they run they can make others that nobody would find once their parents are dead.
        let mut stopped = Vec::new();
        loop {
            let all = self.processes();
            if all == stopped {
                break;
            }
            for pid in all.iter().filter(|pid| !stopped.contains(pid)) {
                _ = nix::sys::signal::kill(*pid, Signal::SIGSTOP);
                wait_until(LIMIT, || proc::state(*pid).is_none_or(|state| matches!(state, 'T' | 'Z' | 't')));
            }
            stopped = all;
        }
        for pid in stopped {
            if let Ok(pidfd) = Pidfd::open(pid) {
                pidfd.kill();
            }
        }
    }

    /// Removes all verdicts: the target is about to be taken back to an earlier moment, from which it counts on.
    pub fn forget_verdicts(&self) {
        for entry in fs::read_dir(self.dir()).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with("verdict.") {
                _ = fs::remove_file(entry.path());
            }
        }
    }

    /// Waits for the end of the root and takes its status.
    #[track_caller]
    pub fn await_exit(&mut self, limit: Duration) -> Option<WaitStatus> {
        let Ok(pidfd) = Pidfd::open(self.pid) else { return None };
        assert!(pidfd.await_end(limit), "{} does not end", self.name);
        pidfd.reap()
    }

    /// Ends the target and checks that it is content, or has the given exit status.
    #[track_caller]
    pub fn finish(mut self, status: i32) {
        self.processes();
        self.signal(Signal::SIGTERM);
        let exit = self.await_exit(LIMIT);
        let verdict = Verdict::read(self.dir(), "root").expect("read the verdict").unwrap_or_default();
        assert!(verdict.ok, "{} finds itself changed at the end: {:#?}", self.name, verdict.failures);
        assert_eq!(exit, Some(WaitStatus::Exited(self.pid, status)), "exit of {}: {}", self.name, self.output());
    }
}

/// Takes every child that has ended: orphans of a target become ours, and whoever has a turn runs no other command.
fn reap() {
    while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG | WaitPidFlag::__WALL)) {
        if status == WaitStatus::StillAlive {
            break;
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("output of {}: {}", self.name, self.output());
        }
        // Only processes that still belong to us: pids seen earlier may be somebody else's by now.
        self.processes();
        let ours = proc::tree(nix::unistd::getpid());
        for pid in self.seen.iter().filter(|pid| ours.contains(pid)) {
            if let Ok(pidfd) = Pidfd::open(*pid) {
                pidfd.kill();
                pidfd.await_end(Duration::from_secs(5));
            }
        }
        wait_until(Duration::from_secs(5), || {
            reap();
            let ours = proc::tree(nix::unistd::getpid());
            !self.seen.iter().any(|pid| ours.contains(pid))
        });
    }
}
