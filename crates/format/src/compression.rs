//! Compression of layers: none, gzip and zstd; whole streams and single frames.
//!
//! - [`Decoder`] decompresses a whole layer as it comes in, of whatever compression it is found to be.
//! - [`FrameDecoder`] decodes one frame of a layer that is read lazily, already in memory.
//! - [`GzipCompressor`] and [`ZstdCompressor`] make frames.
//!
//! All offsets are of *compressed* bytes, since that is what can be looked up in a blob.
//!
//! Sources of the rules: RFC 1952 (gzip), RFC 8878 (zstd).

use std::io;

pub(crate) mod deflate;
mod frame;
pub(crate) mod gzip;
mod member;
mod span;
mod stream;
pub(crate) mod zstd;

pub(crate) use deflate::WINDOW_BYTES;
pub use frame::{FrameDecoder, decode_frame};
pub use gzip::{GzipCompressor, GzipLevel, InvalidGzipLevel, gzip_member};
pub(crate) use member::{Header, header};
pub use span::SpanDecoder;
pub use stream::Decoder;
pub use zstd::{ZstdCompressor, zstd_frame};

/// How a stream is compressed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Compression {
    /// Not at all.
    None,
    /// Gzip members, one or more.
    Gzip,
    /// Zstd frames, one or more, skippable ones among them.
    Zstd,
}

impl Compression {
    /// How many bytes [`Compression::detect`] needs to see.
    pub const DETECT_BYTES: usize = 4;

    /// Tells the compression of a stream by its first bytes, at least [`Compression::DETECT_BYTES`] of them where there
    /// are so many. What is neither gzip nor zstd is taken for uncompressed, so that whoever reads it complains.
    #[must_use]
    pub fn detect(start: &[u8]) -> Self {
        if start.starts_with(&gzip::MAGIC) {
            Self::Gzip
        } else if zstd::is_magic(start) {
            Self::Zstd
        } else {
            Self::None
        }
    }
}

/// Why compressed bytes cannot be decoded. Offsets are compressed bytes from the start of the stream or frame.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The source of the stream failed. Whether a retry can help, `source` says.
    #[error("compressed stream cannot be read at offset {offset}: {source}")]
    Read {
        /// Where the next byte would have been.
        offset: u64,
        /// What the source says.
        source: io::Error,
    },
    /// The stream ends in the middle.
    #[error("{compression} stream is cut off at compressed offset {offset}")]
    Truncated {
        /// What it is.
        compression: &'static str,
        /// Where the bytes end.
        offset: u64,
    },
    /// The bytes break a rule of the format, or a checksum does not match.
    #[error("{compression} stream is corrupt near compressed offset {offset}: {problem}")]
    Corrupt {
        /// What it is.
        compression: &'static str,
        /// Where decoding stopped.
        offset: u64,
        /// What the decoder says.
        problem: &'static str,
    },
    /// Something stands behind the end of the stream.
    #[error("{compression} stream ends at compressed offset {offset}, but other bytes follow")]
    TrailingGarbage {
        /// What it is.
        compression: &'static str,
        /// Where the other bytes begin.
        offset: u64,
    },
    /// Decoding would take more memory than is granted.
    #[error(
        "zstd frame at compressed offset {offset} needs a window of more than {} MiB, which decoders refuse by default",
        1_u64 << (.window_log_max - 20)
    )]
    Window {
        /// Where the frame begins, or near it.
        offset: u64,
        /// The largest window that is allowed, as a power of two of bytes.
        window_log_max: u32,
    },
    /// A frame holds less than was promised.
    #[error("frame holds {found} decoded bytes, but {expected} were expected")]
    Short {
        /// Decoded bytes that the index promises.
        expected: u64,
        /// Decoded bytes that are there.
        found: u64,
    },
    /// A frame is too large to be held in memory.
    #[error("frame of {length} decoded bytes exceeds the limit of {limit}")]
    Limit {
        /// Its decoded bytes.
        length: u64,
        /// [`crate::limits::Limits::frame_bytes`].
        limit: u64,
    },
}

impl From<Error> for io::Error {
    /// Keeps the kind of the source's error; for the others, says that the data is bad or at its end.
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::Read { source, .. } => source.kind(),
            Error::Truncated { .. } | Error::Short { .. } => io::ErrorKind::UnexpectedEof,
            _ => io::ErrorKind::InvalidData,
        };
        Self::new(kind, error)
    }
}

#[cfg(test)]
mod tests;
