//! Where content is, by its digest: one file for the whole store.
//!
//! A hash table on disk with buckets of one page each. Nobody holds any of it in memory: a lookup is one `pread` of 4 KiB,
//! whatever the number of layers. 100 layers of 10,000 extents make a file of 64 MiB, sparse until it is filled.
//!
//! Nothing depends on it. A record is a hint: whoever follows it looks whether the place is there and filled, and hashes
//! what it finds. So nothing is synced, a torn record does not match its checksum and is a free place, a full bucket
//! loses a record, and a file that is damaged or of another version is replaced. The form stands in
//! `docs/formats/store.md`.
//!
//! Several processes write under `flock`, and read without.

use std::{
    collections::HashSet,
    fs::File,
    io,
    os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use loris_format::digest::Digest;

use crate::{
    cache::{NO_FOLLOW, open_private},
    filled::sha256,
};

/// The file, below the root of a store.
pub(crate) const FILE: &str = "digests";

const MAGIC: &[u8; 8] = b"LORISDIG";
const VERSION: u64 = 1;
/// Header and buckets.
const PAGE: usize = 4 << 10;
const RECORD: usize = 32;
const RECORDS: usize = PAGE / RECORD;
/// The table begins with 2^6 buckets (256 KiB, 8192 records) and ends with 2^16 (256 MiB, 8 million records).
const FIRST_BITS: u32 = 6;
const LAST_BITS: u32 = 16;
/// It grows to so many times its size.
const GROWTH_BITS: u32 = 2;
/// Most records of one digest: a licence that is in every layer must not fill a bucket.
const SAME: usize = 8;

/// Where an extent is said to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Names the layer, see [`layer_key`].
    pub(crate) layer: u64,
    /// Where it stands in the data file, in bytes.
    pub(crate) data: u64,
    /// Its bit in the bitmap.
    pub(crate) extent: u32,
}

/// Names a layer's directory, relative to the store's root, by the first 8 bytes of its SHA-256. Two that collide would
/// be taken for each other, which the hash of the content shows.
pub(crate) fn layer_key(relative: &Path) -> u64 {
    first_word(&sha256(relative.as_os_str().as_encoded_bytes()))
}

/// Returns the record that stands for all of a layer's: one like any other.
fn mark(layer: u64, layout: &[u8; 32]) -> (Digest, Place) {
    let mut name = layout.to_vec();
    name.extend_from_slice(&layer.to_le_bytes());
    (Digest::sha256_of(&name), Place { layer, data: 0, extent: u32::MAX })
}

/// The index of one store. What it can't do it leaves: content is fetched then.
#[derive(Debug)]
pub(crate) struct Digests {
    path: PathBuf,
    open: Mutex<Option<Table>>,
}

#[derive(Debug)]
struct Table {
    file: File,
    bits: u32,
    identity: (u64, u64),
}

impl Digests {
    pub(crate) fn new(root: &Path) -> Self {
        Self { path: root.join(FILE), open: Mutex::default() }
    }

