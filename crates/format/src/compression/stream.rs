//! Decompresses a stream as it comes in.

use std::io::{self, BufRead, BufReader, Read};

use zstd_safe::{DCtx, InBuffer, OutBuffer};

use super::{Compression, Error, gzip, zstd};

/// Compressed bytes held at once.
const INPUT_BYTES: usize = 128 << 10;
/// Decoded bytes held at once, for callers that read little at a time: inflating 512 bytes takes the slow way in the
/// decoder, and a tar reader asks for just that.
const OUTPUT_BYTES: usize = 128 << 10;

/// Decompresses a whole stream.
///
/// - Gzip: any number of members; zeros may follow the last one, as tapes pad.
/// - Zstd: any number of frames and skippable frames, with windows up to 128 MiB.
///
/// Anything else behind the end is an error, and so is the end of the source in the middle; both are noticed when the
/// stream is read to its end. Errors carry an [`enum@Error`] as their inner error. Memory: 256 KiB, and for zstd the
/// frame's window.
#[derive(Debug)]
pub struct Decoder<R> {
    inner: BufReader<Raw<R>>,
}

impl<R: Read> Decoder<R> {
    /// Reads the first bytes of a stream and detects its compression.
    ///
    /// # Errors
    /// Where the source fails.
    pub fn new(inner: R) -> Result<Self, Error> {
        let mut input = Input::new(inner);
        input.fill_to(Compression::DETECT_BYTES)?;
        let compression = Compression::detect(input.bytes());
        Ok(Self::over(input, compression))
    }

    /// Starts at the beginning of a stream whose compression is known.
    pub fn with_compression(inner: R, compression: Compression) -> Self {
        Self::over(Input::new(inner), compression)
    }

    fn over(input: Input<R>, compression: Compression) -> Self {
        let state = match compression {
            Compression::None => State::Stored,
            Compression::Gzip => State::Gzip(Gzip { inflate: gzip::Inflate::new(), in_member: false, members: 0 }),
            Compression::Zstd => State::Zstd(Zstd { context: zstd::decoder(), in_frame: false }),
        };
        Self {
            inner: BufReader::with_capacity(OUTPUT_BYTES, Raw { input, state, compression, begins: None, decoded: 0 }),
        }
    }

    /// Returns the compression, as detected or as said.
    pub fn compression(&self) -> Compression {
        self.inner.get_ref().compression
    }

    /// Takes note from now on of where zstd frames begin, see [`Decoder::take_begins`].
    #[must_use]
    pub fn noting_begins(mut self) -> Self {
        self.inner.get_mut().begins = Some(Vec::new());
        self
    }

    /// Returns where zstd frames have begun since the last call: compressed and decoded bytes before each. What is decoded is
    /// ahead of what was read.
    pub fn take_begins(&mut self) -> Vec<(u64, u64)> {
        self.inner.get_mut().begins.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Returns how many compressed bytes have been decoded. What was decoded may still wait to be read.
    pub fn compressed_position(&self) -> u64 {
        self.inner.get_ref().input.position
    }

    /// Gives back the source, behind everything that was read from it, which may be more than was decoded.
    pub fn into_inner(self) -> R {
        self.inner.into_inner().input.inner
    }
}

impl<R: Read> Read for Decoder<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.inner.read(buffer)
    }
}

impl<R: Read> BufRead for Decoder<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.inner.fill_buf()
    }

    fn consume(&mut self, bytes: usize) {
        self.inner.consume(bytes);
    }
}

/// A decoder without a buffer for its output.
#[derive(Debug)]
struct Raw<R> {
    input: Input<R>,
    state: State,
    compression: Compression,
    begins: Option<Vec<(u64, u64)>>,
    decoded: u64,
}

enum State {
    Stored,
    Gzip(Gzip),
    Zstd(Zstd),
}

struct Gzip {
    inflate: gzip::Inflate,
    in_member: bool,
    members: u64,
}

struct Zstd {
    context: DCtx<'static>,
    in_frame: bool,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Stored => "Stored",
            Self::Gzip(_) => "Gzip",
            Self::Zstd(_) => "Zstd",
        })
    }
}

impl<R: Read> Read for Raw<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        let read = match &mut self.state {
            State::Stored => self.input.take(buffer),
            State::Gzip(gzip) => gzip.read(&mut self.input, buffer),
            State::Zstd(zstd) => {
                let decoded = self.decoded;
                let mut note = |at| self.begins.iter_mut().for_each(|begins| begins.push((at, decoded)));
                zstd.read(&mut self.input, buffer, &mut note)
            }
        }?;
        self.decoded += read as u64;
        Ok(read)
    }
}

impl Gzip {
    fn read<R: Read>(&mut self, input: &mut Input<R>, buffer: &mut [u8]) -> Result<usize, Error> {
        loop {
            if !self.in_member && !self.begin(input)? {
                return Ok(0);
            }
            if input.bytes().is_empty() && !input.fill()? {
                return Err(Error::Truncated { compression: "gzip", offset: input.position });
            }
            let gzip::Step { consumed, produced, ended } = self.inflate.step(input.bytes(), buffer);
            input.consume(consumed);
            let ended =
                ended.map_err(|problem| Error::Corrupt { compression: "gzip", offset: input.position, problem })?;
            self.in_member = !ended;
            if produced > 0 {
                return Ok(produced);
            }
        }
    }

