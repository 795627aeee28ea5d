//! One pass over a layer.

use std::{
    io::{self, Read},
    thread,
};

use loris_format::{
    compression,
    digest::{DiffId, Digest, Hasher},
    estargz::{
        footer::{FOOTER_BYTES, Kind, SKIPPABLE_HEAD_BYTES},
        toc::{
            Entry, EntryType, LANDMARK_CONTENT, NO_PREFETCH_LANDMARK, PREFETCH_LANDMARK, TOC_NAME,
            UNCOMPRESSED_SIZE_ANNOTATION, is_same_time,
        },
    },
    limits::Limits,
    tar::{self, EntryKind, path},
};

use super::{
    Findings,
    members::{Begins, Frames, Members, TarStream},
    table::Entries,
};
use crate::layer::{Error, Watch};

/// What is said about a layer.
pub(super) struct Claims {
    pub(super) diff_id: DiffId,
    pub(super) blob_bytes: u64,
    /// The text of the annotation.
    pub(super) uncompressed_bytes: Option<String>,
    /// `None` where the layer is of no lazy format.
    pub(super) table: Option<TableOfContents>,
    pub(super) limits: Limits,
}

/// A table of contents as footer or annotations led to it.
pub(super) struct TableOfContents {
    pub(super) json: Vec<u8>,
    pub(super) kind: Kind,
    /// Where its member or frame begins in the blob.
    pub(super) offset: u64,
    pub(super) digest: Digest,
}

/// Reads a layer and compares.
pub(super) fn check(input: impl Read, claims: &Claims, watch: &Watch, findings: &mut Findings) -> Result<(), Error> {
    let (bytes, digest) = match &claims.table {
        Some(table) => {
            let begins = Begins::default();
            if table.kind.is_zstd() {
                check_lazy(Frames::new(input, &begins), &begins, claims, table, watch, findings)?
            } else {
                check_lazy(Members::new(input, &begins), &begins, claims, table, watch, findings)?
            }
        }
        None => check_plain(input, claims, watch)?,
    };
    // A DiffID of another algorithm can't be compared; the blob's own digest was checked by the source.
    if claims.diff_id.0.algorithm() == digest.algorithm() && claims.diff_id.0 != digest {
        findings.error(format!("its tar has the DiffID {digest}, the configuration says {}", claims.diff_id.0));
    }
    match &claims.uncompressed_bytes {
        Some(text) if text.parse() != Ok(bytes) => findings
            .error(format!("annotation {UNCOMPRESSED_SIZE_ANNOTATION} says {text:?}, but the tar has {bytes} bytes")),
        // For zstd:chunked, Podman goes by the tar-split.
        None if claims.table.as_ref().is_some_and(|table| table.kind != Kind::ZstdChunkedContainers) => findings
            .warning(format!(
                "annotation {UNCOMPRESSED_SIZE_ANNOTATION} is missing: Podman can't use the layer lazily"
            )),
        _ => {}
    }
    Ok(())
}

/// A layer of any compression: it must be a tar.
fn check_plain(input: impl Read, claims: &Claims, watch: &Watch) -> Result<(u64, Digest), Error> {
    let decoder = compression::Decoder::new(input).map_err(|error| Error::Input(error.into()))?;
    let mut hashed = Hashed { inner: decoder, hasher: Hasher::sha256(), bytes: 0 };
    let mut archive = tar::Reader::new(&mut hashed, &claims.limits);
    while archive.next_entry()?.is_some() {
        watch.check()?;
    }
    drop(archive);
    io::copy(&mut hashed, &mut io::sink()).map_err(Error::Input)?;
    Ok((hashed.bytes, hashed.hasher.finish()))
}

struct Hashed<R> {
    inner: R,
    hasher: Hasher,
    bytes: u64,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        self.bytes += read as u64;
        Ok(read)
    }
}

fn check_lazy(
    mut stream: impl TarStream,
    begins: &Begins,
    claims: &Claims,
    table: &TableOfContents,
    watch: &Watch,
    findings: &mut Findings,
) -> Result<(u64, Digest), Error> {
    thread::scope(|scope| {
        let entries = Entries::read(scope, &table.json, &claims.limits);
        let archive = tar::Reader::new(&mut stream, &claims.limits);
        Comparison { archive, entries, begins, table, findings, limits: &claims.limits, landmarks: Vec::new() }
            .run(watch)
    })?;
    // Zeros behind the end of the archive are nothing; anything else is there to be seen by some and not by others.
    let mut rest = vec![0; 64 << 10];
    let mut told = false;
    loop {
        watch.check()?;
        let read = stream.read(&mut rest).map_err(Error::Input)?;
        if read == 0 {
            break;
        }
        if !told && rest[..read].iter().any(|byte| *byte != 0) {
            findings.warning("bytes stand behind the end of the tar that belong to no entry");
            told = true;
        }
    }
    if table.kind.is_zstd() {
        if !begins.has_frame(table.offset.saturating_sub(SKIPPABLE_HEAD_BYTES as u64)) {
            findings.error(format!("no frame begins at the table of contents, {}", table.offset));
        }
        return Ok(stream.finish());
    }
    let footer = claims.blob_bytes.saturating_sub(FOOTER_BYTES as u64);
    if begins.last().map(|begin| begin.blob) != Some(footer) {
        findings.error(format!("no gzip member begins at the footer, {footer}"));
    }
    Ok(stream.finish())
}

