//! Command line. Flags that CRIU has too have its names and meanings.

mod surroundings;

pub(crate) use surroundings::{CgroupsArg, TimensArg};

use crate::watch::Address;
use clap::{Args, Parser, Subcommand, ValueEnum};
use standstill_engine::{At, MemorySnapshot, Precopy, PrecopyOptions, Reader, observe::Scope};
use std::{
    path::PathBuf,
    time::{Duration, SystemTime},
};

/// Checkpoint and restore running Linux process trees
#[derive(Debug, Parser)]
#[command(name = "standstill", version, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Write a process tree to an image
    Dump(DumpArgs),
    /// The same as dump --leave-running --track-mem: the first of several that go on from each other
    PreDump(DumpArgs),
    /// Bring a process tree back from an image
    Restore(RestoreArgs),
    /// Checkpoint a running tree again and again
    Snapshot(SnapshotArgs),
    /// Watch a tree by eBPF, so that dumps know what did not change
    Track(TrackArgs),
    /// Show a running tree: processes, memory, descriptors, and how long a dump would stop it
    Watch(WatchArgs),
    /// Tell what this kernel offers, feature by feature
    Check(JsonArgs),
    /// Show what an image holds
    Inspect(ImageArgs),
    /// Check every checksum and cross-reference of an image
    Verify(ImageArgs),
    /// Make images complete in themselves: without parents, with one file of pages each
    Merge(MergeArgs),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the man pages to a directory
    Manpages {
        /// The directory, which must exist
        dir: PathBuf,
    },
}

/// Where messages go
#[derive(Args, Clone, Debug)]
pub(crate) struct LogArgs {
    /// Write the log to this file (in the image directory unless absolute) instead of standard error
    #[arg(short = 'o', long = "log-file", value_name = "FILE")]
    pub log_file: Option<PathBuf>,
    /// Say more: -v information, -vv debugging, -vvv everything; also -v0 to -v4 as in CRIU
    #[arg(short = 'v', value_name = "LEVEL", num_args = 0..=1, require_equals = false, default_missing_value = "1", action = clap::ArgAction::Append)]
    pub verbose: Vec<String>,
}

#[derive(Args, Debug)]
pub(crate) struct DumpArgs {
    /// Root of the tree to dump
    #[arg(short = 't', long = "tree", value_name = "PID")]
    pub tree: i32,
    /// Directory of the image
    #[arg(short = 'D', long = "images-dir", value_name = "DIR", default_value = ".")]
    pub images_dir: PathBuf,
    /// Let the tree run on after the dump
    #[arg(short = 'R', long)]
    pub leave_running: bool,
    /// Leave the tree stopped after the dump (SIGCONT lets it go on)
    #[arg(short = 's', long, conflicts_with = "leave_running")]
    pub leave_stopped: bool,
    #[command(flatten)]
    pub how: HowArgs,
    /// Make a hard link beside the old name of each file that has lost it and has other names; the restore removes it
    #[arg(long)]
    pub link_remap: bool,
    /// Compare what the tree's tracker knows with the truth while the tree is frozen
    #[arg(long)]
    pub paranoid: bool,
    #[command(flatten)]
    pub chain: ChainArgs,
    /// Print what the dump cost, phase by phase
    #[arg(long)]
    pub display_stats: bool,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub log: LogArgs,
}

/// How a tree is checkpointed
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct HowArgs {
    /// The tree is a job of a shell outside of it
    #[arg(short = 'j', long)]
    pub shell_job: bool,
    /// Record the cgroups that processes are in. (The mode counts at the restore.)
    #[arg(long, value_enum, value_name = "MODE", num_args = 0..=1, require_equals = true, default_value_t,
        default_missing_value = "soft")]
    pub manage_cgroups: CgroupsArg,
    /// Seconds within which the tree must be frozen
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub timeout: u64,
    /// Compression of the pages
    #[arg(long, value_enum, default_value_t)]
    pub compress: Compress,
    /// Who lists the descriptors
    #[arg(long, value_enum, default_value_t)]
    pub reader: ReaderArg,
    #[command(flatten)]
    pub precopy: PrecopyArgs,
}

