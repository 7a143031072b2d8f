//! `standstill watch`: a tree while it runs, and what a dump of it would cost now.

mod app;
mod lines;
mod metrics;
mod overview;
mod sampler;
mod screen;
mod stop;
mod tables;

use crate::{Failure, args::WatchArgs, inspect::output, logging};
use app::App;
pub(crate) use metrics::Address;
use metrics::Metrics;
use sampler::{Sampler, Told};
use standstill_engine::watch::Viewer;
use std::{io::IsTerminal, path::Path, time::Duration};

/// How often the loops look whether a signal asks for the end.
const TICK: Duration = Duration::from_millis(100);

pub(crate) fn run(args: &WatchArgs) -> Result<u8, Failure> {
    let view = !args.json && !args.quiet && !args.once;
    if view && !std::io::stdout().is_terminal() {
        let text = "standard output is not a terminal: use --json, --once or --quiet".into();
        return Err(Failure { status: 2, text });
    }
    // Messages would be written over the view.
    if !view || args.log.log_file.is_some() {
        logging::start(&args.log, Path::new("."))?;
    }
    let viewer = Viewer::with(args.tree, args.reader.into(), args.scope.into(), args.dirty)?;
    // In this order: who waits for the address to answer can rely on everything else.
    let metrics = args.metrics.map(Metrics::serve).transpose()?;
    stop::on_signals()?;
    let sampler = Sampler::start(viewer, args.interval, metrics);
    let ended = if view {
        screen::run(&sampler, App::new(args.tree))?
    } else if args.json {
        lines::json(&sampler, args.once)?
    } else if args.once {
        lines::once(&sampler)?
    } else {
        lines::nothing(&sampler)?
    };
    if ended {
        eprintln!("standstill: process {} has ended", args.tree);
    }
    Ok(0)
}

/// Waits for the next news; `None` if a signal asks for the end.
fn wait(sampler: &Sampler) -> Option<Told> {
    while !stop::asked() {
        if let Some(told) = sampler.next(TICK) {
            return Some(told);
        }
    }
    None
}
