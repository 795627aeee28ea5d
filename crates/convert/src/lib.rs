//! Images turned into other images, copied, and checked.
//!
//! - [`layer`]: one layer made into eStargz, on all cores, in bounded memory.
//! - [`image`]: a whole image converted: all platforms, with everything that belongs to it.
//! - [`copy`]: an image taken to another place as it is.
//! - [`verify`]: whether an image is what it says.
//! - [`soci`]: indexes beside layers that stay as they are.
//! - [`record`]: what a workload read, as other tools write it down.
//! - [`progress`]: what is told while these run.
//!
//! Images come from an [`ImageSource`](loris_oci::ImageSource) and go to an [`ImageSink`](loris_oci::ImageSink). What is
//! not changed is carried along byte for byte, with fields that we have never heard of; what is changed keeps everything
//! but the parts that have to change.
//!
//! What this crate must not know: which kind of place an image comes from or goes to, mounts, terminals.
#![forbid(unsafe_code)]
// Blobs in tests have a few kilobytes.
#![cfg_attr(test, allow(clippy::cast_possible_truncation))]

mod carry;
pub mod copy;
pub mod error;
pub mod image;
pub mod layer;
pub mod progress;
pub mod record;
pub mod soci;
mod survey;
pub mod verify;

#[cfg(test)]
mod memory;

pub use error::Error;
