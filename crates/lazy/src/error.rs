//! Why bytes of a layer could not be had.

use std::{io, path::PathBuf, sync::Arc};

use loris_format::{
    digest::Digest,
    index::{LayerIndex, NodeId},
    position::{BlobRange, FileOffset},
};

/// Why a range of a layer could not be filled. Cloned for everybody who waited for the same frame.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EnsureError {
    /// The source did not give the bytes. It has tried again itself before it said so; a later read tries once more.
    #[error("layer {layer}: bytes {range} could not be fetched: {source}")]
    Fetch {
        /// The compressed blob.
        layer: Digest,
        /// What was asked for, in compressed bytes.
        range: BlobRange,
        /// The source's own error.
        source: Arc<loris_oci::Error>,
    },
    /// The source gave more or fewer bytes than were asked for.
    #[error("layer {layer}: asked for bytes {range} and got {found} of them")]
    WrongLength {
        /// The compressed blob.
        layer: Digest,
        /// What was asked for, in compressed bytes.
        range: BlobRange,
        /// How many came.
        found: u64,
    },
    /// A frame does not decode: the blob is corrupt, or not the one that the index describes.
    #[error("layer {layer}: {path} at offset {offset}: the frame at blob bytes {range} does not decode: {detail}")]
    Decode {
        /// The compressed blob.
        layer: Digest,
        /// The file.
        path: String,
        /// The piece of the file that was wanted.
        offset: FileOffset,
        /// The frame, in compressed bytes.
        range: BlobRange,
        /// What the decoder says.
        detail: String,
    },
    /// Bytes that are not what the index vouches for.
    #[error("layer {layer}: {path} at offset {offset}: the {length} bytes there do not have the digest {expected}")]
    Mismatch {
        /// The compressed blob.
        layer: Digest,
        /// The file.
        path: String,
        /// The piece of the file.
        offset: FileOffset,
        /// Its length, in uncompressed bytes.
        length: u64,
        /// What it should hash to.
        expected: Digest,
    },
    /// A frame that is too large to be held in memory.
    #[error(
        "layer {layer}: {path}: the frame at blob bytes {range} needs {needed} bytes, more than the limit of {limit}"
    )]
    TooLarge {
        /// The compressed blob.
        layer: Digest,
        /// A file that the frame holds.
        path: String,
        /// The frame, in compressed bytes.
        range: BlobRange,
        /// Its size, compressed or decoded, whichever is larger.
        needed: u64,
        /// [`loris_format::limits::Limits::frame_bytes`].
        limit: u64,
    },
    /// The disk is full, or the quota is used up.
    #[error("layer {layer}: no space left for {}; free some there or choose another directory", path.display())]
    NoSpace {
        /// The compressed blob.
        layer: Digest,
        /// The data file.
        path: PathBuf,
    },
    /// The store's quota is used up by what is in use or pinned.
    #[error("layer {layer}: {source}")]
    Quota {
        /// The compressed blob.
        layer: Digest,
        /// [`StoreError::Quota`].
        source: Arc<StoreError>,
    },
    /// The data file or its bitmap could not be read or written.
    #[error("layer {layer}: {}: {source}", path.display())]
    File {
        /// The compressed blob.
        layer: Digest,
        /// The layer's directory in the store.
        path: PathBuf,
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// The layer is not what it claims to be, as was found out once it was whole.
    #[error("layer {layer} is not served any more: {reason}; pull the image anew from someone you trust")]
    Condemned {
        /// The compressed blob.
        layer: Digest,
        /// What is wrong with it.
        reason: String,
    },
    /// What the source has under the blob's digest is something else. Found out where a layer could not be proven.
    #[error(
        "layer {layer}: the blob that {place} has of that digest has the digest {found}; what was read of it so far was \
             verified piece by piece"
    )]
    AnotherBlob {
        /// The compressed blob.
        layer: Digest,
        /// Where it came from.
        place: String,
        /// The digest of what came.
        found: Digest,
    },
    /// The fetch was given up before it ended: the runtime it ran on is going away.
    #[error("layer {layer}: the fetch was interrupted")]
    Interrupted {
        /// The compressed blob.
        layer: Digest,
    },
}

