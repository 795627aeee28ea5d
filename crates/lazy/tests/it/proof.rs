//! What is found out about a layer once it is whole.

use std::{io::Read as _, os::unix::fs::FileExt as _, sync::Arc};

use loris_format::digest::{DiffId, Digest};
use loris_lazy::{
    EnsureError, LayerError, LazyLayer, OpenOptions, Store, Verdict, complete,
    open::{open_all_layers, open_layer},
    open_image,
};
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

/// Two gzip members of which one mirror has made up a header between the files.
fn forged() -> (Case, bytes::Bytes) {
    let case = Case::new(files(4, 5000), Shape::default());
    let lie = case.blob.forged(2);
    (case, lie)
}

#[tokio::test]
async fn a_mirror_that_makes_up_headers_condemns_nobody() {
    let (mut case, lie) = forged();
    let source = TestSource::lying(case.blob.descriptor.digest, lie).or_else(case.blob.bytes.clone());
    case.source = Arc::new(source);
    let layer = open_claiming(&case, case.source.clone(), &diff_id(&case.blob)).await;
    case.check_all(&layer).await;
    complete(&layer).await.unwrap();
    assert_eq!(layer.verdict(), Some(Verdict::Sound(diff_id(&case.blob))));
    assert!(layer.is_complete());
}

#[tokio::test(start_paused = true)]
async fn a_source_that_has_another_blob_condemns_nobody_and_proves_nothing() {
    let (case, lie) = forged();
    let right = diff_id(&case.blob);
    let liar = Arc::new(TestSource::lying(case.blob.descriptor.digest, lie));
    let layer = open_claiming(&case, liar, &right).await;
    let error = complete(&layer).await.unwrap_err();
    assert!(matches!(error, EnsureError::AnotherBlob { .. }), "{error}");
    assert!(!layer.is_complete());
    assert_eq!(layer.verdict(), None);
    // Each piece has its digest all the same.
    case.check_all(&layer).await;
    drop(layer);
    let layer = open_claiming(&case, case.source.clone(), &right).await;
    complete(&layer).await.unwrap();
    assert_eq!(layer.verdict(), Some(Verdict::Sound(right)));
}

#[tokio::test]
async fn what_was_made_up_between_files_is_not_held_against_a_later_image() {
    let (case, lie) = forged();
    let right = diff_id(&case.blob);
    let liar = Arc::new(TestSource::lying(case.blob.descriptor.digest, lie));
    // Nobody knows what it should be.
    let layer = open_layer(liar, &case.blob.descriptor, &case.store, &case.options).await.unwrap();
    complete(&layer).await.unwrap();
    assert!(matches!(layer.verdict(), Some(Verdict::Sound(found)) if found != right));
    let layer = open_claiming(&case, case.source.clone(), &right).await;
    assert!(!layer.is_complete());
    case.check_all(&layer).await;
    complete(&layer).await.unwrap();
    assert_eq!(layer.verdict(), Some(Verdict::Sound(right)));
}

async fn open_claiming(case: &Case, source: Arc<TestSource>, claimed: &DiffId) -> Arc<LazyLayer> {
    let (config, _) = config_of(&[]);
    let manifest = manifest(config, vec![case.blob.descriptor.clone()]);
    let claimed = std::slice::from_ref(claimed);
    open_all_layers(source, &manifest, &case.store, &case.options, claimed).await.unwrap().remove(0)
}

#[tokio::test]
async fn what_one_process_condemns_others_serve_no_more() {
    let case = Case::new(files(3, 5000), Shape { mode: 0o4755, ..Shape::default() });
    let second = case.second_store();
    let open = |store: Store| {
        let (source, descriptor, options) = (case.source.clone(), case.blob.descriptor.clone(), case.options.clone());
        async move { open_layer(source, &descriptor, &store, &options).await.unwrap() }
    };
    let (one, other) = (open(case.store.clone()).await, open(second).await);
    case.check(&other, 1).await.unwrap();
    let node = other.index().lookup(b"file-1").unwrap();
    let loris_format::index::NodeKind::Regular(content) = &other.index().node(node).kind else { panic!() };
    let range = content.data..loris_format::position::DataOffset(content.data.0 + 5000);
    assert!(other.is_filled(&range));
    complete(&one).await.unwrap_err();
    // The other one has not got everything, and hears of it.
    until("what was found out", || !other.is_filled(&range)).await;
    assert!(case.check(&other, 1).await.is_err());
    assert!(complete(&other).await.is_err());
    assert!(!other.is_complete());
}

