//! The *filled* bitmap: which extents are in the data file, verified. One bit each.
//!
//! The words in memory answer; the file keeps them over a restart, in two copies that differ in what they survive:
//!
//! | bytes | content |
//! |---|---|
//! | 0..4096 | header, see [`Header`] |
//! | 4096.. | *durable* bits, little-endian words of 64: their data was synced to the disk before them |
//! | next multiple of 4096.. | *recent* bits, same form: their data was written before them, since the boot in the header |
//!
//! A killed process loses nothing: what it wrote is in the page cache, and the recent bits count until the machine
//! boots again. After a power failure or a reboot only the durable bits count. Each set is written after what it speaks
//! of, so that no bit is ever set for data that isn't there.
//!
//! Several processes may use the file at once: bits are merged into it under `flock`, never just overwritten. A process
//! that takes bits away (the data behind them was found to be wrong) counts that in the file, and the others see it the
//! next time they look, a fraction of a second later.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use loris_format::digest::Digest;

use crate::disk;

/// Bits of a word.
const BITS: usize = 64;
/// Header and bit sets start at multiples of this, so that a torn write to one does not touch another.
const SECTION: u64 = 4 << 10;
/// Words are read and written together where fewer than this lie between them.
const RUN_WORDS: usize = 64;
/// How often it is tried to lock the file, for a second all together.
const ATTEMPTS: u32 = 95;
/// How often we look whether another process has taken bits away, in milliseconds.
const HEED_MS: u64 = 200;

/// The first 4096 bytes of the file; integers are little-endian.
///
/// | bytes | content |
/// |---|---|
/// | 0..8 | `LORISBIT` |
/// | 8..16 | version, 1 |
/// | 16..48 | SHA-256 of the blob's digest as text |
/// | 48..80 | SHA-256 of the layout: where each extent stands and what it must hash to |
/// | 80..88 | number of extents |
/// | 88..96 | size of the data file |
/// | 96..104 | inode number of the data file: one that was put in its place is not taken for it |
/// | 104..120 | the boot in which the recent bits were written |
/// | 120..152 | SHA-256 of bytes 0..120 |
/// | 152..160 | how often bits were taken away; compared for being the same, so that no damage to it matters |
/// | 160..4096 | zeros |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) blob: [u8; 32],
    pub(crate) layout: [u8; 32],
    pub(crate) extents: u64,
    pub(crate) data_length: u64,
    pub(crate) data_inode: u64,
    pub(crate) boot: BootId,
}

const MAGIC: &[u8; 8] = b"LORISBIT";
const VERSION: u64 = 1;
const CHECKED: usize = 120;
const FORGOTTEN_AT: u64 = 152;

impl Header {
    fn to_bytes(self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(usize::try_from(SECTION).unwrap_or_default());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&self.blob);
        bytes.extend_from_slice(&self.layout);
        bytes.extend_from_slice(&self.extents.to_le_bytes());
        bytes.extend_from_slice(&self.data_length.to_le_bytes());
        bytes.extend_from_slice(&self.data_inode.to_le_bytes());
        bytes.extend_from_slice(&self.boot.0);
        bytes.extend_from_slice(&sha256(&bytes));
        bytes.resize(bytes.capacity(), 0);
        bytes
    }

    /// Returns `None` where the bytes are no header of this version or are damaged.
    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let checked = bytes.get(..CHECKED)?;
        if bytes.get(CHECKED..CHECKED + 32)? != sha256(checked) {
            return None;
        }
        let mut rest = checked;
        let mut magic = [0; 8];
        take(&mut rest, &mut magic)?;
        let known = magic == *MAGIC && take_u64(&mut rest)? == VERSION;
        let mut header =
            Self { blob: [0; 32], layout: [0; 32], extents: 0, data_length: 0, data_inode: 0, boot: BootId::UNKNOWN };
        take(&mut rest, &mut header.blob)?;
        take(&mut rest, &mut header.layout)?;
        header.extents = take_u64(&mut rest)?;
        header.data_length = take_u64(&mut rest)?;
        header.data_inode = take_u64(&mut rest)?;
        take(&mut rest, &mut header.boot.0)?;
        known.then_some(header)
    }
}

fn take(from: &mut &[u8], into: &mut [u8]) -> Option<()> {
    let (front, rest) = from.split_at_checked(into.len())?;
    into.copy_from_slice(front);
    *from = rest;
    Some(())
}

