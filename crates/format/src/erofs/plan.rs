//! Where everything goes.
//!
//! An inode, its attributes and what is short of its content stand together, in the order of the tree, in which the
//! files of a directory are neighbours. What fits into a block does not cross one: the kernel demands it of content
//! behind an inode, and of the rest it is worth the few bytes, as an inode then costs one page.

use std::io;

use super::{
    Problem,
    attributes::{Attributes, Uses},
    directory::Directory,
    disk::{BLOCK, Header, INODE_SLOT, Layout},
    sink::Sink,
};
use crate::{
    index::Timestamp,
    position::DataOffset,
    tree::{Inode, InodeId, InodeKind, LayerNumber, Tree},
};

/// A chunk's place on a device: bytes, and what they are aligned to.
const CHUNK_INDEX: u64 = 8;
/// The chunks' places have device numbers beside them.
const CHUNK_INDEXES: u32 = 0x20;
/// The size of a chunk is told by its binary logarithm, in blocks, in five bits.
const MOST_CHUNK_BITS: u32 = 31;
/// Longest target that Linux reads: `PATH_MAX` without the NUL.
const MOST_TARGET: usize = 4095;

/// Type bits of `st_mode`.
const FIFO: u16 = 0o010_000;
const CHAR_DEVICE: u16 = 0o020_000;
const DIRECTORY: u16 = 0o040_000;
const BLOCK_DEVICE: u16 = 0o060_000;
const REGULAR: u16 = 0o100_000;
const SYMLINK: u16 = 0o120_000;

/// Plans inode after inode. The same inodes get the same plans, so it can be run again instead of being remembered.
#[derive(Clone)]
pub(super) struct Planner<'a> {
    tree: &'a Tree,
    attributes: &'a Attributes<'a>,
    /// Lengths of data files, in bytes.
    devices: &'a [u64],
    epoch: Timestamp,
    /// Where the last inode ends.
    end: u64,
    /// Blocks behind the inodes.
    blocks: u64,
    /// Attributes of the inodes before.
    cursor: usize,
}

/// What becomes of an inode.
#[derive(Clone, Copy)]
pub(super) struct Plan<'a> {
    /// Where it stands, in bytes.
    pub(super) at: u64,
    pub(super) uses: Uses<'a>,
    pub(super) is_compact: bool,
    /// Bytes of its attributes.
    pub(super) attributes: u64,
    /// Bytes of its content.
    pub(super) size: u64,
    pub(super) body: Body,
}

/// Where an inode's content is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Body {
    /// There is none.
    None,
    /// On a device.
    Device {
        /// The device's number, from 1.
        device: u16,
        first_block: u32,
        chunk_bits: u32,
    },
    /// In blocks behind the inodes.
    Blocks {
        /// Counted from the first of those blocks.
        first: u64,
        count: u64,
        /// The last part of it, which fills no block, stands behind the inode.
        inline: bool,
    },
}

impl<'a> Planner<'a> {
    /// Begins with the root, at `start`.
    pub(super) fn new(tree: &'a Tree, attributes: &'a Attributes<'a>, devices: &'a [u64], start: u64) -> Self {
        Self { tree, attributes, devices, epoch: common_time(tree), end: start, blocks: 0, cursor: 0 }
    }

    /// The time that compact inodes have.
    pub(super) fn epoch(&self) -> Timestamp {
        self.epoch
    }

