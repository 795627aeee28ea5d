//! The layer index: the one model that every lazy format is read into.
//!
//! ```text
//!  Node (file) ── extents ──▶ Extent ── frame ──▶ Frame ── range ──▶ blob
//!     │                          │
//!     └── place in the data file ┘
//! ```
//!
//! A [`Frame`] is what is fetched and decoded at once; an [`Extent`] is a piece of one file's content inside a decoded
//! frame, with the digest it must have; the *data file* is the sparse local file into which extents are written. A
//! file's place in it is known from the index alone, before anything is fetched.
//!
//! An index that exists is sound: [`builder::IndexBuilder`] is the only way to make one, and it checks that extents
//! cover each file without gap or overlap, that frames lie inside the blob, that links resolve without a cycle, and
//! that the tree is a tree.

use crate::{
    digest::Digest,
    position::{BlobOffset, BlobRange, DataOffset, DataRange, FileOffset},
};

pub mod builder;

/// A node's number in its layer index; the root is [`NodeId::ROOT`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct NodeId(pub u32);

impl NodeId {
    /// The root directory.
    pub const ROOT: Self = Self(0);
}

/// A point in time: seconds since 1970 and nanoseconds (below 10^9) after them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Timestamp {
    /// Whole seconds, negative before 1970.
    pub seconds: i64,
    /// Nanoseconds after `seconds`, below 10^9.
    pub nanoseconds: u32,
}

/// Extended attributes: names and values.
pub type Xattrs = Vec<(Box<[u8]>, Box<[u8]>)>;

/// One file of a layer: an inode. Hard links are several names of one node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Node {
    /// What it is, and what only that kind has.
    pub kind: NodeKind,
    /// Permissions with set-uid, set-gid and sticky bit: the low twelve bits of `st_mode`.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Timestamp,
    /// Extended attributes, sorted by name, as the layer has them (nothing filtered).
    pub xattrs: Xattrs,
    /// Names that lead here; for a directory 2 and one for each subdirectory.
    pub link_count: u32,
}

/// What a node is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NodeKind {
    /// A directory; children sorted by name.
    Directory {
        /// Names (without `/`, NUL; neither `.` nor `..`) and what they lead to.
        children: Vec<(Box<[u8]>, NodeId)>,
    },
    /// A regular file.
    Regular(Content),
    /// A symbolic link.
    Symlink {
        /// Where it points, any bytes but NUL.
        target: Box<[u8]>,
    },
    /// A character device; 0:0 in a layer is *not* a whiteout (OCI whiteouts are names), overlayfs takes it for one.
    CharDevice {
        /// Major and minor number.
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

/// The content of a regular file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Content {
    /// Uncompressed bytes.
    pub size: u64,
    /// Where the content stands in the data file, a multiple of [`crate::position::DATA_ALIGNMENT`]. Of no meaning where
    /// `size` is 0.
    pub data: DataOffset,
    /// Digest of the whole content, where the format has one.
    pub digest: Option<Digest>,
}

/// A frame's number in its layer index, in the order of the blob.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FrameId(pub u32);

/// A part of the blob that can be decoded by itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Frame {
    /// Where it stands in the blob. For formats that tell only where frames start, it ends where the next one starts.
    pub range: BlobRange,
    /// How it is decoded.
    pub codec: Codec,
    /// How many decoded bytes, from the frame's start, the extents need. What is behind them (the tar headers of
    /// following entries) is not decoded.
    pub decoded_length: u64,
}

/// How a frame is decoded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Codec {
    /// One or more gzip members (RFC 1952).
    Gzip,
    /// One or more zstd frames (RFC 8878).
    Zstd,
    /// As it is.
    Stored,
    /// A piece of a deflate stream in gzip members, which begins with any bit and needs the 32 KiB that precede it: a
    /// [`Span`].
    Deflate,
}

/// What a frame is in a layer that stayed as it was, beside which an index was made (SOCI). Neighbours share a byte where the
/// later one does not begin with a whole one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Span {
    /// Where it begins in the tar.
    pub start: u64,
    /// Bytes that it decodes to, those between files included. The last one may have more, behind the end of the archive.
    pub length: u64,
    /// How many upper bits of its first byte are the first of it; 0 where that is all of them.
    pub bits: u8,
    /// What its compressed bytes must hash to, before they are decoded: its extents have no digests.
    pub digest: Digest,
}

/// A piece of one file's content: the unit of verification, and a bit of the filled-bitmap.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Extent {
    /// The regular file.
    pub node: NodeId,
    /// Where the piece begins in the file.
    pub file_offset: FileOffset,
    /// Where it stands in the data file.
    pub data: DataOffset,
    /// Uncompressed bytes, at least 1.
    pub length: u64,
    /// The frame that holds it, whole.
    pub frame: FrameId,
    /// Where it begins in the decoded frame.
    pub frame_offset: u64,
    /// What its bytes must hash to. `None` only in formats without chunk digests (legacy stargz), which are served only
    /// where a policy allows it.
    pub digest: Option<Digest>,
}

