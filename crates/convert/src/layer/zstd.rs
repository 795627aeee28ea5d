//! A layer, made into zstd:chunked.
//!
//! ```text
//!  [zstd frame: headers][zstd frame: a chunk]...[skippable: table][skippable: tar-split][footer][footer]
//! ```
//!
//! Both footers are there, and every chunk has its digest, so that one blob serves both kinds of readers; which of them trusts
//! it is up to the annotations, see [`Dialect`]. The tar stays as it is where it can: the layer keeps its DiffID.

use std::{io::Write, path::Path, sync::Arc};

use loris_format::{
    compression::ZstdCompressor,
    digest::{DiffId, Digest, Hasher},
    estargz::{
        footer::{SKIPPABLE_HEAD_BYTES, skippable_head, write_zstd_containers, write_zstd_stargz},
        toc::{Entry, EntryType, TocWriter},
        writer::{Member, Piece},
    },
    opening::{Family, Promise, ZstdChunked},
    position::{BlobOffset, BlobRange, Packed},
    tar::{self, EntryKind, Raw},
    zstd_chunked::{
        cuts::{Cut, Cutter},
        tar_split::{Crc64, TarSplit},
    },
};

use super::{
    ConvertedLayer, Error, LayerOptions, Watch, Workers,
    input::{self, Plan, PlannedEntry, parse_header},
    output::{Batch, Blob, Failure, TocText, compress_all},
    spool::{Spool, SpoolReader},
    verbatim::{self, Entries, Verbatim},
    workers::{Slot, Strength},
};

/// Who shall trust the layer lazily.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Dialect {
    /// containers/storage, which is Podman, Buildah, CRI-O: they pull what they lack of it. And Loris.
    #[default]
    Containers,
    /// stargz-snapshotter, which mounts it lazily under containerd. And Loris.
    Stargz,
}

/// Bytes of headers in one frame, at most.
const HEADER_RUN_BYTES: u64 = 512 << 10;
/// The text of a table or `tar-split` is compressed in frames of so many bytes; must not change without a new revision of the
/// writer.
const TEXT_FRAME_BYTES: u64 = 16 << 20;

/// Writes a layer.
pub(super) fn convert(
    input: impl std::io::Read + Send,
    options: &LayerOptions,
    (level, dialect): (i32, Dialect),
    workers: &Workers,
    watch: &Watch,
    directory: &Path,
    sink: impl Write,
) -> Result<ConvertedLayer, Error> {
    let writing = Writing { options, level, dialect, workers, watch, directory };
    if !options.prioritised.is_empty() || dialect == Dialect::Stargz {
        let plan = input::spool(input, options, watch, directory)?.plan(options, dialect == Dialect::Stargz)?;
        return writing.anew(plan, sink);
    }
    let Verbatim { spool, size, diff_id, entries } = verbatim::spool(input, options, watch, directory)?;
    match entries {
        Ok(entries) => writing.verbatim(spool, size, diff_id, entries, sink),
        Err(reason) => {
            tracing::debug!(reason, "the tar is written anew");
            let unwatched = Watch::default();
            let tar = SpoolReader::new(&spool, size);
            let spooled = input::spool(tar, options, &unwatched, directory)?;
            drop(spool);
            writing.anew(spooled.plan(options, false)?, sink)
        }
    }
}

struct Writing<'a> {
    options: &'a LayerOptions,
    level: i32,
    dialect: Dialect,
    workers: &'a Workers,
    watch: &'a Watch,
    directory: &'a Path,
}

/// An entry to be written, and the end of the tar.
enum Part {
    Entry { header: Piece, content: Option<Piece>, size: u64, cuts: Vec<Cut> },
    End(Piece),
}

/// What is known beside the parts.
struct About {
    source_diff_id: DiffId,
    source_size: u64,
    /// The new tar's, where it is the old one's.
    diff_id: Option<DiffId>,
    is_text: bool,
    entries: u64,
    missing: Vec<Vec<u8>>,
    dangling_links: Vec<Vec<u8>>,
}

