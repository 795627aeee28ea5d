//! Snapshots: what containerd asks for, done.
//!
//! ```text
//!  ROOT/metadata.redb           names, parents, labels, which layer              metadata
//!  ROOT/snapshots/ID/{fs,work}  what was written: a container's, or an unpacked layer's
//!  ROOT/lower/KEY               lazy layers, mounted                             lowers
//! ```
//!
//! A committed snapshot is either *local*, with files of its own, or *remote*, with a lazy layer and nothing else.
//!
//! What this module must not know: gRPC, where images come from.

use std::{
    collections::HashMap,
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use loris_format::{digest::Digest, estargz::toc::TOC_DIGEST_ANNOTATION, tree::OpaqueStyle};
use loris_lazy::{LazyLayer, OpenOptions, Removed};
use loris_mount::{MountError, erofs::Form, removal::remove_tree};
use loris_oci::registry::Client;

use crate::{
    ahead::{self, Ahead},
    labels::{self, Asked},
    lowers::{LowerKey, Lowers},
    metadata::{Kind, Labels, Metadata, MetadataError, Snapshot, Usage, Wanted},
    metrics::Metrics,
    mounting::{self, Mount, MountSettings},
    remote::{Fallback, FallbackKind, Images, RemoteLayer},
    report::Report,
    usage,
};

/// Snapshots that are being removed.
const REMOVING: &str = "removing-";
/// Between looks for content of removed images that could not be removed with them: at first, and in the end.
const FIRST_DISCARD: Duration = Duration::from_mins(1);
const LONGEST_DISCARD: Duration = Duration::from_hours(1);

/// What can't be done, and why.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The request does not fit what is there.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// A layer is not here and can't be had.
    #[error("layer {layer} of {reference} can't be opened: {reason}")]
    Layer {
        /// The blob.
        layer: String,
        /// Its image.
        reference: String,
        /// Why.
        reason: String,
    },
    /// A lower directory can't be mounted.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// A directory can't be made, measured or removed.
    #[error("{path}: {source}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// This process is ending.
    #[error("the snapshotter is stopping")]
    Stopping,
}

type Result<T> = std::result::Result<T, SnapshotError>;

/// What a snapshot was prepared as.
#[derive(Debug)]
pub enum Prepared {
    /// An ordinary one, to be mounted like this.
    Mounts(Vec<Mount>),
    /// A remote one: it is committed already.
    Remote,
}

/// All snapshots. Cheap to clone.
#[derive(Clone)]
pub struct Snapshots {
    inner: Arc<Inner>,
}

struct Inner {
    root: PathBuf,
    metadata: Metadata,
    images: Arc<Images>,
    lowers: Arc<Lowers>,
    ahead: Ahead,
    mounts: MountSettings,
    metrics: Arc<Metrics>,
}

impl Snapshots {
    /// Puts the parts together, and removes what a killed process left half done.
    ///
    /// # Errors
    /// Where the directory can't be made or read.
    pub fn new(
        root: &Path,
        metadata: Metadata,
        images: Arc<Images>,
        lowers: Arc<Lowers>,
        ahead: Ahead,
        mounts: MountSettings,
    ) -> Result<Self> {
        let metrics = Arc::new(Metrics::new(&ahead, &lowers));
        let inner = Inner { root: root.join("snapshots"), metadata, images, lowers, ahead, mounts, metrics };
        std::fs::create_dir_all(&inner.root).map_err(at(&inner.root))?;
        let snapshots = Self { inner: Arc::new(inner) };
        snapshots.inner.clean()?;
        Ok(snapshots)
    }

    /// Opens and fetches images otherwise from now on; where nothing is said of that, what is fetched ahead is not touched.
    pub fn change(&self, client: Client, open: OpenOptions, patience: Duration, ahead: Option<ahead::Settings>) {
        self.inner.images.change(client, open, patience, ahead.as_ref().map(|ahead| ahead.prefetch));
        if let Some(ahead) = ahead {
            self.inner.ahead.change(ahead);
        }
    }