impl EnsureError {
    /// Says whether the same range may be had later: the bytes are not known to be wrong.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Fetch { source, .. } => source.is_transient(),
            Self::NoSpace { .. } | Self::Interrupted { .. } | Self::WrongLength { .. } => true,
            Self::Decode { .. }
            | Self::Mismatch { .. }
            | Self::TooLarge { .. }
            | Self::File { .. }
            | Self::Quota { .. }
            | Self::AnotherBlob { .. }
            | Self::Condemned { .. } => false,
        }
    }

    /// Says whether there is no room for the bytes: trying others, or fetching more ahead, is of no use either.
    #[must_use]
    pub fn is_no_space(&self) -> bool {
        matches!(self, Self::NoSpace { .. } | Self::Quota { .. })
    }

    /// Says why there is no room for content.
    pub(crate) fn no_room(layer: Digest, error: StoreError) -> Self {
        match error {
            StoreError::File { path, source } => Self::file(layer, path, source),
            error => Self::Quota { layer, source: Arc::new(error) },
        }
    }

    pub(crate) fn file(layer: Digest, path: PathBuf, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace { layer, path },
            _ => Self::File { layer, path, source: Arc::new(source) },
        }
    }
}

/// Why a file of a layer could not be read.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// Its bytes could not be had.
    #[error(transparent)]
    Ensure(#[from] EnsureError),
    /// Only regular files have content.
    #[error("layer {layer}: {path} is not a regular file")]
    NotRegular {
        /// The compressed blob.
        layer: Digest,
        /// The node.
        path: String,
    },
    /// The data file loses bytes while it is read: someone else writes to the store.
    #[error("layer {layer}: {path}: the data file in {} does not keep what is written to it", store.display())]
    Unstable {
        /// The compressed blob.
        layer: Digest,
        /// The file.
        path: String,
        /// The layer's directory in the store.
        store: PathBuf,
    },
}

/// Why a layer is not lazy, or can't be opened as one.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayerError {
    /// The blob has no table of contents: it is of no lazy format.
    #[error("layer {layer} is not lazily readable: {reason}; convert the image with `loris convert`")]
    NotLazy {
        /// The compressed blob.
        layer: Digest,
        /// What was looked for, and what was found.
        reason: String,
    },
    /// Nothing in the manifest vouches for the table of contents.
    #[error(
        "layer {layer} has a table of contents, but its manifest lacks the annotation {annotation} that vouches for it; \
         convert the image again, or allow unverified layers"
    )]
    Unvouched {
        /// The compressed blob.
        layer: Digest,
        /// The annotation's key.
        annotation: &'static str,
    },
    /// The table of contents has no digests for content.
    #[error(
        "layer {layer}: {path} at offset {offset} has no digest to verify it with; allow unverified layers to read it"
    )]
    Undigested {
        /// The compressed blob.
        layer: Digest,
        /// The first file without.
        path: String,
        /// The piece of the file.
        offset: FileOffset,
    },
    /// The layer claims to be lazy, and is corrupt or hostile.
    #[error("layer {layer}: {detail}")]
    Corrupt {
        /// The compressed blob.
        layer: Digest,
        /// What is wrong, and where.
        detail: String,
    },
    /// The source did not give what is needed to open the layer.
    #[error("layer {layer}: bytes {range} could not be fetched: {source}")]
    Fetch {
        /// The compressed blob.
        layer: Digest,
        /// What was asked for, in compressed bytes.
        range: BlobRange,
        /// The source's own error.
        source: Arc<loris_oci::Error>,
    },
    /// The local store failed.
    #[error("layer {layer}: {source}")]
    Store {
        /// The compressed blob.
        layer: Digest,
        /// What failed.
        source: Arc<StoreError>,
    },
    /// The layer was found out, at an earlier time, not to be what it claims to be.
    #[error("layer {layer} is not served: {reason}; pull the image anew from someone you trust")]
    Condemned {
        /// The compressed blob.
        layer: Digest,
        /// What is wrong with it.
        reason: String,
    },
    /// Opening was given up before it ended: the runtime it ran on is going away.
    #[error("layer {layer}: opening it was interrupted")]
    Interrupted {
        /// The compressed blob.
        layer: Digest,
    },
}

