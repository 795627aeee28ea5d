//! Blobs that wait in a directory until the image that they belong to is complete.
//!
//! The directory stands where the image will be, so that a blob gets to its place by a rename, or by a copy that stays
//! inside one file system. Whoever dies leaves that directory, and nothing else; the next writer in the same place
//! removes it. Its owner holds a lock on it (`flock`), which ends with the process.

use std::{
    collections::BTreeMap,
    fs::{DirEntry, File, Permissions},
    io::{Read as _, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use loris_format::digest::{Digest, Hasher};
use tempfile::{NamedTempFile, TempDir};

use crate::{
    blob::{PIECE_BYTES, blocking, check_digest, file_error},
    document::{Descriptor, Document},
    place::{BlobStream, Error},
};

/// How the directories of blobs in waiting are called.
pub(crate) const PREFIX: &str = ".loris-";

/// Blobs that were taken but are not part of an image yet. They are gone when this is dropped.
pub(crate) struct Stage {
    directory: TempDir,
    /// Tells others that the directory's owner is alive.
    _lock: Option<File>,
    /// The sink's name, for messages.
    place: Arc<str>,
    /// Whether a blob must be on the disk, and not only on its way there, when it counts as taken.
    durable: bool,
    blobs: Mutex<BTreeMap<Digest, Staged>>,
    /// Whether the directory is being removed. Held while a file is renamed in it: one that changes its name meanwhile
    /// could be missed.
    closed: Arc<Mutex<bool>>,
}

/// A blob in a [`Stage`].
#[derive(Clone, Debug)]
pub(crate) struct Staged {
    pub path: PathBuf,
    pub size: u64,
}

impl Stage {
    /// Makes a directory inside of another one, and removes those there whose owners died. Blocks, also while another
    /// process does the same.
    pub(crate) fn new_in(parent: &Path, place: &str, durable: bool) -> Result<Self, Error> {
        // Without it, another process could see the directory before it is locked.
        let _parent_lock = lock(parent);
        remove_abandoned(parent);
        let directory = tempfile::Builder::new().prefix(PREFIX).tempdir_in(parent);
        let directory = directory.map_err(|source| file_error(parent, source))?;
        let lock = lock(directory.path());
        Ok(Self {
            directory,
            _lock: lock,
            place: place.into(),
            durable,
            blobs: Mutex::default(),
            closed: Arc::default(),
        })
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

impl Drop for Stage {
    fn drop(&mut self) {
        // Threads may still write for a future that was dropped.
        *self.closed.lock().unwrap_or_else(PoisonError::into_inner) = true;
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
    closed: Arc<Mutex<bool>>,
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
            closed: stage.closed.clone(),
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
        let closed = self.closed.lock().unwrap_or_else(PoisonError::into_inner);
        if *closed {
            return Err(file_error(&self.target, std::io::Error::other("the image was given up")));
        }
        self.file.persist(&self.target).map_err(|error| file_error(&self.target, error.error))?;
        Ok((self.digest, Staged { path: self.target, size: self.size }))
    }

    fn wrong_size(&self, found: &str) -> Error {
        let detail = format!("expected {} bytes, found {found}", self.size);
        Error::Corrupt { what: self.digest.to_string(), place: format!("the source of {}", self.place), detail }
    }
}

/// Locks a directory against other writers, until the file is closed. Waits for them.
///
/// There are file systems that can't lock a directory (NFS). Nothing is lost there as long as there is one writer.
pub(crate) fn lock(path: &Path) -> Option<File> {
    match File::open(path).and_then(|directory| directory.lock().map(|()| directory)) {
        Ok(directory) => Some(directory),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "cannot lock; let nobody else write there at the same time");
            None
        }
    }
}

/// Removes what writers left behind who died.
fn remove_abandoned(parent: &Path) {
    let Ok(entries) = std::fs::read_dir(parent) else { return };
    let is_stage = |entry: &DirEntry| {
        entry.file_name().to_string_lossy().starts_with(PREFIX) && entry.file_type().is_ok_and(|kind| kind.is_dir())
    };
    for entry in entries.flatten().filter(is_stage) {
        if File::open(entry.path()).is_ok_and(|directory| directory.try_lock().is_ok()) {
            // What can't be removed harms nobody.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// Makes a file that is gone when it is dropped, with the mode that a file of the user's has when it is made.
pub(crate) fn new_file_in(directory: &Path) -> Result<NamedTempFile, Error> {
    let mode = Permissions::from_mode(0o666);
    let made = tempfile::Builder::new().prefix("new-").permissions(mode).tempfile_in(directory);
    made.map_err(|source| file_error(directory, source))
}

/// Writes what was renamed in a directory to the disk.
pub(crate) fn sync_directory(directory: &Path) -> Result<(), Error> {
    File::open(directory).and_then(|file| file.sync_all()).map_err(|source| file_error(directory, source))
}