impl Writing<'_> {
    fn verbatim(
        &self,
        spool: Spool,
        size: u64,
        diff_id: DiffId,
        entries: Entries,
        sink: impl Write,
    ) -> Result<ConvertedLayer, Error> {
        let Entries { places, cuts, end, is_text, dangling_links } = entries;
        let about = About {
            source_diff_id: diff_id,
            source_size: size,
            diff_id: Some(diff_id),
            is_text,
            entries: places.len() as u64,
            missing: Vec::new(),
            dangling_links,
        };
        let mut first = 0;
        let parts = places.into_iter().map(|place| {
            let header = u64::from(place.header);
            let padded = place.size + tar::padding(place.size).len() as u64;
            let own = first..place.cuts_end as usize;
            first = own.end;
            let content = (padded > 0).then_some(Piece::Spooled { offset: place.start + header, length: padded });
            let header = Piece::Spooled { offset: place.start, length: header };
            Ok(Part::Entry { header, content, size: place.size, cuts: cuts[own].to_vec() })
        });
        let ends = (end..size)
            .step_by(usize::try_from(HEADER_RUN_BYTES).unwrap_or(1 << 19))
            .map(|offset| Ok(Part::End(Piece::Spooled { offset, length: HEADER_RUN_BYTES.min(size - offset) })));
        self.write(parts.chain(ends), &Arc::new(spool), about, sink)
    }

    fn anew(&self, plan: Plan, sink: impl Write) -> Result<ConvertedLayer, Error> {
        let about = About {
            source_diff_id: plan.source_diff_id,
            source_size: plan.source_size,
            diff_id: None,
            is_text: plan.is_text,
            entries: plan.entries.len() as u64,
            missing: plan.missing,
            dangling_links: plan.dangling_links,
        };
        let spool = plan.spool;
        let parts = plan.entries.into_iter().map(|entry| {
            let entry = PlannedEntry::bytes(entry);
            let cuts = self.cuts(&spool, entry.content.as_ref(), entry.size)?;
            Ok(Part::Entry { header: entry.header, content: entry.content, size: entry.size, cuts })
        });
        let end = std::iter::once(Ok(Part::End(Piece::Made(tar::END_OF_ARCHIVE.as_slice().into()))));
        self.write(parts.chain(end), &spool, about, sink)
    }

    /// Cuts content that was not cut in the first pass.
    fn cuts(&self, spool: &Spool, content: Option<&Piece>, size: u64) -> Result<Vec<Cut>, Error> {
        const STEP: u64 = 1 << 20;
        let mut cutter = Cutter::new(self.options.chunk_bytes);
        match content {
            Some(Piece::Spooled { offset, .. }) => {
                let mut bytes = Vec::new();
                for at in (0..size).step_by(1 << 20) {
                    bytes.clear();
                    spool.read(offset + at, STEP.min(size - at), &mut bytes).map_err(|source| self.disk(source))?;
                    cutter.update(&bytes);
                }
            }
            Some(Piece::Made(bytes)) => cutter.update(&bytes[..usize::try_from(size).unwrap_or_default()]),
            None => {}
        }
        Ok(cutter.finish())
    }

    fn disk(&self, source: std::io::Error) -> Error {
        Error::Spool { directory: self.directory.display().to_string(), source }
    }

    fn write(
        &self,
        parts: impl Iterator<Item = Result<Part, Error>>,
        spool: &Arc<Spool>,
        about: About,
        sink: impl Write,
    ) -> Result<ConvertedLayer, Error> {
        let mut output = Output {
            blob: Blob::new(sink),
            tar: Hasher::sha256(),
            hashes_tar: about.diff_id.is_none(),
            tar_bytes: 0,
            text: TocText::create(self.directory, self.options.limits.toc_bytes)?,
            writer: TocWriter::compact(),
            rows: 0,
            file: None,
            between: Vec::new(),
            split: about.is_text.then(Split::default),
            compressor: ZstdCompressor::new(self.level),
            options: self.options,
            watch: self.watch,
        };
        let mut failure = None;
        let parts = parts.map_while(|part| part.map_err(|error| failure = Some(error)).ok());
        let mut holes = std::collections::VecDeque::new();
        let holes_in = std::cell::RefCell::new(&mut holes);
        let frames =
            Frames { parts, run: Member::default(), waiting: std::collections::VecDeque::new(), holes: &holes_in };
        let strength = Strength::Zstd(self.level);
        let outcome = compress_all(frames, spool, strength, self.workers, |batch, slot| {
            self.watch.check()?;
            output.take(batch, slot, &mut || holes_in.borrow_mut().pop_front().unwrap_or_default())
        });
        if let Some(error) = failure {
            return Err(error);
        }
        outcome.map_err(|error| match error {
            Failure::Layer(error) => error,
            Failure::Spool(source) => self.disk(source),
        })?;
        output.finish(self, about)
    }
}

