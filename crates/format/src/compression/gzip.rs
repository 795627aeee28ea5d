//! Gzip members made of whole buffers.

use libdeflater::{CompressionLvl, Compressor};

/// The first two bytes of every gzip member. The third, the method, has only one value in use.
pub(super) const MAGIC: [u8; 2] = [0x1f, 0x8b];
/// The shortest header, and every header that we write.
pub(super) const HEADER_BYTES: usize = 10;
/// CRC-32 and decoded length, four bytes each.
pub(super) const TRAILER_BYTES: usize = 8;

/// A compression level on zlib's scale, which is what users and other tools' options speak.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct GzipLevel(i32);

/// A number that is no gzip level.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("not a gzip level: {level} (expected 0 to 9, or -1 for the default)")]
pub struct InvalidGzipLevel {
    /// The number.
    pub level: i32,
}

impl GzipLevel {
    /// Level 6, which is what -1 means.
    pub const DEFAULT: Self = Self(6);
    /// Level 9.
    pub const BEST: Self = Self(9);

    /// Takes a level: 0 (stored) to 9, -1 (default), or -2, which for Go is Huffman coding alone, and here is level 1.
    ///
    /// # Errors
    /// Where it is any other number.
    pub fn new(level: i32) -> Result<Self, InvalidGzipLevel> {
        match level {
            -2 => Ok(Self(1)),
            -1 => Ok(Self::DEFAULT),
            0..=9 => Ok(Self(level)),
            _ => Err(InvalidGzipLevel { level }),
        }
    }

    /// Returns the level, 0 to 9.
    #[must_use]
    pub fn get(self) -> i32 {
        self.0
    }

    fn libdeflate(self) -> i32 {
        LIBDEFLATE_LEVELS.get(usize::try_from(self.0).unwrap_or_default()).copied().unwrap_or(6)
    }

    /// The header's hint at the level, as zlib and Go write it.
    fn hint(self) -> u8 {
        match self.0 {
            1 => 4,
            9 => 2,
            _ => 0,
        }
    }
}

impl Default for GzipLevel {
    fn default() -> Self {
        Self::DEFAULT
    }
}

const LIBDEFLATE_LEVELS: [i32; 10] = [0, 1, 1, 2, 3, 5, 6, 6, 6, 6];

/// Compresses buffers into gzip members, one after another, with one working memory.
///
/// The same input gives the same bytes: the header has neither time nor name, and its operating system is 255
/// ("unknown"), as Go writes it.
pub struct GzipCompressor {
    level: GzipLevel,
    inner: Compressor,
}

impl GzipCompressor {
    /// Allocates working memory: up to 9 MiB, at level 6 and above 1 MiB.
    #[must_use]
    pub fn new(level: GzipLevel) -> Self {
        // The table holds nothing beyond libdeflate's range, so that the default is never taken.
        let inner = CompressionLvl::new(level.libdeflate()).unwrap_or_default();
        Self { level, inner: Compressor::new(inner) }
    }

    /// Returns `data` as one member.
    #[must_use]
    pub fn compress(&mut self, data: &[u8]) -> Vec<u8> {
        let mut member = Vec::new();
        self.compress_onto(data, &mut member);
        member
    }

    /// Puts `data` as one member at the end of `out`, and returns the member's length.
    pub fn compress_onto(&mut self, data: &[u8], out: &mut Vec<u8>) -> usize {
        let start = out.len();
        let bound = self.inner.deflate_compress_bound(data.len());
        out.extend_from_slice(&[MAGIC[0], MAGIC[1], 8, 0, 0, 0, 0, 0, self.level.hint(), 255]);
        let body = out.len();
        out.resize(body + bound, 0);
        let Ok(length) = self.inner.deflate_compress(data, &mut out[body..]) else {
            // The one error there is says that the buffer is too small, and the bound rules that out.
            unreachable!("deflate output exceeds its own bound of {bound} bytes")
        };
        out.truncate(body + length);
        out.extend_from_slice(&libdeflater::crc32(data).to_le_bytes());
        // By RFC 1952 the length is modulo 2^32.
        out.extend_from_slice(&(data.len() as u64).to_le_bytes()[..4]);
        out.len() - start
    }
}

impl std::fmt::Debug for GzipCompressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GzipCompressor").field("level", &self.level).finish_non_exhaustive()
    }
}

/// Returns `data` as one gzip member. For more than one, a [`GzipCompressor`] saves the working memory.
#[must_use]
pub fn gzip_member(level: GzipLevel, data: &[u8]) -> Vec<u8> {
    GzipCompressor::new(level).compress(data)
}