fn take_u64(from: &mut &[u8]) -> Option<u64> {
    let mut bytes = [0; 8];
    take(from, &mut bytes)?;
    Some(u64::from_le_bytes(bytes))
}

pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    match Digest::sha256_of(bytes) {
        Digest::Sha256(hash) => hash,
        Digest::Sha512(_) => unreachable!("sha256_of gives SHA-256"),
    }
}

/// Names one run of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BootId(pub(crate) [u8; 16]);

impl BootId {
    /// Equal to no boot, itself included: see [`BootId::is_same`].
    pub(crate) const UNKNOWN: Self = Self([0; 16]);

    /// Asks the kernel (`random(4)`). Where it does not say, recent bits are never trusted after a restart.
    pub(crate) fn current() -> Self {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let mut boot = Self::UNKNOWN;
        if text.trim().len() == 36 {
            boot.0.copy_from_slice(&sha256(text.trim().as_bytes())[..16]);
        }
        boot
    }

    fn is_same(self, other: Self) -> bool {
        self == other && self != Self::UNKNOWN
    }
}

/// What a bitmap's file turned out to be.
pub(crate) enum Loaded {
    /// Good for use.
    Usable(FilledMap),
    /// Of another layer, layout, version or data file; damaged; or of a boot that is over, where this may not be changed.
    Unusable,
}

/// The bitmap of one data file.
#[derive(Debug)]
pub(crate) struct FilledMap {
    words: Vec<AtomicU64>,
    /// What is known to be durable; a subset of `words`.
    durable: Vec<AtomicU64>,
    extents: usize,
    count: AtomicUsize,
    /// What the file counted when it was last looked at.
    forgotten: AtomicU64,
    opened: Instant,
    /// When it was last looked at, in milliseconds after `opened`.
    heeded_ms: AtomicU64,
    /// The lock is for whoever changes words or the file, so that the two agree.
    file: Mutex<File>,
}

/// Which of the two copies in the file.
#[derive(Clone, Copy)]
enum Set {
    Durable,
    Recent,
}

impl FilledMap {
    /// Writes a bitmap with no bit set over whatever `file` holds. Every block is allocated, so that a full disk shows
    /// now and not when the first extent is published.
    pub(crate) fn create(file: File, header: &Header) -> io::Result<Self> {
        let map = Self::empty(file, header)?;
        {
            let file = map.file();
            file.set_len(0)?;
            let zeros = vec![0; usize::try_from(2 * map.set_bytes()).unwrap_or(usize::MAX)];
            disk::write_all_at(&file, &zeros, SECTION)?;
            // Last: what was cut off before here is no bitmap.
            disk::write_all_at(&file, &header.to_bytes(), 0)?;
        }
        Ok(map)
    }

    /// Reads a bitmap. Where another boot wrote it, it is brought into this one if `alone` (nobody else has it open).
    pub(crate) fn load(file: File, expected: &Header, alone: bool) -> io::Result<Loaded> {
        let map = Self::empty(file, expected)?;
        let usable = map.read_from_file(expected, alone)?;
        Ok(if usable { Loaded::Usable(map) } else { Loaded::Unusable })
    }

    fn empty(file: File, header: &Header) -> io::Result<Self> {
        let extents = usize::try_from(header.extents).map_err(io::Error::other)?;
        let words = || (0..extents.div_ceil(BITS)).map(|_| AtomicU64::new(0)).collect();
        Ok(Self {
            words: words(),
            durable: words(),
            extents,
            count: AtomicUsize::new(0),
            forgotten: AtomicU64::new(0),
            opened: Instant::now(),
            heeded_ms: AtomicU64::new(0),
            file: Mutex::new(file),
        })
    }

