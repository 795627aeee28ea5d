//! Media types: their names and what they say.
//!
//! A media type is a claim. What a layer really is shows in its bytes; these functions say what it calls itself.
//!
//! Source: OCI image specification 1.1, `media-types.md`; Docker's distribution manifest schema 2; the zstd and
//! uncompressed variants of Docker's layer types are those that BuildKit and containers/image write.

/// An OCI index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// An OCI manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// An OCI image's configuration.
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// Two bytes, `{}`: the configuration of an artifact that has none.
pub const OCI_EMPTY: &str = "application/vnd.oci.empty.v1+json";
/// An uncompressed OCI layer.
pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// A gzip-compressed OCI layer.
pub const OCI_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// A zstd-compressed OCI layer.
pub const OCI_LAYER_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
/// Docker's index.
pub const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// Docker's manifest, schema 2.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// Docker's manifest, schema 1, which is not supported.
pub const DOCKER_SCHEMA1: &str = "application/vnd.docker.distribution.manifest.v1+json";
/// Docker's signed manifest, schema 1, which is not supported.
pub const DOCKER_SCHEMA1_SIGNED: &str = "application/vnd.docker.distribution.manifest.v1+prettyjws";
/// A Docker image's configuration.
pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
/// An uncompressed Docker layer.
pub const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";
/// A gzip-compressed Docker layer.
pub const DOCKER_LAYER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
/// A zstd-compressed Docker layer.
pub const DOCKER_LAYER_ZSTD: &str = "application/vnd.docker.image.rootfs.diff.tar.zstd";

/// The manifests and indexes that we read, in order of preference: what a client puts into `Accept`.
pub const DOCUMENTS: [&str; 4] = [OCI_INDEX, OCI_MANIFEST, DOCKER_INDEX, DOCKER_MANIFEST];

/// Returns a media type without its parameters: `application/json; charset=utf-8` without the `charset`.
#[must_use]
pub fn essence(media_type: &str) -> &str {
    media_type.split(';').next().unwrap_or_default().trim()
}

/// Says whether a media type is that of an index.
#[must_use]
pub fn is_index(media_type: &str) -> bool {
    matches!(media_type, OCI_INDEX | DOCKER_INDEX)
}

/// Says whether a media type is that of a manifest.
#[must_use]
pub fn is_manifest(media_type: &str) -> bool {
    matches!(media_type, OCI_MANIFEST | DOCKER_MANIFEST)
}

/// Says whether a media type is that of Docker's manifest, schema 1.
#[must_use]
pub fn is_schema1(media_type: &str) -> bool {
    matches!(media_type, DOCKER_SCHEMA1 | DOCKER_SCHEMA1_SIGNED)
}

/// Says whether a media type is that of an image's configuration.
#[must_use]
pub fn is_image_config(media_type: &str) -> bool {
    matches!(media_type, OCI_CONFIG | DOCKER_CONFIG)
}

/// Says whether a media type says nothing: servers of plain files answer with these.
#[must_use]
pub fn is_unspecific(media_type: &str) -> bool {
    matches!(media_type, "" | "application/json" | "application/octet-stream" | "text/plain") || is_schema1(media_type)
}

/// Whose words a media type is in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Family {
    /// The OCI image specification.
    Oci,
    /// Docker's distribution manifest schema 2.
    Docker,
}

/// How a layer says that it is compressed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LayerCompression {
    /// A tar as it is.
    None,
    /// gzip, RFC 1952.
    Gzip,
    /// zstd, RFC 8878.
    Zstd,
}

/// What a layer's media type says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LayerType {
    /// Whose words it is in.
    pub family: Family,
    /// How it is compressed.
    pub compression: LayerCompression,
    /// Not to be pushed to other registries (Windows' base layers): OCI's `nondistributable`, Docker's `foreign`.
    pub foreign: bool,
}

/// All media types of layers.
const LAYERS: [(&str, LayerType); 12] = {
    use Family::{Docker, Oci};
    use LayerCompression::{Gzip, None, Zstd};
    const fn layer(family: Family, compression: LayerCompression, foreign: bool) -> LayerType {
        LayerType { family, compression, foreign }
    }
    [
        (OCI_LAYER_GZIP, layer(Oci, Gzip, false)),
        (DOCKER_LAYER_GZIP, layer(Docker, Gzip, false)),
        (OCI_LAYER_ZSTD, layer(Oci, Zstd, false)),
        (OCI_LAYER, layer(Oci, None, false)),
        (DOCKER_LAYER_ZSTD, layer(Docker, Zstd, false)),
        (DOCKER_LAYER, layer(Docker, None, false)),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", layer(Oci, Gzip, true)),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+zstd", layer(Oci, Zstd, true)),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar", layer(Oci, None, true)),
        ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", layer(Docker, Gzip, true)),
        ("application/vnd.docker.image.rootfs.foreign.diff.tar.zstd", layer(Docker, Zstd, true)),
        ("application/vnd.docker.image.rootfs.foreign.diff.tar", layer(Docker, None, true)),
    ]
};

impl LayerType {
    /// Returns what a media type says of a layer; `None` where it is not that of a layer of a file system.
    #[must_use]
    pub fn parse(media_type: &str) -> Option<Self> {
        LAYERS.iter().find(|(name, _)| *name == media_type).map(|(_, layer)| *layer)
    }

    /// Returns the media type.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        // Every combination is in the table; the fallback is never reached.
        LAYERS.iter().find(|(_, layer)| *layer == self).map_or(OCI_LAYER, |(name, _)| name)
    }
}
