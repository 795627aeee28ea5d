//! Opening layers and images.

use std::sync::Arc;

use bytes::Bytes;
use loris_format::{digest::Digest, index::NodeId};
use loris_lazy::{EnsureError, LayerError, OpenError, OpenOptions, ReadError, Store, StoreOptions, Trust, open_image};
use loris_oci::{
    Descriptor,
    document::{Manifest, media_type},
};
use serde_json::json;

use crate::{
    Case,
    blob::{Shape, TestBlob, estargz, files},
    source::TestSource,
};

const ANNOTATION: &str = "containerd.io/snapshot/stargz/toc.digest";

fn config(layers: usize) -> (Descriptor, Bytes) {
    config_of(&vec![Digest::sha256_of(b"tar").to_string(); layers])
}

pub(crate) fn config_of(diff_ids: &[String]) -> (Descriptor, Bytes) {
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let bytes = Bytes::from(serde_json::to_vec(&config).unwrap());
    (Descriptor::new(media_type::OCI_CONFIG, Digest::sha256_of(&bytes), bytes.len() as u64), bytes)
}

pub(crate) fn manifest(config: Descriptor, layers: Vec<Descriptor>) -> Manifest {
    Manifest {
        schema_version: 2,
        media_type: media_type::OCI_MANIFEST.to_owned(),
        artifact_type: None,
        config,
        layers,
        subject: None,
        annotations: std::collections::BTreeMap::default(),
    }
}

/// An image of these layers, the source that has it, and a store.
struct Image {
    manifest: Manifest,
    source: Arc<TestSource>,
    store: Store,
    _directory: tempfile::TempDir,
}

fn image(blobs: &[&TestBlob]) -> Image {
    let (config, config_bytes) = config(blobs.len());
    let manifest = manifest(config, blobs.iter().map(|blob| blob.descriptor.clone()).collect());
    let source = TestSource::new(blobs.iter().map(|blob| blob.bytes.clone()).chain([config_bytes]));
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    Image { manifest, source: Arc::new(source), store, _directory: directory }
}

fn layer(number: usize) -> TestBlob {
    estargz(files(number + 1, 3000 + number), Shape::default())
}

#[tokio::test]
async fn layers_are_opened_side_by_side_in_one_request_each() {
    let blobs: Vec<TestBlob> = (0..8).map(layer).collect();
    let image = image(&blobs.iter().collect::<Vec<_>>());
    image.source.hold();
    let options = OpenOptions::default();
    let open = open_image(image.source.clone(), &image.manifest, &image.store, &options);
    let (opened, ()) = tokio::join!(open, async {
        image.source.held(8).await;
        image.source.release();
    });
    let lazy = opened.unwrap().into_lazy().unwrap();
    assert_eq!(image.source.take_requests().len(), 8);
    assert_eq!(lazy.config.diff_ids.len(), 8);
    for (layer, blob) in lazy.layers.iter().zip(&blobs) {
        assert_eq!(*layer.digest(), blob.descriptor.digest);
        assert_eq!(layer.index().children(NodeId::ROOT).len(), blob.files.len());
        assert_eq!(layer.statistics().requests, 1);
        assert!(layer.statistics().fetched_bytes > 0);
    }
}

#[tokio::test]
async fn what_is_opened_side_by_side_fits_into_memory() {
    let blobs: Vec<TestBlob> = (0..4).map(layer).collect();
    let mut image = image(&blobs.iter().collect::<Vec<_>>());
    let directory = tempfile::tempdir().unwrap();
    // Too little for two: each goes alone.
    let options = StoreOptions { memory_bytes: 1000, ..StoreOptions::default() };
    image.store = Store::open_with(directory.path(), &options).unwrap();
    image.source.hold();
    let options = OpenOptions::default();
    let open = open_image(image.source.clone(), &image.manifest, &image.store, &options);
    let (opened, ()) = tokio::join!(open, async {
        image.source.held(1).await;
        for _ in 0..1000 {
            tokio::task::yield_now().await;
        }
        assert_eq!(image.source.waiting(), 1);
        image.source.release();
    });
    opened.unwrap().into_lazy().unwrap();
}

#[tokio::test]
async fn the_same_layer_twice_is_one() {
    let (one, two) = (layer(0), layer(1));
    let image = image(&[&one, &two, &one]);
    let options = OpenOptions::default();
    let opened = open_image(image.source.clone(), &image.manifest, &image.store, &options).await.unwrap();
    assert_eq!(image.source.take_requests().len(), 2);
    let lazy = opened.into_lazy().unwrap();
    assert!(Arc::ptr_eq(&lazy.layers[0], &lazy.layers[2]));
    assert!(!Arc::ptr_eq(&lazy.layers[0], &lazy.layers[1]));
}

#[tokio::test]
async fn one_layer_that_is_not_lazy_does_not_hide_the_others() {
    let (one, mut two) = (layer(0), layer(1));
    two.bytes = crate::blob::noise(3, 5000).into();
    two.descriptor = Descriptor::new(media_type::OCI_LAYER_GZIP, Digest::sha256_of(&two.bytes), 5000);
    let image = image(&[&one, &two]);
    let options = OpenOptions::default();
    let opened = open_image(image.source.clone(), &image.manifest, &image.store, &options).await.unwrap();
    assert!(opened.layers[0].layer.is_ok());
    let error = opened.layers[1].layer.as_ref().unwrap_err();
    assert!(matches!(error, LayerError::NotLazy { layer, .. } if *layer == two.descriptor.digest), "{error}");
    assert_eq!(opened.layers[1].descriptor, two.descriptor);
    assert!(matches!(opened.into_lazy(), Err(LayerError::NotLazy { .. })));
}

