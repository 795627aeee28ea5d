//! Extended attributes: which of them EROFS has names for, which are shared, and how they are written.
//!
//! An attribute that several inodes have is written once, before all inodes, and each of them holds four bytes for it. So
//! is a large one, which would push inodes apart for the sake of those few who read it.

use std::{collections::HashMap, io};

use super::{
    BootstrapError, Problem,
    disk::{Fields, INODE_SLOT},
    sink::Sink,
};
use crate::{
    index::builder::shown,
    tree::{Inode, Tree},
};

/// An inode's attributes begin with this many bytes.
pub(super) const BODY_HEADER: u64 = 12;
/// An attribute begins with this many bytes.
const ENTRY_HEADER: u64 = 4;
/// Places of attributes, and their sizes, are counted in units of this many bytes.
const UNIT: u64 = 4;
/// `i_xattr_icount` counts the header as one unit, and has 16 bits.
const MOST_BODY: u64 = BODY_HEADER + UNIT * (u16::MAX as u64 - 1);
/// Shared attributes of one inode. The field has eight bits; values above 128 were kept for other uses once.
const MOST_SHARED: usize = 128;
/// Attributes larger than this are shared even where only one inode has them.
const LARGE: u64 = 256;
/// Stands for an attribute that is not written.
const LEFT_OUT: u32 = u32::MAX;

/// Name spaces: the beginning of a name, and the number that stands for it.
const PREFIXES: [(&[u8], u8); 3] = [(b"user.", 1), (b"trusted.", 4), (b"security.", 6)];
/// Names that a number stands for, whole.
const WHOLE: [(&[u8], u8); 2] = [(b"system.posix_acl_access", 2), (b"system.posix_acl_default", 3)];

/// All attributes of a tree.
pub(super) struct Attributes<'a> {
    entries: Vec<Entry<'a>>,
    /// For each attribute of each inode, in the tree's order: its place in `entries`, or [`LEFT_OUT`].
    uses: Vec<u32>,
    /// Where the shared ones begin in the image.
    start: u64,
    end: u64,
    left_out: u64,
}

/// An attribute: a name and a value, whoever has it.
struct Entry<'a> {
    prefix: u8,
    suffix: &'a [u8],
    value: &'a [u8],
    is_used_again: bool,
    /// Where it stands if it is shared, in units.
    shared_at: Option<u32>,
}

/// An inode's attributes, by their places in [`Attributes::entries`].
pub(super) type Uses<'a> = &'a [u32];

impl<'a> Attributes<'a> {
    /// Collects the attributes of a tree. Those that are shared are to stand from `start` on.
    pub(super) fn collect(tree: &'a Tree, start: u64) -> Result<Self, BootstrapError> {
        let mut attributes = Self { entries: Vec::new(), uses: Vec::new(), start, end: start, left_out: 0 };
        let mut known: HashMap<(&[u8], &[u8]), u32> = HashMap::new();
        for (id, inode) in tree.inodes() {
            for (name, value) in &inode.xattrs {
                let Some((prefix, suffix)) = split(name) else {
                    attributes.uses.push(LEFT_OUT);
                    attributes.left_out += 1;
                    continue;
                };
                if value.len() > usize::from(u16::MAX) {
                    let problem = Problem::AttributeValue { name: shown(name), length: value.len() };
                    return Err(problem.of(tree, id));
                }
                // Below `LEFT_OUT`: an attribute takes more than one byte of memory.
                let next = attributes.entries.len() as u32;
                let place = *known.entry((&**name, &**value)).or_insert(next);
                attributes.uses.push(place);
                if place == next {
                    attributes.entries.push(Entry { prefix, suffix, value, is_used_again: false, shared_at: None });
                } else {
                    attributes.entries[place as usize].is_used_again = true;
                }
            }
        }
        attributes.place_shared()?;
        Ok(attributes)
    }

    fn place_shared(&mut self) -> Result<(), BootstrapError> {
        for entry in &mut self.entries {
            if entry.is_used_again || entry.length() > LARGE {
                let limit = u64::from(u32::MAX) * UNIT;
                let too_large = |_| BootstrapError::TooLarge { what: "extended attributes", limit };
                entry.shared_at = Some(u32::try_from(self.end / UNIT).map_err(too_large)?);
                self.end += entry.length();
            }
        }
        self.end = self.end.next_multiple_of(INODE_SLOT);
        Ok(())
    }

