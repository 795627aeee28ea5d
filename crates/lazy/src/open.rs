//! From a manifest to lazy layers: all of an image's at once, each in one request in the common case and in none where
//! it was opened before.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, OnceLock},
};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use loris_format::{
    digest::{DiffId, Digest},
    estargz::{
        footer::{self, DETECT_BYTES, FooterError, Kind},
        toc::TOC_DIGEST_ANNOTATION,
    },
    index::{
        LayerIndex,
        builder::{IndexError, Problem},
    },
    limits::Limits,
    opening::{self, BESIDE_ANNOTATION, Opened, Opening, Promise, Step},
    position::{BlobOffset, BlobRange},
};
use loris_oci::{
    Descriptor, ImageSource,
    document::{ImageConfig, Manifest},
};

use crate::{
    beside::IndexTrust,
    cache::Tail,
    error::{LayerError, OpenError, StoreError},
    kept,
    layer::{Counters, LazyLayer},
    plan::FetchPolicy,
    proof::{Finding, Verdict},
    schedule::{Claim, Turn, Urgency},
    store::Store,
    windows::Windows,
};

/// How often the end of a blob is held in memory while its table of contents is read: as it came, to be kept, and in one
/// piece.
const COPIES: u64 = 3;

/// Layers of so many bytes get no index where nobody wishes otherwise.
const SMALL_LAYER_BYTES: u64 = loris_format::soci::MIN_LAYER_BYTES;

/// What must vouch for a layer's content.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Trust {
    /// The manifest vouches for the table of contents, and that for every byte. What no digest reaches is refused.
    #[default]
    Vouched,
    /// Layers without that chain are opened too: whoever serves the blob can serve anything. What digests there are is
    /// checked all the same.
    Anything,
}

/// How an image is opened.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// What must vouch for the content.
    pub trust: Trust,
    /// Whose word counts for an index beside a layer.
    pub index_trust: IndexTrust,
    /// Layers that nothing makes lazily readable are fetched whole and indexed, once, where they have at most so many
    /// bytes. Where an image has indexes beside its layers, small ones are in any case: nobody makes an index of them.
    pub plain_bytes: u64,
    /// How what is read becomes requests.
    pub policy: FetchPolicy,
    /// Bounds on what the image may ask of us.
    pub limits: Limits,
    /// Layers that are opened at the same time. The source has its own bound for each host.
    pub side_by_side: usize,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            trust: Trust::default(),
            index_trust: IndexTrust::default(),
            plain_bytes: 0,
            policy: FetchPolicy::default(),
            limits: Limits::default(),
            side_by_side: 16,
        }
    }
}

/// An image whose layers were all looked at.
#[derive(Debug)]
pub struct OpenedImage {
    /// The layers, the lowest first, as many as the manifest has.
    pub layers: Vec<OpenedLayer>,
    /// The manifest.
    pub manifest: Manifest,
    /// The configuration.
    pub config: ImageConfig,
}

/// A layer that was looked at.
#[derive(Debug)]
pub struct OpenedLayer {
    /// What the manifest says of it.
    pub descriptor: Descriptor,
    /// The layer, or why it can't be read lazily. A layer that the image has twice is there twice, as one.
    pub layer: Result<Arc<LazyLayer>, LayerError>,
}

/// An image all of whose layers are lazy.
#[derive(Debug)]
pub struct LazyImage {
    /// The layers, the lowest first.
    pub layers: Vec<Arc<LazyLayer>>,
    /// The manifest.
    pub manifest: Manifest,
    /// The configuration.
    pub config: ImageConfig,
}

impl OpenedImage {
    /// Returns the image where all its layers are lazy.
    ///
    /// # Errors
    /// The first layer's that is not.
    pub fn into_lazy(self) -> Result<LazyImage, LayerError> {
        let layers = self.layers.into_iter().map(|opened| opened.layer).collect::<Result<_, _>>()?;
        Ok(LazyImage { layers, manifest: self.manifest, config: self.config })
    }
}

/// Opens an image: its configuration and all its layers side by side.
///
/// # Errors
/// Where the configuration can't be had or does not fit the manifest. A layer that can't be opened is no error here, see
/// [`OpenedLayer`].
///
/// # Panics
/// Where it is polled outside of a Tokio runtime.
pub async fn open_image(
    source: Arc<dyn ImageSource>,
    manifest: &Manifest,
    store: &Store,
    options: &OpenOptions,
) -> Result<OpenedImage, OpenError> {
    let (config, layers) =
        tokio::join!(open_config(&*source, manifest, options), open_layers(&source, manifest, store, options));
    let config = config?;
    claim(&layers, &config.diff_ids);
    Ok(OpenedImage { layers, manifest: manifest.clone(), config })
}

