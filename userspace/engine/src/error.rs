//! What can go wrong, in words for the person at the terminal.

use std::{io, path::PathBuf};

/// Result of an engine operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of the engine. The text names the process, the object and, where there is one, the remedy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No such process, or one that cannot be a target.
    #[error("{0}")]
    Target(String),
    /// State that cannot be restored later: refused at the dump.
    #[error("process {pid}: {object} cannot be dumped: {remedy}")]
    Unsupported {
        /// Process that has it.
        pid: i32,
        /// The object.
        object: String,
        /// What to do about it.
        remedy: String,
    },
    /// The image is not usable.
    #[error(transparent)]
    Image(#[from] standstill_images::ImageError),
    /// The image decodes, but its content makes no sense or does not fit this machine.
    #[error("image {}: {reason}", dir.display())]
    ImageContent {
        /// Directory of the image.
        dir: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A privilege or kernel feature is missing.
    #[error("{what} is missing: {remedy}")]
    Missing {
        /// Capability or feature.
        what: String,
        /// What to do about it.
        remedy: String,
    },
    /// A file is missing, changed, or cannot be written.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A pid or tid of the image belongs to another process.
    #[error("pid {0} is in use by another process: end it, or restore in a new pid namespace")]
    PidInUse(i32),
    /// The tree could not be stopped in time.
    #[error("the tree was not frozen within {seconds} s: {reason}; it goes on undisturbed")]
    Timeout {
        /// The limit.
        seconds: u64,
        /// Which task was in the way.
        reason: String,
    },
    /// The target ended while it was being dumped.
    #[error("process {0} ended during the dump")]
    Died(i32),
    /// A step of the restore failed in a task.
    #[error("restore of process {pid}: {step}: {source}")]
    Restore {
        /// Task.
        pid: i32,
        /// What it was doing.
        step: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A system call failed where no failure was expected.
    #[error("{call}: {source}")]
    System {
        /// Call and object.
        call: String,
        /// Its errno.
        source: io::Error,
    },
}

impl Error {
    /// Exit status of the command for this error; see `docs/exit-status.md`.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Target(_) => 3,
            Self::Unsupported { .. } => 4,
            Self::Image(e) if e.is_io() => 7,
            Self::Image(_) | Self::ImageContent { .. } => 5,
            Self::Missing { .. } => 6,
            Self::File { .. } => 7,
            Self::PidInUse(_) => 8,
            Self::Timeout { .. } => 9,
            Self::Died(_) => 10,
            Self::Restore { source, .. } | Self::System { source, .. } => match source.raw_os_error() {
                Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => 7,
                // A path that is gone or closed to us, a name or an address that is taken: the surroundings have changed.
                Some(libc::ENOENT | libc::ENOTDIR | libc::EACCES) => 7,
                Some(libc::EEXIST | libc::EADDRINUSE | libc::EADDRNOTAVAIL) => 7,
                Some(libc::EPERM) => 6,
                _ => 1,
            },
        }
    }

    /// Whether the reason is that a process has ended.
    pub(crate) fn is_death(&self) -> bool {
        match self {
            Self::Died(_) => true,
            Self::System { source, .. } => crate::kernel::proc::is_gone(source),
            _ => false,
        }
    }

    pub(crate) fn unsupported(pid: i32, object: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::Unsupported { pid, object: object.into(), remedy: remedy.into() }
    }
}

/// Names the call that failed.
pub(crate) trait Context<T> {
    fn context(self, call: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, call: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| Error::System { call: call(), source: e.into() })
    }
}
