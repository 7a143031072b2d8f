//! Scheduling policy with its parameters, nice value, affinity, I/O priority (sched(7), ioprio_get(2)).

use crate::{
    error::{Context, Result},
    kernel::sys,
    restore::program::Program,
};
use standstill_images::types::{Deadline, Sched};

const SCHED_DEADLINE: u32 = 6;

/// Reads the scheduling of a thread, from outside.
pub(crate) fn collect(tid: i32) -> Result<Sched> {
    let attr = sys::sched_getattr(tid).context(|| format!("sched_getattr of {tid}"))?;
    let reset_on_fork = attr.sched_flags & libc::SCHED_FLAG_RESET_ON_FORK as u64 != 0;
    Ok(Sched {
        policy: attr.sched_policy | if reset_on_fork { libc::SCHED_RESET_ON_FORK as u32 } else { 0 },
        nice: attr.sched_nice,
        priority: attr.sched_priority,
        affinity: sys::sched_getaffinity(tid).context(|| format!("sched_getaffinity of {tid}"))?,
        ioprio: sys::ioprio_get(tid).context(|| format!("ioprio_get of {tid}"))?,
    })
}

/// The parameters of SCHED_DEADLINE, if that is the policy of a thread.
pub(crate) fn deadline(tid: i32, sched: &Sched) -> Result<Option<Deadline>> {
    if policy(sched) != SCHED_DEADLINE {
        return Ok(None);
    }
    let attr = sys::sched_getattr(tid).context(|| format!("sched_getattr of {tid}"))?;
    Ok(Some(Deadline {
        flags: attr.sched_flags & !(libc::SCHED_FLAG_RESET_ON_FORK as u64),
        runtime: attr.sched_runtime,
        deadline: attr.sched_deadline,
        period: attr.sched_period,
    }))
}

fn policy(sched: &Sched) -> u32 {
    sched.policy & !(libc::SCHED_RESET_ON_FORK as u32)
}

/// Sets what differs from `own`, the restorer's scheduling, which every task starts with.
pub(crate) fn restore(sched: &Sched, deadline: Option<Deadline>, own: &Sched, program: &mut Program) {
    if sched.affinity != own.affinity {
        let mut mask = sched.affinity.clone();
        mask.resize(mask.len().next_multiple_of(8), 0);
        let block = program.data(&mask);
        // The machine of the restore may have other CPUs: then the task runs where it can.
        program.try_call("set the CPU affinity", libc::SYS_sched_setaffinity, &[0.into(), mask.len().into(), block]);
    }
    if sched.ioprio != own.ioprio {
        program.call(
            "set the I/O priority",
            libc::SYS_ioprio_set,
            &[1.into(), 0.into(), u64::from(sched.ioprio).into()],
        );
    }
    if (sched.policy, sched.nice, sched.priority) != (own.policy, own.nice, own.priority) {
        let reset = sched.policy & libc::SCHED_RESET_ON_FORK as u32 != 0;
        let flags = if reset { libc::SCHED_FLAG_RESET_ON_FORK as u64 } else { 0 };
        let nice = u64::from(sched.nice as u32) | u64::from(sched.priority) << 32;
        let Deadline { flags: more, runtime, deadline, period } = deadline.unwrap_or_default();
        let head = 48 | u64::from(policy(sched)) << 32; // struct sched_attr: size, policy
        let block = program.words(&[head, flags | more, nice, runtime, deadline, period]);
        program.call("set the scheduling policy", libc::SYS_sched_setattr, &[0.into(), block, 0.into()]);
    }
}
