//! Whether an image is what it says.
//!
//! Every layer is read once, from its first byte to its last, and in that one pass compared with everything that is said
//! about it: digest and size of the blob, the DiffID in the configuration, and for lazy formats the annotations, the table of
//! contents against the tar (entry by entry: names, types, attributes, sizes, links), each chunk's digest and place, each
//! file's digest, the footer. What a lazy reader would show is then what unpacking gives.
//!
//! Memory: the table of contents of the layers that are being read, and what decompression needs.

use std::{collections::HashSet, fmt, io, sync::Arc};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use loris_format::{
    digest::{DiffId, Digest},
    estargz::{
        footer::{self, Footer, FooterError},
        toc::{TOC_DIGEST_ANNOTATION, UNCOMPRESSED_SIZE_ANNOTATION},
    },
    limits::Limits,
    opening::{Family, OpenError, Opened, Opening, Promise, Step, Trust, ZstdChunked},
    position::BlobRange,
    tar,
};
use loris_oci::{Descriptor, ImageSource, Platforms, document::media_type::LayerType};
use serde::Serialize;
use tokio_util::io::{StreamReader, SyncIoBridge};

use crate::{
    Error,
    carry::{counted, watched},
    layer::Watch,
    progress::{Action, Outcome, Progress},
    survey::{self, Node},
};

mod layer;
mod members;
mod table;

#[cfg(test)]
mod tests;

/// Layers that are read at the same time.
const LAYERS_AT_ONCE: usize = 2;

/// Most findings that are told about one layer. A layer with one entry too many differs in all that follow.
const MOST_FINDINGS: usize = 50;

/// What is verified.
#[derive(Clone, Debug)]
pub struct VerifyOptions {
    /// Which platforms.
    pub platforms: Platforms,
    /// Bounds on what the image may ask of us.
    pub limits: Limits,
}

impl Default for VerifyOptions {
    fn default() -> Self {
        Self { platforms: Platforms::All, limits: Limits::default() }
    }
}

/// How bad a finding is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The image works, but not as well as it could.
    Warning,
    /// The image is not what it says.
    Error,
}

/// Something that is wrong, and where.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// The manifest or index.
    pub document: Digest,
    /// The layer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layer: Option<Digest>,
    /// The entry of the layer, as its path stands there; bytes that are not text are escaped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entry: Option<String>,
    /// Where, in uncompressed bytes of the layer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// What.
    pub message: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.layer {
            Some(layer) => write!(f, "layer {layer}")?,
            None => write!(f, "{}", self.document)?,
        }
        if let Some(entry) = &self.entry {
            write!(f, ", entry {entry}")?;
        }
        if let Some(offset) = self.offset {
            write!(f, ", offset {offset}")?;
        }
        write!(f, ": {}", self.message)
    }
}

/// What was verified, and what is wrong with it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Verified {
    /// What the image's name leads to.
    pub digest: Digest,
    /// Layers that were read; one that several images share counts once.
    pub layers_checked: usize,
    /// What is wrong; nothing where all is well.
    pub problems: Vec<Finding>,
}

/// Verifies an image.
///
/// # Errors
/// Where the image cannot be read at all: what is wrong with its content is a finding, that a registry does not answer
/// is an error.
pub async fn verify_image(
    source: &dyn ImageSource,
    options: &VerifyOptions,
    progress: &dyn Progress,
) -> Result<Verified, Error> {
    let mut root = survey::survey(source, &options.limits).await?;
    let digest = root.document().digest;
    if let Some(selected) = survey::select(&root, &options.platforms, &source.name())? {
        survey::prune(&mut root, &selected);
    }
    let mut findings = Vec::new();
    attestations(&root, &mut findings);
    let mut seen = HashSet::new();
    let mut checks = Vec::new();
    for image in root.images() {
        for (layer, diff_id) in image.manifest.layers.iter().zip(&image.config.diff_ids) {
            let foreign = LayerType::parse(&layer.media_type).is_none_or(|layer| layer.foreign);
            if !foreign && seen.insert((layer.digest, *diff_id, layer.annotations.clone())) {
                checks.push(verify_layer(source, image.document.digest, layer, *diff_id, options, progress));
            }
        }
    }
    let layers_checked = checks.len();
    let checked: Vec<Vec<Finding>> = stream::iter(checks).buffered(LAYERS_AT_ONCE).try_collect().await?;
    findings.extend(checked.into_iter().flatten());
    Ok(Verified { digest, layers_checked, problems: findings })
}

