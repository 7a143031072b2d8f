//! The `standstill` command.

mod args;
mod check;
mod dump;
mod inspect;
mod logging;
mod merge;
mod progress;
mod restore;
mod snapshot;
mod terminal;
#[cfg(feature = "ebpf")]
mod track;
mod verify;
mod watch;

use clap::{CommandFactory, Parser};
use standstill_engine::Error;
use std::process::ExitCode;

/// Why a command failed, with the exit status documented in `docs/exit-status.md`.
#[derive(Debug)]
pub(crate) struct Failure {
    /// Exit status.
    status: u8,
    /// One line.
    text: String,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { status: error.exit_status(), text: error.to_string() }
    }
}

impl Failure {
    fn io(what: &str, error: &std::io::Error) -> Self {
        Self { status: 7, text: format!("{what}: {error}") }
    }
}

fn main() -> ExitCode {
    let cli = args::Cli::parse();
    let result = match cli.command {
        args::Command::Dump(args) => dump::run(&args),
        args::Command::PreDump(args) => dump::run_before(args),
        args::Command::Restore(args) => restore::run(&args),
        args::Command::Snapshot(args) => snapshot::run(&args),
        #[cfg(feature = "ebpf")]
        args::Command::Track(args) => track::run(&args),
        #[cfg(not(feature = "ebpf"))]
        args::Command::Track(_) => {
            Err(Failure { status: 6, text: standstill_engine::observe::ObserveError::NotBuilt.to_string() })
        }
        args::Command::Watch(args) => watch::run(&args),
        args::Command::Check(args) => check::run(&args),
        args::Command::Inspect(args) => inspect::run(&args),
        args::Command::Verify(args) => verify::run(&args),
        args::Command::Merge(args) => merge::run(&args),
        args::Command::Completions { shell } => {
            clap_complete::generate(shell, &mut args::Cli::command(), "standstill", &mut std::io::stdout());
            Ok(0)
        }
        args::Command::Manpages { dir } => manpages(&dir),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            if logging::to_file() {
                tracing::error!("Error: {}", failure.text);
            }
            eprintln!("standstill: error: {}", failure.text);
            ExitCode::from(failure.status)
        }
    }
}

fn manpages(dir: &std::path::Path) -> Result<u8, Failure> {
    clap_mangen::generate_to(args::Cli::command(), dir).map_err(|e| Failure::io(&dir.display().to_string(), &e))?;
    Ok(0)
}
