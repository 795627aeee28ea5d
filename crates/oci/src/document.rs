//! Descriptors, manifests, indexes and configurations.
//!
//! A document is its raw bytes; the parsed form is a view that knows only the fields that Loris needs. What is carried
//! along unchanged therefore keeps its digest, with fields that we have never heard of.
//!
//! Views are read strictly where two readers could see two things in the same bytes: an object with a key twice, a
//! manifest that is an index too (CVE-2021-41190), a `mediaType` that contradicts the descriptor. They are read
//! leniently where writers in the field differ: `null` for what is empty, absent media types.
//!
//! Source: OCI image specification 1.1 (`descriptor.md`, `manifest.md`, `image-index.md`, `config.md`), and Docker's
//! distribution manifest schema 2.

use std::collections::BTreeMap;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use loris_format::{digest::Digest, limits::Limits};
use serde::{Deserialize, Deserializer, Serialize};

use crate::place::Error;

mod config;
mod manifest;
pub mod media_type;
mod strict;

pub use config::{History, ImageConfig, ProcessConfig};
pub use manifest::{Index, Kind, Manifest};

/// Marks a manifest of an index as an attestation (BuildKit): the value is `attestation-manifest`.
pub const REFERENCE_TYPE: &str = "vnd.docker.reference.type";
/// The digest of the manifest that an attestation of an index is about (BuildKit).
pub const REFERENCE_DIGEST: &str = "vnd.docker.reference.digest";
/// The name of a manifest in a layout's `index.json`: a tag, or (containerd, Podman) a whole reference.
pub const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// A pointer to content: what it is, how large, and what it must hash to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// The content's type. Docker's and OCI's are both kept as they are.
    #[serde(default, deserialize_with = "null_as_default")]
    pub media_type: String,
    /// What the content must hash to.
    pub digest: Digest,
    /// Compressed bytes.
    pub size: u64,
    /// Where a foreign layer may be had.
    #[serde(default, deserialize_with = "null_as_default", skip_serializing_if = "Vec::is_empty")]
    pub urls: Vec<String>,
    /// Annotations, among them those that make a layer lazily pullable.
    #[serde(default, deserialize_with = "null_as_default", skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// The content itself, in base64, where it is small.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
    /// The platform that a manifest of an index is for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// The kind of artifact, in an index or a list of referrers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
}

impl Descriptor {
    /// Returns a descriptor with nothing but what every descriptor has.
    #[must_use]
    pub fn new(media_type: impl Into<String>, digest: Digest, size: u64) -> Self {
        Self {
            media_type: media_type.into(),
            digest,
            size,
            urls: Vec::new(),
            annotations: BTreeMap::new(),
            data: None,
            platform: None,
            artifact_type: None,
        }
    }

    /// Returns the content that the descriptor carries inline, where it does and where that is what the digest names.
    /// Inline content that does not match is passed over: the content is fetched then, and checked as any other.
    #[must_use]
    pub fn inline(&self) -> Option<Bytes> {
        let text = self.data.as_ref()?;
        // Base64 makes four characters of three bytes; a length that can't be right is not decoded at all.
        if text.len() as u64 != self.size.checked_add(2)? / 3 * 4 {
            return None;
        }
        let content = BASE64_STANDARD.decode(text).ok()?;
        (content.len() as u64 == self.size && self.digest.matches(&content)).then(|| content.into())
    }

    /// Says whether this manifest of an index is not an image but an attestation about one, as BuildKit writes them.
    #[must_use]
    pub fn is_attestation(&self) -> bool {
        self.annotations.get(REFERENCE_TYPE).is_some_and(|kind| kind == "attestation-manifest")
    }

    /// Returns the manifest in the same index that this attestation is about.
    #[must_use]
    pub fn attested(&self) -> Option<Digest> {
        self.is_attestation().then(|| self.annotations.get(REFERENCE_DIGEST)?.parse().ok()).flatten()
    }

    /// Says whether the content is a manifest or an index, by media type.
    #[must_use]
    pub fn is_document(&self) -> bool {
        media_type::is_manifest(&self.media_type) || media_type::is_index(&self.media_type)
    }

    /// Returns the bound on the size of the document that the descriptor leads to, in bytes.
    #[must_use]
    pub fn document_limit(&self, limits: &Limits) -> u64 {
        if self.is_document() || self.media_type.is_empty() { limits.manifest_bytes } else { limits.config_bytes }
    }
}

/// What machine an image is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// `amd64`, `arm64`, ... (GOARCH).
    #[serde(default, deserialize_with = "null_as_default")]
    pub architecture: String,
    /// `linux`, ... (GOOS); `unknown` marks attestations.
    #[serde(default, deserialize_with = "null_as_default")]
    pub os: String,
    /// `v7`, `v8`, ...
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// Windows' build number.
    #[serde(default, rename = "os.version", skip_serializing_if = "Option::is_none")]
    pub os_version: Option<String>,
    /// Windows' features.
    #[serde(
        default,
        rename = "os.features",
        deserialize_with = "null_as_default",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub os_features: Vec<String>,
}