    /// Makes a snapshot that can be written, or where labels ask for it and it can be done, commits a remote one.
    ///
    /// # Errors
    /// See [`SnapshotError`].
    pub async fn prepare(&self, key: &str, parent: &str, labels: Labels) -> Result<Prepared> {
        let fallback = match labels::asked(&labels) {
            None => None,
            Some(Err(reason)) => Some(Fallback::client(reason)),
            Some(Ok(asked)) => match self.prepare_remote(&asked, parent, &labels).await? {
                Ok(()) => {
                    self.inner.metrics.prepared(None);
                    return Ok(Prepared::Remote);
                }
                Err(fallback) => Some(fallback),
            },
        };
        let fallback = fallback.map(|Fallback { kind, reason }| {
            tracing::info!(snapshot = key, %reason, remote_snapshot_prepared = false, "a layer is pulled as usual");
            self.inner.metrics.prepared(Some(kind));
            reason
        });
        self.make(key, parent, labels, Kind::Active, fallback).await.map(Prepared::Mounts)
    }

    /// Makes a snapshot that can be read only.
    ///
    /// # Errors
    /// See [`SnapshotError`].
    pub async fn view(&self, key: &str, parent: &str, labels: Labels) -> Result<Vec<Mount>> {
        self.make(key, parent, labels, Kind::View, None).await
    }

    /// Commits a remote snapshot; or returns why the client should pull the layer itself.
    async fn prepare_remote(
        &self,
        asked: &Asked,
        parent: &str,
        labels: &Labels,
    ) -> Result<std::result::Result<(), Fallback>> {
        // The same layer on the same parent may be here, as another namespace has it.
        let (target, below) = (asked.target.clone(), parent.to_owned());
        let parent = below.clone();
        let known = self.blocking(move |inner| inner.committed_remote(&target, &below)).await?;
        if let Some(known) = known {
            return Ok(self.is_the_same(&known, asked).await);
        }
        let (remote, layer) = match self.inner.images.layer(asked).await {
            Ok(found) => found,
            Err(fallback) => return Ok(Err(fallback)),
        };
        let mut labels = labels.clone();
        labels.insert(labels::REMOTE.to_owned(), labels::REMOTE_VALUE.to_owned());
        let (target, below) = (asked.target.clone(), parent.clone());
        let committed = self
            .blocking(move |inner| {
                if inner.committed_remote(&target, &parent)?.is_some() {
                    return Ok(None);
                }
                // Under another parent the name may be taken; containerd finds it by its labels.
                let names = [target.clone(), format!("{target} on {parent}")];
                let mut result = Err(MetadataError::AlreadyExists(target).into());
                for name in &names {
                    let wanted = Wanted {
                        name,
                        parent: &parent,
                        kind: Kind::Committed,
                        labels: labels.clone(),
                        remote: Some(remote.clone()),
                        fallback: None,
                    };
                    result = inner.metadata.create(&wanted).map_err(SnapshotError::from);
                    if !matches!(result, Err(SnapshotError::Metadata(MetadataError::AlreadyExists(_)))) {
                        break;
                    }
                }
                result.map(Some)
            })
            .await;
        match committed {
            Ok(Some(snapshot)) => {
                tracing::info!(snapshot = snapshot.name, layer = %layer.digest(), image = asked.reference,
                    remote_snapshot_prepared = true, "a layer is lazy");
                self.begin(&snapshot, &asked.reference, &layer).await?;
                Ok(Ok(()))
            }
            // Somebody was faster.
            Ok(None) => {
                let (target, below) = (asked.target.clone(), below);
                let known = self.blocking(move |inner| inner.committed_remote(&target, &below)).await?;
                match known {
                    Some(known) => Ok(self.is_the_same(&known, asked).await),
                    None => Ok(Err(Fallback::client("its snapshot was removed while it was prepared".to_owned()))),
                }
            }
            Err(SnapshotError::Metadata(MetadataError::AlreadyExists(_))) => {
                Ok(Err(Fallback::client("another snapshot has its name".to_owned())))
            }
            Err(error) => Err(error),
        }
    }

