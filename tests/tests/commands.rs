//! What the commands promise beyond bringing a tree back.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use standstill_tests::harness::left::{expect_no_process, expect_none_of, file_names};
use standstill_tests::harness::{Run, Setting, Target, Turn, dump_and_restore, proc, skip, standstill, wait_until};
use standstill_tests::verdict::Verdict;

#[test]
fn check_answers_feature_by_feature() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let text = tool.command(["check"]).run().expect_success();
    assert!(text.stdout.lines().count() > 5, "{text}");
    let json = tool.command(["check", "--json"]).run().expect_success().json();
    let features = json.as_array().or_else(|| json["features"].as_array()).expect("a list of features");
    assert!(features.len() > 5, "few features: {json}");
    for feature in features {
        let answer = feature["answer"].as_str().unwrap_or_default().replace('_', " ");
        assert!(
            ["yes", "no", "cannot tell"].contains(&answer.as_str()),
            "an answer is yes, no or cannot tell: {feature}"
        );
    }
}

#[test]
fn inspect_shows_what_the_image_holds() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("fds", &[]);
    let images = target.images("inspected");
    tool.dump(target.pid(), &images).arg("-R").run().expect_success();
    let text = tool.command(["inspect", "-D"]).arg(&images).run().expect_success().stdout;
    for word in ["fds", "pipe", "eventfd", "epoll", "timerfd", "files/append", "/dev/null", "[stack]"] {
        assert!(text.contains(word), "{word:?} is not in what inspect shows:\n{text}");
    }
    for pid in target.processes() {
        assert!(text.contains(&pid.to_string()), "pid {pid} is not in what inspect shows:\n{text}");
    }
    let json = tool.command(["inspect", "--json", "-D"]).arg(&images).run().expect_success().json();
    let text = json.to_string();
    for word in ["pipe", "files/append", "stack"] {
        assert!(text.contains(word), "{word:?} is not in the JSON: {text}");
    }
    // No kernel address gets into an image.
    assert!(!text.to_lowercase().contains("0xffff8"), "a kernel address is in the JSON");
    tool.command(["verify", "-D"]).arg(&images).run().expect_success();
    let verified = tool.command(["verify", "--json", "-D"]).arg(&images).run().expect_success().json();
    assert_eq!(verified["ok"], Value::Bool(true), "{verified}");
    target.finish(0);
}

#[test]
fn dump_says_what_it_cost() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let target = Target::workload("clock", &["--heap-mib", "16"]);
    let images = target.images("stats");
    let text = tool.dump(target.pid(), &images).args(["-R", "--display-stats"]).run().expect_success();
    assert!(text.stdout.contains("freezing") && text.stdout.contains("frozen"), "{text}");
    let json = tool.dump(target.pid(), &images).args(["-R", "--json"]).run().expect_success().json();
    for field in ["freezing_us", "frozen_us", "total_us", "pages_stored"] {
        assert!(json[field].as_u64().is_some_and(|value| value > 0), "{field}: {json}");
    }
    assert!(json["frozen_us"].as_u64() <= json["total_us"].as_u64(), "{json}");
    let inspected = tool.command(["inspect", "--json", "-D"]).arg(&images).run().expect_success().json();
    assert!(inspected.to_string().contains("frozen_us"), "the image does not say what the dump cost: {inspected}");
    target.finish(0);
}

#[test]
fn dry_run_prints_the_plan_and_does_nothing() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("tree", &["--depth", "3"]);
    let images = target.images("plan");
    let processes = target.processes();
    tool.dump(target.pid(), &images).run().expect_success();
    target.await_gone();
    let before = file_names(&images);
    let plan = tool.command(["restore", "--dry-run", "-D"]).arg(&images).run().expect_success().stdout;
    for pid in &processes {
        assert!(plan.contains(&pid.to_string()), "pid {pid} is not in the plan:\n{plan}");
    }
    assert_eq!(file_names(&images), before, "files of the image");
    expect_no_process(&tool);
    expect_none_of(&processes);
    tool.restore(&images).arg("-d").run().expect_success();
    target.assert_well();
    target.finish(0);
}

