//! Decodes one frame that is in memory: the beginning of it that is needed, and no more.

use libdeflater::Decompressor;
use zstd_safe::{DCtx, InBuffer, OutBuffer};

use super::{Error, gzip, zstd};
use crate::{index::Codec, limits::Limits};

/// Decodes frames, one after another, with one working memory.
///
/// Gzip is decoded by libdeflate where it can be and by zlib-rs elsewhere. libdeflate is 1.7 times as fast (2 cores of a
/// virtual machine, 47 MiB of executables in members of 4 MiB to 4 KiB), but cannot stop in the middle of a member. A
/// member's last bytes tell its length, though, and what a lazy layer has behind a file's content is a few headers.
pub struct FrameDecoder {
    deflate: Decompressor,
    zstd: DCtx<'static>,
}

impl FrameDecoder {
    /// Allocates working memory: 110 KiB; for zstd, a frame's window comes to it, at most 128 MiB and only as far as
    /// the frame really reaches.
    #[must_use]
    pub fn new() -> Self {
        Self { deflate: Decompressor::new(), zstd: zstd::decoder() }
    }

    /// Decodes the first `decoded_length` bytes of a frame: one or more gzip members or zstd frames, or bytes as they
    /// are. What is behind them is not looked at. A member that is decoded to its end has the checksum it says; else it
    /// is for the caller to verify what comes out, against the digest of the extent.
    ///
    /// Allocates `decoded_length` bytes and at most 256 KiB more, whatever the frame says.
    ///
    /// # Errors
    /// Where `decoded_length` exceeds [`Limits::frame_bytes`], or the frame holds less, is corrupt, or needs too large a
    /// window.
    pub fn decode(
        &mut self,
        codec: Codec,
        compressed: &[u8],
        decoded_length: u64,
        limits: &Limits,
    ) -> Result<Vec<u8>, Error> {
        let limit = limits.frame_bytes;
        let length = usize::try_from(decoded_length).ok().filter(|_| decoded_length <= limit);
        let length = length.ok_or(Error::Limit { length: decoded_length, limit })?;
        if length == 0 {
            return Ok(Vec::new());
        }
        match codec {
            Codec::Stored => match compressed.get(..length) {
                Some(bytes) => Ok(bytes.to_vec()),
                None => Err(Error::Short { expected: decoded_length, found: compressed.len() as u64 }),
            },
            Codec::Gzip => match self.whole_member(compressed, length) {
                Some(decoded) => Ok(decoded),
                None => gzip_prefix(compressed, length),
            },
            Codec::Zstd => self.zstd_prefix(compressed, length),
            Codec::Deflate => Err(NEEDS_WINDOW),
        }
    }

    /// Decodes all of a frame, as far as `most` bytes: also what stands behind the first `decoded_length` bytes, which it
    /// must have. Returns what was decoded, and whether that is all of it, sound to its end.
    ///
    /// # Errors
    /// As [`FrameDecoder::decode`]; damage behind the first `decoded_length` bytes is none.
    pub fn decode_all(
        &mut self,
        codec: Codec,
        compressed: &[u8],
        decoded_length: u64,
        most: u64,
        limits: &Limits,
    ) -> Result<(Vec<u8>, bool), Error> {
        let most = usize::try_from(most.min(limits.frame_bytes)).unwrap_or(usize::MAX);
        let all = match codec {
            Codec::Stored => (compressed.len() <= most).then(|| compressed.to_vec()),
            Codec::Gzip => self.one_member(compressed, most).or_else(|| gzip_all(compressed, most)),
            Codec::Zstd => self.zstd_all(compressed, most),
            Codec::Deflate => None,
        };
        match all {
            Some(decoded) if decoded.len() as u64 >= decoded_length => Ok((decoded, true)),
            _ => Ok((self.decode(codec, compressed, decoded_length, limits)?, false)),
        }
    }

    /// Decodes a frame that is one member for certain: its first bytes occur nowhere else in it.
    fn one_member(&mut self, compressed: &[u8], most: usize) -> Option<Vec<u8>> {
        const METHOD_DEFLATE: u8 = 8;
        let first = [gzip::MAGIC[0], gzip::MAGIC[1], METHOD_DEFLATE];
        if compressed.get(1..)?.windows(3).any(|bytes| bytes == first) {
            return None;
        }
        let stated = u32::from_le_bytes(*compressed.last_chunk()?) as usize;
        if stated > most {
            return None;
        }
        let mut decoded = vec![0; stated];
        let found = self.deflate.gzip_decompress(compressed, &mut decoded).ok()?;
        (found == stated).then_some(decoded)
    }

    fn zstd_all(&mut self, compressed: &[u8], most: usize) -> Option<Vec<u8>> {
        const STEP: usize = 128 << 10;
        let _ = self.zstd.reset(zstd_safe::ResetDirective::SessionOnly);
        let mut decoded = Vec::new();
        let mut source = InBuffer::around(compressed);
        let mut hint = 0;
        while source.pos() < compressed.len() || hint != 0 {
            if decoded.len() > most {
                return None;
            }
            let before = (source.pos(), decoded.len());
            decoded.reserve(STEP);
            let at = decoded.len();
            let mut target = OutBuffer::around_pos(&mut decoded, at);
            hint = self.zstd.decompress_stream(&mut target, &mut source).ok()?;
            if before == (source.pos(), decoded.len()) {
                return None;
            }
        }
        (decoded.len() <= most).then_some(decoded)
    }

