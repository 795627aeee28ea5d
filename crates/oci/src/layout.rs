//! OCI layouts: an image as a directory, or as the same directory in a tar.
//!
//! ```text
//! oci-layout               {"imageLayoutVersion": "1.0.0"}
//! index.json               an index; names are annotations of its descriptors
//! blobs/sha256/<64 hex>    manifests, indexes, configurations and layers
//! ```
//!
//! Source: OCI image specification 1.1, `image-layout.md`. Names as skopeo and containerd write them.

use std::{
    collections::BTreeMap,
    fs::File,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;
use bytes::Bytes;
use loris_format::{digest::Digest, limits::Limits};
use serde::{Deserialize, Serialize};

use crate::{
    archive::Members,
    blob::{Part, blocking, file_error},
    document::{Descriptor, Document, Index, Kind, REF_NAME, media_type},
    name::Selector,
    place::{BlobStream, Error, ImageSource},
    reference::Reference,
};

mod sink;

pub use sink::LayoutSink;

/// The file that marks a layout.
pub(crate) const MARKER: &str = "oci-layout";
/// The file that lists what is in a layout.
pub(crate) const INDEX: &str = "index.json";
/// Longest marker, in bytes; it is thirty.
const MARKER_BYTES: u64 = 4 << 10;
/// The whole name of an image, beside the tag in [`REF_NAME`] (containerd, Docker 25 and later).
pub const CONTAINERD_NAME: &str = "io.containerd.image.name";
/// Most names that an error lists.
const MOST_LISTED: usize = 32;

/// Returns the place of a blob. A [`Digest`] has two algorithms and hexadecimal digits only, so that no path leads out.
pub(crate) fn blob_path(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm(), digest.hex())
}

/// The contents of [`MARKER`].
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Marker {
    image_layout_version: String,
}

impl Marker {
    /// The one version that there is.
    pub(crate) fn current() -> Self {
        Self { image_layout_version: "1.0.0".to_owned() }
    }

    fn check(bytes: &[u8], place: &str) -> Result<(), Error> {
        let invalid = |detail: String| Error::Invalid { what: format!("{MARKER} of {place}"), detail };
        let marker: Self = serde_json::from_slice(bytes).map_err(|error| invalid(error.to_string()))?;
        if marker.image_layout_version.starts_with("1.") {
            return Ok(());
        }
        Err(invalid(format!("layout version {:?}, of which only 1 is known", marker.image_layout_version)))
    }
}

/// The files of a layout.
#[derive(Clone, Debug)]
pub(crate) enum Files {
    /// In a directory.
    Directory(PathBuf),
    /// In a tar.
    Archive(Arc<Members>),
}

impl Files {
    /// Returns a file's bytes, or `None` where there is no such file. Blocks.
    fn find(&self, path: &str) -> Result<Option<Part>, Error> {
        match self {
            Self::Directory(directory) => {
                let path = directory.join(path);
                // Not opened before it is known to be a file: opening a pipe would wait.
                let metadata = match std::fs::metadata(&path) {
                    Ok(metadata) => metadata,
                    Err(source) if source.kind() == std::io::ErrorKind::NotFound => return Ok(None),
                    Err(source) => return Err(file_error(path, source)),
                };
                if !metadata.is_file() {
                    let detail = "it is not a regular file".to_owned();
                    return Err(Error::Invalid { what: path.display().to_string(), detail });
                }
                let file = File::open(&path).map_err(|source| file_error(&path, source))?;
                let length = file.metadata().map_err(|source| file_error(&path, source))?.len();
                let place = path.display().to_string().into();
                Ok(Some(Part { file: Arc::new(file), start: 0, length, place }))
            }
            Self::Archive(members) => members.find(path),
        }
    }
}

/// An image in a layout, to be read.
pub struct LayoutSource {
    name: String,
    files: Files,
    index: Index,
    root: Descriptor,
    limits: Limits,
}