/// Groups the bytes of entries into frames.
struct Frames<'h, I> {
    parts: I,
    run: Member,
    waiting: std::collections::VecDeque<Member>,
    /// Whether each chunk is a hole, in order.
    holes: &'h std::cell::RefCell<&'h mut std::collections::VecDeque<bool>>,
}

fn length(piece: &Piece) -> u64 {
    match piece {
        Piece::Spooled { length, .. } => *length,
        Piece::Made(bytes) => bytes.len() as u64,
    }
}

/// Returns a part of a piece.
fn part(piece: &Piece, at: u64, length: u64) -> Piece {
    match piece {
        Piece::Spooled { offset, .. } => Piece::Spooled { offset: offset + at, length },
        Piece::Made(bytes) => {
            let start = usize::try_from(at).unwrap_or(bytes.len());
            let end = usize::try_from(at + length).unwrap_or(bytes.len());
            Piece::Made(bytes[start..end].into())
        }
    }
}

impl<I: Iterator<Item = Part>> Frames<'_, I> {
    fn add(&mut self, piece: Piece) {
        self.run.length += length(&piece);
        self.run.pieces.push(piece);
    }

    fn end_run(&mut self) {
        if self.run.length > 0 {
            self.waiting.push_back(std::mem::take(&mut self.run));
        }
    }

    fn entry(&mut self, header: Piece, content: Option<Piece>, size: u64, cuts: &[Cut]) {
        if self.run.length + length(&header) > HEADER_RUN_BYTES {
            self.end_run();
        }
        let start = self.run.length;
        self.run.headers.push(start..start + length(&header));
        self.add(header);
        let Some(content) = content.filter(|_| size > 0) else { return };
        self.end_run();
        let mut at = 0;
        for cut in cuts {
            let pieces = vec![part(&content, at, cut.length)];
            self.waiting.push_back(Member {
                pieces,
                length: cut.length,
                chunks: std::iter::once(0..cut.length).collect(),
                headers: Vec::new(),
            });
            self.holes.borrow_mut().push_back(cut.hole);
            at += cut.length;
        }
        let padding = length(&content) - at;
        if padding > 0 {
            self.add(part(&content, at, padding));
        }
    }
}

impl<I: Iterator<Item = Part>> Iterator for Frames<'_, I> {
    type Item = Member;

    fn next(&mut self) -> Option<Member> {
        loop {
            if let Some(member) = self.waiting.pop_front() {
                return Some(member);
            }
            match self.parts.next() {
                Some(Part::Entry { header, content, size, cuts }) => self.entry(header, content, size, &cuts),
                Some(Part::End(piece)) => {
                    self.add(piece);
                    if self.run.length > HEADER_RUN_BYTES {
                        self.end_run();
                    }
                }
                None => {
                    self.end_run();
                    return self.waiting.pop_front();
                }
            }
        }
    }
}

/// A file whose content has not passed wholly.
struct OpenFile {
    row: Entry<'static>,
    done: u64,
    hasher: Hasher,
    sum: Crc64,
    chunks: Vec<Chunk>,
}

struct Chunk {
    offset: u64,
    length: u64,
    digest: Digest,
    hole: bool,
}

/// The `tar-split`, compressed as it grows.
#[derive(Default)]
struct Split {
    text: TarSplit,
    packed: Vec<u8>,
    uncompressed: u64,
}

impl Split {
    fn pack(&mut self, least: u64, compressor: &mut ZstdCompressor) {
        if self.text.waiting() as u64 >= least.max(1) {
            let text = self.text.take();
            self.uncompressed += text.len() as u64;
            self.packed.extend(compressor.compress(&text));
        }
    }
}

struct Output<'a, W> {
    blob: Blob<W>,
    tar: Hasher,
    hashes_tar: bool,
    tar_bytes: u64,
    text: TocText<'a>,
    writer: TocWriter,
    rows: usize,
    file: Option<OpenFile>,
    /// Bytes of the tar behind the last file or header.
    between: Vec<u8>,
    split: Option<Split>,
    compressor: ZstdCompressor,
    options: &'a LayerOptions,
    watch: &'a Watch,
}

