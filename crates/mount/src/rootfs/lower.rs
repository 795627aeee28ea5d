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
    path::{Path, PathBuf},
    sync::Arc,
};

use loris_format::tree::Tree;
use loris_lazy::{LazyLayer, Store};
use tokio::runtime::Handle;

use crate::{
    MountError,
    engine::Engine,
    erofs::{DetachedErofs, ErofsMount, ErofsOptions, Form, cached_bootstrap},
    fsopen::Refusal,
    fuse::{
        FuseMount, FuseOptions,
        devices::{Device, DeviceMount},
    },
    mounts::Unmounted,
};

/// What a tree is made of.
pub(super) struct Parts<'a> {
    pub layers: &'a [Arc<LazyLayer>],
    pub store: &'a Store,
    pub fuse: &'a FuseOptions,
    pub runtime: &'a Handle,
}

/// A tree that is mounted. Dropping it unmounts it.
#[derive(Debug)]
pub(super) enum Lower {
    Fuse(FuseMount),
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
                Engine::Fanotify => Err(MountError::Engine { engine, reason: "it has no pager".to_owned() }),
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
        let erofs = DetachedErofs::create(&bootstrap, &devices, &ErofsOptions::default())?;
        if let Some(server) = &mut server {
            server.seal();
        }
        Ok(Self::ErofsFuse(erofs.attach(at)?, server))
    }

    pub(super) fn engine(&self) -> Engine {
        match self {
            Self::Fuse(_) => Engine::Fuse,
            Self::ErofsFuse(..) => Engine::ErofsFuse,
        }
    }

    /// Waits until the kernel has no use for it any more.
    pub(super) async fn ended(&self) {
        match self {
            Self::Fuse(mount) => mount.ended().await,
            Self::ErofsFuse(mount, _) => mount.ended().await,
        }
    }

    /// Unmounts it; where it is in use, it is detached, and reads of content that is not here fail from then on.
    pub(super) fn unmount(self) -> Result<Unmounted, MountError> {
        match self {
            Self::Fuse(mount) => mount.unmount(),
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