/// The tar against the table of contents.
struct Comparison<'a, 'json, R: Read> {
    archive: tar::Reader<R>,
    entries: Entries<'json>,
    begins: &'a Begins,
    table: &'a TableOfContents,
    findings: &'a mut Findings,
    limits: &'a Limits,
    landmarks: Vec<&'static str>,
}

impl<R: Read> Comparison<'_, '_, R> {
    fn run(mut self, watch: &Watch) -> Result<(), Error> {
        let mut has_table = false;
        // Once the two have lost each other, no further difference means anything.
        let mut in_step = true;
        while let Some(entry) = self.archive.next_entry()? {
            watch.check()?;
            self.begins.forget_before(entry.header_offset);
            let name = path::clean(&entry.path, self.limits)
                .map_err(|source| Error::Path { offset: entry.header_offset, source })?;
            if has_table {
                self.findings.entry(&entry, "it stands behind the table of contents, where no lazy reader sees it");
                continue;
            }
            if name == TOC_NAME.as_bytes() && !self.table.kind.is_zstd() {
                has_table = true;
                self.own_entry(&entry)?;
                continue;
            }
            if !in_step {
                continue;
            }
            match self.entries.entry() {
                Some(row) if row.name == entry.path.as_slice() => {
                    self.attributes(&entry, &row);
                    self.content(&entry, &name, row)?;
                }
                Some(row) => {
                    let row = row.name.escape_ascii().take(400).map(char::from).collect::<String>();
                    self.findings.entry(&entry, format!("the table of contents has {row} in its place"));
                    in_step = false;
                }
                None => {
                    let why = match self.entries.failure() {
                        Some(error) => error.to_string(),
                        None => "the table of contents does not have it".to_owned(),
                    };
                    self.findings.entry(&entry, why);
                    in_step = false;
                }
            }
        }
        if in_step && let Some(row) = self.entries.entry().or_else(|| self.entries.chunk()) {
            let row = row.name.escape_ascii().take(400).map(char::from).collect::<String>();
            self.findings.error(format!("the table of contents has {row}, the tar has not"));
        }
        if let Some(error) = self.entries.failure() {
            self.findings.error(error.to_string());
        }
        if !has_table && !self.table.kind.is_zstd() {
            self.findings.error(format!("the tar has no entry {TOC_NAME}"));
        }
        if self.landmarks.len() > 1 {
            self.findings.warning(format!("it has the landmarks {}", self.landmarks.join(" and ")));
        }
        Ok(())
    }

    /// The table of contents as the tar has it must be the one that the footer leads to.
    fn own_entry(&mut self, entry: &tar::Entry) -> Result<(), Error> {
        let mut hasher = self.table.digest.hasher();
        let mut content = self.archive.content();
        let mut buffer = vec![0; 64 << 10];
        loop {
            let read = content.read(&mut buffer).map_err(Error::Input)?;
            if read == 0 {
                break;
            }
            hasher.update(&buffer[..read]);
        }
        if hasher.finish() != self.table.digest {
            self.findings.entry(entry, "it is not the table of contents that the footer leads to");
        }
        if !self.begins.holds(self.table.offset, 0, entry.header_offset) {
            let offset = self.table.offset;
            self.findings.entry(entry, format!("its gzip member does not begin at {offset}, as the footer says"));
        }
        Ok(())
    }

