//! A bound on the disk.

use std::{os::unix::fs::MetadataExt as _, path::Path};

use loris_lazy::{EnsureError, ReadError, Store, StoreOptions, complete};

use crate::{
    blob::{Shape, noise},
    content::{Several, fill},
    until,
};

const IMAGES: usize = 64;
const FILE: usize = 50_000;

/// Bytes of the blocks of everything below a directory.
fn allocated(path: &Path) -> u64 {
    let Ok(metadata) = path.symlink_metadata() else { return 0 };
    let below = std::fs::read_dir(path).into_iter().flatten().filter_map(Result::ok);
    metadata.blocks() * 512 + below.map(|entry| allocated(&entry.path())).sum::<u64>()
}

fn images(quota: u64) -> Several {
    let files =
        |image: usize| (0..4).map(|file| (format!("f{file}"), noise((image * 4 + file) as u64 + 1, FILE))).collect();
    let mut case = Several::new((0..IMAGES).map(|image| (files(image), Shape::default())));
    let options = StoreOptions { quota_bytes: Some(quota), ..StoreOptions::default() };
    case.store = Store::open_with(case.directory.path(), &options).unwrap();
    case
}

#[tokio::test]
async fn sixty_four_images_one_after_the_other_stay_below_one_quota() {
    let quota = 3 << 20;
    let case = images(quota);
    for round in 0..2 {
        for image in 0..IMAGES {
            let layer = case.open(image).await;
            fill(&layer).await;
            let taken = allocated(case.directory.path());
            assert!(taken <= quota, "round {round}, image {image}: {taken} of {quota}");
            case.check_filled(&layer);
        }
    }
    // The last ones are here, the first ones are not.
    let here: Vec<_> = case.store.census().unwrap().into_iter().map(|layer| layer.blob).collect();
    assert!(here.len() > 5 && here.len() < 20, "{}", here.len());
    for (image, blob) in case.blobs.iter().enumerate() {
        let expected = image + here.len() >= IMAGES;
        assert_eq!(here.contains(&blob.descriptor.digest.to_string()), expected, "image {image}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn sixty_four_images_at_once_stay_below_one_quota() {
    let quota = 10 << 20;
    let case = std::sync::Arc::new(images(quota));
    let mut layers = Vec::new();
    for image in 0..IMAGES {
        layers.push(case.open(image).await);
    }
    let work: Vec<_> =
        layers.iter().cloned().map(|layer| tokio::spawn(async move { complete(&layer).await })).collect();
    let mut refused = 0;
    for done in work {
        if let Err(error) = done.await.unwrap() {
            assert!(matches!(error, EnsureError::Quota { .. }) && error.is_no_space(), "{error}");
            assert!(error.to_string().contains("--cache-quota"), "{error}");
            refused += 1;
        }
        let taken = allocated(case.directory.path());
        assert!(taken <= quota, "{taken} of {quota}");
    }
    assert!(refused > 10, "{refused}");
    // A read that needs more says so, and costs nothing. Small ones may still find room.
    let mut failed = None;
    'all: for (image, layer) in layers.iter().enumerate() {
        for file in 0..4 {
            case.source.take_requests();
            if let Err(error) = case.read(layer, image, file).await {
                assert!(matches!(&error, ReadError::Ensure(EnsureError::Quota { .. })), "{error}");
                assert_eq!(case.source.take_requests(), []);
                failed = Some((image, file));
                break 'all;
            }
            assert!(allocated(case.directory.path()) <= quota);
        }
    }
    let (image, file) = failed.unwrap();
    // When others go, there is room.
    for layer in &layers {
        until("nobody else", || std::sync::Arc::strong_count(layer) == 1).await;
    }
    let layer = layers.swap_remove(image);
    drop(layers);
    case.read(&layer, image, file).await.unwrap();
    assert!(allocated(case.directory.path()) <= quota);
    case.check_filled(&layer);
}

#[tokio::test]
async fn what_is_pinned_or_in_use_stays() {
    let quota = 3 << 20;
    let case = images(quota);
    let pinned = case.open(0).await;
    fill(&pinned).await;
    let pinned_at = pinned.directory().to_owned();
    drop(pinned);
    let found = case.store.census().unwrap().remove(0);
    assert!(case.store.set_pinned(&found, true).unwrap());
    let used = case.open(1).await;
    fill(&used).await;
    for image in 2..IMAGES {
        fill(&case.open(image).await).await;
    }
    let census = case.store.census().unwrap();
    let of = |directory: &Path| census.iter().find(|layer| layer.directory == directory).unwrap();
    assert!(of(&pinned_at).pinned && !of(&pinned_at).in_use);
    assert!(of(used.directory()).in_use && !of(used.directory()).pinned);
    assert_eq!(of(&pinned_at).extents_filled, of(&pinned_at).extents_total);
    let taken = allocated(case.directory.path());
    assert!(taken <= quota, "{taken}");
    assert_eq!(case.store.totals().unwrap().total_bytes, taken);
    // Unpinned, it is the oldest.
    assert!(case.store.set_pinned(of(&pinned_at), false).unwrap());
    for image in 2..20 {
        fill(&case.open(image).await).await;
    }
    assert!(!pinned_at.exists());
}

/// Processes with the same quota share it.
#[tokio::test]
async fn two_processes_share_a_quota() {
    let quota = 4 << 20;
    let case = images(quota);
    let options = StoreOptions { quota_bytes: Some(quota), ..StoreOptions::default() };
    let other = Store::open_with(case.directory.path(), &options).unwrap();
    for image in 0..IMAGES {
        let store = if image % 2 == 0 { &case.store } else { &other };
        let layer =
            loris_lazy::open::open_layer(case.source.clone(), &case.blobs[image].descriptor, store, &case.options)
                .await;
        fill(&layer.unwrap()).await;
        let taken = allocated(case.directory.path());
        assert!(taken <= quota, "image {image}: {taken} of {quota}");
    }
}
