//! What the bytes of a layer mean.
//!
//! A *layer* is a tar archive, compressed in one way or another. This crate turns such bytes into one model, the
//! [`index::LayerIndex`]: a tree of files, the [extents](index::Extent) of their content, and the
//! [frames](index::Frame) of the blob that hold them. Nothing to the right of that model (fetching, mounting) knows
//! which format a layer came in. It also writes: a stream of tar entries becomes an eStargz blob.
//!
//! - [`digest`], [`position`], [`limits`]: the words that all formats share. [`amounts`]: sizes and times as people type them.
//! - [`tar`]: every dialect of tar, read and written.
//! - [`compression`]: none, gzip, zstd; whole streams and single frames.
//! - [`estargz`]: table of contents, footers, landmarks; reader and writer.
//! - [`zstd_chunked`]: the same with zstd, in the dialects of containers/storage and of stargz-snapshotter.
//! - [`opening`]: which lazy format a layer has, and the way to its index.
//! - [`index`]: the model. [`tree`]: one or many indexes as one file-system tree.
//! - [`erofs`]: a tree as an image that the kernel mounts.
//! - [`program`]: what an executable or a script names that must be there before it runs.
//!
//! What this crate must not know: networks, disks, mounts, clocks, the environment. Parsers take bytes and return
//! values; all input is hostile, and every bound stands in [`limits::Limits`].
#![forbid(unsafe_code)]

pub mod amounts;
pub mod compression;
pub mod digest;
pub mod erofs;
pub mod estargz;
pub mod index;
pub mod limits;
pub mod opening;
pub mod position;
pub mod program;
pub mod soci;
pub mod tar;
pub mod tree;
pub mod zstd_chunked;
