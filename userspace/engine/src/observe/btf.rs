//! Where the fields of the running kernel's structures are, from its BTF.
//!
//! Format: <https://docs.kernel.org/bpf/btf.html>.

use super::{ObserveError, Result};
use std::{collections::HashMap, fs, path::Path};

const PATH: &str = "/sys/kernel/btf/vmlinux";

#[cfg(test)]
const KIND_PTR: u32 = 2;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_TYPEDEF: u32 = 8;
const KIND_VOLATILE: u32 = 9;
const KIND_CONST: u32 = 10;
const KIND_RESTRICT: u32 = 11;
const KIND_TYPE_TAG: u32 = 18;

/// Unions and structures without a name inside each other that are looked through.
const DEPTH: u32 = 16;

/// A kernel's types.
pub(super) struct Btf {
    data: Vec<u8>,
    strings: usize,
    /// Offset of each type in `data`; type 0 is void.
    types: Vec<u32>,
    structs: HashMap<Vec<u8>, u32>,
}

/// A field found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Field {
    /// Bits from the beginning of the structure.
    pub bit: u32,
    ty: u32,
}

impl Field {
    /// Bytes from the beginning of the structure.
    pub(super) fn byte(self) -> u32 {
        self.bit / 8
    }
}

impl Btf {
    /// The running kernel's, with an index of `structs`.
    pub(super) fn read(structs: &[&str]) -> Result<Self> {
        let data = fs::read(PATH).map_err(|source| ObserveError::NoBtf { path: Path::new(PATH).into(), source })?;
        Self::parse(data, structs)
    }

    fn parse(data: Vec<u8>, wanted: &[&str]) -> Result<Self> {
        let mut btf = Self { data, strings: 0, types: vec![0], structs: HashMap::new() };
        btf.index(wanted).ok_or(ObserveError::BadBtf("it is truncated or of an unknown format"))?;
        Ok(btf)
    }

    fn index(&mut self, wanted: &[&str]) -> Option<()> {
        if self.data.get(..3)? != [0x9f, 0xeb, 1] {
            return None;
        }
        let header = self.u32(4)? as usize;
        let mut at = header.checked_add(self.u32(8)? as usize)?;
        let end = at.checked_add(self.u32(12)? as usize)?;
        self.strings = header.checked_add(self.u32(16)? as usize)?;
        // Most types are a few words long.
        self.types.reserve(end.saturating_sub(at) / 20);
        while at < end {
            let info = self.u32(at + 4)?;
            let (kind, vlen) = ((info >> 24) & 0x1f, (info & 0xffff) as usize);
            if kind == KIND_STRUCT {
                let name = self.string(self.u32(at)?)?;
                if wanted.iter().any(|w| w.as_bytes() == name) {
                    let name = name.to_vec();
                    self.structs.entry(name).or_insert(self.types.len() as u32);
                }
            }
            self.types.push(at as u32);
            at += 12
                + match kind {
                    // Pointers, forward declarations, typedefs, qualifiers, functions, floats, type tags.
                    2 | 7 | 8..=12 | 16 | 18 => 0,
                    // Integers, variables, declaration tags.
                    1 | 14 | 17 => 4,
                    3 => 12,
                    // Enums and parameters of functions.
                    6 | 13 => 8 * vlen,
                    // Members, variables in sections, 64-bit enums.
                    4 | 5 | 15 | 19 => 12 * vlen,
                    _ => return None,
                };
        }
        Some(())
    }

    fn u32(&self, at: usize) -> Option<u32> {
        Some(u32::from_le_bytes(self.data.get(at..at.checked_add(4)?)?.try_into().ok()?))
    }

    fn string(&self, offset: u32) -> Option<&[u8]> {
        let text = self.data.get(self.strings.checked_add(offset as usize)?..)?;
        text.split(|&b| b == 0).next()
    }

