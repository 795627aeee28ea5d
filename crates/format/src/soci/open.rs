//! A ztoc becomes a layer index.
//!
//! What it says of files is believed as far as whoever vouches for it is; that content is what the blob holds, the spans'
//! digests say. Where a tar header would have to stand is checked, so that no two files share content.

use super::{
    zinfo::{Checkpoints, FrameStarts, TarZinfo},
    ztoc::{Algorithm, File, Ztoc, ZtocError},
};
use crate::{
    compression::WINDOW_BYTES,
    digest::Digest,
    index::{
        Codec, LayerIndex, Span,
        builder::{Attributes, IndexBuilder, IndexError, NewChunk, NewKind, NewSpan, Problem},
    },
    limits::Limits,
    position::{BlobOffset, BlobRange, FileOffset},
    tar::{self, BLOCK_BYTES, EntryKind},
};

/// Where the windows of a ztoc's checkpoints stand in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct WindowPlaces {
    /// The first of them.
    pub first: usize,
    /// From the beginning of one to that of the next.
    pub stride: usize,
    /// How many there are.
    pub count: usize,
    /// How many spans stand in front that have none of their own: they begin with the stream.
    pub left_out: usize,
}

/// Finds the windows in a ztoc, of which there are none for an uncompressed layer.
///
/// # Errors
/// Where it is damaged.
pub fn window_places(ztoc: &[u8], limits: &Limits) -> Result<WindowPlaces, ZtocError> {
    let document = Ztoc::read(ztoc, limits)?;
    if document.algorithm != Algorithm::Gzip {
        return Ok(WindowPlaces::default());
    }
    let points = Checkpoints::read(document.checkpoints)?;
    let left_out = usize::from(points.window_at(0).is_none());
    let count = points.count() - left_out;
    let Some(first) = points.window_at(left_out) else { return Ok(WindowPlaces { left_out, ..Default::default() }) };
    let stride = points.window_at(left_out + 1).map_or(WINDOW_BYTES, |second| second.start - first.start);
    Ok(WindowPlaces { first: document.checkpoints_at + first.start, stride, count, left_out })
}

