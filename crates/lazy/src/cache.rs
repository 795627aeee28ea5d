//! The local files of one layer: data file, bitmap, table of contents, lock.
//!
//! | file | content |
//! |---|---|
//! | `data` | sparse; the content of every file of the layer, where the index says; zeros to a multiple of 4 KiB |
//! | `filled` | which of it is there, see [`crate::filled`] |
//! | `toc` | what the index is made of, so that opening again needs no network; see [`Tail`] |
//! | `lock` | `flock`: shared while in use, exclusive while files are made anew or removed; its time is that of the last use |
//! | `origin` | where the layer was opened from, see [`crate::census`] |
//! | `pinned` | is there where the layer must not be evicted |
//!
//! Several processes may use a layer at once: they write the same verified bytes to the same places, and merge their
//! bits. Only to throw files away a process must be alone. A data file is never cut to make it anew, it is replaced:
//! a mount that outlived its process may still read the old one.

use std::{
    fs::{File, TryLockError},
    io::{self, Write as _},
    ops::Range,
    os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use loris_format::{
    digest::{Digest, Hasher},
    index::LayerIndex,
    position::{BlobRange, DATA_ALIGNMENT, DataOffset},
};

use tokio::sync::watch;

use crate::{
    disk,
    error::StoreError,
    filled::{BootId, FilledMap, Header, Loaded, sha256},
    shared::{AllShared, Shared},
    store::Store,
};

/// After so many bytes the data file is synced in the background: what a power failure may cost.
const SYNC_BYTES: u64 = 64 << 20;

/// How often, and with what pause, we look whether files that must be made anew are still in use.
const LOCK_ATTEMPTS: usize = 5;
/// How often a layer may be removed under who opens it.
const REMOVALS: usize = 100;
const LOCK_PAUSE: Duration = Duration::from_millis(20);
/// How often it is noted, at most, that a layer is in use.
const TOUCH_SECONDS: u64 = 60;

/// An open layer of the store.
#[derive(Debug)]
pub(crate) struct LayerCache {
    directory: PathBuf,
    data: File,
    /// Used in place of `data` as soon as it is there.
    filler: OnceLock<File>,
    file_length: u64,
    layout: [u8; 32],
    filled: FilledMap,
    shared: AllShared,
    unsynced_bytes: AtomicU64,
    sync_wanted: AtomicBool,
    syncing: Mutex<()>,
    /// Whether every extent is filled, and may be used without being looked at again.
    complete: watch::Sender<bool>,
    store: Store,
    /// Where what is read must be hashed again first: what has been.
    checked: Option<Mutex<Checked>>,
    opened: Instant,
    /// Seconds after `opened` in which it was last noted that the layer is in use.
    touched: AtomicU64,
    /// Whether another process had it open too when it was opened.
    beside: bool,
    /// Held shared until the end; the system gives it back when the file is closed.
    lock: File,
}

impl LayerCache {
    /// Opens the files in `directory`, or makes them. Blocks, also for another process that is making them.
    ///
    /// A data file that was `adopted` is used in place of one that is opened here, if it is the one in `directory`.
    pub(crate) fn open(
        directory: &Path,
        blob: &Digest,
        index: &LayerIndex,
        adopted: Option<File>,
        store: &Store,
    ) -> Result<Self, StoreError> {
        let expected = Expected {
            blob: sha256(blob.to_string().as_bytes()),
            layout: layout(index),
            extents: index.extents().len() as u64,
            data_length: index.data_length(),
            boot: BootId::current(),
        };
        let (lock, data, filled, beside) = Self::acquire(directory, &expected, store)?;
        let data = match adopted {
            Some(adopted) if is_same_file(&adopted, &data).map_err(StoreError::file(directory))? => adopted,
            _ => data,
        };
        let checked = store.is_paranoid().then(|| Mutex::new(Checked::new(filled.extents())));
        let cache = Self {
            directory: directory.to_owned(),
            data,
            filler: OnceLock::new(),
            file_length: expected.file_length(),
            layout: expected.layout,
            filled,
            shared: AllShared::default(),
            unsynced_bytes: AtomicU64::new(0),
            sync_wanted: AtomicBool::new(false),
            syncing: Mutex::new(()),
            complete: watch::Sender::new(false),
            store: store.clone(),
            checked,
            opened: Instant::now(),
            touched: AtomicU64::new(0),
            beside,
            lock,
        };
        cache.touch();
        cache.tell_if_complete();
        Ok(cache)
    }

    /// Locks the directory and returns the lock, held shared, and the files in it, made anew where they are of no use. Says
    /// with them whether somebody else holds the lock.
    fn acquire(
        directory: &Path,
        expected: &Expected,
        store: &Store,
    ) -> Result<(File, File, FilledMap, bool), StoreError> {
        let lock_path = directory.join("lock");
        let mut attempts = 0..LOCK_ATTEMPTS;
        // Another process may be removing the directory: each step may find it gone.
        let mut removals = 0..REMOVALS;
        'anew: loop {
            let opened = create_private_directory(directory).and_then(|()| open_private(&lock_path));
            let lock = match opened {
                Err(error) if error.kind() == io::ErrorKind::NotFound && removals.next().is_some() => continue,
                opened => opened.map_err(StoreError::file(&lock_path))?,
            };
            loop {
                let alone = match lock.try_lock() {
                    Ok(()) => true,
                    Err(TryLockError::WouldBlock) => false,
                    Err(TryLockError::Error(source)) => return Err(StoreError::file(lock_path)(source)),
                };
                if !alone {
                    lock.lock_shared().map_err(StoreError::file(&lock_path))?;
                }
                if !is_at(&lock, &lock_path) {
                    removals.next().ok_or_else(|| StoreError::InUse { path: directory.to_owned() })?;
                    continue 'anew;
                }
                match Self::load(directory, expected, alone)? {
                    Some((data, filled)) if !alone => return Ok((lock, data, filled, true)),
                    None if !alone => {
                        // Whoever was making the files may have died over it, and nobody is using them.
                        lock.unlock().map_err(StoreError::file(&lock_path))?;
                        attempts.next().ok_or_else(|| StoreError::InUse { path: directory.to_owned() })?;
                        std::thread::sleep(LOCK_PAUSE);
                    }
                    found => {
                        let (data, filled) = match found {
                            Some(files) => files,
                            None => {
                                let _room = store.room(expected.fixed_bytes())?;
                                Self::create(directory, expected)?
                            }
                        };
                        // Which lets go of the lock for a moment, in which all of it may be removed.
                        lock.lock_shared().map_err(StoreError::file(&lock_path))?;
                        if !is_at(&lock, &lock_path) {
                            removals.next().ok_or_else(|| StoreError::InUse { path: directory.to_owned() })?;
                            continue 'anew;
                        }
                        return Ok((lock, data, filled, false));
                    }
                }
            }
        }
    }

    /// Returns the files as they are, or `None` where they are not all there, whole, and of this layer.
    fn load(directory: &Path, expected: &Expected, alone: bool) -> Result<Option<(File, FilledMap)>, StoreError> {
        let (data_path, filled_path) = (directory.join("data"), directory.join("filled"));
        let open = |path: &Path| match File::options().read(true).write(true).custom_flags(NO_FOLLOW).open(path) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(StoreError::file(path)(error)),
        };
        let (Some(data), Some(filled)) = (open(&data_path)?, open(&filled_path)?) else { return Ok(None) };
        let metadata = data.metadata().map_err(StoreError::file(&data_path))?;
        if !metadata.is_file() || metadata.len() != expected.file_length() {
            tracing::warn!(file = %data_path.display(), "not the data file that was left here; starting afresh");
            return Ok(None);
        }
        match FilledMap::load(filled, &expected.header(metadata.ino()), alone) {
            Ok(Loaded::Usable(map)) => Ok(Some((data, map))),
            Ok(Loaded::Unusable) => Ok(None),
            Err(error) => Err(StoreError::file(filled_path)(error)),
        }
    }

    fn create(directory: &Path, expected: &Expected) -> Result<(File, FilledMap), StoreError> {
        let remove = |path: &Path| match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(StoreError::file(path)(error)),
            _ => Ok(()),
        };
        // The bitmap goes first and comes last, so that there is never one beside a data file that is not its own.
        let (data_path, filled_path) = (directory.join("data"), directory.join("filled"));
        remove(&filled_path)?;
        remove(&data_path)?;
        let data = open_private(&data_path).map_err(StoreError::file(&data_path))?;
        data.set_len(expected.file_length()).map_err(StoreError::file(&data_path))?;
        let inode = data.metadata().map_err(StoreError::file(&data_path))?.ino();
        let filled = open_private(&filled_path).map_err(StoreError::file(&filled_path))?;
        let filled = FilledMap::create(filled, &expected.header(inode)).map_err(StoreError::file(&filled_path))?;
        Ok((data, filled))
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(crate) fn data(&self) -> &File {
        self.filler.get().unwrap_or(&self.data)
    }

    /// Uses another descriptor of the data file from now on. Only the first one that is offered is taken.
    pub(crate) fn fill_through(&self, data: File) -> io::Result<()> {
        if !is_same_file(&data, &self.data)? {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not the layer's data file"));
        }
        let _ = self.filler.set(data);
        Ok(())
    }

    /// Takes over what other processes have filled of `extents` meanwhile.
    pub(crate) fn refresh(&self, extents: impl IntoIterator<Item = usize>) -> io::Result<()> {
        self.filled.refresh(extents)?;
        self.tell_if_complete();
        Ok(())
    }

    fn tell_if_complete(&self) {
        if self.is_complete() {
            self.complete.send_replace(true);
        }
    }

    /// Says whether every extent is filled, and may be used without being looked at again.
    pub(crate) fn is_complete(&self) -> bool {
        self.filled.count() == self.filled.extents() && self.unchecked(0..self.filled.extents()).is_none()
    }

    /// Says whether extents are filled, and may be used without being looked at again.
    pub(crate) fn has(&self, extents: Range<usize>) -> bool {
        // What can't be read now is heeded later.
        if self.filled.heed().unwrap_or(false) {
            self.complete.send_replace(false);
            self.tell_if_complete();
            self.shared.all().iter().for_each(|shared| shared.hear(&self.directory));
        }
        self.filled.contains_all(extents.clone()) && self.unchecked(extents).is_none()
    }

    /// Returns the first of some extents that must be hashed before it is used.
    pub(crate) fn unchecked(&self, mut extents: Range<usize>) -> Option<usize> {
        let checked = self.checked.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner);
        if checked.count == checked.extents.len() {
            return None;
        }
        extents.find(|&extent| !checked.extents.get(extent).copied().unwrap_or(true))
    }

    /// Notes that what was hashed is what it must be.
    pub(crate) fn note_checked(&self, extents: impl IntoIterator<Item = usize>) {
        let Some(checked) = &self.checked else { return };
        let mut checked = checked.lock().unwrap_or_else(PoisonError::into_inner);
        for extent in extents {
            checked.set(extent, true);
        }
        drop(checked);
        self.tell_if_complete();
    }

    /// Gives extents up whose content is not what it must be.
    pub(crate) fn forget(&self, extents: &[usize]) -> io::Result<()> {
        self.complete.send_replace(false);
        if let Some(checked) = &self.checked {
            let mut checked = checked.lock().unwrap_or_else(PoisonError::into_inner);
            extents.iter().for_each(|&extent| checked.set(extent, false));
        }
        self.filled.forget(extents.iter().copied())
    }

    /// Returns what is one for all images in this process that have the layer.
    pub(crate) fn shared(&self, index: LayerIndex) -> Arc<Shared> {
        self.shared.get(index, &self.directory)
    }

    /// Lets other processes look at what was found out about the layer.
    pub(crate) fn announce(&self) -> io::Result<()> {
        self.filled.announce()
    }

    pub(crate) fn store(&self) -> &Store {
        &self.store
    }

    /// Notes that the layer is in use: what was not for longest goes first where room is needed.
    fn touch(&self) {
        // A time that can't be noted is that of an earlier use.
        let _ = self.lock.set_modified(SystemTime::now());
    }

    pub(crate) fn is_beside(&self) -> bool {
        self.beside
    }

    pub(crate) fn lock(&self) -> &File {
        &self.lock
    }

    /// Waits until every extent is filled.
    pub(crate) async fn completed(&self) {
        // The sender lives as long as `self`.
        let _ = self.complete.subscribe().wait_for(|complete| *complete).await;
    }

    pub(crate) fn layout(&self) -> &[u8; 32] {
        &self.layout
    }

    pub(crate) fn filled(&self) -> &FilledMap {
        &self.filled
    }

    /// Writes content to its place. It counts only once its extent is published.
    pub(crate) fn write(&self, at: DataOffset, bytes: &[u8]) -> io::Result<()> {
        disk::write_all_at(self.data(), bytes, at.0)
    }

    /// Makes extents count whose `bytes` of content were verified and written.
    pub(crate) fn publish(&self, extents: impl IntoIterator<Item = usize>, bytes: u64) -> io::Result<()> {
        if self.checked.is_some() {
            let extents: Vec<usize> = extents.into_iter().collect();
            self.filled.publish(extents.iter().copied())?;
            self.note_checked(extents);
        } else {
            self.filled.publish(extents)?;
            self.tell_if_complete();
        }
        let now = self.opened.elapsed().as_secs();
        if now.saturating_sub(self.touched.load(Ordering::Relaxed)) >= TOUCH_SECONDS {
            self.touched.store(now, Ordering::Relaxed);
            self.touch();
        }
        if self.unsynced_bytes.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes) >= SYNC_BYTES {
            self.sync_wanted.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Says, once, that so much was written since the last sync that it is time for one.
    pub(crate) fn take_sync_wanted(&self) -> bool {
        self.sync_wanted.swap(false, Ordering::Relaxed)
    }

    /// Makes what was published so far survive a power failure: first the data reaches the disk, then the bits.
    ///
    /// Where the data does not, it can't be trusted from now on and is forgotten.
    pub(crate) fn sync(&self) -> io::Result<()> {
        let _one_at_a_time = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        self.unsynced_bytes.store(0, Ordering::Relaxed);
        let volatile = self.filled.volatile();
        if volatile.is_empty() {
            return Ok(());
        }
        match disk::sync_data(self.data()) {
            Ok(()) => self.filled.make_durable(&volatile),
            Err(error) => {
                self.complete.send_replace(false);
                self.filled.forget_volatile(&volatile)?;
                Err(error)
            }
        }
    }

    /// Where someone has cut the data file, forgets what was behind the cut and makes it as long again as it should be.
    ///
    /// Looked at before each write, which would make the file longer and the cut a hole that reads as zeros.
    pub(crate) fn check_length(&self, index: &LayerIndex) -> io::Result<()> {
        let found = self.data().metadata()?.len();
        if found < self.file_length {
            tracing::warn!(file = %self.directory.join("data").display(), found, expected = self.file_length,
                "the data file was cut; what is gone will be fetched again");
            self.forget(&index.extents_in(&(DataOffset(found)..DataOffset(u64::MAX))).collect::<Vec<_>>())?;
            lengthen(self.data(), self.file_length)?;
        }
        Ok(())
    }
}

