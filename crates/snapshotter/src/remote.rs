//! Images that clients pull: their layers, opened lazily, all at once when the first one is asked for.
//!
//! A layer that can't be opened in time, or not at all, is pulled by the client as usual; the reason is returned.
//!
//! What this module must not know: snapshots, mounts.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, Weak},
    time::{Duration, Instant},
};

use futures_util::{
    FutureExt as _,
    future::{BoxFuture, Shared},
};
use loris_format::{
    digest::{DiffId, Digest},
    estargz::toc::TOC_DIGEST_ANNOTATION,
    opening::Promise,
};
use loris_lazy::{
    LayerError, LazyLayer, OpenOptions, Store, beside::with_indexes, documents::Remembering, open::open_layer,
};
use loris_oci::{
    Descriptor, ImageSource, Reference,
    document::{ImageConfig, Manifest},
    platform::resolve_manifest,
    registry::Client,
};
use serde::{Deserialize, Serialize};

use crate::{labels::Asked, locked::lock};

/// How long what an image's name led to counts for further layers of it.
const RESOLVED: Duration = Duration::from_secs(120);
/// How long a layer that could not be opened is not tried again: its image's other layers would each wait as long.
const FAILED: Duration = Duration::from_secs(10);
/// Most images that are kept for that.
const MOST_RESOLVED: usize = 256;

/// A layer, as it is found again after a restart.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RemoteLayer {
    /// The image, as the client named it.
    pub reference: String,
    /// What its manifest says of the layer.
    pub descriptor: Descriptor,
    /// What its configuration says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diff_id: Option<DiffId>,
    /// How long it took to open it.
    #[serde(default)]
    pub opening: OpeningTimes,
    /// The image that it came from, as its source is named, where nothing vouches for its content: another one's may be other bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unvouched_from: Option<String>,
}

/// What the client waited for, in milliseconds since it asked for the first layer of the image.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct OpeningTimes {
    /// Until the manifest was here.
    pub manifest_ms: u64,
    /// Until the layer's table of contents was here, and read.
    pub layer_ms: u64,
}

/// Why a layer is not lazy.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fallback {
    /// For those who count.
    pub kind: FallbackKind,
    /// For those who read.
    pub reason: String,
}

/// Kinds of reasons.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum FallbackKind {
    /// The client does not say enough, or something else than the registry.
    Client,
    /// The layer is of no lazy format.
    NotLazy,
    /// No digest vouches for its content.
    Unvouched,
    /// It is damaged.
    Corrupt,
    /// The registry does not answer, or not rightly.
    Registry,
    /// It took too long.
    Timeout,
    /// The disk, or something else of this machine.
    Local,
}

impl FallbackKind {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Client, Self::NotLazy, Self::Unvouched, Self::Corrupt, Self::Registry, Self::Timeout, Self::Local];

    /// A word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::NotLazy => "not-lazy",
            Self::Unvouched => "unvouched",
            Self::Corrupt => "corrupt",
            Self::Registry => "registry",
            Self::Timeout => "timeout",
            Self::Local => "local",
        }
    }
}

impl Fallback {
    pub(crate) fn client(reason: String) -> Self {
        Self { kind: FallbackKind::Client, reason }
    }
}

impl From<LayerError> for Fallback {
    fn from(error: LayerError) -> Self {
        let kind = match &error {
            LayerError::NotLazy { .. } => FallbackKind::NotLazy,
            LayerError::Unvouched { .. } | LayerError::Undigested { .. } => FallbackKind::Unvouched,
            LayerError::Corrupt { .. } | LayerError::Condemned { .. } => FallbackKind::Corrupt,
            LayerError::Fetch { .. } => FallbackKind::Registry,
            _ => FallbackKind::Local,
        };
        Self { kind, reason: error.to_string() }
    }
}

impl RemoteLayer {
    /// Names the content: two layers with the same key are the same, whatever image they are of.
    #[must_use]
    pub fn key(&self) -> String {
        format!("{} {}", content_key(&self.descriptor), self.unvouched_from.as_deref().unwrap_or_default())
    }
}

/// Returns the digest that vouches for a layer's index, where the manifest has one.
fn identity(descriptor: &Descriptor) -> Option<Digest> {
    Promise::read(&descriptor.annotations).ok()?.identity()
}

/// Names a layer by its blob and its index.
fn content_key(descriptor: &Descriptor) -> String {
    let identity = identity(descriptor).map(|digest| digest.to_string()).unwrap_or_default();
    format!("{} {identity}", descriptor.digest)
}

