//! Images whose page stores are in several directories.

use standstill_images::{
    ImageError,
    frame::{RecordReader, RecordWriter},
    publish::{ImageDir, MANIFEST, MOST_PARENTS, PARENT, supersede},
    store::{Compression, PAGE, PageReader, PageSet, PageStoreIndex, PageWriter},
};
use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};
use tempfile::TempDir;

/// Publishes an image with a page of its own, and the stores of the image in `parent`.
fn dump(dir: &Path, parent: Option<&Path>) -> Vec<PageStoreIndex> {
    let mut target = ImageDir::create(dir).expect("create");
    let mut stores = parent.map(stores).unwrap_or_default();
    if let Some(parent) = parent {
        target.set_parent(parent).expect("set the parent");
    }
    publish(target, &mut stores).expect("commit");
    stores
}

fn publish(target: ImageDir, stores: &mut Vec<PageStoreIndex>) -> Result<(), ImageError> {
    let mut writer = PageWriter::create(&target.pages_path(), Compression::None)?;
    writer.append(&[stores.len() as u8 + 1; PAGE])?;
    stores.push(writer.finish()?);
    let mut manifest = RecordWriter::new();
    stores.iter().try_for_each(|store| manifest.push(store))?;
    target.commit(&manifest.finish(), &names(stores))
}

fn names(stores: &[PageStoreIndex]) -> Vec<&str> {
    stores.iter().map(|store| &store.file[..]).collect()
}

fn stores(dir: &Path) -> Vec<PageStoreIndex> {
    let open = ImageDir::open(dir).expect("open");
    let path = open.manifest_path();
    let records = RecordReader::new(&path, open.manifest().expect("open")).expect("a manifest");
    records.map(|record| PageStoreIndex::decode(&record.expect("a record")).expect("decode")).collect()
}

/// Reads all pages of an image.
fn read(dir: &Path) -> Result<(), ImageError> {
    let stores = stores(dir);
    let paths = ImageDir::open(dir)?.locate(&stores)?;
    for (n, (path, store)) in paths.iter().zip(&stores).enumerate() {
        let mut page = [0; PAGE];
        PageReader::open(path, store)?.read_pages(0, &mut page)?;
        assert_eq!(page, [n as u8 + 1; PAGE]);
    }
    Ok(())
}

/// A chain of three images.
fn three() -> (TempDir, [PathBuf; 3]) {
    let root = tempfile::tempdir().expect("make a directory");
    let dirs = ["a", "b", "c"].map(|name| root.path().join(name));
    dump(&dirs[0], None);
    dump(&dirs[1], Some(&dirs[0]));
    dump(&dirs[2], Some(&dirs[1]));
    (root, dirs)
}

#[track_caller]
fn expect_error(dir: &Path, words: &[&str]) {
    let error = read(dir).expect_err("a broken chain");
    let text = error.to_string();
    assert!(words.iter().all(|word| text.contains(word)) && !error.is_io(), "{text}");
}

fn entries(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .expect("list")
        .map(|e| e.expect("an entry").file_name().into_string().expect("a name"))
        .collect();
    names.sort();
    names
}

#[test]
fn stores_are_found_in_the_nearest_directory() {
    let (root, [a, b, c]) = three();
    read(&c).expect("read");
    assert_eq!(fs::read_link(c.join(PARENT)).expect("a link"), Path::new("../b"));
    let parents = ImageDir::open(&c).and_then(|open| open.parents()).expect("parents");
    assert_eq!(parents, [&b, &a].map(|dir| dir.canonicalize().expect("a path")));
    // Links are relative: the whole can move.
    let moved = root.path().join("moved");
    fs::create_dir(&moved).expect("make a directory");
    ["a", "b", "c"].iter().for_each(|name| fs::rename(root.path().join(name), moved.join(name)).expect("move"));
    read(&moved.join("c")).expect("read");
    let found = ImageDir::open(&moved.join("c")).and_then(|o| o.locate(&stores(&moved.join("c")))).expect("locate");
    assert_eq!(found[2].parent(), Some(moved.join("c").as_path()));
}

