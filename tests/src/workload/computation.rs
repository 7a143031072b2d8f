//! A long computation whose result can be compared.

use super::{Mapping, Pattern};

/// Words that a step changes.
const STEP_WORDS: usize = 64 * 512;

/// An iterated hash over an array: each step depends on all before it.
pub struct Computation {
    memory: Mapping,
    hash: u64,
    step: u64,
}

impl Computation {
    /// Begins with an array of so many MiB.
    pub fn new(mib: usize) -> Self {
        let memory = Mapping::private(mib << 20).expect("map the array");
        Pattern::new(1).fill(memory.words_mut(), 0);
        Self { memory, hash: 1, step: 0 }
    }

    /// Does one step: words all over the array, chosen by the hash, and 64 pages in a row.
    pub fn step(&mut self) {
        let memory = self.memory;
        let words = memory.words_mut();
        for _ in 0..64 {
            let at = self.hash as usize % words.len();
            self.hash = mix(self.hash ^ words[at], self.step);
            words[at] = self.hash;
        }
        let start = self.hash as usize % (words.len() - STEP_WORDS);
        for word in &mut words[start..start + STEP_WORDS] {
            self.hash = mix(self.hash, *word);
            *word ^= self.hash;
        }
        self.step += 1;
    }

    /// Steps done.
    pub const fn steps(&self) -> u64 {
        self.step
    }

    /// A value that depends on every word of the array and on every step.
    pub fn result(&self) -> u64 {
        self.memory.words().iter().fold(self.hash, |hash, word| mix(hash, *word))
    }
}

const fn mix(hash: u64, word: u64) -> u64 {
    (hash ^ word).rotate_left(23).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(word >> 7)
}
