//! `standstill track`.

use crate::{Failure, args::TrackArgs, inspect::output, logging, terminal::leave_terminal};
use nix::{
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
    unistd::{ForkResult, fork, setsid},
};
use standstill_engine::observe::{ObserveError, Serving, Status};
use std::{
    io::{PipeWriter, Read, Write},
    os::fd::AsFd,
    path::Path,
};

impl From<ObserveError> for Failure {
    fn from(error: ObserveError) -> Self {
        let status = match &error {
            ObserveError::Tracked { .. } | ObserveError::NoProcess(_) => 3,
            ObserveError::Io { .. } => 7,
            _ => 6,
        };
        Self { status, text: error.to_string() }
    }
}

pub(crate) fn run(args: &TrackArgs) -> Result<u8, Failure> {
    if args.status {
        return status(args);
    }
    if args.daemon {
        return detach(args);
    }
    logging::start(&args.log, Path::new("."))?;
    serve(args, None)
}

/// What a tracker says about itself.
fn status(args: &TrackArgs) -> Result<u8, Failure> {
    let Some(status) = Status::ask(args.tree)? else {
        return Err(Failure { status: 3, text: format!("process {} is not tracked", args.tree) });
    };
    if args.json {
        output::json(&status)?;
        return Ok(0);
    }
    let c = &status.counters;
    let rows = [
        ("root", status.root.to_string()),
        ("tracker", status.tracker.to_string()),
        ("processes", status.processes.to_string()),
        ("since", format!("{} s", status.seconds)),
        ("births", format!("{} processes, {} threads", c.forks, c.threads)),
        ("programs", format!("{} begun", c.execs)),
        ("ends", format!("{} processes", c.exits)),
        ("mappings", format!("{} changes", c.memory)),
        ("signals", format!("{} sent", c.signals)),
        ("connections", format!("{} changes of state", c.connections)),
    ];
    let calls = match &c.calls {
        Some(c) => vec![
            ("descriptors", format!("{} changes", c.descriptors)),
            ("sockets", format!("{} changes", c.sockets)),
            ("signal actions", format!("{} changes", c.signal_actions)),
            ("timers", format!("{} changes", c.timers)),
            ("directories", format!("{} changes", c.fs)),
            ("attributes", format!("{} changes", c.attributes)),
        ],
        None => vec![("all else", "not watched, read by each dump: see --syscalls".into())],
    };
    let lines = rows.into_iter().chain(calls).map(|(name, value)| format!("{name:<15} {value}\n"));
    output::print(&lines.collect::<String>())?;
    Ok(0)
}

/// Tracks until the tree ends or a signal asks for the end. `ready` is told when tracking has begun.
fn serve(args: &TrackArgs, ready: Option<PipeWriter>) -> Result<u8, Failure> {
    let mut ends = SigSet::empty();
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().for_each(|signal| ends.add(signal));
    let failed = |what: &'static str| move |e: nix::Error| Failure::io(what, &e.into());
    ends.thread_block().map_err(failed("block signals"))?;
    let stop = SignalFd::with_flags(&ends, SfdFlags::SFD_CLOEXEC).map_err(failed("make a signalfd"))?;
    let mut serving = Serving::start(args.tree, args.scope.into())?;
    tracing::info!(root = args.tree, "tracking");
    if let Some(mut ready) = ready {
        leave_terminal().map_err(|e| Failure::io("leave the terminal", &e))?;
        // A parent that is gone does not want to know.
        let _ = ready.write_all(&[0]);
    }
    serving.run(stop.as_fd())?;
    Ok(0)
}

/// Tracks in a process of its own, once that has begun.
fn detach(args: &TrackArgs) -> Result<u8, Failure> {
    let (mut told, ready) = std::io::pipe().map_err(|e| Failure::io("make a pipe", &e))?;
    // SAFETY: this process has one thread.
    match unsafe { fork() }.map_err(|e| Failure::io("fork", &e.into()))? {
        ForkResult::Parent { child } => {
            drop(ready);
            let mut status = [0];
            match told.read(&mut status).map_err(|e| Failure::io("wait for the tracker", &e))? {
                0 => return Err(Failure { status: 1, text: "the tracker ended early".into() }),
                _ if status == [0] => {}
                _ => {
                    let mut text = String::new();
                    told.read_to_string(&mut text).map_err(|e| Failure::io("wait for the tracker", &e))?;
                    return Err(Failure { status: status[0], text });
                }
            }
            if args.json {
                output::json(&serde_json::json!({ "tracker": child.as_raw() }))?;
            } else {
                output::print(&format!("process {} is tracked by process {child}\n", args.tree))?;
            }
            Ok(0)
        }
        ForkResult::Child => {
            drop(told);
            let mut errors = ready.try_clone().map_err(|e| Failure::io("make a pipe", &e))?;
            let result = logging::start(&args.log, Path::new(".")).and_then(|()| {
                setsid().map_err(|e| Failure::io("setsid", &e.into()))?;
                serve(args, Some(ready))
            });
            match result {
                Ok(status) => Ok(status),
                // Whoever is still there to read it says it; later only the log does.
                Err(failure) => {
                    let text = [&[failure.status], failure.text.as_bytes()].concat();
                    let _ = errors.write_all(&text);
                    if logging::to_file() {
                        tracing::error!("Error: {}", failure.text);
                    }
                    std::process::exit(failure.status.into());
                }
            }
        }
    }
}
