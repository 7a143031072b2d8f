//! `/proc/<pid>/smaps` (proc(5)): mappings with their attributes.

use crate::{
    kernel::proc,
    observe::{VmaEntry, vma_bit},
};
use std::{fs, io, os::unix::ffi::OsStrExt};

/// A mapping as the kernel shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mapped {
    pub start: u64,
    pub end: u64,
    /// `PROT_*` bits.
    pub prot: u8,
    pub shared: bool,
    /// Bytes.
    pub offset: u64,
    /// As stat(2) gives it.
    pub dev: u64,
    pub ino: u64,
    pub name: Vec<u8>,
    /// Attributes (`VmFlags`) of the first 32 bits of `vm_flags`.
    pub flags: u32,
    /// The letters of the others.
    pub others: Vec<[u8; 2]>,
    /// Protection key.
    pub key: u8,
    /// There is certainly no page that this address space alone has, nor a guard.
    pub untouched: bool,
}

impl Mapped {
    /// Whether an attribute is set.
    pub(crate) fn has(&self, flag: &[u8; 2]) -> bool {
        vma_bit(flag).map_or_else(|| self.others.contains(flag), |bit| self.flags & bit != 0)
    }
}

impl From<&VmaEntry> for Mapped {
    fn from(seen: &VmaEntry) -> Self {
        Self {
            start: seen.start,
            end: seen.end,
            prot: seen.prot,
            shared: seen.shared,
            offset: seen.offset,
            dev: seen.dev,
            ino: seen.ino,
            name: seen.name.as_os_str().as_bytes().to_vec(),
            key: seen.key,
            untouched: seen.untouched,
            flags: seen.flags,
            others: Vec::new(),
        }
    }
}

/// All mappings of a process.
pub(crate) fn read(pid: i32) -> io::Result<Vec<Mapped>> {
    let text = fs::read(proc::path(pid, "smaps"))?;
    parse(&text).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/pid/smaps has an unknown format"))
}

fn parse(text: &[u8]) -> Option<Vec<Mapped>> {
    let mut all: Vec<Mapped> = Vec::new();
    for line in text.split(|&b| b == b'\n') {
        if let Some(flags) = line.strip_prefix(b"VmFlags:") {
            let last = all.last_mut()?;
            for letters in flags.split(|&b| b == b' ').filter_map(|word| <[u8; 2]>::try_from(word).ok()) {
                match vma_bit(&letters) {
                    Some(bit) => last.flags |= bit,
                    None => last.others.push(letters),
                }
            }
        } else if let Some(key) = line.strip_prefix(b"ProtectionKey:") {
            all.last_mut()?.key = std::str::from_utf8(key).ok()?.trim().parse().ok()?;
        } else if line.first().is_some_and(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(b)) {
            // Other lines begin with a capital letter.
            all.push(header(line)?);
        }
    }
    Some(all)
}

fn header(line: &[u8]) -> Option<Mapped> {
    let mut fields = line.splitn(6, |&b| b == b' ');
    let mut text = || std::str::from_utf8(fields.next()?).ok();
    let hex = |s: &str| u64::from_str_radix(s, 16).ok();
    let (start, end) = text()?.split_once('-')?;
    let (start, end) = (hex(start)?, hex(end)?);
    let perms = text()?.as_bytes();
    let bit = |n: usize, c: u8, value: i32| if perms.get(n) == Some(&c) { value as u8 } else { 0 };
    let prot = bit(0, b'r', libc::PROT_READ) | bit(1, b'w', libc::PROT_WRITE) | bit(2, b'x', libc::PROT_EXEC);
    let shared = perms.get(3) == Some(&b's');
    let offset = hex(text()?)?;
    let (major, minor) = text()?.split_once(':')?;
    let dev = nix::sys::stat::makedev(hex(major)?, hex(minor)?);
    let ino = text()?.parse().ok()?;
    let name = unescape(fields.next().unwrap_or(b"").trim_ascii_start());
    Some(Mapped { start, end, prot, shared, offset, dev, ino, name, ..Default::default() })
}

/// The kernel writes newlines of names as `\012`.
fn unescape(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((&byte, tail)) = rest.split_first() {
        if let Some(after) = rest.strip_prefix(b"\\012") {
            out.push(b'\n');
            rest = after;
        } else {
            out.push(byte);
            rest = tail;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_mapping_with_flags() {
        let text = b"7f00-8f00 r-xp 00001000 fe:01 77                  /lib/a b\\012c\n\
                     Size:                  4 kB\nProtectionKey:         3\nVmFlags: rd ex mr mw me gd \n\
                     7ffd0000-7ffe0000 rw-s 00000000 00:00 0\nVmFlags: sh\n";
        let all = parse(text).unwrap();
        assert_eq!(all.len(), 2);
        assert_eq!((all[0].start, all[0].end, all[0].prot, all[0].offset), (0x7f00, 0x8f00, 5, 0x1000));
        assert_eq!(all[0].name, b"/lib/a b\nc");
        assert!(all[0].has(b"gd") && !all[0].has(b"sh"));
        assert_eq!((all[0].key, all[1].key), (3, 0));
        assert!(all[1].shared && all[1].name.is_empty());
    }

    #[test]
    fn nonsense_is_an_error() {
        assert!(parse(b"7f00 r-xp\n").is_none());
        assert!(parse(b"VmFlags: rd\n").is_none());
    }
}
