//! What an image consists of: its documents, read and understood, before anything is done with them.

use std::collections::BTreeSet;

use futures_util::{StreamExt as _, TryStreamExt as _, future::BoxFuture, stream};
use loris_format::{digest::Digest, limits::Limits, opening::Promise};
use loris_oci::{
    Descriptor, Document, ImageSource, Platform, Platforms,
    document::{ImageConfig, Index, Kind, Manifest, media_type::LayerType},
};

use crate::Error;

/// Documents that are fetched at the same time.
const FETCHES: usize = 8;

/// Most manifests and indexes of one image.
const MOST_DOCUMENTS: usize = 4096;

/// A document and what is below it.
pub(crate) enum Node {
    /// A list of nodes.
    Index(IndexNode),
    /// An image for one platform.
    Image(Box<ImageNode>),
    /// A manifest of something else: an attestation, an artifact.
    Other(OtherNode),
}

pub(crate) struct IndexNode {
    pub(crate) document: Document,
    pub(crate) index: Index,
    pub(crate) children: Vec<Child>,
}

/// An entry of an index.
pub(crate) struct Child {
    pub(crate) descriptor: Descriptor,
    /// What it leads to; `None` where that is no manifest and no index, but a blob.
    pub(crate) node: Option<Node>,
}

pub(crate) struct ImageNode {
    pub(crate) document: Document,
    pub(crate) manifest: Manifest,
    pub(crate) config_document: Document,
    pub(crate) config: ImageConfig,
    /// From the index, else from the configuration.
    pub(crate) platform: Platform,
}

pub(crate) struct OtherNode {
    pub(crate) document: Document,
    pub(crate) manifest: Manifest,
}

impl Node {
    pub(crate) fn document(&self) -> &Document {
        match self {
            Self::Index(node) => &node.document,
            Self::Image(node) => &node.document,
            Self::Other(node) => &node.document,
        }
    }

    /// Returns all images in it, in order; one that is listed twice, twice.
    pub(crate) fn images(&self) -> Vec<&ImageNode> {
        match self {
            Self::Image(node) => vec![node],
            Self::Other(_) => Vec::new(),
            Self::Index(node) => {
                node.children.iter().filter_map(|child| child.node.as_ref()).flat_map(Self::images).collect()
            }
        }
    }
}

/// Reads an image's documents.
pub(crate) async fn survey(source: &dyn ImageSource, limits: &Limits) -> Result<Node, Error> {
    let root = source.root().await?;
    let mut left = MOST_DOCUMENTS;
    read(source, limits, root, None, 0, &mut left).await
}

fn read<'a>(
    source: &'a dyn ImageSource,
    limits: &'a Limits,
    document: Document,
    platform: Option<Platform>,
    depth: usize,
    left: &'a mut usize,
) -> BoxFuture<'a, Result<Node, Error>> {
    Box::pin(async move {
        let index = match document.parse_kind(limits)? {
            Kind::Manifest(manifest) => return read_manifest(source, limits, document, manifest, platform).await,
            Kind::Index(index) => index,
        };
        let too_much = |detail: String| Error::Document { what: format!("index {}", document.digest), detail };
        if depth >= limits.index_depth {
            return Err(too_much(format!("indexes are nested deeper than the limit of {}", limits.index_depth)));
        }
        *left = left
            .checked_sub(index.manifests.len())
            .ok_or_else(|| too_much(format!("the image has more than {MOST_DOCUMENTS} manifests")))?;
        let fetches: Vec<_> = index.manifests.iter().map(|descriptor| fetch(source, descriptor)).collect();
        let fetched: Vec<Option<Document>> = stream::iter(fetches).buffered(FETCHES).try_collect().await?;
        let mut children = Vec::with_capacity(fetched.len());
        for (descriptor, document) in index.manifests.iter().zip(fetched) {
            let node = match document {
                Some(document) => {
                    Some(read(source, limits, document, descriptor.platform.clone(), depth + 1, left).await?)
                }
                None => None,
            };
            children.push(Child { descriptor: descriptor.clone(), node });
        }
        Ok(Node::Index(IndexNode { document, index, children }))
    })
}

async fn fetch(source: &dyn ImageSource, descriptor: &Descriptor) -> Result<Option<Document>, Error> {
    if !descriptor.is_document() && !descriptor.media_type.is_empty() {
        return Ok(None);
    }
    Ok(Some(source.document(descriptor).await?))
}

async fn read_manifest(
    source: &dyn ImageSource,
    limits: &Limits,
    document: Document,
    manifest: Manifest,
    platform: Option<Platform>,
) -> Result<Node, Error> {
    // Attestations and signatures use an image's form for what are no layers.
    let layers = || manifest.layers.iter().any(|layer| LayerType::parse(&layer.media_type).is_some());
    if !manifest.is_image() || !(manifest.layers.is_empty() || layers()) {
        return Ok(Node::Other(OtherNode { document, manifest }));
    }
    let config_document = source.document(&manifest.config).await?;
    let config = config_document.image_config(limits)?;
    config.check_layers(&manifest)?;
    let platform = platform.filter(|platform| !platform.architecture.is_empty()).unwrap_or_else(|| config.platform());
    Ok(Node::Image(Box::new(ImageNode { document, manifest, config_document, config, platform })))
}

/// Finds the images that are wanted. `None` stands for all.
///
/// For each platform those images are taken that fit it best: an image for arm/v6 serves where arm/v7 is wanted and
/// there is none.
pub(crate) fn select(root: &Node, platforms: &Platforms, place: &str) -> Result<Option<BTreeSet<Digest>>, Error> {
    let Platforms::Only(wanted) = platforms else { return Ok(None) };
    let images = root.images();
    let mut selected = BTreeSet::new();
    for machine in wanted {
        let ranked = images.iter().filter_map(|image| Some((image.platform.rank_on(machine)?, image)));
        let Some(best) = ranked.clone().map(|(rank, _)| rank).min() else {
            let available: BTreeSet<String> = images.iter().map(|image| image.platform.to_string()).collect();
            let available = available.into_iter().collect::<Vec<_>>().join(", ");
            let available = if available.is_empty() { "none".to_owned() } else { available };
            return Err(loris_oci::Error::NoPlatform {
                wanted: machine.to_string(),
                place: place.to_owned(),
                available,
            }
            .into());
        };
        selected.extend(ranked.filter(|(rank, _)| *rank == best).map(|(_, image)| image.document.digest));
    }
    Ok(Some(selected))
}

/// Removes from indexes what was not selected, attestations of it, and indexes that have nothing left. Says whether
/// anything of the node stays.
pub(crate) fn prune(node: &mut Node, selected: &BTreeSet<Digest>) -> bool {
    match node {
        Node::Image(image) => selected.contains(&image.document.digest),
        // On its own it belongs to no platform.
        Node::Other(_) => true,
        Node::Index(index) => {
            index.children.retain_mut(|child| match (&mut child.node, child.descriptor.attested()) {
                (_, Some(about)) => selected.contains(&about),
                (Some(node), None) => prune(node, selected),
                (None, None) => true,
            });
            !index.children.is_empty()
        }
    }
}
/// Says whether an image's layers all say that they are lazily pullable.
pub(crate) fn is_lazy(image: &ImageNode) -> bool {
    image.manifest.layers.iter().all(|layer| Promise::read(&layer.annotations).is_ok_and(|promise| !promise.is_empty()))
}
