//! Directories: blocks of entries, sorted by name over all blocks, `.` and `..` among them.
//!
//! A block begins with its entries, 12 bytes each; their names follow in the same order, without separators. The first
//! entry's name begins where the entries end, which tells how many there are; the last name ends at a NUL or with the
//! block. The kernel finds a name by halving, first among blocks and then within one.

use std::io;

use super::{Problem, disk::BLOCK, sink::Sink};
use crate::tree::{InodeId, InodeKind, Tree};

/// Bytes of an entry without its name.
const ENTRY: usize = 12;
const MOST_NAME: usize = 255;

/// A directory of a tree.
#[derive(Clone, Copy)]
pub(super) struct Directory<'a> {
    tree: &'a Tree,
    id: InodeId,
}

type Entry<'a> = (&'a [u8], InodeId);

impl<'a> Directory<'a> {
    pub(super) fn new(tree: &'a Tree, id: InodeId) -> Self {
        Self { tree, id }
    }

    /// Returns how many bytes it has: all blocks but the last count whole.
    pub(super) fn size(self) -> Result<u64, Problem> {
        let (mut full, mut used) = (0, 0);
        for (name, _) in self.entries() {
            if name.is_empty() || name.len() > MOST_NAME {
                return Err(Problem::Name { length: name.len() });
            }
            let more = (ENTRY + name.len()) as u64;
            if used + more > BLOCK {
                full += 1;
                used = 0;
            }
            used += more;
        }
        let length = full * BLOCK + used;
        // The kernel counts a directory's blocks in 32 bits, and positions in it in 63.
        if full >= u64::from(u32::MAX >> 1) { Err(Problem::DirectoryTooLarge { length }) } else { Ok(length) }
    }

    /// Writes the blocks from `first` on, `count` of them: each is filled up with zeros but the directory's last.
    /// `places` has the numbers of inodes.
    pub(super) fn write(self, sink: &mut Sink<'_>, first: u64, count: u64, places: &[u32]) -> io::Result<()> {
        let mut entries = self.entries().peekable();
        let mut block: Vec<Entry<'a>> = Vec::new();
        for number in 0..first.saturating_add(count) {
            block.clear();
            let mut used = 0;
            while let Some(entry) = entries.next_if(|(name, _)| used + ENTRY + name.len() <= BLOCK as usize) {
                used += ENTRY + entry.0.len();
                block.push(entry);
            }
            if block.is_empty() {
                break;
            }
            if number >= first {
                self.write_block(sink, &block, places)?;
                if entries.peek().is_some() {
                    sink.pad_to(sink.position() + (BLOCK - used as u64))?;
                }
            }
        }
        Ok(())
    }

    fn write_block(self, sink: &mut Sink<'_>, block: &[Entry<'_>], places: &[u32]) -> io::Result<()> {
        // Within a block: less than 2^16.
        let mut name_at = (ENTRY * block.len()) as u16;
        for (name, id) in block {
            let mut entry = [0; ENTRY];
            // A tree's inodes are numbered from 1 without gaps, and each has a place.
            entry[..4].copy_from_slice(&places[id.0 as usize - 1].to_le_bytes());
            entry[8..10].copy_from_slice(&name_at.to_le_bytes());
            entry[10] = self.tree.inode(*id).map_or(0, |inode| file_type(&inode.kind));
            sink.put(&entry)?;
            name_at += name.len() as u16;
        }
        for (name, _) in block {
            sink.put(name)?;
        }
        Ok(())
    }

    /// All entries in their order. `.` and `..` have no place of their own: `+` and `-` sort before them.
    fn entries(self) -> impl Iterator<Item = Entry<'a>> {
        let children = self.tree.children(self.id);
        let (before, rest) = children.split_at(children.partition_point(|(name, _)| **name < b"."[..]));
        let (between, after) = rest.split_at(rest.partition_point(|(name, _)| **name < b".."[..]));
        let named = |children: &'a [(Box<[u8]>, InodeId)]| children.iter().map(|(name, id)| (&**name, *id));
        named(before)
            .chain([(&b"."[..], self.id)])
            .chain(named(between))
            .chain([(&b".."[..], self.tree.parent(self.id))])
            .chain(named(after))
    }
}

/// `FT_*` of Linux, `include/linux/fs_types.h`.
fn file_type(kind: &InodeKind) -> u8 {
    match kind {
        InodeKind::Regular { .. } => 1,
        InodeKind::Directory => 2,
        InodeKind::CharDevice { .. } => 3,
        InodeKind::BlockDevice { .. } => 4,
        InodeKind::Fifo => 5,
        InodeKind::Symlink { .. } => 7,
    }
}
