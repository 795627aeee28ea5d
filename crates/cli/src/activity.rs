//! What the processes that serve mounts do at the moment, for `loris status`.
//!
//! Each writes what it does into the store, once a second:
//!
//! | file | content |
//! |---|---|
//! | `activity/PID.lock` | nothing; locked (`flock`) for as long as the process lives |
//! | `activity/PID.json` | [`Activity`], version 1, or a list of them, one for each image; replaced as a whole |
//!
//! What a dead process has left is removed by whoever comes across it.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{File, TryLockError},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use loris_lazy::{LayerStatistics, LazyLayer, Store, Verdict};
use serde::{Deserialize, Serialize};

/// How often it is written.
const INTERVAL: Duration = Duration::from_secs(1);
const VERSION: u32 = 1;
/// Most bytes that are read of one process: 10,000 layers need 4 MiB.
const MOST_BYTES: u64 = 16 << 20;

/// What a process does.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Activity {
    version: u32,
    pub process: u32,
    /// `mount`, `run` or `warm`.
    pub verb: String,
    pub image: String,
    /// Where it is mounted, if anywhere that has a name.
    pub directory: Option<PathBuf>,
    pub layers: Vec<LayerActivity>,
}

/// What happens to a layer. Bytes are compressed ones, since the process began.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct LayerActivity {
    pub digest: String,
    pub size: u64,
    pub extents_filled: u64,
    pub extents_total: u64,
    pub complete: bool,
    pub verdict: Option<String>,
    pub fetched_bytes: u64,
    pub demand_bytes: u64,
    pub prefetch_bytes: u64,
    pub read_ahead_bytes: u64,
    pub completion_bytes: u64,
    /// Since the last second.
    pub bytes_per_second: u64,
    pub requests: u64,
    /// Reads that had to wait.
    pub waits: u64,
    pub waited_seconds: f64,
    pub errors: u64,
}

impl LayerActivity {
    fn of(layer: &LazyLayer, before: Option<&Self>) -> Self {
        let LayerStatistics {
            fetched_bytes,
            requests,
            extents_filled,
            extents_total,
            demand_bytes,
            prefetch_bytes,
            read_ahead_bytes,
            completion_bytes,
            waits,
            waited,
            errors,
            ..
        } = layer.statistics();
        Self {
            digest: layer.digest().to_string(),
            size: layer.descriptor().size,
            extents_filled,
            extents_total,
            complete: layer.is_complete(),
            verdict: layer.verdict().as_ref().map(Verdict::to_string),
            fetched_bytes,
            demand_bytes,
            prefetch_bytes,
            read_ahead_bytes,
            completion_bytes,
            bytes_per_second: fetched_bytes.saturating_sub(before.map_or(fetched_bytes, |before| before.fetched_bytes)),
            requests,
            waits,
            waited_seconds: waited.as_secs_f64(),
            errors,
        }
    }
}

fn folder(store: &Store) -> PathBuf {
    store.root().join("activity")
}

/// Tells what this process does with an image, from now on until it ends. Where that can't be written nobody hears of it.
pub(crate) fn tell(store: &Store, verb: &str, image: &str, directory: Option<&Path>, layers: &[Arc<LazyLayer>]) {
    let folder = folder(store);
    let process = std::process::id();
    let mut activity = Activity {
        version: VERSION,
        process,
        verb: verb.to_owned(),
        image: image.to_owned(),
        directory: directory.map(|directory| std::path::absolute(directory).unwrap_or_else(|_| directory.to_owned())),
        layers: layers.iter().map(|layer| LayerActivity::of(layer, None)).collect(),
    };
    let layers = layers.to_vec();
    tokio::spawn(async move {
        let lock = match lock(&folder, process) {
            Ok(lock) => lock,
            Err(error) => {
                return tracing::debug!(%error, folder = %folder.display(), "`loris status` will not show this");
            }
        };
        let path = folder.join(format!("{process}.json"));
        let _left = Left { path: path.clone(), lock };
        loop {
            activity.layers = layers
                .iter()
                .zip(&activity.layers)
                .map(|(layer, before)| LayerActivity::of(layer, Some(before)))
                .collect();
            if let Err(error) = write(&path, &activity) {
                tracing::debug!(%error, path = %path.display(), "`loris status` will show old figures");
            }
            tokio::time::sleep(INTERVAL).await;
        }
    });
}

