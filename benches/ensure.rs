//! Reads of a lazy layer whose bytes are there: the way of nearly every read.

use std::{ops::Range, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;
use divan::{
    Bencher, black_box,
    counter::{BytesCount, ItemsCount},
};
use loris_convert::layer::{LayerOptions, Watch, Workers, convert_layer};
use loris_format::{
    compression::GzipLevel,
    digest::Digest,
    position::{DataOffset, DataRange},
};
use loris_lazy::{LazyLayer, OpenOptions, Store, open::open_layer};
use loris_oci::{BlobStream, Descriptor, Document, Error, ImageSource, document::media_type};

/// What the kernel asks for at a time when it reads ahead, in bytes.
const READ_BYTES: usize = 128 << 10;
const LAYER_BYTES: usize = 8 << 20;

/// One blob in memory.
struct Memory(Bytes);

impl Memory {
    fn none(&self, what: &str) -> Error {
        Error::NotFound { what: what.to_owned(), place: self.name() }
    }
}

#[async_trait]
impl ImageSource for Memory {
    fn name(&self) -> String {
        "memory".to_owned()
    }

    async fn root(&self) -> Result<Document, Error> {
        Err(self.none("a manifest"))
    }

    async fn document(&self, _: &Descriptor) -> Result<Document, Error> {
        Err(self.none("a document"))
    }

    async fn blob(&self, _: &Descriptor) -> Result<BlobStream, Error> {
        Err(self.none("a stream"))
    }

    async fn blob_range(&self, _: &Descriptor, range: Range<u64>) -> Result<Bytes, Error> {
        Ok(self.0.slice(usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()))
    }

    async fn referrers(&self, _: &Digest, _: Option<&str>) -> Result<Vec<Descriptor>, Error> {
        Ok(Vec::new())
    }
}

/// A layer that is complete, and what it lives on.
struct Scene {
    layer: Arc<LazyLayer>,
    runtime: tokio::runtime::Runtime,
    _directory: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let options = LayerOptions { level: GzipLevel::new(1).unwrap(), ..LayerOptions::default() };
        let threads = std::thread::available_parallelism().unwrap();
        let workers = Workers::start(threads, options.chunk_bytes, 64 << 20).unwrap();
        let (tar, mut blob) = (loris_benches::layer(LAYER_BYTES), Vec::new());
        let converted =
            convert_layer(tar.as_slice(), &options, &workers, &Watch::default(), directory.path(), &mut blob).unwrap();
        let mut descriptor = Descriptor::new(media_type::OCI_LAYER_GZIP, converted.blob_digest, converted.blob_size);
        descriptor.annotations.extend(converted.annotations());
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let store = Store::open(&directory.path().join("store")).unwrap();
        let source = Arc::new(Memory(blob.into()));
        let layer = runtime.block_on(async {
            let layer = open_layer(source, &descriptor, &store, &OpenOptions::default()).await.unwrap();
            layer.ensure(DataOffset(0)..DataOffset(layer.index().data_length())).await.unwrap();
            layer
        });
        assert!(layer.is_complete());
        Self { layer, runtime, _directory: directory }
    }

    /// A read's worth of bytes in the midst of the layer.
    fn range(&self) -> DataRange {
        let start = self.layer.index().data_length() / 2;
        DataOffset(start)..DataOffset(start + READ_BYTES as u64)
    }
}

#[divan::bench]
fn filled(bencher: Bencher<'_, '_>) {
    let scene = Scene::new();
    let range = scene.range();
    let _entered = scene.runtime.enter();
    bencher.counter(ItemsCount::new(1_usize)).bench_local(|| {
        scene.runtime.block_on(scene.layer.ensure(black_box(range.clone()))).unwrap();
    });
}

/// What FUSE does before it gives a read to the runtime.
#[divan::bench]
fn is_filled(bencher: Bencher<'_, '_>) {
    let scene = Scene::new();
    let range = scene.range();
    bencher.counter(ItemsCount::new(1_usize)).bench_local(|| scene.layer.is_filled(black_box(&range)));
}

#[divan::bench]
fn read(bencher: Bencher<'_, '_>) {
    let scene = Scene::new();
    let mut buffer = vec![0; READ_BYTES];
    let start = scene.range().start;
    bencher
        .counter(BytesCount::new(READ_BYTES))
        .bench_local(|| scene.layer.read_filled(black_box(start), &mut buffer).unwrap());
}
