//! eStargz, and its ancestor stargz: gzip members that are one tar, and a table of contents of it.
//!
//! - [`toc`]: the table of contents, read and written. [`footer`]: how it is found.
//! - [`open`]: from a blob to a [`crate::index::LayerIndex`] in one or two reads.
//! - [`writer`]: how a blob is laid out.
//!
//! What this module must not know: who reads the blob's ranges, and how.

pub mod footer;
pub mod open;
pub mod toc;
pub mod writer;
