//! An image of containerd's, to be read: what its store has from there, the rest from where it came from.
//!
//! What this module must not know: how the store is asked.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures_util::{FutureExt as _, StreamExt as _, future::BoxFuture, stream};
use loris_format::{digest::Digest, limits::Limits};
use loris_oci::{
    Descriptor, Document, ImageSource, Reference,
    document::{Kind, Manifest},
    place::{BlobStream, Error},
};
use tokio::sync::OnceCell;

use super::{Origins, Store, origin};
use crate::{locked::lock, proto::images::Image};

/// An image in containerd's store.
pub struct ContainerdSource {
    store: Store,
    reference: Reference,
    origins: Origins,
    limits: Limits,
    image: OnceCell<Image>,
    /// By which references layers that are missing are asked for, as long as they are found by them.
    references: Mutex<HashMap<Digest, Arc<[Reference]>>>,
}

impl ContainerdSource {
    /// Asks nothing yet.
    #[must_use]
    pub fn new(store: Store, reference: Reference, origins: Origins) -> Self {
        let (limits, image, references) = (Limits::default(), OnceCell::new(), Mutex::default());
        Self { store, reference, origins, limits, image, references }
    }

    /// Returns the same for an image that was listed.
    #[must_use]
    pub fn of(store: Store, image: Image, reference: Reference, origins: Origins) -> Self {
        Self { image: OnceCell::from(image), ..Self::new(store, reference, origins) }
    }

    /// The store that it is in.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Returns what the name leads to. Names are kept as their clients wrote them, which is nearly always in full.
    pub(super) async fn image(&self) -> Result<&Image, Error> {
        self.image
            .get_or_try_init(|| async {
                let tagged = self.reference.without_digest();
                let names = [self.reference.canonical(), tagged.canonical(), tagged.to_string()];
                for name in names {
                    if let Some(image) = self.store.image(&name).await? {
                        return Ok(image);
                    }
                }
                Err(self.missing(format!("image {}", self.reference.without_digest().canonical())))
            })
            .await
    }

    fn missing(&self, what: String) -> Error {
        let place = self.store.place();
        let place = format!("containerd ({}, namespace {})", place.address.display(), place.namespace);
        Error::NotFound { what, place }
    }

    /// Returns the descriptor that the name leads to.
    pub(super) async fn target(&self) -> Result<Descriptor, Error> {
        let invalid = |detail: &str| Error::Invalid { what: self.name(), detail: detail.to_owned() };
        let target = self.image().await?.target.as_ref().ok_or_else(|| invalid("its name leads to nothing"))?;
        let digest = target.digest.parse().map_err(|_| invalid("its name leads to no digest"))?;
        let size = u64::try_from(target.size).map_err(|_| invalid("its size is negative"))?;
        Ok(Descriptor::new(target.media_type.clone(), digest, size))
    }

    /// Returns a document that is in the store; `None` where it is not.
    pub(super) async fn stored(&self, descriptor: &Descriptor) -> Result<Option<Document>, Error> {
        if self.store.info(&descriptor.digest).await?.is_none() {
            return Ok(None);
        }
        let limit = descriptor.document_limit(&self.limits);
        if descriptor.size > limit {
            return Err(Error::TooLarge { what: descriptor.digest.to_string(), limit });
        }
        let bytes = self.read(descriptor, 0..descriptor.size).await?;
        Document::verified(bytes, descriptor, &self.name()).map(Some)
    }

    async fn read(&self, descriptor: &Descriptor, range: Range<u64>) -> Result<Bytes, Error> {
        let wanted = range.end.saturating_sub(range.start);
        let mut content = self.store.read(&descriptor.digest, range).await?;
        let mut bytes = BytesMut::new();
        while let Some(piece) = content.next().await {
            bytes.extend_from_slice(&piece?);
            if bytes.len() as u64 > wanted {
                break;
            }
        }
        if bytes.len() as u64 != wanted {
            let detail = format!("expected {wanted} bytes, found {}", bytes.len());
            return Err(Error::Corrupt { what: descriptor.digest.to_string(), place: self.name(), detail });
        }
        Ok(bytes.freeze())
    }

