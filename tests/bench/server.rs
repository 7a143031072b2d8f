//! A server under load, with snapshots every two seconds and without, in turn: latencies at a fixed rate of requests,
//! throughput without one, and what the server's time went into. All turns of a run are one process's: two that do the
//! same differ by a tenth in what they do, for where their pages are.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use standstill_tests::harness::{Setting, Target, Tool};

use crate::measure::{settle, succeed, well};
use crate::options::Options;
use crate::report::{high_median, write_json};
use crate::times::{SHARES, Times};

/// Time from one snapshot to the next.
const EVERY: Duration = Duration::from_secs(2);
/// Figures of the workload that are compared.
const FIGURES: [&str; 6] = ["requests_per_second", "p50_ns", "p99_ns", "p999_ns", "p9999_ns", "max_ns"];

/// Measures the server with each tool, and prints medians.
pub(crate) fn print(tools: &[(&'static str, Tool)], options: &Options) -> Result<(), String> {
    let seconds = options.seconds.unwrap_or(60);
    let mut runs: Vec<Value> = Vec::new();
    for run in 0..options.runs {
        for rate in [options.rate, 0] {
            let setting = Setting { base: options.dir.clone(), ..Setting::default() };
            let mut target = Target::launch(&setting, "server", &["--rate", &rate.to_string()]);
            settle(&options.dir);
            let mut turns: Vec<Value> = Vec::new();
            // Undisturbed before and after the tools: what a processor does in a minute changes from one to the next.
            let disturbed = (0..tools.len()).map(|number| Some(&tools[(number + run) % tools.len()]));
            for disturbed in std::iter::once(None).chain(disturbed).chain([None]) {
                let by = disturbed.map_or("nobody", |(name, _)| name);
                eprintln!("server: rate {rate}, snapshots by {by}, run {} of {}", run + 1, options.runs);
                let mut figures = measure(&mut target, disturbed, seconds)?;
                figures["by"] = by.into();
                figures["rate"] = rate.into();
                turns.push(figures);
            }
            let throughput = |turn: &Value| turn[FIGURES[0]].as_f64().unwrap_or_default();
            let alone: Vec<f64> = turns.iter().filter(|turn| turn["by"] == "nobody").map(throughput).collect();
            let alone = alone.iter().sum::<f64>() / alone.len() as f64;
            turns.iter_mut().for_each(|turn| turn["share"] = (throughput(turn) / alone).into());
            runs.append(&mut turns);
        }
    }
    println!("server, {} s, a snapshot every {EVERY:?}; medians of {} runs", seconds, options.runs);
    for rate in [options.rate, 0] {
        println!("{}", if rate > 0 { format!("at {rate} requests/s") } else { "as fast as it goes".to_owned() });
        for by in std::iter::once("nobody").chain(tools.iter().map(|(name, _)| *name)) {
            let mine = |run: &&Value| run["by"] == by && run["rate"] == rate;
            let figure = |name: &str| {
                let values: Vec<f64> = runs.iter().filter(mine).filter_map(|run| run[name].as_f64()).collect();
                high_median(&values)
            };
            let ms = |name: &str| figure(name) / 1e6;
            println!(
                "  {by:<11} {:>9.0} requests/s ({:.3})   p50 {:>8.3} ms   p99 {:>8.3} ms   p99.9 {:>8.3} ms   p99.99 {:>8.3} \
                 ms   max {:>8.3} ms   longest pause {:>7.1} ms",
                figure(FIGURES[0]),
                figure("share"),
                ms(FIGURES[1]),
                ms(FIGURES[2]),
                ms(FIGURES[3]),
                ms(FIGURES[4]),
                ms(FIGURES[5]),
                figure("longest_pause_us") / 1e3,
            );
            let shares = SHARES.map(|(name, title)| format!("{title} {:.1} %", 100.0 * figure(name)));
            println!("              {}", shares.join("   "));
        }
    }
    write_json(options, &json!({ "case": "server", "seconds": seconds, "runs": runs }))
}

fn measure(target: &mut Target, by: Option<&(&'static str, Tool)>, seconds: u64) -> Result<Value, String> {
    target.reset_meter();
    let (begin, before) = (Instant::now(), Times::of(target.pid()));
    let length = Duration::from_secs(seconds);
    if let Some((_, tool)) = by {
        snapshots(tool, target, begin + length)?;
    }
    thread::sleep((begin + length).saturating_duration_since(Instant::now()));
    let (after, lasted) = (Times::of(target.pid()), begin.elapsed());
    let verdict = well(target)?;
    let mut figures = json!({ "longest_pause_us": verdict.longest_pause_us });
    after.note(&before, lasted.as_secs_f64(), &mut figures);
    for name in FIGURES {
        figures[name] = verdict.notes.get(name).copied().into();
    }
    Ok(figures)
}

/// Snapshots at the fixed pace until the end: into a store, or as whole dumps where the tool knows nothing better.
fn snapshots(tool: &Tool, target: &mut Target, end: Instant) -> Result<(), String> {
    if tool.is_criu() {
        let mut due = Instant::now();
        while due < end {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            let images = target.images("snapshot");
            succeed(tool.dump(target.pid(), &images).arg("--leave-running").run())?;
            due = (due + EVERY).max(Instant::now());
        }
        return Ok(());
    }
    let store = target.images("store");
    let left = end.saturating_duration_since(Instant::now());
    let count = (left.as_secs() / EVERY.as_secs()).max(1).to_string();
    let run = tool.snapshot(target.pid(), &store, "2s").args(["--keep", "6", "--count", &count]);
    succeed(run.run()).map(|_| ())
}
