//! Resource limits (getrlimit(2)).

use crate::restore::program::Program;

/// Sets the limits that differ from the restorer's own. Raising a hard limit needs CAP_SYS_RESOURCE; the plan refuses
/// that beforehand, by name.
pub(crate) fn restore(limits: &[(u64, u64)], own: &[(u64, u64)], program: &mut Program) {
    for (resource, (limit, own)) in limits.iter().zip(own).enumerate() {
        if limit != own {
            let block = program.words(&[limit.0, limit.1]);
            let args = [0.into(), resource.into(), block, 0.into()];
            program.call(format!("set RLIMIT_{}", name(resource)), libc::SYS_prlimit64, &args);
        }
    }
}

/// The first limit that would have to be raised above the restorer's own hard limit.
pub(crate) fn first_raised(limits: &[(u64, u64)], own: &[(u64, u64)]) -> Option<&'static str> {
    limits.iter().zip(own).position(|(limit, own)| limit.1 > own.1).map(name)
}

fn name(resource: usize) -> &'static str {
    const NAMES: [&str; 16] = [
        "CPU",
        "FSIZE",
        "DATA",
        "STACK",
        "CORE",
        "RSS",
        "NPROC",
        "NOFILE",
        "MEMLOCK",
        "AS",
        "LOCKS",
        "SIGPENDING",
        "MSGQUEUE",
        "NICE",
        "RTPRIO",
        "RTTIME",
    ];
    NAMES.get(resource).copied().unwrap_or("?")
}
