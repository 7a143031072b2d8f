//! The kernel's own mappings in a restored process: `[vdso]`, whose functions tell the time without a system call, and
//! `[vvar…]`, their data.
//!
//! Programs keep the addresses of these functions, so something that works must be where they were. At first the
//! mappings of the restoring process are parked, at the distances they have: the vdso finds its data by distance. If
//! they and the image's are the same, each is moved to its old place at the end. Otherwise they stay parked, and the
//! image's vdso is mapped at its old place as ordinary memory in which every exported function begins with a jump to the
//! same function of this kernel, or does without one. It is a whole ELF file still, for programs that look for functions
//! later.
//!
//! The old `[vvar…]` ranges become zero pages, because old code may run once more: in a thread that was inside a function
//! at the dump, or in the frame that a signal handler returns to. It finds another sequence number than it began with,
//! begins again, finds clock mode 0 (none, in all kernels) and makes the system call. Without the pages it would crash.

use super::{
    environment::{Environment, KernelMapping, is_kernel_mapping},
    program::Program,
};
use crate::{
    error::{Error, Result},
    image::Image,
    kernel::arch,
    tree::thread,
};
use object::{
    LittleEndian,
    elf::{self, FileHeader64, Sym64},
    read::{
        ReadRef, StringTable,
        elf::{Dyn, FileHeader, GnuHashTable, HashTable, ProgramHeader, Sym},
    },
};
use standstill_images::types::{AddressSpace, Backing, Task, Vma};
use std::{collections::BTreeMap, ops::Range};

/// What becomes of the kernel's mappings in all processes of a restore.
pub(crate) struct Vdso<'a> {
    image: &'a Image,
    env: &'a Environment,
    /// Where this kernel's mappings wait, in every process.
    parked: u64,
    /// The image's vdso, if this kernel has another one.
    proxy: Option<Proxy>,
}

impl<'a> Vdso<'a> {
    /// Bytes of address space that [`Vdso::park`] needs.
    pub(crate) fn parking_size(env: &Environment) -> u64 {
        match &env.kernel_mappings[..] {
            [first, .., last] | [first @ last] => last.start + last.len - first.start,
            [] => 0,
        }
    }

    /// Decides, and refuses what cannot be served. `parked`: an address that is free in all processes, for good.
    pub(crate) fn plan(image: &'a Image, env: &'a Environment, parked: u64) -> Result<Self> {
        let mut plan = Self { image, env, parked, proxy: None };
        for task in image.tasks.values() {
            let Some(live) = &task.live else { continue };
            let space = &image.spaces[&live.address_space];
            if matches!(plan.fit(space), Fit::Other) {
                plan.proxy(task, space).map_err(|reason| Error::ImageContent {
                    dir: image.dir.clone(),
                    reason: format!(
                        "it was made on kernel {}, whose vdso differs from this one's: {reason}; restore it there",
                        image.inventory.kernel
                    ),
                })?;
            }
        }
        Ok(plan)
    }

    fn proxy(&mut self, task: &Task, space: &AddressSpace) -> Result<(), String> {
        let old = &self.image.inventory.vdso;
        if self.proxy.is_none() {
            let own_at = self.parked_mappings().find(|(m, _)| m.name == VDSO).map_or(0, |(_, at)| at);
            self.proxy = Some(Proxy::new(old, &self.env.vdso, own_at)?);
        }
        let mut pieces = kernel_vmas(space).filter(|v| is_vdso(v));
        let (Some(vma), None, Some(proxy)) = (pieces.next(), pieces.next(), &self.proxy) else {
            return Err(format!("process {} has it in pieces, or only its data", task.pid));
        };
        if vma.end - vma.start != old.len() as u64 {
            return Err(format!("that of process {} has another size than the image's", task.pid));
        }
        for t in task.live.iter().flat_map(|l| &l.threads) {
            let ip = thread::registers(&t.context).0.ip();
            if proxy.is_overwritten(ip.wrapping_sub(vma.start)) {
                return Err(format!("thread {} was about to call one of its functions at the dump", t.tid));
            }
        }
        Ok(())
    }

    fn fit(&self, space: &AddressSpace) -> Fit {
        let Some(first) = kernel_vmas(space).next() else { return Fit::Nothing };
        let own = self.env.kernel_mappings.iter();
        let own = own.map(|m| (m.name.as_bytes(), m.start - self.env.kernel_mappings[0].start, m.len));
        let old = kernel_vmas(space).map(|v| (name(v), v.start - first.start, v.end - v.start));
        if own.eq(old) && self.image.inventory.vdso == self.env.vdso { Fit::Same } else { Fit::Other }
    }

    /// Where the mappings are parked.
    pub(crate) fn parking(&self) -> Range<u64> {
        self.parked..self.parked + Self::parking_size(self.env)
    }

