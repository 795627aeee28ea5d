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
/// Between attempts at one image that fails: the first pause, which doubles, and the longest.
const FIRST_RETRY: Duration = Duration::from_secs(30);
const LONGEST_RETRY: Duration = Duration::from_hours(1);
/// So long attempts have one lease, which lasts twice as long.
const LEASED: Duration = Duration::from_hours(12);
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
            _ => {
                known.keep(|_| false).await;
                return Ok(true);
            }
        };
        let store = Store::connect(place).await?;
        let images = store.images().await?;
        known.keep(|name| images.iter().any(|image| image.name == name)).await;
        let named = named_by(&remote, images.iter().map(|image| image.name.as_str()));
        let origins = Origins::new(self.inner.snapshots.client()).knowing(&named);
        let mut is_done = true;
        for image in images {
            let target = image.target.as_ref().map(|target| target.digest.clone()).unwrap_or_default();
            let Ok(reference) = image.name.parse::<Reference>() else { continue };
            if known.whole.contains(&(image.name.clone(), target.clone())) {
                continue;
            }
            if !known.is_due(&image.name, &target) {
                is_done = false;
                continue;
            }
            let source = ContainerdSource::of(store.clone(), image.clone(), reference.clone(), origins.clone());
            let missing = match whole::missing(&source).await {
                Ok(missing) => missing,
                // The others have nothing to do with it.
                Err(error) => {
                    known.failed(&image.name, &target, &place.namespace, &error);
                    is_done = false;
                    continue;
                }
            };
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
            let (sink, before) = known.sink(&image.name, || ContainerdSink::new(store.clone(), reference));
            let completed = tokio::select! {
                completed = whole::complete(&source, &sink, &()) => completed,
                () = gone(&store, &image.name) => {
                    known.end(&image.name).await;
                    continue;
                }
            };
            // The new lease has what is there by now.
            if let Some(before) = before {
                before.end().await;
            }
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
                    // It has ended its lease.
                    known.forget(&image.name);
                    known.whole.insert((image.name, target));
                }
                Err(error) => {
                    known.failed(&image.name, &target, &place.namespace, &error);
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
    /// Images with which something is wrong, with what their names lead to.
    failing: HashMap<String, Failing>,
    /// What writes images that are not whole yet, and since when: all attempts at one have the same lease.
    sinks: HashMap<String, (Arc<ContainerdSink>, Instant)>,
}

/// An image that could not be made whole.
struct Failing {
    target: String,
    pause: Duration,
    next: Instant,
}

impl Known {
    /// Forgets images that have gone, and ends their leases.
    async fn keep(&mut self, is_there: impl Fn(&str) -> bool) {
        self.whole.retain(|(name, _)| is_there(name));
        self.waiting.retain(|name, _| is_there(name));
        self.failing.retain(|name, _| is_there(name));
        let gone: Vec<String> = self.sinks.keys().filter(|name| !is_there(name)).cloned().collect();
        for name in gone {
            self.end(&name).await;
        }
    }

    /// Whether an image may be tried: one that fails is tried ever more seldom, until its name leads elsewhere.
    fn is_due(&self, image: &str, target: &str) -> bool {
        self.failing.get(image).is_none_or(|failing| failing.target != target || Instant::now() >= failing.next)
    }

    fn failed(&mut self, image: &str, target: &str, namespace: &str, error: &Error) {
        let before = self.failing.get(image).filter(|failing| failing.target == target);
        let pause = before.map_or(FIRST_RETRY, |failing| (failing.pause * 2).min(LONGEST_RETRY));
        if before.is_none() {
            tracing::warn!(image, namespace, %error,
                "containerd has not got all layers of the image; tried again from time to time");
        }
        let failing = Failing { target: target.to_owned(), pause, next: Instant::now() + pause };
        self.failing.insert(image.to_owned(), failing);
    }

