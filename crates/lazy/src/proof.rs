//! Whether a layer that is whole is the layer that the image means.
//!
//! While a layer is read in pieces, a chain of digests leads from the manifest through the table of contents to each
//! extent. Two things nobody can know before everything is here: that the whole has the DiffID of the image's
//! configuration, and that the table of contents says the same as the tar, which everyone else unpacks. So when the last
//! extent is filled, the tar is put together again, out of the data file and the `rest`, hashed, and
//! compared with the index.
//!
//! Nothing vouches for the `rest`: whoever served the blob can have made up what stands between the extents. So where
//! something is wrong, the blob is read once more, as a whole, from elsewhere where there is an elsewhere, and condemned is
//! only what has the blob's digest. What has not is no verdict, and is tried again later.
//!
//! What comes out is kept in the file `verdict` in the layer's directory:
//!
//! ```text
//! loris verdict 1
//! sound sha256:...        its DiffID
//! of the blob
//! ```
//!
//! or, in the second line, `condemned` and the reason. The third line is there where the blob had its digest. A condemned
//! layer is not served any more, by any process: one that has it open looks at the file when the bitmap's counter changes.
//! What an image claims is no part of the finding: another one may claim what is true.

use std::{
    cell::RefCell,
    collections::VecDeque,
    io::{self, Read, Write as _},
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
use tokio::{runtime::Handle, time::Instant};

use crate::{
    agreement,
    cache::Tail,
    content::COPIED,
    error::{EnsureError, StoreError, path_of},
    layer::LazyLayer,
    recheck::{HASH_BYTES, hashes_to},
    rest::{self, Rest},
    schedule::{Claim, Turn, Urgency},
};

/// What is read of the blob at once, where something is missing.
const PIECE_BYTES: u64 = 1 << 20;
/// What a proof may fetch of frames whose content was copied, or a sixteenth of the blob.
const MOST_ABSENT_BYTES: u64 = 1 << 20;
/// Most bytes of a verdict: a reason is a few lines.
const MOST_VERDICT_BYTES: u64 = 16 << 10;
/// How many places a blob is read from before the proof is put off.
const MOST_PLACES: usize = 4;
/// Frames that are larger when decoded are counted as memory.
const SMALL_FRAME_BYTES: u64 = 1 << 20;
const VERSION: &str = "loris verdict 1";
const OF_BLOB: &str = "of the blob";

/// What is known of a layer that is whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Its tar has this DiffID, and agrees with the index.
    Sound(DiffId),
    /// It could not be put together: what is missing costs too much. Every extent has its digest all the same.
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

/// What was found out about a layer, whatever images claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    pub(crate) verdict: Verdict,
    /// Whether it was found out from bytes that have the blob's digest. Nothing is condemned without.
    pub(crate) of_blob: bool,
}

impl Finding {
    /// Says how much it is worth: what is less replaces nothing.
    pub(crate) fn certainty(&self) -> u8 {
        match self.verdict {
            Verdict::Unproven(_) => 0,
            _ if !self.of_blob => 1,
            _ => 2,
        }
    }

    /// Reads what was found out at an earlier time. What can't be read is nothing: the layer is proven again.
    pub(crate) fn load(directory: &Path) -> Option<Self> {
        let file = crate::cache::open_existing(&directory.join("verdict")).ok()?;
        let mut text = String::new();
        file.take(MOST_VERDICT_BYTES).read_to_string(&mut text).ok()?;
        let mut lines = text.lines();
        // A newer verdict that this version can't read is proven again, and replaced.
        let version = lines.next()?;
        let (word, detail) = (version == VERSION).then(|| lines.next()?.split_once(' '))??;
        let of_blob = lines.next() == Some(OF_BLOB);
        let verdict = match word {
            "sound" => Verdict::Sound(DiffId(detail.parse().ok()?)),
            "condemned" if of_blob => Verdict::Condemned(detail.to_owned()),
            _ => return None,
        };
        Some(Self { verdict, of_blob })
    }

    /// Saves it in one step; nothing where nothing was found out.
    fn save(&self, directory: &Path) -> Result<(), StoreError> {
        if let Verdict::Unproven(_) = self.verdict {
            return Ok(());
        }
        let path = directory.join("verdict");
        // A name in a reason must not look like a line.
        let line = self.verdict.to_string().replace(char::is_control, " ");
        let write = || {
            let mut file = tempfile::Builder::new().prefix(".verdict-").tempfile_in(directory)?;
            writeln!(file, "{VERSION}\n{line}")?;
            if self.of_blob {
                writeln!(file, "{OF_BLOB}")?;
            }
            // Else a power failure might leave a name without content, and with it what was condemned be trusted again.
            file.as_file().sync_data()?;
            file.persist(&path).map_err(|error| error.error)
        };
        write().map_err(StoreError::file(&path)).map(drop)
    }
}

