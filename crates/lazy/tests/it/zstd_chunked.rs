//! zstd:chunked, as skopeo and ctr-remote made it.

use std::sync::Arc;

use bytes::Bytes;
use loris_format::{digest::Digest, position::FileOffset};
use loris_lazy::{LayerError, LazyLayer, OpenOptions, Store, open::open_layer};
use loris_oci::Descriptor;

use crate::{STRICT, source::TestSource};

const GOLDEN: [(&[u8], &str); 2] = [
    (
        include_bytes!("../../../format/tests/golden/zstd-containers.zst"),
        include_str!("../../../format/tests/golden/zstd-containers.json"),
    ),
    (
        include_bytes!("../../../format/tests/golden/zstd-stargz.zst"),
        include_str!("../../../format/tests/golden/zstd-stargz.json"),
    ),
];

fn descriptor((blob, annotations): (&[u8], &str)) -> Descriptor {
    let digest = Digest::sha256_of(blob);
    let mut descriptor =
        Descriptor::new("application/vnd.oci.image.layer.v1.tar+zstd".to_owned(), digest, blob.len() as u64);
    descriptor.annotations = serde_json::from_str(annotations).unwrap();
    descriptor
}

async fn open(source: &Arc<TestSource>, descriptor: &Descriptor, store: &Store) -> Result<Arc<LazyLayer>, LayerError> {
    let options = OpenOptions { policy: STRICT, ..OpenOptions::default() };
    open_layer(source.clone(), descriptor, store, &options).await
}

async fn read(layer: &Arc<LazyLayer>, path: &str) -> Vec<u8> {
    let node = layer.index().lookup(path.as_bytes()).unwrap();
    let mut buffer = vec![0; 200_000];
    let count = layer.read(node, FileOffset(0), &mut buffer).await.unwrap();
    buffer.truncate(count);
    buffer
}

#[tokio::test]
async fn both_dialects_are_lazy_and_opened_again_without_network() {
    for golden in GOLDEN {
        let descriptor = descriptor(golden);
        let source = Arc::new(TestSource::new([Bytes::from_static(golden.0)]));
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let layer = open(&source, &descriptor, &store).await.unwrap();
        assert!(layer.is_vouched());
        assert_eq!(source.take_requests().len(), 1);
        assert_eq!(read(&layer, "etc/link").await, b"lazy\n");
        assert!(layer.statistics().fetched_bytes < 5000, "{:?}", layer.statistics());
        let large = read(&layer, "usr/share/large").await;
        assert!(large.len() == 173_905 && large.ends_with(b"\0behind the hole"));
        drop(layer);
        source.take_requests();
        let store = Store::open(directory.path()).unwrap();
        let layer = open(&source, &descriptor, &store).await.unwrap();
        assert_eq!(read(&layer, "etc/hostname").await, b"lazy\n");
        assert_eq!(source.take_requests().len(), 0);
        let stored = store.census().unwrap();
        let checked = store.verify(&stored[0], &OpenOptions::default().limits).unwrap();
        assert!(checked.extents >= 3 && checked.faults.is_empty(), "{checked:?}");
    }
}

#[tokio::test]
async fn a_layer_that_claims_two_formats_is_refused() {
    let mut descriptor = descriptor(GOLDEN[0]);
    let annotation = "containerd.io/snapshot/stargz/toc.digest".to_owned();
    descriptor.annotations.insert(annotation, Digest::sha256_of(b"").to_string());
    let source = Arc::new(TestSource::new([Bytes::from_static(GOLDEN[0].0)]));
    let directory = tempfile::tempdir().unwrap();
    let error = open(&source, &descriptor, &Store::open(directory.path()).unwrap()).await.unwrap_err();
    assert!(error.to_string().contains("it claims two formats"), "{error}");
    assert_eq!(source.take_requests().len(), 0);
}
