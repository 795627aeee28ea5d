//! Where content stands: extents in the data file, frames in the blob.

use std::ops::Range;

use super::{NewChunk, NewSpan, Problem};
use crate::{
    index::{Codec, Extent, Frame, FrameId, NodeId},
    position::{BlobOffset, BlobRange, DATA_ALIGNMENT, DataOffset},
};

/// Deflate's densest code: 258 bytes in two bits.
const DEFLATE_DENSITY: u64 = 1032;
/// Zstd's smallest block, of 4 bytes, repeats a byte 128 KiB times (RFC 8878, section 3.1.1.2).
const ZSTD_DENSITY: u64 = 32 << 10;

/// The largest size of a file on Linux.
const LARGEST_DATA: u64 = i64::MAX as u64;

/// A file that has content.
struct File {
    node: NodeId,
    chunks: Range<usize>,
}

pub(super) struct Layout<'a> {
    payload_end: u64,
    codec: Codec,
    chunks: &'a [NewChunk],
    spans: &'a [NewSpan],
    files: Vec<File>,
}

/// Where the content of files stands in the data file.
pub(super) type Places = Vec<(NodeId, DataOffset)>;

pub(super) struct Laid {
    pub(super) extents: Vec<Extent>,
    pub(super) frames: Vec<Frame>,
    pub(super) by_frame: Vec<u32>,
    pub(super) frame_extents: Vec<u32>,
    pub(super) data_length: u64,
    /// The place of each file that was added, in that order.
    pub(super) places: Places,
}

impl<'a> Layout<'a> {
    /// `chunks` are all chunks of the layer, also those of files that are not added: they tell where frames start, where
    /// there are no `spans`.
    pub(super) fn new(payload_end: u64, codec: Codec, chunks: &'a [NewChunk], spans: &'a [NewSpan]) -> Self {
        Self { payload_end, codec, chunks, spans, files: Vec::new() }
    }

    /// Adds a file of at least one chunk.
    pub(super) fn add(&mut self, node: NodeId, chunks: Range<usize>) {
        self.files.push(File { node, chunks });
    }

    pub(super) fn finish(mut self) -> Result<Laid, (NodeId, Problem)> {
        let chunks = self.chunks;
        self.files.sort_by_key(|file| place(&chunks[file.chunks.start]));
        let (extents, places, data_length) = self.extents()?;
        // Extents hold no place in the blob until their frame is known; `sources` says which chunk each is.
        let sources: Vec<&NewChunk> = self.files.iter().flat_map(|file| &chunks[file.chunks.clone()]).collect();
        if !self.spans.is_empty() {
            return self.spans(extents, &sources, places, data_length);
        }
        self.frames(extents, &sources, places, data_length)
    }

    /// Makes a frame of each span, also of those that hold no extent.
    fn spans(
        &self,
        mut extents: Vec<Extent>,
        sources: &[&NewChunk],
        places: Places,
        data_length: u64,
    ) -> Result<Laid, (NodeId, Problem)> {
        let frame = |new: &NewSpan| Frame { range: new.range, codec: new.codec, decoded_length: 0 };
        let mut frames: Vec<Frame> = self.spans.iter().map(frame).collect();
        let mut by_frame: Vec<u32> = (0..).take(extents.len()).collect();
        by_frame.sort_by_key(|number| place(sources[*number as usize]));
        let mut frame_extents = vec![0; frames.len() + 1];
        for number in &by_frame {
            let (extent, start) = (&mut extents[*number as usize], sources[*number as usize].frame);
            let Ok(place) = self.spans.binary_search_by_key(&start, |new| new.range.start) else {
                let end = BlobOffset(self.payload_end);
                return Err((extent.node, Problem::OutsideBlob { offset: start, end }));
            };
            let (frame, span) = (&mut frames[place], &self.spans[place].span);
            if extent.frame_offset < frame.decoded_length {
                return Err((extent.node, Problem::Overlap { offset: start }));
            }
            frame.decoded_length = extent.frame_offset + extent.length;
            let (compressed, decoded) = (frame.range.length, frame.decoded_length);
            if decoded > span.length {
                return Err((extent.node, Problem::FrameTooDense { offset: start, compressed, decoded }));
            }
            extent.frame = FrameId(u32::try_from(place).unwrap_or(u32::MAX));
            frame_extents[place + 1] += 1;
        }
        for place in 1..frame_extents.len() {
            frame_extents[place] += frame_extents[place - 1];
        }
        for bounds in frame_extents.windows(2) {
            by_frame[bounds[0] as usize..bounds[1] as usize].sort_unstable();
        }
        Ok(Laid { extents, frames, by_frame, frame_extents, data_length, places })
    }

