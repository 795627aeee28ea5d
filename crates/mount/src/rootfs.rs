//! The root file system of an image, at one directory: to be read, or to be written to as well.
//!
//! ```text
//!  read-only:   tree ──▶ mount point
//!  read-write:  tree ──▶ SCRATCH/lower ─────────┐
//!               SCRATCH/upper, SCRATCH/work ────┴─ overlayfs ──▶ mount point
//! ```
//!
//! The tree is that of all layers, merged: one lower directory, whatever their number. How it becomes visible is the
//! choice of an [`Engine`], see `lower`.
//!
//! The scratch directory (`loris-rootfs.XXXX`) is locked by the process that uses it; one that nobody locks belongs to
//! a process that was killed, and [`unmount_at`] removes it. What was put up is taken down in reverse order. A scratch
//! directory is never removed while anything is mounted below it.
//!
//! This is the only place that chooses how a tree becomes visible; see the crate's documentation.

use std::{
    fs, io,
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt, MetadataExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use loris_lazy::{LazyLayer, Store};
use rustix::{
    fs::{CWD, FlockOperation, Mode, OFlags},
    io::Errno,
};
use tokio::runtime::Handle;

use crate::{
    MountError, Special,
    engine::{self, Engine},
    erofs::Form,
    fuse::FuseOptions,
    mounts::{self, Unmounted},
    overlay::{OverlayMount, OverlayOptions, Upper},
    pager::{Pager, PagerOptions},
    probe::{Wish, probe},
    removal::remove_tree,
};

mod lower;
mod resume;

use lower::{Lower, Parts};
pub use resume::{Devices, Server};

/// How the names of scratch directories begin.
const SCRATCH: &str = "loris-rootfs.";

/// The directory in a scratch directory where the tree is, below an overlay.
const LOWER: &str = "lower";

/// How long a process that was killed may take to be gone.
const DYING: Duration = Duration::from_secs(5);

/// Whether, and where to, a root file system can be written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Access {
    /// It cannot.
    ReadOnly,
    /// Changes are thrown away when it is unmounted.
    Discard,
    /// Changes are kept in `upper` in this directory (beside it, `work` is overlayfs' own) and are there again when the
    /// same image is mounted over it. One mount at a time.
    Keep(PathBuf),
}

/// What fills data files while the kernel reads them, and whether that outlives this process.
#[derive(Clone, Debug)]
pub enum Paging {
    /// Nothing: [`Engine::Fanotify`] is not used.
    None,
    /// A pager of the root file system's own, with a keeper of its own; with [`Engine::ErofsFuse`] a keeper of its own,
    /// where [`OnDeath`](crate::pager::OnDeath) asks for a successor.
    Own(PagerOptions),
    /// A pager that serves others too.
    Shared(Arc<Pager>),
}

/// How to assemble a root file system.
#[derive(Clone, Debug)]
pub struct RootFsOptions {
    /// Where; without, in the scratch directory.
    pub mountpoint: Option<PathBuf>,
    /// Whether it can be written to. What is not [`Access::ReadOnly`] needs the right to mount.
    pub access: Access,
    /// Where to make the scratch directory. Must be on a file system that overlayfs takes as upper directory (not on an
    /// overlay) where `access` is [`Access::Discard`].
    pub scratch: PathBuf,
    /// The engine; `None` for the best that works here, see [`engine::probe`].
    pub engine: Option<Engine>,
    /// What fills data files under [`Engine::Fanotify`].
    pub pager: Paging,
    /// The store that the layers are kept in, and bootstraps beside them.
    pub store: Store,
    /// What of its special files is special.
    pub special: Special,
    /// What is shown of the layers.
    pub form: Form,
    /// How to serve what is served over FUSE.
    pub fuse: FuseOptions,
}

impl RootFsOptions {
    /// Read-only, in a scratch directory below the system's directory for temporary files, by the best engine.
    #[must_use]
    pub fn read_only(store: &Store) -> Self {
        Self {
            mountpoint: None,
            access: Access::ReadOnly,
            scratch: std::env::temp_dir(),
            engine: None,
            pager: Paging::None,
            store: store.clone(),
            special: Special::default(),
            form: Form::Merged,
            fuse: FuseOptions::default(),
        }
    }
}

/// A root file system that is mounted. Dropping it takes everything down.
#[derive(Debug)]
pub struct RootFs {
    path: PathBuf,
    /// Uppermost first: the order in which they are taken down.
    overlay: Option<OverlayMount>,
    lower: Option<Lower>,
    scratch: Option<Scratch>,
}