impl LayoutSource {
    /// Opens a layout in a directory and finds the image in it.
    ///
    /// # Errors
    /// [`Error::Invalid`] where `path` is not a layout; [`Error::NotFound`] and [`Error::Ambiguous`] where `selector`
    /// leads to no image, or to several.
    pub async fn open(path: &Path, selector: &Selector, limits: &Limits) -> Result<Self, Error> {
        let name = format!("oci:{}{selector}", path.display());
        Self::of_files(name, Files::Directory(path.to_owned()), selector, limits).await
    }

    pub(crate) async fn of_files(
        name: String,
        files: Files,
        selector: &Selector,
        limits: &Limits,
    ) -> Result<Self, Error> {
        let (selector, limits) = (selector.clone(), limits.clone());
        blocking(move || {
            let no_layout = |file: &str| Error::Invalid {
                what: name.clone(),
                detail: format!("not an OCI layout: it has no file {file}"),
            };
            let marker = files.find(MARKER)?.ok_or_else(|| no_layout(MARKER))?;
            Marker::check(&marker.read(MARKER, MARKER_BYTES)?, &name)?;
            let bytes = files.find(INDEX)?.ok_or_else(|| no_layout(INDEX))?.read(INDEX, limits.manifest_bytes)?;
            let index = Document::new(media_type::OCI_INDEX, bytes).and_then(|document| document.index(&limits));
            let index = index.map_err(|error| match error {
                Error::Invalid { detail, .. } => Error::Invalid { what: format!("{INDEX} of {name}"), detail },
                other => other,
            })?;
            let root = select(&index, &selector, &name)?;
            Ok(Self { name, files, index, root, limits })
        })
        .await
    }

    /// Returns the descriptor of the image in the layout's list.
    #[must_use]
    pub fn descriptor(&self) -> &Descriptor {
        &self.root
    }

    async fn part(&self, descriptor: &Descriptor) -> Result<Part, Error> {
        let (files, path) = (self.files.clone(), blob_path(&descriptor.digest));
        let not_found = Error::NotFound { what: descriptor.digest.to_string(), place: self.name.clone() };
        blocking(move || files.find(&path)?.ok_or(not_found)).await
    }
}

#[async_trait]
impl ImageSource for LayoutSource {
    fn name(&self) -> String {
        self.name.clone()
    }

    async fn root(&self) -> Result<Document, Error> {
        self.document(&self.root).await
    }

    async fn document(&self, descriptor: &Descriptor) -> Result<Document, Error> {
        if let Some(bytes) = descriptor.inline() {
            return Document::verified(bytes, descriptor, &self.name);
        }
        let limit = descriptor.document_limit(&self.limits);
        self.part(descriptor).await?.document(descriptor.clone(), limit).await
    }

    async fn blob(&self, descriptor: &Descriptor) -> Result<BlobStream, Error> {
        if let Some(bytes) = descriptor.inline() {
            return Ok(Box::pin(futures_util::stream::iter([Ok(bytes)])));
        }
        self.part(descriptor).await?.stream(descriptor)
    }

    async fn blob_range(&self, descriptor: &Descriptor, range: Range<u64>) -> Result<Bytes, Error> {
        self.part(descriptor).await?.range(descriptor, range).await
    }

    async fn referrers(&self, digest: &Digest, artifact_type: Option<&str>) -> Result<Vec<Descriptor>, Error> {
        let mut found: BTreeMap<Digest, Descriptor> = BTreeMap::new();
        for descriptor in self.index.manifests.iter().filter(|descriptor| descriptor.is_document()) {
            if descriptor.digest == *digest || found.contains_key(&descriptor.digest) {
                continue;
            }
            // An image of the same layout that is not there whole (or is damaged) has nothing to do with this one.
            let Ok(document) = self.document(descriptor).await else { continue };
            let Ok(kind) = document.parse_kind(&self.limits) else { continue };
            if kind.subject().is_some_and(|subject| subject.digest == *digest) {
                let referrer = referrer(&document, &kind);
                if artifact_type.is_none() || referrer.artifact_type.as_deref() == artifact_type {
                    found.insert(descriptor.digest, referrer);
                }
            }
        }
        Ok(found.into_values().collect())
    }
}

