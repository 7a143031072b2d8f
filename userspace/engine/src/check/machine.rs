//! Probes for privileges and for what the machine allows.

use super::{Failed, Outcome, child::Bench};
use crate::{
    kernel::{proc, sys::page_size_is_supported},
    observe::{Iterators, ObserveError},
};
use std::{error::Error, fs, io, io::Read, path::Path};

const CAP_SYS_PTRACE: u32 = 19;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_SYS_RESOURCE: u32 = 24;
const CAP_PERFMON: u32 = 38;
const CAP_BPF: u32 = 39;
const CAP_CHECKPOINT_RESTORE: u32 = 40;

fn has(bench: &Bench, capability: u32) -> Result<bool, Failed> {
    Ok(bench.status.as_ref().map_err(Clone::clone)?.caps[2] & (1 << capability) != 0)
}

fn capability(bench: &Bench, capability: u32) -> Outcome {
    /// Inode of the first user namespace (include/linux/proc_ns.h).
    const FIRST: &str = "user:[4026531837]";
    let last: u32 = proc::number(Path::new("/proc/sys/kernel/cap_last_cap"))?;
    Failed::unless(capability <= last, "this kernel does not know it")?;
    Failed::unless(has(bench, capability)?, "not among the effective capabilities of this process")?;
    let namespace = fs::read_link("/proc/self/ns/user")?;
    Ok(if namespace == Path::new(FIRST) { String::new() } else { "in this user namespace only".into() })
}

pub(super) fn cap_sys_ptrace(bench: &Bench) -> Outcome {
    capability(bench, CAP_SYS_PTRACE)
}

pub(super) fn cap_sys_admin(bench: &Bench) -> Outcome {
    capability(bench, CAP_SYS_ADMIN)
}

pub(super) fn cap_sys_resource(bench: &Bench) -> Outcome {
    capability(bench, CAP_SYS_RESOURCE)
}

pub(super) fn cap_perfmon(bench: &Bench) -> Outcome {
    capability(bench, CAP_PERFMON)
}

pub(super) fn cap_bpf(bench: &Bench) -> Outcome {
    capability(bench, CAP_BPF)
}

pub(super) fn cap_checkpoint_restore(bench: &Bench) -> Outcome {
    capability(bench, CAP_CHECKPOINT_RESTORE)
}

pub(super) fn page_size(_: &Bench) -> Outcome {
    Failed::unless(page_size_is_supported(), "this kernel's pages are larger")?;
    Ok(String::new())
}

pub(super) fn btf(_: &Bench) -> Outcome {
    const MAGIC: [u8; 2] = 0xeb9f_u16.to_ne_bytes();
    let mut begin = [0; 2];
    fs::File::open("/sys/kernel/btf/vmlinux")?.read_exact(&mut begin)?;
    Failed::unless(begin == MAGIC, "/sys/kernel/btf/vmlinux does not begin as BTF does")?;
    Ok(String::new())
}

pub(super) fn iterators(bench: &Bench) -> Outcome {
    ebpf(bench, Iterators::load().map(drop))
}

/// Tracks this process for a moment.
pub(super) fn tracker(bench: &Bench) -> Outcome {
    #[cfg(feature = "ebpf")]
    let tracked = {
        use crate::observe::{Scope, Tracker};
        Tracker::start(std::process::id() as i32, Scope::Memory).map(drop)
    };
    #[cfg(not(feature = "ebpf"))]
    let tracked = Err(ObserveError::NotBuilt);
    ebpf(bench, tracked)
}

/// What loading eBPF programs says.
fn ebpf(bench: &Bench, loaded: Result<(), ObserveError>) -> Outcome {
    let error = match loaded {
        Ok(()) => return Ok(String::new()),
        Err(error @ (ObserveError::NotBuilt | ObserveError::PidNamespace)) => {
            return Err(Failed::No(error.to_string()));
        }
        Err(error) => error,
    };
    // CAP_SYS_ADMIN stands for both of the others.
    let privileged = has(bench, CAP_SYS_ADMIN)? || has(bench, CAP_BPF)? && has(bench, CAP_PERFMON)?;
    let mut cause: Option<&(dyn Error + 'static)> = Some(&error);
    let mut refused = false;
    while let Some(e) = cause {
        let io = e.downcast_ref::<io::Error>();
        refused |= io.is_some_and(|e| e.kind() == io::ErrorKind::PermissionDenied);
        cause = e.source();
    }
    let reason = error.to_string();
    Err(if refused || !privileged { Failed::CannotTell(reason) } else { Failed::No(reason) })
}

/// Lockdown up to "integrity" forbids nothing that is done here.
pub(super) fn lockdown(_: &Bench) -> Outcome {
    match fs::read_to_string("/sys/kernel/security/lockdown") {
        Ok(text) => {
            let level = text.split(['[', ']']).nth(1).unwrap_or("unknown");
            Failed::unless(level != "confidentiality", "confidentiality: kernel memory may not be read")?;
            Ok(level.into())
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let mounted = fs::read_to_string("/proc/self/mounts")?.lines().any(|l| l.contains(" securityfs "));
            let built = fs::read_to_string("/proc/filesystems")?.lines().any(|l| l.ends_with("\tsecurityfs"));
            if mounted || !built {
                return Ok("this kernel has no lockdown".into());
            }
            Err(Failed::CannotTell("securityfs is not mounted at /sys/kernel/security".into()))
        }
        Err(e) => Err(e.into()),
    }
}

pub(super) fn open_files(_: &Bench) -> Outcome {
    let limits = proc::limits(std::process::id() as i32)?;
    let hard = limits.get(libc::RLIMIT_NOFILE as usize).ok_or(nix::errno::Errno::EINVAL)?.1;
    let most: u64 = proc::number(Path::new("/proc/sys/fs/nr_open"))?;
    let detail = format!("ulimit -Hn is {hard}, fs.nr_open {most}");
    Failed::unless(hard >= most, &detail)?;
    Ok(detail)
}
