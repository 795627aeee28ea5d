//! The snapshotter as a process: started, taken over from one that was killed, stopped.
//!
//! | what happens | what becomes of mounts |
//! |---|---|
//! | SIGKILL, a crash, an upgrade | reads wait; a successor or a fresh process takes over (see `handover`) |
//! | [`Daemon::leave`] (SIGTERM) | the same: a successor serves reads, but nothing else, until a fresh process comes |
//! | [`Daemon::take_down`] (SIGINT) | they are taken down; snapshots stay known |
//! | the machine starts anew | they are mounted again when somebody asks for them |
//!
//! What this module must not know: the command line, signals.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use loris_lazy::{LazyLayer, OpenOptions};
use loris_mount::{
    MountError,
    engine::Engine,
    keeper::Keeper,
    pager::{PagerError, PagerOptions},
    rootfs::Server,
};
use loris_oci::registry::Client;
use tokio::runtime::Handle;

use crate::{
    ahead::{self, Ahead},
    content::{self, Content},
    handover::{self, Control, Entered, Left},
    idle,
    keychain::cri::ImageService,
    listener::{self, Listener},
    lowers::{self, LowerKey, Lowers},
    metadata::{Metadata, MetadataError, Snapshot},
    mounting::MountSettings,
    proto::snapshots::snapshots_server::SnapshotsServer,
    remote::{self, Images},
    service::Service,
    snapshots::{SnapshotError, Snapshots},
};

/// Between attempts to take over mounts, whose process may not be quite dead.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// After so many, a mount is given up.
const ATTEMPTS: u32 = 10;
/// Largest message that a client may send.
const MESSAGE_BYTES: usize = 16 << 20;
/// A marker in the root directory: who served last was stopped, and its successor serves reads only.
const STOPPED: &str = "stopped";

/// How the snapshotter runs.
pub struct Settings {
    /// Where snapshots and what is known of them are kept.
    pub root: PathBuf,
    /// The socket that containerd is told of.
    pub address: PathBuf,
    /// It, where somebody listens there already: a service manager, or a process that was killed
    /// ([`listener::inherited`]).
    pub listener: Option<OwnedFd>,
    /// Whether the address is a service manager's, and stays when this process ends.
    pub keeps_address: bool,
    /// How images are opened.
    pub images: remote::Settings,
    /// What kubelet is served with beside containerd, where it is (`Keychains::image_service`; the client of `images` must
    /// have the same keychains).
    pub image_service: Option<ImageService>,
    /// What is fetched ahead.
    pub ahead: ahead::Settings,
    /// Where containerd is made to have all layers of lazily pulled images.
    pub content: content::Settings,
    /// More options of snapshots that can be written.
    pub mount_options: Vec<String>,
    /// The engine; `None` for the best that works here.
    pub engine: Option<Engine>,
    /// What fills data files while the kernel reads them.
    pub pager: PagerOptions,
    /// Whether a service manager starts a fresh process when this one dies, so that a successor only keeps mounts alive.
    pub is_managed: bool,
}

