//! What a store keeps, and from whom.

use std::{
    fs::File,
    io::BufRead as _,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    sync::Arc,
};

use loris_format::position::DataOffset;
use loris_lazy::{LazyLayer, Store, StoreError, complete, error::LayerError, open::open_layer};

use crate::{
    Case,
    blob::{Shape, files},
};

async fn reopen(case: &mut Case) -> Arc<LazyLayer> {
    case.store = case.second_store();
    case.try_open().await.unwrap()
}

#[tokio::test]
async fn a_restart_needs_no_network_for_what_is_here() {
    let mut case = Case::new(files(4, 10_000), Shape::default());
    let layer = case.open().await;
    case.check(&layer, 1).await.unwrap();
    let before = layer.statistics();
    assert!(before.extents_filled >= 3 && before.extents_filled < before.extents_total);
    // A killed process runs no destructor.
    std::mem::forget(layer);
    case.source.take_requests();
    case.source.fail();

    let layer = reopen(&mut case).await;
    assert_eq!(layer.statistics().extents_filled, before.extents_filled);
    case.check(&layer, 1).await.unwrap();
    assert_eq!(case.source.take_requests(), []);
    case.check(&layer, 0).await.unwrap_err();
    case.source.heal();
    case.check_all(&layer).await;
}

#[tokio::test]
async fn a_data_file_is_handed_from_process_to_process() {
    let mut case = Case::new(files(4, 10_000), Shape::default());
    let layer = case.open().await;
    case.check(&layer, 1).await.unwrap();
    let [data, lock] = layer.kept_files().map(|file| file.try_clone().unwrap());
    let (inode, directory) = (data.metadata().unwrap().ino(), layer.directory().to_owned());
    std::mem::forget(layer);

    // Meanwhile nobody may make the files anew.
    let other = File::open(directory.join("lock")).unwrap();
    assert!(matches!(other.try_lock(), Err(std::fs::TryLockError::WouldBlock)));

    case.store = case.second_store();
    // Told from another descriptor of the file by its offset, which descriptors of one opening share.
    std::io::Seek::seek(&mut &data, std::io::SeekFrom::Start(12_345)).unwrap();
    case.store.adopt(data).unwrap();
    let layer = case.try_open().await.unwrap();
    assert_eq!(layer.data_file().metadata().unwrap().ino(), inode);
    assert_eq!(std::io::Seek::stream_position(&mut layer.data_file()).unwrap(), 12_345);
    case.check_all(&layer).await;
    drop(lock);
}

#[tokio::test]
async fn a_data_file_of_another_layer_is_not_taken_for_it() {
    let mut case = Case::new(files(4, 10_000), Shape::default());
    let layer = case.open().await;
    let other = Case::new(files(2, 10_000), Shape::default());
    let other_layer = other.open().await;
    drop(layer);
    case.store = case.second_store();
    case.store.adopt(other_layer.data_file().try_clone().unwrap()).unwrap();
    let layer = case.try_open().await.unwrap();
    case.check_all(&layer).await;
    assert_ne!(layer.data_file().metadata().unwrap().ino(), other_layer.data_file().metadata().unwrap().ino());
}

#[tokio::test]
async fn a_layer_says_when_it_is_complete() {
    let case = Case::new(files(4, 10_000), Shape::default());
    let layer = case.open().await;
    let waiting = tokio::spawn({
        let layer = Arc::clone(&layer);
        async move { layer.completed().await }
    });
    case.check(&layer, 1).await.unwrap();
    assert!(!waiting.is_finished() && !layer.is_complete());
    complete(&layer).await.unwrap();
    waiting.await.unwrap();
    // Also to those who come later.
    layer.completed().await;
}

/// Where this variable is set, the test below is the process that gets killed, and works in the directory it names.
const VICTIM: &str = "LORIS_LAZY_TEST_VICTIM";