impl Drop for LayerCache {
    fn drop(&mut self) {
        self.touch();
    }
}

/// Which extents this process has hashed.
#[derive(Debug)]
struct Checked {
    extents: Vec<bool>,
    count: usize,
}

impl Checked {
    fn new(extents: usize) -> Self {
        Self { extents: vec![false; extents], count: 0 }
    }

    fn set(&mut self, extent: usize, value: bool) {
        let Some(place) = self.extents.get_mut(extent) else { return };
        if *place != value {
            *place = value;
            self.count = if value { self.count + 1 } else { self.count - 1 };
        }
    }
}

/// Says whether an open file is still the one at a path.
pub(crate) fn is_at(file: &File, path: &Path) -> bool {
    let (Ok(open), Ok(there)) = (file.metadata(), path.symlink_metadata()) else { return false };
    (open.dev(), open.ino()) == (there.dev(), there.ino())
}

/// Makes a file longer, with a hole. Not by `ftruncate`, for which the kernel asks whoever watches the file (a pager of
/// this process, which would wait for itself) even where the descriptor is older than the watch.
fn lengthen(file: &File, length: u64) -> io::Result<()> {
    let Some(last) = length.checked_sub(1) else { return Ok(()) };
    match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), last, 1) {
        Err(rustix::io::Errno::OPNOTSUPP) => file.set_len(length),
        result => Ok(result?),
    }
}

