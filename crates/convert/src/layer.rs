//! One layer, made into eStargz or zstd:chunked.
//!
//! ```text
//!  input ─▶ decompress ─▶ tar entries ─▶ spool            (first pass: one thread decompresses, one parses)
//!                             └─▶ order
//!  spool ─▶ batches of members ─▶ compress (all cores) ─▶ in order: hash, table of contents, output     (second pass)
//! ```
//!
//! The order of the blob is not known before the last entry was read (a later entry may replace an earlier one), so the
//! content waits in a file without a name. Where members begin depends on nothing but the entries and the chunk size,
//! and each is compressed by itself: the same input gives the same bytes, whatever the number of threads.
//!
//! Memory: the [slots](Workers) of the batches that are under way, and about 150 bytes for each entry.

use std::{
    io::{Read, Write},
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use loris_format::{
    compression::{self, GzipLevel},
    digest::{DiffId, Digest, Hasher},
    estargz::{
        toc::UNCOMPRESSED_SIZE_ANNOTATION,
        writer::{self, DEFAULT_CHUNK_BYTES},
    },
    limits::Limits,
    opening::Promise,
    tar,
};

mod input;
mod output;
mod spool;
mod verbatim;
mod workers;
mod zstd;

#[cfg(test)]
pub(crate) mod archive;
#[cfg(test)]
mod golden_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod zstd_tests;

pub use workers::{DEFAULT_MEMORY_BYTES, Workers};
pub use zstd::Dialect;

/// The level of compression that tools in the field use where nothing else is asked for, on zlib's scale.
pub const DEFAULT_LEVEL: u8 = 9;

/// The largest chunk that can be asked for, in bytes: a whole chunk is held in memory by whoever reads the layer.
pub const MAX_CHUNK_BYTES: u64 = 64 << 20;

/// The layer's largest uncompressed size where nothing else is asked for, in bytes. A small blob can be made that never
/// ends; disks do.
pub const DEFAULT_MAX_UNCOMPRESSED_BYTES: u64 = 256 << 30;

/// What a layer is made into.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Format {
    /// eStargz.
    #[default]
    Estargz,
    /// zstd:chunked, with zstd's level.
    ZstdChunked(i32, Dialect),
}

/// How a layer is made lazily pullable.
#[derive(Clone, Debug)]
pub struct LayerOptions {
    /// Into what.
    pub format: Format,
    /// Strength of compression for eStargz. Tools in the field use [`GzipLevel::BEST`] where nothing else is asked for, as we do.
    pub level: GzipLevel,
    /// Uncompressed bytes of a chunk, for zstd:chunked at most, from 1 to [`MAX_CHUNK_BYTES`].
    pub chunk_bytes: u64,
    /// eStargz only: several files or chunks go into one member while that has fewer uncompressed bytes, at most
    /// [`MAX_CHUNK_BYTES`]. The blob is smaller, and reading a small file costs more.
    pub min_member_bytes: u64,
    /// Files that come first, in this order, as paths in the image. Where there are none, the layer says that nothing
    /// is worth prefetching.
    pub prioritised: Vec<Vec<u8>>,
    /// Whether a prioritised file that the layer lacks is told in [`ConvertedLayer::missing`] or is an error.
    pub allow_missing: bool,
    /// The largest uncompressed size of the source, in bytes.
    pub max_uncompressed_bytes: u64,
    /// Bounds on what the source may ask of us.
    pub limits: Limits,
}

impl Default for LayerOptions {
    fn default() -> Self {
        Self {
            format: Format::default(),
            level: GzipLevel::BEST,
            chunk_bytes: DEFAULT_CHUNK_BYTES,
            min_member_bytes: 0,
            prioritised: Vec::new(),
            allow_missing: false,
            max_uncompressed_bytes: DEFAULT_MAX_UNCOMPRESSED_BYTES,
            limits: Limits::default(),
        }
    }
}