/// Going on from an earlier image
#[derive(Args, Clone, Debug)]
pub(crate) struct ChainArgs {
    /// Directory of the image to go on from, relative to the image directory: what has not changed since is not copied
    #[arg(long, value_name = "DIR")]
    pub prev_images_dir: Option<PathBuf>,
    /// Track writes after the dump, so that the next one can go on from it; a process in the background does so
    #[arg(long)]
    pub track_mem: bool,
    /// Punch pages out of the earlier images that this one replaces: those cannot be restored afterwards
    #[arg(long, requires = "prev_images_dir")]
    pub auto_dedup: bool,
}

#[derive(Args, Debug)]
pub(crate) struct SnapshotArgs {
    /// Root of the tree to checkpoint
    #[arg(short = 't', long = "tree", value_name = "PID")]
    pub tree: i32,
    /// Directory of the checkpoints
    #[arg(short = 'D', long = "images-dir", value_name = "STORE")]
    pub store: PathBuf,
    /// Time from one checkpoint to the next: 50ms, 10s, 5m
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = time)]
    pub every: Duration,
    /// How many checkpoints to keep
    #[arg(long, value_name = "N", default_value_t = 6, value_parser = clap::value_parser!(u32).range(1..))]
    pub keep: u32,
    /// How many checkpoints to make; without it, until the tree ends
    #[arg(long, value_name = "N")]
    pub count: Option<u64>,
    #[command(flatten)]
    pub how: HowArgs,
    /// Print a JSON object for each checkpoint
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub log: LogArgs,
}

/// Copying memory before the freeze
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct PrecopyArgs {
    /// Copy memory while the tree runs, and under the freeze only what has changed: `auto` (for large trees), a number of
    /// rounds, or 0 (never)
    #[arg(long, value_name = "auto|ROUNDS", num_args = 0..=1, require_equals = true, default_value = "auto",
        default_missing_value = "auto", value_parser = precopy)]
    pub precopy: Precopy,
    /// Freeze to aim at with these rounds: 5ms, 1s; without a unit, milliseconds
    #[arg(long, value_name = "TIME", default_value = "5ms", value_parser = milliseconds)]
    pub max_freeze: Duration,
    /// How many rounds there are at most with --precopy=auto
    #[arg(long, value_name = "N", default_value_t = 12)]
    pub max_rounds: u32,
    /// Page data that may wait to be written while the tree runs, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    pub buffer: u64,
    /// How what is left for the freeze is kept as it was, for a tree that goes on
    #[arg(long, value_enum, default_value_t)]
    pub snapshot: SnapshotArg,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum SnapshotArg {
    /// Copy it under the freeze
    #[default]
    Copy,
    /// Fork the processes, if that is quicker, and copy from the forks after the freeze: for trees that write faster than
    /// they can be copied
    Fork,
}

impl From<PrecopyArgs> for PrecopyOptions {
    fn from(args: PrecopyArgs) -> Self {
        Self {
            mode: args.precopy,
            max_freeze: args.max_freeze,
            max_rounds: args.max_rounds,
            buffer: args.buffer << 20,
            snapshot: match args.snapshot {
                SnapshotArg::Copy => MemorySnapshot::Copy,
                SnapshotArg::Fork => MemorySnapshot::Fork,
            },
        }
    }
}

fn at(text: &str) -> Result<At, String> {
    if text == "latest" {
        return Ok(At::Latest);
    }
    if let Ok(number) = text.parse() {
        return Ok(At::Number(number));
    }
    if let Some(seconds) = text.strip_prefix('@') {
        return seconds.parse().map(At::Time).map_err(|e| e.to_string());
    }
    let time = humantime::parse_rfc3339_weak(text).map_err(|e| format!("{e}: `latest`, a number or a time"))?;
    Ok(At::Time(time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()))
}

