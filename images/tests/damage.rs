//! Damaged and hostile images: each gives an error, and none makes the reader take memory that it does not bear out.

use proptest::{collection::vec, prelude::*, sample::Index};
use serde::{Deserialize, Serialize, Serializer, ser::SerializeTuple};
use standstill_images::{
    Flaw, ImageError,
    frame::{Record, RecordReader, RecordWriter},
    store::{CHUNK, Chunk, Compression, PAGE, PageReader, PageStoreIndex, PageWriter},
    types::{Inventory, Task},
};
use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};
use tempfile::TempDir;
use twox_hash::XxHash3_64;

/// The most that one allocation may take while a small image is read. serde reserves up to 1 MiB for a sequence.
const MODEST: usize = 2 << 20;
const FILE_HEADER: usize = 64;
const RECORD_HEADER: usize = 32;

/// The system's allocator, which notes the largest request of each thread.
struct Watch;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every request is passed on to the system's allocator as it is; noting its size allocates nothing.
unsafe impl GlobalAlloc for Watch {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.set(LARGEST.get().max(layout.size()));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static WATCH: Watch = Watch;

fn modestly<T>(action: impl FnOnce() -> T) -> T {
    LARGEST.set(0);
    let result = action();
    let largest = LARGEST.get();
    assert!(largest <= MODEST, "{largest} bytes were allocated at once");
    result
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Sample {
    name: String,
    numbers: Vec<u64>,
    bytes: Vec<u8>,
}

impl Record for Sample {
    const KIND: u16 = 1000;
    const VERSION: u16 = 1;
}

/// A body of any bytes that claims to be a record of kind `KIND`.
struct Claim<const KIND: u16>(Vec<u8>);

impl<const KIND: u16> Record for Claim<KIND> {
    const KIND: u16 = KIND;
    const VERSION: u16 = 1;
}

impl<const KIND: u16> Serialize for Claim<KIND> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut bytes = serializer.serialize_tuple(self.0.len())?;
        self.0.iter().try_for_each(|byte| bytes.serialize_element(byte))?;
        bytes.end()
    }
}

/// Reads everything that this test knows.
fn read(bytes: &[u8]) -> Result<(), ImageError> {
    modestly(|| {
        for record in RecordReader::new(Path::new("test.img"), bytes)? {
            let record = record?;
            match record.kind() {
                Sample::KIND => drop(record.decode::<Sample>()?),
                Inventory::KIND => drop(record.decode::<Inventory>()?),
                Task::KIND => drop(record.decode::<Task>()?),
                PageStoreIndex::KIND => drop(record.decode::<PageStoreIndex>()?),
                _ => record.unknown()?,
            }
        }
        Ok(())
    })
}

fn manifest<T: Record + Serialize>(records: &[T]) -> Vec<u8> {
    let mut writer = RecordWriter::new();
    for record in records {
        writer.push(record).expect("a small record");
    }
    writer.finish()
}

fn sample() -> Sample {
    Sample { name: "a name".into(), numbers: vec![1, 300, u64::MAX], bytes: vec![0; 5] }
}

/// Makes the checksum of the record at `at` right again.
fn seal(bytes: &mut [u8], at: usize, length: usize) {
    let checksum = XxHash3_64::oneshot(&bytes[at + 16..at + RECORD_HEADER + length]);
    bytes[at + 8..at + 16].copy_from_slice(&checksum.to_le_bytes());
}

#[test]
fn a_manifest_cut_anywhere_is_refused() {
    let whole = manifest(&[sample(), sample()]);
    read(&whole).expect("what was written");
    for length in 0..whole.len() {
        match read(&whole[..length]).expect_err("cut") {
            ImageError::NotAnImage(_) if length < 8 => {}
            ImageError::Invalid { offset, flaw: Flaw::Truncated, .. } => assert_eq!(offset, length as u64),
            error => panic!("cut at {length}: {error}"),
        }
    }
}

