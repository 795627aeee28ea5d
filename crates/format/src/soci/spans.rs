//! Decompresses a layer as it comes in, and takes note of where its spans begin and what they hash to.

use std::{
    cell::Cell,
    io::{self, Read},
};

use zstd_safe::{DCtx, InBuffer, OutBuffer};

use super::zinfo::{Checkpoint, CheckpointWriter, FrameStarts};
use crate::{
    compression::{
        Error, Header, WINDOW_BYTES,
        deflate::{Inflater, Input, ROOM_BYTES, Stop},
        gzip::TRAILER_BYTES,
        header, zstd,
    },
    digest::{Digest, Hasher},
};

/// Compressed bytes held at once. Also bounds the header of a gzip member.
const INPUT_BYTES: usize = 256 << 10;
/// Decoded bytes held at once, behind a window.
const OUTPUT_BYTES: usize = 256 << 10;

/// What was found out of a layer.
#[derive(Debug)]
pub(super) struct Spans {
    /// Of the compressed bytes of each.
    pub(super) digests: Vec<Digest>,
    /// As they stand in a ztoc; empty for an uncompressed layer.
    pub(super) checkpoints: Vec<u8>,
}

/// A layer's tar.
pub(super) trait Spanning: Read {
    /// Returns what was found out, at the end.
    fn finish(self) -> Spans;
}

/// A gzip stream. A checkpoint is taken as zlib offers one, which `soci` goes by: behind the header of a member, and
/// between two blocks; the first of them, and each that comes more than `span_bytes` behind the one before.
pub(super) struct GzipSpans<R> {
    source: R,
    input: Box<[u8]>,
    /// `input[at..end]` is still to be decoded.
    at: usize,
    end: usize,
    is_last: bool,
    /// Where `input` begins, in the blob.
    input_offset: u64,
    inflater: Inflater,
    output: Box<[u8]>,
    /// `output[read..filled]` is still to be read, `output[member..filled]` is of this member.
    read: usize,
    filled: usize,
    member: usize,
    /// Where `output[filled]` is, in the tar.
    output_offset: u64,
    state: State,
    checksum: crc32fast::Hasher,
    member_bytes: u64,
    span_bytes: u64,
    last_point: Option<u64>,
    points: CheckpointWriter,
    hashing: SpanHasher,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Header,
    Deflate,
    Ended,
}

/// Hashes the compressed bytes of span after span.
#[derive(Default)]
struct SpanHasher {
    current: Option<Hasher>,
    /// Up to where all was hashed that belongs to a span, in `input`.
    at: usize,
    digests: Vec<Digest>,
}

impl SpanHasher {
    fn take(&mut self, input: &[u8], end: usize) {
        if let Some(hasher) = &mut self.current {
            hasher.update(&input[self.at..end]);
        }
        self.at = end;
    }

    /// Begins a span whose first whole byte is `input[at]`.
    fn begin(&mut self, input: &[u8], at: usize, has_bits: bool) {
        self.take(input, at);
        self.end();
        let mut hasher = Hasher::sha256();
        if has_bits && let Some(before) = at.checked_sub(1) {
            hasher.update(&input[before..at]);
        }
        self.current = Some(hasher);
    }

    fn end(&mut self) {
        self.digests.extend(self.current.take().map(Hasher::finish));
    }
}

impl<R: Read> GzipSpans<R> {
    pub(super) fn new(source: R, span_bytes: u64) -> Self {
        Self {
            source,
            input: vec![0; INPUT_BYTES].into(),
            at: 0,
            end: 0,
            is_last: false,
            input_offset: 0,
            inflater: Inflater::new(),
            output: vec![0; WINDOW_BYTES + OUTPUT_BYTES + ROOM_BYTES].into(),
            read: 0,
            filled: 0,
            member: 0,
            output_offset: 0,
            state: State::Header,
            checksum: crc32fast::Hasher::new(),
            member_bytes: 0,
            span_bytes,
            last_point: None,
            points: CheckpointWriter::new(span_bytes),
            hashing: SpanHasher::default(),
        }
    }

