//! EROFS over local files: the kernel reads a tree by itself.
//!
//! A *bootstrap* holds all of a tree but the content of its files; where content stands, it says by the number of a
//! device and a place there. The devices are plain files: the data files of layers, in the order of their numbers. So one
//! mount shows any number of layers, and looks at nothing but the bootstrap until content is read.
//!
//! The kernel mounts plain files from 6.12 on (`CONFIG_EROFS_FS_BACKED_BY_FILE`); before, and where
//! [asked for](ErofsOptions::loops), it is given a loop device for each. Those read around the hook by which the
//! [pager](crate::pager) hears of what is missing, so that it never mounts by them.
//!
//! What this module must not know: who fills the devices, and when. Whoever mounts over files that are not whole must
//! see to it that reads of the rest wait or fail; EROFS itself would show zeros.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{OFlags, inotify},
    mount::MountAttrFlags,
};
use tokio::io::{Interest, unix::AsyncFd};

use crate::{
    MountError, Special,
    fsopen::{self, Context, Refusal, STRING_BYTES},
    loop_device::LoopDevice,
    mounts::{self, OwnMount, Unmounted},
};

mod bootstrap;

pub use bootstrap::{Form, cached_bootstrap};

/// How to mount.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct ErofsOptions {
    /// Read devices past their own page cache, so that content is not held twice. Takes Linux 6.15.
    pub direct: bool,
    /// What of its special files is special.
    pub special: Special,
    /// Mount loop devices over the files, and not the files. They go with the mount.
    pub loops: bool,
}

/// An EROFS that is mounted. Dropping it unmounts it.
#[derive(Debug)]
pub struct ErofsMount {
    mount: OwnMount,
    goodbye: Option<Goodbye>,
    gone: bool,
}

/// An EROFS that stands nowhere yet: it can be reached through its descriptor alone, and goes with it.
#[derive(Debug)]
pub struct DetachedErofs {
    root: OwnedFd,
    goodbye: Option<Goodbye>,
}

impl DetachedErofs {
    /// Makes the file system of a bootstrap, read-only. `devices[n]` is
    /// what the bootstrap means by device `n + 1`; the kernel opens them all now, and never again. Blocks for some system
    /// calls.
    ///
    /// The bootstrap's path is shown in the kernel's list of mounts (or leads there by a loop device), by which [`mounts::MountInfo::is_loris`] knows it.
    ///
    /// # Errors
    /// See [`MountError`].
    pub fn create(bootstrap: &Path, devices: &[PathBuf], options: &ErofsOptions) -> Result<Self, MountError> {
        let root = create(bootstrap, devices, options).map_err(|refusal| refused(bootstrap, refusal))?;
        Ok(Self { root, goodbye: None })
    }

    /// Lets [`ErofsMount::ended`] hear of its end. It takes one of the few inotify instances that a user has: whoever has a
    /// [`Watch`](crate::pager::Watch) of the mount hears of it anyway.
    ///
    /// # Errors
    /// See [`MountError`].
    pub fn hear_goodbye(mut self) -> Result<Self, MountError> {
        let failed = |error| refused(Path::new("/"), Refusal::plain(error));
        self.goodbye = Some(Goodbye::new(&self.root).map_err(failed)?);
        Ok(self)
    }

    /// Returns its root.
    #[must_use]
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Puts it at a directory.
    ///
    /// # Errors
    /// See [`MountError`]: nothing is mounted then.
    pub fn attach(self, mountpoint: &Path) -> Result<ErofsMount, MountError> {
        let mountpoint = mounts::check_mountpoint(mountpoint)?;
        let Self { root, goodbye } = self;
        fsopen::attach(&root, &mountpoint).map_err(|error| refused(&mountpoint, Refusal::plain(error)))?;
        // The descriptor would keep the mount in use.
        drop(root);
        Ok(ErofsMount { mount: OwnMount::note(&mountpoint)?, goodbye, gone: false })
    }
}

fn refused(path: &Path, Refusal { source, detail }: Refusal) -> MountError {
    MountError::Refused { what: "EROFS", path: path.to_owned(), source, detail }
}

impl ErofsMount {
    /// Mounts a bootstrap at a directory: [`DetachedErofs::create`] and [`DetachedErofs::attach`] at once.
    ///
    /// # Errors
    /// See [`MountError`]: nothing is mounted then.
    pub fn mount(
        bootstrap: &Path,
        devices: &[PathBuf],
        mountpoint: &Path,
        options: &ErofsOptions,
    ) -> Result<Self, MountError> {
        DetachedErofs::create(bootstrap, devices, options)?.hear_goodbye()?.attach(mountpoint)
    }

