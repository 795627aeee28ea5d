//! The directory that keeps what was fetched.
//!
//! | path | content |
//! |---|---|
//! | `version` | one line, `loris layer store 1` |
//! | `layers/BLOB/TOC/` | a layer, see [`crate::layer`]: `data`, `filled`, `toc`, `lock`, `origin`, `pinned`, `verdict` |
//! | `digests` | where content is, by its digest |
//! | `quota/` | what processes have reserved, where there is a quota |
//!
//! `BLOB` is the digest of the compressed blob and `TOC` that of its table of contents, both as `ALGORITHM-HEX`. Both are
//! in the name because nobody checks a blob against its digest while it is read in pieces: an image that names another's
//! blob, but comes with a table of contents of its own, must not meet the other's data. For the same reason a layer that
//! nothing vouches for gets a directory of its own for each place it came from, `unverified-HEX/`.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, PoisonError, Weak},
};

use loris_format::{digest::Digest, index::LayerIndex};

use crate::{
    cache::{LayerCache, NO_FOLLOW, create_private_directory},
    census::Directories,
    digests::{Digests, layer_key},
    error::StoreError,
    quota::{Quota, Room},
    schedule::Schedule,
};

/// The line in the file `version`. A newer Loris that can't be read by this one has another.
const VERSION: &str = "loris layer store 1";

/// The part of a quota that the index of content may have.
const INDEX_PART: u64 = 8;

/// How much a store's layers may do at once, all together.
#[derive(Clone, Copy, Debug)]
pub struct StoreOptions {
    /// Most bytes of fetched and decoded frames in memory. A single frame that needs more is fetched alone.
    pub memory_bytes: u64,
    /// Most requests under way that somebody waits for. The source has its own bound for each host.
    pub requests: usize,
    /// Most frames being decoded: as many as there are processors.
    pub decoders: usize,
    /// Most bytes of the disk that the store takes, of allocated blocks; no bound where it is not given. Kept by evicting
    /// layers that nobody uses, the one that was not used for longest first. All processes of a store should have the
    /// same: what those without it write is noticed within seconds, and not before it is written.
    pub quota_bytes: Option<u64>,
    /// Whether what the disk has is hashed again before its first use in this process.
    pub paranoid: bool,
}

impl Default for StoreOptions {
    fn default() -> Self {
        let decoders = std::thread::available_parallelism().map_or(1, usize::from);
        Self { memory_bytes: 128 << 20, requests: 16, decoders, quota_bytes: None, paranoid: false }
    }
}

/// A directory that keeps layers, for this process and others. Cheap to clone; clones share its bounds.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    schedule: Arc<Schedule>,
    /// What is open, so that two images with a layer in common have one bitmap of it.
    open: Mutex<HashMap<PathBuf, Slot>>,
    /// By device and inode number.
    adopted: Mutex<HashMap<(u64, u64), File>>,
    digests: Digests,
    /// How many layers are being noted there.
    indexing: Mutex<usize>,
    indexed: Condvar,
    directories: Directories,
    quota: Option<Arc<Quota>>,
    paranoid: bool,
}

/// The lock of a slot is held while its layer is being opened, the lock of the map is not.
type Slot = Arc<Mutex<Weak<LayerCache>>>;

