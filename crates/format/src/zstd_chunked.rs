//! zstd:chunked: zstd frames that are one tar, and a table of contents of it in a skippable frame.
//!
//! ```text
//!  [zstd frame: headers][zstd frame: a chunk of content]...     to any decoder, a tar
//!  [skippable frame: table of contents, zstd]
//!  [skippable frame: tar-split, zstd]                           containers/storage only
//!  [skippable frame: footer]
//! ```
//!
//! The table is that of eStargz ([`crate::estargz::toc`]), as JSON, in two dialects:
//!
//! | | containers/storage | stargz-snapshotter |
//! |---|---|---|
//! | who vouches | the digest of the compressed table | the digest of the uncompressed one |
//! | where the table is | an annotation; nobody reads the footer | the footer |
//! | chunks | cut by content, and holes | of one size |
//! | a file of one chunk | has no digest of its chunk, only of the file | has both |
//! | the tar's other bytes | `tar-split`, for the DiffID | are not there |
//!
//! There is no specification; the rules are those of the two programs, see `docs/formats/zstd-chunked.md`.
//!
//! - [`cuts`]: where content is cut. [`tar_split`]: the tar's other bytes, and the sum that goes with them.
//!
//! What this module must not know: who reads the blob's ranges, and how.

use std::io::Read as _;

pub mod cuts;
pub mod tar_split;

use crate::{
    compression::{Compression, Decoder},
    limits::Limits,
    opening::OpenError,
    position::Packed,
};

/// Decodes a table of contents.
pub(crate) fn decode_toc(compressed: &[u8], place: Packed, limits: &Limits) -> Result<Vec<u8>, OpenError> {
    let corrupt = |detail: String| OpenError::TocCorrupt { offset: place.range.start, detail };
    if place.uncompressed > limits.toc_bytes {
        return Err(OpenError::TocTooLarge { bytes: place.uncompressed, limit: limits.toc_bytes });
    }
    if Compression::detect(compressed) != Compression::Zstd {
        return Err(corrupt("no zstd frame begins there".into()));
    }
    let decoder = Decoder::new(compressed).map_err(|error| corrupt(error.to_string()))?;
    let mut json = Vec::new();
    let most = place.uncompressed.saturating_add(1);
    decoder.take(most).read_to_end(&mut json).map_err(|error| corrupt(error.to_string()))?;
    if json.len() as u64 != place.uncompressed {
        let found = if json.len() as u64 == most { "more".to_owned() } else { json.len().to_string() };
        return Err(corrupt(format!("it should have {} bytes and has {found}", place.uncompressed)));
    }
    Ok(json)
}