fn precopy(text: &str) -> Result<Precopy, String> {
    match text {
        "auto" => Ok(Precopy::Auto),
        number => number.parse().map(Precopy::Rounds).map_err(|e| format!("{e}: `auto` or a number of rounds")),
    }
}

#[derive(Args, Debug)]
pub(crate) struct RestoreArgs {
    /// Directory of the image
    #[arg(short = 'D', long = "images-dir", value_name = "DIR", default_value = ".")]
    pub images_dir: PathBuf,
    /// Which checkpoint, if the directory is that of `standstill snapshot`: `latest`, its number, or the newest at a time
    /// (2026-11-26T10:00:00Z, or @SECONDS since the epoch)
    #[arg(long, value_name = "latest|N|TIME", value_parser = at)]
    pub at: Option<At>,
    /// Exit once the tree runs, instead of waiting for it
    #[arg(short = 'd', long)]
    pub restore_detached: bool,
    /// The tree becomes a job of the shell that runs this command
    #[arg(short = 'j', long)]
    pub shell_job: bool,
    /// Put processes into the cgroups that they were in, if the dump recorded these
    #[arg(long, value_enum, value_name = "MODE", num_args = 0..=1, require_equals = true, default_value_t,
        default_missing_value = "soft")]
    pub manage_cgroups: CgroupsArg,
    /// What takes the place of the cgroup that the root was in; those below it move along. Can be given for several
    /// controllers, and without one for all others
    #[arg(long, value_name = "[CONTROLLER:]/PATH", value_parser = surroundings::cgroup_root)]
    pub cgroup_root: Vec<(Option<String>, PathBuf)>,
    /// A time namespace in which CLOCK_MONOTONIC and CLOCK_BOOTTIME go on from where they were at the dump: `new`, the default
    /// where the tree had one that whoever dumped it was not in; `none`, the clocks are those of this machine
    #[arg(long, value_enum, value_name = "MODE", num_args = 0..=1, require_equals = true, default_value_t,
        default_missing_value = "new")]
    pub timens: TimensArg,
    /// Changes nothing: the links of dump --link-remap are always used, and removed
    #[arg(long)]
    pub link_remap: bool,
    /// Write the root's pid to this file (in the image directory unless absolute)
    #[arg(long, value_name = "FILE")]
    pub pidfile: Option<PathBuf>,
    /// Print the plan and do nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Print what the restore cost
    #[arg(long)]
    pub display_stats: bool,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub log: LogArgs,
}

/// How much the kernel tells
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct ScopeArgs {
    /// See every system call too: descriptors, sockets' options, signal actions. Makes each system call on the machine
    /// about 0.1 µs slower
    #[arg(long)]
    pub syscalls: bool,
}

impl From<ScopeArgs> for Scope {
    fn from(args: ScopeArgs) -> Self {
        if args.syscalls { Self::Syscalls } else { Self::Memory }
    }
}

#[derive(Args, Debug)]
pub(crate) struct TrackArgs {
    /// Root of the tree to track
    #[arg(short = 't', long = "tree", value_name = "PID")]
    pub tree: i32,
    /// Go on in the background once tracking has begun
    #[arg(short = 'd', long, conflicts_with = "status")]
    pub daemon: bool,
    #[command(flatten)]
    pub scope: ScopeArgs,
    /// Ask the tree's tracker what it has seen
    #[arg(long, conflicts_with = "syscalls")]
    pub status: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub log: LogArgs,
}