    /// Returns where content is said to be, for each of some digests. Blocks for one read each.
    pub(crate) fn find<'a>(&self, digests: impl IntoIterator<Item = &'a Digest>) -> Vec<Vec<Place>> {
        let mut digests = digests.into_iter().peekable();
        if digests.peek().is_none() {
            return Vec::new();
        }
        let mut open = self.open();
        let Some(table) = self.current(&mut open) else { return digests.map(|_| Vec::new()).collect() };
        let mut page = [0; PAGE];
        digests
            .map(|digest| {
                let fingerprint = fingerprint(digest);
                if table.file.read_exact_at(&mut page, table.bucket(fingerprint)).is_err() {
                    return Vec::new();
                }
                // Their checksums are looked at last: most of a bucket is of other digests.
                let same = page.as_chunks::<RECORD>().0.iter().filter(|record| word(*record, 0) == fingerprint);
                same.filter_map(decode).map(|(_, place)| place).take(SAME).collect()
            })
            .collect()
    }

    /// Says whether a layer's extents are all noted.
    pub(crate) fn has(&self, layer: u64, layout: &[u8; 32]) -> bool {
        let (all, mark) = mark(layer, layout);
        self.find([&all]).iter().flatten().any(|found| *found == mark)
    }

    /// Notes where a layer's extents are, unless it has been done: `layout` hashes all of them. `alive` names the layers of
    /// the store, and is asked for where records of others are to be given up; `room` is asked before the file is made or
    /// grows to so many bytes, and what it returns is kept until then. Blocks for a read and a write for each bucket that
    /// changes.
    pub(crate) fn add<R>(
        &self,
        layer: u64,
        layout: &[u8; 32],
        extents: impl Iterator<Item = (Digest, u64, u32)>,
        alive: impl FnOnce() -> HashSet<u64>,
        room: impl Fn(u64) -> Option<R>,
    ) -> io::Result<()> {
        if self.has(layer, layout) {
            return Ok(());
        }
        let (all, mark) = mark(layer, layout);
        let mut records: Vec<(u64, Place)> =
            extents.map(|(digest, data, extent)| (fingerprint(&digest), Place { layer, data, extent })).collect();
        // Whoever finds the mark finds the others: it comes last.
        records.sort_unstable_by_key(|&(fingerprint, place)| (fingerprint, place.extent));
        let mut open = self.open();
        let Some(_lock) = self.lock(&mut open, &room)? else { return Ok(()) };
        let Some(table) = open.as_mut() else { return Ok(()) };
        let count = table.count()?.saturating_add(records.len() as u64 + 1);
        if count > table.capacity() / 10 * 7 && table.bits < LAST_BITS {
            let mut bits = table.bits;
            while count > (RECORDS as u64) << bits >> 1 && bits < LAST_BITS {
                bits = (bits + GROWTH_BITS).min(LAST_BITS);
            }
            // A table that may not grow loses records.
            if let Some(_room) = room(file_length(bits)) {
                *table = table.grown(bits, &self.path, &alive())?;
            }
        }
        let mut added = 0;
        for of_bucket in records.chunk_by(|one, next| table.bucket(one.0) == table.bucket(next.0)) {
            added += table.put(of_bucket)?;
        }
        added += table.put(&[(fingerprint(&all), mark)])?;
        let count = table.count()?.saturating_add(added);
        table.file.write_all_at(&count.to_le_bytes(), COUNT_AT)
    }

    fn open(&self) -> MutexGuard<'_, Option<Table>> {
        // A table is a descriptor and what its header says: nothing is left half done.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens the file that is there now; another process may have put a larger one in its place.
    fn current<'a>(&self, open: &'a mut Option<Table>) -> Option<&'a mut Table> {
        let metadata = std::fs::symlink_metadata(&self.path).ok()?;
        let identity = (metadata.dev(), metadata.ino());
        if open.as_ref().is_none_or(|table| table.identity != identity) {
            let file = File::options().read(true).write(true).custom_flags(NO_FOLLOW).open(&self.path).ok()?;
            *open = Table::load(file);
        }
        open.as_mut()
    }

    /// Locks the file that is there now, making one where there is none of use. `None` where another process has it locked
    /// for long.
    fn lock<R>(&self, open: &mut Option<Table>, room: impl Fn(u64) -> Option<R>) -> io::Result<Option<Locked>> {
        for attempt in 0..40 {
            if self.current(open).is_none() {
                let Some(_room) = room(file_length(FIRST_BITS)) else { return Ok(None) };
                *open = Some(Table::create(&self.path, FIRST_BITS)?);
            }
            let Some(table) = open.as_ref() else { continue };
            let file = table.file.try_clone()?;
            if file.try_lock().is_ok() {
                let locked = Locked(file);
                let identity = table.identity;
                if self.current(open).is_some_and(|table| table.identity == identity) {
                    return Ok(Some(locked));
                }
                continue;
            }
            std::thread::sleep(Duration::from_millis(attempt.min(10)));
        }
        Ok(None)
    }
}

/// Gives the lock back, which belongs to the opening that descriptors share.
struct Locked(File);