impl LayerOptions {
    /// Returns how many bytes of content are compressed at once, at most: for [`Workers::start`].
    #[must_use]
    pub fn piece_bytes(&self) -> u64 {
        self.chunk_bytes.max(self.min_member_bytes)
    }
}

/// What became of a layer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ConvertedLayer {
    /// Digest of the blob.
    pub blob_digest: Digest,
    /// Compressed bytes of the blob.
    pub blob_size: u64,
    /// Digest of the new tar.
    pub diff_id: DiffId,
    /// Digest of the JSON text of the table of contents.
    pub toc_digest: Digest,
    /// What the manifest must say of the layer, so that readers trust it.
    pub promise: Promise,
    /// Bytes of the new tar, for eStargz with its table of contents.
    pub uncompressed_size: u64,
    /// Entries of the new tar, landmark included, table of contents not.
    pub entries: u64,
    /// Digest of the source's tar, to be compared with what the image's configuration says.
    pub source_diff_id: DiffId,
    /// Bytes of the source's tar.
    pub source_size: u64,
    /// Prioritised files that the layer lacks.
    pub missing: Vec<Vec<u8>>,
    /// Hard links whose target the layer lacks (paths as in the tar). Lazy readers refuse such a layer; unpacking may
    /// find the target in a lower one.
    pub dangling_links: Vec<Vec<u8>>,
}

impl ConvertedLayer {
    /// Returns the annotations that the layer's descriptor needs, so that readers trust the table of contents.
    #[must_use]
    pub fn annotations(&self) -> Vec<(String, String)> {
        let mut annotations: Vec<_> = self.promise.annotations().into_iter().collect();
        // Those who go by the digest of the table go by this size, too.
        if self.promise.toc.is_some() {
            annotations.push((UNCOMPRESSED_SIZE_ANNOTATION.to_owned(), self.uncompressed_size.to_string()));
        }
        annotations
    }
}

/// What is told about a conversion while it runs, and how it is told to stop. Shared between threads.
#[derive(Debug, Default)]
pub struct Watch {
    stop: AtomicBool,
    read: AtomicU64,
    written: AtomicU64,
}

impl Watch {
    /// Makes the conversion end with [`Error::Stopped`] soon.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Returns how many uncompressed bytes of the source were read so far.
    #[must_use]
    pub fn bytes_read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// Returns how many uncompressed bytes of the new tar were written so far.
    #[must_use]
    pub fn bytes_written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.stop.load(Ordering::Relaxed) { Err(Error::Stopped) } else { Ok(()) }
    }
}

