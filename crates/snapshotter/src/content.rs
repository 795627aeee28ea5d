//! containerd's store, completed behind lazy pulls, in the namespaces whose clients expect to find layers there.
//!
//! containerd asks its snapshotter for nothing when somebody exports, pushes or builds on an image: it looks for the layers in
//! its store and fails. So they must be there before. In each of the namespaces one task looks, for some time after a
//! layer was prepared lazily or a snapshot committed, for images with layers of ours that are missing, and fetches them:
//! one after the other, and where layers are completed here, after that.
//!
//! What this module must not know: how snapshots are made, how containerd is asked.

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use loris_format::digest::Digest;
use loris_oci::{Descriptor, Error, Reference};
use tokio::sync::Notify;

use crate::{
    Snapshots,
    containerd::{ContainerdSink, ContainerdSource, Origins, Place, Store, whole},
};

/// Between looks, at first.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Between looks, in the end.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// So long after something has changed, an image may still appear that it belongs to.
const SETTLING: Duration = Duration::from_mins(2);
/// So long the layers of an image may take to be completed here, before they are fetched for containerd.
const COMPLETING: Duration = Duration::from_mins(10);
/// Between looks whether an image is still there whose layers are being fetched.
const LOOK: Duration = Duration::from_secs(2);

/// Which namespaces, of which containerd.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Settings {
    /// containerd's socket.
    pub address: PathBuf,
    /// The namespaces whose images are made whole.
    pub complete_namespaces: Vec<String>,
}

impl Default for Settings {
    /// Docker's: its users push, save and build on what they have pulled, and it has no command that fetches what is
    /// missing. Elsewhere nobody does that (Kubernetes), the client fetches it (nerdctl), or `loris copy` can be asked.
    fn default() -> Self {
        Self { address: crate::containerd::ADDRESS.into(), complete_namespaces: vec!["moby".to_owned()] }
    }
}

/// Completes images. Cheap to clone.
#[derive(Clone)]
pub struct Content {
    inner: Arc<Inner>,
}

struct Inner {
    settings: Settings,
    snapshots: Snapshots,
    /// Whether layers are completed here anyway.
    completes: AtomicBool,
    changed: HashMap<String, Notify>,
}

impl Content {
    /// Does nothing yet.
    #[must_use]
    pub fn new(settings: Settings, snapshots: Snapshots, completes: bool) -> Self {
        let changed = settings.complete_namespaces.iter().map(|name| (name.clone(), Notify::new())).collect();
        let completes = AtomicBool::new(completes);
        Self { inner: Arc::new(Inner { settings, snapshots, completes, changed }) }
    }

    /// Whether layers are completed here anyway, from now on.
    pub(crate) fn change(&self, completes: bool) {
        self.inner.completes.store(completes, Ordering::Relaxed);
    }

    /// Takes note that a snapshot was made: its namespace is the first part of its name.
    pub(crate) fn changed(&self, snapshot: &str) {
        let namespace = snapshot.split_once('/').map_or("", |(namespace, _)| namespace);
        if let Some(changed) = self.inner.changed.get(namespace) {
            changed.notify_one();
        }
    }

    /// Completes images for as long as it is polled, and begins with what an earlier process has left undone.
    pub(crate) async fn run(&self) {
        let namespaces = self.inner.changed.iter();
        futures_util::future::join_all(namespaces.map(|(name, changed)| self.watch(name, changed))).await;
        // With none there is nothing to do, ever.
        std::future::pending::<()>().await;
    }

    async fn watch(&self, namespace: &str, changed: &Notify) {
        let place = Place { address: self.inner.settings.address.clone(), namespace: namespace.to_owned() };
        let mut known = Known::default();
        let (mut settled, mut pause) = (Instant::now(), FIRST_PAUSE);
        loop {
            let is_done = match self.look(&place, &mut known).await {
                Ok(is_done) => is_done,
                Err(error) => {
                    tracing::debug!(namespace, %error, "containerd's store can't be looked at");
                    false
                }
            };
            if is_done && Instant::now() >= settled {
                changed.notified().await;
                (settled, pause) = (Instant::now() + SETTLING, FIRST_PAUSE);
            } else if tokio::time::timeout(pause, changed.notified()).await.is_ok() {
                (settled, pause) = (Instant::now() + SETTLING, FIRST_PAUSE);
            } else {
                pause = (pause * 2).min(LONGEST_PAUSE);
                continue;
            }
            // What comes next comes soon.
            tokio::time::sleep(FIRST_PAUSE).await;
        }
    }

