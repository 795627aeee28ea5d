//! Manifests and indexes, told apart by what they hold and not only by what they call themselves.

use std::collections::BTreeMap;

use bytes::Bytes;
use loris_format::{digest::Digest, limits::Limits};
use serde::{Deserialize, Serialize, de::IgnoredAny};

use super::{Descriptor, Document, invalid, media_type, null_as_default, strict};
use crate::place::Error;

/// The largest size that other tools can read: theirs is a signed number.
const MAX_SIZE: u64 = i64::MAX as u64;

/// The keys by which manifests and indexes are told apart and read.
const TOP_KEYS: [&str; 9] = [
    "schemaVersion",
    "mediaType",
    "artifactType",
    "config",
    "layers",
    "manifests",
    "subject",
    "annotations",
    "fsLayers",
];

/// The view of a manifest: one image, or an artifact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// 2, in all that are supported.
    pub schema_version: u32,
    /// The manifest's type, always filled in in a view that was read.
    #[serde(default, deserialize_with = "null_as_default", skip_serializing_if = "String::is_empty")]
    pub media_type: String,
    /// The kind of artifact; `None` for images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// The image's configuration, or whatever an artifact has in its place.
    pub config: Descriptor,
    /// The layers, the lowest first.
    #[serde(default, deserialize_with = "null_as_default")]
    pub layers: Vec<Descriptor>,
    /// The manifest that this one is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Descriptor>,
    /// Annotations.
    #[serde(default, deserialize_with = "null_as_default", skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl Manifest {
    /// Says whether it is an image (and not an artifact, such as a signature, that only uses the same form).
    #[must_use]
    pub fn is_image(&self) -> bool {
        media_type::is_image_config(&self.config.media_type)
    }

    /// Returns the artifact type as the referrers API tells it: the manifest's own, else its configuration's media type.
    #[must_use]
    pub fn effective_artifact_type(&self) -> &str {
        match self.artifact_type.as_deref() {
            Some(artifact_type) if !artifact_type.is_empty() => artifact_type,
            _ => &self.config.media_type,
        }
    }

    /// Returns the manifest as a document; the same view gives the same bytes.
    ///
    /// # Errors
    /// [`Error::Invalid`] where the view's media type is not that of a manifest.
    pub fn to_document(&self) -> Result<Document, Error> {
        to_document(&self.media_type, self)
    }
}

/// The view of an index: one image for many platforms, or a list of anything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    /// 2, in all that are supported.
    pub schema_version: u32,
    /// The index's type, always filled in in a view that was read.
    #[serde(default, deserialize_with = "null_as_default", skip_serializing_if = "String::is_empty")]
    pub media_type: String,
    /// The kind of artifact; `None` for images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// Manifests and further indexes.
    #[serde(default, deserialize_with = "null_as_default")]
    pub manifests: Vec<Descriptor>,
    /// The manifest that this index is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Descriptor>,
    /// Annotations.
    #[serde(default, deserialize_with = "null_as_default", skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl Index {
    /// Returns an OCI index with nothing in it.
    #[must_use]
    pub fn empty() -> Self {
        Self {
            schema_version: 2,
            media_type: media_type::OCI_INDEX.to_owned(),
            artifact_type: None,
            manifests: Vec::new(),
            subject: None,
            annotations: BTreeMap::new(),
        }
    }

    /// Returns the index as a document; the same view gives the same bytes.
    ///
    /// # Errors
    /// [`Error::Invalid`] where the view's media type is not that of an index.
    pub fn to_document(&self) -> Result<Document, Error> {
        to_document(&self.media_type, self)
    }
}

fn to_document(media_type: &str, view: &impl Serialize) -> Result<Document, Error> {
    let bytes = serde_json::to_vec(view)
        .map_err(|error| Error::Invalid { what: "a new document".to_owned(), detail: error.to_string() })?;
    Document::new(media_type, bytes.into())
}

/// A manifest or an index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A manifest.
    Manifest(Manifest),
    /// An index.
    Index(Index),
}

impl Kind {
    pub(super) fn parse(document: &Document, limits: &Limits) -> Result<Self, Error> {
        if document.bytes.len() as u64 > limits.manifest_bytes {
            let what = format!("manifest {}", document.digest);
            return Err(Error::TooLarge { what, limit: limits.manifest_bytes });
        }
        let digest = &document.digest;
        strict::check(&document.bytes, &TOP_KEYS).map_err(|error| invalid(digest, error))?;
        let own = Probe::of(&document.bytes, digest)?.media_type(&document.media_type, digest)?;
        let kind = if media_type::is_index(&own) {
            let mut index: Index = serde_json::from_slice(&document.bytes)
                .map_err(|error| invalid(digest, format_args!("not an index: {error}")))?;
            index.media_type = own;
            Self::Index(index)
        } else {
            let mut manifest: Manifest = serde_json::from_slice(&document.bytes)
                .map_err(|error| invalid(digest, format_args!("not a manifest: {error}")))?;
            manifest.media_type = own;
            Self::Manifest(manifest)
        };
        kind.check(digest, limits)?;
        Ok(kind)
    }

