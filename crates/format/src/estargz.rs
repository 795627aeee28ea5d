//! eStargz, and its ancestor stargz: gzip members that are one tar, and a table of contents of it.
//!
//! - [`toc`]: the table of contents, read and written.
//!
//! What this module must not know: who reads the blob's ranges, and how.

pub mod toc;
