//! The fixed structures of an EROFS image, byte for byte (Linux, `fs/erofs/erofs_fs.h`). All numbers are little-endian.

use std::io;

use super::sink::Sink;
use crate::index::Timestamp;

/// Bytes of a block. Kernels before 6.4 take no other than their page size.
pub(super) const BLOCK: u64 = 4096;
/// Where the superblock stands.
pub(super) const SUPERBLOCK_AT: u64 = 1024;
const SUPERBLOCK: usize = 128;
/// Bytes of a device's slot. The table begins at a multiple of it, right behind the superblock.
pub(super) const DEVICE_SLOT: u64 = 128;
pub(super) const DEVICE_TABLE_AT: u64 = SUPERBLOCK_AT + SUPERBLOCK as u64;
/// A device's number has 16 bits, and 0 is the image itself.
pub(super) const MOST_DEVICES: usize = 0xffff;
/// Inodes begin at multiples of this, and are numbered by it.
pub(super) const INODE_SLOT: u64 = 32;

const MAGIC: u32 = 0xe0f5_e1e2;
const BLOCK_BITS: u8 = 12;
/// `i_mtime` is the time of modification, not of change.
const COMPATIBLE_MTIME: u32 = 0x2;
const INCOMPATIBLE_CHUNKED_FILE: u32 = 0x4;
const INCOMPATIBLE_DEVICE_TABLE: u32 = 0x8;

/// How an inode's content is laid out: `i_format` from its second bit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Layout {
    /// In blocks of its own.
    Plain = 0,
    /// In blocks of its own, but its last part behind the inode.
    Inline = 2,
    /// On a device: pieces whose places stand behind the inode.
    Chunked = 4,
}

/// What the superblock says that is not the same in all images of ours.
pub(super) struct Superblock {
    /// The root's number, from `inodes_block`.
    pub(super) root: u32,
    pub(super) inodes: u64,
    /// The time of compact inodes.
    pub(super) epoch: Timestamp,
    /// Blocks of the image, without those of the devices.
    pub(super) blocks: u32,
    /// Where the numbers of inodes count from.
    pub(super) inodes_block: u32,
    pub(super) identity: [u8; 16],
    pub(super) devices: u16,
}

impl Superblock {
    /// Writes it. There is no checksum: it would cover the first block and nothing else.
    pub(super) fn write(&self, sink: &mut Sink<'_>) -> io::Result<()> {
        let incompatible = if self.devices > 0 { INCOMPATIBLE_CHUNKED_FILE | INCOMPATIBLE_DEVICE_TABLE } else { 0 };
        let table_at = if self.devices > 0 { DEVICE_TABLE_AT / DEVICE_SLOT } else { 0 };
        let mut bytes = Fields([0; SUPERBLOCK]);
        bytes.set(0, MAGIC.to_le_bytes());
        bytes.set(8, COMPATIBLE_MTIME.to_le_bytes());
        bytes.set(12, [BLOCK_BITS]);
        bytes.set(14, (self.root as u16).to_le_bytes());
        bytes.set(16, self.inodes.to_le_bytes());
        bytes.set(24, self.epoch.seconds.to_le_bytes());
        bytes.set(32, self.epoch.nanoseconds.to_le_bytes());
        bytes.set(36, self.blocks.to_le_bytes());
        bytes.set(40, self.inodes_block.to_le_bytes());
        // At 44, the block from which shared attributes are counted: 0.
        bytes.set(48, self.identity);
        bytes.set(80, incompatible.to_le_bytes());
        bytes.set(86, self.devices.to_le_bytes());
        bytes.set(88, (table_at as u16).to_le_bytes());
        sink.put(&bytes.0)
    }
}

/// Writes a device's slot. The tag is empty: devices are named when the image is mounted.
pub(super) fn write_device(sink: &mut Sink<'_>, blocks: u32) -> io::Result<()> {
    let mut bytes = Fields([0; DEVICE_SLOT as usize]);
    bytes.set(64, blocks.to_le_bytes());
    // At 68, where the device begins in an address space of all devices: 0, it is not in it.
    sink.put(&bytes.0)
}

/// An inode's fixed part.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Header {
    pub(super) layout: Layout,
    /// Bytes of the attributes behind it, as `i_xattr_icount` counts them.
    pub(super) attribute_units: u16,
    pub(super) mode: u16,
    pub(super) links: u32,
    pub(super) size: u64,
    pub(super) mtime: Timestamp,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// First block, device number, or how chunks are counted.
    pub(super) content: u32,
    /// Seen by nobody but 32-bit `stat` of old.
    pub(super) number: u32,
}

impl Header {
    pub(super) const COMPACT: u64 = 32;
    pub(super) const EXTENDED: u64 = 64;

    pub(super) fn write_compact(&self, sink: &mut Sink<'_>) -> io::Result<()> {
        let mut bytes = Fields([0; Self::COMPACT as usize]);
        bytes.set(0, ((self.layout as u16) << 1).to_le_bytes());
        bytes.set(2, self.attribute_units.to_le_bytes());
        bytes.set(4, self.mode.to_le_bytes());
        // The planner gives no compact inode to what does not fit into these.
        bytes.set(6, (self.links as u16).to_le_bytes());
        bytes.set(8, (self.size as u32).to_le_bytes());
        bytes.set(16, self.content.to_le_bytes());
        bytes.set(20, self.number.to_le_bytes());
        bytes.set(24, (self.uid as u16).to_le_bytes());
        bytes.set(26, (self.gid as u16).to_le_bytes());
        sink.put(&bytes.0)
    }

    pub(super) fn write_extended(&self, sink: &mut Sink<'_>) -> io::Result<()> {
        let mut bytes = Fields([0; Self::EXTENDED as usize]);
        bytes.set(0, ((self.layout as u16) << 1 | 1).to_le_bytes());
        bytes.set(2, self.attribute_units.to_le_bytes());
        bytes.set(4, self.mode.to_le_bytes());
        bytes.set(8, self.size.to_le_bytes());
        bytes.set(16, self.content.to_le_bytes());
        bytes.set(20, self.number.to_le_bytes());
        bytes.set(24, self.uid.to_le_bytes());
        bytes.set(28, self.gid.to_le_bytes());
        bytes.set(32, self.mtime.seconds.to_le_bytes());
        bytes.set(40, self.mtime.nanoseconds.to_le_bytes());
        bytes.set(44, self.links.to_le_bytes());
        sink.put(&bytes.0)
    }
}

/// A structure of fixed size; what is not set is zero.
pub(super) struct Fields<const N: usize>(pub(super) [u8; N]);

impl<const N: usize> Fields<N> {
    pub(super) fn set<const M: usize>(&mut self, at: usize, field: [u8; M]) {
        self.0[at..at + M].copy_from_slice(&field);
    }
}
