//! The first pass where the tar stays as it is, byte for byte: decompress, parse, cut, spool.
//!
//! So the layer keeps its DiffID. It can't be so where readers would not agree about the tar: where a name is there twice, a
//! file has holes that the tar leaves out, or an entry means something else without what stands before it. Then the tar is
//! written anew, out of the spool, as for any other target.

use std::{
    cell::RefCell,
    io::{self, Read},
    path::Path,
};

use loris_format::{
    digest::DiffId,
    tar::{self, EntryKind, path},
    zstd_chunked::cuts::{Cut, Cutter},
};

use super::{
    Error, LayerOptions, Watch,
    input::{Blocks, parse_header, read_through},
    spool::{Spool, SpoolWriter},
};
use loris_format::estargz::writer::{Sort, Sorter};

/// A layer in the spool.
pub(super) struct Verbatim {
    pub(super) spool: Spool,
    pub(super) size: u64,
    pub(super) diff_id: DiffId,
    /// What is known of its entries, or why it can't stay as it is.
    pub(super) entries: Result<Entries, &'static str>,
}

/// The entries of a tar that stays as it is.
pub(super) struct Entries {
    pub(super) places: Vec<Place>,
    pub(super) cuts: Vec<Cut>,
    /// Where the last entry ends.
    pub(super) end: u64,
    /// Whether all names are UTF-8.
    pub(super) is_text: bool,
    pub(super) dangling_links: Vec<Vec<u8>>,
}

/// Where an entry stands in the tar.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) start: u64,
    /// Bytes of headers; content follows, and padding.
    pub(super) header: u32,
    pub(super) size: u64,
    /// Where the chunks of its content end in [`Entries::cuts`].
    pub(super) cuts_end: u32,
}

/// Reads the source to its end.
pub(super) fn spool(
    input: impl Read + Send,
    options: &LayerOptions,
    watch: &Watch,
    directory: &Path,
) -> Result<Verbatim, Error> {
    let read = read_through(input, options, watch, |blocks| parse(blocks, options, directory))?;
    let ((spool, entries), diff_id, size) = read;
    Ok(Verbatim { spool, size, diff_id, entries })
}

/// The source, kept as it passes.
struct Tee<'a, 'b> {
    blocks: &'a mut Blocks<'b>,
    spool: SpoolWriter,
    /// What came since the content of the last file, where it is wanted.
    recent: Vec<u8>,
    wanted: bool,
    failure: Option<io::Error>,
}

struct Shared<'s, 'a, 'b>(&'s RefCell<Tee<'a, 'b>>);

impl Read for Shared<'_, '_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let tee = &mut *self.0.borrow_mut();
        let read = tee.blocks.read(buffer)?;
        if let Err(error) = tee.spool.append(&buffer[..read]) {
            tee.failure = Some(error);
            return Err(io::Error::other("the temporary file failed"));
        }
        if tee.wanted {
            tee.recent.extend_from_slice(&buffer[..read]);
        }
        Ok(read)
    }
}

fn parse(
    blocks: &mut Blocks<'_>,
    options: &LayerOptions,
    directory: &Path,
) -> Result<(Spool, Result<Entries, &'static str>), Error> {
    let disk = |source| Error::Spool { directory: directory.display().to_string(), source };
    let spool = SpoolWriter::create(directory).map_err(disk)?;
    let tee = RefCell::new(Tee { blocks, spool, recent: Vec::new(), wanted: true, failure: None });
    let outcome = entries(&tee, options).and_then(|entries| {
        // What follows the end of the archive belongs to the layer, and so does what follows where reading was given up.
        io::copy(&mut Shared(&tee), &mut io::sink()).map_err(Error::Input)?;
        Ok(entries)
    });
    let tee = tee.into_inner();
    if let Some(source) = tee.failure {
        return Err(disk(source));
    }
    let entries = outcome?;
    Ok((tee.spool.finish().map_err(disk)?, entries))
}

fn entries(tee: &RefCell<Tee<'_, '_>>, options: &LayerOptions) -> Result<Result<Entries, &'static str>, Error> {
    let limits = &options.limits;
    let mut archive = tar::Reader::new(Shared(tee), limits);
    let mut found = Entries { places: Vec::new(), cuts: Vec::new(), end: 0, is_text: true, dangling_links: Vec::new() };
    let mut sorter = Sorter::default();
    let mut recent_start = 0;
    let mut links = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    while let Some(entry) = archive.next_entry()? {
        tee.borrow_mut().wanted = false;
        let header_end = entry.content_offset.unwrap_or(entry.header_offset + tar::BLOCK_BYTES as u64);
        if entry.sparse {
            return Ok(Err("a file has holes that the tar leaves out"));
        }
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
            return Ok(Err("it has files of another lazy format"));
        }
        let bytes = |at: u64| usize::try_from(at - recent_start).unwrap_or(usize::MAX);
        let header = {
            let tee = tee.borrow();
            let header = tee.recent.get(bytes(found.end)..bytes(header_end)).unwrap_or_default();
            if !means_the_same(header, &entry, options) {
                return Ok(Err("an entry depends on what stands before it"));
            }
            header.len()
        };
        found.is_text &= [&entry.path, &entry.link].iter().all(|name| std::str::from_utf8(name).is_ok());
        if entry.kind == EntryKind::HardLink {
            links.push((found.places.len(), entry.path.clone()));
        }
        if entry.size > 0 {
            let mut cutter = Cutter::new(options.chunk_bytes);
            let mut content = archive.content();
            loop {
                let read = content.read(&mut buffer).map_err(Error::Input)?;
                if read == 0 {
                    break;
                }
                cutter.update(&buffer[..read]);
            }
            found.cuts.extend(cutter.finish());
        }
        let mut tee = tee.borrow_mut();
        tee.recent.clear();
        tee.wanted = true;
        drop(tee);
        recent_start = header_end + entry.size;
        let too_many = |_| loris_format::estargz::writer::Error::TooManyEntries { limit: limits.entries };
        found.places.push(Place {
            start: found.end,
            header: u32::try_from(header).map_err(too_many)?,
            size: entry.size,
            cuts_end: u32::try_from(found.cuts.len()).map_err(too_many)?,
        });
        found.end = recent_start + tar::padding(entry.size).len() as u64;
    }
    let order = sorter.finish(&[])?;
    let in_order = order.entries.iter().map(|id| id.0 as usize).eq(0..found.places.len());
    if !in_order || !order.changes.is_empty() {
        return Ok(Err("a name is there twice"));
    }
    let dangling = |number: &usize| order.dangling.iter().any(|id| id.0 as usize == *number);
    found.dangling_links = links.into_iter().filter(|(number, _)| dangling(number)).map(|(_, path)| path).collect();
    Ok(Ok(found))
}

/// Says whether headers mean the same by themselves.
fn means_the_same(header: &[u8], entry: &tar::Entry, options: &LayerOptions) -> bool {
    let Ok(alone) = parse_header(header, options) else { return false };
    let alone = tar::Entry { header_offset: entry.header_offset, content_offset: entry.content_offset, ..alone };
    alone == *entry
}
