//! The checkpoints of a gzip layer, as they stand in a ztoc; and what stands there for an uncompressed layer.
//!
//! ```text
//! i32 have, i64 span size, have × { i64 in, i64 out, u8 bits, u8 window[32768] }       little-endian, packed
//! ```
//!
//! `in` is the first whole byte behind the checkpoint, `bits` how many of the byte before belong to what follows. Nothing
//! says the version: in the first one, the first checkpoint (behind the usual header of 10 bytes) is left out.

use super::{
    flat::{Builder, Table, TooLong, Unsound, Value},
    ztoc::ZtocError,
};
use crate::compression::WINDOW_BYTES;

const HEADER_BYTES: usize = 12;
const POINT_BYTES: usize = 17 + WINDOW_BYTES;
/// Where the deflate stream begins behind a gzip header without name and comment.
const USUAL_HEADER_BYTES: u64 = 10;
static NO_WINDOW: [u8; WINDOW_BYTES] = [0; WINDOW_BYTES];

/// Where decoding can begin.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Checkpoint<'a> {
    /// The first whole byte behind it, in the blob.
    pub input: u64,
    /// The first byte behind it, in the tar.
    pub output: u64,
    /// How many upper bits of the byte before `input` belong to what follows, 0 to 7.
    pub bits: u8,
    /// The 32 KiB of the tar before `output`, zeros before its beginning.
    pub window: &'a [u8],
}

impl Checkpoint<'_> {
    /// Returns where the span behind the checkpoint begins, in the blob.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.input.saturating_sub(u64::from(self.bits != 0))
    }
}

/// The checkpoints of a gzip layer.
#[derive(Clone, Copy, Debug)]
pub struct Checkpoints<'a> {
    span_bytes: i64,
    points: &'a [u8],
    is_first_left_out: bool,
}

impl<'a> Checkpoints<'a> {
    /// Reads them.
    ///
    /// # Errors
    /// Where the length is neither that of version 1 nor that of version 2.
    pub fn read(blob: &'a [u8]) -> Result<Self, ZtocError> {
        let fail = || ZtocError::Zinfo { length: blob.len() };
        let (have, rest) = blob.split_first_chunk::<4>().ok_or_else(fail)?;
        let (span, points) = rest.split_first_chunk::<8>().ok_or_else(fail)?;
        let have = usize::try_from(i32::from_le_bytes(*have)).ok().filter(|have| *have > 0).ok_or_else(fail)?;
        if !points.len().is_multiple_of(POINT_BYTES) {
            return Err(fail());
        }
        let is_first_left_out = match have.checked_sub(points.len() / POINT_BYTES) {
            Some(0) => false,
            Some(1) => true,
            _ => return Err(fail()),
        };
        Ok(Self { span_bytes: i64::from_le_bytes(*span), points, is_first_left_out })
    }

    /// Returns how many there are, one at least.
    #[must_use]
    pub fn count(&self) -> usize {
        self.points.len() / POINT_BYTES + usize::from(self.is_first_left_out)
    }

    /// Returns how many decoded bytes were to be between two of them.
    #[must_use]
    pub fn span_bytes(&self) -> i64 {
        self.span_bytes
    }

    /// Returns all of them, in order.
    ///
    /// # Errors
    /// The items are errors where a checkpoint can't be one.
    pub fn iter(&self) -> impl Iterator<Item = Result<Checkpoint<'a>, ZtocError>> + use<'a> {
        let first = Checkpoint { input: USUAL_HEADER_BYTES, output: 0, bits: 0, window: &NO_WINDOW };
        let left_out = self.is_first_left_out.then_some(Ok(first));
        let offset = usize::from(self.is_first_left_out);
        let points = self.points.chunks_exact(POINT_BYTES).enumerate();
        left_out.into_iter().chain(points.map(move |(number, point)| checkpoint(point, number + offset)))
    }

    /// Returns where the window of a checkpoint stands in the blob; `None` for one that is left out or not there.
    #[must_use]
    pub fn window_at(&self, number: usize) -> Option<std::ops::Range<usize>> {
        let stored = number.checked_sub(usize::from(self.is_first_left_out))?;
        let start = stored.checked_mul(POINT_BYTES)?.checked_add(HEADER_BYTES + 17)?;
        (number < self.count()).then(|| start..start + WINDOW_BYTES)
    }
}

