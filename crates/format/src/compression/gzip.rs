//! Gzip: what the decoders share, and members made of whole buffers.

use flate2::{Decompress, FlushDecompress, Status};
use libdeflater::{CompressionLvl, Compressor};

/// The first two bytes of every gzip member. The third, the method, has only one value in use.
pub(super) const MAGIC: [u8; 2] = [0x1f, 0x8b];
/// The shortest header, and every header that we write.
pub(super) const HEADER_BYTES: usize = 10;
/// CRC-32 and decoded length, four bytes each.
pub(crate) const TRAILER_BYTES: usize = 8;

/// Decodes gzip members, one at a time, piece by piece, with their headers and checksums.
pub(super) struct Inflate(Decompress);

/// What one step of decoding did.
pub(super) struct Step {
    /// Bytes taken from the input.
    pub consumed: usize,
    /// Bytes put into the output.
    pub produced: usize,
    /// Whether that was the member's end, or what is wrong with it.
    pub ended: Result<bool, &'static str>,
}

impl Inflate {
    pub fn new() -> Self {
        /// The largest window of deflate: 2^15 bytes.
        const WINDOW_BITS: u8 = 15;
        Self(Decompress::new_gzip(WINDOW_BITS))
    }

    /// Begins another member.
    pub fn reset(&mut self) {
        self.0.reset(true);
    }

    /// Decodes as much as both buffers allow. Neither may be empty.
    pub fn step(&mut self, input: &[u8], output: &mut [u8]) -> Step {
        let before = (self.0.total_in(), self.0.total_out());
        let found = self.0.decompress(input, output, FlushDecompress::None);
        #[expect(clippy::cast_possible_truncation, reason = "bounded by the lengths of the buffers")]
        let (consumed, produced) = ((self.0.total_in() - before.0) as usize, (self.0.total_out() - before.1) as usize);
        let ended = match found {
            Ok(Status::StreamEnd) => Ok(true),
            Ok(_) if consumed == 0 && produced == 0 => Err("decoder makes no progress"),
            Ok(_) => Ok(false),
            Err(error) if error.needs_dictionary().is_some() => Err("needs a dictionary"),
            Err(_) => Err("invalid deflate data, header or checksum"),
        };
        Step { consumed, produced, ended }
    }
}

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

/// libdeflate's level for each of zlib's: the cheapest whose output is no larger than zlib's.
///
/// Measured on 32 MiB of /usr (executables, libraries, Python, documents; every 23rd file), in members of 4 MiB; members
/// of 32 KiB give the same table, but that level 8 would need 7 there alone. Sizes in KiB; speed of one busy core:
///
/// ```text
///  zlib 1.2.13 (1.3.1 gives the same)         libdeflate 1.26               Go 1.19
///  1  9656  70 MiB/s                          1  9109   37-56 MiB/s         1  9934  19 MiB/s
///  2  9318  72                                2  8774   27-33               2  9274  11
///  3  9083  56                                3  8609   21-25               3  9112   9
///  4  8680  50                                4  8494   23-25               4  8728   8
///  5  8415  34                                5  8305   18-26               5  8483   6
///  6  8288  27                                6  8217   19                  6  8411   6
///  7  8258  22                                7  8165   14-21               7  8387   4
///  8  8218  13                                8  8130   8-16                8  8368   3
///  9  8199   7                                9  8120   7-13                9  8358   2
/// ```
///
/// On 95 MiB of executables alone, with an idle processor: libdeflate 6 makes 32.18 % at 113 MiB/s, zlib 9 32.37 % at 28,
/// zlib 6 33.38 %. So a level that users choose for its size costs a fraction of what they are used to.
const LIBDEFLATE_LEVELS: [i32; 10] = [0, 1, 1, 2, 3, 5, 6, 6, 7, 7];

/// Compresses buffers into gzip members, one after another, with one working memory.
///
/// The same input gives the same bytes: the header has neither time nor name, and its operating system is 255
/// ("unknown"), as Go writes it.
pub struct GzipCompressor {
    level: GzipLevel,
    inner: Compressor,
}

impl GzipCompressor {
    /// Allocates working memory: below 1 MiB at every level.
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