    /// Returns what writes an image, and what did so before, where its lease will expire.
    fn sink(
        &mut self,
        image: &str,
        begin: impl FnOnce() -> ContainerdSink,
    ) -> (Arc<ContainerdSink>, Option<Arc<ContainerdSink>>) {
        let before = match self.sinks.get(image) {
            Some((sink, since)) if since.elapsed() < LEASED => return (Arc::clone(sink), None),
            old => old.map(|(sink, _)| Arc::clone(sink)),
        };
        let sink = Arc::new(begin());
        self.sinks.insert(image.to_owned(), (Arc::clone(&sink), Instant::now()));
        (sink, before)
    }

    /// Ends the lease under which an image was written.
    async fn end(&mut self, image: &str) {
        if let Some((sink, _)) = self.sinks.remove(image) {
            sink.end().await;
        }
    }

    fn forget(&mut self, image: &str) {
        self.sinks.remove(image);
        self.failing.remove(image);
    }
}

/// Returns the references that are names of the images here. A layer's snapshot is the same in all namespaces: by which
/// name, and so with whose credentials, another namespace's client asked for it is not this one's to use.
fn named_by<'a>(
    references: &HashMap<Digest, String>,
    images: impl Iterator<Item = &'a str>,
) -> HashMap<Digest, String> {
    let canonical = |name: &str| Some(name.parse::<Reference>().ok()?.canonical());
    let names: HashSet<String> = images.filter_map(canonical).collect();
    let is_here = |name: &str| canonical(name).is_some_and(|name| names.contains(&name));
    let here = references.iter().filter(|(_, name)| is_here(name));
    here.map(|(layer, name)| (*layer, name.clone())).collect()
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_fails_is_tried_ever_more_seldom_until_the_name_leads_elsewhere() {
        let mut known = Known::default();
        assert!(known.is_due("a", "1"));
        let error = Error::NotFound { what: "a layer".to_owned(), place: "a registry".to_owned() };
        for expected in [FIRST_RETRY, FIRST_RETRY * 2, FIRST_RETRY * 4] {
            known.failed("a", "1", "moby", &error);
            assert_eq!(known.failing["a"].pause, expected);
        }
        assert!(!known.is_due("a", "1"));
        assert!(known.is_due("a", "2") && known.is_due("b", "1"));
        for _ in 0..20 {
            known.failed("a", "1", "moby", &error);
        }
        assert_eq!(known.failing["a"].pause, LONGEST_RETRY);
        known.failed("a", "2", "moby", &error);
        assert_eq!(known.failing["a"].pause, FIRST_RETRY);
    }

    #[tokio::test]
    async fn all_attempts_at_an_image_have_one_lease() {
        let directory = tempfile::tempdir().unwrap();
        let address = directory.path().join("containerd.sock");
        let _listener = std::os::unix::net::UnixListener::bind(&address).unwrap();
        let store = Store::connect(&Place { address, namespace: "moby".to_owned() }).await.unwrap();
        let begin = || ContainerdSink::new(store.clone(), "a".parse().unwrap());
        let mut known = Known::default();
        let (first, before) = known.sink("a", begin);
        assert!(before.is_none());
        assert!(Arc::ptr_eq(&first, &known.sink("a", begin).0));
        assert!(!Arc::ptr_eq(&first, &known.sink("b", begin).0));
        known.keep(|name| name == "b").await;
        assert_eq!(known.sinks.keys().collect::<Vec<_>>(), ["b"]);
    }

    #[test]
    fn references_of_other_namespaces_are_not_used() {
        let (own, foreign) = (Digest::sha256_of(b"1"), Digest::sha256_of(b"2"));
        let remote =
            [(own, "docker.io/library/app:1".to_owned()), (foreign, "r.example/private/app:1".to_owned())].into();
        let named = named_by(&remote, ["app:1", "docker.io/library/other:1"].into_iter());
        assert_eq!(named, [(own, "docker.io/library/app:1".to_owned())].into());
    }
}
