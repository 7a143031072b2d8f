//! Framing: a manifest is a header, records, and an end record that counts them.
//!
//! Each record can be told apart, skipped and checked without decoding its body.

use crate::ImageError;
use serde::{Serialize, de::DeserializeOwned};
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::Xxh3;

/// First bytes of a manifest.
pub const FILE_MAGIC: [u8; 8] = *b"STNDSTLL";
/// Version of the framing.
pub const FORMAT_VERSION: u32 = 1;
const RECORD_MAGIC: u32 = 0x5453_4352;
const FILE_HEADER: usize = 16;
const RECORD_HEADER: usize = 32;
const END: u16 = 0;
/// No record is longer than this, whatever its header says.
const LONGEST: u64 = 1 << 30;
/// A reader that does not know the kind must refuse the image.
const REQUIRED: u32 = 1;

/// A type that is stored as a record.
pub trait Record {
    /// Number of the record kind; never used for anything else.
    const KIND: u16;
    /// Version of the body's layout.
    const VERSION: u16;
}

fn config() -> impl bincode::config::Config {
    bincode::config::standard()
}

/// Collects the bytes of a manifest.
#[derive(Debug)]
pub struct RecordWriter {
    bytes: Vec<u8>,
    count: u64,
}

impl Default for RecordWriter {
    fn default() -> Self {
        Self::new()
    }
}

impl RecordWriter {
    /// An empty manifest.
    pub fn new() -> Self {
        let mut bytes = FILE_MAGIC.to_vec();
        bytes.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        Self { bytes, count: 0 }
    }

    /// Adds a record that every reader must know.
    ///
    /// # Errors
    /// When the record is longer than 1 GiB.
    pub fn push<T: Record + Serialize>(&mut self, record: &T) -> Result<(), ImageError> {
        let body = bincode::serde::encode_to_vec(record, config()).map_err(|e| self.refuse(e.to_string()))?;
        if body.len() as u64 > LONGEST {
            return Err(self.refuse("a record of more than 1 GiB".into()));
        }
        self.frame(T::KIND, T::VERSION, &body);
        self.count += 1;
        Ok(())
    }

    fn refuse(&self, reason: String) -> ImageError {
        ImageError::Corrupt { path: PathBuf::from("manifest"), offset: self.bytes.len() as u64, reason }
    }

    fn frame(&mut self, kind: u16, version: u16, body: &[u8]) {
        let mut header = Vec::with_capacity(RECORD_HEADER);
        header.extend_from_slice(&RECORD_MAGIC.to_le_bytes());
        header.extend_from_slice(&kind.to_le_bytes());
        header.extend_from_slice(&version.to_le_bytes());
        header.extend_from_slice(&REQUIRED.to_le_bytes());
        header.extend_from_slice(&[0; 4]);
        header.extend_from_slice(&(body.len() as u64).to_le_bytes());
        let sum = checksum(&header, body);
        self.bytes.extend_from_slice(&header);
        self.bytes.extend_from_slice(&sum.to_le_bytes());
        self.bytes.extend_from_slice(body);
    }

    /// The complete manifest.
    pub fn finish(mut self) -> Vec<u8> {
        let count = self.count.to_le_bytes();
        self.frame(END, 1, &count);
        self.bytes
    }
}

fn checksum(header: &[u8], body: &[u8]) -> u64 {
    let mut hash = Xxh3::new();
    hash.update(header);
    hash.update(body);
    hash.digest()
}

/// One record of a manifest, its checksum already verified.
#[derive(Clone, Copy, Debug)]
pub struct RawRecord<'a> {
    path: &'a Path,
    offset: u64,
    kind: u16,
    version: u16,
    flags: u32,
    body: &'a [u8],
}

