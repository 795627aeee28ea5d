//! SOCI indexes of images: made of layers as these stream by, which stay as they are.
//!
//! - [`index_layers`]: a ztoc of each layer. [`index_manifest`]: the manifest that names them.
//! - [`publish`]: an index put beside an image, as a referrer of its manifest (version 1), there or in another repository.
//! - [`convert_soci`]: an image with its index: of version 1, the image as it was and a referrer, as `soci create` and
//!   `soci push` leave it; of version 2, new manifests that name their index, in an OCI index with it, as `soci convert`
//!   leaves it. Layers keep their digests in both.

use std::{collections::BTreeMap, io, num::NonZeroUsize};

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use loris_format::{
    digest::Digest,
    limits::Limits,
    opening::Promise,
    soci::{
        self, BuildError, BuildOptions, Built, MIN_LAYER_BYTES, SPAN_BYTES,
        manifest::{
            BUILD_TOOL, BUILD_TOOL_SOCI, CONFIG, CONFIG_TYPE_V1, CONFIG_TYPE_V2, IMAGE_MANIFEST_DIGEST, INDEX_DIGEST,
            LAYER_DIGEST, LAYER_TYPE, SPAN_SIZE, ZTOC_TYPE,
        },
    },
};
use loris_oci::{
    BlobStream, Descriptor, Document, ImageSink, ImageSource, Platforms,
    document::{Index, Manifest, media_type},
};
use serde::Serialize;
use tokio_util::io::{StreamReader, SyncIoBridge};

use crate::{
    Error,
    carry::{Carrier, counted, watched},
    image::{edit, rebuild},
    progress::{Action, Outcome, Progress},
    survey::{self, ImageNode, Node},
};

/// What the `soci` of version 0.4 calls itself, which writes indexes of version 1.
const BUILD_TOOL_V1: &str = "AWS SOCI CLI v0.1";

/// The version of an index manifest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Version {
    /// A referrer of the image's manifest; nothing in the image says that it is there.
    One,
    /// Named by the image's manifest.
    Two,
}

/// How images are indexed.
#[derive(Clone, Debug)]
pub struct SociOptions {
    /// The version of the index manifest.
    pub version: Version,
    /// Decoded bytes between two checkpoints.
    pub span_bytes: u64,
    /// Layers that are smaller get no ztoc.
    pub min_layer_bytes: u64,
    /// Which platforms.
    pub platforms: Platforms,
    /// Layers that are read at the same time.
    pub layers_at_once: NonZeroUsize,
    /// Bounds.
    pub limits: Limits,
}

impl Default for SociOptions {
    fn default() -> Self {
        Self {
            version: Version::Two,
            span_bytes: SPAN_BYTES,
            min_layer_bytes: MIN_LAYER_BYTES,
            platforms: Platforms::All,
            layers_at_once: std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
            limits: Limits::default(),
        }
    }
}

impl SociOptions {
    fn build_tool(&self) -> &'static str {
        match self.version {
            Version::One => BUILD_TOOL_V1,
            Version::Two => BUILD_TOOL_SOCI,
        }
    }
}

/// What became of a layer.
#[derive(Clone, Debug)]
pub struct IndexedLayer {
    /// The layer, as its manifest has it.
    pub layer: Descriptor,
    /// Its ztoc, or why it has none.
    pub outcome: Result<Built, String>,
}

/// What is told of an indexed image.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SociReport {
    /// What the new name leads to; of an index that was only published, its own manifest.
    pub digest: Digest,
    /// Its type.
    pub media_type: String,
    /// One for each platform.
    pub images: Vec<SociImage>,
}

/// What is told of one platform's image.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SociImage {
    /// As in `linux/arm/v7`.
    pub platform: String,
    /// The image's manifest.
    pub digest: Digest,
    /// Its index's manifest; none where no layer has a ztoc.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub index: Option<Digest>,
    /// The layers, lowest first.
    pub layers: Vec<SociLayer>,
}

/// What is told of a layer.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SociLayer {
    /// The layer.
    pub digest: Digest,
    /// Its compressed bytes.
    pub bytes: u64,
    /// Its ztoc.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ztoc: Option<Digest>,
    /// Bytes of it.
    pub ztoc_bytes: u64,
    /// Spans that it is cut into.
    pub spans: usize,
    /// Why it has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
}

impl SociLayer {
    /// Says what became of a layer.
    #[must_use]
    pub fn of(indexed: &IndexedLayer) -> Self {
        let (digest, bytes) = (indexed.layer.digest, indexed.layer.size);
        match &indexed.outcome {
            Ok(built) => Self {
                digest,
                bytes,
                ztoc: Some(Digest::sha256_of(&built.ztoc)),
                ztoc_bytes: built.ztoc.len() as u64,
                spans: built.spans,
                skipped: None,
            },
            Err(reason) => Self { digest, bytes, ztoc: None, ztoc_bytes: 0, spans: 0, skipped: Some(reason.clone()) },
        }
    }
}

