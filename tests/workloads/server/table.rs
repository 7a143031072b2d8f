//! A hash table in one piece of memory, with linear probing, whose entries say what they are.

use standstill_tests::workload::{Mapping, Pattern};

/// Words of an entry: key, version, checksum, value.
const ENTRY: usize = 64;
const HEADER: usize = 3;
/// Entries in use, of eight.
const LOAD: usize = 6;

/// The table, and elsewhere the version that each key should have.
pub(crate) struct Table {
    memory: Mapping,
    entries: usize,
    versions: Vec<u32>,
}

impl Table {
    /// Fills a table with keys from 1 on, each in its first version.
    pub(crate) fn new(memory: Mapping) -> Self {
        let entries = memory.length() / 8 / ENTRY;
        let mut table = Self { memory, entries, versions: vec![0; entries * LOAD / 8] };
        for key in 1..=table.keys() {
            table.put(key);
        }
        table
    }

    /// How many keys there are.
    pub(crate) fn keys(&self) -> u64 {
        self.versions.len() as u64
    }

    /// Writes the next version of a key.
    pub(crate) fn put(&mut self, key: u64) {
        self.versions[key as usize - 1] += 1;
        let version = u64::from(self.versions[key as usize - 1]);
        let Some(place) = self.find(key) else { return };
        let entry = &mut self.memory.words_mut()[place * ENTRY..][..ENTRY];
        (entry[0], entry[1]) = (key, version);
        let mut sum = 0;
        for (word, value) in entry[HEADER..].iter_mut().zip(words(key, version)) {
            *word = value;
            sum = add(sum, value);
        }
        entry[2] = sum;
    }

    /// Reads a key's value; says what is wrong with it.
    pub(crate) fn get(&self, key: u64) -> Result<u64, String> {
        let want = u64::from(self.versions[key as usize - 1]);
        let place = self.find(key).ok_or_else(|| format!("key {key} is not in the table"))?;
        let entry = self.entry(place);
        if entry[0] != key {
            return Err(format!("key {key} is not in the table: its place {place} has key {}", entry[0]));
        }
        let sum = entry[HEADER..].iter().fold(0, |sum, word| add(sum, *word));
        if entry[2] != sum || !entry[HEADER..].iter().copied().eq(words(key, entry[1])) {
            return Err(format!("key {key}, version {}, is torn (place {place})", entry[1]));
        }
        if entry[1] != want {
            return Err(format!("key {key} has version {}, should have {want} (place {place})", entry[1]));
        }
        Ok(sum)
    }

    fn entry(&self, place: usize) -> &[u64] {
        &self.memory.words()[place * ENTRY..][..ENTRY]
    }

    /// The place of a key, or the free one where it belongs.
    fn find(&self, key: u64) -> Option<usize> {
        let first = ((u128::from(Pattern::new(key).word(0)) * self.entries as u128) >> 64) as usize;
        let places = (first..self.entries).chain(0..first);
        places.into_iter().find(|place| [0, key].contains(&self.entry(*place)[0]))
    }
}

fn words(key: u64, version: u64) -> impl Iterator<Item = u64> {
    let mut word = key.rotate_left(32) ^ version;
    std::iter::repeat_with(move || {
        word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        word
    })
    .take(ENTRY - HEADER)
}

const fn add(sum: u64, word: u64) -> u64 {
    sum.rotate_left(5) ^ word
}
