//! Real programs go out and come back: each is dumped running and stopped without noticing it, then dumped and restored
//! twice in a row.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use nix::sys::wait::WaitStatus;
use standstill_tests::harness::{Target, Tool, Turn, full_cycle, proc, skip, wait_until};
use standstill_tests::verdict::Verdict;
use standstill_tests::workload::Pattern;

fn well(target: &mut Target) {
    target.assert_well();
}

#[test]
fn python_with_threads_and_a_subprocess() {
    let _turn = Turn::take();
    let mut target = Target::workload("threads.py", &[]);
    full_cycle(&Tool::get(), &mut target, &mut well);
    target.finish(0);
}

#[test]
fn threads_with_avx_state() {
    let _turn = Turn::take();
    let mut target = Target::workload("threads_avx", &["--threads", "64"]);
    full_cycle(&Tool::get(), &mut target, &mut well);
    target.finish(0);
}

#[test]
fn bash_script_with_a_pipeline() {
    let _turn = Turn::take();
    let mut target = Target::workload("pipeline.sh", &[]);
    let progress = |dir: &Path| fs::read_to_string(dir.join("progress")).unwrap_or_default();
    full_cycle(&Tool::get(), &mut target, &mut |target| {
        let before = progress(target.dir());
        let moved = wait_until(Duration::from_secs(20), || progress(target.dir()) != before);
        assert!(moved, "the pipeline does not go on after {before:?}: {}", target.output());
    });
    fs::write(target.dir().join("stop"), "").expect("ask for the end");
    let exit = target.await_exit(Duration::from_secs(30));
    let verdict = Verdict::read(target.dir(), "root").expect("read the verdict").expect("a verdict");
    assert!(verdict.ok && verdict.checks > 0, "{verdict:?}");
    assert_eq!(exit, Some(WaitStatus::Exited(target.pid(), 0)), "{}", target.output());
}

#[test]
fn xz_in_the_middle_of_a_file() {
    const SIZE: usize = 64 << 20;
    let _turn = Turn::take();
    let files = tempfile::tempdir_in("/var/tmp").expect("make a directory");
    let input = files.path().join("input");
    fs::write(&input, half_compressible(SIZE)).expect("write the input");
    let xz = |_: &Path| {
        let mut command = Command::new("xz");
        command.args(["-T2", "--block-size=4MiB", "--keep", "--stdout"]).arg(&input);
        command
    };
    let undisturbed = xz(files.path()).output().expect("run xz").stdout;
    assert!(!undisturbed.is_empty(), "xz made nothing");

    let mut target = Target::start("xz", xz);
    let length = |target: &Target| fs::metadata(target.dir().join("output")).expect("output of xz").len();
    assert!(wait_until(Duration::from_secs(30), || length(&target) > 0), "xz does not begin");
    full_cycle(&Tool::get(), &mut target, &mut |target| {
        assert!(target.is_alive(), "xz ended before it could be checkpointed");
        let before = proc::cpu_ticks(target.pid());
        let works = wait_until(Duration::from_secs(10), || proc::cpu_ticks(target.pid()) != before);
        assert!(works, "xz does not go on");
    });
    let exit = target.await_exit(Duration::from_secs(120));
    assert_eq!(exit, Some(WaitStatus::Exited(target.pid(), 0)));
    let output = fs::read(target.dir().join("output")).expect("read the output of xz");
    assert!(output == undisturbed, "output differs: {} bytes instead of {}", output.len(), undisturbed.len());
}

/// Random bytes, most of them twice.
fn half_compressible(size: usize) -> Vec<u8> {
    let pattern = Pattern::new(0x787a);
    let mut bytes = Vec::with_capacity(size);
    for block in 0.. {
        let random: Vec<u8> =
            (block * 64..block * 64 + 64).flat_map(|index| pattern.word(index).to_le_bytes()).collect();
        bytes.extend_from_slice(&random);
        if block % 3 == 0 {
            bytes.extend_from_slice(&random);
        }
        if bytes.len() >= size {
            break;
        }
    }
    bytes.truncate(size);
    bytes
}

