//! Where images live.
//!
//! An image is *documents* (indexes, manifests, configurations: small, read whole, verified) and *blobs* (layers: large,
//! read as a verified stream or by unverified ranges). Whatever holds images is an [`ImageSource`], whatever takes them
//! an [`ImageSink`]; a registry, an OCI layout directory, OCI and Docker archives and standard input and output are all
//! behind these two, and the rest of Loris never asks which it is.
//!
//! - [`name`]: `alpine:3`, `oci:DIR:TAG`, `docker-archive:FILE`, `-`: what a user types; opens sources and sinks.
//! - [`document`]: descriptors, manifests, indexes, configurations; raw bytes and their digest stay the truth.
//! - [`registry`]: the distribution specification 1.1, as a client. [`auth`]: credentials as Podman and Docker find them.
//! - [`layout`], [`archive`]: images in files.
//!
//! What this crate must not know: what the bytes of a layer mean, mounts, terminals.
#![forbid(unsafe_code)]

pub mod archive;
pub mod auth;
mod blob;
pub mod document;
pub mod layout;
pub mod link;
pub mod name;
pub mod place;
pub mod platform;
pub mod reference;
pub mod registry;
mod stage;

pub use document::{Descriptor, Document};
pub use name::{ImageName, OpenOptions, open_sink, open_source};
pub use place::{BlobStream, Error, ImageSink, ImageSource};
pub use platform::{Platform, Platforms};
pub use reference::Reference;