#[tokio::test]
async fn a_condemned_layer_that_loses_something_is_served_no_more_than_before() {
    let case = Case::new(files(3, 5000), Shape { mode: 0o4755, ..Shape::default() });
    let layer = case.open().await;
    complete(&layer).await.unwrap_err();
    let start = loris_format::position::DataOffset(0)..loris_format::position::DataOffset(5000);
    assert!(!layer.is_filled(&start));
    layer.data_file().set_len(9000).unwrap();
    layer.check_length().unwrap();
    assert!(!layer.is_whole());
    assert!(!layer.is_filled(&start));
}

#[tokio::test]
async fn what_stands_in_no_frame_is_part_of_the_proof_however_much_it_is() {
    let case = Case::new(files(3, 5000), Shape { hidden: 3 << 20, ..Shape::default() });
    let layer = case.open().await;
    let error = complete(&layer).await.unwrap_err();
    assert!(matches!(&error, EnsureError::Condemned { reason, .. } if reason.contains("hidden")), "{error}");
}

#[tokio::test]
async fn a_file_below_a_link_is_not_taken_for_one_that_was_replaced() {
    let case = Case::new(files(3, 5000), Shape { below_link: true, ..Shape::default() });
    let layer = case.open().await;
    let error = complete(&layer).await.unwrap_err();
    assert!(matches!(&error, EnsureError::Condemned { reason, .. } if reason.contains("/a/sh")), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_source_that_is_away_puts_the_proof_off() {
    // More than what is read of its end.
    let case = Case::new(files(3, 60_000), Shape { chunk_bytes: 1 << 20, ..Shape::default() });
    let layer = case.open().await;
    case.check(&layer, 0).await.unwrap();
    case.check(&layer, 1).await.unwrap();
    let rest = layer.directory().join("rest");
    until("the rest", || rest.exists()).await;
    // What the proof needs beside the last file is not here, and can't be had.
    let members = case.blob.members.clone();
    case.source.fault(move |range, bytes| {
        if range.start == members[3].start { Ok(bytes) } else { Err(crate::source::unreachable_registry()) }
    });
    std::fs::remove_file(&rest).unwrap();
    let error = complete(&layer).await.unwrap_err();
    assert!(error.is_transient(), "{error}");
    assert!(layer.is_whole());
    assert_eq!(layer.verdict(), None);
    assert!(!layer.is_complete());
    case.source.heal();
    layer.completed().await;
    assert_eq!(layer.verdict(), Some(Verdict::Sound(diff_id(&case.blob))));
}

#[tokio::test]
async fn images_with_a_layer_in_common_fetch_and_prove_it_once() {
    let case = Case::new(files(3, 5000), Shape::default());
    let (one, other) = (case.open().await, case.open().await);
    let broken = Arc::new(TestSource::new([case.blob.bytes.clone()]).named("broken"));
    let third = open_layer(broken.clone(), &case.blob.descriptor, &case.store, &case.options).await.unwrap();
    case.source.hold();
    let reads = async { tokio::join!(case.check(&one, 0), case.check(&other, 0)) };
    let releasing = async {
        case.source.held(1).await;
        case.source.release();
    };
    let ((first, second), ()) = tokio::join!(reads, releasing);
    first.unwrap();
    second.unwrap();
    assert_eq!(case.source.take_requests().len(), 1);
    // The failure of one's source is not the other's.
    broken.fail();
    broken.hold();
    let reads = async { tokio::join!(case.check(&third, 1), case.check(&other, 1)) };
    let releasing = async {
        broken.held(1).await;
        broken.release();
    };
    let ((broken_read, read), ()) = tokio::join!(reads, releasing);
    broken_read.unwrap_err();
    read.unwrap();
    complete(&one).await.unwrap();
    assert_eq!(other.verdict(), one.verdict());
    assert!(other.is_complete());
    // What one image claims is its own affair.
    let liar = open_claiming(&case, case.source.clone(), &DiffId(Digest::sha256_of(b"another"))).await;
    assert!(!liar.is_complete());
    until("a verdict", || liar.verdict().is_some()).await;
    assert!(case.check(&liar, 0).await.is_err());
    assert!(other.is_complete());
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
