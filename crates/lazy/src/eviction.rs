//! Removing layers that nobody uses, and what was made out of them.
//!
//! A layer is removed under its exclusive lock, which nobody gets who has it open: bitmap first, so that there is none
//! beside a data file that is not its own, and the lock last. Who waits for that lock meanwhile sees that it is not the
//! one at its path any more, and begins anew.

use std::{
    fs::File,
    io,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use crate::{
    beside,
    cache::{NO_FOLLOW, is_at},
    census::{StoredLayer, is_pinned, layer_directories},
    derived,
    error::StoreError,
    quota::allocated_below,
    store::Store,
};

/// A temporary file that is older belongs to a process that was killed.
const TEMPORARY: Duration = Duration::from_secs(3600);

/// What may be removed. Never what is in use or pinned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PruneOptions {
    /// All layers.
    pub all: bool,
    /// Layers that were not used for so long.
    pub older_than: Option<Duration>,
    /// Layers, until the store takes no more than so many bytes; the one that was not used for longest first.
    pub keep_bytes: Option<u64>,
    /// Only say what would go.
    pub dry_run: bool,
}

/// What was removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    /// The layers.
    pub layers: Vec<StoredLayer>,
    /// Bootstraps and temporary files.
    pub other_files: u64,
    /// Freed, in bytes of allocated blocks.
    pub freed_bytes: u64,
}

/// What became of a layer that was to be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removed {
    /// It is gone, and so many bytes of blocks with it.
    Freed(u64),
    /// A process uses it.
    InUse,
    /// It is pinned.
    Pinned,
    /// It was gone already.
    Gone,
}

impl Store {
    /// Removes layers that nobody uses and that are not pinned, and what is left behind of others: with no option but
    /// the default ones, only the latter. Blocks.
    ///
    /// # Errors
    /// Where the store can't be read or written. Some may have been removed then.
    pub fn prune(&self, options: &PruneOptions) -> Result<Pruned, StoreError> {
        let mut pruned = Pruned::default();
        let mut layers = self.census()?;
        layers.reverse();
        let mut left = allocated_below(self.root()).map_err(StoreError::file(self.root()))?;
        let now = SystemTime::now();
        for layer in layers {
            let age = now.duration_since(layer.last_used).unwrap_or_default();
            let is_meant = options.all
                || options.older_than.is_some_and(|least| age >= least)
                || options.keep_bytes.is_some_and(|most| left > most);
            if !is_meant || layer.in_use || layer.pinned {
                continue;
            }
            let removed =
                if options.dry_run { Removed::Freed(layer.allocated_bytes) } else { remove_layer(&layer.directory)? };
            if let Removed::Freed(bytes) = removed {
                left = left.saturating_sub(bytes);
                pruned.freed_bytes = pruned.freed_bytes.saturating_add(bytes);
                pruned.layers.push(layer);
            }
        }
        self.let_go_of_removed();
        let gone: Vec<&Path> = pruned.layers.iter().map(|layer| layer.directory.as_path()).collect();
        let (files, bytes) = remove_leftovers(self.root(), &gone, options.all, options.dry_run)?;
        pruned.other_files = files;
        pruned.freed_bytes = pruned.freed_bytes.saturating_add(bytes);
        Ok(pruned)
    }
}

impl Store {
    /// Removes one layer, given by its directory ([`LazyLayer::directory`]), and what was made out of it. Blocks.
    ///
    /// # Errors
    /// Where the store can't be read or written.
    ///
    /// [`LazyLayer::directory`]: crate::LazyLayer::directory
    pub fn remove(&self, directory: &Path) -> Result<Removed, StoreError> {
        let removed = remove_layer(directory)?;
        // Where it was gone already, another process may have removed it.
        self.let_go_of_removed();
        if let Removed::Freed(_) = removed {
            remove_leftovers(self.root(), &[directory], false, false)?;
        }
        Ok(removed)
    }
}