impl Store {
    /// Opens the store in a directory, or makes one there. Blocks for some system calls.
    ///
    /// # Errors
    /// Where the directory can't be made or written, holds something else, was made by a newer Loris, or can be written
    /// by others.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        Self::open_with(root, &StoreOptions::default())
    }

    /// Does what [`Store::open`] does, with other bounds.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_with(root: &Path, options: &StoreOptions) -> Result<Self, StoreError> {
        create_private_directory(root).map_err(StoreError::file(root))?;
        // Data files are named in mount options, which must not depend on the working directory.
        let root = root.canonicalize().map_err(StoreError::file(root))?;
        check_owner(&root)?;
        check_version(&root)?;
        let schedule = Arc::new(Schedule::new(options.memory_bytes, options.requests, options.decoders));
        let inner = Inner {
            schedule,
            open: Mutex::default(),
            adopted: Mutex::default(),
            digests: Digests::new(&root),
            indexing: Mutex::default(),
            indexed: Condvar::new(),
            directories: Directories::new(&root),
            quota: options.quota_bytes.map(|limit| Arc::new(Quota::new(&root, limit))),
            paranoid: options.paranoid,
            root,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Returns the directory, as an absolute path.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.inner.root
    }

    /// Takes over a data file that an earlier process had open ([`LazyLayer::kept_files`]): when its layer is opened, it
    /// is used in place of a descriptor of our own. A descriptor that is older than a fanotify mark on the file is the
    /// only kind through which it can be filled without asking ourselves for leave.
    ///
    /// # Errors
    /// Where the file can't be looked at.
    ///
    /// [`LazyLayer::kept_files`]: crate::LazyLayer::kept_files
    pub fn adopt(&self, data: File) -> io::Result<()> {
        let metadata = data.metadata()?;
        let mut adopted = self.inner.adopted.lock().unwrap_or_else(PoisonError::into_inner);
        adopted.insert((metadata.dev(), metadata.ino()), data);
        Ok(())
    }

    /// Returns what was adopted of the layer in `directory`.
    fn adopted(&self, directory: &Path) -> Option<File> {
        let metadata = directory.join("data").metadata().ok()?;
        let adopted = self.inner.adopted.lock().unwrap_or_else(PoisonError::into_inner);
        adopted.get(&(metadata.dev(), metadata.ino()))?.try_clone().ok()
    }

    /// Closes what was adopted of layers whose data files were removed, by whomever: they keep their disk for as long as
    /// they are open. Whoever reads one has a descriptor of his own.
    pub fn let_go_of_removed(&self) {
        let mut adopted = self.inner.adopted.lock().unwrap_or_else(PoisonError::into_inner);
        adopted.retain(|_, data| data.metadata().is_ok_and(|metadata| metadata.nlink() > 0));
    }

    /// Returns the bound on the store's disk use, in bytes.
    #[must_use]
    pub fn quota_bytes(&self) -> Option<u64> {
        self.inner.quota.as_ref().map(|quota| quota.limit())
    }

    pub(crate) fn is_paranoid(&self) -> bool {
        self.inner.paranoid
    }

    pub(crate) fn digests(&self) -> &Digests {
        &self.inner.digests
    }

    pub(crate) fn directories(&self) -> &Directories {
        &self.inner.directories
    }

    /// Makes room on the disk for `bytes` that are about to be written, and keeps it until they are. Evicts what nobody
    /// uses where the quota wants it. Blocks.
    pub(crate) fn room(&self, bytes: u64) -> Result<Option<Room>, StoreError> {
        let Some(quota) = &self.inner.quota else { return Ok(None) };
        let room = quota.take(bytes);
        if quota.was_evicted() {
            self.let_go_of_removed();
        }
        room.map(Some)
    }

    /// Returns the layer in `directory`, where this process has it open.
    pub(crate) fn opened_layer(&self, directory: &Path) -> Option<Arc<LayerCache>> {
        let slot = Arc::clone(self.inner.open.lock().unwrap_or_else(PoisonError::into_inner).get(directory)?);
        // Not waiting for one that is being opened.
        slot.try_lock().ok()?.upgrade()
    }

    pub(crate) fn schedule(&self) -> &Arc<Schedule> {
        &self.inner.schedule
    }

    /// Returns the directory of a layer, whether it is here or not. `unverified_from` names the source ([`ImageSource::name`])
    /// of one whose table of contents nothing vouches for.
    ///
    /// [`ImageSource::name`]: loris_oci::ImageSource::name
    #[must_use]
    pub fn layer_directory(&self, blob: &Digest, toc: &Digest, unverified_from: Option<&str>) -> PathBuf {
        self.directory(blob, toc, unverified_from)
    }

    /// Returns the directory of a layer; `unverified_from` names the source of one that nothing vouches for.
    pub(crate) fn directory(&self, blob: &Digest, toc: &Digest, unverified_from: Option<&str>) -> PathBuf {
        let name = |digest: &Digest| format!("{}-{}", digest.algorithm(), digest.hex());
        let mut path = self.inner.root.join("layers").join(name(blob)).join(name(toc));
        if let Some(source) = unverified_from {
            path.push(format!("unverified-{}", Digest::sha256_of(source.as_bytes()).hex()));
        }
        path
    }

    /// Opens a layer's files, or returns them where this process has them open. Blocks.
    pub(crate) fn layer(
        &self,
        directory: &Path,
        blob: &Digest,
        index: &LayerIndex,
    ) -> Result<Arc<LayerCache>, StoreError> {
        let slot = {
            let mut open = self.inner.open.lock().unwrap_or_else(PoisonError::into_inner);
            open.retain(|_, slot| Arc::strong_count(slot) > 1 || slot.lock().is_ok_and(|weak| weak.strong_count() > 0));
            Arc::clone(open.entry(directory.to_owned()).or_default())
        };
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cache) = slot.upgrade() {
            return Ok(cache);
        }
        let cache = Arc::new(LayerCache::open(directory, blob, index, self.adopted(directory), self)?);
        *slot = Arc::downgrade(&cache);
        self.index_content(&cache, index);
        Ok(cache)
    }
}

