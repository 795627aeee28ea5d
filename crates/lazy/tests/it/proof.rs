//! What is found out about a layer once it is whole.

use std::{io::Read as _, os::unix::fs::FileExt as _, sync::Arc};

use loris_format::digest::{DiffId, Digest};
use loris_lazy::{EnsureError, LayerError, LazyLayer, OpenOptions, Verdict, complete, open_image};
use loris_oci::ImageSource as _;

use crate::{
    Case, STRICT,
    blob::{Shape, TestBlob, files, noise},
    open::{config_of, manifest},
    source::TestSource,
    until,
};

/// Hashes the tar, the plain way.
fn diff_id(blob: &TestBlob) -> DiffId {
    let mut tar = Vec::new();
    flate2::read::MultiGzDecoder::new(&blob.bytes[..]).read_to_end(&mut tar).unwrap();
    DiffId(Digest::sha256_of(&tar))
}

async fn verdict(layer: &Arc<LazyLayer>) -> Verdict {
    until("a verdict", || layer.verdict().is_some()).await;
    layer.verdict().unwrap()
}

#[tokio::test]
async fn a_whole_layer_is_put_together_without_fetching_anything_twice() {
    for shape in [
        Shape::default(),
        Shape { files_per_member: 3, ..Shape::default() },
        Shape { landmark: Some(2), ..Shape::default() },
        Shape { chunk_bytes: 1 << 20, ..Shape::default() },
    ] {
        let mut contents = files(6, 9000);
        contents.push(("empty".to_owned(), Vec::new()));
        contents.push(("text".to_owned(), vec![b'x'; 100_000]));
        let case = Case::new(contents, shape);
        let layer = case.open().await;
        let opening = layer.statistics().fetched_bytes;
        for file in [3, 0, 7, 5] {
            case.check(&layer, file).await.unwrap();
        }
        assert_eq!(layer.verdict(), None);
        complete(&layer).await.unwrap();
        assert!(layer.is_complete());
        assert_eq!(layer.verdict(), Some(Verdict::Sound(diff_id(&case.blob))));
        let requests = case.source.take_requests();
        let fetched = layer.statistics().fetched_bytes - opening;
        assert!(fetched <= case.blob.bytes.len() as u64, "{fetched} of {}: {requests:?}", case.blob.bytes.len());
        // It is known the next time.
        drop(layer);
        case.source.fail();
        assert_eq!(case.open().await.verdict(), Some(Verdict::Sound(diff_id(&case.blob))));
    }
}

#[tokio::test]
async fn reading_everything_is_enough_for_a_verdict() {
    let case = Case::new(files(3, 5000), Shape::default());
    let layer = case.open().await;
    case.check_all(&layer).await;
    assert_eq!(verdict(&layer).await, Verdict::Sound(diff_id(&case.blob)));
    layer.completed().await;
}

#[tokio::test]
async fn what_was_not_kept_is_fetched_again() {
    // Bytes that are left of the file.
    for cut in [|_: u64| 0, |length: u64| length - 20, |_: u64| 10] {
        let case = Case::new(files(3, 5000), Shape::default());
        let layer = case.open().await;
        case.check(&layer, 0).await.unwrap();
        let rest = layer.directory().join("rest");
        // It follows what is read.
        until("the rest", || rest.metadata().is_ok_and(|metadata| metadata.len() > 100)).await;
        let file = std::fs::File::options().write(true).open(&rest).unwrap();
        file.set_len(cut(file.metadata().unwrap().len())).unwrap();
        complete(&layer).await.unwrap();
        assert_eq!(layer.verdict(), Some(Verdict::Sound(diff_id(&case.blob))));
    }
}

#[tokio::test]
async fn a_table_of_contents_that_differs_from_the_tar_is_found_out() {
    let case = Case::new(files(3, 5000), Shape { mode: 0o4755, ..Shape::default() });
    let layer = case.open().await;
    case.check(&layer, 1).await.unwrap();
    let error = complete(&layer).await.unwrap_err();
    assert!(
        matches!(&error, EnsureError::Condemned { reason, .. } if reason.contains("0644 in the tar and 4755")),
        "{error}"
    );
    // Nothing of it is served any more, by anyone, at any time.
    assert!(!layer.is_complete());
    assert!(case.check(&layer, 1).await.is_err());
    drop(layer);
    let error = case.try_open().await.unwrap_err();
    assert!(matches!(&error, LayerError::Condemned { reason, .. } if reason.contains("mode")), "{error}");
}

#[tokio::test]
async fn an_image_with_another_diff_id_is_served_nothing_and_others_are() {
    let case = Case::new(files(3, 5000), Shape::default());
    let right = diff_id(&case.blob).0.to_string();
    let wrong = Digest::sha256_of(b"another").to_string();
    let open = |claimed: String| {
        let (config, config_bytes) = config_of(&[claimed]);
        let manifest = manifest(config, vec![case.blob.descriptor.clone()]);
        let source = Arc::new(TestSource::new([case.blob.bytes.clone(), config_bytes]));
        let store = case.store.clone();
        async move {
            let options = OpenOptions { policy: STRICT, ..OpenOptions::default() };
            let image = open_image(source, &manifest, &store, &options).await.unwrap();
            image.into_lazy().unwrap().layers.remove(0)
        }
    };
    let liar = open(wrong.clone()).await;
    case.check(&liar, 0).await.unwrap();
    let error = complete(&liar).await.unwrap_err();
    assert!(matches!(&error, EnsureError::Condemned { reason, .. } if reason.contains(&wrong)), "{error}");
    assert!(case.check(&liar, 0).await.is_err());
    let honest = open(right).await;
    assert!(honest.is_complete());
    case.check_all(&honest).await;
    assert!(case.check(&open(wrong).await, 0).await.is_err());
}

#[tokio::test]
async fn a_disk_that_forgets_condemns_nobody() {
    let case = Case::new(vec![("a".to_owned(), noise(1, 5000)), ("b".to_owned(), noise(2, 5000))], Shape::default());
    let layer = case.open().await;
    case.check(&layer, 0).await.unwrap();
    let mut byte = [0];
    layer.data_file().read_exact_at(&mut byte, 1000).unwrap();
    layer.data_file().write_all_at(&[byte[0] ^ 1], 1000).unwrap();
    case.check(&layer, 1).await.unwrap();
    // Found out, and forgotten.
    until("the damage", || !layer.is_whole()).await;
    complete(&layer).await.unwrap();
    assert_eq!(layer.verdict(), Some(Verdict::Sound(diff_id(&case.blob))));
    case.check_all(&layer).await;
    assert!(case.source.name().contains("memory"));
}
