//! Makes a ztoc while a layer streams by: one pass, nothing copied.

use std::{
    borrow::Cow,
    cell::Cell,
    io::{self, Read},
};

use super::{
    SPAN_BYTES,
    flat::TooLong,
    manifest::BUILD_TOOL_SOCI,
    spans::{GzipSpans, Spanning, TarSpans, ZstdSpans},
    zinfo::TarZinfo,
    ztoc::{Algorithm, File, NewZtoc, Record},
};
use crate::{
    compression::Compression,
    digest::{DiffId, Digest, Hasher},
    limits::Limits,
    tar,
};

/// How a ztoc is made.
#[derive(Clone, Debug)]
pub struct BuildOptions {
    /// Least decoded bytes between two checkpoints. The window of each has 32 KiB in the ztoc.
    pub span_bytes: u64,
    /// Who makes it, as it says itself.
    pub build_tool: String,
    /// Bounds.
    pub limits: Limits,
}

impl Default for BuildOptions {
    /// Makes what `soci` makes.
    fn default() -> Self {
        Self { span_bytes: SPAN_BYTES, build_tool: BUILD_TOOL_SOCI.to_owned(), limits: Limits::default() }
    }
}

/// A ztoc that was made.
#[derive(Clone, Debug)]
pub struct Built {
    /// The ztoc.
    pub ztoc: Vec<u8>,
    /// The digest of the blob that it was made of.
    pub blob: Digest,
    /// The digest of its tar.
    pub diff_id: DiffId,
    /// Bytes of the blob.
    pub compressed_size: u64,
    /// Bytes of the tar, with what stands behind its end.
    pub tar_size: u64,
    /// Its files.
    pub files: usize,
    /// Its spans.
    pub spans: usize,
    /// Whether the tools of SOCI can read it too.
    pub is_common: bool,
}

/// Why no ztoc can be made of a layer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// Its tar can't be read, nor its compression.
    #[error(transparent)]
    Tar(#[from] tar::Error),
    /// What stands behind the end of its tar can't be read.
    #[error("the layer can't be read to its end: {0}")]
    Read(#[source] io::Error),
    /// It is compressed with zstd as a whole.
    #[error(
        "the layer is one zstd frame of {bytes} bytes or more, which can only be decoded from its beginning; convert it to \
         zstd:chunked or eStargz"
    )]
    OneFrame {
        /// Decoded bytes of the largest frame, at least.
        bytes: u64,
    },
    /// It has a file with holes, which is not in the tar in one piece.
    #[error("the layer holds a sparse file ({name}), which a ztoc can't tell from others")]
    Sparse {
        /// Which.
        name: String,
    },
    /// It is empty.
    #[error("the layer is empty")]
    Empty,
    /// Its names and attributes are too many or too long.
    #[error("the names and attributes of the layer's files take more than {limit} bytes")]
    TooMuch {
        /// The most that is held in memory.
        limit: u64,
    },
    /// The ztoc would be too long.
    #[error(transparent)]
    TooLong(#[from] TooLong),
}

/// A frame of zstd that is as long as so many spans is no use to who reads a file of it.
const MOST_SPANS: u64 = 16;
/// What a file takes beside its names and attributes, and what a PAX record takes beside its text.
const FILE_BYTES: usize = size_of::<File<'_>>();
const RECORD_BYTES: usize = size_of::<Record<'_>>();
/// Names and attributes may have this part of what a table of contents may: they are held twice.
const NAMES_PART: u64 = 2;