impl RawRecord<'_> {
    /// The record's kind.
    pub fn kind(&self) -> u16 {
        self.kind
    }

    fn corrupt(&self, reason: impl Into<String>) -> ImageError {
        ImageError::Corrupt { path: self.path.into(), offset: self.offset, reason: reason.into() }
    }

    /// Decodes the body.
    ///
    /// # Errors
    /// A newer version, or a body that is not exactly one `T`.
    pub fn decode<T: Record + DeserializeOwned>(&self) -> Result<T, ImageError> {
        if self.version > T::VERSION {
            return Err(ImageError::Newer {
                path: self.path.into(),
                what: format!("record {}", self.kind),
                found: self.version.into(),
                supported: T::VERSION.into(),
            });
        }
        // The decoder never reserves more than the body could fill: every element takes a byte at least.
        let (record, used) = bincode::serde::decode_from_slice::<T, _>(self.body, config())
            .map_err(|e| self.corrupt(format!("record {}: {e}", self.kind)))?;
        if used != self.body.len() {
            return Err(self.corrupt(format!("record {} has {} bytes too many", self.kind, self.body.len() - used)));
        }
        Ok(record)
    }

    /// For a kind the reader does not know.
    ///
    /// # Errors
    /// When the writer marked the record as one that must be understood.
    pub fn unknown(&self) -> Result<(), ImageError> {
        if self.flags & REQUIRED == 0 {
            return Ok(());
        }
        Err(self.corrupt(format!("record kind {} is unknown to this program", self.kind)))
    }
}

/// Iterates over the records of a manifest.
#[derive(Debug)]
pub struct RecordReader<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
    count: u64,
    done: bool,
}

impl<'a> RecordReader<'a> {
    /// Checks the header. `path` is for messages.
    ///
    /// # Errors
    /// Not an image, or a newer one.
    pub fn new(path: &'a Path, bytes: &'a [u8]) -> Result<Self, ImageError> {
        if bytes.len() < FILE_HEADER || bytes[..8] != FILE_MAGIC {
            return Err(ImageError::NotAnImage(path.into()));
        }
        let version = u32::from_le_bytes(bytes[8..12].try_into().expect("four bytes"));
        if version > FORMAT_VERSION {
            let (what, supported) = ("format".into(), FORMAT_VERSION);
            return Err(ImageError::Newer { path: path.into(), what, found: version, supported });
        }
        let reader = Self { path, bytes, at: FILE_HEADER, count: 0, done: false };
        if version == 0 || bytes[12..16] != [0; 4] {
            return Err(reader.corrupt("the header has unknown flags"));
        }
        Ok(reader)
    }

    fn corrupt(&self, reason: &str) -> ImageError {
        ImageError::Corrupt { path: self.path.into(), offset: self.at as u64, reason: reason.into() }
    }

    fn read(&mut self) -> Result<Option<RawRecord<'a>>, ImageError> {
        let truncated = |offset: usize| ImageError::Truncated { path: self.path.into(), offset: offset as u64 };
        let header = self.bytes.get(self.at..self.at + RECORD_HEADER).ok_or_else(|| truncated(self.bytes.len()))?;
        let u16_at = |n: usize| u16::from_le_bytes(header[n..n + 2].try_into().expect("two bytes"));
        let u32_at = |n: usize| u32::from_le_bytes(header[n..n + 4].try_into().expect("four bytes"));
        let u64_at = |n: usize| u64::from_le_bytes(header[n..n + 8].try_into().expect("eight bytes"));
        if u32_at(0) != RECORD_MAGIC {
            return Err(self.corrupt("no record begins here"));
        }
        let len = u64_at(16);
        if len > LONGEST {
            return Err(self.corrupt("a record longer than any can be"));
        }
        let begin = self.at + RECORD_HEADER;
        let body = self.bytes.get(begin..begin + len as usize).ok_or_else(|| truncated(self.bytes.len()))?;
        if checksum(&header[..24], body) != u64_at(24) {
            return Err(self.corrupt("checksum mismatch"));
        }
        let record = RawRecord {
            path: self.path,
            offset: self.at as u64,
            kind: u16_at(4),
            version: u16_at(6),
            flags: u32_at(8),
            body,
        };
        self.at = begin + len as usize;
        if record.kind != END {
            self.count += 1;
            return Ok(Some(record));
        }
        if body != self.count.to_le_bytes() {
            return Err(self.corrupt("records are missing"));
        }
        if self.at != self.bytes.len() {
            return Err(self.corrupt("bytes after the end"));
        }
        Ok(None)
    }
}

impl<'a> Iterator for RecordReader<'a> {
    type Item = Result<RawRecord<'a>, ImageError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let next = self.read().transpose();
        self.done = !matches!(next, Some(Ok(_)));
        next
    }
}
