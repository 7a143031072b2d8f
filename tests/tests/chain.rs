//! Images whose pages are in the directories of their parents.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use standstill_tests::harness::left::{expect_no_process, expect_none_of, file_names};
use standstill_tests::harness::{Target, Tool, Turn, split_image, standstill};

/// A dumped workload whose pages lie in several directories.
struct Chain {
    tool: Tool,
    target: Target,
    images: PathBuf,
    parents: Vec<PathBuf>,
}

impl Chain {
    fn new(tool: &Tool, workload: &str, args: &[&str], parts: usize) -> Self {
        let mut target = Target::workload(workload, args);
        let images = target.images("chain");
        tool.dump(target.pid(), &images).run().expect_success();
        target.await_gone();
        let parents = split_image(&images, parts);
        Self { tool: tool.clone(), target, images, parents }
    }

    fn verify(&self) {
        self.tool.command(["verify", "-D"]).arg(&self.images).run().expect_success();
    }

    #[track_caller]
    fn expect_refused(&mut self, words: &[&str]) {
        let processes = self.target.processes();
        for command in ["verify", "inspect"] {
            self.tool.command([command, "-D"]).arg(&self.images).run().expect_error(5, words);
        }
        self.tool.command(["merge"]).arg(&self.images).run().expect_error(5, words);
        self.tool.restore(&self.images).arg("-d").run().expect_error(5, words);
        expect_no_process(&self.tool);
        expect_none_of(&processes);
    }

    fn restore(self) {
        self.tool.restore(&self.images).arg("-d").run().expect_success();
        self.target.assert_well();
        self.target.finish(0);
    }
}

/// Drives a file out of the page cache.
fn evict(path: &Path) {
    let file = File::open(path).expect("open");
    file.sync_all().expect("sync");
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).expect("fadvise");
}

fn page_store(dir: &Path) -> PathBuf {
    dir.join(file_names(dir).into_iter().find(|name| name.starts_with("pages-")).expect("a page store"))
}

#[test]
fn two_stores() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    for (workload, args) in
        [("clock", &["--heap-mib", "16"][..]), ("cow_tree", &[]), ("shared_mem", &["--memfd"]), ("mappings", &[])]
    {
        let chain = Chain::new(&tool, workload, args, 2);
        chain.verify();
        chain.restore();
    }
}

/// More than there are descriptors for: some are gathered in memory. Some are in the page cache, and some are not.
#[test]
fn many_stores_warm_and_cold() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    for evicted in [0, 1, 2] {
        let chain = Chain::new(&tool, "clock", &["--heap-mib", "40", "--processes", "2"], 20);
        let dirs = chain.parents.iter().chain([&chain.images]);
        dirs.enumerate().filter(|(n, _)| n % 2 < evicted).for_each(|(_, dir)| evict(&page_store(dir)));
        chain.restore();
    }
}

#[test]
fn inspect_shows_the_chain() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let chain = Chain::new(&tool, "clock", &["--heap-mib", "8"], 3);
    let json = tool.command(["inspect", "--json", "-D"]).arg(&chain.images).run().expect_success().json();
    let (stores, parents) = (&json["chain"]["stores"], &json["chain"]["parents"]);
    let places: Vec<&Path> = chain.parents.iter().map(PathBuf::as_path).chain([&*chain.images]).collect();
    for (n, place) in places.iter().enumerate() {
        assert_eq!(stores[n]["directory"], place.to_str().expect("a path"), "{json}");
        assert_eq!(stores[n]["used_pages"], stores[n]["pages"], "{json}");
    }
    assert_eq!(parents[0], chain.parents[1].to_str().expect("a path"), "{json}");
    assert_eq!(parents.as_array().map(Vec::len), Some(2), "{json}");
    let text = tool.command(["inspect", "-D"]).arg(&chain.images).run().expect_success().stdout;
    for place in &chain.parents {
        assert!(text.contains(place.to_str().expect("a path")), "{text}");
    }
    chain.restore();
}

