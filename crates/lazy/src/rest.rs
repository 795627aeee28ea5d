//! What stands between the extents of a layer: the tar headers and padding that no file holds.
//!
//! With it and the data file the layer's tar can be put together again and its DiffID checked once everything is here,
//! without fetching anything twice. It goes with each decoded frame for next to nothing: tar headers shrink to a tenth.
//!
//! The file `rest` in the layer's directory begins with 16 bytes, `LORISRST` and the version (1, little-endian). Records
//! follow: a length and a frame's number, 32 bits each and little-endian, and a gzip member of that length, which holds
//! the frame's number once more and what of the decoded frame is in none of its extents, in order. Records are only
//! appended, each batch by one write, so that several processes may. What is torn ends what counts; what is missing is
//! fetched again.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, BufReader, Read, Write as _},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::Path,
};

use loris_format::{
    compression::{FrameDecoder, GzipCompressor, GzipLevel},
    index::{Codec, FrameId, LayerIndex},
    limits::Limits,
};

use crate::{cache::NO_FOLLOW, plan::fetched_range};

const HEADER: [u8; 16] = *b"LORISRST\x01\0\0\0\0\0\0\0";
/// Most bytes between extents that are kept of one frame; what has more is read again for the proof.
pub(crate) const MOST_BYTES: u64 = 4 << 20;

/// Records that wait to be written together.
pub(crate) struct Records {
    compressor: GzipCompressor,
    bytes: Vec<u8>,
}

impl Records {
    pub(crate) fn new() -> Self {
        // The lowest level there is: it has to be quick.
        let level = GzipLevel::new(1).unwrap_or_default();
        Self { compressor: GzipCompressor::new(level), bytes: Vec::new() }
    }

    /// Takes in what stands between the extents of a frame that was decoded to its end.
    pub(crate) fn add(&mut self, index: &LayerIndex, frame: FrameId, decoded: &[u8]) {
        let mut record = frame.0.to_le_bytes().to_vec();
        let mut at = 0;
        for (start, end) in covered(index, frame) {
            record.extend_from_slice(decoded.get(at..start).unwrap_or_default());
            at = end;
        }
        record.extend_from_slice(decoded.get(at..).unwrap_or_default());
        let member = self.compressor.compress(&record);
        // At most a little longer than MOST_BYTES.
        self.bytes.extend_from_slice(&u32::try_from(member.len()).unwrap_or(u32::MAX).to_le_bytes());
        self.bytes.extend_from_slice(&frame.0.to_le_bytes());
        self.bytes.extend_from_slice(&member);
    }

