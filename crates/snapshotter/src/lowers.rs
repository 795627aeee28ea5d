//! The lower directories of snapshots: lazy layers, mounted, and shared by all snapshots that stand on them.
//!
//! ```text
//!  chain, lowest first:   remote  remote  remote   local   remote   local
//!  lower directories:     └── one, merged ──────┘  its own one alone its own
//! ```
//!
//! Remote layers at the bottom of a chain, the usual case, are one directory, whatever their number. One that stands on
//! an ordinary snapshot is a directory of its own, with overlayfs' whiteouts.
//!
//! A directory is `ROOT/KEY`, where the key names the layers. It stays mounted for as long as a snapshot stands on it.
//!
//! What this module must not know: containerd, registries.

use std::{
    collections::{HashMap, HashSet},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use loris_format::digest::Digest;
use loris_lazy::{LazyLayer, Store};
use loris_mount::{
    MountError, Special,
    engine::Engine,
    erofs::Form,
    mounts::{self, MountInfo},
    pager::{Pager, PagerOptions},
    rootfs::{self, Access, Paging, RootFs, RootFsOptions, Server},
};
use tokio::runtime::Handle;

use crate::{handover, locked::lock};

/// The directory of the merged layers that make a lower directory.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct LowerKey(String);

impl LowerKey {
    /// Returns the key of layers, given by the names of their content, the lowest first.
    #[must_use]
    pub fn new(layers: &[String], form: Form) -> Self {
        let form = match form {
            Form::Merged => "merged",
            Form::Layer(_) => "layer",
        };
        let text = format!("{form}\n{}", layers.join("\n"));
        Self(Digest::sha256_of(text.as_bytes()).hex()[..32].to_owned())
    }

    fn parse(name: &str) -> Option<Self> {
        (name.len() == 32 && name.bytes().all(|byte| byte.is_ascii_hexdigit())).then(|| Self(name.to_owned()))
    }
}

impl std::fmt::Display for LowerKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// How lower directories are mounted.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where; only root may enter it.
    pub root: PathBuf,
    /// Where it is noted who serves.
    pub state: PathBuf,
    /// Where content is kept.
    pub store: Store,
    /// The engine; `None` for the best that works here.
    pub engine: Option<Engine>,
    /// What fills data files while the kernel reads them.
    pub pager: PagerOptions,
}

/// Lower directories. Dropping it takes them down: a process that leaves them to a successor ends without.
#[derive(Debug)]
pub struct Lowers {
    settings: Settings,
    runtime: Handle,
    pager: Mutex<Option<Server>>,
    mounted: Mutex<HashMap<LowerKey, Slot>>,
}

/// Locked while it is being mounted; the lock of the map is not.
type Slot = Arc<Mutex<Option<Mounted>>>;

#[derive(Debug)]
struct Mounted {
    mount: Mount,
    users: HashSet<u64>,
}

#[derive(Debug)]
enum Mount {
    /// By this process, or taken over.
    Own(RootFs),
    /// By a process that is gone; the kernel needs nobody for it.
    Whole(PathBuf),
}

impl Lowers {
    /// Makes the directory. Mounts nothing yet.
    ///
    /// # Errors
    /// Where it can't be made.
    pub fn new(settings: Settings, runtime: Handle) -> io::Result<Self> {
        std::fs::create_dir_all(&settings.root)?;
        Ok(Self { settings, runtime, pager: Mutex::default(), mounted: Mutex::default() })
    }

    /// Fills data files by what was taken over.
    pub fn serve_with(&self, server: Server) {
        if let Server::Pager(pager) = &server {
            self.note(pager);
        }
        *lock(&self.pager) = Some(server);
    }

    fn note(&self, pager: &Pager) {
        if let Err(error) = handover::note_register(&self.settings.state, &pager.register()) {
            tracing::warn!(%error, "a fresh process will not wait for what this one has mounted");
        }
    }

    /// Returns the directory of a key, mounted or not.
    #[must_use]
    pub fn path(&self, key: &LowerKey) -> PathBuf {
        self.settings.root.join(&key.0)
    }

