//! The first pass: decompress, parse, spool.

use std::{
    io::{self, Read},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
};

use loris_format::{
    compression,
    digest::{DiffId, Hasher},
    estargz::writer::{Change, EntryBytes, EntryId, Order, Piece, Sort, Sorter, landmark},
    tar::{self, EntryKind, path},
};

use super::{
    Error, LayerOptions, Watch,
    spool::{Spool, SpoolWriter},
};

/// Bytes that go from the thread that decompresses to the one that parses at once.
const BLOCK_BYTES: usize = 256 << 10;

/// Blocks that may wait between the two.
const BLOCKS_AHEAD: usize = 4;

/// A layer whose entries stand in the spool, encoded anew: headers, content, padding.
pub(super) struct Spooled {
    spool: Spool,
    spool_directory: String,
    records: Vec<Record>,
    sorter: Sorter,
    is_text: bool,
    diff_id: DiffId,
    size: u64,
}

/// Where an entry stands in the spool.
#[derive(Clone, Copy)]
struct Record {
    offset: u64,
    /// Bytes of headers; content follows.
    header: u32,
    /// Bytes of content, without padding.
    size: u64,
}

/// What the second pass writes.
pub(super) struct Plan {
    pub(super) spool: Arc<Spool>,
    pub(super) entries: Vec<PlannedEntry>,
    pub(super) source_diff_id: DiffId,
    pub(super) source_size: u64,
    pub(super) missing: Vec<Vec<u8>>,
    pub(super) dangling_links: Vec<Vec<u8>>,
    /// Whether all names are UTF-8.
    pub(super) is_text: bool,
}

/// An entry in the order of the blob; 32 bytes, unlike [`EntryBytes`].
pub(super) enum PlannedEntry {
    Spooled(EntryAt),
    Made(Box<EntryBytes>),
}

#[derive(Clone, Copy)]
pub(super) struct EntryAt(Record);

impl PlannedEntry {
    pub(super) fn bytes(self) -> EntryBytes {
        match self {
            Self::Made(entry) => *entry,
            Self::Spooled(EntryAt(record)) => EntryBytes {
                header: Piece::Spooled { offset: record.offset, length: u64::from(record.header) },
                content: content(record),
                size: record.size,
                begins_member: false,
            },
        }
    }
}

fn content(record: Record) -> Option<Piece> {
    let length = record.size + tar::padding(record.size).len() as u64;
    (length > 0).then(|| Piece::Spooled { offset: record.offset + u64::from(record.header), length })
}

/// Reads the source to its end.
pub(super) fn spool(
    input: impl Read + Send,
    options: &LayerOptions,
    watch: &Watch,
    directory: &Path,
) -> Result<Spooled, Error> {
    let read = read_through(input, options, watch, |blocks| parse(blocks, options, directory))?;
    let (parsed, diff_id, size) = read;
    let Parsed { spool, records, sorter, is_text } = parsed;
    Ok(Spooled { spool, spool_directory: directory.display().to_string(), records, sorter, is_text, size, diff_id })
}

/// Has `parse` read the source, decompressed by a thread of its own. Returns the digest and the size of its tar too.
pub(super) fn read_through<T>(
    input: impl Read + Send,
    options: &LayerOptions,
    watch: &Watch,
    parse: impl FnOnce(&mut Blocks<'_>) -> Result<T, Error>,
) -> Result<(T, DiffId, u64), Error> {
    let (full, filled) = mpsc::sync_channel(BLOCKS_AHEAD);
    let (emptied, empty) = mpsc::channel();
    let too_large = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(move || decompress(input, &full, &empty));
        // Dropped at the end of the closure, whatever the outcome: then the other thread's next send fails and it ends.
        let mut blocks = Blocks {
            filled,
            emptied,
            block: Vec::new(),
            at: 0,
            total: 0,
            hasher: Hasher::sha256(),
            limit: options.max_uncompressed_bytes,
            too_large: &too_large,
            watch,
        };
        let outcome = parse(&mut blocks);
        // The tar's reader reports what stopped it as it sees it; the reason is known better here.
        if too_large.load(Ordering::Relaxed) {
            return Err(Error::TooLarge { limit: options.max_uncompressed_bytes });
        }
        watch.check()?;
        Ok((outcome?, DiffId(blocks.hasher.finish()), blocks.total))
    })
}

