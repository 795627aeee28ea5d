//! Hashing again what is here already: all of a layer on demand, and, for the paranoid, everything before its first use.
//!
//! A disk can lose bits. What turns out wrong is logged and its bit is taken away, so that the next read fetches it again,
//! in this process and, a moment later, in others.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt as _, sync::Arc};

use loris_format::{digest::Digest, index::Extent, limits::Limits};

use crate::{
    census::StoredLayer,
    error::{EnsureError, StoreError, path_of},
    kept::saved_index,
    layer::LazyLayer,
    store::Store,
};

/// What is read at once to be hashed.
pub(crate) const HASH_BYTES: usize = 512 << 10;

/// What checking a layer came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// Extents that were hashed.
    pub extents: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Extents that no digest is known of.
    pub without_digest: u64,
    /// What was wrong. It will be fetched again.
    pub faults: Vec<Fault>,
}

/// A piece of a file that is not on the disk as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The file, as a path in the layer.
    pub path: String,
    /// Where the piece begins in the file, in bytes.
    pub offset: u64,
    /// Its length, in bytes.
    pub length: u64,
    /// What it must hash to.
    pub expected: Digest,
}

impl Store {
    /// Hashes everything that is here of a layer, and gives up what is not right. Blocks for as long as reading it takes.
    /// May be called while the layer is in use. Nothing is checked of one that was removed meanwhile.
    ///
    /// # Errors
    /// Where its table of contents is not here, or its files can't be read or written.
    pub fn verify(&self, layer: &StoredLayer, limits: &Limits) -> Result<Checked, StoreError> {
        let directory = &layer.directory;
        if !directory.join("lock").exists() {
            return Ok(Checked::default());
        }
        let unreadable = || StoreError::NoTableOfContents { path: directory.clone() };
        let (Ok(blob), Ok(toc)) = (layer.blob.parse::<Digest>(), layer.toc.parse::<Digest>()) else {
            return Err(unreadable());
        };
        let index = saved_index(directory, toc, limits).ok_or_else(unreadable)?;
        let cache = self.layer(directory, &blob, &index)?;
        let failed = |error| StoreError::file(directory)(error);
        cache.check_length(&index).map_err(failed)?;
        let mut checked = Checked::default();
        let mut wrong = Vec::new();
        let mut buffer = vec![0; HASH_BYTES];
        for (number, extent) in index.extents().iter().enumerate() {
            if !cache.filled().contains(number) {
                continue;
            }
            let Some(expected) = extent.digest else {
                checked.without_digest += 1;
                continue;
            };
            checked.extents += 1;
            checked.bytes = checked.bytes.saturating_add(extent.length);
            // Twice, since it may be written anew just now.
            let mut is_right = || hashes_to(cache.data(), extent, &expected, &mut buffer);
            if is_right().map_err(failed)? || is_right().map_err(failed)? {
                cache.note_checked([number]);
                continue;
            }
            wrong.push(number);
            let (path, offset) = (path_of(&index, extent.node), extent.file_offset.0);
            checked.faults.push(Fault { path, offset, length: extent.length, expected });
        }
        if !wrong.is_empty() {
            cache.forget(&wrong).map_err(failed)?;
        }
        drop(cache);
        if !layer.in_use {
            // To look at it is not to use it.
            let lock = File::options().write(true).open(directory.join("lock"));
            let _ = lock.and_then(|lock| lock.set_modified(layer.last_used));
        }
        Ok(checked)
    }
}

impl LazyLayer {
    /// Where this process believes no disk: hashes what is filled of some extents and was not looked at before, and gives
    /// up what is not right.
    pub(crate) async fn recheck(self: &Arc<Self>, extents: Range<usize>) -> Result<(), EnsureError> {
        if self.cache.unchecked(extents.clone()).is_none() {
            return Ok(());
        }
        let layer = Arc::clone(self);
        match tokio::task::spawn_blocking(move || layer.recheck_now(extents)).await {
            Ok(result) => result.map_err(|error| self.file_error(error)),
            Err(_) => Err(EnsureError::Interrupted { layer: self.digest }),
        }
    }

    fn recheck_now(&self, mut extents: Range<usize>) -> io::Result<()> {
        let mut buffer = vec![0; HASH_BYTES];
        while let Some(number) = self.cache.unchecked(extents.clone()) {
            extents.start = number + 1;
            if !self.cache.filled().contains(number) {
                continue;
            }
            let extent = self.extent(number);
            let is_right = match &extent.digest {
                Some(digest) => hashes_to(self.cache.data(), extent, digest, &mut buffer)?,
                None => true,
            };
            if is_right {
                self.cache.note_checked([number]);
            } else {
                let path = path_of(&self.index, extent.node);
                tracing::error!(layer = %self.digest, path, offset = extent.file_offset.0, store = %self.directory().display(),
                    "the disk does not have what was written to it; fetching it again");
                self.cache.forget(&[number])?;
            }
        }
        Ok(())
    }
}

/// Says whether an extent's bytes are in a data file. A file that is too short, or that the disk can't read, has not got
/// them.
pub(crate) fn hashes_to(data: &File, extent: &Extent, digest: &Digest, buffer: &mut [u8]) -> io::Result<bool> {
    let mut hasher = digest.hasher();
    let mut done = 0;
    while done < extent.length {
        let part = usize::try_from(extent.length - done).map_or(buffer.len(), |left| left.min(buffer.len()));
        match data.read_exact_at(&mut buffer[..part], extent.data.0 + done) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => return Ok(false),
            Err(error) => return Err(error),
        }
        hasher.update(&buffer[..part]);
        done += part as u64;
    }
    Ok(hasher.finish() == *digest)
}
