//! The content of a stopped tree's memory.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::unistd::Pid;

use super::proc;

/// Unit of comparison. The kernel itself may change two such places for each thread: the rseq area, which holds the cpu
/// number, and the remainder of an interrupted sleep.
const UNIT: usize = 32;
const KERNELS_OWN: usize = 2;

const PAGE: usize = 4096;

/// Every readable byte of some processes.
#[derive(Default)]
pub struct Memory {
    ranges: BTreeMap<(Pid, u64), Vec<u8>>,
    threads: usize,
}

impl Memory {
    /// Copies the memory of stopped processes.
    pub fn take(pids: &[Pid]) -> Self {
        let mut memory = Self::default();
        for pid in pids {
            memory.threads += proc::threads(*pid).len();
            let Ok(file) = File::open(proc::path(*pid, "mem")) else { continue };
            for (start, end) in readable_ranges(*pid) {
                let mut bytes = vec![0; usize::try_from(end - start).expect("a length")];
                for (number, page) in bytes.chunks_mut(PAGE).enumerate() {
                    // A page beyond the end of a mapped file cannot be read and stays zero.
                    _ = file.read_exact_at(page, start + (number * PAGE) as u64);
                }
                memory.ranges.insert((*pid, start), bytes);
            }
        }
        memory
    }

    /// Bytes compared.
    pub fn len(&self) -> usize {
        self.ranges.values().map(Vec::len).sum()
    }

    /// True when there is nothing to compare.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where the content is no longer the same, but for what the kernel may have changed.
    pub fn changes(&self, after: &Self) -> Vec<String> {
        let mut changes = Vec::new();
        for (place, was) in &self.ranges {
            let Some(is) = after.ranges.get(place) else {
                changes.push(format!("{place:x?} is gone"));
                continue;
            };
            let areas = was.chunks(UNIT).zip(is.chunks(UNIT)).enumerate();
            for (number, (was, is)) in areas.filter(|(_, (was, is))| was != is) {
                let address = place.1 + (number * UNIT) as u64;
                changes.push(format!("{} at {address:x}: was {was:x?}, is {is:x?}", place.0));
            }
        }
        if changes.len() <= KERNELS_OWN * self.threads && changes.iter().all(|change| change.contains(" at ")) {
            changes.clear();
        }
        changes
    }
}

/// Memory with content of its own: not the kernel's time pages, and nothing that may not be read. Neighbouring mappings
/// are taken together, whether the kernel keeps them apart or not.
fn readable_ranges(pid: Pid) -> Vec<(u64, u64)> {
    let maps = proc::text(pid, "maps");
    let range = |line: &str| {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let special = line.contains("[vvar") || line.contains("[vsyscall]");
        let range = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
        (rest.starts_with('r') && !special).then_some(range)
    };
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for (start, end) in maps.lines().filter_map(range) {
        match ranges.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => ranges.push((start, end)),
        }
    }
    ranges
}
