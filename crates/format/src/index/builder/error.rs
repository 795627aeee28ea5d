//! What can be wrong with an entry.

use crate::{
    position::{BlobOffset, FileOffset},
    tar::path::InvalidPath,
};

/// An entry that makes the layer unsound.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("entry {entry} (\"{name}\"): {problem}")]
pub struct IndexError {
    /// The entry's number in the table of contents, from 0.
    pub entry: u64,
    /// Its name, escaped, cut to a length that can be shown.
    pub name: String,
    /// What is wrong.
    pub problem: Problem,
}

impl IndexError {
    pub(crate) fn new(entry: u64, name: &[u8], problem: Problem) -> Self {
        Self { entry, name: shown(name), problem }
    }
}

/// What is wrong with an entry.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// The name is no path inside an image.
    #[error(transparent)]
    Path(#[from] InvalidPath),
    /// The root must be a directory.
    #[error("the root of the layer is not a directory")]
    RootNotDirectory,
    /// Something else than a directory stands where a parent is needed.
    #[error("\"{at}\" on the way to it is not a directory")]
    ParentNotDirectory {
        /// The component in question.
        at: String,
    },
    /// Symbolic links on the way lead to ever more of them.
    #[error("too many symbolic links on the way to it, at \"{at}\"")]
    TooManySymlinks {
        /// The component in question.
        at: String,
    },
    /// A component that comes from a symbolic link is too long.
    #[error("name of a directory on the way to it is longer than {limit} bytes")]
    NameTooLong {
        /// The bound.
        limit: usize,
    },
    /// Deeper than [`crate::limits::Limits::depth`].
    #[error("it lies deeper than {limit} directories")]
    TooDeep {
        /// The bound.
        limit: usize,
    },
    /// More entries, chunks or implied directories than [`crate::limits::Limits::entries`].
    #[error("the layer has more than {limit} entries")]
    TooManyEntries {
        /// The bound.
        limit: usize,
    },
    /// A link's target that no system call can set.
    #[error("link target \"{target}\" is empty or holds a NUL byte")]
    Target {
        /// The target, escaped.
        target: String,
    },
    /// A link's target beyond [`crate::limits::Limits::path_bytes`].
    #[error("link target is longer than {limit} bytes")]
    TargetTooLong {
        /// The bound.
        limit: usize,
    },
    /// A hard link to nothing.
    #[error("hard link to \"{target}\", which is not in the layer")]
    LinkToNothing {
        /// The target, escaped.
        target: String,
    },
    /// A hard link to a directory.
    #[error("hard link to \"{target}\", which is a directory")]
    LinkToDirectory {
        /// The target, escaped.
        target: String,
    },
    /// A hard link that leads back to itself.
    #[error("hard link to \"{target}\", which leads back to itself")]
    LinkCycle {
        /// The target, escaped.
        target: String,
    },
    /// An extended attribute that Linux has not.
    #[error("extended attribute \"{name}\" has a name that is empty, too long or holds a NUL byte")]
    XattrName {
        /// The attribute, escaped.
        name: String,
    },
    /// Attributes beyond [`crate::limits::Limits::xattr_bytes`].
    #[error("extended attributes have more than {limit} bytes")]
    XattrsTooLarge {
        /// The bound.
        limit: usize,
    },
    /// A device number that Linux has not.
    #[error("device number {major}:{minor} is beyond 4095:1048575")]
    Device {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A fraction of a second of a second or more.
    #[error("modification time has {nanoseconds} nanoseconds")]
    Nanoseconds {
        /// The fraction.
        nanoseconds: u32,
    },
    /// A number that a file system can't hold.
    #[error("{field} {value} is out of range")]
    OutOfRange {
        /// The field of the format.
        field: &'static str,
        /// Its value.
        value: i64,
    },
    /// Larger than [`crate::limits::Limits::file_bytes`].
    #[error("size of {size} bytes is beyond the limit of {limit} bytes")]
    FileTooLarge {
        /// The size.
        size: u64,
        /// The bound.
        limit: u64,
    },
    /// All files together are larger than a file can be.
    #[error("content of all files before it is larger than a file can be")]
    DataTooLarge,
    /// A chunk that follows no regular file.
    #[error("chunk does not belong to a regular file")]
    ChunkWithoutFile,
    /// A chunk that says it is of another file.
    #[error("chunk says that it is of \"{file}\"")]
    ChunkOfOtherFile {
        /// The other file, escaped.
        file: String,
    },
    /// A gap or an overlap between chunks.
    #[error("chunk begins at {found} of the file instead of {expected}")]
    ChunkOutOfPlace {
        /// Where the chunk before it ends.
        expected: FileOffset,
        /// Where it begins.
        found: FileOffset,
    },
    /// A chunk of no bytes, or of more than the file has left.
    #[error("chunk at {at} of the file has {length} bytes, the file has {left} left")]
    ChunkLength {
        /// Where it begins.
        at: FileOffset,
        /// Its size in uncompressed bytes.
        length: u64,
        /// Bytes of the file from there on.
        left: u64,
    },
    /// Chunks that end before the file does.
    #[error("chunks have {covered} of the file's {size} bytes")]
    ContentMissing {
        /// Bytes that chunks have.
        covered: u64,
        /// Bytes that the file has.
        size: u64,
    },
    /// A chunk that nothing vouches for.
    #[error("chunk at {at} of the file has no digest")]
    NoDigest {
        /// Where it begins.
        at: FileOffset,
    },
    /// Content that does not lie in the blob, before its table of contents.
    #[error("content at {offset} of the blob lies behind the end of content at {end}")]
    OutsideBlob {
        /// Where the content should start.
        offset: BlobOffset,
        /// Where content ends.
        end: BlobOffset,
    },
    /// More than [`crate::limits::Limits::frame_bytes`].
    #[error("frame at {offset} of the blob has more than {limit} bytes when decoded")]
    FrameTooLarge {
        /// Where it starts.
        offset: BlobOffset,
        /// The bound.
        limit: u64,
    },
    /// More bytes than its compression could make of it.
    #[error("frame at {offset} of the blob cannot hold {decoded} bytes in {compressed}")]
    FrameTooDense {
        /// Where it starts.
        offset: BlobOffset,
        /// Its compressed bytes.
        compressed: u64,
        /// The decoded bytes that it should hold.
        decoded: u64,
    },
    /// Two chunks that lie over each other.
    #[error("its content overlaps with that of another entry in the frame at {offset} of the blob")]
    Overlap {
        /// Where the frame starts.
        offset: BlobOffset,
    },
}

/// Escapes a hostile name and cuts it to a length that can be shown.
pub(crate) fn shown(name: &[u8]) -> String {
    const SHOWN_BYTES: usize = 160;
    let cut = if name.len() > SHOWN_BYTES { "..." } else { "" };
    format!("{}{cut}", name[..name.len().min(SHOWN_BYTES)].escape_ascii())
}
