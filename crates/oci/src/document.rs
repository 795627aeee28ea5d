//! Descriptors, manifests, indexes and configurations.
//!
//! A document is its raw bytes; the parsed form is a view that knows only the fields that Loris needs. What is carried
//! along unchanged therefore keeps its digest, with fields that we have never heard of.
//!
//! Source: OCI image specification 1.1 (`descriptor.md`, `manifest.md`, `image-index.md`, `config.md`), and Docker's
//! distribution manifest schema 2.

use std::collections::BTreeMap;

use bytes::Bytes;
use loris_format::digest::Digest;
use serde::{Deserialize, Serialize};

/// A pointer to content: what it is, how large, and what it must hash to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// The content's type. Docker's and OCI's are both kept as they are.
    #[serde(default)]
    pub media_type: String,
    /// What the content must hash to.
    pub digest: Digest,
    /// Compressed bytes.
    pub size: u64,
    /// Where a foreign layer may be had.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub urls: Vec<String>,
    /// Annotations, among them those that make a layer lazily pullable.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
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

/// What machine an image is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// `amd64`, `arm64`, ... (GOARCH).
    pub architecture: String,
    /// `linux`, ... (GOOS); `unknown` marks attestations.
    pub os: String,
    /// `v7`, `v8`, ...
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// Windows' build number.
    #[serde(default, rename = "os.version", skip_serializing_if = "Option::is_none")]
    pub os_version: Option<String>,
    /// Windows' features.
    #[serde(default, rename = "os.features", skip_serializing_if = "Vec::is_empty")]
    pub os_features: Vec<String>,
}

/// A manifest, an index or a configuration: verified bytes and what names them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// The type: from the document's own `mediaType`, else from the descriptor or the answer that led to it.
    pub media_type: String,
    /// The digest of `bytes`.
    pub digest: Digest,
    /// The document as it is stored.
    pub bytes: Bytes,
}
