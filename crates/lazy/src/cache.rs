//! The local files of one layer: data file, bitmap, table of contents, lock.
//!
//! | file | content |
//! |---|---|
//! | `data` | sparse; the content of every file of the layer, where the index says; zeros to a multiple of 4 KiB |
//! | `filled` | which of it is there, see [`crate::filled`] |
//! | `toc` | what the index is made of, so that opening again needs no network; see [`Tail`] |
//! | `lock` | `flock`: shared while in use, exclusive while files are made anew |
//!
//! Several processes may use a layer at once: they write the same verified bytes to the same places, and merge their
//! bits. Only to throw files away a process must be alone. A data file is never cut to make it anew, it is replaced:
//! a mount that outlived its process may still read the old one.

use std::{
    fs::{File, TryLockError},
    io::{self, Write as _},
    os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use loris_format::{
    digest::{Digest, Hasher},
    index::LayerIndex,
    position::{BlobRange, DATA_ALIGNMENT, DataOffset},
};

use tokio::sync::watch;

use crate::{
    error::StoreError,
    filled::{BootId, FilledMap, Header, Loaded, sha256},
};

/// After so many bytes the data file is synced in the background: what a power failure may cost.
const SYNC_BYTES: u64 = 64 << 20;

/// How often, and with what pause, we look whether files that must be made anew are still in use.
const LOCK_ATTEMPTS: usize = 5;
const LOCK_PAUSE: Duration = Duration::from_millis(20);

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
    unsynced_bytes: AtomicU64,
    sync_wanted: AtomicBool,
    syncing: Mutex<()>,
    /// Whether every extent is filled.
    complete: watch::Sender<bool>,
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
    ) -> Result<Self, StoreError> {
        let expected = Expected {
            blob: sha256(blob.to_string().as_bytes()),
            layout: layout(index),
            extents: index.extents().len() as u64,
            data_length: index.data_length(),
            boot: BootId::current(),
        };
        create_private_directory(directory).map_err(StoreError::file(directory))?;
        let lock_path = directory.join("lock");
        let lock = open_private(&lock_path).map_err(StoreError::file(&lock_path))?;
        let mut attempts = 0..LOCK_ATTEMPTS;
        let (data, filled) = loop {
            let alone = match lock.try_lock() {
                Ok(()) => true,
                Err(TryLockError::WouldBlock) => false,
                Err(TryLockError::Error(source)) => return Err(StoreError::file(lock_path)(source)),
            };
            if !alone {
                lock.lock_shared().map_err(StoreError::file(&lock_path))?;
            }
            match Self::load(directory, &expected, alone)? {
                Some(files) if !alone => break files,
                None if !alone => {
                    // Whoever was making the files may have died over it, and nobody is using them.
                    lock.unlock().map_err(StoreError::file(&lock_path))?;
                    attempts.next().ok_or_else(|| StoreError::InUse { path: directory.to_owned() })?;
                    std::thread::sleep(LOCK_PAUSE);
                }
                found => {
                    let files = match found {
                        Some(files) => files,
                        None => Self::create(directory, &expected)?,
                    };
                    lock.lock_shared().map_err(StoreError::file(&lock_path))?;
                    break files;
                }
            }
        };
        let data = match adopted {
            Some(adopted) if is_same_file(&adopted, &data).map_err(StoreError::file(directory))? => adopted,
            _ => data,
        };
        let complete = watch::Sender::new(filled.count() == index.extents().len());
        Ok(Self {
            directory: directory.to_owned(),
            data,
            filler: OnceLock::new(),
            file_length: expected.file_length(),
            layout: expected.layout,
            filled,
            unsynced_bytes: AtomicU64::new(0),
            sync_wanted: AtomicBool::new(false),
            syncing: Mutex::new(()),
            complete,
            lock,
        })
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
        if self.filled.count() == self.filled.extents() {
            self.complete.send_replace(true);
        }
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
        self.data().write_all_at(bytes, at.0)
    }

    /// Makes extents count whose `bytes` of content were verified and written.
    pub(crate) fn publish(&self, extents: impl IntoIterator<Item = usize>, bytes: u64) -> io::Result<()> {
        self.filled.publish(extents)?;
        self.tell_if_complete();
        if self.unsynced_bytes.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes) >= SYNC_BYTES {
            self.sync_wanted.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Says, once, that so much was written since the last sync that it is time for one.
    pub(crate) fn take_sync_wanted(&self) -> bool {
        self.sync_wanted.swap(false, Ordering::Relaxed)
    }

    /// Forgets extents whose content turned out to be damaged.
    pub(crate) fn forget(&self, extents: impl IntoIterator<Item = usize>) -> io::Result<()> {
        self.complete.send_replace(false);
        self.filled.forget(extents)
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
        match self.data().sync_data() {
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
            self.complete.send_replace(false);
            self.filled.forget(index.extents_in(&(DataOffset(found)..DataOffset(u64::MAX))))?;
            lengthen(self.data(), self.file_length)?;
        }
        Ok(())
    }
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
    /// Where `bytes` end: the size of the blob.
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
        (magic == TAIL_MAGIC && tail.end == blob_size && sum == tail.sum()).then_some(tail)
    }

    /// Saves it in one step.
    pub(crate) fn save(&self, directory: &Path) -> Result<(), StoreError> {
        create_private_directory(directory).map_err(StoreError::file(directory))?;
        let path = directory.join("toc");
        let write = || {
            let mut file = tempfile::Builder::new().prefix(".toc-").tempfile_in(directory)?;
            file.write_all(TAIL_MAGIC)?;
            file.write_all(&self.end.to_le_bytes())?;
            file.write_all(&self.sum())?;
            file.write_all(&self.bytes)?;
            file.persist(&path).map_err(|error| error.error)
        };
        write().map_err(StoreError::file(&path)).map(drop)
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

fn open_private(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(NO_FOLLOW).open(path)
}

pub(crate) fn create_private_directory(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}
