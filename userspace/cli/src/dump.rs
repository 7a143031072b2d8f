//! `standstill dump`.

use crate::{
    Failure,
    args::{CgroupsArg, Compress, DumpArgs, HowArgs, SnapshotArg},
    logging, progress,
    terminal::leave_terminal,
};
use nix::unistd::{ForkResult, fork, setsid};
use standstill_engine::{Afterwards, DumpOptions, Keeper, dump};
use standstill_images::{
    store::Compression,
    types::{DumpStats, PrecopyStats},
};
use std::{path::Path, sync::Arc, time::Duration};

impl From<Compress> for Compression {
    fn from(compress: Compress) -> Self {
        match compress {
            Compress::None => Self::None,
            Compress::Lz4 => Self::Lz4,
            Compress::Zstd => Self::Zstd(1),
        }
    }
}

impl HowArgs {
    /// A dump of a tree that is killed afterwards, with nothing before or after it.
    pub(crate) fn options(self, pid: i32, dir: &Path) -> DumpOptions {
        DumpOptions {
            pid,
            dir: dir.into(),
            afterwards: Afterwards::Kill,
            shell_job: self.shell_job,
            link_remap: false,
            cgroups: self.manage_cgroups != CgroupsArg::Ignore,
            timeout: Duration::from_secs(self.timeout),
            compression: self.compress.into(),
            reader: self.reader.into(),
            paranoid: false,
            precopy: self.precopy.into(),
            prev_images: None,
            auto_dedup: false,
            track: false,
            progress: Arc::default(),
        }
    }
}

pub(crate) fn run(args: &DumpArgs) -> Result<u8, Failure> {
    if args.how.precopy.snapshot == SnapshotArg::Fork && !args.leave_running && !args.leave_stopped {
        return Err(Failure {
            status: 2,
            text: "--snapshot fork needs --leave-running: a tree that is killed stays frozen until its image is safe"
                .into(),
        });
    }
    logging::start(&args.log, &args.images_dir)?;
    let options = DumpOptions {
        afterwards: match (args.leave_running, args.leave_stopped) {
            (true, _) => Afterwards::Run,
            (_, true) => Afterwards::Stop,
            _ => Afterwards::Kill,
        },
        paranoid: args.paranoid,
        link_remap: args.link_remap,
        prev_images: args.chain.prev_images_dir.clone(),
        auto_dedup: args.chain.auto_dedup,
        track: args.chain.track_mem,
        ..args.how.options(args.tree, &args.images_dir)
    };
    let dumped = progress::during(args.json, || options.progress.look(), || dump(&options))?;
    if args.json {
        println!("{}", serde_json::to_string(&dumped).unwrap_or_default());
    } else if args.display_stats {
        print(&dumped.stats);
        dumped.precopy.iter().for_each(print_precopy);
    }
    match dumped.keeper {
        Some(keeper) => keep(keeper),
        None => Ok(0),
    }
}

/// `standstill pre-dump`.
pub(crate) fn run_before(mut args: DumpArgs) -> Result<u8, Failure> {
    args.leave_running = !args.leave_stopped;
    args.chain.track_mem = true;
    run(&args)
}

/// Goes on tracking in a process of its own.
fn keep(keeper: Keeper) -> Result<u8, Failure> {
    let failed = |e: nix::Error| Failure::io("track writes in the background", &e.into());
    // SAFETY: this process has one thread: those of the dump have ended.
    if let ForkResult::Child = unsafe { fork() }.map_err(failed)? {
        setsid().map_err(failed)?;
        leave_terminal().map_err(|e| Failure::io("leave the terminal", &e))?;
        keeper.run()?;
    }
    Ok(0)
}

/// Times and amounts for people.
pub(crate) fn print(stats: &DumpStats) {
    let ms = |us: u64| format!("{:.2} ms", us as f64 / 1000.0);
    println!("reader          {}", stats.reader);
    println!("prepare         {}", ms(stats.prepare_us));
    println!("freezing        {}", ms(stats.freezing_us));
    println!("frozen          {}", ms(stats.frozen_us));
    for (name, us) in &stats.phases {
        println!("  {name:<13} {}", ms(*us));
    }
    println!("total           {}", ms(stats.total_us));
    println!("pages stored    {}", stats.pages_stored);
    println!("pages zero      {}", stats.pages_zero);
    println!("pages shared    {}", stats.pages_shared);
}

/// What was copied before the freeze.
pub(crate) fn print_precopy(precopy: &PrecopyStats) {
    for (n, round) in (1..).zip(&precopy.rounds) {
        println!("round {n:<9} {} pages in {:.2} ms", round.pages, round.us as f64 / 1000.0);
    }
    let rounds = &precopy.rounds[precopy.rounds.len().min(1)..];
    let (pages, us) = rounds.iter().fold((0, 0), |(pages, us), r| (pages + r.pages, us + r.since_us));
    if let Some(rate) = (pages * 1_000_000).checked_div(us) {
        println!("dirty           {rate} pages/s");
    }
    println!("expected        {} pages in {:.2} ms", precopy.expected_pages, precopy.expected_us as f64 / 1000.0);
    println!("under freeze    {} pages", precopy.late_pages);
    if precopy.shared_tracked + precopy.shared_whole > 0 {
        println!("shared objects  {} tracked, {} copied in full", precopy.shared_tracked, precopy.shared_whole);
    }
}
