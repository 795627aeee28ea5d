//! The frames of one request, taken out of its bytes as these arrive.
//!
//! Pure: pieces of a range in, whole frames out. A frame that came in one piece is not copied; bytes between frames are
//! thrown away as they come.

use std::collections::VecDeque;

use bytes::{Buf as _, Bytes, BytesMut};
use loris_format::{index::FrameId, position::BlobRange};

/// Memory that is taken for a frame before its bytes arrive.
const CAPACITY: u64 = 4 << 20;

/// A request under way.
pub(crate) struct Arriving {
    range: BlobRange,
    /// Bytes of the range that have come, and perhaps more.
    came: u64,
    /// What is not whole yet, in order.
    frames: VecDeque<(FrameId, BlobRange)>,
    /// What is here of the first of them.
    part: BytesMut,
    /// The last byte of the frame that was handed out last: it may be the first of the next one.
    shared: Option<u8>,
}

impl Arriving {
    /// Makes ready for the bytes of `range`. The frames lie in it, in order; a frame may begin with the last
    /// byte of the one before, and overlap it no further.
    pub(crate) fn new(range: BlobRange, frames: impl IntoIterator<Item = (FrameId, BlobRange)>) -> Self {
        Self { range, came: 0, frames: frames.into_iter().collect(), part: BytesMut::new(), shared: None }
    }

    /// Returns how many bytes have come: as many as the range has, or the source is wrong.
    pub(crate) fn came(&self) -> u64 {
        self.came
    }

    /// Takes the next bytes, and hands out the frames that are whole with them. Of a piece that goes beyond the range
    /// nothing is believed.
    pub(crate) fn take(&mut self, mut piece: Bytes, mut whole: impl FnMut(FrameId, Bytes)) {
        let mut at = self.range.start.0.saturating_add(self.came);
        self.came = self.came.saturating_add(piece.len() as u64);
        if self.came > self.range.length {
            return;
        }
        while let Some(&(frame, range)) = self.frames.front() {
            // Bytes of the frame that are here lie before `at`.
            let gap = size(range.start.0.saturating_sub(at)).min(piece.len());
            piece.advance(gap);
            at += gap as u64;
            if range.start.0 < at && self.part.is_empty() {
                self.part.extend(self.shared.take());
            }
            let missing = size(range.length) - self.part.len();
            if at < range.start.0 || (piece.is_empty() && missing > 0) {
                return;
            }
            let next = piece.split_to(missing.min(piece.len()));
            at += next.len() as u64;
            if next.len() < missing {
                self.part.reserve(size(range.length.min(CAPACITY)).saturating_sub(self.part.len()));
                self.part.extend_from_slice(&next);
                return;
            }
            self.frames.pop_front();
            let bytes = if self.part.is_empty() {
                next
            } else {
                self.part.extend_from_slice(&next);
                self.part.split().freeze()
            };
            self.shared = bytes.last().copied();
            whole(frame, bytes);
        }
    }
}

fn size(bytes: u64) -> usize {
    // Frames were checked to fit into memory.
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use loris_format::position::BlobOffset;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_piece_too_many_is_not_believed() {
        let range = BlobRange { start: BlobOffset(5), length: 4 };
        let mut arriving = Arriving::new(range, [(FrameId(1), range)]);
        arriving.take(Bytes::from_static(b"abc"), |_, _| panic!("not whole"));
        arriving.take(Bytes::from_static(b"de"), |_, _| panic!("one too many"));
        assert_eq!(arriving.came(), 5);
    }

    proptest! {
        #[test]
        fn frames_are_whole_with_their_last_byte(
            parts in proptest::collection::vec((0usize..40, 0usize..60), 1..12),
            start in 0u64..1000,
            behind in 0usize..30,
            cuts in proptest::collection::vec(1usize..90, 1..80),
        ) {
            let mut frames = Vec::new();
            let mut end = 0;
            for (number, (gap, length)) in (0..).zip(parts) {
                let at = end + gap;
                end = at + length;
                frames.push((FrameId(number), at, length));
            }
            let bytes: Bytes = (0..=255).cycle().take(end + behind).collect::<Vec<u8>>().into();
            let range = BlobRange { start: BlobOffset(start), length: bytes.len() as u64 };
            let ranges = frames.iter().map(|&(id, at, length)| {
                (id, BlobRange { start: BlobOffset(start + at as u64), length: length as u64 })
            });
            let mut arriving = Arriving::new(range, ranges);
            let (mut at, mut got) = (0, Vec::new());
            for cut in cuts.into_iter().cycle() {
                let next = (at + cut).min(bytes.len());
                arriving.take(bytes.slice(at..next), |frame, whole| got.push((frame, whole)));
                at = next;
                // An empty frame is whole with what stands before it.
                let expected = frames.iter().filter(|(_, start, length)| start + length <= at).count();
                prop_assert_eq!(got.len(), expected);
                if at == bytes.len() {
                    break;
                }
            }
            prop_assert_eq!(arriving.came(), bytes.len() as u64);
            for ((frame, whole), (id, start, length)) in got.iter().zip(&frames) {
                prop_assert_eq!(frame, id);
                prop_assert_eq!(whole, &bytes.slice(*start..start + length));
            }
        }
    }
}