    /// Completes what can be completed. Says whether nothing is left to do.
    async fn look(&self, place: &Place, known: &mut Known) -> Result<bool, Error> {
        let remote = match self.inner.snapshots.remote_layers().await {
            Ok(remote) if !remote.is_empty() => remote,
            // Nothing here is lazy.
            _ => return Ok(true),
        };
        let store = Store::connect(place).await?;
        let images = store.images().await?;
        known.keep(|name| images.iter().any(|image| image.name == name));
        let origins = Origins::new(self.inner.snapshots.client()).knowing(&remote);
        let mut is_done = true;
        for image in images {
            let target = image.target.as_ref().map(|target| target.digest.clone()).unwrap_or_default();
            let Ok(reference) = image.name.parse::<Reference>() else { continue };
            if known.whole.contains(&(image.name.clone(), target.clone())) {
                continue;
            }
            let source = ContainerdSource::of(store.clone(), image.clone(), reference.clone(), origins.clone());
            let missing = whole::missing(&source).await?;
            if !missing.iter().any(|layer| remote.contains_key(&layer.digest)) {
                // What is missing else is somebody's who is just pulling it.
                if missing.is_empty() {
                    known.whole.insert((image.name, target));
                }
                continue;
            }
            if self.waits_for(&missing, &image.name, known) {
                is_done = false;
                continue;
            }
            let sink = ContainerdSink::new(store.clone(), reference);
            let completed = tokio::select! {
                completed = whole::complete(&source, &sink, &()) => completed,
                () = gone(&store, &image.name) => {
                    sink.end().await;
                    continue;
                }
            };
            match completed {
                Ok(completed) => {
                    let (layers, bytes) = (completed.fetched.len(), completed.fetched_bytes);
                    tracing::info!(
                        image = image.name,
                        namespace = place.namespace,
                        layers,
                        bytes,
                        "containerd has all layers of the image"
                    );
                    known.whole.insert((image.name, target));
                }
                Err(error) => {
                    if known.told.insert(image.name.clone()) {
                        tracing::warn!(image = image.name, namespace = place.namespace, %error,
                            "containerd has not got all layers of the image; tried again from time to time");
                    }
                    is_done = false;
                }
            }
        }
        Ok(is_done)
    }

    /// Whether some of the layers are just being completed here: two would share the link.
    fn waits_for(&self, missing: &[Descriptor], image: &str, known: &mut Known) -> bool {
        if !self.inner.completes.load(Ordering::Relaxed) {
            return false;
        }
        let is_missing = |digest: &Digest| missing.iter().any(|layer| layer.digest == *digest);
        let layers = self.inner.snapshots.layers();
        let completes = layers.iter().any(|(_, layer)| is_missing(layer.digest()) && !layer.is_complete());
        let since = known.waiting.entry(image.to_owned()).or_insert_with(Instant::now);
        completes && since.elapsed() < COMPLETING
    }
}

/// What was found in a namespace.
#[derive(Default)]
struct Known {
    /// Images, with what their names lead to, that are not looked at again.
    whole: HashSet<(String, String)>,
    /// Images whose layers are being completed here, and since when.
    waiting: HashMap<String, Instant>,
    /// Images of which it was said that something is wrong.
    told: HashSet<String>,
}

impl Known {
    fn keep(&mut self, is_there: impl Fn(&str) -> bool) {
        self.whole.retain(|(name, _)| is_there(name));
        self.waiting.retain(|name, _| is_there(name));
        self.told.retain(|name| is_there(name));
    }
}

/// Returns when an image has gone.
async fn gone(store: &Store, name: &str) {
    loop {
        tokio::time::sleep(LOOK).await;
        if let Ok(None) = store.image(name).await {
            return;
        }
    }
}