fn is_same_file(one: &File, other: &File) -> io::Result<bool> {
    let (one, other) = (one.metadata()?, other.metadata()?);
    Ok((one.dev(), one.ino()) == (other.dev(), other.ino()))
}

/// What the header of the bitmap must say.
struct Expected {
    blob: [u8; 32],
    layout: [u8; 32],
    extents: u64,
    data_length: u64,
    boot: BootId,
}

impl Expected {
    /// Returns the length of the data file, in bytes: of whole blocks, since EROFS reads nothing less of a device.
    fn file_length(&self) -> u64 {
        // The builder of the index has checked that all content ends far below 2^64.
        self.data_length.next_multiple_of(DATA_ALIGNMENT)
    }

    /// Returns how much of the disk a layer takes with no content in it, about, in bytes: bitmap and directories.
    fn fixed_bytes(&self) -> u64 {
        (self.extents / 4).saturating_add(8 * DATA_ALIGNMENT)
    }

    fn header(&self, data_inode: u64) -> Header {
        let &Self { blob, layout, extents, data_length, boot } = self;
        Header { blob, layout, extents, data_length, data_inode, boot }
    }
}

/// Hashes where each extent stands and what it must be: what a bit of the bitmap means.
fn layout(index: &LayerIndex) -> [u8; 32] {
    let mut hasher = Hasher::sha256();
    for extent in index.extents() {
        hasher.update(&extent.data.0.to_le_bytes());
        hasher.update(&extent.length.to_le_bytes());
        // The text names the algorithm too; without a digest, where the bytes come from is all that is known of them.
        match &extent.digest {
            Some(digest) => hasher.update(digest.to_string().as_bytes()),
            None => {
                let frame = &index.frames()[extent.frame.0 as usize];
                hasher.update(&frame.range.start.0.to_le_bytes());
                hasher.update(&extent.frame_offset.to_le_bytes());
            }
        }
    }
    match hasher.finish() {
        Digest::Sha256(hash) => hash,
        Digest::Sha512(_) => unreachable!("the hasher is SHA-256"),
    }
}