#[tokio::test]
async fn a_killed_process_loses_nothing_and_leaves_nothing_wrong() {
    let mut case = Case::new(files(60, 20_000), Shape::default());
    if let Some(directory) = std::env::var_os(VICTIM) {
        case.store = Store::open(directory.as_ref()).unwrap();
        let layer = case.open().await;
        for file in 0..60 {
            case.check(&layer, file).await.unwrap();
            println!("\nread {file}");
        }
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    for kills in 1..=6 {
        let mut victim = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "restart::a_killed_process_loses_nothing_and_leaves_nothing_wrong", "--nocapture"])
            .env(VICTIM, case.directory.path())
            // It has no time to clean up.
            .env("TMPDIR", scratch.path())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let output = std::io::BufReader::new(victim.stdout.take().unwrap());
        let last = format!("read {}", kills * 8);
        let seen: Vec<String> = output.lines().map_while(Result::ok).take_while(|line| *line != last).collect();
        victim.kill().unwrap();
        victim.wait().unwrap();
        assert!(seen.iter().any(|line| line == "read 0"), "{seen:?}");

        let layer = reopen(&mut case).await;
        case.source.fail();
        for file in 0..=kills * 8 {
            case.check(&layer, file).await.unwrap();
        }
        for extent in layer.index().extents() {
            if layer.is_filled(&(extent.data..DataOffset(extent.data.0 + 1))) {
                let mut content = vec![0; usize::try_from(extent.length).unwrap()];
                layer.read_filled(extent.data, &mut content).unwrap();
                assert!(extent.digest.unwrap().matches(&content), "{extent:?}");
            }
        }
        case.source.heal();
    }
}

#[tokio::test]
async fn a_data_file_that_was_cut_is_filled_again() {
    // Cut while nobody uses it.
    let mut case = Case::new(files(3, 10_000), Shape::default());
    let layer = case.open().await;
    complete(&layer).await.unwrap();
    let data = layer.directory().join("data");
    assert_eq!(data.metadata().unwrap().len(), layer.index().data_length().next_multiple_of(4096));
    drop(layer);
    File::options().write(true).open(&data).unwrap().set_len(12_000).unwrap();
    let layer = reopen(&mut case).await;
    assert_eq!(layer.statistics().extents_filled, 0);
    case.check_all(&layer).await;

    // Cut while it is open.
    complete(&layer).await.unwrap();
    case.source.take_requests();
    File::options().write(true).open(&data).unwrap().set_len(15_000).unwrap();
    case.check_all(&layer).await;
    assert!(!case.source.take_requests().is_empty());
    assert!(layer.is_complete());
    assert_eq!(data.metadata().unwrap().len(), layer.index().data_length().next_multiple_of(4096));

    // Cut, and then made longer by the next write.
    let first = layer.index().extents()[0].clone();
    File::options().write(true).open(&data).unwrap().set_len(0).unwrap();
    let last = layer.index().extents()[layer.index().extents().len() - 1].data;
    let mut end = [0; 1];
    assert_eq!(layer.read_filled(last, &mut end).unwrap(), 0);
    case.check(&layer, 2).await.unwrap();
    assert!(!layer.is_filled(&(first.data..DataOffset(first.data.0 + 1))));
    case.check_all(&layer).await;
}

#[tokio::test]
async fn files_that_are_not_ours_are_made_anew() {
    type Damage = fn(&std::path::Path);
    let cases: [(&str, Damage); 8] = [
        ("data replaced", |path| {
            let data = path.join("data");
            let length = data.metadata().unwrap().len();
            File::create(path.join("other")).unwrap().set_len(length).unwrap();
            std::fs::rename(path.join("other"), data).unwrap();
        }),
        ("data removed", |path| std::fs::remove_file(path.join("data")).unwrap()),
        ("bitmap removed", |path| std::fs::remove_file(path.join("filled")).unwrap()),
        ("bitmap cut", |path| {
            File::options().write(true).open(path.join("filled")).unwrap().set_len(4097).unwrap();
        }),
        ("bitmap empty", |path| drop(File::create(path.join("filled")).unwrap())),
        ("header flipped", |path| {
            let file = File::options().read(true).write(true).open(path.join("filled")).unwrap();
            let mut byte = [0];
            file.read_exact_at(&mut byte, 60).unwrap();
            file.write_all_at(&[byte[0] ^ 1], 60).unwrap();
        }),
        ("everything removed", |path| {
            std::fs::remove_dir_all(path).unwrap();
        }),
        ("table of contents flipped", |path| {
            let file = File::options().read(true).write(true).open(path.join("toc")).unwrap();
            let mut byte = [0];
            file.read_exact_at(&mut byte, 100).unwrap();
            file.write_all_at(&[byte[0] ^ 1], 100).unwrap();
        }),
    ];
    for (name, damage) in cases {
        let mut case = Case::new(files(3, 5000), Shape::default());
        let layer = case.open().await;
        complete(&layer).await.unwrap();
        let directory = layer.directory().to_owned();
        drop(layer);
        damage(&directory);
        let layer = reopen(&mut case).await;
        let expected = if name.starts_with("table") { layer.statistics().extents_total } else { 0 };
        assert_eq!(layer.statistics().extents_filled, expected, "{name}");
        case.check_all(&layer).await;
    }
}