/// Finds out what a layer is that is whole. Blocks, for the source too where something is missing.
///
/// # Errors
/// Where the disk or the source fails, the source has another blob, or the data file was damaged: what was is forgotten
/// then, to be fetched again.
pub(crate) fn prove(layer: &Arc<LazyLayer>, runtime: &Handle) -> Result<Finding, EnsureError> {
    let directory = layer.directory();
    let settles = |finding: &Finding| layer.judge(finding).is_some();
    // Another process may have been at it, and has taken away then what is needed for it.
    let known = Finding::load(directory).or_else(|| layer.shared.finding());
    let finding = match known {
        Some(known) if settles(&known) => return Ok(known),
        // This image claims something else.
        Some(_) => of_blob(layer, runtime)?,
        None => match in_pieces(layer, runtime)? {
            Verdict::Unproven(reason) => {
                let unproven = Finding { verdict: Verdict::Unproven(reason), of_blob: false };
                return Ok(Finding::load(directory).filter(settles).unwrap_or(unproven));
            }
            verdict @ Verdict::Sound(_) if settles(&Finding { verdict: verdict.clone(), of_blob: false }) => {
                Finding { verdict, of_blob: false }
            }
            found => {
                tracing::warn!(layer = %layer.digest(), %found, "not what it should be; reading all of the blob again");
                // A disk that does not keep what is written must not condemn a layer for ever.
                check_data_file(layer)?;
                of_blob(layer, runtime)?
            }
        },
    };
    match finding.save(directory) {
        // It has served.
        Ok(()) => drop(std::fs::remove_file(directory.join("rest"))),
        Err(error) => tracing::warn!(%error, "a verdict could not be kept"),
    }
    if finding.of_blob
        && let Err(error) = layer.cache.announce()
    {
        tracing::warn!(layer = %layer.digest(), %error, "other processes do not hear of a verdict");
    }
    Ok(finding)
}

/// Puts the layer's tar together, out of what is here where that can be done. What is wrong with it may be the fault of
/// whoever has sent what stands between the extents.
fn in_pieces(layer: &Arc<LazyLayer>, runtime: &Handle) -> Result<Verdict, EnsureError> {
    let failure = Arc::default();
    let stream = TarStream::new(layer, runtime, &failure).map_err(|error| layer.file_error(error))?;
    let absent = stream.unseen_bytes();
    if absent > MOST_ABSENT_BYTES.max(layer.descriptor().size / 16) {
        return Ok(Verdict::Unproven(format!("{absent} bytes of the blob would have to be fetched for it")));
    }
    let verdict = examine(layer, stream, None);
    match take(&failure) {
        Some(error) => Err(error),
        None => Ok(verdict),
    }
}

/// Reads all of the blob, until what comes has its digest.
fn of_blob(layer: &Arc<LazyLayer>, runtime: &Handle) -> Result<Finding, EnsureError> {
    let size = layer.descriptor().size;
    for _ in 1..MOST_PLACES {
        match of_blob_once(layer, runtime) {
            // Somebody else may have the right one.
            Err(EnsureError::AnotherBlob { .. }) if layer.source.distrust_range(layer.descriptor(), 0..size) => {}
            outcome => return outcome,
        }
    }
    of_blob_once(layer, runtime)
}

fn of_blob_once(layer: &Arc<LazyLayer>, runtime: &Handle) -> Result<Finding, EnsureError> {
    let failure = Failure::default();
    let reader = BlobReader {
        layer: Arc::clone(layer),
        runtime: runtime.clone(),
        failure: Arc::clone(&failure),
        tail: Arc::default(),
        left: BlobRange { start: BlobOffset(0), length: layer.descriptor().size },
        piece: Bytes::new(),
    };
    let blob = RefCell::new(Hashed { inner: reader, hasher: layer.digest().hasher() });
    let mut damaged = Vec::new();
    let verdict = match Decoder::new(Lent(&blob)) {
        Ok(tar) => examine(layer, tar, Some(&mut damaged)),
        Err(error) => unreadable(&io::Error::other(error)),
    };
    if let Some(error) = take(&failure) {
        return Err(error);
    }
    // What comes behind the damage belongs to the blob.
    let read = io::copy(&mut Lent(&blob), &mut io::sink());
    if let Some(error) = take(&failure) {
        return Err(error);
    }
    read.map_err(|error| layer.file_error(error))?;
    let found = blob.into_inner().hasher.finish();
    if found != *layer.digest() {
        return Err(EnsureError::AnotherBlob { layer: *layer.digest(), place: layer.source.name(), found });
    }
    forget(layer, &damaged)?;
    Ok(Finding { verdict, of_blob: true })
}

