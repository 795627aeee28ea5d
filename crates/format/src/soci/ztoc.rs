//! The ztoc: a layer's files and its spans, as a FlatBuffer.
//!
//! ```text
//! Ztoc: 0 version, 1 build tool, 2 compressed size, 3 uncompressed size, 4 TOC, 5 CompressionInfo
//! TOC: 0 [FileMetadata]
//! FileMetadata: 0 name, 1 type, 2 offset, 3 size, 4 link name, 5 mode, 6 uid, 7 gid, 8 uname, 9 gname, 10 time,
//!               11 devmajor, 12 devminor, 13 [Xattr: 0 key, 1 value], which are all PAX records
//! CompressionInfo: 0 algorithm (1 gzip, 2 none; 3 zstd, ours), 1 last span's number, 2 [digests of spans], 3 checkpoints
//! ```

use std::borrow::Cow;

use super::flat::{Builder, Table, TooLong, Unsound, Value, Vector, Written};
use crate::{digest::Digest, estargz::toc::time, index::Timestamp, limits::Limits, tar::EntryKind};

/// The version that is written, and the only one in the field.
pub const VERSION: &str = "0.9";

/// Why a ztoc can't be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ZtocError {
    /// Its offsets lead nowhere.
    #[error("the ztoc is damaged: {0}")]
    Unsound(Unsound),
    /// It lacks a part.
    #[error("the ztoc has no {part}")]
    Missing {
        /// What is missing.
        part: &'static str,
    },
    /// It is for a compression that is not known here.
    #[error(
        "the ztoc is for compression {algorithm}, which is neither gzip (1) nor none (2) nor, as Loris alone has it, zstd (3)"
    )]
    Algorithm {
        /// What it says.
        algorithm: i8,
    },
    /// A number is none that can be.
    #[error("the ztoc's {field} can't be {value}")]
    OutOfRange {
        /// Which.
        field: &'static str,
        /// What it says.
        value: i64,
    },
    /// The checkpoints are not as long as they say.
    #[error("the ztoc's checkpoints have {length} bytes, which is no whole number of them")]
    Zinfo {
        /// Their bytes.
        length: usize,
    },
    /// A checkpoint is none.
    #[error("the ztoc's checkpoint {number} is damaged, or does not lie behind the one before and within the layer")]
    Checkpoint {
        /// Which.
        number: usize,
    },
    /// A digest is none.
    #[error("the ztoc's digest of span {number} is no digest")]
    SpanDigest {
        /// Which.
        number: usize,
    },
    /// There are more or fewer digests than spans.
    #[error("the ztoc has {digests} digests for {spans} spans")]
    SpanCount {
        /// Digests.
        digests: usize,
        /// Spans.
        spans: usize,
    },
    /// A file's type is none.
    #[error("the ztoc's entry {number} is of an unknown type ({kind})")]
    Type {
        /// Which.
        number: u64,
        /// What it says.
        kind: String,
    },
    /// A file's time is none.
    #[error("the ztoc's entry {number} has no sound time")]
    Time {
        /// Which.
        number: u64,
    },
    /// It asks for more than is granted.
    #[error("the ztoc's {part} exceed the limit of {limit}")]
    Limit {
        /// What is too much.
        part: &'static str,
        /// The most that is allowed.
        limit: u64,
    },
}

/// How a layer is compressed, as a ztoc says it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Algorithm {
    /// Gzip.
    Gzip,
    /// Not at all.
    Uncompressed,
    /// Zstd, of several frames: an index for this machine alone, which the tools of SOCI don't know.
    Zstd,
}

impl Algorithm {
    const DEFAULT: i8 = 1;

    fn number(self) -> i8 {
        match self {
            Self::Gzip => 1,
            Self::Uncompressed => 2,
            Self::Zstd => 3,
        }
    }
}

