//! Makes a [`super::LayerIndex`] out of entries in the order of a table of contents, and refuses what is not sound.
//!
//! Entries mean what they mean to a program that unpacks the tar one by one: of several entries with one name the last
//! counts, a directory that stands there already only gets new attributes, anything else replaces what was there (and a
//! replaced directory takes its content with it); a symbolic link in the way to an entry is followed inside the layer.
//! Two things are more generous, as they are in the reference reader: a missing parent is made, and a hard link may
//! stand before its target.
//!
//! Time and memory are linear in the size of the table of contents. 100,000 entries have about 35 MB here.

use std::{borrow::Cow, ops::Range};

use super::{LayerIndex, Timestamp, Xattrs};
use crate::{
    digest::Digest,
    limits::Limits,
    position::{BlobOffset, FileOffset},
    tar::path,
};

mod error;
mod finish;
mod layout;
mod names;
#[cfg(test)]
mod tests;

pub use error::{IndexError, Problem};
use names::Names;

/// Permissions of a directory that no entry describes; its owner is root and its time 1970.
const IMPLIED_PERMISSIONS: u16 = 0o755;

/// Most symbolic links on the way to one entry, as Linux has it.
const FOLLOWED_LINKS: u32 = 40;

/// Most bytes of paths that are walked behind symbolic links, over all entries: a short entry must not cost a long walk
/// each time. Real layers stay far below, since entries of one directory follow each other.
const FOLLOWED_BYTES: u64 = 256 << 20;

/// Longest name of an extended attribute on Linux.
const XATTR_NAME_BYTES: usize = 255;

/// Device numbers that Linux can hold: 12 and 20 bits.
const MAJOR_LIMIT: u32 = 1 << 12;
const MINOR_LIMIT: u32 = 1 << 20;

/// What an entry says of its node, whatever kind it is.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Attributes {
    /// The low twelve bits of `st_mode`; others are dropped.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Timestamp,
    /// Extended attributes in any order; of equal names the last counts.
    pub xattrs: Xattrs,
}

/// What an entry makes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NewKind<'a> {
    /// A directory.
    Directory,
    /// A regular file. If it is not empty its chunks follow, see [`IndexBuilder::chunk`].
    Regular {
        /// Uncompressed bytes.
        size: u64,
        /// Digest of the whole content.
        digest: Option<Digest>,
    },
    /// A symbolic link.
    Symlink {
        /// Where it points.
        target: &'a [u8],
    },
    /// Another name of a node that is no directory. The attributes are those of the target.
    HardLink {
        /// The path of the target, from the root of the layer.
        target: &'a [u8],
    },
    /// A character device.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
}

/// A piece of the content of the last regular file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NewChunk {
    /// Where it begins in the file.
    pub file_offset: FileOffset,
    /// Uncompressed bytes.
    pub length: u64,
    /// Where the frame that holds it starts in the blob.
    pub frame: BlobOffset,
    /// Where it begins in the decoded frame.
    pub frame_offset: u64,
    /// What its bytes must hash to.
    pub digest: Option<Digest>,
}

/// What to do about content that no digest covers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MissingDigest {
    /// It is an error.
    Refuse,
    /// It becomes an extent without digest.
    Allow,
}

/// Collects entries.
#[derive(Debug)]
pub struct IndexBuilder {
    limits: Limits,
    missing_digest: MissingDigest,
    /// Where the frames end and something else begins, in the blob.
    payload_end: u64,
    nodes: Vec<Draft>,
    names: Names,
    chunks: Vec<NewChunk>,
    open: Option<OpenFile>,
    /// The number and the name of the last entry.
    last_entry: u64,
    last_name: Vec<u8>,
    /// The last directory that was looked for: most entries stand in the same one as their predecessor.
    last_directory: Option<(Vec<u8>, u32)>,
    followed_bytes: u64,
}

/// The regular file that chunks belong to.
#[derive(Debug)]
struct OpenFile {
    node: u32,
    size: u64,
    digest: Option<Digest>,
    covered: u64,
    first_chunk: usize,
}

