//! Both readers look at the same processes and have to see the same.

mod aliases;
mod attributes;
mod files;
mod namespaces;
mod restless;
mod sockets;
mod threads;
mod track;
mod victim;
mod vmas;

use super::{Iterators, iter::ONE_BY_ONE};

/// The iterators; `None` where they do not work and need not.
fn iterators() -> Option<Iterators> {
    match Iterators::load() {
        Ok(iterators) => Some(iterators),
        Err(e) => {
            skip(&e.to_string());
            None
        }
    }
}

/// The processes among so many others that all are read at once. The others do not exist: PID_MAX_LIMIT is 4 Mi.
fn among_many(pids: &[i32]) -> Vec<i32> {
    (5_000_000..).take(ONE_BY_ONE).chain(pids.iter().copied()).collect()
}

/// Says that a test, or a part of it, is left out; fails if nothing may be (STANDSTILL_REQUIRE_ALL).
fn skip(reason: &str) {
    assert!(std::env::var_os("STANDSTILL_REQUIRE_ALL").is_none_or(|v| v != "1"), "{reason}");
    println!("SKIPPED: {reason}");
}
