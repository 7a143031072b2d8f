//! Small numbers for objects, by first appearance.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
};

/// A hash for kernel addresses: nobody outside the kernel chooses them.
#[derive(Default)]
pub(super) struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_ne_bytes(word));
        }
    }

    fn write_u64(&mut self, word: u64) {
        // Objects are aligned: their differences are in the middle bits, which a multiplication spreads upwards.
        let mixed = (self.0.rotate_left(23) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 32);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// Numbers objects, by their address, from 0 in the order in which they are first asked for.
#[derive(Default)]
pub(super) struct Ids(HashMap<u64, u32, BuildHasherDefault<AddressHasher>>);

impl Ids {
    /// Numbers for about so many objects.
    pub(super) fn with_capacity(capacity: usize) -> Self {
        Self(HashMap::with_capacity_and_hasher(capacity, Default::default()))
    }

    /// The number of an object.
    pub(super) fn of(&mut self, object: u64) -> u32 {
        let next = self.0.len() as u32;
        *self.0.entry(object).or_insert(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_by_first_appearance() {
        let mut ids = Ids::default();
        let numbers: Vec<u32> = [70, 30, 70, 10, 30].into_iter().map(|n| ids.of(n)).collect();
        assert_eq!(numbers, [0, 1, 0, 2, 1]);
    }
}