#[derive(Debug)]
struct Draft {
    kind: DraftKind,
    attributes: Attributes,
    /// The number of the entry that made it.
    entry: u64,
}

#[derive(Debug)]
enum DraftKind {
    Directory {
        parent: u32,
        depth: usize,
        implied: bool,
    },
    Regular {
        size: u64,
        digest: Option<Digest>,
        chunks: Range<usize>,
    },
    Symlink {
        target: Box<[u8]>,
    },
    CharDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Fifo,
    /// A hard link whose target was not there when it came; `target` is clean.
    Pending {
        target: Box<[u8]>,
        waiting: Waiting,
    },
}

/// How far a hard link has come to its target.
#[derive(Debug)]
enum Waiting {
    Untried,
    /// One of a chain that is being followed: to meet it again means a cycle.
    UnderWay,
    Resolved(u32),
}

const ROOT: u32 = 0;

/// Node numbers have 32 bits, and one of them means none.
const NODE_LIMIT: usize = u32::MAX as usize - 1;

impl IndexBuilder {
    /// Starts an index of a blob whose frames end before `payload_end`.
    #[must_use]
    pub fn new(payload_end: BlobOffset, missing_digest: MissingDigest, limits: Limits) -> Self {
        Self {
            limits,
            missing_digest,
            payload_end: payload_end.0,
            nodes: vec![Draft::implied(ROOT, 0, 0)],
            names: Names::default(),
            chunks: Vec::new(),
            open: None,
            last_entry: 0,
            last_name: Vec::new(),
            last_directory: None,
            followed_bytes: 0,
        }
    }

    /// Takes the next entry. `number` is its place in the table of contents, for messages, `name` its path as the layer
    /// has it.
    ///
    /// # Errors
    /// Where the entry is not sound, or the file before it lacks content. The builder is of no use after that.
    pub fn push(
        &mut self,
        number: u64,
        name: &[u8],
        attributes: Attributes,
        kind: NewKind<'_>,
    ) -> Result<(), IndexError> {
        self.close_file()?;
        self.last_entry = number;
        self.last_name.clear();
        self.last_name.extend_from_slice(name);
        self.place(number, attributes, kind).map_err(|problem| IndexError::new(number, name, problem))
    }

    /// Takes the next chunk of the file that was pushed last; `number` as for [`IndexBuilder::push`]. Chunks must come in the order of the file, without gap.
    ///
    /// # Errors
    /// Where the chunk does not fit the file or the blob. The builder is of no use after that.
    pub fn chunk(&mut self, number: u64, chunk: NewChunk) -> Result<(), IndexError> {
        let name = &self.last_name;
        let fail = |problem| IndexError::new(number, name, problem);
        let Some(file) = &mut self.open else { return Err(fail(Problem::ChunkWithoutFile)) };
        let at = chunk.file_offset;
        if at.0 != file.covered {
            return Err(fail(Problem::ChunkOutOfPlace { expected: FileOffset(file.covered), found: at }));
        }
        // The file ends where its size says; `covered` is never beyond it.
        if chunk.length == 0 || chunk.length > file.size - file.covered {
            return Err(fail(Problem::ChunkLength { at, length: chunk.length, left: file.size - file.covered }));
        }
        if chunk.frame.0 >= self.payload_end {
            return Err(fail(Problem::OutsideBlob { offset: chunk.frame, end: BlobOffset(self.payload_end) }));
        }
        if chunk.frame_offset.checked_add(chunk.length).is_none_or(|end| end > self.limits.frame_bytes) {
            let (offset, limit) = (chunk.frame, self.limits.frame_bytes);
            return Err(fail(Problem::FrameTooLarge { offset, limit }));
        }
        if self.chunks.len() >= self.limits.entries {
            return Err(fail(Problem::TooManyEntries { limit: self.limits.entries }));
        }
        file.covered += chunk.length;
        self.chunks.push(chunk);
        Ok(())
    }

    /// Returns the name of the entry that was pushed last, as it was given; empty before the first.
    #[must_use]
    pub fn last_name(&self) -> &[u8] {
        &self.last_name
    }