/// Makes a ztoc of a layer's blob, read to its end.
///
/// Memory: 1 MiB, and the ztoc twice: 32 KiB for each span and what each file's name and attributes take, which is bounded by
/// half of [`Limits::toc_bytes`].
///
/// # Errors
/// Where the layer can't be read, or no ztoc can say what is in it.
pub fn build(blob: impl Read, options: &BuildOptions) -> Result<Built, BuildError> {
    let mut blob = Hashing { inner: blob, hasher: Hasher::sha256(), bytes: 0 };
    let mut start = Vec::new();
    blob.by_ref().take(Compression::DETECT_BYTES as u64).read_to_end(&mut start).map_err(BuildError::Read)?;
    if start.is_empty() {
        return Err(BuildError::Empty);
    }
    let compression = Compression::detect(&start);
    let source = io::Cursor::new(start).chain(&mut blob);
    let most = options.limits.frame_bytes.min(options.span_bytes.max(SPAN_BYTES).saturating_mul(MOST_SPANS));
    let longest = Cell::new(0);
    let made = match compression {
        Compression::Gzip => read(GzipSpans::new(source, options.span_bytes), options),
        Compression::None => read(TarSpans::new(source, options.span_bytes), options),
        Compression::Zstd => read(ZstdSpans::new(source, options.span_bytes, most, &longest), options),
    };
    if longest.get() > most {
        return Err(BuildError::OneFrame { bytes: longest.get() });
    }
    let Made { files, spans, tar_size, uncompressed_size, diff_id } = made?;
    let (algorithm, checkpoints) = match compression {
        Compression::Gzip => (Algorithm::Gzip, spans.checkpoints),
        Compression::Zstd => (Algorithm::Zstd, spans.checkpoints),
        Compression::None => {
            let zinfo = TarZinfo { span_bytes: options.span_bytes.max(1), size: blob.bytes };
            (Algorithm::Uncompressed, zinfo.write()?)
        }
    };
    let ztoc = NewZtoc {
        build_tool: &options.build_tool,
        compressed_size: blob.bytes,
        uncompressed_size,
        algorithm,
        digests: &spans.digests,
        checkpoints: &checkpoints,
        files: &files,
    };
    Ok(Built {
        ztoc: ztoc.write()?,
        blob: blob.hasher.finish(),
        diff_id,
        compressed_size: blob.bytes,
        tar_size,
        files: files.len(),
        spans: spans.digests.len(),
        is_common: algorithm != Algorithm::Zstd,
    })
}

struct Made {
    files: Vec<File<'static>>,
    spans: super::spans::Spans,
    tar_size: u64,
    /// As far as a reader of tar goes.
    uncompressed_size: u64,
    diff_id: DiffId,
}

fn read(spanning: impl Spanning, options: &BuildOptions) -> Result<Made, BuildError> {
    let tar = Hashing { inner: spanning, hasher: Hasher::sha256(), bytes: 0 };
    let mut archive = tar::Reader::new(tar, &options.limits).keeping_raw();
    let mut files = Vec::new();
    let limit = options.limits.toc_bytes / NAMES_PART;
    let mut held = 0_u64;
    while let Some(entry) = archive.next_entry()? {
        let file = file(entry, &archive)?;
        held = held.saturating_add(held_bytes(&file) as u64);
        if held > limit {
            return Err(BuildError::TooMuch { limit });
        }
        files.push(file);
    }
    let uncompressed_size = archive.position();
    let mut tar = archive.into_inner();
    io::copy(&mut tar, &mut io::sink()).map_err(BuildError::Read)?;
    Ok(Made {
        files,
        tar_size: tar.bytes,
        uncompressed_size,
        diff_id: DiffId(tar.hasher.finish()),
        spans: tar.inner.finish(),
    })
}

fn file<R: Read>(entry: tar::Entry, archive: &tar::Reader<R>) -> Result<File<'static>, BuildError> {
    if entry.sparse {
        return Err(BuildError::Sparse { name: entry.path.escape_ascii().take(200).map(char::from).collect() });
    }
    let raw = archive.raw().cloned().unwrap_or_default();
    let own = |(key, value): (Box<[u8]>, Box<[u8]>)| (Cow::Owned(key.into_vec()), Cow::Owned(value.into_vec()));
    Ok(File {
        name: Cow::Owned(entry.path),
        kind: entry.kind,
        // Behind the header: for what has no content too.
        offset: entry.content_offset.unwrap_or(entry.header_offset + tar::BLOCK_BYTES as u64),
        size: entry.size,
        link: Cow::Owned(entry.link),
        mode: raw.mode,
        uid: entry.uid,
        gid: entry.gid,
        user_name: Cow::Owned(entry.user_name),
        group_name: Cow::Owned(entry.group_name),
        mtime: entry.mtime,
        device: raw.device,
        records: raw.records.into_iter().map(own).collect(),
    })
}

fn held_bytes(file: &File<'_>) -> usize {
    let text = file.name.len() + file.link.len() + file.user_name.len() + file.group_name.len();
    let records = file.records.iter().map(|(key, value)| key.len() + value.len() + RECORD_BYTES);
    records.fold(FILE_BYTES + text, usize::saturating_add)
}

struct Hashing<R> {
    inner: R,
    hasher: Hasher,
    bytes: u64,
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        self.bytes += read as u64;
        Ok(read)
    }
}
