//! The driver behind `scripts/bench`: how long a target stands still, and what dump and restore take.

mod cases;
mod cost;
mod measure;
mod options;
mod prediction;
mod report;

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
        if let Some(path) = &options.criu {
            tools.push(("criu", Tool::at(path)));
        }
    }
    if options.tracking_cost || options.prediction {
        let print = if options.prediction { prediction::print } else { cost::print };
        return match print(&tools[0].1, &options) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("bench: error: {error}");
                ExitCode::FAILURE
            }
        };
    }
    let mut report = Report::new(options.runs);
    for case in cases::ALL.iter().filter(|case| options.wants(case.name)) {
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