/// A file of the layer: what a tar header says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct File<'a> {
    /// Its name, exactly as in the archive.
    pub name: Cow<'a, [u8]>,
    /// What it is.
    pub kind: EntryKind,
    /// Where its content begins in the tar, or would.
    pub offset: u64,
    /// Bytes of content.
    pub size: u64,
    /// Where a link leads.
    pub link: Cow<'a, [u8]>,
    /// Its mode, with whatever bits the archive has.
    pub mode: i64,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// The owner's name.
    pub user_name: Cow<'a, [u8]>,
    /// The group's name.
    pub group_name: Cow<'a, [u8]>,
    /// Modification time.
    pub mtime: Timestamp,
    /// Major and minor number of a device, or what stands in their place.
    pub device: (i64, i64),
    /// All PAX records, sorted by keyword.
    pub records: Vec<Record<'a>>,
}

/// A PAX record: keyword and value.
pub type Record<'a> = (Cow<'a, [u8]>, Cow<'a, [u8]>);

/// A ztoc that is read.
#[derive(Clone, Copy, Debug)]
pub struct Ztoc<'a> {
    /// Its version.
    pub version: &'a [u8],
    /// Who made it.
    pub build_tool: &'a [u8],
    /// Bytes of the layer's blob.
    pub compressed_size: u64,
    /// Bytes of its tar, as far as a reader of tar goes.
    pub uncompressed_size: u64,
    /// How it is compressed.
    pub algorithm: Algorithm,
    /// The number of the last span.
    pub max_span: i32,
    /// The checkpoints or what stands in their place, see [`super::zinfo`].
    pub checkpoints: &'a [u8],
    /// Where these stand in the ztoc.
    pub checkpoints_at: usize,
    files: Vector<'a>,
    digests: Vector<'a>,
    bytes: usize,
}

impl<'a> Ztoc<'a> {
    /// Reads a ztoc. Files and digests are read as they are asked for.
    ///
    /// # Errors
    /// Where it is damaged or lacks a part.
    pub fn read(bytes: &'a [u8], limits: &Limits) -> Result<Self, ZtocError> {
        let root = Table::root(bytes)?;
        let toc = root.table(4)?.ok_or(ZtocError::Missing { part: "table of files" })?;
        let info = root.table(5)?.ok_or(ZtocError::Missing { part: "spans" })?;
        let algorithm = match info.i8(0, Algorithm::DEFAULT)? {
            1 => Algorithm::Gzip,
            2 => Algorithm::Uncompressed,
            3 => Algorithm::Zstd,
            algorithm => return Err(ZtocError::Algorithm { algorithm }),
        };
        let files = toc.vector(0)?;
        if files.len() > limits.entries {
            return Err(ZtocError::Limit { part: "files", limit: limits.entries as u64 });
        }
        Ok(Self {
            version: root.bytes(0)?,
            build_tool: root.bytes(1)?,
            compressed_size: unsigned("compressed size", root.i64(2)?)?,
            uncompressed_size: unsigned("uncompressed size", root.i64(3)?)?,
            algorithm,
            max_span: info.i32(1, 0)?,
            checkpoints: info.bytes(3)?,
            checkpoints_at: info.bytes_at(3)?,
            files,
            digests: info.vector(2)?,
            bytes: bytes.len(),
        })
    }

    /// Returns how many files there are.
    #[must_use]
    pub fn file_count(&self) -> usize {
        self.files.len()
    }

    /// Returns all files, in the order of the tar.
    ///
    /// # Errors
    /// The items are errors where a file can't be read, or where all of them together have more text than the ztoc could
    /// hold if it had each only once.
    pub fn files(&self) -> impl Iterator<Item = Result<File<'a>, ZtocError>> + use<'a> {
        /// Names of owners may well stand there once for all files.
        const SHARED: usize = 4;
        let limit = self.bytes.saturating_mul(SHARED);
        let mut left = limit;
        self.files.tables().zip(0..).map(move |(table, number)| {
            let found = file(table?, number, &mut left)?;
            found.ok_or(ZtocError::Limit { part: "bytes of text", limit: limit as u64 })
        })
    }

    /// Returns how many spans have digests.
    #[must_use]
    pub fn digest_count(&self) -> usize {
        self.digests.len()
    }

