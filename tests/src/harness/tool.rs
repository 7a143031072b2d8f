//! The tool under test, run as a program.

use std::fs::{self, File};
use std::io::{Read, Seek};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use std::{env, io};

use nix::unistd::Pid;

use super::Pidfd;

/// The binary under test: `standstill`, or CRIU where that makes sense.
#[derive(Clone, Debug)]
pub struct Tool {
    path: PathBuf,
    criu: bool,
}

impl Tool {
    /// The binary named by `STANDSTILL`, or the one that lies next to the tests; built if it does not.
    pub fn get() -> Self {
        static PATH: OnceLock<PathBuf> = OnceLock::new();
        Self::at(PATH.get_or_init(|| env::var_os("STANDSTILL").map_or_else(build, PathBuf::from)))
    }

    /// The binary at a path; one that is called `criu` is taken for CRIU.
    pub fn at(path: &Path) -> Self {
        let path = path.canonicalize().unwrap_or_else(|error| panic!("no tool at {}: {error}", path.display()));
        let criu = path.file_name().is_some_and(|name| name == "criu");
        Self { path, criu }
    }

    /// True when the tool is CRIU: what only Standstill promises cannot be tested.
    pub const fn is_criu(&self) -> bool {
        self.criu
    }

    /// Path of the binary.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A command line of the tool.
    pub fn command<I: AsRef<std::ffi::OsStr>>(&self, args: impl IntoIterator<Item = I>) -> Run {
        let mut command = Command::new(&self.path);
        command.args(args);
        Run { command, timeout: Duration::from_secs(120), log: None }
    }

    /// `dump -t PID -D DIR -o dump.log`.
    pub fn dump(&self, pid: Pid, dir: &Path) -> Run {
        let run = self.command(["dump", "-t", &pid.to_string(), "-o", "dump.log", "-D"]).arg(dir);
        run.log(&dir.join("dump.log"))
    }

    /// `pre-dump -t PID -D DIR -o dump.log`.
    pub fn pre_dump(&self, pid: Pid, dir: &Path) -> Run {
        let run = self.command(["pre-dump", "-t", &pid.to_string(), "-o", "dump.log", "-D"]).arg(dir);
        run.log(&dir.join("dump.log"))
    }

    /// `snapshot -t PID -D STORE --every INTERVAL`.
    pub fn snapshot(&self, pid: Pid, store: &Path, every: &str) -> Run {
        self.command(["snapshot", "-t", &pid.to_string(), "--every", every, "-D"]).arg(store)
    }

    /// `restore -D STORE --at WHICH -d`, without a log: the store may be full.
    pub fn restore_at(&self, store: &Path, which: &str) -> Run {
        self.command(["restore", "-d", "--at", which, "-D"]).arg(store)
    }

    /// `restore -D DIR -o restore.log`.
    pub fn restore(&self, dir: &Path) -> Run {
        let run = self.command(["restore", "-o", "restore.log", "-D"]).arg(dir);
        run.log(&dir.join("restore.log"))
    }
}

/// Builds the binary with the profile of the running test.
fn build() -> PathBuf {
    let dir = super::target::bin_dir();
    let path = dir.join("standstill");
    if !path.exists() {
        let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.args(["build", "-p", "standstill", "--target-dir"]).arg(dir.parent().expect("a target directory"));
        if dir.ends_with("release") {
            command.arg("--release");
        }
        let status = command.current_dir(env!("CARGO_MANIFEST_DIR")).status();
        let built = status.as_ref().is_ok_and(ExitStatus::success);
        assert!(built, "`cargo build -p standstill` failed ({status:?}); build it, or set STANDSTILL to a binary");
    }
    path
}

/// A command about to be run.
pub struct Run {
    command: Command,
    timeout: Duration,
    log: Option<PathBuf>,
}