/// The end of a blob, as much of it as was read to find and read its table of contents.
///
/// In the file `toc` it is kept as it came, compressed: opening again is the same work with the same checks, only without
/// the network. Form: 8 bytes `LORISTOC`, the size of the whole blob as a 64-bit little-endian number, the SHA-256 of
/// these 16 bytes and the rest, and the bytes.
#[derive(Debug, Default)]
pub(crate) struct Tail {
    /// Where `bytes` end: mostly the blob's own end.
    end: u64,
    bytes: Vec<u8>,
}

const TAIL_MAGIC: &[u8; 8] = b"LORISTOC";
const TAIL_HEADER: usize = 8 + 8 + 32;
/// What is read of a blob's end beside its table of contents, at most.
const TAIL_REST: u64 = 2 << 20;

impl Tail {
    /// Takes in a range that ends where what is there begins.
    pub(crate) fn extend_down(&mut self, range: BlobRange, bytes: &[u8]) {
        self.end = self.end.max(range.end().0);
        self.bytes.splice(..0, bytes.iter().copied());
    }

    /// Returns a range, where all of it is there.
    pub(crate) fn get(&self, range: BlobRange) -> Option<&[u8]> {
        let start = self.end.checked_sub(self.bytes.len() as u64)?;
        let at = usize::try_from(range.start.0.checked_sub(start)?).ok()?;
        self.bytes.get(at..at.checked_add(usize::try_from(range.length).ok()?)?)
    }

