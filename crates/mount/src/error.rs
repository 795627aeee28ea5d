//! What can go wrong while mounting and unmounting, with what to do about it.

use std::{io, path::PathBuf};

use crate::engine::Engine;

/// An error of mounting or unmounting. Messages are fragments which fit behind "failed to mount: ".
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MountError {
    /// The directory to mount at cannot be used.
    #[error("mount point {}: {source}", path.display())]
    MountPoint {
        /// The directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The place to mount at is no directory.
    #[error("mount point {} is not a directory", path.display())]
    NotADirectory {
        /// The place.
        path: PathBuf,
    },
    /// A mount stands there whose server has ended.
    #[error("mount point {}: a FUSE mount stands there whose server has ended; detach it with `{remedy}`", path.display())]
    DeadMount {
        /// The directory.
        path: PathBuf,
        /// A command that detaches it.
        remedy: String,
    },
    /// A mount of ours stands there already.
    #[error("mount point {}: already in use by a mount of loris; unmount it with `loris umount`", path.display())]
    AlreadyMounted {
        /// The directory.
        path: PathBuf,
    },
    /// No mount of ours stands there.
    #[error("{} is not a mount of loris", path.display())]
    NotOurs {
        /// The directory.
        path: PathBuf,
    },
    /// `/dev/fuse` cannot be opened.
    #[error("cannot open /dev/fuse: {source}; {remedy}")]
    FuseDevice {
        /// Why not.
        source: io::Error,
        /// What to do.
        remedy: &'static str,
    },
    /// The program that mounts for users without privileges is missing.
    #[error("fusermount3 is not installed, and mounting FUSE without it takes root; `apt install fuse3` installs it")]
    FusermountMissing,
    /// `fusermount3` refused.
    #[error("fusermount3 refused to mount at {}: {message}", path.display())]
    Fusermount {
        /// The directory.
        path: PathBuf,
        /// What it said.
        message: String,
    },
    /// The kernel refused to mount.
    #[error("cannot mount {what} at {}: {source}{detail}", path.display())]
    Refused {
        /// The kind of file system.
        what: &'static str,
        /// The directory.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
        /// What the kernel logged and what may help: empty, or beginning with a separator.
        detail: String,
    },
    /// The kernel and this process did not come to an agreement about the protocol.
    #[error("FUSE mount at {}: handshake with the kernel: {source}", path.display())]
    Handshake {
        /// The directory.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// A tree refers to a layer that was not given. A mistake of the caller.
    #[error("the tree refers to layer {layer}, but only {layers} layers were given")]
    LayerMissing {
        /// The layer's number.
        layer: u32,
        /// How many there are.
        layers: usize,
    },
    /// The EROFS image without content that shows an image cannot be written.
    #[error("bootstrap {}: {reason}", path.display())]
    Bootstrap {
        /// Where it should be.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// An engine was asked for by name that can't be used here.
    #[error("the engine {engine} can't be used here: {reason}")]
    Engine {
        /// The engine.
        engine: Engine,
        /// Why not, and what to do.
        reason: String,
    },
    /// What fills data files while they are mounted cannot do so.
    #[error(transparent)]
    Pager(#[from] crate::pager::PagerError),
    /// The directories of an overlay cannot be combined.
    #[error("overlay at {}: {reason}", path.display())]
    Overlay {
        /// The directory.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// A directory that a root file system needs for itself cannot be made or removed.
    #[error("directory {}: {source}", path.display())]
    Scratch {
        /// The directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A mount cannot be taken away.
    #[error("cannot unmount {}: {source}", path.display())]
    Unmount {
        /// The directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// This machine lacks something; see [`crate::probe`].
    #[error("{missing}")]
    Unable {
        /// All that is missing, each with its remedy.
        missing: String,
    },
    /// The kernel's list of mounts cannot be read.
    #[error("cannot read /proc/self/mountinfo: {source}")]
    MountInfo {
        /// Why not.
        source: io::Error,
    },
}