    /// Makes the index. Its [`LayerIndex::prefetch`] is [`super::Prefetch::Unspecified`].
    ///
    /// # Errors
    /// Where the last file lacks content, a hard link leads nowhere, in a circle or to a directory, or frames overlap or
    /// claim more than they can hold.
    pub fn finish(mut self) -> Result<LayerIndex, IndexError> {
        self.close_file()?;
        finish::finish(self)
    }

    fn place(&mut self, entry: u64, mut attributes: Attributes, kind: NewKind<'_>) -> Result<(), Problem> {
        check_attributes(&mut attributes, &self.limits)?;
        let path = path::clean(&self.last_name, &self.limits)?;
        let Some((directory, name)) = path::split_last(&path) else {
            return self.place_root(entry, attributes, kind);
        };
        let directory = self.make_directory(directory, entry)?;
        let depth = self.depth(directory) + 1;
        if depth > self.limits.depth {
            return Err(Problem::TooDeep { limit: self.limits.depth });
        }
        let standing = self.names.find(directory, name);
        if let (NewKind::Directory, Some(standing)) = (kind, standing) {
            let node = &mut self.nodes[self.names.node(standing) as usize];
            if let DraftKind::Directory { implied, .. } = &mut node.kind {
                *implied = false;
                (node.attributes, node.entry) = (attributes, entry);
                return Ok(());
            }
        }
        let kind = match kind {
            NewKind::Directory => DraftKind::Directory { parent: directory, depth, implied: false },
            NewKind::Regular { size, digest } => {
                if size > self.limits.file_bytes {
                    return Err(Problem::FileTooLarge { size, limit: self.limits.file_bytes });
                }
                DraftKind::Regular { size, digest, chunks: 0..0 }
            }
            NewKind::Symlink { target } => DraftKind::Symlink { target: checked_target(target, &self.limits)?.into() },
            NewKind::HardLink { target } => {
                checked_target(target, &self.limits)?;
                let target = path::clean(target, &self.limits)?;
                if let Some(node) = self.link_target(&target, (directory, name))? {
                    self.set_name(directory, name, standing, node)?;
                    return Ok(());
                }
                DraftKind::Pending { target: target.into(), waiting: Waiting::Untried }
            }
            NewKind::CharDevice { major, minor } | NewKind::BlockDevice { major, minor }
                if major >= MAJOR_LIMIT || minor >= MINOR_LIMIT =>
            {
                return Err(Problem::Device { major, minor });
            }
            NewKind::CharDevice { major, minor } => DraftKind::CharDevice { major, minor },
            NewKind::BlockDevice { major, minor } => DraftKind::BlockDevice { major, minor },
            NewKind::Fifo => DraftKind::Fifo,
        };
        if let DraftKind::Regular { size, digest, .. } = kind {
            let (node, first_chunk) = (self.next_node()?, self.chunks.len());
            self.open = Some(OpenFile { node, size, digest, covered: 0, first_chunk });
        }
        let node = self.add(Draft { kind, attributes, entry })?;
        self.set_name(directory, name, standing, node)
    }

    fn place_root(&mut self, entry: u64, attributes: Attributes, kind: NewKind<'_>) -> Result<(), Problem> {
        let root = &mut self.nodes[ROOT as usize];
        let DraftKind::Directory { implied, .. } = &mut root.kind else { return Err(Problem::RootNotDirectory) };
        if kind != NewKind::Directory {
            return Err(Problem::RootNotDirectory);
        }
        *implied = false;
        (root.attributes, root.entry) = (attributes, entry);
        Ok(())
    }