/// How images are opened.
pub struct Settings {
    /// Asks registries.
    pub client: Client,
    /// Keeps what was fetched.
    pub store: Store,
    /// How layers are opened.
    pub open: OpenOptions,
    /// How long a client waits for a layer before it pulls it itself.
    pub patience: Duration,
    /// Whether what an image's command seems to need is fetched first, where nobody marked it.
    pub foresee: bool,
}

/// Images that clients pull.
pub struct Images {
    store: Store,
    settings: Mutex<Arc<Settings>>,
    resolved: Mutex<HashMap<ImageKey, Resolved>>,
    open: Mutex<HashMap<String, Weak<LazyLayer>>>,
}

type ImageKey = (String, Option<Digest>);
type Opening = Shared<BoxFuture<'static, Result<Arc<Image>, Fallback>>>;
/// The layer, and how long that took.
type LayerOpening = Shared<BoxFuture<'static, Result<(Arc<LazyLayer>, Duration), LayerError>>>;

struct Resolved {
    image: Opening,
    since: Instant,
    /// When one of its layers was first found to be out of reach.
    failed: Option<Instant>,
}

/// An image whose manifest is known and whose layers are being opened.
struct Image {
    /// How long it took to find the manifest.
    manifest: Duration,
    /// What its source is called, which names the directories of layers that nothing vouches for.
    source: String,
    layers: Vec<(Descriptor, LayerOpening)>,
    config: Shared<BoxFuture<'static, Option<Arc<ImageConfig>>>>,
}

impl Image {
    /// Returns the DiffID that the configuration, where it can be had, names for a layer.
    async fn diff_id(&self, layer: usize) -> Option<DiffId> {
        self.config.clone().await?.diff_ids.get(layer).copied()
    }
}

