//! Tar archives: every dialect read, two of them (USTAR and PAX) written.
//!
//! - [`Reader`] goes through an archive entry by entry, over any [`std::io::Read`].
//! - [`encode_header`] turns an [`Entry`] into the bytes that precede its content.
//! - [`path`] makes a path of an archive into one inside the image.
//!
//! ```
//! use loris_format::{limits::Limits, tar};
//!
//! let entry = tar::Entry { path: b"hello".to_vec(), size: 5, permissions: 0o644, ..tar::Entry::default() };
//! let mut archive = tar::encode_header(&entry)?;
//! archive.extend_from_slice(b"world");
//! archive.extend_from_slice(tar::padding(5));
//! archive.extend_from_slice(&tar::END_OF_ARCHIVE);
//!
//! let mut reader = tar::Reader::new(archive.as_slice(), &Limits::default());
//! let read = reader.next_entry()?.expect("one entry");
//! assert_eq!((read.path, read.size), (b"hello".to_vec(), 5));
//! assert_eq!(std::io::read_to_string(reader.content())?, "world");
//! assert!(reader.next_entry()?.is_none());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Sources of the rules: POSIX.1-2017 `pax` (sections "ustar Interchange Format" and "pax Header Block"), the GNU tar
//! manual (chapter "Tar Internals", with the sparse formats), the star(5) page for `SCHILY.*`. Where programs disagree
//! about the same bytes, an archive could show one tree to a scanner and another one to a container runtime. Such
//! places are decided as Go's `archive/tar` decides them, because that is what container runtimes unpack with, or are
//! refused; each is commented where it is decided.
//!
//! What this module must not know: compression, whiteouts, eStargz. A name is bytes here, never text.

use crate::index::{Timestamp, Xattrs};

mod header;
pub mod path;
mod pax;
mod raw;
mod raw_header;
mod reader;
mod sparse;
mod writer;

#[cfg(test)]
mod peer_tests;

pub(crate) use pax::attributes;
pub use raw::Raw;
pub use raw_header::RawHeader;
pub use reader::{Content, Reader};
pub use writer::{END_OF_ARCHIVE, InvalidEntry, encode_header, padding};

/// Headers and content of an archive come in blocks of so many bytes.
pub const BLOCK_BYTES: usize = 512;

/// One member of an archive: what all its headers say together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// Its name, exactly as in the archive; see [`path::clean`].
    pub path: Vec<u8>,
    /// What it is.
    pub kind: EntryKind,
    /// Where a link leads, exactly as in the archive: a path in the archive for hard links, any text for symbolic
    /// ones. Empty for all others.
    pub link: Vec<u8>,
    /// Bytes of content as a program would read them (holes included); 0 for all but regular files.
    pub size: u64,
    /// The low twelve bits of the mode.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// The owner's name, or nothing.
    pub user_name: Vec<u8>,
    /// The group's name, or nothing.
    pub group_name: Vec<u8>,
    /// Modification time.
    pub mtime: Timestamp,
    /// Major and minor number of a device; zeros for all others.
    pub device: (u32, u32),
    /// Extended attributes, sorted by name, each name once.
    pub xattrs: Xattrs,
    /// Whether the archive leaves out holes of the content. [`Content`] fills them in.
    pub sparse: bool,
    /// Where the entry's own header begins (not those of metadata before it), in the uncompressed archive.
    pub header_offset: u64,
    /// Where the content begins, in the uncompressed archive. `None` for all but regular files, and for sparse ones,
    /// whose content is not there in one piece.
    pub content_offset: Option<u64>,
}

/// What an entry is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum EntryKind {
    /// A regular file.
    #[default]
    Regular,
    /// Another name of an earlier (or, in a careless archive, later) entry's file.
    HardLink,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
}

/// Why an archive cannot be read. Offsets are bytes of the uncompressed archive.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The source of the archive failed. Whether a retry can help, `source` says.
    #[error("tar archive cannot be read at offset {offset}: {source}")]
    Read {
        /// Where the next byte would have been.
        offset: u64,
        /// What the source says.
        source: std::io::Error,
    },
    /// The archive ends where it must not.
    #[error("tar archive is cut off at offset {offset}, in {part}")]
    Truncated {
        /// Where the bytes end.
        offset: u64,
        /// What they end in.
        part: &'static str,
    },
    /// The archive breaks a rule of its format, or programs would disagree about what it says.
    #[error("tar entry at offset {offset} is corrupt: {part}: {problem}")]
    Corrupt {
        /// The header in question.
        offset: u64,
        /// The field or record.
        part: &'static str,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// An entry of a kind that a layer cannot hold.
    #[error("tar entry at offset {offset} is not supported: {problem} (type flag '{}')", .type_flag.escape_ascii())]
    Unsupported {
        /// Its header.
        offset: u64,
        /// Its type flag.
        type_flag: u8,
        /// What it is, as far as it is known.
        problem: &'static str,
    },
    /// The archive asks for more than [`crate::limits::Limits`] grants.
    #[error("tar entry at offset {offset}: {part} exceeds the limit of {limit}")]
    Limit {
        /// The header in question.
        offset: u64,
        /// What is too large, with its unit.
        part: &'static str,
        /// The most that is allowed.
        limit: u64,
    },
    /// The reader was asked to go on after an error.
    #[error("tar archive was given up at offset {offset} after an earlier error")]
    GivenUp {
        /// Where it stopped.
        offset: u64,
    },
}
