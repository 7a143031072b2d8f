use std::{
    fmt, io,
    path::{Path, PathBuf},
};

/// Why an image cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// There is no complete image.
    #[error("no complete image in {}", .0.display())]
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
    /// The file is not what was written, or was never valid.
    #[error("{}: {flaw} at byte {offset}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// What is wrong there.
        flaw: Flaw,
    },
    /// The image's page stores are not all in its directory and those of its parents.
    #[error("{}: {reason}", dir.display())]
    Chain {
        /// Directory of the image.
        dir: PathBuf,
        /// What is missing, and what to do about it.
        reason: String,
    },
    /// Pages of the image were given up for a newer one.
    #[error(
        "{}: superseded by the image in {}, for which --auto-dedup took pages out of {store}: use that one",
        dir.display(), by.display()
    )]
    Superseded {
        /// Directory of the image.
        dir: PathBuf,
        /// Directory of the newer one.
        by: PathBuf,
        /// The page store that is not complete any more.
        store: String,
    },
    /// A record that cannot be written.
    #[error("record kind {kind} cannot be written: {reason}")]
    Unwritable {
        /// Its kind.
        kind: u16,
        /// Why.
        reason: String,
    },
    /// The file system or the quota is used up.
    #[error("{}: no space left: free some, or use another directory", .0.display())]
    NoSpace(PathBuf),
    /// Reading or writing failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

/// What is wrong with a place in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Flaw {
    /// The file ends too early.
    Truncated,
    /// The bytes are not those that were written.
    Checksum,
    /// No record begins here.
    NoRecord,
    /// A length beyond what there can be.
    TooLong {
        /// The length.
        length: u64,
        /// The most there can be.
        limit: u64,
    },
    /// More bytes than belong here.
    Leftovers,
    /// A record kind that must be understood and is not.
    UnknownKind(u16),
    /// A flag that must be understood and is not.
    UnknownFlags(u32),
    /// The end record counts more or fewer records than there are.
    Count {
        /// Records that were written.
        written: u64,
        /// Records that are there.
        found: u64,
    },
    /// The content makes no sense, for this reason.
    Content(String),
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Truncated => write!(f, "truncated"),
            Self::Checksum => write!(f, "checksum mismatch"),
            Self::NoRecord => write!(f, "no record"),
            Self::TooLong { length, limit } => write!(f, "too long ({length} bytes, at most {limit} are possible)"),
            Self::Leftovers => write!(f, "unexpected bytes"),
            Self::UnknownKind(kind) => write!(f, "a record of kind {kind}, which this program does not know,"),
            Self::UnknownFlags(flags) => write!(f, "flags {flags:#x}, which this program does not know,"),
            Self::Count { written, found } => write!(f, "{found} records, but {written} were written, up to the end"),
            Self::Content(reason) => write!(f, "{reason}"),
        }
    }
}

impl ImageError {
    /// Whether a read or write failed, as opposed to a bad image.
    pub fn is_io(&self) -> bool {
        matches!(self, Self::Io { .. } | Self::NoSpace(_) | Self::Locked(_))
    }

    /// What an I/O error at this path is.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace(path),
            _ => Self::Io { path, source },
        }
    }

    pub(crate) fn invalid(path: &Path, offset: u64, flaw: Flaw) -> Self {
        Self::Invalid { path: path.into(), offset, flaw }
    }
}
