//! A tree comes back on a kernel whose vdso is another one than that of its image.
//!
//! There is only one kernel here, so the image is changed instead: the code of its vdso is gone, but for what lies under
//! the entries of the functions, and its data has other mappings. Needs root and python3; skipped without.

use nix::{
    sys::{
        signal::{Signal, killpg},
        wait::waitpid,
    },
    unistd::Pid,
};
use object::{LittleEndian, Object, ObjectSymbol, elf::FileHeader64, read::elf::ElfFile};
use standstill_engine::{Afterwards, DumpOptions, Image, Reader, RestoreOptions, dump, restore};
use standstill_images::{
    frame::{Record, RecordReader, RecordWriter},
    publish::{ImageDir, MANIFEST},
    store::{Compression, PageStoreIndex},
    types::{AddressSpace, Backing, Clocks, DumpStats, FdTable, Inventory, OpenFile, Pipe, SharedMemory, Task},
};
use std::{
    fs,
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    thread::sleep,
    time::{Duration, Instant, SystemTime},
};

/// Two processes, the first with two threads, write what their clocks say; 6 is CLOCK_MONOTONIC_COARSE.
const PROGRAM: &str = r#"
import os, sys, threading, time
child = os.fork()
name = sys.argv[1] + ("/parent" if child else "/child")
def spin():
    while True:
        time.monotonic_ns()
        time.sleep(0.003)
if child:
    threading.Thread(target=spin, daemon=True).start()
last = 0
while True:
    now = time.monotonic()
    assert now >= last
    last = now
    with open(name + ".new", "w") as out:
        out.write(f"{time.time()} {now} {time.clock_gettime(6)}")
    os.rename(name + ".new", name)
    time.sleep(0.005)
"#;

fn monotonic() -> f64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map(|t| Duration::from(t).as_secs_f64()).unwrap()
}

/// Waits until both processes wrote what the clocks say now.
fn assert_right_clocks(dir: &Path) {
    let begin = monotonic();
    let deadline = Instant::now() + Duration::from_secs(20);
    for name in ["parent", "child"] {
        loop {
            assert!(Instant::now() < deadline, "{name} does not go on: {:?}", fs::read_to_string(dir.join("output")));
            sleep(Duration::from_millis(10));
            let text = fs::read_to_string(dir.join(name)).unwrap_or_default();
            let said: Vec<f64> = text.split(' ').filter_map(|word| word.parse().ok()).collect();
            let &[time, precise, coarse] = &said[..] else { continue };
            if precise > begin {
                let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64();
                assert!(precise <= monotonic() && (now - time).abs() < 5.0 && (precise - coarse).abs() < 1.0, "{text}");
                break;
            }
        }
    }
}

fn dump_to(dir: &Path, pid: i32) {
    dump(&DumpOptions {
        progress: Arc::default(),
        pid,
        dir: dir.into(),
        afterwards: Afterwards::Kill,
        shell_job: false,
        link_remap: false,
        cgroups: false,
        timeout: Duration::from_secs(10),
        compression: Compression::None,
        reader: Reader::Auto,
        paranoid: false,
        precopy: Default::default(),
        prev_images: None,
        auto_dedup: false,
        track: false,
    })
    .unwrap();
    // The tracer has reaped it already, unless it is not the parent.
    let _ = waitpid(Pid::from_raw(pid), None);
}

fn restore_from(dir: &Path) {
    restore(&Image::open(dir).unwrap(), &RestoreOptions::default()).unwrap();
}

