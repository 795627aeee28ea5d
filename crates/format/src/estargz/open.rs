//! From a blob to its index, in one read of its end or two.
//!
//! ```
//! use loris_format::{estargz::open::{Opening, Step, Trust}, limits::Limits, position::BlobRange};
//!
//! # fn example(blob_size: u64, annotation: Option<loris_format::digest::Digest>,
//! #     fetch: impl Fn(BlobRange) -> Vec<u8>) -> Result<(), loris_format::estargz::open::OpenError> {
//! let (mut opening, mut range) = Opening::new(blob_size, annotation, Trust::Required, &Limits::default())?;
//! let index = loop {
//!     match opening.supply(&fetch(range))? {
//!         Step::Read(next, next_range) => (opening, range) = (next, next_range),
//!         Step::Done(index, _opened) => break index,
//!     }
//! };
//! # let _ = index; Ok(()) }
//! ```
//!
//! What is known of a layer before it is opened is its size and the digest of its table of contents, which the layer's
//! descriptor carries as an annotation. The table is checked against that digest before anything in it is believed.

use std::io::Read as _;

use super::{
    footer::{self, Footer, FooterError, Kind},
    toc::{self, Entry, EntryType, TOC_NAME, TocError},
};
use crate::{
    digest::{Digest, Hasher},
    index::{
        LayerIndex, NodeId, NodeKind, Prefetch,
        builder::{Attributes, IndexBuilder, IndexError, MissingDigest, NewChunk, NewKind, Problem},
    },
    limits::Limits,
    position::{BlobOffset, BlobRange, FileOffset},
    tar::path,
};

/// The first read takes this part of the blob. A table of contents is 1 to 2 % of a layer of Debian packages.
const GUESS_SHARE: u64 = 64;
/// And at least this many bytes: they cost less than a round trip on any link that is worth reading from lazily.
const GUESS_LEAST: u64 = 64 << 10;
/// And at most this many: layers of large files have small tables, and one that is larger takes longer to transfer than
/// the second round trip that it costs.
const GUESS_MOST: u64 = 1 << 20;

/// Deflate's densest code.
const DEFLATE_DENSITY: u64 = 1032;

/// An entry of a regular file has about as many bytes of JSON. Room is made for as many as a table then has.
const USUAL_ENTRY_BYTES: usize = 480;

/// Who must vouch for a layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trust {
    /// An annotation must vouch for the table of contents, and the table for every byte of content.
    Required,
    /// What is there is checked, what is not there is not missed: layers without annotation, legacy stargz.
    Optional,
}

/// What was learnt of a blob beside its index.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Opened {
    /// [`Kind::Estargz`] or [`Kind::LegacyStargz`].
    pub kind: Kind,
    /// The digest of the table of contents, as it was found. SHA-256, unless the annotation wanted another algorithm.
    pub toc_digest: Digest,
    /// Whether an annotation vouched for it.
    pub vouched: bool,
    /// Where the table of contents stands, compressed.
    pub toc_range: BlobRange,
    /// The size of its JSON, in uncompressed bytes.
    pub toc_bytes: u64,
    /// How many entries it has, chunks included.
    pub entries: u64,
}

