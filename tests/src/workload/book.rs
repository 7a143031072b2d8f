//! Memory whose pages say what they are, and a table elsewhere that knows what they should be.
//!
//! A page holds its number, its stamp (who wrote it, and which version of it this is), a checksum, and words that
//! follow from number and stamp. The table holds the stamp of each page. So a page that came back as it once was, as
//! another page, or half of it, is found and named.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::{Checker, Mapping, Pattern};

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Words of a page.
const WORDS: usize = PAGE / 8;
/// Number, stamp and checksum.
const HEADER: usize = 3;
/// Bits of a stamp that are the version; the others are the writer.
const VERSION_BITS: u32 = 48;

type Page = [u64; WORDS];

/// What a page contains that nobody has written yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fresh {
    Zeros,
    /// Words of a file that has this pattern.
    File(Pattern),
}

/// The pages of a mapping that one process writes.
#[derive(Clone)]
pub struct Book {
    memory: Mapping,
    /// Number of the first page of the memory: no two books have a number in common.
    first: u64,
    /// Which pages are ours: the first, and every how many.
    ours: (usize, usize),
    fresh: Fresh,
    /// A file behind shared memory, to write through as well.
    file: Option<Arc<File>>,
    /// Stamp of each page of ours; 0 for one that nobody has written.
    stamps: Vec<u64>,
}

impl Book {
    /// A book of memory that is all zeros. `name` makes its page numbers differ from those of others.
    pub fn new(memory: Mapping, name: u32) -> Self {
        Self::of_every(memory, name, (0, 1))
    }

    /// A book of those pages only that `ours` tells: the first, and every how many.
    pub fn of_every(memory: Mapping, name: u32, ours: (usize, usize)) -> Self {
        let pages = memory.length() / PAGE;
        let count = (ours.0..pages).step_by(ours.1).len();
        let first = u64::from(name) << 32;
        Self { memory, first, ours, fresh: Fresh::Zeros, file: None, stamps: vec![0; count] }
    }

    /// The same of a private mapping of a file that has a pattern.
    pub fn over_pattern(mut self, pattern: Pattern) -> Self {
        self.fresh = Fresh::File(pattern);
        self
    }

    /// The same of a shared mapping of a file; [`Book::write_to_file`] is allowed then.
    pub fn with_file(mut self, file: Arc<File>) -> Self {
        self.file = Some(file);
        self
    }

    /// The memory.
    pub const fn memory(&self) -> Mapping {
        self.memory
    }

    /// How many pages are ours.
    pub fn len(&self) -> usize {
        self.stamps.len()
    }

    /// True when no page is ours.
    pub fn is_empty(&self) -> bool {
        self.stamps.is_empty()
    }

    /// The memory has been moved.
    pub fn moved(&mut self, memory: Mapping) {
        assert_eq!(memory.length(), self.memory.length(), "length of the moved memory");
        self.memory = memory;
    }

    /// What lay in some pages of ours has been thrown away.
    pub fn forget(&mut self, pages: std::ops::Range<usize>) {
        self.stamps[pages].fill(0);
    }

    /// Writes a page of ours: its next version, by this writer.
    pub fn write(&mut self, index: usize, writer: u16) {
        let (number, stamp) = self.next(index, writer);
        fill(self.page_mut(index), number, stamp);
    }

    /// The memory of a page of ours.
    pub fn memory_of(&self, index: usize) -> Mapping {
        self.memory.part(self.place(index) * PAGE, PAGE)
    }

    /// What the next version of a page of ours is, by this writer, for whoever writes it in another way.
    pub fn next_version(&mut self, index: usize, writer: u16) -> [u64; PAGE / 8] {
        let (number, stamp) = self.next(index, writer);
        let mut page = [0; WORDS];
        fill(&mut page, number, stamp);
        page
    }

    /// Somebody else has written the next version of a page of ours for this writer.
    pub fn was_written(&mut self, index: usize, writer: u16) {
        self.next(index, writer);
    }

    /// Writes a page of ours through the file behind the memory, or by the memory when there is none.
    pub fn write_to_file(&mut self, index: usize, writer: u16) -> std::io::Result<()> {
        let Some(file) = self.file.clone() else {
            self.write(index, writer);
            return Ok(());
        };
        let page = self.next_version(index, writer);
        let bytes: Vec<u8> = page.iter().flat_map(|word| word.to_ne_bytes()).collect();
        file.write_all_at(&bytes, (self.place(index) * PAGE) as u64)
    }

    /// Number and next stamp of a page. The table is first: it counts even if the page never changes.
    fn next(&mut self, index: usize, writer: u16) -> (u64, u64) {
        let version = (self.stamps[index] & ((1 << VERSION_BITS) - 1)) + 1;
        self.stamps[index] = u64::from(writer) << VERSION_BITS | version;
        (self.first + self.place(index) as u64, self.stamps[index])
    }

    /// Whether a page is as it should be; allocates nothing.
    pub fn is_right(&self, index: usize) -> bool {
        let (number, stamp) = (self.first + self.place(index) as u64, self.stamps[index]);
        let page = self.page(index);
        match stamp {
            0 => self.is_fresh(index),
            _ => page[0] == number && page[1] == stamp && first_wrong(page).is_none(),
        }
    }