/// Why the snapshotter does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DaemonError {
    /// Its directory can't be used.
    #[error("{path} can't be used: {source}")]
    Root {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Its socket can't be made.
    #[error("can't listen on {path}: {source}")]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What is known of snapshots can't be read.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// Snapshots are not in order.
    #[error(transparent)]
    Snapshots(#[from] SnapshotError),
    /// Mounts can't be listed.
    #[error(transparent)]
    Mounts(#[from] MountError),
    /// Reads of an earlier process can't be answered.
    #[error("taking over mounts: {0}")]
    Pager(#[from] PagerError),
}

/// How a process begins.
#[derive(Debug)]
pub enum Started {
    /// It serves.
    Serving(Box<Daemon>),
    /// Another one does, which has got what this one had from its predecessor. Nothing is left to do.
    PassedOn,
}

/// A snapshotter that runs. It must be ended by [`Daemon::leave`] or [`Daemon::take_down`].
pub struct Daemon {
    root: PathBuf,
    snapshots: Snapshots,
    content: Content,
    image_service: Option<ImageService>,
    control: Control,
    /// `None` where it rests.
    listener: Option<Listener>,
    keeps_address: bool,
    _lock: File,
}

impl std::fmt::Debug for Daemon {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Daemon").field("root", &self.root).field("rests", &self.rests()).finish_non_exhaustive()
    }
}

impl Daemon {
    /// Starts. Takes over from a process that was killed, where there is something to take over. `keeper` is the socket that
    /// a successor inherits ([`Keeper::inherited_socket`]).
    ///
    /// # Errors
    /// See [`DaemonError`]. What was mounted stays so.
    pub async fn start(settings: Settings, keeper: Option<OwnedFd>) -> Result<Started, DaemonError> {
        let Settings { root, address, listener, keeps_address, image_service, .. } = settings;
        let Settings { images, ahead, content, mount_options, engine, mut pager, is_managed, .. } = settings;
        let completes = ahead.complete.is_some();
        let failed = |source| DaemonError::Root { path: root.clone(), source };
        make_root(&root).map_err(failed)?;
        let root = root.canonicalize().map_err(failed)?;
        let is_successor = keeper.is_some();
        let was_stopped = root.join(STOPPED).exists();
        let (left, listener) = match keeper {
            // The address of one that was stopped is gone.
            Some(keeper) => (Some(Left { keeper, listener: listener.filter(|_| !was_stopped) }), None),
            None => (None, listener),
        };
        let rests = is_successor && (is_managed || was_stopped);
        let at = root.clone();
        let entered = tokio::task::spawn_blocking(move || handover::enter(&at, left)).await;
        let (lock, left) = match entered.unwrap_or_else(|_| Err(io::ErrorKind::Interrupted.into())).map_err(failed)? {
            Entered::Serves { lock, left } => (lock, left),
            Entered::PassedOn => return Ok(Started::PassedOn),
        };
        if !rests {
            let _ = std::fs::remove_file(root.join(STOPPED));
        }
        let (keeper, left_listener) = left.map_or((None, None), |left| (Some(left.keeper), left.listener));
        // Before a keeper is started, which must have it too.
        let listener = match (rests, listener.or(left_listener)) {
            (true, _) => None,
            (false, listener) => Some(Listener::open(&address, listener, &mut pager.on_death)?),
        };
        let control = Control::listen(&root).map_err(failed)?;
        let inherited = keeper.map(Keeper::inherit_through).transpose().map_err(failed)?;
        let store = images.store.clone();
        if let Some(inherited) = &inherited {
            for data in inherited.data_files().map_err(failed)? {
                store.adopt(data).map_err(failed)?;
            }
        }
        let runtime = Handle::current();
        let lowers =
            lowers::Settings { root: root.join("lower"), state: root.clone(), store, engine, pager: pager.clone() };
        let lowers = Arc::new(Lowers::new(lowers, runtime.clone()).map_err(failed)?);
        let metadata = Metadata::open(&root.join("metadata.redb"))?;
        let ahead = Ahead::new(ahead, runtime.clone());
        let mounts = MountSettings::of_this_machine(mount_options);
        let images = Arc::new(Images::new(images));
        let snapshots = Snapshots::new(&root, metadata, images, Arc::clone(&lowers), ahead, mounts)?;
        let content = Content::new(content, snapshots.clone(), completes);
        let daemon = Self { root, snapshots, content, image_service, control, listener, keeps_address, _lock: lock };
        daemon.take_over(inherited, &pager, &runtime).await?;
        Ok(Started::Serving(Box::new(daemon)))
    }

    /// Goes on with what an earlier process had mounted.
    async fn take_over(
        &self,
        inherited: Option<loris_mount::keeper::Inherited>,
        pager: &PagerOptions,
        runtime: &Handle,
    ) -> Result<(), DaemonError> {
        let lowers = self.snapshots.lowers();
        let left: HashSet<LowerKey> = lowers.left_behind()?.into_iter().collect();
        let mut chains: HashMap<LowerKey, (HashSet<u64>, Vec<Snapshot>)> = HashMap::new();
        for (user, key, snapshots) in self.snapshots.chains_in_use()? {
            chains.entry(key).or_insert_with(|| (HashSet::new(), snapshots)).0.insert(user);
        }
        let Some(inherited) = inherited else {
            for key in left {
                match chains.remove(&key) {
                    Some((users, _)) if lowers.is_whole(&key) => lowers.adopt_whole(&key, users),
                    _ => lowers.remove_stranger(&key),
                }
            }
            return Ok(());
        };
        let mut opened: HashMap<u64, Arc<LazyLayer>> = HashMap::new();
        let wanted = chains.values().flat_map(|(_, snapshots)| snapshots);
        let openings = wanted.map(|snapshot| async move { (snapshot.id, self.snapshots.reopened(snapshot).await) });
        for (id, layer) in futures_util::future::join_all(openings).await {
            match layer {
                Ok(layer) => drop(opened.insert(id, layer)),
                Err(error) => tracing::error!(%error, "reads of it are refused"),
            }
        }
        let layers: Vec<Arc<LazyLayer>> = opened.values().map(Arc::clone).collect();
        let server = Server::resume(inherited, &layers, pager, runtime)?;
        lowers.serve_with(server.clone());
        for key in left {
            let Some((users, snapshots)) = chains.remove(&key) else {
                lowers.remove_stranger(&key);
                continue;
            };
            let layers: Option<Vec<Arc<LazyLayer>>> =
                snapshots.iter().map(|snapshot| opened.get(&snapshot.id).map(Arc::clone)).collect();
            match layers {
                Some(layers) => self.resume(&key, &layers, &server, &users).await,
                None => tracing::error!(lower = %key, "it stays mounted, but reads of what is not here are refused"),
            }
        }
        server.settled();
        Ok(())
    }

    async fn resume(&self, key: &LowerKey, layers: &[Arc<LazyLayer>], server: &Server, users: &HashSet<u64>) {
        let mut pause = FIRST_PAUSE;
        for _ in 0..ATTEMPTS {
            match self.snapshots.lowers().resume(key, layers, server, users.clone()) {
                Ok(_) => return,
                Err(error) => tracing::warn!(lower = %key, %error, "not taken over yet; tried again"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        tracing::error!(lower = %key, "it could not be taken over, and stays mounted");
    }

    /// Whether this process keeps mounts alive and does nothing else, until a fresh one comes.
    #[must_use]
    pub fn rests(&self) -> bool {
        self.listener.is_none()
    }

    /// Opens and fetches images otherwise from now on. What is open stays so.
    pub fn change(&self, client: Client, open: OpenOptions, patience: Duration, ahead: Option<ahead::Settings>) {
        if let Some(ahead) = &ahead {
            self.content.change(ahead.complete.is_some());
        }
        self.snapshots.change(client, open, patience, ahead);
    }

    /// Its snapshots.
    #[must_use]
    pub fn snapshots(&self) -> &Snapshots {
        &self.snapshots
    }

    /// Answers containerd; where it rests, keeps mounts alive and does nothing else. Returns when somebody asked for the
    /// process to make way, or nothing is left to keep alive.
    ///
    /// # Errors
    /// Where the socket fails.
    pub async fn serve(&self) -> io::Result<()> {
        let Some(listener) = &self.listener else {
            self.rest().await;
            return Ok(());
        };
        let service = SnapshotsServer::new(Service::new(self.snapshots.clone(), self.content.clone()))
            .max_decoding_message_size(MESSAGE_BYTES)
            .max_encoding_message_size(MESSAGE_BYTES);
        tracing::info!(address = %listener.address().display(), "serving snapshots");
        let of_kubelet = self.image_service.as_ref();
        let elsewhere = of_kubelet.and_then(|service| Some((service, service.listen_path()?)));
        let here = of_kubelet.filter(|service| service.listen_path().is_none());
        let serving = tonic::transport::Server::builder()
            .add_service(service)
            .add_optional_service(here.map(ImageService::v1))
            .add_optional_service(here.map(ImageService::v1alpha2))
            .serve_with_incoming(listener::incoming(listener.socket()?));
        let serving_kubelet = async {
            match elsewhere {
                Some((service, path)) => {
                    tracing::info!(address = %path.display(), "serving kubelet's image service");
                    service.serve(listener::listen(path).map_err(io::Error::other)?).await
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            served = serving => served.map_err(io::Error::other),
            served = serving_kubelet => served,
            () = self.content.run() => Ok(()),
            () = idle::give_memory_back(self.snapshots.ahead()) => Ok(()),
            () = self.snapshots.discard_left() => Ok(()),
            () = self.control.asked(false, || self.report()) => Ok(()),
        }
    }

    /// Keeps mounts alive until a fresh process comes or nothing is left to keep alive.
    async fn report(&self) -> Vec<u8> {
        match self.snapshots.report().await {
            Ok(report) => serde_json::to_vec(&report).unwrap_or_default(),
            Err(error) => {
                tracing::warn!(%error, "what is known can't be told");
                Vec::new()
            }
        }
    }

    async fn rest(&self) {
        tokio::select! {
            () = self.control.asked(true, || self.report()) => {}
            () = self.snapshots.lowers().idle() => {}
        }
    }

    /// Ends without unmounting anything: what has mounts gets a successor, which serves reads and nothing else. The process
    /// must end at once, without dropping this.
    pub fn leave(&self) {
        if let Err(error) = File::create(self.root.join(STOPPED)) {
            tracing::warn!(%error, "a successor will serve all");
        }
        // Its keeper listens on, and nobody would answer.
        if let Some(listener) = self.listener.as_ref().filter(|_| !self.keeps_address) {
            listener.remove();
        }
    }

    /// Takes all lower directories down. Blocks.
    pub fn take_down(self) {
        self.snapshots.lowers().unmount_all();
        if let Some(listener) = self.listener.as_ref().filter(|_| !self.keeps_address) {
            listener.remove();
        }
    }
}

/// Makes the root directory, into which only its owner may look: a container's files have set-user-id bits and devices.
fn make_root(root: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(root)?;
    let metadata = root.metadata()?;
    if metadata.permissions().mode() & 0o022 != 0 {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "others can write to it"));
    }
    std::fs::set_permissions(root, std::fs::Permissions::from_mode(0o700))
}
