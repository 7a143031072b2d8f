//! The loop in which a workload is told what to do.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use nix::unistd::Pid;

use super::family::Family;
use super::{Args, Checker, Meter};

/// Why a round of verification is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Nobody asked: compare what can be compared without changing anything.
    Idle,
    /// A verdict is due: verify everything, also by using it.
    Verdict,
    /// The same for the last time: the process ends after this round.
    End,
}

impl Request {
    /// True when a verdict is due.
    pub fn thorough(self) -> bool {
        self != Self::Idle
    }
}

/// Longest life of a workload whose test has gone away without stopping it.
const MAX_LIFE: Duration = Duration::from_secs(900);

/// What the meter says when a verdict is asked for, before the verification for it disturbs the clock loop.
#[derive(Default)]
struct Pauses {
    longest_us: u64,
    paused_us: u64,
}

impl Pauses {
    fn now(meter: Option<&Meter>) -> Self {
        let Some(meter) = meter else { return Self::default() };
        meter.catch_up();
        Self { longest_us: meter.longest_us(), paused_us: meter.paused_us() }
    }
}

/// One process of a workload, as seen by the test that drives it.
pub struct Control {
    name: &'static str,
    member: String,
    dir: PathBuf,
    seq: u64,
    /// What this process has verified.
    pub checker: Arc<Checker>,
    signals: SigSet,
    family: Family,
    exit_status: i32,
    on_reset: Option<Box<dyn FnMut()>>,
}

impl Control {
    /// Takes over the control signals. Call it before any thread is started: they inherit the mask.
    pub fn new(name: &'static str, args: &Args) -> Self {
        let mut signals = SigSet::empty();
        for signal in [Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGTERM] {
            signals.add(signal);
        }
        signals.thread_block().expect("block the control signals");
        Self { exit_status: args.value("exit-status", 0), ..Self::with(name, "root", args.dir(), signals) }
    }

    fn with(name: &'static str, member: &str, dir: PathBuf, signals: SigSet) -> Self {
        let member = member.to_owned();
        let (checker, family) = (Arc::default(), Family::default());
        Self { name, member, dir, seq: 0, checker, signals, family, exit_status: 0, on_reset: None }
    }

    /// The same for a process forked by the workload, with a verdict of its own.
    pub fn for_child(&self, member: &str) -> Self {
        Self::with(self.name, member, self.dir.clone(), self.signals)
    }

    /// The same for a process that will have the workload's directory as its root directory.
    pub fn for_jailed_child(&self, member: &str) -> Self {
        Self::with(self.name, member, PathBuf::from("/"), self.signals)
    }

    /// Has something called when the figures shall begin anew, besides the pause meter's reset.
    pub fn on_reset(&mut self, action: impl FnMut() + 'static) {
        self.on_reset = Some(Box::new(action));
    }

    /// Makes a child process answer to this one: it is asked for its verdict with each verdict of this process, and
    /// ended with it.
    pub fn adopt(&mut self, pid: Pid, member: &str) {
        self.family.adopt(pid, member.to_owned());
    }

    /// Asks every adopted child for a verdict now.
    pub fn collect(&mut self) {
        self.family.collect(&self.dir, &self.checker);
    }

    /// Says that the state is set up.
    pub fn ready(&self) {
        let mut out = std::io::stdout().lock();
        out.write_all(b"READY\n").and_then(|()| out.flush()).expect("print READY");
    }

    /// Serves requests until `SIGTERM`, calling `round` every `every` and for each verdict. Never returns: the process
    /// exits with `--exit-status` (default 0), or 1 when something was wrong.
    pub fn serve(mut self, meter: Option<&Meter>, every: Duration, mut round: impl FnMut(Request)) -> ! {
        let started = std::time::Instant::now();
        while started.elapsed() < MAX_LIFE {
            match self.next_signal(every) {
                None => round(Request::Idle),
                Some(libc::SIGUSR2) => {
                    let pauses = Pauses::now(meter);
                    if let Some(meter) = meter {
                        meter.reset();
                    }
                    if let Some(action) = &mut self.on_reset {
                        action();
                    }
                    self.write(&pauses);
                }
                Some(libc::SIGTERM) => {
                    let pauses = Pauses::now(meter);
                    round(Request::End);
                    self.family.end(&self.dir, &self.checker);
                    let ok = self.write(&pauses);
                    std::process::exit(if ok { self.exit_status } else { 1 });
                }
                Some(_) => {
                    let pauses = Pauses::now(meter);
                    round(Request::Verdict);
                    self.collect();
                    self.write(&pauses);
                }
            }
        }
        std::process::exit(3);
    }

    fn next_signal(&self, timeout: Duration) -> Option<i32> {
        let limit = libc::timespec { tv_sec: timeout.as_secs().cast_signed(), tv_nsec: timeout.subsec_nanos().into() };
        // SAFETY: both pointers are to live values of the right type, and a null siginfo is allowed.
        let signal = unsafe { libc::sigtimedwait(self.signals.as_ref(), std::ptr::null_mut(), &raw const limit) };
        (signal > 0).then_some(signal)
    }

    fn write(&mut self, pauses: &Pauses) -> bool {
        self.seq += 1;
        let mut verdict = self.checker.verdict(self.name);
        verdict.seq = self.seq;
        verdict.longest_pause_us = pauses.longest_us;
        verdict.paused_us = pauses.paused_us;
        if let Err(error) = verdict.write(&self.dir, &self.member) {
            eprintln!("{}: cannot write the verdict: {error}", self.member);
        }
        verdict.ok
    }
}