    /// Returns what was saved of a blob of `blob_size` bytes, or `None` where there is nothing that can be believed.
    /// `toc_limit` bounds the size of its table of contents.
    pub(crate) fn load(directory: &Path, blob_size: u64, toc_limit: u64) -> Option<Self> {
        let file = File::options().read(true).custom_flags(NO_FOLLOW).open(directory.join("toc")).ok()?;
        let metadata = file.metadata().ok()?;
        let length = metadata.len().checked_sub(TAIL_HEADER as u64)?;
        if !metadata.is_file() || length > blob_size.min(toc_limit.saturating_add(TAIL_REST)) {
            return None;
        }
        let mut header = [0; TAIL_HEADER];
        file.read_exact_at(&mut header, 0).ok()?;
        let mut bytes = vec![0; usize::try_from(length).ok()?];
        file.read_exact_at(&mut bytes, TAIL_HEADER as u64).ok()?;
        let (magic, rest) = header.split_first_chunk::<8>()?;
        let (end, sum) = rest.split_first_chunk::<8>()?;
        let tail = Self { end: u64::from_le_bytes(*end), bytes };
        (magic == TAIL_MAGIC && tail.end <= blob_size && sum == tail.sum()).then_some(tail)
    }

    /// Returns the size of the file that it is saved in, in bytes.
    pub(crate) fn saved_bytes(&self) -> u64 {
        (TAIL_HEADER + self.bytes.len()) as u64
    }

