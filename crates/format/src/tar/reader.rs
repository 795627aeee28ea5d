//! Reads an archive entry by entry.

use std::{
    io::{self, Read},
    mem,
};

use super::{
    BLOCK_BYTES, Entry, Error, RawHeader,
    header::{self, Block},
    pax::{Records, Scope},
    sparse::{Cursor, Piece},
};
use crate::limits::Limits;

mod entry;

pub(super) use entry::number;

/// Content is passed over in pieces of this size.
const SKIP_BYTES: usize = 64 << 10;

/// Goes through an archive in any dialect, over a source that need not be seekable.
///
/// Headers are read 512 bytes at a time, so an unbuffered source should be wrapped in a [`io::BufReader`]; content goes
/// straight to the caller's buffer. What is held in memory is one entry's metadata, bounded by
/// [`Limits::tar_metadata_bytes`] whatever the archive says.
///
/// The end-of-archive marker may be missing at a block's end, and anything may stand behind it; the reader stops there,
/// and [`Reader::into_inner`] gives back the source at that place.
#[derive(Debug)]
pub struct Reader<R> {
    inner: R,
    limits: Limits,
    position: u64,
    entries: usize,
    /// What global PAX headers said so far, and from how many bytes.
    globals: Records,
    globals_bytes: u64,
    body: Body,
    /// The content that the last entry, a hard link, says to have; see [`Reader::next_block`].
    link_body: u64,
    state: State,
    scratch: Box<[u8]>,
    /// What the last entry's headers say word for word, where somebody wants to know.
    raw: Option<RawHeader>,
}

/// What is left of the current entry's content in the archive.
#[derive(Debug, Default)]
struct Body {
    stored: u64,
    padding: u64,
    sparse: Option<Cursor>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Open,
    Ended,
    Failed,
}

/// Metadata that precedes an entry.
struct Metadata {
    records: Option<Records>,
    long_path: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    /// Bytes that may still come before the limit is reached.
    budget: u64,
}

impl<R: Read> Reader<R> {
    /// Starts at the beginning of an archive.
    pub fn new(inner: R, limits: &Limits) -> Self {
        Self {
            inner,
            limits: limits.clone(),
            position: 0,
            entries: 0,
            globals: Records::default(),
            globals_bytes: 0,
            body: Body::default(),
            link_body: 0,
            state: State::Open,
            scratch: vec![0; SKIP_BYTES].into(),
            raw: None,
        }
    }

    /// Keeps what the headers of each entry say word for word, see [`Reader::raw`].
    #[must_use]
    pub fn keeping_raw(mut self) -> Self {
        self.raw = Some(RawHeader::default());
        self
    }

    /// Returns what the last entry's headers say word for word, if that is [kept](Reader::keeping_raw).
    pub fn raw(&self) -> Option<&RawHeader> {
        self.raw.as_ref()
    }

