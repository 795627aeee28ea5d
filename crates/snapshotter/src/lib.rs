//! A snapshotter for containerd whose layers are lazy: `loris daemon snapshotter`.
//!
//! containerd asks for a snapshot of each layer, from the lowest upwards. Where the layer is lazy, the answer is that its
//! snapshot exists already, and containerd pulls nothing. When a container is made of the uppermost, its root file system
//! is overlayfs over one directory, where all of them are mounted, merged.
//!
//! ```text
//!  containerd ──▶ service ──▶ snapshots ──┬─▶ metadata     what there is, on disk
//!                 gRPC        the rules   ├─▶ remote       images of registries, opened lazily
//!                                         ├─▶ ahead        what is fetched before anyone asks
//!                                         ├─▶ lowers       where layers are mounted
//!                                         └─▶ mounting     what containerd is told to mount
//! ```
//!
//! - [`labels`]: what clients say of a layer. [`filter`]: how they ask for lists.
//! - [`keychain`]: credentials that only a node of a cluster has.
//! - [`daemon`]: all of it, started, and taken over from a process that was killed.
//! - [`metrics`], [`report`]: what is counted, and what is known, for those who look.
//! - [`config`]: what all of that is told, and by whom.
//! - [`install`]: units and other programs' configuration.
//! - [`containerd`]: its store of images, of which this is a client.
//! - [`content`]: when that store is completed behind lazy pulls.
//! - [`proto`]: containerd's protocols, generated.
//!
//! What this crate must not know: the command line, formats of layers, how the kernel is asked.
#![forbid(unsafe_code)]

pub mod ahead;
pub mod config;
pub mod containerd;
pub mod content;
pub mod daemon;
pub mod filter;
mod handover;
mod idle;
pub mod install;
pub mod keychain;
pub mod labels;
pub mod listener;
mod locked;
pub mod lowers;
pub mod metadata;
pub mod metrics;
pub mod mounting;
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod proto;
pub mod remote;
pub mod report;
mod service;
pub mod snapshots;
pub mod systemd;
mod usage;
pub mod watching;

pub use daemon::{Daemon, DaemonError};
pub use snapshots::{SnapshotError, Snapshots};