impl Run {
    /// Adds an argument.
    pub fn arg(mut self, arg: impl AsRef<std::ffi::OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    /// Adds arguments.
    pub fn args<I: AsRef<std::ffi::OsStr>>(mut self, args: impl IntoIterator<Item = I>) -> Self {
        self.command.args(args);
        self
    }

    /// Changes how the command is started.
    pub fn with(mut self, change: impl FnOnce(&mut Command)) -> Self {
        change(&mut self.command);
        self
    }

    fn log(mut self, path: &Path) -> Self {
        self.log = Some(path.to_owned());
        self
    }

    /// Starts the command.
    pub fn spawn(mut self) -> Running {
        // Files rather than pipes: whoever inherits them by mistake cannot keep us waiting.
        let file = || tempfile::tempfile().expect("make a temporary file");
        let clone = |file: &File| Stdio::from(file.try_clone().expect("dup"));
        let (stdout, stderr) = (file(), file());
        self.command.stdin(Stdio::null()).stdout(clone(&stdout)).stderr(clone(&stderr));
        let started = Instant::now();
        let child = self.command.spawn().unwrap_or_else(|error| panic!("start {:?}: {error}", self.command));
        let pidfd = Pidfd::open(Pid::from_raw(child.id().cast_signed())).expect("pidfd of a child");
        Running { child, pidfd, started, stdout, stderr, run: self }
    }

    /// Runs the command to its end.
    pub fn run(self) -> Outcome {
        self.spawn().wait()
    }
}

/// A command that is running; killed when dropped.
pub struct Running {
    child: Child,
    pidfd: Pidfd,
    started: Instant,
    stdout: File,
    stderr: File,
    run: Run,
}

impl Running {
    /// Process of the command.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Ends the command the hard way.
    pub fn kill(&self) {
        self.pidfd.kill();
    }

    /// Waits for the end of the command.
    pub fn wait(mut self) -> Outcome {
        let ended = self.pidfd.await_end(self.run.timeout);
        let wall = self.started.elapsed();
        assert!(ended, "{:?} did not end within {:?}\n{}", self.run.command, self.run.timeout, self.log());
        let status = self.child.wait().expect("wait for a child");
        Outcome {
            status: status.code(),
            signal: status.signal(),
            stdout: content(&mut self.stdout).expect("read stdout"),
            stderr: content(&mut self.stderr).expect("read stderr"),
            wall,
            log: self.log(),
            command: format!("{:?}", self.run.command),
        }
    }

    fn log(&self) -> String {
        self.run.log.as_ref().and_then(|path| fs::read_to_string(path).ok()).unwrap_or_default()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.pidfd.kill();
        _ = self.child.wait();
    }
}

fn content(file: &mut File) -> io::Result<String> {
    file.rewind()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// How a command ended.
#[derive(Debug)]
pub struct Outcome {
    /// Exit status, unless it was killed.
    pub status: Option<i32>,
    /// Signal that killed it.
    pub signal: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// Time from start to end.
    pub wall: Duration,
    /// Content of the log file.
    pub log: String,
    command: String,
}

impl Outcome {
    /// Fails unless the command succeeded.
    #[track_caller]
    pub fn expect_success(self) -> Self {
        assert!(self.status == Some(0), "{self}");
        self
    }

    /// Fails unless the command was refused with this status and a single error line that contains `words`, on stderr
    /// and in the log.
    #[track_caller]
    pub fn expect_error(self, status: i32, words: &[&str]) -> Self {
        assert!(self.status == Some(status), "should end with status {status}: {self}");
        let warning = |line: &&str| line.contains(" WARN ");
        let lines = self.stderr.lines().filter(|line| !line.trim().is_empty() && !warning(line));
        let lines: Vec<&str> = lines.collect();
        let one = lines.len() == 1 && lines[0].starts_with("standstill: error: ");
        assert!(one, "should print exactly one error line: {self}");
        for word in words {
            let found = lines[0].to_lowercase().contains(&word.to_lowercase());
            assert!(found, "the error should mention {word:?}: {self}");
        }
        assert!(self.log.is_empty() || self.log.contains("Error"), "the log should say \"Error\": {self}");
        self
    }

    /// The output as JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("not JSON ({error}): {self}"))
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let tail: Vec<&str> = self.log.lines().rev().take(25).collect();
        writeln!(out, "{}\nstatus {:?}, signal {:?}, {:?}", self.command, self.status, self.signal, self.wall)?;
        writeln!(out, "stdout: {}\nstderr: {}\nlog:", self.stdout.trim_end(), self.stderr.trim_end())?;
        tail.iter().rev().try_for_each(|line| writeln!(out, "  {line}"))
    }
}