    /// Says that a snapshot stands on a directory, where it is mounted: `false` where it is not. Blocks while it is being
    /// mounted.
    #[must_use]
    pub fn hold(&self, key: &LowerKey, user: u64) -> bool {
        let Some(slot) = lock(&self.mounted).get(key).map(Arc::clone) else { return false };
        lock(&slot).as_mut().is_some_and(|mounted| {
            mounted.users.insert(user);
            true
        })
    }

    /// Mounts layers, the lowest first, for a snapshot that stands on them. Blocks.
    ///
    /// # Errors
    /// See [`MountError`].
    pub fn mount(
        &self,
        key: &LowerKey,
        layers: &[Arc<LazyLayer>],
        form: Form,
        user: u64,
    ) -> Result<PathBuf, MountError> {
        let path = self.path(key);
        let slot = Arc::clone(lock(&self.mounted).entry(key.clone()).or_default());
        let mut slot = lock(&slot);
        let mounted = match &mut *slot {
            Some(mounted) => mounted,
            empty => {
                // What could not be taken over, or not be unmounted. Who uses it keeps it.
                if mounts::find(&path)?.is_some_and(|mount| mount.is_loris() && mount.mountpoint == path) {
                    rootfs::unmount_at(&path)?;
                }
                let mount = self.assemble(&path, layers, form)?;
                empty.insert(Mounted { mount: Mount::Own(mount), users: HashSet::new() })
            }
        };
        mounted.users.insert(user);
        Ok(path)
    }

    fn assemble(&self, path: &Path, layers: &[Arc<LazyLayer>], form: Form) -> Result<RootFs, MountError> {
        std::fs::create_dir_all(path).map_err(|source| MountError::Scratch { path: path.to_owned(), source })?;
        let options = RootFsOptions {
            mountpoint: Some(path.to_owned()),
            access: Access::ReadOnly,
            engine: self.settings.engine,
            special: Special::ALL,
            pager: self.paging(),
            form,
            ..RootFsOptions::read_only(&self.settings.store)
        };
        let mount = RootFs::assemble(layers, &options, &self.runtime)?;
        if mount.engine() != Engine::Fanotify
            && let Err(source) = std::fs::write(self.served(path), mount.engine().name())
        {
            return Err(MountError::Scratch { path: path.to_owned(), source });
        }
        Ok(mount)
    }

    /// A file beside a directory whose mount some process has to serve, and that does not say so in the register.
    fn served(&self, path: &Path) -> PathBuf {
        path.with_extension("served")
    }

    /// Whether the mount of a process that is gone needs nobody: what does, and is in the register, was taken down before.
    #[must_use]
    pub fn is_whole(&self, key: &LowerKey) -> bool {
        !self.served(&self.path(key)).exists()
    }

    /// Returns what fills data files: one pager for all, begun with the first mount.
    fn paging(&self) -> Paging {
        if self.settings.engine.is_some_and(|engine| engine != Engine::Fanotify) {
            return Paging::None;
        }
        let mut pager = lock(&self.pager);
        match &*pager {
            Some(Server::Pager(pager)) => Paging::Shared(Arc::clone(pager)),
            Some(Server::Devices(_)) => Paging::None,
            None => match Pager::start(&self.settings.pager, &self.runtime) {
                Ok(started) => {
                    let started = Arc::new(started);
                    self.note(&started);
                    *pager = Some(Server::Pager(Arc::clone(&started)));
                    Paging::Shared(started)
                }
                Err(error) => {
                    tracing::info!(%error, "the kernel can't ask for content by fanotify");
                    Paging::None
                }
            },
        }
    }

