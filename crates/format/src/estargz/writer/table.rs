//! The table of contents, grown while the blob is written.
//!
//! Entries and chunks are told in the order of the blob; the JSON text comes out in pieces, so that it can go to a file.
//! Memory: the text that was not taken yet, the names of owners, and 40 bytes for each chunk of the file that is being
//! written.

use std::{borrow::Cow, collections::HashMap};

use super::Error;
use crate::{
    digest::{Digest, Hasher},
    estargz::toc::{Entry, EntryType, TocWriter},
    position::BlobOffset,
    tar,
};

/// Collects the table of contents.
pub struct Table {
    text: TocWriter,
    chunk_bytes: u64,
    most: usize,
    entries: usize,
    user_names: HashMap<u32, Vec<u8>>,
    group_names: HashMap<u32, Vec<u8>>,
    file: Option<OpenFile>,
}

/// A file whose content has not passed wholly.
struct OpenFile {
    entry: Entry<'static>,
    done: u64,
    /// Of the whole content; where that is one chunk, its digest is the chunk's.
    hasher: Option<Hasher>,
    chunks: Vec<(BlobOffset, u64, Digest)>,
}

impl Table {
    /// Starts a table for content that is cut into chunks of `chunk_bytes`. It may have `most` entries, chunks included.
    #[must_use]
    pub fn new(chunk_bytes: u64, most: usize) -> Self {
        Self {
            text: TocWriter::new(),
            chunk_bytes: chunk_bytes.max(1),
            most,
            entries: 0,
            user_names: HashMap::new(),
            group_names: HashMap::new(),
            file: None,
        }
    }

    /// Takes the next entry of the new tar. The chunks of a file that is not empty must follow.
    ///
    /// # Errors
    /// [`Error::TooManyEntries`].
    pub fn entry(&mut self, entry: &tar::Entry) -> Result<(), Error> {
        let regular = entry.kind == tar::EntryKind::Regular;
        let row = Entry {
            name: Cow::Owned(entry.path.clone()),
            entry_type: entry_type(entry.kind),
            size: if regular { entry.size } else { 0 },
            modtime: entry.mtime,
            link_name: Cow::Owned(entry.link.clone()),
            mode: i64::from(entry.permissions),
            uid: i64::from(entry.uid),
            gid: i64::from(entry.gid),
            user_name: Cow::Owned(if_changed(&mut self.user_names, entry.uid, &entry.user_name)),
            group_name: Cow::Owned(if_changed(&mut self.group_names, entry.gid, &entry.group_name)),
            dev_major: i64::from(entry.device.0),
            dev_minor: i64::from(entry.device.1),
            xattrs: entry
                .xattrs
                .iter()
                .map(|(name, value)| (Cow::Owned(name.to_vec()), Cow::Owned(value.to_vec())))
                .collect(),
            digest: (regular && entry.size == 0).then(|| Digest::sha256_of(b"")),
            ..Entry::default()
        };
        if regular && entry.size > 0 {
            let hasher = (entry.size > self.chunk_bytes).then(Hasher::sha256);
            self.file = Some(OpenFile { entry: row, done: 0, hasher, chunks: Vec::new() });
            return self.count();
        }
        self.text.push(&row);
        self.count()
    }

    /// Takes the next chunk of the file before: where its member begins, where in the member it does, its digest, its bytes.
    ///
    /// # Errors
    /// [`Error::TooManyEntries`]; [`Error::StrayChunk`] where no file waits for one.
    pub fn chunk(&mut self, offset: BlobOffset, inner: u64, digest: Digest, content: &[u8]) -> Result<(), Error> {
        let length = content.len() as u64;
        let stray = Error::StrayChunk { offset: offset.0, length };
        let Some(file) = &mut self.file else { return Err(stray) };
        if length != self.chunk_bytes.min(file.entry.size - file.done) {
            return Err(stray);
        }
        if let Some(hasher) = &mut file.hasher {
            hasher.update(content);
        }
        let further = !file.chunks.is_empty();
        file.chunks.push((offset, inner, digest));
        file.done += length;
        if file.done == file.entry.size {
            self.close_file();
        }
        if further { self.count() } else { Ok(()) }
    }

    fn close_file(&mut self) {
        let Some(OpenFile { mut entry, hasher, chunks, .. }) = self.file.take() else { return };
        let size = entry.size;
        entry.digest = match hasher {
            Some(hasher) => Some(hasher.finish()),
            None => chunks.first().map(|(_, _, digest)| *digest),
        };
        let mut begin = 0;
        for (offset, inner, digest) in chunks {
            entry.offset = offset.0;
            entry.inner_offset = inner;
            entry.chunk_offset = begin;
            // A chunk that is cut short by the end of the file does not tell its size; one that is full always does.
            entry.chunk_size = if size - begin < self.chunk_bytes { 0 } else { self.chunk_bytes };
            entry.chunk_digest = Some(digest);
            self.text.push(&entry);
            begin += self.chunk_bytes;
            if entry.entry_type == EntryType::Regular {
                entry = Entry { name: entry.name, entry_type: EntryType::Chunk, ..Entry::default() };
            }
        }
    }

