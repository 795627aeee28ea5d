//! The smallest image that can be read lazily: one file of one block, whose content stands on a device.

use loris_format::{
    digest::Digest,
    index::builder::{Attributes, IndexBuilder, MissingDigest, NewChunk, NewKind},
    limits::Limits,
    position::{BlobOffset, FileOffset},
    tree::Tree,
};

use crate::erofs::write_tree;

/// Its only file.
pub(super) const NAME: &str = "file";
/// Bytes of the file and of the device.
pub(super) const LENGTH: usize = 4096;

/// Returns what the file holds: no block of zeros, and none that stands anywhere else.
pub(super) fn content() -> Vec<u8> {
    b"loris asks whether this is read. ".iter().copied().cycle().take(LENGTH).collect()
}

/// Writes its bootstrap.
pub(super) fn bootstrap() -> Result<Vec<u8>, String> {
    let length = LENGTH as u64;
    let build = || {
        let mut builder = IndexBuilder::new(BlobOffset(length), MissingDigest::Refuse, Limits::default());
        let attributes = Attributes { permissions: 0o444, ..Attributes::default() };
        builder.push(0, NAME.as_bytes(), attributes, NewKind::Regular { size: length, digest: None })?;
        builder.chunk(
            0,
            NewChunk {
                file_offset: FileOffset(0),
                length,
                frame: BlobOffset(0),
                frame_offset: 0,
                digest: Some(Digest::sha256_of(&content())),
            },
        )?;
        builder.finish()
    };
    let index = build().map_err(|error| error.to_string())?;
    let mut bytes = Vec::new();
    write_tree(&Tree::merged(&[&index]), &[length], &mut bytes)?;
    Ok(bytes)
}
