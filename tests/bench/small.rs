//! Twenty snapshots a second of a small server, sustained, and random ones of them restored and verified.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use standstill_tests::harness::{Setting, Target, Tool};
use standstill_tests::workload::Random;

use crate::measure::{CLOCK_US, settle, succeed, well};
use crate::options::Options;
use crate::report::{high_median, write_json};

const PER_SECOND: u64 = 20;
const INTERVAL: &str = "50ms";
/// 500 pages in each interval.
const PAGES_PER_SECOND: &str = "10000";
/// Snapshots restored after each run.
const RESTORED: usize = 8;

/// Measures and prints a line for each run.
pub(crate) fn print(tool: &Tool, options: &Options) -> Result<(), String> {
    if tool.is_criu() {
        return Err("small-20hz: CRIU has no store of snapshots".to_owned());
    }
    let seconds = options.seconds.unwrap_or(30);
    let mut runs: Vec<Value> = Vec::new();
    for run in 0..options.runs {
        eprintln!("small-20hz: run {} of {}", run + 1, options.runs);
        runs.push(measure(tool, seconds, run as u64, &options.dir)?);
    }
    println!("small-20hz: 64 MiB, 500 pages written in each of {} intervals of {INTERVAL}", seconds * PER_SECOND);
    for run in &runs {
        println!("  {run}");
    }
    let figure = |name: &str| high_median(&runs.iter().filter_map(|run| run[name].as_f64()).collect::<Vec<f64>>());
    println!(
        "  median: {:.2} snapshots/s, longest pause {:.2} ms",
        figure("snapshots_per_second"),
        figure("longest_pause_us") / 1000.0
    );
    write_json(options, &json!({ "case": "small-20hz", "seconds": seconds, "runs": runs }))
}

fn measure(tool: &Tool, seconds: u64, seed: u64, dir: &Path) -> Result<Value, String> {
    let setting = Setting { base: dir.to_owned(), ..Setting::default() };
    let args = ["--heap", "64", "--pages-per-second", PAGES_PER_SECOND, "--clock-us", CLOCK_US];
    let mut target = Target::launch(&setting, "writer", &args);
    settle(dir);
    target.reset_meter();
    let written = well(&target)?.notes.get("pages_written").copied().unwrap_or(0);
    target.reset_meter();
    let store = target.images("store");
    let count = seconds * PER_SECOND;
    let run = tool.snapshot(target.pid(), &store, INTERVAL);
    let outcome = succeed(run.args(["--keep", &count.to_string(), "--count", &count.to_string()]).run())?;
    let verdict = well(&target)?;
    let kept = numbers(&store);
    let mut random = Random::new(seed);
    let mut restore_us = Vec::new();
    for _ in 0..RESTORED.min(kept.len()) {
        let number = kept[random.below(kept.len())];
        target.kill_tree();
        target.forget_verdicts();
        let outcome = succeed(tool.restore_at(&store, &number.to_string()).run())?;
        well(&target).map_err(|error| format!("snapshot {number}: {error}"))?;
        restore_us.push(micros(outcome.wall));
    }
    if restore_us.is_empty() {
        return Err("the store is empty".to_owned());
    }
    Ok(json!({
        "snapshots": kept.len(),
        "snapshots_per_second": count as f64 / outcome.wall.as_secs_f64(),
        "pages_written": verdict.notes.get("pages_written").copied().unwrap_or(0) - written,
        "longest_pause_us": verdict.longest_pause_us,
        "restored": restore_us.len(),
        "restore_us": restore_us,
    }))
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Numbers of the snapshots in a store.
fn numbers(store: &Path) -> Vec<u64> {
    let entries = fs::read_dir(store).into_iter().flatten().flatten();
    let complete = entries.filter(|entry| entry.path().join("standstill.img").exists());
    complete.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}
