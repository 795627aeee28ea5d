//! The tree of an image at a directory, by one of the engines.
//!
//! ```text
//!  fanotify     bootstrap, data files ─────────────▶ EROFS ──▶ directory     marked before, see crate::pager
//!  erofs-fuse   bootstrap, data files over FUSE ───▶ EROFS ──▶ directory
//!  erofs-loop   loop devices over the same ────────▶ EROFS ──▶ directory
//!  fuse         tree ──────────────────────────────▶ FUSE ───▶ directory
//! ```
//!
//! A layer that is complete and on the disk when it is mounted is read as the local file that it is, by all engines with
//! EROFS: no process of ours is on the way then. One that becomes so later is by fanotify alone: the kernel opens a device
//! once, when it mounts, and what it has opened over FUSE stays a file over FUSE (also with FUSE's own passthrough, which is
//! agreed upon when a file is opened).

use std::{
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use loris_lazy::{LazyLayer, Store};
use tokio::runtime::Handle;

use crate::{
    MountError, Special,
    engine::Engine,
    erofs::{DetachedErofs, ErofsMount, ErofsOptions, Form, cached_bootstrap},
    fsopen::Refusal,
    fuse::{
        FuseMount, FuseOptions,
        devices::{Device, DeviceMount},
    },
    mounts::{self, Unmounted},
    pager::{Pager, Watch},
};

use super::{
    Paging,
    resume::{Server, shown},
};

/// What a tree is made of.
pub(super) struct Parts<'a> {
    pub layers: &'a [Arc<LazyLayer>],
    pub store: &'a Store,
    pub pager: &'a Paging,
    /// Where users find the tree, or what is mounted over it.
    pub shown_at: &'a Path,
    pub special: Special,
    pub form: Form,
    pub fuse: &'a FuseOptions,
    pub runtime: &'a Handle,
}

impl Parts<'_> {
    fn erofs(&self) -> ErofsOptions {
        ErofsOptions { special: self.special, ..ErofsOptions::default() }
    }
}

/// A tree that is mounted. Dropping it unmounts it.
#[derive(Debug)]
pub(super) enum Lower {
    Fuse(FuseMount),
    /// In this order: the mount goes first.
    Fanotify(ErofsMount, Watch, Arc<Pager>),
    /// By either engine that is served over FUSE.
    ErofsFuse(ErofsMount, Option<Arc<DeviceMount>>, Engine),
}

impl Lower {
    /// Mounts by the first of the engines that can.
    pub(super) fn mount(engines: &[Engine], parts: &Parts<'_>, at: &Path) -> Result<Self, MountError> {
        let mut engines = engines.iter().copied().peekable();
        loop {
            let Some(engine) = engines.next() else {
                return Err(MountError::Unable { missing: "no engine can be used here".to_owned() });
            };
            let mounted = match engine {
                Engine::Fanotify => Self::fanotify(parts, at),
                Engine::ErofsFuse | Engine::ErofsLoop => Self::erofs_fuse(parts, at, engine),
                Engine::Fuse => Self::fuse(parts, at),
            };
            match (mounted, engines.peek()) {
                (Err(error), Some(next)) => {
                    tracing::info!(%engine, %error, %next, "a tree cannot be mounted by the better engine");
                }
                (Ok(lower), _) => {
                    tracing::debug!(%engine, at = %at.display(), "a tree is mounted");
                    return Ok(lower);
                }
                (Err(error), None) => return Err(error),
            }
        }
    }

    fn fuse(parts: &Parts<'_>, at: &Path) -> Result<Self, MountError> {
        let tree = Arc::new(parts.form.tree(parts.layers));
        FuseMount::mount(tree, parts.layers.to_vec(), at, parts.fuse, parts.runtime).map(Self::Fuse)
    }

    fn fanotify(parts: &Parts<'_>, at: &Path) -> Result<Self, MountError> {
        let pager = match parts.pager {
            Paging::Shared(pager) => Arc::clone(pager),
            Paging::Own(options) => Arc::new(Pager::start(options, parts.runtime)?),
            Paging::None => {
                let (engine, reason) = (Engine::Fanotify, "no pager was given".to_owned());
                return Err(MountError::Engine { engine, reason });
            }
        };
        let bootstrap = cached_bootstrap(parts.store, parts.layers, parts.form)?;
        // What was marked, whatever stands in the store under that name by now.
        let device = |layer: &Arc<LazyLayer>| format!("/proc/self/fd/{}", layer.data_file().as_raw_fd()).into();
        // Marked before the kernel opens them, and known to the pager before anybody can reach the mount.
        let mut watch = pager.watch(parts.layers)?;
        let devices: Vec<PathBuf> = parts.layers.iter().map(device).collect();
        let erofs = DetachedErofs::create(&bootstrap, &devices, &parts.erofs())?;
        watch.mounted(erofs.root())?;
        watch.attached(&shown(parts.shown_at, at))?;
        Ok(Self::Fanotify(erofs.attach(at)?, watch, pager))
    }