/// Returns the descriptor by which a list of referrers names a manifest: distribution specification 1.1, section
/// "Listing Referrers".
pub(crate) fn referrer(document: &Document, kind: &Kind) -> Descriptor {
    Descriptor {
        artifact_type: kind.artifact_type().map(str::to_owned),
        annotations: kind.annotations().clone(),
        ..document.descriptor()
    }
}

/// Finds the image that is meant.
fn select(index: &Index, selector: &Selector, place: &str) -> Result<Descriptor, Error> {
    let not_found = |what: String| Error::NotFound { what, place: format!("{place} ({})", listed(&index.manifests)) };
    let entries: Vec<&Descriptor> = if let Some(number) = selector.index {
        vec![index.manifests.get(number).ok_or_else(|| not_found(format!("an image number {number}")))?]
    } else if let Some(name) = &selector.name {
        let named = named(&index.manifests, name);
        if named.is_empty() {
            return Err(not_found(format!("an image named {name:?}")));
        }
        named
    } else if selector.digest.is_some() {
        index.manifests.iter().collect()
    } else {
        unnamed(&index.manifests)
    };
    let mut entries: Vec<&Descriptor> =
        entries.into_iter().filter(|entry| selector.digest.is_none_or(|digest| entry.digest == digest)).collect();
    entries.dedup_by_key(|entry| entry.digest);
    match entries.as_slice() {
        [one] => Ok((*one).clone()),
        [] => Err(not_found(match &selector.digest {
            Some(digest) => digest.to_string(),
            None => "an image".to_owned(),
        })),
        several => {
            let several: Vec<Descriptor> = several.iter().map(|entry| (*entry).clone()).collect();
            Err(Error::Ambiguous { what: "the image".to_owned(), place: place.to_owned(), choices: listed(&several) })
        }
    }
}

/// Returns the entries of a name: by the tag or, in the archives of containerd and Docker, by the whole reference.
fn named<'a>(entries: &'a [Descriptor], name: &str) -> Vec<&'a Descriptor> {
    let by_annotation = |annotation: &str, is_meant: &dyn Fn(&str) -> bool| -> Vec<&'a Descriptor> {
        let has = |entry: &&Descriptor| entry.annotations.get(annotation).is_some_and(|value| is_meant(value));
        entries.iter().filter(has).collect()
    };
    let found = by_annotation(REF_NAME, &|value| value == name);
    if !found.is_empty() {
        return found;
    }
    let Ok(wanted) = name.parse::<Reference>() else { return Vec::new() };
    by_annotation(CONTAINERD_NAME, &|value| value.parse::<Reference>().is_ok_and(|found| found == wanted))
}

/// Returns the entries that can be meant where no name is given: all, but for referrers where others are named.
fn unnamed(entries: &[Descriptor]) -> Vec<&Descriptor> {
    let all: Vec<&Descriptor> = entries.iter().collect();
    let images: Vec<&Descriptor> = entries
        .iter()
        .filter(|entry| entry.annotations.contains_key(REF_NAME) || entry.artifact_type.is_none())
        .collect();
    if images.is_empty() { all } else { images }
}

/// Says what is in a layout, for an error.
fn listed(entries: &[Descriptor]) -> String {
    let mut list: Vec<String> = entries
        .iter()
        .take(MOST_LISTED)
        .enumerate()
        .map(|(number, entry)| {
            match entry.annotations.get(REF_NAME).or_else(|| entry.annotations.get(CONTAINERD_NAME)) {
                Some(name) => format!("{:?}", name.chars().take(200).collect::<String>()),
                None => format!("@{number} without a name, {}", entry.digest),
            }
        })
        .collect();
    if entries.len() > MOST_LISTED {
        list.push(format!("{} more", entries.len() - MOST_LISTED));
    }
    if list.is_empty() { "it is empty".to_owned() } else { list.join(", ") }
}

#[cfg(test)]
mod tests;
