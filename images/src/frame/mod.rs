//! Framing: a manifest is a header, records, and an end record that counts them.
//!
//! Each record can be told apart, checked and skipped without decoding its body. Bodies are in the wire format of
//! [postcard](https://postcard.jamesmunns.com/wire-format), whose decoder takes no memory for lengths that the rest of
//! the body does not bear out.

use crate::{Flaw, ImageError};
use serde::{Serialize, de::DeserializeOwned};
use std::{
    io::{self, Read},
    path::Path,
};
use twox_hash::XxHash3_64;

/// First bytes of a manifest.
pub const FILE_MAGIC: [u8; 8] = *b"STNDSTLL";
/// Version of the framing.
pub const FORMAT_VERSION: u32 = 1;

const RECORD_MAGIC: [u8; 8] = *b"STNDSREC";
/// Magic, version, flags, name of the writer, checksum of all that.
const FILE_HEADER: usize = 64;
const WRITER: std::ops::Range<usize> = 16..56;
/// Magic, checksum of all that follows, kind, version, flags, length of the body.
const RECORD_HEADER: usize = 32;
/// Where the checksummed part of a record begins.
const CHECKED: usize = 16;
/// Kind of the end record.
const END: u16 = 0;
/// No body is longer than this, whatever its header says.
const LONGEST: u64 = 1 << 30;
/// Flag of a record: a reader that does not know the kind must refuse the image.
const REQUIRED: u32 = 1;

/// A type that is stored as a record.
///
/// The body is the type's serde form: a change to it needs a new `VERSION`, and the old type kept for old images.
pub trait Record {
    /// Number of the record kind; never used for anything else, and not 0.
    const KIND: u16;
    /// Version of the body's layout, from 1.
    const VERSION: u16;
    /// Whether a reader that does not know the kind may go on without it.
    const OPTIONAL: bool = false;
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
        let mut bytes = Vec::with_capacity(1 << 16);
        bytes.extend_from_slice(&FILE_MAGIC);
        bytes.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        bytes.extend_from_slice(&0_u32.to_le_bytes());
        bytes.extend_from_slice(concat!("standstill ", env!("CARGO_PKG_VERSION")).as_bytes());
        bytes.resize(WRITER.end, 0);
        bytes.extend_from_slice(&XxHash3_64::oneshot(&bytes).to_le_bytes());
        Self { bytes, count: 0 }
    }

    /// Adds a record.
    ///
    /// # Errors
    /// When the record is longer than 1 GiB.
    pub fn push<T: Record + Serialize>(&mut self, record: &T) -> Result<(), ImageError> {
        let flags = if T::OPTIONAL { 0 } else { REQUIRED };
        self.frame(T::KIND, T::VERSION, flags, record)?;
        self.count += 1;
        Ok(())
    }

    /// Adds a record as it is in another manifest, whether its kind is known or not.
    pub fn copy(&mut self, record: &RawRecord<'_>) {
        self.bytes.extend_from_slice(&RECORD_MAGIC);
        self.bytes.extend_from_slice(&XxHash3_64::oneshot(&record.bytes).to_le_bytes());
        self.bytes.extend_from_slice(&record.bytes);
        self.count += 1;
    }

    fn frame(&mut self, kind: u16, version: u16, flags: u32, body: &impl Serialize) -> Result<(), ImageError> {
        let unwritable = |reason: String| ImageError::Unwritable { kind, reason };
        let start = self.bytes.len();
        self.bytes.resize(start + RECORD_HEADER, 0);
        self.bytes =
            postcard::to_extend(body, std::mem::take(&mut self.bytes)).map_err(|e| unwritable(e.to_string()))?;
        let record = &mut self.bytes[start..];
        let length = (record.len() - RECORD_HEADER) as u64;
        if length > LONGEST {
            return Err(unwritable(format!("{length} bytes are more than a record can have")));
        }
        record[..8].copy_from_slice(&RECORD_MAGIC);
        record[16..18].copy_from_slice(&kind.to_le_bytes());
        record[18..20].copy_from_slice(&version.to_le_bytes());
        record[20..24].copy_from_slice(&flags.to_le_bytes());
        record[24..32].copy_from_slice(&length.to_le_bytes());
        let checksum = XxHash3_64::oneshot(&record[CHECKED..]);
        record[8..16].copy_from_slice(&checksum.to_le_bytes());
        Ok(())
    }

    /// The complete manifest.
    pub fn finish(mut self) -> Vec<u8> {
        let count = self.count.to_le_bytes();
        self.frame(END, 1, REQUIRED, &count).expect("a number can always be written");
        self.bytes
    }
}

