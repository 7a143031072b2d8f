//! What the plan must know of the restoring process: every task begins as a copy of it.

use crate::{
    error::{Context, Result},
    kernel::{arch, proc},
    tree::{attributes, creds, labels, sched},
};
use standstill_images::types::{Attributes, Bytes, Creds, Sched, ThreadAttributes};
use std::path::Path;

/// One of the kernel's own mappings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KernelMapping {
    pub name: String,
    pub start: u64,
    pub len: u64,
}

/// Facts about this process and machine.
#[derive(Clone, Debug)]
pub(crate) struct Environment {
    pub creds: Creds,
    pub sched: Sched,
    pub attributes: Attributes,
    pub limits: Vec<(u64, u64)>,
    /// Signals ignored.
    pub ignored: u64,
    pub personality: u32,
    pub loginuid: u32,
    /// Label by a security module.
    pub label: Option<Bytes>,
    pub may_raise_limits: bool,
    /// May install seccomp filters and suspend them.
    pub may_filter: bool,
    pub kernel_mappings: Vec<KernelMapping>,
    /// Address ranges in use.
    pub used: Vec<(u64, u64)>,
    /// Contents of the `[vdso]`.
    pub vdso: Vec<u8>,
    /// Highest descriptor number plus one.
    pub fd_limit: i32,
    /// Mappings that a process may have.
    pub max_mappings: usize,
    pub xstate_size: usize,
    /// CPUs that the machine may ever have.
    pub cpus: usize,
}

/// Names of the kernel's mappings that a process may move.
pub(crate) fn is_kernel_mapping(name: &str) -> bool {
    name == "[vdso]" || name.starts_with("[vvar")
}

/// The kernel's own mappings of a process.
pub(crate) fn kernel_mappings(pid: i32) -> Result<Vec<KernelMapping>> {
    let maps = proc::maps(pid).context(|| format!("read the mappings of {pid}"))?;
    Ok(maps
        .into_iter()
        .filter(|m| is_kernel_mapping(&m.name))
        .map(|m| KernelMapping { name: m.name, start: m.start, len: m.end - m.start })
        .collect())
}

/// The bytes of a process's `[vdso]`; empty if it has none.
pub(crate) fn vdso(pid: i32) -> Result<Vec<u8>> {
    let Some(vdso) = kernel_mappings(pid)?.into_iter().find(|m| m.name == "[vdso]") else { return Ok(Vec::new()) };
    vdso_at(pid, vdso.start, vdso.len)
}

/// The bytes of a process's `[vdso]`, which is known to be at `start`.
pub(crate) fn vdso_at(pid: i32, start: u64, len: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len as usize];
    let memory = std::fs::File::open(proc::path(pid, "mem")).context(|| format!("open the memory of {pid}"))?;
    std::os::unix::fs::FileExt::read_exact_at(&memory, &mut bytes, start)
        .context(|| format!("read the vdso of {pid}"))?;
    Ok(bytes)
}

impl Environment {
    /// What every thread begins with.
    pub(crate) fn thread(&self) -> (&Sched, &ThreadAttributes) {
        (&self.sched, attributes::of_thread(&self.attributes, self.attributes.pid))
    }

    /// Looks at this process. Its soft limit of descriptors is raised to the hard one, for the tree's sake.
    pub(crate) fn current() -> Result<Self> {
        let pid = std::process::id() as i32;
        let limits = proc::limits(pid).context(|| "read own limits".into())?;
        let status = proc::status(pid, pid).context(|| "read own status".into())?;
        let hard = limits[libc::RLIMIT_NOFILE as usize].1;
        nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, hard, hard)
            .context(|| "raise RLIMIT_NOFILE".into())?;
        // SAFETY: 0xffffffff only asks.
        let personality = unsafe { libc::personality(0xffff_ffff) } as u32;
        const CAP_SYS_ADMIN: u32 = 21;
        const CAP_SYS_RESOURCE: u32 = 24;
        let may = |capability: u32| status.caps[2] & (1 << capability) != 0;
        Ok(Self {
            creds: creds::of(&status, 0),
            sched: sched::collect(pid)?,
            attributes: attributes::own(),
            limits: proc::limits(pid).context(|| "read own limits".into())?,
            ignored: status.ignored,
            personality,
            loginuid: proc::number(&proc::path(pid, "loginuid")).unwrap_or(u32::MAX),
            label: labels::own(),
            may_raise_limits: may(CAP_SYS_RESOURCE),
            may_filter: may(CAP_SYS_ADMIN) && status.seccomp == 0,
            kernel_mappings: kernel_mappings(pid)?,
            used: proc::maps(pid)
                .context(|| "read own mappings".into())?
                .into_iter()
                .map(|m| (m.start, m.end))
                .collect(),
            vdso: vdso(pid)?,
            fd_limit: i32::try_from(hard.min(1 << 20)).unwrap_or(1 << 20),
            max_mappings: proc::number(Path::new("/proc/sys/vm/max_map_count")).unwrap_or(usize::MAX),
            xstate_size: arch::xstate_size(),
            cpus: proc::possible_cpus().unwrap_or(1),
        })
    }
}
