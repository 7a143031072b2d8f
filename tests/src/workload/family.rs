//! The child processes of a workload that verify themselves.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use super::Checker;
use crate::verdict::Verdict;

/// How long a child may take for its verdict.
const LIMIT: Duration = Duration::from_secs(30);

/// Children that answer for themselves, each with the sequence number of its last verdict.
#[derive(Default)]
pub struct Family(Vec<(Pid, String, u64)>);

impl Family {
    /// Adds a child that writes its verdicts under this name.
    pub fn adopt(&mut self, pid: Pid, member: String) {
        self.0.push((pid, member, 0));
    }

    /// Asks every child for a verdict and takes them over.
    pub fn collect(&mut self, dir: &Path, checker: &Checker) {
        for (pid, member, _) in &self.0 {
            checker.works(&format!("signal {member}"), kill(*pid, Signal::SIGUSR1));
        }
        let limit = Instant::now() + LIMIT;
        for (pid, member, seq) in &mut self.0 {
            let Some(verdict) = await_verdict(dir, member, *seq, limit) else {
                checker.that(false, || format!("{member} (pid {pid}) gives no verdict"));
                continue;
            };
            checker.equal("pid of a child's verdict", &verdict.pid, &pid.as_raw());
            checker.merge(member, &verdict);
            *seq = verdict.seq;
        }
    }

    /// Ends every child, which makes it write a last verdict, and checks how it ended.
    pub fn end(&mut self, dir: &Path, checker: &Checker) {
        for (pid, member, _) in &self.0 {
            checker.works(&format!("end {member}"), kill(*pid, Signal::SIGTERM));
        }
        for (pid, member, _) in self.0.drain(..) {
            let status = loop {
                match waitpid(pid, None) {
                    Err(Errno::EINTR) => {}
                    other => break other,
                }
            };
            checker.equal(&format!("exit of {member}"), &status, &Ok(WaitStatus::Exited(pid, 0)));
            match Verdict::read(dir, &member) {
                Ok(Some(verdict)) => checker.merge(&member, &verdict),
                other => _ = checker.that(false, || format!("last verdict of {member}: {other:?}")),
            }
        }
    }
}

fn await_verdict(dir: &Path, member: &str, after: u64, limit: Instant) -> Option<Verdict> {
    loop {
        match Verdict::read(dir, member) {
            Ok(Some(verdict)) if verdict.seq > after => return Some(verdict),
            _ if Instant::now() > limit => return None,
            _ => thread::sleep(Duration::from_millis(2)),
        }
    }
}