    fn parked_mappings(&self) -> impl Iterator<Item = (&KernelMapping, u64)> {
        let first = self.env.kernel_mappings.first().map_or(0, |m| m.start);
        self.env.kernel_mappings.iter().map(move |m| (m, self.parked + (m.start - first)))
    }

    /// Moves the restoring process's mappings out of the way; children inherit them there.
    pub(crate) fn park(&self, program: &mut Program) {
        for (m, to) in self.parked_mappings() {
            move_mapping(m, m.start, to, program);
        }
    }

    /// Gives a process what its image had, once it forks no more.
    pub(crate) fn restore(&self, pid: i32, space: &AddressSpace, program: &mut Program) {
        match (self.fit(space), &self.proxy) {
            (Fit::Nothing, _) => {
                for (m, at) in self.parked_mappings() {
                    program.call("unmap a kernel mapping", libc::SYS_munmap, &[at.into(), m.len.into()]);
                }
            }
            (Fit::Other, Some(proxy)) => {
                for vma in kernel_vmas(space) {
                    if is_vdso(vma) {
                        proxy.restore(pid, vma, program);
                    } else {
                        map(vma, libc::PROT_READ, program);
                    }
                }
            }
            _ => {
                for ((m, from), vma) in self.parked_mappings().zip(kernel_vmas(space)) {
                    move_mapping(m, from, vma.start, program);
                }
            }
        }
    }

    /// A `syscall` instruction that is there when the restorer is not.
    pub(crate) fn syscall_instruction(&self, pid: i32, space: &AddressSpace) -> Result<u64> {
        let old = kernel_vmas(space).find(|v| is_vdso(v)).map(|v| v.start);
        let parked = self.parked_mappings().find(|(m, _)| m.name == VDSO).map(|(_, at)| at);
        let own = match self.fit(space) {
            Fit::Other => parked,
            _ => old,
        };
        let inside = |code: &[u8], at: Option<u64>| Some(at? + arch::find_syscall(code)? as u64);
        inside(&self.env.vdso, own)
            .or_else(|| inside(&self.proxy.as_ref()?.bytes, old))
            .ok_or_else(|| Error::Target(format!("process {pid} has no vdso, so the restorer cannot leave it")))
    }
}

const VDSO: &str = "[vdso]";

/// How the kernel's mappings in an image compare to this kernel's.
enum Fit {
    /// There are none.
    Nothing,
    Same,
    Other,
}

fn kernel_vmas(space: &AddressSpace) -> impl Iterator<Item = &Vma> {
    space.vmas.iter().filter(|v| is_kernel_mapping(&String::from_utf8_lossy(name(v))))
}

fn name(vma: &Vma) -> &[u8] {
    match &vma.backing {
        Backing::Kernel { name } => &name.0,
        _ => &[],
    }
}

fn is_vdso(vma: &Vma) -> bool {
    name(vma) == VDSO.as_bytes()
}

fn move_mapping(mapping: &KernelMapping, from: u64, to: u64, program: &mut Program) {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let args = [from.into(), mapping.len.into(), mapping.len.into(), flags.into(), to.into()];
    program.call_expecting(format!("move {}", mapping.name), libc::SYS_mremap, &args, to);
}

/// Anonymous memory in the place of one of the old kernel's mappings.
fn map(vma: &Vma, prot: i32, program: &mut Program) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let args = [vma.start.into(), (vma.end - vma.start).into(), prot.into(), flags.into(), (-1).into(), 0.into()];
    let label = format!("map what was {}", String::from_utf8_lossy(name(vma)));
    program.call_expecting(label, libc::SYS_mmap, &args, vma.start);
}

/// The vdso of another kernel whose functions lead to this kernel's.
struct Proxy {
    bytes: Vec<u8>,
    /// What was written where.
    patches: BTreeMap<usize, Vec<u8>>,
}

impl Proxy {
    /// Replaces the functions of `old` by those of `own`, which lies at `own_at`.
    fn new(old: &[u8], own: &[u8], own_at: u64) -> Result<Self, String> {
        let own = if own.is_empty() { Vec::new() } else { exports(own, "this kernel's")? };
        let mut proxy = Self { bytes: old.to_vec(), patches: BTreeMap::new() };
        for function in exports(old, "the image's")? {
            let name = &function.name;
            let code = match own.iter().find(|f| f.plain_name() == function.plain_name()) {
                Some(f) => arch::jump(own_at + f.offset as u64),
                None => arch::vdso_substitute(function.plain_name())
                    .ok_or_else(|| format!("this kernel has no function {name}"))?,
            };
            if code.len() > function.size {
                return Err(format!("its function {name} is too short to be replaced"));
            }
            let place =
                function.offset.checked_add(code.len()).and_then(|end| proxy.bytes.get_mut(function.offset..end));
            place.ok_or_else(|| format!("its function {name} lies outside"))?.copy_from_slice(&code);
            if proxy.patches.insert(function.offset, code.clone()).is_some_and(|other| other != code) {
                return Err(format!("its function {name} is also another one"));
            }
        }
        let ends = proxy.patches.iter().map(|(at, code)| at + code.len());
        if ends.zip(proxy.patches.keys().skip(1)).any(|(end, next)| end > *next) {
            return Err("its functions overlap".into());
        }
        Ok(proxy)
    }