impl RootFs {
    /// Mounts the layers of an image, the lowest first; or one layer, as a lower directory for overlayfs. Missing content is fetched on `runtime`. On return it is live.
    /// Blocks for some system calls, and for the processor where the tree has to be built; never for the network.
    ///
    /// # Errors
    /// See [`MountError`]: nothing is left mounted, and no directory left behind, then.
    pub fn assemble(layers: &[Arc<LazyLayer>], options: &RootFsOptions, runtime: &Handle) -> Result<Self, MountError> {
        let wish = if options.access == Access::ReadOnly { Wish::ReadOnly } else { Wish::ReadWrite };
        let engines = candidates(options, wish)?;
        let scratch = match (&options.mountpoint, &options.access) {
            (Some(_), Access::ReadOnly) => None,
            _ => Some(Scratch::create(&options.scratch)?),
        };
        let path = match (&options.mountpoint, &scratch) {
            (Some(mountpoint), _) => mounts::check_mountpoint(mountpoint)?,
            (None, Some(scratch)) => scratch.directory("rootfs")?,
            (None, None) => unreachable!("a mount without a mount point of its own has a scratch directory"),
        };
        // From here on, an early return drops what was put up so far, uppermost first.
        let mut rootfs = Self { path, overlay: None, lower: None, scratch };
        let base = match (&options.access, &rootfs.scratch) {
            (Access::Keep(base), _) => Some(base.clone()),
            (Access::Discard, Some(scratch)) => Some(scratch.path().to_owned()),
            _ => None,
        };
        let lower_at = match (&base, &rootfs.scratch) {
            (Some(_), Some(scratch)) => scratch.directory(LOWER)?,
            _ => rootfs.path.clone(),
        };
        let parts = Parts {
            layers,
            store: &options.store,
            pager: &options.pager,
            shown_at: &rootfs.path,
            special: options.special,
            form: options.form,
            fuse: &FuseOptions { special: options.special, ..options.fuse.clone() },
            runtime,
        };
        rootfs.lower = Some(Lower::mount(&engines, &parts, &lower_at)?);
        if let Some(base) = base {
            let overlay = OverlayOptions {
                upper: Some(upper_directory(&base, &lower_at)?),
                lower: vec![lower_at],
                user_xattrs: in_user_namespace(),
                volatile: options.access == Access::Discard,
                special: options.special,
            };
            rootfs.overlay = Some(OverlayMount::mount(&overlay, &rootfs.path)?);
        }
        Ok(rootfs)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Which engine shows its tree.
    #[must_use]
    pub fn engine(&self) -> Engine {
        self.lower.as_ref().map_or(Engine::Fuse, Lower::engine)
    }

    /// Waits until somebody else has taken it down, as [`unmount_at`] does, or its uppermost part, as `umount(8)` does. It
    /// should be dropped then.
    pub async fn ended(&self) {
        let overlay = async {
            match &self.overlay {
                Some(overlay) => overlay.ended().await,
                None => std::future::pending().await,
            }
        };
        if let Some(lower) = &self.lower {
            tokio::select! {
                () = lower.ended() => {}
                () = overlay => {}
            }
        }
    }

    /// Takes everything down, in reverse order; what is in use is detached. Blocks for at most a second.
    ///
    /// # Errors
    /// The first error; the rest is still tried.
    pub fn unmount(mut self) -> Result<Unmounted, MountError> {
        self.take_down()
    }

    fn take_down(&mut self) -> Result<Unmounted, MountError> {
        let overlay = self.overlay.take().map_or(Ok(Unmounted::Absent), OverlayMount::unmount);
        let lower = self.lower.take().map_or(Ok(Unmounted::Absent), Lower::unmount);
        let scratch = self.scratch.take().map_or(Ok(()), Scratch::remove);
        let (overlay, lower) = (overlay?, lower?);
        scratch?;
        let detached = [overlay, lower].contains(&Unmounted::Detached);
        let absent = [overlay, lower] == [Unmounted::Absent; 2];
        Ok(match (detached, absent) {
            (true, _) => Unmounted::Detached,
            (_, true) => Unmounted::Absent,
            _ => Unmounted::Whole,
        })
    }
}

impl Drop for RootFs {
    fn drop(&mut self) {
        if let Err(error) = self.take_down() {
            tracing::warn!(%error, "a root file system was not taken down whole");
        }
    }
}

/// Takes down the root file system at a directory, whichever process of this machine put it up, also where that process
/// was killed. A process that is alive is told by [`RootFs::ended`] and removes its scratch directory itself.
///
/// # Errors
/// [`MountError::NotOurs`] where nothing of ours stands there; [`MountError::Unmount`] where the kernel refuses.
pub fn unmount_at(mountpoint: &Path) -> Result<Unmounted, MountError> {
    unmount_with(mountpoint, Duration::ZERO)
}

/// Does what [`unmount_at`] does, where the process that put it up was killed. The last of it may still be going: a
/// descriptor that is closed before the one which locks the scratch directory can take the kernel milliseconds.
pub(crate) fn unmount_of_the_dead(mountpoint: &Path) -> Result<Unmounted, MountError> {
    unmount_with(mountpoint, DYING)
}

/// Whether a mount that is to be found at a directory is up and of use: the lower part of a root file system whose
/// overlay is gone is not.
pub(crate) fn is_up(mountpoint: &Path) -> bool {
    let Ok(mounts) = mounts::list() else { return false };
    let Some(mount) = mounts.iter().rfind(|mount| mount.mountpoint == mountpoint) else { return false };
    let is_lower = mountpoint.ends_with(LOWER) && mountpoint.parent().is_some_and(is_scratch);
    let has_overlay = || mounts.iter().any(|mount| mount.is_loris() && mount.lower_directories() == [mountpoint]);
    mount.is_loris() && (!is_lower || has_overlay())
}

fn unmount_with(mountpoint: &Path, patience: Duration) -> Result<Unmounted, MountError> {
    let not_ours = || MountError::NotOurs { path: mountpoint.to_owned() };
    let mount = mounts::find(mountpoint)?.filter(mounts::MountInfo::is_loris).ok_or_else(not_ours)?;
    let mut unmounted = mounts::unmount(&mount.mountpoint)?;
    let mut beside = vec![mount.mountpoint.clone()];
    for lower in mount.lower_directories() {
        if mounts::find(&lower)?.is_some_and(|mount| mount.is_loris())
            && mounts::unmount(&lower)? == Unmounted::Detached
        {
            unmounted = Unmounted::Detached;
        }
        beside.push(lower);
    }
    for directory in beside.iter().filter_map(|path| path.parent()).filter(|path| is_scratch(path)) {
        let end = Instant::now() + patience;
        loop {
            match lock(directory) {
                Ok(Some(lock)) => {
                    remove(directory)?;
                    drop(lock);
                    break;
                }
                Ok(None) if Instant::now() < end => std::thread::sleep(Duration::from_millis(5)),
                _ => break,
            }
        }
    }
    Ok(unmounted)
}

/// Returns the engines to try, the best first.
fn candidates(options: &RootFsOptions, wish: Wish) -> Result<Vec<Engine>, MountError> {
    let abilities = probe();
    let unable = |missing: Vec<String>| Err(MountError::Unable { missing: missing.join("; ") });
    let missing = abilities.missing_for_overlay(wish);
    if !missing.is_empty() {
        return unable(missing.iter().map(ToString::to_string).collect());
    }
    if options.engine == Some(Engine::Fuse) {
        // Nothing else has to be looked at.
        let missing = abilities.missing_for(wish);
        if !missing.is_empty() {
            return unable(missing.iter().map(ToString::to_string).collect());
        }
        return Ok(vec![Engine::Fuse]);
    }
    let has_pager = !matches!(options.pager, Paging::None);
    if options.engine == Some(Engine::Fanotify) && !has_pager {
        return Err(MountError::Engine { engine: Engine::Fanotify, reason: "no pager was given".to_owned() });
    }
    let report = engine::probe(options.store.root());
    if let Some(engine) = options.engine {
        let ability = report.ability(engine);
        if !ability.is_present() {
            return Err(MountError::Engine { engine, reason: ability.to_string() });
        }
        return Ok(vec![engine]);
    }
    let mut usable = report.usable();
    usable.retain(|&engine| engine != Engine::Fanotify || has_pager);
    if usable.is_empty() {
        return unable(abilities.missing_for(wish).iter().map(ToString::to_string).collect());
    }
    for engine in Engine::ALL.into_iter().take_while(|engine| !usable.contains(engine)) {
        tracing::info!(%engine, reason = %report.ability(engine), "a better engine cannot be used");
    }
    Ok(usable)
}

/// Makes the directories that take changes. A fresh upper directory looks like the root of the tree, since its mode and
/// owner are those of the root that programs see.
fn upper_directory(base: &Path, lower: &Path) -> Result<Upper, MountError> {
    let failed = |path: &Path, source: io::Error| MountError::Scratch { path: path.to_owned(), source };
    let upper = Upper { upper: base.join("upper"), work: base.join("work") };
    let fresh = !upper.upper.exists();
    for directory in [base, &upper.upper, &upper.work] {
        fs::create_dir_all(directory).map_err(|error| failed(directory, error))?;
    }
    if fresh {
        let root = fs::metadata(lower).map_err(|error| failed(lower, error))?;
        std::os::unix::fs::chown(&upper.upper, Some(root.uid()), Some(root.gid()))
            .and_then(|()| fs::set_permissions(&upper.upper, root.permissions()))
            .map_err(|error| failed(&upper.upper, error))?;
    }
    Ok(upper)
}

/// Whether user numbers are mapped here, so that overlayfs cannot use `trusted.*` attributes.
fn in_user_namespace() -> bool {
    fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| !map.split_whitespace().eq(["0", "0", "4294967295"]))
}

