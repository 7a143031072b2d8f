//! What tracking costs a program that writes memory as fast as it goes, over the length of the interval in which the
//! written pages are looked up. The workload tracks itself by the kernel's means, so that nothing else is measured:
//! no copying, no writing.

use std::path::Path;
use std::process::{Command, Stdio};

use serde::Serialize;
use serde_json::{Value, json};
use standstill_tests::harness::workload;

use crate::options::Options;
use crate::report::{high_median, write_json};

const INTERVALS_MS: [u64; 7] = [50, 100, 200, 500, 1000, 2000, 5000];

/// One length of the interval.
#[derive(Serialize)]
struct Point {
    interval_ms: u64,
    /// Share of the throughput that is lost.
    overhead: f64,
    /// The same for the time in which no page is written for the first time since the look-up.
    overhead_settled: Option<f64>,
    /// How long a look-up takes.
    look_us: f64,
    untracked_mib_per_second: f64,
    tracked_mib_per_second: f64,
}

/// Measures all lengths, and prints them as CSV.
pub(crate) fn print(options: &Options) -> Result<(), String> {
    let mut points = Vec::new();
    for interval in INTERVALS_MS {
        let seconds = options.seconds.unwrap_or(2).max(interval * 5 / 2000 + 2);
        let mut pairs = Vec::new();
        for run in 0..options.runs {
            eprintln!("tracking-curve: interval {interval} ms, run {} of {}", run + 1, options.runs);
            // One after the other, each time another one first: whatever drifts meets both.
            let first = stream(seconds, if run % 2 == 0 { interval } else { 0 }, &options.dir)?;
            let second = stream(seconds, if run % 2 == 0 { 0 } else { interval }, &options.dir)?;
            pairs.push(if run % 2 == 0 { (second, first) } else { (first, second) });
        }
        points.push(point(interval, &pairs));
    }
    println!("interval_ms,overhead_percent,overhead_settled_percent,look_ms,untracked_mib_per_second");
    for point in &points {
        let settled = point.overhead_settled.map_or_else(String::new, |share| format!("{:.2}", share * 100.0));
        let (overhead, look) = (point.overhead * 100.0, point.look_us / 1000.0);
        println!("{},{overhead:.2},{settled},{look:.2},{:.0}", point.interval_ms, point.untracked_mib_per_second);
    }
    write_json(options, &json!({ "case": "tracking-curve", "runs": options.runs, "points": points }))
}

/// Medians over pairs of an untracked and a tracked run.
fn point(interval_ms: u64, pairs: &[(Value, Value)]) -> Point {
    let mean = |run: &Value| run["mib_per_second"].as_f64().unwrap_or(f64::NAN);
    let all = |of: &dyn Fn(&(Value, Value)) -> f64| high_median(&pairs.iter().map(of).collect::<Vec<f64>>());
    let settled = |(off, on): &(Value, Value)| {
        let (off, on) = (windows(off, false), windows(on, true));
        (!on.is_empty()).then(|| 1.0 - high_median(&on) / high_median(&off))
    };
    let settled: Vec<f64> = pairs.iter().filter_map(settled).collect();
    let looks = |(_, on): &(Value, Value)| on["look_us"].as_array().cloned().unwrap_or_default();
    let looks: Vec<f64> = pairs.iter().flat_map(looks).filter_map(|us| us.as_f64()).collect();
    Point {
        interval_ms,
        overhead: all(&|(off, on)| 1.0 - mean(on) / mean(off)),
        overhead_settled: (!settled.is_empty()).then(|| high_median(&settled)),
        look_us: high_median(&looks),
        untracked_mib_per_second: all(&|(off, _)| mean(off)),
        tracked_mib_per_second: all(&|(_, on)| mean(on)),
    }
}

/// Throughput of all windows, or of those in which every page had been written since the look-up.
fn windows(run: &Value, settled: bool) -> Vec<f64> {
    let list = |name: &str| run[name].as_array().cloned().unwrap_or_default();
    let pairs = list("windows").into_iter().zip(list("settled"));
    pairs.filter(|(_, is)| !settled || *is == true).filter_map(|(window, _)| window.as_f64()).collect()
}

fn stream(seconds: u64, track_ms: u64, dir: &Path) -> Result<Value, String> {
    let mut command: Command = workload("stream");
    command.arg("--dir").arg(dir).args(["--seconds", &seconds.to_string(), "--track-ms", &track_ms.to_string()]);
    let output = command.stderr(Stdio::inherit()).output().map_err(|error| format!("stream: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find(|line| line.starts_with('{'));
    line.and_then(|line| serde_json::from_str(line).ok()).ok_or_else(|| format!("stream says: {text}"))
}
