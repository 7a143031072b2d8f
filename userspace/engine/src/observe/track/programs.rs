//! The tracker's programs and maps in the kernel.

use super::{super::btf::Btf as Types, syscalls};
use crate::{
    kernel::sys,
    observe::{ObserveError, Result, Scope, loader},
};
use aya::{
    Btf, Ebpf, EbpfLoader, include_bytes_aligned,
    maps::{Array, HashMap, IterableMap, Map, MapData, MapError, PerCpuArray, RingBuf},
    programs::{BtfTracePoint, ProgramError},
};
use aya_log::EbpfLogger;
use log::Log;
use standstill_ebpf_abi::{
    ABSENT, Plain,
    track::{TrackLayout, count, part},
};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/tracker.o"));

/// Programs and their tracepoints.
const NEEDED: [(&str, &str); 5] = [
    ("fork", "sched_process_fork"),
    ("exec", "sched_process_exec"),
    ("exit", "sched_process_exit"),
    ("free", "sched_process_free"),
    ("locked", "mmap_lock_acquire_returned"),
];
/// The program that sees system calls. It costs every process of the machine.
const SYSCALLS: (&str, &str) = ("sys_exit", "sys_exit");
/// Programs without which a map fills up more quickly, or a number is missing.
const OPTIONAL: [(&str, &str); 3] =
    [("exit_mmap", "exit_mmap"), ("signal_sent", "signal_generate"), ("socket_state", "inet_sock_set_state")];

/// A tracked process as it is in its map: when tracking began, and when each part last changed.
pub(super) type Process = [u64; 1 + part::COUNT];

/// The maps that say what changed.
pub(super) struct Maps {
    processes: HashMap<MapData, u32, Process>,
    spaces: HashMap<MapData, u64, u64>,
}

/// The attached programs and all their maps.
pub(super) struct Programs {
    pub(super) maps: Maps,
    counts: PerCpuArray<MapData, [u64; count::COUNT]>,
    told: Array<MapData, u32>,
    pub(super) wake: Wake,
    /// What the programs say about themselves.
    log: EbpfLogger<&'static dyn Log>,
    /// Detaches the programs when dropped.
    _ebpf: Ebpf,
}

/// The ring that says that something changed.
pub(super) struct Wake(RingBuf<MapData>);

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor lives as long as the ring that is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

impl Programs {
    /// Loads and attaches the programs. Nothing is tracked yet.
    pub(super) fn load(scope: Scope) -> Result<Self> {
        loader::check_capabilities()?;
        let layout = layout()?;
        let btf = Btf::from_sys_fs().map_err(|e| loader::failed("all", e))?;
        let log_level = log::max_level() as u8;
        let mut ebpf = EbpfLoader::new()
            .override_global("LAYOUT", layout.bytes(), true)
            .override_global(aya_log::LEVEL, &log_level, true)
            .load(OBJECT)
            .map_err(|e| loader::failed("all", e))?;
        let log = EbpfLogger::init(&mut ebpf).map_err(|e| loader::failed("AYA_LOGS", e))?;
        for (name, tracepoint) in NEEDED.into_iter().chain((scope == Scope::Syscalls).then_some(SYSCALLS)) {
            attach(&mut ebpf, &btf, name, tracepoint).map_err(|e| loader::failed(name, e))?;
        }
        for (name, tracepoint) in OPTIONAL {
            if let Err(e) = attach(&mut ebpf, &btf, name, tracepoint) {
                tracing::debug!("not attached to {tracepoint}: {e}");
            }
        }
        Ok(Self {
            maps: Maps {
                processes: loader::map(&mut ebpf, "PROCESSES", HashMap::try_from)?,
                spaces: loader::map(&mut ebpf, "SPACES", HashMap::try_from)?,
            },
            counts: loader::map(&mut ebpf, "COUNTS", PerCpuArray::try_from)?,
            told: loader::map(&mut ebpf, "TOLD", Array::try_from)?,
            wake: Wake(loader::map(&mut ebpf, "WAKE", RingBuf::try_from)?),
            log,
            _ebpf: ebpf,
        })
    }