/// What the writer of the layer wished to be fetched first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Prefetch {
    /// The layer does not say.
    Unspecified,
    /// Nothing is worth it.
    Nothing,
    /// The blob up to here.
    Until(BlobOffset),
}

/// A layer: its tree, its extents, its frames.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LayerIndex {
    nodes: Vec<Node>,
    /// Directories that no entry describes, sorted.
    implied: Vec<NodeId>,
    /// Sorted by `data`, without overlap.
    extents: Vec<Extent>,
    /// Sorted by `range.start`, without overlap.
    frames: Vec<Frame>,
    /// `extents` numbers sorted by frame: `by_frame[frame_extents[f]..frame_extents[f + 1]]` are those of frame `f`.
    by_frame: Vec<u32>,
    frame_extents: Vec<u32>,
    /// As many as there are frames, or none.
    spans: Vec<Span>,
    data_length: u64,
    prefetch: Prefetch,
}

impl LayerIndex {
    /// Returns a node.
    ///
    /// # Panics
    /// Where `id` is not of this index.
    #[must_use]
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0 as usize]
    }

    /// Returns all nodes; a node's place is its [`NodeId`].
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Says whether a node is a directory that the layer holds entries of but does not describe. Its attributes are made
    /// up, and do not count where a lower layer has that directory.
    #[must_use]
    pub fn is_implied(&self, id: NodeId) -> bool {
        self.implied.binary_search(&id).is_ok()
    }

    /// Returns all extents in the order of the data file.
    #[must_use]
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// Returns all frames in the order of the blob.
    #[must_use]
    pub fn frames(&self) -> &[Frame] {
        &self.frames
    }

    /// Returns what a frame is as a span. Of the frames of an index either all or none are spans; where they are, they
    /// decode to all of the tar.
    #[must_use]
    pub fn span(&self, frame: FrameId) -> Option<&Span> {
        self.spans.get(frame.0 as usize)
    }

    /// Says whether the frames are spans.
    #[must_use]
    pub fn has_spans(&self) -> bool {
        !self.spans.is_empty()
    }

    /// Says whether a digest reaches all content: that of each extent, or that of the span it is in.
    #[must_use]
    pub fn is_digested(&self) -> bool {
        self.has_spans() || self.extents.iter().all(|extent| extent.digest.is_some())
    }

    /// Returns the size of the data file, in bytes.
    #[must_use]
    pub fn data_length(&self) -> u64 {
        self.data_length
    }

    /// Returns what is to be fetched first.
    #[must_use]
    pub fn prefetch(&self) -> Prefetch {
        self.prefetch
    }

    pub(crate) fn set_prefetch(&mut self, prefetch: Prefetch) {
        self.prefetch = prefetch;
    }

    /// Returns the children of a directory, sorted by name; nothing for other nodes.
    #[must_use]
    pub fn children(&self, id: NodeId) -> &[(Box<[u8]>, NodeId)] {
        match &self.node(id).kind {
            NodeKind::Directory { children } => children,
            _ => &[],
        }
    }

    /// Returns a directory's child by name.
    #[must_use]
    pub fn child(&self, directory: NodeId, name: &[u8]) -> Option<NodeId> {
        let children = self.children(directory);
        children.binary_search_by(|(child, _)| child.as_ref().cmp(name)).ok().map(|place| children[place].1)
    }

    /// Returns the node at a path, without following symbolic links. Empty components and `.` are passed over.
    #[must_use]
    pub fn lookup(&self, path: &[u8]) -> Option<NodeId> {
        let mut names = path.split(|&byte| byte == b'/').filter(|name| !name.is_empty() && *name != b".");
        names.try_fold(NodeId::ROOT, |directory, name| self.child(directory, name))
    }

    /// Returns the numbers of the extents that `range` of the data file touches, in order.
    #[must_use]
    pub fn extents_in(&self, range: &DataRange) -> std::ops::Range<usize> {
        if range.start >= range.end {
            return 0..0;
        }
        let first = self.extents.partition_point(|extent| extent.data.0 + extent.length <= range.start.0);
        let last = self.extents.partition_point(|extent| extent.data < range.end);
        first..last.max(first)
    }

    /// Returns the numbers of the extents that a frame holds, in the order of the data file.
    ///
    /// # Panics
    /// Where `frame` is not of this index.
    #[must_use]
    pub fn extents_of(&self, frame: FrameId) -> &[u32] {
        let first = self.frame_extents[frame.0 as usize] as usize;
        let last = self.frame_extents[frame.0 as usize + 1] as usize;
        &self.by_frame[first..last]
    }
}
