//! Content that other layers have.

use std::{fs::File, os::unix::fs::FileExt as _, sync::Arc};

use loris_format::position::DataOffset;
use loris_lazy::{LazyLayer, Store, complete, open::open_layer};

use crate::{
    OpenOptions, STRICT,
    blob::{self, Shape, TestBlob, files, noise},
    source::TestSource,
    until,
};

/// Several blobs in one source, and a store.
pub(crate) struct Several {
    pub(crate) blobs: Vec<TestBlob>,
    pub(crate) source: Arc<TestSource>,
    pub(crate) directory: tempfile::TempDir,
    pub(crate) store: Store,
    pub(crate) options: OpenOptions,
}

impl Several {
    pub(crate) fn new(blobs: impl IntoIterator<Item = (Vec<(String, Vec<u8>)>, Shape)>) -> Self {
        let blobs: Vec<_> = blobs.into_iter().map(|(files, shape)| blob::estargz(files, shape)).collect();
        let source = Arc::new(TestSource::new(blobs.iter().map(|blob| blob.bytes.clone())));
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let options = OpenOptions { policy: STRICT, ..OpenOptions::default() };
        Self { blobs, source, directory, store, options }
    }

    /// Opens a blob and forgets the requests that it took.
    pub(crate) async fn open(&self, number: usize) -> Arc<LazyLayer> {
        let descriptor = &self.blobs[number].descriptor;
        let layer = open_layer(self.source.clone(), descriptor, &self.store, &self.options).await.unwrap();
        self.source.take_requests();
        let store = self.store.clone();
        tokio::task::spawn_blocking(move || store.settle()).await.unwrap();
        layer
    }

    /// Compares everything that is filled with what it must be, byte by byte.
    pub(crate) fn check_filled(&self, layer: &LazyLayer) {
        for extent in layer.index().extents() {
            if layer.is_filled(&(extent.data..DataOffset(extent.data.0 + 1))) {
                let mut content = vec![0; usize::try_from(extent.length).unwrap()];
                layer.read_filled(extent.data, &mut content).unwrap();
                assert!(extent.digest.unwrap().matches(&content), "{extent:?}");
            }
        }
    }

    pub(crate) async fn read(
        &self,
        layer: &Arc<LazyLayer>,
        blob: usize,
        file: usize,
    ) -> Result<(), loris_lazy::ReadError> {
        let (name, content) = &self.blobs[blob].files[file];
        let node = layer.index().lookup(name.as_bytes()).unwrap();
        let mut buffer = vec![0xee; content.len()];
        let count = layer.read(node, loris_format::position::FileOffset(0), &mut buffer).await?;
        assert!(count == content.len() && buffer == *content, "{name}: wrong bytes");
        Ok(())
    }

    fn fetched(&self) -> u64 {
        self.source.take_requests().iter().map(|range| range.end - range.start).sum()
    }
}

/// Fills all of a layer, and waits until nobody else is at it.
pub(crate) async fn fill(layer: &Arc<LazyLayer>) {
    complete(layer).await.unwrap();
    layer.completed().await;
    until("the proof", || Arc::strong_count(layer) == 1).await;
}

/// The same files as in `files`, of which every fifth is another one.
fn four_fifths(files: &[(String, Vec<u8>)]) -> Vec<(String, Vec<u8>)> {
    let mut other: Vec<_> = files.to_vec();
    for (number, (_, content)) in other.iter_mut().enumerate() {
        if number % 5 == 0 {
            *content = noise(1000 + number as u64, content.len());
        }
    }
    other
}

#[tokio::test]
async fn of_an_image_of_which_four_fifths_are_here_the_rest_is_fetched() {
    // Split into other layers, which are closed, of another writer.
    let all = files(60, 30_001);
    let shared = Shape { files_per_member: 3, chunk_bytes: 1 << 20, ..Shape::default() };
    let single = Shape { chunk_bytes: 1 << 20, ..Shape::default() };
    let mut other = four_fifths(&all);
    other.reverse();
    let case = Several::new([(all[..25].to_vec(), shared), (all[25..].to_vec(), single), (other, single)]);
    for number in 0..2 {
        let layer = case.open(number).await;
        fill(&layer).await;
    }
    let layer = case.open(2).await;
    fill(&layer).await;
    let (fetched, size) = (case.fetched(), case.blobs[2].bytes.len() as u64);
    assert!(fetched * 100 <= size * 22, "{fetched} of {size}");
    let statistics = layer.statistics();
    assert_eq!(statistics.copied_bytes, 48 * 30_001);
    assert_eq!(statistics.extents_filled, statistics.extents_total);
    for file in 0..60 {
        case.read(&layer, 2, file).await.unwrap();
    }
}

