//! Content that another layer of the store has is copied and not fetched.
//!
//! Found by its digest ([`crate::digests`]), in whatever layer and place, complete or not, and believed by nobody: what is
//! copied is hashed, and published only where it is what it must be. A byte that was flipped on the disk in one layer does
//! not spread to another.

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::Path,
    sync::Arc,
};

use loris_format::{
    digest::Digest,
    index::{Extent, FrameId},
    position::DATA_ALIGNMENT,
};

use crate::{
    cache::{LayerCache, NO_FOLLOW, open_private},
    digests::{Place, layer_key},
    disk,
    error::EnsureError,
    filled::Glimpse,
    layer::{Counters, LazyLayer},
    quota::Room,
    store::Store,
};

/// What the layer's small files may grow by meanwhile, in bytes.
const SMALL_FILES: u64 = 4 * DATA_ALIGNMENT;
/// Bytes in memory while content is copied.
const BUFFER_BYTES: usize = 512 << 10;
/// The file in a layer's directory that says that content was copied to it: what stands around that was never seen.
pub(crate) const COPIED: &str = "copied";
/// Layers whose files are open while frames are filled.
const SOURCES: usize = 32;

impl LazyLayer {
    /// Fills what the store has elsewhere of some frames, and makes room on the disk for the rest, for as long as what it
    /// returns is kept. Blocks.
    ///
    /// # Errors
    /// Where there is no room, or the layer's own files fail.
    pub(crate) fn fill_from_store(&self, frames: &[FrameId]) -> Result<Option<Room>, EnsureError> {
        let missing = |frame: FrameId| {
            let extents = self.index.extents_of(frame).iter().map(|&number| number as usize);
            extents.filter(|&number| !self.cache.filled().contains(number))
        };
        let all: Vec<usize> = frames.iter().flat_map(|&frame| missing(frame)).collect();
        let store = self.cache.store();
        let needed = all.iter().map(|&number| blocks(self.extent(number))).fold(SMALL_FILES, u64::saturating_add);
        let room = store.room(needed).map_err(|error| EnsureError::no_room(self.digest, error))?;

        let wanted: Vec<(usize, Digest)> =
            all.into_iter().filter_map(|number| Some((number, self.extent(number).digest?))).collect();
        let places = store.digests().find(wanted.iter().map(|(_, digest)| digest));
        if places.iter().all(Vec::is_empty) {
            return Ok(room);
        }
        let directory = self.directory();
        let own = layer_key(directory.strip_prefix(store.root()).unwrap_or(directory));
        let mut sources = Sources { store, open: HashMap::new() };
        let mut copier = Copier::new(self.cache.data());
        let mut right = Vec::new();
        let mut right_bytes = 0;
        for ((number, digest), places) in wanted.into_iter().zip(places) {
            let extent = self.extent(number);
            let elsewhere = |place: &&Place| place.layer != own || place.extent as usize != number;
            for place in places.iter().filter(elsewhere) {
                let Some(source) = sources.get(place) else { continue };
                if right.is_empty() {
                    // Before the first write, which would hide that somebody has cut the file.
                    self.cache.check_length(&self.index).map_err(|error| self.file_error(error))?;
                    open_private(&directory.join(COPIED)).map_err(|error| self.file_error(error))?;
                }
                match copier.copy(source.data(), place.data, extent, &digest, self.has_blocks(number)) {
                    Ok(true) => {
                        right.push(number);
                        right_bytes += extent.length;
                        break;
                    }
                    Ok(false) => {
                        tracing::debug!(layer = %self.digest, extent = number, "found elsewhere and not right");
                    }
                    Err(error) => return Err(self.file_error(error)),
                }
            }
        }
        Counters::add(&self.counters.copied_bytes, right_bytes);
        if !right.is_empty() {
            self.cache.publish(right, right_bytes).map_err(|error| self.file_error(error))?;
        }
        Ok(room)
    }

    /// Says whether no other extent stands in the blocks of one. One of several of a file may begin or end inside of a
    /// block.
    fn has_blocks(&self, number: usize) -> bool {
        let extent = self.extent(number);
        let end = extent.data.0.saturating_add(extent.length).next_multiple_of(DATA_ALIGNMENT);
        extent.data.0.is_multiple_of(DATA_ALIGNMENT)
            && self.index.extents().get(number + 1).is_none_or(|next| next.data.0 >= end)
    }
}

