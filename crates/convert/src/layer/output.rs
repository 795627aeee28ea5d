//! The second pass: compress on all cores, write in order.

use std::{
    collections::VecDeque,
    io::{self, Write},
    iter::Peekable,
    ops::Range,
    path::Path,
    sync::{Arc, atomic::Ordering, mpsc},
};

use flate2::{Compression, write::GzEncoder};
use loris_format::{
    compression::gzip_member,
    digest::{DiffId, Digest, Hasher},
    estargz::{
        footer,
        writer::{Member, Members, Piece, Table, toc_header},
    },
    opening::Promise,
    position::BlobOffset,
    tar,
};

use super::{
    ConvertedLayer, Error, LayerOptions, Watch, Workers,
    input::{Plan, PlannedEntry, parse_header},
    spool::{Spool, SpoolWriter},
    workers::{BATCH_BYTES, Slot, Strength, Tools},
};

/// A table of contents up to this size is compressed in memory, as one buffer; a larger one as a stream, which takes
/// longer and packs worse. In bytes; must not change without a new revision of the writer.
const TOC_IN_MEMORY_BYTES: u64 = 16 << 20;

/// Writes the layer that `plan` describes.
pub(super) fn write(
    plan: Plan,
    options: &LayerOptions,
    workers: &Workers,
    watch: &Watch,
    directory: &Path,
    sink: impl Write,
) -> Result<ConvertedLayer, Error> {
    let entries = plan.entries.len() as u64;
    let mut output = Output {
        blob: Blob::new(sink),
        tar: Tar { digest: Hasher::sha256(), size: 0, watch },
        table: Table::new(options.chunk_bytes, options.limits.entries),
        text: TocText::create(directory, options.limits.toc_bytes)?,
        options,
    };
    let members = Members::new(plan.entries.into_iter().map(PlannedEntry::bytes), options.chunk_bytes)
        .with_least_bytes(options.min_member_bytes);
    compress_all(members, &plan.spool, Strength::Gzip(options.level), workers, |batch, slot| {
        watch.check()?;
        output.take(batch, slot)
    })
    .map_err(|error| match error {
        Failure::Layer(error) => error,
        Failure::Spool(source) => Error::Spool { directory: directory.display().to_string(), source },
    })?;
    let (mut blob, tar, toc_digest) = output.finish()?;
    blob.sink.flush().map_err(Error::Output)?;
    Ok(ConvertedLayer {
        blob_digest: blob.digest.finish(),
        blob_size: blob.size,
        diff_id: DiffId(tar.digest.finish()),
        toc_digest,
        promise: Promise::estargz(Some(toc_digest)),
        uncompressed_size: tar.size,
        entries,
        source_diff_id: plan.source_diff_id,
        source_size: plan.source_size,
        missing: plan.missing,
        dangling_links: plan.dangling_links,
    })
}

/// Members that are compressed by one worker at once.
pub(super) struct Batch {
    /// The bytes of all members.
    pieces: Vec<Piece>,
    pub(super) members: Vec<MemberOfBatch>,
}

pub(super) struct MemberOfBatch {
    pub(super) length: usize,
    /// Where chunks are, and their digests, which the worker fills in.
    pub(super) chunks: Vec<(Range<usize>, Digest)>,
    pub(super) headers: Vec<Range<usize>>,
    /// Where the compressed member ends in [`Slot::packed`]; filled in by the worker.
    pub(super) packed_end: usize,
}

pub(super) enum Failure {
    Layer(Error),
    Spool(io::Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Layer(error)
    }
}

