//! Regular files, directories and character devices.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use standstill_tests::workload::{Checker, Control, Pattern, fork_child};

use super::{Group, name_of, status_flags};

const SIZE: usize = 10_000;
/// Where the description shared by fork starts; each verdict moves it by one.
const SHARED_START: u64 = 500;

/// An open file and what must be true of it.
struct Open {
    file: File,
    name: String,
    inode: u64,
    flags: i32,
    position: Option<u64>,
}

impl Open {
    fn new(file: File) -> Self {
        let position = (&file).stream_position().ok();
        let inode = file.metadata().expect("stat").ino();
        Self { name: name_of(&file), inode, flags: status_flags(&file), position, file }
    }

    fn look(&self, checker: &Checker) {
        checker.equal("name of a file", &name_of(&self.file), &self.name);
        let inode = self.file.metadata().map(|data| data.ino()).ok();
        checker.equal(&format!("inode of {}", self.name), &inode, &Some(self.inode));
        checker.equal(&format!("flags of {}", self.name), &status_flags(&self.file), &self.flags);
        let position = (&self.file).stream_position().ok();
        checker.equal(&format!("position of {}", self.name), &position, &self.position);
    }
}

pub(crate) struct Files {
    static_ones: Vec<Open>,
    /// Two descriptors of one description, and one of another on the same file.
    original: File,
    duplicate: File,
    separate: File,
    append: File,
    appended: Vec<u8>,
    shared_by_fork: File,
    verdicts: u64,
    null: File,
    random: File,
}

impl Files {
    pub(crate) fn new(dir: &Path, control: &mut Control) -> Self {
        let dir = dir.join("files");
        fs::create_dir_all(&dir).expect("make the directory for the files");
        let path = dir.join("content");
        fs::write(&path, Pattern::new(1).bytes(SIZE)).expect("write a file");
        let at = |mut file: File, position| {
            file.seek(SeekFrom::Start(position)).expect("seek");
            file
        };
        let with = |flags| OpenOptions::new().read(true).write(true).custom_flags(flags).open(&path).expect("open");
        let original = at(with(0), 100);
        let append = OpenOptions::new().append(true).read(true).create(true).mode(0o600).open(dir.join("append"));
        let shared_by_fork = at(with(0), SHARED_START);
        fork_reader(control, &shared_by_fork);
        let high = move_to(&with(0), 5000, libc::O_CLOEXEC);
        let inherited = move_to(&with(0), 777, 0);
        let open = |path: &str| File::open(path).expect("open a device");
        let write_only = OpenOptions::new().write(true).open(&path).expect("open for writing");
        let directory = OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(&dir).expect("open");
        let static_ones = [
            at(with(0), 1),
            at(with(libc::O_NONBLOCK | libc::O_SYNC), 2),
            at(with(libc::O_NOATIME), SIZE as u64 + 5),
            write_only,
            high,
            inherited,
            directory,
            File::open("/").expect("open the root directory"),
            open("/dev/zero"),
        ];
        Self {
            static_ones: static_ones.into_iter().map(Open::new).collect(),
            duplicate: original.try_clone().expect("dup"),
            original,
            separate: at(with(0), 100),
            append: append.expect("open for appending"),
            appended: Vec::new(),
            shared_by_fork,
            verdicts: 0,
            null: OpenOptions::new().read(true).write(true).open("/dev/null").expect("open /dev/null"),
            random: open("/dev/urandom"),
        }
    }
}

impl Group for Files {
    fn look(&self, checker: &Checker) {
        for open in &self.static_ones {
            open.look(checker);
        }
        for file in [&self.original, &self.duplicate, &self.separate] {
            let mut file = file;
            checker.equal("position of a duplicated file", &file.stream_position().ok(), &Some(100));
        }
        let mut file = &self.shared_by_fork;
        let position = Some(SHARED_START + self.verdicts);
        checker.equal("position shared by fork", &file.stream_position().ok(), &position);
        checker.equal("name of /dev/null", &name_of(&self.null).as_str(), &"/dev/null");
        checker.equal("name of /dev/urandom", &name_of(&self.random).as_str(), &"/dev/urandom");
        checker.that(status_flags(&self.append) & libc::O_APPEND != 0, || "O_APPEND is gone".to_owned());
    }

    fn exercise(&mut self, checker: &Checker) {
        self.verdicts += 1;
        checker.works("seek the shared file", self.shared_by_fork.seek(SeekFrom::Current(1)));

        let mut buffer = [0; 16];
        checker.works("read through the duplicate", self.duplicate.read_exact(&mut buffer));
        checker.equal("content at 100", &buffer.as_slice(), &&Pattern::new(1).bytes(116)[100..]);
        checker.equal("position of the original", &self.original.stream_position().ok(), &Some(116));
        checker.equal("position of the other description", &self.separate.stream_position().ok(), &Some(100));
        checker.works("seek back", self.original.seek(SeekFrom::Start(100)));

        self.appended.extend_from_slice(b"line\n");
        checker.works("seek to the start", self.append.rewind());
        checker.works("append", self.append.write_all(b"line\n"));
        let mut content = Vec::new();
        checker.works("seek to the start", self.append.rewind());
        checker.works("read what was appended", self.append.read_to_end(&mut content));
        checker.equal("content of the appended file", &content, &self.appended);

        checker.works("write to /dev/null", self.null.write_all(b"gone"));
        let (mut one, mut two) = ([0; 16], [0; 16]);
        checker.works("read /dev/urandom", self.random.read_exact(&mut one));
        checker.works("read /dev/urandom", self.random.read_exact(&mut two));
        checker.that(one != two, || "/dev/urandom repeats itself".to_owned());
    }
}

/// Moves a file to a high descriptor number.
fn move_to(file: &File, number: i32, flags: i32) -> File {
    use std::os::fd::AsRawFd;
    use std::os::fd::FromRawFd;
    // SAFETY: dup3 makes a new descriptor from a live one; the number is far above those in use.
    let result = unsafe { libc::dup3(file.as_fd().as_raw_fd(), number, flags) };
    assert_eq!(result, number, "dup3");
    // SAFETY: the descriptor was just made and belongs to nobody else.
    unsafe { File::from_raw_fd(number) }
}

/// Forks a process that shares the description and follows its position: the parent moves it by one for each verdict,
/// just before it asks this process for its own.
fn fork_reader(control: &mut Control, shared: &File) {
    let child = control.for_child("reader");
    let file = shared.try_clone().expect("dup");
    let pid = fork_child(move || {
        let checker = Arc::clone(&child.checker);
        let mut verdicts = 0;
        child.serve(None, Duration::from_secs(60), |request| {
            if request.thorough() {
                verdicts += 1;
                let position = (&file).stream_position().ok();
                checker.equal("position shared by fork", &position, &Some(SHARED_START + verdicts));
            }
        });
    });
    control.adopt(pid, "reader");
}
