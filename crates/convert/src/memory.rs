//! A place for images in memory, for tests.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    path::Path,
    sync::{Mutex, MutexGuard},
};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use loris_format::{digest::Digest, limits::Limits};
use loris_oci::{
    BlobStream, Descriptor, Document, Error, ImageSink, ImageSource,
    document::{Kind, media_type},
};

/// An image and everything that belongs to it.
#[derive(Default)]
pub(crate) struct Memory {
    state: Mutex<State>,
    /// Registry and repository that it plays.
    repository: Option<(&'static str, &'static str)>,
    /// Whether blobs can be taken over by name.
    mounts: bool,
}

#[derive(Default, Clone)]
struct State {
    blobs: HashMap<Digest, Bytes>,
    documents: HashMap<Digest, Document>,
    root: Option<Digest>,
    /// Blobs that were sent, in order.
    sent: Vec<Digest>,
}

impl Memory {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Plays a repository of a registry.
    pub(crate) fn in_registry(registry: &'static str, repository: &'static str) -> Self {
        Self { repository: Some((registry, repository)), mounts: true, ..Self::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn add_blob(&self, media_type: &str, bytes: impl Into<Bytes>) -> Descriptor {
        let bytes = bytes.into();
        let digest = Digest::sha256_of(&bytes);
        let descriptor = Descriptor::new(media_type, digest, bytes.len() as u64);
        self.state().blobs.insert(digest, bytes);
        descriptor
    }

    pub(crate) fn add_document(&self, text: &str) -> Document {
        let document = Document::new("", text.to_owned().into()).unwrap();
        self.state().documents.insert(document.digest, document.clone());
        document
    }

    pub(crate) fn set_root(&self, document: &Document) {
        self.state().root = Some(document.digest);
    }

    pub(crate) fn blob_bytes(&self, digest: &Digest) -> Option<Bytes> {
        self.state().blobs.get(digest).cloned()
    }

    pub(crate) fn stored(&self, digest: &Digest) -> Option<Document> {
        self.state().documents.get(digest).cloned()
    }

    pub(crate) fn sent(&self) -> usize {
        self.state().sent.len()
    }

    /// Flips a bit in the middle of a blob, without anybody noticing its digest.
    pub(crate) fn damage(&self, digest: &Digest, place: usize) {
        let mut state = self.state();
        let mut bytes = state.blobs[digest].to_vec();
        bytes[place] ^= 1;
        state.blobs.insert(*digest, bytes.into());
    }

    pub(crate) fn lose(&self, digest: &Digest) {
        self.state().blobs.remove(digest);
    }

    fn missing(&self, digest: &Digest) -> Error {
        Error::NotFound { what: digest.to_string(), place: self.name_of() }
    }

    #[expect(clippy::unused_self, reason = "reads as the name of this place")]
    fn name_of(&self) -> String {
        "memory".to_owned()
    }

    fn content(&self, descriptor: &Descriptor) -> Result<Bytes, Error> {
        let bytes = self.blob_bytes(&descriptor.digest).ok_or_else(|| self.missing(&descriptor.digest))?;
        assert_eq!(bytes.len() as u64, descriptor.size, "{}", descriptor.digest);
        Ok(bytes)
    }
}

#[async_trait]
impl ImageSource for Memory {
    fn name(&self) -> String {
        self.name_of()
    }

    async fn root(&self) -> Result<Document, Error> {
        let state = self.state();
        Ok(state.documents[&state.root.unwrap()].clone())
    }

    async fn document(&self, descriptor: &Descriptor) -> Result<Document, Error> {
        if let Some(document) = self.stored(&descriptor.digest) {
            return Ok(document);
        }
        Document::verified(self.content(descriptor)?, descriptor, "memory")
    }

    async fn blob(&self, descriptor: &Descriptor) -> Result<BlobStream, Error> {
        let content = self.content(descriptor)?;
        // As real sources do: an error at the end where the digest differs.
        let end = if descriptor.digest.matches(&content) {
            Vec::new()
        } else {
            vec![Err(Error::Corrupt {
                what: descriptor.digest.to_string(),
                place: self.name_of(),
                detail: "flipped".into(),
            })]
        };
        let pieces: Vec<_> = content.chunks(10_000).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
        Ok(stream::iter(pieces.into_iter().chain(end)).boxed())
    }

    async fn blob_range(&self, descriptor: &Descriptor, range: Range<u64>) -> Result<Bytes, Error> {
        Ok(self.content(descriptor)?.slice(range.start as usize..range.end as usize))
    }

    async fn referrers(&self, digest: &Digest, _: Option<&str>) -> Result<Vec<Descriptor>, Error> {
        let mut found: Vec<Descriptor> = self
            .state()
            .documents
            .values()
            .filter(|document| {
                let kind = document.parse_kind(&Limits::default()).unwrap();
                kind.subject().is_some_and(|subject| subject.digest == *digest)
            })
            .map(Document::descriptor)
            .collect();
        found.sort_by_key(|descriptor| descriptor.digest);
        Ok(found)
    }

    fn repository(&self) -> Option<(String, String)> {
        self.repository.map(|(registry, repository)| (registry.to_owned(), repository.to_owned()))
    }
}

#[async_trait]
impl ImageSink for Memory {
    fn name(&self) -> String {
        self.name_of()
    }

    async fn has_blob(&self, descriptor: &Descriptor) -> Result<bool, Error> {
        Ok(self.blob_bytes(&descriptor.digest).is_some())
    }

    async fn mount_blob(&self, descriptor: &Descriptor, from: (&str, &str)) -> Result<bool, Error> {
        let possible = self.mounts && self.repository.is_some_and(|(registry, _)| registry == from.0);
        if possible {
            self.state().blobs.insert(descriptor.digest, Bytes::new());
        }
        Ok(possible)
    }

    async fn put_blob(&self, descriptor: &Descriptor, content: BlobStream) -> Result<(), Error> {
        let bytes: Vec<Bytes> = content.try_collect().await?;
        let bytes = bytes.concat();
        assert!(descriptor.digest.matches(&bytes) && descriptor.size == bytes.len() as u64);
        let mut state = self.state();
        state.blobs.insert(descriptor.digest, bytes.into());
        state.sent.push(descriptor.digest);
        Ok(())
    }

    async fn put_blob_file(&self, descriptor: &Descriptor, file: &Path) -> Result<(), Error> {
        let bytes = Bytes::from(std::fs::read(file).unwrap());
        self.put_blob(descriptor, stream::once(async { Ok(bytes) }).boxed()).await
    }

    async fn put_manifest(&self, document: &Document) -> Result<(), Error> {
        assert!(document.digest.matches(&document.bytes));
        let has = |descriptor: &Descriptor| {
            let state = self.state();
            assert!(
                state.blobs.contains_key(&descriptor.digest)
                    || state.documents.contains_key(&descriptor.digest)
                    || !descriptor.urls.is_empty(),
                "{} leads to {}, which is not there",
                document.digest,
                descriptor.digest
            );
        };
        match document.parse_kind(&Limits::default()).unwrap() {
            Kind::Manifest(manifest) => manifest.layers.iter().chain([&manifest.config]).for_each(has),
            Kind::Index(index) => index.manifests.iter().for_each(has),
        }
        self.state().documents.insert(document.digest, document.clone());
        Ok(())
    }

    async fn commit(&self, root: &Document, _: &BTreeMap<String, String>) -> Result<(), Error> {
        assert!(media_type::is_index(&root.media_type) || media_type::is_manifest(&root.media_type));
        assert!(self.stored(&root.digest).is_some());
        self.set_root(root);
        Ok(())
    }
}
