//! `standstill watch --dirty`: how quickly memory is written to, and that nobody has to wait for it.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use standstill_tests::harness::left::expect_not_tracked;
use standstill_tests::harness::{Target, Tool, Turn, standstill};

/// A watch whose looks are read as they come; killed when dropped.
struct Watch {
    child: Child,
    lines: Receiver<String>,
}

impl Watch {
    fn start(tool: &Tool, target: &Target) -> Self {
        let pid = target.pid().to_string();
        let mut child = Command::new(tool.path())
            .args(["watch", "--dirty", "--json", "--interval", "200ms", "-t", &pid])
            .stdout(Stdio::piped())
            .spawn()
            .expect("start watch");
        let stdout = child.stdout.take().expect("a pipe");
        let (tell, lines) = channel();
        thread::spawn(move || {
            BufReader::new(stdout).lines().map_while(Result::ok).try_for_each(|line| tell.send(line))
        });
        Self { child, lines }
    }

    /// The first look from now on of which this holds.
    #[track_caller]
    fn until(&mut self, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        let begin = Instant::now();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_secs_f64();
        loop {
            let line = self.lines.recv_timeout(Duration::from_secs(60)).expect("watch goes on");
            let sample: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
            if sample["time"].as_f64() > Some(now + sample["memory_age"].as_f64().unwrap_or(0.0)) && is_so(&sample) {
                return sample;
            }
            assert!(begin.elapsed() < Duration::from_secs(60), "not in a minute: {what}: {sample:#}");
        }
    }

    /// Waits for rates.
    #[track_caller]
    fn rates(&mut self) -> Value {
        self.until("rates of writes", |sample| written(sample).is_some())
    }

    #[track_caller]
    fn kill(mut self) {
        self.child.kill().expect("kill watch");
        self.child.wait().expect("wait for watch");
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Bytes of private anonymous memory that are written to in a second, if that is known.
fn written(sample: &Value) -> Option<f64> {
    let rows = sample["memory"].as_array()?;
    let rates = rows.iter().filter(|row| row["kind"] == "anonymous");
    rates.filter_map(|row| row["written_per_second"].as_f64()).reduce(|a, b| a + b)
}

fn has_prediction(sample: &Value) -> bool {
    sample["prediction"]["freeze_us"].as_u64().is_some_and(|us| us > 0)
}

#[test]
fn rates_of_writes_and_nothing_left_of_them() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    for (pages_per_second, least, most) in [(2000_u32, 0.3, 1.3), (0, 0.0, 0.0)] {
        let rate = pages_per_second.to_string();
        let mut target = Target::workload("writer", &["--heap", "64", "--children", "1", "--pages-per-second", &rate]);
        let mut watch = Watch::start(&tool, &target);
        watch.rates();
        let sample = watch.until("a later reading", |sample| written(sample).is_some() && has_prediction(sample));
        // Both processes write. The stacks of threads and the like are anonymous memory, too.
        let expected = 2.0 * 4096.0 * f64::from(pages_per_second);
        let rate = written(&sample).expect("rates");
        assert!(
            rate >= least * expected && rate <= most * expected + 1e6,
            "{rate} bytes a second, {expected} are written: {:#}",
            sample["memory"]
        );
        assert!(
            sample["memory"].as_array().is_some_and(|rows| rows
                .iter()
                .all(|row| row["kind"] != "shared" || row["written_per_second"].is_null()))
        );
        target.assert_free();
        if pages_per_second == 0 {
            // It ends in the usual way.
            kill(Pid::from_raw(watch.child.id().cast_signed()), Signal::SIGTERM).expect("end watch");
            assert!(watch.child.wait().expect("wait for watch").success());
        } else {
            watch.kill();
        }
        expect_not_tracked(&mut target);
        target.assert_free();
        target.assert_well();
        target.finish(0);
    }
}

#[test]
fn dumps_and_snapshots_go_first() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let args = ["--heap", "48", "--children", "2", "--pages-per-second", "1000", "--shared", "4"];
    let mut target = Target::workload("writer", &args);
    let mut watch = Watch::start(&tool, &target);
    watch.rates();
    for args in [&["-R"][..], &["-R", "--precopy=0"], &["-R", "--reader", "procfs"]] {
        let stats = tool.dump(target.pid(), &target.images("running")).args(["--json"]).args(args).run();
        let stats = stats.expect_success().json();
        assert_eq!(stats["precopy"].is_object(), args != ["-R", "--precopy=0"], "{stats}");
        // It begins anew afterwards.
        watch.rates();
    }
    let store = target.images("store");
    let pid = target.pid().to_string();
    let snapshot = tool.command(["snapshot", "--every", "300ms", "--count", "3", "-t", &pid, "-D"]).arg(&store);
    snapshot.run().expect_success();
    watch.rates();
    target.assert_free();
    target.assert_well();
    // The last one takes the tree away, which ends the watch; what it wrote is what the tree was.
    let images = target.images("last");
    tool.dump(target.pid(), &images).run().expect_success();
    assert!(watch.child.wait().expect("wait for watch").success());
    drop(watch);
    target.kill_tree();
    target.forget_verdicts();
    tool.restore(&images).arg("-d").run().expect_success();
    target.assert_free();
    expect_not_tracked(&mut target);
    target.assert_well();
    target.finish(0);
}

#[test]
fn whoever_tracks_for_the_next_image_goes_on() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("writer", &["--heap", "32", "--pages-per-second", "200"]);
    let mut watch = Watch::start(&tool, &target);
    watch.rates();
    let (first, second) = (target.images("first"), target.images("second"));
    tool.dump(target.pid(), &first).args(["-R", "--track-mem"]).run().expect_success();
    let sample = watch.until("somebody else tracks", |sample| sample["dirty_note"].is_string());
    assert!(sample["dirty_note"].as_str().is_some_and(|note| note.contains("another standstill")), "{sample}");
    watch.until("a prediction all the same", has_prediction);
    let parent = first.canonicalize().expect("the first image");
    let dump = tool.dump(target.pid(), &second).args(["-R", "--json", "--prev-images-dir"]).arg(&parent);
    let outcome = dump.run().expect_success();
    // Had the tracking been disturbed, all of the memory would be in it.
    let stored = outcome.json()["pages_stored"].as_u64().expect("a number");
    assert!(stored < 32 * 256 / 2, "{stored} pages");
    watch.rates();
    watch.kill();
    target.assert_free();
    expect_not_tracked(&mut target);
    target.assert_well();
    target.finish(0);
}
