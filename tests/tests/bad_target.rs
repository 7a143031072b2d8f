//! Dumps that must be refused: one error line, the documented exit status, the target unharmed, nothing left behind.

use std::process::Command;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount, umount};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpid};
use standstill_tests::harness::left::{expect_none_of, expect_nothing_left, expect_refused, file_names};
use standstill_tests::harness::{Occupier, Pidfd, Target, Tool, Turn, proc, skip, standstill, wait_until};

/// Tries to dump a process that is none of ours.
#[track_caller]
fn expect_refused_pid(tool: &Tool, pid: Pid, words: &[&str]) {
    let dir = tempfile::tempdir_in("/var/tmp").expect("make a directory");
    tool.dump(pid, dir.path()).run().expect_error(3, words);
    expect_nothing_left(tool, dir.path());
}

#[test]
fn no_such_process() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    // A pid that was just given up, so that nobody else has it.
    let mut child = Command::new("true").spawn().expect("start a process");
    let pid = Pid::from_raw(child.id().cast_signed());
    child.wait().expect("wait for it");
    expect_refused_pid(&tool, pid, &[&pid.to_string()]);
}

#[test]
fn numbers_that_are_no_pids() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    for number in [0, -5] {
        let dir = tempfile::tempdir_in("/var/tmp").expect("make a directory");
        let outcome = tool.dump(Pid::from_raw(number), dir.path()).run();
        assert!(matches!(outcome.status, Some(2 | 3)), "{outcome}");
        expect_nothing_left(&tool, dir.path());
    }
}

#[test]
fn own_pid() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let dir = tempfile::tempdir_in("/var/tmp").expect("make a directory");
    // The shell becomes the tool, which so is told to dump itself.
    let script = format!("exec {} dump -t $$ -o dump.log -D {}", tool.path().display(), dir.path().display());
    let output = Command::new("sh").args(["-c", &script]).output().expect("run a shell");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{stderr}");
    assert_eq!(stderr.lines().filter(|line| line.starts_with("standstill: error: ")).count(), 1, "{stderr}");
    expect_nothing_left(&tool, dir.path());
}

#[test]
fn an_ancestor() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    expect_refused_pid(&tool, getpid(), &[]);
    expect_refused_pid(&tool, Pid::from_raw(1), &[]);
}

#[test]
fn a_kernel_thread() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    if proc::text(Pid::from_raw(2), "comm").trim() != "kthreadd" {
        return skip("no kernel threads in this pid namespace");
    }
    expect_refused_pid(&tool, Pid::from_raw(2), &["kernel thread"]);
}

#[test]
fn a_zombie() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut child = Command::new("true").spawn().expect("start a process");
    let pid = Pid::from_raw(child.id().cast_signed());
    assert!(wait_until(Duration::from_secs(5), || proc::state(pid) == Some('Z')), "the child does not end");
    expect_refused_pid(&tool, pid, &[]);
    child.wait().expect("wait for it");
}

#[test]
fn a_thread_that_is_not_a_process() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("clock", &["--threads", "4"]);
    let threads = proc::threads(target.pid());
    expect_refused_pid(&tool, threads[2], &[]);
    target.assert_free();
    target.assert_well();
}

#[test]
fn a_target_that_is_traced_already() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    // This workload does not look whether it is traced.
    let mut target = Target::workload("threads.py", &[]);
    let traced = target.processes()[1];
    ptrace::seize(traced, ptrace::Options::empty()).expect("trace a process of the target");
    let images = target.images("refused");
    let outcome = tool.dump(target.pid(), &images).run();
    ptrace::interrupt(traced).and_then(|()| nix::sys::wait::waitpid(traced, None)).expect("stop the traced process");
    ptrace::detach(traced, None).expect("let go of the traced process");
    outcome.expect_error(3, &[&traced.to_string(), "traced"]);
    expect_nothing_left(&tool, &images);
    target.assert_free();
    target.assert_well();
}

#[test]
fn a_task_that_cannot_be_stopped() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("unsuitable", &["--kind", "vfork"]);
    // The wait of a vfork cannot be interrupted by a tracer; the limit must end the attempt.
    let begin = Instant::now();
    expect_refused(&tool, &mut target, &["--timeout", "1"], 9, &[]);
    assert!(begin.elapsed() < Duration::from_secs(15), "the limit of 1 s took {:?}", begin.elapsed());
}

