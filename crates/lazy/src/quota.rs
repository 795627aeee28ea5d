//! A bound on the disk that a store takes, kept by several processes without one of them being in charge.
//!
//! | path | content |
//! |---|---|
//! | `quota/used` | 32 bytes: `LORISUSE`, bytes taken, seconds since 1970 when they were counted, checksum |
//! | `quota/PID-XXXXXX` | 8 bytes: what one process has reserved and may not have written yet; `flock` while it lives |
//!
//! *Used* is never less than what is on the disk: it is what a count of all blocks found, and everything reserved since.
//! Before a process fetches, it takes room for what it will write: mostly out of what it has reserved before, so that the
//! file is touched once for some megabytes. Where nothing is left, or the count is old, it counts again (the blocks of
//! all files, and what living processes have reserved), and evicts what nobody uses.

use std::{
    fs::{File, TryLockError},
    io,
    os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use crate::{
    cache::{NO_FOLLOW, create_private_directory, open_private},
    error::StoreError,
    eviction,
    filled::sha256,
};

/// The folder, below the root of a store.
pub(crate) const FOLDER: &str = "quota";

/// A process reserves such a part of the quota at once, or so many bytes where that is less.
const RESERVED_PART: u64 = 64;
const RESERVED_BYTES: u64 = 16 << 20;
/// A count that is older is not believed: someone without a quota may have written.
const BELIEVED: Duration = Duration::from_secs(10);
/// How long another process may count and evict.
const PATIENCE: Duration = Duration::from_secs(20);

const MAGIC: &[u8; 8] = b"LORISUSE";

/// The bound on one store.
#[derive(Debug)]
pub(crate) struct Quota {
    root: PathBuf,
    limit: u64,
    account: Mutex<Account>,
    /// Taken, and perhaps not written yet. Outside of the account, which may be held for as long as layers are evicted.
    in_flight: AtomicU64,
    /// Whether layers were evicted, so that what is open of them is closed.
    evicted: AtomicBool,
}

/// What this process has reserved.
#[derive(Debug, Default)]
struct Account {
    /// Reserved, and not taken by anyone.
    budget: u64,
    slot: Option<Slot>,
}

#[derive(Debug)]
struct Slot {
    file: File,
    path: PathBuf,
}

/// Room on the disk for something that is being written. It counts as written when this is dropped.
#[derive(Debug)]
#[must_use]
pub(crate) struct Room {
    quota: Arc<Quota>,
    bytes: u64,
}

impl Drop for Room {
    fn drop(&mut self) {
        self.quota.in_flight.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

impl Quota {
    pub(crate) fn new(root: &Path, limit: u64) -> Self {
        Self {
            root: root.to_owned(),
            limit,
            account: Mutex::default(),
            in_flight: AtomicU64::new(0),
            evicted: AtomicBool::new(false),
        }
    }

    pub(crate) fn limit(&self) -> u64 {
        self.limit
    }

    /// Whether layers were evicted since this was last asked.
    pub(crate) fn was_evicted(&self) -> bool {
        self.evicted.load(Ordering::Acquire) && self.evicted.swap(false, Ordering::AcqRel)
    }

    /// Takes room for `bytes`. Blocks; for long only where something must be counted or evicted.
    pub(crate) fn take(self: &Arc<Self>, bytes: u64) -> Result<Room, StoreError> {
        let mut account = self.account();
        if account.budget < bytes {
            let missing = bytes - account.budget;
            let more = self.reserve(&mut account, missing)?;
            account.budget += more;
        }
        account.budget -= bytes;
        // It can't overflow: all that is in flight fits into the quota.
        self.in_flight.fetch_add(bytes, Ordering::AcqRel);
        Ok(Room { quota: Arc::clone(self), bytes })
    }

    fn in_flight(&self) -> u64 {
        self.in_flight.load(Ordering::Acquire)
    }

    fn account(&self) -> MutexGuard<'_, Account> {
        // Numbers that are changed at once.
        self.account.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reserves at least `missing` bytes, and returns how many.
    fn reserve(&self, account: &mut Account, missing: u64) -> Result<u64, StoreError> {
        let folder = self.root.join(FOLDER);
        create_private_directory(&folder).map_err(StoreError::file(&folder))?;
        let path = folder.join("used");
        let at = |error| StoreError::file(&path)(error);
        let file = open_private(&path).map_err(at)?;
        lock_patiently(&file).map_err(at)?;
        let wanted = missing.max((self.limit / RESERVED_PART).min(RESERVED_BYTES));
        let fits = |used: u64, more: u64| used.checked_add(more).is_some_and(|sum| sum <= self.limit);

        let mut used = read_used(&file);
        if used.is_none_or(|used| !fits(used, wanted)) {
            let mut counted = self.count(account)?;
            if !fits(counted, wanted) {
                let excess = counted.saturating_add(wanted).saturating_sub(self.limit);
                // Said before: where it fails half-way, some are gone.
                self.evicted.store(true, Ordering::Release);
                if eviction::make_room(&self.root, excess)? > 0 {
                    counted = self.count(account)?;
                }
            }
            used = Some(counted);
            write_used(&file, counted).map_err(at)?;
        }
        let used = used.unwrap_or(u64::MAX);
        let granted = if fits(used, wanted) { wanted } else { missing };
        if !fits(used, granted) {
            return Err(StoreError::Quota { path: self.root.clone(), limit: self.limit, used });
        }
        // Said before it is counted, so that it is not missed where we are killed in between.
        let held = account.budget.saturating_add(self.in_flight()).saturating_add(granted);
        self.slot(account)?.file.write_all_at(&held.to_le_bytes(), 0).map_err(StoreError::file(&folder))?;
        add_used(&file, used.saturating_add(granted)).map_err(at)?;
        Ok(granted)
        // Closing the file unlocks it.
    }

    /// Counts what is on the disk and what may come to it. Under the lock.
    fn count(&self, account: &Account) -> Result<u64, StoreError> {
        // First what is reserved: it may be written meanwhile, and would be in neither.
        let mut reserved = account.budget.saturating_add(self.in_flight());
        let folder = self.root.join(FOLDER);
        let own = account.slot.as_ref().map(|slot| slot.path.as_path());
        for entry in std::fs::read_dir(&folder).map_err(StoreError::file(&folder))? {
            let path = entry.map_err(StoreError::file(&folder))?.path();
            if path.file_name().is_some_and(|name| name == "used") || Some(&*path) == own {
                continue;
            }
            let Ok(file) = File::options().read(true).custom_flags(NO_FOLLOW).open(&path) else { continue };
            match file.try_lock() {
                // Nobody's any more.
                Ok(()) => drop(std::fs::remove_file(&path)),
                Err(_) => {
                    let mut bytes = [0; 8];
                    if file.read_exact_at(&mut bytes, 0).is_ok() {
                        reserved = reserved.saturating_add(u64::from_le_bytes(bytes));
                    }
                }
            }
        }
        Ok(allocated_below(&self.root).map_err(StoreError::file(&self.root))?.saturating_add(reserved))
    }

    fn slot<'a>(&self, account: &'a mut Account) -> Result<&'a Slot, StoreError> {
        let folder = self.root.join(FOLDER);
        let make = || {
            // Under the lock of `used`: nobody takes it for a dead process's before it is locked.
            let named = tempfile::Builder::new().prefix(&format!("{}-", std::process::id())).tempfile_in(&folder)?;
            named.as_file().lock()?;
            let (file, path) = named.keep().map_err(|error| error.error)?;
            Ok(Slot { file, path })
        };
        let slot = match account.slot.take() {
            Some(slot) if slot.path.exists() => slot,
            _ => make().map_err(StoreError::file(&folder))?,
        };
        Ok(account.slot.insert(slot))
    }
}

impl Drop for Quota {
    fn drop(&mut self) {
        if let Some(slot) = self.account().slot.take() {
            // What is left behind is found to be nobody's.
            let _ = std::fs::remove_file(slot.path);
        }
    }
}

/// Waits for a lock, but not for ever: its holder may have been stopped.
fn lock_patiently(file: &File) -> io::Result<()> {
    let end = Instant::now() + PATIENCE;
    let mut pause = Duration::from_micros(100);
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) if Instant::now() < end => std::thread::sleep(pause),
            Err(TryLockError::WouldBlock) => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "another process has it locked"));
            }
            Err(TryLockError::Error(error)) => return Err(error),
        }
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Returns what is used, where that is known and was counted lately.
fn read_used(file: &File) -> Option<u64> {
    let mut bytes = [0; 32];
    file.read_exact_at(&mut bytes, 0).ok()?;
    let (checked, sum) = bytes.split_at(24);
    let (magic, rest) = checked.split_first_chunk::<8>()?;
    let (used, counted) = rest.split_first_chunk::<8>()?;
    let counted = u64::from_le_bytes(*counted.first_chunk()?);
    let is_new = now().checked_sub(counted).is_some_and(|age| age <= BELIEVED.as_secs());
    (magic == MAGIC && sum == &sha256(checked)[..8] && is_new).then_some(u64::from_le_bytes(*used))
}

