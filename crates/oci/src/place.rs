//! The two traits of a place that holds images, and the one error that they answer with.

use std::{collections::BTreeMap, ops::Range, path::Path, pin::Pin};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::Stream;
use loris_format::digest::Digest;

use crate::{
    document::{Descriptor, Document},
    link::Link,
};

/// A blob's bytes, in order. A source checks size and digest as they pass: the stream ends in an error where they differ,
/// so that a consumer who reaches the end without one has read the right bytes.
pub type BlobStream = Pin<Box<dyn Stream<Item = Result<Bytes, Error>> + Send>>;

/// A place that an image can be read from, and the one image in it that was named.
#[async_trait]
pub trait ImageSource: Send + Sync {
    /// Returns the name, as the user would type it, for messages.
    fn name(&self) -> String;

    /// Returns the document that the name leads to: an index or a manifest.
    async fn root(&self) -> Result<Document, Error>;

    /// Returns a document that a descriptor leads to, verified against it and bounded in size
    /// ([`loris_format::limits::Limits::manifest_bytes`], `config_bytes`).
    async fn document(&self, descriptor: &Descriptor) -> Result<Document, Error>;

    /// Returns a manifest of which only the digest is known. The name must lead to an index that has it, unless the place
    /// finds manifests by their digests.
    async fn manifest_named(&self, digest: &Digest) -> Result<Document, Error> {
        let root = self.root().await?;
        if root.digest == *digest {
            return Ok(root);
        }
        let limits = loris_format::limits::Limits::default();
        let entries = match root.parse_kind(&limits)? {
            crate::document::Kind::Index(index) => index.manifests,
            crate::document::Kind::Manifest(_) => Vec::new(),
        };
        match entries.iter().find(|entry| entry.digest == *digest) {
            Some(descriptor) => self.document(descriptor).await,
            None => Err(Error::NotFound { what: format!("manifest {digest}"), place: self.name() }),
        }
    }

    /// Returns a blob, from its first byte. Verified as it passes; resumed where the connection breaks.
    async fn blob(&self, descriptor: &Descriptor) -> Result<BlobStream, Error>;

    /// Returns bytes of a blob, exactly `range.end - range.start` of them. They are *not* verified: a range has no
    /// digest. `range` must lie inside `0..descriptor.size`.
    async fn blob_range(&self, descriptor: &Descriptor, range: Range<u64>) -> Result<Bytes, Error>;

    /// Hands the bytes that [`ImageSource::blob_range`] returns to `take` as they arrive: in order, in pieces. Where it
    /// fails, what was handed out before is as good as ever.
    async fn blob_range_pieces(
        &self,
        descriptor: &Descriptor,
        range: Range<u64>,
        take: &mut (dyn FnMut(Bytes) + Send),
    ) -> Result<(), Error> {
        take(self.blob_range(descriptor, range).await?);
        Ok(())
    }

    /// Returns the descriptors of the manifests whose `subject` is `digest`, of the given artifact type or of any.
    async fn referrers(&self, digest: &Digest, artifact_type: Option<&str>) -> Result<Vec<Descriptor>, Error>;

    /// Returns the repository that blobs can be mounted from, for a sink in the same registry: (registry host, repository).
    fn repository(&self) -> Option<(String, String)> {
        None
    }

    /// Returns what is known of the way that ranges come from now: `None` while nothing has been measured, and where the
    /// source is local.
    fn link(&self) -> Option<Link> {
        None
    }

    /// Takes note that bytes of a range proved wrong, as only the caller can know: a source with more than one host asks
    /// another one first when bytes of that range are asked for again. Says whether there is one; does nothing where there
    /// is no choice.
    fn distrust_range(&self, descriptor: &Descriptor, range: Range<u64>) -> bool {
        let _ = (descriptor, range);
        false
    }
}

