//! What a store holds: its layers, who uses them, what they take.
//!
//! | file of a layer | content |
//! |---|---|
//! | `origin` | names of the images that it was opened for, one a line, the last one first; at most [`ORIGINS`] |
//! | `pinned` | nothing: that it is there is what counts |
//! | `verdict` | what a proof of the whole layer came to, where one was made; see [`crate::proof`] |
//!
//! A layer is counted as in use while some process has its `lock` locked. A mount that needs no process any more, since
//! all of its layers are complete, has none: its files go from the directory and stay on the disk until it is unmounted.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::{self, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use crate::{
    cache::{NO_FOLLOW, is_at, open_private},
    derived::BOOTSTRAPS,
    digests::layer_key,
    error::StoreError,
    filled::Glimpse,
    proof::Finding,
    quota::allocated_below,
    store::Store,
};

/// Names of images that are kept with a layer.
pub const ORIGINS: usize = 8;
/// Most bytes of a file with text that are read.
const TEXT_BYTES: u64 = 16 << 10;
/// How often we look for directories that others have made.
const LOOKED: Duration = Duration::from_millis(200);

/// A layer of a store, as its files say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredLayer {
    /// Its directory, an absolute path.
    pub directory: PathBuf,
    /// The digest of the compressed blob, as text.
    pub blob: String,
    /// The digest of its table of contents, as text.
    pub toc: String,
    /// Whether a manifest vouches for it.
    pub vouched: bool,
    /// The images that it was opened for, the last one first.
    pub origins: Vec<String>,
    /// Extents that are here.
    pub extents_filled: u64,
    /// All its extents.
    pub extents_total: u64,
    /// What it takes of the disk, in bytes of allocated blocks.
    pub allocated_bytes: u64,
    /// When it was used last.
    pub last_used: SystemTime,
    /// Whether a process has it open.
    pub in_use: bool,
    /// Whether it must not be evicted.
    pub pinned: bool,
    /// What its proof came to, where one was made.
    pub verdict: Option<String>,
}

/// What a store takes of the disk, in bytes of allocated blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Layers.
    pub layers: u64,
    /// Layers that a process has open.
    pub layers_in_use: u64,
    /// Layers that are pinned.
    pub layers_pinned: u64,
    /// What layers take.
    pub layer_bytes: u64,
    /// What layers take that could be removed now.
    pub reclaimable_bytes: u64,
    /// Bootstraps.
    pub bootstraps: u64,
    /// What they take.
    pub bootstrap_bytes: u64,
    /// All of it, with directories and the index of content.
    pub total_bytes: u64,
}

impl Store {
    /// Lists all layers, the one that was used last first. Blocks for some system calls each. A layer that is removed
    /// meanwhile is not listed.
    ///
    /// # Errors
    /// Where the store can't be read.
    pub fn census(&self) -> Result<Vec<StoredLayer>, StoreError> {
        let root = self.root();
        let directories = layer_directories(root).map_err(StoreError::file(root))?;
        let mut layers: Vec<_> = directories.iter().filter_map(|directory| look(root, directory)).collect();
        layers.sort_by(|one, other| (other.last_used, &one.directory).cmp(&(one.last_used, &other.directory)));
        Ok(layers)
    }

    /// Adds up what the store takes. Blocks as [`Store::census`].
    ///
    /// # Errors
    /// Where the store can't be read.
    pub fn totals(&self) -> Result<Totals, StoreError> {
        let mut totals = Totals::default();
        for layer in self.census()? {
            totals.layers += 1;
            totals.layers_in_use += u64::from(layer.in_use);
            totals.layers_pinned += u64::from(layer.pinned);
            totals.layer_bytes = totals.layer_bytes.saturating_add(layer.allocated_bytes);
            if !layer.in_use && !layer.pinned {
                totals.reclaimable_bytes = totals.reclaimable_bytes.saturating_add(layer.allocated_bytes);
            }
        }
        let folder = self.root().join(BOOTSTRAPS);
        for entry in std::fs::read_dir(&folder).into_iter().flatten().filter_map(Result::ok) {
            let Ok(metadata) = entry.metadata() else { continue };
            totals.bootstraps += u64::from(entry.path().extension().is_some_and(|extension| extension == "erofs"));
            totals.bootstrap_bytes = totals.bootstrap_bytes.saturating_add(metadata.blocks().saturating_mul(512));
        }
        totals.total_bytes = allocated_below(self.root()).map_err(StoreError::file(self.root()))?;
        Ok(totals)
    }

