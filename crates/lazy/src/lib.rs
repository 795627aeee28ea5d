//! Layers of an image, read before they are here.
//!
//! A [`LazyLayer`] is a layer index, a place where the blob's bytes can be had, and a local *data file* that holds what
//! was needed so far. [`LazyLayer::ensure`] is the only way in: it fetches the *frames* that hold a range, decodes them,
//! verifies every *extent* against its digest, writes them to the data file, and only then says so in the *filled*
//! bitmap. FUSE, a pager, prefetch and `fs cat` differ only in who calls it.
//!
//! - [`store`]: the directory on disk that keeps data files, bitmaps and tables of contents over restarts.
//! - [`derived`]: what is made out of layers and kept beside them.
//! - [`documents`]: manifests and configurations, for when the registry is away.
//! - [`census`]: what a store holds, and who uses it; pruning, pinning and checking it.
//! - [`open`]: from a manifest to lazy layers, all side by side.
//! - [`layer`]: [`LazyLayer`]. [`mod@complete`]: prefetch and completion, ahead of anyone who asks.
//! - [`foresight`]: what a start will read that nobody has recorded; `neighbours`: what stands near what is waited for.
//! - [`recorded`]: what a workload reads, for a list to prefetch.
//! - [`proof`]: what is found out about a layer once it is whole; `rest` keeps what that needs.
//! - `schedule`: who goes first. [`plan`]: which bytes to ask for; `sequence`: who reads in sequence. The latter two are
//!   pure, so that the policy can be replaced without touching anything else.
//!
//! ```no_run
//! # async fn example(
//! #     source: std::sync::Arc<dyn loris_oci::ImageSource>,
//! #     manifest: &loris_oci::document::Manifest,
//! # ) -> Result<(), Box<dyn std::error::Error>> {
//! use loris_lazy::{OpenOptions, Store, open_image};
//!
//! let store = Store::open("/var/lib/loris".as_ref())?;
//! let image = open_image(source, manifest, &store, &OpenOptions::default()).await?.into_lazy()?;
//! let layer = &image.layers[0];
//! if let Some(file) = layer.index().lookup(b"etc/os-release") {
//!     let mut start = [0; 4096];
//!     let length = layer.read(file, loris_format::position::FileOffset(0), &mut start).await?;
//!     println!("{}", String::from_utf8_lossy(&start[..length]));
//! }
//! # Ok(())
//! # }
//! ```
//!
//! What this crate must not know: how layers are shown to the kernel, which format a layer came in (beyond the one call
//! that opens it), terminals.
#![forbid(unsafe_code)]

mod agreement;
mod arriving;
pub mod beside;
mod cache;
mod content;
mod digests;
mod disk;
mod eviction;
mod fetch;
mod filled;
mod kept;
mod neighbours;
mod quota;
mod recheck;

pub mod census;
pub mod complete;
pub mod derived;
pub mod documents;
pub mod error;
pub mod foresight;
pub mod layer;
pub mod open;
pub mod plan;
pub mod proof;
pub mod recorded;
mod rest;
mod schedule;
mod sequence;
mod shared;
mod spans;
pub mod store;
mod verdict;
mod windows;

pub use beside::IndexTrust;
pub use census::{StoredLayer, Totals};
pub use complete::{Completion, complete, complete_all, prefetch, prefetch_in_order};
pub use error::{EnsureError, LayerError, OpenError, ReadError, StoreError};
pub use eviction::{PruneOptions, Pruned, Removed};
pub use foresight::{Command, foresee};
pub use layer::{LayerStatistics, LazyLayer};
pub use open::{LazyImage, OpenOptions, OpenedImage, OpenedLayer, Trust, open_image};
pub use plan::FetchPolicy;
pub use proof::Verdict;
pub use recheck::{Checked, Fault};
pub use recorded::Recorder;
pub use store::{Store, StoreOptions};