/// A place that one image is written to. Nothing is visible under the image's name before [`ImageSink::commit`].
#[async_trait]
pub trait ImageSink: Send + Sync {
    /// Returns the name, as the user would type it, for messages and the `REF@sha256:...` line.
    fn name(&self) -> String;

    /// Says whether the place has a blob already (so that it need not be sent).
    async fn has_blob(&self, descriptor: &Descriptor) -> Result<bool, Error>;

    /// Tries to take a blob from another repository of the same registry without sending it; `false` where that can't be
    /// done.
    async fn mount_blob(&self, descriptor: &Descriptor, from: (&str, &str)) -> Result<bool, Error>;

    /// Stores a blob. Size and digest are checked; where they differ nothing is stored.
    async fn put_blob(&self, descriptor: &Descriptor, content: BlobStream) -> Result<(), Error>;

    /// Stores a blob that is in a file (so that an upload can be begun again after a failure).
    async fn put_blob_file(&self, descriptor: &Descriptor, file: &Path) -> Result<(), Error>;

    /// Stores a manifest or an index. With a `subject` it becomes a referrer, also in registries without that API.
    async fn put_manifest(&self, document: &Document) -> Result<(), Error>;

    /// Makes `root` what the name leads to, with annotations for its descriptor where the place keeps one (a layout's
    /// `index.json`). Everything it leads to must have been put. Archives are written here, layouts get their entry.
    async fn commit(&self, root: &Document, annotations: &BTreeMap<String, String>) -> Result<(), Error>;
}

/// Why an image could not be read or written. Messages are fragments that fit `failed to ...: {error}`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// What was asked for is not there.
    #[error("{what} is not in {place}")]
    NotFound {
        /// A tag, manifest or blob.
        what: String,
        /// The source's name.
        place: String,
    },
    /// The image is there, but not for this platform.
    #[error("{place} has no image for {wanted}; it has {available}")]
    NoPlatform {
        /// The platform that was asked for.
        wanted: String,
        /// The source's name.
        place: String,
        /// What there is, as a list.
        available: String,
    },
    /// More than one image fits.
    #[error("{place} has more than one thing that could be {what}; choose one of {choices}")]
    Ambiguous {
        /// What was asked for.
        what: String,
        /// The source's name.
        place: String,
        /// What there is, as a list.
        choices: String,
    },
    /// Credentials are missing or not good enough.
    #[error("{place} refused access ({detail}); {remedy}")]
    Denied {
        /// Registry and repository.
        place: String,
        /// The registry's words.
        detail: String,
        /// What can be done about it.
        remedy: &'static str,
    },
    /// Bytes are not what their digest or size says.
    #[error("{what} from {place} is corrupt: {detail}")]
    Corrupt {
        /// A digest or a part of the layout.
        what: String,
        /// The source's name.
        place: String,
        /// Expected and found.
        detail: String,
    },
    /// A document or reference that means nothing.
    #[error("{what} is not valid: {detail}")]
    Invalid {
        /// The document or text.
        what: String,
        /// What is wrong, and where.
        detail: String,
    },
    /// Larger than a bound of ours.
    #[error("{what} is larger than the limit of {limit} bytes")]
    TooLarge {
        /// The document.
        what: String,
        /// The bound, in bytes.
        limit: u64,
    },
    /// The place can't do that, or we can't do it there.
    #[error("{place} does not support {what}")]
    Unsupported {
        /// The operation.
        what: String,
        /// The place.
        place: String,
    },
    /// A registry that answers with an error or not as the specification says.
    #[error("{method} {url}: {detail}")]
    Registry {
        /// The request's method.
        method: String,
        /// The request's address, without credentials or signed query.
        url: String,
        /// The status, if one came.
        status: Option<u16>,
        /// The registry's own list of errors, or what is wrong with the answer.
        detail: String,
        /// Whether trying again can help.
        transient: bool,
    },
    /// A local file.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
}

impl Error {
    /// Says whether trying again can help. Sources have tried again themselves before they answer with an error.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Registry { transient: true, .. })
    }
}
