//! Restores that must be refused: one error line, the documented exit status, no process left behind, and the image
//! still good once the reason is gone.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::Pid;
use standstill_tests::harness::left::{expect_no_process, expect_none_of};
use standstill_tests::harness::{Occupier, Sysctl, Target, Tool, Turn, proc, standstill, wait_until};

/// A target that was dumped and is gone.
struct Dumped {
    tool: Tool,
    target: Target,
    images: PathBuf,
    processes: Vec<Pid>,
    threads: Vec<Pid>,
}

impl Dumped {
    fn new(tool: Tool, workload: &str, args: &[&str]) -> Self {
        let mut target = Target::workload(workload, args);
        let images = target.images("dumped");
        let processes = target.processes();
        let threads = processes.iter().flat_map(|pid| proc::threads(*pid)).collect();
        tool.dump(target.pid(), &images).run().expect_success();
        target.await_gone();
        Self { tool, target, images, processes, threads }
    }

    /// Restores although something is in the way.
    #[track_caller]
    fn expect_refused(&self, status: i32, words: &[&str], in_the_way: &[Pid]) {
        self.tool.restore(&self.images).arg("-d").run().expect_error(status, words);
        expect_no_process(&self.tool);
        let others: Vec<Pid> = self.processes.iter().filter(|pid| !in_the_way.contains(pid)).copied().collect();
        expect_none_of(&others);
    }

    /// Restores now that nothing is in the way.
    #[track_caller]
    fn expect_restored(self) {
        self.tool.restore(&self.images).arg("-d").run().expect_success();
        self.target.assert_well();
        self.target.finish(0);
    }
}

#[test]
fn the_original_still_runs() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("tree", &["--depth", "3"]);
    let images = target.images("running");
    tool.dump(target.pid(), &images).arg("-R").run().expect_success();
    let processes = target.processes();
    tool.restore(&images).arg("-d").run().expect_error(8, &[]);
    expect_no_process(&tool);
    target.assert_free();
    assert_eq!(target.processes(), processes, "processes of the original");
    target.assert_well();
    target.finish(0);
}

#[test]
fn a_pid_is_in_use() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let dumped = Dumped::new(tool, "tree", &["--depth", "3", "--processes", "10"]);
    let (root, last) = (dumped.processes[0], dumped.processes[dumped.processes.len() - 1]);
    for pid in [root, last] {
        let occupier = Occupier::take(pid).expect("take a pid of the tree");
        dumped.expect_refused(8, &[&pid.to_string()], &[pid]);
        assert!(occupier.is_alive(), "the process in the way was harmed");
    }
    dumped.expect_restored();
}

#[test]
fn a_thread_id_is_in_use() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let dumped = Dumped::new(tool, "clock", &["--threads", "20"]);
    let thread = dumped.threads[15];
    let occupier = Occupier::take(thread).expect("take a thread id of the tree");
    dumped.expect_refused(8, &[&thread.to_string()], &[]);
    assert!(occupier.is_alive(), "the process in the way was harmed");
    drop(occupier);
    dumped.expect_restored();
}

/// Dumps a target with open files, spoils the first of them, and expects that its name is in the error.
fn with_spoilt_file(spoil: impl Fn(&Path), repair: impl Fn(&Path)) {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let dumped = Dumped::new(tool, "clock", &["--fds", "5"]);
    let file = dumped.target.dir().join("files/3");
    spoil(&file);
    dumped.expect_refused(7, &["files/3"], &[]);
    repair(&file);
    dumped.expect_restored();
}

#[test]
fn a_missing_file() {
    let aside = |file: &Path| file.with_extension("aside");
    with_spoilt_file(
        |file| fs::rename(file, aside(file)).expect("move the file away"),
        |file| fs::rename(aside(file), file).expect("move the file back"),
    );
}

#[test]
fn a_longer_file() {
    with_spoilt_file(
        |file| change(file, |open| open.write_all_at(b"more", 64)),
        |file| change(file, |open| open.set_len(64)),
    );
}

#[test]
fn a_shorter_file() {
    // Cut after what is read at the verdict, so that the content can be made whole again.
    with_spoilt_file(
        |file| change(file, |open| open.set_len(63)),
        |file| {
            let last = standstill_tests::workload::Pattern::new(3).bytes(64)[63];
            change(file, |open| open.write_all_at(&[last], 63));
        },
    );
}