    /// Keeps a layer from being evicted, or lets it be again. Blocks. Returns whether the layer is still there.
    ///
    /// # Errors
    /// Where the store can't be written.
    pub fn set_pinned(&self, layer: &StoredLayer, pinned: bool) -> Result<bool, StoreError> {
        // With the lock, so that nobody is removing it.
        let Some(_lock) = lock_shared(&layer.directory)? else { return Ok(false) };
        let path = layer.directory.join("pinned");
        let done = if pinned { open_private(&path).map(drop) } else { std::fs::remove_file(&path) };
        match done {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(StoreError::file(path)(error)),
            _ => Ok(true),
        }
    }

    /// Notes that a layer was opened for an image. Nothing depends on it, so that what fails is left.
    pub(crate) fn note_origin(&self, directory: &Path, name: &str) {
        let name: String = name.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).take(1024).collect();
        let mut origins = read_origins(directory);
        if origins.first() == Some(&name) {
            return;
        }
        origins.retain(|origin| *origin != name);
        origins.insert(0, name);
        origins.truncate(ORIGINS);
        let write = || {
            let mut file = tempfile::Builder::new().prefix(".origin-").tempfile_in(directory)?;
            file.write_all((origins.join("\n") + "\n").as_bytes())?;
            file.persist(directory.join("origin")).map_err(|error| error.error)
        };
        if let Err(error) = write() {
            tracing::debug!(%error, layer = %directory.display(), "the name of the image could not be noted");
        }
    }
}

/// Locks a layer's directory so that it stays; `None` where it is gone.
fn lock_shared(directory: &Path) -> Result<Option<File>, StoreError> {
    let path = directory.join("lock");
    let lock = match File::options().read(true).custom_flags(NO_FOLLOW).open(&path) {
        Ok(lock) => lock,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(StoreError::file(path)(error)),
    };
    lock.lock_shared().map_err(StoreError::file(&path))?;
    Ok(is_at(&lock, &path).then_some(lock))
}