/// A manifest, an index or a configuration: verified bytes and what names them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// The type: from the document's own `mediaType`, else from the descriptor or the answer that led to it, else from
    /// the document's form.
    pub media_type: String,
    /// The digest of `bytes`.
    pub digest: Digest,
    /// The document as it is stored.
    pub bytes: Bytes,
}

impl Document {
    /// Returns a document of which no digest is known beforehand: one that was just made, or one that a tag led to.
    ///
    /// `media_type` is what is said about it elsewhere (an HTTP header), and may be empty. The digest is SHA-256.
    ///
    /// # Errors
    /// [`Error::Invalid`] where the document's own `mediaType` is of another kind than `media_type`, or where its kind
    /// can't be told.
    pub fn new(media_type: &str, bytes: Bytes) -> Result<Self, Error> {
        let digest = Digest::sha256_of(&bytes);
        Self::with_digest(media_type, digest, bytes)
    }

    /// Returns the document that a descriptor leads to, after checking its size and digest.
    ///
    /// # Errors
    /// [`Error::Corrupt`] where size or digest differ (`place` is named in it); [`Error::Invalid`] as for [`Self::new`].
    pub fn verified(bytes: Bytes, descriptor: &Descriptor, place: &str) -> Result<Self, Error> {
        let corrupt = |detail| Error::Corrupt { what: descriptor.digest.to_string(), place: place.to_owned(), detail };
        if bytes.len() as u64 != descriptor.size {
            return Err(corrupt(format!("expected {} bytes, found {}", descriptor.size, bytes.len())));
        }
        if !descriptor.digest.matches(&bytes) {
            return Err(corrupt(format!("its bytes have the digest {}", Digest::sha256_of(&bytes))));
        }
        Self::with_digest(&descriptor.media_type, descriptor.digest, bytes)
    }

    fn with_digest(said: &str, digest: Digest, bytes: Bytes) -> Result<Self, Error> {
        let said = media_type::essence(said);
        // What is neither a manifest nor an index (a configuration, an artifact's own document) may be anything.
        if !media_type::is_unspecific(said) && !media_type::is_manifest(said) && !media_type::is_index(said) {
            return Ok(Self { media_type: said.to_owned(), digest, bytes });
        }
        let own = manifest::Probe::of(&bytes, &digest)?.media_type(said, &digest)?;
        Ok(Self { media_type: own, digest, bytes })
    }

    /// Returns the descriptor of this document, without platform or annotations.
    #[must_use]
    pub fn descriptor(&self) -> Descriptor {
        Descriptor::new(self.media_type.clone(), self.digest, self.bytes.len() as u64)
    }

    /// Returns the view of a manifest or an index.
    ///
    /// # Errors
    /// [`Error::Invalid`] where it is neither, is ambiguous, or has more layers or manifests than `limits.layers`;
    /// [`Error::TooLarge`] where it is longer than `limits.manifest_bytes`; [`Error::Unsupported`] for Docker's schema 1.
    pub fn parse_kind(&self, limits: &Limits) -> Result<Kind, Error> {
        Kind::parse(self, limits)
    }

    /// Returns the view of a manifest.
    ///
    /// # Errors
    /// As [`Self::parse_kind`], and [`Error::Invalid`] where it is an index.
    pub fn manifest(&self, limits: &Limits) -> Result<Manifest, Error> {
        match self.parse_kind(limits)? {
            Kind::Manifest(manifest) => Ok(manifest),
            Kind::Index(_) => Err(self.invalid("it is an index where a manifest is expected")),
        }
    }

    /// Returns the view of an index.
    ///
    /// # Errors
    /// As [`Self::parse_kind`], and [`Error::Invalid`] where it is a manifest.
    pub fn index(&self, limits: &Limits) -> Result<Index, Error> {
        match self.parse_kind(limits)? {
            Kind::Index(index) => Ok(index),
            Kind::Manifest(_) => Err(self.invalid("it is a manifest where an index is expected")),
        }
    }

    /// Returns the view of an image's configuration.
    ///
    /// # Errors
    /// [`Error::Invalid`] where it is not one; [`Error::TooLarge`] where it is longer than `limits.config_bytes`.
    pub fn image_config(&self, limits: &Limits) -> Result<ImageConfig, Error> {
        ImageConfig::parse(self, limits)
    }

    fn invalid(&self, detail: impl std::fmt::Display) -> Error {
        invalid(&self.digest, detail)
    }
}

fn invalid(digest: &Digest, detail: impl std::fmt::Display) -> Error {
    Error::Invalid { what: digest.to_string(), detail: detail.to_string() }
}

/// Go writes an empty list or map as `null` unless it is told not to.
pub(crate) fn null_as_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[cfg(test)]
mod tests;