/// Makes a ztoc of each layer, read once; of those that are too small or none can be made of, says why not.
///
/// # Errors
/// Where the source fails, or a layer can't be read, or has not the DiffID that is `claimed` for it.
pub async fn index_layers(
    source: &dyn ImageSource,
    layers: &[Descriptor],
    options: &SociOptions,
    progress: &dyn Progress,
) -> Result<Vec<IndexedLayer>, Error> {
    let indexed: Vec<_> = layers.iter().map(|layer| index_layer(source, layer, options, progress)).collect();
    stream::iter(indexed).buffered(options.layers_at_once.get()).try_collect().await
}

async fn index_layer(
    source: &dyn ImageSource,
    layer: &Descriptor,
    options: &SociOptions,
    progress: &dyn Progress,
) -> Result<IndexedLayer, Error> {
    let skipped = |reason: String| Ok(IndexedLayer { layer: layer.clone(), outcome: Err(reason) });
    if media_type::LayerType::parse(&layer.media_type).is_none() {
        return skipped(format!("it is of type {:?}, which is no layer's", layer.media_type));
    }
    if layer.size < options.min_layer_bytes {
        return skipped(format!("it has {} bytes, fewer than {}", layer.size, options.min_layer_bytes));
    }
    progress.began(Action::Convert, &layer.digest, layer.size);
    let (content, counter) = counted(match layer.inline() {
        Some(content) => stream::once(async move { Ok(content) }).boxed(),
        None => source.blob(layer).await?,
    });
    let input = SyncIoBridge::new(StreamReader::new(content.map_err(io::Error::other)));
    let build = BuildOptions {
        span_bytes: options.span_bytes,
        build_tool: options.build_tool().to_owned(),
        limits: options.limits.clone(),
    };
    let work = tokio::task::spawn_blocking(move || soci::build(input, &build));
    let told = |bytes| progress.advanced(Action::Convert, &layer.digest, bytes);
    let built = watched(work, &counter, told).await.map_err(|_| Error::Stopped)?;
    progress.ended(Action::Convert, &layer.digest, Outcome::Done);
    match built {
        Ok(built) if built.blob == layer.digest || layer.digest.algorithm() != "sha256" => {
            Ok(IndexedLayer { layer: layer.clone(), outcome: Ok(built) })
        }
        Ok(built) => Err(document_error(layer.digest, format!("its bytes have the digest {}", built.blob))),
        Err(error @ (BuildError::OneFrame { .. } | BuildError::Sparse { .. } | BuildError::Empty)) => {
            skipped(error.to_string())
        }
        Err(error) => Err(document_error(layer.digest, error.to_string())),
    }
}

fn document_error(layer: Digest, detail: String) -> Error {
    Error::Document { what: format!("layer {layer}"), detail }
}

/// Makes an index manifest of ztocs, and the descriptors of these; `None` where there are none. `image` is the manifest that
/// an index of version 1 refers to.
///
/// # Errors
/// None that can happen with these documents.
pub fn index_manifest(
    layers: &[IndexedLayer],
    image: &Descriptor,
    options: &SociOptions,
) -> Result<Option<Document>, Error> {
    let annotation = |key: &str, value: String| (key.to_owned(), value);
    let ztoc = |indexed: &IndexedLayer| {
        let built = indexed.outcome.as_ref().ok().filter(|built| built.is_common)?;
        let digest = Digest::sha256_of(&built.ztoc);
        let mut ztoc = Descriptor::new(ZTOC_TYPE, digest, built.ztoc.len() as u64);
        ztoc.annotations.extend([
            annotation(LAYER_DIGEST, indexed.layer.digest.to_string()),
            annotation(LAYER_TYPE, indexed.layer.media_type.clone()),
        ]);
        // As `soci` 0.4 and 0.15 do.
        if options.version == Version::Two {
            ztoc.annotations.extend([annotation(SPAN_SIZE, options.span_bytes.to_string())]);
        }
        Some(ztoc)
    };
    let ztocs: Vec<Descriptor> = layers.iter().filter_map(ztoc).collect();
    if ztocs.is_empty() {
        return Ok(None);
    }
    let config_type = match options.version {
        Version::One => CONFIG_TYPE_V1,
        Version::Two => CONFIG_TYPE_V2,
    };
    let subject = || Descriptor::new(image.media_type.clone(), image.digest, image.size);
    let manifest = Manifest {
        schema_version: 2,
        media_type: media_type::OCI_MANIFEST.to_owned(),
        artifact_type: None,
        config: Descriptor::new(config_type, Digest::sha256_of(CONFIG), CONFIG.len() as u64),
        layers: ztocs,
        subject: (options.version == Version::One).then(subject),
        annotations: BTreeMap::from([annotation(BUILD_TOOL, options.build_tool().to_owned())]),
    };
    Ok(Some(manifest.to_document()?))
}