    fn attributes(&mut self, entry: &tar::Entry, row: &Entry<'_>) {
        let mut differ = |what: &str, tar: &dyn std::fmt::Debug, toc: &dyn std::fmt::Debug| {
            self.findings.entry(entry, format!("{what} is {tar:?} in the tar and {toc:?} in the table of contents"));
        };
        let kind = entry_type(entry.kind);
        if row.entry_type != kind {
            differ("type", &kind.as_str(), &row.entry_type.as_str());
        }
        let numbers = [
            ("mode", i64::from(entry.permissions), row.mode & 0o7777),
            ("uid", i64::from(entry.uid), row.uid),
            ("gid", i64::from(entry.gid), row.gid),
            ("device's major number", i64::from(entry.device.0), row.dev_major),
            ("device's minor number", i64::from(entry.device.1), row.dev_minor),
        ];
        for (what, tar, toc) in numbers {
            if tar != toc {
                differ(what, &tar, &toc);
            }
        }
        if entry.size != row.size {
            differ("size", &entry.size, &row.size);
        }
        if !is_same_time(entry.mtime, row.modtime) {
            differ("time", &entry.mtime, &row.modtime);
        }
        if entry.link != row.link_name.as_ref() {
            differ("link", &entry.link.escape_ascii().to_string(), &row.link_name.escape_ascii().to_string());
        }
        // Names of owners are written only where they change.
        for (what, tar, toc) in
            [("user name", &entry.user_name, &row.user_name), ("group name", &entry.group_name, &row.group_name)]
        {
            if !toc.is_empty() && tar.as_slice() != toc.as_ref() {
                differ(what, &tar.escape_ascii().to_string(), &toc.escape_ascii().to_string());
            }
        }
        let mut attributes: Vec<_> = row.xattrs.iter().map(|(name, value)| (name.as_ref(), value.as_ref())).collect();
        attributes.sort_unstable();
        if !entry.xattrs.iter().map(|(name, value)| (name.as_ref(), value.as_ref())).eq(attributes.iter().copied()) {
            let names = |names: Vec<&[u8]>| names.join(&b' ').escape_ascii().to_string();
            let tar = names(entry.xattrs.iter().map(|(name, _)| name.as_ref()).collect());
            let toc = names(attributes.iter().map(|(name, _)| *name).collect());
            differ("extended attributes (names or values)", &tar, &toc);
        }
    }

    /// Compares content with the digests of its chunks, and their place with where the table of contents says it is.
    fn content(&mut self, entry: &tar::Entry, name: &[u8], row: Entry<'_>) -> Result<(), Error> {
        let landmark =
            [PREFETCH_LANDMARK, NO_PREFETCH_LANDMARK].into_iter().find(|landmark| name == landmark.as_bytes());
        self.landmarks.extend(landmark);
        if entry.kind != EntryKind::Regular {
            return Ok(());
        }
        let mut whole = Hasher::sha256();
        let digest = row.digest;
        let mut done = 0;
        let mut next = Some(row);
        while done < entry.size {
            let chunk = next.take().or_else(|| self.entries.chunk());
            let Some(chunk) = chunk.filter(|chunk| chunk.chunk_offset == done) else {
                self.findings.entry(entry, format!("no chunk of its content begins at {done}"));
                return Ok(());
            };
            let left = entry.size - done;
            let length = if chunk.chunk_size == 0 { left } else { chunk.chunk_size.min(left) };
            let found = self.hash(length, chunk.chunk_digest.as_ref(), &mut whole, landmark.is_some(), entry)?;
            match chunk.chunk_digest {
                Some(expected) if expected == found => {}
                Some(expected) => self.findings.entry(
                    entry,
                    format!("chunk at {done} has the digest {found}, the table of contents says {expected}"),
                ),
                // The digest of the file is that of its one chunk.
                None if length == entry.size && digest.is_some() => {}
                None => self.findings.entry(entry, format!("chunk at {done} has no digest")),
            }
            let place = entry.content_offset.and_then(|begin| begin.checked_add(done));
            match place {
                Some(place) if self.begins.holds(chunk.offset, chunk.inner_offset, place) => {}
                Some(_) => self.findings.entry(
                    entry,
                    format!("chunk at {done} is not at {} of the blob, as the table of contents says", chunk.offset),
                ),
                None => self.findings.entry(entry, "it is a sparse file, which no lazy reader can read"),
            }
            done += length;
        }
        let found = whole.finish();
        if let Some(expected) = digest.filter(|expected| expected.algorithm() == "sha256" && *expected != found) {
            self.findings
                .entry(entry, format!("content has the digest {found}, the table of contents says {expected}"));
        }
        Ok(())
    }

    /// Reads `length` bytes of content and returns their digest, of the algorithm of `like`.
    fn hash(
        &mut self,
        length: u64,
        like: Option<&Digest>,
        whole: &mut Hasher,
        landmark: bool,
        entry: &tar::Entry,
    ) -> Result<Digest, Error> {
        let mut hasher = like.map_or_else(Hasher::sha256, Digest::hasher);
        let mut content = self.archive.content().take(length);
        let mut buffer = vec![0; 64 << 10];
        let mut first = true;
        loop {
            let read = content.read(&mut buffer).map_err(Error::Input)?;
            if read == 0 {
                return Ok(hasher.finish());
            }
            if landmark && first && buffer[..read] != *LANDMARK_CONTENT {
                self.findings.entry(entry, "a landmark has another content");
            }
            first = false;
            hasher.update(&buffer[..read]);
            whole.update(&buffer[..read]);
        }
    }
}

fn entry_type(kind: EntryKind) -> EntryType {
    match kind {
        EntryKind::Regular => EntryType::Regular,
        EntryKind::HardLink => EntryType::HardLink,
        EntryKind::Symlink => EntryType::Symlink,
        EntryKind::CharDevice => EntryType::CharDevice,
        EntryKind::BlockDevice => EntryType::BlockDevice,
        EntryKind::Directory => EntryType::Directory,
        EntryKind::Fifo => EntryType::Fifo,
    }
}