    fn read_from_file(&self, expected: &Header, alone: bool) -> io::Result<bool> {
        let file = self.file();
        if file.metadata()?.len() != SECTION + 2 * self.set_bytes() {
            return Ok(false);
        }
        let mut bytes = [0; CHECKED + 32];
        file.read_exact_at(&mut bytes, 0)?;
        let Some(header) =
            Header::from_bytes(&bytes).filter(|found| Header { boot: expected.boot, ..*found } == *expected)
        else {
            return Ok(false);
        };
        self.forgotten.store(read_forgotten(&file)?, Ordering::Relaxed);
        let durable = self.read_words(&file, Set::Durable, 0..self.words.len())?;
        for (word, bits) in self.durable.iter().zip(&durable) {
            word.store(*bits, Ordering::Relaxed);
        }
        if header.boot.is_same(expected.boot) {
            let recent = self.read_words(&file, Set::Recent, 0..self.words.len())?;
            for (number, bits) in recent.iter().enumerate() {
                self.set(number, *bits | durable[number]);
            }
            return Ok(true);
        }
        if !alone {
            return Ok(false);
        }
        // The recent bits speak of a page cache that is gone. They must be off the disk before the header calls them ours.
        self.write_words(&file, Set::Recent, 0, &durable)?;
        disk::sync_data(&file)?;
        disk::write_all_at(&file, &expected.to_bytes(), 0)?;
        self.forgotten.store(0, Ordering::Relaxed);
        for (number, bits) in durable.iter().enumerate() {
            self.set(number, *bits);
        }
        Ok(true)
    }

    /// Returns the number of bits.
    pub(crate) fn extents(&self) -> usize {
        self.extents
    }

    /// Returns the number of bits that are set.
    pub(crate) fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Says whether an extent is filled. What was written before its bit was set can be read after.
    pub(crate) fn contains(&self, extent: usize) -> bool {
        self.words[extent / BITS].load(Ordering::Acquire) & bit(extent) != 0
    }

    /// Says whether all of `extents` are filled. Takes no lock.
    pub(crate) fn contains_all(&self, extents: std::ops::Range<usize>) -> bool {
        let mut at = extents.start;
        while at < extents.end {
            let word = at / BITS;
            let mask = mask(at, extents.end);
            if self.words[word].load(Ordering::Acquire) & mask != mask {
                return false;
            }
            at = (word + 1) * BITS;
        }
        true
    }

    /// Sets bits, in the file first. Their data must have been written. Blocks for a few system calls.
    pub(crate) fn publish(&self, extents: impl IntoIterator<Item = usize>) -> io::Result<()> {
        let file = self.file();
        let _merging = Merging::begin(&file);
        self.merge(&file, Set::Recent, &by_word(extents), |number, bits| self.set(number, bits))
    }

    /// Takes over what other processes have filled of `extents` meanwhile.
    pub(crate) fn refresh(&self, extents: impl IntoIterator<Item = usize>) -> io::Result<()> {
        let file = self.file();
        for run in runs(&by_word(extents)) {
            let first = run[0].0;
            let bits = self.read_words(&file, Set::Recent, first..run[run.len() - 1].0 + 1)?;
            for (number, bits) in (first..).zip(bits) {
                self.set(number, bits);
            }
        }
        Ok(())
    }

    /// Clears bits whose data turned out to be gone or wrong, also for other processes that use the file.
    pub(crate) fn forget(&self, extents: impl IntoIterator<Item = usize>) -> io::Result<()> {
        let file = self.file();
        let cleared = by_word(extents);
        for &(number, bits) in &cleared {
            self.clear(number, bits);
        }
        self.erase(&file, &cleared)?;
        // Durable bits of wrong data must not come back with the next boot.
        disk::sync_data(&file)
    }

    /// Gives up bits that another process has taken away. Looks into the file now and then, and never waits for whoever is
    /// at it. Says whether another process had something to say: it took bits away, or [announced](Self::announce).
    pub(crate) fn heed(&self) -> io::Result<bool> {
        let now = u64::try_from(self.opened.elapsed().as_millis()).unwrap_or(u64::MAX);
        if now.saturating_sub(self.heeded_ms.load(Ordering::Relaxed)) < HEED_MS {
            return Ok(false);
        }
        let Ok(file) = self.file.try_lock() else { return Ok(false) };
        self.heeded_ms.store(now, Ordering::Relaxed);
        self.heed_in(&file)
    }

    fn heed_in(&self, file: &File) -> io::Result<bool> {
        let forgotten = read_forgotten(file)?;
        if forgotten == self.forgotten.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let all = 0..self.words.len();
        let durable = self.read_words(file, Set::Durable, all.clone())?;
        let recent = self.read_words(file, Set::Recent, all)?;
        for (number, kept) in durable.iter().zip(&recent).map(|(durable, recent)| durable | recent).enumerate() {
            // Whatever is set here was set in the file first.
            let gone = self.words[number].load(Ordering::Acquire) & !kept;
            if gone != 0 {
                self.clear(number, gone);
            }
        }
        self.forgotten.store(forgotten, Ordering::Relaxed);
        Ok(true)
    }