fn claim(layers: &[OpenedLayer], diff_ids: &[DiffId]) {
    for (opened, diff_id) in layers.iter().zip(diff_ids) {
        if let Ok(layer) = &opened.layer {
            layer.claim_diff_id(diff_id);
            // Where something else was found at another time.
            layer.prove_when_whole();
        }
    }
}

async fn open_config(
    source: &dyn ImageSource,
    manifest: &Manifest,
    options: &OpenOptions,
) -> Result<ImageConfig, OpenError> {
    let digest = manifest.config.digest;
    let failed = |source| OpenError::Document { document: digest, source };
    let config = source.document(&manifest.config).await.map_err(failed)?;
    let config = config.image_config(&options.limits).map_err(failed)?;
    if config.diff_ids.len() != manifest.layers.len() {
        let detail = format!("it lists {} layers, its manifest {}", config.diff_ids.len(), manifest.layers.len());
        return Err(OpenError::NotAnImage { document: digest, detail });
    }
    Ok(config)
}

async fn open_layers(
    source: &Arc<dyn ImageSource>,
    manifest: &Manifest,
    store: &Store,
    options: &OpenOptions,
) -> Vec<OpenedLayer> {
    // The same layer twice is opened once.
    let key = |descriptor: &Descriptor| (descriptor.digest, descriptor.size, descriptor.annotations.clone());
    let mut distinct: HashMap<_, usize> = HashMap::new();
    let mut descriptors = Vec::new();
    for descriptor in &manifest.layers {
        distinct.entry(key(descriptor)).or_insert_with(|| {
            descriptors.push(descriptor.clone());
            descriptors.len() - 1
        });
    }
    let has_index = descriptors.iter().any(|descriptor| descriptor.annotations.contains_key(BESIDE_ANNOTATION));
    let least = if has_index { SMALL_LAYER_BYTES } else { 0 };
    let options = &OpenOptions { plain_bytes: options.plain_bytes.max(least), ..options.clone() };
    let opened: Vec<Result<Arc<LazyLayer>, LayerError>> = stream::iter(&descriptors)
        .map(|descriptor| open_layer(Arc::clone(source), descriptor, store, options))
        .buffered(options.side_by_side.max(1))
        .collect()
        .await;
    let of = |descriptor: &Descriptor| OpenedLayer {
        descriptor: descriptor.clone(),
        layer: opened[distinct[&key(descriptor)]].clone(),
    };
    manifest.layers.iter().map(of).collect()
}

/// Opens the layers of an image whose configuration is not needed, side by side. Where all of them are in the store, with
/// their tables of contents, the source is not asked for anything. `claimed` are the DiffIDs that the configuration is known
/// to have for them, if it is: the lowest layer's first.
///
/// # Errors
/// The first layer's that can't be opened lazily.
///
/// # Panics
/// Where it is polled outside of a Tokio runtime.
pub async fn open_all_layers(
    source: Arc<dyn ImageSource>,
    manifest: &Manifest,
    store: &Store,
    options: &OpenOptions,
    claimed: &[DiffId],
) -> Result<Vec<Arc<LazyLayer>>, LayerError> {
    let layers = open_layers(&source, manifest, store, options).await;
    claim(&layers, claimed);
    layers.into_iter().map(|opened| opened.layer).collect()
}

/// Opens one layer.
///
/// # Errors
/// Where it is of no lazy format, nothing vouches for it (and something must), it is corrupt, or the source or the store
/// fails.
///
/// # Panics
/// Where it is polled outside of a Tokio runtime.
pub async fn open_layer(
    source: Arc<dyn ImageSource>,
    descriptor: &Descriptor,
    store: &Store,
    options: &OpenOptions,
) -> Result<Arc<LazyLayer>, LayerError> {
    let opening = LayerOpening {
        source,
        descriptor: descriptor.clone(),
        store: store.clone(),
        options: options.clone(),
        counters: Counters::default(),
    };
    opening.open().await
}

/// A layer that is being opened.
pub(crate) struct LayerOpening {
    pub(crate) source: Arc<dyn ImageSource>,
    pub(crate) descriptor: Descriptor,
    pub(crate) store: Store,
    pub(crate) options: OpenOptions,
    pub(crate) counters: Counters,
}

/// A layer whose table of contents was read.
pub(crate) struct Indexed {
    pub(crate) index: LayerIndex,
    pub(crate) opened: Opened,
    /// What the manifest says of it.
    pub(crate) promise: Promise,
    /// The end of the blob that it was read from.
    pub(crate) tail: Tail,
    /// Whether the tail came from the network.
    pub(crate) fresh: bool,
    /// Where its frames are spans.
    pub(crate) windows: Option<Windows>,
}