    /// Returns how much there is to write, in bytes.
    pub(crate) fn length(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Appends everything to the file in `directory`.
    pub(crate) fn write(self, directory: &Path) -> io::Result<()> {
        if self.bytes.is_empty() {
            return Ok(());
        }
        let path = directory.join("rest");
        let open = || File::options().append(true).custom_flags(NO_FOLLOW).open(&path);
        let is_whole = |file: &File| file.metadata().map(|metadata| metadata.len() >= HEADER.len() as u64);
        let mut file = match open() {
            Ok(file) if is_whole(&file)? => file,
            found => {
                if found.is_ok() {
                    std::fs::remove_file(&path)?;
                }
                // Made under another name, so that nobody appends in front of the header; whoever comes second uses the
                // first one's.
                let mut new = tempfile::Builder::new().prefix(".rest-").tempfile_in(directory)?;
                new.write_all(&HEADER)?;
                match new.persist_noclobber(&path) {
                    Err(error) if error.error.kind() != io::ErrorKind::AlreadyExists => return Err(error.error),
                    _ => open()?,
                }
            }
        };
        file.write_all(&self.bytes)
    }
}

/// Returns what of a decoded frame is in extents: ranges, sorted, without overlap.
fn covered(index: &LayerIndex, frame: FrameId) -> Vec<(usize, usize)> {
    let place = |number: &u32| {
        let extent = &index.extents()[*number as usize];
        let start = usize::try_from(extent.frame_offset).ok()?;
        Some((start, start.checked_add(usize::try_from(extent.length).ok()?)?))
    };
    let mut ranges: Vec<(usize, usize)> = index.extents_of(frame).iter().filter_map(place).collect();
    ranges.sort_unstable();
    let mut joined: Vec<(usize, usize)> = Vec::with_capacity(ranges.len());
    for (start, end) in ranges {
        match joined.last_mut() {
            Some(last) if start <= last.1 => last.1 = last.1.max(end),
            _ => joined.push((start, end)),
        }
    }
    joined
}

/// Says whether there is a record of a frame once it was fetched, as far as the index tells.
pub(crate) fn can_be_kept(index: &LayerIndex, frame: FrameId) -> bool {
    let parts = &index.frames()[frame.0 as usize];
    let inside: usize = covered(index, frame).iter().map(|(start, end)| end - start).sum();
    parts.range == fetched_range(parts) && parts.decoded_length.saturating_sub(inside as u64) <= MOST_BYTES
}

/// The file of a layer, read.
pub(crate) struct Rest {
    file: Option<File>,
    /// Where each frame's member is, and how long.
    places: HashMap<FrameId, (u64, u32)>,
}

impl Rest {
    /// Finds out which frames have a record. Reads through the file once.
    pub(crate) fn open(directory: &Path, index: &LayerIndex) -> io::Result<Self> {
        let file = match File::options().read(true).custom_flags(NO_FOLLOW).open(directory.join("rest")) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Self { file: None, places: HashMap::new() });
            }
            Err(error) => return Err(error),
        };
        let mut places = HashMap::new();
        let length = file.metadata()?.len();
        let mut input = BufReader::with_capacity(256 << 10, &file);
        let mut header = [0; HEADER.len()];
        if input.read_exact(&mut header).is_ok() && header == HEADER {
            let mut at = HEADER.len() as u64;
            loop {
                let (mut size, mut frame) = ([0; 4], [0; 4]);
                if input.read_exact(&mut size).is_err() || input.read_exact(&mut frame).is_err() {
                    break;
                }
                let (size, frame) = (u32::from_le_bytes(size), FrameId(u32::from_le_bytes(frame)));
                at += 8;
                let is_whole = u64::from(size) <= (MOST_BYTES * 2).min(length.saturating_sub(at));
                if !is_whole || (frame.0 as usize) >= index.frames().len() {
                    break;
                }
                places.insert(frame, (at, size));
                at += u64::from(size);
                input.seek_relative(i64::from(size))?;
            }
        }
        Ok(Self { file: Some(file), places })
    }

    /// Says whether a frame has a record.
    pub(crate) fn has(&self, frame: FrameId) -> bool {
        self.places.contains_key(&frame)
    }

    /// Returns the decoded frame, whose extents are taken from `data`. `None` where there is no sound record of it.
    pub(crate) fn frame(
        &self,
        index: &LayerIndex,
        frame: FrameId,
        data: &File,
        decoder: &mut FrameDecoder,
        limits: &Limits,
    ) -> io::Result<Option<Vec<u8>>> {
        let (Some(file), Some(&(at, size))) = (&self.file, self.places.get(&frame)) else { return Ok(None) };
        let mut member = vec![0; size as usize];
        file.read_exact_at(&mut member, at)?;
        let record = decoder.decode_all(Codec::Gzip, &member, 4, MOST_BYTES + 4, limits);
        let Ok((record, true)) = record else { return Ok(None) };
        let Some(rest) = record.strip_prefix(&frame.0.to_le_bytes()) else { return Ok(None) };
        let covered = covered(index, frame);
        let inside: usize = covered.iter().map(|(start, end)| end - start).sum();
        let Some(total) = inside.checked_add(rest.len()).filter(|&total| total as u64 <= limits.frame_bytes) else {
            return Ok(None);
        };
        let mut decoded = vec![0; total];
        let (mut at, mut from) = (0, rest);
        for &(start, end) in covered.iter().chain([&(total, total)]) {
            let Some((gap, behind)) = start.checked_sub(at).and_then(|gap| from.split_at_checked(gap)) else {
                return Ok(None);
            };
            decoded[at..start].copy_from_slice(gap);
            (at, from) = (end, behind);
        }
        for &number in index.extents_of(frame) {
            let extent = &index.extents()[number as usize];
            let Ok(start) = usize::try_from(extent.frame_offset) else { return Ok(None) };
            let Ok(length) = usize::try_from(extent.length) else { return Ok(None) };
            data.read_exact_at(&mut decoded[start..start + length], extent.data.0)?;
        }
        Ok(Some(decoded))
    }
}