impl Images {
    /// Opens nothing yet.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        let store = settings.store.clone();
        let settings = Mutex::new(Arc::new(settings));
        Self { store, settings, resolved: Mutex::default(), open: Mutex::default() }
    }

    fn settings(&self) -> Arc<Settings> {
        Arc::clone(&lock(&self.settings))
    }

    /// Opens images otherwise from now on: those that are open stay as they are, and so does the store.
    pub fn change(&self, client: Client, open: OpenOptions, patience: Duration, foresee: Option<bool>) {
        let mut settings = lock(&self.settings);
        let foresee = foresee.unwrap_or(settings.foresee);
        *settings = Arc::new(Settings { client, store: self.store.clone(), open, patience, foresee });
        drop(settings);
        lock(&self.resolved).clear();
    }

    /// Returns what asks registries now.
    #[must_use]
    pub fn client(&self) -> Client {
        self.settings().client.clone()
    }

    /// Where content is kept.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Opens a layer that a client asks for, and all others of its image beside it.
    ///
    /// # Errors
    /// Why the client should pull it itself.
    pub async fn layer(self: &Arc<Self>, asked: &Asked) -> Result<(RemoteLayer, Arc<LazyLayer>), Fallback> {
        let patience = self.settings().patience;
        let waited_for = Mutex::new(None);
        match tokio::time::timeout(patience, self.find(asked, &waited_for)).await {
            Ok(found) => found,
            Err(_) => {
                self.failed(asked, &waited_for);
                let reason = format!("it could not be opened within {} s", patience.as_secs_f32());
                Err(Fallback { kind: FallbackKind::Timeout, reason })
            }
        }
    }

    /// Notes in `waited_for` which opening it waits for.
    async fn find(
        self: &Arc<Self>,
        asked: &Asked,
        waited_for: &Mutex<Option<Opening>>,
    ) -> Result<(RemoteLayer, Arc<LazyLayer>), Fallback> {
        // The name may lead elsewhere by now.
        let mut image = self.image(asked, false, waited_for).await?;
        let is_meant = |descriptor: &Descriptor| descriptor.digest == asked.layer;
        if !image.layers.iter().any(|(descriptor, _)| is_meant(descriptor)) {
            image = self.image(asked, true, waited_for).await?;
        }
        let Some(number) = image.layers.iter().position(|(descriptor, _)| is_meant(descriptor)) else {
            let reason = format!("the image that {} leads to has no such layer", asked.reference);
            return Err(Fallback::client(reason));
        };
        let (descriptor, opening) = &image.layers[number];
        if let Some(toc) = &asked.toc
            && descriptor.annotations.get(TOC_DIGEST_ANNOTATION) != Some(toc)
        {
            let reason = format!("the registry names another table of contents than the client's manifest, {toc}");
            return Err(Fallback::client(reason));
        }
        let opened = opening.clone().await;
        if let Err(LayerError::Fetch { .. }) = opened {
            self.failed(asked, waited_for);
        }
        let (layer, took) = opened?;
        // It was asked for beside the layers.
        let diff_id = image.diff_id(number).await;
        let milliseconds = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let opening =
            OpeningTimes { manifest_ms: milliseconds(image.manifest), layer_ms: milliseconds(image.manifest + took) };
        let (reference, descriptor) = (asked.reference.clone(), descriptor.clone());
        let unvouched_from = (!layer.is_vouched()).then(|| image.source.clone());
        Ok((RemoteLayer { reference, descriptor, diff_id, opening, unvouched_from }, layer))
    }

    /// Notes that a layer of an image is out of reach: what is asked for later is tried anew.
    fn failed(&self, asked: &Asked, waited_for: &Mutex<Option<Opening>>) {
        let Some(opening) = lock(waited_for).clone() else { return };
        // Somebody may have begun anew by now.
        if let Some(resolved) = lock(&self.resolved).get_mut(&(asked.reference.clone(), asked.manifest))
            && resolved.image.ptr_eq(&opening)
        {
            resolved.failed.get_or_insert_with(Instant::now);
        }
    }

    /// Opens a layer that was opened before, as after a restart: what is in the store is not asked for again.
    ///
    /// # Errors
    /// See [`LayerError`].
    pub async fn reopen(&self, remote: &RemoteLayer) -> Result<Arc<LazyLayer>, LayerError> {
        let layer = remote.descriptor.digest;
        let not_lazy = |error: loris_oci::Error| LayerError::NotLazy { layer, reason: error.to_string() };
        // A layer that nothing vouches for is where its source's name leads.
        let name = remote.unvouched_from.as_ref().unwrap_or(&remote.reference);
        let reference: Reference = name.parse().map_err(not_lazy)?;
        let source: Arc<dyn ImageSource> = Arc::new(self.settings().client.source(&reference));
        let patience = self.settings().patience;
        let opened = tokio::time::timeout(patience, self.opened(source, &remote.descriptor)).await;
        let layer = opened.unwrap_or_else(|_| {
            let reason = format!("it could not be opened within {} s", patience.as_secs_f32());
            Err(LayerError::NotLazy { layer, reason })
        })?;
        if let Some(diff_id) = remote.diff_id {
            layer.claim_diff_id(&diff_id);
        }
        Ok(layer)
    }

    /// A layer is not wanted any more: it is not kept open for other layers of its image.
    pub fn forget(&self, layer: &Digest) {
        // What has not answered yet is looked at the next time.
        let has = |resolved: &Resolved| match resolved.image.peek() {
            Some(Ok(image)) => image.layers.iter().any(|(descriptor, _)| descriptor.digest == *layer),
            _ => false,
        };
        lock(&self.resolved).retain(|_, resolved| !has(resolved));
    }

    /// Returns where the store keeps a layer that is not open.
    #[must_use]
    pub fn directory(&self, remote: &RemoteLayer) -> Option<PathBuf> {
        let identity = identity(&remote.descriptor)?;
        Some(self.store.layer_directory(&remote.descriptor.digest, &identity, remote.unvouched_from.as_deref()))
    }

    async fn image(
        self: &Arc<Self>,
        asked: &Asked,
        anew: bool,
        waited_for: &Mutex<Option<Opening>>,
    ) -> Result<Arc<Image>, Fallback> {
        let key = (asked.reference.clone(), asked.manifest);
        let opening = {
            let mut resolved = lock(&self.resolved);
            resolved.retain(|_, resolved| {
                resolved.since.elapsed() < RESOLVED && resolved.failed.is_none_or(|failed| failed.elapsed() < FAILED)
            });
            if anew || (resolved.len() >= MOST_RESOLVED && !resolved.contains_key(&key)) {
                resolved.remove(&key);
            }
            if resolved.len() >= MOST_RESOLVED {
                resolved.clear();
            }
            let begin = || Resolved { image: self.spawned(&key), since: Instant::now(), failed: None };
            resolved.entry(key.clone()).or_insert_with(begin).image.clone()
        };
        *lock(waited_for) = Some(opening.clone());
        let image = opening.clone().await;
        if image.is_err() {
            // The next one who asks may have more luck, and may have begun by now.
            let mut resolved = lock(&self.resolved);
            if resolved.get(&key).is_some_and(|resolved| resolved.image.ptr_eq(&opening)) {
                resolved.remove(&key);
            }
        }
        image
    }

    /// Finds an image whether anybody waits for it or not: what nobody polls would hold this, which holds it, for ever.
    fn spawned(self: &Arc<Self>, key: &ImageKey) -> Opening {
        let patience = self.settings().patience;
        let begun = Self::begin(Arc::clone(self), key.clone());
        let bounded = async move {
            let timeout = |_| Fallback {
                kind: FallbackKind::Timeout,
                reason: format!("its manifest could not be had within {} s", patience.as_secs_f32()),
            };
            tokio::time::timeout(patience, begun).await.unwrap_or_else(|elapsed| Err(timeout(elapsed)))
        };
        let opening = bounded.boxed().shared();
        tokio::spawn(opening.clone());
        opening
    }

    /// Finds the manifest and begins to open everything.
    async fn begin(self: Arc<Self>, (name, manifest): ImageKey) -> Result<Arc<Image>, Fallback> {
        let began = Instant::now();
        let not_named = |error: loris_oci::Error| Fallback::client(error.to_string());
        let mut reference: Reference = name.parse().map_err(not_named)?;
        if let Some(manifest) = manifest {
            reference = reference.with_digest(manifest);
        }
        let source = Arc::new(self.settings().client.source(&reference));
        let source: Arc<dyn ImageSource> = Arc::new(Remembering::new(source, &self.store));
        let limits = self.settings().open.limits.clone();
        let failed = |error: loris_oci::Error| Fallback { kind: FallbackKind::Registry, reason: error.to_string() };
        let (document, manifest) = resolve_manifest(&*source, None, &limits).await.map_err(failed)?;
        let manifest = with_indexes(&*source, manifest, &document.digest, &self.store, &self.settings().open).await;
        let found = began.elapsed();
        let config = Self::config(Arc::clone(&source), manifest.clone(), limits).boxed().shared();
        tokio::spawn(config.clone());
        let mut layers = Vec::new();
        for (number, descriptor) in manifest.layers.iter().enumerate() {
            let (images, source, descriptor) = (Arc::clone(&self), Arc::clone(&source), descriptor.clone());
            let (known, configured) = (descriptor.clone(), config.clone());
            let opening = async move {
                let began = Instant::now();
                images.opened(source, &known).await.map(|layer| (layer, began.elapsed()))
            };
            let opening = opening.boxed().shared();
            let claimed = opening.clone();
            tokio::spawn(async move {
                if let (Ok((layer, _)), Some(config)) = tokio::join!(claimed, configured)
                    && let Some(diff_id) = config.diff_ids.get(number)
                {
                    layer.claim_diff_id(diff_id);
                }
            });
            layers.push((descriptor, opening));
        }
        if self.settings().foresee {
            tokio::spawn(foresee(layers.iter().map(|(_, opening)| opening.clone()).collect(), config.clone()));
        }
        let images = Arc::downgrade(&self);
        tokio::spawn(async move {
            tokio::time::sleep(RESOLVED).await;
            if let Some(images) = images.upgrade() {
                lock(&images.resolved).retain(|_, resolved| resolved.since.elapsed() < RESOLVED);
            }
        });
        Ok(Arc::new(Image { manifest: found, source: source.name(), layers, config }))
    }

    async fn config(
        source: Arc<dyn ImageSource>,
        manifest: Manifest,
        limits: loris_format::limits::Limits,
    ) -> Option<Arc<ImageConfig>> {
        let config = async { source.document(&manifest.config).await?.image_config(&limits) };
        match config.await {
            Ok(config) if config.diff_ids.len() == manifest.layers.len() => Some(Arc::new(config)),
            Ok(_) => None,
            Err(error) => {
                tracing::debug!(%error, "layers are not proven against the configuration, which can't be had");
                None
            }
        }
    }

    /// Opens a layer, or returns it where it is open.
    async fn opened(
        &self,
        source: Arc<dyn ImageSource>,
        descriptor: &Descriptor,
    ) -> Result<Arc<LazyLayer>, LayerError> {
        let key = content_key(descriptor);
        if let Some(layer) = lock(&self.open).get(&key).and_then(Weak::upgrade) {
            return Ok(layer);
        }
        let layer = open_layer(source, descriptor, &self.store, &self.settings().open).await?;
        if !layer.is_vouched() {
            // Each source may serve something else.
            return Ok(layer);
        }
        let mut open = lock(&self.open);
        open.retain(|_, layer| layer.strong_count() > 0);
        // Somebody may have been faster: one layer has one index in memory.
        if let Some(layer) = open.get(&key).and_then(Weak::upgrade) {
            return Ok(layer);
        }
        open.insert(key, Arc::downgrade(&layer));
        Ok(layer)
    }
}

/// Fetches what the image's command seems to need, where all its layers are lazy.
async fn foresee(layers: Vec<LayerOpening>, config: Shared<BoxFuture<'static, Option<Arc<ImageConfig>>>>) {
    let (layers, config) = tokio::join!(futures_util::future::join_all(layers), config);
    let layers: Result<Vec<_>, _> = layers.into_iter().map(|opened| opened.map(|(layer, _)| layer)).collect();
    if let (Ok(layers), Some(config)) = (layers, config) {
        loris_lazy::foresee(layers, (&config.config).into()).await;
    }
}
