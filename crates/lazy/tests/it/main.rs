//! Lazy layers against a source in memory.
#![expect(clippy::unwrap_used, reason = "functions that only tests call are tests too")]

mod arriving;
mod blob;
mod content;
mod documents;
mod faults;
mod foresight;
mod keeping;
mod open;
mod proof;
mod quota;
mod read;
mod restart;
mod source;
mod spans;
mod zstd_chunked;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use blob::{Shape, TestBlob};
use loris_format::position::FileOffset;
use loris_lazy::{FetchPolicy, LayerError, LazyLayer, OpenOptions, ReadError, Store, open::open_layer};
use source::TestSource;

/// A policy under which nothing is fetched that was not asked for.
pub(crate) const STRICT: FetchPolicy =
    FetchPolicy { gap_bytes: 0, max_request_bytes: 1 << 20, read_ahead_bytes: 0, sequential_bytes: 0 };

/// Waits for something that other tasks bring about; fails where it does not come.
pub(crate) async fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not come");
        tokio::task::yield_now().await;
    }
}

/// One blob in a source, and a store to open it in.
pub(crate) struct Case {
    pub(crate) blob: TestBlob,
    pub(crate) source: Arc<TestSource>,
    pub(crate) directory: tempfile::TempDir,
    pub(crate) store: Store,
    pub(crate) options: OpenOptions,
}

impl Case {
    pub(crate) fn new(files: Vec<(String, Vec<u8>)>, shape: Shape) -> Self {
        let blob = blob::estargz(files, shape);
        let source = Arc::new(TestSource::new([blob.bytes.clone()]));
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let options = OpenOptions { policy: STRICT, ..OpenOptions::default() };
        Self { blob, source, directory, store, options }
    }

    pub(crate) async fn try_open(&self) -> Result<Arc<LazyLayer>, LayerError> {
        open_layer(self.source.clone(), &self.blob.descriptor, &self.store, &self.options).await
    }

    /// Opens the layer and forgets the requests that it took.
    pub(crate) async fn open(&self) -> Arc<LazyLayer> {
        let layer = self.try_open().await.unwrap();
        self.source.take_requests();
        layer
    }

    /// Opens a store of its own in the same directory, as another process would.
    pub(crate) fn second_store(&self) -> Store {
        Store::open(self.directory.path()).unwrap()
    }

    pub(crate) fn content(&self, file: usize) -> &[u8] {
        &self.blob.files[file].1
    }

    /// Reads a whole file and compares it.
    pub(crate) async fn check(&self, layer: &Arc<LazyLayer>, file: usize) -> Result<(), ReadError> {
        self.check_part(layer, file, 0, self.content(file).len()).await
    }

    pub(crate) async fn check_part(
        &self,
        layer: &Arc<LazyLayer>,
        file: usize,
        at: usize,
        length: usize,
    ) -> Result<(), ReadError> {
        let (name, content) = &self.blob.files[file];
        let node = layer.index().lookup(name.as_bytes()).unwrap();
        let mut buffer = vec![0xee; length];
        let count = layer.read(node, FileOffset(at as u64), &mut buffer).await?;
        let start = at.min(content.len());
        let expected = &content[start..content.len().min(at + length)];
        assert_eq!(count, expected.len(), "{name} at {at}");
        assert!(buffer[..count] == *expected, "{name} at {at}: wrong bytes");
        Ok(())
    }

    pub(crate) async fn check_all(&self, layer: &Arc<LazyLayer>) {
        for file in 0..self.blob.files.len() {
            self.check(layer, file).await.unwrap();
        }
    }
}
