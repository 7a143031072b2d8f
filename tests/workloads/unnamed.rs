//! Files that have lost the name under which they were opened: some have others, some have none any more.
//!
//! Options: `--ring` (it also has an io_uring, which no dump can keep).

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::{FcntlArg, fcntl};
use standstill_tests::workload::{Args, Checker, Control, Mapping, Pattern, Request};

const SIZE: usize = 3 * 4096;
const POSITION: u64 = 77;

fn main() {
    let args = Args::parse();
    let control = Control::new("unnamed", &args);
    let dir = args.dir().join("unnamed");
    fs::create_dir_all(&dir).expect("make a directory");
    let files = Files::new(&dir);
    let ring = args.flag("ring").then(|| {
        let mut parameters = [0u32; 30];
        // SAFETY: the kernel reads and writes one `struct io_uring_params` of 120 bytes.
        unsafe { libc::syscall(libc::SYS_io_uring_setup, 8, parameters.as_mut_ptr()) }
    });
    assert!(ring.is_none_or(|fd| fd >= 0), "io_uring_setup");
    let checker = Arc::clone(&control.checker);
    control.ready();
    control.serve(None, Duration::from_millis(100), |request| files.check(&checker, request));
}

struct Files {
    dir: PathBuf,
    /// Open, mapped and held by O_PATH; has another name.
    open: File,
    again: File,
    held: File,
    shared: Mapping,
    /// Only mapped; has another name too.
    private: Mapping,
    /// Held by O_PATH; has no name.
    nameless: File,
    inode: u64,
}

impl Files {
    fn new(dir: &Path) -> Self {
        let file = |name: &str, seed: u64| {
            let path = dir.join(name);
            fs::write(&path, Pattern::new(seed).bytes(SIZE)).expect("write a file");
            let file = OpenOptions::new().read(true).write(true).open(&path).expect("open a file");
            let held = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&path).expect("hold a file");
            (path, file, held)
        };
        let (path, mut open, held) = file("first", 1);
        let again = File::open(&path).expect("open a file again");
        fs::hard_link(&path, dir.join("other name")).expect("link a file");
        open.seek(SeekFrom::Start(POSITION)).expect("seek");
        let shared = Mapping::new(SIZE, libc::PROT_READ, libc::MAP_SHARED, Some((&open, 0))).expect("map a file");
        fs::remove_file(path).expect("remove a name");
        let (path, mapped, _) = file("second", 2);
        fs::hard_link(&path, dir.join("other name of the second")).expect("link a file");
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let private = Mapping::new(SIZE, prot, libc::MAP_PRIVATE, Some((&mapped, 0))).expect("map a file");
        private.words_mut()[0] = 4711;
        fs::remove_file(path).expect("remove a name");
        let (path, _, nameless) = file("third", 3);
        fs::remove_file(path).expect("remove a name");
        let inode = open.metadata().expect("stat").ino();
        Self { dir: dir.to_owned(), open, again, held, shared, private, nameless, inode }
    }

    fn check(&self, checker: &Checker, request: Request) {
        let other = self.dir.join("other name");
        // Links that a dump has made count as well, as long as they are there.
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten().filter_map(|entry| entry.metadata().ok());
        let names = entries.filter(|m| m.ino() == self.inode).count() as u64;
        for (what, file) in [("open", &self.open), ("open again", &self.again), ("held", &self.held)] {
            let Some(found) = checker.works("stat", file.metadata()) else { continue };
            checker.equal(&format!("inode of the {what} file"), &found.ino(), &self.inode);
            if request.thorough() {
                checker.equal(&format!("names of the {what} file"), &found.nlink(), &names);
            }
        }
        let path = fcntl(&self.held, FcntlArg::F_GETFL).map(|flags| flags & libc::O_PATH);
        checker.equal("O_PATH", &path, &Ok(libc::O_PATH));
        let nameless = self.nameless.metadata().map(|m| (m.nlink(), m.len() as usize));
        checker.equal("file without a name", &nameless.ok(), &Some((0, SIZE)));
        let path = fcntl(&self.nameless, FcntlArg::F_GETFL).map(|flags| flags & libc::O_PATH);
        checker.equal("O_PATH", &path, &Ok(libc::O_PATH));
        checker.equal("position", &(&self.open).stream_position().ok(), &Some(POSITION));
        if !request.thorough() {
            return;
        }
        let wrong = Pattern::new(2).first_wrong(&self.private.words()[1..], 1);
        checker.equal("private mapping", &(self.private.words()[0], wrong), &(4711, None));
        // What is written by one way is there by all others.
        let word = self.shared.words()[9].wrapping_add(1);
        checker.works("write", self.open.write_all_at(&word.to_ne_bytes(), 72));
        checker.equal("shared mapping", &self.shared.words()[9], &word);
        let mut bytes = [0; 8];
        checker.works("read", self.again.read_exact_at(&mut bytes, 72));
        checker.equal("open again", &u64::from_ne_bytes(bytes), &word);
        let named = File::open(other).and_then(|file| file.read_exact_at(&mut bytes, 72));
        checker.works("read by the other name", named);
        checker.equal("the other name", &u64::from_ne_bytes(bytes), &word);
    }
}
