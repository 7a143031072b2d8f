//! Rows for memory, from `/proc/pid/smaps`. The kernel walks the page tables for it, about 5 µs for each mapping and a
//! few ms for each GiB, so it is read only now and then.

use super::{
    dirty::Written,
    sample::{MappingKind, MappingRow},
};
use crate::{
    kernel::{pagemap::Range, proc},
    memory::ranges,
};
use std::{
    collections::{BTreeMap, HashMap},
    fs,
};

/// What is mapped in a tree.
#[derive(Clone, Debug, Default)]
pub(super) struct Mapped {
    /// The most resident first.
    pub rows: Vec<MappingRow>,
    /// Mappings of each process.
    pub counts: BTreeMap<i32, u64>,
}

/// Reads the mappings of all processes; those that end in the meantime are left out. `written`: pages that were written to.
pub(super) fn read(pids: &[i32], written: &HashMap<i32, Written>) -> Mapped {
    let mut rows: HashMap<(MappingKind, String), MappingRow> = HashMap::new();
    let mut counts = BTreeMap::new();
    for &pid in pids {
        // Names may hold any bytes.
        let Ok(text) = fs::read(proc::path(pid, "smaps")) else { continue };
        counts.insert(pid, add(&String::from_utf8_lossy(&text), written.get(&pid), &mut rows));
    }
    let mut rows: Vec<MappingRow> = rows.into_values().collect();
    rows.sort_by(|a, b| (b.resident, b.size, &a.name).cmp(&(a.resident, a.size, &b.name)));
    Mapped { rows, counts }
}

/// Adds the mappings of a process; how many there were.
fn add(text: &str, written: Option<&Written>, rows: &mut HashMap<(MappingKind, String), MappingRow>) -> u64 {
    let mut count = 0;
    let mut current = None;
    let mut addresses = None;
    for line in text.lines() {
        if line.as_bytes().first().is_some_and(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(b)) {
            current = None;
            let Some((kind, name)) = classify(line) else { continue };
            let row = rows.entry((kind, name.clone())).or_insert(MappingRow {
                kind,
                name,
                count: 0,
                size: 0,
                resident: 0,
                private_dirty: 0,
                written_per_second: None,
            });
            row.count += 1;
            count += 1;
            current = Some(row);
            addresses = written.and_then(|_| range(line));
            continue;
        }
        // Attributes come last.
        if let (Some(row), Some(range), Some(written), Some(flags)) =
            (&mut current, addresses, written, line.strip_prefix("VmFlags:"))
            && flags.split(' ').any(|flag| flag == "uw")
        {
            *row.written_per_second.get_or_insert_default() += written.within(range) as f64 / written.seconds.max(1e-3);
        }
        let (Some(row), Some((name, value))) = (&mut current, line.split_once(':')) else { continue };
        let field = match name {
            "Size" => &mut row.size,
            "Rss" => &mut row.resident,
            "Private_Dirty" => &mut row.private_dirty,
            _ => continue,
        };
        *field += value.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0) << 10;
    }
    count
}

impl Written {
    /// Bytes of the pages in a range.
    fn within(&self, range: Range) -> u64 {
        let first = self.ranges.partition_point(|r| r.end <= range.start);
        let some = self.ranges[first..].iter().take_while(|r| r.start < range.end);
        ranges::size(
            &some.map(|r| Range { start: r.start.max(range.start), end: r.end.min(range.end) }).collect::<Vec<_>>(),
        )
    }
}

/// The addresses in the first line of a mapping.
fn range(line: &str) -> Option<Range> {
    let (start, end) = line.split_once(' ')?.0.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some(Range { start: number(start)?, end: number(end)? })
}

