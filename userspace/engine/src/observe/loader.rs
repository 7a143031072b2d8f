//! Loads the programs.

use super::{ObserveError, Result, layout::Layouts};
use aya::{
    Btf, Ebpf, EbpfLoader, include_bytes_aligned,
    maps::{Array, HashMap, IterableMap, Map, MapData},
    programs::{Iter, ProgramError},
};
use standstill_ebpf_abi::Plain;
use std::{
    fs,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    panic::resume_unwind,
    thread,
};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/observers.o"));

/// The programs in the kernel, and the maps they look at.
pub(super) struct Programs {
    pub task_file: OwnedFd,
    pub task: OwnedFd,
    pub lineage: OwnedFd,
    pub task_vma: OwnedFd,
    pub sockets: OwnedFd,
    /// Processes of interest.
    pub tree: HashMap<MapData, u32, u8>,
    /// Whether paths are written.
    pub paths: Array<MapData, u32>,
    pub layouts: Layouts,
}

impl Programs {
    /// The programs of another process, by descriptors in the order of [`Self::fds`].
    pub(super) fn from_fds(mut fds: impl Iterator<Item = OwnedFd>, layouts: Layouts) -> Result<Self> {
        let mut next = || fds.next().ok_or(ObserveError::BadRecord("tracker"));
        let (task_file, task, lineage, task_vma, sockets) = (next()?, next()?, next()?, next()?, next()?);
        let mut map = |name| {
            let map = next().map(|fd| MapData::from_fd(fd).and_then(Map::from_map_data))?;
            map.map_err(|e| failed(name, e))
        };
        Ok(Self {
            task_file,
            task,
            lineage,
            task_vma,
            sockets,
            tree: map("TREE")?.try_into().map_err(|e| failed("TREE", e))?,
            paths: map("PATHS")?.try_into().map_err(|e| failed("PATHS", e))?,
            layouts,
        })
    }

    /// Descriptors of programs and maps.
    pub(super) fn fds(&self) -> [BorrowedFd<'_>; 7] {
        let programs = [&self.task_file, &self.task, &self.lineage, &self.task_vma, &self.sockets].map(AsFd::as_fd);
        let [task_file, task, lineage, task_vma, sockets] = programs;
        [task_file, task, lineage, task_vma, sockets, self.tree.map().fd().as_fd(), self.paths.map().fd().as_fd()]
    }

    pub(super) fn load() -> Result<Self> {
        check_capabilities()?;
        // Reading BTF takes longest. aya does it once for the loader and wants it again for each program to load.
        let (mut loader, btf, layouts) = thread::scope(|scope| {
            let btf = scope.spawn(|| (Btf::from_sys_fs(), Layouts::read()));
            let loader = EbpfLoader::new();
            let (btf, layouts) = btf.join().unwrap_or_else(|panic| resume_unwind(panic));
            (loader, btf, layouts)
        });
        let layouts = layouts?;
        let btf = btf.map_err(|e| failed("all", e))?;
        let mut ebpf = loader
            .override_global("COMMON", layouts.common.bytes(), true)
            .override_global("FILE", layouts.files.bytes(), true)
            .override_global("TASK", layouts.tasks.bytes(), true)
            .override_global("VMA", layouts.vmas.bytes(), true)
            .override_global("SOCKET", layouts.sockets.bytes(), true)
            .load(OBJECT)
            .map_err(|e| failed("all", e))?;
        Ok(Self {
            task_file: program(&mut ebpf, &btf, "task_file", "task_file")?,
            task: program(&mut ebpf, &btf, "task", "task")?,
            lineage: program(&mut ebpf, &btf, "lineage", "task")?,
            task_vma: program(&mut ebpf, &btf, "task_vma", "task_vma")?,
            sockets: program(&mut ebpf, &btf, "sockets", "task_file")?,
            tree: map(&mut ebpf, "TREE", HashMap::try_from)?,
            paths: map(&mut ebpf, "PATHS", Array::try_from)?,
            layouts,
        })
    }
}

/// Loads one program for an iterator.
pub(super) fn program(ebpf: &mut Ebpf, btf: &Btf, name: &'static str, iterator: &str) -> Result<OwnedFd> {
    let mut load = || -> std::result::Result<OwnedFd, ProgramError> {
        let program = ebpf.program_mut(name).ok_or(ProgramError::NotLoaded)?;
        let iter: &mut Iter = program.try_into()?;
        iter.load(iterator, btf)?;
        Ok(iter.fd()?.as_fd().try_clone_to_owned()?)
    };
    load().map_err(|e| failed(name, e))
}

pub(super) fn map<T>(
    ebpf: &mut Ebpf,
    name: &'static str,
    convert: impl FnOnce(aya::maps::Map) -> std::result::Result<T, aya::maps::MapError>,
) -> Result<T> {
    let map = ebpf.take_map(name).ok_or_else(|| failed(name, "the object has no such map"))?;
    convert(map).map_err(|e| failed(name, e))
}

/// An error of aya in our words, with the errors it was caused by and the end of the verifier's log.
pub(super) fn failed(program: &'static str, error: impl Into<Box<dyn std::error::Error>>) -> ObserveError {
    let error = error.into();
    let mut source = Some(&*error);
    while let Some(e) = source {
        if e.downcast_ref::<std::io::Error>().is_some_and(|e| e.raw_os_error() == Some(libc::EPERM)) {
            return ObserveError::NotPermitted;
        }
        source = e.source();
    }
    let text = error.to_string();
    let lines: Vec<&str> = text.lines().collect();
    let reason = match lines.len() {
        0..16 => text,
        n => format!("{} […] {}", lines[0], lines[n - 12..].join("\n")),
    };
    ObserveError::Load { program, reason }
}

/// Numbers of capabilities, see capabilities(7).
const CAP_SYS_ADMIN: u32 = 21;
const CAP_PERFMON: u32 = 38;
const CAP_BPF: u32 = 39;

/// Says which capability is missing, instead of a bare EPERM.
pub(super) fn check_capabilities() -> Result<()> {
    let path = "/proc/self/status";
    let status = fs::read_to_string(path).map_err(ObserveError::io(format!("read {path}")))?;
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(u64::MAX);
    missing_capability(effective).map_or(Ok(()), |name| Err(ObserveError::MissingCapability(name)))
}

fn missing_capability(effective: u64) -> Option<&'static str> {
    let has = |capability: u32| effective & 1 << capability != 0;
    if has(CAP_SYS_ADMIN) {
        return None;
    }
    [(CAP_BPF, "CAP_BPF"), (CAP_PERFMON, "CAP_PERFMON")].into_iter().find(|&(n, _)| !has(n)).map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_missing_capability_is_named() {
        assert_eq!(missing_capability(u64::MAX), None);
        assert_eq!(missing_capability(1 << CAP_SYS_ADMIN), None);
        assert_eq!(missing_capability(1 << CAP_BPF | 1 << CAP_PERFMON), None);
        assert_eq!(missing_capability(1 << CAP_BPF), Some("CAP_PERFMON"));
        assert_eq!(missing_capability(0), Some("CAP_BPF"));
    }

    #[test]
    fn a_long_verifier_log_is_cut() {
        let log: Vec<String> = (0..100).map(|n| format!("line {n}")).collect();
        let text = failed("task", log.join("\n")).to_string();
        assert!(
            text.starts_with("the eBPF programs do not load (task): line 0 […] line 88\n") && text.ends_with("line 99")
        );
    }
}