/// Why a ztoc is no index of a layer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// It can't be read.
    #[error(transparent)]
    Ztoc(#[from] ZtocError),
    /// It is of another layer.
    #[error("the ztoc is of a layer of {found} bytes, this one has {expected}")]
    OtherLayer {
        /// The layer's size.
        expected: u64,
        /// What the ztoc says.
        found: u64,
    },
    /// A file's content overlaps what is before it, or lies outside of the tar.
    #[error("the ztoc's entry {number} ({name}) has content where none of its can be, at {offset} of the tar")]
    Place {
        /// Which.
        number: u64,
        /// Its name.
        name: String,
        /// Where.
        offset: u64,
    },
    /// A file is in the tar with holes.
    #[error("the ztoc's entry {number} ({name}) is a sparse file, which SOCI can't say how to read")]
    Sparse {
        /// Which.
        number: u64,
        /// Its name.
        name: String,
    },
    /// Its files make no tree.
    #[error(transparent)]
    Index(#[from] IndexError),
}

/// Reads a ztoc into the index of a layer whose blob has `size` bytes.
///
/// # Errors
/// Where it is damaged, of another layer, or not sound.
pub fn open(ztoc: &[u8], size: u64, limits: &Limits) -> Result<LayerIndex, OpenError> {
    let ztoc = Ztoc::read(ztoc, limits)?;
    if ztoc.compressed_size != size {
        return Err(OpenError::OtherLayer { expected: size, found: ztoc.compressed_size });
    }
    let spans = spans(&ztoc, limits)?;
    let starts: Vec<u64> = spans.starts;
    let of_blob: Vec<BlobOffset> = spans.spans.iter().map(|new| new.range.start).collect();
    let mut builder = IndexBuilder::of_spans(BlobOffset(size), spans.spans, limits.clone());
    builder.reserve(ztoc.file_count());
    // Where the next header has to be.
    let mut header = 0_u64;
    for (file, number) in ztoc.files().zip(0..) {
        let file = file?;
        let place = || OpenError::Place { number, name: shown(&file.name), offset: file.offset };
        let content_end = file.offset.checked_add(file.size).filter(|end| *end <= ztoc.uncompressed_size);
        let content_end = content_end.ok_or_else(place)?;
        if header.checked_add(BLOCK_BYTES as u64).is_none_or(|behind| file.offset < behind) {
            return Err(place());
        }
        header = content_end.checked_next_multiple_of(BLOCK_BYTES as u64).ok_or_else(place)?;
        push(&mut builder, number, &file)?;
        if file.kind == EntryKind::Regular {
            chunks(&mut builder, number, &file, &starts, &of_blob)?;
        }
    }
    Ok(builder.finish()?)
}

struct Spans {
    spans: Vec<NewSpan>,
    /// Where each begins, in the tar.
    starts: Vec<u64>,
}

/// Most spans of a layer. In memory, each takes some hundred bytes, and a ztoc need not have more than ten for it.
const MOST_SPANS: usize = 1 << 20;

fn spans(ztoc: &Ztoc<'_>, limits: &Limits) -> Result<Spans, ZtocError> {
    if ztoc.digest_count() > MOST_SPANS {
        return Err(ZtocError::Limit { part: "spans", limit: MOST_SPANS as u64 });
    }
    let digests = ztoc.digests().collect::<Result<Vec<Digest>, _>>()?;
    // (start in the blob, first byte of its own, start in the tar, bits)
    let points: Vec<(u64, u64, u64, u8)> = match ztoc.algorithm {
        Algorithm::Gzip => {
            let points = Checkpoints::read(ztoc.checkpoints)?;
            let point = |point: Result<super::zinfo::Checkpoint<'_>, ZtocError>| {
                point.map(|point| (point.start(), point.input, point.output, point.bits))
            };
            points.iter().map(point).collect::<Result<_, _>>()?
        }
        Algorithm::Zstd => {
            let starts = FrameStarts::read(ztoc.checkpoints)?;
            starts.0.into_iter().map(|(input, output)| (input, input, output, 0)).collect()
        }
        Algorithm::Uncompressed => {
            let zinfo = TarZinfo::read(ztoc.checkpoints)?;
            let out_of_range = || ZtocError::OutOfRange {
                field: "span size",
                value: i64::try_from(zinfo.span_bytes).unwrap_or(i64::MAX),
            };
            if zinfo.span_bytes == 0 || zinfo.size != ztoc.compressed_size {
                return Err(out_of_range());
            }
            let count = usize::try_from(zinfo.size.div_ceil(zinfo.span_bytes)).map_err(|_| out_of_range())?;
            if count != digests.len() {
                return Err(ZtocError::SpanCount { digests: digests.len(), spans: count });
            }
            (0..count as u64).map(|number| number * zinfo.span_bytes).map(|at| (at, at, at, 0)).collect()
        }
    };
    let is_last = usize::try_from(ztoc.max_span).is_ok_and(|last| last + 1 == points.len());
    if digests.len() != points.len() || !is_last {
        return Err(ZtocError::SpanCount { digests: digests.len(), spans: points.len() });
    }
    let codec = match ztoc.algorithm {
        Algorithm::Gzip => Codec::Deflate,
        Algorithm::Zstd => Codec::Zstd,
        Algorithm::Uncompressed => Codec::Stored,
    };
    // Of an uncompressed layer, the last span holds what stands behind the tar's end, too.
    let tar_end = if codec == Codec::Stored { ztoc.compressed_size } else { ztoc.uncompressed_size };
    let mut spans = Vec::with_capacity(points.len());
    for (number, &(start, own, output, bits)) in points.iter().enumerate() {
        let (next, end, output_end) = match points.get(number + 1) {
            Some(&(next, end, output, _)) => (next, end, output),
            None => (u64::MAX, ztoc.compressed_size, tar_end),
        };
        // All but the last hold something.
        let is_sound = start < next && own < end && end <= ztoc.compressed_size && output <= output_end;
        let is_filled = output < output_end || number + 1 == points.len();
        if !is_sound || !is_filled || (number == 0 && output != 0) || (codec == Codec::Stored && start != output) {
            return Err(ZtocError::Checkpoint { number });
        }
        let (length, limit) = (output_end - output, limits.frame_bytes);
        if length > limit {
            return Err(ZtocError::Limit { part: "bytes of one span", limit });
        }
        let range = BlobRange { start: BlobOffset(start), length: end - start };
        spans.push(NewSpan { range, codec, span: Span { start: output, length, bits, digest: digests[number] } });
    }
    let starts = points.iter().map(|(_, _, output, _)| *output).collect();
    Ok(Spans { spans, starts })
}

