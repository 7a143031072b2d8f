//! Sees when memory of a process is mapped a second time: by fork(2), mremap(2) or through a descriptor.

use super::{ObserveError, Result, Space, btf::Btf as Types, iter::Iterators, loader};
use crate::kernel::sys;
use aya::{
    Btf, Ebpf, EbpfLoader, include_bytes_aligned,
    maps::{HashMap, MapData, MapError},
    programs::{BtfTracePoint, ProgramError},
};
use standstill_ebpf_abi::{
    Plain,
    aliases::{AliasLayout, SYSCALLS, call},
};
use std::{collections::BTreeMap, fmt, time::Duration};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/aliases.o"));

/// Watches address spaces until it is dropped. Needs what [`Iterators`] need, and CONFIG_TRACING.
pub(crate) struct Aliases {
    /// When each space was last changed, and last mapped a second time.
    spaces: HashMap<MapData, u64, [u64; 2]>,
    /// The space of each watched process.
    watched: BTreeMap<i32, u64>,
    /// Detaches the program when dropped.
    _ebpf: Ebpf,
}

impl fmt::Debug for Aliases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The spaces are kernel addresses.
        write!(f, "Aliases {{ {} processes }}", self.watched.len())
    }
}

impl Aliases {
    /// Loads the program. Nothing is watched yet.
    pub(crate) fn load() -> Result<Self> {
        loader::check_capabilities()?;
        let layout = layout()?;
        let btf = Btf::from_sys_fs().map_err(|e| loader::failed("aliases", e))?;
        let mut ebpf = EbpfLoader::new()
            .override_global("LAYOUT", layout.bytes(), true)
            .load(OBJECT)
            .map_err(|e| loader::failed("aliases", e))?;
        attach(&mut ebpf, &btf).map_err(|e| loader::failed("aliases", e))?;
        let spaces = loader::map(&mut ebpf, "SPACES", HashMap::try_from)?;
        Ok(Self { spaces, watched: BTreeMap::new(), _ebpf: ebpf })
    }

    /// Watches the address spaces that the processes have now, and no others.
    pub(crate) fn watch(&mut self, iterators: &mut Iterators, pids: &[i32]) -> Result<()> {
        let belongings = iterators.belongings(pids)?;
        let now: BTreeMap<i32, u64> = belongings.iter().map(|(pid, has)| (*pid, has.mm)).collect();
        for space in self.watched.values().filter(|space| !now.values().any(|other| other == *space)) {
            match self.spaces.remove(space) {
                Err(e) if !matches!(e, MapError::KeyNotFound) => return Err(failed(e)),
                _ => {}
            }
        }
        for (pid, &space) in &now {
            // An address space may be where another was before.
            if self.watched.get(pid) != Some(&space) {
                self.spaces.insert(space, [sys::monotonic().as_nanos() as u64; 2], 0).map_err(failed)?;
            }
        }
        self.watched = now;
        Ok(())
    }

    /// What happened to the address space of a process; `None`: it is not watched.
    pub(crate) fn of(&self, pid: i32) -> Result<Option<Space>> {
        let Some(space) = self.watched.get(&pid) else { return Ok(None) };
        let owner = self.watched.iter().find(|(_, other)| *other == space).map_or(pid, |(owner, _)| *owner);
        match self.spaces.get(space, 0) {
            Ok(times) => {
                let [changed, aliased] = times.map(Duration::from_nanos);
                Ok(Some(Space { owner, changed, aliased }))
            }
            Err(MapError::KeyNotFound) => Ok(None),
            Err(e) => Err(failed(e)),
        }
    }
}

fn attach(ebpf: &mut Ebpf, btf: &Btf) -> std::result::Result<(), ProgramError> {
    let program = ebpf.program_mut("locked").ok_or(ProgramError::NotLoaded)?;
    let program: &mut BtfTracePoint = program.try_into()?;
    program.load("mmap_lock_acquire_returned", btf)?;
    program.attach()?;
    Ok(())
}

fn failed(error: MapError) -> ObserveError {
    ObserveError::io("use a map of watched address spaces")(std::io::Error::other(error))
}

fn layout() -> Result<AliasLayout> {
    let btf = Types::read(&["task_struct", "thread_info", "pt_regs"])?;
    let at = |structure, field| btf.field(structure, field).map(|f| f.byte());
    Ok(AliasLayout {
        task_mm: at("task_struct", "mm")?,
        task_status: at("task_struct", "thread_info.status")?,
        regs_number: at("pt_regs", "orig_ax")?,
        regs_second: at("pt_regs", "si")?,
        regs_third: at("pt_regs", "dx")?,
        regs_fourth: at("pt_regs", "r10")?,
        calls: calls(),
    })
}

/// System calls that change mappings all the time, and do not map memory a second time.
fn calls() -> [u8; SYSCALLS] {
    const HARMLESS: [i64; 10] = [
        libc::SYS_brk,
        libc::SYS_munmap,
        libc::SYS_mprotect,
        libc::SYS_pkey_mprotect,
        libc::SYS_madvise,
        libc::SYS_msync,
        libc::SYS_mlock,
        libc::SYS_mlock2,
        libc::SYS_munlock,
        libc::SYS_prctl,
    ];
    let mut calls = [call::UNKNOWN; SYSCALLS];
    HARMLESS.iter().for_each(|&number| calls[number as usize] = call::HARMLESS);
    calls[libc::SYS_mmap as usize] = call::MMAP;
    calls[libc::SYS_mremap as usize] = call::MREMAP;
    calls
}
