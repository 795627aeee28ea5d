//! The data files that are watched, and whose they are.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    time::{Duration, Instant},
};

use loris_format::position::DataRange;
use loris_lazy::{EnsureError, LazyLayer};
use tokio::task::AbortHandle;

use super::identity;

/// For how long after a wait in vain the next ones are shorter, and by what factor.
const AGAIN: Duration = Duration::from_secs(5);
const SHORTER: u32 = 4;
/// Most files whose failures are logged.
const MAX_COMPLAINTS: usize = 1000;

/// A watched file, as whoever watches it holds it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct FileId {
    /// Its name in the journal and at the keeper; never 0, never used twice.
    pub(super) key: u64,
    identity: (u64, u64),
    /// Which use of it this is.
    number: u64,
}

/// Who can fill a file.
#[derive(Clone, Debug)]
pub(super) enum Watched {
    /// The layer.
    Layer(Arc<LazyLayer>),
    /// Nobody: it was watched by an earlier process, and this one has not opened its layer.
    Orphan,
}

/// All watched files.
#[derive(Debug, Default)]
pub(super) struct Files {
    inner: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    by_identity: HashMap<(u64, u64), Entry>,
    by_key: HashMap<u64, (u64, u64)>,
    last_key: u64,
    last_use: u64,
    complained: HashSet<(u64, u64)>,
    /// When a wait for content was last in vain.
    failed: HashMap<(u64, u64), Instant>,
    /// Who waits for the descriptor of an event of their own, by the file's identity.
    expected: HashMap<(u64, u64), mpsc::Sender<File>>,
}

#[derive(Debug)]
struct Entry {
    key: u64,
    /// The watches, by number. Images may have the layer in common; what they claim about it need not be the same.
    uses: Vec<(u64, Arc<LazyLayer>)>,
    /// Whether the kernel asks before it is read, as far as is known.
    is_marked: bool,
    /// The descriptors of an orphan, which nobody else holds here.
    kept: Option<[File; 2]>,
    /// The tasks that wait until a layer is complete.
    completions: Vec<(Arc<LazyLayer>, Completion)>,
}

impl Entry {
    fn new(key: u64) -> Self {
        Self { key, uses: Vec::new(), is_marked: true, kept: None, completions: Vec::new() }
    }

    /// Returns data file and lock, where it was inherited.
    fn inherited(&self) -> Option<io::Result<[File; 2]>> {
        let used = self.uses.iter().find(|(number, _)| *number == INHERITED).map(|(_, layer)| layer.kept_files());
        let [data, lock] = used.or_else(|| self.kept.as_ref().map(|[data, lock]| [data, lock]))?;
        Some(data.try_clone().and_then(|data| Ok([data, lock.try_clone()?])))
    }

    /// Returns who fills the file. Who asks for it is not known: as long as one image of those that are mounted is what it
    /// claims to be, its readers get what they ask for.
    fn watched(&self) -> Watched {
        let sound = self.uses.iter().find(|(_, layer)| !layer.is_condemned());
        match sound.or(self.uses.first()) {
            Some((_, layer)) => Watched::Layer(Arc::clone(layer)),
            None => Watched::Orphan,
        }
    }
}

/// The number of uses that were inherited: mounts that are out of sight may read it.
const INHERITED: u64 = 0;

/// A file that nobody watches any more: its key, data file and lock.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) key: u64,
    pub(super) data: File,
    pub(super) lock: File,
}

/// A task that holds the layer, and ends when nobody watches that any more.
#[derive(Debug)]
struct Completion(AbortHandle);

impl Drop for Completion {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Files {
    /// Takes over the files of an earlier process. All of them are marked.
    pub(super) fn inherited(files: HashMap<u64, [File; 2]>, layers: &[Arc<LazyLayer>]) -> io::Result<Self> {
        let mut opened = HashMap::new();
        for layer in layers {
            opened.insert(identity(layer.data_file())?, layer);
        }
        let mut table = Table::default();
        for (key, kept) in files {
            let identity = identity(&kept[0])?;
            let mut entry = Entry::new(key);
            match opened.get(&identity) {
                Some(&layer) => entry.uses.push((INHERITED, Arc::clone(layer))),
                None => entry.kept = Some(kept),
            }
            table.last_key = table.last_key.max(key);
            table.by_key.insert(key, identity);
            table.by_identity.insert(identity, entry);
        }
        Ok(Self { inner: Mutex::new(table) })
    }

