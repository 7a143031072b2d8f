//! Compression of one chunk after the other.

use super::{CHUNK, Compression, PAGE, buffer::Page};
use std::io;
use zstd::bulk;

/// Compresses chunks.
pub(super) struct Packer {
    codec: Codec,
    output: Box<[Page]>,
}

enum Codec {
    None,
    Lz4,
    Zstd(bulk::Compressor<'static>),
}

impl Packer {
    pub(super) fn new(compression: Compression) -> io::Result<Self> {
        let (codec, room) = match compression {
            Compression::None => (Codec::None, 0),
            Compression::Lz4 => (Codec::Lz4, lz4_flex::block::get_maximum_output_size(CHUNK)),
            Compression::Zstd(level) => (Codec::Zstd(bulk::Compressor::new(level)?), zstd::compress_bound(CHUNK)),
        };
        Ok(Self { codec, output: Page::allocate(room) })
    }

    /// The compressed form's length, and the form itself with zeros up to whole pages; none if that saves no page.
    pub(super) fn pack(&mut self, raw: &[u8]) -> io::Result<Option<(usize, &[u8])>> {
        let output = Page::bytes_mut(&mut self.output);
        let length = match &mut self.codec {
            Codec::None => return Ok(None),
            Codec::Lz4 => lz4_flex::block::compress_into(raw, output).map_err(io::Error::other)?,
            Codec::Zstd(context) => context.compress_to_buffer(raw, output)?,
        };
        let padded = length.next_multiple_of(PAGE);
        if padded >= raw.len() {
            return Ok(None);
        }
        output[length..padded].fill(0);
        Ok(Some((length, &output[..padded])))
    }
}

/// Decompresses chunks.
pub(super) enum Unpacker {
    None,
    Lz4,
    Zstd(bulk::Decompressor<'static>),
}

impl Unpacker {
    pub(super) fn new(compression: Compression) -> io::Result<Self> {
        Ok(match compression {
            Compression::None => Self::None,
            Compression::Lz4 => Self::Lz4,
            Compression::Zstd(_) => Self::Zstd(bulk::Decompressor::new()?),
        })
    }

    /// Restores page data; the number of bytes, or why it cannot be done. Bytes beyond `raw` are an error.
    pub(super) fn unpack(&mut self, stored: &[u8], raw: &mut [u8]) -> Result<usize, String> {
        match self {
            Self::None => Err("not compressed".into()),
            Self::Lz4 => lz4_flex::block::decompress_into(stored, raw).map_err(|e| e.to_string()),
            Self::Zstd(context) => context.decompress_to_buffer(stored, raw).map_err(|e| e.to_string()),
        }
    }
}
