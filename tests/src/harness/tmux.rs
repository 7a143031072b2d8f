//! A terminal whose screen can be read.

use std::process::{Command, Output};
use std::time::Duration;

use nix::unistd::Pid;
use tempfile::TempDir;

use super::wait_until;

/// A tmux server of its own with one window, 80×24; gone when dropped.
pub struct Tmux {
    dir: TempDir,
}

impl Tmux {
    /// Runs a shell command in the window.
    ///
    /// # Errors
    /// When tmux is missing.
    pub fn start(command: &str) -> Result<Self, String> {
        let tmux = Self { dir: tempfile::tempdir().expect("make a directory") };
        let output = tmux.run(&["-f", "/dev/null", "new-session", "-d", "-x", "80", "-y", "24", command])?;
        if output.status.success() { Ok(tmux) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
    }

    fn run(&self, args: &[&str]) -> Result<Output, String> {
        let mut command = Command::new("tmux");
        // Whoever runs the tests may sit in a tmux of their own.
        command.env_remove("TMUX").env("LC_ALL", "C.UTF-8").arg("-S").arg(self.dir.path().join("socket")).args(args);
        command.output().map_err(|error| format!("tmux: {error}"))
    }

    /// Presses keys, with the names that tmux has for them.
    #[track_caller]
    pub fn keys(&self, keys: &[&str]) {
        let output = self.run(&[&["send-keys"], keys].concat()).expect("tmux send-keys");
        assert!(output.status.success(), "{output:?}");
    }

    /// Gives the window another size.
    #[track_caller]
    pub fn resize(&self, width: u16, height: u16) {
        let (width, height) = (width.to_string(), height.to_string());
        let output = self.run(&["resize-window", "-x", &width, "-y", &height]).expect("tmux resize-window");
        assert!(output.status.success(), "{output:?}");
    }

    /// What the screen shows.
    #[track_caller]
    pub fn screen(&self) -> String {
        let output = self.run(&["capture-pane", "-p"]).expect("tmux capture-pane");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Waits until the screen shows all these words; what it shows then.
    #[track_caller]
    pub fn expect(&self, words: &[&str]) -> String {
        let shows = || {
            let screen = self.screen();
            words.iter().all(|word| screen.contains(word))
        };
        let found = wait_until(Duration::from_secs(20), shows);
        assert!(found, "{words:?} are not on the screen:\n{}", self.screen());
        self.screen()
    }

    /// The shell in the window.
    #[track_caller]
    pub fn shell(&self) -> Pid {
        let output = self.run(&["list-panes", "-F", "#{pane_pid}"]).expect("tmux list-panes");
        let text = String::from_utf8_lossy(&output.stdout);
        Pid::from_raw(text.trim().parse().unwrap_or_else(|_| panic!("{text:?} is no pid")))
    }
}

impl Drop for Tmux {
    fn drop(&mut self) {
        _ = self.run(&["kill-server"]);
    }
}
