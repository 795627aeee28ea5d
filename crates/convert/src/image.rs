//! A whole image converted: all platforms, with everything that belongs to it.
//!
//! ```text
//!  survey (all documents) ─▶ select platforms ─▶ layers, side by side ─▶ configurations ─▶ manifests ─▶ indexes ─▶ root
//!                                                 each one once                             └─▶ referrers
//! ```
//!
//! What is kept: everything but what has to change. Documents are changed in places (unknown fields, history, order of
//! keys stay); attestations in an index and referrers are relinked to the new manifests, never converted; artifacts,
//! foreign layers and layers of unknown types are carried along unchanged, the last with a warning.
//!
//! Choosing platforms of an index gives an index with those alone, also where it is one, as `nerdctl image convert` and
//! `ctr image convert` do; a manifest that stands alone stays alone.
//!
//! Converting what we made ourselves changes nothing: a layer that we wrote with the same options is recognised by
//! [`WRITER_ANNOTATION`], the annotations of its format and its footer, and passed on as it is. An order of files that
//! an earlier conversion was given is kept where no other is asked for.

use std::{
    collections::{BTreeMap, HashMap},
    num::NonZeroUsize,
    path::PathBuf,
};

use loris_format::{
    digest::{DiffId, Digest},
    limits::Limits,
};
use loris_oci::{Descriptor, Document, ImageSink, ImageSource, Platforms};
use serde::Serialize;

use crate::{
    Error,
    carry::Carrier,
    layer::{DEFAULT_MEMORY_BYTES, LayerOptions},
    progress::Progress,
    record::Record,
    survey::{self, ImageNode, Node},
};

pub(crate) mod edit;
mod layers;
pub(crate) mod rebuild;
pub(crate) mod referrers;

#[cfg(test)]
mod tests;

pub use layers::WRITER_ANNOTATION;

/// What layers are made into.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Target {
    /// Lazily pullable, and a compressed tar for everyone else.
    Lazy(LayerOptions),
    /// Layers stay as they are. With [`ConvertOptions::oci`], media types change; without, an exact copy is made.
    Keep,
    /// Tars without compression.
    Uncompressed,
}

/// How an image is converted.
#[derive(Clone, Debug)]
pub struct ConvertOptions {
    /// What layers are made into. [`LayerOptions::prioritised`] holds for every layer; a record is the better way.
    pub target: Target,
    /// Whether Docker's media types become OCI's.
    pub oci: bool,
    /// Which platforms are converted; the others are left out of the new image.
    pub platforms: Platforms,
    /// Whether what refers to the image is carried along and relinked.
    pub referrers: bool,
    /// What a workload read: these files come first in their layers.
    pub record: Option<Record>,
    /// Threads that compress; as many as there are processors where it is not given. The result is the same.
    pub threads: Option<NonZeroUsize>,
    /// Memory for what is being compressed, in bytes, all layers together.
    pub memory_bytes: u64,
    /// Layers that are worked on at the same time. Each needs space for its uncompressed content in `work_directory`.
    pub layers_at_once: NonZeroUsize,
    /// Where temporary files go. Nothing is left in it.
    pub work_directory: PathBuf,
    /// Bounds on documents.
    pub limits: Limits,
}

impl Default for ConvertOptions {
    fn default() -> Self {
        Self {
            target: Target::Lazy(LayerOptions::default()),
            oci: false,
            platforms: Platforms::All,
            referrers: true,
            record: None,
            threads: None,
            memory_bytes: DEFAULT_MEMORY_BYTES,
            layers_at_once: const { NonZeroUsize::new(3).unwrap() },
            work_directory: std::env::temp_dir(),
            limits: Limits::default(),
        }
    }
}

/// What became of an image.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// The new root.
    pub digest: Digest,
    /// Its type.
    pub media_type: String,
    /// The images in it, in the order of the index.
    pub images: Vec<ImageReport>,
    /// What refers to the image and was carried along: the new manifests.
    pub referrers: Vec<Digest>,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// What became of one platform's image.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ImageReport {
    /// As in `linux/arm/v7`.
    pub platform: String,
    /// The source's manifest.
    pub source: Digest,
    /// The new manifest.
    pub digest: Digest,
    /// The layers, lowest first.
    pub layers: Vec<LayerReport>,
}