fn checkpoint(point: &[u8], number: usize) -> Result<Checkpoint<'_>, ZtocError> {
    let fail = || ZtocError::Checkpoint { number };
    let (input, rest) = point.split_first_chunk().ok_or_else(fail)?;
    let (output, rest) = rest.split_first_chunk().ok_or_else(fail)?;
    let (&bits, window) = rest.split_first().filter(|(bits, _)| **bits < 8).ok_or_else(fail)?;
    let offset = |bytes: &[u8; 8]| u64::try_from(i64::from_le_bytes(*bytes)).map_err(|_| fail());
    Ok(Checkpoint { input: offset(input)?, output: offset(output)?, bits, window })
}

/// Collects checkpoints.
#[derive(Debug)]
pub struct CheckpointWriter {
    blob: Vec<u8>,
    have: i32,
}

impl CheckpointWriter {
    /// Starts with none.
    #[must_use]
    pub fn new(span_bytes: u64) -> Self {
        let mut blob = vec![0; 4];
        blob.extend_from_slice(&i64::try_from(span_bytes).unwrap_or(i64::MAX).to_le_bytes());
        Self { blob, have: 0 }
    }

    /// Takes the next one. What the window lacks at its beginning is filled with zeros; of a longer one the end counts.
    pub fn push(&mut self, point: Checkpoint<'_>) {
        let offset = |at: u64| i64::try_from(at).unwrap_or(i64::MAX).to_le_bytes();
        self.blob.extend_from_slice(&offset(point.input));
        self.blob.extend_from_slice(&offset(point.output));
        self.blob.push(point.bits);
        let window = &point.window[point.window.len().saturating_sub(WINDOW_BYTES)..];
        self.blob.resize(self.blob.len() + WINDOW_BYTES - window.len(), 0);
        self.blob.extend_from_slice(window);
        // Far fewer: each has 32 KiB.
        self.have = self.have.saturating_add(1);
    }

    /// Returns them as version 2.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.blob[..4].copy_from_slice(&self.have.to_le_bytes());
        self.blob
    }
}

/// What a ztoc of ours has in place of checkpoints for a zstd layer: where each span begins, which is a frame and needs nothing
/// else. 16 bytes each: the place in the blob and the place in the tar, little-endian.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FrameStarts(pub Vec<(u64, u64)>);

impl FrameStarts {
    /// Reads them.
    ///
    /// # Errors
    /// Where they are no whole number.
    pub fn read(blob: &[u8]) -> Result<Self, ZtocError> {
        let (starts, rest) = blob.as_chunks::<16>();
        if !rest.is_empty() || starts.is_empty() {
            return Err(ZtocError::Zinfo { length: blob.len() });
        }
        let number = |bytes: &[u8]| bytes.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        Ok(Self(starts.iter().map(|start| (number(&start[..8]), number(&start[8..]))).collect()))
    }

    /// Writes them.
    #[must_use]
    pub fn write(&self) -> Vec<u8> {
        self.0.iter().flat_map(|(input, output)| [input.to_le_bytes(), output.to_le_bytes()]).flatten().collect()
    }
}

/// What a ztoc has in place of checkpoints for an uncompressed layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TarZinfo {
    /// Bytes of a span.
    pub span_bytes: u64,
    /// Bytes of the layer.
    pub size: u64,
}

impl TarZinfo {
    const VERSION: i32 = 2;

    /// Reads it.
    ///
    /// # Errors
    /// Where it is damaged or its numbers can't be right.
    pub fn read(blob: &[u8]) -> Result<Self, ZtocError> {
        let table = Table::root(blob)?;
        let number = |slot| -> Result<u64, ZtocError> {
            let number = table.i64(slot)?;
            u64::try_from(number).map_err(|_| ZtocError::OutOfRange { field: "span or layer size", value: number })
        };
        Ok(Self { span_bytes: number(1)?, size: number(2)? })
    }

    /// Writes it.
    ///
    /// # Errors
    /// None that can happen with this content.
    pub fn write(&self) -> Result<Vec<u8>, TooLong> {
        let mut builder = Builder::default();
        let number = |value: u64| Value::I64(i64::try_from(value).unwrap_or(i64::MAX));
        let mut fields = vec![(0, Value::I32(Self::VERSION))];
        fields.extend((self.span_bytes != 0).then(|| (1, number(self.span_bytes))));
        fields.extend((self.size != 0).then(|| (2, number(self.size))));
        let root = builder.table(&fields);
        builder.finish(root)
    }
}

impl From<Unsound> for ZtocError {
    fn from(error: Unsound) -> Self {
        Self::Unsound(error)
    }
}