    /// Returns the bits that are set and not yet durable, to be handed to [`FilledMap::make_durable`] once the data was
    /// synced.
    pub(crate) fn volatile(&self) -> Volatile {
        let bits = |(number, word): (usize, &AtomicU64)| {
            let bits = word.load(Ordering::Acquire) & !self.durable[number].load(Ordering::Relaxed);
            (bits != 0).then_some((number, bits))
        };
        Volatile(self.words.iter().enumerate().filter_map(bits).collect())
    }

    /// Writes bits whose data was synced after they were set, and waits for the disk.
    pub(crate) fn make_durable(&self, synced: &Volatile) -> io::Result<()> {
        if synced.0.is_empty() {
            return Ok(());
        }
        let file = self.file();
        {
            let _merging = Merging::begin(&file);
            self.heed_in(&file)?;
            // Less what was forgotten since, here or elsewhere.
            let synced: Vec<_> = synced
                .0
                .iter()
                .map(|&(number, bits)| (number, bits & self.words[number].load(Ordering::Acquire)))
                .collect();
            self.merge(&file, Set::Durable, &synced, |number, bits| {
                self.durable[number].fetch_or(bits, Ordering::Relaxed);
            })?;
        }
        // Not under the lock: a slow disk must hold up nobody who publishes.
        let copy = file.try_clone()?;
        drop(file);
        disk::sync_data(&copy)
    }

    /// Clears bits whose data could not be synced: it may be gone from the page cache without having reached the disk.
    pub(crate) fn forget_volatile(&self, lost: &Volatile) -> io::Result<()> {
        let file = self.file();
        for &(number, bits) in &lost.0 {
            self.clear(number, bits);
        }
        self.erase(&file, &lost.0)
    }

    /// Lets other processes that use the file look at what else there is to know of the layer, the next time they heed.
    pub(crate) fn announce(&self) -> io::Result<()> {
        self.erase(&self.file(), &[])
    }

    fn file(&self) -> MutexGuard<'_, File> {
        // Nothing is left half done where a holder panics: words and file only ever lag behind the data.
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, number: usize, bits: u64) {
        let Some(word) = self.words.get(number) else { return };
        let bits = bits & mask(number * BITS, self.extents);
        let before = word.fetch_or(bits, Ordering::Release);
        self.count.fetch_add((bits & !before).count_ones() as usize, Ordering::Relaxed);
    }

    fn clear(&self, number: usize, bits: u64) {
        self.durable[number].fetch_and(!bits, Ordering::Relaxed);
        let before = self.words[number].fetch_and(!bits, Ordering::AcqRel);
        self.count.fetch_sub((bits & before).count_ones() as usize, Ordering::Relaxed);
    }

    fn erase(&self, file: &File, cleared: &[(usize, u64)]) -> io::Result<()> {
        let _merging = Merging::begin(file);
        self.heed_in(file)?;
        for set in [Set::Recent, Set::Durable] {
            for run in runs(cleared) {
                let first = run[0].0;
                let mut bits = self.read_words(file, set, first..run[run.len() - 1].0 + 1)?;
                for &(number, cleared) in run {
                    bits[number - first] &= !cleared;
                }
                self.write_words(file, set, first, &bits)?;
            }
        }
        // Last: whoever sees the count sees the bits.
        let forgotten = self.forgotten.load(Ordering::Relaxed).wrapping_add(1);
        disk::write_all_at(file, &forgotten.to_le_bytes(), FORGOTTEN_AT)?;
        self.forgotten.store(forgotten, Ordering::Relaxed);
        Ok(())
    }

    /// ORs words into a set of the file, and tells `seen` what each word is then.
    fn merge(&self, file: &File, set: Set, words: &[(usize, u64)], seen: impl Fn(usize, u64)) -> io::Result<()> {
        for run in runs(words) {
            let first = run[0].0;
            let mut bits = self.read_words(file, set, first..run[run.len() - 1].0 + 1)?;
            for &(number, more) in run {
                bits[number - first] |= more;
            }
            self.write_words(file, set, first, &bits)?;
            for (number, bits) in (first..).zip(bits) {
                seen(number, bits);
            }
        }
        Ok(())
    }

    fn set_bytes(&self) -> u64 {
        (self.words.len() as u64 * 8).next_multiple_of(SECTION)
    }

    fn place(&self, set: Set, word: usize) -> u64 {
        let start = match set {
            Set::Durable => SECTION,
            Set::Recent => SECTION + self.set_bytes(),
        };
        start + word as u64 * 8
    }

    fn read_words(&self, file: &File, set: Set, words: std::ops::Range<usize>) -> io::Result<Vec<u64>> {
        let mut bytes = vec![0; words.len() * 8];
        file.read_exact_at(&mut bytes, self.place(set, words.start))?;
        Ok(bytes.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect())
    }

    fn write_words(&self, file: &File, set: Set, first: usize, words: &[u64]) -> io::Result<()> {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        disk::write_all_at(file, &bytes, self.place(set, first))
    }
}

