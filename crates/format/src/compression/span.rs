//! Decodes a span: a piece of a gzip stream that begins with any bit, behind a window that is known.

use super::{
    Error,
    deflate::{Inflater, Input, ROOM_BYTES, Stop, WINDOW_BYTES},
    gzip::TRAILER_BYTES,
    member::{Header, header},
};
use crate::{index::Span, limits::Limits};

/// Output grows by so much where nothing says how long it is.
const STEP_BYTES: usize = 1 << 20;

/// Decodes spans, one after another, with one working memory.
pub struct SpanDecoder(Inflater);

impl SpanDecoder {
    /// Allocates working memory: 20 KiB.
    #[must_use]
    pub fn new() -> Self {
        Self(Inflater::new())
    }

    /// Decodes the first `length` bytes of a span whose digest was checked. `window` is what stands before it in the
    /// decoded stream: 32 KiB, or nothing.
    ///
    /// # Errors
    /// Where it is longer than [`Limits::frame_bytes`], or holds less than `length`, or is damaged.
    pub fn decode(
        &mut self,
        span: &Span,
        window: &[u8],
        compressed: &[u8],
        length: u64,
        limits: &Limits,
    ) -> Result<Vec<u8>, Error> {
        let limit = limits.frame_bytes;
        let fits = usize::try_from(length).ok().filter(|_| length <= limit);
        let wanted = fits.ok_or(Error::Limit { length, limit })?;
        let decoded = self.run(span.bits, window, compressed, wanted, wanted)?;
        if decoded.len() < wanted {
            return Err(Error::Short { expected: length, found: decoded.len() as u64 });
        }
        Ok(decoded)
    }

    /// Decodes the last span of a stream, to the end of it.
    ///
    /// # Errors
    /// As [`SpanDecoder::decode`], of the span's own length; and where there is more than that and `more`.
    pub fn decode_last(
        &mut self,
        span: &Span,
        window: &[u8],
        compressed: &[u8],
        more: u64,
        limits: &Limits,
    ) -> Result<Vec<u8>, Error> {
        let (limit, most) = (limits.frame_bytes, span.length.saturating_add(more));
        let fits = usize::try_from(most).ok().filter(|_| most <= limit);
        let most = fits.ok_or(Error::Limit { length: most, limit })?;
        let least = usize::try_from(span.length).unwrap_or(most);
        let decoded = self.run(span.bits, window, compressed, least, most.saturating_add(1))?;
        match decoded.len() {
            length if length < least => Err(Error::Short { expected: span.length, found: length as u64 }),
            length if length > most => Err(Error::Limit { length: length as u64, limit: most as u64 }),
            _ => Ok(decoded),
        }
    }

    /// Decodes until there are `most` bytes or no more. Room is made for `least`.
    fn run(&mut self, bits: u8, window: &[u8], compressed: &[u8], least: usize, most: usize) -> Result<Vec<u8>, Error> {
        let window = &window[window.len().saturating_sub(WINDOW_BYTES)..];
        let (mut filled, wanted) = (window.len(), window.len().saturating_add(most));
        let mut output = Vec::with_capacity(window.len() + least + ROOM_BYTES);
        output.extend_from_slice(window);
        // What a match writes beyond what is wanted is cut off below.
        output.resize(window.len() + least + ROOM_BYTES, 0);
        let mut input = Input { bytes: compressed, at: 0, is_last: true };
        let mut member = 0;
        match compressed.first() {
            Some(first) if bits > 0 => {
                self.0.begin(*first, bits);
                input.at = 1;
            }
            _ => self.0.begin(0, 0),
        }
        while filled < wanted {
            if output.len() - filled < ROOM_BYTES {
                let room = output.len().saturating_add(STEP_BYTES).min(wanted.saturating_add(ROOM_BYTES));
                output.resize(room, 0);
            }
            let mut produced = filled - member;
            let found = self.0.run(&mut input, &mut output[member..], &mut produced);
            filled = member + produced;
            let offset = input.at as u64;
            match found.map_err(|problem| Error::Corrupt { compression: "gzip", offset, problem })? {
                Stop::BlockEnd | Stop::Output | Stop::Input => {}
                Stop::StreamEnd => {
                    self.0.settle(&mut input);
                    self.0.align();
                    input.at += TRAILER_BYTES;
                    match header(compressed.get(input.at..).unwrap_or_default()) {
                        Header::Bytes(length) => input.at += length,
                        // The end, or zeros behind it.
                        Header::CutOff | Header::Wrong(_) => break,
                    }
                    self.0.begin(0, 0);
                    member = filled;
                }
            }
        }
        output.truncate(filled.min(wanted));
        output.drain(..window.len());
        Ok(output)
    }
}

impl Default for SpanDecoder {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for SpanDecoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SpanDecoder").finish_non_exhaustive()
    }
}