    fn count(&mut self) -> Result<(), Error> {
        self.entries += 1;
        if self.entries > self.most { Err(Error::TooManyEntries { limit: self.most }) } else { Ok(()) }
    }

    /// Returns the JSON text since the last call.
    #[must_use]
    pub fn take(&mut self) -> Vec<u8> {
        self.text.take()
    }

    /// Returns the rest of the JSON text.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        self.text.finish()
    }
}

fn entry_type(kind: tar::EntryKind) -> EntryType {
    match kind {
        tar::EntryKind::Regular => EntryType::Regular,
        tar::EntryKind::HardLink => EntryType::HardLink,
        tar::EntryKind::Symlink => EntryType::Symlink,
        tar::EntryKind::CharDevice => EntryType::CharDevice,
        tar::EntryKind::BlockDevice => EntryType::BlockDevice,
        tar::EntryKind::Directory => EntryType::Directory,
        tar::EntryKind::Fifo => EntryType::Fifo,
    }
}

/// Names are written only where they are not what the reader remembers for that number.
fn if_changed(names: &mut HashMap<u32, Vec<u8>>, id: u32, name: &[u8]) -> Vec<u8> {
    if name.is_empty() || names.get(&id).is_some_and(|known| known == name) {
        return Vec::new();
    }
    names.insert(id, name.to_vec());
    name.to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, size: u64) -> tar::Entry {
        tar::Entry { path: name.into(), size, ..tar::Entry::default() }
    }

    fn values<'a>(text: &'a str, key: &str) -> Vec<&'a str> {
        let key = format!("\"{key}\": ");
        text.lines()
            .filter_map(|line| line.trim().strip_prefix(&key))
            .map(|value| value.trim_end_matches(',').trim_matches('"'))
            .collect()
    }

    #[test]
    fn only_full_chunks_tell_their_size() {
        for (size, offsets, sizes) in [
            (3_usize, vec![], vec![]),
            (4, vec![], vec!["4"]),
            (5, vec!["4"], vec!["4"]),
            (8, vec!["4"], vec!["4", "4"]),
            (9, vec!["4", "8"], vec!["4", "4"]),
        ] {
            let content = &b"abcdefghi"[..size];
            let mut table = Table::new(4, 10);
            table.entry(&file("f", size as u64)).unwrap();
            for (place, chunk) in content.chunks(4).enumerate() {
                table.chunk(BlobOffset(100 + place as u64), 0, Digest::sha256_of(chunk), chunk).unwrap();
            }
            let text = String::from_utf8(table.finish()).unwrap();
            assert_eq!(values(&text, "chunkOffset"), offsets, "{size}: {text}");
            assert_eq!(values(&text, "chunkSize"), sizes, "{size}: {text}");
            assert_eq!(values(&text, "digest"), [Digest::sha256_of(content).to_string()]);
            let types = values(&text, "type");
            assert_eq!(types.len(), size.div_ceil(4));
            assert_eq!(types[0], "reg");
            assert!(types[1..].iter().all(|kind| *kind == "chunk"));
            assert_eq!(values(&text, "offset")[0], "100");
        }
    }

    #[test]
    fn owners_are_named_when_they_change() {
        let mut table = Table::new(4, 10);
        for (uid, name) in [(1, "a"), (1, "a"), (2, "b"), (1, "a"), (1, "c"), (1, ""), (1, "c")] {
            table.entry(&tar::Entry { uid, user_name: name.into(), ..file("f", 0) }).unwrap();
        }
        let text = String::from_utf8(table.finish()).unwrap();
        assert_eq!(values(&text, "userName"), ["a", "b", "c"]);
    }

    #[test]
    fn bounds_and_stray_chunks() {
        let digest = Digest::sha256_of(b"abcd");
        let mut table = Table::new(4, 2);
        assert!(matches!(table.chunk(BlobOffset(0), 0, digest, b"abcd"), Err(Error::StrayChunk { .. })));
        table.entry(&file("f", 9)).unwrap();
        table.chunk(BlobOffset(0), 0, digest, b"abcd").unwrap();
        assert!(matches!(table.chunk(BlobOffset(0), 0, digest, b"ab"), Err(Error::StrayChunk { .. })));
        table.chunk(BlobOffset(0), 0, digest, b"abcd").unwrap();
        assert!(matches!(table.chunk(BlobOffset(0), 0, digest, b"a"), Err(Error::TooManyEntries { limit: 2 })));
    }
}