/// Why an image could not be opened at all.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The document is no image manifest.
    #[error("{document} can't be opened as an image: {detail}")]
    NotAnImage {
        /// The document's digest.
        document: Digest,
        /// What it is instead, or what is wrong with it.
        detail: String,
    },
    /// A document could not be read.
    #[error("{document} could not be read: {source}")]
    Document {
        /// The digest of the configuration.
        document: Digest,
        /// The source's own error.
        source: loris_oci::Error,
    },
}

/// Why the local store can't be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A file or directory of the store.
    #[error("{}: {source}", path.display())]
    File {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The directory holds something else.
    #[error("{} is not empty and not a store of Loris; choose another directory", path.display())]
    NotAStore {
        /// The directory.
        path: PathBuf,
    },
    /// A newer Loris made it.
    #[error(
        "the store {} has the format {found:?}, and this version of Loris reads {expected:?}; use the newer one, or \
         another directory",
        path.display()
    )]
    Newer {
        /// The store's directory.
        path: PathBuf,
        /// The first line of its `version` file.
        found: String,
        /// What that line should be.
        expected: &'static str,
    },
    /// Others may write to it: what it holds is not to be trusted.
    #[error("the store {} can be written by others ({detail}); its owner must be you or root, alone", path.display())]
    Exposed {
        /// The store's directory.
        path: PathBuf,
        /// Owner or mode.
        detail: String,
    },
    /// There is no room within the quota, and nothing more that could be evicted.
    #[error(
        "the cache {} has a quota of {limit} bytes, of which {used} are taken by layers that are in use or pinned; \
         unmount images, unpin some (`loris cache ls`), or allow more (`--cache-quota`)",
        path.display()
    )]
    Quota {
        /// The store's directory.
        path: PathBuf,
        /// [`crate::StoreOptions::quota_bytes`].
        limit: u64,
        /// What is taken, in bytes, with what is reserved.
        used: u64,
    },
    /// A layer's table of contents is not in the store, so that nothing says what its content must be.
    #[error("{} has no table of contents that can be read; it can be checked when its image was opened again", path.display())]
    NoTableOfContents {
        /// The layer's directory.
        path: PathBuf,
    },
    /// A layer's files need to be made anew, and another process has them open.
    #[error("{} is damaged or of another version of Loris, and in use by another process; end that one first", path.display())]
    InUse {
        /// The layer's directory.
        path: PathBuf,
    },
}

impl StoreError {
    /// Says whether the disk is full or the quota used up.
    #[must_use]
    pub fn is_no_space(&self) -> bool {
        match self {
            Self::File { source, .. } => {
                matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
            }
            Self::Quota { .. } => true,
            _ => false,
        }
    }

    pub(crate) fn file(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { path, source }
    }
}

/// Returns a path that leads to a node, for messages. Walks the tree: only where something has gone wrong already.
pub(crate) fn path_of(index: &LayerIndex, node: NodeId) -> String {
    let mut parents: Vec<Option<(NodeId, &[u8])>> = vec![None; index.nodes().len()];
    for (number, directory) in (0..).zip(index.nodes()) {
        if let loris_format::index::NodeKind::Directory { children } = &directory.kind {
            for (name, child) in children {
                parents[child.0 as usize].get_or_insert((NodeId(number), name));
            }
        }
    }
    let mut names = Vec::new();
    let mut at = node;
    // An index is a tree, so that this ends; the bound only keeps a mistake there from becoming an endless loop here.
    while let Some((parent, name)) = parents[at.0 as usize].filter(|_| names.len() < parents.len()) {
        names.push(String::from_utf8_lossy(name));
        at = parent;
    }
    names.iter().rev().fold(String::new(), |path, name| path + "/" + name).escape_debug().to_string()
}