#[test]
fn a_missing_store_is_named_with_its_image_and_the_remedy() {
    let (root, [a, b, c]) = three();
    let all = stores(&c);
    let aside = root.path().join("aside");
    fs::rename(&a, &aside).expect("move");
    expect_error(
        &c,
        &[&all[0].file, "/c: ", "parent leads nowhere", "replaced, or belongs to another tree", "put it back"],
    );
    dump(&a, None);
    expect_error(&c, &[&all[0].file, "another tree"]);
    fs::remove_dir_all(&a).expect("remove");
    fs::rename(&aside, &a).expect("move back");
    fs::remove_file(b.join(PARENT)).expect("remove the link");
    expect_error(&c, &[&all[0].file]);
    symlink("../a", b.join(PARENT)).expect("link");
    read(&c).expect("all is well again");
    fs::remove_file(c.join(&all[2].file)).expect("remove");
    expect_error(&c, &["/c: ", &all[2].file, "is missing"]);
}

#[test]
fn loops_end() {
    let (_root, [a, b, c]) = three();
    symlink("../c", a.join(PARENT)).expect("link");
    read(&c).expect("everything is found before it comes back");
    fs::remove_file(b.join(PARENT)).expect("remove the link");
    for to in ["../c", ".", "../b"] {
        symlink(to, b.join(PARENT)).expect("link");
        expect_error(&c, &["leads back to"]);
        fs::remove_file(b.join(PARENT)).expect("remove the link");
    }
    symlink(PARENT, b.join(PARENT)).expect("link");
    let error = read(&c).expect_err("a link to itself");
    assert!(error.to_string().contains(PARENT), "{error}");
}

#[test]
fn chains_have_an_end() {
    let root = tempfile::tempdir_in("/dev/shm").expect("make a directory");
    let dir = |n: usize| root.path().join(n.to_string());
    dump(&dir(0), None);
    for n in 1..=MOST_PARENTS {
        fs::create_dir(dir(n)).expect("make a directory");
        symlink(format!("../{}", n - 1), dir(n).join(PARENT)).expect("link");
    }
    let last = dir(MOST_PARENTS + 1);
    dump(&last, None);
    symlink(format!("../{MOST_PARENTS}"), last.join(PARENT)).expect("link");
    let all = [stores(&dir(0)), stores(&last)].concat();
    let error = ImageDir::open(&last).and_then(|open| open.locate(&all)).expect_err("too long");
    assert!(error.to_string().contains("more than 4096 parents"), "{error}");
    fs::remove_file(last.join(PARENT)).expect("remove the link");
    symlink(format!("../{}", MOST_PARENTS - 1), last.join(PARENT)).expect("link");
    ImageDir::open(&last).and_then(|open| open.locate(&all)).expect("just short enough");
}

#[test]
fn nobody_is_its_own_parent() {
    let (root, [a, ..]) = three();
    let link = root.path().join("link");
    symlink("a", &link).expect("link");
    for parent in [&a, &link, &a.join("."), &a.join("../a")] {
        let error = ImageDir::create(&a).and_then(|mut dir| dir.set_parent(parent)).expect_err("itself");
        assert!(error.to_string().contains("cannot be its own parent"), "{error}");
    }
    let error = ImageDir::create(&a).and_then(|mut dir| dir.set_parent(&a.join(MANIFEST))).expect_err("a file");
    assert!(error.to_string().contains("ot a directory"), "{error}");
    read(&a).expect("it is still there");
    fs::write(a.join(PARENT), "a file of others").expect("write");
    let error = ImageDir::create(&a).and_then(|mut dir| dir.set_parent(root.path())).expect_err("no link");
    assert!(error.to_string().contains("not the link of an image"), "{error}");
}

#[test]
fn without_commit_no_link_is_left_and_the_old_image_keeps_its_own() {
    let (root, [a, b, c]) = three();
    let other = root.path().join("other");
    dump(&other, None);
    let before = entries(&c);
    let mut target = ImageDir::create(&c).expect("create");
    target.set_parent(&other).expect("set the parent");
    target.link(&other.join(&stores(&other)[0].file)).expect("link");
    target.link(&c.join(&stores(&c)[2].file)).expect("it is there already");
    drop(target);
    assert_eq!(entries(&c), before);
    read(&c).expect("the old image");
    // A new image with another parent, and then one with none.
    let mut target = ImageDir::create(&c).expect("create");
    target.set_parent(&other).expect("set the parent");
    publish(target, &mut stores(&other)).expect("commit");
    assert_eq!(fs::read_link(c.join(PARENT)).expect("a link"), Path::new("../other"));
    read(&c).expect("the new image");
    dump(&c, None);
    assert_eq!(entries(&c).len(), 2);
    read(&b).and_then(|()| read(&a)).expect("the others");
}

