//! Memory content that can be made and checked from a seed alone.

/// A repeatable sequence of words: position and seed decide each of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pattern(u64);

impl Pattern {
    /// The pattern of a seed.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Word number `index`, never zero.
    pub const fn word(self, index: u64) -> u64 {
        let mut x = self.0.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)) | 1
    }

    /// Fills memory with the words from `first` on.
    pub fn fill(self, memory: &mut [u64], first: u64) {
        for (index, word) in (first..).zip(memory.iter_mut()) {
            *word = self.word(index);
        }
    }

    /// Position of the first word that is not as [`Pattern::fill`] left it.
    pub fn first_wrong(self, memory: &[u64], first: u64) -> Option<usize> {
        (first..).zip(memory).position(|(index, word)| *word != self.word(index))
    }

    /// The first `length` bytes of the pattern.
    pub fn bytes(self, length: usize) -> Vec<u8> {
        (0..length.div_ceil(8) as u64).flat_map(|index| self.word(index).to_le_bytes()).take(length).collect()
    }
}
