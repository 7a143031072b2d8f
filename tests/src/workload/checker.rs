//! Collects what a workload compared and what was wrong.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::verdict::Verdict;

/// Failures kept; more say nothing new.
const MAX_FAILURES: usize = 40;

/// Counts comparisons and remembers those that failed. Shared by all threads of a process.
#[derive(Default)]
pub struct Checker {
    checks: AtomicU64,
    failures: Mutex<Vec<String>>,
    notes: Mutex<BTreeMap<String, u64>>,
}

impl Checker {
    /// Counts one comparison; `what` describes it when it failed.
    pub fn that(&self, ok: bool, what: impl FnOnce() -> String) -> bool {
        self.checks.fetch_add(1, Ordering::Relaxed);
        if !ok {
            let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
            if failures.len() < MAX_FAILURES {
                failures.push(what());
            }
        }
        ok
    }

    /// Compares two values.
    pub fn equal<T: PartialEq + Debug>(&self, what: &str, got: &T, want: &T) -> bool {
        self.that(got == want, || format!("{what}: is {got:?}, should be {want:?}"))
    }

    /// Records a system call that should have worked, and hands on its value.
    pub fn works<T, E: Debug>(&self, what: &str, result: Result<T, E>) -> Option<T> {
        match result {
            Ok(value) => {
                self.that(true, String::new);
                Some(value)
            }
            Err(error) => {
                self.that(false, || format!("{what}: {error:?}"));
                None
            }
        }
    }

    /// Adds to a figure that is neither right nor wrong.
    pub fn note(&self, name: &str, add: u64) {
        let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        *notes.entry(name.to_owned()).or_default() += add;
    }

    /// Sets a figure that is neither right nor wrong.
    pub fn figure(&self, name: &str, value: u64) {
        let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        notes.insert(name.to_owned(), value);
    }

    /// Takes over the verdict of another process of the same workload.
    pub fn merge(&self, member: &str, verdict: &Verdict) {
        self.checks.fetch_add(verdict.checks, Ordering::Relaxed);
        self.that(verdict.checks > 0, || format!("{member} checked nothing"));
        for failure in &verdict.failures {
            self.that(false, || format!("{member}: {failure}"));
        }
    }

    /// The verdict so far, without the parts that the checker does not know.
    pub fn verdict(&self, workload: &str) -> Verdict {
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Verdict {
            workload: workload.to_owned(),
            pid: std::process::id().cast_signed(),
            ok: failures.is_empty(),
            checks: self.checks.load(Ordering::Relaxed),
            failures,
            notes: self.notes.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            ..Verdict::default()
        }
    }
}
