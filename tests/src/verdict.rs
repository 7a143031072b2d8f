//! The file in which a workload says how it fared.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{fs, io};

use serde::{Deserialize, Serialize};

/// What a workload found out about itself.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Verdict {
    /// Name of the workload.
    pub workload: String,
    /// Process that wrote the verdict.
    pub pid: i32,
    /// Counts the verdicts of one process, from 1.
    pub seq: u64,
    /// True when nothing was wrong so far.
    pub ok: bool,
    /// Comparisons made so far; a verdict without any is worth nothing.
    pub checks: u64,
    /// What was wrong, in words.
    pub failures: Vec<String>,
    /// Longest gap seen by the clock loop, in microseconds.
    #[serde(default)]
    pub longest_pause_us: u64,
    /// Sum of all gaps longer than [`Verdict::LONG_PAUSE_US`], in microseconds.
    #[serde(default)]
    pub paused_us: u64,
    /// Figures that are neither right nor wrong.
    #[serde(default)]
    pub notes: BTreeMap<String, u64>,
}

impl Verdict {
    /// A gap of the clock loop from which on the process counts as having been stopped.
    pub const LONG_PAUSE_US: u64 = 20_000;

    /// The file a process of a workload writes its verdict to; `member` names the process within the workload.
    pub fn path(dir: &Path, member: &str) -> PathBuf {
        dir.join(format!("verdict.{member}.json"))
    }

    /// Writes the verdict so that a reader sees all of it or none.
    pub fn write(&self, dir: &Path, member: &str) -> io::Result<()> {
        let path = Self::path(dir, member);
        let aside = path.with_extension("new");
        fs::write(&aside, serde_json::to_vec_pretty(self)?)?;
        fs::rename(aside, path)
    }

    /// Reads a verdict; `None` when there is none yet.
    pub fn read(dir: &Path, member: &str) -> io::Result<Option<Self>> {
        match fs::read(Self::path(dir, member)) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}