    /// Decodes a frame of one member that ends soon enough behind what is needed. `None` where the frame is not such a
    /// one or is corrupt: then the other way shall say so, since the damage may be behind what is needed.
    fn whole_member(&mut self, compressed: &[u8], length: usize) -> Option<Vec<u8>> {
        /// Most decoded bytes that are decoded and thrown away.
        const SLACK_BYTES: usize = 256 << 10;
        if compressed.len() < gzip::HEADER_BYTES + gzip::TRAILER_BYTES {
            return None;
        }
        let stated = u32::from_le_bytes(*compressed.last_chunk()?) as usize;
        let slack = stated.checked_sub(length)?;
        if slack > SLACK_BYTES {
            return None;
        }
        let mut decoded = vec![0; stated];
        let found = self.deflate.gzip_decompress(compressed, &mut decoded).ok()?;
        decoded.truncate(length);
        (found >= length).then_some(decoded)
    }

    fn zstd_prefix(&mut self, compressed: &[u8], length: usize) -> Result<Vec<u8>, Error> {
        // A frame that failed, or was left in the middle, must not leak into this one. It cannot fail.
        let _ = self.zstd.reset(zstd_safe::ResetDirective::SessionOnly);
        let mut decoded = Vec::with_capacity(length);
        let mut source = InBuffer::around(compressed);
        let mut target = OutBuffer::around(&mut decoded);
        let mut hint = 0;
        while target.pos() < length {
            let before = (source.pos(), target.pos());
            if hint == 0 && source.pos() == compressed.len() {
                break;
            }
            let found = self.zstd.decompress_stream(&mut target, &mut source);
            hint = found.map_err(|code| zstd::error(code, source.pos() as u64))?;
            if before == (source.pos(), target.pos()) {
                return Err(Error::Truncated { compression: "zstd", offset: source.pos() as u64 });
            }
        }
        let found = target.pos();
        enough(decoded, length, found)
    }
}

/// What [`super::SpanDecoder`] is for.
const NEEDS_WINDOW: Error =
    Error::Corrupt { compression: "deflate", offset: 0, problem: "a span can't be decoded without its window" };

impl Default for FrameDecoder {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for FrameDecoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrameDecoder").finish_non_exhaustive()
    }
}

/// Decodes the first `decoded_length` bytes of a frame. For more than one, a [`FrameDecoder`] saves the working memory.
///
/// # Errors
/// As [`FrameDecoder::decode`].
pub fn decode_frame(codec: Codec, compressed: &[u8], decoded_length: u64, limits: &Limits) -> Result<Vec<u8>, Error> {
    FrameDecoder::new().decode(codec, compressed, decoded_length, limits)
}

fn gzip_prefix(compressed: &[u8], length: usize) -> Result<Vec<u8>, Error> {
    let mut decoded = vec![0; length];
    let mut inflate = gzip::Inflate::new();
    let (mut source, mut filled) = (0, 0);
    while filled < length {
        let rest = &compressed[source..];
        if rest.is_empty() {
            return Err(Error::Truncated { compression: "gzip", offset: source as u64 });
        }
        let gzip::Step { consumed, produced, ended } = inflate.step(rest, &mut decoded[filled..]);
        source += consumed;
        filled += produced;
        let corrupt = |problem| Error::Corrupt { compression: "gzip", offset: source as u64, problem };
        if ended.map_err(corrupt)? {
            // Behind a member: nothing, zeros as after a stream, or something else. Only a member holds content.
            if !compressed[source..].starts_with(&gzip::MAGIC) {
                break;
            }
            inflate.reset();
        }
    }
    enough(decoded, length, filled)
}

/// Decodes members up to the end of the input, where there are only members.
fn gzip_all(compressed: &[u8], most: usize) -> Option<Vec<u8>> {
    const STEP: usize = 128 << 10;
    let mut decoded = Vec::new();
    let mut inflate = gzip::Inflate::new();
    let mut source = 0;
    let mut filled = 0;
    loop {
        if filled == decoded.len() {
            if filled > most {
                return None;
            }
            decoded.resize(filled + STEP.max(compressed.len()), 0);
        }
        let rest = compressed.get(source..).filter(|rest| !rest.is_empty())?;
        let gzip::Step { consumed, produced, ended } = inflate.step(rest, &mut decoded[filled..]);
        source += consumed;
        filled += produced;
        if ended.ok()? {
            if source == compressed.len() {
                break;
            }
            inflate.reset();
        }
    }
    decoded.truncate(filled);
    (filled <= most).then_some(decoded)
}

fn enough(mut decoded: Vec<u8>, expected: usize, found: usize) -> Result<Vec<u8>, Error> {
    if found < expected {
        return Err(Error::Short { expected: expected as u64, found: found as u64 });
    }
    // A vector may have more room than was asked for, and zstd fills what there is.
    decoded.truncate(expected);
    Ok(decoded)
}
