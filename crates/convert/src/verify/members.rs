//! A blob read member by member, or frame by frame, so that it is known where each begins.

use std::{
    cell::RefCell,
    collections::VecDeque,
    io::{self, BufRead, BufReader, Read},
};

use flate2::bufread::GzDecoder;
use loris_format::{
    compression::{Compression, Decoder},
    digest::{Digest, Hasher},
};

/// Most beginnings that are remembered: members without content need 20 bytes each, and a blob may be full of them.
const MOST_REMEMBERED: usize = 1 << 20;

/// Where a member begins: compressed and uncompressed bytes before it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Begin {
    pub(super) blob: u64,
    pub(super) tar: u64,
}

/// The members' beginnings that may still be asked for.
#[derive(Default)]
pub(super) struct Begins(RefCell<VecDeque<Begin>>);

impl Begins {
    /// Says whether a member begins at `blob` whose byte `inner` is the byte `tar` of the archive.
    pub(super) fn holds(&self, blob: u64, inner: u64, tar: u64) -> bool {
        let begins = self.0.borrow();
        match begins.binary_search_by_key(&blob, |begin| begin.blob) {
            Ok(place) => begins[place].tar.checked_add(inner) == Some(tar),
            Err(_) => false,
        }
    }

    /// Returns the last member that began.
    pub(super) fn last(&self) -> Option<Begin> {
        self.0.borrow().back().copied()
    }

    /// Says whether a frame begins at `blob`, whatever is in it.
    pub(super) fn has_frame(&self, blob: u64) -> bool {
        self.0.borrow().binary_search_by_key(&blob, |begin| begin.blob).is_ok()
    }

    /// Forgets members that end at or before the byte `tar` of the archive.
    pub(super) fn forget_before(&self, tar: u64) {
        let mut begins = self.0.borrow_mut();
        while begins.get(1).is_some_and(|next| next.tar < tar) {
            begins.pop_front();
        }
    }

    fn push(&self, begin: Begin) -> io::Result<()> {
        let mut begins = self.0.borrow_mut();
        if begins.len() >= MOST_REMEMBERED {
            return Err(io::Error::other("too many gzip members without content"));
        }
        begins.push_back(begin);
        Ok(())
    }
}

/// The decompressed stream of a blob.
pub(super) trait TarStream: Read {
    /// Returns the size and digest of everything that was read.
    fn finish(self) -> (u64, Digest);
}

/// The decompressed stream of a blob of zstd frames.
pub(super) struct Frames<'a, R> {
    decoder: Decoder<R>,
    begins: &'a Begins,
    position: u64,
    hasher: Hasher,
}

impl<'a, R: Read> Frames<'a, R> {
    pub(super) fn new(blob: R, begins: &'a Begins) -> Self {
        let decoder = Decoder::with_compression(blob, Compression::Zstd).noting_begins();
        Self { decoder, begins, position: 0, hasher: Hasher::sha256() }
    }
}

impl<R: Read> Read for Frames<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.decoder.read(buffer);
        for (blob, tar) in self.decoder.take_begins() {
            self.begins.push(Begin { blob, tar })?;
        }
        let read = read?;
        self.position += read as u64;
        self.hasher.update(&buffer[..read]);
        Ok(read)
    }
}

impl<R: Read> TarStream for Frames<'_, R> {
    fn finish(self) -> (u64, Digest) {
        (self.position, self.hasher.finish())
    }
}

/// The decompressed stream of a blob of gzip members.
pub(super) struct Members<'a, R> {
    /// `None` only while one member gives way to the next, and after an error.
    member: Option<Member<R>>,
    begins: &'a Begins,
    /// Uncompressed bytes so far.
    position: u64,
    hasher: Hasher,
}

enum Member<R> {
    Inside(Box<GzDecoder<Counted<R>>>),
    Between(Counted<R>),
}

impl<'a, R: Read> Members<'a, R> {
    pub(super) fn new(blob: R, begins: &'a Begins) -> Self {
        let blob = Counted { inner: BufReader::with_capacity(256 << 10, blob), position: 0 };
        Self { member: Some(Member::Between(blob)), begins, position: 0, hasher: Hasher::sha256() }
    }
}

impl<R: Read> TarStream for Members<'_, R> {
    fn finish(self) -> (u64, Digest) {
        (self.position, self.hasher.finish())
    }
}

impl<R: Read> Read for Members<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            match self.member.take() {
                None => return Err(io::Error::other("read after an error")),
                Some(Member::Between(mut blob)) => {
                    if blob.fill_buf()?.is_empty() {
                        self.member = Some(Member::Between(blob));
                        return Ok(0);
                    }
                    self.begins.push(Begin { blob: blob.position, tar: self.position })?;
                    self.member = Some(Member::Inside(Box::new(GzDecoder::new(blob))));
                }
                Some(Member::Inside(mut member)) => {
                    let read = member.read(buffer).map_err(|error| {
                        let at = member.get_ref().position;
                        io::Error::new(error.kind(), AtOffset { at, error })
                    })?;
                    if read > 0 {
                        self.member = Some(Member::Inside(member));
                        self.position += read as u64;
                        self.hasher.update(&buffer[..read]);
                        return Ok(read);
                    }
                    self.member = Some(Member::Between(member.into_inner()));
                }
            }
        }
    }
}

/// Where in the blob decompression failed.
#[derive(Debug, thiserror::Error)]
#[error("gzip at compressed offset {at}: {error}")]
struct AtOffset {
    at: u64,
    #[source]
    error: io::Error,
}

/// Counts what is consumed.
struct Counted<R> {
    inner: BufReader<R>,
    position: u64,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.position += read as u64;
        Ok(read)
    }
}

impl<R: Read> BufRead for Counted<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.inner.fill_buf()
    }

    fn consume(&mut self, amount: usize) {
        self.position += amount as u64;
        self.inner.consume(amount);
    }
}