impl Drop for Locked {
    fn drop(&mut self) {
        // It fails only where there is no lock to give back.
        let _ = self.0.unlock();
    }
}

const COUNT_AT: u64 = 40;
const HEADER_CHECKED: usize = 24;

impl Table {
    fn load(file: File) -> Option<Self> {
        let mut header = [0; HEADER_CHECKED + 8];
        file.read_exact_at(&mut header, 0).ok()?;
        let (checked, sum) = header.split_at(HEADER_CHECKED);
        let [magic, version, bits] = [0, 8, 16].map(|at| word(checked, at));
        let bits = u32::try_from(bits).ok().filter(|bits| (FIRST_BITS..=LAST_BITS).contains(bits))?;
        let metadata = file.metadata().ok()?;
        let known = magic == u64::from_le_bytes(*MAGIC)
            && version == VERSION
            && sum == &sha256(checked)[..8]
            && metadata.is_file()
            && metadata.len() == file_length(bits);
        known.then(|| Self { identity: (metadata.dev(), metadata.ino()), file, bits })
    }

    /// Makes an empty one in the place of what is there.
    fn create(path: &Path, bits: u32) -> io::Result<Self> {
        let (file, table) = Self::begin(path, bits)?;
        file.persist(path).map_err(|error| error.error)?;
        Ok(table)
    }

    fn begin(path: &Path, bits: u32) -> io::Result<(tempfile::NamedTempFile, Self)> {
        let folder = path.parent().unwrap_or(Path::new("/"));
        let named = tempfile::Builder::new().prefix(".digests-").tempfile_in(folder)?;
        let file = open_private(named.path())?;
        let mut header = [*MAGIC, VERSION.to_le_bytes(), u64::from(bits).to_le_bytes()].concat();
        header.extend_from_slice(&sha256(&header)[..8]);
        file.set_len(file_length(bits))?;
        file.write_all_at(&header, 0)?;
        let metadata = file.metadata()?;
        Ok((named, Self { identity: (metadata.dev(), metadata.ino()), file, bits }))
    }

    /// Returns a larger one with all records of layers that are alive, which has taken the place of this one. It is not
    /// locked, but nobody else knows it before this one's lock goes.
    fn grown(&self, bits: u32, path: &Path, alive: &HashSet<u64>) -> io::Result<Self> {
        let (named, table) = Self::begin(path, bits)?;
        let mut page = [0; PAGE];
        let mut count = 0;
        for bucket in 0..1_u64 << self.bits {
            self.file.read_exact_at(&mut page, (bucket + 1) * PAGE as u64)?;
            let mut records: Vec<_> = page.as_chunks::<RECORD>().0.iter().filter_map(decode).collect();
            records.retain(|(_, place)| alive.contains(&place.layer));
            records.sort_unstable_by_key(|&(fingerprint, place)| (fingerprint, place.extent));
            // A bucket becomes several that lie side by side: the front of a fingerprint is the bucket's number.
            for of_bucket in records.chunk_by(|one, next| table.bucket(one.0) == table.bucket(next.0)) {
                count += table.put(of_bucket)?;
            }
        }
        table.file.write_all_at(&u64::to_le_bytes(count), COUNT_AT)?;
        named.persist(path).map_err(|error| error.error)?;
        Ok(table)
    }

    fn capacity(&self) -> u64 {
        (RECORDS as u64) << self.bits
    }

    /// Returns about how many records there are.
    fn count(&self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, COUNT_AT)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Returns where the bucket of a fingerprint begins, in bytes.
    fn bucket(&self, fingerprint: u64) -> u64 {
        ((fingerprint >> (u64::BITS - self.bits)) + 1) * PAGE as u64
    }