/// Frees at least `excess` bytes where that can be done, and returns how many. Blocks.
pub(crate) fn make_room(root: &Path, excess: u64) -> Result<u64, StoreError> {
    let used = |directory: &PathBuf| directory.join("lock").symlink_metadata().ok()?.modified().ok();
    let directories = layer_directories(root).map_err(StoreError::file(root))?;
    let mut oldest: Vec<_> = directories.into_iter().filter_map(|path| Some((used(&path)?, path))).collect();
    oldest.sort();
    let mut freed = 0_u64;
    for (_, directory) in oldest {
        if freed >= excess {
            break;
        }
        if let Removed::Freed(bytes) = remove_layer(&directory)? {
            tracing::debug!(layer = %directory.display(), bytes, "evicted");
            freed = freed.saturating_add(bytes);
            freed = freed.saturating_add(remove_leftovers(root, &[&directory], false, false)?.1);
        }
    }
    if freed < excess {
        freed = freed.saturating_add(remove_leftovers(root, &[], true, false)?.1);
    }
    if freed < excess {
        freed = freed.saturating_add(beside::make_room(root, excess - freed));
    }
    Ok(freed)
}

/// Removes a layer's files, unless somebody uses it or it is pinned.
fn remove_layer(directory: &Path) -> Result<Removed, StoreError> {
    let path = directory.join("lock");
    let at = |error| StoreError::file(&path)(error);
    let lock = match File::options().read(true).custom_flags(NO_FOLLOW).open(&path) {
        Ok(lock) => lock,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Removed::Gone),
        Err(error) => return Err(at(error)),
    };
    match lock.try_lock() {
        Ok(()) if !is_at(&lock, &path) => return Ok(Removed::Gone),
        Ok(()) => {}
        Err(std::fs::TryLockError::WouldBlock) => return Ok(Removed::InUse),
        Err(std::fs::TryLockError::Error(error)) => return Err(at(error)),
    }
    if is_pinned(directory) {
        return Ok(Removed::Pinned);
    }
    let remove = |path: &Path| {
        let bytes = path.symlink_metadata().map_or(0, |metadata| metadata.blocks().saturating_mul(512));
        match std::fs::remove_file(path) {
            Ok(()) => Ok(bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(error) => Err(StoreError::file(path)(error)),
        }
    };
    let mut freed = remove(&directory.join("filled"))?;
    for entry in std::fs::read_dir(directory).map_err(StoreError::file(directory))? {
        let entry = entry.map_err(StoreError::file(directory))?;
        // Directories are other layers': of the same table of contents, which nothing vouches for.
        if entry.file_name() != "lock" && entry.file_type().is_ok_and(|kind| !kind.is_dir()) {
            freed += remove(&entry.path())?;
        }
    }
    freed += remove(&path)?;
    let mut empty = directory;
    for _ in 0..3 {
        let bytes = empty.symlink_metadata().map_or(0, |metadata| metadata.blocks().saturating_mul(512));
        match (empty.ends_with("layers"), std::fs::remove_dir(empty), empty.parent()) {
            (false, Ok(()), Some(parent)) => {
                freed += bytes;
                empty = parent;
            }
            _ => break,
        }
    }
    Ok(Removed::Freed(freed))
}

/// Removes bootstraps of which a layer is gone, and temporary files of processes that were killed. With `all`, also
/// bootstraps of which nobody knows what they were made of. Returns how many files, and their bytes.
fn remove_leftovers(root: &Path, gone: &[&Path], all: bool, dry_run: bool) -> Result<(u64, u64), StoreError> {
    let mut found = derived::orphans(root, gone, all.then_some(TEMPORARY));
    let now = SystemTime::now();
    let folders = std::iter::once(root.to_owned()).chain(layer_directories(root).map_err(StoreError::file(root))?);
    for folder in folders.chain([root.join(derived::BOOTSTRAPS)]).chain(beside::folders(root)) {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().filter_map(Result::ok) {
            let is_old = |metadata: std::fs::Metadata| {
                metadata.is_file()
                    && metadata
                        .modified()
                        .ok()
                        .and_then(|at| now.duration_since(at).ok())
                        .is_some_and(|age| age > TEMPORARY)
            };
            let name = entry.file_name();
            if name.as_encoded_bytes().starts_with(b".") && entry.metadata().is_ok_and(is_old) {
                found.push(entry.path());
            }
        }
    }
    let (mut files, mut bytes) = (0, 0_u64);
    for path in found {
        let Ok(metadata) = path.symlink_metadata() else { continue };
        if dry_run || std::fs::remove_file(&path).is_ok() {
            files += 1;
            bytes = bytes.saturating_add(metadata.blocks().saturating_mul(512));
        }
    }
    Ok((files, bytes))
}