/// Fills blocks until the source ends, fails, or nobody wants more.
fn decompress(input: impl Read, full: &mpsc::SyncSender<io::Result<Vec<u8>>>, empty: &mpsc::Receiver<Vec<u8>>) {
    let mut decoder = match compression::Decoder::new(input) {
        Ok(decoder) => decoder,
        Err(error) => {
            let _ = full.send(Err(error.into()));
            return;
        }
    };
    loop {
        let mut block = empty.try_recv().unwrap_or_else(|_| vec![0; BLOCK_BYTES]);
        block.resize(BLOCK_BYTES, 0);
        let outcome = fill(&mut decoder, &mut block).map(|filled| {
            block.truncate(filled);
            block
        });
        let last = outcome.as_ref().map_or(true, Vec::is_empty);
        // Where the receiver is gone, it has its reasons.
        if full.send(outcome).is_err() || last {
            return;
        }
    }
}

fn fill(source: &mut impl Read, block: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < block.len() {
        match source.read(&mut block[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// The decompressed stream, hashed and counted.
pub(super) struct Blocks<'a> {
    filled: mpsc::Receiver<io::Result<Vec<u8>>>,
    emptied: mpsc::Sender<Vec<u8>>,
    block: Vec<u8>,
    at: usize,
    total: u64,
    hasher: Hasher,
    limit: u64,
    too_large: &'a AtomicBool,
    watch: &'a Watch,
}

impl Blocks<'_> {
    fn next_block(&mut self) -> io::Result<()> {
        if self.watch.check().is_err() {
            return Err(io::Error::other("stopped"));
        }
        let next = match self.filled.recv() {
            Ok(next) => next?,
            // The end was sent and taken before.
            Err(mpsc::RecvError) => Vec::new(),
        };
        // Where the other thread is done, nobody wants blocks.
        let _ = self.emptied.send(std::mem::replace(&mut self.block, next));
        self.at = 0;
        self.total += self.block.len() as u64;
        if self.total > self.limit {
            self.too_large.store(true, Ordering::Relaxed);
            return Err(io::Error::other("too large"));
        }
        self.hasher.update(&self.block);
        self.watch.read.fetch_add(self.block.len() as u64, Ordering::Relaxed);
        Ok(())
    }
}

impl Read for Blocks<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at == self.block.len() {
            self.next_block()?;
        }
        let length = buffer.len().min(self.block.len() - self.at);
        buffer[..length].copy_from_slice(&self.block[self.at..self.at + length]);
        self.at += length;
        Ok(length)
    }
}

/// What the first pass finds.
struct Parsed {
    spool: Spool,
    records: Vec<Record>,
    sorter: Sorter,
    /// Whether all names are UTF-8.
    is_text: bool,
}

fn parse(blocks: &mut Blocks<'_>, options: &LayerOptions, directory: &Path) -> Result<Parsed, Error> {
    let disk = |source| Error::Spool { directory: directory.display().to_string(), source };
    let limits = &options.limits;
    let mut spool = SpoolWriter::create(directory).map_err(disk)?;
    let mut sorter = Sorter::default();
    let mut records = Vec::new();
    let mut is_text = true;
    let mut archive = tar::Reader::new(&mut *blocks, limits);
    while let Some(mut entry) = archive.next_entry()? {
        let clean = |path: &[u8]| {
            path::clean(path, limits).map_err(|source| Error::Path { offset: entry.header_offset, source })
        };
        let name = clean(&entry.path)?;
        let target = if entry.kind == EntryKind::HardLink { clean(&entry.link)? } else { Vec::new() };
        let sort = match entry.kind {
            EntryKind::HardLink => Sort::HardLink(&target),
            EntryKind::Directory => Sort::Directory,
            _ => Sort::Other,
        };
        if sorter.add(&name, sort, limits.entries)?.is_none() {
            continue;
        }
        is_text &= [&entry.path, &entry.link].iter().all(|name| std::str::from_utf8(name).is_ok());
        // Holes are filled in: the new entry is an ordinary file.
        entry.sparse = false;
        let header = tar::encode_header(&entry).map_err(loris_format::estargz::writer::Error::from)?;
        let record = Record {
            offset: spool.length(),
            header: u32::try_from(header.len()).map_err(|error| disk(io::Error::other(error)))?,
            size: entry.size,
        };
        spool.append(&header).map_err(disk)?;
        if entry.size > 0 {
            spool.append_all(&mut archive.content()).map_err(disk)?.map_err(Error::Input)?;
            spool.append(tar::padding(entry.size)).map_err(disk)?;
        }
        records.push(record);
    }
    drop(archive);
    // What follows the end of the archive belongs to the layer's digest.
    io::copy(blocks, &mut io::sink()).map_err(Error::Input)?;
    Ok(Parsed { spool: spool.finish().map_err(disk)?, records, sorter, is_text })
}