    /// Where `field` of `structure` is: a member, possibly of a member (`a.b`), possibly within unnamed structures and
    /// unions.
    pub(super) fn field(&self, structure: &'static str, field: &'static str) -> Result<Field> {
        self.find(structure, field).ok_or(ObserveError::MissingField { structure, field })
    }

    fn find(&self, structure: &str, field: &str) -> Option<Field> {
        let mut found = Field { bit: 0, ty: *self.structs.get(structure.as_bytes())? };
        for name in field.split('.') {
            let member = self.member(self.resolve(found.ty)?, name.as_bytes(), DEPTH)?;
            found = Field { bit: found.bit.checked_add(member.bit)?, ty: member.ty };
        }
        Some(found)
    }

    /// Size of a structure.
    pub(super) fn size_of(&self, structure: &'static str) -> Result<u32> {
        let missing = ObserveError::MissingField { structure, field: "(the structure itself)" };
        let size = || self.u32(*self.types.get(*self.structs.get(structure.as_bytes())? as usize)? as usize + 8);
        size().ok_or(missing)
    }

    /// Size of the elements of an array of structures.
    pub(super) fn element_size(&self, array: Field) -> Option<u32> {
        let at = *self.types.get(self.resolve(array.ty)? as usize)? as usize;
        if self.kind(at)? != KIND_ARRAY {
            return None;
        }
        let element = *self.types.get(self.resolve(self.u32(at + 12)?)? as usize)? as usize;
        matches!(self.kind(element)?, KIND_STRUCT | KIND_UNION).then(|| self.u32(element + 8))?
    }

    fn kind(&self, at: usize) -> Option<u32> {
        Some((self.u32(at + 4)? >> 24) & 0x1f)
    }

    /// Looks through typedefs and qualifiers.
    fn resolve(&self, mut ty: u32) -> Option<u32> {
        for _ in 0..DEPTH {
            let at = *self.types.get(ty as usize)? as usize;
            match self.kind(at)? {
                KIND_TYPEDEF | KIND_VOLATILE | KIND_CONST | KIND_RESTRICT | KIND_TYPE_TAG => ty = self.u32(at + 8)?,
                _ => return Some(ty),
            }
        }
        None
    }

    fn member(&self, ty: u32, name: &[u8], depth: u32) -> Option<Field> {
        let at = *self.types.get(ty as usize)? as usize;
        let kind = self.kind(at)?;
        if ty == 0 || depth == 0 || !matches!(kind, KIND_STRUCT | KIND_UNION) {
            return None;
        }
        let info = self.u32(at + 4)?;
        // With the kind flag, the upper byte of the offset is the width of a bit field.
        let mask = if info >> 31 == 1 { 0xff_ffff } else { u32::MAX };
        for n in 0..(info & 0xffff) as usize {
            let member = at + 12 + 12 * n;
            let (name_off, ty, bit) = (self.u32(member)?, self.u32(member + 4)?, self.u32(member + 8)? & mask);
            if self.string(name_off)? == name {
                return Some(Field { bit, ty });
            }
            if self.string(name_off)?.is_empty()
                && let Some(inner) = self.resolve(ty).and_then(|ty| self.member(ty, name, depth - 1))
            {
                return Some(Field { bit: bit.checked_add(inner.bit)?, ty: inner.ty });
            }
        }
        None
    }