/// A directory for one root file system, locked while it is in use. Dropping it removes it, unless something is mounted
/// below it.
#[derive(Debug)]
struct Scratch {
    path: PathBuf,
    _lock: OwnedFd,
    removed: bool,
}

impl Scratch {
    fn create(parent: &Path) -> Result<Self, MountError> {
        let failed = |source: io::Error| MountError::Scratch { path: parent.to_owned(), source };
        // Overlayfs is told the path, and it must mean the same after a change of the working directory.
        let parent = parent.canonicalize().map_err(failed)?;
        let directory = tempfile::Builder::new().prefix(SCRATCH).tempdir_in(parent).map_err(failed)?;
        let lock = lock(directory.path()).map_err(failed)?;
        let lock = lock.ok_or_else(|| failed(io::ErrorKind::ResourceBusy.into()))?;
        // Not left to `TempDir`, which would go on into what is still mounted.
        Ok(Self { path: directory.keep(), _lock: lock, removed: false })
    }

    /// Takes over that of a process that was killed.
    fn adopt(path: PathBuf) -> Result<Self, MountError> {
        let failed = |source: io::Error| MountError::Scratch { path: path.clone(), source };
        let lock = lock(&path).map_err(failed)?.ok_or_else(|| failed(io::ErrorKind::ResourceBusy.into()))?;
        Ok(Self { path, _lock: lock, removed: false })
    }

