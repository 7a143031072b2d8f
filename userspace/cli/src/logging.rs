//! The log: standard error or a file, by tracing.

use crate::{Failure, args::LogArgs, progress};
use std::{
    fs::OpenOptions,
    io::IsTerminal,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
};
use tracing::level_filters::LevelFilter;

fn level(verbose: &[String]) -> LevelFilter {
    match score(verbose) {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 | 3 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    }
}

/// -v, -vv, -vvv add up; -v4 says it at once. What follows the first v of -vv is its value, another v.
fn score(verbose: &[String]) -> usize {
    verbose.iter().map(|v| v.parse().unwrap_or(v.len() + 1)).sum()
}

static TO_FILE: AtomicBool = AtomicBool::new(false);

/// Whether the log goes to a file, so that errors must be written to it besides standard error.
pub(crate) fn to_file() -> bool {
    TO_FILE.load(Ordering::Relaxed)
}

/// Starts logging. A log file is created in `dir` with mode 0600.
pub(crate) fn start(args: &LogArgs, dir: &Path) -> Result<(), Failure> {
    let level = level(&args.verbose);
    let Some(file) = &args.log_file else {
        tracing_subscriber::fmt()
            .with_max_level(level)
            .with_writer(|| progress::Above)
            .with_ansi(std::io::stderr().is_terminal())
            .init();
        return Ok(());
    };
    let path = dir.join(file);
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&path)
        .map_err(|e| Failure::io(&path.display().to_string(), &e))?;
    TO_FILE.store(true, Ordering::Relaxed);
    tracing_subscriber::fmt().with_max_level(level).with_writer(Mutex::new(file)).with_ansi(false).init();
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::args::{Cli, Command};
    use clap::Parser;

    #[test]
    fn verbosity_adds_up() {
        let score = |flags: &[&str]| {
            let line = ["standstill", "track", "-t", "1"].iter().chain(flags);
            match Cli::try_parse_from(line).unwrap().command {
                Command::Track(args) => super::score(&args.log.verbose),
                other => panic!("{other:?}"),
            }
        };
        let flags: [(&[&str], usize); 7] =
            [(&[], 0), (&["-v"], 1), (&["-vv"], 2), (&["-v", "-v"], 2), (&["-vvv"], 3), (&["-v4"], 4), (&["-v0"], 0)];
        for (flags, expected) in flags {
            assert_eq!(score(flags), expected, "{flags:?}");
        }
    }
}
