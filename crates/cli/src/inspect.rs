//! `inspect`: what each layer really is, read from its bytes, and whether it would be lazy.

use std::collections::BTreeMap;

use clap::Args;
use futures_util::{StreamExt as _, stream};
use loris_format::{
    compression::Compression,
    estargz::footer,
    index::{LayerIndex, NodeKind, Prefetch},
};
use loris_lazy::{FetchPolicy, OpenedLayer};
use loris_oci::{Descriptor, ImageSource, document::ImageConfig};
use serde::Serialize;

use crate::{
    Global,
    access::OnePlatform,
    failure::{self, Outcome},
    opened::{Looked, OpenLazily},
    table::{bytes, printable, short_digest, table},
};

/// Show what each layer really is, and whether it would be lazy.
#[derive(Args)]
pub(crate) struct InspectArguments {
    /// The image
    image: String,
    #[command(flatten)]
    platform: OnePlatform,
    #[command(flatten)]
    open: OpenLazily,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    name: String,
    digest: String,
    media_type: String,
    platform: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    created: Option<String>,
    entrypoint: Vec<String>,
    cmd: Vec<String>,
    env: Vec<String>,
    user: String,
    working_dir: String,
    labels: BTreeMap<String, String>,
    /// Of all layers' blobs.
    compressed_bytes: u64,
    /// Whether a mount of it would be lazy: all of its layers are.
    lazy: bool,
    layers: Vec<Layer>,
}

/// One layer.
#[derive(Serialize)]
struct Layer {
    digest: String,
    /// What the manifest says it is.
    media_type: String,
    compressed_bytes: u64,
    /// What its bytes say it is.
    format: String,
    lazy: bool,
    /// Why it is not lazy.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    contents: Option<Contents>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
}

/// What the layer's table of contents tells.
#[derive(Serialize)]
struct Contents {
    files: usize,
    directories: usize,
    other: usize,
    /// Content of regular files.
    file_bytes: u64,
    frames: usize,
    extents: usize,
    /// Compressed bytes that the layer's writer wants fetched first; not there where the layer does not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    prefetch_bytes: Option<u64>,
    /// Extents that are in the local cache.
    cached_extents: u64,
}

/// Layers whose bytes are looked at side by side.
const SIDE_BY_SIDE: usize = 16;
/// Enough to tell a compression and a tar archive by, in bytes.
const HEAD_BYTES: u64 = 512;
/// As long as the longest footer, in bytes.
const TAIL_BYTES: u64 = 72;

impl InspectArguments {
    pub(crate) async fn run(self, global: &Global) -> failure::Result {
        let store = self.open.store()?;
        let looked = Looked::open(global, &self.image, &self.platform, &self.open, &store, FetchPolicy::EXACT).await?;
        let layers: Vec<Layer> = stream::iter(&looked.image.layers)
            .map(|opened| look(&*looked.source, opened))
            .buffered(SIDE_BY_SIDE)
            .collect()
            .await;
        let report = Report::new(&self.image, &looked, layers);
        if global.json {
            println!("{}", serde_json::to_string_pretty(&report)?);
        } else {
            print!("{}", report.to_text());
        }
        Ok(Outcome::Done)
    }
}

async fn look(source: &dyn ImageSource, opened: &OpenedLayer) -> Layer {
    let (format, reason, contents) = match &opened.layer {
        Ok(layer) => {
            let statistics = layer.statistics();
            let cached = statistics.extents_filled;
            (layer.opened().kind.name().to_owned(), None, Some(Contents::new(layer.index(), cached)))
        }
        Err(error) => (format_of(source, &opened.descriptor).await, Some(error.to_string()), None),
    };
    Layer {
        digest: opened.descriptor.digest.to_string(),
        media_type: opened.descriptor.media_type.clone(),
        compressed_bytes: opened.descriptor.size,
        format,
        lazy: reason.is_none(),
        reason,
        contents,
        annotations: opened.descriptor.annotations.clone(),
    }
}