    /// Takes over the EROFS at a directory, which another process mounted. `with_root` is given its root before anything
    /// here could unmount it.
    pub(crate) fn adopt<E: Into<MountError>>(
        mountpoint: &Path,
        with_root: impl FnOnce(BorrowedFd<'_>) -> Result<(), E>,
    ) -> Result<Self, MountError> {
        let failed = |error: io::Error| refused(mountpoint, Refusal::plain(error));
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root =
            rustix::fs::open(mountpoint, flags, rustix::fs::Mode::empty()).map_err(|errno| failed(errno.into()))?;
        with_root(root.as_fd()).map_err(Into::into)?;
        drop(root);
        Ok(Self { mount: OwnMount::note(mountpoint)?, goodbye: None, gone: false })
    }

    /// Where it is mounted.
    #[must_use]
    pub fn mountpoint(&self) -> &Path {
        self.mount.mountpoint()
    }

    /// Waits until the kernel has no use for it any more, where that [is heard of](DetachedErofs::hear_goodbye): somebody has unmounted it, and nobody has a file of it open.
    pub async fn ended(&self) {
        match &self.goodbye {
            Some(goodbye) => goodbye.said().await,
            None => std::future::pending().await,
        }
    }

    /// Unmounts it: as usual, or where it is in use, by detaching it.
    ///
    /// # Errors
    /// [`MountError::Unmount`] where the kernel refuses.
    pub fn unmount(mut self) -> Result<Unmounted, MountError> {
        self.gone = true;
        self.mount.unmount()
    }
}

impl Drop for ErofsMount {
    fn drop(&mut self) {
        if !self.gone
            && let Err(error) = self.mount.unmount()
        {
            tracing::warn!(%error, "an EROFS stays mounted");
        }
    }
}

/// Tells when a file system is shut down. An inotify watch ends with the file system, and does not keep it in use.
#[derive(Debug)]
pub(crate) struct Goodbye(OwnedFd);

impl Goodbye {
    fn new(root: &OwnedFd) -> io::Result<Self> {
        Self::of(Path::new(&format!("/proc/self/fd/{}", root.as_raw_fd())))
    }

    /// Of the file system whose root is at a path.
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        let inotify = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        // The root is never deleted: there is nothing to be read before the end.
        inotify::add_watch(&inotify, path, inotify::WatchFlags::DELETE_SELF)?;
        Ok(Self(inotify))
    }

    pub(crate) async fn said(&self) {
        // SAFETY: the descriptor is borrowed from `self`, which keeps it open for longer than the watch on it lives.
        let inotify = unsafe { AsyncFd::register_with_interest(self.0.as_fd(), Interest::READABLE) };
        // Where the runtime cannot watch a descriptor, nobody is told; whoever waits waits for signals too.
        match &inotify {
            Ok(inotify) => drop(inotify.readable().await),
            Err(_) => std::future::pending().await,
        }
    }
}

/// Makes a mount that stands nowhere yet.
pub(crate) fn create(source: &Path, devices: &[PathBuf], options: &ErofsOptions) -> Result<OwnedFd, Refusal> {
    let absolute = std::path::absolute(source).map_err(Refusal::plain)?;
    let text = absolute.as_os_str().as_bytes();
    if options.loops {
        return create_over_loops(&absolute, devices, options);
    }
    if text.len() > STRING_BYTES {
        // A shorter way to the file would be shown instead, and nobody would know the mount for ours.
        return Err(Refusal {
            source: io::ErrorKind::InvalidFilename.into(),
            detail: format!("; the path of a bootstrap must not be longer than {STRING_BYTES} bytes"),
        });
    }
    let context = Context::open("erofs")?;
    context.set("source", text)?;
    context.set_flag("ro")?;
    if options.direct {
        context.set_flag("directio")?;
    }
    // The kernel opens them when the file system is made: until then, descriptors that stand for long paths stay open.
    let mut open = Vec::new();
    for device in devices {
        let argument = short_path(device, &mut open)
            .map_err(|source| Refusal { source, detail: format!("; device {}", device.display()) })?;
        context.set("device", argument.as_os_str().as_bytes())?;
    }
    context.mount(MountAttrFlags::MOUNT_ATTR_RDONLY | options.special.attributes())
}

fn create_over_loops(source: &Path, devices: &[PathBuf], options: &ErofsOptions) -> Result<OwnedFd, Refusal> {
    let over = |file: &Path| {
        LoopDevice::over(file)
            .map_err(|source| Refusal { source, detail: format!("; loop device over {}", file.display()) })
    };
    let bootstrap = over(source)?;
    let devices = devices.iter().map(|device| over(device)).collect::<Result<Vec<_>, _>>()?;
    let context = Context::open("erofs")?;
    context.set("source", bootstrap.path().as_os_str().as_bytes())?;
    context.set_flag("ro")?;
    for device in &devices {
        context.set("device", device.path().as_os_str().as_bytes())?;
    }
    // From then on the kernel has them open.
    context.mount(MountAttrFlags::MOUNT_ATTR_RDONLY | options.special.attributes())
}

/// A path as `fsconfig` takes it: absolute, and not too long. A descriptor that it goes through is put into `open`.
fn short_path(path: &Path, open: &mut Vec<File>) -> io::Result<PathBuf> {
    let absolute = std::path::absolute(path)?;
    if absolute.as_os_str().len() <= STRING_BYTES {
        return Ok(absolute);
    }
    let flags = (OFlags::PATH | OFlags::CLOEXEC).bits().cast_signed();
    let file = File::options().read(true).custom_flags(flags).open(&absolute)?;
    let short = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    open.push(file);
    Ok(short)
}
