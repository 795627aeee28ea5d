//! An image taken to another place as it is.
//!
//! Everything keeps its digest: documents, layers, annotations, referrers. Only where some platforms of an index are
//! chosen must the index change: of several, an index with those is made; of one, its manifest alone is taken, which is
//! what Skopeo and Podman do, and keeps signatures of it valid.

use std::collections::BTreeMap;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use loris_format::{digest::Digest, limits::Limits};
use loris_oci::{ImageSink, ImageSource, Platforms};
use serde::Serialize;

use crate::{
    Error,
    carry::Carrier,
    image::{Warnings, rebuild, referrers},
    progress::Progress,
    survey::{self, Node},
};

/// Blobs that are copied at the same time.
const BLOBS_AT_ONCE: usize = 4;

/// How an image is copied.
#[derive(Clone, Debug)]
pub struct CopyOptions {
    /// Which platforms.
    pub platforms: Platforms,
    /// Whether what refers to the image is copied with it.
    pub referrers: bool,
    /// What is said about the image where it is listed; its name is among it.
    pub annotations: BTreeMap<String, String>,
    /// Bounds on documents.
    pub limits: Limits,
}

impl Default for CopyOptions {
    fn default() -> Self {
        Self { platforms: Platforms::All, referrers: true, annotations: BTreeMap::new(), limits: Limits::default() }
    }
}

/// What was copied.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CopyReport {
    /// What the name leads to in the sink.
    pub digest: Digest,
    /// Its type.
    pub media_type: String,
    /// Manifests of images, in order.
    pub images: Vec<Digest>,
    /// Whether all of them say that they are lazily pullable.
    pub lazy: bool,
    /// Manifests that refer to them.
    pub referrers: Vec<Digest>,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// Copies an image. Blobs that the sink has are not sent, and are taken over by name within one registry.
///
/// # Errors
/// See [`Error`]. A sink that can take one platform only (a Docker archive) refuses an index: choose a platform then.
pub async fn copy_image(
    source: &dyn ImageSource,
    sink: &dyn ImageSink,
    options: &CopyOptions,
    progress: &dyn Progress,
) -> Result<CopyReport, Error> {
    let mut root = survey::survey(source, &options.limits).await?;
    if let Some(selected) = survey::select(&root, &options.platforms, &source.name())? {
        survey::prune(&mut root, &selected);
        if let Platforms::Only(wanted) = &options.platforms
            && wanted.len() == 1
            && selected.len() == 1
        {
            root = only_image(root);
        }
    }
    let carrier = Carrier::new(source, sink, progress);
    let mut warnings = Warnings::new(progress);
    let images = root.images();
    let layers = images.iter().flat_map(|image| &image.manifest.layers);
    let copies: Vec<_> = layers.map(|layer| carrier.blob(layer)).collect();
    stream::iter(copies).buffer_unordered(BLOBS_AT_ONCE).try_collect::<()>().await?;
    let rebuilt = rebuild::prune(&root)?;
    rebuild::put(&root, &rebuilt, &carrier).await?;
    let referrers = if options.referrers {
        let subjects = rebuilt.documents.iter().map(|(old, new)| (*old, new.clone())).collect();
        referrers::carry(&carrier, subjects, &options.limits, &mut warnings).await?
    } else {
        Vec::new()
    };
    let new_root = rebuilt.document(root.document().digest)?;
    sink.commit(new_root, &options.annotations).await?;
    Ok(CopyReport {
        digest: new_root.digest,
        media_type: new_root.media_type.clone(),
        images: images.iter().map(|image| image.document.digest).collect(),
        lazy: images.iter().all(|image| survey::is_lazy(image)),
        referrers,
        warnings: warnings.finish(),
    })
}

/// Returns the one image that is left in a node.
fn only_image(node: Node) -> Node {
    match node {
        Node::Index(mut index) => {
            let image = |node: &Node| !node.images().is_empty();
            let place = index.children.iter().position(|child| child.node.as_ref().is_some_and(image));
            match place.and_then(|place| index.children.swap_remove(place).node) {
                Some(node) => only_image(node),
                None => Node::Index(index),
            }
        }
        node => node,
    }
}