/// Returns how much of the disk an extent can take, in bytes: all blocks that it touches.
fn blocks(extent: &Extent) -> u64 {
    let inside = extent.data.0 % DATA_ALIGNMENT;
    inside.saturating_add(extent.length).div_ceil(DATA_ALIGNMENT).saturating_mul(DATA_ALIGNMENT)
}

/// The layers that content is taken from.
struct Sources<'a> {
    store: &'a Store,
    open: HashMap<u64, Option<Source>>,
}

enum Source {
    /// Open in this process: read through its own descriptor, for which no pager is asked.
    Opened(Arc<LayerCache>),
    Files {
        filled: Glimpse,
        data: File,
    },
}

impl Sources<'_> {
    /// Returns the layer of a place, if it has the extent filled.
    fn get(&mut self, place: &Place) -> Option<&Source> {
        if self.open.len() >= SOURCES && !self.open.contains_key(&place.layer) {
            self.open.clear();
        }
        let store = self.store;
        let source = self.open.entry(place.layer).or_insert_with(|| Source::open(store, place.layer)).as_ref()?;
        let extent = place.extent as usize;
        let is_filled = match source {
            Source::Opened(cache) => {
                let filled = cache.filled();
                // Another process may have filled it.
                extent < filled.extents()
                    && (filled.contains(extent) || cache.refresh([extent]).is_ok_and(|()| filled.contains(extent)))
            }
            Source::Files { filled, .. } => filled.contains(u64::from(place.extent)),
        };
        is_filled.then_some(source)
    }
}

impl Source {
    fn open(store: &Store, key: u64) -> Option<Self> {
        let directory = store.directories().get(key)?;
        if let Some(cache) = store.opened_layer(&directory) {
            return Some(Self::Opened(cache));
        }
        let open = |path: &Path| File::options().read(true).custom_flags(NO_FOLLOW).open(path).ok();
        // The bitmap first: one beside an older data file is never there.
        let filled = Glimpse::new(open(&directory.join("filled"))?)?;
        let data = open(&directory.join("data"))?;
        data.metadata().ok().filter(std::fs::Metadata::is_file)?;
        Some(Self::Files { filled, data })
    }

    fn data(&self) -> &File {
        match self {
            Self::Opened(cache) => cache.data(),
            Self::Files { data, .. } => data,
        }
    }
}

/// Copies extents into one data file.
struct Copier<'a> {
    to: &'a File,
    buffer: Vec<u8>,
    /// Whether the file system can let two files have the same blocks.
    shares: bool,
}

impl<'a> Copier<'a> {
    fn new(to: &'a File) -> Self {
        Self { to, buffer: vec![0; BUFFER_BYTES], shares: shares_blocks(to) }
    }

    /// Copies an extent from where it is said to be, and says whether it is what it must be. `has_blocks` says that no
    /// other extent stands in its blocks. An error is one of the file that is written to.
    fn copy(&mut self, from: &File, at: u64, extent: &Extent, digest: &Digest, has_blocks: bool) -> io::Result<bool> {
        if at.checked_add(extent.length).is_none() {
            return Ok(false);
        }
        if self.shares && has_blocks && self.share(from, at, extent, digest) {
            return Ok(true);
        }
        let Some(hashes) = self.read(from, at, extent, digest) else { return Ok(false) };
        // What is small is still in the buffer.
        if extent.length <= self.buffer.len() as u64 {
            disk::write_all_at(self.to, &self.buffer[..part(extent.length, self.buffer.len())], extent.data.0)?;
            return Ok(true);
        }
        let mut hasher = digest.hasher();
        let mut done = 0;
        for expected in hashes {
            let part = part(extent.length - done, self.buffer.len());
            let bytes = &mut self.buffer[..part];
            if from.read_exact_at(bytes, at + done).is_err() {
                return Ok(false);
            }
            hasher.update(bytes);
            if hasher.clone().finish() != expected {
                // It changed meanwhile.
                return Ok(false);
            }
            disk::write_all_at(self.to, bytes, extent.data.0 + done)?;
            done += part as u64;
        }
        Ok(true)
    }

