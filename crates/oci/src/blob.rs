//! Blobs in local files, read with verification.

use std::{fs::File, ops::Range, os::unix::fs::FileExt as _, path::Path, sync::Arc};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use loris_format::digest::{Digest, Hasher};

use crate::{
    document::{Descriptor, Document},
    place::{BlobStream, Error},
};

/// Files are read, hashed and written in pieces of this many bytes: large enough that handing a piece to another thread
/// costs nothing beside hashing it.
pub(crate) const PIECE_BYTES: usize = 1 << 20;

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

pub(crate) fn check_digest(hasher: Hasher, expected: &Digest, place: &str) -> Result<(), Error> {
    let found = hasher.finish();
    if found == *expected {
        return Ok(());
    }
    let detail = format!("its bytes have the digest {found}");
    Err(Error::Corrupt { what: expected.to_string(), place: place.to_owned(), detail })
}