    /// Returns the node that a hard link at `link` (directory and name) leads to, `None` where it is not there yet.
    fn link_target(&mut self, target: &[u8], link: (u32, &[u8])) -> Result<Option<u32>, Problem> {
        let shown = || error::shown(target);
        let Some((directory, name)) = path::split_last(target) else {
            return Err(Problem::LinkToDirectory { target: shown() });
        };
        let Some(directory) = self.walk(directory, None)? else { return Ok(None) };
        if (directory, name) == link {
            return Err(Problem::LinkCycle { target: shown() });
        }
        let Some(found) = self.names.find(directory, name) else { return Ok(None) };
        let node = self.names.node(found);
        match self.nodes[node as usize].kind {
            DraftKind::Directory { .. } => Err(Problem::LinkToDirectory { target: shown() }),
            _ => Ok(Some(node)),
        }
    }

    fn make_directory(&mut self, path: &[u8], entry: u64) -> Result<u32, Problem> {
        if path.is_empty() {
            return Ok(ROOT);
        }
        if let Some((last, node)) = &self.last_directory
            && last == path
        {
            return Ok(*node);
        }
        // It is there or made.
        let node = self.walk(path, Some(entry))?.unwrap_or(ROOT);
        self.last_directory = Some((path.into(), node));
        Ok(node)
    }

    /// Returns what stands at a clean path, following symbolic links on the way.
    fn node_at(&mut self, path: &[u8]) -> Result<Option<u32>, Problem> {
        let Some((directory, name)) = path::split_last(path) else { return Ok(Some(ROOT)) };
        let Some(directory) = self.walk(directory, None)? else { return Ok(None) };
        Ok(self.names.find(directory, name).map(|place| self.names.node(place)))
    }

    /// Returns the directory at a clean path, following symbolic links. Where it is not there, it is made for entry
    /// `make`, or else the answer is `None`.
    fn walk(&mut self, path: &[u8], make: Option<u64>) -> Result<Option<u32>, Problem> {
        let mut rest = Cow::Borrowed(path);
        let mut at = 0;
        let mut directory = ROOT;
        let mut followed = 0;
        while at < rest.len() {
            let end = rest[at..].iter().position(|&byte| byte == b'/').map_or(rest.len(), |length| at + length);
            let name = &rest[at..end];
            at = end + 1;
            match name {
                b"" | b"." => continue,
                b".." => {
                    directory = self.parent(directory);
                    continue;
                }
                _ => {}
            }
            let Some(found) = self.names.find(directory, name) else {
                let Some(entry) = make else { return Ok(None) };
                directory = self.imply(directory, name, entry)?;
                continue;
            };
            let node = self.names.node(found);
            match &self.nodes[node as usize].kind {
                DraftKind::Directory { .. } => directory = node,
                DraftKind::Symlink { target } => {
                    let left = rest.get(at..).unwrap_or_default();
                    let walked = target.len() + left.len() + 1;
                    followed += 1;
                    self.followed_bytes += u64::try_from(walked).unwrap_or(u64::MAX);
                    if followed > FOLLOWED_LINKS || self.followed_bytes > FOLLOWED_BYTES {
                        return Err(Problem::TooManySymlinks { at: error::shown(name) });
                    }
                    if target.starts_with(b"/") {
                        directory = ROOT;
                    }
                    rest = Cow::Owned([target, left].join(&b'/'));
                    at = 0;
                }
                _ if make.is_none() => return Ok(None),
                _ => return Err(Problem::ParentNotDirectory { at: error::shown(name) }),
            }
        }
        Ok(Some(directory))
    }

    fn imply(&mut self, parent: u32, name: &[u8], entry: u64) -> Result<u32, Problem> {
        // A clean path was checked; what a symbolic link brings in was not.
        if name.len() > self.limits.name_bytes {
            return Err(Problem::NameTooLong { limit: self.limits.name_bytes });
        }
        let depth = self.depth(parent) + 1;
        if depth > self.limits.depth {
            return Err(Problem::TooDeep { limit: self.limits.depth });
        }
        let node = self.add(Draft::implied(parent, depth, entry))?;
        self.set_name(parent, name, None, node)?;
        Ok(node)
    }

    fn set_name(&mut self, directory: u32, name: &[u8], standing: Option<u32>, node: u32) -> Result<(), Problem> {
        let Some(standing) = standing else {
            return self.names.insert(directory, name, node).ok_or(Problem::TooManyEntries { limit: NODE_LIMIT });
        };
        // The last directory may have been reached through what is replaced.
        self.last_directory = None;
        self.names.set_node(standing, node);
        Ok(())
    }

