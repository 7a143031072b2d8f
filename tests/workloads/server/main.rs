//! A server without a network: a hash table, and loops that make requests of their own and answer them.
//!
//! Options:
//!
//! - `--table MiB` (default 1024), `--writes PERCENT` (default 5), `--threads N` (default 1, each with a part of the
//!   table), `--seed N`
//! - `--rate R`: requests a second of all threads; the latency is counted from the moment at which a request was due,
//!   so that requests which wait for an earlier one count as late. 0 (the default): the next one begins when the last
//!   one has ended.
//! - `--seconds N`: measure so long, print the figures and end
//!
//! Throughput and latencies are printed as one line of JSON at a request for a verdict, whose notes have them too, and
//! are forgotten at a reset. A verdict looks at the whole table; requests are not counted meanwhile.

mod table;
mod worker;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use standstill_tests::workload::{Args, Checker, Control, Histogram, Mapping, Meter, Request};

use table::Table;
use worker::Worker;

fn main() {
    let args = Args::parse();
    let mut control = Control::new("server", &args);
    let checker = Arc::clone(&control.checker);
    let threads = args.value("threads", 1_usize).max(1);
    let length = (args.value("table", 1024_usize) << 20) / threads;
    let seed: u64 = args.value("seed", 1);
    let load = worker::Load {
        writes_percent: args.value("writes", 5),
        every_ns: match args.value("rate", 0_u64) {
            0 => None,
            rate => Some(1_000_000_000 * threads as u64 / rate.max(1)),
        },
    };
    let workers: Vec<Arc<Worker>> = (0..threads)
        .map(|number| {
            let memory = Mapping::private(length).expect("map the table");
            memory.advise(libc::MADV_NOHUGEPAGE).expect("small pages");
            let (table, seed) = (Table::new(memory), seed << 8 | number as u64);
            Worker::start(number, table, load, seed, Arc::clone(&checker))
        })
        .collect();
    let meter = Meter::start(Duration::from_micros(args.value("clock-us", 1000)));
    let all = workers.clone();
    control.on_reset(move || all.iter().for_each(|worker| worker.ask(worker::Ask::Reset)));
    control.ready();
    let seconds = args.value("seconds", 0);
    if seconds > 0 {
        workers.iter().for_each(|worker| worker.ask(worker::Ask::Reset));
        thread::sleep(Duration::from_secs(seconds));
        println!("{}", report(&workers, &checker));
        workers.iter().for_each(|worker| worker.ask(worker::Ask::Verify));
        std::process::exit(i32::from(!checker.verdict("server").ok));
    }
    control.serve(Some(&meter), Duration::from_secs(1), |request| {
        if !request.thorough() {
            return;
        }
        let figures = report(&workers, &checker);
        workers.iter().for_each(|worker| worker.ask(worker::Ask::Verify));
        if request == Request::Verdict {
            println!("{figures}");
        }
    });
}

/// The figures of all workers, which also become notes of the verdict.
fn report(workers: &[Arc<Worker>], checker: &Checker) -> Value {
    let mut all = Histogram::default();
    let mut busy_us = 0;
    for worker in workers {
        worker.ask(worker::Ask::Report);
        let (histogram, us) = worker.figures();
        all.add(&histogram);
        busy_us = busy_us.max(us);
    }
    let seconds = busy_us as f64 / 1e6;
    let latencies = [("p50_ns", 0.5), ("p99_ns", 0.99), ("p999_ns", 0.999), ("p9999_ns", 0.9999)];
    let mut figures: Vec<(&str, u64)> = latencies.map(|(name, share)| (name, all.quantile(share))).into();
    figures.extend([("max_ns", all.most()), ("requests", all.total()), ("measured_us", busy_us)]);
    figures.push(("requests_per_second", (all.total() as f64 / seconds) as u64));
    let mut text = json!({});
    for (name, value) in figures {
        checker.figure(name, value);
        text[name] = value.into();
    }
    text
}
