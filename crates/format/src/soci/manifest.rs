//! The words of SOCI's index manifests. They are image manifests, whose layers are ztocs.

/// The type of the configuration of a manifest of version 1, which is a referrer of an image's manifest.
pub const CONFIG_TYPE_V1: &str = "application/vnd.amazon.soci.index.v1+json";
/// The same in version 2, whose digest is an annotation of the image's manifest.
pub const CONFIG_TYPE_V2: &str = "application/vnd.amazon.soci.index.v2+json";
/// The configuration itself.
pub const CONFIG: &[u8] = b"{}";
/// The type of a ztoc.
pub const ZTOC_TYPE: &str = "application/octet-stream";
/// The type of a document of spans that are wanted first.
pub const PREFETCH_TYPE: &str = "application/vnd.amazon.soci.prefetch.v1+json";

/// Annotation of an image's manifest: the digest of its index manifest.
pub const INDEX_DIGEST: &str = "com.amazon.soci.index-digest";
/// Annotation of an index manifest's entry in the image's index: the digest of the image's manifest.
pub const IMAGE_MANIFEST_DIGEST: &str = "com.amazon.soci.image-manifest-digest";
/// Annotation of an index manifest: who made it.
pub const BUILD_TOOL: &str = "com.amazon.soci.build-tool-identifier";
/// What `soci` says there, in the ztoc too.
pub const BUILD_TOOL_SOCI: &str = "AWS SOCI CLI v0.2";
/// Annotation of a ztoc: the digest of its layer.
pub const LAYER_DIGEST: &str = "com.amazon.soci.image-layer-digest";
/// Annotation of a ztoc: the type of its layer.
pub const LAYER_TYPE: &str = "com.amazon.soci.image-layer-mediaType";
/// Annotation of a ztoc: decoded bytes between two checkpoints.
pub const SPAN_SIZE: &str = "com.amazon.soci.span-size";
