//! Priority over the rest of the machine, for as long as somebody stands still because of us.

/// The calling thread, and those that it starts, come before all ordinary ones (sched(7), SCHED_RR) until this is dropped.
/// Without permission for that (CAP_SYS_NICE or RLIMIT_RTPRIO) nothing changes.
#[derive(Debug)]
pub(crate) struct Urgent {
    /// Policy and priority before.
    before: Option<(i32, libc::sched_param)>,
}

impl Urgent {
    /// Begins. Whoever waits for a thread that is not stopped must sleep meanwhile: one that asks again and again could keep
    /// the processor from it.
    pub(crate) fn begin() -> Self {
        // SAFETY: only a number is returned; 0 is the calling thread.
        let policy = unsafe { libc::sched_getscheduler(0) };
        let mut own = libc::sched_param { sched_priority: 0 };
        // SAFETY: `own` is writable.
        let known = policy >= 0 && unsafe { libc::sched_getparam(0, &raw mut own) } == 0;
        let ordinary = matches!(policy, libc::SCHED_OTHER | libc::SCHED_BATCH | libc::SCHED_IDLE);
        let first = libc::sched_param { sched_priority: 1 };
        // SAFETY: `first` is readable.
        let done = known && ordinary && unsafe { libc::sched_setscheduler(0, libc::SCHED_RR, &raw const first) } == 0;
        Self { before: done.then_some((policy, own)) }
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        if let Some((policy, own)) = self.before {
            // SAFETY: `own` is readable. To give a priority up needs no permission.
            unsafe { libc::sched_setscheduler(0, policy, &raw const own) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> i32 {
        // SAFETY: only a number is returned.
        unsafe { libc::sched_getscheduler(0) }
    }

    #[test]
    fn the_priority_is_given_back() {
        let before = policy();
        let urgent = Urgent::begin();
        if urgent.before.is_some() {
            assert_eq!(policy(), libc::SCHED_RR);
            std::thread::scope(|scope| {
                scope.spawn(|| assert_eq!(policy(), libc::SCHED_RR));
            });
            drop(Urgent::begin());
            assert_eq!(policy(), libc::SCHED_RR, "only the outer one gives it back");
        }
        drop(urgent);
        assert_eq!(policy(), before);
    }
}