    /// Asks for a layer that is missing by all references by which it may be found, the likely ones first. Those that
    /// have led to it are kept: to find them takes many calls.
    async fn asked_of_origins<'a, T>(
        &self,
        layer: &Descriptor,
        ask: impl Fn(Arc<[Reference]>) -> BoxFuture<'a, Result<T, Error>> + Send + Sync,
    ) -> Result<T, Error> {
        let kept = lock(&self.references).get(&layer.digest).cloned();
        let (is_kept, likely) = match kept {
            Some(kept) => (true, kept),
            None => (false, self.references(layer).await.into()),
        };
        let error = match ask(Arc::clone(&likely)).await {
            Ok(answer) => {
                if !is_kept {
                    lock(&self.references).insert(layer.digest, likely);
                }
                return Ok(answer);
            }
            Err(error) => error,
        };
        lock(&self.references).remove(&layer.digest);
        let mut others = self.others(layer).await;
        others.retain(|other| !likely.iter().any(|likely| likely.name() == other.name()));
        if others.is_empty() {
            return Err(error);
        }
        let answer = ask(others.clone().into()).await.map_err(|_| error)?;
        others.extend(likely.iter().cloned());
        lock(&self.references).insert(layer.digest, others.into());
        Ok(answer)
    }

    /// Returns references by which a layer that is missing is likely to be found.
    async fn references(&self, layer: &Descriptor) -> Vec<Reference> {
        if let Some(known) = self.origins.known(&layer.digest) {
            return vec![known.clone()];
        }
        let mut labels = Vec::new();
        if let Ok(target) = self.target().await {
            let manifest = self.manifests(&target).await.into_iter().map(|(descriptor, _)| descriptor.digest);
            for digest in manifest.chain([target.digest]) {
                if let Ok(Some(info)) = self.store.info(&digest).await {
                    labels.extend(info.labels);
                }
            }
        }
        origin::of(&self.store, layer, &self.reference, labels.into_iter()).await
    }

    /// Returns the names of other images with the same layer.
    async fn others(&self, layer: &Descriptor) -> Vec<Reference> {
        let mut found = Vec::new();
        for image in self.store.images().await.unwrap_or_default() {
            let Ok(reference) = image.name.parse::<Reference>() else { continue };
            let other = Self::of(self.store.clone(), image, reference.clone(), self.origins.clone());
            let Ok(target) = other.target().await else { continue };
            let has_it = |manifest: &Manifest| manifest.layers.iter().any(|known| known.digest == layer.digest);
            if other.manifests(&target).await.iter().any(|(_, manifest)| has_it(manifest)) {
                found.push(reference);
            }
        }
        found
    }

    /// Returns the image's manifests that are in the store. What is not there, or makes no sense, is left out.
    pub(super) async fn manifests(&self, target: &Descriptor) -> Vec<(Descriptor, Manifest)> {
        let mut found = Vec::new();
        let mut left = vec![(target.clone(), 0)];
        // An index may name a child more than once, and so may that.
        let mut seen = HashSet::from([target.digest]);
        while let Some((descriptor, depth)) = left.pop() {
            let Ok(Some(document)) = self.stored(&descriptor).await else { continue };
            match document.parse_kind(&self.limits) {
                Ok(Kind::Manifest(manifest)) => found.push((descriptor, manifest)),
                Ok(Kind::Index(index)) if depth < self.limits.index_depth => {
                    let children = index.manifests.into_iter().filter(Descriptor::is_document);
                    let children = children.filter(|child| seen.insert(child.digest));
                    left.extend(children.map(|child| (child, depth + 1)));
                }
                _ => {}
            }
        }
        found
    }
}

#[async_trait]
impl ImageSource for ContainerdSource {
    fn name(&self) -> String {
        format!("containerd:{}/{}", self.store.place().namespace, self.reference.canonical())
    }

    async fn root(&self) -> Result<Document, Error> {
        let target = self.target().await?;
        if let Some(wanted) = self.reference.digest().filter(|wanted| **wanted != target.digest) {
            let detail = format!("the name leads to {}", target.digest);
            return Err(Error::Invalid { what: format!("{} as {wanted}", self.name()), detail });
        }
        self.stored(&target).await?.ok_or_else(|| self.missing(format!("manifest {}", target.digest)))
    }

    async fn document(&self, descriptor: &Descriptor) -> Result<Document, Error> {
        if let Some(document) = self.stored(descriptor).await? {
            return Ok(document);
        }
        // Manifests of other platforms are not pulled.
        let from = self.origins.source(&self.reference.without_digest()).document(descriptor).await;
        from.map_err(|error| match error {
            Error::NotFound { what, place } => Error::NotFound {
                what,
                place: format!("containerd's store, nor in {place}; --platform takes what is there"),
            },
            error => error,
        })
    }

    async fn blob(&self, descriptor: &Descriptor) -> Result<BlobStream, Error> {
        if self.store.info(&descriptor.digest).await?.is_some() {
            let content = self.store.read(&descriptor.digest, 0..descriptor.size).await?;
            return Ok(verified(content, descriptor, self.name()));
        }
        let ask =
            |references: Arc<[Reference]>| async move { self.origins.blob(descriptor, &references).await }.boxed();
        self.asked_of_origins(descriptor, ask).await
    }

    async fn blob_range(&self, descriptor: &Descriptor, range: Range<u64>) -> Result<Bytes, Error> {
        if self.store.info(&descriptor.digest).await?.is_some() {
            return self.read(descriptor, range).await;
        }
        let ask = |references: Arc<[Reference]>| {
            let range = range.clone();
            async move { self.origins.range(descriptor, range, &references).await }.boxed()
        };
        self.asked_of_origins(descriptor, ask).await
    }

    async fn referrers(&self, digest: &Digest, artifact_type: Option<&str>) -> Result<Vec<Descriptor>, Error> {
        // containerd keeps none. Where the image has a name of this machine only, there are none either.
        let found = self.origins.source(&self.reference.without_digest()).referrers(digest, artifact_type).await;
        Ok(found.unwrap_or_default())
    }

    fn repository(&self) -> Option<(String, String)> {
        Some((self.reference.registry().to_owned(), self.reference.repository().to_owned()))
    }
}

/// Checks size and digest as the bytes pass.
fn verified(content: BlobStream, descriptor: &Descriptor, place: String) -> BlobStream {
    let (digest, size) = (descriptor.digest, descriptor.size);
    let corrupt = move |detail| Error::Corrupt { what: digest.to_string(), place: place.clone(), detail };
    let start = Some((content, digest.hasher(), 0));
    let checked = stream::try_unfold(start, move |state| {
        let corrupt = corrupt.clone();
        async move {
            let Some((mut content, mut hasher, passed)) = state else { return Ok(None) };
            let Some(piece) = content.next().await.transpose()? else {
                let found = hasher.finish();
                return match (passed == size, found == digest) {
                    (true, true) => Ok(None),
                    (false, _) => Err(corrupt(format!("expected {size} bytes, found {passed}"))),
                    (true, false) => Err(corrupt(format!("its bytes have the digest {found}"))),
                };
            };
            hasher.update(&piece);
            let passed = passed + piece.len() as u64;
            if passed > size {
                return Err(corrupt(format!("it is longer than {size} bytes")));
            }
            Ok(Some((piece, Some((content, hasher, passed)))))
        }
    });
    checked.boxed()
}
