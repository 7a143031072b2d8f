//! Probes for what dump and restore do with memory.

use super::{Failed, Outcome, child::Bench, sys, sys::Pages};
use crate::{
    kernel::{
        PAGE, arch,
        pagemap::{Pagemap, Range, Region},
        proc,
    },
    restore::environment,
};
use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
};
use std::{fs::OpenOptions, os::unix::fs::FileExt};

/// Lies at the same address in the child.
static MARK: [u8; 16] = *b"standstill check";

pub(super) fn vm_read(bench: &Bench) -> Outcome {
    let mut copy = [0; MARK.len()];
    std::fs::File::open(proc::path(bench.child()?.pid(), "mem"))?.read_exact_at(&mut copy, MARK.as_ptr() as u64)?;
    Failed::unless(copy == MARK, "what was read is not what is there")?;
    Ok(String::new())
}

/// Code of the `[vdso]` that is mapped here, and how much of it is in use.
fn vdso() -> Result<(u64, usize, usize), Failed> {
    let own = std::process::id() as i32;
    let mapped = proc::maps(own)?.into_iter().find(|m| m.name == "[vdso]");
    let start = mapped.ok_or_else(|| Failed::No("this process has no [vdso]".into()))?.start;
    let code = environment::vdso(own).map_err(|e| Failed::CannotTell(e.to_string()))?;
    let used = code.iter().rposition(|&b| b != 0).map_or(0, |p| p + 1).next_multiple_of(16);
    Ok((start, used, code.len()))
}

pub(super) fn vdso_room(_: &Bench) -> Outcome {
    let (_, used, len) = vdso()?;
    let room = len.saturating_sub(used);
    let detail = format!("{room} bytes at its end, {} are used", arch::TRAMPOLINE);
    Failed::unless(room >= arch::TRAMPOLINE, &detail)?;
    Ok(detail)
}

/// Writes zeros over the zeros at the end of the child's `[vdso]`, which no process may write to itself.
pub(super) fn forced_write(bench: &Bench) -> Outcome {
    let (start, _, len) = vdso()?;
    let memory = OpenOptions::new().write(true).open(proc::path(bench.stopped()?.pid(), "mem"))?;
    match memory.write_all_at(&[0], start + len as u64 - 1) {
        Ok(()) => Ok(String::new()),
        Err(e) if e.raw_os_error() == Some(libc::EIO) => {
            Err(Failed::No("refused: see proc_mem.force_override of the kernel's command line".into()))
        }
        Err(e) => Err(e.into()),
    }
}

pub(super) fn scan(_: &Bench) -> Outcome {
    let pages = Pages::new(2)?;
    let (start, end) = (pages.start(), pages.start() + 2 * PAGE);
    let mut found = Vec::new();
    Pagemap::open(std::process::id() as i32)?.private(Range { start, end }, &[], &mut found)?;
    Failed::unless(
        found == [Region { range: Range { start, end }, guard: false }],
        "pages that were written to are not reported",
    )?;
    Ok(String::new())
}

pub(super) fn frames(_: &Bench) -> Outcome {
    let pages = Pages::new(1)?;
    match Pagemap::open(std::process::id() as i32)?.frames(pages.start(), 1)?.first() {
        None | Some(0) => Err(Failed::CannotTell("the kernel hides them".into())),
        Some(_) => Ok(String::new()),
    }
}

pub(super) fn guards(_: &Bench) -> Outcome {
    const MADV_GUARD_INSTALL: i32 = 102;
    let pages = Pages::new(2)?;
    match pages.advise(1, MADV_GUARD_INSTALL) {
        Err(nix::errno::Errno::EINVAL) => {
            return Err(Failed::No("this kernel has no guard pages (Linux 6.13), so no tree has any".into()));
        }
        installed => installed?,
    }
    let (start, end) = (pages.start(), pages.start() + 2 * PAGE);
    let mut found = Vec::new();
    Pagemap::open(std::process::id() as i32)?.private(Range { start, end }, &[], &mut found)?;
    let guards: Vec<Range> = found.iter().filter(|r| r.guard).map(|r| r.range).collect();
    let why = "this kernel has guard pages, but PAGEMAP_SCAN does not report them";
    Failed::unless(guards == [Range { start: start + PAGE, end }], why)?;
    Ok(String::new())
}

pub(super) fn map_files(bench: &Bench) -> Outcome {
    let pid = bench.child()?.pid();
    let mapped = proc::maps(pid)?.into_iter().find(|m| m.name.starts_with('/'));
    let file = mapped.ok_or_else(|| Failed::CannotTell("no file is mapped to try it on".into()))?;
    std::fs::metadata(proc::path(pid, &format!("map_files/{:x}-{:x}", file.start, file.end)))?;
    Ok(String::new())
}

pub(super) fn mm_map(_: &Bench) -> Outcome {
    // struct prctl_mm_map as this program fills it.
    const KNOWN: u32 = 104;
    let size = sys::mm_map_size()?;
    Failed::unless(size >= KNOWN, &format!("the kernel's structure has {size} bytes, not {KNOWN}"))?;
    Ok(format!("{size} bytes"))
}

pub(super) fn memfd(_: &Bench) -> Outcome {
    let file = memfd_create(c"standstill check", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW))?;
    Failed::unless(fcntl(&file, FcntlArg::F_GET_SEALS)? == SealFlag::F_SEAL_GROW.bits(), "a seal is not there")?;
    Ok(String::new())
}

pub(super) fn userfaultfd(_: &Bench) -> Outcome {
    sys::userfaultfd(0)?;
    Ok(String::new())
}

pub(super) fn write_tracking(_: &Bench) -> Outcome {
    const WP_UNPOPULATED: u64 = 1 << 13;
    const WP_ASYNC: u64 = 1 << 15;
    sys::userfaultfd(WP_ASYNC | WP_UNPOPULATED)?;
    Ok(String::new())
}
