//! Signal actions and pending signals.

use crate::{
    error::{Context, Result},
    kernel::{proc::Status, ptrace},
    restore::program::Program,
    task::Remote,
};
use standstill_images::types::{LiveTask, SigAction};

/// Size of the kernel's sigset_t, as the rt_sig* calls want it.
const SIGSET: u64 = 8;
/// Size of the kernel's `struct sigaction`: handler, flags, restorer, mask.
const ACTION: u64 = 32;

/// Actions that are not the default. procfs says which are caught or ignored; the process itself says the rest.
pub(crate) fn actions(pid: i32, status: &Status, remote: &mut Remote) -> Result<Vec<SigAction>> {
    let set: Vec<i32> = (1..=64).filter(|s| (status.caught | status.ignored) & (1 << (s - 1)) != 0).collect();
    if set.is_empty() {
        return Ok(Vec::new());
    }
    let scratch = remote.scratch()?;
    for (n, &signal) in set.iter().enumerate() {
        let out = scratch + ACTION * n as u64;
        remote.syscall(pid, libc::SYS_rt_sigaction, [signal as u64, 0, out, SIGSET, 0, 0])?;
    }
    let mut bytes = vec![0u8; ACTION as usize * set.len()];
    remote.read(&mut bytes)?;
    Ok(set
        .iter()
        .zip(bytes.chunks_exact(ACTION as usize))
        .map(|(&signal, action)| {
            let word = |n: usize| u64::from_ne_bytes(action[8 * n..8 * n + 8].try_into().expect("eight bytes"));
            SigAction { signal, handler: word(0), flags: word(1), restorer: word(2), mask: word(3) }
        })
        .collect())
}

/// Gives the signals of a set their default action.
pub(crate) fn restore_default(set: u64, program: &mut Program) {
    for signal in (1..=64).filter(|s| set & (1 << (s - 1)) != 0) {
        let block = program.words(&[0; 4]);
        let args = [signal.into(), block, 0.into(), SIGSET.into()];
        program.call(format!("reset the action of signal {signal}"), libc::SYS_rt_sigaction, &args);
    }
}

/// Sets the actions; the others are the default already.
pub(crate) fn restore_actions(actions: &[SigAction], program: &mut Program) {
    for action in actions {
        let block = program.words(&[action.handler, action.flags, action.restorer, action.mask]);
        let args = [action.signal.into(), block, 0.into(), SIGSET.into()];
        program.call(format!("set the action of signal {}", action.signal), libc::SYS_rt_sigaction, &args);
    }
}

/// Signals queued for a thread (or for its whole process) as raw `siginfo_t`.
pub(crate) fn pending(tid: i32, shared: bool) -> Result<Vec<Vec<u8>>> {
    ptrace::pending(tid, shared).context(|| format!("read the pending signals of {tid}"))
}

/// Takes on a thread's own mask for a while, as what tells about it shall show it. Nothing is queued yet, and the tracer
/// keeps away what others send.
pub(crate) fn restore_mask(blocked: u64, program: &mut Program) {
    let mask = program.words(&[blocked]);
    let args = [libc::SIG_SETMASK.into(), mask, 0.into(), SIGSET.into()];
    program.call("set the signal mask", libc::SYS_rt_sigprocmask, &args);
}

/// Blocks all signals but the restorer's own breakpoint trap: what is queued next stays queued.
pub(crate) fn restore_block(program: &mut Program) {
    let mask = program.words(&[!(1 << (libc::SIGTRAP - 1))]);
    let args = [libc::SIG_SETMASK.into(), mask, 0.into(), SIGSET.into()];
    program.call("block signals", libc::SYS_rt_sigprocmask, &args);
}

fn number(info: &[u8]) -> i32 {
    i32::from_ne_bytes(info[..4].try_into().expect("siginfo_t begins with si_signo"))
}

/// Whether a SIGSTOP is under way: it came when the process was frozen. It cannot be blocked, so the restorer does not
/// queue it.
pub(crate) fn is_about_to_stop(live: &LiveTask) -> bool {
    let mut pending = live.pending.iter().chain(live.threads.iter().flat_map(|t| &t.pending));
    pending.any(|info| number(info) == libc::SIGSTOP)
}

/// Queues signals, all but SIGSTOP, for the process `pid` or, given a `tid`, for one thread.
pub(crate) fn restore_pending(pid: i32, tid: Option<i32>, pending: &[Vec<u8>], program: &mut Program) {
    for info in pending.iter().filter(|info| number(info) != libc::SIGSTOP) {
        let signal = number(info);
        let block = program.data(info);
        let label = format!("queue signal {signal}");
        match tid {
            None => program.call(label, libc::SYS_rt_sigqueueinfo, &[pid.into(), signal.into(), block]),
            Some(tid) => {
                program.call(label, libc::SYS_rt_tgsigqueueinfo, &[pid.into(), tid.into(), signal.into(), block]);
            }
        }
    }
}