impl<W: Write> Output<'_, W> {
    fn take(&mut self, batch: &Batch, slot: &Slot, hole: &mut dyn FnMut() -> bool) -> Result<(), Error> {
        if self.hashes_tar {
            self.tar.update(&slot.raw);
        }
        self.tar_bytes += slot.raw.len() as u64;
        self.watch.written.fetch_add(slot.raw.len() as u64, std::sync::atomic::Ordering::Relaxed);
        let mut raw = slot.raw.as_slice();
        let mut packed_begin = 0;
        for member in &batch.members {
            let (content, rest) = raw.split_at(member.length);
            raw = rest;
            let offset = self.blob.size + packed_begin as u64;
            packed_begin = member.packed_end;
            match member.chunks.first() {
                Some(&(_, digest)) => {
                    let end = self.blob.size + member.packed_end as u64;
                    self.chunk(offset, end, digest, content, hole())?;
                }
                None => self.headers(&member.headers, content)?,
            }
        }
        self.text.append(&self.writer.take())?;
        self.blob.write(&slot.packed)
    }

    fn headers(&mut self, headers: &[std::ops::Range<usize>], run: &[u8]) -> Result<(), Error> {
        let mut at = 0;
        for header in headers {
            self.between.extend_from_slice(&run[at..header.end]);
            at = header.end;
            if let Some(split) = &mut self.split {
                split.text.headers(&self.between);
                split.pack(TEXT_FRAME_BYTES, &mut self.compressor);
            }
            self.between.clear();
            self.entry(&run[header.clone()])?;
        }
        self.between.extend_from_slice(&run[at..]);
        // Nothing but the end of a tar is as long.
        if self.between.len() as u64 > HEADER_RUN_BYTES {
            self.end_between();
        }
        Ok(())
    }

    fn end_between(&mut self) {
        if let Some(split) = &mut self.split {
            split.text.tail(&self.between);
            split.pack(TEXT_FRAME_BYTES, &mut self.compressor);
        }
        self.between.clear();
    }

    fn entry(&mut self, header: &[u8]) -> Result<(), Error> {
        let entry = parse_header(header, self.options)?;
        let raw = Raw::read(header);
        let row = row(entry, raw);
        self.count()?;
        if row.size > 0 {
            let (hasher, sum) = (Hasher::sha256(), Crc64::default());
            self.file = Some(OpenFile { row, done: 0, hasher, sum, chunks: Vec::new() });
            return Ok(());
        }
        if let Some(split) = &mut self.split {
            split.text.entry(&row.name, None);
        }
        self.writer.push(&row);
        Ok(())
    }

    fn chunk(&mut self, offset: u64, end: u64, digest: Digest, content: &[u8], hole: bool) -> Result<(), Error> {
        let length = content.len() as u64;
        let stray = loris_format::estargz::writer::Error::StrayChunk { offset, length };
        let Some(file) = self.file.as_mut().filter(|file| file.done + length <= file.row.size) else {
            return Err(stray.into());
        };
        if self.split.is_some() {
            file.sum.update(content);
        }
        let is_all = length == file.row.size;
        if !is_all {
            file.hasher.update(content);
        }
        let further = !file.chunks.is_empty();
        file.chunks.push(Chunk { offset, length, digest, hole });
        file.done += length;
        if file.done == file.row.size {
            self.close_file(end);
        }
        if further { self.count() } else { Ok(()) }
    }

    fn close_file(&mut self, end: u64) {
        let Some(OpenFile { mut row, hasher, sum, chunks, .. }) = self.file.take() else { return };
        if let Some(split) = &mut self.split {
            split.text.entry(&row.name, Some((row.size, sum.finish())));
        }
        row.end_offset = end;
        row.digest = match chunks.as_slice() {
            [only] => Some(only.digest),
            _ => Some(hasher.finish()),
        };
        let name = row.name.clone();
        let mut begin = 0;
        for chunk in chunks {
            row.offset = chunk.offset;
            row.chunk_offset = begin;
            row.chunk_size = chunk.length;
            row.chunk_digest = Some(chunk.digest);
            row.hole = chunk.hole;
            self.writer.push(&row);
            begin += chunk.length;
            row = Entry { name: name.clone(), entry_type: EntryType::Chunk, ..Entry::default() };
        }
    }

    fn count(&mut self) -> Result<(), Error> {
        self.rows += 1;
        let limit = self.options.limits.entries;
        if self.rows > limit {
            return Err(loris_format::estargz::writer::Error::TooManyEntries { limit }.into());
        }
        Ok(())
    }

    /// Writes what stands behind the frames.
    fn finish(mut self, writing: &Writing<'_>, about: About) -> Result<ConvertedLayer, Error> {
        self.end_between();
        let Self { mut blob, mut text, mut compressor, split, writer, .. } = self;
        let split = split.map(|mut split| {
            split.pack(0, &mut compressor);
            split
        });
        let split_digest = split.as_ref().map(|split| Digest::sha256_of(&split.packed));
        text.append(&writer.finish_with(split_digest.as_ref()))?;
        let (json_bytes, toc_digest) = (text.length(), text.digest());
        let mut packed = Vec::new();
        let spool = text.finish()?;
        for at in (0..json_bytes).step_by(usize::try_from(TEXT_FRAME_BYTES).unwrap_or(1 << 24)) {
            let mut piece = Vec::new();
            let read = spool.read(at, TEXT_FRAME_BYTES.min(json_bytes - at), &mut piece);
            read.map_err(|source| writing.disk(source))?;
            packed.extend(compressor.compress(&piece));
        }
        let checksum = Digest::sha256_of(&packed);
        let toc = skippable(&mut blob, &packed, json_bytes)?;
        let tar_split = split.map(|split| skippable(&mut blob, &split.packed, split.uncompressed)).transpose()?;
        if let Some(tar_split) = tar_split {
            blob.write(&write_zstd_containers(toc, tar_split))?;
        }
        blob.write(&write_zstd_stargz(toc))?;
        blob.sink.flush().map_err(Error::Output)?;
        let (family, promised_toc, tar_split) = match writing.dialect {
            Dialect::Containers => (Family::Containers, None, tar_split),
            Dialect::Stargz => (Family::Stargz, Some(toc_digest), None),
        };
        let zstd_chunked = Some(ZstdChunked { family, checksum, position: Some(toc), tar_split });
        Ok(ConvertedLayer {
            blob_digest: blob.digest.finish(),
            blob_size: blob.size,
            diff_id: about.diff_id.unwrap_or_else(|| DiffId(self.tar.finish())),
            toc_digest,
            promise: Promise { toc: promised_toc, zstd_chunked, beside: None },
            uncompressed_size: self.tar_bytes,
            entries: about.entries,
            source_diff_id: about.source_diff_id,
            source_size: about.source_size,
            missing: about.missing,
            dangling_links: about.dangling_links,
        })
    }
}