#[tokio::test]
async fn a_configuration_must_fit() {
    let blob = layer(0);
    let mut image = image(&[&blob]);
    let options = OpenOptions::default();
    image.manifest.layers.push(blob.descriptor.clone());
    let error = open_image(image.source.clone(), &image.manifest, &image.store, &options).await.unwrap_err();
    assert!(matches!(&error, OpenError::NotAnImage { .. }), "{error}");
    image.manifest.config.digest = Digest::sha256_of(b"?");
    let error = open_image(image.source.clone(), &image.manifest, &image.store, &options).await.unwrap_err();
    assert!(matches!(&error, OpenError::Document { .. }), "{error}");
}

#[tokio::test]
async fn content_that_nothing_vouches_for_is_read_only_where_allowed() {
    // No annotation.
    let mut case = Case::new(files(2, 3000), Shape::default());
    let vouched = case.open().await.directory().to_owned();
    case.blob.descriptor.annotations.clear();
    let error = case.try_open().await.unwrap_err();
    assert!(matches!(&error, LayerError::Unvouched { annotation: ANNOTATION, .. }), "{error}");
    case.options.trust = Trust::Anything;
    let layer = case.open().await;
    assert!(!layer.is_vouched());
    case.check_all(&layer).await;
    assert_ne!(layer.directory(), vouched);

    // Another source's claims are not mixed with these.
    let other = Arc::new(TestSource::new([case.blob.bytes.clone()]).named("elsewhere"));
    let theirs = loris_lazy::open::open_layer(other, &case.blob.descriptor, &case.store, &case.options).await.unwrap();
    assert_ne!(theirs.directory(), layer.directory());
    assert_eq!(theirs.statistics().extents_filled, 0);

    // An annotation, and no digests of chunks.
    let mut case = Case::new(files(2, 3000), Shape { digests: false, ..Shape::default() });
    let error = case.try_open().await.unwrap_err();
    assert!(matches!(&error, LayerError::Undigested { path, .. } if path == "file-0"), "{error}");
    case.options.trust = Trust::Anything;
    let layer = case.open().await;
    assert!(!layer.is_vouched());
    case.check_all(&layer).await;
    // Seen once, and still not trusted by those who did not ask for it.
    case.options.trust = Trust::Vouched;
    case.try_open().await.unwrap_err();
}

#[tokio::test]
async fn an_annotation_that_is_wrong_is_corruption() {
    for annotation in [Digest::sha256_of(b"another").to_string(), "sha256:nonsense".to_owned(), String::new()] {
        for trust in [Trust::Vouched, Trust::Anything] {
            let mut case = Case::new(files(2, 3000), Shape::default());
            case.options.trust = trust;
            case.blob.descriptor.annotations.insert(ANNOTATION.to_owned(), annotation.clone());
            let error = case.try_open().await.unwrap_err();
            assert!(matches!(&error, LayerError::Corrupt { .. }), "{annotation}: {error}");
            assert!(!case.store.root().join("layers").exists(), "nothing is kept");
        }
    }
}

#[tokio::test]
async fn damage_and_faults_are_told_apart() {
    let case = Case::new(files(2, 3000), Shape::default());
    case.source.fail();
    let error = case.try_open().await.unwrap_err();
    assert!(matches!(&error, LayerError::Fetch { source, .. } if source.is_transient()), "{error}");
    case.source.fault(|_, bytes| Ok(bytes.slice(1..)));
    let error = case.try_open().await.unwrap_err();
    assert!(matches!(&error, LayerError::Fetch { .. } | LayerError::Corrupt { .. }), "{error}");

    // Wherever the tail is damaged: an error, or the right table of contents.
    let size = case.blob.bytes.len() as u64;
    let toc = case.blob.members[case.blob.members.len() - 1].end;
    for place in (toc..size).step_by(3) {
        let bytes = case.blob.flipped(place);
        let case = Case::new(files(2, 3000), Shape::default());
        case.source.fault(move |range, _| {
            Ok(bytes.slice(usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()))
        });
        if let Ok(layer) = case.try_open().await {
            case.source.heal();
            case.check_all(&layer).await;
        }
    }
}

#[tokio::test]
async fn a_blob_of_another_ones_name_does_not_reach_its_data() {
    // An image whose manifest names a victim's blob, and brings a table of contents of its own for it.
    let victim = Case::new(files(1, 3000), Shape::default());
    let evil = estargz(vec![("file-0".to_owned(), crate::blob::noise(99, 3000))], Shape::default());
    let mut descriptor = victim.blob.descriptor.clone();
    descriptor.size = evil.descriptor.size;
    descriptor.annotations = evil.descriptor.annotations.clone();
    let source = Arc::new(TestSource::lying(descriptor.digest, evil.bytes.clone()));
    let theirs = loris_lazy::open::open_layer(source, &descriptor, &victim.store, &victim.options).await.unwrap();
    loris_lazy::complete(&theirs).await.unwrap();
    let ours = victim.open().await;
    assert_eq!(ours.statistics().extents_filled, 0);
    victim.check_all(&ours).await;

    // The same table of contents with other bytes behind it: they are refused, and not kept.
    let liar = Arc::new(TestSource::new([victim.blob.bytes.clone()]));
    let fresh = Case::new(files(1, 3000), Shape::default());
    let layer =
        loris_lazy::open::open_layer(liar.clone(), &fresh.blob.descriptor, &fresh.store, &fresh.options).await.unwrap();
    liar.fault(|_, bytes| Ok(vec![7; bytes.len()].into()));
    let error = fresh.check(&layer, 0).await.unwrap_err();
    assert!(matches!(&error, ReadError::Ensure(EnsureError::Decode { .. })), "{error}");
    let honest = fresh.open().await;
    fresh.check_all(&honest).await;
}
