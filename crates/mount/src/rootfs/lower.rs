//! The tree of an image at a directory, by one of the engines.
//!
//! ```text
//!  fanotify     bootstrap, data files ─────────────▶ EROFS ──▶ directory     marked before, see crate::pager
//!  erofs-fuse   bootstrap, data files over FUSE ───▶ EROFS ──▶ directory
//!  fuse         tree ──────────────────────────────▶ FUSE ───▶ directory
//! ```
//!
//! A layer that is complete is read as the local file that it is, by both engines with EROFS: no process of ours is on
//! the way then.

use std::{
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use loris_format::tree::Tree;
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
    mounts::Unmounted,
    pager::{Pager, Watch},
};

use super::{Paging, resume::shown};

/// What a tree is made of.
pub(super) struct Parts<'a> {
    pub layers: &'a [Arc<LazyLayer>],
    pub store: &'a Store,
    pub pager: &'a Paging,
    /// Where users find the tree, or what is mounted over it.
    pub shown_at: &'a Path,
    pub special: Special,
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
    ErofsFuse(ErofsMount, Option<DeviceMount>),
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
                Engine::ErofsFuse => Self::erofs_fuse(parts, at),
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
        let indexes: Vec<_> = parts.layers.iter().map(|layer| layer.index()).collect();
        let tree = Arc::new(Tree::merged(&indexes));
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
        let bootstrap = cached_bootstrap(parts.store, parts.layers, Form::Merged)?;
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
        pager: Arc<Pager>,
        at: &Path,
        shown_at: &Path,
    ) -> Result<Self, MountError> {
        let mut watch = pager.watch(layers)?;
        let erofs = ErofsMount::adopt(at, |root| watch.mounted(root))?;
        watch.attached(&shown(shown_at, at))?;
        Ok(Self::Fanotify(erofs, watch, pager))
    }

    fn erofs_fuse(parts: &Parts<'_>, at: &Path) -> Result<Self, MountError> {
        let bootstrap = cached_bootstrap(parts.store, parts.layers, Form::Merged)?;
        enum Way {
            Local(PathBuf),
            Served(usize),
        }
        let mut ways = Vec::new();
        let mut served = Vec::new();
        for layer in parts.layers {
            if layer.is_complete() {
                ways.push(Way::Local(layer.directory().join("data")));
            } else {
                ways.push(Way::Served(served.len()));
                served.push(Device::Layer(Arc::clone(layer), parts.runtime.clone()));
            }
        }
        let refused = |Refusal { source, detail }| MountError::Refused {
            what: "FUSE under EROFS",
            path: at.to_owned(),
            source,
            detail,
        };
        let mut server = match served.as_slice() {
            [] => None,
            _ => Some(DeviceMount::serve(served, parts.fuse.threads()).map_err(refused)?),
        };
        let path = |way| match (way, &server) {
            (Way::Local(path), _) => path,
            (Way::Served(number), Some(server)) => server.path(number),
            (Way::Served(_), None) => unreachable!("what is served has a server"),
        };
        let devices: Vec<PathBuf> = ways.into_iter().map(path).collect();
        let erofs = DetachedErofs::create(&bootstrap, &devices, &parts.erofs())?.hear_goodbye()?;
        if let Some(server) = &mut server {
            server.seal();
        }
        Ok(Self::ErofsFuse(erofs.attach(at)?, server))
    }

    pub(super) fn engine(&self) -> Engine {
        match self {
            Self::Fuse(_) => Engine::Fuse,
            Self::Fanotify(..) => Engine::Fanotify,
            Self::ErofsFuse(..) => Engine::ErofsFuse,
        }
    }

    /// Waits until the kernel has no use for it any more.
    pub(super) async fn ended(&self) {
        match self {
            Self::Fuse(mount) => mount.ended().await,
            Self::Fanotify(_, watch, _) => watch.ended().await,
            Self::ErofsFuse(mount, _) => mount.ended().await,
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
            Self::ErofsFuse(mount, server) => {
                let unmounted = mount.unmount()?;
                if let Some(mut server) = server {
                    server.stop(unmounted == Unmounted::Whole);
                }
                Ok(unmounted)
            }
        }
    }
}
