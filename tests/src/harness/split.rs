//! Chains of images, made of one.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use standstill_images::frame::{Record, RecordReader, RecordWriter};
use standstill_images::publish::ImageDir;
use standstill_images::store::{Chunk, PAGE, PageStoreIndex};

/// Distributes the page store of an uncompressed image over `parts` stores, each in a directory of its own, as if it had
/// been dumped in increments. The last one stays in the directory of the image; the others, the oldest first.
pub fn split_image(dir: &Path, parts: usize) -> Vec<PathBuf> {
    let open = ImageDir::open(dir).expect("open the image");
    let path = open.manifest_path();
    let records = RecordReader::new(&path, open.manifest().expect("open the manifest")).expect("a manifest");
    let records: Vec<_> = records.map(|record| record.expect("a record")).collect();
    let index = records.iter().find(|record| record.kind() == PageStoreIndex::KIND).expect("a page store");
    let index = PageStoreIndex::decode(index).expect("decode");
    let pages = fs::read(dir.join(&index.file)).expect("read the pages");
    assert!(index.chunks.len() >= parts, "{} chunks for {parts} stores", index.chunks.len());

    let home = dir.with_extension("parents");
    let parents: Vec<PathBuf> = (1..parts).map(|n| home.join(n.to_string())).collect();
    let mut manifest = RecordWriter::new();
    for (n, place) in parents.iter().map(PathBuf::as_path).chain([dir]).enumerate() {
        fs::create_dir_all(place).expect("make a directory");
        if n > 0 {
            symlink(&parents[n - 1], place.join("parent")).expect("link to the parent");
        }
        let chunks = &index.chunks[index.chunks.len() * n / parts..index.chunks.len() * (n + 1) / parts];
        let start = chunks[0].offset;
        let end = chunks.last().map_or(start, |last| last.offset + u64::from(last.raw));
        let file = format!("pages-{:016x}.img", u64::MAX - n as u64);
        fs::write(place.join(&file), &pages[start as usize..end as usize]).expect("write the pages");
        let chunks = chunks.iter().map(|chunk| Chunk { offset: chunk.offset - start, ..*chunk }).collect();
        let store = PageStoreIndex { file, chunks, compression: index.compression, dropped: Vec::new() };
        assert_eq!(store.pages() * PAGE as u64, end - start, "only uncompressed images can be split");
        manifest.push(&store).expect("write a record");
    }
    records.iter().filter(|record| record.kind() != PageStoreIndex::KIND).for_each(|record| manifest.copy(record));
    fs::write(path, manifest.finish()).expect("write the manifest");
    fs::remove_file(dir.join(&index.file)).expect("remove the old pages");
    parents
}
