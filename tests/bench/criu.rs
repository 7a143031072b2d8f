//! What CRIU says about a dump of its own, in the file `stats-dump`: two magic numbers, a length, and a protocol buffer
//! whose field 1 describes the dump.

/// Times of a dump in microseconds: from the freeze to the thaw, and the part of it that copied memory.
pub(crate) fn frozen_us(file: &[u8]) -> Option<u64> {
    const HEADER: usize = 12;
    /// Field numbers of the message about a dump.
    const FREEZING: u64 = 1;
    const FROZEN: u64 = 2;
    let dump = fields(file.get(HEADER..)?).find(|(number, _)| *number == 1)?.1;
    let Value::Bytes(dump) = dump else { return None };
    let field = |wanted| {
        fields(dump).find_map(|(number, value)| match value {
            Value::Number(value) if number == wanted => Some(value),
            _ => None,
        })
    };
    Some(field(FREEZING)? + field(FROZEN)?)
}

enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// Fields of a protocol buffer by their numbers; ends at a kind that does not occur here.
fn fields(mut rest: &[u8]) -> impl Iterator<Item = (u64, Value<'_>)> {
    std::iter::from_fn(move || {
        let key = varint(&mut rest)?;
        let value = match key & 7 {
            0 => Value::Number(varint(&mut rest)?),
            2 => {
                let length = usize::try_from(varint(&mut rest)?).ok()?;
                let (bytes, behind) = rest.split_at_checked(length)?;
                rest = behind;
                Value::Bytes(bytes)
            }
            _ => return None,
        };
        Some((key >> 3, value))
    })
}

fn varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, behind) = rest.split_first()?;
        *rest = behind;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    #[test]
    fn times_are_found() {
        // freezing_time 300, frozen_time 5, memdump_time 1.
        let mut file = vec![0; 8];
        file.extend([9, 0, 0, 0, 0x0a, 7, 0x08, 0xac, 0x02, 0x10, 5, 0x18, 1]);
        assert_eq!(super::frozen_us(&file), Some(305));
        assert_eq!(super::frozen_us(&file[..14]), None);
        assert_eq!(super::frozen_us(&[]), None);
    }
}