/// A file system that does not answer: no tracer stops such a wait. The limit ends the attempt, and nobody has noticed.
#[test]
fn a_task_in_uninterruptible_sleep() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::start("unanswered", |dir| {
        let mut command = standstill_tests::harness::workload("unanswered");
        command.arg("--dir").arg(dir);
        command
    });
    wait_until(Duration::from_secs(10), || !target.output().is_empty());
    if target.output().contains("UNAVAILABLE") {
        return skip(target.output().trim());
    }
    target = target.await_ready();
    for options in [&["--timeout", "1"][..], &["--timeout", "1", "-R", "--reader", "procfs"]] {
        let begin = Instant::now();
        expect_refused(&tool, &mut target, options, 9, &["(state D) does not stop"]);
        assert!(begin.elapsed() < Duration::from_secs(15), "the limit of 1 s took {:?}", begin.elapsed());
    }
    let waits = target.processes().into_iter().filter(|pid| matches!(proc::state(*pid), Some('D'))).count();
    assert_eq!(waits, 1, "processes that wait for the file system");
    // The server gives up, and who waited for it goes on and ends.
    target.finish(0);
}

fn expect_unsupported(kind: &str) {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::start("unsuitable", |dir| {
        let mut command = standstill_tests::harness::workload("unsuitable");
        command.args(["--kind", kind, "--dir"]).arg(dir);
        command
    });
    wait_until(Duration::from_secs(10), || !target.output().is_empty());
    if target.output().contains("UNAVAILABLE") {
        return skip(target.output().trim());
    }
    target = target.await_ready();
    let pid = target_pid(&target);
    expect_refused(&tool, &mut target, &[], 4, &[kind, &pid]);
    // What cannot be dumped cannot be dumped with the target left running either.
    expect_refused(&tool, &mut target, &["--leave-running"], 4, &[kind]);
    expect_refused(&tool, &mut target, &["--reader", "procfs"], 4, &[kind]);
    if kind != "CLONE_VM" {
        target.finish(0); // the child that shares its memory ends with the target's directory
    }
}

fn target_pid(target: &Target) -> String {
    target.pid().to_string()
}

#[test]
fn an_io_uring() {
    expect_unsupported("io_uring");
}

#[test]
fn descriptors_in_a_socket() {
    expect_unsupported("SCM_RIGHTS");
}

#[test]
fn credentials_in_a_socket() {
    expect_unsupported("SCM_CREDENTIALS");
}

#[test]
fn urgent_data_in_a_socket() {
    expect_unsupported("urgent data");
}

#[test]
fn a_socket_with_a_peer_elsewhere() {
    expect_unsupported("outside the tree");
}

#[test]
fn a_grandchild_that_shares_memory() {
    expect_unsupported("CLONE_VM");
}

#[test]
fn a_thread_with_descriptors_of_its_own() {
    expect_unsupported("CLONE_FILES");
}

#[test]
fn a_thread_with_a_directory_of_its_own() {
    expect_unsupported("CLONE_FS");
}

#[test]
fn a_seccomp_filter_with_a_supervisor() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("seccomp", &["--supervisor"]);
    let pid = target_pid(&target);
    expect_refused(&tool, &mut target, &[], 4, &["SECCOMP_RET_USER_NOTIF", &pid]);
    expect_refused(&tool, &mut target, &["--reader", "procfs"], 4, &["SECCOMP_RET_USER_NOTIF"]);
    target.finish(0);
}

#[test]
fn a_userfaultfd() {
    expect_unsupported("userfaultfd");
}

#[test]
fn a_pidfd_of_a_process_outside_of_the_tree() {
    expect_unsupported("pidfd of process");
}

#[test]
fn asynchronous_io_that_is_under_way() {
    expect_unsupported("requests in flight");
}

#[test]
fn a_pidfd_of_another_thread_than_the_first() {
    expect_unsupported("pidfd of thread");
}

#[test]
fn a_target_that_dies_during_the_dump() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let start = || Target::workload("clock", &["--heap-mib", "512"]);
    let target = start();
    let whole = tool.dump(target.pid(), &target.images("whole")).run().expect_success().wall;
    drop(target);
    let mut died = 0;
    for part in 1..=12 {
        let mut target = start();
        let images = target.images("dying");
        let dump = tool.dump(target.pid(), &images).spawn();
        std::thread::sleep(whole * part / 14);
        Pidfd::open(target.pid()).expect("pidfd").kill();
        let outcome = dump.wait();
        match outcome.status {
            // The target was dead before the dump began with it, or the dump was complete before the target died.
            Some(0) => assert_eq!(tool.command(["verify", "-D"]).arg(&images).run().status, Some(0)),
            Some(3) => expect_nothing_left(&tool, &images),
            _ => {
                died += 1;
                outcome.expect_error(10, &[&target_pid(&target)]);
                expect_nothing_left(&tool, &images);
            }
        }
        target.await_gone();
    }
    assert!(died >= 3, "the target died during {died} of 12 dumps only: the instants are badly chosen");
}

