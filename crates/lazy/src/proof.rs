//! Whether a layer that is whole is the layer that the image means.
//!
//! While a layer is read in pieces, a chain of digests leads from the manifest through the table of contents to each
//! extent. Two things nobody can know before everything is here: that the whole has the DiffID of the image's
//! configuration, and that the table of contents says the same as the tar, which everyone else unpacks. So when the last
//! extent is filled, the tar is put together again, out of the data file and the `rest`, hashed, and
//! compared with the index. What comes out is kept in the file `verdict` in the layer's directory:
//!
//! ```text
//! loris verdict 1
//! sound sha256:...        its DiffID
//! ```
//!
//! or, in the second line, `condemned` and the reason. A condemned layer is not served any more, by any process.

use std::{
    collections::VecDeque,
    io::{self, Read, Write as _},
    os::unix::fs::FileExt as _,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::{Buf as _, Bytes};
use loris_format::{
    compression::{Decoder, FrameDecoder},
    digest::{DiffId, Digest, Hasher},
    index::FrameId,
    position::{BlobOffset, BlobRange},
};
use tokio::runtime::Handle;

use crate::{
    agreement,
    cache::Tail,
    error::{EnsureError, StoreError, path_of},
    layer::LazyLayer,
    rest::Rest,
};

/// What is read of the blob at once, where something is missing.
const PIECE_BYTES: u64 = 1 << 20;
/// What a proof may fetch, or a sixteenth of the blob.
const MOST_ABSENT_BYTES: u64 = 1 << 20;
/// Most bytes of a verdict: a reason is a few lines.
const MOST_VERDICT_BYTES: u64 = 16 << 10;
const VERSION: &str = "loris verdict 1";

/// What is known of a layer that is whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Its tar has this DiffID, and agrees with the index.
    Sound(DiffId),
    /// It could not be put together: what is missing can't be had, or costs too much. Every extent has its digest all the
    /// same.
    Unproven(String),
    /// It is not what it claims to be.
    Condemned(String),
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Sound(diff_id) => write!(f, "sound {}", diff_id.0),
            Self::Unproven(reason) => write!(f, "unproven: {reason}"),
            Self::Condemned(reason) => write!(f, "condemned {reason}"),
        }
    }
}

impl Verdict {
    /// Reads the verdict of an earlier time. What can't be read is none: the layer is proven again.
    pub(crate) fn load(directory: &Path) -> Option<Self> {
        let file = crate::cache::open_existing(&directory.join("verdict")).ok()?;
        let mut text = String::new();
        file.take(MOST_VERDICT_BYTES).read_to_string(&mut text).ok()?;
        let (version, rest) = text.split_once('\n')?;
        // A newer verdict that this version can't read is proven again, and replaced.
        let (word, detail) = (version == VERSION).then(|| rest.split_once(' '))??;
        match word {
            "sound" => Some(Self::Sound(DiffId(detail.trim_end().parse().ok()?))),
            "condemned" => Some(Self::Condemned(detail.trim_end().to_owned())),
            _ => None,
        }
    }

    /// Saves it in one step; nothing where nothing was found out.
    fn save(&self, directory: &Path) -> Result<(), StoreError> {
        if let Self::Unproven(_) = self {
            return Ok(());
        }
        let path = directory.join("verdict");
        let write = || {
            let mut file = tempfile::Builder::new().prefix(".verdict-").tempfile_in(directory)?;
            write!(file, "{VERSION}\n{self}\n")?;
            // Else a power failure might leave a name without content, and with it what was condemned be trusted again.
            file.as_file().sync_data()?;
            file.persist(&path).map_err(|error| error.error)
        };
        write().map_err(StoreError::file(&path)).map(drop)
    }
}

