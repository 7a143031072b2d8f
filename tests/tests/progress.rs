//! Long commands show in a terminal how far they are, and only there.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use standstill_tests::harness::{Target, Tmux, Tool, Turn, skip, standstill, wait_until};

/// A command in a terminal, and what it has ever written there: a bar may be gone before anybody looks at the screen.
struct Terminal {
    tmux: Tmux,
    written: PathBuf,
}

/// What a bar always shows.
const BAR: [&str; 3] = ["MiB of ", "iB/s, ", " left"];

impl Terminal {
    fn start(tool: &Tool, target: &Target, args: &str) -> Option<Self> {
        let written = target.dir().join("typescript");
        _ = fs::remove_file(&written);
        let (path, file) = (tool.path().display(), written.display());
        let command = format!("echo ABOVE; script -qec '{path} {args}' {file}; echo \"status $?\"; exec sleep 100");
        Tmux::start(&command).inspect_err(|error| skip(error)).ok().map(|tmux| Self { tmux, written })
    }

    /// Waits until the command has succeeded. Whether it has shown a bar, which must be gone.
    #[track_caller]
    fn has_shown_bar(&self) -> bool {
        let ended = || self.tmux.screen().contains("status");
        assert!(wait_until(Duration::from_secs(60), ended), "{}", self.tmux.screen());
        let screen = self.tmux.expect(&["ABOVE", "status 0"]);
        assert!(!screen.contains(BAR[2]), "the bar is still there:\n{screen}");
        let written = self.written();
        BAR.iter().all(|word| written.contains(word))
    }

    /// All that was ever shown.
    fn written(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.written).expect("read what was written")).into_owned()
    }
}

fn dump_args(target: &Target, images: &Path, more: &str) -> String {
    format!("dump -t {} -D {} {more}", target.pid(), images.display())
}

#[test]
fn a_bar_in_a_terminal() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("writer", &["--heap", "1024", "--pages-per-second", "1000"]);
    let images = target.images("shown");
    for options in ["-R", "-R --precopy=0 --snapshot fork", "-R --track-mem", "--precopy=0"] {
        target.processes();
        let args = dump_args(&target, &images, options);
        let Some(terminal) = Terminal::start(&tool, &target, &args) else { return };
        assert!(terminal.has_shown_bar(), "no bar: {args}");
        let written = terminal.written();
        assert!(!written.contains(" MiB, "), "the whole, 1 GiB, is not told from the beginning on: {args}\n{written}");
        if options.starts_with("-R") {
            target.assert_free();
            target.assert_well();
        }
    }
    target.await_gone();
    let args = format!("restore -d -D {}", images.display());
    let Some(terminal) = Terminal::start(&tool, &target, &args) else { return };
    assert!(terminal.has_shown_bar(), "no bar: {args}");
    target.assert_well();
    // It is no child of the tests: the terminal's server is.
    target.kill_all();
}

#[test]
fn no_bar_elsewhere() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::workload("writer", &["--heap", "512"]);
    let images = target.images("quiet");
    let outcome = tool.command(["dump", "-R", "-t", &target.pid().to_string(), "-D"]).arg(&images).run();
    let outcome = outcome.expect_success();
    assert!(outcome.stdout.is_empty() && outcome.stderr.is_empty(), "{outcome}");
    let args = dump_args(&target, &images, "-R --json > /dev/null");
    let Some(terminal) = Terminal::start(&tool, &target, &args) else { return };
    assert!(!terminal.has_shown_bar(), "a bar was shown");
    tool.dump(target.pid(), &images).run().expect_success();
    target.await_gone();
    let outcome = tool.command(["restore", "-d", "-D"]).arg(&images).run().expect_success();
    assert!(outcome.stdout.is_empty() && outcome.stderr.is_empty(), "{outcome}");
    target.assert_well();
    target.finish(0);
}
