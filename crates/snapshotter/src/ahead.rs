//! Layers that snapshots are made of, kept open, and fetched ahead of anyone who reads them.
//!
//! The layers of one image are completed together, so that what a start needs is not held up (see
//! [`loris_lazy::complete_all`]). When a snapshot is removed, that ends at once for its layer, and where it was the last one,
//! what was fetched of it is removed.
//!
//! What this module must not know: snapshots beyond their numbers.

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use loris_lazy::{Completion, LazyLayer, Removed, Store};
use tokio::{runtime::Handle, task::AbortHandle};

/// How long the next layer of an image is waited for, before those that are known are completed: a container is made of them
/// meanwhile, for which the link is needed.
const GATHERING: Duration = Duration::from_secs(1);
/// Between attempts to remove a layer that somebody still uses.
const PAUSE: Duration = Duration::from_millis(500);
/// How often that is tried: for a minute. What is in use for longer is tried again with what was left at the start.
const ATTEMPTS: u32 = 120;

/// What is fetched ahead.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Whether what the writers of layers marked is fetched first.
    pub prefetch: bool,
    /// Whether, and how, the rest is fetched behind it.
    pub complete: Option<Completion>,
}

/// Layers that are open. Cheap to clone.
#[derive(Clone)]
pub struct Ahead {
    inner: Arc<Inner>,
}

struct Inner {
    settings: Mutex<Settings>,
    runtime: Handle,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// By the number of the snapshot.
    layers: HashMap<u64, Kept>,
    /// By image.
    groups: HashMap<String, AbortHandle>,
}

struct Kept {
    layer: Arc<LazyLayer>,
    image: String,
}

impl Ahead {
    /// Begins with nothing.
    #[must_use]
    pub fn new(settings: Settings, runtime: Handle) -> Self {
        Self { inner: Arc::new(Inner { settings: Mutex::new(settings), runtime, state: Mutex::default() }) }
    }

    fn settings(&self) -> Settings {
        *self.inner.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fetches otherwise from now on, what is being fetched too.
    pub fn change(&self, settings: Settings) {
        *self.inner.settings.lock().unwrap_or_else(PoisonError::into_inner) = settings;
        let mut state = self.state();
        let images: HashSet<String> = state.layers.values().map(|kept| kept.image.clone()).collect();
        for image in images {
            self.complete(&mut state, &image);
        }
    }

    /// Keeps the layer of a snapshot open, and begins to fetch it.
    pub fn begin(&self, image: &str, snapshot: u64, layer: &Arc<LazyLayer>) {
        let kept = Kept { layer: Arc::clone(layer), image: image.to_owned() };
        let mut state = self.state();
        if state.layers.insert(snapshot, kept).is_some() || layer.is_complete() {
            return;
        }
        if self.settings().prefetch {
            let layer = Arc::clone(layer);
            self.inner.runtime.spawn(async move {
                if let Err(error) = loris_lazy::prefetch(&[layer]).await {
                    tracing::debug!(%error, "prefetching ended early");
                }
            });
        }
        self.complete(&mut state, image);
    }

    /// Completes all layers of an image that are known by now.
    fn complete(&self, state: &mut State, image: &str) {
        if let Some(before) = state.groups.remove(image) {
            before.abort();
        }
        let Some(completion) = self.settings().complete else { return };
        // By their numbers, which is the order in which the client asked: the lowest first.
        let mut layers: Vec<(u64, Arc<LazyLayer>)> = state
            .layers
            .iter()
            .filter(|(_, kept)| kept.image == image && !kept.layer.is_complete())
            .map(|(number, kept)| (*number, Arc::clone(&kept.layer)))
            .collect();
        if layers.is_empty() {
            return;
        }
        layers.sort_by_key(|(number, _)| *number);
        let layers: Vec<Arc<LazyLayer>> = layers.into_iter().map(|(_, layer)| layer).collect();
        let name = image.to_owned();
        let task = self.inner.runtime.spawn(async move {
            tokio::time::sleep(GATHERING).await;
            match loris_lazy::complete_all(&layers, &completion).await {
                Ok(()) => tracing::info!(image = name, "all of its lazy layers are complete"),
                Err(error) => tracing::warn!(image = name, %error, "the image is not complete"),
            }
        });
        state.groups.insert(image.to_owned(), task.abort_handle());
    }

    /// Returns the layer of a snapshot, where it is open.
    #[must_use]
    pub fn layer(&self, snapshot: u64) -> Option<Arc<LazyLayer>> {
        Some(Arc::clone(&self.state().layers.get(&snapshot)?.layer))
    }

    /// Returns how much was fetched of all layers that are open.
    pub(crate) fn fetched_bytes(&self) -> u64 {
        let state = self.state();
        state.layers.values().map(|kept| kept.layer.statistics().fetched_bytes).fold(0, u64::wrapping_add)
    }

    /// Returns all layers that are open, by image.
    #[must_use]
    pub fn layers(&self) -> Vec<(String, Arc<LazyLayer>)> {
        let state = self.state();
        let mut layers: Vec<_> = state.layers.iter().collect();
        layers.sort_by_key(|(number, kept)| (&kept.image, **number));
        layers.into_iter().map(|(_, kept)| (kept.image.clone(), Arc::clone(&kept.layer))).collect()
    }

    /// A snapshot is gone: nothing is fetched for it any more. Returns its layer.
    pub fn end(&self, snapshot: u64) -> Option<Arc<LazyLayer>> {
        let mut state = self.state();
        let Kept { layer, image } = state.layers.remove(&snapshot)?;
        // It goes on for what is left of the image.
        self.complete(&mut state, &image);
        Some(layer)
    }

    /// Removes what was fetched of a layer, as soon as nobody uses it, and says so then.
    pub fn discard(&self, store: &Store, directory: PathBuf, done: impl FnOnce() + Send + 'static) {
        let store = store.clone();
        self.inner.runtime.spawn(async move {
            for _ in 0..ATTEMPTS {
                let (store, at) = (store.clone(), directory.clone());
                let removed = tokio::task::spawn_blocking(move || store.remove(&at)).await;
                match removed {
                    Ok(Ok(Removed::InUse)) => tokio::time::sleep(PAUSE).await,
                    Ok(Ok(removed)) => {
                        tracing::debug!(?removed, layer = %directory.display(), "the layer of a removed image");
                        let _ = tokio::task::spawn_blocking(done).await;
                        return;
                    }
                    Ok(Err(error)) => {
                        tracing::warn!(%error, layer = %directory.display(), "the layer of a removed image stays");
                        return;
                    }
                    Err(_) => return,
                }
            }
            tracing::info!(layer = %directory.display(), "the layer of a removed image is in use elsewhere, and stays for now");
        });
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
