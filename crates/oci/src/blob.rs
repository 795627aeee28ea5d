//! Blobs in local files: read with verification, staged until an image is complete.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read as _, Write as _},
    ops::Range,
    os::unix::fs::{FileExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use loris_format::digest::{Digest, Hasher};
use tempfile::{NamedTempFile, TempDir};

use crate::{
    document::{Descriptor, Document},
    place::{BlobStream, Error},
};

/// Files are read, hashed and written in pieces of this many bytes: large enough that handing a piece to another thread
/// costs nothing beside hashing it.
const PIECE_BYTES: usize = 1 << 20;

/// Runs what waits for a disk on a thread that may wait.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        // Only where the runtime is shut down before the work began.
        Err(_) => Err(file_error("work on a file", std::io::ErrorKind::Interrupted.into())),
    }
}

/// Makes an error of what the system said about a file.
pub(crate) fn file_error(path: impl AsRef<Path>, source: std::io::Error) -> Error {
    Error::File { path: path.as_ref().display().to_string(), source }
}

/// Makes a file that is gone when it is dropped, with the mode that a file of the user's has when it is made.
pub(crate) fn new_file_in(directory: &Path) -> Result<NamedTempFile, Error> {
    let mode = std::fs::Permissions::from_mode(0o666);
    let made = tempfile::Builder::new().prefix(".loris-").permissions(mode).tempfile_in(directory);
    made.map_err(|source| file_error(directory, source))
}

/// Writes what was renamed in a directory to the disk.
pub(crate) fn sync_directory(directory: &Path) -> Result<(), Error> {
    File::open(directory).and_then(|file| file.sync_all()).map_err(|source| file_error(directory, source))
}

/// Bytes of a file: a blob of a layout, a member of an archive.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub file: Arc<File>,
    pub start: u64,
    pub length: u64,
    /// The file's name, for messages.
    pub place: Arc<str>,
}

impl Part {
    /// Reads all of it, where it is no longer than `limit`. Blocks.
    pub(crate) fn read(&self, what: &str, limit: u64) -> Result<Bytes, Error> {
        if self.length > limit {
            return Err(Error::TooLarge { what: format!("{what} of {}", self.place), limit });
        }
        self.read_at(0..self.length)
    }

    /// Reads a range, which lies inside. Blocks.
    pub(crate) fn read_at(&self, range: Range<u64>) -> Result<Bytes, Error> {
        let length = usize::try_from(range.end - range.start)
            .map_err(|_| file_error(&*self.place, std::io::ErrorKind::OutOfMemory.into()))?;
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, self.start + range.start).map_err(|source| {
            if source.kind() == std::io::ErrorKind::UnexpectedEof {
                let detail = "the file is shorter than it was when it was opened".to_owned();
                Error::Corrupt { what: "a blob".to_owned(), place: self.place.to_string(), detail }
            } else {
                file_error(&*self.place, source)
            }
        })?;
        Ok(bytes.into())
    }

    /// Checks that it is as long as the descriptor says.
    pub(crate) fn check_size(&self, descriptor: &Descriptor) -> Result<(), Error> {
        if self.length == descriptor.size {
            return Ok(());
        }
        let detail = format!("expected {} bytes, found {}", descriptor.size, self.length);
        Err(Error::Corrupt { what: descriptor.digest.to_string(), place: self.place.to_string(), detail })
    }

    /// Returns the document in it, verified.
    pub(crate) async fn document(self, descriptor: Descriptor, limit: u64) -> Result<Document, Error> {
        blocking(move || {
            self.check_size(&descriptor)?;
            let bytes = self.read(&descriptor.digest.to_string(), limit)?;
            Document::verified(bytes, &descriptor, &self.place)
        })
        .await
    }

    /// Returns a range of the blob.
    pub(crate) async fn range(self, descriptor: &Descriptor, range: Range<u64>) -> Result<Bytes, Error> {
        self.check_size(descriptor)?;
        if range.start > range.end || range.end > self.length {
            let detail = format!("the range {}..{} is not inside 0..{}", range.start, range.end, self.length);
            return Err(Error::Invalid { what: descriptor.digest.to_string(), detail });
        }
        blocking(move || self.read_at(range)).await
    }

    /// Returns the blob, verified as it passes.
    pub(crate) fn stream(self, descriptor: &Descriptor) -> Result<BlobStream, Error> {
        self.check_size(descriptor)?;
        let digest = descriptor.digest;
        let start = Some((0, digest.hasher()));
        Ok(stream::try_unfold((self, start), move |(part, state)| async move {
            let Some((offset, mut hasher)) = state else { return Ok(None) };
            let end = part.length.min(offset + PIECE_BYTES as u64);
            let (part, piece, hasher) = blocking(move || {
                let piece = part.read_at(offset..end)?;
                hasher.update(&piece);
                Ok((part, piece, hasher))
            })
            .await?;
            if end < part.length {
                return Ok(Some((piece, (part, Some((end, hasher))))));
            }
            check_digest(hasher, &digest, &part.place)?;
            Ok(Some((piece, (part, None))))
        })
        .boxed())
    }
}

fn check_digest(hasher: Hasher, expected: &Digest, place: &str) -> Result<(), Error> {
    let found = hasher.finish();
    if found == *expected {
        return Ok(());
    }
    let detail = format!("its bytes have the digest {found}");
    Err(Error::Corrupt { what: expected.to_string(), place: place.to_owned(), detail })
}