    /// Returns the keys of what an earlier process left mounted here.
    ///
    /// # Errors
    /// Where the list of mounts can't be read.
    pub fn left_behind(&self) -> Result<Vec<LowerKey>, MountError> {
        let root = self.settings.root.canonicalize().unwrap_or_else(|_| self.settings.root.clone());
        let ours = |mount: &MountInfo| {
            let name = mount.mountpoint.strip_prefix(&root).ok()?.to_str()?;
            mount.is_loris().then(|| LowerKey::parse(name)).flatten()
        };
        let mut keys: Vec<LowerKey> = mounts::list()?.iter().filter_map(ours).collect();
        keys.sort_by(|a, b| a.0.cmp(&b.0));
        keys.dedup();
        Ok(keys)
    }

    /// Takes over what a process that was killed had mounted of `layers`, for the snapshots that stand on it: `false`
    /// where it was unmounted meanwhile. Blocks.
    ///
    /// # Errors
    /// See [`MountError`]. What is mounted stays so.
    pub fn resume(
        &self,
        key: &LowerKey,
        layers: &[Arc<LazyLayer>],
        server: &Server,
        users: HashSet<u64>,
    ) -> Result<bool, MountError> {
        let Some(mount) = RootFs::resume(&self.path(key), layers, server)? else { return Ok(false) };
        self.put(key, Mount::Own(mount), users);
        Ok(true)
    }

    /// Takes note of a mount whose layers are complete, which needs no process.
    pub fn adopt_whole(&self, key: &LowerKey, users: HashSet<u64>) {
        self.put(key, Mount::Whole(self.path(key)), users);
    }

    fn put(&self, key: &LowerKey, mount: Mount, users: HashSet<u64>) {
        *lock(lock(&self.mounted).entry(key.clone()).or_default()) = Some(Mounted { mount, users });
    }

    /// Unmounts what no snapshot of ours stands on. Blocks.
    pub fn remove_stranger(&self, key: &LowerKey) {
        let path = self.path(key);
        if let Err(error) = rootfs::unmount_at(&path) {
            tracing::warn!(%error, path = %path.display(), "a lower directory stays mounted");
            return;
        }
        self.remove(&path);
    }

    fn remove(&self, path: &Path) {
        let _ = std::fs::remove_dir(path);
        let _ = std::fs::remove_file(self.served(path));
    }

    /// A snapshot is gone: unmounts what nobody stands on any more. Blocks.
    pub fn release(&self, user: u64) {
        let slots: Vec<(LowerKey, Slot)> =
            lock(&self.mounted).iter().map(|(key, slot)| (key.clone(), Arc::clone(slot))).collect();
        for (key, slot) in slots {
            let mut mounted = lock(&slot);
            let is_last =
                mounted.as_mut().is_some_and(|mounted| mounted.users.remove(&user) && mounted.users.is_empty());
            if let Some(Mounted { mount, .. }) = mounted.take_if(|_| is_last) {
                self.unmount(&key, mount);
            }
        }
        lock(&self.mounted).retain(|_, slot| Arc::strong_count(slot) > 1 || lock(slot).is_some());
    }

    fn unmount(&self, key: &LowerKey, mount: Mount) {
        let path = self.path(key);
        let unmounted = match mount {
            Mount::Own(mount) => mount.unmount().map(drop),
            Mount::Whole(path) => rootfs::unmount_at(&path).map(drop),
        };
        match unmounted {
            Ok(()) => self.remove(&path),
            Err(error) => tracing::warn!(%error, path = %path.display(), "a lower directory stays mounted"),
        }
    }

    /// Takes down everything. Blocks.
    pub fn unmount_all(&self) {
        let slots: Vec<(LowerKey, Slot)> = lock(&self.mounted).drain().collect();
        for (key, slot) in slots {
            if let Some(Mounted { mount, .. }) = lock(&slot).take() {
                self.unmount(&key, mount);
            }
        }
        // Its keeper ends with it.
        lock(&self.pager).take();
    }

    /// Waits until nothing is mounted that somebody has to serve.
    pub async fn idle(&self) {
        let server = lock(&self.pager).clone();
        if let Some(server) = server {
            server.idle().await;
        }
    }

    /// Returns how many directories are mounted.
    #[must_use]
    pub fn count(&self) -> usize {
        lock(&self.mounted).len()
    }
}
