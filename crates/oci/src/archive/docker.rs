//! Reading what `docker save`, `podman save` and others write.
//!
//! ```text
//! manifest.json      [{"Config": "<hex>.json", "RepoTags": ["alpine:3"], "Layers": ["<hex>.tar", ...]}, ...]
//! <hex>.json         a configuration, named by its digest
//! <hex>/layer.tar    a layer, usually uncompressed: then its digest is the DiffID in the configuration
//! ```
//!
//! There is no manifest in such an archive. One is made up, the same for the same archive; it is OCI's, since umoci and
//! skopeo find no other in an OCI layout, and whoever takes Docker's takes OCI's too.
//!
//! Source: Docker image specification 1.2 ("Combined Image JSON + Filesystem Changeset Format"), and archives of Docker
//! 1.10 to 28, Podman, skopeo, kaniko and crane.

use std::{collections::HashMap, ops::Range, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;
use loris_format::{
    compression::Compression,
    digest::{Digest, Hasher},
    limits::Limits,
};
use serde::{Deserialize, Serialize};

use super::members::Members;
use crate::{
    blob::{Part, blocking},
    document::{Descriptor, Document, Manifest, media_type, null_as_default},
    name::Selector,
    place::{BlobStream, Error, ImageSource},
    reference::Reference,
};

/// The file that lists the images.
pub(super) const MANIFEST: &str = "manifest.json";
/// Layers whose digest is not known are hashed in pieces of this many bytes.
const PIECE_BYTES: u64 = 1 << 20;
/// Most names that an error lists.
const MOST_LISTED: usize = 32;

/// One image of [`MANIFEST`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Item {
    pub config: String,
    #[serde(default, deserialize_with = "null_as_default")]
    pub repo_tags: Vec<String>,
    #[serde(default, deserialize_with = "null_as_default")]
    pub layers: Vec<String>,
}

/// An image in a Docker archive, to be read.
pub struct DockerArchiveSource {
    name: String,
    root: Document,
    config: Document,
    layers: HashMap<Digest, Part>,
}

impl DockerArchiveSource {
    pub(super) async fn open(
        name: String,
        members: Arc<Members>,
        selector: &Selector,
        limits: &Limits,
    ) -> Result<Self, Error> {
        let (selector, limits) = (selector.clone(), limits.clone());
        blocking(move || {
            let items = read_list(&members, &limits)?;
            let item = select(&items, &selector, &name)?;
            Self::of_item(name, &members, item, &limits).and_then(|source| source.check(&selector))
        })
        .await
    }

    fn of_item(name: String, members: &Members, item: &Item, limits: &Limits) -> Result<Self, Error> {
        let find = |path: &str| {
            // The names in the list are written in different ways too: `./x`.
            let clean = loris_format::tar::path::clean(path.as_bytes(), limits).ok();
            let clean = clean.and_then(|clean| String::from_utf8(clean).ok()).unwrap_or_default();
            members.find(&clean)?.ok_or_else(|| Error::NotFound { what: format!("{path:?}"), place: name.clone() })
        };
        let bytes = find(&item.config)?.read(&format!("configuration {:?}", item.config), limits.config_bytes)?;
        let config = Document::new(media_type::OCI_CONFIG, bytes)?;
        check_config_name(&item.config, &config, &name)?;
        let view = config.image_config(limits)?;
        if view.diff_ids.len() != item.layers.len() {
            let detail =
                format!("{} layers are listed, its configuration has {}", item.layers.len(), view.diff_ids.len());
            return Err(Error::Invalid { what: format!("{MANIFEST} of {}", members.place()), detail });
        }
        let mut layers = HashMap::new();
        let mut descriptors = Vec::new();
        // A file that several layers share is hashed once.
        let mut hashed: HashMap<u64, Digest> = HashMap::new();
        for (path, diff_id) in item.layers.iter().zip(&view.diff_ids) {
            let part = find(path)?;
            let start = part.read_at(0..part.length.min(Compression::DETECT_BYTES as u64))?;
            let (media_type, digest) = match Compression::detect(&start) {
                // Checked as the bytes pass.
                Compression::None => (media_type::OCI_LAYER, diff_id.0),
                compression => {
                    let digest = match hashed.get(&part.start) {
                        Some(digest) => *digest,
                        None => digest_of(&part)?,
                    };
                    hashed.insert(part.start, digest);
                    let is_gzip = compression == Compression::Gzip;
                    (if is_gzip { media_type::OCI_LAYER_GZIP } else { media_type::OCI_LAYER_ZSTD }, digest)
                }
            };
            descriptors.push(Descriptor::new(media_type, digest, part.length));
            layers.insert(digest, part);
        }
        let manifest = Manifest {
            schema_version: 2,
            media_type: media_type::OCI_MANIFEST.to_owned(),
            artifact_type: None,
            config: config.descriptor(),
            layers: descriptors,
            subject: None,
            annotations: Default::default(),
        };
        Ok(Self { name, root: manifest.to_document()?, config, layers })
    }

    fn check(self, selector: &Selector) -> Result<Self, Error> {
        match selector.digest {
            Some(expected) if expected != self.root.digest => {
                Err(Error::NotFound { what: expected.to_string(), place: self.name })
            }
            _ => Ok(self),
        }
    }