    /// Reads an extent from where it is said to be, and returns the hash at the end of each piece of it; `None` where it is
    /// not what it must be. Before anything is written: others may have filled the extent meanwhile, and read it.
    fn read(&mut self, from: &File, at: u64, extent: &Extent, digest: &Digest) -> Option<Vec<Digest>> {
        let mut hasher = digest.hasher();
        let mut hashes = Vec::new();
        let mut done = 0;
        while done < extent.length {
            let part = part(extent.length - done, self.buffer.len());
            let bytes = &mut self.buffer[..part];
            from.read_exact_at(bytes, at + done).ok()?;
            hasher.update(bytes);
            hashes.push(hasher.clone().finish());
            done += part as u64;
        }
        (hasher.finish() == *digest).then_some(hashes)
    }

    /// Lets both files have the same blocks, and says whether what is in them is right, up to the end of the last block,
    /// which is zeros behind the extent. (`copy_file_range(2)` shares blocks wherever that can be done for all of a range.
    /// Where it can't, the bytes had better come by here, since they must be hashed anyway.)
    fn share(&mut self, from: &File, at: u64, extent: &Extent, digest: &Digest) -> bool {
        let length = extent.length.next_multiple_of(DATA_ALIGNMENT);
        if !at.is_multiple_of(DATA_ALIGNMENT) {
            return false;
        }
        let Ok(whole) = usize::try_from(length) else { return false };
        // Whoever reads the extent already must not see what is wrong.
        if self.read(from, at, extent, digest).is_none() {
            return false;
        }
        let (mut from_at, mut to_at) = (at, extent.data.0);
        if !rustix::fs::copy_file_range(from, Some(&mut from_at), self.to, Some(&mut to_at), whole)
            .is_ok_and(|copied| copied == whole)
        {
            return false;
        }
        let mut hasher = digest.hasher();
        let mut done = 0;
        while done < length {
            let part = part(length - done, self.buffer.len());
            let bytes = &mut self.buffer[..part];
            if self.to.read_exact_at(bytes, extent.data.0 + done).is_err() {
                return false;
            }
            let content = bytes.len().min(usize::try_from(extent.length.saturating_sub(done)).unwrap_or(usize::MAX));
            hasher.update(&bytes[..content]);
            if bytes[content..].iter().any(|&byte| byte != 0) {
                // What is behind the extent over there is none of ours.
                let zeros = vec![0; part - content];
                return disk::write_all_at(self.to, &zeros, extent.data.0 + done + content as u64).is_ok()
                    && hasher.finish() == *digest;
            }
            done += part as u64;
        }
        hasher.finish() == *digest
    }
}

fn part(left: u64, most: usize) -> usize {
    usize::try_from(left).map_or(most, |left| left.min(most))
}

/// Says whether a file is on a file system whose files can have blocks in common (XFS, Btrfs, bcachefs).
fn shares_blocks(file: &File) -> bool {
    const MAGIC: [u64; 3] = [0x5846_5342, 0x9123_683e, 0xca45_1a4e];
    rustix::fs::fstatfs(file).is_ok_and(|found| MAGIC.contains(&(found.f_type as u64)))
}

#[cfg(test)]
mod tests {
    use loris_format::{
        index::NodeId,
        position::{DataOffset, FileOffset},
    };

    use super::*;

    #[test]
    fn what_is_wrong_is_never_written() {
        for length in [100, BUFFER_BYTES, 3 * BUFFER_BYTES + 7] {
            let right: Vec<u8> = (0..=250).cycle().take(length).collect();
            let digest = Digest::sha256_of(&right);
            let extent = Extent {
                node: NodeId(1),
                file_offset: FileOffset(0),
                data: DataOffset(DATA_ALIGNMENT),
                length: length as u64,
                frame: FrameId(0),
                frame_offset: 0,
                digest: Some(digest),
            };
            let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
            from.write_all_at(&right, 5).unwrap();
            from.write_all_at(&[right[length - 1] ^ 1], 5 + length as u64 - 1).unwrap();
            // Another process has filled it already.
            to.write_all_at(&right, DATA_ALIGNMENT).unwrap();
            let mut copier = Copier::new(&to);
            let mut copy = || copier.copy(&from, 5, &extent, &digest, false).unwrap();
            assert!(!copy());
            let read = || {
                let mut bytes = vec![0; length];
                to.read_exact_at(&mut bytes, DATA_ALIGNMENT).unwrap();
                bytes
            };
            assert!(read() == right, "{length}");
            from.write_all_at(&right, 5).unwrap();
            to.set_len(0).unwrap();
            assert!(copy());
            assert!(read() == right, "{length}");
        }
    }
}
