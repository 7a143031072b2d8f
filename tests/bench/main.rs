//! The driver behind `scripts/bench`: how long a target stands still, and what dump and restore take.

mod cases;
mod cost;
mod criu;
mod curve;
mod measure;
mod options;
mod prediction;
mod report;
mod server;
mod small;
mod times;

use std::process::ExitCode;

use standstill_tests::harness::{Tool, Turn};

use options::Options;
use report::Report;

fn main() -> ExitCode {
    let options = match Options::parse() {
        Ok(Some(options)) => options,
        Ok(None) => {
            print!("{}", options::HELP);
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("bench: error: {error}");
            return ExitCode::from(2);
        }
    };
    let _turn = Turn::take();
    let mut tools = vec![("standstill", Tool::get())];
    if tools[0].1.is_criu() {
        tools[0].0 = "criu";
    } else {
        if options.tracker {
            tools.push((measure::TRACKED, Tool::get()));
        }
        if options.precopy {
            tools.push((measure::PRECOPY, Tool::get()));
        }
        if let Some(path) = &options.criu {
            tools.push(("criu", Tool::at(path)));
        }
    }
    // A store is made without a tracker and without pre-copy of its own.
    let plain = |tool: &&(&str, Tool)| ![measure::TRACKED, measure::PRECOPY].contains(&tool.0);
    let plain: Vec<(&str, Tool)> = tools.iter().filter(plain).cloned().collect();
    let by_name = |name: &str, measure: &dyn Fn() -> Result<(), String>| match options.names(name) {
        true => measure(),
        false => Ok(()),
    };
    let others = if options.tracking_cost {
        cost::print(&tools[0].1, &options)
    } else if options.prediction {
        prediction::print(&tools[0].1, &options)
    } else {
        by_name("server", &|| server::print(&plain, &options))
            .and_then(|()| by_name("small-20hz", &|| small::print(&tools[0].1, &options)))
            .and_then(|()| by_name("tracking-curve", &|| curve::print(&options)))
    };
    if let Err(error) = others {
        eprintln!("bench: error: {error}");
        return ExitCode::FAILURE;
    }
    if options.tracking_cost || options.prediction || !cases::ALL.iter().any(|case| options.wants(case)) {
        return ExitCode::SUCCESS;
    }
    let mut report = Report::new(options.runs);
    for case in cases::ALL.iter().filter(|case| options.wants(case)) {
        for run in 0..options.runs {
            // In turn, and each time another one first: whatever drifts meets both.
            for number in 0..tools.len() {
                let (name, tool) = &tools[(number + run) % tools.len()];
                eprintln!("{}: {name}, run {} of {}", case.name, run + 1, options.runs);
                report.add(case.name, name, measure::run(case, name, tool, &options.dir));
            }
        }
    }
    print!("{}", report.table());
    if let Some(path) = &options.json
        && let Err(error) = std::fs::write(path, report.json())
    {
        eprintln!("bench: error: {}: {error}", path.display());
        return ExitCode::from(7);
    }
    if report.has_failures() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
