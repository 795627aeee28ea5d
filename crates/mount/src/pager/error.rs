//! Why a pager cannot be started, or a layer not be watched.

use std::{io, path::PathBuf};

use loris_format::digest::Digest;
use loris_lazy::LazyLayer;

use crate::register::RegisterError;

/// An error of the pager. Nothing is mounted because of it that would read zeros.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PagerError {
    /// No fanotify group could be made.
    #[error("cannot ask the kernel to be told of reads (fanotify_init): {0}")]
    Group(#[source] io::Error),
    /// A data file could not be marked.
    #[error("cannot mark {}, the data file of layer {layer}: {source}", path.display())]
    Mark {
        /// The compressed blob.
        layer: Digest,
        /// The data file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A data file could not be looked at.
    #[error("cannot look at a data file: {0}")]
    DataFile(#[source] io::Error),
    /// The shared memory could not be made or taken over.
    #[error("cannot share memory with the keeper: {0}")]
    Journal(#[source] io::Error),
    /// Mounts could not be watched.
    #[error("cannot watch a mount (inotify): {0}")]
    Inotify(#[source] io::Error),
    /// More mounts than a pager has room for.
    #[error("{most} mounts are up already, which is as many as one process serves")]
    TooManyMounts {
        /// How many.
        most: usize,
    },
    /// The keeper could not be started or reached.
    #[error("cannot start or reach the keeper of mounts: {0}")]
    Keeper(#[source] io::Error),
    /// A connection of FUSE could not be taken over.
    #[error("cannot take over what serves devices: {0}")]
    Connection(#[source] io::Error),
    /// The register of mounts could not be written.
    #[error(transparent)]
    Register(#[from] RegisterError),
    /// Threads could not be started.
    #[error("cannot start the pager's threads: {0}")]
    Threads(#[source] io::Error),
}

impl PagerError {
    pub(super) fn mark(layer: &LazyLayer, source: io::Error) -> Self {
        Self::Mark { layer: *layer.digest(), path: layer.directory().join("data"), source }
    }
}
