//! Reading: what is fetched, how often, and what happens where it is wrong.

use std::sync::Arc;

use loris_format::position::{DataOffset, FileOffset};
use loris_lazy::{
    EnsureError, FetchPolicy, OpenOptions, ReadError, Recorder, Store, StoreOptions, complete, prefetch,
    prefetch_in_order,
};
use proptest::prelude::*;

use crate::{
    Case, STRICT,
    blob::{Shape, files, noise},
    source::unreachable_registry,
    until,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_hundred_readers_of_one_frame_are_one_fetch() {
    let case = Arc::new(Case::new(files(3, 4000), Shape::default()));
    let layer = case.open().await;
    case.source.hold();
    let readers: Vec<_> = (0..200)
        .map(|number| {
            let (case, layer) = (case.clone(), layer.clone());
            tokio::spawn(async move { case.check_part(&layer, 1, number * 20, 20).await })
        })
        .collect();
    case.source.held(1).await;
    until("a reader", || layer.statistics().waits >= 200).await;
    case.source.release();
    for reader in readers {
        reader.await.unwrap().unwrap();
    }
    let member = case.blob.members[2].clone();
    assert_eq!(case.source.take_requests(), std::slice::from_ref(&member));
    let statistics = layer.statistics();
    assert_eq!((statistics.extents_filled, statistics.extents_total), (1, 3));
    assert_eq!(statistics.errors, 0);
    case.check(&layer, 1).await.unwrap();
    assert_eq!(case.source.take_requests(), []);
}

#[tokio::test]
async fn neighbouring_frames_are_one_request() {
    let mut case = Case::new(vec![("big".to_owned(), noise(1, 40_000))], Shape::default());
    let layer = case.open().await;
    case.check(&layer, 0).await.unwrap();
    let members = case.blob.members.clone();
    assert_eq!(members.len(), 11, "a header and ten chunks");
    let all = members[1].start..members[10].end;
    assert_eq!(case.source.take_requests(), std::slice::from_ref(&all));

    // Over a gap, where the policy pays for it; the frame in the gap is kept then.
    for (gap_bytes, expected) in [(0, 2), (8192, 1)] {
        case.options.policy = FetchPolicy { gap_bytes, ..STRICT };
        let other = tempfile::tempdir().unwrap();
        case.store = loris_lazy::Store::open(other.path()).unwrap();
        let layer = case.open().await;
        let extents = layer.index().extents();
        layer.ensure(extents[1].data..extents[2].data).await.unwrap();
        layer.ensure(extents[5].data..extents[6].data).await.unwrap();
        case.source.take_requests();
        layer.ensure(extents[0].data..extents[3].data).await.unwrap();
        assert_eq!(case.source.take_requests().len(), expected, "gap of {gap_bytes}");
    }
}

#[tokio::test]
async fn what_lies_ahead_is_fetched_and_not_waited_for() {
    let mut case = Case::new(files(6, 4096), Shape::default());
    case.options.policy = FetchPolicy { read_ahead_bytes: 10_000, ..STRICT };
    let layer = case.open().await;
    case.check(&layer, 0).await.unwrap();
    let members = &case.blob.members;
    // In one answer, behind what somebody waits for.
    assert_eq!(case.source.take_requests(), std::slice::from_ref(&(members[1].start..members[3].end)));
    until("what lies ahead", || layer.statistics().extents_filled >= 3).await;
    case.check(&layer, 2).await.unwrap();
    assert!(case.source.take_requests().iter().all(|range| range.start >= members[3].end));
}

#[tokio::test]
async fn a_large_file_is_read_ahead_in_sequence_and_only_then() {
    let shape = || Shape { chunk_bytes: 16 << 10, ..Shape::default() };
    let policy = FetchPolicy { read_ahead_bytes: 1 << 20, sequential_bytes: 1 << 20, ..STRICT };
    let chunk = 16 << 10;
    // Far apart: nothing but what was asked for.
    let mut case = Case::new(vec![("big".to_owned(), noise(1, 4 << 20))], shape());
    case.options.policy = policy;
    let layer = case.open().await;
    for number in [200, 20, 150, 60, 100] {
        case.check_part(&layer, 0, number * chunk, 100).await.unwrap();
    }
    assert_eq!(layer.statistics().extents_filled, 5);
    // One after the other: soon far ahead of the reader.
    let mut case = Case::new(vec![("big".to_owned(), noise(1, 4 << 20))], shape());
    case.options.policy = policy;
    let layer = case.open().await;
    for number in 0..16 {
        case.check_part(&layer, 0, number * chunk, chunk).await.unwrap();
    }
    until("what lies ahead", || layer.statistics().extents_filled >= 32).await;
    let before = layer.statistics().waits;
    case.check_part(&layer, 0, 16 * chunk, 8 * chunk).await.unwrap();
    assert_eq!(layer.statistics().waits, before);
}

#[tokio::test]
async fn a_list_is_prefetched_in_its_order_with_few_requests() {
    // Each file makes more than a window, so that the order of the list shows; the last two are small and side by side.
    let mut contents: Vec<_> = (0..4).map(|number| (format!("big-{number}"), noise(number, 1_200_000))).collect();
    contents.extend([("a".to_owned(), noise(9, 4000)), ("b".to_owned(), noise(8, 4000)), ("c".to_owned(), vec![])]);
    let mut case = Case::new(contents, Shape { chunk_bytes: 2 << 20, ..Shape::default() });
    case.options.policy = FetchPolicy { max_request_bytes: 4 << 20, ..STRICT };
    // One request at a time: several go side by side.
    let options = StoreOptions { requests: 1, ..StoreOptions::default() };
    case.store = Store::open_with(case.directory.path(), &options).unwrap();
    let layer = case.open().await;
    let range = |name: &str| {
        let node = layer.index().lookup(name.as_bytes()).unwrap();
        let loris_format::index::NodeKind::Regular(content) = &layer.index().node(node).kind else { panic!("{name}") };
        (Arc::clone(&layer), content.data..DataOffset(content.data.0 + content.size))
    };
    let wanted: Vec<_> = ["big-2", "big-0", "b", "a", "big-2"].into_iter().map(range).collect();
    prefetch_in_order(&wanted).await.unwrap();
    let members = &case.blob.members;
    let range = |from: usize, to: usize| members[from].start..members[to].end;
    // The first member holds the first header alone.
    assert_eq!(case.source.take_requests(), [range(3, 3), range(1, 1), range(5, 6)]);
    case.source.fail();
    for file in [2, 0, 4, 5, 6] {
        case.check(&layer, file).await.unwrap();
    }
    case.check(&layer, 1).await.unwrap_err();
}

#[tokio::test]
async fn what_is_read_is_recorded_in_order_and_once() {
    let case =
        Case::new(vec![("dir/big".to_owned(), noise(1, 20_000)), ("small".to_owned(), noise(2, 10))], Shape::default());
    let layer = case.open().await;
    let layers = [Arc::clone(&layer)];
    let recorder = Recorder::begin(&layers);
    case.check_part(&layer, 0, 9000, 100).await.unwrap();
    case.check(&layer, 1).await.unwrap();
    case.check_part(&layer, 0, 0, 100).await.unwrap();
    case.check_part(&layer, 0, 4000, 10_000).await.unwrap();
    let list = String::from_utf8(recorder.list(&layers)).unwrap();
    assert_eq!(list, "/dir/big\t8192-12288\n/small\t0-10\n/dir/big\t0-8192\n/dir/big\t12288-16384\n");
}

#[tokio::test]
async fn a_flipped_byte_fails_its_own_read_and_no_other() {
    for files_per_member in [1, 4] {
        let case = Case::new(files(4, 3000), Shape { files_per_member, ..Shape::default() });
        let layer = case.open().await;
        let damaged = if files_per_member == 1 { case.blob.members[3].clone() } else { case.blob.members[1].clone() };
        // In the last file of a member that is shared: noise is stored, so that nothing but its bytes changes.
        let place = if files_per_member == 1 { damaged.start + 1500 } else { damaged.end - 1500 };
        let bytes = case.blob.flipped(place);
        case.source.fault(move |range, _| {
            Ok(bytes.slice(usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()))
        });
        let bad = if files_per_member == 1 { 2 } else { 3 };
        for file in 0..4 {
            let result = case.check(&layer, file).await;
            if file != bad {
                result.unwrap();
                continue;
            }
            let error = result.unwrap_err();
            assert!(
                matches!(&error, ReadError::Ensure(EnsureError::Mismatch { .. } | EnsureError::Decode { .. })),
                "{error}"
            );
            let text = error.to_string();
            let place = format!("layer {}: /file-{bad} at offset 0:", case.blob.descriptor.digest);
            assert!(text.starts_with(&place), "{text}");
        }
        assert_eq!(layer.statistics().extents_filled, 3);
        // Nothing of it is remembered.
        case.source.heal();
        case.check_all(&layer).await;
    }
}

#[tokio::test]
async fn bad_answers_fail_and_are_forgotten() {
    type Answer = fn(std::ops::Range<u64>, bytes::Bytes) -> Result<bytes::Bytes, loris_oci::Error>;
    type Expected = fn(&EnsureError) -> bool;
    let cases: [(&str, Answer, Expected, bool); 5] = [
        ("error", |_, _| Err(unreachable_registry()), |error| matches!(error, EnsureError::Fetch { .. }), true),
        (
            "short",
            |_, bytes| Ok(bytes.slice(1..)),
            |error| matches!(error, EnsureError::WrongLength { found, range, .. } if found + 1 == range.length),
            true,
        ),
        (
            "long",
            |_, bytes| Ok([&bytes[..], &[0]].concat().into()),
            |error| matches!(error, EnsureError::WrongLength { found, range, .. } if *found == range.length + 1),
            true,
        ),
        (
            "zeros",
            |_, bytes| Ok(vec![0; bytes.len()].into()),
            |error| matches!(error, EnsureError::Decode { path, .. } if path == "/file-0"),
            false,
        ),
        (
            "panic",
            |_, _| panic!("a mistake in the source"),
            |error| matches!(error, EnsureError::Interrupted { .. }),
            true,
        ),
    ];
    for (name, answer, expected, transient) in cases {
        let case = Case::new(files(1, 4000), Shape::default());
        let layer = case.open().await;
        case.source.fault(answer);
        let all = DataOffset(0)..DataOffset(layer.index().data_length());
        let (one, two) = tokio::join!(layer.ensure(all.clone()), layer.ensure(all.clone()));
        for error in [one.unwrap_err(), two.unwrap_err()] {
            assert!(expected(&error), "{name}: {error}");
            assert_eq!(error.is_transient(), transient, "{name}");
        }
        assert!(!layer.is_filled(&all), "{name}");
        assert_eq!(case.source.take_requests().len(), 1, "{name}");
        case.source.heal();
        case.check_all(&layer).await;
        assert_eq!(case.source.take_requests().len(), 1, "{name}");
    }
}

#[tokio::test]
async fn a_waiter_that_goes_away_takes_nothing_with_it() {
    let case = Arc::new(Case::new(files(1, 4000), Shape::default()));
    let layer = case.open().await;
    case.source.hold();
    let first = tokio::spawn({
        let (case, layer) = (case.clone(), layer.clone());
        async move { case.check(&layer, 0).await }
    });
    case.source.held(1).await;
    let second = tokio::spawn({
        let (case, layer) = (case.clone(), layer.clone());
        async move { case.check(&layer, 0).await }
    });
    until("a reader", || layer.statistics().waits >= 2).await;
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    case.source.release();
    second.await.unwrap().unwrap();
    assert_eq!(case.source.take_requests().len(), 1);
}

#[tokio::test]
async fn what_nobody_waits_for_any_more_is_kept() {
    let case = Arc::new(Case::new(files(1, 4000), Shape::default()));
    let layer = case.open().await;
    case.source.hold();
    let only = tokio::spawn({
        let (case, layer) = (case.clone(), layer.clone());
        async move { case.check(&layer, 0).await }
    });
    case.source.held(1).await;
    only.abort();
    assert!(only.await.unwrap_err().is_cancelled());
    case.source.release();
    until("the fetch", || layer.is_complete()).await;
    case.check(&layer, 0).await.unwrap();
    assert_eq!(case.source.take_requests().len(), 1);
}

#[tokio::test]
async fn prefetch_stops_at_the_landmark() {
    let shape = Shape { landmark: Some(5), ..Shape::default() };
    let case = Case::new(files(10, 3000), shape);
    let layer = case.open().await;
    prefetch(std::slice::from_ref(&layer)).await.unwrap();
    case.source.fail();
    for file in 0..5 {
        case.check(&layer, file).await.unwrap();
    }
    assert!(layer.statistics().extents_filled < 7);
    assert!(complete(&layer).await.unwrap_err().is_transient());
    case.source.heal();
    complete(&layer).await.unwrap();
    assert!(layer.is_complete());
    case.source.fail();
    case.check_all(&layer).await;

    let unmarked = Case::new(files(3, 3000), Shape::default());
    let layer = unmarked.open().await;
    prefetch(std::slice::from_ref(&layer)).await.unwrap();
    assert_eq!(unmarked.source.take_requests(), []);
}

#[tokio::test]
async fn memory_is_bounded_and_large_frames_still_pass() {
    let mut case = Case::new(files(8, 50_000), Shape { chunk_bytes: 50_000, ..Shape::default() });
    let options = loris_lazy::StoreOptions {
        memory_bytes: 110_000,
        requests: 8,
        decoders: 2,
        ..loris_lazy::StoreOptions::default()
    };
    let other = tempfile::tempdir().unwrap();
    case.store = loris_lazy::Store::open_with(other.path(), &options).unwrap();
    let case = Arc::new(case);
    let layer = case.open().await;
    case.source.hold();
    let readers: Vec<_> = (0..8)
        .map(|file| {
            let (case, layer) = (case.clone(), layer.clone());
            tokio::spawn(async move { case.check(&layer, file).await })
        })
        .collect();
    until("a reader", || layer.statistics().waits >= 8).await;
    case.source.held(1).await;
    // Time for another one to come, which must not.
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    assert_eq!(case.source.take_requests().len(), 1, "a frame with its decoded form fills the bound");
    case.source.release();
    for reader in readers {
        reader.await.unwrap().unwrap();
    }

    let options = loris_lazy::StoreOptions { memory_bytes: 1, ..options };
    let other = tempfile::tempdir().unwrap();
    let tiny = loris_lazy::Store::open_with(other.path(), &options).unwrap();
    let layer =
        loris_lazy::open::open_layer(case.source.clone(), &case.blob.descriptor, &tiny, &case.options).await.unwrap();
    case.check_all(&layer).await;
}

#[tokio::test]
async fn only_regular_files_are_read() {
    let case =
        Case::new(vec![("dir/file".to_owned(), noise(1, 10)), ("empty".to_owned(), Vec::new())], Shape::default());
    let layer = case.open().await;
    let directory = layer.index().lookup(b"dir").unwrap();
    let error = layer.read(directory, FileOffset(0), &mut [0; 10]).await.unwrap_err();
    assert!(matches!(&error, ReadError::NotRegular { path, .. } if path == "/dir"), "{error}");
    case.check(&layer, 1).await.unwrap();
    for (at, length) in [(0, 0), (10, 5), (11, 5), (usize::MAX, 1), (9, 5)] {
        let file = layer.index().lookup(b"dir/file").unwrap();
        let mut buffer = vec![0; length];
        let count = layer.read(file, FileOffset(at as u64), &mut buffer).await.unwrap();
        assert_eq!(count, 10usize.saturating_sub(at).min(length), "at {at}");
    }
    let nothing = DataOffset(1 << 50)..DataOffset(1 << 51);
    assert!(layer.is_filled(&nothing));
    layer.ensure(nothing).await.unwrap();
}

#[test]
fn a_full_disk_is_an_error_and_fills_nothing() {
    let test = "a_full_disk_is_an_error_and_fills_nothing";
    if !loris_testkit::require_root(test) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mount = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=256k,mode=0700", "tmpfs"])
        .arg(directory.path())
        .output();
    if !mount.is_ok_and(|output| output.status.success()) {
        loris_testkit::skip(test, "permission to mount a tmpfs");
        return;
    }
    let unmount = Unmount(directory.path().to_owned());
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap().block_on(async {
        let mut case = Case::new(files(1, 500_000), Shape { chunk_bytes: 20_000, ..Shape::default() });
        case.store = loris_lazy::Store::open(directory.path()).unwrap();
        case.options = OpenOptions { policy: FetchPolicy { max_request_bytes: 25_000, ..STRICT }, ..case.options };
        let layer = case.open().await;
        let error = case.check(&layer, 0).await.unwrap_err();
        assert!(
            matches!(&error, ReadError::Ensure(error @ EnsureError::NoSpace { path, .. })
            if path.starts_with(directory.path()) && error.is_transient()),
            "{error}"
        );
        // What is there is right, and what is not there is not marked.
        case.source.fail();
        let mut filled = 0;
        for extent in layer.index().extents() {
            if layer.is_filled(&(extent.data..DataOffset(extent.data.0 + extent.length))) {
                let at = usize::try_from(extent.file_offset.0).unwrap();
                case.check_part(&layer, 0, at, usize::try_from(extent.length).unwrap()).await.unwrap();
                filled += 1;
            }
        }
        assert!(filled < layer.index().extents().len());
        assert_eq!(layer.statistics().extents_filled, filled as u64);
    });
    drop(unmount);
}

struct Unmount(std::path::PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        let status = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
        assert!(std::thread::panicking() || status.unwrap().success());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn random_reads_are_right(
        sizes in proptest::collection::vec(0usize..30_000, 1..8),
        reads in proptest::collection::vec((any::<prop::sample::Index>(), 0usize..32_000, 0usize..20_000), 1..30),
        chunk_bytes in 500usize..9000,
        files_per_member in 1usize..4,
        gap_bytes in 0u64..20_000,
        max_request_bytes in 1u64..40_000,
        read_ahead_bytes in 0u64..20_000,
    ) {
        let files: Vec<_> = sizes.iter().enumerate()
            .map(|(number, &size)| (format!("file-{number}"), noise(number as u64 + 7, size)))
            .collect();
        let mut case = Case::new(files, Shape { chunk_bytes, files_per_member, ..Shape::default() });
        case.options.policy = FetchPolicy { gap_bytes, max_request_bytes, read_ahead_bytes, sequential_bytes: 0 };
        let case = Arc::new(case);
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap().block_on(async {
            let layer = case.open().await;
            let readers: Vec<_> = reads.iter().map(|(file, at, length)| {
                let (case, layer, file, at, length) = (case.clone(), layer.clone(), file.index(sizes.len()), *at, *length);
                tokio::spawn(async move { case.check_part(&layer, file, at, length).await })
            }).collect();
            for reader in readers {
                reader.await.unwrap().unwrap();
            }
            complete(&layer).await.unwrap();
            case.check_all(&layer).await;
            // However it was read, no frame was decoded twice.
            let decoded: u64 = layer.index().frames().iter().map(|frame| frame.decoded_length).sum();
            prop_assert_eq!(layer.statistics().decoded_bytes, decoded);
            Ok(())
        })?;
    }
}
