//! A lazily pulled image made whole in containerd's store, so that exporting, pushing, converting it and building on it
//! find its layers.
//!
//! What containerd has of the image decides what is fetched: manifests of other platforms are left alone.
//!
//! What this module must not know: who wants that, and when.

use futures_util::StreamExt as _;
use loris_format::digest::Digest;
use loris_oci::{Descriptor, ImageSink as _, ImageSource as _, document::media_type::LayerType, place::Error};
use serde::Serialize;

use super::{ContainerdSink, ContainerdSource};

/// What was missing.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Completed {
    /// What the name leads to.
    pub digest: Digest,
    /// Layers that were fetched.
    pub fetched: Vec<Digest>,
    /// Their bytes.
    pub fetched_bytes: u64,
    /// Layers that were there.
    pub present: usize,
}

/// Takes news of layers.
pub trait News: Send + Sync {
    /// A layer that is missing begins to be fetched.
    fn began(&self, layer: &Descriptor);
    /// So many more bytes of it were fetched.
    fn advanced(&self, layer: &Descriptor, bytes: u64);
    /// It is here.
    fn ended(&self, layer: &Descriptor);
}

/// Tells nobody.
impl News for () {
    fn began(&self, _: &Descriptor) {}
    fn advanced(&self, _: &Descriptor, _: u64) {}
    fn ended(&self, _: &Descriptor) {}
}

/// Returns the layers of an image that containerd's store has not got.
///
/// # Errors
/// Where containerd does not answer, or has no such image.
pub async fn missing(source: &ContainerdSource) -> Result<Vec<Descriptor>, Error> {
    let target = source.target().await?;
    let mut missing: Vec<Descriptor> = Vec::new();
    for layer in layers(source, &target).await {
        if source.store().info(&layer.digest).await?.is_none() {
            missing.push(layer);
        }
    }
    Ok(missing)
}

async fn layers(source: &ContainerdSource, target: &Descriptor) -> Vec<Descriptor> {
    let manifests = source.manifests(target).await;
    let mut layers: Vec<Descriptor> = Vec::new();
    for layer in manifests.into_iter().flat_map(|(_, manifest)| manifest.layers) {
        // Foreign ones are nobody's to keep.
        let is_foreign =
            LayerType::parse(&layer.media_type).is_some_and(|layer| layer.foreign) && !layer.urls.is_empty();
        if !is_foreign && !layers.iter().any(|known| known.digest == layer.digest) {
            layers.push(layer);
        }
    }
    layers
}

/// Puts all layers of an image into the store that it has not got. Those that are there stay; done twice, it does nothing.
///
/// # Errors
/// Where containerd does not answer or has no such image, or where a layer can't be had. What was fetched by then stays
/// for a day, so that the next attempt goes on.
pub async fn complete(source: &ContainerdSource, sink: &ContainerdSink, news: &dyn News) -> Result<Completed, Error> {
    let target = source.target().await?;
    let digest = target.digest;
    let mut completed = Completed { digest, fetched: Vec::new(), fetched_bytes: 0, present: 0 };
    for layer in layers(source, &target).await {
        if sink.has_blob(&layer).await? {
            completed.present += 1;
            continue;
        }
        news.began(&layer);
        let (told, passed) = tokio::sync::mpsc::unbounded_channel();
        let content = source.blob(&layer).await?;
        let content = content.inspect(move |piece| {
            if let Ok(piece) = piece {
                let _ = told.send(piece.len() as u64);
            }
        });
        let telling = tell(passed, |bytes| news.advanced(&layer, bytes));
        let (written, ()) = tokio::join!(sink.put_blob(&layer, content.boxed()), telling);
        written?;
        news.ended(&layer);
        completed.fetched_bytes += layer.size;
        completed.fetched.push(layer.digest);
    }
    for (descriptor, _) in source.manifests(&target).await {
        if let Some(document) = source.stored(&descriptor).await? {
            sink.hold_children(&document).await?;
        }
    }
    sink.end().await;
    Ok(completed)
}

/// Passes news on until there is no more.
async fn tell(mut passed: tokio::sync::mpsc::UnboundedReceiver<u64>, told: impl Fn(u64)) {
    while let Some(bytes) = passed.recv().await {
        told(bytes);
    }
}