    /// Where the last inode ends.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Blocks behind the inodes.
    pub(super) fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Plans the next inode of the tree.
    pub(super) fn next(&mut self, id: InodeId, inode: &Inode) -> Result<Plan<'a>, Problem> {
        let uses = self.attributes.uses(&mut self.cursor, inode);
        let attributes = self.attributes.body_length(uses)?;
        let (size, mut body) = self.content(id, inode)?;
        let is_compact = inode.mtime == self.epoch
            && inode.uid.max(inode.gid).max(inode.link_count) <= u16::MAX.into()
            && size <= u32::MAX.into();
        let mut fixed = attributes + if is_compact { Header::COMPACT } else { Header::EXTENDED };
        if matches!(body, Body::Device { .. }) {
            fixed = fixed.next_multiple_of(CHUNK_INDEX) + CHUNK_INDEX;
        }
        let tail = if matches!(body, Body::Blocks { .. }) { size % BLOCK } else { 0 };
        let (at, inline) = place(self.end, fixed, tail);
        self.end = at + fixed + if inline { tail } else { 0 };
        if let Body::Blocks { first, count, inline: is_inline } = &mut body {
            *first = self.blocks;
            *count = if inline { size / BLOCK } else { size.div_ceil(BLOCK) };
            *is_inline = inline;
            self.blocks += *count;
        }
        Ok(Plan { at, uses, is_compact, attributes, size, body })
    }

    fn content(&self, id: InodeId, inode: &Inode) -> Result<(u64, Body), Problem> {
        const UNPLACED: Body = Body::Blocks { first: 0, count: 0, inline: false };
        match &inode.kind {
            InodeKind::Directory => Ok((Directory::new(self.tree, id).size()?, UNPLACED)),
            InodeKind::Symlink { target } if target.len() > MOST_TARGET => {
                Err(Problem::Target { length: target.len() })
            }
            InodeKind::Symlink { target } => Ok((target.len() as u64, UNPLACED)),
            InodeKind::Regular { size: 0, .. } => Ok((0, Body::None)),
            InodeKind::Regular { layer, size, data, .. } => Ok((*size, self.on_device(*layer, *size, *data)?)),
            InodeKind::CharDevice { .. } | InodeKind::BlockDevice { .. } | InodeKind::Fifo => Ok((0, Body::None)),
        }
    }

    fn on_device(&self, layer: LayerNumber, size: u64, data: DataOffset) -> Result<Body, Problem> {
        let outside = Problem::OutsideDevice { layer: layer.0, at: data.0, length: size };
        let Some(length) = usize::try_from(layer.0).ok().and_then(|layer| self.devices.get(layer)) else {
            return Err(outside);
        };
        if data.checked_add(size).is_none_or(|end| end.0 > *length) {
            return Err(outside);
        }
        if !data.0.is_multiple_of(BLOCK) {
            return Err(Problem::Unaligned { layer: layer.0, at: data.0 });
        }
        // One chunk for the whole file: the kernel finds any piece of it by a single place, and the device by its number.
        // A plain file in an address space of all devices would do without the place, but then the kernel looks through
        // all devices in each read.
        let chunk_bits = size.div_ceil(BLOCK).next_power_of_two().trailing_zeros();
        if chunk_bits > MOST_CHUNK_BITS {
            return Err(Problem::FileTooLarge { length: size });
        }
        // Devices were counted, and their blocks too: neither number is beyond its field.
        Ok(Body::Device { device: layer.0 as u16 + 1, first_block: (data.0 / BLOCK) as u32, chunk_bits })
    }

    /// Writes an inode with its attributes and what stands behind it. `blocks_at` is the first block behind all inodes,
    /// `places` has the numbers of inodes.
    pub(super) fn write(
        &self,
        sink: &mut Sink<'_>,
        plan: &Plan<'_>,
        id: InodeId,
        inode: &Inode,
        blocks_at: u64,
        places: &[u32],
    ) -> io::Result<()> {
        let (layout, content) = match plan.body {
            Body::Device { chunk_bits, .. } => (Layout::Chunked, CHUNK_INDEXES | chunk_bits),
            Body::Blocks { first, count, inline } => {
                // The image's blocks were counted.
                let first = if count > 0 { (blocks_at + first) as u32 } else { 0 };
                (if inline { Layout::Inline } else { Layout::Plain }, first)
            }
            Body::None => (Layout::Plain, 0),
        };
        let (file_type, content) = match &inode.kind {
            InodeKind::Directory => (DIRECTORY, content),
            InodeKind::Regular { .. } => (REGULAR, content),
            InodeKind::Symlink { .. } => (SYMLINK, content),
            InodeKind::CharDevice { major, minor } => (CHAR_DEVICE, device_number(*major, *minor)),
            InodeKind::BlockDevice { major, minor } => (BLOCK_DEVICE, device_number(*major, *minor)),
            InodeKind::Fifo => (FIFO, 0),
        };
        let header = Header {
            layout,
            attribute_units: Attributes::units(plan.attributes),
            mode: file_type | inode.permissions & 0o7777,
            links: inode.link_count,
            size: plan.size,
            mtime: inode.mtime,
            uid: inode.uid,
            gid: inode.gid,
            content,
            number: id.0 as u32,
        };
        sink.pad_to(plan.at)?;
        if plan.is_compact {
            header.write_compact(sink)?;
        } else {
            header.write_extended(sink)?;
        }
        if plan.attributes > 0 {
            self.attributes.write_body(sink, plan.uses)?;
        }
        match plan.body {
            Body::Device { device, first_block, .. } => {
                sink.align(CHUNK_INDEX)?;
                let mut index = [0; CHUNK_INDEX as usize];
                // At 0, the upper bits of the block, which only newer kernels know.
                index[2..4].copy_from_slice(&device.to_le_bytes());
                index[4..].copy_from_slice(&first_block.to_le_bytes());
                sink.put(&index)
            }
            Body::Blocks { count, inline: true, .. } => self.write_content(sink, id, inode, count, 1, places),
            Body::Blocks { .. } | Body::None => Ok(()),
        }
    }

    /// Writes blocks of a directory's or a link's content, see [`Directory::write`].
    pub(super) fn write_content(
        &self,
        sink: &mut Sink<'_>,
        id: InodeId,
        inode: &Inode,
        first: u64,
        count: u64,
        places: &[u32],
    ) -> io::Result<()> {
        match &inode.kind {
            InodeKind::Directory => Directory::new(self.tree, id).write(sink, first, count, places),
            // A target is shorter than a block: there is no other than the first.
            InodeKind::Symlink { target } => sink.put(target),
            _ => Ok(()),
        }
    }
}

