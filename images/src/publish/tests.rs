use super::*;
use crate::{
    frame::{Record, RecordReader, RecordWriter},
    store::{Compression, PAGE, PageReader, PageStoreIndex, PageWriter},
};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};
use std::{collections::BTreeSet, env, os::unix::fs::PermissionsExt};
use tempfile::TempDir;

fn pages(count: usize, value: u8) -> Vec<u8> {
    vec![value; count * PAGE]
}

/// Writes an image as a dump does.
fn dump(dir: ImageDir, pages: &[u8]) -> Result<(), ImageError> {
    let mut writer = PageWriter::create(&dir.pages_path(), Compression::None)?;
    writer.append(pages)?;
    let mut manifest = RecordWriter::new();
    manifest.push(&writer.finish()?)?;
    dir.commit(&manifest.finish(), &[])
}

/// Reads an image as a restore does.
fn restore(path: &Path) -> Result<Vec<u8>, ImageError> {
    let open = ImageDir::open(path)?;
    let mut index = None;
    for record in RecordReader::new(&open.manifest_path(), open.manifest()?)? {
        let record = record?;
        assert_eq!(record.kind(), PageStoreIndex::KIND);
        index = Some(record.decode::<PageStoreIndex>()?);
    }
    let index = index.expect("an index is there");
    let mut pages = vec![0; index.pages() as usize * PAGE];
    let found = open.locate(std::slice::from_ref(&index))?;
    PageReader::open(&found[0], &index)?.read_pages(0, &mut pages)?;
    Ok(pages)
}

fn names(path: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(path).expect("list the directory");
    entries.map(|e| e.expect("an entry").file_name().into_string().expect("a name")).collect()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).expect("stat").permissions().mode() & 0o7777
}

fn scratch() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("make a directory");
    let path = dir.path().join("image");
    (dir, path)
}

#[test]
fn an_image_is_published_for_its_owner_only() {
    let (_dir, path) = scratch();
    let image = ImageDir::create(&path).expect("create");
    let store = image.pages_path();
    let error = restore(&path).expect_err("not complete yet");
    assert_eq!(error.to_string(), format!("no complete image in {}", path.display()));
    dump(image, &pages(3, 7)).expect("dump");
    assert_eq!(restore(&path).expect("restore"), pages(3, 7));
    assert_eq!(mode(&path), 0o700);
    assert_eq!(mode(&path.join(MANIFEST)), 0o600);
    assert_eq!(mode(&store), 0o600);
}

#[test]
fn without_commit_nothing_is_left() {
    let (_dir, path) = scratch();
    let image = ImageDir::create(&path).expect("create");
    PageWriter::create(&image.pages_path(), Compression::None).expect("create the store");
    drop(image);
    assert!(!path.exists());
}

#[test]
fn without_commit_files_of_others_are_left_and_so_is_their_directory() {
    let (_dir, path) = scratch();
    // Made before us, or by others while we were writing.
    for made_by_us in [true, false] {
        if !made_by_us {
            fs::create_dir(&path).expect("make the directory");
        }
        let image = ImageDir::create(&path).expect("create");
        PageWriter::create(&image.pages_path(), Compression::None).expect("create the store");
        fs::write(path.join("dump.log"), "a log").expect("write");
        drop(image);
        assert_eq!(names(&path), BTreeSet::from(["dump.log".to_string()]));
        fs::remove_dir_all(&path).expect("remove");
    }
}

#[test]
fn a_new_image_replaces_the_old_one_and_nothing_else() {
    let (_dir, path) = scratch();
    dump(ImageDir::create(&path).expect("create"), &pages(2, 1)).expect("dump");
    let others = ["dump.log", "pages-1.img", "pages-0123456789abcdeX.img"];
    for other in others {
        fs::write(path.join(other), "of others").expect("write");
    }
    let image = ImageDir::create(&path).expect("create again");
    assert_eq!(restore(&path).expect("the old one is whole until then"), pages(2, 1));
    let store = image.pages_path().file_name().and_then(|n| n.to_str()).expect("a name").to_string();
    dump(image, &pages(5, 2)).expect("dump");
    assert_eq!(restore(&path).expect("restore"), pages(5, 2));
    let expected = others.into_iter().chain([MANIFEST, &store]).map(String::from).collect();
    assert_eq!(names(&path), expected);
}

#[test]
fn a_failed_dump_leaves_the_old_image() {
    let (_dir, path) = scratch();
    dump(ImageDir::create(&path).expect("create"), &pages(2, 1)).expect("dump");
    let before = names(&path);
    let image = ImageDir::create(&path).expect("create again");
    PageWriter::create(&image.pages_path(), Compression::None).expect("create the store");
    drop(image);
    assert_eq!(restore(&path).expect("restore"), pages(2, 1));
    assert_eq!(names(&path), before);
}

