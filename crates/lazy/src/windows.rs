//! A ztoc as it is kept: what an index is made of, and beside it the windows, each compressed by itself.
//!
//! A span is decoded with the 32 KiB before it. In memory, ten gigabytes of layers would have eighty megabytes of these;
//! so they stay on the disk, and each is read when its span has come.
//!
//! The file `ztoc` in a layer's directory, numbers little-endian:
//!
//! | bytes | |
//! |---|---|
//! | 8 | `LORISZTC` |
//! | 4 | version, 1 |
//! | 4 | number of windows |
//! | 4 | from the beginning of one to that of the next, in the ztoc |
//! | 4 | spans in front that have none |
//! | 8 | length of the ztoc |
//! | 8 | where the first window stands in it |
//! | 4 each | length of what follows: the ztoc without windows, and each window; each a zstd frame |

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    os::unix::fs::FileExt as _,
    path::Path,
};

use loris_format::{
    compression::{FrameDecoder, ZstdCompressor},
    digest::Digest,
    index::{Codec, FrameId},
    limits::Limits,
    soci::{self, WindowPlaces},
};

use crate::{
    cache::{create_private_directory, open_existing},
    error::StoreError,
};

const MAGIC: &[u8; 8] = b"LORISZTC";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 40;
const WINDOW_BYTES: usize = 32 << 10;
/// Windows are written while somebody waits for the layer.
const LEVEL: i32 = 3;

/// The windows of a layer's spans.
#[derive(Debug)]
pub(crate) struct Windows {
    file: File,
    places: WindowPlaces,
    /// Where each begins in the file; one more for the end of the last.
    offsets: Vec<u64>,
}

/// A ztoc that was kept.
pub(crate) struct Kept {
    /// The ztoc, with zeros in place of the windows.
    pub(crate) ztoc: Vec<u8>,
    pub(crate) windows: Windows,
}

/// Keeps a ztoc in a layer's directory, in one step.
pub(crate) fn save(directory: &Path, ztoc: &[u8], places: &WindowPlaces) -> Result<(), StoreError> {
    let path = directory.join("ztoc");
    let write = || -> io::Result<()> {
        create_private_directory(directory)?;
        let mut file = tempfile::Builder::new().prefix(".ztoc-").tempfile_in(directory)?;
        let mut compressor = ZstdCompressor::new(LEVEL);
        let mut lengths = Vec::with_capacity(places.count + 1);
        let table = HEADER_BYTES + 4 * (places.count + 1);
        // The header comes last: a table of lengths that are not known yet.
        file.write_all(&vec![0; table])?;
        let mut put = |bytes: &[u8]| -> io::Result<()> {
            let frame = compressor.compress(bytes);
            lengths.extend_from_slice(&number(frame.len())?.to_le_bytes());
            file.write_all(&frame)
        };
        put(&without_windows(ztoc, places))?;
        for window in windows(places) {
            put(ztoc.get(window).ok_or(io::ErrorKind::InvalidData)?)?;
        }
        let mut header = MAGIC.to_vec();
        let numbers = [VERSION, number(places.count)?, number(places.stride)?, number(places.left_out)?];
        numbers.iter().for_each(|number| header.extend_from_slice(&number.to_le_bytes()));
        header.extend_from_slice(&(ztoc.len() as u64).to_le_bytes());
        header.extend_from_slice(&(places.first as u64).to_le_bytes());
        header.extend_from_slice(&lengths);
        file.as_file().write_all_at(&header, 0)?;
        file.persist(&path).map_err(|error| error.error)?;
        Ok(())
    };
    write().map_err(StoreError::file(&path))
}

fn number(value: usize) -> io::Result<u32> {
    u32::try_from(value).map_err(|_| io::ErrorKind::FileTooLarge.into())
}

fn windows(places: &WindowPlaces) -> impl Iterator<Item = std::ops::Range<usize>> {
    let WindowPlaces { first, stride, count, .. } = *places;
    (0..count).map(move |number| first + number * stride).map(|start| start..start + WINDOW_BYTES)
}

fn without_windows(ztoc: &[u8], places: &WindowPlaces) -> Vec<u8> {
    let mut rest = Vec::with_capacity(ztoc.len().saturating_sub(places.count * WINDOW_BYTES));
    let mut at = 0;
    for window in windows(places) {
        rest.extend_from_slice(ztoc.get(at..window.start).unwrap_or_default());
        at = window.end;
    }
    rest.extend_from_slice(ztoc.get(at..).unwrap_or_default());
    rest
}