#[test]
fn redis_with_many_keys() {
    const KEYS: usize = 100_000;
    let _turn = Turn::take();
    if !Path::new("/usr/bin/redis-server").exists() {
        return skip("redis-server is not installed");
    }
    let redis = Redis::start();
    redis.fill(KEYS);
    let digest = redis.ask(&["debug", "digest"]);
    assert_eq!(digest.len(), 40, "digest of the keys: {digest:?}");
    let Redis { mut target, socket } = redis;
    let mut round = 0;
    full_cycle(&Tool::get(), &mut target, &mut |target| {
        round += 1;
        assert_eq!(ask(&socket, &["dbsize"]), KEYS.to_string(), "number of keys");
        assert_eq!(ask(&socket, &["debug", "digest"]), digest, "digest of the keys");
        assert_eq!(ask(&socket, &["get", "key:77777"]), value(77777), "a key");
        // It must also take changes, and forget them again.
        assert_eq!(ask(&socket, &["set", "round", &round.to_string()]), "OK");
        assert_eq!(ask(&socket, &["getdel", "round"]), round.to_string());
        await_no_client(target);
    });
    ask(&socket, &["shutdown", "nosave"]);
    let exit = target.await_exit(Duration::from_secs(30));
    assert_eq!(exit, Some(WaitStatus::Exited(target.pid(), 0)), "{}", target.output());
}

struct Redis {
    target: Target,
    socket: PathBuf,
}

impl Redis {
    fn start() -> Self {
        let target = Target::start("redis-server", |dir| {
            let mut command = Command::new("/usr/bin/redis-server");
            command.arg("--dir").arg(dir).arg("--unixsocket").arg(dir.join("socket"));
            command.args(["--bind", "127.0.0.1", "--port", "16399", "--save", "", "--enable-debug-command", "yes"]);
            command
        });
        let redis = Self { socket: target.dir().join("socket"), target };
        let answers = wait_until(Duration::from_secs(20), || redis.ask(&["ping"]) == "PONG");
        assert!(answers, "redis does not start: {}", redis.target.output());
        redis
    }

    fn fill(&self, keys: usize) {
        let commands = self.target.dir().join("commands");
        let lines: String = (0..keys).map(|key| format!("set key:{key} {}\n", value(key))).collect();
        fs::write(&commands, lines).expect("write the commands");
        let mut cli = Command::new("redis-cli");
        cli.arg("-s").arg(&self.socket).arg("--pipe").stdin(fs::File::open(commands).expect("open the commands"));
        let status = cli.stdout(Stdio::null()).status().expect("run redis-cli");
        assert!(status.success(), "filling redis failed");
        await_no_client(&self.target);
    }

    fn ask(&self, words: &[&str]) -> String {
        ask(&self.socket, words)
    }
}

fn value(key: usize) -> String {
    format!("{:x}", Pattern::new(99).word(key as u64))
}

/// One command through redis-cli.
fn ask(socket: &Path, words: &[&str]) -> String {
    let output = Command::new("redis-cli").arg("-s").arg(socket).args(words).output().expect("run redis-cli");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Waits until redis has closed its side of the last connection: two listening sockets remain.
fn await_no_client(target: &Target) {
    let sockets = || {
        let fds = proc::numbers_in(&proc::path(target.pid(), "fd")).into_iter();
        let links = fds.filter_map(|fd| fs::read_link(proc::path(target.pid(), &format!("fd/{fd}"))).ok());
        links.filter(|link| link.to_string_lossy().starts_with("socket:")).count()
    };
    let alone = wait_until(Duration::from_secs(10), || sockets() == 2);
    assert!(alone, "redis keeps {} sockets", sockets());
    thread::sleep(Duration::from_millis(50));
}