    /// What was counted, over all CPUs.
    pub(super) fn counts(&self) -> Result<[u64; count::COUNT]> {
        let mut sum = [0; count::COUNT];
        for cpu in self.counts.get(&0, 0).map_err(failed)?.iter() {
            sum.iter_mut().zip(cpu).for_each(|(sum, n)| *sum += n);
        }
        Ok(sum)
    }

    /// Lets the next change wake the reader up again.
    pub(super) fn rearm(&mut self) -> Result<()> {
        while self.wake.0.next().is_some() {}
        self.log.flush();
        self.told.set(0, 0, 0).map_err(failed)
    }
}

impl Maps {
    /// The maps of another process's tracker, by descriptors in the order of [`Self::fds`].
    pub(super) fn from_fds(mut fds: impl Iterator<Item = OwnedFd>) -> Result<Self> {
        let mut next = || {
            let fd = fds.next().ok_or(ObserveError::BadRecord("tracker"))?;
            MapData::from_fd(fd).and_then(Map::from_map_data).map_err(failed)
        };
        Ok(Self { processes: next()?.try_into().map_err(failed)?, spaces: next()?.try_into().map_err(failed)? })
    }

    /// Descriptors of the maps.
    pub(super) fn fds(&self) -> [BorrowedFd<'_>; 2] {
        [self.processes.map().fd().as_fd(), self.spaces.map().fd().as_fd()]
    }

    /// Tracks a process from now on.
    pub(super) fn track(&mut self, pid: i32) -> Result<()> {
        self.processes.insert(pid as u32, [now(); 1 + part::COUNT], 0).map_err(failed)
    }

    /// Tracks an address space from now on.
    pub(super) fn track_space(&mut self, mm: u64) -> Result<()> {
        self.spaces.insert(mm, now(), 0).map_err(failed)
    }

    /// Numbers of all tracked processes.
    pub(super) fn pids(&self) -> Result<Vec<i32>> {
        self.processes.keys().map(|key| key.map(|pid| pid as i32).map_err(failed)).collect()
    }

    /// When the parts of a process changed; `None`: it is not tracked.
    pub(super) fn process(&self, pid: i32) -> Result<Option<Process>> {
        found(self.processes.get(&(pid as u32), 0))
    }

    /// When an address space changed; `None`: it is not tracked.
    pub(super) fn space(&self, mm: u64) -> Result<Option<u64>> {
        found(self.spaces.get(&mm, 0))
    }
}

fn attach(ebpf: &mut Ebpf, btf: &Btf, name: &str, tracepoint: &str) -> std::result::Result<(), ProgramError> {
    let program = ebpf.program_mut(name).ok_or(ProgramError::NotLoaded)?;
    let program: &mut BtfTracePoint = program.try_into()?;
    program.load(tracepoint, btf)?;
    program.attach()?;
    Ok(())
}

fn found<T>(result: std::result::Result<T, MapError>) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(e) => Err(failed(e)),
    }
}

fn failed(error: MapError) -> ObserveError {
    ObserveError::io("use a map of the tracker")(std::io::Error::other(error))
}

/// CLOCK_MONOTONIC, as the programs have it.
fn now() -> u64 {
    sys::monotonic().as_nanos() as u64
}

/// Offsets in this kernel, and what its system calls do.
fn layout() -> Result<TrackLayout> {
    let btf = Types::read(&["task_struct", "thread_info", "pt_regs", "sock"])?;
    let at = |structure, field| btf.field(structure, field).map(|f| f.byte());
    let task = |field| at("task_struct", field);
    Ok(TrackLayout {
        task_tgid: task("tgid")?,
        task_pid: task("pid")?,
        task_mm: task("mm")?,
        task_status: task("thread_info.status")?,
        regs_number: at("pt_regs", "orig_ax")?,
        regs_second: at("pt_regs", "si")?,
        sock_owned: at("sock", "sk_lock.owned").unwrap_or(ABSENT),
        syscalls: syscalls::table().map(u16::to_le_bytes),
    })
}