/// One record of a manifest, its checksum already verified.
#[derive(Clone, Debug)]
pub struct RawRecord<'a> {
    path: &'a Path,
    offset: u64,
    /// From the checksummed part of the header on.
    bytes: Vec<u8>,
}

impl RawRecord<'_> {
    /// Where the record begins in the file.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The record's kind.
    pub fn kind(&self) -> u16 {
        u16::from_le_bytes(field(&self.bytes, 0))
    }

    /// Version of the body's layout.
    pub fn version(&self) -> u16 {
        u16::from_le_bytes(field(&self.bytes, 2))
    }

    fn flags(&self) -> u32 {
        u32::from_le_bytes(field(&self.bytes, 4))
    }

    /// The body as it is in the file.
    pub fn body(&self) -> &[u8] {
        &self.bytes[RECORD_HEADER - CHECKED..]
    }

    fn invalid(&self, flaw: Flaw) -> ImageError {
        ImageError::invalid(self.path, self.offset, flaw)
    }

    /// Decodes the body.
    ///
    /// # Errors
    /// Another version than that of `T`, or a body that is not exactly one `T`.
    pub fn decode<T: Record + DeserializeOwned>(&self) -> Result<T, ImageError> {
        let kind = self.kind();
        if self.version() > T::VERSION {
            return Err(ImageError::Newer {
                path: self.path.into(),
                what: format!("record kind {kind}"),
                found: self.version().into(),
                supported: T::VERSION.into(),
            });
        }
        let content = |reason: String| self.invalid(Flaw::Content(format!("record kind {kind}: {reason}")));
        if kind != T::KIND || self.version() != T::VERSION {
            return Err(content(format!("not kind {} version {}", T::KIND, T::VERSION)));
        }
        let (record, rest) = postcard::take_from_bytes(self.body()).map_err(|e| content(e.to_string()))?;
        if !rest.is_empty() {
            let offset = self.offset + (RECORD_HEADER + self.body().len() - rest.len()) as u64;
            return Err(ImageError::invalid(self.path, offset, Flaw::Leftovers));
        }
        Ok(record)
    }

    /// For a kind the reader does not know.
    ///
    /// # Errors
    /// When the writer marked the record as one that must be understood.
    pub fn unknown(&self) -> Result<(), ImageError> {
        if self.flags() & REQUIRED == 0 {
            return Ok(());
        }
        Err(self.invalid(Flaw::UnknownKind(self.kind())))
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("a field lies within its header")
}

/// Iterates over the records of a manifest. It is whole only if the iteration came to its end without an error.
#[derive(Debug)]
pub struct RecordReader<'a, R> {
    path: &'a Path,
    source: R,
    writer: String,
    /// Bytes read so far.
    at: u64,
    count: u64,
    done: bool,
}