/// Writes a skippable frame, and returns where what it holds stands.
fn skippable<W: Write>(blob: &mut Blob<W>, packed: &[u8], uncompressed: u64) -> Result<Packed, Error> {
    let length = u32::try_from(packed.len()).map_err(|_| Error::TocTooLarge { limit: u64::from(u32::MAX) })?;
    let start = BlobOffset(blob.size + SKIPPABLE_HEAD_BYTES as u64);
    blob.write(&skippable_head(length))?;
    blob.write(packed)?;
    Ok(Packed { range: BlobRange { start, length: u64::from(length) }, uncompressed })
}

fn row(entry: tar::Entry, raw: Raw) -> Entry<'static> {
    let entry_type = match entry.kind {
        EntryKind::Regular => EntryType::Regular,
        EntryKind::HardLink => EntryType::HardLink,
        EntryKind::Symlink => EntryType::Symlink,
        EntryKind::CharDevice => EntryType::CharDevice,
        EntryKind::BlockDevice => EntryType::BlockDevice,
        EntryKind::Directory => EntryType::Directory,
        EntryKind::Fifo => EntryType::Fifo,
    };
    let xattrs = entry.xattrs.into_iter().map(|(name, value)| (name.into_vec().into(), value.into_vec().into()));
    Entry {
        name: entry.path.into(),
        entry_type,
        size: if entry.kind == EntryKind::Regular { entry.size } else { 0 },
        modtime: entry.mtime,
        link_name: entry.link.into(),
        mode: raw.mode,
        uid: i64::from(entry.uid),
        gid: i64::from(entry.gid),
        dev_major: i64::from(entry.device.0),
        dev_minor: i64::from(entry.device.1),
        xattrs: xattrs.collect(),
        accessed: raw.accessed,
        changed: raw.changed,
        ..Entry::default()
    }
}