#[test]
fn linked_stores_make_a_directory_complete() {
    let (_root, [a, b, c]) = three();
    let mut target = ImageDir::create(&c).expect("create");
    let all = stores(&c);
    for path in ImageDir::open(&c).and_then(|open| open.locate(&all)).expect("locate") {
        target.link(&path).expect("link");
    }
    target.commit(&fs::read(c.join(MANIFEST)).expect("read"), &names(&all)).expect("commit");
    [a, b].iter().for_each(|dir| fs::remove_dir_all(dir).expect("remove"));
    read(&c).expect("read");
    assert_eq!(entries(&c).len(), 4);
}

#[test]
fn what_cannot_be_linked_is_an_error() {
    let (root, [a, ..]) = three();
    let mut target = ImageDir::create(&root.path().join("d")).expect("create");
    let error = target.link(&a.join(MANIFEST)).expect_err("no page store");
    assert!(error.to_string().contains("not the name of a page store"), "{error}");
    let elsewhere = tempfile::tempdir_in("/dev/shm").expect("make a directory");
    let other = elsewhere.path().join("image");
    let file = dump(&other, None).remove(0).file;
    let error = target.link(&other.join(&file)).expect_err("another file system");
    assert!(error.is_io(), "{error}");
    fs::write(root.path().join("d").join(&file), "something else").expect("write");
    target.link(&other.join(&file)).expect_err("another file of the same name");
    assert_eq!(fs::read(root.path().join("d").join(&file)).expect("read"), b"something else");
}

/// A writer that is killed between the manifest and the link has published its image.
#[test]
fn a_link_that_has_not_got_its_name_yet_is_followed() {
    let (root, [a, b, c]) = three();
    let other = root.path().join("other");
    dump(&other, None);
    let own = stores(&b)[1].file.clone();
    fs::rename(b.join(PARENT), b.join(format!(".parent-{own}"))).expect("rename");
    symlink("../other", b.join(PARENT)).expect("the link of the image before");
    read(&b).and_then(|()| read(&c)).expect("read");
    // Whoever begins to write there changes nothing, and whoever publishes removes it.
    drop(ImageDir::create(&b).expect("create"));
    read(&c).expect("read");
    let mut target = ImageDir::create(&b).expect("create");
    target.set_parent(&a).expect("set the parent");
    let mut all = stores(&a);
    publish(target, &mut all).expect("commit");
    assert_eq!(entries(&b).len(), 3);
    read(&b).expect("read");
}

#[test]
fn a_superseded_image_says_so() {
    let (_root, [a, b, c]) = three();
    let all = stores(&c);
    let page = PageSet::from_pairs(&[(0, 1)]);
    let store = a.join(&all[0].file);
    supersede(&store, &c, &page).expect("write the note");
    for dir in [&a, &b, &c] {
        expect_error(dir, &[&format!("superseded by the image in {}", c.display()), &all[0].file, "use that one"]);
    }
    // Whoever does not need the page may go on.
    let mut open = stores(&c);
    open[0] = PageReader::open(&store, &all[0]).and_then(|r| r.without(&page)).expect("drop");
    ImageDir::open(&c).and_then(|dir| dir.locate(&open)).expect("it knows");
    let note = a.join(format!("{}.superseded", all[0].file));
    let bytes = fs::read(&note).expect("read");
    for length in 0..bytes.len() {
        fs::write(&note, &bytes[..length]).expect("cut");
        read(&c).expect_err("half a note");
    }
    fs::write(&note, &bytes).expect("write");
    // A new image in that directory has nothing to do with it.
    dump(&a, None);
    assert_eq!(entries(&a).len(), 2);
    read(&a).expect("read");
}

#[test]
fn stores_twice_or_with_names_that_lead_elsewhere_are_refused() {
    let (_root, [a, ..]) = three();
    let store = stores(&a).remove(0);
    let open = ImageDir::open(&a).expect("open");
    let error = open.locate(&[store.clone(), store.clone()]).expect_err("twice");
    assert!(error.to_string().contains("twice"), "{error}");
    let elsewhere = PageStoreIndex { file: format!("../a/{}", store.file), ..store.clone() };
    let error = open.locate(&[elsewhere, store]).expect_err("elsewhere");
    assert!(error.to_string().contains("not the name of a page store"), "{error}");
}