/// Forgets extents without digest whose content is another in the blob.
fn forget(layer: &Arc<LazyLayer>, damaged: &[usize]) -> Result<(), EnsureError> {
    let Some(&first) = damaged.first() else { return Ok(()) };
    layer.cache.forget(damaged).map_err(|error| layer.file_error(error))?;
    let extent = layer.extent(first);
    Err(EnsureError::Mismatch {
        layer: *layer.digest(),
        path: path_of(layer.index(), extent.node),
        offset: extent.file_offset,
        length: extent.length,
        expected: *layer.digest(),
    })
}

/// Compares a tar with the layer's index, and hashes it. Extents without digest whose content in the data file is another
/// are `damaged`, where the tar does not come from there itself.
fn examine(layer: &LazyLayer, tar: impl Read, damaged: Option<&mut Vec<usize>>) -> Verdict {
    let mut hashed = Hashed { inner: tar, hasher: Hasher::sha256() };
    let data = damaged.map(|damaged| (layer.data_file(), damaged));
    let found = agreement::compare(&mut hashed, layer.index(), &layer.limits, data).and_then(|differences| {
        io::copy(&mut hashed, &mut io::sink())?;
        Ok(differences)
    });
    match found {
        Ok(differences) => match differences.first() {
            None => Verdict::Sound(DiffId(hashed.hasher.finish())),
            Some(first) if differences.len() == 1 => Verdict::Condemned(first.clone()),
            Some(first) => Verdict::Condemned(format!("{first}, and {} more differences", differences.len() - 1)),
        },
        Err(error) => unreadable(&error),
    }
}

fn unreadable(error: &io::Error) -> Verdict {
    Verdict::Condemned(format!("its tar can't be read: {error}"))
}

/// Says whether a DiffID can't be the same layer's. One of another algorithm can't be compared.
pub(crate) fn is_another(claimed: &DiffId, found: &DiffId) -> bool {
    claimed.0.algorithm() == found.0.algorithm() && claimed != found
}

