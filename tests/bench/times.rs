//! What a target's time went into.

use std::fs;

use nix::unistd::{Pid, SysconfVar, sysconf};
use serde_json::Value;
use standstill_tests::harness::proc;
use standstill_tests::workload::proc_stat_fields;

/// Seconds that the busiest thread of a process had, and that the host took from the whole machine.
#[derive(Clone, Copy, Default)]
pub(crate) struct Times {
    user: f64,
    system: f64,
    waiting: f64,
    stolen: f64,
}

/// Names of the shares, with what they are printed as.
pub(crate) const SHARES: [(&str, &str); 4] = [
    ("user", "its own code"),
    ("system", "in the kernel"),
    ("waiting", "waiting for a processor"),
    ("stolen", "stolen"),
];

impl Times {
    /// Up to now.
    pub(crate) fn of(pid: Pid) -> Self {
        let hertz = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100) as f64;
        let thread = |thread: Pid| {
            let file = |name: &str| format!("/proc/{pid}/task/{thread}/{name}");
            let stat = proc_stat_fields(&file("stat")).ok()?;
            // Fields 14 and 15 of proc(5); in schedstat the second is the time in the queue, in ns.
            let ticks = |field: usize| stat.get(field - 3)?.parse::<f64>().ok();
            let schedstat = fs::read_to_string(file("schedstat")).ok()?;
            let waiting = schedstat.split_whitespace().nth(1)?.parse::<f64>().ok()? / 1e9;
            Some(Self { user: ticks(14)? / hertz, system: ticks(15)? / hertz, waiting, stolen: 0.0 })
        };
        let threads = proc::threads(pid).into_iter().filter_map(thread);
        let busiest = threads.max_by(|a, b| a.user.total_cmp(&b.user)).unwrap_or_default();
        let machine = fs::read_to_string("/proc/stat").unwrap_or_default();
        let stolen = machine.split_whitespace().nth(8).and_then(|ticks| ticks.parse::<f64>().ok());
        Self { stolen: stolen.unwrap_or_default() / hertz, ..busiest }
    }

    /// Adds to some figures which shares of so many seconds were spent since an earlier time.
    pub(crate) fn note(&self, since: &Self, seconds: f64, figures: &mut Value) {
        let spent = [
            self.user - since.user,
            self.system - since.system,
            self.waiting - since.waiting,
            self.stolen - since.stolen,
        ];
        for ((name, _), spent) in SHARES.iter().zip(spent) {
            figures[*name] = (spent / seconds).into();
        }
    }
}
