//! A fault at every single request of a full run, one run each: what is read is right or an error, and a second run
//! repairs whatever the first has left.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use bytes::Bytes;
use loris_lazy::{LazyLayer, Verdict, complete};
use loris_oci::Error;

use crate::{
    Case,
    blob::{Shape, files},
    source::unreachable_registry,
    until,
};

type Fault = fn(&Bytes) -> Result<Bytes, Error>;

const FAULTS: [(&str, Fault); 6] = [
    ("away", |_| Err(unreachable_registry())),
    ("gone", |_| Err(Error::NotFound { what: "blob".to_owned(), place: "memory".to_owned() })),
    ("short", |bytes| Ok(bytes.slice(..bytes.len() / 2))),
    ("long", |bytes| Ok([&bytes[..], b"more"].concat().into())),
    ("flipped", |bytes| {
        let mut bytes = bytes.to_vec();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        Ok(bytes.into())
    }),
    ("zeros", |bytes| Ok(vec![0; bytes.len()].into())),
];

/// Reads some of a layer on demand and then completes it; returns how many requests that took. Faults are no failure.
async fn run(case: &Case) -> Option<Arc<LazyLayer>> {
    let layer = case.try_open().await.ok()?;
    for file in [2, 0] {
        let _ = case.check(&layer, file).await;
    }
    let _ = complete(&layer).await;
    for file in 0..case.blob.files.len() {
        let _ = case.check(&layer, file).await;
    }
    Some(layer)
}

fn case() -> Case {
    // Large enough that the table of contents does not come with the first request together with everything else.
    Case::new(files(5, 9000), Shape { chunk_bytes: 4000, landmark: Some(2), ..Shape::default() })
}

#[tokio::test]
async fn a_fault_at_any_request_is_an_error_and_is_repaired() {
    let sound = case();
    let verdict = run(&sound).await.unwrap().verdict();
    assert!(matches!(verdict, Some(Verdict::Sound(_))), "{verdict:?}");
    let requests = sound.source.take_requests().len();
    assert!(requests > 3, "{requests}");
    for (name, fault) in FAULTS {
        for at in 0..requests + 2 {
            let case = case();
            let count = AtomicUsize::new(0);
            case.source.fault(move |_, bytes| match count.fetch_add(1, Ordering::SeqCst) {
                number if number == at => fault(&bytes),
                _ => Ok(bytes),
            });
            drop(run(&case).await);
            case.source.heal();
            let layer = case.try_open().await.unwrap_or_else(|error| panic!("{name} at {at}: {error}"));
            complete(&layer).await.unwrap_or_else(|error| panic!("{name} at {at}: {error}"));
            case.check_all(&layer).await;
            assert_eq!(layer.verdict(), verdict, "{name} at {at}");
            drop(layer);
            // The proof of the first run may still be writing what it has found.
            until(&format!("{name} at {at}: the end of unfinished files"), || {
                walk(case.directory.path()).iter().all(|name| !name.starts_with('.'))
            })
            .await;
        }
    }
}

fn walk(directory: &std::path::Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        names.push(entry.file_name().to_string_lossy().into_owned());
        if entry.file_type().unwrap().is_dir() {
            names.extend(walk(&entry.path()));
        }
    }
    names
}

#[tokio::test]
async fn two_hundred_readers_of_one_frame_are_one_fetch() {
    let case = Arc::new(case());
    let layer = case.open().await;
    case.source.hold();
    let readers: Vec<_> = (0..200)
        .map(|number| {
            let (case, layer) = (Arc::clone(&case), Arc::clone(&layer));
            tokio::spawn(async move { case.check_part(&layer, 1, number * 19, 100).await })
        })
        .collect();
    case.source.held(1).await;
    case.source.release();
    for reader in readers {
        reader.await.unwrap().unwrap();
    }
    assert_eq!(case.source.take_requests().len(), 1);
}
