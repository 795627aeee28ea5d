//! Blobs taken from a source to a sink as they are: not at all where the sink has them, by name where the two are in one
//! registry, else byte by byte.

use std::{
    collections::HashSet,
    pin::pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use loris_format::digest::Digest;
use loris_oci::{BlobStream, Descriptor, Document, ImageSink, ImageSource, document::media_type::LayerType};

use crate::{
    Error,
    progress::{Action, Outcome, Progress},
};

/// Takes blobs along.
pub(crate) struct Carrier<'a> {
    pub(crate) source: &'a dyn ImageSource,
    pub(crate) sink: &'a dyn ImageSink,
    pub(crate) progress: &'a dyn Progress,
    /// What was taken already, or is being taken.
    taken: Mutex<HashSet<Digest>>,
}

impl<'a> Carrier<'a> {
    pub(crate) fn new(source: &'a dyn ImageSource, sink: &'a dyn ImageSink, progress: &'a dyn Progress) -> Self {
        Self { source, sink, progress, taken: Mutex::default() }
    }

    /// Takes a blob. Foreign layers stay where they are: their content is not for this registry to have.
    pub(crate) async fn blob(&self, descriptor: &Descriptor) -> Result<(), Error> {
        let foreign = LayerType::parse(&descriptor.media_type).is_some_and(|layer| layer.foreign);
        if foreign && !descriptor.urls.is_empty() || !self.begin(&descriptor.digest) {
            return Ok(());
        }
        self.progress.began(Action::Copy, &descriptor.digest, descriptor.size);
        let outcome = self.take(descriptor).await?;
        self.progress.ended(Action::Copy, &descriptor.digest, outcome);
        Ok(())
    }

    async fn take(&self, descriptor: &Descriptor) -> Result<Outcome, Error> {
        if self.sink.has_blob(descriptor).await? {
            return Ok(Outcome::Present);
        }
        if let Some((registry, repository)) = self.source.repository()
            && self.sink.mount_blob(descriptor, (&registry, &repository)).await?
        {
            return Ok(Outcome::Present);
        }
        let content = match descriptor.inline() {
            Some(content) => once(content),
            None => self.source.blob(descriptor).await?,
        };
        let (content, counter) = counted(content);
        let told = |bytes| self.progress.advanced(Action::Copy, &descriptor.digest, bytes);
        watched(self.sink.put_blob(descriptor, content), &counter, told).await?;
        Ok(Outcome::Done)
    }

    /// Stores a document that is no manifest: a configuration.
    pub(crate) async fn config(&self, document: &Document) -> Result<(), Error> {
        let descriptor = document.descriptor();
        if self.begin(&descriptor.digest) && !self.sink.has_blob(&descriptor).await? {
            self.sink.put_blob(&descriptor, once(document.bytes.clone())).await?;
        }
        Ok(())
    }

    fn begin(&self, digest: &Digest) -> bool {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).insert(*digest)
    }
}

fn once(content: Bytes) -> BlobStream {
    stream::once(async move { Ok(content) }).boxed()
}

/// How often news is told.
const NEWS: Duration = Duration::from_millis(100);

/// Returns the stream and a counter of the bytes that have passed.
pub(crate) fn counted(content: BlobStream) -> (BlobStream, Arc<AtomicU64>) {
    let counter = Arc::new(AtomicU64::new(0));
    let passed = Arc::clone(&counter);
    let content = content.inspect(move |piece| {
        if let Ok(piece) = piece {
            passed.fetch_add(piece.len() as u64, Ordering::Relaxed);
        }
    });
    (content.boxed(), counter)
}

/// Waits for `work` and tells, from time to time and at the end, how much the counter has grown.
pub(crate) async fn watched<T>(work: impl Future<Output = T>, counter: &AtomicU64, told: impl Fn(u64)) -> T {
    let mut work = pin!(work);
    let mut before = 0;
    let mut tell = || {
        let now = counter.load(Ordering::Relaxed);
        if now > before {
            told(now - before);
            before = now;
        }
    };
    loop {
        match tokio::time::timeout(NEWS, &mut work).await {
            Ok(result) => {
                tell();
                return result;
            }
            Err(_) => tell(),
        }
    }
}