    /// Takes over a tree that is mounted.
    pub(super) fn resume(
        layers: &[Arc<LazyLayer>],
        server: &Server,
        at: &Path,
        shown_at: &Path,
    ) -> Result<Self, MountError> {
        let shown = shown(shown_at, at);
        match server {
            Server::Pager(pager) => {
                let mut watch = pager.watch(layers)?;
                let erofs = ErofsMount::adopt(at, |root| watch.mounted(root))?;
                watch.attached(&shown)?;
                Ok(Self::Fanotify(erofs, watch, Arc::clone(pager)))
            }
            Server::Devices(devices) => {
                devices.0.attached(&shown)?;
                let erofs = ErofsMount::adopt(at, |_| Ok::<_, MountError>(()))?;
                let is_looped =
                    mounts::find(at)?.is_some_and(|mount| mount.source.as_encoded_bytes().starts_with(b"/dev/"));
                let engine = if is_looped { Engine::ErofsLoop } else { Engine::ErofsFuse };
                Ok(Self::ErofsFuse(erofs, Some(Arc::clone(&devices.0)), engine))
            }
        }
    }

    fn erofs_fuse(parts: &Parts<'_>, at: &Path, engine: Engine) -> Result<Self, MountError> {
        let bootstrap = cached_bootstrap(parts.store, parts.layers, parts.form)?;
        let refused = |Refusal { source, detail }| MountError::Refused {
            what: "FUSE under EROFS",
            path: at.to_owned(),
            source,
            detail,
        };
        // All layers are devices, so that a successor finds them by their numbers; what is complete is not served.
        let complete: Vec<bool> = parts.layers.iter().map(|layer| layer.is_on_disk()).collect();
        let mut server = None;
        if complete.contains(&false) {
            let device = |layer: &Arc<LazyLayer>| Device::Layer(Arc::clone(layer), parts.runtime.clone());
            let devices = parts.layers.iter().map(device).collect();
            let mut served = DeviceMount::serve(devices, parts.fuse.threads()).map_err(refused)?;
            if let Paging::Own(options) = parts.pager {
                // It serves all the same, and what it serves fails by itself when it is gone.
                if let Err(error) = served.survive(parts.layers, options) {
                    tracing::warn!(%error, "the mount will not outlive this process");
                }
            }
            server = Some(served);
        }
        let path = |(number, layer): (usize, &Arc<LazyLayer>)| match &server {
            Some(server) if !complete[number] => server.path(number),
            _ => layer.directory().join("data"),
        };
        let devices: Vec<PathBuf> = parts.layers.iter().enumerate().map(path).collect();
        let erofs = DetachedErofs::create(
            &bootstrap,
            &devices,
            &ErofsOptions { loops: engine == Engine::ErofsLoop, ..parts.erofs() },
        )?
        .hear_goodbye()?;
        if let Some(server) = &mut server {
            server.seal();
            server.attached(&shown(parts.shown_at, at))?;
        }
        Ok(Self::ErofsFuse(erofs.attach(at)?, server.map(Arc::new), engine))
    }

    pub(super) fn engine(&self) -> Engine {
        match self {
            Self::Fuse(_) => Engine::Fuse,
            Self::Fanotify(..) => Engine::Fanotify,
            Self::ErofsFuse(_, _, engine) => *engine,
        }
    }

    /// Leaves it mounted, as if it had not been taken over.
    pub(super) fn let_go(self) {
        match self {
            Self::Fuse(mount) => std::mem::forget(mount),
            Self::Fanotify(mount, ..) | Self::ErofsFuse(mount, ..) => std::mem::forget(mount),
        }
    }

    /// Waits until the kernel has no use for it any more.
    pub(super) async fn ended(&self) {
        match self {
            Self::Fuse(mount) => mount.ended().await,
            Self::Fanotify(_, watch, _) => watch.ended().await,
            // The devices of one that was taken over are all that tells.
            Self::ErofsFuse(mount, Some(server), _) => tokio::select! {
                () = mount.ended() => {}
                () = server.ended() => {}
            },
            Self::ErofsFuse(mount, None, _) => mount.ended().await,
        }
    }

    /// Unmounts it; where it is in use, it is detached, and reads of content that is not here fail from then on.
    pub(super) fn unmount(self) -> Result<Unmounted, MountError> {
        match self {
            Self::Fuse(mount) => mount.unmount(),
            // Where it is still in use, the pager or its keeper refuses what is not here until it is not.
            Self::Fanotify(mount, watch, pager) => match mount.unmount() {
                Ok(unmounted) => {
                    // The kernel's word on it must have been heard before the keeper is told whether there is anything
                    // left to keep.
                    if unmounted != Unmounted::Detached {
                        watch.is_gone();
                    }
                    drop((watch, pager));
                    Ok(unmounted)
                }
                Err(error) => {
                    // It stays mounted. So this must look like a death to the keeper, when this process ends.
                    std::mem::forget((watch, pager));
                    Err(error)
                }
            },
            Self::ErofsFuse(mount, server, _) => match (mount.unmount(), server) {
                (Ok(unmounted), server) => {
                    if let Some(server) = server {
                        server.stop(unmounted == Unmounted::Whole);
                    }
                    Ok(unmounted)
                }
                (Err(error), server) => {
                    // As above: what stays mounted goes on being served, here or by a successor.
                    std::mem::forget(server);
                    Err(error)
                }
            },
        }
    }
}
