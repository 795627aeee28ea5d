//! Layers that stayed as they were, beside which there is an index (SOCI).

use std::{io::Write as _, os::unix::fs::FileExt as _, sync::Arc};

use bytes::Bytes;
use loris_format::{
    digest::{DiffId, Digest},
    opening::{BESIDE_ANNOTATION, Beside, Voucher},
    position::FileOffset,
    soci::{self, BuildOptions, Built},
    tar,
};
use loris_lazy::{
    IndexTrust, LayerError, LazyLayer, OpenOptions, Store, Verdict,
    beside::{NodeIndexes, with_indexes, with_known_indexes},
    complete,
    open::{open_all_layers, open_layer},
};
use loris_oci::{Descriptor, document::Manifest};

use crate::{STRICT, blob::noise, source::TestSource};

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// A plain layer, its index, and a store.
struct Plain {
    blob: Bytes,
    built: Built,
    files: Vec<(String, Vec<u8>)>,
    descriptor: Descriptor,
    options: OpenOptions,
    _directory: tempfile::TempDir,
    store: Store,
}

/// Half noise, half nothing: it shrinks, and blocks are short.
fn content(seed: u64, length: usize) -> Vec<u8> {
    let mut content = noise(seed, length);
    content.chunks_mut(100).for_each(|piece| piece.iter_mut().skip(50).for_each(|byte| *byte = b'.'));
    content
}

fn archive(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (name, content) in files {
        let entry = tar::Entry {
            path: name.clone().into(),
            size: content.len() as u64,
            permissions: 0o644,
            ..tar::Entry::default()
        };
        archive.extend(tar::encode_header(&entry).unwrap());
        archive.extend(content);
        archive.extend(tar::padding(content.len() as u64));
    }
    archive.extend(tar::END_OF_ARCHIVE);
    // As tar pads, which no index tells of.
    archive.extend([0; 8192]);
    archive
}

impl Plain {
    fn new(voucher: Voucher) -> Self {
        let files: Vec<_> = [200_000, 0, 90_000, 3, 400_000, 70]
            .iter()
            .zip(1..)
            .map(|(&length, number)| (format!("file-{number}"), content(number, length)))
            .collect();
        let archive = archive(&files);
        // Several members, so that spans reach from one into the next.
        let mut blob = Vec::new();
        for piece in archive.chunks(300_000) {
            let mut encoder = flate2::write::GzEncoder::new(&mut blob, flate2::Compression::default());
            encoder.write_all(piece).unwrap();
            encoder.finish().unwrap();
        }
        let options = BuildOptions { span_bytes: 60_000, ..BuildOptions::default() };
        let built = soci::build(&blob[..], &options).unwrap();
        assert!(built.spans > 4, "{} spans", built.spans);
        let (ztoc, size) = (Digest::sha256_of(&built.ztoc), built.ztoc.len() as u64);
        let mut descriptor = Descriptor::new(LAYER, built.blob, blob.len() as u64);
        let beside = Beside { digest: ztoc, size, voucher };
        descriptor.annotations.insert(BESIDE_ANNOTATION.to_owned(), beside.to_string());
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let options = OpenOptions { policy: STRICT, ..OpenOptions::default() };
        Self { blob: blob.into(), built, files, descriptor, options, _directory: directory, store }
    }

    fn source(&self) -> Arc<TestSource> {
        Arc::new(TestSource::new([self.blob.clone(), self.built.ztoc.clone().into()]))
    }

    async fn open(&self, source: Arc<TestSource>) -> Result<Arc<LazyLayer>, LayerError> {
        open_layer(source, &self.descriptor, &self.store, &self.options).await
    }

    async fn check_all(&self, layer: &Arc<LazyLayer>) {
        for (name, content) in &self.files {
            let node = layer.index().lookup(name.as_bytes()).unwrap();
            let mut buffer = vec![0xee; content.len() + 1];
            let read = layer.read(node, FileOffset(0), &mut buffer).await.unwrap();
            assert!(buffer[..read] == content[..], "{name}");
        }
    }