/// Tells a layer's format by its first and last bytes.
async fn format_of(source: &dyn ImageSource, blob: &Descriptor) -> String {
    let size = blob.size;
    let head = source.blob_range(blob, 0..size.min(HEAD_BYTES));
    let tail = source.blob_range(blob, size.saturating_sub(TAIL_BYTES)..size);
    let (head, tail) = tokio::join!(head, tail);
    let (Ok(head), Ok(tail)) = (head, tail) else { return "unreadable".into() };
    if let Some(kind) = footer::detect(&tail, size) {
        return kind.name().to_owned();
    }
    match Compression::detect(&head) {
        Compression::Gzip => "tar, gzip".into(),
        Compression::Zstd => "tar, zstd".into(),
        Compression::None if head.len() >= 262 && &head[257..262] == b"ustar" => "tar".into(),
        Compression::None if head.is_empty() => "empty".into(),
        Compression::None => "unknown".into(),
    }
}

impl Contents {
    fn new(index: &LayerIndex, cached_extents: u64) -> Self {
        let (mut files, mut directories, mut other, mut file_bytes) = (0, 0, 0, 0_u64);
        for node in index.nodes() {
            match &node.kind {
                NodeKind::Regular(content) => {
                    files += 1;
                    file_bytes = file_bytes.saturating_add(content.size);
                }
                NodeKind::Directory { .. } => directories += 1,
                _ => other += 1,
            }
        }
        let prefetch_bytes = match index.prefetch() {
            Prefetch::Unspecified => None,
            Prefetch::Nothing => Some(0),
            Prefetch::Until(end) => Some(end.0),
        };
        let (frames, extents) = (index.frames().len(), index.extents().len());
        Self { files, directories, other, file_bytes, frames, extents, prefetch_bytes, cached_extents }
    }
}

impl Report {
    fn new(name: &str, looked: &Looked, layers: Vec<Layer>) -> Self {
        let ImageConfig { config, created, .. } = &looked.image.config;
        Self {
            name: name.to_owned(),
            digest: looked.document.digest.to_string(),
            media_type: looked.document.media_type.clone(),
            platform: looked.image.config.platform().normalized().to_string(),
            created: created.clone(),
            entrypoint: config.entrypoint.clone(),
            cmd: config.cmd.clone(),
            env: config.env.clone(),
            user: config.user.clone(),
            working_dir: config.working_dir.clone(),
            labels: config.labels.clone(),
            compressed_bytes: layers.iter().fold(0, |sum, layer| layer.compressed_bytes.saturating_add(sum)),
            lazy: layers.iter().all(|layer| layer.lazy),
            layers,
        }
    }

    fn to_text(&self) -> String {
        let mut facts = vec![
            ("name", self.name.clone()),
            ("digest", self.digest.clone()),
            ("platform", self.platform.clone()),
            ("created", self.created.clone().unwrap_or_else(|| "-".into())),
            ("command", command(&self.entrypoint, &self.cmd)),
            ("layers", format!("{}, {} compressed", self.layers.len(), bytes(self.compressed_bytes))),
        ];
        let lazy = self.layers.iter().filter(|layer| layer.lazy).count();
        facts.push((
            "lazy",
            if self.lazy { "yes".into() } else { format!("no: {lazy} of {} layers are", self.layers.len()) },
        ));
        let mut text = String::new();
        for (key, value) in facts {
            text.push_str(&format!("{key:<9} {}\n", printable(value.as_bytes())));
        }
        text.push('\n');
        let head = ["layer", ">size", "is", "lazy", ">files", ">content", ">cached", ">prefetch"];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        rows.extend(self.layers.iter().map(Layer::row));
        text.push_str(&table(&rows));
        for layer in &self.layers {
            if let Some(reason) = &layer.reason {
                text.push_str(&format!("{}: {}\n", short_digest(&layer.digest), printable(reason.as_bytes())));
            }
        }
        text
    }
}

impl Layer {
    fn row(&self) -> Vec<String> {
        let mut row = vec![
            short_digest(&self.digest),
            bytes(self.compressed_bytes),
            self.format.clone(),
            if self.lazy { "yes".into() } else { "no".into() },
        ];
        if let Some(contents) = &self.contents {
            let cached = if contents.extents == 0 {
                "-".into()
            } else {
                format!("{:.0} %", 100.0 * contents.cached_extents as f64 / contents.extents as f64)
            };
            row.extend([
                contents.files.to_string(),
                bytes(contents.file_bytes),
                cached,
                contents.prefetch_bytes.map_or_else(|| "-".into(), bytes),
            ]);
        }
        row
    }
}

fn command(entrypoint: &[String], cmd: &[String]) -> String {
    let words: Vec<&str> = entrypoint.iter().chain(cmd).map(String::as_str).collect();
    if words.is_empty() { "-".into() } else { words.join(" ") }
}