    fn path(&self) -> &Path {
        &self.path
    }

    /// Unlocks it and leaves it as it is.
    fn let_go(mut self) {
        self.removed = true;
    }

    fn directory(&self, name: &str) -> Result<PathBuf, MountError> {
        let path = self.path().join(name);
        let made = fs::DirBuilder::new().mode(0o755).create(&path);
        made.map(|()| path.clone()).map_err(|source| MountError::Scratch { path, source })
    }

    fn remove(mut self) -> Result<(), MountError> {
        self.removed = true;
        remove(&self.path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.removed
            && let Err(error) = remove(&self.path)
        {
            tracing::warn!(%error, "a directory is left behind");
        }
    }
}

/// Removes a scratch directory unless something is mounted below it, which might be somebody's files.
fn remove(directory: &Path) -> Result<(), MountError> {
    let failed = |source: io::Error| MountError::Scratch { path: directory.to_owned(), source };
    if mounts::list()?.iter().any(|mount| mount.mountpoint.starts_with(directory)) {
        return Err(failed(io::Error::new(io::ErrorKind::ResourceBusy, "something is still mounted in it")));
    }
    match remove_tree(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(error)),
        _ => Ok(()),
    }
}

fn is_scratch(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(SCRATCH.as_bytes()))
}

/// Locks a directory until the descriptor is closed; `None` where another process has locked it.
fn lock(directory: &Path) -> io::Result<Option<OwnedFd>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let descriptor = rustix::fs::openat(CWD, directory, flags, Mode::empty())?;
    match rustix::fs::flock(&descriptor, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(descriptor)),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_scratch_directory_is_locked_and_removed() {
        let parent = tempfile::tempdir().unwrap();
        let scratch = Scratch::create(parent.path()).unwrap();
        let path = scratch.path().to_owned();
        assert!(is_scratch(&path));
        assert!(!is_scratch(parent.path()));
        assert!(lock(&path).unwrap().is_none(), "locked");
        fs::write(scratch.directory("upper").unwrap().join("file"), "x").unwrap();
        scratch.remove().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn nothing_of_ours() {
        let directory = tempfile::tempdir().unwrap();
        for path in [directory.path(), Path::new("/"), &directory.path().join("missing")] {
            let error = unmount_at(path).unwrap_err();
            assert!(matches!(error, MountError::NotOurs { .. }), "{error}");
        }
    }
}