/// An attestation of an index that is about a manifest which is not in it is of no use to anybody.
fn attestations(node: &Node, findings: &mut Vec<Finding>) {
    let Node::Index(index) = node else { return };
    for child in &index.children {
        let about = child.descriptor.attested();
        if let Some(about) = about.filter(|about| !index.children.iter().any(|other| other.descriptor.digest == *about))
        {
            findings.push(Finding {
                severity: Severity::Warning,
                document: index.document.digest,
                layer: None,
                entry: None,
                offset: None,
                message: format!("attestation {} is about {about}, which is not there", child.descriptor.digest),
            });
        }
        if let Some(node) = &child.node {
            attestations(node, findings);
        }
    }
}

/// What is found about one layer.
pub(crate) struct Findings {
    document: Digest,
    layer: Digest,
    list: Vec<Finding>,
    /// How many were not kept.
    more: usize,
}

impl Findings {
    fn new(document: Digest, layer: Digest) -> Self {
        Self { document, layer, list: Vec::new(), more: 0 }
    }

    fn error(&mut self, message: impl Into<String>) {
        self.add(Severity::Error, None, None, message.into());
    }

    fn warning(&mut self, message: impl Into<String>) {
        self.add(Severity::Warning, None, None, message.into());
    }

    fn entry(&mut self, entry: &tar::Entry, message: impl Into<String>) {
        self.add(Severity::Error, Some(&entry.path), Some(entry.header_offset), message.into());
    }

    fn add(&mut self, severity: Severity, entry: Option<&[u8]>, offset: Option<u64>, message: String) {
        if self.list.len() >= MOST_FINDINGS {
            self.more += 1;
            return;
        }
        let entry = entry.map(|path| path.escape_ascii().take(400).map(char::from).collect());
        self.list.push(Finding { severity, document: self.document, layer: Some(self.layer), entry, offset, message });
    }

    fn finish(mut self) -> Vec<Finding> {
        if self.more > 0 {
            let (document, layer) = (self.document, Some(self.layer));
            let message = format!("and {} more findings", self.more);
            self.list.push(Finding { severity: Severity::Error, document, layer, entry: None, offset: None, message });
        }
        self.list
    }
}

/// Stops a pass that nobody waits for any more.
struct StopOnDrop(Arc<Watch>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stop();
    }
}

async fn verify_layer(
    source: &dyn ImageSource,
    document: Digest,
    descriptor: &Descriptor,
    diff_id: DiffId,
    options: &VerifyOptions,
    progress: &dyn Progress,
) -> Result<Vec<Finding>, Error> {
    progress.began(Action::Verify, &descriptor.digest, descriptor.size);
    let mut findings = Findings::new(document, descriptor.digest);
    let outcome = read_layer(source, descriptor, diff_id, options, progress, &mut findings).await;
    if let Err(error) = outcome {
        match (error.place(), &error) {
            (Some(loris_oci::Error::Corrupt { .. }) | None, Error::Layer { source, .. }) => {
                findings.error(source.to_string());
            }
            (Some(loris_oci::Error::Corrupt { .. } | loris_oci::Error::NotFound { .. }), _) => {
                findings.error(error.to_string());
            }
            _ => return Err(error),
        }
    }
    progress.ended(Action::Verify, &descriptor.digest, Outcome::Done);
    Ok(findings.finish())
}

async fn read_layer(
    source: &dyn ImageSource,
    descriptor: &Descriptor,
    diff_id: DiffId,
    options: &VerifyOptions,
    progress: &dyn Progress,
    findings: &mut Findings,
) -> Result<(), Error> {
    let table = table_of_contents(source, descriptor, options, findings).await?;
    let (content, counter) = counted(source.blob(descriptor).await?);
    let input = SyncIoBridge::new(StreamReader::new(content.map_err(io::Error::other)));
    let watch = Arc::new(Watch::default());
    let _stop = StopOnDrop(Arc::clone(&watch));
    let claims = layer::Claims {
        diff_id,
        blob_bytes: descriptor.size,
        uncompressed_bytes: descriptor.annotations.get(UNCOMPRESSED_SIZE_ANNOTATION).cloned(),
        table,
        limits: options.limits.clone(),
    };
    let mut own = std::mem::replace(findings, Findings::new(findings.document, findings.layer));
    let work = tokio::task::spawn_blocking(move || {
        let outcome = layer::check(input, &claims, &watch, &mut own);
        (outcome, own)
    });
    let told = |bytes| progress.advanced(Action::Verify, &descriptor.digest, bytes);
    let outcome = match watched(work, &counter, told).await {
        Ok((outcome, own)) => {
            *findings = own;
            outcome
        }
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => return Err(Error::Stopped),
    };
    outcome.map_err(|source| Error::Layer { digest: descriptor.digest, source })
}