impl<'a, R: Read> RecordReader<'a, R> {
    /// Reads the header. `path` is for messages.
    ///
    /// # Errors
    /// Not an image, or a newer one.
    pub fn new(path: &'a Path, source: R) -> Result<Self, ImageError> {
        let mut reader = Self { path, source, writer: String::new(), at: 0, count: 0, done: false };
        let mut header = Vec::new();
        reader.read(FILE_HEADER as u64, &mut header)?;
        if !header.starts_with(&FILE_MAGIC) {
            return Err(ImageError::NotAnImage(path.into()));
        }
        if header.len() < FILE_HEADER {
            return Err(reader.invalid(Flaw::Truncated));
        }
        let version = u32::from_le_bytes(field(&header, 8));
        if version > FORMAT_VERSION {
            let (what, supported) = ("format".into(), FORMAT_VERSION);
            return Err(ImageError::Newer { path: path.into(), what, found: version, supported });
        }
        let at_start = |flaw| Err(ImageError::invalid(path, 0, flaw));
        if XxHash3_64::oneshot(&header[..WRITER.end]) != u64::from_le_bytes(field(&header, WRITER.end)) {
            return at_start(Flaw::Checksum);
        }
        let flags = u32::from_le_bytes(field(&header, 12));
        if flags != 0 {
            return at_start(Flaw::UnknownFlags(flags));
        }
        reader.writer = String::from_utf8_lossy(&header[WRITER]).trim_end_matches('\0').into();
        Ok(reader)
    }

    /// Name and version of the program that wrote the manifest.
    pub fn writer(&self) -> &str {
        &self.writer
    }

    fn invalid(&self, flaw: Flaw) -> ImageError {
        ImageError::invalid(self.path, self.at, flaw)
    }

    /// Adds the next bytes to `bytes`; fewer than `length` at the end of the file. Memory is taken for what is really
    /// there, not for what `length` promises.
    fn read(&mut self, length: u64, bytes: &mut Vec<u8>) -> Result<(), ImageError> {
        let read = self.source.by_ref().take(length).read_to_end(bytes).map_err(ImageError::io(self.path))?;
        self.at += read as u64;
        Ok(())
    }

    fn record(&mut self) -> Result<Option<RawRecord<'a>>, ImageError> {
        let offset = self.at;
        let invalid = |flaw| ImageError::invalid(self.path, offset, flaw);
        let mut header = Vec::with_capacity(RECORD_HEADER);
        self.read(RECORD_HEADER as u64, &mut header)?;
        if header.len() < RECORD_HEADER {
            return Err(self.invalid(Flaw::Truncated));
        }
        if !header.starts_with(&RECORD_MAGIC) {
            return Err(invalid(Flaw::NoRecord));
        }
        let checksum = u64::from_le_bytes(field(&header, 8));
        let length = u64::from_le_bytes(field(&header, 24));
        if length > LONGEST {
            return Err(invalid(Flaw::TooLong { length, limit: LONGEST }));
        }
        let mut bytes = header.split_off(CHECKED);
        self.read(length, &mut bytes)?;
        if self.at - offset < RECORD_HEADER as u64 + length {
            return Err(self.invalid(Flaw::Truncated));
        }
        if XxHash3_64::oneshot(&bytes) != checksum {
            return Err(invalid(Flaw::Checksum));
        }
        let record = RawRecord { path: self.path, offset, bytes };
        if record.flags() & !REQUIRED != 0 {
            return Err(invalid(Flaw::UnknownFlags(record.flags())));
        }
        if record.kind() != END {
            self.count += 1;
            return Ok(Some(record));
        }
        self.end(&record)?;
        Ok(None)
    }

    fn end(&mut self, record: &RawRecord<'_>) -> Result<(), ImageError> {
        let written = record.body().try_into().map(u64::from_le_bytes).map_err(|_| record.invalid(Flaw::NoRecord))?;
        if written != self.count {
            return Err(record.invalid(Flaw::Count { written, found: self.count }));
        }
        match self.source.read_exact(&mut [0]) {
            Ok(()) => Err(self.invalid(Flaw::Leftovers)),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(()),
            Err(e) => Err(ImageError::io(self.path)(e)),
        }
    }
}

impl<'a, R: Read> Iterator for RecordReader<'a, R> {
    type Item = Result<RawRecord<'a>, ImageError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let next = self.record().transpose();
        self.done = !matches!(next, Some(Ok(_)));
        next
    }
}

#[cfg(test)]
mod tests;