    /// Compares a page with the table.
    pub fn check_page(&self, checker: &Checker, what: &str, index: usize) {
        checker.that(self.is_right(index), || self.describe(what, index));
    }

    /// Compares all pages with the table.
    pub fn check(&self, checker: &Checker, what: &str) {
        (0..self.len()).for_each(|index| self.check_page(checker, what, index));
    }

    /// Version of a page of somebody else as the page itself tells; none while it is being written.
    pub fn version_of(&self, place: usize) -> Option<u64> {
        let memory = self.memory.part(place * PAGE, PAGE);
        let mut page = [0; WORDS];
        // Word by word, as somebody may be writing.
        page.iter_mut().enumerate().for_each(|(at, word)| *word = memory.load(at));
        let whole = page[0] == self.first + place as u64 && first_wrong(&page).is_none();
        whole.then_some(page[1] & ((1 << VERSION_BITS) - 1))
    }

    fn place(&self, index: usize) -> usize {
        self.ours.0 + index * self.ours.1
    }

    fn page(&self, index: usize) -> &Page {
        let words = self.words(index);
        words.try_into().expect("a page")
    }

    fn words(&self, index: usize) -> &[u64] {
        &self.memory.words()[self.place(index) * WORDS..][..WORDS]
    }

    fn page_mut(&mut self, index: usize) -> &mut Page {
        let start = self.place(index) * WORDS;
        (&mut self.memory.words_mut()[start..][..WORDS]).try_into().expect("a page")
    }

    fn is_fresh(&self, index: usize) -> bool {
        match self.fresh {
            Fresh::Zeros => self.words(index).iter().all(|word| *word == 0),
            Fresh::File(pattern) => {
                pattern.first_wrong(self.words(index), (self.place(index) * WORDS) as u64).is_none()
            }
        }
    }

    /// What is wrong with a page.
    fn describe(&self, what: &str, index: usize) -> String {
        let (place, page) = (self.place(index), self.page(index));
        let stamp = |stamp: u64| match stamp {
            0 => "never written".to_owned(),
            _ => format!("version {} by {}", stamp & ((1 << VERSION_BITS) - 1), stamp >> VERSION_BITS),
        };
        let want = stamp(self.stamps[index]);
        let is = match first_wrong(page) {
            _ if page.iter().all(|word| *word == 0) => "empty".to_owned(),
            Some(word) => format!("torn: it says {} and is wrong from word {word}", stamp(page[1])),
            None if page[0] != self.first + place as u64 => {
                format!("page {} of memory {}, {}", page[0] as u32, page[0] >> 32, stamp(page[1]))
            }
            None => format!("another one: {}", stamp(page[1])),
        };
        let address = self.memory.start() + place * PAGE;
        format!("{what}: page {place} (memory {}, at {address:x}) is {is}; should be {want}", self.first >> 32)
    }
}

/// The words behind the header, and their checksum.
fn fill(page: &mut Page, number: u64, stamp: u64) {
    (page[0], page[1]) = (number, stamp);
    let (mut word, mut sum) = start(number, stamp);
    for place in &mut page[HEADER..] {
        word = step(word);
        *place = word;
        sum = add(sum, word);
    }
    page[2] = sum;
}

/// First word that does not belong to what the header says.
fn first_wrong(page: &Page) -> Option<usize> {
    let (mut word, mut sum) = start(page[0], page[1]);
    for (at, place) in page.iter().enumerate().skip(HEADER) {
        word = step(word);
        if *place != word {
            return Some(at);
        }
        sum = add(sum, word);
    }
    (page[2] != sum).then_some(2)
}

const fn start(number: u64, stamp: u64) -> (u64, u64) {
    (Pattern::new(number).word(stamp), number ^ stamp)
}

const fn step(word: u64) -> u64 {
    word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f)
}

const fn add(sum: u64, word: u64) -> u64 {
    sum.rotate_left(5) ^ word
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failures(book: &Book) -> Vec<String> {
        let checker = Checker::default();
        book.check(&checker, "memory");
        checker.verdict("book").failures
    }

    #[test]
    fn what_is_wrong_is_named() {
        let memory = Mapping::private(8 * PAGE).unwrap();
        let mut book = Book::new(memory, 7);
        (0..6).for_each(|page| book.write(page, 1));
        assert_eq!(failures(&book), Vec::<String>::new());
        let old = memory.words()[..WORDS].to_vec();
        book.write(0, 2);
        memory.words_mut()[..WORDS].copy_from_slice(&old);
        memory.words_mut()[WORDS..2 * WORDS].copy_from_slice(&old);
        memory.words_mut()[2 * WORDS + 100] += 1;
        memory.words_mut()[3 * WORDS..4 * WORDS].fill(0);
        memory.words_mut()[7 * WORDS] = 1;
        let failures = failures(&book);
        let words =
            ["another one: version 1 by 1; should be version 2 by 2", "is page 0 of memory 7", "is torn", "is empty"];
        for (at, word) in words.into_iter().enumerate() {
            assert!(failures[at].contains(word), "{}", failures[at]);
        }
        assert!(failures[4].contains("page 7 ") && failures[4].contains("never written"), "{}", failures[4]);
        assert_eq!(failures.len(), 5, "{failures:?}");
    }
}
