//! The smallest image that can be read lazily: one file of one block, whose content stands on a device.

use loris_format::{
    digest::Digest,
    erofs::write_bootstrap,
    index::builder::{Attributes, IndexBuilder, MissingDigest, NewChunk, NewKind},
    limits::Limits,
    position::{BlobOffset, FileOffset},
    tree::Tree,
};

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
    let tree = Tree::merged(&[&index]);
    write_bootstrap(&tree, &[length], [0; 16], &mut bytes).map_err(|error| error.to_string())?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_can_be_written() {
        // The superblock's magic number, where the kernel looks for it.
        let bytes = bootstrap().unwrap_or_default();
        assert_eq!(bytes.get(1024..1028), Some(&[0xe2, 0xe1, 0xf5, 0xe0][..]));
        assert!(content().chunks(512).all(|sector| sector.iter().any(|&byte| byte != 0)));
    }
}
