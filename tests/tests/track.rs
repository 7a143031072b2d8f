//! Trackers: what they promise to people, and that a dump with one is a dump like any other.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use standstill_tests::harness::{Target, Tool, Turn, proc, standstill, wait_until};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

fn track(tool: &Tool, target: &Target) -> Pid {
    let pid = target.pid().to_string();
    let json = tool.command(["track", "-d", "--json", "-t", &pid]).run().expect_success().json();
    Pid::from_raw(i32::try_from(json["tracker"].as_i64().expect("a pid")).expect("a pid"))
}

fn status(tool: &Tool, target: &Target) -> serde_json::Value {
    tool.command(["track", "--status", "--json", "-t", &target.pid().to_string()]).run().expect_success().json()
}

fn is_gone(pid: Pid) -> bool {
    wait_until(Duration::from_secs(10), || matches!(proc::state(pid), None | Some('Z')))
}

fn socket(target: &Target) -> PathBuf {
    format!("/run/standstill/track-{}.sock", target.pid()).into()
}

#[test]
fn a_tracker_counts_refuses_a_second_one_and_ends_with_its_tree() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("clock", &["--processes", "5", "--fds", "50"]);
    let pid = target.pid().to_string();
    let tracker = track(&tool, &target);
    let seen = status(&tool, &target);
    assert_eq!(seen["tracker"].as_i64(), Some(tracker.as_raw().into()), "{seen}");
    assert_eq!(seen["processes"].as_u64(), Some(target.processes().len() as u64), "{seen}");
    let text = tool.command(["track", "--status", "-t", &pid]).run().expect_success();
    assert!(text.stdout.contains("mappings") && text.stdout.contains("connections"), "{text}");
    tool.command(["track", "-t", &pid]).run().expect_error(3, &[&pid, &tracker.to_string(), "already"]);
    tool.command(["track", "-d", "-t", &pid]).run().expect_error(3, &[&pid, &tracker.to_string(), "already"]);
    target.finish(0);
    assert!(is_gone(tracker), "the tracker outlives its tree");
    let left = |kind: &str| Path::new(&format!("/run/standstill/track-{pid}.{kind}")).exists();
    assert!(!left("sock") && !left("lock"), "the tracker leaves files");
    tool.command(["track", "--status", "-t", &pid]).run().expect_error(3, &[&pid, "not tracked"]);
}

#[test]
fn the_tracker_of_an_idle_tree_uses_no_processor() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let target = Target::start("sleep", |_| {
        let mut command = Command::new("sleep");
        command.arg("1000");
        command
    });
    let tracker = track(&tool, &target);
    // Its beginning is over.
    std::thread::sleep(Duration::from_millis(500));
    let before = proc::cpu_ticks(tracker);
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(proc::cpu_ticks(tracker) - before, 0, "clock ticks in 2 s");
    kill(tracker, Signal::SIGTERM).expect("it is there");
}

#[test]
fn a_dump_takes_what_the_tracker_knows() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("tree", &[]);
    let tracker = track(&tool, &target);
    for name in ["first", "second"] {
        let images = target.images(name);
        let outcome =
            tool.dump(target.pid(), &images).args(["-R", "--paranoid", "--json", "-v"]).run().expect_success();
        assert_eq!(outcome.json()["reader"], "tracker", "{outcome}");
        assert!(!outcome.stderr.contains("is wrong"), "the tracker's copy differs from the truth: {outcome}");
        target.assert_well();
    }
    // The images of both readers bring the same back.
    let images = target.images("killed");
    target.processes();
    tool.dump(target.pid(), &images).args(["--paranoid"]).run().expect_success();
    target.await_gone();
    assert!(is_gone(tracker), "the tracker outlives its tree");
    tool.restore(&images).arg("-d").run().expect_success();
    target.assert_well();
    let again = track(&tool, &target);
    target.assert_well();
    target.finish(0);
    assert!(is_gone(again));
}