/// The first step, out of the two that may be needed.
enum Start {
    /// Everything was in the store.
    Opened(Box<Indexed>),
    /// This has to be fetched.
    Fetch(Box<Opening>, BlobRange),
}

impl LayerOpening {
    async fn open(self) -> Result<Arc<LazyLayer>, LayerError> {
        let promise = Promise::read(&self.descriptor.annotations).map_err(|error| self.refused(error.into()))?;
        if let Some(beside) = promise.index_beside() {
            return self.open_beside(promise, beside).await;
        }
        if promise.is_empty() && self.descriptor.size <= self.options.plain_bytes {
            return self.open_plain().await;
        }
        if promise.is_empty() && self.options.trust == Trust::Vouched {
            return Err(self.without_promise().await?);
        }
        let indexed = self.index(promise).await?;
        self.finish(indexed).await
    }

    /// Says what is wrong with a layer that nothing vouches for: mostly, that it is an ordinary layer.
    async fn without_promise(&self) -> Result<LayerError, LayerError> {
        let layer = self.descriptor.digest;
        let size = self.descriptor.size;
        let length = size.min(DETECT_BYTES as u64);
        if length == 0 {
            return Ok(LayerError::NotLazy { layer, reason: "it is empty".to_owned() });
        }
        let range = BlobRange { start: BlobOffset(size - length), length };
        let _turn = self.turn(range).await;
        let tail = self.fetch(range).await?;
        Ok(match footer::detect(&tail, size) {
            Some(Kind::ExternalToc | Kind::Soci) => not_supported(layer, Kind::ExternalToc),
            Some(Kind::ZstdChunkedContainers) => {
                LayerError::Unvouched { layer, annotation: "io.github.containers.zstd-chunked.manifest-checksum" }
            }
            Some(Kind::Estargz | Kind::LegacyStargz | Kind::ZstdChunkedStargz) => {
                LayerError::Unvouched { layer, annotation: TOC_DIGEST_ANNOTATION }
            }
            None => LayerError::NotLazy { layer, reason: FooterError::NoFooter.to_string() },
        })
    }

    /// Reads the table of contents: from the store, else from the source.
    async fn index(&self, promise: Promise) -> Result<Indexed, LayerError> {
        let mut again = false;
        loop {
            let mut tail = Tail::default();
            let (mut opening, mut range) = match self.start(&promise).await? {
                Start::Opened(indexed) => return Ok(*indexed),
                Start::Fetch(opening, range) => (*opening, range),
            };
            let refused = loop {
                // Never two at once: who holds one and waits for another might wait for ever.
                let mut turn = self.turn(range).await;
                let bytes = self.fetch(range).await?;
                turn.landed();
                tail.extend_down(range, &bytes);
                match self.compute(move || opening.supply(&bytes)).await? {
                    Ok(Step::Read(next, next_range)) => (opening, range) = (next, next_range),
                    Ok(Step::Done(index, opened)) => {
                        return Ok(Indexed { index, opened, promise, tail, fresh: true, windows: None });
                    }
                    Err(error) => break self.refused(error),
                }
            };
            // Somebody else may have the right bytes.
            let seen = range.start.0..self.descriptor.size;
            if std::mem::replace(&mut again, true) || !self.source.distrust_range(&self.descriptor, seen) {
                return Err(refused);
            }
        }
    }

    /// Opens the layer from what the store has of its blob's end; where it has nothing of use, says what to fetch.
    async fn start(&self, promise: &Promise) -> Result<Start, LayerError> {
        let trust = match self.options.trust {
            Trust::Vouched => opening::Trust::Required,
            Trust::Anything => opening::Trust::Optional,
        };
        let (size, limits) = (self.descriptor.size, self.options.limits.clone());
        let begun = Opening::new(size, promise.clone(), trust, &limits);
        let (opening, range) = begun.map_err(|error| self.refused(error))?;
        // Without a promise nothing says which of the tables that the blob's name was seen with is meant.
        let Some(identity) = promise.identity() else { return Ok(Start::Fetch(Box::new(opening), range)) };
        let directory = self.store.directory(&self.descriptor.digest, &identity, None);
        let promise = promise.clone();
        let replay = move || {
            let (index, opened, tail) = kept::replay(&directory, size, promise.clone(), trust, &limits)?;
            Some(Indexed { index, opened, promise, tail, fresh: false, windows: None })
        };
        Ok(match self.compute(replay).await? {
            Some(indexed) => Start::Opened(Box::new(indexed)),
            None => Start::Fetch(Box::new(opening), range),
        })
    }

