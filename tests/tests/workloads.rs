//! The self-verifying workloads go out and come back.

use standstill_tests::harness::left::expect_refused;
use standstill_tests::harness::{Run, Target, Tool, Turn, dump_and_restore, dump_and_restore_twice, full_cycle};

/// Dumps and restores twice in a row, with a verdict before and after each.
fn twice(name: &str, args: &[&str], options: fn(Run) -> Run) {
    let _turn = Turn::take();
    let mut target = Target::workload(name, args);
    target.assert_well();
    dump_and_restore_twice(&Tool::get(), &mut target, options, &mut |target| {
        target.assert_well();
    });
    target.finish(0);
}

/// The same, and dumps that leave the target running and stopped.
fn thoroughly(name: &str, args: &[&str]) {
    let _turn = Turn::take();
    let mut target = Target::workload(name, args);
    full_cycle(&Tool::get(), &mut target, &mut |target| {
        target.assert_well();
    });
    target.finish(0);
}

#[test]
fn copy_on_write_stays_shared() {
    twice("cow_tree", &[], |run| run);
}

#[test]
fn shared_memory_stays_shared() {
    thoroughly("shared_mem", &[]);
}

#[test]
fn memfd_stays_shared() {
    twice("shared_mem", &["--memfd"], |run| run);
}

#[test]
fn mappings_of_every_kind() {
    thoroughly("mappings", &[]);
}

#[test]
fn interrupted_system_calls_resume() {
    // CRIU lets sleeps end early with EINTR.
    let lenient: &[&str] = if Tool::get().is_criu() { &["--lenient"] } else { &[] };
    twice("interrupted", lenient, |run| run);
}

#[test]
fn parked_threads_do_not_notice() {
    let _turn = Turn::take();
    // Sleeps long enough that no thread moves by itself.
    let mut target = Target::workload("interrupted", &["--sleep-ms", "15000"]);
    full_cycle(&Tool::get(), &mut target, &mut |target| target.assert_free());
    if !Tool::get().is_criu() {
        target.assert_well();
    }
}

#[test]
fn descriptors_of_every_kind() {
    thoroughly("fds", &[]);
}

#[test]
fn listening_sockets() {
    twice("fds", &["--sockets"], |run| run);
}

#[test]
fn another_root_directory() {
    twice("fds", &["--chroot"], |run| run);
}

#[test]
fn tree_with_sessions_groups_and_zombies() {
    thoroughly("tree", &["--depth", "20"]);
}

#[test]
fn a_session_without_its_leader_is_refused() {
    let _turn = Turn::take();
    let tool = Tool::get();
    if tool.is_criu() {
        return; // which restores it
    }
    let mut target = Target::workload("tree", &["--depth", "1", "--orphans"]);
    let refused = tool.dump(target.pid(), &target.images("try")).arg("--leave-running").run();
    assert_eq!(refused.status, Some(3), "a session whose leader is dead");
    expect_refused(&tool, &mut target, &[], 3, &["session"]);
}

#[test]
fn pipes_in_packet_mode() {
    twice("fds", &["--packets"], |run| run);
}

#[test]
fn credentials_of_another_user() {
    twice("tree", &["--depth", "1", "--credentials"], |run| run);
}

#[test]
fn pending_signals_timers_and_limits() {
    let _turn = Turn::take();
    let mut target = Target::workload("tree", &["--depth", "1", "--extras"]);
    // Running both times: the timers of a stopped process go on.
    for round in ["first", "second"] {
        dump_and_restore(&Tool::get(), &mut target, round, |run| run);
        target.assert_well();
    }
    target.finish(0);
}

#[test]
fn three_hundred_processes() {
    twice("tree", &["--depth", "5", "--processes", "300"], |run| run);
}

#[test]
fn a_thousand_threads() {
    twice("clock", &["--threads", "1000"], |run| run);
}

#[test]
fn five_thousand_files() {
    twice("clock", &["--fds", "5000"], |run| run);
}

#[test]
fn a_big_heap_uncompressed() {
    twice("clock", &["--heap-mib", "256"], |run| run);
}
