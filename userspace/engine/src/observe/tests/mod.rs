//! Both readers look at the same processes and have to see the same.

mod figures;
mod files;
mod threads;
mod victim;
mod vmas;

use super::{Iterators, ObserveError};

/// The iterators; `None` and a word about it where they do not work and need not (STANDSTILL_REQUIRE_ALL).
fn iterators() -> Option<Iterators> {
    match Iterators::load() {
        Ok(iterators) => Some(iterators),
        Err(ObserveError::Load { program, reason }) if !reason.contains("not supported") => {
            panic!("program {program} should load: {reason}")
        }
        Err(e) if std::env::var_os("STANDSTILL_REQUIRE_ALL").is_some_and(|v| v == "1") => panic!("{e}"),
        Err(e) => {
            println!("SKIPPED: {e}");
            None
        }
    }
}