fn read_forgotten(file: &File) -> io::Result<u64> {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, FORGOTTEN_AT)?;
    Ok(u64::from_le_bytes(bytes))
}

/// The bitmap of a layer that this process has not opened: for who looks for content elsewhere, and for who counts.
#[derive(Debug)]
pub(crate) struct Glimpse {
    file: File,
    extents: u64,
    set_start: u64,
}

impl Glimpse {
    /// Reads no more than the header; `None` where it is no bitmap that counts.
    pub(crate) fn new(file: File) -> Option<Self> {
        let mut bytes = [0; CHECKED + 32];
        file.read_exact_at(&mut bytes, 0).ok()?;
        let header = Header::from_bytes(&bytes)?;
        let set_bytes = header.extents.div_ceil(64).checked_mul(8)?.checked_next_multiple_of(SECTION)?;
        if file.metadata().ok()?.len() != set_bytes.checked_mul(2)?.checked_add(SECTION)? {
            return None;
        }
        let set_start = if header.boot.is_same(BootId::current()) { SECTION + set_bytes } else { SECTION };
        Some(Self { file, extents: header.extents, set_start })
    }

    /// Returns the number of bits.
    pub(crate) fn extents(&self) -> u64 {
        self.extents
    }

    /// Says whether a bit is set, in the file, now.
    pub(crate) fn contains(&self, extent: u64) -> bool {
        let mut byte = [0];
        extent < self.extents
            && self.file.read_exact_at(&mut byte, self.set_start + extent / 8).is_ok()
            && byte[0] & (1 << (extent % 8)) != 0
    }

    /// Counts the bits that are set, in the file, now.
    pub(crate) fn count(&self) -> u64 {
        let mut left = self.extents.div_ceil(64) * 8;
        let mut at = self.set_start;
        let mut buffer = [0; 4096];
        let mut count = 0;
        while left > 0 {
            let part = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            if self.file.read_exact_at(&mut buffer[..part], at).is_err() {
                break;
            }
            count += buffer[..part].iter().map(|byte| u64::from(byte.count_ones())).sum::<u64>();
            at += part as u64;
            left -= part as u64;
        }
        // Bits behind the last one are never set by us.
        count.min(self.extents)
    }
}

/// Bits by word, in the order of the words.
#[derive(Debug)]
pub(crate) struct Volatile(Vec<(usize, u64)>);

impl Volatile {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn bit(extent: usize) -> u64 {
    1 << (extent % BITS)
}

/// Returns the bits from `from` on, within its word and below `end`.
fn mask(from: usize, end: usize) -> u64 {
    let low = u64::MAX << (from % BITS);
    match end.saturating_sub(from / BITS * BITS) {
        0 => 0,
        length if length >= BITS => low,
        length => low & !(u64::MAX << length),
    }
}

fn by_word(extents: impl IntoIterator<Item = usize>) -> Vec<(usize, u64)> {
    let mut words: Vec<(usize, u64)> = Vec::new();
    for extent in extents {
        match words.last_mut() {
            Some((number, bits)) if *number == extent / BITS => *bits |= bit(extent),
            _ => words.push((extent / BITS, bit(extent))),
        }
    }
    words.sort_unstable_by_key(|&(number, _)| number);
    words.dedup_by(|next, kept| {
        let same = next.0 == kept.0;
        if same {
            kept.1 |= next.1;
        }
        same
    });
    words
}

/// Cuts sorted words into parts that are read and written at once.
fn runs(words: &[(usize, u64)]) -> impl Iterator<Item = &[(usize, u64)]> {
    words.chunk_by(|a, b| b.0 - a.0 < RUN_WORDS)
}

/// Keeps other processes from changing the file between our reading and writing it.
///
/// A process that was stopped at the wrong moment holds the lock for as long as it is stopped, so that nobody waits for
/// more than a second: without the lock, bits that others set at this moment can get lost, and their extents are fetched twice.
struct Merging<'a>(Option<&'a File>);

