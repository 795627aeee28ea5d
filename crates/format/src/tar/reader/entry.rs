//! Makes entries of headers and the records before them.

use std::{io::Read, mem};

use super::{Body, Metadata, Reader, padding_bytes};
use crate::{
    index::Timestamp,
    tar::{
        BLOCK_BYTES, Entry, EntryKind, Error,
        header::{self, Block, Dialect},
        pax::{self, Records},
        sparse::{self, Cursor, Map, Segment},
    },
};

impl<R: Read> Reader<R> {
    /// Makes an entry of its header and the metadata before it, and gets its content ready.
    pub(super) fn entry(
        &mut self,
        block: &Block,
        mut kind: EntryKind,
        header_size: u64,
        metadata: Metadata,
        offset: u64,
    ) -> Result<Entry, Error> {
        let corrupt = |part, problem| Error::Corrupt { offset, part, problem };
        self.entries += 1;
        if self.entries > self.limits.entries {
            return Err(Error::Limit { offset, part: "number of entries", limit: self.limits.entries as u64 });
        }
        let mut records = metadata.records.unwrap_or_else(|| self.globals.clone());
        let old_sparse = block[header::TYPE_FLAG] == b'S';
        let stored = records.size.unwrap_or(header_size);

        // GNU's long name overrules PAX' path, and the path of a sparse file both: as in Go.
        let path = metadata.long_path.or(records.path.take());
        let mut path = path.unwrap_or_else(|| header::path(block));
        let pax_sparse = mem::take(&mut records.sparse);
        let form = SparseForm::of(old_sparse, &pax_sparse).map_err(|problem| corrupt("records GNU.sparse", problem))?;
        if let (Some(_), Some(name)) = (&form, pax_sparse.name) {
            path = name;
        }

        // Before there was a type for directories, a slash at the end made one. GNU tar, libarchive and (for some type
        // flags) Go keep to that. With content, they would not agree what follows.
        if kind == EntryKind::Regular && path.ends_with(b"/") {
            if stored > 0 || form.is_some() {
                return Err(corrupt("size", "a directory (by the slash at its name's end) with content"));
            }
            kind = EntryKind::Directory;
        }

        let is_link = matches!(kind, EntryKind::HardLink | EntryKind::Symlink);
        let link = if is_link {
            let link = metadata.long_link.or(records.link.take());
            link.unwrap_or_else(|| header::text(&block[header::LINK]).to_vec())
        } else {
            Vec::new()
        };
        let is_device = matches!(kind, EntryKind::CharDevice | EntryKind::BlockDevice);
        let device = if is_device { device(block, &records, offset)? } else { (0, 0) };
        let named = header::dialect(block) != Dialect::V7;
        let name = |field| if named { header::text(&block[field]).to_vec() } else { Vec::new() };
        let user_name = records.user_name.take().unwrap_or_else(|| name(header::USER_NAME));
        let group_name = records.group_name.take().unwrap_or_else(|| name(header::GROUP_NAME));
        let limit = self.limits.path_bytes;
        for (part, bytes) in [
            ("bytes of the path", &path),
            ("bytes of the link", &link),
            ("bytes of the user name", &user_name),
            ("bytes of the group name", &group_name),
        ] {
            if bytes.len() > limit {
                return Err(Error::Limit { offset, part, limit: limit as u64 });
            }
        }

        if let Some(raw) = &mut self.raw {
            raw.set_header(block, offset)?;
        }
        let mut entry = Entry {
            path,
            kind,
            link,
            size: 0,
            permissions: permissions(number(&block[header::MODE], offset, "mode")?),
            uid: id(records.uid, &block[header::UID], offset, "uid")?,
            gid: id(records.gid, &block[header::GID], offset, "gid")?,
            user_name,
            group_name,
            mtime: match records.mtime {
                Some(mtime) => mtime,
                None => Timestamp { seconds: number(&block[header::MTIME], offset, "mtime")?, nanoseconds: 0 },
            },
            device,
            xattrs: records.into_xattrs(),
            sparse: form.is_some(),
            header_offset: offset,
            content_offset: None,
        };
        match (kind, form) {
            (EntryKind::Regular, None) => {
                self.body = self.body_of(stored, offset)?;
                entry.size = stored;
                entry.content_offset = Some(self.position);
            }
            (EntryKind::Regular, Some(form)) => {
                self.body = self.sparse_body(form, block, stored, offset, metadata.budget)?;
                entry.size = self.body.sparse.as_ref().map_or(0, Cursor::size);
            }
            (_, Some(_)) => return Err(corrupt("records GNU.sparse", "not a regular file")),
            (EntryKind::HardLink, None) => self.link_body = stored,
            // Whatever size the header of a directory, link or device says: none has content. As in Go.
            _ => {}
        }
        Ok(entry)
    }

    fn body_of(&self, stored: u64, offset: u64) -> Result<Body, Error> {
        self.check_size(stored, offset)?;
        Ok(Body { stored, padding: padding_bytes(stored), sparse: None })
    }

    fn check_size(&self, size: u64, offset: u64) -> Result<(), Error> {
        let limit = self.limits.file_bytes;
        if size > limit { Err(Error::Limit { offset, part: "bytes of content", limit }) } else { Ok(()) }
    }

