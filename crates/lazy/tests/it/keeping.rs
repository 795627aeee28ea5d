//! Listing, checking and pruning what a store has.

use std::{
    fs::File,
    os::unix::fs::FileExt as _,
    time::{Duration, SystemTime},
};

use loris_format::limits::Limits;
use loris_lazy::{PruneOptions, Store, StoreError, StoreOptions, open::open_layer};

use crate::{
    blob::{Shape, files},
    content::{Several, fill},
    until,
};

fn flip(layer: &std::path::Path, at: u64) {
    let data = File::options().read(true).write(true).open(layer.join("data")).unwrap();
    let mut byte = [0];
    data.read_exact_at(&mut byte, at).unwrap();
    data.write_all_at(&[byte[0] ^ 0x20], at).unwrap();
}

#[tokio::test]
async fn a_flipped_byte_is_found_and_fetched_again() {
    let case = Several::new([(files(3, 10_000), Shape::default())]);
    let layer = case.open(0).await;
    fill(&layer).await;
    let place = layer.index().extents()[4].clone();
    let directory = layer.directory().to_owned();
    drop(layer);
    let old = SystemTime::now() - Duration::from_secs(5000);
    File::options().write(true).open(directory.join("lock")).unwrap().set_modified(old).unwrap();
    let verify = || {
        let stored = case.store.census().unwrap().remove(0);
        (case.store.verify(&stored, &Limits::default()).unwrap(), stored)
    };
    let (clean, stored) = verify();
    assert_eq!((clean.extents, clean.bytes, clean.without_digest, clean.faults.len()), (9, 30_000, 0, 0));
    assert_eq!((stored.extents_filled, stored.extents_total, stored.in_use), (9, 9, false));
    assert_eq!(stored.origins, ["memory"]);
    flip(&directory, place.data.0 + 17);
    let (found, _) = verify();
    let [fault] = &found.faults[..] else { panic!("{:?}", found.faults) };
    assert_eq!((fault.path.as_str(), fault.offset, fault.length), ("/file-1", 4096, 4096));
    assert_eq!(Some(fault.expected), place.digest);
    let (again, stored) = verify();
    assert_eq!((again.extents, again.faults.len(), stored.extents_filled), (8, 0, 8));
    assert_eq!(stored.last_used, old, "to look is not to use");

    let layer = case.open(0).await;
    assert!(!layer.is_whole());
    case.read(&layer, 0, 1).await.unwrap();
    assert!(layer.is_whole());
    case.check_filled(&layer);
}

/// A process that has the layer open notices what another one has found.
#[tokio::test]
async fn a_flipped_byte_under_a_reader_is_fetched_again() {
    let case = Several::new([(files(3, 10_000), Shape::default())]);
    let layer = case.open(0).await;
    fill(&layer).await;
    flip(layer.directory(), layer.index().extents()[0].data.0);
    let other = Store::open(case.directory.path()).unwrap();
    let stored = other.census().unwrap().remove(0);
    assert!(stored.in_use);
    assert_eq!(other.verify(&stored, &Limits::default()).unwrap().faults.len(), 1);
    let all = layer.index().extents()[0].data..layer.index().extents()[1].data;
    until("the other's finding", || !layer.is_filled(&all)).await;
    assert!(!layer.is_whole());
    case.read(&layer, 0, 0).await.unwrap();
    assert!(layer.is_whole());
    case.check_filled(&layer);
}

#[tokio::test]
async fn the_paranoid_find_it_when_they_read() {
    let mut case = Several::new([(files(3, 10_000), Shape::default())]);
    let layer = case.open(0).await;
    fill(&layer).await;
    let directory = layer.directory().to_owned();
    let (first, second) = (layer.index().extents()[0].data.0, layer.index().extents()[3].data.0);
    drop(layer);
    flip(&directory, first + 1);
    flip(&directory, second + 1);
    let options = StoreOptions { paranoid: true, ..StoreOptions::default() };
    case.store = Store::open_with(case.directory.path(), &options).unwrap();
    let layer = case.open(0).await;
    assert!(!layer.is_complete());
    case.read(&layer, 0, 0).await.unwrap();
    assert_eq!(case.source.take_requests().len(), 1, "one frame of it");
    case.read(&layer, 0, 0).await.unwrap();
    assert_eq!(case.source.take_requests(), []);
    // Where it can't be had again, it fails.
    case.source.fail();
    case.read(&layer, 0, 1).await.unwrap_err();
    case.read(&layer, 0, 2).await.unwrap();
    case.source.heal();
    case.read(&layer, 0, 1).await.unwrap();
    layer.completed().await;
    case.check_filled(&layer);
    assert!(layer.is_complete());
}