/// Puts a layer that is whole together and says what it is. Blocks, for the source too where something is missing.
///
/// # Errors
/// Where the disk or the source fails, or the data file was damaged: what was is forgotten then, to be fetched again.
pub(crate) fn prove(layer: &Arc<LazyLayer>, runtime: &Handle) -> Result<Verdict, EnsureError> {
    let failure = Arc::default();
    let stream = TarStream::new(layer, runtime, &failure).map_err(|error| layer.file_error(error))?;
    let absent = stream.absent_bytes();
    if absent > MOST_ABSENT_BYTES.max(layer.descriptor().size / 16) {
        // As where content was found in other layers of the store: what stands around it was never seen.
        return Ok(Verdict::Unproven(format!("{absent} bytes of the blob would have to be fetched for it")));
    }
    let mut hashed = Hashed { inner: stream, hasher: Hasher::sha256() };
    let found = agreement::compare(&mut hashed, layer.index(), &layer.limits).and_then(|differences| {
        io::copy(&mut hashed, &mut io::sink())?;
        Ok(differences)
    });
    if let Some(error) = failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
        return Err(error);
    }
    let verdict = match found {
        Ok(differences) => match differences.first() {
            None => Verdict::Sound(DiffId(hashed.hasher.finish())),
            Some(first) if differences.len() == 1 => Verdict::Condemned(first.clone()),
            Some(first) => Verdict::Condemned(format!("{first}, and {} more differences", differences.len() - 1)),
        },
        Err(error) => Verdict::Condemned(format!("its tar can't be read: {error}")),
    };
    let unclaimed = |found: &DiffId| layer.claimed().is_some_and(|claimed| is_another(claimed, found));
    let is_bad = match &verdict {
        Verdict::Sound(found) => unclaimed(found),
        _ => true,
    };
    if is_bad {
        // A disk that does not keep what is written must not condemn a layer for ever.
        check_data_file(layer)?;
    }
    match verdict.save(layer.directory()) {
        // It has served.
        Ok(()) => drop(std::fs::remove_file(layer.directory().join("rest"))),
        Err(error) => tracing::warn!(%error, "a verdict could not be kept"),
    }
    Ok(verdict)
}

/// Says whether a DiffID can't be the same layer's. One of another algorithm can't be compared.
pub(crate) fn is_another(claimed: &DiffId, found: &DiffId) -> bool {
    claimed.0.algorithm() == found.0.algorithm() && claimed != found
}

/// Hashes all extents once more, and forgets those that are not what they were.
fn check_data_file(layer: &Arc<LazyLayer>) -> Result<(), EnsureError> {
    let mut damaged = Vec::new();
    let mut first = None;
    let mut buffer = Vec::new();
    for (number, extent) in layer.index().extents().iter().enumerate() {
        let Some(expected) = &extent.digest else { continue };
        buffer.resize(usize::try_from(extent.length).unwrap_or(usize::MAX), 0);
        layer.data_file().read_exact_at(&mut buffer, extent.data.0).map_err(|error| layer.file_error(error))?;
        if !expected.matches(&buffer) {
            first.get_or_insert((extent, *expected));
            damaged.push(number);
        }
    }
    let Some((extent, expected)) = first else { return Ok(()) };
    layer.cache.forget(&damaged).map_err(|error| layer.file_error(error))?;
    Err(EnsureError::Mismatch {
        layer: *layer.digest(),
        path: path_of(layer.index(), extent.node),
        offset: extent.file_offset,
        length: extent.length,
        expected,
    })
}

struct Hashed<R> {
    inner: R,
    hasher: Hasher,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        Ok(read)
    }
}

/// What went wrong outside of the layer.
type Failure = Arc<Mutex<Option<EnsureError>>>;

/// The layer's tar.
struct TarStream<'a> {
    layer: &'a Arc<LazyLayer>,
    runtime: &'a Handle,
    failure: &'a Failure,
    rest: Rest,
    tail: Arc<Tail>,
    decoder: FrameDecoder,
    segments: VecDeque<Segment>,
    current: Current,
}

/// A part of the blob that can be decoded by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Segment {
    Frame(FrameId),
    /// What is before, between and behind the frames.
    Blob(BlobRange),
}

enum Current {
    Bytes(Bytes),
    Decoding(Box<Decoder<BlobReader>>),
}

