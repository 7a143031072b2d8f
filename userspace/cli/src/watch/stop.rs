//! Signals that ask for the end.

use crate::Failure;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use std::sync::atomic::{AtomicBool, Ordering};

static ASKED: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_: libc::c_int) {
    ASKED.store(true, Ordering::Relaxed);
}

/// Notes the signals instead of dying of them, so that the terminal can be restored.
pub(super) fn on_signals() -> Result<(), Failure> {
    let action = SigAction::new(SigHandler::Handler(note), SaFlags::empty(), SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT] {
        // SAFETY: the handler only stores to an atomic.
        unsafe { sigaction(signal, &action) }.map_err(|e| Failure::io("sigaction", &e.into()))?;
    }
    Ok(())
}

/// Whether such a signal came.
pub(super) fn asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}
