//! From what a manifest says of a layer, and the end of its blob, to its index: whatever format it has.
//!
//! ```
//! use loris_format::{limits::Limits, opening::{Promise, Opening, Step, Trust}, position::BlobRange};
//!
//! # fn example(blob_size: u64, promise: Promise,
//! #     fetch: impl Fn(BlobRange) -> Vec<u8>) -> Result<(), loris_format::opening::OpenError> {
//! let (mut opening, mut range) = Opening::new(blob_size, promise, Trust::Required, &Limits::default())?;
//! let index = loop {
//!     match opening.supply(&fetch(range))? {
//!         Step::Read(next, next_range) => (opening, range) = (next, next_range),
//!         Step::Done(index, _opened) => break index,
//!     }
//! };
//! # let _ = index; Ok(()) }
//! ```
//!
//! The manifest *promises* something ([`Promise`]): its annotations carry the digest of a table of contents. The bytes say what
//! the blob *is* ([`Kind`]). Both must go together, and the table is checked against that digest before anything in it is
//! believed.
//!
//! All formats whose table stands at the end of the blob are opened here. One has a function that finds its table by the
//! tail (`Table`), and one that decodes it; what a table says is made an index by [`crate::estargz::open::index`].
//!
//! What this module must not know: who reads the blob's ranges, and how.

use crate::{
    digest::{Digest, Hasher},
    estargz::{
        self,
        footer::{self, Footer, FooterError, Kind, SKIPPABLE_HEAD_BYTES},
        toc::{self, TocError},
    },
    index::{Codec, LayerIndex, builder::IndexError},
    limits::Limits,
    position::{BlobOffset, BlobRange, Packed},
    zstd_chunked,
};

mod promise;

pub use promise::{BESIDE_ANNOTATION, Beside, Family, Promise, PromiseError, Voucher, ZstdChunked};

/// The first read takes this part of the blob. A table of contents is 1 to 2 % of a layer of Debian packages.
const GUESS_SHARE: u64 = 64;
/// And at least this many bytes: they cost less than a round trip on any link that is worth reading from lazily.
pub(crate) const GUESS_LEAST: u64 = 64 << 10;
/// And at most this many: layers of large files have small tables, and one that is larger takes longer to transfer than
/// the second round trip that it costs.
pub(crate) const GUESS_MOST: u64 = 1 << 20;

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
    /// What it is.
    pub kind: Kind,
    /// [`Promise::identity`], or the digest of the table of contents where nothing was promised.
    pub identity: Digest,
    /// The digest of the uncompressed table of contents, as it was found. SHA-256, unless the annotation wanted another
    /// algorithm.
    pub toc_digest: Digest,
    /// Whether an annotation vouched for it.
    pub vouched: bool,
    /// Where the table of contents stands, compressed.
    pub toc_range: BlobRange,
    /// Where the frames end that are the tar. In eStargz, the tar's own end comes behind them, with the table of contents.
    pub payload_end: BlobOffset,
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
    /// Annotations that can't be followed.
    #[error(transparent)]
    Promise(#[from] PromiseError),
    /// Of no lazy format, or with a footer that lies.
    #[error(transparent)]
    Footer(#[from] FooterError),
    /// The annotations say one format, the bytes another.
    #[error(
        "it claims two formats: its annotations say that it is zstd:chunked, its bytes that it is {name}; convert the \
         image again", name = kind.name()
    )]
    Disagree {
        /// What the bytes say.
        kind: Kind,
    },
    /// A kind that is known but not read here.
    #[error("layer is {name}, which can't be read lazily here: {reason}", name = kind.name())]
    Unsupported {
        /// What it is.
        kind: Kind,
        /// What is in the way.
        reason: &'static str,
    },
    /// A place that is promised and not in the blob.
    #[error(
        "its annotations say that the table of contents is {length} bytes at {offset}, but the layer has {blob_size}"
    )]
    Outside {
        /// Where it should start.
        offset: BlobOffset,
        /// Its size.
        length: u64,
        /// Bytes of the blob.
        blob_size: u64,
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
    promise: Promise,
    trust: Trust,
    limits: Limits,
    range: BlobRange,
    known: Option<Known>,
}

/// A table of contents in a blob.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Table {
    /// What the blob is.
    kind: Kind,
    /// Where the table stands, compressed.
    range: BlobRange,
    /// Where the frames with content end.
    payload_end: BlobOffset,
    form: Form,
}