    /// Saves it in one step.
    pub(crate) fn save(&self, directory: &Path) -> Result<(), StoreError> {
        let path = directory.join("toc");
        let write = || {
            create_private_directory(directory)?;
            let mut file = tempfile::Builder::new().prefix(".toc-").tempfile_in(directory)?;
            file.write_all(TAIL_MAGIC)?;
            file.write_all(&self.end.to_le_bytes())?;
            file.write_all(&self.sum())?;
            file.write_all(&self.bytes)?;
            file.persist(&path).map_err(|error| error.error)
        };
        let mut result = write();
        for _ in 0..REMOVALS {
            match &result {
                // Another process is removing the directory.
                Err(error) if error.kind() == io::ErrorKind::NotFound => result = write(),
                _ => break,
            }
        }
        result.map_err(StoreError::file(&path)).map(drop)
    }

    /// Returns where what was saved ends, as the file says: the size of the blob, for all but zstd:chunked.
    pub(crate) fn saved_size(directory: &Path) -> Option<u64> {
        let file = File::options().read(true).custom_flags(NO_FOLLOW).open(directory.join("toc")).ok()?;
        let mut size = [0; 8];
        file.read_exact_at(&mut size, 8).ok()?;
        Some(u64::from_le_bytes(size))
    }

    fn sum(&self) -> [u8; 32] {
        let mut hasher = Hasher::sha256();
        hasher.update(TAIL_MAGIC);
        hasher.update(&self.end.to_le_bytes());
        hasher.update(&self.bytes);
        match hasher.finish() {
            Digest::Sha256(hash) => hash,
            Digest::Sha512(_) => unreachable!("the hasher is SHA-256"),
        }
    }
}

/// The store's own files are never links; and opening one that somebody has replaced by a named pipe must not wait for
/// another end of it.
pub(crate) const NO_FOLLOW: i32 = rustix::fs::OFlags::NOFOLLOW.union(rustix::fs::OFlags::NONBLOCK).bits().cast_signed();

pub(crate) fn open_existing(path: &Path) -> io::Result<File> {
    File::options().read(true).custom_flags(NO_FOLLOW).open(path)
}

pub(crate) fn open_private(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(NO_FOLLOW).open(path)
}

pub(crate) fn create_private_directory(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

#[cfg(test)]
mod crash;