#[tokio::test]
async fn an_old_data_file_is_left_to_whoever_still_reads_it() {
    let mut case = Case::new(files(1, 5000), Shape::default());
    let layer = case.open().await;
    complete(&layer).await.unwrap();
    let mounted = layer.data_file().try_clone().unwrap();
    std::fs::remove_file(layer.directory().join("filled")).unwrap();
    drop(layer);
    let layer = reopen(&mut case).await;
    assert_ne!(layer.data_file().metadata().unwrap().ino(), mounted.metadata().unwrap().ino());
    let mut buffer = vec![0; 5000];
    mounted.read_exact_at(&mut buffer, layer.index().extents()[0].data.0).unwrap();
    assert!(buffer == case.content(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_processes_share_a_layer() {
    let case = Arc::new(Case::new(files(20, 9000), Shape::default()));
    let layers = [case.open().await, {
        let store = case.second_store();
        open_layer(case.source.clone(), &case.blob.descriptor, &store, &case.options).await.unwrap()
    }];
    let readers: Vec<_> = (0..40)
        .map(|number| {
            let (case, layer) = (case.clone(), layers[number % 2].clone());
            tokio::spawn(async move { case.check(&layer, (number / 2 * 7) % 20).await })
        })
        .collect();
    for reader in readers {
        reader.await.unwrap().unwrap();
    }
    // The proof needs the first header, which no reader has fetched.
    crate::until("the proof", || layers.iter().all(|layer| layer.verdict().is_some())).await;
    // What one has fetched, the other has.
    case.source.fail();
    for layer in &layers {
        case.check_all(layer).await;
        complete(layer).await.unwrap();
    }
    drop(layers);
    let store = case.second_store();
    let layer = open_layer(case.source.clone(), &case.blob.descriptor, &store, &case.options).await.unwrap();
    assert!(layer.is_complete());
}

#[tokio::test]
async fn what_one_process_fetched_the_other_takes() {
    let case = Case::new(files(2, 9000), Shape::default());
    let one = case.open().await;
    let store = case.second_store();
    let two = open_layer(case.source.clone(), &case.blob.descriptor, &store, &case.options).await.unwrap();
    case.check(&one, 0).await.unwrap();
    case.source.fail();
    case.check(&two, 0).await.unwrap();
    case.check(&two, 1).await.unwrap_err();
}

#[tokio::test]
async fn damage_under_another_user_is_not_repaired() {
    let case = Case::new(files(1, 5000), Shape::default());
    let layer = case.open().await;
    std::fs::remove_file(layer.directory().join("filled")).unwrap();
    let store = case.second_store();
    let error = open_layer(case.source.clone(), &case.blob.descriptor, &store, &case.options).await.unwrap_err();
    assert!(
        matches!(&error, LayerError::Store { source, .. } if matches!(**source, StoreError::InUse { .. })),
        "{error}"
    );
    // Within one process the open files are shared, and go on.
    let again = case.try_open().await.unwrap();
    assert_eq!(again.data_file().metadata().unwrap().ino(), layer.data_file().metadata().unwrap().ino());
    case.check_all(&layer).await;
    assert!(again.is_whole());
}

#[tokio::test]
async fn a_store_needs_no_privilege_and_lets_nobody_else_in() {
    let case = Case::new(files(1, 5000), Shape::default());
    let layer = case.open().await;
    case.check_all(&layer).await;
    let store: &Store = &case.store;
    for path in [store.root().join("layers"), layer.directory().to_owned(), layer.directory().join("data")] {
        assert_eq!(path.metadata().unwrap().mode() & 0o077, 0, "{}", path.display());
    }
}
