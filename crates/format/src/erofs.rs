//! EROFS bootstraps: a tree as a file system that the kernel mounts by itself.
//!
//! A *bootstrap* is an EROFS image (Linux, `fs/erofs/erofs_fs.h`) of all that a tree holds but the content of its files.
//! Content stays where it is: device `n + 1` of the image is the data file of layer `n`, in which each file lies in one
//! piece from a multiple of 4 KiB.
//!
//! ```text
//!  superblock │ device table │ shared attributes │ inodes, each with its attributes │ blocks of large directories
//!             │              │                   │ and what is short: a directory's │ and of long links
//!             │              │                   │ last block, a link, a place      │
//! ```
//!
//! The tree is walked twice, and nothing is held but four bytes for each inode and each attribute: the first walk finds
//! where each inode stands, the second writes. `docs/formats/erofs.md` has the fields.
//!
//! What this module must not know: where the image goes, who mounts it, and whether the devices are filled.
#![expect(
    clippy::cast_possible_truncation,
    reason = "fields have fixed widths: what goes into them was checked, and a comment at each cast says where"
)]

use std::io::{self, Write};

use crate::{
    index::builder::shown,
    tree::{InodeId, Tree},
};

mod attributes;
mod directory;
mod disk;
mod plan;
mod sink;

#[cfg(test)]
mod reader;
#[cfg(test)]
mod tests;

use attributes::Attributes;
use disk::{BLOCK, Superblock};
use plan::{Body, Planner};
use sink::Sink;

/// What was written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Bootstrap {
    /// Bytes, a multiple of 4096.
    pub length: u64,
    /// Files of all types.
    pub inodes: u64,
    /// Extended attributes that EROFS has no name for, and that are not in the image: other name spaces than `user.`,
    /// `trusted.`, `security.` and those of access control lists. No program could read them.
    pub left_out_attributes: u64,
}

/// Why a tree cannot be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootstrapError {
    /// A file that EROFS has no room for.
    #[error("\"{path}\": {problem}")]
    File {
        /// Where it stands, escaped.
        path: String,
        /// What is wrong with it.
        problem: Problem,
    },
    /// More layers than the format counts.
    #[error("the image has {count} layers; EROFS takes at most {limit} devices")]
    TooManyDevices {
        /// Layers.
        count: usize,
        /// The format's bound.
        limit: usize,
    },
    /// A data file whose blocks the format cannot count.
    #[error("the data file of layer {layer} has {length} bytes; EROFS takes at most {limit} of a device")]
    DeviceTooLarge {
        /// The layer's number.
        layer: usize,
        /// Bytes.
        length: u64,
        /// The format's bound, in bytes.
        limit: u64,
    },
    /// So many files or attributes that their places cannot be told.
    #[error("the tree is too large for EROFS: its {what} take more than {limit} bytes")]
    TooLarge {
        /// What there is too much of.
        what: &'static str,
        /// Our bound, in bytes.
        limit: u64,
    },
    /// The image could not be written.
    #[error("cannot write the EROFS image")]
    Write(#[from] io::Error),
}

/// What is wrong with a file.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// A name of no bytes or too many.
    #[error("holds a name of {length} bytes; EROFS takes 1 to 255")]
    Name {
        /// Bytes.
        length: usize,
    },
    /// A link that the kernel would cut short.
    #[error("symbolic link to {length} bytes; Linux takes at most 4095")]
    Target {
        /// Bytes.
        length: usize,
    },
    /// An attribute with too large a value.
    #[error("extended attribute \"{name}\" of {length} bytes; EROFS takes at most 65535")]
    AttributeValue {
        /// The attribute's name, escaped.
        name: String,
        /// Bytes.
        length: usize,
    },
    /// More attributes than fit beside an inode.
    #[error("extended attributes of {length} bytes; EROFS takes at most 262148 beside those that are shared")]
    AttributesTooLarge {
        /// Bytes.
        length: u64,
    },
    /// A file too large for one piece.
    #[error("file of {length} bytes; the largest that can be written is 8 TiB")]
    FileTooLarge {
        /// Bytes.
        length: u64,
    },
    /// A file that does not lie in its layer's data file.
    #[error("its content, {length} bytes at {at} of layer {layer}, is not in the layer's data file")]
    OutsideDevice {
        /// The layer's number.
        layer: u32,
        /// Where it is said to begin, in bytes.
        at: u64,
        /// Bytes.
        length: u64,
    },
    /// A file that begins within a block.
    #[error("its content begins at {at} of layer {layer}, which is no multiple of 4096")]
    Unaligned {
        /// The layer's number.
        layer: u32,
        /// Where it begins, in bytes.
        at: u64,
    },
    /// A directory too large for its size to be told.
    #[error("directory of {length} bytes")]
    DirectoryTooLarge {
        /// Bytes.
        length: u64,
    },
}