/// Puts an index where it belongs: its configuration, the ztocs, its manifest last. Gives no name to it.
///
/// # Errors
/// Where the sink does not take it.
pub async fn publish(sink: &dyn ImageSink, index: &Document, layers: &[IndexedLayer]) -> Result<(), Error> {
    let config = Descriptor::new(String::new(), Digest::sha256_of(CONFIG), CONFIG.len() as u64);
    put(sink, &config, Bytes::from_static(CONFIG)).await?;
    for built in layers.iter().filter_map(|indexed| indexed.outcome.as_ref().ok()).filter(|built| built.is_common) {
        let ztoc = Descriptor::new(ZTOC_TYPE, Digest::sha256_of(&built.ztoc), built.ztoc.len() as u64);
        put(sink, &ztoc, built.ztoc.clone().into()).await?;
    }
    Ok(sink.put_manifest(index).await?)
}

async fn put(sink: &dyn ImageSink, descriptor: &Descriptor, content: Bytes) -> Result<(), Error> {
    if sink.has_blob(descriptor).await? {
        return Ok(());
    }
    let content: BlobStream = stream::once(async move { Ok(content) }).boxed();
    Ok(sink.put_blob(descriptor, content).await?)
}

/// Takes an image to another place, with an index of its layers.
///
/// # Errors
/// As [`crate::image::convert_image`]; and where no layer has an index.
pub async fn convert_soci(
    source: &dyn ImageSource,
    sink: &dyn ImageSink,
    options: &SociOptions,
    progress: &dyn Progress,
) -> Result<SociReport, Error> {
    let mut root = survey::survey(source, &options.limits).await?;
    if let Some(selected) = survey::select(&root, &options.platforms, &source.name())? {
        survey::prune(&mut root, &selected);
    }
    let carrier = Carrier::new(source, sink, progress);
    let images = root.images();
    let mut indexed = Vec::new();
    for image in &images {
        for layer in &image.manifest.layers {
            carrier.blob(layer).await?;
        }
        indexed.push(Indexing::of(source, image, options, progress).await?);
    }
    if indexed.iter().all(|indexing| indexing.index.is_none()) {
        let detail = format!(
            "no layer has an index: {}",
            indexed.iter().flat_map(Indexing::reasons).next().unwrap_or("it has none")
        );
        return Err(Error::Document { what: source.name(), detail });
    }
    let rebuilt = rebuild::prune(&root)?;
    let new_root = match options.version {
        Version::One => {
            rebuild::put(&root, &rebuilt, &carrier).await?;
            for indexing in &indexed {
                indexing.publish(sink).await?;
            }
            rebuilt.document(root.document().digest)?.clone()
        }
        Version::Two => bind(&root, &images, &mut indexed, &carrier).await?,
    };
    sink.commit(&new_root, &BTreeMap::new()).await?;
    let report = |indexing: &Indexing| SociImage {
        platform: indexing.platform.clone(),
        digest: indexing.digest,
        index: indexing.index.as_ref().map(|index| index.digest),
        layers: indexing.layers.iter().map(SociLayer::of).collect(),
    };
    Ok(SociReport {
        digest: new_root.digest,
        media_type: new_root.media_type.clone(),
        images: indexed.iter().map(report).collect(),
    })
}

/// One image and its index.
struct Indexing {
    platform: String,
    /// Of its manifest, which changes where the index is bound to it.
    digest: Digest,
    layers: Vec<IndexedLayer>,
    index: Option<Document>,
}

impl Indexing {
    async fn of(
        source: &dyn ImageSource,
        image: &ImageNode,
        options: &SociOptions,
        progress: &dyn Progress,
    ) -> Result<Self, Error> {
        let layers = index_layers(source, &image.manifest.layers, options, progress).await?;
        let index = index_manifest(&layers, &image.document.descriptor(), options)?;
        Ok(Self { platform: image.platform.to_string(), digest: image.document.digest, layers, index })
    }

    async fn publish(&self, sink: &dyn ImageSink) -> Result<(), Error> {
        match &self.index {
            Some(index) => publish(sink, index, &self.layers).await,
            None => Ok(()),
        }
    }

    fn reasons(&self) -> impl Iterator<Item = &str> {
        self.layers.iter().filter_map(|indexed| indexed.outcome.as_ref().err().map(String::as_str))
    }
}

