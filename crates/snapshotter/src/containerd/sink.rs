//! An image of containerd's, to be written: blobs under a lease first, labels that hold them next, the name last.
//!
//! What this module must not know: where anything comes from.

use std::{collections::BTreeMap, path::Path, sync::Mutex};

use async_trait::async_trait;
use futures_util::{StreamExt as _, stream};
use loris_format::limits::Limits;
use loris_oci::{
    Descriptor, Document, ImageSink, Reference,
    document::{Kind, media_type},
    place::{BlobStream, Error},
};
use tokio::sync::OnceCell;

use super::Store;
use crate::locked::lock;

/// Holds what a document leads to: another label for each.
const GC_LABEL: &str = "containerd.io/gc.ref.content.";
/// Says where content came from, so that whoever pushes it takes it over by name.
const SOURCE_LABEL: &str = "containerd.io/distribution.source.";
/// Files are read in pieces.
const PIECE_BYTES: usize = 1 << 20;

/// An image in containerd's store.
pub struct ContainerdSink {
    store: Store,
    reference: Reference,
    limits: Limits,
    leased: OnceCell<Store>,
    /// The repository that the content comes from.
    from: Mutex<Option<(String, String)>>,
}

impl ContainerdSink {
    /// Writes nothing yet.
    #[must_use]
    pub fn new(store: Store, reference: Reference) -> Self {
        Self { store, reference, limits: Limits::default(), leased: OnceCell::new(), from: Mutex::default() }
    }

    /// The store, with a lease.
    pub(super) async fn leased(&self) -> Result<&Store, Error> {
        self.leased.get_or_try_init(|| self.store.leased()).await
    }

    /// Ends the lease: what was written must be held by something else, or is garbage.
    pub async fn end(&self) {
        if let Some(leased) = self.leased.get() {
            leased.end_lease().await;
        }
    }

    /// Makes a manifest or index in the store hold what it leads to, as far as that is not so already.
    pub(super) async fn hold_children(&self, document: &Document) -> Result<(), Error> {
        let Some(info) = self.store.info(&document.digest).await? else { return Ok(()) };
        let held: Vec<&String> =
            info.labels.iter().filter(|(name, _)| name.starts_with(GC_LABEL)).map(|(_, to)| to).collect();
        let mut wanted = self.children(document)?;
        wanted.retain(|_, child| !held.contains(&&*child));
        // Under names that nothing else has.
        let taken = |name: &String| info.labels.contains_key(name);
        let wanted = wanted
            .into_iter()
            .map(|(name, child)| if taken(&name) { (format!("{name}.loris"), child) } else { (name, child) });
        self.store.label(&document.digest, wanted.collect()).await
    }

    /// Returns the labels by which a document holds what it leads to, named as containerd names them.
    fn children(&self, document: &Document) -> Result<BTreeMap<String, String>, Error> {
        let mut labels = BTreeMap::new();
        match document.parse_kind(&self.limits)? {
            Kind::Index(index) => {
                for (number, child) in index.manifests.iter().enumerate() {
                    labels.insert(format!("{GC_LABEL}m.{number}"), child.digest.to_string());
                }
            }
            Kind::Manifest(manifest) => {
                labels.insert(format!("{GC_LABEL}config"), manifest.config.digest.to_string());
                for (number, layer) in manifest.layers.iter().enumerate() {
                    labels.insert(format!("{GC_LABEL}l.{number}"), layer.digest.to_string());
                }
            }
        }
        Ok(labels)
    }

    fn source_label(&self) -> BTreeMap<String, String> {
        let from = lock(&self.from);
        let label = |(registry, repository): &(String, String)| {
            let host = registry.rsplit_once(':').map_or(registry.as_str(), |(host, _)| host);
            (format!("{SOURCE_LABEL}{host}"), repository.clone())
        };
        from.iter().map(label).collect()
    }
}

#[async_trait]
impl ImageSink for ContainerdSink {
    fn name(&self) -> String {
        format!("containerd:{}/{}", self.store.place().namespace, self.reference.canonical())
    }

    async fn has_blob(&self, descriptor: &Descriptor) -> Result<bool, Error> {
        let leased = self.leased().await?;
        // Held first: what is looked at before may be collected in between. A lease may hold what is not there.
        leased.hold(&descriptor.digest).await?;
        Ok(leased.info(&descriptor.digest).await?.is_some())
    }

    /// Nothing can be mounted, but where content comes from is worth knowing.
    async fn mount_blob(&self, _: &Descriptor, (registry, repository): (&str, &str)) -> Result<bool, Error> {
        let from = Some((registry.to_owned(), repository.to_owned()));
        *lock(&self.from) = from;
        Ok(false)
    }

    async fn put_blob(&self, descriptor: &Descriptor, content: BlobStream) -> Result<(), Error> {
        self.leased().await?.write(descriptor, content, self.source_label()).await
    }

    async fn put_blob_file(&self, descriptor: &Descriptor, file: &Path) -> Result<(), Error> {
        let path = file.display().to_string();
        let failed = move |source| Error::File { path: path.clone(), source };
        let file = tokio::fs::File::open(file).await.map_err(&failed)?;
        let pieces = stream::try_unfold(file, move |mut file| {
            let failed = failed.clone();
            async move {
                let mut piece = bytes::BytesMut::with_capacity(PIECE_BYTES);
                let read = tokio::io::AsyncReadExt::read_buf(&mut file, &mut piece).await.map_err(&failed)?;
                Ok((read > 0).then(|| (piece.freeze(), file)))
            }
        });
        self.put_blob(descriptor, pieces.boxed()).await
    }

    async fn put_manifest(&self, document: &Document) -> Result<(), Error> {
        let mut labels = self.children(document)?;
        labels.extend(self.source_label());
        let bytes = document.bytes.clone();
        let content = stream::once(async move { Ok(bytes) }).boxed();
        self.leased().await?.write(&document.descriptor(), content, labels).await?;
        // It may have been there before, without what it leads to.
        self.hold_children(document).await
    }

    async fn commit(&self, root: &Document, annotations: &BTreeMap<String, String>) -> Result<(), Error> {
        if let Some(digest) = self.reference.digest().filter(|digest| **digest != root.digest) {
            let detail = format!("the image to be stored there is {}", root.digest);
            return Err(Error::Invalid { what: format!("{}@{digest}", self.reference.name()), detail });
        }
        if !media_type::is_manifest(&root.media_type) && !media_type::is_index(&root.media_type) {
            let detail = format!("{} is neither a manifest nor an index", root.media_type);
            return Err(Error::Invalid { what: root.digest.to_string(), detail });
        }
        self.leased().await?.hold(&root.digest).await?;
        let target = Descriptor { annotations: annotations.clone(), ..root.descriptor() };
        self.store.set_image(&self.reference.without_digest().canonical(), &target).await?;
        self.end().await;
        Ok(())
    }
}