/// How a table of contents is compressed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Form {
    /// A gzip member that holds the end of the tar.
    Member,
    /// A zstd frame, of so many bytes when it is decoded.
    Zstd(u64),
}

/// What the first read has found.
#[derive(Debug)]
struct Known {
    table: Table,
    /// The end of the table of contents, as far as the first read had it.
    tail: Vec<u8>,
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
    /// [`OpenError::NotVouched`] where `trust` wants a promise and there is none: nothing need be read to know that such a
    /// layer can't be used. [`FooterError::NoFooter`] where the blob is empty.
    pub fn new(
        blob_size: u64,
        promise: Promise,
        trust: Trust,
        limits: &Limits,
    ) -> Result<(Self, BlobRange), OpenError> {
        if promise.is_empty() && trust == Trust::Required {
            return Err(OpenError::NotVouched);
        }
        if blob_size == 0 {
            return Err(FooterError::NoFooter.into());
        }
        if let Some(position) = promise.zstd_chunked.as_ref().and_then(|promised| promised.position) {
            let range = with_head(position.range, blob_size)?;
            check_size(range.length, limits)?;
            return Ok((Self { blob_size, promise, trust, limits: limits.clone(), range, known: None }, range));
        }
        let length = (blob_size / GUESS_SHARE).clamp(GUESS_LEAST, GUESS_MOST).min(blob_size);
        let range = BlobRange { start: BlobOffset(blob_size - length), length };
        Ok((Self { blob_size, promise, trust, limits: limits.clone(), range, known: None }, range))
    }

    /// Takes the bytes of the range that was asked for.
    ///
    /// # Errors
    /// Where the blob is of no lazy format or not of the one that is promised, or its table of contents is not the one that
    /// was vouched for or not sound.
    pub fn supply(self, bytes: &[u8]) -> Result<Step, OpenError> {
        if u64::try_from(bytes.len()).ok() != Some(self.range.length) {
            let (offset, expected) = (self.range.start, self.range.length);
            return Err(OpenError::WrongLength { offset, expected, found: bytes.len() });
        }
        match self.known {
            None => self.first(bytes),
            Some(Known { table, ref tail }) => {
                // Between a table of zstd and the footer, there may be more.
                let mut all = [bytes, tail].concat();
                all.truncate(usize::try_from(table.range.length).unwrap_or(usize::MAX));
                self.finish(table, &all)
            }
        }
    }

    fn first(self, tail: &[u8]) -> Result<Step, OpenError> {
        if let Some((promised, position)) = self.promised_position() {
            let offset = position.range.start;
            let head = u32::try_from(position.range.length).ok().and_then(|length| footer::skippable(tail, length));
            let missing =
                || OpenError::TocCorrupt { offset, detail: "no skippable frame of its size begins there".into() };
            let bytes = head.ok_or_else(missing)?;
            return self.finish(Table::zstd(promised.family.kind(), position), bytes);
        }
        let table = self.locate(tail)?;
        check_size(table.range.length, &self.limits)?;
        let read_from = self.range.start;
        // A table ends in front of the footer.
        let behind = usize::try_from(self.blob_size - table.range.end().0).unwrap_or(tail.len());
        let tail = &tail[..tail.len().saturating_sub(behind)];
        match table.range.start.0.checked_sub(read_from.0).and_then(|skipped| usize::try_from(skipped).ok()) {
            Some(skipped) => self.finish(table, tail.get(skipped..).unwrap_or_default()),
            None => {
                let range = BlobRange { start: table.range.start, length: read_from.0 - table.range.start.0 };
                // A table of zstd may claim to stand anywhere.
                check_size(range.length, &self.limits)?;
                Ok(Step::Read(Self { range, known: Some(Known { table, tail: tail.to_vec() }), ..self }, range))
            }
        }
    }

    fn promised_position(&self) -> Option<(&ZstdChunked, Packed)> {
        let promised = self.promise.zstd_chunked.as_ref()?;
        Some((promised, promised.position?))
    }