impl Spooled {
    /// Finds the order of the blob, with a landmark or without.
    pub(super) fn plan(self, options: &LayerOptions, with_landmark: bool) -> Result<Plan, Error> {
        let mut prioritised = Vec::with_capacity(options.prioritised.len());
        for name in &options.prioritised {
            prioritised.push(path::clean(name, &options.limits).map_err(|source| Error::Path { offset: 0, source })?);
        }
        let Self { spool, spool_directory, records, sorter, is_text, diff_id, size } = self;
        let order = sorter.finish(&prioritised)?;
        if let Some(first) = order.missing.first().filter(|_| !options.allow_missing) {
            let first = String::from_utf8_lossy(first).into_owned();
            return Err(Error::Missing { count: order.missing.len(), first });
        }
        let source = Source { spool: &spool, directory: &spool_directory, records: &records, options };
        let mut entries = Vec::with_capacity(order.entries.len() + 1);
        let (before, behind) = order.entries.split_at(order.prioritised);
        for &id in before {
            entries.push(source.planned(id, &order)?);
        }
        if with_landmark {
            entries.push(landmark_entry(order.landmark)?);
        }
        for &id in behind {
            entries.push(source.planned(id, &order)?);
        }
        let mut dangling_links = Vec::with_capacity(order.dangling.len());
        for &id in &order.dangling {
            dangling_links.push(source.entry(id)?.path);
        }
        Ok(Plan {
            spool: Arc::new(spool),
            entries,
            source_diff_id: diff_id,
            source_size: size,
            missing: order.missing,
            dangling_links,
            is_text,
        })
    }
}

fn landmark_entry(name: &str) -> Result<PlannedEntry, Error> {
    let landmark = landmark(name)?;
    Ok(PlannedEntry::Made(Box::new(landmark)))
}

struct Source<'a> {
    spool: &'a Spool,
    directory: &'a str,
    records: &'a [Record],
    options: &'a LayerOptions,
}

impl Source<'_> {
    fn planned(&self, id: EntryId, order: &Order) -> Result<PlannedEntry, Error> {
        let record = self.records[id.0 as usize];
        let Some(change) = order.changes.get(&id) else { return Ok(PlannedEntry::Spooled(EntryAt(record))) };
        let own = self.entry(id)?;
        let (entry, from) = match change {
            Change::Takes(of) => (tar::Entry { path: own.path, ..self.entry(*of)? }, self.records[of.0 as usize]),
            Change::LinksTo(name) => (tar::Entry { link: name.to_vec(), ..own }, record),
        };
        let header = tar::encode_header(&entry).map_err(loris_format::estargz::writer::Error::from)?;
        Ok(PlannedEntry::Made(Box::new(EntryBytes {
            header: Piece::Made(header.into()),
            content: content(from),
            size: from.size,
            begins_member: false,
        })))
    }

    /// Reads an entry's headers back.
    fn entry(&self, id: EntryId) -> Result<tar::Entry, Error> {
        let record = self.records[id.0 as usize];
        let mut header = Vec::new();
        self.spool
            .read(record.offset, u64::from(record.header), &mut header)
            .map_err(|source| Error::Spool { directory: self.directory.to_owned(), source })?;
        parse_header(&header, self.options)
    }
}

/// Returns the entry that encoded headers tell of.
pub(super) fn parse_header(header: &[u8], options: &LayerOptions) -> Result<tar::Entry, Error> {
    let entry = tar::Reader::new(header, &options.limits).next_entry()?;
    entry.ok_or(Error::Tar(tar::Error::Truncated { offset: 0, part: "a header of our own" }))
}
