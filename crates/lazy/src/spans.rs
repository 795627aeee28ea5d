//! Frames that are spans: their compressed bytes are checked before they are decoded, since their extents have no digests.

use loris_format::{
    compression::{FrameDecoder, SpanDecoder},
    index::{Codec, FrameId},
};

use crate::{layer::LazyLayer, rest};

impl LazyLayer {
    /// Checks and decodes a span: as much of it as its extents need, or `all`. Returns what was decoded, and whether that is
    /// all of it; or what is wrong with it.
    pub(crate) fn decode_span(
        &self,
        decoder: &mut FrameDecoder,
        id: FrameId,
        compressed: &[u8],
        all: bool,
    ) -> Result<(Vec<u8>, bool), String> {
        let frame = &self.index.frames()[id.0 as usize];
        let Some(span) = self.index.span(id) else { return Err("it is no span".to_owned()) };
        if !span.digest.matches(compressed) {
            return Err(format!("its compressed bytes have not the digest that the index says, {}", span.digest));
        }
        if frame.codec == Codec::Stored {
            return Ok((compressed.to_vec(), true));
        }
        let is_last = id.0 as usize + 1 == self.index.frames().len();
        if frame.codec == Codec::Zstd {
            let decoded = if all && is_last {
                let most = span.length.saturating_add(rest::MOST_BYTES);
                decoder.decode_all(frame.codec, compressed, span.length, most, &self.limits)
            } else {
                let length = if all { span.length } else { frame.decoded_length };
                decoder.decode(frame.codec, compressed, length, &self.limits).map(|decoded| (decoded, all))
            };
            return decoded.map_err(|error| error.to_string());
        }
        let window = self.windows.as_ref().and_then(|windows| windows.before(decoder, id));
        let window = window.ok_or("the window before it can't be read from the store; open the image again")?;
        let mut spans = SpanDecoder::new();
        if !all {
            let decoded = spans.decode(span, &window, compressed, frame.decoded_length, &self.limits);
            return decoded.map(|decoded| (decoded, false)).map_err(|error| error.to_string());
        }
        let decoded = if is_last {
            spans.decode_last(span, &window, compressed, rest::MOST_BYTES, &self.limits)
        } else {
            spans.decode(span, &window, compressed, span.length, &self.limits)
        };
        match decoded {
            Ok(decoded) => Ok((decoded, true)),
            // Damage behind what is needed is no concern of who reads.
            Err(_) => self.decode_span(decoder, id, compressed, false),
        }
    }
}
