//! Long commands show in a terminal how far they are, and only there.

use std::path::Path;
use std::time::Duration;

use standstill_tests::harness::{Target, Tmux, Tool, Turn, skip, standstill, wait_until};

/// Runs the command in a terminal.
fn terminal(tool: &Tool, args: &str) -> Option<Tmux> {
    let path = tool.path().display();
    let command = format!("echo ABOVE; {path} {args}; echo \"status $?\"; exec sleep 100");
    Tmux::start(&command).inspect_err(|error| skip(error)).ok()
}

/// What a bar always shows.
const BAR: [&str; 3] = ["MiB of ", "iB/s, ", " left"];

fn shows_bar(screen: &str) -> bool {
    BAR.iter().all(|word| screen.contains(word))
}

/// The command shows a bar, which is gone when it has ended.
#[track_caller]
fn expect_bar(tmux: &Tmux) {
    tmux.expect(&BAR);
    let ended = || tmux.screen().contains("status");
    assert!(wait_until(Duration::from_secs(60), ended), "{}", tmux.screen());
    let screen = tmux.expect(&["ABOVE", "status 0"]);
    assert!(!screen.contains(BAR[2]), "the bar is still there:\n{screen}");
}

/// The command ends without ever showing a bar.
#[track_caller]
fn expect_no_bar(tmux: &Tmux) {
    let mut seen = None;
    let ended = wait_until(Duration::from_secs(60), || {
        let screen = tmux.screen();
        let ended = screen.contains("status 0");
        seen = seen.take().or(Some(screen).filter(|screen| shows_bar(screen)));
        ended
    });
    assert!(ended, "{}", tmux.screen());
    assert_eq!(seen, None, "a bar was shown");
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
        let Some(tmux) = terminal(&tool, &dump_args(&target, &images, options)) else { return };
        expect_bar(&tmux);
        if options.starts_with("-R") {
            target.assert_free();
            target.assert_well();
        }
    }
    target.await_gone();
    let Some(tmux) = terminal(&tool, &format!("restore -d -D {}", images.display())) else { return };
    expect_bar(&tmux);
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
    let Some(tmux) = terminal(&tool, &dump_args(&target, &images, "-R --json > /dev/null")) else { return };
    expect_no_bar(&tmux);
    tool.dump(target.pid(), &images).run().expect_success();
    target.await_gone();
    let outcome = tool.command(["restore", "-d", "-D"]).arg(&images).run().expect_success();
    assert!(outcome.stdout.is_empty() && outcome.stderr.is_empty(), "{outcome}");
    target.assert_well();
    target.finish(0);
}
