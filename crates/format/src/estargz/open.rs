//! What a table of contents says, as an index; and how it is taken out of its gzip member.
//!
//! The way there, from a blob's end, is that of all formats: [`crate::opening`].

use std::io::Read as _;

use super::toc::{self, Entry, EntryType, TOC_NAME};
use crate::{
    index::{
        Codec, LayerIndex, NodeId, NodeKind, Prefetch,
        builder::{Attributes, IndexBuilder, IndexError, MissingDigest, NewChunk, NewKind, Problem},
    },
    limits::Limits,
    opening::{OpenError, Trust},
    position::{BlobOffset, FileOffset},
    tar::path,
};

/// Deflate's densest code.
const DEFLATE_DENSITY: u64 = 1032;

/// An entry of a regular file has about as many bytes of JSON. Room is made for as many as a table then has.
const USUAL_ENTRY_BYTES: usize = 480;

/// Makes an index out of a table of contents (uncompressed JSON) of a blob whose frames end at `payload_end` and are decoded
/// by `codec`. Returns the number of entries too. eStargz and both dialects of zstd:chunked say the same in the same words.
///
/// # Errors
/// [`OpenError::Toc`] or [`OpenError::Index`].
pub fn index(
    json: &[u8],
    payload_end: BlobOffset,
    codec: Codec,
    trust: Trust,
    limits: &Limits,
) -> Result<(LayerIndex, u64), OpenError> {
    let missing_digest = match trust {
        Trust::Required => MissingDigest::Refuse,
        Trust::Optional => MissingDigest::Allow,
    };
    let mut builder = IndexBuilder::new(payload_end, missing_digest, limits.clone()).with_codec(codec);
    builder.reserve(json.len() / USUAL_ENTRY_BYTES);
    let mut size = 0;
    let mut entries = 0;
    toc::read(json, limits, |number, entry| {
        entries = number + 1;
        if entry.entry_type == EntryType::Chunk {
            if !is_same_file(&entry.name, builder.last_name(), limits) {
                let file = entry.name.escape_ascii().take(200).map(char::from).collect();
                return Err(IndexError::new(number, &entry.name, Problem::ChunkOfOtherFile { file }).into());
            }
            // A chunk without size goes to the end of its file.
            return Ok(builder.chunk(number, chunk(&entry, size))?);
        }
        size = if entry.entry_type == EntryType::Regular { entry.size } else { 0 };
        push(&mut builder, number, &entry).map_err(OpenError::from)?;
        if size > 0 {
            builder.chunk(number, chunk(&entry, size))?;
        }
        Ok::<_, OpenError>(())
    })?;
    let mut index = builder.finish()?;
    index.set_prefetch(prefetch(&index));
    Ok((index, entries))
}

fn push(builder: &mut IndexBuilder, number: u64, entry: &Entry<'_>) -> Result<(), IndexError> {
    let fit = |field, value| {
        u32::try_from(value).map_err(|_| IndexError::new(number, &entry.name, Problem::OutOfRange { field, value }))
    };
    let device = || Ok::<_, IndexError>((fit("devMajor", entry.dev_major)?, fit("devMinor", entry.dev_minor)?));
    let kind = match entry.entry_type {
        EntryType::Directory => NewKind::Directory,
        EntryType::Regular | EntryType::Chunk => NewKind::Regular { size: entry.size, digest: entry.digest },
        EntryType::Symlink => NewKind::Symlink { target: &entry.link_name },
        EntryType::HardLink => NewKind::HardLink { target: &entry.link_name },
        EntryType::CharDevice => device().map(|(major, minor)| NewKind::CharDevice { major, minor })?,
        EntryType::BlockDevice => device().map(|(major, minor)| NewKind::BlockDevice { major, minor })?,
        EntryType::Fifo => NewKind::Fifo,
    };
    let attributes = Attributes {
        // The low twelve bits, which fit.
        permissions: u16::try_from(entry.mode & 0o7777).unwrap_or_default(),
        uid: fit("uid", entry.uid)?,
        gid: fit("gid", entry.gid)?,
        mtime: entry.modtime,
        xattrs: entry.xattrs.iter().map(|(name, value)| (name.as_ref().into(), value.as_ref().into())).collect(),
    };
    builder.push(number, &entry.name, attributes, kind)
}

fn chunk(entry: &Entry<'_>, size: u64) -> NewChunk {
    let length = if entry.chunk_size == 0 { size.saturating_sub(entry.chunk_offset) } else { entry.chunk_size };
    NewChunk {
        file_offset: FileOffset(entry.chunk_offset),
        length,
        frame: BlobOffset(entry.offset),
        frame_offset: entry.inner_offset,
        digest: entry.chunk_digest,
    }
}