    /// Returns the digests of the compressed bytes of all spans.
    ///
    /// # Errors
    /// The items are errors where one is none.
    pub fn digests(&self) -> impl Iterator<Item = Result<Digest, ZtocError>> + use<'a> {
        let digest = |(text, number): (Result<&'a [u8], Unsound>, usize)| {
            Digest::from_text(text?).map_err(|_| ZtocError::SpanDigest { number })
        };
        self.digests.strings().zip(0..).map(digest)
    }
}

fn unsigned(field: &'static str, value: i64) -> Result<u64, ZtocError> {
    u64::try_from(value).map_err(|_| ZtocError::OutOfRange { field, value })
}

const KINDS: [(EntryKind, &str); 7] = [
    (EntryKind::Regular, "reg"),
    (EntryKind::HardLink, "hardlink"),
    (EntryKind::Symlink, "symlink"),
    (EntryKind::Directory, "dir"),
    (EntryKind::CharDevice, "char"),
    (EntryKind::BlockDevice, "block"),
    (EntryKind::Fifo, "fifo"),
];

/// Reads a file, and takes its text and its records off what is `left`; `None` where that is not enough.
fn file<'a>(table: Table<'a>, number: u64, left: &mut usize) -> Result<Option<File<'a>>, ZtocError> {
    let text = |slot| table.bytes(slot).map(Cow::Borrowed);
    let kind = table.bytes(1)?;
    let known = KINDS.iter().find(|(_, name)| name.as_bytes() == kind);
    let shown = || kind.escape_ascii().take(40).map(char::from).collect();
    let records = table.vector(13)?;
    // Grows with what is there: all of them may be the same, and those of all files.
    let mut pairs = Vec::new();
    for record in records.tables() {
        let record = record?;
        let (key, value) = (record.bytes(0)?, record.bytes(1)?);
        let Some(rest) = left.checked_sub(key.len() + value.len() + RECORD_BYTES) else { return Ok(None) };
        *left = rest;
        pairs.push((Cow::Borrowed(key), Cow::Borrowed(value)));
        if pairs.len() > MOST_RECORDS {
            return Err(ZtocError::Limit { part: "PAX records of one file", limit: MOST_RECORDS as u64 });
        }
    }
    let mtime = table.bytes(10)?;
    // Go writes nothing for years of five digits.
    let mtime = if mtime.is_empty() { Some(Timestamp::default()) } else { time::parse(mtime) };
    let file = File {
        name: text(0)?,
        kind: known.map(|(kind, _)| *kind).ok_or_else(|| ZtocError::Type { number, kind: shown() })?,
        offset: unsigned("offset of a file", table.i64(2)?)?,
        size: unsigned("size of a file", table.i64(3)?)?,
        link: text(4)?,
        mode: table.i64(5)?,
        uid: table.u32(6)?,
        gid: table.u32(7)?,
        user_name: text(8)?,
        group_name: text(9)?,
        mtime: mtime.ok_or(ZtocError::Time { number })?,
        device: (table.i64(11)?, table.i64(12)?),
        records: pairs,
    };
    let text = file.name.len() + file.link.len() + file.user_name.len() + file.group_name.len();
    Ok(left.checked_sub(text).map(|rest| {
        *left = rest;
        file
    }))
}

/// Most PAX records of one file. Linux allows 64 KiB of names of extended attributes.
const MOST_RECORDS: usize = 64 << 10;
/// What a record without any text counts as. One that no other file has takes that much in the ztoc.
const RECORD_BYTES: usize = 16;

/// A ztoc that is written.
#[derive(Clone, Copy, Debug)]
pub struct NewZtoc<'a> {
    /// Who makes it.
    pub build_tool: &'a str,
    /// Bytes of the layer's blob.
    pub compressed_size: u64,
    /// Bytes of its tar.
    pub uncompressed_size: u64,
    /// How it is compressed.
    pub algorithm: Algorithm,
    /// Digests of the compressed bytes of all spans.
    pub digests: &'a [Digest],
    /// The checkpoints or what stands in their place.
    pub checkpoints: &'a [u8],
    /// All files.
    pub files: &'a [File<'a>],
}