    fn extents(&self) -> Result<(Vec<Extent>, Places, u64), (NodeId, Problem)> {
        let mut extents = Vec::with_capacity(self.files.iter().map(|file| file.chunks.len()).sum());
        let mut places = Vec::with_capacity(self.files.len());
        let mut end = 0_u64;
        for file in &self.files {
            let fail = || (file.node, Problem::DataTooLarge);
            let start = end.checked_next_multiple_of(DATA_ALIGNMENT).ok_or_else(fail)?;
            places.push((file.node, DataOffset(start)));
            end = start;
            for new in &self.chunks[file.chunks.clone()] {
                extents.push(Extent {
                    node: file.node,
                    file_offset: new.file_offset,
                    data: DataOffset(end),
                    length: new.length,
                    frame: FrameId(0),
                    frame_offset: new.frame_offset,
                    digest: new.digest,
                });
                end = end.checked_add(new.length).filter(|end| *end <= LARGEST_DATA).ok_or_else(fail)?;
            }
        }
        Ok((extents, places, end))
    }

    fn frames(
        &self,
        mut extents: Vec<Extent>,
        sources: &[&NewChunk],
        places: Places,
        data_length: u64,
    ) -> Result<Laid, (NodeId, Problem)> {
        let density = match self.codec {
            Codec::Gzip | Codec::Deflate => DEFLATE_DENSITY,
            Codec::Zstd => ZSTD_DENSITY,
            Codec::Stored => 1,
        };
        let mut starts: Vec<u64> = self.chunks.iter().map(|chunk| chunk.frame.0).collect();
        starts.sort_unstable();
        let mut starts = starts.into_iter().peekable();
        let mut frames: Vec<Frame> = Vec::new();
        // There are at most as many extents as entries, whose numbers have 32 bits.
        let mut by_frame: Vec<u32> = (0..).take(extents.len()).collect();
        by_frame.sort_by_key(|number| place(sources[*number as usize]));
        let mut frame_extents = Vec::new();
        for (position, number) in (0_u32..).zip(&by_frame) {
            let extent = &mut extents[*number as usize];
            let start = sources[*number as usize].frame;
            if frames.last().is_none_or(|frame| frame.range.start != start) {
                while starts.next_if(|next| *next <= start.0).is_some() {}
                let end = starts.peek().copied().unwrap_or(self.payload_end);
                let range = BlobRange { start, length: end - start.0 };
                frames.push(Frame { range, codec: self.codec, decoded_length: 0 });
                frame_extents.push(position);
            }
            let count = u32::try_from(frames.len()).unwrap_or(u32::MAX);
            extent.frame = FrameId(count - 1);
            let Some(frame) = frames.last_mut() else { continue };
            if extent.frame_offset < frame.decoded_length {
                return Err((extent.node, Problem::Overlap { offset: start }));
            }
            // Below the limit of a frame, as was checked when the chunk came.
            frame.decoded_length = extent.frame_offset + extent.length;
            let (compressed, decoded) = (frame.range.length, frame.decoded_length);
            if decoded > compressed.saturating_mul(density) {
                return Err((extent.node, Problem::FrameTooDense { offset: start, compressed, decoded }));
            }
        }
        frame_extents.push(u32::try_from(by_frame.len()).unwrap_or(u32::MAX));
        for bounds in frame_extents.windows(2) {
            by_frame[bounds[0] as usize..bounds[1] as usize].sort_unstable();
        }
        Ok(Laid { extents, frames, by_frame, frame_extents, data_length, places })
    }
}

/// The order of the blob.
fn place(chunk: &NewChunk) -> (BlobOffset, u64) {
    (chunk.frame, chunk.frame_offset)
}
