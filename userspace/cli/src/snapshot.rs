//! `standstill snapshot`.

use crate::{Failure, args::SnapshotArgs, inspect::output, logging};
use serde::Serialize;
use standstill_engine::{Afterwards, DumpOptions, Dumped, Snapshot, SnapshotOptions, snapshot};

/// A checkpoint as a JSON line.
#[derive(Serialize)]
struct Line<'a> {
    number: u64,
    #[serde(flatten)]
    dumped: &'a Dumped,
}

pub(crate) fn run(args: &SnapshotArgs) -> Result<u8, Failure> {
    logging::start(&args.log, &args.store)?;
    let options = SnapshotOptions {
        dump: DumpOptions { afterwards: Afterwards::Run, track: true, ..args.how.options(args.tree, &args.store) },
        every: args.every,
        keep: args.keep as usize,
        count: args.count,
    };
    let mut unwritten = None;
    snapshot(&options, |made, dumped| {
        // Whoever reads this may have gone: the checkpoints go on.
        unwritten = unwritten.take().or(print(args.json, made, dumped).err());
    })?;
    unwritten.map_or(Ok(0), Err)
}

fn print(json: bool, made: &Snapshot, dumped: &Dumped) -> Result<(), Failure> {
    if json {
        let line = serde_json::to_string(&Line { number: made.number, dumped }).unwrap_or_default();
        return output::print(&format!("{line}\n"));
    }
    let stats = &dumped.stats;
    let frozen = (stats.freezing_us + stats.frozen_us) as f64 / 1000.0;
    let mib = stats.pages_stored as f64 / 256.0;
    let total = stats.total_us as f64 / 1000.0;
    output::print(&format!("checkpoint {}: frozen {frozen:.2} ms, {mib:.1} MiB in {total:.0} ms\n", made.number))
}