impl NewZtoc<'_> {
    /// Writes it.
    ///
    /// # Errors
    /// Where it is longer than 2 GiB.
    pub fn write(&self) -> Result<Vec<u8>, TooLong> {
        let mut builder = Builder::default();
        let version = builder.string(VERSION.as_bytes());
        let build_tool = builder.string(self.build_tool.as_bytes());
        let mut files: Vec<Written> = self.files.iter().rev().map(|file| file.write(&mut builder)).collect();
        files.reverse();
        let files = builder.vector(&files);
        let toc = builder.table(&[(0, Value::Reference(files))]);
        let checkpoints = builder.bytes(self.checkpoints);
        let digests: Vec<Written> =
            self.digests.iter().map(|digest| builder.string(digest.to_string().as_bytes())).collect();
        let digests = builder.vector(&digests);
        let mut info = Vec::new();
        let max_span = i32::try_from(self.digests.len().saturating_sub(1)).unwrap_or(i32::MAX);
        info.extend((max_span != 0).then_some((1, Value::I32(max_span))));
        info.push((2, Value::Reference(digests)));
        info.push((3, Value::Reference(checkpoints)));
        let algorithm = self.algorithm.number();
        info.extend((algorithm != Algorithm::DEFAULT).then_some((0, Value::I8(algorithm))));
        let info = builder.table(&info);
        let mut root = vec![(0, Value::Reference(version)), (1, Value::Reference(build_tool))];
        root.push((4, Value::Reference(toc)));
        push_i64(&mut root, 2, signed(self.compressed_size));
        push_i64(&mut root, 3, signed(self.uncompressed_size));
        root.push((5, Value::Reference(info)));
        let root = builder.table(&root);
        builder.finish(root)
    }
}

impl File<'_> {
    fn write(&self, builder: &mut Builder) -> Written {
        let kind = KINDS.iter().find(|(kind, _)| *kind == self.kind).map_or("reg", |(_, name)| name);
        let name = builder.string(&self.name);
        let kind = builder.string(kind.as_bytes());
        let link = builder.string(&self.link);
        let user_name = builder.string(&self.user_name);
        let group_name = builder.string(&self.group_name);
        let mut mtime = Vec::new();
        if has_year(self.mtime) {
            time::write(self.mtime, &mut mtime);
        }
        let mtime = builder.string(&mtime);
        let record = |(key, value): &Record<'_>, builder: &mut Builder| {
            let (key, value) = (builder.string(key), builder.string(value));
            builder.table(&[(0, Value::Reference(key)), (1, Value::Reference(value))])
        };
        let records: Vec<Written> = self.records.iter().map(|pair| record(pair, builder)).collect();
        let records = builder.vector(&records);
        let mut fields = vec![(0, Value::Reference(name)), (1, Value::Reference(kind))];
        push_i64(&mut fields, 2, signed(self.offset));
        push_i64(&mut fields, 3, signed(self.size));
        fields.push((4, Value::Reference(link)));
        push_i64(&mut fields, 5, self.mode);
        fields.extend((self.uid != 0).then_some((6, Value::U32(self.uid))));
        fields.extend((self.gid != 0).then_some((7, Value::U32(self.gid))));
        fields
            .extend([(8, user_name), (9, group_name), (10, mtime)].map(|(slot, text)| (slot, Value::Reference(text))));
        push_i64(&mut fields, 11, self.device.0);
        push_i64(&mut fields, 12, self.device.1);
        fields.push((13, Value::Reference(records)));
        builder.table(&fields)
    }
}

fn push_i64(fields: &mut Vec<(usize, Value)>, slot: usize, value: i64) {
    fields.extend((value != 0).then_some((slot, Value::I64(value))));
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Says whether Go writes a time: one of the years 0 to 9999.
fn has_year(time: Timestamp) -> bool {
    (-62_167_219_200..253_402_300_800).contains(&time.seconds)
}