/// What a writer killed at any point leaves behind goes with the next dump.
#[test]
fn leftovers_of_dead_writers_are_removed() {
    let (_dir, path) = scratch();
    let leftovers = |n: u64| {
        let store = path.join(format!("pages-{n:016x}.img"));
        fs::write(&store, pages(9, 0)).expect("write");
        fs::write(path.join(ASIDE), "half a mani").expect("write");
        store
    };
    fs::create_dir(&path).expect("make the directory");
    let store = leftovers(1);
    let image = ImageDir::create(&path).expect("create");
    assert!(!store.exists(), "without an image, its space is needed at once");
    dump(image, &pages(1, 1)).expect("dump");
    assert_eq!(names(&path).len(), 2);
    leftovers(2);
    assert_eq!(restore(&path).expect("restore"), pages(1, 1));
    dump(ImageDir::create(&path).expect("create"), &pages(1, 2)).expect("dump");
    assert_eq!(names(&path).len(), 2);
    assert_eq!(restore(&path).expect("restore"), pages(1, 2));
}

#[test]
fn two_writers_are_refused() {
    let (_dir, path) = scratch();
    let image = ImageDir::create(&path).expect("create");
    let error = ImageDir::create(&path).expect_err("locked");
    assert_eq!(error.to_string(), format!("{}: another dump is writing here", path.display()));
    dump(image, &pages(1, 1)).expect("the first one goes on");
    ImageDir::create(&path).expect("unlocked");
    assert_eq!(restore(&path).expect("restore"), pages(1, 1));
}

#[test]
fn places_that_cannot_be_directories_are_refused() {
    let (dir, path) = scratch();
    fs::write(&path, "a file").expect("write");
    let error = ImageDir::create(&path).expect_err("a file");
    assert!(error.to_string().contains("not a directory"), "{error}");
    let error = ImageDir::open(&path).expect_err("a file");
    assert!(error.is_io(), "{error}");
    let link = dir.path().join("link");
    std::os::unix::fs::symlink("nowhere", &link).expect("link");
    for nowhere in [link, dir.path().join("nowhere/image")] {
        let error = ImageDir::create(&nowhere).expect_err("nowhere");
        assert!(error.is_io(), "{error}");
        assert!(matches!(ImageDir::open(&nowhere), Err(ImageError::Missing(_))));
    }
}

#[test]
fn a_page_store_elsewhere_is_refused() {
    let (_dir, path) = scratch();
    dump(ImageDir::create(&path).expect("create"), &pages(1, 1)).expect("dump");
    let open = ImageDir::open(&path).expect("open");
    for file in ["../pages-0123456789abcdef.img", "/etc/passwd", "", ".", "pages-0123456789abcde/.img"] {
        let index =
            PageStoreIndex { file: file.into(), compression: Compression::None, chunks: vec![], dropped: vec![] };
        let error = open.locate(&[index]).expect_err(file);
        assert!(error.to_string().contains("not the name of a page store"), "{error}");
    }
}

/// A small file system, seen by this thread and those it starts only, so that it is gone with them.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn mount(bytes: usize) -> Result<Self, String> {
        unshare(CloneFlags::CLONE_NEWNS).map_err(|e| format!("no mount namespace: {e}"))?;
        let dir = tempfile::tempdir().expect("make a directory");
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("make mounts private");
        let size = format!("size={bytes}");
        mount(Some("none"), dir.path(), Some("tmpfs"), MsFlags::empty(), Some(&size[..])).expect("mount a tmpfs");
        Ok(Self(dir))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

fn small_disk() -> Option<SmallDisk> {
    let reason = match SmallDisk::mount(1 << 20) {
        Ok(disk) => return Some(disk),
        Err(reason) => reason,
    };
    assert!(env::var_os("STANDSTILL_REQUIRE_ALL").is_none_or(|v| v != "1"), "cannot run: {reason}");
    println!("SKIPPED: {reason}");
    None
}

#[test]
fn a_full_disk_gives_an_error_and_nothing_is_left() {
    let Some(disk) = small_disk() else { return };
    let path = disk.0.path().join("image");
    let store = |e: &ImageError| e.to_string().contains("pages-") && e.to_string().contains(": no space left");
    for count in [257, 5000] {
        let error = dump(ImageDir::create(&path).expect("create"), &pages(count, 1)).expect_err("full");
        assert!(matches!(error, ImageError::NoSpace(_)) && error.is_io() && store(&error), "{error}");
        assert!(!path.exists());
    }
    dump(ImageDir::create(&path).expect("create"), &pages(10, 1)).expect("enough space");
    let before = names(&path);
    let error = dump(ImageDir::create(&path).expect("create"), &pages(5000, 2)).expect_err("full");
    assert!(store(&error), "{error}");
    assert_eq!(restore(&path).expect("the old image is whole"), pages(10, 1));
    assert_eq!(names(&path), before);

    let error = ImageDir::create(&path).and_then(|d| d.commit(&pages(500, 3), &[])).expect_err("full");
    assert!(
        error.to_string().ends_with("standstill.img: no space left: free some, or use another directory"),
        "{error}"
    );
    assert_eq!(restore(&path).expect("the old image is whole"), pages(10, 1));
    assert_eq!(names(&path), before);
}