/// Hashes all extents once more, and forgets those that are not what they were.
fn check_data_file(layer: &Arc<LazyLayer>) -> Result<(), EnsureError> {
    let mut damaged = Vec::new();
    let mut first = None;
    let mut buffer = vec![0; HASH_BYTES];
    for (number, extent) in layer.index().extents().iter().enumerate() {
        let Some(expected) = &extent.digest else { continue };
        let is_right = hashes_to(layer.data_file(), extent, expected, &mut buffer);
        if !is_right.map_err(|error| layer.file_error(error))? {
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

/// A reader that is needed again when whoever reads from it has given up.
struct Lent<'a, R>(&'a RefCell<R>);

impl<R: Read> Read for Lent<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.borrow_mut().read(buffer)
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
    Bytes {
        bytes: Bytes,
        /// What it takes, where that is much.
        _memory: Option<Turn>,
    },
    Decoding(Box<Decoder<BlobReader>>),
}

impl<'a> TarStream<'a> {
    fn new(layer: &'a Arc<LazyLayer>, runtime: &'a Handle, failure: &'a Failure) -> io::Result<Self> {
        let size = layer.descriptor().size;
        let mut segments = VecDeque::new();
        let mut at = 0;
        for (frame, id) in layer.index().frames().iter().zip(0..) {
            // What is in no span is the header of the first gzip member.
            segments.extend(between(at, frame.range.start.0).filter(|_| !layer.index().has_spans()));
            segments.push_back(Segment::Frame(FrameId(id)));
            at = frame.range.end().0;
        }
        // The skippable frames behind the tar of zstd:chunked are nothing to whoever decodes it.
        let end = if layer.opened().kind.is_zstd() { layer.opened().payload_end.0 } else { size };
        segments.extend(between(at, end).filter(|_| !layer.index().has_spans()));
        let tail = Tail::load(layer.directory(), size, layer.limits.toc_bytes).unwrap_or_default();
        Ok(Self {
            layer,
            runtime,
            failure,
            rest: Rest::open(layer.directory(), layer.index())?,
            tail: Arc::new(tail),
            decoder: FrameDecoder::new(),
            segments,
            current: Current::Bytes { bytes: Bytes::new(), _memory: None },
        })
    }

    /// Returns how many bytes of the blob were never seen, since their content was found in other layers of the store. All
    /// else that is not here, whoever made or sent the blob has a say in, and is fetched however much it is.
    fn unseen_bytes(&self) -> u64 {
        if !self.layer.directory().join(COPIED).exists() {
            return 0;
        }
        let index = self.layer.index();
        let unseen = |segment: &Segment| match *segment {
            Segment::Frame(frame) if !self.rest.has(frame) && rest::can_be_kept(index, frame) => {
                index.frames()[frame.0 as usize].range.length
            }
            _ => 0,
        };
        self.segments.iter().map(unseen).fold(0, u64::saturating_add)
    }

    fn open(&mut self, segment: Segment) -> io::Result<Current> {
        let range = match segment {
            Segment::Blob(range) => range,
            Segment::Frame(frame) => {
                let (index, limits) = (self.layer.index(), &self.layer.limits);
                let memory = self.memory(index.frames()[frame.0 as usize].decoded_length);
                let known = self.rest.frame(index, frame, self.layer.data_file(), &mut self.decoder, limits);
                match known.map_err(|error| self.fail(self.layer.file_error(error)))? {
                    Some(decoded) => return Ok(Current::Bytes { bytes: decoded.into(), _memory: memory }),
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
        if let (Segment::Frame(frame), true) = (segment, self.layer.index().has_spans()) {
            return self.span(frame, blob);
        }
        Ok(Current::Decoding(Box::new(Decoder::new(blob).map_err(io::Error::other)?)))
    }

    /// Fetches a span that nobody has asked for: one that holds no content, or whose record was lost.
    fn span(&mut self, frame: FrameId, mut blob: BlobReader) -> io::Result<Current> {
        let memory = self.memory(self.layer.index().span(frame).map_or(0, |span| span.length));
        let mut compressed = Vec::new();
        blob.read_to_end(&mut compressed)?;
        match self.layer.decode_span(&mut self.decoder, frame, &compressed, true) {
            Ok((decoded, true)) => Ok(Current::Bytes { bytes: decoded.into(), _memory: memory }),
            Ok((_, false)) => Err(io::Error::other("a span can't be decoded to its end")),
            Err(fault) => Err(io::Error::other(fault)),
        }
    }

    /// Waits for memory, where much is needed.
    fn memory(&self, bytes: u64) -> Option<Turn> {
        let is_much = bytes > SMALL_FRAME_BYTES && bytes <= self.layer.limits.frame_bytes;
        is_much.then(|| self.runtime.block_on(self.layer.schedule.memory(bytes)))
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

fn take(failure: &Failure) -> Option<EnsureError> {
    failure.lock().unwrap_or_else(PoisonError::into_inner).take()
}

fn between(start: u64, end: u64) -> Option<Segment> {
    let length = end.checked_sub(start).filter(|&length| length > 0)?;
    Some(Segment::Blob(BlobRange { start: BlobOffset(start), length }))
}

impl Read for TarStream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = match &mut self.current {
                Current::Bytes { bytes, .. } => {
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
            // The memory goes back first.
            self.current = Current::Bytes { bytes: Bytes::new(), _memory: None };
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
                None => self.fetch(next).map_err(|error| fail(&self.failure, error))?,
            };
            self.left = BlobRange { start: next.end(), length: self.left.length - next.length };
        }
        let length = self.piece.len().min(buffer.len());
        self.piece.copy_to_slice(&mut buffer[..length]);
        Ok(length)
    }
}

impl BlobReader {
    /// Fetches as what nobody waits for does, but does not wait until nobody reads: a layer that is not proven costs each
    /// reader something.
    fn fetch(&self, range: BlobRange) -> Result<Bytes, EnsureError> {
        let claim = Claim { quiet_until: Some(Instant::now()), ..Claim::new(Urgency::Completion, range.length) };
        self.runtime.block_on(async {
            let _turn = self.layer.schedule.turn(claim).await;
            self.layer.fetch(range).await
        })
    }
}

/// Shows a digest in a condemnation.
pub(crate) fn other_diff_id(found: &Digest, claimed: &Digest) -> String {
    format!("its tar has the DiffID {found}, the configuration says {claimed}")
}
