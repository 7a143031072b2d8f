//! What tracking costs those who are tracked: a server under load, and a build that forks and executes all the time.
//! With and without a tracker in turn, each time another one first.

use standstill_tests::harness::Tool;

use crate::report::high_median;
use std::{
    fs,
    io::{self, Write},
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// Requests of each run of redis-benchmark.
const REQUESTS: &str = "200000";
/// Files that the build compiles.
const SOURCES: usize = 150;

/// Figures of all runs: with a tracker and without.
#[derive(Default)]
struct Pairs {
    on: Vec<f64>,
    off: Vec<f64>,
}

/// Measures both, and prints a line for each.
pub(crate) fn print(tool: &Tool, dir: &Path, runs: usize) -> Result<(), String> {
    let say = |what: &str, unit: &str, pairs: &Pairs, share: f64| {
        let (on, off) = (high_median(&pairs.on), high_median(&pairs.off));
        println!("{what:<24} {off:>10.1} {unit} without, {on:>10.1} {unit} with a tracker: {share:.3} of the speed");
    };
    println!("{runs} runs with and without a tracker in turn; medians");
    let redis = redis(tool, runs).map_err(|e| format!("redis: {e}"))?;
    say("redis set+get, 20 clients", "req/s", &redis, high_median(&redis.on) / high_median(&redis.off));
    let build = build(tool, dir, runs).map_err(|e| format!("build: {e}"))?;
    say(&format!("make -j2, {SOURCES} files"), "ms", &build, high_median(&build.off) / high_median(&build.on));
    Ok(())
}

/// Calls `measure` with and without a tracker for the process that `start` gives, `runs` times each.
fn in_turn(runs: usize, mut measure: impl FnMut(bool) -> io::Result<f64>) -> io::Result<Pairs> {
    let mut pairs = Pairs::default();
    measure(false)?; // to warm up
    for run in 0..runs {
        for tracked in [run % 2 == 0, run % 2 != 0] {
            let figure = measure(tracked)?;
            (if tracked { &mut pairs.on } else { &mut pairs.off }).push(figure);
        }
    }
    Ok(pairs)
}

/// A tracker that ends when dropped.
struct Tracker(Child);

impl Tracker {
    fn start(tool: &Tool, pid: u32) -> io::Result<Self> {
        let pid = pid.to_string();
        let child = Command::new(tool.path()).args(["track", "-t", &pid]).spawn()?;
        let tracker = Self(child);
        let asked = || Command::new(tool.path()).args(["track", "--status", "-t", &pid]).output();
        let begin = Instant::now();
        while !asked()?.status.success() {
            if begin.elapsed() > Duration::from_secs(5) {
                return Err(io::Error::other("the tracker does not begin"));
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(tracker)
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        let _ =
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.0.id() as i32), nix::sys::signal::Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

/// A process that is killed when dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn redis(tool: &Tool, runs: usize) -> io::Result<Pairs> {
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port().to_string();
    let server = Command::new("redis-server")
        .args(["--port", &port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
        .stdout(Stdio::null())
        .spawn()
        .map(Server)?;
    thread::sleep(Duration::from_millis(500));
    in_turn(runs, |tracked| {
        let _tracker = if tracked { Some(Tracker::start(tool, server.0.id())?) } else { None };
        let output = Command::new("redis-benchmark")
            .args(["-p", &port, "-t", "set,get", "-n", REQUESTS, "-c", "20", "--csv"])
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let rate = |line: &str| line.split(',').nth(1)?.trim_matches('"').parse::<f64>().ok();
        let rates: Vec<f64> = text.lines().filter_map(rate).collect();
        if rates.is_empty() {
            return Err(io::Error::other(format!("redis-benchmark says: {text}")));
        }
        // The rate of the whole: both kinds of request, one after the other.
        Ok(rates.len() as f64 / rates.iter().map(|rate| 1.0 / rate).sum::<f64>())
    })
}

fn build(tool: &Tool, dir: &Path, runs: usize) -> io::Result<Pairs> {
    let dir = tempfile::tempdir_in(dir)?;
    for n in 0..SOURCES {
        let text = format!("#include <stdio.h>\nint f{n}(int a) {{ return printf(\"%d\\n\", a * {n}); }}\n");
        fs::write(dir.path().join(format!("f{n}.c")), text)?;
    }
    fs::write(dir.path().join("Makefile"), "all: $(patsubst %.c,%.o,$(wildcard *.c))\nclean:\n\trm -f *.o\n")?;
    in_turn(runs, |tracked| {
        // It waits until it is tracked.
        let mut shell = Command::new("sh")
            .args(["-c", "read go; make -s clean; exec make -s -j2 all"])
            .current_dir(dir.path())
            .stdin(Stdio::piped())
            .spawn()?;
        let tracker = if tracked { Some(Tracker::start(tool, shell.id())?) } else { None };
        let begin = Instant::now();
        shell.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?.write_all(b"go\n")?;
        let status = shell.wait()?;
        let elapsed = begin.elapsed();
        drop(tracker);
        if status.success() { Ok(elapsed.as_secs_f64() * 1000.0) } else { Err(io::Error::other("make failed")) }
    })
}