    fn sparse_body(
        &mut self,
        form: SparseForm,
        block: &Block,
        mut stored: u64,
        offset: u64,
        mut budget: u64,
    ) -> Result<Body, Error> {
        let corrupt = |problem| Error::Corrupt { offset, part: "sparse map", problem };
        let padding = padding_bytes(stored);
        let (segments, size) = match form {
            SparseForm::Old => {
                let (mut segments, size, mut more) = sparse::old_header(block).map_err(corrupt)?;
                while more {
                    let block = self.read_map_block(offset, &mut budget)?;
                    more = sparse::old_extension(&block, &mut segments).map_err(corrupt)?;
                }
                (segments, size)
            }
            SparseForm::Records { segments, size } => (segments, size.unwrap_or(stored)),
            SparseForm::Content { size } => {
                let size = size.unwrap_or(stored);
                let mut lines = sparse::LineParser::default();
                let mut complete = false;
                while !complete {
                    stored = stored.checked_sub(BLOCK_BYTES as u64).ok_or_else(|| corrupt("does not end"))?;
                    let block = self.read_map_block(offset, &mut budget)?;
                    complete = lines.push(&block).map_err(corrupt)?;
                }
                (lines.into_segments(), size)
            }
        };
        self.check_size(size, offset)?;
        let map = Map::new(segments, size).map_err(corrupt)?;
        if map.stored() != stored {
            return Err(corrupt("does not fit the size of the content"));
        }
        Ok(Body { stored, padding, sparse: Some(Cursor::new(map)) })
    }
}

/// Where the map of a sparse file is.
enum SparseForm {
    /// In the header and the blocks behind it.
    Old,
    /// In the records before it. The size is the file's, if it was said.
    Records { segments: Vec<Segment>, size: Option<u64> },
    /// In front of the content.
    Content { size: Option<u64> },
}

impl SparseForm {
    fn of(old: bool, records: &pax::Sparse) -> Result<Option<Self>, &'static str> {
        let size = records.size.or(records.real_size);
        match (records.major, records.minor) {
            (None, None) | (Some(0), Some(0 | 1)) => match &records.map {
                Some(_) if old => Err("two sparse maps"),
                Some(segments) => Ok(Some(Self::Records { segments: segments.clone(), size })),
                None if records.major.is_some() => Err("no sparse map"),
                None => Ok(old.then_some(Self::Old)),
            },
            (Some(1), Some(0)) if old => Err("two sparse maps"),
            (Some(1), Some(0)) => Ok(Some(Self::Content { size })),
            _ => Err("unknown version of the sparse format"),
        }
    }
}

pub(super) fn kind(type_flag: u8, offset: u64) -> Result<EntryKind, Error> {
    let problem = match type_flag {
        b'0' | 0 | b'7' | b'S' => return Ok(EntryKind::Regular),
        b'1' => return Ok(EntryKind::HardLink),
        b'2' => return Ok(EntryKind::Symlink),
        b'3' => return Ok(EntryKind::CharDevice),
        b'4' => return Ok(EntryKind::BlockDevice),
        b'5' => return Ok(EntryKind::Directory),
        b'6' => return Ok(EntryKind::Fifo),
        b'V' => "a volume label",
        b'M' => "the rest of a file that began in another volume",
        b'D' => "a directory of an incremental backup",
        b'N' => "a list of long names as GNU tar wrote it before 1990",
        _ => "an unknown kind of entry",
    };
    Err(Error::Unsupported { offset, type_flag, problem })
}

pub(in crate::tar) fn number(field: &[u8], offset: u64, part: &'static str) -> Result<i64, Error> {
    let problem = "neither an octal nor a base-256 number in range";
    header::number(field).map_err(|_| Error::Corrupt { offset, part, problem })
}

/// Returns an owner or group as `chown` takes it: -2, which some systems write for "nobody", is 2^32 - 2.
fn id(record: Option<i64>, field: &[u8], offset: u64, part: &'static str) -> Result<u32, Error> {
    let id = match record {
        Some(id) => id,
        None => number(field, offset, part)?,
    };
    let wrapped = u32::try_from(id).ok().or_else(|| i32::try_from(id).ok().map(i32::cast_unsigned));
    wrapped.ok_or(Error::Corrupt { offset, part, problem: "beyond 32 bits" })
}

fn permissions(mode: i64) -> u16 {
    // The rest of a mode is the file's type, which the type flag says.
    u16::try_from(mode & 0o7777).unwrap_or_default()
}

fn device(block: &Block, records: &Records, offset: u64) -> Result<(u32, u32), Error> {
    let field = |record: Option<u32>, field, part| match record {
        Some(number) => Ok(number),
        None if header::dialect(block) == Dialect::V7 => Ok(0),
        None => u32::try_from(number(field, offset, part)?).map_err(|_| Error::Corrupt {
            offset,
            part,
            problem: "beyond 32 bits",
        }),
    };
    let major = field(records.device_major, &block[header::DEVICE_MAJOR], "device major number")?;
    let minor = field(records.device_minor, &block[header::DEVICE_MINOR], "device minor number")?;
    Ok((major, minor))
}