/// What the first line of a mapping says it is.
fn classify(line: &str) -> Option<(MappingKind, String)> {
    let mut fields = line.splitn(6, ' ');
    let (permissions, device) = (fields.nth(1)?, fields.nth(1)?);
    let inode = fields.next()?;
    let name = fields.next().unwrap_or("").trim_start();
    if permissions.len() != 4 || !device.contains(':') {
        return None;
    }
    if name == "[vsyscall]" {
        return None; // not a mapping of the process but of the machine
    }
    let plain = |kind, name: &str| Some((kind, name.to_owned()));
    let is_shared_memory = ["/memfd:", "/dev/zero (deleted)", "/SYSV", "/dev/shm/"];
    match name {
        "[heap]" => plain(MappingKind::Heap, name),
        "[stack]" => plain(MappingKind::Stack, name),
        _ if name.starts_with("[anon_shmem:") || is_shared_memory.iter().any(|start| name.starts_with(start)) => {
            plain(MappingKind::Shared, name)
        }
        _ if name.starts_with("[anon:") => plain(MappingKind::Anonymous, name),
        _ if name.starts_with('[') => plain(MappingKind::Kernel, name),
        _ if inode == "0" => plain(MappingKind::Anonymous, "anonymous"),
        _ => plain(MappingKind::File, name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds() {
        let kind = |line: &str| classify(line).map(|(kind, _)| kind);
        let line = |permissions: &str, inode: &str, name: &str| {
            format!("7f00-8f00 {permissions} 00001000 fe:01 {inode}          {name}")
        };
        assert_eq!(kind(&line("rw-p", "0", "[heap]")), Some(MappingKind::Heap));
        assert_eq!(kind(&line("rw-p", "0", "")), Some(MappingKind::Anonymous));
        assert_eq!(kind(&line("rw-p", "0", "[anon:glibc: malloc]")), Some(MappingKind::Anonymous));
        assert_eq!(kind(&line("rw-s", "7", "/memfd:x (deleted)")), Some(MappingKind::Shared));
        assert_eq!(kind(&line("rw-s", "7", "/dev/shm/x")), Some(MappingKind::Shared));
        assert_eq!(kind(&line("r--p", "7", "/usr/lib/x y.so")), Some(MappingKind::File));
        assert_eq!(kind(&line("r-xp", "0", "[vdso]")), Some(MappingKind::Kernel));
        assert_eq!(kind(&line("--xp", "0", "[vsyscall]")), None);
        assert_eq!(kind("deadbeef"), None);
    }

    #[test]
    fn alike_mappings_are_one_row() {
        let one = "7f00-8f00 rw-p 00000000 00:00 0 \nSize:  4 kB\nRss: 4 kB\nPrivate_Dirty: 0 kB\nVmFlags: rd\n";
        let two = "8f00-9f00 rw-p 00000000 00:00 0 \nSize:  8 kB\nRss: 4 kB\nPrivate_Dirty: 4 kB\nVmFlags: rd\n";
        let mut rows = HashMap::new();
        assert_eq!(add(&format!("{one}{two}"), None, &mut rows), 2);
        let row = rows.values().next().unwrap();
        assert_eq!((rows.len(), row.count, row.size, row.resident, row.private_dirty), (1, 2, 12288, 8192, 4096));
    }

    #[test]
    fn pages_that_were_written_to_belong_to_their_mappings() {
        let text = |flags: &str| {
            let mapping = |range: &str| format!("{range} rw-p 00000000 00:00 0 \nSize:  8 kB\nVmFlags: rd {flags}\n");
            mapping("1000-3000") + &mapping("5000-9000")
        };
        let range = |start, end| Range { start, end };
        let written = Written { seconds: 2.0, ranges: vec![range(0x2000, 0x3000), range(0x6000, 0xa000)] };
        let rate = |text: &str| {
            let mut rows = HashMap::new();
            add(text, Some(&written), &mut rows);
            rows.into_values().next().unwrap().written_per_second
        };
        assert_eq!(rate(&text("uw")), Some(8192.0));
        assert_eq!(rate(&text("wr")), None, "nobody tracks them");
    }

    #[test]
    fn our_own_memory() {
        let pid = std::process::id() as i32;
        let mapped = read(&[pid, i32::MAX], &HashMap::new());
        assert!(mapped.counts[&pid] > 10 && mapped.counts.len() == 1);
        assert!(mapped.rows.iter().any(|r| r.kind == MappingKind::Stack && r.private_dirty > 0));
        assert!(mapped.rows.is_sorted_by_key(|r| std::cmp::Reverse(r.resident)));
    }
}