    /// Finds the table of contents, by what the blob ends in.
    fn locate(&self, tail: &[u8]) -> Result<Table, OpenError> {
        match footer::read(tail, self.blob_size)? {
            Footer::Toc { kind, .. } if self.promise.zstd_chunked.is_some() => Err(OpenError::Disagree { kind }),
            Footer::Toc { kind, offset, footer_bytes } => {
                let end = self.blob_size - footer_bytes as u64;
                let range = BlobRange { start: offset, length: end - offset.0 };
                Ok(Table { kind, range, payload_end: offset, form: Form::Member })
            }
            Footer::Zstd { kind, toc, .. } => Ok(Table::zstd(kind, toc)),
            Footer::External => {
                let reason = "its table of contents is in another image";
                Err(OpenError::Unsupported { kind: Kind::ExternalToc, reason })
            }
        }
    }

    fn finish(&self, table: Table, bytes: &[u8]) -> Result<Step, OpenError> {
        let Table { kind, range, payload_end, form } = table;
        let offset = range.start;
        if let Some(ZstdChunked { checksum: expected, .. }) = self.promise.zstd_chunked {
            let mut hasher = expected.hasher();
            hasher.update(bytes);
            let found = hasher.finish();
            if found != expected {
                return Err(OpenError::TocDigest { offset, expected, found });
            }
        }
        let json = table.decode(bytes, &self.limits)?;
        let json = json.as_slice();
        let codec = if form == Form::Member { Codec::Gzip } else { Codec::Zstd };
        let mut hasher = self.promise.toc.map_or_else(Hasher::sha256, |digest| digest.hasher());
        hasher.update(json);
        let found = hasher.finish();
        if let Some(expected) = self.promise.toc.filter(|expected| *expected != found) {
            return Err(OpenError::TocDigest { offset, expected, found });
        }
        let (index, entries) = estargz::open::index(json, payload_end, codec, self.trust, &self.limits)?;
        let opened = Opened {
            kind,
            payload_end,
            identity: self.promise.identity().unwrap_or(found),
            toc_digest: found,
            vouched: !self.promise.is_empty(),
            toc_range: range,
            toc_bytes: json.len() as u64,
            entries,
        };
        Ok(Step::Done(index, opened))
    }
}

impl Opened {
    /// Decodes the table of contents once more, out of the bytes of [`Opened::toc_range`].
    ///
    /// # Errors
    /// Where they are not what they were.
    pub fn decode_toc(&self, bytes: &[u8], limits: &Limits) -> Result<Vec<u8>, OpenError> {
        let form = if self.kind.is_zstd() { Form::Zstd(self.toc_bytes) } else { Form::Member };
        let Self { kind, toc_range: range, payload_end, .. } = *self;
        Table { kind, range, payload_end, form }.decode(bytes, limits)
    }
}

impl Table {
    fn decode(&self, bytes: &[u8], limits: &Limits) -> Result<Vec<u8>, OpenError> {
        match self.form {
            Form::Member => estargz::open::decode_toc(bytes, self.range.start, limits),
            Form::Zstd(uncompressed) => {
                zstd_chunked::decode_toc(bytes, Packed { range: self.range, uncompressed }, limits)
            }
        }
    }

    fn zstd(kind: Kind, toc: Packed) -> Self {
        // Behind the head of a skippable frame, as was checked.
        let payload_end = BlobOffset(toc.range.start.0.saturating_sub(SKIPPABLE_HEAD_BYTES as u64));
        Self { kind, range: toc.range, payload_end, form: Form::Zstd(toc.uncompressed) }
    }
}

impl Family {
    fn kind(self) -> Kind {
        match self {
            Self::Containers => Kind::ZstdChunkedContainers,
            Self::Stargz => Kind::ZstdChunkedStargz,
        }
    }
}

/// Returns a promised range with the head of the skippable frame before it, where both are in the blob.
fn with_head(range: BlobRange, blob_size: u64) -> Result<BlobRange, OpenError> {
    let head = SKIPPABLE_HEAD_BYTES as u64;
    let outside = || OpenError::Outside { offset: range.start, length: range.length, blob_size };
    let start = range.start.0.checked_sub(head).ok_or_else(outside)?;
    let end = range.start.checked_add(range.length).filter(|end| end.0 <= blob_size && range.length > 0);
    let end = end.ok_or_else(outside)?;
    Ok(BlobRange { start: BlobOffset(start), length: end.0 - start })
}

fn check_size(bytes: u64, limits: &Limits) -> Result<(), OpenError> {
    let limit = limits.toc_bytes;
    if bytes > limit { Err(OpenError::TocTooLarge { bytes, limit }) } else { Ok(()) }
}

#[cfg(test)]
mod tests;
