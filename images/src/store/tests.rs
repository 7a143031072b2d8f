use super::*;
use crate::frame::{RecordReader, RecordWriter};
use proptest::{collection::vec, prelude::*};
use std::{
    fs,
    os::unix::fs::{FileExt, PermissionsExt},
    path::PathBuf,
    sync::mpsc,
    thread,
    time::Duration,
};
use tempfile::TempDir;

const ALL: [Compression; 3] = [Compression::None, Compression::Lz4, Compression::Zstd(1)];

fn scratch() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("make a directory");
    let path = dir.path().join("pages.img");
    (dir, path)
}

fn compression() -> impl Strategy<Value = Compression> {
    prop::sample::select(ALL.to_vec())
}

/// Page data that compresses well or, with a large `noise`, not at all.
fn pages(count: usize, seed: u64, noise: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut data = vec![seed as u8; count * PAGE];
    for page in data.chunks_exact_mut(PAGE) {
        for byte in &mut page[..noise] {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *byte = state as u8;
        }
    }
    data
}

fn write_all(path: &Path, compression: Compression, data: &[u8]) -> PageStoreIndex {
    let mut writer = PageWriter::create(path, compression).expect("create the store");
    assert_eq!(writer.append(data).expect("append"), 0);
    writer.finish().expect("finish")
}

/// One step of a writer.
#[derive(Clone, Debug)]
struct Step {
    pages: usize,
    noise: usize,
    seed: u64,
    in_place: bool,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = (0..400_usize, prop::sample::select(vec![0, 100, PAGE]), any::<u64>(), any::<bool>());
    vec(step.prop_map(|(pages, noise, seed, in_place)| Step { pages, noise, seed, in_place }), 0..6)
}

fn put(writer: &mut PageWriter, step: &Step, data: &[u8]) -> PageIndex {
    if !step.in_place {
        return writer.append(data).expect("append");
    }
    let mut first = None;
    for part in data.chunks(CHUNK) {
        let mut buffer = writer.take_buffer();
        buffer.spare_mut()[..part.len()].copy_from_slice(part);
        buffer.advance(part.len());
        assert_eq!(buffer.filled(), part);
        let at = writer.append_buffer(buffer).expect("append");
        first.get_or_insert(at);
    }
    first.unwrap_or_else(|| writer.append(&[]).expect("append nothing"))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn pages_come_back(compression in compression(), steps in steps(), at in any::<prop::sample::Index>()) {
        let (_dir, path) = scratch();
        let mut writer = PageWriter::create(&path, compression).expect("create");
        writer.set_limit(4 * CHUNK as u64);
        let mut expected = Vec::new();
        for step in &steps {
            let data = pages(step.pages, step.seed, step.noise);
            prop_assert_eq!(put(&mut writer, step, &data), (expected.len() / PAGE) as u64);
            expected.extend(data);
        }
        let index = writer.finish().expect("finish");
        prop_assert_eq!(index.pages(), (expected.len() / PAGE) as u64);

        let reader = PageReader::open(&path, &index).expect("open");
        reader.verify(2, |done, all| assert!(done <= all && all == expected.len() as u64)).expect("verify");
        let mut back = vec![1; expected.len()];
        reader.read_pages(0, &mut back).expect("read all");
        prop_assert!(back == expected);
        let raw = tempfile::tempfile().expect("make a file");
        reader.copy_into(&raw, 3).expect("raw form");
        back.fill(1);
        raw.read_exact_at(&mut back, 3 * PAGE as u64).expect("read the raw form");
        prop_assert!(back == expected);

        if reader.is_raw() {
            let find = |first: PageIndex, page: &mut [u8]| {
                page.copy_from_slice(&expected[first as usize * PAGE..][..page.len()]);
                Ok(())
            };
            reader.verify_copy(2, find).expect("verify a copy");
            let damaged = |first: PageIndex, page: &mut [u8]| {
                find(first, page)?;
                page[at.index(page.len())] ^= 1;
                Ok(())
            };
            prop_assert_eq!(reader.verify_copy(2, damaged).is_err(), !expected.is_empty());
        }

        if !expected.is_empty() {
            let first = at.index(expected.len() / PAGE);
            let some = &mut back[first * PAGE..expected.len().min((first + 300) * PAGE)];
            some.fill(1);
            reader.read_pages(first as u64, some).expect("read some");
            prop_assert!(*some == expected[first * PAGE..][..some.len()]);
        }
    }
}

#[test]
fn works_with_and_without_direct_io() {
    let data = pages(700, 5, 1000);
    for dir in ["/var/tmp", "/dev/shm"] {
        for compression in ALL {
            let dir = tempfile::tempdir_in(dir).expect("make a directory");
            let path = dir.path().join("pages.img");
            let index = write_all(&path, compression, &data);
            assert_eq!(fs::metadata(&path).expect("stat").permissions().mode() & 0o7777, 0o600);
            let mut back = vec![0; data.len()];
            PageReader::open(&path, &index).and_then(|r| r.read_pages(0, &mut back)).expect("read");
            assert!(back == data, "{compression:?} in {}", dir.path().display());
        }
    }
}