#[test]
fn a_child_that_dies_during_the_dump() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("tree", &["--depth", "2", "--processes", "60"]);
    let whole = tool.dump(target.pid(), &target.images("whole")).run().expect_success().wall;
    let leaves: Vec<Pid> = target.processes().into_iter().rev().take(20).collect();
    for (number, leaf) in leaves.into_iter().enumerate().take(8) {
        let images = target.images("dying");
        let dump = tool.dump(target.pid(), &images).arg("-R").spawn();
        std::thread::sleep(whole * number as u32 / 9);
        _ = kill(leaf, Signal::SIGKILL);
        let outcome = dump.wait();
        match outcome.status {
            // A dead child is a zombie, which a tree may well contain.
            Some(0) => assert_eq!(tool.command(["verify", "-D"]).arg(&images).run().status, Some(0)),
            _ => {
                outcome.expect_error(10, &[]);
                expect_nothing_left(&tool, &images);
            }
        }
        target.assert_free();
    }
}

#[test]
fn a_full_disk() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("clock", &["--heap-mib", "64"]);
    for size in ["size=16k", "size=1m", "size=20m"] {
        let images = target.images("small");
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("tmpfs"), &images, Some("tmpfs"), flags, Some(size)).expect("mount a small tmpfs");
        let outcome = tool.dump(target.pid(), &images).run();
        let files = file_names(&images);
        umount(&images).expect("unmount");
        outcome.expect_error(7, &["space"]);
        assert!(files.iter().all(|name| name.ends_with(".log")), "left behind with {size}: {files:?}");
        target.assert_free();
        target.assert_well();
    }
    target.finish(0);
}

#[test]
fn a_directory_that_is_not_there() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("clock", &[]);
    let images = target.dir().join("no such directory/images");
    let run = tool.command(["dump", "-t", &target_pid(&target), "-D"]).arg(&images);
    run.run().expect_error(7, &["no such"]);
    assert!(!images.exists(), "the directory was made");
    target.assert_free();
    target.assert_well();
}

#[test]
fn missing_capabilities() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("clock", &[]);
    let images = target.images("powerless");
    let outcome = tool.dump(target.pid(), &images).with(without_capabilities).run();
    outcome.expect_error(6, &["cap_"]);
    expect_nothing_left(&tool, &images);
    target.assert_free();
    target.assert_well();

    tool.dump(target.pid(), &images).run().expect_success();
    target.await_gone();
    let processes = target.processes();
    tool.restore(&images).arg("-d").with(without_capabilities).run().expect_error(6, &["cap_"]);
    expect_none_of(&processes);
    // The image is none the worse.
    tool.restore(&images).arg("-d").run().expect_success();
    target.assert_well();
    target.finish(0);
}

/// Root without any capability, as in an unprivileged container.
fn without_capabilities(command: &mut Command) {
    use std::os::unix::process::CommandExt;
    let drop_all = || {
        for capability in 0..64 {
            // SAFETY: the call takes numbers only; capabilities that the kernel does not know are an error, no harm.
            unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        }
        Ok(())
    };
    // SAFETY: prctl is async-signal-safe and the closure allocates nothing.
    unsafe { command.pre_exec(drop_all) };
}

#[test]
fn wrong_usage() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let wrong: [&[&str]; 7] = [
        &[],
        &["frobnicate"],
        &["dump"],
        &["dump", "-t"],
        &["dump", "-t", "abc"],
        &["dump", "-t", "99999", "--compress", "rar"],
        &["dump", "-t", "99999", "-R", "-s"],
    ];
    for args in wrong {
        let dir = tempfile::tempdir_in("/var/tmp").expect("make a directory");
        let outcome = tool.command(args).with(|command| _ = command.current_dir(dir.path())).run();
        assert_eq!(outcome.status, Some(2), "{args:?}: {outcome}");
        assert!(!outcome.stderr.trim().is_empty(), "{args:?} says nothing: {outcome}");
        assert!(file_names(dir.path()).is_empty(), "{args:?} leaves {:?}", file_names(dir.path()));
    }
}

#[test]
fn the_harness_can_occupy_a_pid() {
    let _turn = Turn::take();
    let mut child = Command::new("true").spawn().expect("start a process");
    let pid = Pid::from_raw(child.id().cast_signed());
    child.wait().expect("wait for it");
    let occupier = Occupier::take(pid).expect("take a pid");
    assert!(occupier.is_alive(), "nobody has the pid");
    drop(occupier);
    assert_eq!(proc::state(pid), None, "the pid is still taken");
}