    /// Puts records of one bucket into it, and returns how many more it has then.
    fn put(&self, records: &[(u64, Place)]) -> io::Result<u64> {
        let Some(&(first, _)) = records.first() else { return Ok(0) };
        let at = self.bucket(first);
        let mut page = [0; PAGE];
        self.file.read_exact_at(&mut page, at)?;
        let slots = page.as_chunks_mut::<RECORD>().0;
        let mut added = 0;
        for &(fingerprint, place) in records {
            let mut free = None;
            let mut same = Vec::new();
            let mut known = None;
            for (number, slot) in slots.iter().enumerate() {
                match word(slot, 0) {
                    0 => free = free.or(Some(number)),
                    other if other == fingerprint => match decode(slot) {
                        Some((_, found)) => {
                            if (found.layer, found.extent) == (place.layer, place.extent) {
                                known = Some(number);
                            }
                            same.push(number);
                        }
                        None => free = Some(number),
                    },
                    _ => {}
                }
            }
            // Which of several goes is as good as any; not always the same one.
            let turn = usize::try_from(place.layer % 1024).unwrap_or_default() + place.extent as usize;
            let slot = match (known, free) {
                (Some(known), _) => known,
                (None, _) if same.len() >= SAME => same[turn % same.len()],
                (None, Some(free)) => {
                    added += 1;
                    free
                }
                // A torn record before any other.
                (None, None) => slots.iter().position(|slot| decode(slot).is_none()).unwrap_or(turn % RECORDS),
            };
            slots[slot] = encode(fingerprint, place);
        }
        self.file.write_all_at(&page, at)?;
        Ok(added)
    }
}

fn file_length(bits: u32) -> u64 {
    ((1_u64 << bits) + 1) * PAGE as u64
}

/// The first 8 bytes of a digest, so that their front numbers a bucket. Zero, which is a free place, is made one.
fn fingerprint(digest: &Digest) -> u64 {
    let bytes: &[u8] = match digest {
        Digest::Sha256(bytes) => bytes,
        Digest::Sha512(bytes) => bytes,
    };
    first_word(bytes).max(1)
}

fn first_word(bytes: &[u8]) -> u64 {
    bytes.first_chunk().copied().map_or(0, u64::from_be_bytes)
}

fn word(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|rest| rest.first_chunk().copied()).map_or(0, u64::from_le_bytes)
}

fn half_word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk().copied()).map_or(0, u32::from_le_bytes)
}

fn encode(fingerprint: u64, place: Place) -> [u8; RECORD] {
    let mut record = [0; RECORD];
    record[..8].copy_from_slice(&fingerprint.to_le_bytes());
    record[8..16].copy_from_slice(&place.layer.to_le_bytes());
    record[16..24].copy_from_slice(&place.data.to_le_bytes());
    record[24..28].copy_from_slice(&place.extent.to_le_bytes());
    let sum = check(&record);
    record[28..].copy_from_slice(&sum.to_le_bytes());
    record
}

fn decode(record: &[u8; RECORD]) -> Option<(u64, Place)> {
    let fingerprint = word(record, 0);
    let (extent, sum) = (half_word(record, 24), half_word(record, 28));
    (fingerprint != 0 && sum == check(record))
        .then(|| (fingerprint, Place { layer: word(record, 8), data: word(record, 16), extent }))
}