    /// Reads until the buffer is full or the source ends. The byte before what is left is kept: a span may begin in it.
    fn fill_input(&mut self) -> Result<(), Error> {
        if self.state == State::Deflate {
            self.settle();
        }
        self.hashing.take(&self.input, self.at);
        let kept = self.at.saturating_sub(1);
        self.input.copy_within(kept..self.end, 0);
        self.input_offset += kept as u64;
        (self.at, self.end) = (self.at - kept, self.end - kept);
        self.hashing.at = self.at;
        while self.end < self.input.len() && !self.is_last {
            match self.source.read(&mut self.input[self.end..]) {
                Ok(0) => self.is_last = true,
                Ok(read) => self.end += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(Error::Read { offset: self.input_offset + self.end as u64, source }),
            }
        }
        Ok(())
    }

    fn offset(&self) -> u64 {
        self.input_offset + self.at as u64
    }

    fn corrupt(&self, problem: &'static str) -> Error {
        if self.is_last && self.at >= self.end.saturating_sub(TRAILER_BYTES) {
            return Error::Truncated { compression: "gzip", offset: self.offset() };
        }
        Error::Corrupt { compression: "gzip", offset: self.offset(), problem }
    }

    /// Decodes more, as long as there is none to be read.
    fn advance(&mut self) -> Result<(), Error> {
        while self.read == self.filled && self.state != State::Ended {
            match self.state {
                State::Header => self.header()?,
                State::Deflate => self.deflate()?,
                State::Ended => {}
            }
        }
        Ok(())
    }

    fn header(&mut self) -> Result<(), Error> {
        let mut found = header(&self.input[self.at..self.end]);
        if !self.is_last && self.end - self.at < INPUT_BYTES / 2 {
            self.fill_input()?;
            found = header(&self.input[self.at..self.end]);
        }
        match found {
            Header::Bytes(length) => self.at += length,
            // As tapes pad, behind a member.
            _ if self.last_point.is_some() && self.input[self.at..self.end].iter().all(|&byte| byte == 0) => {
                self.at = self.end;
                self.fill_input()?;
                if self.at == self.end {
                    self.hashing.end();
                    self.state = State::Ended;
                }
                return Ok(());
            }
            Header::CutOff if self.is_last => {
                return Err(Error::Truncated { compression: "gzip", offset: self.offset() });
            }
            Header::CutOff => return Err(self.corrupt("a gzip header is too long")),
            Header::Wrong(_) if self.last_point.is_some() => {
                return Err(Error::TrailingGarbage { compression: "gzip", offset: self.offset() });
            }
            Header::Wrong(problem) => return Err(self.corrupt(problem)),
        }
        self.inflater.begin(0, 0);
        (self.member, self.member_bytes) = (self.filled, 0);
        self.checksum = crc32fast::Hasher::new();
        self.state = State::Deflate;
        self.consider_point(0);
        Ok(())
    }

    fn deflate(&mut self) -> Result<(), Error> {
        self.slide();
        let mut input = Input { bytes: &self.input[..self.end], at: self.at, is_last: self.is_last };
        let mut produced = self.filled - self.member;
        let found = self.inflater.run(&mut input, &mut self.output[self.member..], &mut produced);
        self.at = input.at;
        let before = std::mem::replace(&mut self.filled, self.member + produced);
        let new = &self.output[before..self.filled];
        self.checksum.update(new);
        self.member_bytes += new.len() as u64;
        self.output_offset += new.len() as u64;
        match found.map_err(|problem| self.corrupt(problem))? {
            Stop::Input => self.fill_input(),
            Stop::Output => Ok(()),
            Stop::BlockEnd => {
                // What is in the bit buffer goes back only where it must.
                if self.is_due() {
                    let bits = self.settle();
                    self.consider_point(bits);
                }
                Ok(())
            }
            Stop::StreamEnd => {
                self.settle();
                self.inflater.align();
                self.trailer()
            }
        }
    }

    fn settle(&mut self) -> u8 {
        let mut input = Input { bytes: &self.input[..self.end], at: self.at, is_last: self.is_last };
        let bits = self.inflater.settle(&mut input);
        self.at = input.at;
        bits
    }