    /// Says whether a committed snapshot is of the layer that a client means: a chain has its name from what an image's
    /// configuration claims, and another image may have claimed it first.
    async fn is_the_same(&self, known: &Snapshot, asked: &Asked) -> std::result::Result<(), Fallback> {
        let is_the_same = known.remote.as_ref().is_some_and(|remote| {
            let toc = remote.descriptor.annotations.get(TOC_DIGEST_ANNOTATION);
            remote.descriptor.digest == asked.layer && asked.toc.as_ref().is_none_or(|asked| Some(asked) == toc)
        });
        if !is_the_same {
            return Err(Fallback::client(format!("another image has another layer under its name, {}", known.name)));
        }
        match self.reopened(known).await {
            Ok(_) => Ok(()),
            Err(error) => Err(Fallback { kind: FallbackKind::Registry, reason: error.to_string() }),
        }
    }

    /// Keeps the layer of a snapshot open and begins to fetch it, unless the snapshot was removed meanwhile.
    async fn begin(&self, snapshot: &Snapshot, image: &str, layer: &Arc<LazyLayer>) -> Result<()> {
        self.inner.ahead.begin(image, snapshot.id, layer);
        let (name, id) = (snapshot.name.clone(), snapshot.id);
        let stays = self.blocking(move |inner| Ok(inner.has(&name, id))).await;
        match (stays, &snapshot.remote) {
            (Ok(false), Some(remote)) => {
                let (remote, id) = (remote.clone(), snapshot.id);
                self.blocking(move |inner| inner.forget_layer(id, &remote)).await
            }
            (stays, _) => stays.map(drop),
        }
    }

    async fn make(
        &self,
        key: &str,
        parent: &str,
        labels: Labels,
        kind: Kind,
        fallback: Option<String>,
    ) -> Result<Vec<Mount>> {
        let (key, parent) = (key.to_owned(), parent.to_owned());
        let snapshot = self
            .blocking(move |inner| {
                let wanted = Wanted { name: &key, parent: &parent, kind, labels, remote: None, fallback };
                let snapshot = inner.metadata.create(&wanted)?;
                if let Err(error) = inner.make_directories(&snapshot) {
                    let _ = inner.metadata.remove(&key, |_| None);
                    return Err(error);
                }
                Ok(snapshot)
            })
            .await?;
        match self.mounts_of(&snapshot).await {
            Ok(mounts) => Ok(mounts),
            Err(error) => {
                let _ = self.remove(&snapshot.name).await;
                Err(error)
            }
        }
    }

    /// Says how to mount a snapshot that is not committed.
    ///
    /// # Errors
    /// See [`SnapshotError`].
    pub async fn mounts(&self, key: &str) -> Result<Vec<Mount>> {
        let name = key.to_owned();
        let snapshot = self.blocking(move |inner| Ok(inner.metadata.get(&name)?)).await?;
        if snapshot.kind == Kind::Committed {
            let message = format!("snapshot {key} can't be mounted: it is committed");
            return Err(MetadataError::WrongState(message).into());
        }
        self.mounts_of(&snapshot).await
    }

    async fn mounts_of(&self, snapshot: &Snapshot) -> Result<Vec<Mount>> {
        let name = snapshot.name.clone();
        let parents = self.blocking(move |inner| Ok(inner.metadata.parents(&name)?)).await?;
        let mut lower = Vec::new();
        for part in parts(&parents, self.inner.mounts.opaque_style()) {
            lower.push(match part {
                Part::Local(parent) => self.inner.directory(parent.id).join("fs"),
                Part::Remote(chain) => self.lower(snapshot, &chain).await?,
            });
        }
        // The uppermost first.
        lower.reverse();
        let directory = self.inner.directory(snapshot.id);
        Ok(mounting::mounts(snapshot, &directory, &lower, &self.inner.mounts))
    }