/// Writes the bootstrap of a tree, front to back. `devices[n]` is the length of layer `n`'s data file, in bytes. All
/// layers are devices of the image, also those that no file of the tree lies in: they must be given to the kernel in this
/// order. It reads whole blocks of them, and from Linux 6.18 on (before, it took what was missing for zeros) fails where
/// the last one is not whole: a data file must be as long as the next multiple of 4096.
///
/// `identity` becomes the file system's UUID. Whoever mounts overlayfs over several bootstraps needs one for each, and
/// the same content may have the same: the beginning of a digest of all that went into the tree is right.
///
/// The bytes depend on the arguments alone. Output is written in pieces of some 100 KiB and not flushed.
///
/// # Errors
/// [`BootstrapError`] where EROFS has no room for something, or `output` fails. What was written by then is of no use.
pub fn write_bootstrap(
    tree: &Tree,
    devices: &[u64],
    identity: [u8; 16],
    output: &mut dyn Write,
) -> Result<Bootstrap, BootstrapError> {
    let device_blocks = device_blocks(devices)?;
    let attributes_at = disk::DEVICE_TABLE_AT + disk::DEVICE_SLOT * devices.len() as u64;
    let attributes = Attributes::collect(tree, attributes_at)?;
    let inodes_at = attributes.end();
    let first_block = inodes_at / BLOCK;
    let planner = Planner::new(tree, &attributes, devices, inodes_at);

    let mut places = Vec::new();
    let mut plans = planner.clone();
    for (id, inode) in tree.inodes() {
        let plan = plans.next(id, inode).map_err(|problem| problem.of(tree, id))?;
        let place = (plan.at - first_block * BLOCK) / disk::INODE_SLOT;
        let too_large = || BootstrapError::TooLarge { what: "inodes", limit: u64::from(u32::MAX) * disk::INODE_SLOT };
        places.push(u32::try_from(place).map_err(|_| too_large())?);
    }
    // `fsck.erofs` 1.5 reads the beginning of attributes behind the last inode too, where there are none.
    let data_at = (plans.end() + attributes::BODY_HEADER).next_multiple_of(BLOCK);
    let blocks = data_at / BLOCK + plans.blocks();
    let blocks = u32::try_from(blocks)
        .map_err(|_| BootstrapError::TooLarge { what: "inodes and directories", limit: u64::from(u32::MAX) * BLOCK })?;

    let mut sink = Sink::new(output);
    let superblock = Superblock {
        // At most the 255 places of the first two blocks: the root is the first inode.
        root: places[0],
        inodes: places.len() as u64,
        epoch: planner.epoch(),
        blocks,
        // Not beyond `blocks`.
        inodes_block: first_block as u32,
        identity,
        // Checked with the devices.
        devices: devices.len() as u16,
    };
    sink.pad_to(disk::SUPERBLOCK_AT)?;
    superblock.write(&mut sink)?;
    for blocks in device_blocks {
        disk::write_device(&mut sink, blocks)?;
    }
    attributes.write_shared(&mut sink)?;
    let mut plans = planner;
    // Few: directories of more than some 100 names, and links that fill a block.
    let mut with_blocks = Vec::new();
    for (id, inode) in tree.inodes() {
        let plan = plans.next(id, inode).map_err(|problem| problem.of(tree, id))?;
        plans.write(&mut sink, &plan, id, inode, data_at / BLOCK, &places)?;
        if let Body::Blocks { count: count @ 1.., .. } = plan.body {
            with_blocks.push((id, inode, count));
        }
    }
    sink.pad_to(data_at)?;
    for (id, inode, count) in with_blocks {
        plans.write_content(&mut sink, id, inode, 0, count, &places)?;
        sink.align(BLOCK)?;
    }
    let length = sink.finish()?;
    Ok(Bootstrap { length, inodes: places.len() as u64, left_out_attributes: attributes.left_out() })
}

/// Returns how many blocks each device has.
fn device_blocks(devices: &[u64]) -> Result<Vec<u32>, BootstrapError> {
    if devices.len() > disk::MOST_DEVICES {
        return Err(BootstrapError::TooManyDevices { count: devices.len(), limit: disk::MOST_DEVICES });
    }
    let blocks = |(layer, length): (usize, &u64)| {
        let limit = u64::from(u32::MAX) * BLOCK;
        u32::try_from(length.div_ceil(BLOCK)).map_err(|_| BootstrapError::DeviceTooLarge {
            layer,
            length: *length,
            limit,
        })
    };
    devices.iter().enumerate().map(blocks).collect()
}

impl Problem {
    /// Says whose problem it is.
    fn of(self, tree: &Tree, id: InodeId) -> BootstrapError {
        BootstrapError::File { path: shown(&path_of(tree, id)), problem: self }
    }
}

/// Finds a path of an inode: the first of its names. Takes no longer than one look at the whole tree.
fn path_of(tree: &Tree, id: InodeId) -> Vec<u8> {
    let name_in = |directory: InodeId, id: InodeId| tree.children(directory).iter().find(|(_, child)| *child == id);
    let mut names = Vec::new();
    let mut found = tree.inodes().find_map(|(directory, _)| name_in(directory, id).map(|(name, _)| (directory, name)));
    while let Some((directory, name)) = found {
        names.push(name);
        let parent = tree.parent(directory);
        found = name_in(parent, directory).map(|(name, _)| (parent, name));
    }
    let mut path = Vec::new();
    for name in names.iter().rev() {
        path.push(b'/');
        path.extend_from_slice(name);
    }
    if path.is_empty() { b"/".to_vec() } else { path }
}