    fn layer(&self, descriptor: &Descriptor) -> Result<Part, Error> {
        self.layers.get(&descriptor.digest).cloned().ok_or_else(|| self.not_found(descriptor))
    }

    fn document_of(&self, descriptor: &Descriptor) -> Option<&Document> {
        [&self.root, &self.config].into_iter().find(|document| document.digest == descriptor.digest)
    }

    fn not_found(&self, descriptor: &Descriptor) -> Error {
        Error::NotFound { what: descriptor.digest.to_string(), place: self.name.clone() }
    }
}

#[async_trait]
impl ImageSource for DockerArchiveSource {
    fn name(&self) -> String {
        self.name.clone()
    }

    async fn root(&self) -> Result<Document, Error> {
        Ok(self.root.clone())
    }

    async fn document(&self, descriptor: &Descriptor) -> Result<Document, Error> {
        let document = self.document_of(descriptor).ok_or_else(|| self.not_found(descriptor))?;
        Document::verified(document.bytes.clone(), descriptor, &self.name)
    }

    async fn blob(&self, descriptor: &Descriptor) -> Result<BlobStream, Error> {
        match self.document_of(descriptor) {
            Some(document) => {
                let document = Document::verified(document.bytes.clone(), descriptor, &self.name)?;
                Ok(Box::pin(futures_util::stream::iter([Ok(document.bytes)])))
            }
            None => self.layer(descriptor)?.stream(descriptor),
        }
    }

    async fn blob_range(&self, descriptor: &Descriptor, range: Range<u64>) -> Result<Bytes, Error> {
        self.layer(descriptor)?.range(descriptor, range).await
    }

    async fn referrers(&self, _: &Digest, _: Option<&str>) -> Result<Vec<Descriptor>, Error> {
        Ok(Vec::new())
    }
}

fn read_list(members: &Members, limits: &Limits) -> Result<Vec<Item>, Error> {
    let place = members.place();
    let Some(part) = members.find(MANIFEST)? else {
        let detail = format!("not a Docker archive: it has no file {MANIFEST}, which Docker 1.10 and later writes");
        return Err(Error::Invalid { what: place.to_string(), detail });
    };
    let invalid = |detail: String| Error::Invalid { what: format!("{MANIFEST} of {place}"), detail };
    let bytes = part.read(MANIFEST, limits.manifest_bytes)?;
    let items: Vec<Item> = serde_json::from_slice(&bytes).map_err(|error| invalid(error.to_string()))?;
    if items.len() > limits.layers {
        return Err(invalid(format!("{} images, more than the limit of {}", items.len(), limits.layers)));
    }
    match items.iter().find(|item| item.layers.len() > limits.layers) {
        Some(item) => Err(invalid(format!("{} layers, more than the limit of {}", item.layers.len(), limits.layers))),
        None => Ok(items),
    }
}

fn select<'a>(items: &'a [Item], selector: &Selector, place: &str) -> Result<&'a Item, Error> {
    let not_found = |what: String| Error::NotFound { what, place: format!("{place} ({})", listed(items)) };
    if let Some(index) = selector.index {
        return items.get(index).ok_or_else(|| not_found(format!("an image number {index}")));
    }
    if let Some(name) = &selector.name {
        let is_meant = |tag: &String| tag.parse::<Reference>().is_ok_and(|tag| tag.canonical() == *name);
        let found = items.iter().find(|item| item.repo_tags.iter().any(is_meant));
        return found.ok_or_else(|| not_found(format!("an image named {name:?}")));
    }
    match items {
        [one] => Ok(one),
        [] => Err(not_found("an image".to_owned())),
        _ => Err(Error::Ambiguous { what: "the image".to_owned(), place: place.to_owned(), choices: listed(items) }),
    }
}

/// Says what is in an archive, for an error.
fn listed(items: &[Item]) -> String {
    let name = |(number, item): (usize, &Item)| match item.repo_tags.first() {
        Some(tag) => tag.chars().take(200).collect(),
        None => format!("@{number} without a name"),
    };
    let mut list: Vec<String> = items.iter().enumerate().take(MOST_LISTED).map(name).collect();
    if items.len() > MOST_LISTED {
        list.push(format!("{} more", items.len() - MOST_LISTED));
    }
    if list.is_empty() { "it is empty".to_owned() } else { list.join(", ") }
}

/// A configuration is named by its digest: `<hex>.json`, `blobs/sha256/<hex>`. Where it is, the two must agree.
fn check_config_name(path: &str, config: &Document, place: &str) -> Result<(), Error> {
    let file = path.rsplit('/').next().unwrap_or_default();
    let hex = file.strip_suffix(".json").unwrap_or(file);
    let hex = hex.strip_prefix("sha256:").unwrap_or(hex);
    match format!("sha256:{hex}").parse::<Digest>() {
        Ok(named) if named != config.digest => {
            let detail = format!("its bytes have the digest {}", config.digest);
            Err(Error::Corrupt { what: format!("configuration {path:?}"), place: place.to_owned(), detail })
        }
        _ => Ok(()),
    }
}

fn digest_of(part: &Part) -> Result<Digest, Error> {
    let mut hasher = Hasher::sha256();
    let mut start = 0;
    while start < part.length {
        let end = part.length.min(start + PIECE_BYTES);
        hasher.update(&part.read_at(start..end)?);
        start = end;
    }
    Ok(hasher.finish())
}