    /// Opens the local files.
    pub(crate) async fn finish(self, indexed: Indexed) -> Result<Arc<LazyLayer>, LayerError> {
        let layer = self.descriptor.digest;
        let Indexed { index, opened, promise, tail, fresh, windows } = indexed;
        let vouched = opened.vouched && index.is_digested();
        // What is beside the layer was let in by who vouches for it.
        if !vouched && self.options.trust == Trust::Vouched && windows.is_none() {
            // The machine has refused it before it came here.
            return Err(LayerError::Unvouched { layer, annotation: TOC_DIGEST_ANNOTATION });
        }
        let (name, size) = (self.source.name(), self.descriptor.size);
        let unverified_from = (!vouched).then_some(name.as_str());
        let directory = self.store.directory(&layer, &opened.identity, unverified_from);
        let store = self.store.clone();
        let work = move || -> Result<_, StoreError> {
            if fresh && vouched && !index.has_spans() {
                let _room = store.room(tail.saved_bytes())?;
                // Whoever finds the tail takes the promise to be there.
                kept::save_promise(&directory, size, &promise)?;
                tail.save(&directory)?;
            }
            let cache = store.layer(&directory, &layer, &index)?;
            store.note_origin(&directory, &name);
            let shared = cache.shared(index);
            Ok((cache, shared))
        };
        let (cache, shared) = tokio::task::spawn_blocking(work)
            .await
            .map_err(|_| LayerError::Interrupted { layer })?
            .map_err(|source| LayerError::Store { layer, source: Arc::new(source) })?;
        if let Some(Finding { verdict: Verdict::Condemned(reason), .. }) = shared.finding() {
            return Err(LayerError::Condemned { layer, reason });
        }
        Ok(Arc::new(LazyLayer {
            digest: layer,
            descriptor: self.descriptor,
            index: Arc::clone(&shared.index),
            opened,
            vouched,
            cache,
            windows,
            source: self.source,
            schedule: Arc::clone(self.store.schedule()),
            policy: self.options.policy,
            limits: self.options.limits,
            number: shared.number(),
            landing: Arc::clone(&shared.landing),
            shared,
            sequences: Mutex::default(),
            recorder: OnceLock::new(),
            watchers: Mutex::default(),
            claimed: OnceLock::new(),
            also_claimed: OnceLock::new(),
            proofs: Mutex::default(),
            counters: self.counters,
        }))
    }

    /// Waits for the right to fetch a range that ends where what is there of the blob begins, or with it, and for the memory
    /// that all of it takes.
    async fn turn(&self, range: BlobRange) -> Turn {
        let bytes = self.descriptor.size.saturating_sub(range.start.0).saturating_mul(COPIES);
        self.store.schedule().turn(Claim::new(Urgency::Demand, bytes)).await
    }

    async fn fetch(&self, range: BlobRange) -> Result<Bytes, LayerError> {
        Counters::add(&self.counters.requests, 1);
        let bytes =
            self.source.blob_range(&self.descriptor, range.start.0..range.end().0).await.map_err(|source| {
                LayerError::Fetch { layer: self.descriptor.digest, range, source: Arc::new(source) }
            })?;
        Counters::add(&self.counters.fetched_bytes, bytes.len() as u64);
        Ok(bytes)
    }

    /// Does something that takes the processor, and memory for a whole table of contents: no more of them at once than
    /// there are processors.
    pub(crate) async fn compute<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, LayerError> {
        let place = self.store.schedule().decoder(Urgency::Demand).await;
        let work = move || {
            let result = work();
            drop(place);
            result
        };
        let layer = self.descriptor.digest;
        tokio::task::spawn_blocking(work).await.map_err(|_| LayerError::Interrupted { layer })
    }

    pub(crate) fn corrupt(&self, detail: String) -> LayerError {
        LayerError::Corrupt { layer: self.descriptor.digest, detail }
    }

    fn refused(&self, error: opening::OpenError) -> LayerError {
        let layer = self.descriptor.digest;
        match error {
            opening::OpenError::NotVouched => LayerError::Unvouched { layer, annotation: TOC_DIGEST_ANNOTATION },
            opening::OpenError::Unsupported { kind, .. } => not_supported(layer, kind),
            // With an annotation that claims otherwise, a blob without footer is damaged, or not the blob.
            opening::OpenError::Footer(error @ FooterError::NoFooter)
                if Promise::read(&self.descriptor.annotations).is_ok_and(|promise| promise.is_empty()) =>
            {
                LayerError::NotLazy { layer, reason: error.to_string() }
            }
            opening::OpenError::Index(IndexError { name, problem: Problem::NoDigest { at }, .. }) => {
                LayerError::Undigested { layer, path: name, offset: at }
            }
            error => self.corrupt(error.to_string()),
        }
    }
}

fn not_supported(layer: Digest, kind: Kind) -> LayerError {
    LayerError::NotLazy { layer, reason: format!("it is {}, which is not read lazily yet", kind.name()) }
}
