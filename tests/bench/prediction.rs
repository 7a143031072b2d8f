//! How near predicted freezes are to observed ones: `watch` looks at a target for a while, then a dump follows, again and
//! again. The dumps themselves teach the next prediction.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use serde_json::Value;
use standstill_tests::harness::{Setting, Target, Tool};

use crate::cases;
use crate::options::Options;
use crate::report::high_median;

/// Those of [`cases::ALL`] that are measured, besides redis.
const CASES: [&str; 5] = ["fds-15000", "vmas-20000", "processes-300", "threads-1000", "heap-64m"];
const REDIS: &str = "redis-idle";
/// Looks before each dump: from the fifth on, `watch` takes the middle one of five measurements.
const LOOKS: usize = 6;

/// Microseconds of one freeze.
struct Freeze {
    predicted: f64,
    observed: f64,
}

impl Freeze {
    /// Within a quarter or 2 ms.
    fn is_near(&self) -> bool {
        (self.predicted - self.observed).abs() <= (self.observed / 4.0).max(2000.0)
    }
}

/// Measures all cases, and prints a line for each.
pub(crate) fn print(tool: &Tool, options: &Options) -> Result<(), String> {
    println!("freezes in ms; near: within 25 % or 2 ms; {} dumps of each", options.runs);
    println!(
        "{:<14} {:<8} {:>20} {:>22} {:>9} {:>6} {:>6}",
        "case", "reader", "first pred. / obs.", "median pred. / obs.", "worst", "near", "fresh"
    );
    let all = || CASES.into_iter().chain([REDIS]);
    let some = all().any(|case| options.names(case));
    for case in all().filter(|case| !some || options.names(case)) {
        for tracked in [false, true] {
            let (freezes, fresh) =
                measure(tool, &options.dir, case, tracked, options.runs).map_err(|error| format!("{case}: {error}"))?;
            let ms = |of: fn(&Freeze) -> f64| high_median(&freezes.iter().map(of).collect::<Vec<_>>()) / 1e3;
            let worst =
                freezes.iter().map(|f| f.predicted / f.observed - 1.0).max_by(|a, b| a.abs().total_cmp(&b.abs()));
            let near = freezes.iter().filter(|f| f.is_near()).count();
            println!(
                "{case:<14} {:<8} {:>9.1} /{:>9.1} {:>10.1} /{:>10.1} {:>+7.0} % {near:>3}/{:<2} {fresh:>6}",
                if tracked { "tracker" } else { "ebpf" },
                freezes[0].predicted / 1e3,
                freezes[0].observed / 1e3,
                ms(|f| f.predicted),
                ms(|f| f.observed),
                100.0 * worst.unwrap_or(f64::NAN),
                freezes.len(),
            );
        }
    }
    Ok(())
}

fn measure(tool: &Tool, dir: &Path, case: &str, tracked: bool, runs: usize) -> Result<(Vec<Freeze>, String), String> {
    let target = if case == REDIS { redis()? } else { workload(dir, case) };
    let pid = target.pid().to_string();
    if tracked {
        tool.command(["track", "-d", "-t", &pid]).run().expect_success();
    }
    let mut fresh = String::new();
    let freezes = (0..runs).map(|_| {
        let predicted = predict(tool, &pid)?;
        let images = target.images("running");
        let args = ["-R", "--json", "--precopy=0", "-v"];
        let stats = tool.dump(target.pid(), &images).args(args).run().expect_success().json();
        let log = std::fs::read_to_string(images.join("dump.log")).unwrap_or_default();
        let told = log.split_once("fresh=").and_then(|(_, rest)| rest.split_once('%'));
        fresh = told.map_or("-".to_owned(), |(share, _)| format!("{} %", share.trim_matches(['"', ' '])));
        let us = |name: &str| stats[name].as_f64().ok_or_else(|| format!("no {name} in {stats}"));
        Ok(Freeze { predicted, observed: us("freezing_us")? + us("frozen_us")? })
    });
    Ok((freezes.collect::<Result<_, String>>()?, fresh))
}

fn workload(dir: &Path, case: &str) -> Target {
    let setting = Setting { base: dir.to_owned(), ..Setting::default() };
    let args = cases::ALL.iter().find(|c| c.name == case).map_or(&[][..], |c| c.args);
    Target::launch(&setting, "clock", args)
}

/// A redis-server that was filled, and has no client.
fn redis() -> Result<Target, String> {
    let target = Target::start("redis-server", |dir| {
        let mut command = Command::new("redis-server");
        command.arg("--dir").arg(dir).arg("--unixsocket").arg(dir.join("socket"));
        command.args(["--port", "0", "--save", "", "--appendonly", "no"]);
        command
    });
    let socket = target.dir().join("socket");
    let fill = || {
        let mut command = Command::new("redis-benchmark");
        command.arg("-s").arg(&socket).args(["-t", "set", "-r", "1000000", "-n", "200000", "-d", "100", "-q"]);
        command.stdout(Stdio::null()).stderr(Stdio::null()).status()
    };
    for _ in 0..50 {
        if fill().map_err(|e| format!("redis-benchmark: {e}"))?.success() {
            // Until the last client is gone.
            thread::sleep(Duration::from_secs(1));
            return Ok(target);
        }
        thread::sleep(Duration::from_millis(100));
    }
    Err("redis does not answer".to_owned())
}

/// What `watch` says after a few looks.
fn predict(tool: &Tool, pid: &str) -> Result<f64, String> {
    let mut watch = Command::new(tool.path())
        .args(["watch", "--json", "--interval", "500ms", "-t", pid])
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|e| format!("watch: {e}"))?;
    let lines = BufReader::new(watch.stdout.take().ok_or("watch has no output")?).lines();
    let last = lines.take(LOOKS).last();
    // Nobody reads any more, which ends it.
    watch.wait().map_err(|e| format!("watch: {e}"))?;
    let line = last.ok_or("watch says nothing")?.map_err(|e| format!("watch: {e}"))?;
    let sample: Value = serde_json::from_str(&line).map_err(|e| format!("watch: {e}"))?;
    sample["prediction"]["freeze_us"].as_f64().ok_or_else(|| format!("no prediction: {line}"))
}
