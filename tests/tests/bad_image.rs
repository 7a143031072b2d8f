//! Images that are damaged in every way: refused by verify and restore alike, before any process exists.

use std::fs;
use std::path::{Path, PathBuf};

use nix::unistd::Pid;
use standstill_tests::harness::left::{expect_no_process, expect_none_of, file_names};
use standstill_tests::harness::{Target, Tool, Turn, standstill};
use standstill_tests::workload::Pattern;

/// An image of a target that is gone, to be damaged in copies.
struct Image {
    tool: Tool,
    target: Target,
    images: PathBuf,
    processes: Vec<Pid>,
}

impl Image {
    fn new(tool: Tool, compress: &str) -> Self {
        let mut target =
            Target::workload("clock", &["--heap-mib", "2", "--fds", "3", "--threads", "3", "--processes", "3"]);
        let (images, processes) = (target.images("good"), target.processes());
        tool.dump(target.pid(), &images).args(["--compress", compress]).run().expect_success();
        target.await_gone();
        fs::remove_file(images.join("dump.log")).expect("remove the log");
        Self { tool, target, images, processes }
    }

    fn files(&self) -> Vec<String> {
        file_names(&self.images)
    }

    /// A copy of the image.
    fn copy(&self) -> PathBuf {
        let copy = self.target.images("damaged");
        for name in self.files() {
            fs::copy(self.images.join(&name), copy.join(&name)).expect("copy a file of the image");
        }
        copy
    }

    /// Damages one file of a copy, and expects that it is noticed.
    #[track_caller]
    fn expect_noticed(&self, how: &str, file: &str, words: &[&str], damage: impl FnOnce(&mut Vec<u8>)) {
        let copy = self.copy();
        let path = copy.join(file);
        let mut bytes = fs::read(&path).expect("read a file of the image");
        let before = bytes.clone();
        damage(&mut bytes);
        assert!(bytes != before, "{how}: nothing was damaged in {file}");
        fs::write(&path, bytes).expect("write a file of the image");
        self.expect_refused(&format!("{how} in {file}"), &copy, words);
    }

    #[track_caller]
    fn expect_refused(&self, how: &str, copy: &Path, words: &[&str]) {
        let verify = self.tool.command(["verify", "-D"]).arg(copy).run();
        assert_eq!(verify.status, Some(5), "{how}: {verify}");
        verify.expect_error(5, words);
        let restore = self.tool.restore(copy).arg("-d").run();
        assert_eq!(restore.status, Some(5), "{how}: {restore}");
        restore.expect_error(5, words);
        expect_no_process(&self.tool);
        expect_none_of(&self.processes);
    }

    /// The undamaged image is still good.
    #[track_caller]
    fn expect_restored(self) {
        self.tool.command(["verify", "-D"]).arg(&self.images).run().expect_success();
        self.tool.restore(&self.images).arg("-d").run().expect_success();
        self.target.assert_well();
        self.target.finish(0);
    }
}

/// The file that makes a directory an image, and where its parts are.
const MANIFEST: &str = "standstill.img";
const VERSION_OFFSET: usize = 8;
const FIRST_RECORD: usize = 64;
const RECORD_VERSION_OFFSET: usize = FIRST_RECORD + 18;
const RECORD_LENGTH_OFFSET: usize = FIRST_RECORD + 24;

#[test]
fn no_image() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let dir = tempfile::tempdir_in("/var/tmp").expect("make a directory");
    for command in ["verify", "inspect", "restore"] {
        tool.command([command, "-D"]).arg(dir.path()).run().expect_error(5, &[]);
        let missing = dir.path().join("missing");
        tool.command([command, "-D"]).arg(&missing).run().expect_error(5, &["missing"]);
        assert!(!missing.exists(), "{command} made the directory");
    }
    fs::write(dir.path().join(MANIFEST), "not an image").expect("write a file");
    for command in ["verify", "inspect", "restore"] {
        tool.command([command, "-D"]).arg(dir.path()).run().expect_error(5, &[]);
    }
    expect_no_process(&tool);
}

#[test]
fn a_file_of_the_image_is_missing() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let image = Image::new(tool, "none");
    for name in image.files() {
        let copy = image.copy();
        fs::remove_file(copy.join(&name)).expect("remove a file of the image");
        image.expect_refused(&format!("{name} missing"), &copy, &[]);
    }
    image.expect_restored();
}

#[test]
fn truncated() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    for compress in ["none", "zstd"] {
        let image = Image::new(tool.clone(), compress);
        for name in image.files() {
            let length = fs::metadata(image.images.join(&name)).expect("stat").len() as usize;
            for rest in [0, 1, 63, 64, length / 3, length / 2, length - 1] {
                image.expect_noticed(&format!("cut to {rest}"), &name, &[], |bytes| bytes.truncate(rest));
            }
            image.expect_noticed("bytes added", &name, &[], |bytes| bytes.extend_from_slice(b"more"));
        }
        image.expect_restored();
    }
}

#[test]
fn bits_flipped() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    for (number, compress) in ["none", "lz4", "zstd"].into_iter().enumerate() {
        let image = Image::new(tool.clone(), compress);
        for name in image.files() {
            let length = fs::metadata(image.images.join(&name)).expect("stat").len();
            let random = Pattern::new(number as u64);
            for flip in 0..24 {
                let bit = random.word(flip) % (length * 8);
                image.expect_noticed(&format!("bit {bit} flipped ({compress})"), &name, &[], |bytes| {
                    bytes[(bit / 8) as usize] ^= 1 << (bit % 8);
                });
            }
        }
        image.expect_restored();
    }
}

#[test]
fn newer_than_the_tool() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let image = Image::new(tool, "none");
    image.expect_noticed("newer format", MANIFEST, &["newer"], |bytes| bytes[VERSION_OFFSET] += 1);
    image.expect_noticed("newer record", MANIFEST, &[], |bytes| bytes[RECORD_VERSION_OFFSET] += 1);
    image.expect_restored();
}

#[test]
fn absurd_lengths() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let image = Image::new(tool, "none");
    for length in [u64::MAX, 1 << 40, u64::from(u32::MAX), 1 << 30, 0] {
        image.expect_noticed(&format!("length {length}"), MANIFEST, &[], |bytes| {
            bytes[RECORD_LENGTH_OFFSET..RECORD_LENGTH_OFFSET + 8].copy_from_slice(&length.to_le_bytes());
        });
    }
    image.expect_restored();
}

#[test]
fn records_swapped_with_those_of_another_image() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let image = Image::new(tool.clone(), "none");
    let mut other = Target::workload("clock", &["--heap-mib", "1"]);
    let others = other.images("other");
    tool.dump(other.pid(), &others).run().expect_success();
    other.await_gone();
    // The manifest of one with the pages of the other, under the name it expects.
    let pages = |dir: &Path| file_names(dir).into_iter().find(|name| name.starts_with("pages")).expect("pages");
    let copy = image.copy();
    fs::copy(others.join(pages(&others)), copy.join(pages(&copy))).expect("exchange the pages");
    image.expect_refused("pages of another image", &copy, &[]);
    image.expect_restored();
}