/// Reads what was kept of a ztoc with a digest; `None` where there is nothing, or nothing that has it.
pub(crate) fn load(directory: &Path, digest: &Digest, limits: &Limits) -> Option<Kept> {
    let mut file = open_existing(&directory.join("ztoc")).ok()?;
    let mut header = [0; HEADER_BYTES];
    file.read_exact(&mut header).ok()?;
    let word = |at: usize| Some(u32::from_le_bytes(*header.get(at..)?.first_chunk()?));
    let long = |at: usize| Some(u64::from_le_bytes(*header.get(at..)?.first_chunk()?));
    if &header[..8] != MAGIC || word(8)? != VERSION || long(24)? > limits.toc_bytes {
        return None;
    }
    let size = |number: u32| usize::try_from(number).ok();
    let places = WindowPlaces {
        first: usize::try_from(long(32)?).ok()?,
        count: size(word(12)?)?,
        stride: size(word(16)?)?,
        left_out: size(word(20)?)?,
    };
    let length = usize::try_from(long(24)?).ok()?;
    let end = places.count.checked_sub(1).map_or(Some(places.first), |last| {
        places.first.checked_add(last.checked_mul(places.stride)?)?.checked_add(WINDOW_BYTES)
    })?;
    if end > length || (places.count > 1 && places.stride < WINDOW_BYTES) {
        return None;
    }
    let mut table = vec![0; 4 * (places.count + 1)];
    file.read_exact(&mut table).ok()?;
    let mut offsets = vec![(HEADER_BYTES + table.len()) as u64];
    for entry in table.as_chunks::<4>().0 {
        offsets.push(offsets.last()?.checked_add(u64::from(u32::from_le_bytes(*entry)))?);
    }
    if file.metadata().ok()?.len() != *offsets.last()? {
        return None;
    }
    let windows = Windows { file, places, offsets };
    let ztoc = windows.rebuild(length, digest)?;
    Some(Kept { ztoc, windows })
}

impl Windows {
    /// Puts the ztoc together but for the windows, and checks its digest with them.
    fn rebuild(&self, length: usize, digest: &Digest) -> Option<Vec<u8>> {
        let mut decoder = FrameDecoder::new();
        let rest_length = length.checked_sub(self.places.count * WINDOW_BYTES)?;
        let rest = self.piece(&mut decoder, 0, rest_length)?;
        // Pages of it that stay zeros take no memory.
        let mut ztoc = vec![0; length];
        let mut hasher = digest.hasher();
        let (mut at, mut from) = (0, &rest[..]);
        for (number, window) in windows(&self.places).enumerate() {
            let (gap, behind) = from.split_at_checked(window.start.checked_sub(at)?)?;
            ztoc.get_mut(at..window.start)?.copy_from_slice(gap);
            hasher.update(gap);
            hasher.update(&self.piece(&mut decoder, number + 1, WINDOW_BYTES)?);
            (at, from) = (window.end, behind);
        }
        let last = ztoc.get_mut(at..)?;
        if last.len() != from.len() {
            return None;
        }
        last.copy_from_slice(from);
        hasher.update(from);
        (hasher.finish() == *digest).then_some(ztoc)
    }

    fn piece(&self, decoder: &mut FrameDecoder, number: usize, length: usize) -> Option<Vec<u8>> {
        let (start, end) = (*self.offsets.get(number)?, *self.offsets.get(number + 1)?);
        let mut frame = vec![0; usize::try_from(end - start).ok()?];
        self.file.read_exact_at(&mut frame, start).ok()?;
        // What is not a window is bounded by the file's length, which was checked against that of a ztoc.
        let limits = Limits { frame_bytes: length as u64, ..Limits::default() };
        decoder.decode(Codec::Zstd, &frame, length as u64, &limits).ok()
    }

    /// Returns what stands before a span in the tar. `None` where the file was damaged.
    pub(crate) fn before(&self, decoder: &mut FrameDecoder, frame: FrameId) -> Option<Vec<u8>> {
        let number = frame.0 as usize;
        match number.checked_sub(self.places.left_out) {
            Some(stored) if stored < self.places.count => self.piece(decoder, stored + 1, WINDOW_BYTES),
            Some(_) => None,
            None => Some(Vec::new()),
        }
    }
}

/// Finds the windows in a ztoc that was just fetched.
pub(crate) fn places(ztoc: &[u8], limits: &Limits) -> Result<WindowPlaces, String> {
    soci::window_places(ztoc, limits).map_err(|error| error.to_string())
}
