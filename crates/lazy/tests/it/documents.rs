//! Images of which the registry is away.

use std::sync::Arc;

use bytes::Bytes;
use loris_format::digest::Digest;
use loris_lazy::{Store, documents::Remembering};
use loris_oci::{Descriptor, Document, Error, ImageSource};

use crate::source::TestSource;

/// A source that has a root, or is away.
struct Registry {
    blobs: TestSource,
    root: Option<Document>,
}

#[async_trait::async_trait]
impl ImageSource for Registry {
    fn name(&self) -> String {
        "registry.example/image:tag".to_owned()
    }

    async fn root(&self) -> Result<Document, Error> {
        let away = || Error::Registry {
            method: "GET".to_owned(),
            url: String::new(),
            status: None,
            detail: "away".to_owned(),
            transient: true,
        };
        self.root.clone().ok_or_else(away)
    }

    async fn document(&self, descriptor: &Descriptor) -> Result<Document, Error> {
        self.blobs.document(descriptor).await
    }

    async fn blob(&self, descriptor: &Descriptor) -> Result<loris_oci::BlobStream, Error> {
        self.blobs.blob(descriptor).await
    }

    async fn blob_range(&self, descriptor: &Descriptor, range: std::ops::Range<u64>) -> Result<Bytes, Error> {
        self.blobs.blob_range(descriptor, range).await
    }

    async fn referrers(&self, digest: &Digest, kind: Option<&str>) -> Result<Vec<Descriptor>, Error> {
        self.blobs.referrers(digest, kind).await
    }
}

fn document(text: &'static str) -> Document {
    let bytes = Bytes::from_static(text.as_bytes());
    Document { media_type: "application/test+json".to_owned(), digest: Digest::sha256_of(&bytes), bytes }
}

#[tokio::test]
async fn what_a_name_led_to_is_known_while_the_registry_is_away() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    let (root, config) = (document("{}"), document("{\"config\":1}"));
    let descriptor = Descriptor::new(&config.media_type, config.digest, config.bytes.len() as u64);
    let open = |root: Option<Document>, blobs: Vec<Bytes>| {
        let registry = Registry { blobs: TestSource::new(blobs), root };
        Remembering::new(Arc::new(registry), &store)
    };
    assert!(open(None, vec![]).root().await.unwrap_err().is_transient());
    let here = open(Some(root.clone()), vec![config.bytes.clone()]);
    assert_eq!(here.root().await.unwrap(), root);
    assert_eq!(here.document(&descriptor).await.unwrap().bytes, config.bytes);

    let away = open(None, vec![]);
    assert_eq!(away.root().await.unwrap(), root);
    assert_eq!(away.document(&descriptor).await.unwrap().bytes, config.bytes);
    // What it leads to now goes before what it led to.
    let newer = document("{\"new\":1}");
    assert_eq!(open(Some(newer.clone()), vec![]).root().await.unwrap(), newer);
    assert_eq!(open(None, vec![]).root().await.unwrap(), newer);

    // Damage is not believed.
    let folder = directory.path().join("documents/v1/blobs");
    for entry in std::fs::read_dir(folder).unwrap() {
        std::fs::write(entry.unwrap().path(), "{ }").unwrap();
    }
    assert!(open(None, vec![]).root().await.is_err());
    assert!(open(None, vec![]).document(&descriptor).await.is_err());
}
