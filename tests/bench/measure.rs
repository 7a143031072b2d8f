//! One run of one case with one tool.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use standstill_tests::harness::{Outcome, Run, Setting, Target, Tool};
use standstill_tests::verdict::Verdict;

use crate::cases::Case;
use crate::criu;

/// Sleep of the target's clock loop, in microseconds: what a freeze is measured with.
pub(crate) const CLOCK_US: &str = "50";

/// Figures of one run.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Figures {
    pub(crate) idle_us: u64,
    pub(crate) freeze_us: u64,
    /// As the tool tells it.
    pub(crate) told_us: Option<u64>,
    pub(crate) dump_us: u64,
    pub(crate) durable_us: u64,
    pub(crate) restore_cold_us: u64,
    pub(crate) restore_warm_us: u64,
    pub(crate) image_bytes: u64,
}

/// Name of Standstill with a tracker.
pub(crate) const TRACKED: &str = "tracked";

/// Name of Standstill with pre-copy.
pub(crate) const PRECOPY: &str = "precopy";

/// A dump as the name asks for it.
fn dump(target: &Target, name: &str, tool: &Tool, images: &Path) -> Run {
    let run = tool.dump(target.pid(), images);
    let run = if name == PRECOPY { run.arg("--precopy") } else { run };
    if tool.is_criu() { run } else { run.arg("--json") }
}

/// The freeze as the tool tells it: Standstill on its standard output, CRIU in a file of the image.
fn told_us(tool: &Tool, outcome: &Outcome, images: &Path) -> Option<u64> {
    if tool.is_criu() {
        return criu::frozen_us(&fs::read(images.join("stats-dump")).ok()?);
    }
    serde_json::from_str::<serde_json::Value>(&outcome.stdout).ok()?["frozen_us"].as_u64()
}

/// Gives the target a tracker that ends with it, if the name asks for one.
fn track(target: &Target, name: &str, tool: &Tool) -> Result<(), String> {
    if name == TRACKED {
        succeed(tool.command(["track", "-d", "-t", &target.pid().to_string()]).run())?;
        thread::sleep(Duration::from_millis(500));
    }
    Ok(())
}

/// Measures a fresh target; says why when that did not work.
pub(crate) fn run(case: &Case, name: &str, tool: &Tool, dir: &Path) -> Result<Figures, String> {
    let setting = Setting { base: dir.to_owned(), ..Setting::default() };
    let args: Vec<&str> = case.args.iter().copied().chain(["--clock-us", CLOCK_US]).collect();
    let mut target = Target::launch(&setting, case.workload, &args);
    settle(dir);
    track(&target, name, tool)?;

    target.reset_meter();
    let images = target.images("running");
    let outcome = succeed(dump(&target, name, tool, &images).arg("--leave-running").run())?;
    let told_us = told_us(tool, &outcome, &images);
    let freeze_us = well(&target)?.longest_pause_us;
    target.images("running");
    settle(dir);

    target.reset_meter();
    thread::sleep(outcome.wall);
    let idle_us = well(&target)?.longest_pause_us;

    let mut figures = Figures { idle_us, freeze_us, told_us, ..Figures::default() };
    for cache in [Cache::Cold, Cache::Warm] {
        let images = target.images("killed");
        target.processes();
        let dump_us = wall_us(&succeed(dump(&target, name, tool, &images).run())?);
        let begin = Instant::now();
        sync(dir);
        let durable_us = dump_us + u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX);
        target.await_gone();
        settle(dir);
        cache.prepare(&images).map_err(|error| format!("{}: {error}", images.display()))?;
        let restore_us = wall_us(&succeed(tool.restore(&images).arg("-d").run())?);
        well(&target)?;
        match cache {
            Cache::Cold => {
                (figures.dump_us, figures.durable_us) = (dump_us, durable_us);
                figures.image_bytes = size_of(&images);
                figures.restore_cold_us = restore_us;
            }
            Cache::Warm => figures.restore_warm_us = restore_us,
        }
    }
    Ok(figures)
}

/// Whether the kernel has an image in its page cache before a restore. After a reboot or on another machine it has
/// not; what a dump leaves there depends on how it writes.
#[derive(Clone, Copy)]
enum Cache {
    Cold,
    Warm,
}

impl Cache {
    fn prepare(self, images: &Path) -> io::Result<()> {
        for entry in fs::read_dir(images)? {
            let entry = entry?;
            if !entry.file_type()?.is_file() {
                continue;
            }
            let mut file = File::open(entry.path())?;
            match self {
                Self::Cold => {
                    nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
                }
                Self::Warm => _ = io::copy(&mut file, &mut io::sink())?,
            }
        }
        Ok(())
    }
}

/// Lets nothing that was written before be written during the measurement.
pub(crate) fn settle(dir: &Path) {
    sync(dir);
    thread::sleep(Duration::from_millis(200));
}

/// Waits until what was written is on the disk.
fn sync(dir: &Path) {
    if let Ok(file) = File::open(dir) {
        // SAFETY: the descriptor is live for the call.
        unsafe { libc::syncfs(file.as_raw_fd()) };
    }
}

/// A figure counts only when the target is well afterwards.
pub(crate) fn well(target: &Target) -> Result<Verdict, String> {
    let begin = Instant::now();
    let verdict = target.verdict();
    match verdict.ok && verdict.checks > 0 {
        true => Ok(verdict),
        false => Err(format!("the target finds itself changed after {:?}: {:?}", begin.elapsed(), verdict.failures)),
    }
}

pub(crate) fn succeed(outcome: Outcome) -> Result<Outcome, String> {
    if outcome.status == Some(0) { Ok(outcome) } else { Err(outcome.to_string()) }
}

fn wall_us(outcome: &Outcome) -> u64 {
    u64::try_from(outcome.wall.as_micros()).unwrap_or(u64::MAX)
}

/// Bytes of an image, without its logs.
fn size_of(images: &Path) -> u64 {
    let entries = fs::read_dir(images).into_iter().flatten().flatten();
    let is_log = |entry: &fs::DirEntry| entry.path().extension().is_some_and(|extension| extension == "log");
    entries.filter(|entry| !is_log(entry)).filter_map(|entry| Some(entry.metadata().ok()?.len())).sum()
}
