//! One test at a time, and tests that cannot be run here.

use std::fs::{File, OpenOptions};
use std::io::{Write, stderr};
use std::sync::Once;
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

const LOCK: &str = "/var/tmp/standstill-tests.lock";

/// The right to run: only one test on this machine has it, because the tests freeze things, measure time and need the
/// pids of processes that have just died.
pub struct Turn(#[expect(dead_code, reason = "held for its lock")] Flock<File>);

impl Turn {
    /// Waits for the other tests to finish.
    pub fn take() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "the end-to-end tests need root");
        static ONCE: Once = Once::new();
        ONCE.call_once(|| {
            // Restored processes lose their parent; as a subreaper we can wait for them and see stray ones.
            nix::sys::prctl::set_child_subreaper(true).expect("become a subreaper");
            let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("getrlimit");
            setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("setrlimit");
        });
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(LOCK).expect("open the lock file");
        let lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error);
        Self(lock.expect("lock the lock file"))
    }
}

/// Says that a test could not check anything. It fails when `STANDSTILL_REQUIRE_ALL` is 1.
pub fn skip(reason: &str) {
    assert!(
        std::env::var_os("STANDSTILL_REQUIRE_ALL").is_none_or(|value| value != "1"),
        "not allowed to skip: {reason}"
    );
    say(&format!("SKIPPED: {reason}"));
}

/// Prints a line that is seen even when the test passes: the test runner captures what eprintln prints.
pub fn say(line: &str) {
    _ = stderr().write_all(format!("{line}\n").as_bytes());
}

/// The tool, for tests of what only Standstill promises; none, and a skip, when CRIU is tested in its place.
pub fn standstill() -> Option<super::Tool> {
    let tool = super::Tool::get();
    if tool.is_criu() {
        skip("only Standstill promises this, and the tool is CRIU");
        return None;
    }
    Some(tool)
}

/// Polls until a condition holds; false when it does not within the limit.
pub fn wait_until(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + limit;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() > end {
            return false;
        }
        thread::sleep(Duration::from_millis(2));
    }
}