    fn next_node(&self) -> Result<u32, Problem> {
        let limit = self.limits.entries.min(NODE_LIMIT);
        u32::try_from(self.nodes.len())
            .ok()
            .filter(|_| self.nodes.len() <= limit)
            .ok_or(Problem::TooManyEntries { limit })
    }

    fn add(&mut self, draft: Draft) -> Result<u32, Problem> {
        let node = self.next_node()?;
        self.nodes.push(draft);
        Ok(node)
    }

    fn parent(&self, directory: u32) -> u32 {
        match self.nodes[directory as usize].kind {
            DraftKind::Directory { parent, .. } => parent,
            _ => ROOT,
        }
    }

    fn depth(&self, directory: u32) -> usize {
        match self.nodes[directory as usize].kind {
            DraftKind::Directory { depth, .. } => depth,
            _ => 0,
        }
    }

    /// Checks that the last file has all its content.
    fn close_file(&mut self) -> Result<(), IndexError> {
        let Some(file) = self.open.take() else { return Ok(()) };
        let fail = |problem| Err(IndexError::new(self.last_entry, &self.last_name, problem));
        if file.covered != file.size {
            return fail(Problem::ContentMissing { covered: file.covered, size: file.size });
        }
        let chunks = &mut self.chunks[file.first_chunk..];
        if let [only] = chunks {
            only.digest = only.digest.or(file.digest);
        }
        if self.missing_digest == MissingDigest::Refuse
            && let Some(chunk) = chunks.iter().find(|chunk| chunk.digest.is_none())
        {
            return fail(Problem::NoDigest { at: chunk.file_offset });
        }
        let last_chunk = self.chunks.len();
        if let DraftKind::Regular { chunks, .. } = &mut self.nodes[file.node as usize].kind {
            *chunks = file.first_chunk..last_chunk;
        }
        Ok(())
    }
}

impl Draft {
    fn implied(parent: u32, depth: usize, entry: u64) -> Self {
        let attributes = Attributes { permissions: IMPLIED_PERMISSIONS, ..Attributes::default() };
        Self { kind: DraftKind::Directory { parent, depth, implied: true }, attributes, entry }
    }
}

fn check_attributes(attributes: &mut Attributes, limits: &Limits) -> Result<(), Problem> {
    attributes.permissions &= 0o7777;
    if attributes.mtime.nanoseconds >= 1_000_000_000 {
        return Err(Problem::Nanoseconds { nanoseconds: attributes.mtime.nanoseconds });
    }
    let xattrs = &mut attributes.xattrs;
    if xattrs.is_empty() {
        return Ok(());
    }
    // Both are as long as a vector may be, so that their sum is no overflow.
    let bytes = xattrs.iter().fold(0_usize, |sum, (name, value)| sum.saturating_add(name.len() + value.len()));
    if bytes > limits.xattr_bytes {
        return Err(Problem::XattrsTooLarge { limit: limits.xattr_bytes });
    }
    if let Some((name, _)) =
        xattrs.iter().find(|(name, _)| name.is_empty() || name.len() > XATTR_NAME_BYTES || name.contains(&0))
    {
        return Err(Problem::XattrName { name: error::shown(name) });
    }
    // Stable, and the last of equal names stays.
    xattrs.sort_by(|one, other| one.0.cmp(&other.0));
    xattrs.reverse();
    xattrs.dedup_by(|one, other| one.0 == other.0);
    xattrs.reverse();
    Ok(())
}

fn checked_target<'a>(target: &'a [u8], limits: &Limits) -> Result<&'a [u8], Problem> {
    if target.is_empty() || target.contains(&0) {
        return Err(Problem::Target { target: error::shown(target) });
    }
    if target.len() > limits.path_bytes {
        return Err(Problem::TargetTooLong { limit: limits.path_bytes });
    }
    Ok(target)
}
