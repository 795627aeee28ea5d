//! Images turned into other images.
//!
//! - [`layer`]: one layer made into eStargz.
//!
//! What this crate must not know: which kind of place an image comes from or goes to, mounts, terminals.
#![forbid(unsafe_code)]

pub mod layer;