impl Store {
    /// Notes where the layer's content is, so that other layers find it: behind whoever opens the layer, where there is a
    /// runtime to do it.
    fn index_content(&self, cache: &LayerCache, index: &LayerIndex) {
        let directory = cache.directory();
        let key = layer_key(directory.strip_prefix(self.root()).unwrap_or(directory));
        let layout = *cache.layout();
        self.inner.directories.know(key, directory);
        if self.inner.digests.has(key, &layout) {
            return;
        }
        let extents = index.extents().iter().zip(0..);
        let extents: Vec<_> =
            extents.filter_map(|(extent, number)| Some((extent.digest?, extent.data.0, number))).collect();
        let (store, indexing) = (self.clone(), Indexing::begin(&self.inner));
        let work = move || {
            // Content comes first: where there is a quota, the index has a small part of it.
            let room = |bytes: u64| {
                let is_small = store.quota_bytes().is_none_or(|quota| bytes <= quota / INDEX_PART);
                is_small.then(|| store.room(bytes).ok()).flatten()
            };
            let alive = || store.inner.directories.keys();
            if let Err(error) = store.inner.digests.add(key, &layout, extents.into_iter(), alive, room) {
                // Others fetch it then.
                tracing::debug!(%error, "the index of content could not be written");
            }
            drop(indexing);
        };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(work)),
            Err(_) => work(),
        }
    }

    /// Waits until layers that are opened later find the content of all that were opened before. Blocks.
    pub fn settle(&self) {
        let mut count = self.inner.indexing.lock().unwrap_or_else(PoisonError::into_inner);
        while *count > 0 {
            count = self.inner.indexed.wait(count).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A layer whose content is being noted.
struct Indexing(Arc<Inner>);

impl Indexing {
    fn begin(inner: &Arc<Inner>) -> Self {
        *inner.indexing.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        Self(Arc::clone(inner))
    }
}

impl Drop for Indexing {
    fn drop(&mut self) {
        *self.0.indexing.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.indexed.notify_all();
    }
}

/// Whoever can write to the store decides what containers read.
fn check_owner(root: &Path) -> Result<(), StoreError> {
    let metadata = root.metadata().map_err(StoreError::file(root))?;
    let mode = metadata.permissions().mode();
    let us = rustix::process::geteuid().as_raw();
    let detail = if metadata.uid() != us && metadata.uid() != 0 {
        format!("it belongs to user {}", metadata.uid())
    } else if mode & 0o022 != 0 {
        format!("its mode is {:04o}", mode & 0o7777)
    } else {
        return Ok(());
    };
    Err(StoreError::Exposed { path: root.to_owned(), detail })
}

/// Reads the first 200 bytes of a file, and nothing of what is no file.
fn read_start(path: &Path) -> io::Result<Vec<u8>> {
    let file = File::options().read(true).custom_flags(NO_FOLLOW).open(path)?;
    let mut text = Vec::new();
    if file.metadata()?.is_file() {
        file.take(200).read_to_end(&mut text)?;
    }
    Ok(text)
}

fn check_version(root: &Path) -> Result<(), StoreError> {
    let path = root.join("version");
    loop {
        match read_start(&path) {
            Ok(text) => {
                let text = String::from_utf8_lossy(&text);
                let found = text.lines().next().unwrap_or_default();
                return match found {
                    VERSION => Ok(()),
                    other if other.starts_with("loris layer store ") => {
                        Err(StoreError::Newer { path: root.to_owned(), found: other.to_owned(), expected: VERSION })
                    }
                    _ => Err(StoreError::NotAStore { path: root.to_owned() }),
                };
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(StoreError::file(path)(error)),
        }
        let mut entries = std::fs::read_dir(root).map_err(StoreError::file(root))?;
        // Another process may be making the store: what it leaves before the version is a temporary file.
        let stranger = entries
            .any(|entry| entry.is_ok_and(|entry| !entry.file_name().as_encoded_bytes().starts_with(b".version-")));
        if stranger && !path.exists() {
            return Err(StoreError::NotAStore { path: root.to_owned() });
        }
        let write = || {
            let mut file = tempfile::Builder::new().prefix(".version-").tempfile_in(root)?;
            writeln!(file, "{VERSION}")?;
            file.persist_noclobber(&path).map_err(|error| error.error).map(drop)
        };
        match write() {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(StoreError::file(path)(error)),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_is_made_once_and_known_again() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("a/b");
        let store = Store::open(&root).unwrap();
        assert_eq!(store.root(), root.canonicalize().unwrap());
        assert_eq!(std::fs::read_to_string(root.join("version")).unwrap(), "loris layer store 1\n");
        assert_eq!(root.metadata().unwrap().permissions().mode() & 0o777, 0o700);
        Store::open(&root).unwrap();
    }

    #[test]
    fn what_is_no_store_of_ours_is_left_alone() {
        type Expected = fn(&StoreError) -> bool;
        let cases: [(&str, &str, Expected); 4] = [
            ("version", "loris layer store 2\n", |error| matches!(error, StoreError::Newer { .. })),
            ("version", "something else\n", |error| matches!(error, StoreError::NotAStore { .. })),
            ("version", "", |error| matches!(error, StoreError::NotAStore { .. })),
            ("holiday.jpg", "", |error| matches!(error, StoreError::NotAStore { .. })),
        ];
        for (name, content, expected) in cases {
            let directory = tempfile::tempdir().unwrap();
            std::fs::write(directory.path().join(name), content).unwrap();
            let error = Store::open(directory.path()).unwrap_err();
            assert!(expected(&error), "{name} {content:?}: {error}");
            assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
        }
    }

    #[test]
    fn a_named_pipe_in_the_place_of_a_file_holds_nobody_up() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("version");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
        assert!(matches!(Store::open(directory.path()), Err(StoreError::NotAStore { .. })));
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        assert!(Store::open(directory.path()).is_err());
    }

    #[test]
    fn a_store_that_others_can_write_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let mode = std::fs::Permissions::from_mode(0o777);
        std::fs::set_permissions(directory.path(), mode).unwrap();
        let error = Store::open(directory.path()).unwrap_err();
        assert!(matches!(&error, StoreError::Exposed { detail, .. } if detail.contains("0777")), "{error}");
    }

    #[test]
    fn what_was_adopted_is_closed_once_it_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let adopted = |store: &Store| store.inner.adopted.lock().unwrap().len();
        for name in ["a", "b"] {
            let file = File::create(directory.path().join(name)).unwrap();
            store.adopt(file).unwrap();
        }
        // By another process.
        std::fs::remove_file(directory.path().join("a")).unwrap();
        assert_eq!(adopted(&store), 2);
        let gone = store.remove(&directory.path().join("layers/x/y")).unwrap();
        assert_eq!((gone, adopted(&store)), (crate::Removed::Gone, 1));
    }

    #[test]
    fn what_is_evicted_for_the_quota_is_closed() {
        let directory = tempfile::tempdir().unwrap();
        let options = StoreOptions { quota_bytes: Some(1 << 20), ..StoreOptions::default() };
        let store = Store::open_with(directory.path(), &options).unwrap();
        let layer = store.layer_directory(&Digest::sha256_of(b"1"), &Digest::sha256_of(b"2"), None);
        std::fs::create_dir_all(&layer).unwrap();
        std::fs::write(layer.join("lock"), b"").unwrap();
        std::fs::write(layer.join("data"), vec![1; 900 << 10]).unwrap();
        store.adopt(File::open(layer.join("data")).unwrap()).unwrap();
        drop(store.room(600 << 10).unwrap());
        assert!(!layer.exists());
        assert_eq!(store.inner.adopted.lock().unwrap().len(), 0);
    }

    #[test]
    fn untrusted_layers_are_apart() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let (blob, toc, other) = (Digest::sha256_of(b"1"), Digest::sha256_of(b"2"), Digest::sha256_of(b"3"));
        let paths = [
            store.directory(&blob, &toc, None),
            store.directory(&blob, &other, None),
            store.directory(&other, &toc, None),
            store.directory(&blob, &toc, Some("one")),
            store.directory(&blob, &toc, Some("two")),
        ];
        for (number, path) in paths.iter().enumerate() {
            assert!(!paths[..number].contains(path), "{}", path.display());
            assert!(path.starts_with(store.root().join("layers")));
        }
    }
}