/// Keeps all slots busy and hands finished batches to `take`, in order.
pub(super) fn compress_all(
    members: impl Iterator<Item = Member>,
    spool: &Arc<Spool>,
    strength: Strength,
    workers: &Workers,
    mut take: impl FnMut(&Batch, &Slot) -> Result<(), Error>,
) -> Result<(), Failure> {
    let mut members = members.peekable();
    let mut under_way = UnderWay { workers, batches: VecDeque::new() };
    loop {
        while members.peek().is_some() {
            // With batches of our own under way, theirs is the way to a free slot.
            let slot = if under_way.batches.is_empty() { Some(workers.slot()) } else { workers.try_slot() };
            let Some(slot) = slot else { break };
            let batch = next_batch(&mut members)?;
            let (done, outcome) = mpsc::sync_channel(1);
            let spool = Arc::clone(spool);
            workers.run(Box::new(move |tools| {
                // Where nobody waits any more, the layer has failed and the slot is counted as lost.
                let _ = done.send(compress(batch, slot, &spool, strength, tools));
            }));
            under_way.batches.push_back(outcome);
        }
        let Some(outcome) = under_way.batches.pop_front() else { return Ok(()) };
        let finished = outcome.recv();
        let result = match &finished {
            Ok(Ok((batch, slot))) => take(batch, slot).map_err(Failure::Layer),
            Ok(Err(_)) | Err(_) => Ok(()),
        };
        match finished {
            Ok(Ok((_, slot))) => workers.give_back(Some(slot)),
            Ok(Err(error)) => {
                workers.give_back(None);
                return Err(Failure::Spool(error));
            }
            Err(mpsc::RecvError) => {
                workers.give_back(None);
                return Err(Failure::Layer(Error::Thread));
            }
        }
        result?;
    }
}

/// Batches that workers have. When a layer fails, their slots must come back before its thread goes.
struct UnderWay<'a> {
    workers: &'a Workers,
    batches: VecDeque<mpsc::Receiver<io::Result<(Batch, Slot)>>>,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        for batch in self.batches.drain(..) {
            self.workers.give_back(batch.recv().ok().and_then(Result::ok).map(|(_, slot)| slot));
        }
    }
}

fn next_batch(members: &mut Peekable<impl Iterator<Item = Member>>) -> Result<Batch, Failure> {
    let mut batch = Batch { pieces: Vec::new(), members: Vec::new() };
    let mut length = 0;
    let size = |bytes: u64| usize::try_from(bytes).map_err(|error| Failure::Spool(io::Error::other(error)));
    while let Some(member) = members.next_if(|member| length == 0 || length + member.length <= BATCH_BYTES) {
        length += member.length;
        let sizes = |range: &Range<u64>| Ok::<_, Failure>(size(range.start)?..size(range.end)?);
        let unknown = Digest::sha256_of(b"");
        let chunks = member.chunks.iter().map(|chunk| Ok((sizes(chunk)?, unknown)));
        batch.members.push(MemberOfBatch {
            length: size(member.length)?,
            chunks: chunks.collect::<Result<_, Failure>>()?,
            headers: member.headers.iter().map(sizes).collect::<Result<_, _>>()?,
            packed_end: 0,
        });
        for piece in member.pieces {
            match (batch.pieces.last_mut(), &piece) {
                // Without priorities, a batch is one stretch of the spool.
                (Some(Piece::Spooled { offset: last, length }), Piece::Spooled { offset, length: more })
                    if *last + *length == *offset =>
                {
                    *length += more;
                }
                _ => batch.pieces.push(piece),
            }
        }
    }
    Ok(batch)
}

fn compress(
    mut batch: Batch,
    mut slot: Slot,
    spool: &Spool,
    strength: Strength,
    tools: &mut Tools,
) -> io::Result<(Batch, Slot)> {
    slot.raw.clear();
    slot.packed.clear();
    for piece in &batch.pieces {
        match piece {
            Piece::Spooled { offset, length } => spool.read(*offset, *length, &mut slot.raw)?,
            Piece::Made(bytes) => slot.raw.extend_from_slice(bytes),
        }
    }
    let mut begin = 0;
    for member in &mut batch.members {
        let raw = &slot.raw[begin..begin + member.length];
        for (chunk, digest) in &mut member.chunks {
            *digest = Digest::sha256_of(&raw[chunk.clone()]);
        }
        tools.compress(strength, raw, &mut slot.packed);
        member.packed_end = slot.packed.len();
        begin += member.length;
    }
    Ok((batch, slot))
}

/// What is written, in order.
struct Output<'a, W> {
    blob: Blob<W>,
    tar: Tar<'a>,
    table: Table,
    text: TocText<'a>,
    options: &'a LayerOptions,
}