impl<'a> TarStream<'a> {
    fn new(layer: &'a Arc<LazyLayer>, runtime: &'a Handle, failure: &'a Failure) -> io::Result<Self> {
        let size = layer.descriptor().size;
        let mut segments = VecDeque::new();
        let mut at = 0;
        for (frame, id) in layer.index().frames().iter().zip(0..) {
            segments.extend(between(at, frame.range.start.0));
            segments.push_back(Segment::Frame(FrameId(id)));
            at = frame.range.end().0;
        }
        segments.extend(between(at, size));
        let tail = Tail::load(layer.directory(), size, layer.limits.toc_bytes).unwrap_or_default();
        Ok(Self {
            layer,
            runtime,
            failure,
            rest: Rest::open(layer.directory(), layer.index())?,
            tail: Arc::new(tail),
            decoder: FrameDecoder::new(),
            segments,
            current: Current::Bytes(Bytes::new()),
        })
    }

    /// Returns how many bytes of the blob would have to be fetched.
    fn absent_bytes(&self) -> u64 {
        let frames = self.layer.index().frames();
        let absent = |segment: &Segment| match *segment {
            Segment::Frame(frame) if self.rest.has(frame) => 0,
            Segment::Frame(frame) => frames[frame.0 as usize].range.length,
            Segment::Blob(range) if self.tail.get(range).is_some() => 0,
            Segment::Blob(range) => range.length,
        };
        self.segments.iter().map(absent).fold(0, u64::saturating_add)
    }

    fn open(&mut self, segment: Segment) -> io::Result<Current> {
        let range = match segment {
            Segment::Blob(range) => range,
            Segment::Frame(frame) => {
                let (index, limits) = (self.layer.index(), &self.layer.limits);
                let known = self.rest.frame(index, frame, self.layer.data_file(), &mut self.decoder, limits);
                match known.map_err(|error| self.fail(self.layer.file_error(error)))? {
                    Some(decoded) => return Ok(Current::Bytes(decoded.into())),
                    None => index.frames()[frame.0 as usize].range,
                }
            }
        };
        let blob = BlobReader {
            layer: Arc::clone(self.layer),
            runtime: self.runtime.clone(),
            failure: Arc::clone(self.failure),
            tail: Arc::clone(&self.tail),
            left: range,
            piece: Bytes::new(),
        };
        Ok(Current::Decoding(Box::new(Decoder::new(blob).map_err(io::Error::other)?)))
    }

    fn fail(&self, error: EnsureError) -> io::Error {
        fail(self.failure, error)
    }
}

fn fail(failure: &Failure, error: EnsureError) -> io::Error {
    let text = error.to_string();
    failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    io::Error::other(text)
}

fn between(start: u64, end: u64) -> Option<Segment> {
    let length = end.checked_sub(start).filter(|&length| length > 0)?;
    Some(Segment::Blob(BlobRange { start: BlobOffset(start), length }))
}

impl Read for TarStream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = match &mut self.current {
                Current::Bytes(bytes) => {
                    let length = bytes.len().min(buffer.len());
                    bytes.copy_to_slice(&mut buffer[..length]);
                    length
                }
                Current::Decoding(decoder) => decoder.read(buffer)?,
            };
            if read > 0 || buffer.is_empty() {
                return Ok(read);
            }
            let Some(segment) = self.segments.pop_front() else { return Ok(0) };
            self.current = self.open(segment)?;
        }
    }
}

/// Bytes of the blob as it is: from what was kept of its end, else from the source.
struct BlobReader {
    layer: Arc<LazyLayer>,
    runtime: Handle,
    failure: Failure,
    tail: Arc<Tail>,
    left: BlobRange,
    piece: Bytes,
}

impl Read for BlobReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.piece.is_empty() && self.left.length > 0 {
            let next = BlobRange { start: self.left.start, length: self.left.length.min(PIECE_BYTES) };
            self.piece = match self.tail.get(next) {
                Some(bytes) => Bytes::copy_from_slice(bytes),
                None => self.runtime.block_on(self.layer.fetch(next)).map_err(|error| fail(&self.failure, error))?,
            };
            self.left = BlobRange { start: next.end(), length: self.left.length - next.length };
        }
        let length = self.piece.len().min(buffer.len());
        self.piece.copy_to_slice(&mut buffer[..length]);
        Ok(length)
    }
}

/// Shows a digest in a condemnation.
pub(crate) fn other_diff_id(found: &Digest, claimed: &Digest) -> String {
    format!("its tar has the DiffID {found}, the configuration says {claimed}")
}