/// Why a blob can't be used lazily.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Nothing vouches for the layer.
    #[error("no annotation {annotation} vouches for the layer's table of contents", annotation = toc::TOC_DIGEST_ANNOTATION)]
    NotVouched,
    /// No eStargz, or one whose footer lies.
    #[error(transparent)]
    Footer(#[from] FooterError),
    /// A kind that is known but not read here.
    #[error("layer is {name}, which can't be read lazily here: {reason}", name = kind.name())]
    Unsupported {
        /// What it is.
        kind: Kind,
        /// What is in the way.
        reason: &'static str,
    },
    /// A table of contents beyond [`Limits::toc_bytes`].
    #[error("table of contents has {bytes} bytes, which is beyond the limit of {limit}")]
    TocTooLarge {
        /// Its size, compressed or not.
        bytes: u64,
        /// The bound.
        limit: u64,
    },
    /// Bytes that do not decode to a table of contents.
    #[error("table of contents at {offset} of the blob is corrupt: {detail}")]
    TocCorrupt {
        /// Where it starts.
        offset: BlobOffset,
        /// What is wrong.
        detail: String,
    },
    /// Not the table of contents that the annotation vouches for.
    #[error("table of contents at {offset} of the blob has digest {found}, the annotation says {expected}")]
    TocDigest {
        /// Where it starts.
        offset: BlobOffset,
        /// What the annotation says.
        expected: Digest,
        /// What was found.
        found: Digest,
    },
    /// A table of contents that is no valid document.
    #[error(transparent)]
    Toc(#[from] TocError),
    /// A table of contents that describes no sound layer.
    #[error("table of contents, {0}")]
    Index(#[from] IndexError),
    /// Not as many bytes as were asked for.
    #[error("{found} bytes of the blob instead of the {expected} at {offset}")]
    WrongLength {
        /// Where they start.
        offset: BlobOffset,
        /// As many were asked for.
        expected: u64,
        /// As many came.
        found: usize,
    },
}

/// A blob that is being opened: it waits for a range of the blob.
#[derive(Debug)]
pub struct Opening {
    blob_size: u64,
    toc_digest: Option<Digest>,
    trust: Trust,
    limits: Limits,
    range: BlobRange,
    known: Option<Known>,
}

/// What the first read has found.
#[derive(Debug)]
struct Known {
    kind: Kind,
    toc_range: BlobRange,
    /// The end of the table of contents, as far as the first read had it.
    toc_tail: Vec<u8>,
}

/// What comes next.
#[derive(Debug)]
pub enum Step {
    /// These bytes of the blob are wanted; at most one more range after the first.
    Read(Opening, BlobRange),
    /// The blob is open.
    Done(LayerIndex, Opened),
}

impl Opening {
    /// Starts to open a blob of `blob_size` compressed bytes, and returns the range to read first.
    ///
    /// # Errors
    /// [`OpenError::NotVouched`] where `trust` wants a `toc_digest` and there is none: nothing need be read to know that
    /// such a layer can't be used. [`FooterError::NoFooter`] where the blob is empty.
    pub fn new(
        blob_size: u64,
        toc_digest: Option<Digest>,
        trust: Trust,
        limits: &Limits,
    ) -> Result<(Self, BlobRange), OpenError> {
        if toc_digest.is_none() && trust == Trust::Required {
            return Err(OpenError::NotVouched);
        }
        if blob_size == 0 {
            return Err(FooterError::NoFooter.into());
        }
        let length = (blob_size / GUESS_SHARE).clamp(GUESS_LEAST, GUESS_MOST).min(blob_size);
        let range = BlobRange { start: BlobOffset(blob_size - length), length };
        Ok((Self { blob_size, toc_digest, trust, limits: limits.clone(), range, known: None }, range))
    }

    /// Takes the bytes of the range that was asked for.
    ///
    /// # Errors
    /// Where the blob is no eStargz, or its table of contents is not the one that was vouched for or not sound.
    pub fn supply(self, bytes: &[u8]) -> Result<Step, OpenError> {
        if u64::try_from(bytes.len()).ok() != Some(self.range.length) {
            let (offset, expected) = (self.range.start, self.range.length);
            return Err(OpenError::WrongLength { offset, expected, found: bytes.len() });
        }
        match self.known {
            None => self.first(bytes),
            Some(Known { kind, toc_range, ref toc_tail }) => self.finish(kind, toc_range, &[bytes, toc_tail].concat()),
        }
    }

    fn first(self, tail: &[u8]) -> Result<Step, OpenError> {
        let (kind, offset, footer_bytes) = match footer::read(tail, self.blob_size)? {
            Footer::Toc { kind, offset, footer_bytes } => (kind, offset, footer_bytes),
            Footer::Other(kind) => {
                let reason = match kind {
                    Kind::ExternalToc => "its table of contents is in another image",
                    _ => "its table of contents is of another format",
                };
                return Err(OpenError::Unsupported { kind, reason });
            }
        };
        let toc_end = self.blob_size - footer_bytes as u64;
        let toc_range = BlobRange { start: offset, length: toc_end - offset.0 };
        if toc_range.length > self.limits.toc_bytes {
            return Err(OpenError::TocTooLarge { bytes: toc_range.length, limit: self.limits.toc_bytes });
        }
        let read_from = self.range.start;
        let without_footer = &tail[..tail.len() - footer_bytes];
        match offset.0.checked_sub(read_from.0).and_then(|skipped| usize::try_from(skipped).ok()) {
            Some(skipped) => self.finish(kind, toc_range, &without_footer[skipped..]),
            None => {
                let range = BlobRange { start: offset, length: read_from.0 - offset.0 };
                let known = Some(Known { kind, toc_range, toc_tail: without_footer.to_vec() });
                Ok(Step::Read(Self { range, known, ..self }, range))
            }
        }
    }

    fn finish(&self, kind: Kind, toc_range: BlobRange, member: &[u8]) -> Result<Step, OpenError> {
        let offset = toc_range.start;
        let toc = Toc::decode(member, offset, &self.limits)?;
        let json = toc.json();
        let mut hasher = self.toc_digest.map_or_else(Hasher::sha256, |digest| digest.hasher());
        hasher.update(json);
        let found = hasher.finish();
        if let Some(expected) = self.toc_digest.filter(|expected| *expected != found) {
            return Err(OpenError::TocDigest { offset, expected, found });
        }
        let (index, entries) = index(json, offset, self.trust, &self.limits)?;
        let opened = Opened {
            kind,
            toc_digest: found,
            vouched: self.toc_digest.is_some(),
            toc_range,
            toc_bytes: json.len() as u64,
            entries,
        };
        Ok(Step::Done(index, opened))
    }
}

/// Makes an index out of a table of contents (uncompressed JSON) of a blob whose content ends at `payload_end`. Returns
/// the number of entries too.
///
/// # Errors
/// [`OpenError::Toc`] or [`OpenError::Index`].
pub fn index(
    json: &[u8],
    payload_end: BlobOffset,
    trust: Trust,
    limits: &Limits,
) -> Result<(LayerIndex, u64), OpenError> {
    let missing_digest = match trust {
        Trust::Required => MissingDigest::Refuse,
        Trust::Optional => MissingDigest::Allow,
    };
    let mut builder = IndexBuilder::new(payload_end, missing_digest, limits.clone());
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

/// The tar entry that holds a table of contents, decoded.
struct Toc {
    tar: Vec<u8>,
    size: usize,
}

const HEADER_BYTES: usize = 512;

impl Toc {
    /// Decodes a gzip member.
    fn decode(member: &[u8], offset: BlobOffset, limits: &Limits) -> Result<Self, OpenError> {
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
                tar.truncate(HEADER_BYTES + size);
                stream.read_exact(&mut tar[HEADER_BYTES..]).map_err(|error| corrupt(format!("gzip: {error}")))?;
            }
            Err(error) => return Err(corrupt(format!("gzip: {error}"))),
        }
        Ok(Self { tar, size })
    }

    fn json(&self) -> &[u8] {
        &self.tar[HEADER_BYTES..HEADER_BYTES + self.size]
    }
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