/// Why a layer cannot be converted. Messages are fragments that fit "failed to convert layer ...: {error}".
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A chunk size that is not possible.
    #[error("chunk size must be from 1 to {MAX_CHUNK_BYTES} bytes, not {bytes}")]
    ChunkSize {
        /// What was asked for.
        bytes: u64,
    },
    /// A least size of members that is not possible.
    #[error("gzip members can be filled up to {MAX_CHUNK_BYTES} bytes, not {bytes}")]
    MemberSize {
        /// What was asked for.
        bytes: u64,
    },
    /// The source does not come, or is not what its compression says.
    #[error("its content cannot be read: {0}")]
    Input(#[source] std::io::Error),
    /// The source's tar is not one that can be taken.
    #[error(transparent)]
    Tar(#[from] tar::Error),
    /// A path in the source's tar that no file can have.
    #[error("entry at offset {offset}: {source}")]
    Path {
        /// Offset of its header in the uncompressed tar.
        offset: u64,
        /// What is wrong with it.
        source: tar::path::InvalidPath,
    },
    /// The source is larger than [`LayerOptions::max_uncompressed_bytes`].
    #[error("its uncompressed content exceeds the limit of {limit} bytes")]
    TooLarge {
        /// The bound.
        limit: u64,
    },
    /// The table of contents is larger than [`Limits::toc_bytes`].
    #[error("its table of contents exceeds the limit of {limit} bytes")]
    TocTooLarge {
        /// The bound.
        limit: u64,
    },
    /// The layer cannot be written as eStargz.
    #[error(transparent)]
    Format(#[from] writer::Error),
    /// Prioritised files are not there.
    #[error(
        "{count} prioritised files are not in the layer, first {first:?}; allow missing files to convert it without them"
    )]
    Missing {
        /// How many.
        count: usize,
        /// The first.
        first: String,
    },
    /// The temporary file failed, most likely for want of space.
    #[error(
        "temporary file in {directory}: {source}; point TMPDIR to a directory with space for the uncompressed layer"
    )]
    Spool {
        /// Where it is.
        directory: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The output does not take the blob.
    #[error("the result cannot be written: {0}")]
    Output(#[source] std::io::Error),
    /// [`Watch::stop`] was called.
    #[error("stopped")]
    Stopped,
    /// A compression thread panicked.
    #[error("a compression thread failed; this is a bug, please report it")]
    Thread,
}

/// Reads a layer (a tar, as it is or compressed with gzip or zstd), and writes it to `sink` in the format that is asked for.
///
/// Blocks until the layer is written. `spool_directory` must have space for the uncompressed layer while it runs;
/// nothing is left in it. The blob is not complete before this returns without an error.
///
/// # Errors
/// See [`Error`]. The source's digest is not compared with anything: that is up to the caller, who knows what it should
/// be ([`ConvertedLayer::source_diff_id`]).
pub fn convert_layer(
    input: impl Read + Send,
    options: &LayerOptions,
    workers: &Workers,
    watch: &Watch,
    spool_directory: &Path,
    sink: impl Write,
) -> Result<ConvertedLayer, Error> {
    if !(1..=MAX_CHUNK_BYTES).contains(&options.chunk_bytes) {
        return Err(Error::ChunkSize { bytes: options.chunk_bytes });
    }
    if options.min_member_bytes > MAX_CHUNK_BYTES {
        return Err(Error::MemberSize { bytes: options.min_member_bytes });
    }
    if let Format::ZstdChunked(level, dialect) = options.format {
        return zstd::convert(input, options, (level, dialect), workers, watch, spool_directory, sink);
    }
    let spooled = input::spool(input, options, watch, spool_directory)?;
    let plan = spooled.plan(options, true)?;
    output::write(plan, options, workers, watch, spool_directory, sink)
}

/// Decompresses a layer into `sink`. Returns the digest of the tar, which is its DiffID and the new blob's digest, and
/// its size in bytes.
///
/// # Errors
/// [`Error::Input`], [`Error::TooLarge`] beyond [`DEFAULT_MAX_UNCOMPRESSED_BYTES`], [`Error::Output`], [`Error::Stopped`].
pub fn decompress_layer(input: impl Read, watch: &Watch, mut sink: impl Write) -> Result<(Digest, u64), Error> {
    let mut decoder = compression::Decoder::new(input).map_err(|error| Error::Input(error.into()))?;
    let mut hasher = Hasher::sha256();
    let mut size = 0;
    let mut buffer = vec![0; 256 << 10];
    loop {
        watch.check()?;
        let length = match decoder.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => length,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Error::Input(error)),
        };
        size += length as u64;
        if size > DEFAULT_MAX_UNCOMPRESSED_BYTES {
            return Err(Error::TooLarge { limit: DEFAULT_MAX_UNCOMPRESSED_BYTES });
        }
        hasher.update(&buffer[..length]);
        sink.write_all(&buffer[..length]).map_err(Error::Output)?;
        watch.read.fetch_add(length as u64, Ordering::Relaxed);
        watch.written.fetch_add(length as u64, Ordering::Relaxed);
    }
    sink.flush().map_err(Error::Output)?;
    Ok((hasher.finish(), size))
}