#[derive(Args, Debug)]
pub(crate) struct WatchArgs {
    /// Root of the tree to show
    #[arg(short = 't', long = "tree", value_name = "PID")]
    pub tree: i32,
    /// Time between two looks: 500ms, 1s, 2m
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = interval)]
    pub interval: Duration,
    /// Print a JSON object a line instead of a view
    #[arg(long)]
    pub json: bool,
    /// Show one look, after an interval, and exit
    #[arg(long)]
    pub once: bool,
    /// Show nothing: only serve metrics
    #[arg(long, requires = "metrics", conflicts_with_all = ["json", "once"])]
    pub quiet: bool,
    /// Serve Prometheus metrics at http://ADDRESS:PORT/metrics; a port alone means loopback
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub metrics: Option<Address>,
    /// Also show how quickly memory is written to. Each process is stopped for a moment at the beginning, and the first write
    /// to a page after a look takes it longer
    #[arg(long)]
    pub dirty: bool,
    /// Who reads descriptors and mappings
    #[arg(long, value_enum, default_value_t)]
    pub reader: ReaderArg,
    #[command(flatten)]
    pub scope: ScopeArgs,
    #[command(flatten)]
    pub log: LogArgs,
}

/// A time with a unit; a number alone is seconds.
fn interval(text: &str) -> Result<Duration, String> {
    match time(text)? {
        time if (0.1..=86_400.0).contains(&time.as_secs_f64()) => Ok(time),
        _ => Err("between 100ms and 24h".into()),
    }
}

/// A time with a unit, or milliseconds.
fn milliseconds(text: &str) -> Result<Duration, String> {
    text.parse().map_or_else(|_| time(text), |ms| Ok(Duration::from_millis(ms)))
}

/// A time with a unit.
fn time(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "ms" => 1e-3,
        "s" | "" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => return Err("units are ms, s, m and h".into()),
    };
    let seconds = digits.parse::<f64>().map_err(|_| "not a number with a unit, as 500ms or 2s")? * unit;
    Duration::try_from_secs_f64(seconds).map_err(|_| "not a time".into())
}

#[derive(Args, Debug)]
pub(crate) struct ImageArgs {
    /// Directory of the image
    #[arg(short = 'D', long = "images-dir", value_name = "DIR", default_value = ".")]
    pub images_dir: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct MergeArgs {
    /// Directories of images; images that build on one of them can be restored afterwards only if they are given too
    #[arg(required = true, value_name = "DIR")]
    pub dirs: Vec<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct JsonArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub(crate) enum Compress {
    /// Pages as they are
    #[default]
    None,
    /// LZ4
    Lz4,
    /// Zstandard, level 1
    Zstd,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub(crate) enum ReaderArg {
    /// eBPF iterators where they load, else procfs
    #[default]
    Auto,
    /// eBPF iterators or nothing
    Ebpf,
    /// procfs
    Procfs,
}

impl From<ReaderArg> for Reader {
    fn from(arg: ReaderArg) -> Self {
        match arg {
            ReaderArg::Auto => Self::Auto,
            ReaderArg::Ebpf => Self::Ebpf,
            ReaderArg::Procfs => Self::Procfs,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals() {
        for (text, ms) in [("500ms", 500), ("1s", 1000), ("2", 2000), ("1.5s", 1500), ("2m", 120_000)] {
            assert_eq!(interval(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        assert_eq!(time("1.5ms"), Ok(Duration::from_micros(1500)));
        assert!(time("-1s").is_err());
        for text in ["", "s", "0", "1ms", "-1s", "1d", "inf", "nan", "99999999h", "ä"] {
            assert!(interval(text).is_err(), "{text}");
        }
    }

    #[test]
    fn moments() {
        for (text, expected) in [
            ("latest", At::Latest),
            ("17", At::Number(17)),
            ("@1000", At::Time(1000)),
            ("1970-01-01T00:01:00Z", At::Time(60)),
            ("1970-01-01 00:01:00", At::Time(60)),
        ] {
            assert_eq!(at(text), Ok(expected), "{text}");
        }
        assert!(at("yesterday").is_err() && at("@x").is_err() && at("-1").is_err());
    }
}