#[test]
fn a_file_of_the_same_size_with_other_content() {
    let first = standstill_tests::workload::Pattern::new(3).bytes(1);
    with_spoilt_file(
        |file| change(file, |open| open.write_all_at(&[!first[0]], 0)),
        |file| change(file, |open| open.write_all_at(&first, 0)),
    );
}

#[test]
fn a_directory_in_place_of_a_file() {
    let aside = |file: &Path| file.with_extension("aside");
    with_spoilt_file(
        |file| {
            fs::rename(file, aside(file)).expect("move the file away");
            fs::create_dir(file).expect("make a directory");
        },
        |file| {
            fs::remove_dir(file).expect("remove the directory");
            fs::rename(aside(file), file).expect("move the file back");
        },
    );
}

/// Changes a file without changing when it was last modified for good: it is set back afterwards by the repair.
fn change(file: &Path, change: impl FnOnce(&File) -> std::io::Result<()>) {
    let open = OpenOptions::new().write(true).open(file).expect("open the file");
    let stamp = file.with_extension("stamp");
    if !stamp.exists() {
        File::create(&stamp).and_then(|stamp| copy_time(&open, &stamp)).expect("remember the time");
        change(&open).expect("change the file");
        return;
    }
    change(&open).expect("change the file");
    File::open(&stamp).and_then(|stamp| copy_time(&stamp, &open)).expect("set the time back");
}

fn copy_time(from: &File, to: &File) -> std::io::Result<()> {
    to.set_modified(from.metadata()?.modified()?)
}

#[test]
fn a_missing_executable() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::start("clock", |dir| {
        let copy = dir.join("copy of clock");
        fs::copy(standstill_tests::harness::workload("clock").get_program(), &copy).expect("copy the workload");
        let mut command = std::process::Command::new(copy);
        command.arg("--dir").arg(dir);
        command
    })
    .await_ready();
    let (images, processes) = (target.images("dumped"), target.processes());
    tool.dump(target.pid(), &images).run().expect_success();
    target.await_gone();
    let dumped = Dumped { tool, images, threads: processes.clone(), processes, target };
    let (copy, aside) = (dumped.target.dir().join("copy of clock"), dumped.target.dir().join("aside"));
    fs::rename(&copy, &aside).expect("move the executable away");
    dumped.expect_refused(7, &["copy of clock"], &[]);
    fs::rename(&aside, &copy).expect("move the executable back");
    dumped.expect_restored();
}

#[test]
fn a_missing_working_directory() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let dumped = Dumped::new(tool, "fds", &[]);
    let (directory, aside) = (dumped.target.dir().join("working directory"), dumped.target.dir().join("aside"));
    fs::rename(&directory, &aside).expect("move the directory away");
    dumped.expect_refused(7, &["working directory"], &[]);
    fs::rename(&aside, &directory).expect("move the directory back");
    dumped.expect_restored();
}

#[test]
fn a_port_that_is_in_use() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let dumped = Dumped::new(tool, "fds", &["--sockets"]);
    let log = fs::read_to_string(dumped.target.dir().join("port")).expect("the port the workload listens on");
    let port: u16 = log.trim().parse().expect("a port");
    let listener = std::net::TcpListener::bind(("127.0.0.1", port)).expect("take the port");
    dumped.expect_refused(7, &[&port.to_string()], &[]);
    drop(listener);
    dumped.expect_restored();
}

#[test]
fn a_machine_that_allows_fewer_mappings() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let limit = Sysctl::new("vm/max_map_count");
    limit.set(200_000);
    let dumped = Dumped::new(tool, "clock", &["--vmas", "100000"]);
    limit.set(100_000);
    dumped.expect_refused(6, &["mappings of process", "vm.max_map_count="], &[]);
    limit.set(200_000);
    dumped.expect_restored();
}

#[test]
fn restoring_twice_at_once_gives_one_tree() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let dumped = Dumped::new(tool, "tree", &["--depth", "4"]);
    let start = || dumped.tool.restore(&dumped.images).arg("-d").spawn();
    let (one, two) = (start(), start());
    let outcomes = [one.wait(), two.wait()];
    let good = outcomes.iter().filter(|outcome| outcome.status == Some(0)).count();
    assert_eq!(good, 1, "{}{}", outcomes[0], outcomes[1]);
    for outcome in outcomes {
        if outcome.status != Some(0) {
            outcome.expect_error(8, &[]);
        }
    }
    let all = || dumped.processes.iter().all(|pid| proc::state(*pid).is_some());
    assert!(wait_until(Duration::from_secs(5), all), "processes are missing");
    dumped.target.assert_well();
    dumped.target.finish(0);
}