#[tokio::test]
async fn pruning_takes_what_it_was_told() {
    let names: [(&str, PruneOptions, &[usize]); 5] = [
        ("nothing but leftovers", PruneOptions::default(), &[]),
        ("all", PruneOptions { all: true, ..PruneOptions::default() }, &[1, 3, 4]),
        ("old", PruneOptions { older_than: Some(Duration::from_secs(2500)), ..PruneOptions::default() }, &[3, 4]),
        ("to nothing", PruneOptions { keep_bytes: Some(0), ..PruneOptions::default() }, &[1, 3, 4]),
        ("to plenty", PruneOptions { keep_bytes: Some(1 << 30), ..PruneOptions::default() }, &[]),
    ];
    for (name, options, expected) in names {
        let case = Several::new((0..5).map(|image| (files(image + 1, 3000), Shape::default())));
        let mut directories = Vec::new();
        for image in 0..5 {
            let layer = case.open(image).await;
            fill(&layer).await;
            directories.push(layer.directory().to_owned());
        }
        // The first is in use, the third pinned; the others are older the higher their number.
        let _used = case.open(0).await;
        let census = case.store.census().unwrap();
        let third = census.iter().find(|layer| layer.directory == directories[2]).unwrap();
        case.store.set_pinned(third, true).unwrap();
        for (age, directory) in directories.iter().enumerate() {
            let at = SystemTime::now() - Duration::from_secs(1000 * age as u64);
            File::options().write(true).open(directory.join("lock")).unwrap().set_modified(at).unwrap();
        }
        let left = case.directory.path().join(".digests-old");
        File::create(&left).unwrap().set_modified(SystemTime::now() - Duration::from_secs(7200)).unwrap();
        let young = directories[0].join(".toc-new");
        File::create(&young).unwrap();
        let would = case.store.prune(&PruneOptions { dry_run: true, ..options }).unwrap();
        assert!(directories.iter().all(|directory| directory.exists()) && left.exists(), "{name}");
        let did = case.store.prune(&options).unwrap();
        assert_eq!(would.layers, did.layers, "{name}");
        assert_eq!((would.other_files, did.other_files), (1, 1), "{name}");
        assert!(!left.exists() && young.exists(), "{name}");
        for (image, directory) in directories.iter().enumerate() {
            assert_eq!(directory.exists(), !expected.contains(&image), "{name}: {image}");
            assert_eq!(
                did.layers.iter().any(|layer| layer.directory == *directory),
                expected.contains(&image),
                "{name}"
            );
        }
        assert_eq!(did.freed_bytes > 0, !expected.is_empty(), "{name}");
        // What is gone comes again.
        let layer = case.open(4).await;
        fill(&layer).await;
        case.check_filled(&layer);
    }
}

#[tokio::test]
async fn a_layer_without_table_of_contents_is_not_checked() {
    let case = Several::new([(files(1, 3000), Shape::default())]);
    let layer = case.open(0).await;
    std::fs::remove_file(layer.directory().join("toc")).unwrap();
    let stored = case.store.census().unwrap().remove(0);
    let error = case.store.verify(&stored, &Limits::default()).unwrap_err();
    assert!(matches!(error, StoreError::NoTableOfContents { .. }), "{error}");
}

/// Opening, filling and closing in several threads, each with a store of its own as processes have, while another one
/// prunes and verifies all the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn pruning_and_checking_disturb_nobody() {
    let case =
        std::sync::Arc::new(Several::new([(files(6, 9000), Shape::default()), (files(4, 9000), Shape::default())]));
    let done = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let sweeper = std::thread::spawn({
        let (store, done) = (Store::open(case.directory.path()).unwrap(), done.clone());
        move || {
            let mut removed = 0;
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                removed += store.prune(&PruneOptions { all: true, ..PruneOptions::default() }).unwrap().layers.len();
                for layer in store.census().unwrap() {
                    match store.verify(&layer, &Limits::default()) {
                        Ok(checked) => assert_eq!(checked.faults, []),
                        Err(StoreError::NoTableOfContents { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            }
            removed
        }
    });
    let users: Vec<_> = (0..3)
        .map(|user| {
            let case = case.clone();
            tokio::spawn(async move {
                let store = Store::open(case.directory.path()).unwrap();
                for round in 0..25 {
                    let blob = (round + user) % 2;
                    let descriptor = &case.blobs[blob].descriptor;
                    let layer = open_layer(case.source.clone(), descriptor, &store, &case.options).await.unwrap();
                    for file in 0..4 {
                        case.read(&layer, blob, (file + user) % 4).await.unwrap();
                    }
                    case.check_filled(&layer);
                }
            })
        })
        .collect();
    for user in users {
        user.await.unwrap();
    }
    done.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(sweeper.join().unwrap() > 0, "nothing was ever pruned");
}