/// Reads a layer's table of contents as a lazy reader does. `None` where there is none to be compared.
async fn table_of_contents(
    source: &dyn ImageSource,
    descriptor: &Descriptor,
    options: &VerifyOptions,
    findings: &mut Findings,
) -> Result<Option<layer::TableOfContents>, Error> {
    let promise = Promise::read(&descriptor.annotations).unwrap_or_else(|error| {
        findings.error(error.to_string());
        Promise::default()
    });
    let tail_bytes = (footer::DETECT_BYTES as u64).min(descriptor.size);
    let tail = source.blob_range(descriptor, descriptor.size - tail_bytes..descriptor.size).await?;
    let kind = footer::detect(&tail, descriptor.size);
    if promise.is_empty() {
        let Some(kind) = kind.filter(|kind| *kind == footer::Kind::Estargz || kind.is_zstd()) else { return Ok(None) };
        let annotation = match kind {
            footer::Kind::ZstdChunkedContainers => Family::Containers.checksum_annotation(),
            _ => TOC_DIGEST_ANNOTATION.to_owned(),
        };
        findings.warning(format!(
            "it is {}, but the annotation {annotation} is missing: no lazy reader will trust it",
            kind.name()
        ));
    }
    let promised = promise.zstd_chunked.clone();
    let opened = match open(source, descriptor, promise, &options.limits).await? {
        Ok(opened) => opened,
        Err(error) => {
            findings.error(error.to_string());
            return Ok(None);
        }
    };
    if let Some(promised) = promised {
        compare_places(&promised, &tail, descriptor.size, findings);
    }
    let bytes = source.blob_range(descriptor, opened.toc_range.start.0..opened.toc_range.end().0).await?;
    match opened.decode_toc(&bytes, &options.limits) {
        Ok(json) => Ok(Some(layer::TableOfContents {
            json,
            kind: opened.kind,
            offset: opened.toc_range.start.0,
            digest: opened.toc_digest,
        })),
        Err(error) => {
            findings.error(format!("table of contents cannot be read: {error}"));
            Ok(None)
        }
    }
}

/// Compares where annotations and footer of a zstd:chunked layer say that its parts are: some readers go by these, some by
/// those.
fn compare_places(promised: &ZstdChunked, tail: &[u8], blob_size: u64, findings: &mut Findings) {
    let (toc, tar_split) = match footer::read(tail, blob_size) {
        Ok(Footer::Zstd { toc, tar_split, .. }) => (toc, tar_split),
        Ok(_) | Err(FooterError::NoFooter) => {
            findings.warning("it has no footer: readers that go by that find no table of contents");
            return;
        }
        Err(error) => {
            findings.error(error.to_string());
            return;
        }
    };
    let (position, split) = (promised.family.position_annotation(), promised.family.tar_split_annotation());
    if promised.position.is_some_and(|position| position != toc) {
        findings.error(format!("annotation {position} and the footer name two places for the table of contents"));
    }
    if let (Some(promised), Some(found)) = (promised.tar_split, tar_split)
        && promised != found
    {
        findings.error(format!("annotation {split} and the footer name two places for the tar-split"));
    }
}

async fn open(
    source: &dyn ImageSource,
    descriptor: &Descriptor,
    promise: Promise,
    limits: &Limits,
) -> Result<Result<Opened, OpenError>, Error> {
    let (mut opening, mut range) = match Opening::new(descriptor.size, promise, Trust::Optional, limits) {
        Ok(opening) => opening,
        Err(error) => return Ok(Err(error)),
    };
    loop {
        let BlobRange { start, .. } = range;
        let bytes = source.blob_range(descriptor, start.0..range.end().0).await?;
        match opening.supply(&bytes) {
            Ok(Step::Read(next, next_range)) => (opening, range) = (next, next_range),
            Ok(Step::Done(_, opened)) => return Ok(Ok(opened)),
            Err(error) => return Ok(Err(error)),
        }
    }
}