/// Replaces the kernel of an image.
fn age(dir: &Path) {
    fn copy<T: Record + serde::Serialize + serde::de::DeserializeOwned>(
        from: &standstill_images::frame::RawRecord<'_>,
        to: &mut RecordWriter,
        change: impl FnOnce(&mut T),
    ) {
        let mut record = from.decode::<T>().unwrap();
        change(&mut record);
        to.push(&record).unwrap();
    }
    let open = ImageDir::open(dir).unwrap();
    let (path, bytes) = (open.manifest_path(), open.manifest().unwrap());
    let mut writer = RecordWriter::new();
    for record in RecordReader::new(&path, &bytes).unwrap() {
        let record = record.unwrap();
        match record.kind() {
            Inventory::KIND => copy::<Inventory>(&record, &mut writer, |i| poison(&mut i.vdso)),
            AddressSpace::KIND => copy::<AddressSpace>(&record, &mut writer, join_data),
            Task::KIND => copy::<Task>(&record, &mut writer, |_| {}),
            FdTable::KIND => copy::<FdTable>(&record, &mut writer, |_| {}),
            OpenFile::KIND => copy::<OpenFile>(&record, &mut writer, |_| {}),
            SharedMemory::KIND => copy::<SharedMemory>(&record, &mut writer, |_| {}),
            Pipe::KIND => copy::<Pipe>(&record, &mut writer, |_| {}),
            Clocks::KIND => copy::<Clocks>(&record, &mut writer, |_| {}),
            DumpStats::KIND => copy::<DumpStats>(&record, &mut writer, |_| {}),
            PageStoreIndex::KIND => copy::<PageStoreIndex>(&record, &mut writer, |_| {}),
            other => panic!("record kind {other}"),
        }
    }
    fs::write(dir.join(MANIFEST), writer.finish()).unwrap();
}

/// Whoever runs this vdso's code dies of it.
fn poison(vdso: &mut [u8]) {
    let file = ElfFile::<FileHeader64<LittleEndian>>::parse(&*vdso).unwrap();
    let functions: Vec<_> = file.dynamic_symbols().map(|s| (s.address() as usize, s.size() as usize)).collect();
    for (start, size) in functions {
        vdso[start..start + size].fill(0xcc);
    }
}

/// One mapping of another name instead of several of the vdso's data.
fn join_data(space: &mut AddressSpace) {
    let is_data = |b: &Backing| matches!(b, Backing::Kernel { name } if name.0.starts_with(b"[vvar"));
    let Some(first) = space.vmas.iter().position(|v| is_data(&v.backing)) else { return };
    while space.vmas.get(first + 1).is_some_and(|v| is_data(&v.backing) && v.start == space.vmas[first].end) {
        space.vmas[first].end = space.vmas.remove(first + 1).end;
    }
    space.vmas[first].backing = Backing::Kernel { name: b"[vvar_of_old]"[..].into() };
}

fn mapping(pid: i32, name: &str) -> String {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    maps.lines().find(|l| l.ends_with(name)).unwrap_or_else(|| panic!("no {name} in\n{maps}")).into()
}

/// The process group of the program, killed at the end.
struct Tree(i32);

impl Drop for Tree {
    fn drop(&mut self) {
        let root = Pid::from_raw(self.0);
        let _ = killpg(root, Signal::SIGKILL);
        let _ = waitpid(root, None);
    }
}

#[test]
fn clocks_go_on_with_the_vdso_of_another_kernel() {
    let python = Command::new("python3").arg("-V").stdout(Stdio::null()).status().is_ok_and(|s| s.success());
    if !nix::unistd::geteuid().is_root() || !python {
        assert!(std::env::var_os("STANDSTILL_REQUIRE_ALL").is_none_or(|v| v != "1"), "needs root and python3");
        println!("skipped: needs root and python3");
        return;
    }
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path();
    let output = fs::File::create(dir.join("output")).unwrap();
    let mut command = Command::new("python3");
    command.args(["-c", PROGRAM]).arg(dir).current_dir("/").stdin(Stdio::null());
    command.stdout(output.try_clone().unwrap()).stderr(output);
    // SAFETY: the forked child makes one system call.
    unsafe { command.pre_exec(|| nix::unistd::setsid().map(drop).map_err(Into::into)) };
    let tree = Tree(command.spawn().unwrap().id() as i32);
    let pid = tree.0;
    assert_right_clocks(dir);
    let before = mapping(pid, "[vdso]");

    let image = dir.join("other");
    dump_to(&image, pid);
    age(&image);
    restore_from(&image);
    assert_right_clocks(dir);
    let proxied = mapping(pid, "[vdso]");
    assert_ne!(before, proxied);
    let old_place = before.split(' ').next().unwrap();
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    assert!(maps.contains(&format!("{old_place} r-xp")), "{maps}");

    let image = dir.join("again");
    dump_to(&image, pid);
    restore_from(&image);
    assert_right_clocks(dir);
    assert_eq!(mapping(pid, "[vdso]"), proxied);

    // And once more to another kernel: the jumps of the first go through those of the second.
    let image = dir.join("third");
    dump_to(&image, pid);
    age(&image);
    restore_from(&image);
    assert_right_clocks(dir);
    assert_ne!(mapping(pid, "[vdso]"), proxied);
}
