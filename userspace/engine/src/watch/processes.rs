//! Rows for processes, from `/proc/pid/stat` and `statm`: two short files, about 25 µs for a process.

use super::sample::ProcessRow;
use crate::kernel::{PAGE, proc};
use std::{collections::BTreeMap, fs, io, path::Path};

/// A process, and what tells it from one that had its number before, or from the program it ran before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    pub row: ProcessRow,
    /// Beginning of the process, in clock ticks since boot.
    pub start_time: u64,
    /// Top of the first stack, which is another one for every program.
    pub start_stack: u64,
}

/// The living processes; those that end in the meantime are left out.
pub(super) fn read(pids: &[i32]) -> BTreeMap<i32, Seen> {
    pids.iter().filter_map(|&pid| Some((pid, one(pid).ok()?))).filter(|(_, seen)| seen.row.state != 'Z').collect()
}

fn one(pid: i32) -> io::Result<Seen> {
    let stat = proc::stat(pid)?;
    let (resident, shared) = parse_statm(&fs::read_to_string(proc::path(pid, "statm"))?).unwrap_or_default();
    let row = ProcessRow {
        pid,
        ppid: stat.ppid,
        comm: String::from_utf8_lossy(&stat.comm).into_owned(),
        state: stat.state.into(),
        threads: stat.threads,
        resident,
        anonymous: resident.saturating_sub(shared),
        descriptors: descriptors(&proc::path(pid, "fd"))?,
    };
    Ok(Seen { row, start_time: stat.start_time, start_stack: stat.start_stack })
}

/// Resident bytes, and those of them that belong to files or shared memory.
fn parse_statm(text: &str) -> Option<(u64, u64)> {
    let mut fields = text.split_ascii_whitespace().skip(1).map(|n| n.parse::<u64>().ok());
    Some((fields.next()?? * PAGE, fields.next()?? * PAGE))
}

/// Number of open descriptors: the size of the directory (Linux 6.2), or else its entries.
fn descriptors(directory: &Path) -> io::Result<u64> {
    match fs::metadata(directory)?.len() {
        0 => Ok(fs::read_dir(directory)?.count() as u64),
        n => Ok(n),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_process() {
        let pid = std::process::id() as i32;
        let all = read(&[pid, i32::MAX]);
        assert_eq!(all.len(), 1);
        let row = &all[&pid].row;
        assert!(row.threads >= 1 && row.descriptors >= 3 && row.anonymous > 0, "{row:?}");
        assert!(row.resident >= row.anonymous && all[&pid].start_stack != 0 && all[&pid].start_time != 0);
    }

    #[test]
    fn statm() {
        assert_eq!(parse_statm("100 20 5 1 0 30 0\n"), Some((20 * 4096, 5 * 4096)));
        assert_eq!(parse_statm("100 20\n"), None);
    }
}