#[test]
fn a_killed_dump_gives_the_tracker_back() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("clock", &["--threads", "20", "--heap-mib", "32"]);
    let tracker = track(&tool, &target);
    let dump = |name: &str| tool.dump(target.pid(), &target.images(name)).args(["-R", "--paranoid", "--json", "-v"]);
    let usual = (0..3).map(|_| dump("whole").run().expect_success().wall).min().expect("three dumps");
    for n in 1..=12 {
        let running = dump("killed").spawn();
        std::thread::sleep(usual * n / 12);
        running.kill();
        running.wait();
        // It answers only when nobody has what it lends.
        assert_eq!(status(&tool, &target)["tracker"].as_i64(), Some(tracker.as_raw().into()));
        let outcome = dump("next").run().expect_success();
        assert_eq!(outcome.json()["reader"], "tracker", "{outcome}");
        assert!(!outcome.stderr.contains("is wrong"), "{outcome}");
    }
    target.assert_free();
    target.assert_well();
    target.finish(0);
    assert!(is_gone(tracker));
}

#[test]
fn system_calls_are_watched_on_request() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let target = Target::workload("clock", &[]);
    let pid = target.pid().to_string();
    for (options, scope) in [(&[][..], "memory"), (&["--syscalls"], "syscalls")] {
        let json = tool.command(["track", "-d", "--json", "-t", &pid]).args(options).run().expect_success().json();
        let tracker = Pid::from_raw(i32::try_from(json["tracker"].as_i64().expect("a pid")).expect("a pid"));
        let seen = status(&tool, &target);
        assert_eq!(seen["scope"], scope, "{seen}");
        assert_eq!(seen["counters"]["calls"].is_object(), scope == "syscalls", "{seen}");
        let text = tool.command(["track", "--status", "-t", &pid]).run().expect_success().stdout;
        assert_eq!(text.contains("not watched"), scope == "memory", "{text}");
        // What a tracker counts is what `watch` shows.
        let args = ["watch", "--json", "--once", "--interval", "200ms", "-t", &pid];
        let sample = tool.command(args).run().expect_success().json();
        assert_eq!(sample["rates"]["counted"], scope, "{sample}");
        let outcome = tool.dump(target.pid(), &target.images("running")).args(["-R", "--paranoid", "--json"]).run();
        assert_eq!(outcome.expect_success().json()["reader"], "tracker");
        kill(tracker, Signal::SIGTERM).expect("it is there");
        assert!(is_gone(tracker));
    }
    target.assert_well();
    target.finish(0);
}

#[test]
fn a_killed_tracker_harms_nobody() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let target = Target::workload("clock", &["--threads", "10"]);
    let tracker = track(&tool, &target);
    kill(tracker, Signal::SIGKILL).expect("it is there");
    assert!(is_gone(tracker));
    assert!(socket(&target).exists(), "nobody was left to remove it");
    let images = target.images("without");
    let outcome = tool.dump(target.pid(), &images).args(["-R", "--json"]).run().expect_success();
    assert_eq!(outcome.json()["reader"], "ebpf", "{outcome}");
    let next = track(&tool, &target);
    assert_eq!(status(&tool, &target)["tracker"].as_i64(), Some(next.as_raw().into()));
    kill(next, Signal::SIGTERM).expect("it is there");
    assert!(is_gone(next));
    assert!(!socket(&target).exists(), "the tracker left its socket");
    target.assert_well();
    target.finish(0);
}

#[test]
fn what_cannot_be_tracked() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    for options in [&["track", "-t", "4000000"][..], &["track", "-d", "-t", "4000000"]] {
        tool.command(options).run().expect_error(3, &["4000000", "no such process"]);
    }
    // A directory that others can write to is not believed.
    let target = Target::workload("clock", &[]);
    let _ = fs::create_dir("/run/standstill");
    let mode = |mode| fs::set_permissions("/run/standstill", std::os::unix::fs::PermissionsExt::from_mode(mode));
    mode(0o777).expect("chmod");
    let refused = tool.command(["track", "-t", &target.pid().to_string()]).run();
    mode(0o700).expect("chmod");
    refused.expect_error(7, &["/run/standstill"]);
    target.finish(0);
}