#[test]
fn a_manifest_with_any_bit_flipped_is_refused() {
    let mut bytes = manifest(&[sample(), sample()]);
    for bit in 0..bytes.len() * 8 {
        bytes[bit / 8] ^= 1 << (bit % 8);
        read(&bytes).expect_err("a flipped bit");
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
    read(&bytes).expect("all bits are back");
}

#[test]
fn bytes_after_the_manifest_are_refused() {
    let mut bytes = manifest(&[sample()]);
    bytes.push(0);
    let end = bytes.len() as u64 - 1;
    match read(&bytes).expect_err("leftovers") {
        ImageError::Invalid { offset, flaw: Flaw::Leftovers, .. } => assert_eq!(offset, end),
        error => panic!("{error}"),
    }
}

#[test]
fn absurd_lengths_of_records_are_refused() {
    for length in [1 << 20, 1 << 30, (1 << 30) + 1, 1 << 40, u64::MAX] {
        let mut bytes = manifest(&[sample()]);
        bytes[FILE_HEADER + 24..FILE_HEADER + 32].copy_from_slice(&u64::to_le_bytes(length));
        match read(&bytes).expect_err("absurd") {
            ImageError::Invalid { flaw: Flaw::Truncated, .. } => assert!(length <= 1 << 30),
            ImageError::Invalid { flaw: Flaw::TooLong { .. }, offset: 64, .. } => assert!(length > 1 << 30),
            error => panic!("{error}"),
        }
    }
}

#[test]
fn absurd_lengths_within_records_are_refused() {
    // Varints: 2^40, 2^64 - 1, one that is too long.
    let absurd: [&[u8]; 3] = [&[0x80, 0x80, 0x80, 0x80, 0x80, 0x40], &[0xff; 10], &[0xff; 300]];
    for length in absurd {
        for before in 0..3 {
            let mut body = vec![0; before];
            body.extend_from_slice(length);
            body.extend_from_slice(&[1; 40]);
            read(&manifest(&[Claim::<{ Sample::KIND }>(body.clone())])).expect_err("absurd");
            read(&manifest(&[Claim::<{ Inventory::KIND }>(body.clone())])).expect_err("absurd");
            read(&manifest(&[Claim::<{ PageStoreIndex::KIND }>(body.clone())])).expect_err("absurd");
            read(&manifest(&[Claim::<{ Task::KIND }>(body)])).expect_err("absurd");
        }
    }
}

#[test]
fn a_body_cut_or_longer_is_refused() {
    let whole = postcard::to_allocvec(&sample()).expect("encode");
    for length in 0..whole.len() {
        read(&manifest(&[Claim::<{ Sample::KIND }>(whole[..length].to_vec())])).expect_err("cut");
    }
    let longer = [&whole[..], &[0]].concat();
    let error = read(&manifest(&[Claim::<{ Sample::KIND }>(longer)])).expect_err("longer");
    assert!(matches!(error, ImageError::Invalid { flaw: Flaw::Leftovers, .. }), "{error}");
}

proptest! {
    #[test]
    fn noise_is_no_manifest(bytes in vec(any::<u8>(), 0..200)) {
        read(&bytes).expect_err("noise");
    }

    #[test]
    fn noise_behind_a_header_is_no_manifest(bytes in vec(any::<u8>(), 0..200)) {
        let header = &manifest::<Sample>(&[])[..FILE_HEADER];
        read(&[header, &bytes].concat()).expect_err("noise");
    }

    /// Whatever a body holds behind a right checksum, reading it ends, and modestly.
    #[test]
    fn bodies_of_noise_do_no_harm(body in vec(any::<u8>(), 0..300)) {
        let _ = read(&manifest(&[Claim::<{ Task::KIND }>(body.clone())]));
        let _ = read(&manifest(&[Claim::<{ PageStoreIndex::KIND }>(body.clone())]));
        let _ = read(&manifest(&[Claim::<{ Inventory::KIND }>(body)]));
    }
}

#[test]
fn headers_with_a_right_checksum_are_not_believed_either() {
    const FLAGS: usize = 20;
    let whole = manifest(&[sample()]);
    let length = whole.len() - FILE_HEADER - 2 * RECORD_HEADER - 8;
    for at in 16..RECORD_HEADER {
        for byte in 0..=u8::MAX {
            let mut bytes = whole.clone();
            bytes[FILE_HEADER + at] = byte;
            seal(&mut bytes, FILE_HEADER, length);
            // Only this is a manifest as good: a record may be known and optional.
            let good = bytes == whole || at == FLAGS && byte == 0;
            assert_eq!(read(&bytes).is_ok(), good, "byte {at} of the header is {byte}");
        }
    }
}

/// A small page store: two chunks of which the second is not full.
fn store(compression: Compression) -> (TempDir, PathBuf, PageStoreIndex) {
    let dir = tempfile::tempdir().expect("make a directory");
    let path = dir.path().join("pages.img");
    let mut writer = PageWriter::create(&path, compression).expect("create");
    for value in [1, 2] {
        let mut buffer = writer.take_buffer();
        buffer.spare_mut()[..2 * PAGE].fill(value);
        buffer.advance(2 * PAGE);
        writer.append_buffer(buffer).expect("append");
    }
    let index = writer.finish().expect("finish");
    (dir, path, index)
}

fn verify(path: &Path, index: &PageStoreIndex) -> Result<(), ImageError> {
    modestly(|| PageReader::open(path, index)?.verify(1, |_, _| ()))
}

const ALL: [Compression; 3] = [Compression::None, Compression::Lz4, Compression::Zstd(1)];

#[test]
fn a_page_store_cut_or_longer_is_refused() {
    for compression in ALL {
        let (_dir, path, index) = store(compression);
        let file = File::options().write(true).open(&path).expect("open");
        let whole = file.metadata().expect("stat").len();
        for length in (0..whole).rev() {
            file.set_len(length).expect("cut");
            match PageReader::open(&path, &index).expect_err("cut") {
                ImageError::Invalid { offset, flaw: Flaw::Truncated, .. } => assert_eq!(offset, length),
                error => panic!("cut at {length}: {error}"),
            }
        }
        file.set_len(whole + 1).expect("lengthen");
        let error = PageReader::open(&path, &index).expect_err("longer");
        assert!(matches!(error, ImageError::Invalid { flaw: Flaw::Leftovers, .. }), "{error}");
        fs::remove_file(&path).expect("remove");
        let error = PageReader::open(&path, &index).expect_err("missing");
        assert!(error.is_io(), "{error}");
    }
}

#[test]
fn a_page_store_with_any_bit_flipped_is_refused() {
    for compression in ALL {
        let (_dir, path, index) = store(compression);
        let reader = PageReader::open(&path, &index).expect("open");
        let file = File::options().write(true).open(&path).expect("open");
        let bytes = fs::read(&path).expect("read");
        // All bits of compressed data, and some of what is not or only padding.
        for bit in (0..bytes.len() * 8).filter(|bit| bit / 8 % PAGE < 64 || bit % 29 == 0) {
            let (byte, at) = (bytes[bit / 8], bit as u64 / 8);
            file.write_all_at(&[byte ^ 1 << (bit % 8)], at).expect("flip");
            modestly(|| reader.verify(1, |_, _| ())).expect_err("a flipped bit");
            file.write_all_at(&[byte], at).expect("flip back");
        }
        reader.verify(1, |_, _| ()).expect("all bits are back");
    }
}

#[test]
fn a_page_store_that_shrinks_while_it_is_read_gives_an_error() {
    let (_dir, path, index) = store(Compression::None);
    let reader = PageReader::open(&path, &index).expect("open");
    File::options().write(true).open(&path).and_then(|f| f.set_len(5000)).expect("shrink");
    let error = reader.verify(2, |_, _| ()).expect_err("shrunk");
    assert!(matches!(error, ImageError::Invalid { flaw: Flaw::Truncated, .. }), "{error}");
}

proptest! {
    /// A table of contents that says anything, for a file that fits it or not.
    #[test]
    fn tables_of_noise_do_no_harm(
        compression in prop::sample::select(ALL.to_vec()),
        which in any::<Index>(),
        offset in prop_oneof![any::<u64>(), (0..4_u64).prop_map(|n| n * PAGE as u64)],
        stored in prop_oneof![any::<u32>(), 0..9000_u32],
        raw in prop_oneof![any::<u32>(), (0..400_u32).prop_map(|n| n * PAGE as u32)],
    ) {
        let (_dir, path, mut index) = store(compression);
        let which = which.index(index.chunks.len());
        let before = index.chunks[which];
        index.chunks[which] = Chunk { offset, stored, raw, ..before };
        let result = verify(&path, &index);
        prop_assert_eq!(result.is_ok(), index.chunks[which] == before);
    }

    #[test]
    fn compressed_noise_does_no_harm(compression in prop::sample::select(ALL[1..].to_vec()), noise in vec(any::<u8>(), 1..300)) {
        let (_dir, path, mut index) = store(compression);
        let mut bytes = fs::read(&path).expect("read");
        bytes[..noise.len()].copy_from_slice(&noise);
        bytes[noise.len()..PAGE].fill(0);
        fs::write(&path, &bytes).expect("write");
        let checksum = XxHash3_64::oneshot(&bytes[..PAGE]);
        index.chunks[0] = Chunk { offset: 0, stored: noise.len() as u32, raw: CHUNK as u32, checksum };
        verify(&path, &index).expect_err("noise");
    }
}