    /// Returns the directory of remote snapshots, the lowest first, mounted.
    async fn lower(&self, snapshot: &Snapshot, chain: &Chain<'_>) -> Result<PathBuf> {
        let (user, user_name) = (snapshot.id, &snapshot.name);
        let key = chain.key();
        let lowers = Arc::clone(&self.inner.lowers);
        let (held, wanted) = (Arc::clone(&lowers), key.clone());
        if self.blocking(move |_| Ok(held.hold(&wanted, user))).await? {
            return Ok(lowers.path(&key));
        }
        let opened = chain.snapshots.iter().map(|snapshot| self.reopened(snapshot));
        let mut layers = Vec::new();
        for opened in futures_util::future::join_all(opened).await {
            layers.push(opened?);
        }
        let (form, name) = (chain.form, user_name.to_owned());
        self.blocking(move |inner| {
            let path = lowers.mount(&key, &layers, form, user)?;
            // Whoever removed it meanwhile found nothing to release.
            if !inner.has(&name, user) {
                lowers.release(user);
                return Err(MetadataError::NotFound(name).into());
            }
            Ok(path)
        })
        .await
    }

    /// Returns the layer of a remote snapshot, opened again where it is not open.
    ///
    /// # Errors
    /// See [`SnapshotError`].
    pub async fn reopened(&self, snapshot: &Snapshot) -> Result<Arc<LazyLayer>> {
        let Some(remote) = &snapshot.remote else {
            return Err(MetadataError::WrongState(format!("snapshot {} is not remote", snapshot.name)).into());
        };
        if let Some(layer) = self.inner.ahead.layer(snapshot.id) {
            return Ok(layer);
        }
        let layer = self.inner.images.reopen(remote).await.map_err(|error| SnapshotError::Layer {
            layer: remote.descriptor.digest.to_string(),
            reference: remote.reference.clone(),
            reason: error.to_string(),
        })?;
        self.begin(snapshot, &remote.reference, &layer).await?;
        Ok(layer)
    }

    /// Commits an active snapshot; on another parent where one is given.
    ///
    /// # Errors
    /// See [`SnapshotError`].
    pub async fn commit(&self, name: &str, key: &str, parent: &str, labels: Labels) -> Result<()> {
        let (name, key, parent) = (name.to_owned(), key.to_owned(), parent.to_owned());
        self.blocking(move |inner| {
            let active = inner.metadata.get(&key)?;
            let mut labels = labels;
            if let Some(reason) = &active.fallback {
                labels.entry(labels::FALLBACK.to_owned()).or_insert_with(|| shortened(reason));
            }
            let usage = usage::of(&inner.directory(active.id).join("fs")).map_err(at(&inner.root))?;
            let committed = inner.metadata.commit(&name, &key, &parent, &labels, usage)?;
            // Nobody mounts it itself any more.
            inner.lowers.release(committed.id);
            Ok(())
        })
        .await
    }

    /// Removes a snapshot.
    ///
    /// # Errors
    /// See [`SnapshotError`].
    pub async fn remove(&self, key: &str) -> Result<()> {
        let key = key.to_owned();
        self.blocking(move |inner| {
            let snapshot =
                inner.metadata.remove(&key, |snapshot| inner.stored_at(snapshot.id, snapshot.remote.as_ref()?))?;
            inner.lowers.release(snapshot.id);
            match &snapshot.remote {
                Some(remote) => inner.forget_layer(snapshot.id, remote)?,
                None => inner.remove_directory(snapshot.id)?,
            }
            Ok(())
        })
        .await
    }

    /// Removes the content of layers whose last snapshot was removed, where that was not possible then or the process was
    /// killed before it: at once, and from time to time. Never ends.
    pub(crate) async fn discard_left(&self) {
        let mut pause = FIRST_DISCARD;
        loop {
            if let Err(error) = self.blocking(|inner| inner.discard_left()).await {
                tracing::warn!(%error, "layers of removed images stay");
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 4).min(LONGEST_DISCARD);
        }
    }

    /// Returns the layers of remote snapshots, and by which reference each was asked for.
    ///
    /// # Errors
    /// See [`SnapshotError`].
    pub async fn remote_layers(&self) -> Result<HashMap<Digest, String>> {
        let snapshots = self.list(|snapshot| snapshot.remote.is_some()).await?;
        let remote = snapshots.into_iter().filter_map(|snapshot| snapshot.remote);
        Ok(remote.map(|remote| (remote.descriptor.digest, remote.reference)).collect())
    }

