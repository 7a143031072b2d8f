//! `standstill restore`.

use crate::{Failure, args::RestoreArgs, logging, progress};
use nix::{
    sys::{
        signal::{SigSet, Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use standstill_engine::{At, CgroupOptions, Image, RestoreOptions, find, list, restore};
use standstill_images::publish::MANIFEST;
use std::{fs::OpenOptions, io::Write, os::unix::fs::OpenOptionsExt, path::PathBuf};

const PAGE: u64 = 4096;

pub(crate) fn run(args: &RestoreArgs) -> Result<u8, Failure> {
    logging::start(&args.log, &args.images_dir)?;
    let image = Image::open(&directory(args)?)?;
    if image.inventory.shell_job && !args.shell_job {
        return Err(Failure {
            status: 2,
            text: "the image is that of a shell job: restore it with --shell-job from a shell".into(),
        });
    }
    // Signals for the tree must not be lost between its start and the loop that forwards them.
    let forwarded = SigSet::all();
    if !args.restore_detached && !args.dry_run {
        forwarded.thread_block().map_err(|e| Failure::io("block signals", &e.into()))?;
    }
    let options = RestoreOptions {
        dry_run: args.dry_run,
        cgroups: CgroupOptions { mode: args.manage_cgroups.into(), roots: args.cgroup_root.clone() },
        time_namespace: args.timens.into(),
    };
    let total = image.spaces.values().flat_map(|space| &space.pages).map(|run| run.pages * PAGE).sum();
    let filled = || Some((resident(&image).min(total), total));
    let restored = progress::during(args.json || args.dry_run, filled, || restore(&image, &options))?;
    if let Some(plan) = &restored.plan {
        print!("{plan}");
        return Ok(0);
    }
    if let Some(pidfile) = &args.pidfile {
        let path = args.images_dir.join(pidfile);
        let write = || -> std::io::Result<()> {
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path)?;
            write!(file, "{}", restored.root)
        };
        write().map_err(|e| Failure::io(&path.display().to_string(), &e))?;
    }
    if args.json {
        println!("{}", serde_json::json!({ "pid": restored.root, "elapsed_us": restored.elapsed_us }));
    } else if args.display_stats {
        println!("restored        {:.2} ms", restored.elapsed_us as f64 / 1000.0);
    }
    if args.restore_detached {
        return Ok(0);
    }
    stay(Pid::from_raw(restored.root), &forwarded)
}

/// Memory that the tree's processes have so far, in bytes.
fn resident(image: &Image) -> u64 {
    let pages = |pid: &i32| -> Option<u64> {
        let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
        statm.split(' ').nth(1)?.parse().ok()
    };
    image.tasks.keys().filter_map(pages).sum::<u64>() * PAGE
}

/// Where the image is: the directory itself, or one of its checkpoints.
fn directory(args: &RestoreArgs) -> Result<PathBuf, Failure> {
    let dir = &args.images_dir;
    let at = match args.at {
        None if dir.join(MANIFEST).exists() || list(dir)?.is_empty() => return Ok(dir.clone()),
        at => at.unwrap_or(At::Latest),
    };
    Ok(find(dir, at)?.dir)
}

/// Forwards signals to the root and ends as it does.
fn stay(root: Pid, signals: &SigSet) -> Result<u8, Failure> {
    loop {
        match waitpid(root, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, code)) => return Ok(code as u8),
            Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(128 + signal as u8),
            Ok(_) => {}
            Err(e) => return Err(Failure::io("wait for the restored tree", &e.into())),
        }
        match signals.wait() {
            Ok(Signal::SIGCHLD) => {}
            Ok(signal) => {
                // The tree may have ended meanwhile: the next round sees it.
                let _ = kill(root, signal);
            }
            Err(e) => return Err(Failure::io("wait for signals", &e.into())),
        }
    }
}