/// What became of a layer.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LayerReport {
    /// The source's layer.
    pub source: Digest,
    /// Its compressed bytes.
    pub source_bytes: u64,
    /// The new layer.
    pub digest: Digest,
    /// Its compressed bytes.
    pub bytes: u64,
    /// Its type.
    pub media_type: String,
    /// What was done.
    pub change: LayerChange,
    /// Digest of the table of contents of a layer that was converted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub toc_digest: Option<Digest>,
    /// Prioritised files that a converted layer does not have.
    pub missing: usize,
}

/// What was done to a layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LayerChange {
    /// It was written anew.
    Converted,
    /// It was as it should be.
    Unchanged,
    /// It is foreign and was left alone.
    Foreign,
    /// It is of a type that is not known and was left alone.
    Unknown,
}

/// Converts an image.
///
/// Layers are converted on threads of their own; the future itself does not block. Where it is dropped, they stop soon.
/// Nothing is visible in the sink under the image's name before all of it is there.
///
/// # Errors
/// See [`Error`]. A layer whose content is not what the configuration says is one.
pub async fn convert_image(
    source: &dyn ImageSource,
    sink: &dyn ImageSink,
    options: &ConvertOptions,
    progress: &dyn Progress,
) -> Result<Report, Error> {
    let mut root = survey::survey(source, &options.limits).await?;
    if let Some(selected) = survey::select(&root, &options.platforms, &source.name())? {
        survey::prune(&mut root, &selected);
    }
    let carrier = Carrier::new(source, sink, progress);
    let mut warnings = Warnings { progress, list: Vec::new() };
    let record = options.record.as_ref();
    if let Some(record) = record
        && !root.images().iter().any(|image| record.knows(&image.document.digest))
    {
        warnings.add(format!(
            "the record was made of another image than {}: its files come first in all layers",
            source.name()
        ));
    }
    let made = layers::convert_all(&root, &carrier, options, &mut warnings).await?;
    let rebuilt = rebuild::rebuild(&root, &made, options)?;
    rebuild::put(&root, &rebuilt, &carrier).await?;
    let referrers = if options.referrers {
        let subjects = rebuilt.documents.iter().map(|(old, new)| (*old, new.clone())).collect();
        referrers::carry(&carrier, subjects, &options.limits, &mut warnings).await?
    } else {
        Vec::new()
    };
    let new_root = rebuilt.document(root.document().digest)?;
    sink.commit(new_root, &BTreeMap::new()).await?;
    let images = root.images().into_iter().map(|image| report(image, &made, &rebuilt.documents)).collect();
    Ok(Report {
        digest: new_root.digest,
        media_type: new_root.media_type.clone(),
        images,
        referrers,
        warnings: warnings.list,
    })
}

fn report(image: &ImageNode, made: &layers::MadeLayers, documents: &HashMap<Digest, Document>) -> ImageReport {
    let source = image.document.digest;
    let layers = image.manifest.layers.iter().enumerate().map(|(index, layer)| made.report(&source, index, layer));
    ImageReport {
        platform: image.platform.to_string(),
        source,
        digest: documents.get(&source).map_or(source, |document| document.digest),
        layers: layers.collect(),
    }
}

/// What the user should know: told at once, and kept for the report.
pub(crate) struct Warnings<'a> {
    progress: &'a dyn Progress,
    list: Vec<String>,
}

impl<'a> Warnings<'a> {
    pub(crate) fn new(progress: &'a dyn Progress) -> Self {
        Self { progress, list: Vec::new() }
    }

    pub(crate) fn add(&mut self, warning: String) {
        if !self.list.contains(&warning) {
            self.progress.warned(&warning);
            self.list.push(warning);
        }
    }

    pub(crate) fn finish(self) -> Vec<String> {
        self.list
    }
}