#[test]
fn compression_saves_space_and_only_where_it_does() {
    for compression in &ALL[1..] {
        let (_dir, path) = scratch();
        let data = [pages(256, 1, 10), pages(256, 2, PAGE)].concat();
        let index = write_all(&path, *compression, &data);
        assert!(index.chunks[0].stored < index.chunks[0].raw / 8, "{index:?}");
        assert_eq!(index.chunks[1].stored, index.chunks[1].raw, "noise is stored as it is");
        assert!(fs::metadata(&path).expect("stat").len() < (data.len() * 5 / 8) as u64);
    }
}

#[test]
fn an_empty_store_is_one() {
    for compression in ALL {
        let (_dir, path) = scratch();
        let index = write_all(&path, compression, &[]);
        assert_eq!(index.pages(), 0);
        let reader = PageReader::open(&path, &index).expect("open");
        reader.verify(4, |_, _| ()).expect("nothing to verify");
        let error = reader.read_pages(0, &mut [0; PAGE]).expect_err("no page");
        assert!(error.to_string().contains("not in the store"), "{error}");
        reader.read_pages(0, &mut []).expect("no page is wanted");
    }
}

/// Several threads fill buffers of a pool that is smaller than what is under way in all.
#[test]
fn buffers_are_filled_by_several_threads() {
    const THREADS: usize = 4;
    let (_dir, path) = scratch();
    let mut writer = PageWriter::create(&path, Compression::Zstd(1)).expect("create");
    // One for each thread, and one for append.
    writer.set_limit(((THREADS + 2) * CHUNK) as u64);
    let count = |seed: u64| 1 + seed as usize * 37 % 256;
    let mut places = Vec::new();
    thread::scope(|scope| {
        let (full, filled) = mpsc::channel();
        let fillers: Vec<_> = (0..THREADS)
            .map(|_| {
                let (empty, to_fill) = mpsc::channel::<(u64, Buffer)>();
                let full = full.clone();
                scope.spawn(move || {
                    for (seed, mut buffer) in to_fill {
                        let data = pages(count(seed), seed, 64);
                        buffer.spare_mut()[..data.len()].copy_from_slice(&data);
                        buffer.advance(data.len());
                        full.send((seed, buffer)).expect("the main thread listens");
                    }
                });
                empty
            })
            .collect();
        for seed in 0..100 {
            if seed >= THREADS as u64 {
                let (seed, buffer) = filled.recv().expect("one is always under way");
                places.push((seed, writer.append_buffer(buffer).expect("append")));
                places.push((seed, writer.append(&pages(count(seed), seed, 64)).expect("append")));
            }
            fillers[seed as usize % THREADS].send((seed, writer.take_buffer())).expect("the thread listens");
        }
        drop((fillers, full));
        for (seed, buffer) in filled {
            places.push((seed, writer.append_buffer(buffer).expect("append")));
        }
    });
    let index = writer.finish().expect("finish");
    let reader = PageReader::open(&path, &index).expect("open");
    for (seed, first) in places {
        let expected = pages(count(seed), seed, 64);
        let mut back = vec![0; expected.len()];
        reader.read_pages(first, &mut back).expect("read");
        assert!(back == expected, "pages of {seed} at {first}");
    }
}

#[test]
fn the_pool_is_bounded_and_its_buffers_come_back() {
    let (_dir, path) = scratch();
    let writer = PageWriter::create(&path, Compression::None).expect("create");
    // They are made in pairs.
    writer.set_limit(5 * CHUNK as u64);
    writer.reserve(u64::MAX);
    let mut held: Vec<_> = (0..4).map(|_| writer.take_buffer()).collect();
    thread::scope(|scope| {
        let (sender, taken) = mpsc::channel();
        let writer = &writer;
        scope.spawn(move || sender.send(writer.take_buffer()));
        taken.recv_timeout(Duration::from_millis(50)).expect_err("there is no fifth buffer");
        held.pop();
        taken.recv_timeout(Duration::from_secs(60)).expect("the fourth one came back");
    });
}

#[test]
fn room_is_waited_for() {
    let (_dir, path) = scratch();
    let writer = PageWriter::create(&path, Compression::None).expect("create");
    writer.set_limit(4 * CHUNK as u64);
    let mut held: Vec<_> = (0..3).map(|_| writer.take_buffer()).collect();
    writer.await_room(CHUNK as u64);
    thread::scope(|scope| {
        let (sender, free) = mpsc::channel();
        let writer = &writer;
        scope.spawn(move || {
            writer.await_room(u64::MAX);
            sender.send(())
        });
        held.pop();
        free.recv_timeout(Duration::from_millis(50)).expect_err("two of four buffers are in use");
        held.pop();
        free.recv_timeout(Duration::from_secs(60)).expect("all but one");
    });
}

#[test]
fn an_existing_file_is_not_overwritten() {
    let (_dir, path) = scratch();
    fs::write(&path, "precious").expect("write");
    let error = PageWriter::create(&path, Compression::None).expect_err("it exists");
    assert!(error.is_io(), "{error}");
    assert_eq!(fs::read(&path).expect("read"), b"precious");
}

