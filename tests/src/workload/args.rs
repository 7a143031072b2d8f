//! Options of a workload.

use std::path::PathBuf;
use std::str::FromStr;

/// The command line of a workload: `--name value` pairs and `--flag`s.
pub struct Args(Vec<String>);

impl Args {
    /// Takes the command line of this process.
    pub fn parse() -> Self {
        Self(std::env::args().skip(1).collect())
    }

    /// True when `--name` was given.
    pub fn flag(&self, name: &str) -> bool {
        self.position(name).is_some()
    }

    /// The value behind `--name`, or the default when it is absent.
    pub fn value<T: FromStr>(&self, name: &str, default: T) -> T {
        let Some(at) = self.position(name) else {
            return default;
        };
        let text = self.0.get(at + 1).unwrap_or_else(|| panic!("--{name} needs a value"));
        text.parse().unwrap_or_else(|_| panic!("--{name}: {text:?} makes no sense"))
    }

    /// The directory the workload keeps its files in.
    pub fn dir(&self) -> PathBuf {
        let dir: PathBuf = self.value("dir", PathBuf::new());
        assert!(dir.is_absolute(), "--dir needs an absolute path");
        dir
    }

    fn position(&self, name: &str) -> Option<usize> {
        self.0.iter().position(|arg| arg.strip_prefix("--") == Some(name))
    }
}