/// Blobs that were taken but are not part of an image yet. They are gone when this is dropped.
pub(crate) struct Stage {
    directory: TempDir,
    /// The sink's name, for messages.
    place: Arc<str>,
    /// Whether a blob must be on the disk, and not only on its way there, when it counts as taken.
    durable: bool,
    blobs: Mutex<BTreeMap<Digest, Staged>>,
}

/// A blob in a [`Stage`].
#[derive(Clone, Debug)]
pub(crate) struct Staged {
    pub path: PathBuf,
    pub size: u64,
}

impl Stage {
    pub(crate) fn new(directory: TempDir, place: &str, durable: bool) -> Self {
        Self { directory, place: place.into(), durable, blobs: Mutex::default() }
    }

    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn get(&self, digest: &Digest) -> Option<Staged> {
        self.lock().get(digest).cloned()
    }

    /// Returns all blobs, sorted by digest.
    pub(crate) fn all(&self) -> Vec<(Digest, Staged)> {
        self.lock().iter().map(|(digest, staged)| (*digest, staged.clone())).collect()
    }

    pub(crate) fn has(&self, descriptor: &Descriptor) -> bool {
        self.get(&descriptor.digest).is_some_and(|staged| staged.size == descriptor.size)
    }

    /// Takes a blob from a stream, and checks it.
    pub(crate) async fn put(&self, descriptor: &Descriptor, mut content: BlobStream) -> Result<(), Error> {
        let mut writer = Writer::new(self, descriptor)?;
        let mut pieces = Vec::new();
        let mut waiting = 0;
        while let Some(piece) = content.next().await.transpose()? {
            waiting += piece.len();
            pieces.push(piece);
            if waiting >= PIECE_BYTES {
                let pieces = std::mem::take(&mut pieces);
                waiting = 0;
                writer = blocking(move || writer.write(&pieces)).await?;
            }
        }
        let (digest, staged) = blocking(move || writer.write(&pieces)?.finish()).await?;
        self.lock().insert(digest, staged);
        Ok(())
    }

    /// Takes a blob from a file, and checks it.
    pub(crate) async fn put_file(&self, descriptor: &Descriptor, path: &Path) -> Result<(), Error> {
        let mut writer = Writer::new(self, descriptor)?;
        let path = path.to_owned();
        let (digest, staged) = blocking(move || {
            let mut file = File::open(&path).map_err(|source| file_error(&path, source))?;
            let mut buffer = vec![0; PIECE_BYTES];
            loop {
                match file.read(&mut buffer).map_err(|source| file_error(&path, source))? {
                    0 => return writer.finish(),
                    length => writer.write_all(&buffer[..length])?,
                }
            }
        })
        .await?;
        self.lock().insert(digest, staged);
        Ok(())
    }

    /// Takes a document, which was verified when it was made.
    pub(crate) async fn put_document(&self, document: &Document) -> Result<(), Error> {
        let content = stream::iter([Ok(document.bytes.clone())]).boxed();
        self.put(&document.descriptor(), content).await
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Digest, Staged>> {
        // The map is whole between any two statements, so a panic elsewhere leaves nothing half done.
        self.blobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes one blob to a temporary file and refuses what does not fit its descriptor.
struct Writer {
    file: NamedTempFile,
    target: PathBuf,
    place: Arc<str>,
    hasher: Hasher,
    digest: Digest,
    size: u64,
    written: u64,
    durable: bool,
}

impl Writer {
    fn new(stage: &Stage, descriptor: &Descriptor) -> Result<Self, Error> {
        let directory = stage.directory.path();
        Ok(Self {
            file: new_file_in(directory)?,
            target: directory.join(format!("{}-{}", descriptor.digest.algorithm(), descriptor.digest.hex())),
            place: stage.place.clone(),
            hasher: descriptor.digest.hasher(),
            digest: descriptor.digest,
            size: descriptor.size,
            written: 0,
            durable: stage.durable,
        })
    }

    fn write(mut self, pieces: &[Bytes]) -> Result<Self, Error> {
        pieces.iter().try_for_each(|piece| self.write_all(piece))?;
        Ok(self)
    }

    fn write_all(&mut self, piece: &[u8]) -> Result<(), Error> {
        self.written += piece.len() as u64;
        if self.written > self.size {
            return Err(self.wrong_size("more"));
        }
        self.hasher.update(piece);
        self.file.write_all(piece).map_err(|source| file_error(self.file.path(), source))
    }

    fn finish(self) -> Result<(Digest, Staged), Error> {
        if self.written != self.size {
            return Err(self.wrong_size(&self.written.to_string()));
        }
        check_digest(self.hasher, &self.digest, &self.place)?;
        if self.durable {
            self.file.as_file().sync_all().map_err(|source| file_error(self.file.path(), source))?;
        }
        self.file.persist(&self.target).map_err(|error| file_error(&self.target, error.error))?;
        Ok((self.digest, Staged { path: self.target, size: self.size }))
    }

    fn wrong_size(&self, found: &str) -> Error {
        let detail = format!("expected {} bytes, found {found}", self.size);
        Error::Corrupt { what: self.digest.to_string(), place: format!("the source of {}", self.place), detail }
    }
}