    fn manifest(&self) -> Manifest {
        let mut layer = self.descriptor.clone();
        layer.annotations.clear();
        Manifest {
            schema_version: 2,
            media_type: "application/vnd.oci.image.manifest.v1+json".to_owned(),
            artifact_type: None,
            config: Descriptor::new("application/vnd.oci.image.config.v1+json", Digest::sha256_of(b"{}"), 2),
            layers: vec![layer],
            subject: None,
            annotations: std::collections::BTreeMap::new(),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plain_layer_is_read_by_spans_and_proven() {
    let case = Plain::new(Voucher::Manifest);
    let source = case.source();
    let layer = case.open(source.clone()).await.unwrap();
    assert!(layer.is_vouched());
    source.take_requests();
    let (name, content) = &case.files[2];
    let node = layer.index().lookup(name.as_bytes()).unwrap();
    let mut buffer = vec![0; 10];
    layer.read(node, FileOffset(5), &mut buffer).await.unwrap();
    assert!(buffer == content[5..15]);
    let fetched: u64 = source.take_requests().iter().map(|range| range.end - range.start).sum();
    assert!(fetched < case.blob.len() as u64 / 2, "{fetched} of {} bytes were fetched for ten", case.blob.len());
    layer.claim_diff_id(&case.built.diff_id);
    case.check_all(&layer).await;
    complete(&layer).await.unwrap();
    assert_eq!(layer.verdict(), Some(Verdict::Sound(case.built.diff_id)));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_opened_opens_again_without_its_source() {
    let case = Plain::new(Voucher::Manifest);
    let layer = case.open(case.source()).await.unwrap();
    complete(&layer).await.unwrap();
    drop(layer);
    let layer = case.open(Arc::new(TestSource::new([]))).await.unwrap();
    case.check_all(&layer).await;
    // Also where a new process has to decode, and only the blob can be had.
    let fresh = Plain::new(Voucher::Manifest);
    drop(fresh.open(fresh.source()).await.unwrap());
    let layer = fresh.open(Arc::new(TestSource::new([fresh.blob.clone()]))).await.unwrap();
    fresh.check_all(&layer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_byte_is_refused() {
    let case = Plain::new(Voucher::Manifest);
    let mut flipped = case.blob.to_vec();
    let at = flipped.len() / 2;
    flipped[at] ^= 1;
    let source = Arc::new(TestSource::new([case.built.ztoc.clone().into()]));
    drop(case.open(source).await.unwrap());
    let layer = case.open(Arc::new(TestSource::lying(case.descriptor.digest, flipped.into()))).await.unwrap();
    let error = complete(&layer).await.unwrap_err();
    assert!(error.to_string().contains("digest"), "{error}");
    assert!(!layer.is_whole());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_vouches_decides() {
    for (voucher, least) in [
        (Voucher::Node, IndexTrust::Manifest),
        (Voucher::Manifest, IndexTrust::Manifest),
        (Voucher::Repository, IndexTrust::Repository),
        (Voucher::Elsewhere, IndexTrust::Any),
    ] {
        for trust in [IndexTrust::Manifest, IndexTrust::Repository, IndexTrust::Any] {
            let mut case = Plain::new(voucher);
            case.options.index_trust = trust;
            let opened = case.open(case.source()).await;
            assert_eq!(opened.is_ok(), trust >= least, "{voucher:?} {trust:?}");
            match opened {
                Ok(layer) => assert_eq!(layer.is_vouched(), least == IndexTrust::Manifest),
                Err(error) => assert!(matches!(error, LayerError::Unvouched { .. }), "{error}"),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_lies_is_found_out() {
    let mut case = Plain::new(Voucher::Repository);
    case.options.index_trust = IndexTrust::Repository;
    // The same spans, and a file of another mode.
    let honest = soci::ztoc::Ztoc::read(&case.built.ztoc, &case.options.limits).unwrap();
    let mut files: Vec<_> = honest.files().map(|file| file.unwrap()).collect();
    files[0].mode = 0o4755;
    let digests: Vec<Digest> = honest.digests().map(|digest| digest.unwrap()).collect();
    let lying = soci::ztoc::NewZtoc {
        build_tool: "",
        compressed_size: honest.compressed_size,
        uncompressed_size: honest.uncompressed_size,
        algorithm: honest.algorithm,
        digests: &digests,
        checkpoints: honest.checkpoints,
        files: &files,
    };
    let ztoc = lying.write().unwrap();
    let beside = Beside { digest: Digest::sha256_of(&ztoc), size: ztoc.len() as u64, voucher: Voucher::Repository };
    case.descriptor.annotations.insert(BESIDE_ANNOTATION.to_owned(), beside.to_string());
    let source = Arc::new(TestSource::new([case.blob.clone(), ztoc.into()]));
    let layer = case.open(source).await.unwrap();
    let error = complete(&layer).await.unwrap_err();
    assert!(error.to_string().contains("mode"), "{error}");
    assert!(layer.is_condemned());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_claims_another_diff_id_is_found_out() {
    let case = Plain::new(Voucher::Manifest);
    let layer = case.open(case.source()).await.unwrap();
    layer.claim_diff_id(&DiffId(Digest::sha256_of(b"another")));
    assert!(complete(&layer).await.unwrap_err().to_string().contains("DiffID"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_disk_has_changed_is_not_called_sound() {
    let case = Plain::new(Voucher::Manifest);
    let layer = case.open(case.source()).await.unwrap();
    layer.claim_diff_id(&case.built.diff_id);
    let (name, content) = &case.files[4];
    let node = layer.index().lookup(name.as_bytes()).unwrap();
    let mut buffer = vec![0; content.len()];
    layer.read(node, FileOffset(0), &mut buffer).await.unwrap();
    let data = layer.index().extents().iter().find(|extent| extent.node == node).unwrap().data;
    layer.data_file().write_all_at(b"damaged", data.0).unwrap();
    // No digest tells which extent it is: the proof does, by the blob.
    let _ = complete(&layer).await;
    complete(&layer).await.unwrap();
    assert_eq!(layer.verdict(), Some(Verdict::Sound(case.built.diff_id)));
    case.check_all(&layer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_of_this_machine_is_found() {
    let case = Plain::new(Voucher::Manifest);
    let digest = Digest::sha256_of(b"the manifest");
    let known = |manifest| with_known_indexes(manifest, &digest, &case.store, &case.options);
    assert!(known(case.manifest()).layers[0].annotations.is_empty());
    NodeIndexes::of(&case.store).keep(&case.descriptor.digest, &case.built.ztoc, Voucher::Node).unwrap();
    let source = Arc::new(TestSource::new([case.blob.clone()]));
    let manifest = with_indexes(&*source, case.manifest(), &digest, &case.store, &case.options).await;
    assert_eq!(manifest, known(case.manifest()));
    let layers = open_all_layers(source, &manifest, &case.store, &case.options, &[case.built.diff_id]).await.unwrap();
    case.check_all(&layers[0]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_of_this_machine_that_is_damaged_is_made_again() {
    let mut case = Plain::new(Voucher::Node);
    let node = NodeIndexes::of(&case.store);
    node.keep(&case.descriptor.digest, &case.built.ztoc, Voucher::Node).unwrap();
    let ztocs = case.store.root().join("indexes/v1/ztocs");
    let kept = ztocs.read_dir().unwrap().next().unwrap().unwrap().path().join("ztoc");
    let damage = || std::fs::write(&kept, b"damaged").unwrap();
    damage();
    let source = Arc::new(TestSource::new([case.blob.clone()]));
    let error = case.open(source.clone()).await.unwrap_err();
    assert!(matches!(&error, LayerError::NotLazy { reason, .. } if reason.contains("loris index")), "{error}");
    assert!(node.find(&case.descriptor, IndexTrust::Any).is_none());
    node.keep(&case.descriptor.digest, &case.built.ztoc, Voucher::Node).unwrap();
    damage();
    case.options.plain_bytes = 10 << 20;
    let layer = case.open(source.clone()).await.unwrap();
    assert!(layer.is_whole());
    case.check_all(&layer).await;
    assert!(node.find(&case.descriptor, IndexTrust::Manifest).is_some());
    // Made anew, it need not be the same.
    std::fs::remove_dir_all(ztocs).unwrap();
    assert!(node.find(&case.descriptor, IndexTrust::Any).is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_from_elsewhere_yields_to_one_that_the_manifest_names() {
    let mut case = Plain::new(Voucher::Manifest);
    case.options.index_trust = IndexTrust::Any;
    NodeIndexes::of(&case.store).keep(&case.descriptor.digest, &case.built.ztoc, Voucher::Elsewhere).unwrap();
    // What was found the last time, when the source could be asked.
    let digest = Digest::sha256_of(b"the manifest");
    let images = case.store.root().join("indexes/v1/images");
    std::fs::create_dir_all(&images).unwrap();
    let note = |voucher| {
        let beside = Beside { digest: Digest::sha256_of(b"another ztoc"), size: 12, voucher };
        let line = format!("{} {beside}\n", case.descriptor.digest);
        std::fs::write(images.join(format!("{}-{}", digest.algorithm(), digest.hex())), line).unwrap();
        beside
    };
    let source = TestSource::new([]);
    let mut image = case.manifest();
    image.annotations.insert("com.amazon.soci.index-digest".to_owned(), Digest::sha256_of(b"lost").to_string());
    for (voucher, trust, counts) in [
        (Voucher::Manifest, IndexTrust::Any, true),
        (Voucher::Repository, IndexTrust::Repository, true),
        (Voucher::Repository, IndexTrust::Manifest, false),
    ] {
        let expected = counts.then(|| note(voucher).to_string());
        let options = OpenOptions { index_trust: trust, ..case.options.clone() };
        let known = with_known_indexes(image.clone(), &digest, &case.store, &options);
        let found = with_indexes(&source, image.clone(), &digest, &case.store, &options).await;
        for manifest in [known, found] {
            assert_eq!(
                manifest.layers[0].annotations.get(BESIDE_ANNOTATION),
                expected.as_ref(),
                "{voucher:?} {trust:?}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_plain_layer_is_fetched_once_and_indexed() {
    let mut case = Plain::new(Voucher::Manifest);
    case.descriptor.annotations.clear();
    assert!(matches!(case.open(case.source()).await, Err(LayerError::NotLazy { .. })));
    case.options.plain_bytes = 10 << 20;
    let source = Arc::new(TestSource::new([case.blob.clone()]));
    let layer = case.open(source.clone()).await.unwrap();
    source.take_requests();
    assert!(layer.is_whole());
    case.check_all(&layer).await;
    complete(&layer).await.unwrap();
    assert_eq!(layer.verdict(), Some(Verdict::Sound(case.built.diff_id)));
    assert_eq!(source.take_requests(), []);
}