    fn is_due(&self) -> bool {
        self.last_point.is_none_or(|last| self.output_offset - last > self.span_bytes)
    }

    fn consider_point(&mut self, bits: u8) {
        if !self.is_due() {
            return;
        }
        let window = &self.output[self.filled.saturating_sub(WINDOW_BYTES)..self.filled];
        let (input, output) = (self.input_offset + self.at as u64, self.output_offset);
        self.points.push(Checkpoint { input, output, bits, window });
        self.hashing.begin(&self.input, self.at, bits > 0);
        self.last_point = Some(output);
    }

    fn trailer(&mut self) -> Result<(), Error> {
        if self.end - self.at < TRAILER_BYTES {
            self.fill_input()?;
        }
        let Some(trailer) = self.input[self.at..self.end].first_chunk::<TRAILER_BYTES>() else {
            return Err(Error::Truncated { compression: "gzip", offset: self.offset() });
        };
        let [a, b, c, d, e, f, g, h] = *trailer;
        let checksum = std::mem::take(&mut self.checksum).finalize();
        // The length counts modulo 2^32.
        let length = u32::from_le_bytes([e, f, g, h]);
        if u32::from_le_bytes([a, b, c, d]) != checksum || u64::from(length) != self.member_bytes & 0xffff_ffff {
            return Err(self.corrupt("a gzip member's checksum or length is wrong"));
        }
        self.at += TRAILER_BYTES;
        if self.at == self.end {
            self.fill_input()?;
        }
        if self.at < self.end {
            self.state = State::Header;
        } else {
            self.hashing.take(&self.input, self.end);
            self.hashing.end();
            self.state = State::Ended;
        }
        Ok(())
    }

    /// Makes room, where all was read.
    fn slide(&mut self) {
        if self.output.len() - self.filled >= OUTPUT_BYTES / 2 + ROOM_BYTES {
            return;
        }
        let gone = self.filled.saturating_sub(WINDOW_BYTES);
        self.output.copy_within(gone..self.filled, 0);
        self.filled -= gone;
        self.read = self.filled;
        self.member = self.member.saturating_sub(gone);
    }
}

impl<R: Read> Read for GzipSpans<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if !buffer.is_empty() {
            self.advance()?;
        }
        let ready = &self.output[self.read..self.filled];
        let length = ready.len().min(buffer.len());
        buffer[..length].copy_from_slice(&ready[..length]);
        self.read += length;
        Ok(length)
    }
}

impl<R: Read> Spanning for GzipSpans<R> {
    fn finish(self) -> Spans {
        Spans { digests: self.hashing.digests, checkpoints: self.points.finish() }
    }
}

/// An uncompressed layer, whose spans are all of one length.
pub(super) struct TarSpans<R> {
    source: R,
    span_bytes: u64,
    /// What is missing of the span.
    left: u64,
    hasher: Option<Hasher>,
    digests: Vec<Digest>,
}

impl<R: Read> TarSpans<R> {
    pub(super) fn new(source: R, span_bytes: u64) -> Self {
        Self { source, span_bytes: span_bytes.max(1), left: 0, hasher: None, digests: Vec::new() }
    }
}

impl<R: Read> Read for TarSpans<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.source.read(buffer)?;
        let mut bytes = &buffer[..read];
        while !bytes.is_empty() {
            if self.left == 0 {
                self.digests.extend(self.hasher.replace(Hasher::sha256()).map(Hasher::finish));
                self.left = self.span_bytes;
            }
            let length = usize::try_from(self.left).map_or(bytes.len(), |left| left.min(bytes.len()));
            let (now, behind) = bytes.split_at(length);
            if let Some(hasher) = &mut self.hasher {
                hasher.update(now);
            }
            self.left -= length as u64;
            bytes = behind;
        }
        Ok(read)
    }
}

impl<R: Read> Spanning for TarSpans<R> {
    fn finish(mut self) -> Spans {
        self.digests.extend(self.hasher.take().map(Hasher::finish));
        Spans { digests: self.digests, checkpoints: Vec::new() }
    }
}