/// Tells a record that was written whole from one that was not (FNV-1a of 32 bits). Against accidents, not against anyone.
fn check(record: &[u8; RECORD]) -> u32 {
    record[..28].iter().fold(0x811c_9dc5, |hash, &byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(number: u64) -> Digest {
        Digest::sha256_of(&number.to_le_bytes())
    }

    fn add(index: &Digests, layer: u64, numbers: impl Iterator<Item = u64>) {
        let extents = numbers.zip(0..).map(|(number, extent)| (digest(number), u64::from(extent) * 4096, extent));
        index.add(layer, &[7; 32], extents, || (0..1000).collect(), Some).unwrap();
    }

    #[test]
    fn what_was_added_is_found_also_by_others_and_after_growing() {
        let directory = tempfile::tempdir().unwrap();
        let (one, two) = (Digests::new(directory.path()), Digests::new(directory.path()));
        assert_eq!(one.find([&digest(0)]), [vec![]]);
        let mut sizes = vec![];
        for layer in 0..20 {
            let index = if layer % 2 == 0 { &one } else { &two };
            add(index, layer, layer * 1000..(layer + 1) * 1000);
            sizes.push(directory.path().join(FILE).metadata().unwrap().len());
        }
        assert!(sizes.first() < sizes.last(), "{sizes:?}");
        for index in [&one, &two, &Digests::new(directory.path())] {
            let digests: Vec<_> = (0..20_000).map(digest).collect();
            for (number, places) in (0..).zip(index.find(&digests)) {
                let extent = number % 1000;
                let place = Place { layer: u64::from(number / 1000), data: u64::from(extent) * 4096, extent };
                assert_eq!(places, [place], "{number}");
            }
            assert_eq!(index.find([&digest(20_000)]), [vec![]]);
        }
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_layer_is_added_once() {
        let directory = tempfile::tempdir().unwrap();
        let index = Digests::new(directory.path());
        add(&index, 3, 0..10);
        let again = |layout| {
            let mut asked = false;
            let extents = std::iter::from_fn(|| {
                asked = true;
                None
            });
            index.add(3, layout, extents, HashSet::new, Some).unwrap();
            asked
        };
        assert!(!again(&[7; 32]));
        assert!(again(&[8; 32]), "another layout of it");
    }

    #[test]
    fn without_room_it_neither_begins_nor_grows() {
        let directory = tempfile::tempdir().unwrap();
        let index = Digests::new(directory.path());
        let add = |layer: u64, room: fn(u64) -> Option<()>| {
            let extents = (0..2000).map(|extent| (digest(layer * 2000 + u64::from(extent)), 0, extent));
            index.add(layer, &[7; 32], extents, || (0..100).collect(), room).unwrap();
            directory.path().join(FILE).metadata().map_or(0, |metadata| metadata.len())
        };
        assert_eq!(add(0, |_| None), 0);
        for layer in 0..8 {
            assert_eq!(add(layer, |bytes| (bytes < 300_000).then_some(())), file_length(FIRST_BITS));
        }
        assert!(add(8, |_| Some(())) > file_length(FIRST_BITS));
    }

    #[test]
    fn one_digest_has_few_records_and_crowds_out_no_other() {
        let directory = tempfile::tempdir().unwrap();
        let index = Digests::new(directory.path());
        add(&index, 0, 100..101);
        for layer in 1..400 {
            add(&index, layer, 5..6);
        }
        let found = index.find([&digest(5), &digest(100)]);
        assert_eq!((found[0].len(), found[1].len()), (SAME, 1));
    }

    #[test]
    fn damage_is_a_miss() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(FILE);
        let index = Digests::new(directory.path());
        let all: Vec<_> = (0..100).map(digest).collect();
        let found = |index: &Digests| index.find(&all).iter().filter(|places| !places.is_empty()).count();
        add(&index, 1, 0..100);
        let good = std::fs::read(&path).unwrap();
        // Torn records, in each of the bytes that matter.
        for (at, byte) in good.iter().enumerate().skip(PAGE) {
            let is_mark = good[at / RECORD * RECORD + 24..][..4] == [0xff; 4];
            if *byte != 0 && !is_mark && at % 7 == 0 {
                let mut torn = good.clone();
                torn[at] ^= 1;
                std::fs::write(&path, &torn).unwrap();
                assert_eq!(found(&index), 99, "byte {at}");
            }
        }
        for bad in [&good[..PAGE], &[&good[..16], &[9], &good[17..]].concat(), b"", b"LORISDIG"] {
            std::fs::write(&path, bad).unwrap();
            let index = Digests::new(directory.path());
            assert_eq!(found(&index), 0);
            add(&index, 1, 0..100);
            assert_eq!(found(&index), 100);
        }
    }

    #[test]
    fn a_process_that_stands_still_with_the_lock_holds_nobody_up() {
        let directory = tempfile::tempdir().unwrap();
        add(&Digests::new(directory.path()), 1, 0..1);
        let held = File::open(directory.path().join(FILE)).unwrap();
        held.lock().unwrap();
        let index = Digests::new(directory.path());
        add(&index, 2, 1..2);
        assert_eq!(index.find([&digest(0), &digest(1)]).iter().map(Vec::len).collect::<Vec<_>>(), [1, 0]);
    }
}
