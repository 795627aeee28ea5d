//! Writes eStargz: the parts that need neither threads nor files.
//!
//! ```text
//!  source tar ─▶ Sorter ─▶ Order ─▶ Members ─▶ (compressed one by one) ─▶ blob
//!                                      └─▶ Table ─▶ toc_entry ─▶ last member, footer
//! ```
//!
//! - [`order`]: which entry comes where.
//! - [`members`]: where gzip members begin and end.
//! - [`table`]: the table of contents, grown as members are written.
//!
//! Whoever drives these brings the bytes: see `loris-convert`, which spools, compresses on all cores and writes.
//!
//! Format: `docs/estargz.md` of containerd/stargz-snapshotter. A member begins at the top of the blob, at the payload
//! (not the header) of every file that is not empty, at each further chunk of it, at the tar header of the table of
//! contents, and at the footer. Where members of a least size are asked for, one holds several files or chunks.

use crate::{
    estargz::toc::{LANDMARK_CONTENT, TOC_NAME},
    tar,
};

pub mod members;
pub mod order;
pub mod table;

pub use members::{EntryBytes, Member, Members, Piece};
pub use order::{Change, EntryId, Order, Sort, Sorter};
pub use table::Table;

/// Uncompressed bytes of a chunk where nothing else is asked for, as all writers in the field have it.
pub const DEFAULT_CHUNK_BYTES: u64 = 4 << 20;

/// Why a blob cannot be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// More entries than [`crate::limits::Limits::entries`].
    #[error("the layer has more than {limit} entries and chunks")]
    TooManyEntries {
        /// The bound.
        limit: usize,
    },
    /// Hard links that lead to each other and to no file.
    #[error("hard links lead in a circle by way of {target:?}")]
    LinkCircle {
        /// What one of the links leads to.
        target: String,
    },
    /// An entry that no tar header can hold.
    #[error(transparent)]
    Entry(#[from] tar::InvalidEntry),
    /// The driver told of a chunk where none can be: a mistake in the program, not in the layer.
    #[error("chunk of {length} bytes at {offset} belongs to no file")]
    StrayChunk {
        /// Offset in the blob.
        offset: u64,
        /// Uncompressed bytes.
        length: u64,
    },
}

/// Returns a landmark as an entry of the new tar. `name` is [`Order::landmark`].
///
/// # Errors
/// None for the names of landmarks.
pub fn landmark(name: &str) -> Result<EntryBytes, Error> {
    let size = LANDMARK_CONTENT.len() as u64;
    let header = tar::encode_header(&tar::Entry { path: name.into(), size, ..tar::Entry::default() })?;
    let content = [LANDMARK_CONTENT, tar::padding(size)].concat();
    Ok(EntryBytes {
        header: Piece::Made(header.into()),
        content: Some(Piece::Made(content.into())),
        size,
        begins_member: true,
    })
}

/// Returns the tar header of the table of contents, whose JSON text has `length` bytes. Behind the text come its
/// [padding](tar::padding) and [`tar::END_OF_ARCHIVE`].
///
/// # Errors
/// None for lengths that a tar header can hold.
pub fn toc_header(length: u64) -> Result<Vec<u8>, Error> {
    let entry = tar::Entry { path: TOC_NAME.into(), size: length, ..tar::Entry::default() };
    Ok(tar::encode_header(&entry)?)
}