#[test]
fn leave_stopped_stops_the_tree() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("tree", &["--depth", "3"]);
    let images = target.images("stopped");
    let is_stopped = |pid: &Pid| proc::state(*pid) == Some('T');
    let stopped = target.processes().into_iter().find(is_stopped).expect("the workload has a stopped child");
    tool.dump(target.pid(), &images).arg("--leave-stopped").run().expect_success();
    target.await_stop();
    target.assert_free();
    // The last child had been stopped before; everybody else goes on.
    for pid in target.processes().into_iter().filter(|pid| *pid != stopped) {
        kill(pid, Signal::SIGCONT).expect("let a process go on");
    }
    target.assert_well();
    target.finish(0);
}

#[test]
fn restore_in_the_foreground_is_the_parent_and_ends_as_the_tree_does() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("clock", &["--exit-status", "7"]);
    let images = target.images("foreground");
    tool.dump(target.pid(), &images).run().expect_success();
    target.await_gone();
    let restore = tool.restore(&images).arg("--pidfile").arg(target.dir().join("pidfile")).spawn();
    await_pidfile(&target);
    assert_eq!(proc::parent(target.pid()), Some(restore.pid()), "parent of the root");
    // A signal for the command is one for the root.
    let before = target.assert_well().seq;
    kill(restore.pid(), Signal::SIGUSR1).expect("signal the command");
    let answered = || {
        let verdict = Verdict::read(target.dir(), "root").expect("read the verdict");
        verdict.is_some_and(|verdict| verdict.seq > before && verdict.ok)
    };
    assert!(wait_until(Duration::from_secs(20), answered), "the signal was not forwarded");
    kill(restore.pid(), Signal::SIGTERM).expect("signal the command");
    let outcome = restore.wait();
    assert_eq!(outcome.status, Some(7), "exit status of the root: {outcome}");
    assert_eq!(proc::state(target.pid()), None, "the root is still there");
}

/// The pidfile says that the tree runs.
#[track_caller]
fn await_pidfile(target: &Target) {
    let pid = || fs::read_to_string(target.dir().join("pidfile")).unwrap_or_default();
    let written = wait_until(Duration::from_secs(20), || pid() == target.pid().to_string());
    assert!(written, "the pidfile holds {:?}", pid());
}

#[test]
fn restore_in_the_foreground_reports_a_fatal_signal() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("clock", &[]);
    let images = target.images("foreground");
    tool.dump(target.pid(), &images).run().expect_success();
    target.await_gone();
    let restore = tool.restore(&images).arg("--pidfile").arg(target.dir().join("pidfile")).spawn();
    await_pidfile(&target);
    target.assert_well();
    target.signal(Signal::SIGKILL);
    let outcome = restore.wait();
    assert_eq!(outcome.status, Some(128 + 9), "{outcome}");
}

#[test]
fn a_shell_job_needs_to_be_called_one() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    // No session of its own: it stays in that of the tests.
    let setting = Setting { own_session: false, ..Setting::default() };
    let mut target = Target::launch(&setting, "clock", &[]);
    let images = target.images("job");
    tool.dump(target.pid(), &images).run().expect_error(4, &["shell-job"]);
    target.assert_free();
    tool.dump(target.pid(), &images).arg("--shell-job").run().expect_success();
    target.await_gone();
    tool.restore(&images).args(["-d", "--shell-job"]).run().expect_success();
    target.assert_free();
    // Its session is that of whoever restores it, which is the same one here.
    target.assert_well();
    target.finish(0);
}

