//! Manifests and configurations that were read, kept so that an image opens again without its registry.
//!
//! | path | content |
//! |---|---|
//! | `documents/v1/blobs/ALGORITHM-HEX` | a document, as it was served; a digest is its name, and is checked |
//! | `documents/v1/roots/HEX` | what a name led to the last time: digest, a space, media type, a line feed, the name |
//!
//! A root's `HEX` is the SHA-256 of the image's name. What a name leads to is asked for anew each time; only where the
//! registry can't be reached, what it led to the last time counts. A document with a known digest is never asked for twice.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    ops::Range,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;
use bytes::Bytes;
use loris_format::{digest::Digest, limits::Limits};
use loris_oci::{BlobStream, Descriptor, Document, Error, ImageSource, link::Link};

use crate::{
    cache::{NO_FOLLOW, create_private_directory},
    store::Store,
};

/// The folder of documents below the root of a store.
pub const DOCUMENTS: &str = "documents/v1";
/// Most bytes of a root's file: a name and a media type are shorter.
const MOST_ROOT_BYTES: u64 = 4096;

/// A source whose documents are kept in a store.
pub struct Remembering {
    source: Arc<dyn ImageSource>,
    folder: PathBuf,
    limit: u64,
}

impl Remembering {
    /// Puts a store in front of a source.
    #[must_use]
    pub fn new(source: Arc<dyn ImageSource>, store: &Store) -> Self {
        let limits = Limits::default();
        let limit = limits.manifest_bytes.max(limits.config_bytes);
        Self { source, folder: store.root().join(DOCUMENTS), limit }
    }

    fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.folder.join("blobs").join(format!("{}-{}", digest.algorithm(), digest.hex()))
    }

    fn root_path(&self) -> PathBuf {
        self.folder.join("roots").join(Digest::sha256_of(self.source.name().as_bytes()).hex())
    }

    fn known(&self, digest: &Digest, media_type: &str) -> Option<Document> {
        let bytes = read(&self.blob_path(digest), self.limit).ok()?;
        digest.matches(&bytes).then(|| Document {
            media_type: media_type.to_owned(),
            digest: *digest,
            bytes: bytes.into(),
        })
    }

    fn known_root(&self) -> Option<Document> {
        let text = String::from_utf8(read(&self.root_path(), MOST_ROOT_BYTES).ok()?).ok()?;
        let (first, name) = text.split_once('\n')?;
        let (digest, media_type) = first.split_once(' ')?;
        (name == self.source.name()).then(|| self.known(&digest.parse().ok()?, media_type)).flatten()
    }

    /// Keeps a document. What can't be kept is asked for again.
    fn keep(&self, document: &Document, is_root: bool) {
        let kept = write(&self.blob_path(&document.digest), &document.bytes).and_then(|()| {
            let line = format!("{} {}\n{}", document.digest, document.media_type, self.source.name());
            let is_kept = !is_root || document.media_type.contains(['\n', ' ']) || line.len() as u64 > MOST_ROOT_BYTES;
            if is_kept { Ok(()) } else { write(&self.root_path(), line.as_bytes()) }
        });
        if let Err(error) = kept {
            tracing::debug!(%error, digest = %document.digest, "a document could not be kept");
        }
    }
}

#[async_trait]
impl ImageSource for Remembering {
    fn name(&self) -> String {
        self.source.name()
    }

    async fn root(&self) -> Result<Document, Error> {
        match self.source.root().await {
            Ok(document) => {
                self.keep(&document, true);
                Ok(document)
            }
            Err(error) if error.is_transient() => match self.known_root() {
                Some(document) => {
                    tracing::warn!(%error, digest = %document.digest,
                        "the registry can't be reached; the image is what its name led to the last time");
                    Ok(document)
                }
                None => Err(error),
            },
            Err(error) => Err(error),
        }
    }

    async fn document(&self, descriptor: &Descriptor) -> Result<Document, Error> {
        if let Some(document) = self.known(&descriptor.digest, &descriptor.media_type)
            && document.bytes.len() as u64 == descriptor.size
        {
            return Ok(document);
        }
        let document = self.source.document(descriptor).await?;
        self.keep(&document, false);
        Ok(document)
    }

    async fn manifest_named(&self, digest: &Digest) -> Result<Document, Error> {
        if let Some(document) = self.known(digest, "") {
            return Document::verified(document.bytes.clone(), &document.descriptor(), "the store");
        }
        let document = self.source.manifest_named(digest).await?;
        self.keep(&document, false);
        Ok(document)
    }

    async fn blob(&self, descriptor: &Descriptor) -> Result<BlobStream, Error> {
        self.source.blob(descriptor).await
    }

    async fn blob_range(&self, descriptor: &Descriptor, range: Range<u64>) -> Result<Bytes, Error> {
        self.source.blob_range(descriptor, range).await
    }

    async fn blob_range_pieces(
        &self,
        descriptor: &Descriptor,
        range: Range<u64>,
        take: &mut (dyn FnMut(Bytes) + Send),
    ) -> Result<(), Error> {
        self.source.blob_range_pieces(descriptor, range, take).await
    }

    async fn referrers(&self, digest: &Digest, artifact_type: Option<&str>) -> Result<Vec<Descriptor>, Error> {
        self.source.referrers(digest, artifact_type).await
    }

    fn repository(&self) -> Option<(String, String)> {
        self.source.repository()
    }

    fn link(&self) -> Option<Link> {
        self.source.link()
    }

    fn distrust_range(&self, descriptor: &Descriptor, range: Range<u64>) -> bool {
        self.source.distrust_range(descriptor, range)
    }
}

pub(crate) fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let file = File::options().read(true).custom_flags(NO_FOLLOW).open(path)?;
    let mut bytes = Vec::new();
    if file.metadata()?.is_file() {
        file.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    }
    if bytes.len() as u64 > limit {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(bytes)
}

/// Writes a file in one step.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if path.metadata().is_ok_and(|metadata| metadata.len() == bytes.len() as u64)
        && read(path, bytes.len() as u64)? == bytes
    {
        return Ok(());
    }
    let folder = path.parent().unwrap_or(Path::new("/"));
    create_private_directory(folder)?;
    let mut file = tempfile::Builder::new().prefix(".unfinished-").tempfile_in(folder)?;
    file.write_all(bytes)?;
    file.persist(path).map(drop).map_err(|error| error.error)
}