    /// Adds a use of a layer's file.
    pub(super) fn add(&self, layer: &Arc<LazyLayer>) -> io::Result<FileId> {
        let identity = identity(layer.data_file())?;
        let mut table = self.lock();
        table.last_use += 1;
        let number = table.last_use;
        let key = table.by_identity.get(&identity).map_or(table.last_key + 1, |entry| entry.key);
        table.last_key = table.last_key.max(key);
        table.by_key.insert(key, identity);
        let entry = table.by_identity.entry(identity).or_insert_with(|| Entry::new(key));
        entry.uses.push((number, Arc::clone(layer)));
        Ok(FileId { key, identity, number })
    }

    /// Starts the task that waits until a layer is complete, unless there is one or nobody watches the layer.
    pub(super) fn await_completion(&self, layer: &LazyLayer, start: impl FnOnce() -> AbortHandle) {
        let Ok(identity) = identity(layer.data_file()) else { return };
        let mut table = self.lock();
        let Some(entry) = table.by_identity.get_mut(&identity) else { return };
        // One that has ended is of a layer that was complete and is not any more.
        entry.completions.retain(|(_, completion)| !completion.0.is_finished());
        let is = |known: &Arc<LazyLayer>| std::ptr::eq(&**known, layer);
        if let Some((_, layer)) = entry.uses.iter().find(|(_, known)| is(known))
            && !entry.completions.iter().any(|(known, _)| is(known))
        {
            entry.completions.push((Arc::clone(layer), Completion(start())));
        }
    }

    /// Takes a use away; returns the layer where it was the last one.
    pub(super) fn remove(&self, id: FileId) -> Option<Arc<LazyLayer>> {
        let mut table = self.lock();
        let entry = table.by_identity.get_mut(&id.identity)?;
        let place = entry.uses.iter().position(|(number, _)| *number == id.number)?;
        let (_, layer) = entry.uses.remove(place);
        if !entry.uses.iter().any(|(_, known)| Arc::ptr_eq(known, &layer)) {
            entry.completions.retain(|(known, _)| !Arc::ptr_eq(known, &layer));
        }
        if !entry.uses.is_empty() || entry.kept.is_some() {
            return None;
        }
        let entry = table.by_identity.remove(&id.identity)?;
        table.by_key.remove(&entry.key);
        table.complained.remove(&id.identity);
        table.failed.remove(&id.identity);
        Some(layer)
    }

    /// Ends the uses that were inherited, and returns the files that nobody watches then. Where that fails, nothing has
    /// changed.
    pub(super) fn take_inherited(&self) -> io::Result<Vec<Ended>> {
        let mut table = self.lock();
        // All descriptors first: they may run out.
        let mut inherited = Vec::new();
        for (identity, entry) in &table.by_identity {
            if let Some(files) = entry.inherited().transpose()? {
                inherited.push((*identity, files));
            }
        }
        let mut ended = Vec::new();
        for (identity, files) in inherited {
            let Some(entry) = table.by_identity.get_mut(&identity) else { continue };
            entry.uses.retain(|(number, _)| *number != INHERITED);
            entry.kept = None;
            let uses = &entry.uses;
            entry.completions.retain(|(known, _)| uses.iter().any(|(_, layer)| Arc::ptr_eq(known, layer)));
            if entry.uses.is_empty() {
                let [data, lock] = files;
                ended.push(Ended { key: entry.key, data, lock });
            }
        }
        for Ended { key, .. } in &ended {
            if let Some(identity) = table.by_key.remove(key) {
                table.by_identity.remove(&identity);
                table.complained.remove(&identity);
                table.failed.remove(&identity);
            }
        }
        Ok(ended)
    }

    /// Notes whether a layer's file is marked, and returns its key where it is watched. What is added counts as marked.
    pub(super) fn set_marked(&self, layer: &LazyLayer, is_marked: bool) -> Option<u64> {
        let identity = identity(layer.data_file()).ok()?;
        let mut table = self.lock();
        let entry = table.by_identity.get_mut(&identity)?;
        entry.is_marked = is_marked;
        Some(entry.key)
    }

