//! What tracking costs those who are tracked: a server under load, and a build that forks and executes all the time.
//! Without a tracker, with one, and with one that sees system calls in turn, each time another one first.

use crate::{options::Options, report::high_median};
use standstill_tests::harness::Tool;
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

/// Options of `track` that are compared; `None`: no tracker.
const WAYS: [Option<&[&str]>; 3] = [None, Some(&[]), Some(&["--syscalls"])];

/// Figures of all runs, by the way of [`WAYS`].
type Series = [Vec<f64>; WAYS.len()];

/// Measures both, and prints a line for each.
pub(crate) fn print(tool: &Tool, options: &Options) -> Result<(), String> {
    let (runs, dir) = (options.runs, &options.dir);
    let say = |what: &str, unit: &str, series: &Series, speed: fn(f64) -> f64| {
        let figures = series.each_ref().map(|values| high_median(values));
        for (way, figure) in WAYS.iter().zip(figures) {
            let way = way.map_or("no tracker".to_owned(), |options| format!("track {}", options.join(" ")));
            let share = speed(figure) / speed(figures[0]);
            println!("{what:<26} {way:<18} {figure:>10.1} {unit:<5} {share:.3} of the speed");
        }
    };
    println!("{runs} runs of each in turn; medians");
    let redis = redis(tool, runs).map_err(|e| format!("redis: {e}"))?;
    say("redis set+get, 20 clients", "req/s", &redis, |rate| rate);
    let build = build(tool, dir, runs).map_err(|e| format!("build: {e}"))?;
    say(&format!("make -j2, {SOURCES} files"), "ms", &build, |time| 1.0 / time);
    Ok(())
}

/// Calls `measure` with the options of each tracker, `runs` times each.
fn in_turn(runs: usize, mut measure: impl FnMut(Option<&[&str]>) -> io::Result<f64>) -> io::Result<Series> {
    let mut series = Series::default();
    measure(None)?; // to warm up
    for run in 0..runs {
        for number in 0..WAYS.len() {
            let way = (number + run) % WAYS.len();
            series[way].push(measure(WAYS[way])?);
        }
    }
    Ok(series)
}

/// A tracker that ends when dropped.
struct Tracker(Child);

impl Tracker {
    fn start(tool: &Tool, pid: u32, options: &[&str]) -> io::Result<Self> {
        let pid = pid.to_string();
        let child = Command::new(tool.path()).args(["track", "-t", &pid]).args(options).spawn()?;
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

fn redis(tool: &Tool, runs: usize) -> io::Result<Series> {
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port().to_string();
    let server = Command::new("redis-server")
        .args(["--port", &port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
        .stdout(Stdio::null())
        .spawn()
        .map(Server)?;
    thread::sleep(Duration::from_millis(500));
    in_turn(runs, |way| {
        let _tracker = way.map(|options| Tracker::start(tool, server.0.id(), options)).transpose()?;
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

fn build(tool: &Tool, dir: &Path, runs: usize) -> io::Result<Series> {
    let dir = tempfile::tempdir_in(dir)?;
    for n in 0..SOURCES {
        let text = format!("#include <stdio.h>\nint f{n}(int a) {{ return printf(\"%d\\n\", a * {n}); }}\n");
        fs::write(dir.path().join(format!("f{n}.c")), text)?;
    }
    fs::write(dir.path().join("Makefile"), "all: $(patsubst %.c,%.o,$(wildcard *.c))\nclean:\n\trm -f *.o\n")?;
    in_turn(runs, |way| {
        // It waits until it is tracked.
        let mut shell = Command::new("sh")
            .args(["-c", "read go; make -s clean; exec make -s -j2 all"])
            .current_dir(dir.path())
            .stdin(Stdio::piped())
            .spawn()?;
        let tracker = way.map(|options| Tracker::start(tool, shell.id(), options)).transpose()?;
        let begin = Instant::now();
        shell.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?.write_all(b"go\n")?;
        let status = shell.wait()?;
        let elapsed = begin.elapsed();
        drop(tracker);
        if status.success() { Ok(elapsed.as_secs_f64() * 1000.0) } else { Err(io::Error::other("make failed")) }
    })
}