    /// Returns the manifest or index that this one is about.
    #[must_use]
    pub fn subject(&self) -> Option<&Descriptor> {
        match self {
            Self::Manifest(manifest) => manifest.subject.as_ref(),
            Self::Index(index) => index.subject.as_ref(),
        }
    }

    /// Returns the artifact type as the referrers API tells it; `None` where there is none.
    #[must_use]
    pub fn artifact_type(&self) -> Option<&str> {
        match self {
            Self::Manifest(manifest) => Some(manifest.effective_artifact_type()),
            Self::Index(index) => index.artifact_type.as_deref(),
        }
        .filter(|artifact_type| !artifact_type.is_empty())
    }

    /// Returns the annotations of the manifest or index itself.
    #[must_use]
    pub fn annotations(&self) -> &BTreeMap<String, String> {
        match self {
            Self::Manifest(manifest) => &manifest.annotations,
            Self::Index(index) => &index.annotations,
        }
    }

    fn check(&self, digest: &Digest, limits: &Limits) -> Result<(), Error> {
        let (schema_version, list, what, single) = match self {
            Self::Manifest(view) => (view.schema_version, &view.layers, "layers", Some(&view.config)),
            Self::Index(view) => (view.schema_version, &view.manifests, "manifests", None),
        };
        if schema_version != 2 {
            return Err(invalid(digest, format_args!("schemaVersion {schema_version}, expected 2")));
        }
        if list.len() > limits.layers {
            let count = list.len();
            return Err(invalid(digest, format_args!("{count} {what}, more than the limit of {}", limits.layers)));
        }
        match list.iter().chain(single).chain(self.subject()).find(|descriptor| descriptor.size > MAX_SIZE) {
            Some(huge) => Err(invalid(digest, format_args!("{} has an impossible size, {}", huge.digest, huge.size))),
            None => Ok(()),
        }
    }
}

/// What a document's own top level says of its kind.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Probe {
    #[serde(default)]
    schema_version: Option<u32>,
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    config: Option<IgnoredAny>,
    #[serde(default)]
    layers: Option<IgnoredAny>,
    #[serde(default)]
    manifests: Option<IgnoredAny>,
    #[serde(default)]
    fs_layers: Option<IgnoredAny>,
}

impl Probe {
    pub(super) fn of(bytes: &Bytes, digest: &Digest) -> Result<Self, Error> {
        serde_json::from_slice(bytes)
            .map_err(|error| invalid(digest, format_args!("neither a manifest nor an index: {error}")))
    }

    /// Returns the document's media type: its own, else `said`, else what its form tells. All three must agree.
    pub(super) fn media_type(self, said: &str, digest: &Digest) -> Result<String, Error> {
        let own = self.media_type.unwrap_or_default();
        let is_schema1 = media_type::is_schema1(&own) || media_type::is_schema1(said) || self.schema_version == Some(1);
        if is_schema1 || self.fs_layers.is_some() {
            return Err(Error::Unsupported {
                what: "a Docker manifest of schema 1; push the image again with a client newer than 2017".to_owned(),
                place: digest.to_string(),
            });
        }
        let as_index = self.manifests.is_some();
        let as_manifest = self.config.is_some() || self.layers.is_some();
        if as_index && as_manifest {
            return Err(invalid(digest, "it is a manifest and an index at once (CVE-2021-41190)"));
        }
        let said = if media_type::is_unspecific(said) { "" } else { said };
        for claim in [own.as_str(), said].into_iter().filter(|claim| !claim.is_empty()) {
            let holds = (media_type::is_index(claim) && !as_manifest) || (media_type::is_manifest(claim) && !as_index);
            if !media_type::is_index(claim) && !media_type::is_manifest(claim) {
                return Err(invalid(digest, format_args!("{claim:?} is the type of neither a manifest nor an index")));
            }
            if !holds {
                let form = if as_index { "an index" } else { "a manifest" };
                return Err(invalid(digest, format_args!("it calls itself {claim:?} but has the form of {form}")));
            }
        }
        match (own.is_empty(), said.is_empty()) {
            (false, false) if media_type::is_index(&own) != media_type::is_index(said) => {
                Err(invalid(digest, format_args!("it calls itself {own:?}, what leads to it calls it {said:?}")))
            }
            (false, _) => Ok(own),
            (true, false) => Ok(said.to_owned()),
            (true, true) if as_index => Ok(media_type::OCI_INDEX.to_owned()),
            (true, true) if as_manifest => Ok(media_type::OCI_MANIFEST.to_owned()),
            (true, true) => Err(invalid(digest, "neither a manifest nor an index")),
        }
    }
}