    /// Whether a byte belongs to what was written over a function, the first byte excepted.
    fn is_overwritten(&self, offset: u64) -> bool {
        let Ok(offset) = usize::try_from(offset) else { return false };
        self.patches.range(..offset).next_back().is_some_and(|(at, code)| offset < at + code.len())
    }

    fn restore(&self, pid: i32, vma: &Vma, program: &mut Program) {
        map(vma, libc::PROT_READ | libc::PROT_WRITE, program);
        let bytes = program.data(&self.bytes);
        let local = program.words(&[0, self.bytes.len() as u64]);
        program.point(local, 0, bytes);
        let remote = program.words(&[vma.start, self.bytes.len() as u64]);
        let args = [pid.into(), local, 1.into(), remote, 1.into(), 0.into()];
        program.call_expecting("write the old vdso", libc::SYS_process_vm_writev, &args, self.bytes.len());
        let prot = libc::PROT_READ | libc::PROT_EXEC;
        let args = [vma.start.into(), self.bytes.len().into(), prot.into()];
        program.call("protect the old vdso", libc::SYS_mprotect, &args);
    }
}

/// A function that a vdso offers.
struct Function {
    name: String,
    offset: usize,
    size: usize,
}

impl Function {
    fn plain_name(&self) -> &str {
        self.name.strip_prefix(arch::VDSO_PREFIX).unwrap_or(&self.name)
    }
}

/// The functions among the dynamic symbols of an ELF file in memory, found as the dynamic linker finds them: there may be
/// no section headers.
fn exports(file: &[u8], whose: &str) -> Result<Vec<Function>, String> {
    let unreadable = |e: object::read::Error| format!("{whose} cannot be read ({e})");
    let missing = |what: &str| format!("{whose} has no usable {what}");
    let header = FileHeader64::<LittleEndian>::parse(file).map_err(unreadable)?;
    let endian = header.endian().map_err(unreadable)?;
    let segments = header.program_headers(endian, file).map_err(unreadable)?;
    let code = segments.iter().find(|s| s.p_type(endian) == elf::PT_LOAD).ok_or_else(|| missing("segment"))?;
    let dynamic = segments.iter().find_map(|s| s.dynamic(endian, file).transpose());
    let dynamic = dynamic.ok_or_else(|| missing("dynamic section"))?.map_err(unreadable)?;
    let value =
        |tag: i64| dynamic.iter().find(|d| d.tag32(endian).map(i64::from) == Some(tag)).map(|d| d.d_val(endian));
    // Some vdsos are linked to an address other than zero.
    let offset = |address: u64| address.wrapping_sub(code.p_vaddr(endian)).wrapping_add(code.p_offset(endian));
    let table = |tag: i64| file.get(offset(value(tag)?) as usize..);
    let symbols = table(elf::DT_SYMTAB).ok_or_else(|| missing("symbol table"))?;
    let count = table(elf::DT_HASH)
        .and_then(|t| HashTable::<FileHeader64<LittleEndian>>::parse(endian, t).ok())
        .map(|t| t.symbol_table_length())
        .or_else(|| {
            let table = GnuHashTable::<FileHeader64<LittleEndian>>::parse(endian, table(elf::DT_GNU_HASH)?).ok()?;
            // A base beyond the file would make the length overflow.
            if table.symbol_base() as usize > file.len() { None } else { table.symbol_table_length(endian) }
        })
        .ok_or_else(|| missing("hash table"))?;
    let symbols: &[Sym64<LittleEndian>] =
        symbols.read_slice_at(0, count as usize).map_err(|()| missing("symbol table"))?;
    let strings = table(elf::DT_STRTAB).ok_or_else(|| missing("string table"))?;
    let strings = StringTable::new(strings, 0, value(elf::DT_STRSZ).unwrap_or(0));
    let mut found = Vec::new();
    for symbol in symbols {
        let callable = matches!(symbol.st_type(), elf::STT_FUNC | elf::STT_NOTYPE);
        if callable && symbol.is_definition(endian, strings) {
            let name = symbol.name(endian, strings).map_err(unreadable)?;
            found.push(Function {
                name: String::from_utf8_lossy(name).into_owned(),
                offset: offset(symbol.st_value(endian)) as usize,
                size: symbol.st_size(endian) as usize,
            });
        }
    }
    Ok(found)
}

#[cfg(test)]
#[path = "vdso_tests.rs"]
mod tests;
