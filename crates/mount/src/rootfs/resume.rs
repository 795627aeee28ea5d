//! A root file system that outlived its process.
//!
//! Only [`Engine::Fanotify`](crate::engine::Engine::Fanotify) leaves one that can be gone on with: its readers wait.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use loris_lazy::LazyLayer;

use super::{Lower, RootFs, Scratch, is_scratch};
use crate::{
    MountError,
    mounts::{self, MountInfo},
    overlay::OverlayMount,
    pager::Pager,
};

impl RootFs {
    /// Takes over the root file system at a directory, whose process was killed, after its pager was
    /// [resumed](Pager::resume). `layers` are those that it was assembled of.
    ///
    /// `None` where it was unmounted meanwhile; somebody may still use it, see [`Pager::idle`].
    ///
    /// # Errors
    /// See [`MountError`]. What is mounted stays so.
    pub fn resume(mountpoint: &Path, layers: &[Arc<LazyLayer>], pager: Arc<Pager>) -> Result<Option<Self>, MountError> {
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
        let lower = Lower::resume(layers, pager, &lower_at, &path)?;
        // Last, since dropping it unmounts.
        let overlay = if lower_at == path { None } else { Some(OverlayMount::adopt(&path)?) };
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