#[test]
fn a_merged_image_needs_no_parents() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let chain = Chain::new(&tool, "clock", &["--heap-mib", "12"], 4);
    let merged = tool.command(["merge", "--json"]).arg(&chain.images).run().expect_success().json();
    assert_eq!(merged[0]["stores_before"], 4, "{merged}");
    chain.parents.iter().for_each(|parent| fs::remove_dir_all(parent).expect("remove a parent"));
    assert!(!chain.images.join("parent").is_symlink(), "the link is still there");
    chain.verify();
    let again = tool.command(["merge", "--json"]).arg(&chain.images).run().expect_success().json();
    assert_eq!(again[0]["pages_written"], 0, "{again}");
    chain.restore();
}

#[test]
fn broken_chains() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut chain = Chain::new(&tool, "clock", &["--heap-mib", "8"], 3);
    let (oldest, newer) = (chain.parents[0].clone(), chain.parents[1].clone());
    let store = page_store(&oldest);
    let name = store.file_name().and_then(|name| name.to_str()).expect("a name").to_owned();
    let bytes = fs::read(&store).expect("read the pages");

    let aside = oldest.with_extension("aside");
    fs::rename(&oldest, &aside).expect("move a parent");
    chain.expect_refused(&[&name, "parent", "missing"]);
    fs::rename(&aside, &oldest).expect("move it back");

    fs::remove_file(newer.join("parent")).expect("remove a link");
    std::os::unix::fs::symlink(&newer, newer.join("parent")).expect("make a loop");
    chain.expect_refused(&[&name, "leads back"]);
    fs::remove_file(newer.join("parent")).expect("remove a link");
    std::os::unix::fs::symlink(&oldest, newer.join("parent")).expect("link");

    fs::write(&store, &bytes[..bytes.len() / 2]).expect("cut the pages");
    chain.expect_refused(&[&name, "truncated"]);
    fs::write(&store, &bytes).expect("write the pages");

    // Noticed at the checksums: an image can be inspected without them.
    let mut damaged = bytes.clone();
    damaged[bytes.len() / 3] ^= 4;
    let processes = chain.target.processes();
    for cold in [false, true] {
        fs::write(&store, &damaged).expect("damage the pages");
        if cold {
            evict(&store);
        }
        tool.restore(&chain.images).arg("-d").run().expect_error(5, &[&name, "checksum"]);
        expect_no_process(&tool);
        expect_none_of(&processes);
    }
    tool.command(["merge"]).arg(&chain.images).run().expect_error(5, &[&name, "checksum"]);
    tool.command(["verify", "-D"]).arg(&chain.images).run().expect_error(5, &[&name, "checksum"]);
    fs::write(&store, &bytes).expect("write the pages");
    chain.restore();
}

/// What a newer image has taken from its parents is missed at once, not at a checksum.
#[test]
fn a_superseded_image_is_refused() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("clock", &["--heap-mib", "8"]);
    let (old, new) = (target.images("old"), target.images("new"));
    let processes = target.processes();
    tool.dump(target.pid(), &old).args(["-R", "--track-mem"]).run().expect_success();
    target.assert_well();
    let dump = tool.dump(target.pid(), &new).args(["--auto-dedup", "--prev-images-dir"]).arg(&old).run();
    dump.expect_success();
    target.await_gone();
    for command in ["restore", "verify", "inspect"] {
        tool.command([command, "-D"]).arg(&old).run().expect_error(5, &["superseded", new.to_str().expect("a path")]);
    }
    expect_none_of(&processes);
    tool.command(["verify", "-D"]).arg(&new).run().expect_success();
    tool.restore(&new).arg("-d").run().expect_success();
    target.assert_well();
    target.finish(0);
}

/// Its image is there: that the next one will have to copy everything is worth a warning only.
#[test]
fn a_dump_after_which_nobody_can_track_is_a_dump() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("clock", &["--heap-mib", "4"]);
    let in_the_way = PathBuf::from(format!("/run/standstill/writes-{}.sock", target.pid()));
    fs::create_dir_all(&in_the_way).expect("make a directory");
    let first = target.images("first");
    let outcome = tool.pre_dump(target.pid(), &first).run().expect_success();
    assert!(outcome.log.contains("not tracked further on"), "{outcome}");
    let second = target.images("second");
    let dump = tool.dump(target.pid(), &second).arg("--prev-images-dir").arg(&first).run();
    fs::remove_dir(&in_the_way).expect("remove the directory");
    dump.expect_success();
    target.await_gone();
    tool.restore(&second).arg("-d").run().expect_success();
    target.assert_well();
    target.finish(0);
}
