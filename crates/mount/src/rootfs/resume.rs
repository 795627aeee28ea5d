//! A root file system that outlived its process.
//!
//! By the engines [`Fanotify`](crate::engine::Engine::Fanotify) and [`ErofsFuse`](crate::engine::Engine::ErofsFuse): their
//! readers wait meanwhile.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use loris_lazy::LazyLayer;
use tokio::runtime::Handle;

use super::{Lower, RootFs, Scratch, is_scratch};
use crate::{
    MountError,
    fuse::{FuseOptions, devices::DeviceMount},
    keeper::{Asking, Inherited},
    mounts::{self, MountInfo},
    overlay::OverlayMount,
    pager::{Pager, PagerError, PagerOptions},
};

/// What answers reads in the place of a process that was killed.
#[derive(Clone, Debug)]
pub enum Server {
    /// A pager.
    Pager(Arc<Pager>),
    /// Devices over FUSE.
    Devices(Devices),
}

/// Devices over FUSE that were taken over.
#[derive(Clone, Debug)]
pub struct Devices(pub(super) Arc<DeviceMount>);

impl Server {
    /// Goes on where a killed process was: from now on reads are answered. `layers` are those that it served, in the same
    /// order.
    ///
    /// # Errors
    /// See [`PagerError`]. The old keeper stays as it is then, and starts another successor when this process ends.
    pub fn resume(
        inherited: Inherited,
        layers: &[Arc<LazyLayer>],
        options: &PagerOptions,
        runtime: &Handle,
    ) -> Result<Self, PagerError> {
        match &inherited.asking {
            Asking::Events { .. } => {
                Pager::resume(inherited, layers, options, runtime).map(|pager| Self::Pager(Arc::new(pager)))
            }
            Asking::Requests { .. } => {
                let threads = FuseOptions::default().threads();
                let devices = DeviceMount::resume(inherited, layers, options, threads, runtime)?;
                Ok(Self::Devices(Devices(Arc::new(devices))))
            }
        }
    }

    /// What was taken over and is wanted has been [found again](RootFs::resume): what only other mounts of the process
    /// before this one read is given up when these are gone.
    pub fn settled(&self) {
        match self {
            Self::Pager(pager) => pager.settled(),
            // Its devices stay for as long as the connection.
            Self::Devices(_) => {}
        }
    }

    /// Waits until no mount is up, also none that is out of sight but in use.
    pub async fn idle(&self) {
        match self {
            Self::Pager(pager) => pager.idle().await,
            Self::Devices(devices) => devices.0.ended().await,
        }
    }
}

impl RootFs {
    /// Takes over the root file system at a directory, whose process was killed, after its reads were
    /// [answered again](Server::resume). `layers` are those that it was assembled of.
    ///
    /// `None` where it was unmounted meanwhile; somebody may still use it, see [`Server::idle`].
    ///
    /// # Errors
    /// See [`MountError`]. What is mounted stays so.
    pub fn resume(mountpoint: &Path, layers: &[Arc<LazyLayer>], server: &Server) -> Result<Option<Self>, MountError> {
        let Some(top) = mounts::find(mountpoint)?.filter(MountInfo::is_loris) else { return Ok(None) };
        let path = top.mountpoint.clone();
        let lower_at = match top.lower_directories().into_iter().next() {
            Some(lower) => match mounts::find(&lower)?.filter(MountInfo::is_loris) {
                Some(lower) => lower.mountpoint,
                None => return Ok(None),
            },
            None => path.clone(),
        };
        let scratch = [&lower_at, &path].into_iter().filter_map(|at| at.parent()).find(|parent| is_scratch(parent));
        let scratch = scratch.map(|scratch| Scratch::adopt(scratch.to_owned())).transpose()?;
        let lower = match Lower::resume(layers, server, &lower_at, &path) {
            Ok(lower) => lower,
            Err(error) => {
                if let Some(scratch) = scratch {
                    scratch.let_go();
                }
                return Err(error);
            }
        };
        // Dropping either unmounts it.
        let overlay = match lower_at == path {
            true => None,
            false => match OverlayMount::adopt(&path) {
                Ok(overlay) => Some(overlay),
                Err(error) => {
                    lower.let_go();
                    if let Some(scratch) = scratch {
                        scratch.let_go();
                    }
                    return Err(error);
                }
            },
        };
        Ok(Some(Self { path, overlay, lower: Some(lower), scratch }))
    }
}

/// The directories that lead to a root file system, uppermost first.
pub(super) fn shown(path: &Path, lower_at: &Path) -> Vec<PathBuf> {
    let mut shown = vec![path.to_owned()];
    if lower_at != path {
        shown.push(lower_at.to_owned());
    }
    shown
}