/// Cuts a file's content at the borders of spans.
fn chunks(
    builder: &mut IndexBuilder,
    number: u64,
    file: &File<'_>,
    starts: &[u64],
    of_blob: &[BlobOffset],
) -> Result<(), IndexError> {
    let mut covered = 0;
    // The first one begins with the tar.
    let mut span = starts.partition_point(|start| *start <= file.offset).saturating_sub(1);
    while covered < file.size {
        // The end of the content was found to be no overflow.
        let at = file.offset + covered;
        let end = starts.get(span + 1).map_or(file.offset + file.size, |next| (*next).min(file.offset + file.size));
        let chunk = NewChunk {
            file_offset: FileOffset(covered),
            length: end - at,
            frame: of_blob[span],
            frame_offset: at - starts[span],
            digest: None,
        };
        builder.chunk(number, chunk)?;
        covered += chunk.length;
        span += 1;
    }
    Ok(())
}

fn push(builder: &mut IndexBuilder, number: u64, file: &File<'_>) -> Result<(), OpenError> {
    let fail = |problem| OpenError::Index(IndexError::new(number, &file.name, problem));
    if file.records.iter().any(|(key, _)| key.starts_with(b"GNU.sparse.")) {
        return Err(OpenError::Sparse { number, name: shown(&file.name) });
    }
    let device = || {
        let fit = |field, value: i64| u32::try_from(value).map_err(|_| fail(Problem::OutOfRange { field, value }));
        Ok::<_, OpenError>((fit("devmajor", file.device.0)?, fit("devminor", file.device.1)?))
    };
    let kind = match file.kind {
        EntryKind::Directory => NewKind::Directory,
        EntryKind::Regular => NewKind::Regular { size: file.size, digest: None },
        EntryKind::Symlink => NewKind::Symlink { target: &file.link },
        EntryKind::HardLink => NewKind::HardLink { target: &file.link },
        EntryKind::CharDevice => device().map(|(major, minor)| NewKind::CharDevice { major, minor })?,
        EntryKind::BlockDevice => device().map(|(major, minor)| NewKind::BlockDevice { major, minor })?,
        EntryKind::Fifo => NewKind::Fifo,
    };
    let records = file.records.iter().map(|(key, value)| (key.as_ref(), value.as_ref()));
    let xattrs = tar::attributes(records).map_err(|_| fail(Problem::XattrName { name: shown(&file.name) }))?;
    let attributes = Attributes {
        // The low twelve bits, which fit.
        permissions: u16::try_from(file.mode & 0o7777).unwrap_or_default(),
        uid: file.uid,
        gid: file.gid,
        mtime: file.mtime,
        xattrs,
    };
    Ok(builder.push(number, &file.name, attributes, kind)?)
}

fn shown(name: &[u8]) -> String {
    name.escape_ascii().take(200).map(char::from).collect()
}
