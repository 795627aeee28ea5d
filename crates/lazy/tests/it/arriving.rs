//! Who waits for a frame waits for no other: answers that stop in the middle, and that break off there.

use std::{sync::Arc, time::Duration};

use loris_format::position::DataOffset;
use loris_lazy::{
    Completion, FetchPolicy, OpenOptions, Store, StoreOptions, complete, complete_all, open::open_layer,
    prefetch_in_order,
};
use loris_oci::{
    Reference,
    registry::{Client, Config},
};
use loris_testkit::registry::{Effect, Fault, FaultRegistry};

use crate::{
    Case, STRICT,
    blob::{Shape, estargz, files, noise},
    until,
};

/// One file of ten chunks, each a frame; all of them are one request.
fn case() -> Arc<Case> {
    Arc::new(Case::new(vec![("big".to_owned(), noise(1, 40_000))], Shape::default()))
}

const CHUNK: usize = 4096;

#[tokio::test]
async fn a_read_is_answered_while_the_rest_of_its_request_is_withheld() {
    let case = case();
    let layer = case.open().await;
    let all = case.blob.members[1].start..case.blob.members[10].end;
    // A byte too few of the fourth frame.
    case.source.withhold_from(case.blob.members[4].end - 1);
    let whole = tokio::spawn({
        let (case, layer) = (Arc::clone(&case), Arc::clone(&layer));
        async move { case.check(&layer, 0).await }
    });
    until("a request", || layer.statistics().waits >= 1).await;
    case.check_part(&layer, 0, 0, 3 * CHUNK).await.unwrap();
    assert_eq!(layer.statistics().extents_filled, 3);
    assert!(!whole.is_finished());
    let fourth = tokio::spawn({
        let (case, layer) = (Arc::clone(&case), Arc::clone(&layer));
        async move { case.check_part(&layer, 0, 3 * CHUNK, CHUNK).await }
    });
    case.source.withhold_from(case.blob.members[4].end);
    fourth.await.unwrap().unwrap();
    assert_eq!(layer.statistics().extents_filled, 4);
    assert!(!whole.is_finished());
    case.source.withhold_from(u64::MAX);
    whole.await.unwrap().unwrap();
    assert_eq!(case.source.take_requests(), std::slice::from_ref(&all));
}

#[tokio::test]
async fn a_read_waits_for_its_frame_and_not_for_the_window_of_completion() {
    let case = case();
    let layer = case.open().await;
    case.source.withhold_from(case.blob.members[2].start);
    let completing = tokio::spawn({
        let layer = Arc::clone(&layer);
        async move { complete_all(&[layer], &Completion::default()).await }
    });
    until("the window", || layer.statistics().completion_bytes > 0).await;
    case.check_part(&layer, 0, 0, CHUNK).await.unwrap();
    assert_eq!(layer.statistics().extents_filled, 1);
    case.source.withhold_from(u64::MAX);
    completing.await.unwrap().unwrap();
    assert!(layer.is_complete());
    // The window is as large as the layer; nothing was asked for beside it.
    assert_eq!(case.source.take_requests().len(), 1);
    assert_eq!(layer.statistics().demand_bytes, 0);
}

#[tokio::test]
async fn a_read_does_not_wait_for_the_turn_of_what_nobody_waits_for() {
    let mut case = Case::new(files(9, 4096), Shape::default());
    case.options.policy = FetchPolicy { max_request_bytes: 10_000, ..STRICT };
    // One request ahead of readers at a time.
    let options = StoreOptions { requests: 1, ..StoreOptions::default() };
    let other = tempfile::tempdir().unwrap();
    case.store = Store::open_with(other.path(), &options).unwrap();
    let layer = case.open().await;
    case.source.withhold(case.blob.members[1].clone());
    let all = vec![(Arc::clone(&layer), DataOffset(0)..DataOffset(layer.index().data_length()))];
    let prefetching = tokio::spawn(async move { prefetch_in_order(&all).await });
    until("the first request", || layer.statistics().prefetch_bytes == 0 && layer.statistics().requests >= 2).await;
    // It is on its way to be fetched when its turn comes, which it does not.
    case.check(&layer, 6).await.unwrap();
    assert_eq!(case.source.take_requests().len(), 2);
    assert!(layer.statistics().demand_bytes > 0);
    case.source.withhold(0..0);
    prefetching.await.unwrap().unwrap();
}

#[tokio::test]
async fn what_came_before_an_answer_broke_off_is_kept() {
    let case = case();
    let layer = case.open().await;
    case.source.break_at(case.blob.members[4].start + 1);
    let error = case.check(&layer, 0).await.unwrap_err();
    assert!(matches!(&error, loris_lazy::ReadError::Ensure(error) if error.is_transient()), "{error}");
    assert_eq!(layer.statistics().extents_filled, 3);
    assert_eq!(case.source.take_requests().len(), 1);
    case.check(&layer, 0).await.unwrap();
    let rest = case.blob.members[4].start..case.blob.members[10].end;
    assert_eq!(case.source.take_requests(), std::slice::from_ref(&rest));
    // Also what the proof needs: no header is fetched again, but for the first one, which nobody has read.
    complete(&layer).await.unwrap();
    let headers = case.source.take_requests();
    assert!(headers.iter().all(|range| range.end <= case.blob.members[1].start), "{headers:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_that_stalls_in_the_middle_has_answered_what_it_has_sent() {
    let blob = estargz(files(6, 60_000), Shape { chunk_bytes: 20_000, ..Shape::default() });
    let registry = FaultRegistry::start().await;
    registry.add_blob(blob.bytes.clone());
    let reference: Reference = registry.reference("latest").parse().unwrap();
    // Nothing is asked for a second time while the test runs.
    let for_ever = Duration::from_secs(3600);
    let config = Config {
        plain_http: true,
        hosts_dirs: Vec::new(),
        stall_timeout: for_ever,
        deadline: for_ever,
        ..Config::default()
    };
    let source = Arc::new(Client::new(config).unwrap().source(&reference));
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    let options = OpenOptions { policy: STRICT, ..OpenOptions::default() };
    let layer = open_layer(source, &blob.descriptor, &store, &options).await.unwrap();
    registry.forget_requests();

    let sent = blob.members[3].end - blob.members[1].start;
    registry.fault(Fault::new(Effect::Stall(sent, for_ever)).path("/blobs/"));
    let extents = layer.index().extents().to_vec();
    let end = |number: usize| DataOffset(extents[number].data.0 + extents[number].length);
    let all = tokio::spawn({
        let (layer, range) = (Arc::clone(&layer), extents[0].data..end(17));
        async move { layer.ensure(range).await }
    });
    until("the request", || !registry.requests().is_empty()).await;
    layer.ensure(extents[0].data..end(2)).await.unwrap();
    let mut content = vec![0; 60_000];
    layer.read_filled(extents[0].data, &mut content).unwrap();
    assert!(content == blob.files[0].1);
    assert_eq!(layer.statistics().extents_filled, 3);
    assert_eq!(registry.requests().len(), 1);
    assert!(!all.is_finished());
    all.abort();
}