    /// Where the shared attributes end, and inodes may begin.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// How many attributes of how many files are not written, together.
    pub(super) fn left_out(&self) -> u64 {
        self.left_out
    }

    /// Returns an inode's attributes. `cursor` counts those of the inodes before it.
    pub(super) fn uses(&self, cursor: &mut usize, inode: &Inode) -> Uses<'_> {
        let start = *cursor;
        *cursor += inode.xattrs.len();
        &self.uses[start..*cursor]
    }

    /// Bytes of an inode's attributes, as they stand behind it: 0 where it has none, or a multiple of 4.
    pub(super) fn body_length(&self, uses: Uses<'_>) -> Result<u64, Problem> {
        if uses.iter().all(|&place| place == LEFT_OUT) {
            return Ok(0);
        }
        let shared = self.shared(uses).count() as u64;
        let length = BODY_HEADER + UNIT * shared + self.inline(uses).map(Entry::length).sum::<u64>();
        if length > MOST_BODY { Err(Problem::AttributesTooLarge { length }) } else { Ok(length) }
    }

    /// What `i_xattr_icount` says of a body's length.
    pub(super) fn units(length: u64) -> u16 {
        // At most `MOST_BODY`.
        length.checked_sub(BODY_HEADER).map_or(0, |length| 1 + (length / UNIT) as u16)
    }

    /// Writes an inode's attributes, which must not be none.
    pub(super) fn write_body(&self, sink: &mut Sink<'_>, uses: Uses<'_>) -> io::Result<()> {
        let shared = self.shared(uses).count();
        let mut header = Fields([0; BODY_HEADER as usize]);
        // At 0, a filter of names, which no feature of ours switches on. At most `MOST_SHARED`.
        header.set(4, [shared as u8]);
        sink.put(&header.0)?;
        for place in self.shared(uses) {
            sink.put(&place.to_le_bytes())?;
        }
        for entry in self.inline(uses) {
            entry.write(sink)?;
        }
        Ok(())
    }

    /// Writes the shared attributes, in the place that they were given.
    pub(super) fn write_shared(&self, sink: &mut Sink<'_>) -> io::Result<()> {
        sink.pad_to(self.start)?;
        for entry in self.entries.iter().filter(|entry| entry.shared_at.is_some()) {
            entry.write(sink)?;
        }
        sink.pad_to(self.end)
    }

    fn entries(&self, uses: Uses<'_>) -> impl Iterator<Item = &Entry<'a>> {
        uses.iter().filter(|place| **place != LEFT_OUT).map(|place| &self.entries[*place as usize])
    }

    /// Places of those attributes that stand elsewhere.
    fn shared(&self, uses: Uses<'_>) -> impl Iterator<Item = u32> {
        self.entries(uses).filter_map(|entry| entry.shared_at).take(MOST_SHARED)
    }

    /// Those that stand behind the inode.
    fn inline(&self, uses: Uses<'_>) -> impl Iterator<Item = &Entry<'a>> {
        let mut left = MOST_SHARED;
        self.entries(uses).filter(move |entry| {
            let shared = entry.shared_at.is_some() && left > 0;
            left -= usize::from(shared);
            !shared
        })
    }
}

impl Entry<'_> {
    fn length(&self) -> u64 {
        (ENTRY_HEADER + self.suffix.len() as u64 + self.value.len() as u64).next_multiple_of(UNIT)
    }

    fn write(&self, sink: &mut Sink<'_>) -> io::Result<()> {
        let mut header = Fields([0; ENTRY_HEADER as usize]);
        // The value was checked when it was collected; an index has no name of more than 255 bytes.
        header.set(0, [self.suffix.len() as u8, self.prefix]);
        header.set(2, (self.value.len() as u16).to_le_bytes());
        sink.put(&header.0)?;
        sink.put(self.suffix)?;
        sink.put(self.value)?;
        sink.align(UNIT)
    }
}

/// Takes a name apart; `None` where EROFS cannot hold it, or no system call takes it.
fn split(name: &[u8]) -> Option<(u8, &[u8])> {
    if let Some((_, number)) = WHOLE.iter().find(|(whole, _)| *whole == name) {
        return Some((*number, b""));
    }
    let (prefix, number) = PREFIXES.iter().find(|(prefix, _)| name.starts_with(prefix))?;
    let suffix = &name[prefix.len()..];
    (!suffix.is_empty()).then_some((*number, suffix))
}