    /// Whether a field is a pointer.
    #[cfg(test)]
    fn is_pointer(&self, field: Field) -> bool {
        self.resolve(field.ty).and_then(|ty| self.kind(self.types[ty as usize] as usize)) == Some(KIND_PTR)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// struct outer { int a; union { struct { int b; int c; }; long d; }; unsigned e: 1, f: 1; typedef inner *p; };
    /// struct pair { int x; int y; }; struct holder { struct pair all[3]; }
    fn sample() -> Vec<u8> {
        let mut strings = vec![0u8];
        let mut name = |s: &str| {
            let at = strings.len() as u32;
            strings.extend_from_slice(s.as_bytes());
            strings.push(0);
            at
        };
        let mut types: Vec<u32> = Vec::new();
        let mut add = |words: &[u32]| types.extend_from_slice(words);
        let info = |kind: u32, vlen: u32| kind << 24 | vlen;
        add(&[name("int"), info(1, 0), 4, 32]); // 1
        add(&[0, info(4, 2), 8, name("b"), 1, 0, name("c"), 1, 32]); // 2
        add(&[0, info(5, 2), 8, 0, 2, 0, name("d"), 1, 0]); // 3
        add(&[name("pair"), info(4, 2), 8, name("x"), 1, 0, name("y"), 1, 32]); // 4
        add(&[name("pair_t"), info(8, 0), 4]); // 5
        add(&[0, info(2, 0), 5]); // 6
        let bits = 1 << 24;
        add(&[name("outer"), info(4, 6) | 1 << 31, 32, name("a"), 1, 0, 0, 3, 64]);
        add(&[name("e"), 1, 128 | bits, name("f"), 1, 129 | bits, name("p"), 6, 192, name("q"), 5, 256]); // 7
        add(&[0, info(3, 0), 0, 4, 1, 3]); // 8
        add(&[name("holder"), info(4, 1), 24, name("all"), 8, 0]); // 9
        let mut data = vec![0x9f, 0xeb, 1, 0];
        for word in [24, 0, 4 * types.len() as u32, 4 * types.len() as u32, strings.len() as u32] {
            data.extend_from_slice(&word.to_le_bytes());
        }
        types.iter().for_each(|w| data.extend_from_slice(&w.to_le_bytes()));
        data.extend_from_slice(&strings);
        data
    }

    #[test]
    fn fields_of_all_shapes() {
        let btf = Btf::parse(sample(), &["outer", "pair", "holder"]).unwrap();
        let byte = |path| btf.field("outer", path).unwrap().byte();
        assert_eq!((byte("a"), byte("b"), byte("c"), byte("d"), byte("q.y")), (0, 8, 12, 8, 36));
        assert_eq!(btf.field("outer", "f").unwrap().bit, 129);
        assert!(btf.is_pointer(btf.field("outer", "p").unwrap()));
        assert_eq!(btf.size_of("pair").unwrap(), 8);
        assert_eq!(btf.element_size(btf.field("holder", "all").unwrap()), Some(8));
        assert_eq!(btf.element_size(btf.field("outer", "a").unwrap()), None);
    }

    #[test]
    fn what_is_missing_is_named() {
        let btf = Btf::parse(sample(), &["outer"]).unwrap();
        let text = btf.field("outer", "q.z").unwrap_err().to_string();
        assert_eq!(text, "struct outer of this kernel has no field q.z");
        assert!(btf.field("pair", "x").is_err());
        assert!(btf.size_of("pair").is_err());
    }

    #[test]
    fn any_truncation_is_an_error_or_harmless() {
        let whole = sample();
        for len in 0..whole.len() {
            if let Ok(btf) = Btf::parse(whole[..len].to_vec(), &["outer"]) {
                let _ = btf.field("outer", "q.y");
            }
        }
    }

    #[test]
    fn any_damage_is_an_error_or_harmless() {
        let whole = sample();
        for at in 0..whole.len() {
            for value in [0, 1, 4, 5, 0x7f, 0xff] {
                let mut damaged = whole.clone();
                damaged[at] = value;
                if let Ok(btf) = Btf::parse(damaged, &["outer", "pair"]) {
                    let _ = btf.field("outer", "q.y");
                    let _ = btf.size_of("pair");
                }
            }
        }
    }

    #[test]
    fn the_running_kernel() {
        let Ok(btf) = Btf::read(&["task_struct", "list_head"]) else { return };
        assert_eq!(btf.field("list_head", "prev").unwrap().byte(), 8);
        assert!(btf.is_pointer(btf.field("task_struct", "files").unwrap()));
        assert!(btf.size_of("task_struct").unwrap() > 1000);
    }
}