/// A zstd stream. A span begins with the first frame, and with each that begins more than `span_bytes` behind the span
/// before. Reading fails as soon as a span has more than `most` bytes: what follows might be any number of them.
pub(super) struct ZstdSpans<'a, R> {
    source: R,
    context: DCtx<'static>,
    input: Box<[u8]>,
    at: usize,
    end: usize,
    input_offset: u64,
    output_offset: u64,
    in_frame: bool,
    span_bytes: u64,
    starts: FrameStarts,
    hashing: SpanHasher,
    most: u64,
    /// Decoded bytes of the longest span, as far as was read.
    longest: &'a Cell<u64>,
}

impl<'a, R: Read> ZstdSpans<'a, R> {
    pub(super) fn new(source: R, span_bytes: u64, most: u64, longest: &'a Cell<u64>) -> Self {
        Self {
            source,
            context: zstd::decoder(),
            input: vec![0; INPUT_BYTES].into(),
            at: 0,
            end: 0,
            input_offset: 0,
            output_offset: 0,
            in_frame: false,
            span_bytes,
            starts: FrameStarts::default(),
            hashing: SpanHasher::default(),
            most,
            longest,
        }
    }

    fn offset(&self) -> u64 {
        self.input_offset + self.at as u64
    }

    /// Reads more, where all is decoded; says whether there is some.
    fn fill_input(&mut self) -> Result<bool, Error> {
        self.hashing.take(&self.input, self.end);
        self.input_offset += self.end as u64;
        (self.at, self.end, self.hashing.at) = (0, 0, 0);
        loop {
            match self.source.read(&mut self.input) {
                Ok(read) => {
                    self.end = read;
                    return Ok(read > 0);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(Error::Read { offset: self.offset(), source }),
            }
        }
    }

    /// Where a frame begins. One of nothing (a skippable one behind the last) begins no span.
    fn consider_start(&mut self) {
        let last = self.starts.0.last().map(|(_, output)| *output);
        if last.is_some_and(|last| self.output_offset - last <= self.span_bytes) {
            return;
        }
        self.hashing.begin(&self.input, self.at, false);
        self.starts.0.push((self.offset(), self.output_offset));
    }

    fn measure(&self) -> Result<(), Error> {
        let start = self.starts.0.last().map_or(0, |(_, output)| *output);
        self.longest.set(self.longest.get().max(self.output_offset - start));
        if self.longest.get() > self.most {
            let problem = "a frame is too long";
            return Err(Error::Corrupt { compression: "zstd", offset: self.offset(), problem });
        }
        Ok(())
    }

    fn decode(&mut self, buffer: &mut [u8]) -> Result<usize, Error> {
        loop {
            if self.at == self.end && !self.fill_input()? {
                if self.in_frame {
                    return Err(Error::Truncated { compression: "zstd", offset: self.offset() });
                }
                self.hashing.end();
                return Ok(0);
            }
            if !self.in_frame {
                self.consider_start();
            }
            let mut source = InBuffer::around(&self.input[self.at..self.end]);
            let mut target = OutBuffer::around(&mut *buffer);
            let found = self.context.decompress_stream(&mut target, &mut source);
            let (consumed, produced) = (source.pos(), target.pos());
            let hint = found.map_err(|code| zstd::error(code, self.offset()))?;
            self.at += consumed;
            self.in_frame = hint != 0;
            self.output_offset += produced as u64;
            self.measure()?;
            if produced > 0 {
                return Ok(produced);
            }
            if consumed == 0 {
                let problem = "decoder makes no progress";
                return Err(Error::Corrupt { compression: "zstd", offset: self.offset(), problem });
            }
        }
    }
}

impl<R: Read> Read for ZstdSpans<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() { Ok(0) } else { Ok(self.decode(buffer)?) }
    }
}

impl<R: Read> Spanning for ZstdSpans<'_, R> {
    fn finish(self) -> Spans {
        Spans { digests: self.hashing.digests, checkpoints: self.starts.write() }
    }
}