/// Returns the directories of all layers, in no order.
pub(crate) fn layer_directories(root: &Path) -> io::Result<Vec<PathBuf>> {
    let below = |directory: &Path| -> io::Result<Vec<PathBuf>> {
        match std::fs::read_dir(directory) {
            Ok(entries) => {
                let directories = entries
                    .filter_map(Result::ok)
                    .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                    .map(|entry| entry.path());
                Ok(directories.collect())
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    };
    let mut found = Vec::new();
    for blob in below(&root.join("layers"))? {
        for toc in below(&blob)? {
            found.extend(below(&toc)?);
            found.push(toc);
        }
    }
    found.retain(|directory| directory.join("lock").symlink_metadata().is_ok_and(|lock| lock.is_file()));
    Ok(found)
}

fn look(root: &Path, directory: &Path) -> Option<StoredLayer> {
    let relative = directory.strip_prefix(root).ok()?;
    let mut names = relative.iter().skip(1).map(|name| digest_of_name(&name.to_string_lossy()));
    let (blob, toc) = (names.next()?, names.next()?);
    let lock_path = directory.join("lock");
    let lock = File::options().read(true).custom_flags(NO_FOLLOW).open(&lock_path).ok()?;
    let last_used = lock.metadata().ok()?.modified().ok()?;
    let in_use = lock.try_lock().is_err();
    // Not held while the rest is looked at: somebody may want to open it.
    drop(lock);
    let filled = File::options().read(true).custom_flags(NO_FOLLOW).open(directory.join("filled"));
    let filled = filled.ok().and_then(Glimpse::new);
    Some(StoredLayer {
        directory: directory.to_owned(),
        blob,
        toc,
        vouched: names.next().is_none(),
        origins: read_origins(directory),
        extents_filled: filled.as_ref().map_or(0, Glimpse::count),
        extents_total: filled.as_ref().map_or(0, Glimpse::extents),
        allocated_bytes: allocated_in(directory),
        last_used,
        in_use,
        pinned: is_pinned(directory),
        verdict: Finding::load(directory).map(|finding| finding.verdict.to_string()),
    })
}

/// `sha256-HEX` as `sha256:HEX`.
fn digest_of_name(name: &str) -> String {
    name.replacen('-', ":", 1)
}

pub(crate) fn is_pinned(directory: &Path) -> bool {
    directory.join("pinned").symlink_metadata().is_ok()
}

/// What a layer's own files take, in bytes.
fn allocated_in(directory: &Path) -> u64 {
    let entries = std::fs::read_dir(directory).into_iter().flatten().filter_map(Result::ok);
    let files = entries.filter_map(|entry| entry.metadata().ok()).filter(|metadata| !metadata.is_dir());
    let own = directory.symlink_metadata().ok();
    files.chain(own).map(|metadata| metadata.blocks().saturating_mul(512)).sum()
}

fn read_origins(directory: &Path) -> Vec<String> {
    let text = read_text(&directory.join("origin"));
    text.lines().filter(|line| !line.is_empty()).take(ORIGINS).map(str::to_owned).collect()
}

/// Reads a small file of ours; nothing where it can't be read.
fn read_text(path: &Path) -> String {
    let read = || {
        let file = File::options().read(true).custom_flags(NO_FOLLOW).open(path)?;
        let mut bytes = Vec::new();
        if file.metadata()?.is_file() {
            file.take(TEXT_BYTES).read_to_end(&mut bytes)?;
        }
        io::Result::Ok(bytes)
    };
    String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
}

/// Layers' directories by the keys that the index of content has of them.
#[derive(Debug)]
pub(crate) struct Directories {
    root: PathBuf,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    by_key: HashMap<u64, PathBuf>,
    looked: Option<Instant>,
}

impl Directories {
    pub(crate) fn new(root: &Path) -> Self {
        Self { root: root.to_owned(), known: Mutex::default() }
    }

    /// Takes note of a directory.
    pub(crate) fn know(&self, key: u64, directory: &Path) {
        self.known().by_key.insert(key, directory.to_owned());
    }

    /// Returns a directory. Looks for new ones where it is not known, not too often.
    pub(crate) fn get(&self, key: u64) -> Option<PathBuf> {
        let mut known = self.known();
        if !known.by_key.contains_key(&key) && known.looked.is_none_or(|looked| looked.elapsed() >= LOOKED) {
            self.look(&mut known);
        }
        known.by_key.get(&key).cloned()
    }

    /// Returns the keys of all layers that are there.
    pub(crate) fn keys(&self) -> HashSet<u64> {
        let mut known = self.known();
        self.look(&mut known);
        known.by_key.keys().copied().collect()
    }

    fn look(&self, known: &mut Known) {
        known.looked = Some(Instant::now());
        if let Ok(directories) = layer_directories(&self.root) {
            let key = |directory: &Path| layer_key(directory.strip_prefix(&self.root).unwrap_or(directory));
            known.by_key = directories.into_iter().map(|directory| (key(&directory), directory)).collect();
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // A map that is replaced or added to.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_few_and_newest_first() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let layer = directory.path().join("layer");
        std::fs::create_dir(&layer).unwrap();
        for number in 0..12 {
            store.note_origin(&layer, &format!("image:{number}"));
        }
        store.note_origin(&layer, "image:7");
        store.note_origin(&layer, "bad\nname");
        let expected =
            ["bad\u{fffd}name", "image:7", "image:11", "image:10", "image:9", "image:8", "image:6", "image:5"];
        assert_eq!(read_origins(&layer), expected);
        assert_eq!(std::fs::read_dir(&layer).unwrap().count(), 1);
    }
}