impl<'a, W: Write> Output<'a, W> {
    fn take(&mut self, batch: &Batch, slot: &Slot) -> Result<(), Error> {
        self.tar.add(&slot.raw);
        let mut raw = slot.raw.as_slice();
        let mut packed_begin = 0;
        for member in &batch.members {
            let (content, rest) = raw.split_at(member.length);
            raw = rest;
            let offset = BlobOffset(self.blob.size + packed_begin as u64);
            let mut headers = member.headers.iter().peekable();
            for (chunk, digest) in &member.chunks {
                while let Some(header) = headers.next_if(|header| header.end <= chunk.start) {
                    self.table.entry(&parse_header(&content[header.clone()], self.options)?)?;
                }
                self.table.chunk(offset, chunk.start as u64, *digest, &content[chunk.clone()])?;
            }
            for header in headers {
                self.table.entry(&parse_header(&content[header.clone()], self.options)?)?;
            }
            packed_begin = member.packed_end;
        }
        self.text.append(&self.table.take())?;
        self.blob.write(&slot.packed)
    }

    /// Writes the table of contents and the footer.
    fn finish(self) -> Result<(Blob<W>, Tar<'a>, Digest), Error> {
        let Self { mut blob, mut tar, table, mut text, options } = self;
        text.append(&table.finish())?;
        let disk = |source| Error::Spool { directory: text.directory.display().to_string(), source };
        let offset = blob.size;
        let length = text.spool.length();
        let spool = text.spool.finish().map_err(disk)?;
        let header = toc_header(length)?;
        let tail = [tar::padding(length), &tar::END_OF_ARCHIVE].concat();
        if length <= TOC_IN_MEMORY_BYTES {
            let mut raw = header;
            spool.read(0, length, &mut raw).map_err(disk)?;
            raw.extend_from_slice(&tail);
            tar.add(&raw);
            blob.write(&gzip_member(options.level, &raw))?;
        } else {
            // zlib's level 9 takes far more time on such text than it saves bytes.
            let mut stream = GzEncoder::new(Vec::new(), Compression::new(6));
            let mut add = |bytes: &[u8]| {
                tar.add(bytes);
                // Always in the same pieces: zlib's output depends on them.
                stream.write_all(bytes).map_err(Error::Output)?;
                blob.write(&std::mem::take(stream.get_mut()))
            };
            add(&header)?;
            spool.read_pieces(length, disk, &mut add)?;
            add(&tail)?;
            blob.write(&stream.finish().map_err(Error::Output)?)?;
        }
        blob.write(&footer::write(BlobOffset(offset)))?;
        Ok((blob, tar, text.digest.finish()))
    }
}

/// The new tar, which exists only as it passes.
struct Tar<'a> {
    digest: Hasher,
    size: u64,
    watch: &'a Watch,
}

impl Tar<'_> {
    fn add(&mut self, bytes: &[u8]) {
        self.digest.update(bytes);
        self.size += bytes.len() as u64;
        self.watch.written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
    }
}

/// The blob, hashed and counted on its way to the sink.
pub(super) struct Blob<W> {
    pub(super) sink: W,
    pub(super) digest: Hasher,
    pub(super) size: u64,
}

impl<W: Write> Blob<W> {
    pub(super) fn new(sink: W) -> Self {
        Self { sink, digest: Hasher::sha256(), size: 0 }
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.digest.update(bytes);
        self.size += bytes.len() as u64;
        self.sink.write_all(bytes).map_err(Error::Output)
    }
}

/// The text of the table of contents, as it grows.
pub(super) struct TocText<'a> {
    spool: SpoolWriter,
    digest: Hasher,
    directory: &'a Path,
    limit: u64,
}

impl<'a> TocText<'a> {
    pub(super) fn create(directory: &'a Path, limit: u64) -> Result<Self, Error> {
        let spool = SpoolWriter::create(directory)
            .map_err(|source| Error::Spool { directory: directory.display().to_string(), source })?;
        Ok(Self { spool, digest: Hasher::sha256(), directory, limit })
    }

    pub(super) fn append(&mut self, text: &[u8]) -> Result<(), Error> {
        self.digest.update(text);
        self.spool
            .append(text)
            .map_err(|source| Error::Spool { directory: self.directory.display().to_string(), source })?;
        if self.spool.length() > self.limit { Err(Error::TocTooLarge { limit: self.limit }) } else { Ok(()) }
    }
    /// Returns how many bytes there are.
    pub(super) fn length(&self) -> u64 {
        self.spool.length()
    }

    /// Returns the digest of all text so far.
    pub(super) fn digest(&self) -> Digest {
        self.digest.clone().finish()
    }

    /// Ends the text, to be read.
    pub(super) fn finish(self) -> Result<Spool, Error> {
        let directory = self.directory;
        self.spool.finish().map_err(|source| Error::Spool { directory: directory.display().to_string(), source })
    }
}
