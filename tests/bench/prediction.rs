//! How near predicted freezes are to observed ones: `watch` looks at a target for a while, then a dump follows, again and
//! again. The dumps themselves teach the next prediction.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};
use standstill_tests::harness::{Setting, Target, Tool};

use crate::cases;
use crate::options::Options;
use crate::report::{high_median, write_json};

/// Those of [`cases::ALL`] that are measured, besides redis.
const CASES: [&str; 5] = ["fds-15000", "vmas-20000", "processes-300", "threads-1000", "heap-64m"];
const REDIS: &str = "redis-idle";
/// Looks before each dump: from the fifth on, `watch` takes the middle one of five measurements.
const LOOKS: usize = 6;

/// Dumps: their name in the table, which of the predictions is theirs, and their options.
const DUMPS: [(&str, &str, &[&str]); 2] =
    [("default", "prediction", &[]), ("precopy=0", "prediction_without_precopy", &["--precopy=0"])];

/// Microseconds of one freeze.
#[derive(Serialize)]
struct Freeze {
    predicted: f64,
    observed: f64,
    /// The phases as they were predicted, and as the dump told them.
    parts: Value,
    phases: Value,
}

impl Freeze {
    fn is_near(&self) -> bool {
        is_near(self.predicted, self.observed)
    }
}

/// Within a quarter or 2 ms.
fn is_near(expected: f64, observed: f64) -> bool {
    (expected - observed).abs() <= (observed / 4.0).max(2000.0)
}

/// Measures all cases, and prints a line for each.
pub(crate) fn print(tool: &Tool, options: &Options) -> Result<(), String> {
    println!("freezes in ms; near: within 25 % or 2 ms; {} dumps of each", options.runs);
    println!("steady: dumps as near to the middle one of the same row, which is what any prediction could reach");
    println!(
        "{:<14} {:<8} {:<10} {:>20} {:>22} {:>9} {:>6} {:>6} {:>6}",
        "case", "reader", "dump", "first pred. / obs.", "median pred. / obs.", "worst", "near", "steady", "fresh"
    );
    let all = || CASES.into_iter().chain([REDIS]);
    let some = all().any(|case| options.names(case));
    let mut rows = Vec::new();
    for case in all().filter(|case| !some || options.names(case)) {
        for tracked in [false, true] {
            let (series, fresh) =
                measure(tool, &options.dir, case, tracked, options.runs).map_err(|error| format!("{case}: {error}"))?;
            let reader = if tracked { "tracker" } else { "ebpf" };
            for ((dump, ..), freezes) in DUMPS.iter().zip(series) {
                row(case, reader, dump, &freezes, &fresh);
                rows.push(json!({ "case": case, "reader": reader, "dump": dump, "freezes": freezes }));
            }
        }
    }
    write_json(options, &json!({ "prediction": rows, "runs": options.runs }))
}

fn row(case: &str, reader: &str, dump: &str, freezes: &[Freeze], fresh: &str) {
    let middle = |of: fn(&Freeze) -> f64| high_median(&freezes.iter().map(of).collect::<Vec<_>>());
    let (predicted, observed) = (middle(|f| f.predicted), middle(|f| f.observed));
    let worst = freezes.iter().map(|f| f.predicted / f.observed - 1.0).max_by(|a, b| a.abs().total_cmp(&b.abs()));
    println!(
        "{case:<14} {reader:<8} {dump:<10} {:>9.1} /{:>9.1} {:>10.1} /{:>10.1} {:>+7.0} % {:>3}/{:<2} {:>3}/{:<2} {fresh:>6}",
        freezes[0].predicted / 1e3,
        freezes[0].observed / 1e3,
        predicted / 1e3,
        observed / 1e3,
        100.0 * worst.unwrap_or(f64::NAN),
        freezes.iter().filter(|f| f.is_near()).count(),
        freezes.len(),
        freezes.iter().filter(|f| is_near(observed, f.observed)).count(),
        freezes.len(),
    );
}

/// Freezes of each kind of dump, and what of the tracker's copy was fresh in the last one.
fn measure(
    tool: &Tool,
    dir: &Path,
    case: &str,
    tracked: bool,
    runs: usize,
) -> Result<([Vec<Freeze>; 2], String), String> {
    let target = if case == REDIS { redis()? } else { workload(dir, case) };
    let pid = target.pid().to_string();
    if tracked {
        tool.command(["track", "-d", "-t", &pid]).run().expect_success();
    }
    let mut fresh = String::new();
    let mut series = [Vec::new(), Vec::new()];
    for _ in 0..runs {
        for ((_, name, args), freezes) in DUMPS.iter().zip(&mut series) {
            let prediction = predict(tool, &pid, name)?;
            let images = target.images("running");
            let dump = tool.dump(target.pid(), &images).args(["-R", "--json", "-v"]).args(*args);
            let stats = dump.run().expect_success().json();
            let log = std::fs::read_to_string(images.join("dump.log")).unwrap_or_default();
            let told = log.split_once("fresh=").and_then(|(_, rest)| rest.split_once('%'));
            fresh = told.map_or("-".to_owned(), |(share, _)| format!("{} %", share.trim_matches(['"', ' '])));
            let us = |of: &Value, name: &str| of[name].as_f64().ok_or_else(|| format!("no {name} in {of}"));
            freezes.push(Freeze {
                predicted: us(&prediction, "freeze_us")?,
                observed: us(&stats, "freezing_us")? + us(&stats, "frozen_us")?,
                parts: prediction["parts"].clone(),
                phases: json!({ "freezing": stats["freezing_us"], "others": stats["phases"], "counts": stats["counts"],
                    "precopy": stats["precopy"] }),
            });
        }
    }
    Ok((series, fresh))
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

/// One of the predictions of `watch` after a few looks.
fn predict(tool: &Tool, pid: &str, name: &str) -> Result<Value, String> {
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
    let prediction = &sample[name];
    if prediction.is_object() { Ok(prediction.clone()) } else { Err(format!("no {name}: {line}")) }
}
