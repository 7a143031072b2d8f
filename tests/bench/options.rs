//! Command line of the benchmark.

use std::path::PathBuf;

use crate::cases::{self, Case};

pub(crate) const HELP: &str = "\
Measures how long a target stands still during a dump, and what dump and restore take.

Usage: scripts/bench [options]

  --criu PATH   also measure CRIU, in turn with Standstill, and print ratios
  --tracker     also measure dumps of a target that has a tracker
  --precopy     also measure dumps with --precopy
  --seconds N   length of one run of server (default 60) and small-20hz (default 30)
  --rate N      requests a second of server (default 50000); throughput is measured without a rate
  --tracking-cost
                measure only what a tracker costs its target: redis under load, and make -j2
  --prediction  measure only how near the freezes that `watch` predicts are to those of dumps that follow, with and
                without a tracker, as `dump` copies memory before the freeze and with --precopy=0: fds-15000
                vmas-20000 processes-300 threads-1000 heap-64m, and a redis-server that idles
  --case NAME   only this case (may be repeated): heap-64m heap-1g fds-1000 fds-15000
                vmas-20000 threads-100 threads-1000 processes-300
                and only when named:
                  heap-1g-idle, writer-4g (4 GiB, 2,000 pages/s written)
                  shared-512m     shared memory of two processes, 1,000 pages/s written by each
                  server          latencies and throughput with a snapshot every 2 s and without
                  small-20hz      20 snapshots a second of 64 MiB, random ones of which are restored
                  tracking-curve  what tracking costs a program that writes 1 GiB from end to end
  --runs N      runs of each case (default 5)
  --json FILE   write every single figure to a file
  --dir DIR     directory for targets and images (default /var/tmp)

The binary measured is the release build, or the one named by STANDSTILL.
freeze   longest pause of the target's own clock loop during `dump --leave-running`
told     the same dump's freeze as the tool tells it
dump     wall time of a dump that kills the target
durable  until the image of such a dump is on the disk (Standstill's dump waits for that, CRIU's does not)
restore  wall time of `restore -d`: cold = nothing of the image in the page cache, warm = all of it
idle     longest pause of the clock loop without a dump, for as long as a dump takes
";

/// What the command line asks for.
pub(crate) struct Options {
    pub(crate) criu: Option<PathBuf>,
    pub(crate) tracker: bool,
    pub(crate) precopy: bool,
    pub(crate) seconds: Option<u64>,
    pub(crate) rate: u64,
    pub(crate) tracking_cost: bool,
    pub(crate) prediction: bool,
    pub(crate) runs: usize,
    pub(crate) json: Option<PathBuf>,
    pub(crate) dir: PathBuf,
    cases: Vec<String>,
}

impl Options {
    /// Reads the command line; none when help was asked for.
    pub(crate) fn parse() -> Result<Option<Self>, String> {
        let mut options = Self {
            criu: None,
            tracker: false,
            precopy: false,
            seconds: None,
            rate: 50_000,
            tracking_cost: false,
            prediction: false,
            runs: 5,
            json: None,
            dir: "/var/tmp".into(),
            cases: Vec::new(),
        };
        let mut args = std::env::args().skip(1);
        while let Some(name) = args.next() {
            if matches!(name.as_str(), "-h" | "--help") {
                return Ok(None);
            }
            let flag = match name.as_str() {
                "--tracker" => Some(&mut options.tracker),
                "--precopy" => Some(&mut options.precopy),
                "--tracking-cost" => Some(&mut options.tracking_cost),
                _ => None,
            };
            if let Some(flag) = flag {
                *flag = true;
                continue;
            }
            if name == "--prediction" {
                options.prediction = true;
                continue;
            }
            let value = args.next().ok_or_else(|| format!("{name}: unknown, or its value is missing"))?;
            match name.as_str() {
                "--criu" => options.criu = Some(value.into()),
                "--json" => options.json = Some(value.into()),
                "--dir" => options.dir = value.into(),
                "--runs" => options.runs = number(&name, &value)? as usize,
                "--seconds" => options.seconds = Some(number(&name, &value)?),
                "--rate" => options.rate = number(&name, &value)?,
                "--case" if is_case(&value) => options.cases.push(value),
                "--case" => return Err(format!("--case {value}: no such case")),
                _ => return Err(format!("{name}: unknown option")),
            }
        }
        if options.runs == 0 {
            return Err("--runs 0: nothing to do".to_owned());
        }
        Ok(Some(options))
    }

    /// True when a case was asked for, or none was named and it is no long one.
    pub(crate) fn wants(&self, case: &Case) -> bool {
        self.names(case.name) || (self.cases.is_empty() && !case.only_named)
    }

    /// True when something was asked for by its name.
    pub(crate) fn names(&self, case: &str) -> bool {
        self.cases.iter().any(|name| name == case)
    }
}

fn number(name: &str, value: &str) -> Result<u64, String> {
    value.parse().map_err(|_| format!("{name} {value}: not a number"))
}

fn is_case(name: &str) -> bool {
    cases::OTHERS.contains(&name) || cases::ALL.iter().any(|case| case.name == name)
}