    /// Returns what asks registries now.
    #[must_use]
    pub fn client(&self) -> Client {
        self.inner.images.client()
    }

    /// Returns what is known of a snapshot.
    ///
    /// # Errors
    /// See [`SnapshotError`].
    pub async fn stat(&self, key: &str) -> Result<Snapshot> {
        let key = key.to_owned();
        self.blocking(move |inner| Ok(inner.metadata.get(&key)?)).await
    }

    /// Changes a snapshot's labels.
    ///
    /// # Errors
    /// See [`SnapshotError`].
    pub async fn update(&self, name: &str, labels: Labels, paths: Vec<String>) -> Result<Snapshot> {
        let name = name.to_owned();
        self.blocking(move |inner| Ok(inner.metadata.update(&name, &labels, &paths)?)).await
    }

    /// Returns what is known of the snapshots that are wanted, by name.
    ///
    /// # Errors
    /// See [`SnapshotError`].
    pub async fn list(&self, wanted: impl Fn(&Snapshot) -> bool + Send + 'static) -> Result<Vec<Snapshot>> {
        self.blocking(move |inner| Ok(inner.metadata.list(wanted)?)).await
    }

    /// Returns what a snapshot takes on the disk: a remote one what is here of its layer.
    ///
    /// # Errors
    /// See [`SnapshotError`].
    pub async fn usage(&self, key: &str) -> Result<Usage> {
        let key = key.to_owned();
        self.blocking(move |inner| {
            let snapshot = inner.metadata.get(&key)?;
            if let Some(layer) = snapshot.remote.as_ref().and_then(|_| inner.ahead.layer(snapshot.id)) {
                let data = layer.data_file().metadata().map_err(at(layer.directory()))?;
                return Ok(Usage { bytes: data.blocks() * 512, inodes: 0 });
            }
            match snapshot.kind {
                Kind::Committed => Ok(snapshot.usage),
                Kind::Active | Kind::View => {
                    let directory = inner.directory(snapshot.id).join("fs");
                    usage::of(&directory).map_err(at(&directory))
                }
            }
        })
        .await
    }

    /// Removes what removed snapshots left behind.
    ///
    /// # Errors
    /// See [`SnapshotError`].
    pub async fn cleanup(&self) -> Result<()> {
        self.blocking(|inner| inner.clean()).await
    }

    /// The layers that are open.
    #[must_use]
    pub fn ahead(&self) -> &Ahead {
        &self.inner.ahead
    }

    /// What holds lower directories.
    #[must_use]
    pub fn lowers(&self) -> &Arc<Lowers> {
        &self.inner.lowers
    }

    /// Every chain of remote snapshots that an active snapshot or a view stands on, and their numbers.
    ///
    /// # Errors
    /// See [`SnapshotError`].
    pub fn chains_in_use(&self) -> Result<Vec<(u64, LowerKey, Vec<Snapshot>)>> {
        let users = self.inner.metadata.list(|snapshot| snapshot.kind != Kind::Committed)?;
        let mut found = Vec::new();
        for user in users {
            let parents = self.inner.metadata.parents(&user.name)?;
            for part in parts(&parents, self.inner.mounts.opaque_style()) {
                if let Part::Remote(chain) = part {
                    found.push((user.id, chain.key(), chain.snapshots.into_iter().cloned().collect()));
                }
            }
        }
        Ok(found)
    }

    /// Counts what happens.
    #[must_use]
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.inner.metrics
    }

    /// What is open, by image.
    #[must_use]
    pub fn layers(&self) -> Vec<(String, Arc<LazyLayer>)> {
        self.inner.ahead.layers()
    }

    /// Tells all that is known of images and containers.
    ///
    /// # Errors
    /// See [`SnapshotError`].
    pub async fn report(&self) -> Result<Report> {
        self.blocking(|inner| {
            let snapshots = inner.metadata.list(|_| true)?;
            Ok(Report::of(&snapshots, |id| inner.ahead.layer(id)))
        })
        .await
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Arc<Inner>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let inner = Arc::clone(&self.inner);
        tokio::task::spawn_blocking(move || work(&inner)).await.unwrap_or(Err(SnapshotError::Stopping))
    }
}

