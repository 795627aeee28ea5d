//! An image's configuration: the machine it is for, its layers' DiffIDs, and the process that a container of it runs.

use std::collections::BTreeMap;

use loris_format::{digest::DiffId, limits::Limits};
use serde::{Deserialize, Deserializer};

use super::{Document, Platform, manifest::Manifest, null_as_default, strict};
use crate::place::Error;

/// The view of an image's configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageConfig {
    /// `amd64`, `arm64`, ... (GOARCH).
    pub architecture: String,
    /// `linux`, ... (GOOS).
    pub os: String,
    /// `v7`, `v8`, ...
    pub variant: Option<String>,
    /// Windows' build number.
    pub os_version: Option<String>,
    /// Windows' features.
    pub os_features: Vec<String>,
    /// When it was made: a date as RFC 3339 writes it, unchecked.
    pub created: Option<String>,
    /// Who made it.
    pub author: Option<String>,
    /// Digests of the uncompressed layers, the lowest first.
    pub diff_ids: Vec<DiffId>,
    /// What a container of it runs.
    pub config: ProcessConfig,
    /// What was done for each layer, the lowest first, and for steps that made none.
    pub history: Vec<History>,
}

/// What a container of an image runs, unless it is told otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ProcessConfig {
    /// `NAME=value`.
    #[serde(deserialize_with = "null_as_default")]
    pub env: Vec<String>,
    /// The program and its first arguments.
    #[serde(deserialize_with = "words")]
    pub entrypoint: Vec<String>,
    /// The arguments behind `entrypoint`, or the program where there is none.
    #[serde(deserialize_with = "words")]
    pub cmd: Vec<String>,
    /// The working directory; empty for `/`.
    #[serde(deserialize_with = "null_as_default")]
    pub working_dir: String,
    /// `user`, `uid`, `user:group`, `uid:gid`, ...; empty for root.
    #[serde(deserialize_with = "null_as_default")]
    pub user: String,
    /// `80/tcp`, ..., sorted.
    #[serde(deserialize_with = "keys")]
    pub exposed_ports: Vec<String>,
    /// Directories for volumes, sorted.
    #[serde(deserialize_with = "keys")]
    pub volumes: Vec<String>,
    /// The signal that ends it: `SIGTERM`, `15`; empty for the default.
    #[serde(deserialize_with = "null_as_default")]
    pub stop_signal: String,
    /// Labels.
    #[serde(deserialize_with = "null_as_default")]
    pub labels: BTreeMap<String, String>,
}

/// One step of how an image was made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct History {
    /// When: a date as RFC 3339 writes it, unchecked.
    pub created: Option<String>,
    /// The command.
    #[serde(deserialize_with = "null_as_default")]
    pub created_by: String,
    /// A remark.
    #[serde(deserialize_with = "null_as_default")]
    pub comment: String,
    /// It made no layer.
    #[serde(deserialize_with = "null_as_default")]
    pub empty_layer: bool,
}

impl ImageConfig {
    pub(super) fn parse(document: &Document, limits: &Limits) -> Result<Self, Error> {
        if document.bytes.len() as u64 > limits.config_bytes {
            let what = format!("configuration {}", document.digest);
            return Err(Error::TooLarge { what, limit: limits.config_bytes });
        }
        strict::check(&document.bytes, &[]).map_err(|error| document.invalid(error))?;
        let form: Form = serde_json::from_slice(&document.bytes)
            .map_err(|error| document.invalid(format_args!("not an image's configuration: {error}")))?;
        if form.rootfs.diff_ids.len() > limits.layers {
            let count = form.rootfs.diff_ids.len();
            return Err(document.invalid(format_args!("{count} layers, more than the limit of {}", limits.layers)));
        }
        if !matches!(form.rootfs.kind.as_str(), "" | "layers") {
            return Err(document.invalid(format_args!("rootfs of unknown type {:?}", form.rootfs.kind)));
        }
        Ok(Self {
            architecture: form.architecture,
            os: form.os,
            variant: form.variant.filter(|variant| !variant.is_empty()),
            os_version: form.os_version.filter(|version| !version.is_empty()),
            os_features: form.os_features,
            created: form.created,
            author: form.author,
            diff_ids: form.rootfs.diff_ids,
            config: form.config,
            history: form.history,
        })
    }

    /// Returns the machine that the image is for.
    #[must_use]
    pub fn platform(&self) -> Platform {
        Platform {
            architecture: self.architecture.clone(),
            os: self.os.clone(),
            variant: self.variant.clone(),
            os_version: self.os_version.clone(),
            os_features: self.os_features.clone(),
        }
    }

    /// Checks that the manifest has as many layers as the configuration has DiffIDs.
    ///
    /// # Errors
    /// [`Error::Invalid`] where it has not.
    pub fn check_layers(&self, manifest: &Manifest) -> Result<(), Error> {
        if self.diff_ids.len() == manifest.layers.len() {
            return Ok(());
        }
        Err(Error::Invalid {
            what: format!("configuration {}", manifest.config.digest),
            detail: format!("{} DiffIDs for {} layers", self.diff_ids.len(), manifest.layers.len()),
        })
    }
}

/// The configuration as it is written.
#[derive(Deserialize)]
struct Form {
    #[serde(default, deserialize_with = "null_as_default")]
    architecture: String,
    #[serde(default, deserialize_with = "null_as_default")]
    os: String,
    #[serde(default)]
    variant: Option<String>,
    #[serde(default, rename = "os.version")]
    os_version: Option<String>,
    #[serde(default, rename = "os.features", deserialize_with = "null_as_default")]
    os_features: Vec<String>,
    #[serde(default)]
    created: Option<String>,
    #[serde(default)]
    author: Option<String>,
    rootfs: RootFs,
    #[serde(default, deserialize_with = "null_as_default")]
    config: ProcessConfig,
    #[serde(default, deserialize_with = "null_as_default")]
    history: Vec<History>,
}

#[derive(Deserialize)]
struct RootFs {
    #[serde(default, rename = "type", deserialize_with = "null_as_default")]
    kind: String,
    #[serde(default, deserialize_with = "null_as_default")]
    diff_ids: Vec<DiffId>,
}

/// A command: old images have a single string where a list is meant.
fn words<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    struct Words;
    impl<'de> serde::de::Visitor<'de> for Words {
        type Value = Vec<String>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a list of strings or a string")
        }

        fn visit_unit<E: serde::de::Error>(self) -> Result<Self::Value, E> {
            Ok(Vec::new())
        }

        fn visit_str<E: serde::de::Error>(self, word: &str) -> Result<Self::Value, E> {
            Ok(vec![word.to_owned()])
        }

        fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
            let mut words = Vec::new();
            while let Some(word) = list.next_element()? {
                words.push(word);
            }
            Ok(words)
        }
    }
    deserializer.deserialize_any(Words)
}

/// A set, which Go writes as an object whose values are empty objects.
fn keys<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let map: Option<BTreeMap<String, serde::de::IgnoredAny>> = Option::deserialize(deserializer)?;
    Ok(map.unwrap_or_default().into_keys().collect())
}
