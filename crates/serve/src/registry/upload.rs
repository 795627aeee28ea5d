//! Uploads under way: content that is not yet a blob.
//!
//! An upload lives in memory (its offset, its running digest) and in one temporary file. It ends by becoming a blob, by
//! being cancelled, by being left alone for too long, or with the registry.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use loris_format::digest::{Digest, Hasher};
use tempfile::TempPath;

use super::name::Repository;

/// How long an upload may be left alone. A client that resumes does so within seconds or minutes.
const IDLE: Duration = Duration::from_secs(60 * 60);
/// Most uploads at a time. Each costs an open file.
const MOST: usize = 512;
/// How much is read at a time where content must be hashed again.
const REHASH_BYTES: usize = 1 << 20;

/// All uploads of a registry, by their identifier.
#[derive(Default)]
pub struct Uploads {
    by_id: Mutex<HashMap<String, Arc<Upload>>>,
}

/// One upload. One request at a time may write to it.
pub struct Upload {
    /// Where the blob is to go.
    pub repository: Repository,
    /// Held by the request that writes.
    pub writing: tokio::sync::Mutex<()>,
    content: Mutex<Content>,
}

struct Content {
    file: File,
    /// `None` once the file has become a blob.
    path: Option<TempPath>,
    size: u64,
    hasher: Hasher,
    touched: Instant,
}

impl Uploads {
    /// Adds an upload into an empty file, and returns its identifier. `None` means that there are too many.
    pub fn start(&self, repository: Repository, file: File, path: TempPath) -> Option<(String, Arc<Upload>)> {
        let mut by_id = self.by_id();
        by_id.retain(|_, upload| upload.content().touched.elapsed() < IDLE);
        if by_id.len() >= MOST {
            return None;
        }
        // The temporary file's name is random and unique in its directory, so it serves as the identifier too.
        let id = path.file_name()?.to_str()?.trim_start_matches('.').to_owned();
        let content = Content { file, path: Some(path), size: 0, hasher: Hasher::sha256(), touched: Instant::now() };
        let upload =
            Arc::new(Upload { repository, writing: tokio::sync::Mutex::new(()), content: Mutex::new(content) });
        by_id.insert(id.clone(), Arc::clone(&upload));
        Some((id, upload))
    }

    /// Returns the upload of that identifier, if it goes to `repository`.
    pub fn find(&self, repository: &Repository, id: &str) -> Option<Arc<Upload>> {
        self.by_id().get(id).filter(|upload| upload.repository == *repository).cloned()
    }

    /// Forgets an upload. Its file goes with the last request that uses it.
    pub fn end(&self, id: &str) {
        self.by_id().remove(id);
    }

    /// Forgets all uploads.
    pub fn end_all(&self) {
        self.by_id().clear();
    }

    fn by_id(&self) -> MutexGuard<'_, HashMap<String, Arc<Upload>>> {
        // A map is whole between any two calls of its methods.
        self.by_id.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Upload {
    /// Returns how many bytes have come.
    pub fn size(&self) -> u64 {
        self.content().size
    }

    /// Appends bytes. Blocks on the disk.
    ///
    /// # Errors
    /// They can't be written; those that were are not counted, and are written over.
    pub fn append(&self, chunks: &[Bytes]) -> io::Result<()> {
        let mut content = self.content();
        content.touched = Instant::now();
        let start = content.size;
        content.file.seek(SeekFrom::Start(start))?;
        for chunk in chunks {
            content.file.write_all(chunk)?;
        }
        for chunk in chunks {
            content.hasher.update(chunk);
            content.size += chunk.len() as u64;
        }
        content.touched = Instant::now();
        Ok(())
    }

    /// Checks the content against `digest`, and hands out the file if it is that. Blocks on the disk.
    ///
    /// # Errors
    /// The file can't be read.
    pub fn finish(&self, digest: &Digest) -> io::Result<Option<(File, TempPath)>> {
        let mut content = self.content();
        let actual = match digest {
            Digest::Sha256(_) => content.hasher.clone().finish(),
            // Only SHA-256 is computed on the way; another algorithm costs a second reading.
            Digest::Sha512(_) => {
                let mut hasher = digest.hasher();
                content.file.seek(SeekFrom::Start(0))?;
                let mut rest = (&content.file).take(content.size);
                let mut buffer = vec![0; REHASH_BYTES];
                loop {
                    match rest.read(&mut buffer)? {
                        0 => break hasher.finish(),
                        count => hasher.update(&buffer[..count]),
                    }
                }
            }
        };
        if actual != *digest {
            return Ok(None);
        }
        // A write that failed half-way may have left bytes behind the counted ones.
        content.file.set_len(content.size)?;
        let file = content.file.try_clone()?;
        Ok(content.path.take().map(|path| (file, path)))
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        // `size` and `hasher` change together, without a call that can panic between them.
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
