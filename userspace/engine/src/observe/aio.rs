//! Contexts of io_setup(2), and how many requests of each the kernel still works on.

use super::{AioContext, ObserveError, Result, btf::Btf as Types, iter, layout::Layouts, loader};
use crate::kernel::proc;
use aya::{
    Btf, EbpfLoader, include_bytes_aligned,
    maps::{Array, HashMap, MapData},
};
use standstill_ebpf_abi::{
    Plain,
    aio::{AioLayout, AioRecord, CONTEXTS},
};
use std::{
    collections::BTreeMap,
    os::fd::{AsFd, OwnedFd},
};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/aio.o"));

/// Reader of contexts.
pub(crate) struct AioContexts {
    program: OwnedFd,
    /// The CPU whose counts are asked for.
    cpu: Array<MapData, u32>,
    /// Processes of interest.
    tree: HashMap<MapData, u32, u8>,
}

impl AioContexts {
    /// Loads the program. Needs what the other iterators need, and Linux 5.19.
    pub(crate) fn load() -> Result<Self> {
        loader::check_capabilities()?;
        let (common, layout) = (Layouts::read()?.common, layout()?);
        let btf = Btf::from_sys_fs().map_err(|e| loader::failed("aio", e))?;
        let mut ebpf = EbpfLoader::new()
            .override_global("COMMON", common.bytes(), true)
            .override_global("LAYOUT", layout.bytes(), true)
            .load(OBJECT)
            .map_err(|e| loader::failed("aio", e))?;
        let program = loader::program(&mut ebpf, &btf, "aio", "task")?;
        let cpu = loader::map(&mut ebpf, "CPU", Array::try_from)?;
        Ok(Self { program, cpu, tree: loader::map(&mut ebpf, "TREE", HashMap::try_from)? })
    }

    /// What processes have now. They must not run.
    ///
    /// # Errors
    /// When the iterator cannot be read, or has not seen everything.
    pub(crate) fn read(&mut self, pids: &[i32]) -> Result<Vec<AioContext>> {
        pids.iter().try_for_each(|&pid| self.tree.insert(pid as u32, 1, 0)).map_err(iter::map_failed)?;
        let mut all: BTreeMap<(i32, u64), AioContext> = BTreeMap::new();
        for cpu in 0..proc::possible_cpus().unwrap_or(0) as u32 {
            self.cpu.set(0, cpu, 0).map_err(iter::map_failed)?;
            let mut stream = Vec::new();
            iter::read(self.program.as_fd(), None, &mut stream).map_err(iter::iter_failed)?;
            let mut stream = &stream[..];
            let mut here = BTreeMap::new();
            while !stream.is_empty() {
                let (r, rest) = AioRecord::split(stream).ok_or(ObserveError::BadRecord("aio"))?;
                stream = rest;
                if r.slots > CONTEXTS {
                    return Err(ObserveError::BadRecord("aio"));
                }
                let key = (r.tgid, r.id);
                let aside = all.get(&key).map_or(0, |context| context.aside) + r.here;
                // Places of the ring that are neither free nor those of events; one is never used.
                let in_flight = r.events.saturating_sub(1).wrapping_sub(r.available + aside + r.completed);
                here.insert(key, AioContext { pid: r.tgid, id: r.id, aside, in_flight });
            }
            all = here;
        }
        Ok(all.into_values().collect())
    }
}

fn layout() -> Result<AioLayout> {
    let btf = Types::read(&["bpf_array", "kioctx", "kioctx_table", "mm_struct"])?;
    let at = |structure, field| btf.field(structure, field).map(|f| f.byte());
    Ok(AioLayout {
        mm_ioctx_table: at("mm_struct", "ioctx_table")?,
        table_nr: at("kioctx_table", "nr")?,
        table_table: at("kioctx_table", "table")?,
        ctx_user_id: at("kioctx", "user_id")?,
        ctx_nr_events: at("kioctx", "nr_events")?,
        ctx_completed_events: at("kioctx", "completed_events")?,
        ctx_reqs_available: at("kioctx", "reqs_available")?,
        ctx_cpu: at("kioctx", "cpu")?,
        array_pptrs: at("bpf_array", "pptrs")?,
    })
}