impl Inner {
    /// Whether a snapshot of this name is still the one of this number; also once it is committed under another name.
    fn has(&self, name: &str, id: u64) -> bool {
        match self.metadata.get(name) {
            Ok(found) => found.id == id,
            Err(_) => self.metadata.list(|snapshot| snapshot.id == id).is_ok_and(|found| !found.is_empty()),
        }
    }

    fn directory(&self, id: u64) -> PathBuf {
        self.root.join(id.to_string())
    }

    /// Returns a remote snapshot that is committed on a parent (empty for none) for a client's target.
    fn committed_remote(&self, target: &str, parent: &str) -> Result<Option<Snapshot>> {
        let parent = (!parent.is_empty()).then_some(parent);
        for name in [target.to_owned(), format!("{target} on {}", parent.unwrap_or_default())] {
            match self.metadata.get(&name) {
                Ok(found) if found.remote.is_some() && found.parent.as_deref() == parent => return Ok(Some(found)),
                Ok(_) | Err(MetadataError::NotFound(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(None)
    }

    /// Makes the directories of a snapshot. What can be written looks like the root below it.
    fn make_directories(&self, snapshot: &Snapshot) -> Result<()> {
        let directory = self.directory(snapshot.id);
        let build = || -> io::Result<()> {
            std::fs::DirBuilder::new().mode(0o700).create(&directory)?;
            let fs = directory.join("fs");
            std::fs::create_dir(&fs)?;
            // Whatever the umask is.
            std::fs::set_permissions(&fs, std::fs::Permissions::from_mode(0o755))?;
            if snapshot.kind == Kind::Active {
                let work = directory.join("work");
                std::fs::DirBuilder::new().mode(0o711).create(work)?;
            }
            if let Some((user, group)) = mounting::owner_of_root(&snapshot.labels) {
                std::os::unix::fs::chown(&fs, Some(user), Some(group))?;
            } else if let Some(parent) = self.local_parent(snapshot) {
                let parent = parent.metadata()?;
                std::os::unix::fs::chown(&fs, Some(parent.uid()), Some(parent.gid()))?;
            }
            Ok(())
        };
        build().map_err(|source| {
            let _ = remove_tree(&directory);
            SnapshotError::Directory { path: directory.clone(), source }
        })
    }

    /// The files of the snapshot below, where that is a local one.
    fn local_parent(&self, snapshot: &Snapshot) -> Option<PathBuf> {
        let parent = self.metadata.get(snapshot.parent.as_deref()?).ok()?;
        parent.remote.is_none().then(|| self.directory(parent.id).join("fs"))
    }

    fn remove_directory(&self, id: u64) -> Result<()> {
        let (from, to) = (self.directory(id), self.root.join(format!("{REMOVING}{id}")));
        match std::fs::rename(&from, &to) {
            Ok(()) => remove_tree(&to).map_err(at(&to)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(at(&from)(error)),
        }
    }

    /// Where the content of a snapshot's layer is, below the root of the store.
    fn stored_at(&self, id: u64, remote: &RemoteLayer) -> Option<String> {
        let layer = self.ahead.layer(id);
        let directory = layer.map(|layer| layer.directory().to_owned()).or_else(|| self.images.directory(remote))?;
        Some(directory.strip_prefix(self.images.store().root()).ok()?.to_str()?.to_owned())
    }

    /// The last snapshot of a layer is gone: its content goes too.
    fn forget_layer(self: &Arc<Self>, id: u64, remote: &RemoteLayer) -> Result<()> {
        let key = remote.key();
        let others = self.metadata.list(|other| other.remote.as_ref().is_some_and(|other| other.key() == key))?;
        let at = self.stored_at(id, remote);
        self.images.forget(&remote.descriptor.digest);
        drop(self.ahead.end(id));
        if others.is_empty()
            && let Some(at) = at
        {
            let (inner, directory) = (Arc::downgrade(self), self.images.store().root().join(&at));
            let done = move || {
                if let Some(inner) = inner.upgrade() {
                    inner.discarded(&at);
                }
            };
            self.ahead.discard(self.images.store(), directory, done);
        }
        Ok(())
    }

    fn discarded(&self, at: &str) {
        if let Err(error) = self.metadata.discarded(at) {
            tracing::debug!(%error, "a layer that was removed is looked for again");
        }
    }

    /// Removes content that an earlier attempt, or an earlier process, has left.
    fn discard_left(&self) -> Result<()> {
        let store = self.images.store();
        // Others evict too.
        store.let_go_of_removed();
        for at in self.metadata.discards()? {
            // It may have been pulled again. Whoever is just doing it has it open.
            let remote = self.metadata.list(|snapshot| snapshot.remote.is_some())?;
            let stored = |snapshot: &Snapshot| self.stored_at(snapshot.id, snapshot.remote.as_ref()?);
            let is_wanted = remote.iter().any(|snapshot| stored(snapshot).as_ref() == Some(&at));
            let is_inside = at.starts_with("layers/") && !at.split('/').any(|part| part == "..");
            let removed = match is_wanted || !is_inside {
                true => Ok(Removed::Gone),
                false => store.remove(&store.root().join(&at)),
            };
            match removed {
                Ok(Removed::InUse) => {}
                Ok(_) => self.discarded(&at),
                Err(error) => tracing::warn!(%error, layer = at, "the layer of a removed image stays"),
            }
        }
        Ok(())
    }

    /// Removes directories that no snapshot has.
    fn clean(&self) -> Result<()> {
        let entries = std::fs::read_dir(&self.root).map_err(at(&self.root))?;
        let names =
            entries.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>().map_err(at(&self.root))?;
        // Asked after the directory was read: a snapshot is known before it has one, and its number is never used again.
        let known: std::collections::HashSet<u64> =
            self.metadata.list(|snapshot| snapshot.remote.is_none())?.iter().map(|snapshot| snapshot.id).collect();
        for name in names {
            let is_orphan = match name.to_str() {
                Some(name) if name.starts_with(REMOVING) => true,
                Some(name) => name.parse().is_ok_and(|id: u64| !known.contains(&id)),
                None => false,
            };
            let path = self.root.join(name);
            if is_orphan && let Err(error) = remove_tree(&path) {
                tracing::warn!(%error, path = %path.display(), "what is left of a removed snapshot stays");
            }
        }
        Ok(())
    }
}

/// A part of a chain of parents.
enum Part<'a> {
    Local(&'a Snapshot),
    Remote(Chain<'a>),
}

/// Remote snapshots that become one directory, the lowest first.
struct Chain<'a> {
    snapshots: Vec<&'a Snapshot>,
    form: Form,
}

impl Chain<'_> {
    fn key(&self) -> LowerKey {
        let names: Vec<String> =
            self.snapshots.iter().filter_map(|snapshot| Some(snapshot.remote.as_ref()?.key())).collect();
        LowerKey::new(&names, self.form)
    }
}

/// Cuts a chain of parents (the nearest first) into what becomes lower directories, the lowest first.
fn parts(parents: &[Snapshot], style: OpaqueStyle) -> Vec<Part<'_>> {
    let mut parts: Vec<Part<'_>> = Vec::new();
    for snapshot in parents.iter().rev() {
        let part = match (&snapshot.remote, parts.as_mut_slice()) {
            (None, _) => Part::Local(snapshot),
            (Some(_), [Part::Remote(bottom)]) if bottom.form == Form::Merged => {
                bottom.snapshots.push(snapshot);
                continue;
            }
            (Some(_), []) => Part::Remote(Chain { snapshots: vec![snapshot], form: Form::Merged }),
            (Some(_), _) => Part::Remote(Chain { snapshots: vec![snapshot], form: Form::Layer(style) }),
        };
        parts.push(part);
    }
    parts
}

/// A label's value has its bounds.
fn shortened(reason: &str) -> String {
    const MOST: usize = 512;
    let end = (0..=MOST.min(reason.len())).rev().find(|&end| reason.is_char_boundary(end)).unwrap_or(0);
    reason[..end].to_owned()
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> SnapshotError {
    let path = path.to_owned();
    move |source| SnapshotError::Directory { path, source }
}