#[tokio::test]
async fn a_layer_that_is_half_here_gives_what_it_has() {
    let all = files(10, 9000);
    let mut reversed = all.clone();
    reversed.reverse();
    let case = Several::new([(all, Shape::default()), (reversed, Shape::default())]);
    let one = case.open(0).await;
    for file in 0..5 {
        case.read(&one, 0, file).await.unwrap();
    }
    let two = case.open(1).await;
    case.source.fail();
    for file in 5..10 {
        case.read(&two, 1, file).await.unwrap();
    }
    case.read(&two, 1, 0).await.unwrap_err();
    // Also what came later.
    case.source.heal();
    case.read(&one, 0, 9).await.unwrap();
    case.source.fail();
    case.read(&two, 1, 0).await.unwrap();
    assert_eq!(two.statistics().fetched_bytes, two.statistics().fetched_bytes.min(case.blobs[1].bytes.len() as u64));
}

#[tokio::test]
async fn what_is_twice_in_a_layer_is_fetched_once() {
    let mut twice = files(3, 9000);
    twice.push(("again".to_owned(), twice[1].1.clone()));
    let case = Several::new([(twice, Shape::default())]);
    let layer = case.open(0).await;
    case.read(&layer, 0, 1).await.unwrap();
    case.source.fail();
    case.read(&layer, 0, 3).await.unwrap();
}

#[tokio::test]
async fn what_was_flipped_on_the_disk_does_not_spread() {
    type Damage = fn(&std::path::Path);
    let cases: [(&str, Damage); 5] = [
        ("flipped", |layer| {
            let data = File::options().read(true).write(true).open(layer.join("data")).unwrap();
            let mut byte = [0];
            data.read_exact_at(&mut byte, 5000).unwrap();
            data.write_all_at(&[byte[0] ^ 1], 5000).unwrap();
        }),
        ("cut", |layer| File::options().write(true).open(layer.join("data")).unwrap().set_len(100).unwrap()),
        ("gone", |layer| std::fs::remove_dir_all(layer).unwrap()),
        ("without a bitmap", |layer| std::fs::remove_file(layer.join("filled")).unwrap()),
        ("a named pipe", |layer| {
            std::fs::remove_file(layer.join("data")).unwrap();
            let (kind, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR);
            rustix::fs::mknodat(rustix::fs::CWD, layer.join("data"), kind, mode, 0).unwrap();
        }),
    ];
    for (name, damage) in cases {
        println!("{name}");
        let shape = Shape { chunk_bytes: 1 << 20, ..Shape::default() };
        let mut other = files(1, 9000);
        other.push(("more".to_owned(), b"more".to_vec()));
        let case = Several::new([(files(1, 9000), shape), (other, shape)]);
        let one = case.open(0).await;
        fill(&one).await;
        let directory = one.directory().to_owned();
        drop(one);
        damage(&directory);
        let two = case.open(1).await;
        case.read(&two, 1, 0).await.unwrap();
        assert!(case.fetched() >= 9000, "{name}");
        case.check_filled(&two);
    }
}

#[tokio::test]
async fn without_digests_nothing_is_found() {
    let shape = Shape { digests: false, ..Shape::default() };
    let mut case = Several::new([(files(1, 3000), shape), (files(2, 3000), shape)]);
    case.options.trust = loris_lazy::Trust::Anything;
    for blob in &mut case.blobs {
        blob.descriptor.annotations.clear();
    }
    let one = case.open(0).await;
    case.read(&one, 0, 0).await.unwrap();
    let two = case.open(1).await;
    case.read(&two, 1, 0).await.unwrap();
    assert_eq!(two.statistics().copied_bytes, 0);
}

/// What another process makes meanwhile is found too.
#[tokio::test]
async fn other_processes_layers_are_found() {
    let case = Several::new([(files(4, 9000), Shape::default()), (files(3, 9000), Shape::default())]);
    let two = case.open(1).await;
    let store = Store::open(case.directory.path()).unwrap();
    let one = open_layer(case.source.clone(), &case.blobs[0].descriptor, &store, &case.options).await.unwrap();
    fill(&one).await;
    tokio::task::spawn_blocking(move || store.settle()).await.unwrap();
    case.source.fail();
    for file in 0..3 {
        case.read(&two, 1, file).await.unwrap();
    }
}
