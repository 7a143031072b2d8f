//! Finding one mapping without reading all: PROCMAP_QUERY (Linux 6.11) on `/proc/<pid>/maps`.
//!
//! Kernel doc: Documentation/filesystems/proc.rst.

use super::{pagemap::Range, proc};
use std::{
    fs::{self, File},
    io,
    os::fd::AsRawFd,
};

#[repr(C)]
#[derive(Default)]
struct Query {
    size: u64,
    flags: u64,
    address: u64,
    start: u64,
    end: u64,
    vma_flags: u64,
    page_size: u64,
    offset: u64,
    inode: u64,
    device: [u32; 2],
    name_size: u32,
    build_id_size: u32,
    name: u64,
    build_id: u64,
}

nix::ioctl_readwrite!(procmap_query, b'f', 17, Query);

/// The `[vdso]` of a process. Quick where the kernel tells of a single mapping and the process has not moved its own.
pub(crate) fn vdso(pid: i32) -> io::Result<Option<Range>> {
    let at = vdso_at_exec(pid)?;
    if let Ok(range @ Some(_)) = named(pid, at, b"[vdso]") {
        return Ok(range);
    }
    let found = proc::maps(pid)?.into_iter().find(|m| m.name == "[vdso]");
    Ok(found.map(|m| Range { start: m.start, end: m.end }))
}

/// Where the kernel put the vdso, as `/proc/<pid>/auxv` has it; 0 if it has not.
fn vdso_at_exec(pid: i32) -> io::Result<u64> {
    let bytes = fs::read(proc::path(pid, "auxv"))?;
    let words: Vec<u64> =
        bytes.chunks_exact(8).map(|b| u64::from_ne_bytes(b.try_into().expect("chunks of eight"))).collect();
    let entry = words.chunks_exact(2).find(|entry| entry[0] == libc::AT_SYSINFO_EHDR);
    Ok(entry.map_or(0, |entry| entry[1]))
}

/// The mapping that holds an address, if it has this name.
fn named(pid: i32, address: u64, name: &[u8]) -> io::Result<Option<Range>> {
    let maps = File::open(proc::path(pid, "maps"))?;
    let mut buffer = [0_u8; 64];
    let mut query = Query {
        size: size_of::<Query>() as u64,
        address,
        name_size: buffer.len() as u32,
        name: buffer.as_mut_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: `query` has the size it states, and `name` is writable for `name_size` bytes.
    match unsafe { procmap_query(maps.as_raw_fd(), &raw mut query) } {
        // Its name is a longer one.
        Err(nix::errno::Errno::ENAMETOOLONG) => return Ok(None),
        result => result?,
    };
    // The size includes the null byte at the end.
    let is_it = buffer.get(..query.name_size as usize).and_then(|b| b.split_last()).is_some_and(|(_, n)| n == name);
    Ok(is_it.then_some(Range { start: query.start, end: query.end }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vdso_is_found_in_both_ways() {
        let pid = std::process::id() as i32;
        let listed = proc::maps(pid).unwrap().into_iter().find(|m| m.name == "[vdso]").unwrap();
        let listed = Range { start: listed.start, end: listed.end };
        assert_eq!(vdso(pid).unwrap(), Some(listed));
        assert_eq!(vdso_at_exec(pid).unwrap(), listed.start);
        let other = proc::maps(pid).unwrap()[0].start;
        // ENOTTY before Linux 6.11.
        if let Ok(found) = named(pid, listed.start, b"[vdso]") {
            assert_eq!(found, Some(listed));
            // ENAMETOOLONG where the tests lie deep.
            assert!(!matches!(named(pid, other, b"[vdso]"), Ok(Some(_))));
            assert!(named(pid, 0, b"[vdso]").is_err());
        }
    }
}
