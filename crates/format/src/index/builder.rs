//! Makes a [`super::LayerIndex`] out of entries in the order of a table of contents, and refuses what is not sound.
//!
//! Entries mean what they mean to a program that unpacks the tar one by one: of several entries with one name the last
//! counts, a directory that stands there already only gets new attributes, anything else replaces what was there (and a
//! replaced directory takes its content with it); a symbolic link in the way to an entry is followed inside the layer.
//! Three things are more generous. As in the reference reader, a missing parent is made, and a hard link may stand before
//! its target. And a name that begins with `.wh.` below what is no directory is passed over, see [`crate::tree`].
//!
//! Time and memory are linear in the size of the table of contents. 100,000 entries have about 35 MB here.

use std::ops::Range;

use super::{Codec, LayerIndex, Span, Timestamp, Xattrs};
use crate::{
    digest::Digest,
    limits::Limits,
    position::{BlobOffset, BlobRange, FileOffset},
};

mod error;
mod finish;
mod layout;
mod names;
mod place;
#[cfg(test)]
mod tests;

pub(crate) use error::shown;
pub use error::{IndexError, Problem};
use names::Names;

/// Permissions of a directory that no entry describes; its owner is root and its time 1970.
const IMPLIED_PERMISSIONS: u16 = 0o755;

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

/// A span of the blob, see [`Span`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NewSpan {
    /// Where it stands in the blob.
    pub range: BlobRange,
    /// How it is decoded.
    pub codec: Codec,
    /// What else it is.
    pub span: Span,
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
    codec: Codec,
    nodes: Vec<Draft>,
    names: Names,
    chunks: Vec<NewChunk>,
    /// The frames, where they are known beforehand.
    spans: Vec<NewSpan>,
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

impl IndexBuilder {
    /// Starts an index of a blob whose frames end before `payload_end`.
    #[must_use]
    pub fn new(payload_end: BlobOffset, missing_digest: MissingDigest, limits: Limits) -> Self {
        Self {
            limits,
            missing_digest,
            payload_end: payload_end.0,
            codec: Codec::Gzip,
            nodes: vec![Draft::implied(ROOT, 0, 0)],
            names: Names::default(),
            chunks: Vec::new(),
            spans: Vec::new(),
            open: None,
            last_entry: 0,
            last_name: Vec::new(),
            last_directory: None,
            followed_bytes: 0,
        }
    }

    /// Starts an index whose frames are spans: chunks name them by where they start. They must be in the order of the blob,
    /// each beginning behind the beginning of the one before, and end before `payload_end`. Chunks need no digest.
    #[must_use]
    pub fn of_spans(payload_end: BlobOffset, spans: Vec<NewSpan>, limits: Limits) -> Self {
        Self { spans, ..Self::new(payload_end, MissingDigest::Allow, limits) }
    }

    /// Says how frames are decoded: they are gzip members where nothing is said.
    #[must_use]
    pub fn with_codec(self, codec: Codec) -> Self {
        Self { codec, ..self }
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
        self.place(number, name, attributes, kind).map_err(|problem| IndexError::new(number, name, problem))
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

    /// Makes room for so many more entries, chunks included. Whoever knows about how many will come spares the copying that
    /// growing costs; memory that is not used is not taken.
    pub fn reserve(&mut self, entries: usize) {
        let entries = entries.min(self.limits.entries);
        self.nodes.reserve(entries);
        self.chunks.reserve(entries);
        self.names.reserve(entries);
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
