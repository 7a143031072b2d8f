//! Threads: registers, extended state, and what the kernel keeps per thread for user space.

use super::{attributes, creds, sched, seccomp, signals};
use crate::{
    error::{Context, Result},
    kernel::{
        arch::{self, Registers},
        proc, ptrace, sys,
    },
    observe::{RestartBlock, ThreadState},
    restore::program::{Arg, Program},
    task::Remote,
};
use standstill_images::types::{
    AltStack, Bytes, Context as CpuContext, Restart, Rseq, Sched, Thread, ThreadAttributes,
};

/// Reads a stopped thread: its registers, and what the observer did not see. `securebits`: those of the leader.
/// `timed`: timers may have sent it signals since.
pub(crate) fn collect(
    pid: i32,
    tid: i32,
    seen: Option<&ThreadState>,
    remote: &mut Remote,
    securebits: Option<u32>,
    timed: bool,
    filters: &mut seccomp::Collected,
) -> Result<(Thread, ThreadAttributes)> {
    let (mode, creds, status) = match seen {
        Some(ThreadState { seccomp: Some(mode), creds: Some(creds), .. }) => (*mode, creds.clone(), None),
        _ => {
            let status = proc::status(pid, tid).context(|| format!("read the status of thread {tid}"))?;
            let securebits = match (seen, securebits) {
                (Some(t), _) => t.securebits,
                (_, Some(bits)) => bits,
                _ => creds::ask_securebits(tid, remote)?,
            };
            (status.seccomp, creds::of(&status, securebits), Some(status))
        }
    };
    filters.thread(pid, tid, mode)?;
    let (altstack, clear_child_tid, pdeath_signal) = match seen {
        Some(t) => (t.altstack, t.clear_child_tid, t.pdeath_signal),
        None => ask(tid, remote)?,
    };
    let rseq = match seen.and_then(|t| t.rseq) {
        Some(rseq) => rseq,
        None => ptrace::rseq(tid).map(rseq).context(|| format!("read the rseq registration of thread {tid}"))?,
    };
    let sched = match seen.and_then(|t| t.sched.clone()) {
        Some(sched) => sched,
        None => sched::collect(tid)?,
    };
    let mut attributes =
        attributes::collect_thread(tid, seen, status.as_ref(), mode == libc::SECCOMP_MODE_STRICT, remote)?;
    attributes.deadline = sched::deadline(tid, &sched)?;
    let blocked = match seen.and_then(|t| t.blocked) {
        Some(mask) => mask,
        None => ptrace::sigmask(tid).context(|| format!("read the signal mask of thread {tid}"))?,
    };
    let (comm, robust_list, timerslack_ns) = match seen {
        Some(t) => (t.comm.clone(), t.robust_list, t.timerslack_ns),
        None => (
            comm(pid, tid)?,
            sys::get_robust_list(tid).context(|| format!("get_robust_list of thread {tid}"))?,
            proc::number(&proc::path(tid, "timerslack_ns")).unwrap_or(50_000),
        ),
    };
    let mut pending = Vec::new();
    if timed || seen.is_none_or(|t| t.pending) {
        pending = signals::pending(tid, false)?;
    }
    let regs = remote.registers(tid).context(|| format!("read the registers of thread {tid}"))?;
    let xstate = ptrace::regset(tid, arch::NT_X86_XSTATE).context(|| format!("read the xstate of thread {tid}"))?;
    let thread = Thread {
        tid,
        comm,
        restart: restart(&regs, seen),
        context: regs.context(xstate),
        blocked,
        pending,
        altstack,
        clear_child_tid,
        robust_list,
        rseq: (rseq.address != 0).then_some(rseq),
        pdeath_signal,
        creds,
        sched,
        timerslack_ns,
    };
    Ok((thread, attributes))
}

/// What is left of a leader that has exited, whose process lives in threads like `other`.
pub(crate) fn collect_dead(pid: i32, other: &Thread) -> Result<Thread> {
    let status = proc::status(pid, pid).context(|| format!("read the status of {pid}"))?;
    // It will not run any more.
    let CpuContext::X86_64 { xstate, .. } = &other.context;
    Ok(Thread {
        tid: pid,
        comm: comm(pid, pid)?,
        restart: Restart::Registers,
        context: CpuContext::X86_64 { regs: [0; 27], xstate: xstate.clone() },
        blocked: 0,
        pending: Vec::new(),
        altstack: AltStack { flags: libc::SS_DISABLE, ..Default::default() },
        clear_child_tid: 0,
        robust_list: (0, 0),
        rseq: None,
        pdeath_signal: 0,
        creds: creds::of(&status, other.creds.securebits),
        sched: other.sched.clone(),
        timerslack_ns: other.timerslack_ns,
    })
}

fn comm(pid: i32, tid: i32) -> Result<Bytes> {
    let path = proc::path(pid, &format!("task/{tid}/comm"));
    let line = std::fs::read(path).context(|| format!("read the name of thread {tid}"))?;
    Ok(line.strip_suffix(b"\n").unwrap_or(&line).into())
}

fn rseq(conf: ptrace::RseqConfiguration) -> Rseq {
    Rseq { address: conf.address, size: conf.size, signature: conf.signature }
}

