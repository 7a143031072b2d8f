//! The mappings of a frozen process as records.

use super::{
    aio,
    area::{Area, REGISTERED},
    smaps::{self, Mapped},
};
use crate::{
    error::{Context, Error, Result},
    kernel::{hugetlb, proc},
    objects::{Collected, link_remap, regular, shared_memory},
    observe::{ProcessState, SharedId, VmaEntry},
};
use standstill_images::types::{AddressSpace, AddressSpaceId, Backing, Bytes, MmLayout, OpenFileId, Vma, VmaFlags};
use std::{
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// Reads the address space of a process, with what the observer saw of it and of its mappings, if anything: all but its
/// pages and guards, for which the mappings come in a second form. `tracked`: write protection by userfaultfd is ours.
pub(crate) fn collect(
    pid: i32,
    id: AddressSpaceId,
    brk: u64,
    seen: Option<&ProcessState>,
    mappings: &[VmaEntry],
    all: &mut Collected,
    tracked: bool,
) -> Result<(AddressSpace, Vec<Area>)> {
    // The observer names the common attributes only.
    let mapped = if mappings.is_empty() || mappings.iter().any(|v| v.unusual) {
        smaps::read(pid).context(|| format!("read the mappings of {pid}"))?
    } else {
        mappings.iter().map(Mapped::from).collect()
    };
    let mut vmas = Vec::with_capacity(mapped.len());
    let mut areas = Vec::with_capacity(mapped.len());
    for map in &mapped {
        if map.name == b"[vsyscall]" {
            continue; // not a mapping of the process but of the machine
        }
        let vma = record(pid, map, all, tracked)?;
        areas.push(Area::of(&vma, map));
        vmas.push(vma);
    }
    let layout = match seen.and_then(|p| p.layout) {
        Some(layout) => layout,
        None => layout(pid, brk)?,
    };
    let auxv = match seen.and_then(|p| p.auxv.clone()) {
        Some(auxv) => auxv,
        None => std::fs::read(proc::path(pid, "auxv")).context(|| format!("read the auxv of {pid}"))?,
    };
    let exe = executable(pid, seen.and_then(|p| p.exe), all)?;
    Ok((AddressSpace { id, layout, auxv, exe, vmas, pages: Vec::new(), guards: Vec::new() }, areas))
}

fn layout(pid: i32, brk: u64) -> Result<MmLayout> {
    let stat = proc::stat(pid).context(|| format!("read /proc/{pid}/stat"))?;
    Ok(MmLayout {
        start_code: stat.start_code,
        end_code: stat.end_code,
        start_data: stat.start_data,
        end_data: stat.end_data,
        start_brk: stat.start_brk,
        brk,
        start_stack: stat.start_stack,
        arg_start: stat.arg_start,
        arg_end: stat.arg_end,
        env_start: stat.env_start,
        env_end: stat.env_end,
    })
}

/// The executed file. `seen`: the observer's number for it.
fn executable(pid: i32, seen: Option<SharedId>, all: &mut Collected) -> Result<OpenFileId> {
    if let Some(&known) = seen.and_then(|id| all.executables.get(&id)) {
        return Ok(known);
    }
    let link = proc::path(pid, "exe");
    let name = std::fs::read_link(&link).context(|| format!("read {}", link.display()))?;
    let meta = std::fs::metadata(&link).context(|| format!("stat {}", link.display()))?;
    let file = mapped_file(pid, &name, || link.clone(), meta.dev(), meta.ino(), false, all)?;
    if let Some(id) = seen {
        all.executables.insert(id, file);
    }
    Ok(file)
}

fn mapped_file(
    pid: i32,
    name: &Path,
    link: impl FnOnce() -> PathBuf,
    dev: u64,
    ino: u64,
    writable: bool,
    all: &mut Collected,
) -> Result<OpenFileId> {
    let refuse = |why: &str| Error::unsupported(pid, format!("the mapped file {}", name.display()), why.to_string());
    all.mapped(dev, ino, writable, |all| {
        let link = link();
        let meta = std::fs::metadata(&link).context(|| format!("stat {}", link.display()))?;
        if meta.nlink() == 0 {
            let object = shared_memory::collect(name, &link, dev, ino, all)?;
            return Ok(standstill_images::types::FileKind::SharedMemory { object });
        }
        let mtime = (meta.mtime(), meta.mtime_nsec() as u32);
        if let Some(kind) = regular::describe(name, meta.size(), mtime, meta.mode(), meta.dev(), meta.ino()) {
            return Ok(kind);
        }
        if !name.as_os_str().as_encoded_bytes().ends_with(b" (deleted)") {
            return Err(refuse("its name leads elsewhere: give the file its name back"));
        }
        let linked =
            all.links.record(name, &link).context(|| format!("link {} beside its old name", name.display()))?;
        linked.ok_or_else(|| refuse(link_remap::REMEDY))
    })
}

/// Attributes that say that the pages are not ordinary memory.
fn refuse_special(pid: i32, map: &Mapped, tracked: bool) -> Result<()> {
    let name = if map.name.is_empty() { "anonymous".into() } else { String::from_utf8_lossy(&map.name) };
    let object = || format!("the mapping {:x}-{:x} ({name})", map.start, map.end);
    let why = if map.has(b"pf") || map.has(b"io") {
        "it belongs to a device: close the device before the dump"
    } else if map.has(b"um") || map.has(b"ui") || map.has(b"uw") && !tracked {
        REGISTERED
    } else if map.has(b"ss") {
        "it is a shadow stack: run the program without one (glibc.cpu.x86_shstk=off)"
    } else if map.name.starts_with(b"/secretmem") {
        "memfd_secret memory cannot be read by anybody else: end its use before the dump"
    } else if map.name.starts_with(b"anon_inode:") {
        "it belongs to a kernel object that cannot be read: close it before the dump"
    } else if map.key != 0 && map.prot != libc::PROT_EXEC as u8 {
        // That of memory that can only be executed comes and goes with its protection.
        "it has a protection key: give it back (pkey_mprotect with key 0) before the dump"
    } else {
        return Ok(());
    };
    Err(Error::unsupported(pid, object(), why))
}

fn record(pid: i32, map: &Mapped, all: &mut Collected, tracked: bool) -> Result<Vma> {
    let kernel =
        [&b"[vdso]"[..], b"[uprobes]", b"[vectors]"].contains(&map.name.as_slice()) || map.name.starts_with(b"[vvar");
    let backing = if kernel {
        Backing::Kernel { name: map.name.as_slice().into() }
    } else {
        refuse_special(pid, map, tracked)?;
        backing(pid, map, all)?
    };
    let flags = VmaFlags {
        growsdown: map.has(b"gd"),
        noreserve: map.has(b"nr"),
        droppable: map.has(b"dp"),
        locked: map.has(b"lo"),
        lock_on_fault: map.has(b"lf"),
        dontfork: map.has(b"dc"),
        wipeonfork: map.has(b"wf"),
        dontdump: map.has(b"dd") && !kernel,
        mergeable: map.has(b"mg"),
        hugepage: map.has(b"hg"),
        nohugepage: map.has(b"nh"),
        sequential: map.has(b"sr"),
        random: map.has(b"rr"),
    };
    Ok(Vma { start: map.start, end: map.end, prot: map.prot, backing, flags })
}

fn backing(pid: i32, map: &Mapped, all: &mut Collected) -> Result<Backing> {
    if map.ino == 0 && !map.shared {
        let name = map.name.strip_prefix(b"[anon:").and_then(|n| n.strip_suffix(b"]"));
        return Ok(Backing::Anonymous { name: name.map(Bytes::from) });
    }
    let name = PathBuf::from(<std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(map.name.clone()));
    let link = || proc::path(pid, &format!("map_files/{:x}-{:x}", map.start, map.end));
    let offset = map.offset;
    let huge = map.has(b"ht");
    if map.shared && !huge && map.name.starts_with(b"/dev/zero (deleted)") {
        let object = shared_memory::collect(&name, &link(), map.dev, map.ino, all)?;
        return Ok(Backing::SharedAnonymous { object, offset });
    }
    if aio::is_ring(&map.name) {
        return Ok(Backing::AioRing { slot: 0, head: 0, tail: 0, events: Vec::new() });
    }
    if map.shared && map.name.starts_with(b"/SYSV") {
        let object = shared_memory::collect(&name, &link(), map.dev, map.ino, all)?;
        if all.is_segment(object) {
            return Ok(Backing::SystemV { object, offset, writable: map.has(b"mw") });
        }
        if huge {
            let name = format!("System V shared memory {}", map.ino);
            return Err(Error::unsupported(pid, name, "its size is not one of whole huge pages: make it larger"));
        }
    }
    // A shared mapping that may be written (now or after mprotect) came from a descriptor open for writing.
    let writable = map.shared && map.has(b"mw");
    let file = mapped_file(pid, &name, link, map.dev, map.ino, writable, all)?;
    if huge {
        let page_size = hugetlb::page_size_at(&link()).and_then(|size| size.ok_or(io::ErrorKind::InvalidData.into()));
        let page_size = page_size.context(|| format!("look at {}", link().display()))?;
        return Ok(Backing::HugePages { file, offset, page_size, shared: map.shared });
    }
    Ok(if map.shared { Backing::SharedFile { file, offset } } else { Backing::PrivateFile { file, offset } })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protection_keys_are_refused_by_name() {
        let mapped =
            |key, prot: i32| Mapped { start: 0x1000, end: 0x2000, key, prot: prot as u8, ..Default::default() };
        let text = refuse_special(7, &mapped(3, libc::PROT_READ), false).unwrap_err().to_string();
        assert!(text.contains("1000-2000") && text.contains("protection key"), "{text}");
        assert!(refuse_special(7, &mapped(0, libc::PROT_READ), false).is_ok());
        // The kernel gives such memory a key by itself.
        assert!(refuse_special(7, &mapped(1, libc::PROT_EXEC), false).is_ok());
    }
}