/// Finds a place behind `end` for an inode of `fixed` bytes with a short piece of content of `tail` bytes. Says where,
/// and whether the piece stands behind the inode.
fn place(end: u64, fixed: u64, tail: u64) -> (u64, bool) {
    let at = end.next_multiple_of(INODE_SLOT);
    let next_block = at.next_multiple_of(BLOCK);
    let room = next_block - at;
    let fits = |bytes: u64| bytes <= room;
    if tail > 0 && fits(fixed + tail) {
        return (at, true);
    }
    // Room that is left empty is the price for it, a block of its own that of the other way.
    if tail > 0 && fixed + tail <= BLOCK && (!fits(fixed) || room + tail < BLOCK) {
        return (next_block, true);
    }
    (if fits(fixed) { at } else { next_block }, false)
}

/// As Linux encodes it in 32 bits: `new_encode_dev` in `include/linux/kdev_t.h`. An index has no number beyond 12 and 20
/// bits.
fn device_number(major: u32, minor: u32) -> u32 {
    minor & 0xff | major << 8 | (minor & !0xff) << 12
}

/// The time of more than half of all inodes, where there is such a time (Boyer and Moore): those become compact. Any
/// other choice is right too, and costs 32 bytes for each inode.
fn common_time(tree: &Tree) -> Timestamp {
    let (mut candidate, mut votes) = (Timestamp::default(), 0_u64);
    for (_, inode) in tree.inodes() {
        if votes == 0 {
            candidate = inode.mtime;
        }
        if inode.mtime == candidate { votes += 1 } else { votes -= 1 }
    }
    candidate
}