/// The name of a chunk says nothing more than that of its file; older writers leave it out.
fn is_same_file(chunk: &[u8], file: &[u8], limits: &Limits) -> bool {
    chunk.is_empty() || chunk == file || path::clean(chunk, limits) == path::clean(file, limits)
}

fn prefetch(index: &LayerIndex) -> Prefetch {
    if index.child(NodeId::ROOT, toc::NO_PREFETCH_LANDMARK.as_bytes()).is_some() {
        return Prefetch::Nothing;
    }
    let landmark = index.child(NodeId::ROOT, toc::PREFETCH_LANDMARK.as_bytes()).map(|node| &index.node(node).kind);
    let Some(NodeKind::Regular(content)) = landmark else { return Prefetch::Unspecified };
    let Some(end) = content.data.checked_add(content.size) else { return Prefetch::Unspecified };
    match index.extents().get(index.extents_in(&(content.data..end))) {
        Some([extent, ..]) => Prefetch::Until(index.frames()[extent.frame.0 as usize].range.start),
        _ => Prefetch::Unspecified,
    }
}

const HEADER_BYTES: usize = 512;

/// Decodes the gzip member at `offset` that holds a table of contents as a tar entry, and returns its JSON.
pub(crate) fn decode_toc(member: &[u8], offset: BlobOffset, limits: &Limits) -> Result<Vec<u8>, OpenError> {
    let corrupt = |detail: String| OpenError::TocCorrupt { offset, detail };
    let mut header = [0; HEADER_BYTES];
    let mut stream = flate2::bufread::GzDecoder::new(member);
    stream.read_exact(&mut header).map_err(|error| corrupt(format!("gzip: {error}")))?;
    let bytes = toc_size(&header).map_err(|detail| corrupt(detail.into()))?;
    if bytes > limits.toc_bytes {
        return Err(OpenError::TocTooLarge { bytes, limit: limits.toc_bytes });
    }
    let dense = || corrupt(format!("{} bytes of gzip cannot hold {bytes} bytes", member.len()));
    if bytes > (member.len() as u64).saturating_mul(DEFLATE_DENSITY) {
        return Err(dense());
    }
    let size = usize::try_from(bytes).map_err(|_| dense())?;
    // What Go's tar writer makes: the header, the content, padding, and two empty blocks.
    let mut tar = vec![0; HEADER_BYTES + size.next_multiple_of(HEADER_BYTES) + 2 * HEADER_BYTES];
    match libdeflater::Decompressor::new().gzip_decompress(member, &mut tar) {
        Ok(decoded) if decoded >= HEADER_BYTES + size => {}
        Ok(_) => return Err(corrupt("the tar entry is cut off".into())),
        // More blocks than usual; what matters is in front of them.
        Err(libdeflater::DecompressionError::InsufficientSpace) => {
            stream
                .read_exact(&mut tar[HEADER_BYTES..HEADER_BYTES + size])
                .map_err(|error| corrupt(format!("gzip: {error}")))?;
        }
        Err(error) => return Err(corrupt(format!("gzip: {error}"))),
    }
    tar.truncate(HEADER_BYTES + size);
    tar.drain(..HEADER_BYTES);
    Ok(tar)
}

/// Returns the size in a tar header, which must be that of a table of contents: a regular file of this name, with a size
/// in octal digits and a right checksum (POSIX.1-2017, `pax`, section "ustar Interchange Format").
fn toc_size(header: &[u8; HEADER_BYTES]) -> Result<u64, &'static str> {
    const SIZE: std::ops::Range<usize> = 124..136;
    const CHECKSUM: std::ops::Range<usize> = 148..156;
    const TYPE: usize = 156;
    let sum = header.iter().enumerate().map(|(at, byte)| if CHECKSUM.contains(&at) { b' ' } else { *byte });
    if octal(&header[CHECKSUM]) != Some(sum.map(u64::from).sum()) {
        return Err("the tar header's checksum is wrong");
    }
    let name = header[..100].split(|byte| *byte == 0).next().unwrap_or_default();
    if name != TOC_NAME.as_bytes() {
        return Err("the tar entry is not named stargz.index.json");
    }
    if !matches!(header[TYPE], b'0' | 0) {
        return Err("the tar entry is not a regular file");
    }
    octal(&header[SIZE]).ok_or("the tar entry's size is not a number")
}

fn octal(field: &[u8]) -> Option<u64> {
    let digits = field.trim_ascii_start();
    let end = digits.iter().position(|byte| matches!(byte, b' ' | 0)).unwrap_or(digits.len());
    if end == 0 {
        return None;
    }
    // At most 12 digits of 3 bits.
    digits[..end]
        .iter()
        .try_fold(0, |value, digit| (b'0'..=b'7').contains(digit).then(|| value << 3 | u64::from(digit - b'0')))
}

#[cfg(test)]
mod tests;