/// Tells what this process does with images that come and go: `layers` returns those that are open, by image.
pub(crate) fn tell_of(
    store: Store,
    verb: &'static str,
    layers: impl Fn() -> Vec<(String, Arc<LazyLayer>)> + Send + 'static,
) {
    let process = std::process::id();
    tokio::spawn(async move {
        let folder = folder(&store);
        let lock = match lock(&folder, process) {
            Ok(lock) => lock,
            Err(error) => {
                return tracing::debug!(%error, folder = %folder.display(), "`loris status` will not show this");
            }
        };
        let path = folder.join(format!("{process}.json"));
        let _left = Left { path: path.clone(), lock };
        let mut before: HashMap<(String, String), LayerActivity> = HashMap::new();
        loop {
            let mut activities: BTreeMap<String, Activity> = BTreeMap::new();
            for (image, layer) in layers() {
                let key = (image.clone(), layer.digest().to_string());
                let now = LayerActivity::of(&layer, before.get(&key));
                before.insert(key, now.clone());
                let directory = None;
                let new = || Activity {
                    version: VERSION,
                    process,
                    verb: verb.to_owned(),
                    image: image.clone(),
                    directory,
                    layers: Vec::new(),
                };
                activities.entry(image.clone()).or_insert_with(new).layers.push(now);
            }
            before.retain(|(image, _), _| activities.contains_key(image));
            if let Err(error) = write(&path, &activities.into_values().collect::<Vec<_>>()) {
                tracing::debug!(%error, path = %path.display(), "`loris status` will show old figures");
            }
            tokio::time::sleep(INTERVAL).await;
        }
    });
}

/// Removes the files when the process ends in good order.
struct Left {
    path: PathBuf,
    lock: File,
}

impl Drop for Left {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
        let _ = std::fs::remove_file(self.path.with_extension("lock"));
        let _ = self.lock.unlock();
    }
}

fn lock(folder: &Path, process: u32) -> io::Result<File> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let path = folder.join(format!("{process}.lock"));
    let lock = File::options().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    lock.try_lock()?;
    Ok(lock)
}

fn write(path: &Path, activity: &impl Serialize) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let mut file = tempfile::Builder::new().prefix(".unfinished-").tempfile_in(folder)?;
    file.write_all(&serde_json::to_vec(activity)?)?;
    file.persist(path).map(drop).map_err(|error| error.error)
}

/// Returns what all processes do that use the store, by their numbers.
pub(crate) fn all(store: &Store) -> io::Result<Vec<Activity>> {
    let folder = folder(store);
    let entries = match std::fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut activities = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "lock") {
            continue;
        }
        let json = path.with_extension("json");
        let Ok(lock) = File::open(&path) else { continue };
        match lock.try_lock() {
            // Its process is gone.
            Ok(()) => {
                let _ = std::fs::remove_file(&json);
                let _ = std::fs::remove_file(&path);
            }
            Err(TryLockError::WouldBlock) => activities.extend(read(&json)),
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
    activities.sort_by_key(|activity| activity.process);
    Ok(activities)
}

/// Returns nothing where a process has just begun, or is of another version.
fn read(path: &Path) -> Vec<Activity> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Told {
        Of(Box<Activity>),
        OfMany(Vec<Activity>),
    }
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MOST_BYTES).read_to_end(&mut bytes));
    let told = read.ok().and_then(|_| serde_json::from_slice(&bytes).ok());
    let mut activities = match told {
        Some(Told::Of(activity)) => vec![*activity],
        Some(Told::OfMany(activities)) => activities,
        None => Vec::new(),
    };
    activities.retain(|activity| activity.version == VERSION);
    activities
}