    /// Begins the next member, if there is one.
    fn begin<R: Read>(&mut self, input: &mut Input<R>) -> Result<bool, Error> {
        input.fill_to(gzip::MAGIC.len())?;
        let start = input.bytes();
        if start.starts_with(&gzip::MAGIC) || self.members == 0 && !start.is_empty() {
            if self.members > 0 {
                self.inflate.reset();
            }
            self.members += 1;
            self.in_member = true;
            return Ok(true);
        }
        if self.members == 0 {
            return Err(Error::Truncated { compression: "gzip", offset: input.position });
        }
        // A cut in the two bytes of a further member's magic.
        if start == &gzip::MAGIC[..1] {
            return Err(Error::Truncated { compression: "gzip", offset: input.position + 1 });
        }
        let garbage = input.position;
        loop {
            if input.bytes().iter().any(|&byte| byte != 0) {
                return Err(Error::TrailingGarbage { compression: "gzip", offset: garbage });
            }
            input.consume(input.bytes().len());
            if !input.fill()? {
                return Ok(false);
            }
        }
    }
}

impl Zstd {
    /// Tells `begins` where a frame begins.
    fn read<R: Read>(
        &mut self,
        input: &mut Input<R>,
        buffer: &mut [u8],
        begins: &mut impl FnMut(u64),
    ) -> Result<usize, Error> {
        let mut started = input.position > 0;
        loop {
            if !self.in_frame {
                input.fill_to(Compression::DETECT_BYTES)?;
                let start = input.bytes();
                if start.is_empty() && started {
                    return Ok(0);
                }
                if start.len() < Compression::DETECT_BYTES {
                    let offset = input.position + start.len() as u64;
                    return Err(Error::Truncated { compression: "zstd", offset });
                }
                if !zstd::is_magic(start) {
                    let (compression, offset) = ("zstd", input.position);
                    return Err(if started {
                        Error::TrailingGarbage { compression, offset }
                    } else {
                        Error::Corrupt { compression, offset, problem: "not a zstd frame" }
                    });
                }
                started = true;
                begins(input.position);
            }
            let mut source = InBuffer::around(input.bytes());
            let mut target = OutBuffer::around(&mut *buffer);
            let found = self.context.decompress_stream(&mut target, &mut source);
            let (consumed, produced) = (source.pos(), target.pos());
            input.consume(consumed);
            let hint = found.map_err(|code| zstd::error(code, input.position))?;
            self.in_frame = hint > 0;
            if produced > 0 {
                return Ok(produced);
            }
            // Asked without input, the context may still have output from before; so more is only read here.
            if consumed == 0 && self.in_frame {
                let (compression, offset) = ("zstd", input.position);
                if !input.bytes().is_empty() {
                    return Err(Error::Corrupt { compression, offset, problem: "decoder makes no progress" });
                }
                if !input.fill()? {
                    return Err(Error::Truncated { compression, offset });
                }
            }
        }
    }
}

/// A source with a buffer and a position.
struct Input<R> {
    inner: R,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// Where the byte at `start` stands in the stream.
    position: u64,
    ended: bool,
}

impl<R: Read> Input<R> {
    fn new(inner: R) -> Self {
        Self { inner, buffer: vec![0; INPUT_BYTES].into(), start: 0, end: 0, position: 0, ended: false }
    }

    fn consume(&mut self, bytes: usize) {
        self.start += bytes;
        self.position += bytes as u64;
    }

    /// Reads more behind what there is; `false` at the end of the source.
    fn fill(&mut self) -> Result<bool, Error> {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        if self.ended {
            return Ok(false);
        }
        let read = read_some(&mut self.inner, &mut self.buffer[self.end..], self.position + self.end as u64)?;
        self.end += read;
        self.ended = read == 0;
        Ok(read > 0)
    }

    /// Reads until there are so many bytes, or the source ends.
    fn fill_to(&mut self, bytes: usize) -> Result<(), Error> {
        while self.bytes().len() < bytes && self.fill()? {}
        Ok(())
    }

    /// Takes bytes as they are, past the buffer when it is empty.
    fn take(&mut self, buffer: &mut [u8]) -> Result<usize, Error> {
        let held = self.bytes();
        if held.is_empty() {
            let read = read_some(&mut self.inner, buffer, self.position)?;
            self.position += read as u64;
            return Ok(read);
        }
        let length = held.len().min(buffer.len());
        buffer[..length].copy_from_slice(&held[..length]);
        self.consume(length);
        Ok(length)
    }
}

impl<R> Input<R> {
    fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }
}

impl<R> std::fmt::Debug for Input<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Input").field("position", &self.position).finish_non_exhaustive()
    }
}

fn read_some<R: Read>(source: &mut R, buffer: &mut [u8], offset: u64) -> Result<usize, Error> {
    loop {
        match source.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => return Err(Error::Read { offset, source }),
            Ok(read) => return Ok(read),
        }
    }
}