    /// Whether the kernel asks before any of these is read.
    pub(super) fn is_any_marked(&self, files: &[FileId]) -> bool {
        let table = self.lock();
        files.iter().any(|file| table.by_identity.get(&file.identity).is_none_or(|entry| entry.is_marked))
    }

    /// Returns the file with an identity.
    pub(super) fn find(&self, identity: (u64, u64)) -> Option<(u64, Watched)> {
        let table = self.lock();
        let entry = table.by_identity.get(&identity)?;
        Some((entry.key, entry.watched()))
    }

    /// Returns the file with a key.
    pub(super) fn by_key(&self, key: u64) -> Option<Watched> {
        let table = self.lock();
        let identity = table.by_key.get(&key)?;
        Some(table.by_identity.get(identity)?.watched())
    }

    /// Returns all files.
    pub(super) fn all(&self) -> Vec<Watched> {
        self.lock().by_identity.values().map(Entry::watched).collect()
    }

    /// Returns all layers.
    pub(super) fn layers(&self) -> Vec<Arc<LazyLayer>> {
        let table = self.lock();
        let uses = table.by_identity.values().flat_map(|entry| &entry.uses);
        uses.map(|(_, layer)| Arc::clone(layer)).collect()
    }

    /// Returns what a keeper has to keep: data file and lock of all that is watched.
    pub(super) fn kept(&self) -> io::Result<Vec<(u64, [File; 2])>> {
        let table = self.lock();
        let clone = |[data, lock]: [&File; 2]| io::Result::Ok([data.try_clone()?, lock.try_clone()?]);
        let kept = |entry: &Entry| match (entry.uses.first(), &entry.kept) {
            (Some((_, layer)), _) => Some(clone(layer.kept_files()).map(|files| (entry.key, files))),
            (None, Some([data, lock])) => Some(clone([data, lock]).map(|files| (entry.key, files))),
            (None, None) => None,
        };
        table.by_identity.values().filter_map(kept).collect()
    }

    /// Waits for an event of this process's own on a layer's file.
    pub(super) fn expect(&self, layer: &LazyLayer) -> io::Result<mpsc::Receiver<File>> {
        let (sender, receiver) = mpsc::channel();
        self.lock().expected.insert(identity(layer.data_file())?, sender);
        Ok(receiver)
    }

    /// Returns who waits for an event of a file, if anybody does.
    pub(super) fn take_expected(&self, identity: (u64, u64)) -> Option<mpsc::Sender<File>> {
        self.lock().expected.remove(&identity)
    }

    /// Returns how long to wait for a layer's content. Where a wait was in vain a moment ago, it is the same read that asks
    /// again (the kernel reads ahead, and then the page alone), and was kept waiting long enough.
    pub(super) fn patience(&self, layer: &LazyLayer, usual: Duration) -> Duration {
        let Ok(identity) = identity(layer.data_file()) else { return usual };
        match self.lock().failed.get(&identity) {
            Some(failed) if failed.elapsed() < AGAIN => usual / SHORTER,
            _ => usual,
        }
    }

    /// Notes that a wait for a layer's content was in vain.
    pub(super) fn waited_in_vain(&self, layer: &LazyLayer) {
        if let Ok(identity) = identity(layer.data_file()) {
            self.lock().failed.insert(identity, Instant::now());
        }
    }

    /// Notes that a layer's content can be had again.
    pub(super) fn waited_well(&self, layer: &LazyLayer) {
        let mut table = self.lock();
        if !table.failed.is_empty()
            && let Ok(identity) = identity(layer.data_file())
        {
            table.failed.remove(&identity);
        }
    }

    /// Logs why a range cannot be read: once a layer, since programs try again and again.
    pub(super) fn complain(&self, layer: &LazyLayer, range: DataRange, error: &EnsureError) {
        let Ok(identity) = identity(layer.data_file()) else { return };
        let mut table = self.lock();
        if table.complained.len() < MAX_COMPLAINTS && table.complained.insert(identity) {
            drop(table);
            tracing::error!(layer = %layer.digest(), offset = range.start.0, %error, "a read failed");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // Each change is complete before the lock is given up.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