fn ask(tid: i32, remote: &mut Remote) -> Result<(AltStack, u64, i32)> {
    let out = remote.scratch()?;
    remote.syscall(tid, libc::SYS_sigaltstack, [0, out, 0, 0, 0, 0])?;
    remote.syscall(tid, libc::SYS_prctl, [libc::PR_GET_TID_ADDRESS as u64, out + 24, 0, 0, 0, 0])?;
    remote.syscall(tid, libc::SYS_prctl, [libc::PR_GET_PDEATHSIG as u64, out + 32, 0, 0, 0, 0])?;
    let mut bytes = [0u8; 36];
    remote.read(&mut bytes)?;
    let word = |n: usize| u64::from_ne_bytes(bytes[n..n + 8].try_into().expect("eight bytes"));
    let half = |n: usize| i32::from_ne_bytes(bytes[n..n + 4].try_into().expect("four bytes"));
    // SS_ONSTACK only says where the thread happens to be.
    let altstack = AltStack { sp: word(0), flags: half(8) & !libc::SS_ONSTACK, size: word(16) };
    Ok((altstack, word(24), half(32)))
}

/// What a thread sets up for itself, except credentials. `own`: what the restorer has of the same.
pub(crate) fn restore(
    (thread, attributes): (&Thread, &ThreadAttributes),
    own: (&Sched, &ThreadAttributes),
    program: &mut Program,
) {
    let name = program.string(&thread.comm.0);
    program.call("set the name", libc::SYS_prctl, &[libc::PR_SET_NAME.into(), name]);
    let stack = program.words(&[thread.altstack.sp, u64::from(thread.altstack.flags as u32), thread.altstack.size]);
    program.call("set the alternate signal stack", libc::SYS_sigaltstack, &[stack, 0.into()]);
    program.call("set the tid address", libc::SYS_set_tid_address, &[thread.clear_child_tid.into()]);
    if thread.robust_list.0 != 0 {
        let (head, len) = thread.robust_list;
        program.call("set the robust list", libc::SYS_set_robust_list, &[head.into(), len.into()]);
    }
    if let Some(rseq) = &thread.rseq {
        let args = [rseq.address.into(), rseq.size.into(), 0.into(), rseq.signature.into()];
        program.call("register rseq", libc::SYS_rseq, &args);
    }
    program.call(
        "set the timer slack",
        libc::SYS_prctl,
        &[libc::PR_SET_TIMERSLACK.into(), thread.timerslack_ns.into()],
    );
    attributes::restore_thread(attributes, own.1, program);
    sched::restore(&thread.sched, attributes.deadline, own.0, program);
}

/// Sets the signal sent when the parent dies; after the credentials, whose change clears it.
pub(crate) fn restore_pdeath_signal(thread: &Thread, program: &mut Program) {
    program.call(
        "set the parent-death signal",
        libc::SYS_prctl,
        &[libc::PR_SET_PDEATHSIG.into(), thread.pdeath_signal.into()],
    );
}

/// The registers of an image.
pub(crate) fn registers(context: &CpuContext) -> (Registers, &[u8]) {
    match context {
        CpuContext::X86_64 { regs, xstate } => (Registers::from_words(regs), xstate),
    }
}

/// What an interrupted wait needs to be entered again.
fn restart(regs: &Registers, seen: Option<&ThreadState>) -> Restart {
    let Some(nr) = regs.interrupted_syscall().filter(|_| regs.uses_restart_block()) else { return Restart::Registers };
    let args = regs.arguments();
    let remaining_ns = seen.and_then(|t| t.remaining_ns);
    if nr != libc::SYS_restart_syscall {
        return Restart::Call { nr, args, remaining_ns };
    }
    // Interrupted once before: the number is gone, but the restart_block tells, and the other registers are as they
    // were.
    match seen.map(|t| t.restart) {
        Some(RestartBlock::Nanosleep { clock, rmtp, .. }) => {
            Restart::Call { nr: libc::SYS_clock_nanosleep, args: [clock as u64, 0, 0, rmtp, 0, 0], remaining_ns }
        }
        Some(RestartBlock::Futex { .. }) => Restart::Call { nr: libc::SYS_futex, args, remaining_ns },
        Some(RestartBlock::Poll { ufds, nfds, expires_ns }) => {
            // Without a limit the timeout is negative.
            let forever = if expires_ns.is_none() { u64::MAX } else { 0 };
            Restart::Call { nr: libc::SYS_poll, args: [ufds, nfds.into(), forever, 0, 0, 0], remaining_ns }
        }
        _ => Restart::Unknown,
    }
}

/// Enters a wait with a timeout again before the registers are set; whether there is one.
///
/// The kernel keeps the end of such a wait in the thread's restart_block, which nobody can write. So the restorer makes
/// the same call with the time that was left, the tracer interrupts it at once, and the kernel fills the block itself.
pub(crate) fn restore_wait(thread: &Thread, program: &mut Program) -> bool {
    const FUTEX_CMD_MASK: u64 = !(libc::FUTEX_PRIVATE_FLAG as u64 | libc::FUTEX_CLOCK_REALTIME as u64);
    let Restart::Call { nr, args, remaining_ns } = thread.restart else { return false };
    let mut values: [Arg; 6] = args.map(Arg::Value);
    let timespec = |program: &mut Program, ns: u64| program.words(&[ns / 1_000_000_000, ns % 1_000_000_000]);
    match (nr, remaining_ns) {
        (libc::SYS_nanosleep, Some(ns)) => values[0] = timespec(program, ns),
        (libc::SYS_clock_nanosleep, Some(ns)) => values[2] = timespec(program, ns),
        (libc::SYS_poll, Some(ns)) => values[2] = ns.div_ceil(1_000_000).into(),
        // Only plain FUTEX_WAIT counts from now; the others name the end.
        (libc::SYS_futex, Some(ns)) if args[1] & FUTEX_CMD_MASK == libc::FUTEX_WAIT as u64 => {
            values[3] = timespec(program, ns);
        }
        // The rest of the wait is not known: it begins again.
        _ => {}
    }
    program.try_call("enter the interrupted wait again", nr, &values);
    true
}