impl<'a> Merging<'a> {
    fn begin(file: &'a File) -> Self {
        for attempt in 0..ATTEMPTS {
            if file.try_lock().is_ok() {
                return Self(Some(file));
            }
            std::thread::sleep(Duration::from_micros(50 << (attempt / 2).min(8)));
        }
        Self(None)
    }
}

impl Drop for Merging<'_> {
    fn drop(&mut self) {
        if let Some(file) = self.0 {
            // It fails only where there is no lock to give back.
            let _ = file.unlock();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(extents: u64, boot: u8) -> Header {
        Header { blob: [1; 32], layout: [2; 32], extents, data_length: 77, data_inode: 5, boot: BootId([boot; 16]) }
    }

    fn set(map: &FilledMap) -> Vec<usize> {
        (0..map.extents).filter(|&extent| map.contains(extent)).collect()
    }

    fn load(path: &std::path::Path, header: &Header, alone: bool) -> Option<FilledMap> {
        let file = File::options().read(true).write(true).open(path).unwrap();
        match FilledMap::load(file, header, alone).unwrap() {
            Loaded::Usable(map) => Some(map),
            Loaded::Unusable => None,
        }
    }

    #[test]
    fn header_round_trips_and_damage_shows() {
        let bytes = header(9, 3).to_bytes();
        assert_eq!(bytes.len(), 4096);
        assert_eq!(Header::from_bytes(&bytes), Some(header(9, 3)));
        for place in 0..CHECKED + 32 {
            let mut bytes = bytes.clone();
            bytes[place] ^= 1;
            assert_eq!(Header::from_bytes(&bytes), None, "byte {place}");
        }
        assert_eq!(Header::from_bytes(&bytes[..100]), None);
    }

    #[test]
    fn ranges_are_counted_to_the_bit() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("filled");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        let map = FilledMap::create(file, &header(200, 1)).unwrap();
        assert!(map.contains_all(5..5) && !map.contains_all(0..1));
        map.publish(60..140).unwrap();
        for (start, end, expected) in
            [(60, 140, true), (59, 140, false), (60, 141, false), (64, 128, true), (139, 140, true), (140, 200, false)]
        {
            assert_eq!(map.contains_all(start..end), expected, "{start}..{end}");
        }
        assert_eq!(map.count(), 80);
        map.publish([61, 199]).unwrap();
        assert_eq!(map.count(), 81);
        map.forget([61, 62, 0]).unwrap();
        assert_eq!(map.count(), 79);
        assert!(!map.contains(61) && map.contains(63));
    }

    #[test]
    fn a_restart_keeps_all_bits_and_a_reboot_the_durable_ones() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("filled");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        let map = FilledMap::create(file, &header(300, 1)).unwrap();
        map.publish([0, 100]).unwrap();
        let synced = map.volatile();
        map.publish([200, 299]).unwrap();
        map.make_durable(&synced).unwrap();
        drop(map);

        assert_eq!(set(&load(&path, &header(300, 1), false).unwrap()), [0, 100, 200, 299]);
        assert!(load(&path, &header(300, 2), false).is_none(), "another boot's bits while others use the file");
        assert_eq!(set(&load(&path, &header(300, 2), true).unwrap()), [0, 100]);
        // The reboot was noted: what the first boot wrote last is gone for good.
        assert_eq!(set(&load(&path, &header(300, 2), false).unwrap()), [0, 100]);
        assert_eq!(set(&load(&path, &header(300, 1), true).unwrap()), [0, 100]);

        let unknown = Header { boot: BootId::UNKNOWN, ..header(300, 0) };
        let map = load(&path, &unknown, true).unwrap();
        map.publish([7]).unwrap();
        drop(map);
        assert_eq!(set(&load(&path, &unknown, true).unwrap()), [0, 100]);
    }

    #[test]
    fn two_users_merge_their_bits() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("filled");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        let one = FilledMap::create(file, &header(64, 1)).unwrap();
        let two = load(&path, &header(64, 1), false).unwrap();
        one.publish([1]).unwrap();
        two.publish([2]).unwrap();
        assert_eq!(set(&two), [1, 2]);
        assert_eq!(set(&one), [1]);
        one.refresh([9]).unwrap();
        assert_eq!(set(&one), [1, 2]);
        assert_eq!(set(&load(&path, &header(64, 1), false).unwrap()), [1, 2]);
    }

    #[test]
    fn what_one_takes_away_the_other_gives_up() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("filled");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        let one = FilledMap::create(file, &header(200, 1)).unwrap();
        let two = load(&path, &header(200, 1), false).unwrap();
        one.publish([1, 100, 150]).unwrap();
        two.refresh(0..200).unwrap();
        two.publish([7]).unwrap();
        let synced = two.volatile();
        one.forget([100]).unwrap();
        assert_eq!(set(&two), [1, 7, 100, 150]);
        // Nor does it make durable what is gone.
        two.make_durable(&synced).unwrap();
        assert_eq!(set(&two), [1, 7, 150]);
        assert_eq!(set(&load(&path, &header(200, 2), true).unwrap()), [1, 7, 150]);

        let two = load(&path, &header(200, 2), false).unwrap();
        let one = load(&path, &header(200, 2), false).unwrap();
        one.forget([150]).unwrap();
        two.heeded_ms.store(0, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(HEED_MS));
        assert!(two.heed().unwrap());
        assert_eq!(set(&two), [1, 7]);
        assert!(!two.heed().unwrap());
    }

    #[test]
    fn a_glimpse_sees_what_counts() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("filled");
        let open = || File::options().read(true).write(true).create(true).truncate(false).open(&path).unwrap();
        let this = Header { boot: BootId::current(), ..header(70_000, 0) };
        let map = FilledMap::create(open(), &this).unwrap();
        map.publish([3, 69_999]).unwrap();
        map.make_durable(&map.volatile()).unwrap();
        map.publish([40_000]).unwrap();
        let seen = |glimpse: &Glimpse| (0..80_000).filter(|&extent| glimpse.contains(extent)).collect::<Vec<_>>();
        let glimpse = Glimpse::new(open()).unwrap();
        assert_eq!(seen(&glimpse), [3, 40_000, 69_999]);
        assert_eq!((glimpse.count(), glimpse.extents()), (3, 70_000));
        // Of another boot.
        open().write_all_at(&Header { boot: BootId([9; 16]), ..this }.to_bytes(), 0).unwrap();
        let glimpse = Glimpse::new(open()).unwrap();
        assert_eq!((seen(&glimpse), glimpse.count()), (vec![3, 69_999], 2));
        open().set_len(5000).unwrap();
        assert!(Glimpse::new(open()).is_none());
        open().set_len(0).unwrap();
        assert!(Glimpse::new(open()).is_none());
    }

    #[test]
    fn what_could_not_be_synced_is_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("filled");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        let map = FilledMap::create(file, &header(64, 1)).unwrap();
        map.publish([1]).unwrap();
        map.make_durable(&map.volatile()).unwrap();
        map.publish([2]).unwrap();
        map.forget_volatile(&map.volatile()).unwrap();
        assert_eq!(set(&map), [1]);
        assert_eq!(set(&load(&path, &header(64, 1), false).unwrap()), [1]);
    }

    #[test]
    fn files_of_others_are_not_used() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("filled");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        FilledMap::create(file, &header(64, 1)).unwrap();
        for other in [
            Header { blob: [9; 32], ..header(64, 1) },
            Header { layout: [9; 32], ..header(64, 1) },
            Header { data_length: 9, ..header(64, 1) },
            Header { data_inode: 9, ..header(64, 1) },
            header(63, 1),
            header(100_000, 1),
        ] {
            assert!(load(&path, &other, true).is_none(), "{other:?}");
        }
        File::options().write(true).open(&path).unwrap().set_len(100).unwrap();
        assert!(load(&path, &header(64, 1), true).is_none());
    }
}
