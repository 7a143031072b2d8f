use std::{io, path::PathBuf};

/// Why an image cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// There is no complete image.
    #[error("{}: no complete image here", .0.display())]
    Missing(PathBuf),
    /// Another process writes there.
    #[error("{}: another dump is writing here", .0.display())]
    Locked(PathBuf),
    /// The file does not begin as one of ours does.
    #[error("{}: not a Standstill image", .0.display())]
    NotAnImage(PathBuf),
    /// The file or a record of it comes from a newer program.
    #[error("{}: the image is newer ({what} version {found}, this program reads up to {supported})", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// What has the version.
        what: String,
        /// Its version.
        found: u32,
        /// The newest version known here.
        supported: u32,
    },
    /// The file ends too early.
    #[error("{}: truncated at byte {offset}", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Where something is missing.
        offset: u64,
    },
    /// Bytes are not what was written.
    #[error("{}: corrupt at byte {offset}: {reason}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// What is wrong there.
        reason: String,
    },
    /// Reading or writing failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

impl ImageError {
    /// Whether a read or write failed, as opposed to a bad image.
    pub fn is_io(&self) -> bool {
        matches!(self, Self::Io { .. } | Self::Locked(_))
    }

    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}
