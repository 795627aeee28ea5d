//! SOCI: an index beside layers that stay as they are.
//!
//! A *ztoc* lists a layer's files and cuts its blob into *spans*, each of which can be decoded by itself: of a gzip stream
//! with the 32 KiB before it, its *window*, and with the bit it begins at; the *zinfo* in the ztoc has these checkpoints.
//! An *index manifest* names the ztocs of an image's layers.
//!
//! - [`ztoc`]: the document, read and written, byte for byte as `soci` writes it. [`zinfo`]: the checkpoints in it.
//! - [`build()`]: makes a ztoc while a layer streams by.
//! - [`mod@open`]: a ztoc becomes a layer index. SOCI has no digests of files, but one of each span's compressed bytes.
//! - [`manifest`]: the words of index manifests; [`prefetch`]: the document that says which spans are wanted first.
//!
//! Sources of the rules: `ztoc/`, `soci/` and `fs/` of awslabs/soci-snapshotter 0.15 (facts only), `lib/gzran.c` of
//! erofs-utils.

mod build;
mod flat;
pub mod manifest;
pub mod open;
pub mod prefetch;
mod spans;
pub mod zinfo;
pub mod ztoc;

#[cfg(test)]
mod tests;

pub use build::{BuildError, BuildOptions, Built, build};
pub use open::{WindowPlaces, open, window_places};

/// Decoded bytes between two checkpoints where nothing else is said.
pub const SPAN_BYTES: u64 = 4 << 20;
/// Layers that are smaller get no ztoc where nothing else is said.
pub const MIN_LAYER_BYTES: u64 = 10 << 20;
