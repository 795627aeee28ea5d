//! A read-only tree over lazy layers, served by this process through FUSE.
//!
//! The tree never changes while it is mounted. So the kernel is told to keep what it was told for as long as it likes
//! (entries, also negative ones, attributes, link targets, listings, content), and to leave out the calls that say
//! nothing in such a tree (open, release, flush). What is cached never reaches this process again.
//!
//! ```text
//!  kernel ──▶ FUSE thread ──▶ tree: lookup, attributes, listings, xattrs        answered at once
//!                       ├───▶ content that is filled: pread of the data file    answered at once
//!                       └───▶ content that is not: a task of the runtime, ensure, pread, answer
//! ```
//!
//! No FUSE thread waits for the network. When the server dies, reads of what the kernel has not cached fail; they never
//! read zeros.
//!
//! What this module must not know: overlayfs, what the tree is for. The types of the FUSE crate stay in `protocol`.

use std::{
    path::Path,
    sync::{Arc, mpsc},
    time::Duration,
};

use loris_format::tree::Tree;
use loris_lazy::LazyLayer;
use tokio::{runtime::Handle, sync::watch};

use crate::{
    MountError, Special,
    mounts::{self, OwnMount, Unmounted},
};

mod attributes;
mod connection;
mod content;
pub(crate) mod devices;
pub(crate) mod fusermount;
mod protocol;

/// The device over which the kernel talks to us.
pub(crate) const DEVICE: &str = "/dev/fuse";

/// How long unmounting waits until the kernel has said good-bye. It takes microseconds, unless another mount (an
/// overlay that was detached) still uses the tree.
const GOODBYE: Duration = Duration::from_secs(1);

/// How long the kernel may keep what it was told: about for ever (136 years), since what we serve never changes.
const FOR_EVER: Duration = Duration::from_secs(u32::MAX as u64);
/// Most readahead requests that the kernel sends before it waits for answers. Its own bound is 12, which would let one
/// slow file hold up all others. Each waits as a small task.
const MAX_BACKGROUND: u16 = 512;
/// Largest answer to one read, in bytes: 256 pages, which is as much as the kernel allows by default.
const MAX_READ: u32 = 1 << 20;
/// Most fetches that are under way for one mount. The rest waits in line: each costs about 1 KiB, and there are at most
/// as many as the kernel's readahead requests ([`MAX_BACKGROUND`]) plus programs' threads that wait for a page.
const MAX_FETCHES: usize = 1024;

/// How to serve a tree.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct FuseOptions {
    /// Threads that answer the kernel; `None` for as many as there are processors, but at least 2 and at most 8.
    pub threads: Option<usize>,
    /// Let other users in, where this process may decide that: as root, or as `/etc/fuse.conf` allows.
    pub allow_other: bool,
    /// What of its special files is special, where root mounts it. Others never have special files.
    pub special: Special,
}

impl Default for FuseOptions {
    fn default() -> Self {
        Self { threads: None, allow_other: true, special: Special::default() }
    }
}

impl FuseOptions {
    pub(crate) fn threads(&self) -> usize {
        self.threads
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(2, |cores| cores.get().clamp(2, 8)))
            .max(1)
    }
}

/// A tree that is mounted. Dropping it unmounts it.
#[derive(Debug)]
pub struct FuseMount {
    mount: OwnMount,
    /// Set when nothing more is to be fetched.
    stop: watch::Sender<bool>,
    ended: watch::Receiver<bool>,
    /// Disconnected when the session has ended: for those who wait without a runtime.
    session: mpsc::Receiver<()>,
    gone: bool,
}

impl FuseMount {
    /// Mounts `tree` at a directory: as root by itself, else through `fusermount3` (without devices and set-uid then).
    /// Content that is missing is fetched by tasks on `runtime`, which must live as long as the mount. On return the
    /// mount is live. Blocks for a few system calls; never for the network.
    ///
    /// `layers[n]` is what the tree means by layer `n`.
    ///
    /// # Errors
    /// See [`MountError`]: nothing is mounted then.
    pub fn mount(
        tree: Arc<Tree>,
        layers: Vec<Arc<LazyLayer>>,
        mountpoint: &Path,
        options: &FuseOptions,
        runtime: &Handle,
    ) -> Result<Self, MountError> {
        let mountpoint = mounts::check_mountpoint(mountpoint)?;
        let (stop, stopped) = watch::channel(false);
        let served = Arc::new(content::Served::new(tree, layers, runtime.clone(), stopped)?);
        let device = connection::open(&mountpoint, options)?;
        let mount = OwnMount::note(&mountpoint)?;
        let serve = |source| MountError::Handshake { path: mountpoint.clone(), source };
        let started = protocol::handshake(served, device, options.threads()).and_then(start);
        match started {
            Ok((ended, session)) => Ok(Self { mount, stop, ended, session, gone: false }),
            Err(error) => {
                // The error at hand says more than a second one.
                let _ = mount.unmount();
                Err(serve(error))
            }
        }
    }

    /// Where it is mounted.
    #[must_use]
    pub fn mountpoint(&self) -> &Path {
        self.mount.mountpoint()
    }

    /// Waits until the session has ended because somebody else unmounted it. The mount should be dropped then.
    pub async fn ended(&self) {
        // An error means that the thread which serves has ended.
        let _ = self.ended.clone().wait_for(|ended| *ended).await;
    }

    /// Unmounts it. Where it is in use, it is detached: no path leads to it any more, reads that wait for content fail
    /// with `EIO`, and so does everything that is not here yet; what is here can be read by those who have it open,
    /// until they close it or this process ends. Blocks for at most a second.
    ///
    /// # Errors
    /// [`MountError::Unmount`] where the kernel refuses.
    pub fn unmount(mut self) -> Result<Unmounted, MountError> {
        self.take_down()
    }

    fn take_down(&mut self) -> Result<Unmounted, MountError> {
        self.gone = true;
        let unmounted = self.mount.unmount()?;
        if unmounted == Unmounted::Whole {
            // Nobody ever sends: this waits for the other end to go.
            if self.session.recv_timeout(GOODBYE) == Err(mpsc::RecvTimeoutError::Timeout) {
                tracing::debug!(mountpoint = %self.mountpoint().display(), "the tree is unmounted but still in use");
            }
        }
        self.stop.send_replace(true);
        Ok(unmounted)
    }
}

impl Drop for FuseMount {
    fn drop(&mut self) {
        if !self.gone
            && let Err(error) = self.take_down()
        {
            tracing::warn!(%error, "a tree stays mounted");
        }
    }
}

/// Runs a session on threads of its own.
fn start(
    session: impl FnOnce() -> std::io::Result<()> + Send + 'static,
) -> std::io::Result<(watch::Receiver<bool>, mpsc::Receiver<()>)> {
    let (ended, ended_later) = watch::channel(false);
    let (alive, session_alive) = mpsc::channel();
    std::thread::Builder::new().name("loris-fuse".to_owned()).spawn(move || {
        if let Err(error) = session() {
            tracing::warn!(%error, "a FUSE session ended early");
        }
        drop(alive);
        ended.send_replace(true);
    })?;
    Ok((ended_later, session_alive))
}