/// Makes manifests that name their index, and an OCI index of both.
async fn bind(
    root: &Node,
    images: &[&ImageNode],
    indexed: &mut [Indexing],
    carrier: &Carrier<'_>,
) -> Result<Document, Error> {
    let mut index = match root {
        Node::Index(node) => Index { media_type: media_type::OCI_INDEX.to_owned(), ..node.index.clone() },
        _ => Index::empty(),
    };
    let mut entries = Vec::new();
    if let Node::Index(node) = root {
        // What else stands there: attestations, artifacts; not what was left out.
        entries.extend(node.children.iter().map(|child| child.descriptor.clone()));
        for child in node.children.iter().filter_map(|child| child.node.as_ref()) {
            if !matches!(child, Node::Image(_)) {
                rebuild::put(child, &rebuild::prune(child)?, carrier).await?;
            }
        }
    } else if let Some(image) = images.first() {
        let mut entry = image.document.descriptor();
        entry.platform = Some(image.platform.clone());
        entries.push(entry);
    }
    let mut added = Vec::new();
    for (image, indexing) in images.iter().zip(indexed) {
        carrier.config(&image.config_document).await?;
        indexing.publish(carrier.sink).await?;
        let mut manifest = Manifest { media_type: media_type::OCI_MANIFEST.to_owned(), ..image.manifest.clone() };
        manifest.config.media_type = edit::oci_type(&manifest.config.media_type);
        if let Some(soci) = &indexing.index {
            manifest.annotations.insert(INDEX_DIGEST.to_owned(), soci.digest.to_string());
        }
        let document = manifest.to_document()?;
        carrier.sink.put_manifest(&document).await?;
        let old = std::mem::replace(&mut indexing.digest, document.digest);
        for entry in entries.iter_mut().filter(|entry| entry.digest == old) {
            (entry.digest, entry.size) = (document.digest, document.bytes.len() as u64);
            entry.media_type = media_type::OCI_MANIFEST.to_owned();
            entry.annotations = manifest.annotations.clone();
        }
        let Some(soci) = &indexing.index else { continue };
        let mut entry = soci.descriptor();
        entry.artifact_type = Some(CONFIG_TYPE_V2.to_owned());
        entry.platform = Some(image.platform.clone());
        entry.annotations.insert(IMAGE_MANIFEST_DIGEST.to_owned(), document.digest.to_string());
        let is_old = |known: &Descriptor| {
            known.artifact_type.as_deref() == Some(CONFIG_TYPE_V2) && known.platform.as_ref() == Some(&image.platform)
        };
        match entries.iter_mut().find(|known| is_old(known)) {
            Some(known) => *known = entry,
            None => added.push(entry),
        }
    }
    entries.append(&mut added);
    index.manifests = entries;
    let document = index.to_document()?;
    carrier.sink.put_manifest(&document).await?;
    Ok(document)
}

/// Says whether nothing in a layer makes it lazily readable by itself.
#[must_use]
pub fn is_plain(layer: &Descriptor) -> bool {
    Promise::read(&layer.annotations).is_ok_and(|promise| promise.is_empty())
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    fn golden(name: &str) -> Vec<u8> {
        std::fs::read(format!("{}/../format/tests/golden/soci/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
    }

    /// What `soci create` 0.4.1 has made of an image with the same layer twice, once without compression.
    #[test]
    fn the_manifest_is_that_of_soci() {
        let options = SociOptions { version: Version::One, span_bytes: 32 << 10, ..SociOptions::default() };
        let blob = golden("layer.tar.gz");
        let mut tar = Vec::new();
        flate2::read::GzDecoder::new(&blob[..]).read_to_end(&mut tar).unwrap();
        let build = BuildOptions {
            span_bytes: options.span_bytes,
            build_tool: options.build_tool().to_owned(),
            ..BuildOptions::default()
        };
        let layer = |bytes: &[u8], kind: &str| {
            let media_type = format!("application/vnd.oci.image.layer.v1.tar{kind}");
            let layer = Descriptor::new(media_type, Digest::sha256_of(bytes), bytes.len() as u64);
            IndexedLayer { layer, outcome: Ok(soci::build(bytes, &build).unwrap()) }
        };
        let layers = [layer(&blob, "+gzip"), layer(&tar, "")];
        let expected = golden("index.json");
        let manifest: Manifest = serde_json::from_slice(&expected).unwrap();
        let index = index_manifest(&layers, &manifest.subject.unwrap(), &options).unwrap().unwrap();
        assert_eq!(String::from_utf8_lossy(&index.bytes), String::from_utf8_lossy(&expected));
    }
}