    /// Passes over what is left of the current entry's content and returns the next entry, or `None` at the end.
    ///
    /// # Errors
    /// Where the source fails, or the archive is cut off, corrupt, beyond the limits, or holds what no layer can hold.
    /// After an error, every further call is one too.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, Error> {
        match self.state {
            State::Open => {}
            State::Ended => return Ok(None),
            State::Failed => return Err(Error::GivenUp { offset: self.position }),
        }
        let found = self.advance();
        self.state = match &found {
            Ok(Some(_)) => State::Open,
            Ok(None) => State::Ended,
            Err(_) => State::Failed,
        };
        found
    }

    /// Returns the current entry's content, from where it was left: as a program would read it, with the holes of a
    /// sparse file as zeros. Empty for all but regular files.
    ///
    /// Its errors carry an [`enum@Error`] as their inner error, and the kind of the source's error, if that failed;
    /// else [`io::ErrorKind::UnexpectedEof`].
    pub fn content(&mut self) -> Content<'_, R> {
        Content { reader: self }
    }

    /// Returns where the next byte stands that will be taken from the source, in the uncompressed archive.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Gives back the source, at [`Reader::position`].
    pub fn into_inner(self) -> R {
        self.inner
    }

    fn advance(&mut self) -> Result<Option<Entry>, Error> {
        if let Some(raw) = &mut self.raw {
            raw.records.clear();
        }
        let left = mem::take(&mut self.body);
        // Two steps: the sum of two hostile numbers could overflow.
        self.skip(left.stored, "content")?;
        self.skip(left.padding, "padding")?;

        let mut metadata =
            Metadata { records: None, long_path: None, long_link: None, budget: self.limits.tar_metadata_bytes };
        loop {
            let Some(block) = self.next_block()? else {
                if metadata.is_empty() {
                    return Ok(None);
                }
                return Err(Error::Truncated { offset: self.position, part: "metadata without an entry" });
            };
            let offset = self.position - BLOCK_BYTES as u64;
            if !header::checksum_is_right(&block) {
                return Err(Error::Corrupt { offset, part: "header", problem: "checksum does not match" });
            }
            let size = entry::number(&block[header::SIZE], offset, "size")?;
            let size = u64::try_from(size).map_err(|_| Error::Corrupt { offset, part: "size", problem: "negative" })?;
            match block[header::TYPE_FLAG] {
                // The size of metadata is always its own header's: were a PAX size applied to a long name that
                // follows it, programs would go on at different places.
                b'x' | b'X' => {
                    let records = self.read_metadata(size, offset, &mut metadata.budget)?;
                    // A second local header replaces the first, as in Go.
                    let mut found = self.globals.clone();
                    found.apply(&records, Scope::Local, offset, &self.limits)?;
                    metadata.records = Some(found);
                    if let Some(raw) = &mut self.raw {
                        raw.set_records(&records);
                    }
                }
                b'g' => {
                    let mut budget = self.limits.tar_metadata_bytes.saturating_sub(self.globals_bytes);
                    let records = self.read_metadata(size, offset, &mut budget)?;
                    self.globals_bytes = self.limits.tar_metadata_bytes - budget;
                    self.globals.apply(&records, Scope::Global, offset, &self.limits)?;
                }
                b'L' => {
                    let name = self.read_metadata(size, offset, &mut metadata.budget)?;
                    metadata.long_path = Some(header::text(&name).to_vec());
                }
                b'K' => {
                    let name = self.read_metadata(size, offset, &mut metadata.budget)?;
                    metadata.long_link = Some(header::text(&name).to_vec());
                }
                type_flag => {
                    let kind = entry::kind(type_flag, offset)?;
                    return self.entry(&block, kind, size, metadata, offset).map(Some);
                }
            }
        }
    }

    fn read_map_block(&mut self, offset: u64, budget: &mut u64) -> Result<Block, Error> {
        self.spend(BLOCK_BYTES as u64, offset, budget)?;
        let mut block = [0; BLOCK_BYTES];
        self.read_exact(&mut block, "a sparse map")?;
        Ok(block)
    }

    /// Reads the content of a metadata entry and its padding.
    fn read_metadata(&mut self, size: u64, offset: u64, budget: &mut u64) -> Result<Vec<u8>, Error> {
        // The header counts too: a chain of empty ones must end as well.
        self.spend(size.saturating_add(BLOCK_BYTES as u64), offset, budget)?;
        // Grows with what is really there, so that a header alone cannot make us allocate.
        let mut data = Vec::new();
        while (data.len() as u64) < size {
            let piece = usize::try_from(size - data.len() as u64).map_or(SKIP_BYTES, |left| left.min(SKIP_BYTES));
            let start = data.len();
            data.resize(start + piece, 0);
            self.read_exact(&mut data[start..], "metadata")?;
        }
        self.skip(padding_bytes(size), "metadata")?;
        Ok(data)
    }

    fn spend(&self, bytes: u64, offset: u64, budget: &mut u64) -> Result<(), Error> {
        let limit = self.limits.tar_metadata_bytes;
        let part = "bytes of metadata";
        *budget = budget.checked_sub(bytes).ok_or(Error::Limit { offset, part, limit })?;
        Ok(())
    }

    /// Returns the next header, or `None` at the end of the archive.
    ///
    /// A hard link's header may state a size. Most programs mean the target's, and no content follows: Go, GNU tar and
    /// Python read it so. But `pax` and `cpio` may store the content with every name, as POSIX allows. If a header
    /// follows at once, it is read, as all programs do; if none does, those would fail, and it is content. In
    /// between is the case where zeros follow: they end the archive only if nothing else comes after them.
    fn next_block(&mut self) -> Result<Option<Block>, Error> {
        let mut link_body = mem::take(&mut self.link_body);
        let Some(mut block) = self.read_block()? else { return Ok(None) };
        if link_body > 0 && !is_zero(&block) && !header::checksum_is_right(&block) {
            let first = link_body.min(BLOCK_BYTES as u64);
            self.skip(link_body - first, "content of a hard link")?;
            self.skip(if link_body == first { 0 } else { padding_bytes(link_body) }, "content of a hard link")?;
            link_body = 0;
            match self.read_block()? {
                Some(next) => block = next,
                None => return Ok(None),
            }
        }
        if !is_zero(&block) {
            return Ok(Some(block));
        }
        let offset = self.position - BLOCK_BYTES as u64;
        if self.read_block()?.is_some_and(|second| !is_zero(&second)) {
            let problem = "one block of zeros, which neither ends the archive nor begins an entry";
            return Err(Error::Corrupt { offset, part: "header", problem });
        }
        if link_body > 0 {
            self.expect_zeros(offset)?;
        }
        Ok(None)
    }

    fn expect_zeros(&mut self, offset: u64) -> Result<(), Error> {
        let mut scratch = mem::take(&mut self.scratch);
        let found = loop {
            match self.read_some(&mut scratch) {
                Ok(0) => break Ok(()),
                Ok(read) if is_zero(&scratch[..read]) => {}
                Ok(_) => {
                    let problem = "zeros, of which programs disagree whether they are the content of the hard link \
                                   before or the end of the archive";
                    break Err(Error::Corrupt { offset, part: "header", problem });
                }
                Err(error) => break Err(error),
            }
        };
        self.scratch = scratch;
        found
    }

    /// Reads a block; `None` at the end of the source, also if some zeros stand there that are no block.
    fn read_block(&mut self) -> Result<Option<Block>, Error> {
        let mut block = [0; BLOCK_BYTES];
        match self.fill(&mut block)? {
            BLOCK_BYTES => Ok(Some(block)),
            read if is_zero(&block[..read]) => Ok(None),
            _ => Err(Error::Truncated { offset: self.position, part: "a header" }),
        }
    }

    fn read_exact(&mut self, buffer: &mut [u8], part: &'static str) -> Result<(), Error> {
        if self.fill(buffer)? < buffer.len() {
            return Err(Error::Truncated { offset: self.position, part });
        }
        Ok(())
    }

    /// Reads until the buffer is full or the source ends.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, Error> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.read_some(&mut buffer[filled..])? {
                0 => break,
                read => filled += read,
            }
        }
        Ok(filled)
    }

    fn read_some(&mut self, buffer: &mut [u8]) -> Result<usize, Error> {
        loop {
            match self.inner.read(buffer) {
                Ok(read) => {
                    self.position += read as u64;
                    return Ok(read);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(Error::Read { offset: self.position, source }),
            }
        }
    }

    fn skip(&mut self, bytes: u64, part: &'static str) -> Result<(), Error> {
        let mut scratch = mem::take(&mut self.scratch);
        let mut left = bytes;
        let found = loop {
            if left == 0 {
                break Ok(());
            }
            let piece = usize::try_from(left).map_or(scratch.len(), |left| left.min(scratch.len()));
            match self.read_some(&mut scratch[..piece]) {
                Ok(0) => break Err(Error::Truncated { offset: self.position, part }),
                Ok(read) => left -= read as u64,
                Err(error) => break Err(error),
            }
        };
        self.scratch = scratch;
        found
    }

    fn read_content(&mut self, buffer: &mut [u8]) -> Result<usize, Error> {
        let piece = match &self.body.sparse {
            None => Piece::Data(self.body.stored),
            Some(cursor) => cursor.piece(),
        };
        let (Piece::Hole(length) | Piece::Data(length)) = piece else { return Ok(0) };
        let wanted = usize::try_from(length).map_or(buffer.len(), |length| length.min(buffer.len()));
        let buffer = &mut buffer[..wanted];
        if buffer.is_empty() {
            return Ok(0);
        }
        let read = if let Piece::Hole(_) = piece {
            buffer.fill(0);
            wanted
        } else {
            let read = self.read_some(buffer)?;
            if read == 0 {
                return Err(Error::Truncated { offset: self.position, part: "content" });
            }
            self.body.stored -= read as u64;
            read
        };
        if let Some(cursor) = &mut self.body.sparse {
            cursor.advance(read as u64);
        }
        Ok(read)
    }
}

/// The content of a [`Reader`]'s current entry.
#[derive(Debug)]
pub struct Content<'a, R> {
    reader: &'a mut Reader<R>,
}

impl<R: Read> Read for Content<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.reader.state == State::Failed {
            return Err(io::Error::other(Error::GivenUp { offset: self.reader.position }));
        }
        self.reader.read_content(buffer).map_err(|error| {
            self.reader.state = State::Failed;
            let kind = match &error {
                Error::Read { source, .. } => source.kind(),
                _ => io::ErrorKind::UnexpectedEof,
            };
            io::Error::new(kind, error)
        })
    }
}

impl Metadata {
    fn is_empty(&self) -> bool {
        self.records.is_none() && self.long_path.is_none() && self.long_link.is_none()
    }
}

fn padding_bytes(size: u64) -> u64 {
    let block = BLOCK_BYTES as u64;
    (block - size % block) % block
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|&byte| byte == 0)
}

#[cfg(test)]
pub(super) mod tests;