#[test]
fn an_old_table_of_contents_has_nothing_dropped() {
    // As version 1 was written: the name, no compression, one chunk.
    let golden = [&[26][..], b"pages-0123456789abcdef.img", &[0, 1, 0, 0x80, 0x20, 0x80, 0x20, 7]].concat();
    let file = "pages-0123456789abcdef.img".to_string();
    let chunks = vec![Chunk { offset: 0, stored: 4096, raw: 4096, checksum: 7 }];
    let mut writer = RecordWriter::new();
    let old = PageStoreIndexV1 { file: file.clone(), compression: Compression::None, chunks: chunks.clone() };
    writer.push(&old).expect("push");
    let bytes = writer.finish();
    let record = RecordReader::new("old".as_ref(), &bytes[..]).expect("a manifest").next().expect("a record");
    let record = record.expect("a whole record");
    assert_eq!((record.kind(), record.version(), record.body()), (PageStoreIndex::KIND, 1, &golden[..]));
    let index = PageStoreIndex::decode(&record).expect("decode");
    assert_eq!(index, PageStoreIndex { file, compression: Compression::None, chunks, dropped: vec![] });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Before and after they are punched out, the others are what they were.
    #[test]
    fn dropped_pages_are_zeros(first in vec((0..600_u64, 0..300_u64), 0..4), then in vec((0..600_u64, 0..300_u64), 0..4)) {
        let (_dir, path) = scratch();
        let data = pages(600, 3, 64);
        let mut index = write_all(&path, Compression::None, &data);
        let mut all = PageSet::default();
        for dropped in [first, then] {
            let dropped = PageSet::new(PageSet::from_pairs(&dropped).within(0..600));
            let old = index.clone();
            index = PageReader::open(&path, &index).and_then(|r| r.without(&dropped)).expect("drop");
            all = all.union(&dropped);
            prop_assert_eq!(PageSet::from_pairs(&index.dropped), all.clone());
            let mut expected = data.clone();
            all.ranges().iter().for_each(|r| expected[r.start as usize * PAGE..r.end as usize * PAGE].fill(0));
            let open = PageReader::open(&path, &index).expect("open");
            for _ in 0..2 {
                open.verify(2, |_, _| ()).expect("verify");
                open.verify_copy(2, |first, to| {
                    to.copy_from_slice(&data[first as usize * PAGE..][..to.len()]);
                    Ok(())
                }).expect("verify the copy");
                let mut back = vec![1; data.len()];
                open.read_pages(0, &mut back).expect("read");
                prop_assert!(back == expected);
                punch(&path, &all).expect("punch");
            }
            // Whoever needs what is gone is not told that it is whole.
            let damaged = PageReader::open(&path, &old).and_then(|r| r.verify(1, |_, _| ()));
            prop_assert_eq!(damaged.is_err(), old.dropped != index.dropped);
        }
    }

    #[test]
    fn only_chunks_with_needed_pages_are_read(needed in vec((0..1000_u64, 0..300_u64), 0..3)) {
        let (dir, path) = scratch();
        let data = pages(1000, 3, 64);
        let index = write_all(&path, Compression::Lz4, &data);
        let needed = PageSet::new(PageSet::from_pairs(&needed).within(0..1000));
        let reader = PageReader::open(&path, &index).expect("open").only(&needed);
        let copy = fs::File::create_new(dir.path().join("copy")).expect("create");
        reader.copy_into(&copy, 0).expect("copy");
        let mut seen = Vec::new();
        reader.in_order(|first, raw| {
            assert!(raw == &data[first as usize * PAGE..][..raw.len()]);
            seen.push(first..first + (raw.len() / PAGE) as u64);
            Ok::<_, ImageError>(())
        }).expect("read");
        prop_assert!(seen.iter().all(|chunk| needed.overlaps(chunk.clone())));
        prop_assert!(PageSet::new(seen).contains(&needed));
        let copied = fs::read(dir.path().join("copy")).expect("read");
        for r in needed.ranges() {
            let range = r.start as usize * PAGE..r.end as usize * PAGE;
            prop_assert!(copied[range.clone()] == data[range]);
        }
    }
}

#[test]
fn nonsense_about_dropped_pages_is_refused() {
    for compression in [Compression::None, Compression::Lz4] {
        let (_dir, path) = scratch();
        let index = write_all(&path, compression, &pages(10, 1, PAGE));
        let cases: [&[(u64, u64)]; 7] = [
            &[(0, 11)],
            &[(10, 1)],
            &[(3, 0)],
            &[(u64::MAX, 2)],
            &[(5, u64::MAX)],
            &[(4, 2), (5, 2)],
            &[(4, 2), (1, 1)],
        ];
        for dropped in cases {
            let error = PageReader::open(&path, &PageStoreIndex { dropped: dropped.into(), ..index.clone() });
            let error = error.expect_err("nonsense");
            assert!(error.to_string().contains("makes no sense"), "{error}");
        }
        let all = PageStoreIndex { dropped: vec![(0, 10)], ..index.clone() };
        assert_eq!(PageReader::open(&path, &all).is_ok(), compression == Compression::None);
    }
}
