//! An image in a registry, as a source and as a sink.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    path::Path,
    sync::{Mutex, PoisonError},
};

use async_trait::async_trait;
use bytes::Bytes;
use loris_format::digest::Digest;

use super::{ManifestName, Repository, upload::Session};
use crate::{
    Reference,
    document::{Descriptor, Document},
    link::Link,
    place::{BlobStream, Error, ImageSink, ImageSource},
};

/// An image in a registry, to be read.
#[derive(Clone)]
pub struct RegistrySource {
    repository: Repository,
    reference: Reference,
}

/// An image in a registry, to be written.
pub struct RegistrySink {
    repository: Repository,
    reference: Reference,
    /// Uploads that registries have begun where they were asked to mount.
    begun: Mutex<HashMap<Digest, Session>>,
}

impl RegistrySource {
    pub(super) fn new(repository: Repository, reference: Reference) -> Self {
        Self { repository, reference }
    }

    /// Returns the repository, for what goes beyond one image.
    #[must_use]
    pub fn in_repository(&self) -> &Repository {
        &self.repository
    }
}

impl RegistrySink {
    pub(super) fn new(repository: Repository, reference: Reference) -> Self {
        Self { repository, reference, begun: Mutex::default() }
    }

    /// Returns the repository, for what goes beyond one image.
    #[must_use]
    pub fn in_repository(&self) -> &Repository {
        &self.repository
    }

    fn begun(&self, digest: &Digest) -> Option<Session> {
        self.begun.lock().unwrap_or_else(PoisonError::into_inner).remove(digest)
    }
}

/// Returns what a manifest is asked for by: the digest where there is one, since the tag is only carried along then.
fn manifest_name(reference: &Reference) -> ManifestName<'_> {
    match (reference.digest(), reference.tag()) {
        (Some(digest), _) => ManifestName::Digest(digest),
        (None, tag) => ManifestName::Tag(tag.unwrap_or(crate::reference::DEFAULT_TAG)),
    }
}

#[async_trait]
impl ImageSource for RegistrySource {
    fn name(&self) -> String {
        self.reference.to_string()
    }

    async fn root(&self) -> Result<Document, Error> {
        self.repository.manifest(manifest_name(&self.reference)).await
    }

    async fn document(&self, descriptor: &Descriptor) -> Result<Document, Error> {
        self.repository.document(descriptor).await
    }

    async fn manifest_named(&self, digest: &Digest) -> Result<Document, Error> {
        self.repository.manifest(ManifestName::Digest(digest)).await
    }

    async fn blob(&self, descriptor: &Descriptor) -> Result<BlobStream, Error> {
        Ok(self.repository.blob(descriptor))
    }

    async fn blob_range(&self, descriptor: &Descriptor, range: Range<u64>) -> Result<Bytes, Error> {
        self.repository.blob_range(descriptor, range).await
    }

    async fn blob_range_pieces(
        &self,
        descriptor: &Descriptor,
        range: Range<u64>,
        take: &mut (dyn FnMut(Bytes) + Send),
    ) -> Result<(), Error> {
        self.repository.blob_range_pieces(descriptor, range, take).await
    }

    async fn referrers(&self, digest: &Digest, artifact_type: Option<&str>) -> Result<Vec<Descriptor>, Error> {
        self.repository.referrers(digest, artifact_type).await
    }

    fn repository(&self) -> Option<(String, String)> {
        Some((self.repository.registry().to_owned(), self.repository.name().to_owned()))
    }

    fn link(&self) -> Option<Link> {
        self.repository.link()
    }

    fn distrust_range(&self, descriptor: &Descriptor, range: Range<u64>) -> bool {
        self.repository.distrust_range(descriptor, &range)
    }
}

#[async_trait]
impl ImageSink for RegistrySink {
    fn name(&self) -> String {
        self.reference.to_string()
    }

    async fn has_blob(&self, descriptor: &Descriptor) -> Result<bool, Error> {
        self.repository.has_blob(descriptor).await
    }

    async fn mount_blob(&self, descriptor: &Descriptor, (registry, from): (&str, &str)) -> Result<bool, Error> {
        if registry != self.repository.registry() || from == self.repository.name() {
            return Ok(false);
        }
        match self.repository.mount(&descriptor.digest, from).await? {
            Ok(()) => Ok(true),
            Err(session) => {
                let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
                begun.extend(session.map(|session| (descriptor.digest, session)));
                Ok(false)
            }
        }
    }

    async fn put_blob(&self, descriptor: &Descriptor, content: BlobStream) -> Result<(), Error> {
        self.repository.put_stream(descriptor, content, self.begun(&descriptor.digest)).await
    }

    async fn put_blob_file(&self, descriptor: &Descriptor, file: &Path) -> Result<(), Error> {
        self.repository.put_file(descriptor, file, self.begun(&descriptor.digest)).await
    }

    async fn put_manifest(&self, document: &Document) -> Result<(), Error> {
        self.repository.put_manifest(ManifestName::Digest(&document.digest), document).await
    }

    /// Annotations of the root's descriptor have no place in a registry and are dropped.
    async fn commit(&self, root: &Document, _annotations: &BTreeMap<String, String>) -> Result<(), Error> {
        if let Some(digest) = self.reference.digest().filter(|digest| **digest != root.digest) {
            let detail = format!("the image to be stored there is {}", root.digest);
            return Err(Error::Invalid { what: format!("{}@{digest}", self.reference.name()), detail });
        }
        match self.reference.tag() {
            Some(tag) => self.repository.put_manifest(ManifestName::Tag(tag), root).await,
            None => self.repository.put_manifest(ManifestName::Digest(&root.digest), root).await,
        }
    }
}