fn compressed(options: fn(Run) -> Run) -> u64 {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return 0 };
    let mut target = Target::workload("mappings", &[]);
    let images = dump_and_restore(&tool, &mut target, "compressed", options);
    let size = size_of(&images);
    target.assert_well();
    target.finish(0);
    size
}

fn size_of(images: &Path) -> u64 {
    file_names(images).iter().map(|name| fs::metadata(images.join(name)).expect("stat").len()).sum()
}

#[test]
fn compression() {
    let sizes = [
        compressed(|run| run.args(["--compress", "none"])),
        compressed(|run| run.args(["--compress", "lz4"])),
        compressed(|run| run.args(["--compress", "zstd"])),
    ];
    if standstill().is_some() {
        assert!(sizes.iter().all(|size| *size > 0), "{sizes:?}");
        assert!(sizes[1] < sizes[0] && sizes[2] < sizes[0], "compressed images are not smaller: {sizes:?}");
    }
}

#[test]
fn zero_pages_are_not_stored() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    // Has 32 MiB that were only read and 16 MiB of explicit zeros.
    let target = Target::workload("mappings", &[]);
    let images = target.images("zeros");
    tool.dump(target.pid(), &images).arg("-R").run().expect_success();
    let size = size_of(&images);
    assert!(size < 14 << 20, "the image takes {size} bytes");
    target.finish(0);
}

#[test]
fn both_readers_give_the_same_image() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    for (workload, args) in
        [("fds", &["--sockets", "--chroot"][..]), ("tree", &["--depth", "6"]), ("shared_mem", &[]), ("sharing", &[])]
    {
        let mut target = Target::workload(workload, args);
        // Stopped, so that both see the same; what two dumps with the same reader do not agree on is the time passing.
        target.stop();
        let mut inspected = Vec::new();
        for (name, reader) in [("first", "procfs"), ("second", "ebpf"), ("third", "procfs")] {
            let images = target.images(name);
            let dump = tool.dump(target.pid(), &images).args(["-R", "--json", "--reader", reader]).run();
            if reader == "ebpf" && dump.status == Some(6) {
                return skip(&format!("no eBPF here: {}", dump.stderr.lines().next().unwrap_or_default()));
            }
            let stats = dump.expect_success().json();
            assert_eq!(stats["reader"], reader, "{stats}");
            inspected.push(tool.command(["inspect", "--json", "-D"]).arg(&images).run().expect_success().json());
        }
        let passing = differences("", &inspected[0], &inspected[2]);
        let mut differences = differences("", &inspected[0], &inspected[1]);
        // How much of an interrupted wait was left only the iterators can tell.
        differences.retain(|place, _| !passing.contains_key(place) && !place.contains(".restart"));
        assert!(passing.len() < 40, "{workload}: two dumps of a stopped tree differ: {passing:#?}");
        assert!(differences.is_empty(), "{workload}: procfs and eBPF differ: {differences:#?}");
        target.go_on();
        thread::sleep(Duration::from_millis(50));
        target.assert_well();
        target.finish(0);
    }
}

/// Places at which two values differ, but for those that say how the image was made.
fn differences(place: &str, one: &Value, two: &Value) -> BTreeMap<String, String> {
    match (one, two) {
        (Value::Object(one), Value::Object(two)) if one.keys().eq(two.keys()) => {
            let fields =
                one.iter().filter(|(name, _)| !name.ends_with("_us") && !["reader", "phases"].contains(&name.as_str()));
            fields.flat_map(|(name, value)| differences(&format!("{place}.{name}"), value, &two[name])).collect()
        }
        (Value::Array(one), Value::Array(two)) if one.len() == two.len() => {
            let pairs = one.iter().zip(two).enumerate();
            pairs.flat_map(|(at, (one, two))| differences(&format!("{place}[{at}]"), one, two)).collect()
        }
        _ if one == two => BTreeMap::new(),
        _ => BTreeMap::from([(place.to_owned(), format!("{one} and {two}"))]),
    }
}