fn write_used(file: &File, used: u64) -> io::Result<()> {
    write(file, used, now())
}

/// Changes what is used, and leaves when it was counted.
fn add_used(file: &File, used: u64) -> io::Result<()> {
    let mut counted = [0; 8];
    file.read_exact_at(&mut counted, 16)?;
    write(file, used, u64::from_le_bytes(counted))
}

fn write(file: &File, used: u64, counted: u64) -> io::Result<()> {
    let mut bytes = [*MAGIC, used.to_le_bytes(), counted.to_le_bytes()].concat();
    bytes.extend_from_slice(&sha256(&bytes)[..8]);
    file.write_all_at(&bytes, 0)
}

/// Directories below the root of a store that are looked into: there are five levels.
const DEPTH: usize = 8;

/// Returns the bytes of all blocks that are allocated below a directory, its own included.
pub(crate) fn allocated_below(directory: &Path) -> io::Result<u64> {
    fn add(path: &Path, depth: usize, sum: &mut u64) -> io::Result<()> {
        // What is removed meanwhile is not there.
        let gone = |error: io::Error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) };
        let metadata = match path.symlink_metadata() {
            Ok(metadata) => metadata,
            Err(error) => return gone(error),
        };
        *sum = sum.saturating_add(metadata.blocks().saturating_mul(512));
        if metadata.is_dir() && depth > 0 {
            let entries = match std::fs::read_dir(path) {
                Ok(entries) => entries,
                Err(error) => return gone(error),
            };
            for entry in entries {
                add(&entry?.path(), depth - 1, sum)?;
            }
        }
        Ok(())
    }
    let mut sum = 0;
    add(directory, DEPTH, &mut sum)?;
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, impl Fn(u64) -> Arc<Quota>) {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("layers")).unwrap();
        let root = directory.path().to_owned();
        (directory, move |limit| Arc::new(Quota::new(&root, limit)))
    }

    #[test]
    fn processes_share_what_there_is() {
        let (directory, quota) = store();
        let base = allocated_below(directory.path()).unwrap() + (64 << 10);
        let limit = base + (1 << 20);
        let (one, two) = (quota(limit), quota(limit));
        let first = one.take(400 << 10).unwrap();
        let second = two.take(400 << 10).unwrap();
        let error = two.take(400 << 10).unwrap_err();
        assert!(matches!(error, StoreError::Quota { .. }), "{error}");
        assert!(error.to_string().contains("--cache-quota"), "{error}");
        // What was not written is given back with the next count, which a process that has not enough makes.
        drop(first);
        drop(one);
        drop(two.take(400 << 10).unwrap());
        drop(second);
    }

    #[test]
    fn what_was_written_is_given_back_while_others_are_evicting() {
        let (directory, quota) = store();
        let quota = quota(allocated_below(directory.path()).unwrap() + (1 << 20));
        let room = quota.take(1000).unwrap();
        let _evicting = quota.account();
        // By a thread that must not wait.
        drop(room);
        assert_eq!(quota.in_flight(), 0);
    }

    #[test]
    fn what_a_dead_process_had_reserved_is_given_back() {
        let (directory, quota) = store();
        let limit = allocated_below(directory.path()).unwrap() + (1 << 20) + (64 << 10);
        // A killed process's: nobody has it locked.
        std::fs::create_dir(directory.path().join(FOLDER)).unwrap();
        let left = directory.path().join(FOLDER).join("123-abc");
        std::fs::write(&left, u64::MAX.to_le_bytes()).unwrap();
        let room = quota(limit).take(1 << 20).unwrap();
        assert!(!left.exists());
        drop(room);
    }

    #[test]
    fn damage_is_counted_anew() {
        let (directory, quota) = store();
        let limit = allocated_below(directory.path()).unwrap() + (1 << 20);
        drop(quota(limit).take(1).unwrap());
        let used = directory.path().join(FOLDER).join("used");
        let good = std::fs::read(&used).unwrap();
        assert_eq!(good.len(), 32);
        let file = File::open(&used).unwrap();
        assert!(read_used(&file).is_some());
        for at in 0..32 {
            let mut bad = good.clone();
            bad[at] ^= 0x40;
            std::fs::write(&used, &bad).unwrap();
            assert_eq!(read_used(&file), None, "byte {at}");
        }
        drop(quota(limit).take(100).unwrap());
        assert!(read_used(&file).is_some());
        // One that is old, or of a clock that was set back.
        for age in [-100_i64, 11] {
            write(&file_for_writing(&used), 5, now().saturating_add_signed(-age)).unwrap();
            assert_eq!(read_used(&file), None, "{age} s");
        }
    }

    fn file_for_writing(path: &Path) -> File {
        File::options().read(true).write(true).open(path).unwrap()
    }
}
