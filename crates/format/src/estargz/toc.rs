//! The table of contents: the JSON document that an eStargz layer ends with.
//!
//! Format: `docs/estargz.md` of containerd/stargz-snapshotter, section "TOC, TOCEntries and Footer". The one writer in
//! the field is Go's `encoding/json` with `MarshalIndent(toc, "", "\t")`; [`TocWriter`] writes what it would write, byte
//! for byte, and [`read()`] takes what its reader takes: unknown keys are passed over, the last of several equal keys
//! counts, `null` is as good as absent, and text that is not UTF-8 becomes U+FFFD.
//!
//! Two extensions, both ignored by other readers:
//! - `nameBytes` and `linkNameBytes`, base64, where a name is not UTF-8 (JSON can't hold it). `name` then has U+FFFD for
//!   every byte that is not UTF-8, which is what Go writes, and a reader checks that the two agree.
//! - a fraction in `modtime`, which RFC 3339 allows. Times are never rounded.

use std::borrow::Cow;

use crate::{digest::Digest, index::Timestamp};

mod json;
pub mod read;
pub mod time;
pub mod write;

pub use read::{TocError, read};
pub use write::TocWriter;

/// The name of the tar entry that holds the table of contents.
pub const TOC_NAME: &str = "stargz.index.json";

/// The name of the file, at the root, behind the last file that is worth prefetching.
pub const PREFETCH_LANDMARK: &str = ".prefetch.landmark";

/// The name of the file, at the root, that says that nothing is worth prefetching.
pub const NO_PREFETCH_LANDMARK: &str = ".no.prefetch.landmark";

/// The content of both landmarks.
pub const LANDMARK_CONTENT: &[u8] = &[0x0f];

/// The annotation of a layer's descriptor that vouches for the table of contents: the digest of its uncompressed JSON.
pub const TOC_DIGEST_ANNOTATION: &str = "containerd.io/snapshot/stargz/toc.digest";

/// The annotation of a layer's descriptor with the size of the uncompressed tar, which Podman needs.
pub const UNCOMPRESSED_SIZE_ANNOTATION: &str = "io.containers.estargz.uncompressed-size";

/// One entry of the table of contents: a tar entry, or a chunk of a file after its first.
///
/// Fields stand in the order in which they are written. Zero, empty and `None` are not written. Numbers that Go has as
/// `int` are as wide as there: what a file system can hold is checked when the index is built.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Entry<'a> {
    /// The path, as the tar has it: any bytes.
    pub name: Cow<'a, [u8]>,
    /// What it is.
    pub entry_type: EntryType,
    /// Regular files: uncompressed bytes of the whole content.
    pub size: u64,
    /// Modification time; 1970-01-01T00:00:00Z is not written.
    pub modtime: Timestamp,
    /// Symbolic and hard links: where they lead, any bytes.
    pub link_name: Cow<'a, [u8]>,
    /// Permissions and set-uid, set-gid, sticky bit; other bits of the tar's field are carried along.
    pub mode: i64,
    /// Owner.
    pub uid: i64,
    /// Group.
    pub gid: i64,
    /// Owner's name; only on the first entry with this `uid` and name.
    pub user_name: Cow<'a, [u8]>,
    /// Group's name; only on the first entry with this `gid` and name.
    pub group_name: Cow<'a, [u8]>,
    /// Content of a file that is not empty, or a chunk: where the gzip member that holds it starts in the blob.
    pub offset: u64,
    /// Where the content starts in the decompressed member. Written by `--estargz-min-chunk-size` only.
    pub inner_offset: u64,
    /// Devices: major number.
    pub dev_major: i64,
    /// Devices: minor number.
    pub dev_minor: i64,
    /// Extended attributes. Written in the order of their names; of equal names the last counts. A name that is not
    /// UTF-8 is written with U+FFFD.
    pub xattrs: EntryXattrs<'a>,
    /// Regular files: digest of the whole content.
    pub digest: Option<Digest>,
    /// Where the chunk begins in the file, in uncompressed bytes.
    pub chunk_offset: u64,
    /// Uncompressed bytes of the chunk. 0 is written for a chunk that is shorter than the chunk size, which is one that
    /// goes to the end of the file.
    pub chunk_size: u64,
    /// Digest of the chunk's uncompressed bytes.
    pub chunk_digest: Option<Digest>,
    /// Zstd:chunked: whether the chunk is a hole.
    pub hole: bool,
    /// Zstd:chunked: where the frames with the content of the file end in the blob.
    pub end_offset: u64,
    /// Zstd:chunked: access time.
    pub accessed: Option<Timestamp>,
    /// Zstd:chunked: change time.
    pub changed: Option<Timestamp>,
}

/// Extended attributes of an entry: names and values.
pub type EntryXattrs<'a> = Vec<(Cow<'a, [u8]>, Cow<'a, [u8]>)>;

/// The `type` of an entry.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum EntryType {
    /// `dir`
    Directory,
    /// `reg`
    #[default]
    Regular,
    /// `symlink`
    Symlink,
    /// `hardlink`
    HardLink,
    /// `char`
    CharDevice,
    /// `block`
    BlockDevice,
    /// `fifo`
    Fifo,
    /// `chunk`: a further chunk of the regular file before it.
    Chunk,
}

impl EntryType {
    /// Returns the text that stands in the JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Directory => "dir",
            Self::Regular => "reg",
            Self::Symlink => "symlink",
            Self::HardLink => "hardlink",
            Self::CharDevice => "char",
            Self::BlockDevice => "block",
            Self::Fifo => "fifo",
            Self::Chunk => "chunk",
        }
    }

    fn from_bytes(text: &[u8]) -> Option<Self> {
        Some(match text {
            b"dir" => Self::Directory,
            b"reg" => Self::Regular,
            b"symlink" => Self::Symlink,
            b"hardlink" => Self::HardLink,
            b"char" => Self::CharDevice,
            b"block" => Self::BlockDevice,
            b"fifo" => Self::Fifo,
            b"chunk" => Self::Chunk,
            _ => return None,
        })
    }
}

/// Returns `bytes` as Go's encoder and decoder leave them in a JSON string: every byte that is not part of well-formed
/// UTF-8 becomes one U+FFFD.
#[must_use]
pub fn to_utf8(bytes: &[u8]) -> Cow<'_, str> {
    if let Ok(text) = std::str::from_utf8(bytes) {
        return Cow::Borrowed(text);
    }
    let mut text = String::with_capacity(bytes.len() + 16);
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        text.extend(chunk.invalid().iter().map(|_| char::REPLACEMENT_CHARACTER));
    }
    Cow::Owned(text)
}
/// Says whether a time in a table of contents is that of an entry of the tar. The reference rounds times to the nearest
/// second, and writes nothing for the first second of 1970.
#[must_use]
pub fn is_same_time(tar: Timestamp, toc: Timestamp) -> bool {
    let rounded = tar.seconds.saturating_add(i64::from(tar.nanoseconds >= 500_000_000));
    tar == toc || (toc.nanoseconds == 0 && (toc.seconds == rounded || toc.seconds == tar.seconds))
}
