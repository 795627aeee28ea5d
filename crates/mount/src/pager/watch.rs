//! Mounts that read watched files, until the kernel says that they are gone.
//!
//! A mount that is unmounted while in use is only out of sight: whoever has files of it open still reads. Its marks must
//! stay as long. inotify tells the moment: a watch on a file system's root is ended with `IN_UNMOUNT` when the
//! superblock is shut down, by whomever and however late.

use std::{
    collections::HashMap,
    ffi::CString,
    io,
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    time::Duration,
};

use loris_lazy::LazyLayer;
use rustix::fs::inotify;
use tokio::sync::watch;

use super::{
    Inner, PagerError, Shown,
    files::FileId,
    journal::{Journal, MOUNTS},
};

/// How long it may take the kernel to shut a superblock down after the last user has gone.
const GOODBYE: Duration = Duration::from_secs(1);

/// The mounts of one pager.
#[derive(Debug)]
pub(super) struct Mounts {
    inotify: OwnedFd,
    state: Mutex<HashMap<i32, Mounted>>,
}

#[derive(Debug)]
struct Mounted {
    gone: watch::Sender<bool>,
    /// Whether it is known which files it reads: of one that was taken over, not before it is found again.
    is_known: bool,
    /// What nobody holds any more, to be released when the mount is gone.
    left: Vec<FileId>,
}

impl Mounted {
    fn new(is_known: bool) -> Self {
        Self { gone: watch::Sender::new(false), is_known, left: Vec::new() }
    }
}

impl Mounts {
    pub(super) fn new() -> io::Result<Self> {
        let inotify = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        Ok(Self { inotify, state: Mutex::default() })
    }

    /// Takes over the mounts of an earlier process: those that are up still are in the journal.
    pub(super) fn attach(inotify: OwnedFd, journal: &Journal) -> Self {
        let up = journal.mounts().map(|mount| mount.load(Ordering::Acquire)).filter(|&watch| watch > 0);
        let state = up.map(|watch| (watch, Mounted::new(false))).collect();
        Self { inotify, state: Mutex::new(state) }
    }

    /// Whether a mount is up of which it is not known what it reads.
    pub(super) fn is_any_unknown(&self) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.values().any(|mounted| !mounted.is_known)
    }

    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }

    /// Waits until every mount that is up is gone.
    pub(super) async fn all_gone(&self) {
        loop {
            let next = {
                let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                state.values().next().map(|mounted| mounted.gone.subscribe())
            };
            let Some(mut next) = next else { return };
            // An error means that it was taken out of the table, which is the same.
            let _ = next.wait_for(|gone| *gone).await;
        }
    }

    /// Watches the mount whose root is at `root`. A mount that was taken over is known by the same number again.
    fn add(&self, journal: &Journal, root: &Path) -> Result<(i32, watch::Receiver<bool>), PagerError> {
        let path = CString::new(root.as_os_str().as_bytes()).map_err(|error| PagerError::Inotify(error.into()))?;
        // Under the lock, so that its end is not heard of before its beginning.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let watch = inotify::add_watch(&self.inotify, &path, inotify::WatchFlags::DELETE_SELF)
            .map_err(|errno| PagerError::Inotify(errno.into()))?;
        if let Some(mounted) = state.get_mut(&watch) {
            mounted.is_known = true;
            return Ok((watch, mounted.gone.subscribe()));
        }
        let free = journal.mounts().find(|mount| mount.load(Ordering::Relaxed) == 0);
        let free = free.ok_or(PagerError::TooManyMounts { most: MOUNTS })?;
        free.store(watch, Ordering::Release);
        let mounted = Mounted::new(true);
        let later = mounted.gone.subscribe();
        state.insert(watch, mounted);
        Ok((watch, later))
    }

    /// Reads what inotify has to say; returns files to be released.
    pub(super) fn take_gone(&self, journal: &Journal) -> Vec<FileId> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(self.inotify.as_fd(), &mut buffer);
        let mut released = Vec::new();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while let Ok(event) = reader.next() {
            if !event.events().intersects(inotify::ReadFlags::UNMOUNT | inotify::ReadFlags::IGNORED) {
                continue;
            }
            let Some(mounted) = state.remove(&event.wd()) else { continue };
            journal.forget_mount(event.wd());
            mounted.gone.send_replace(true);
            released.extend(mounted.left);
        }
        released
    }

    /// Leaves files to be released when a mount is gone; gives them back where it is gone already.
    fn leave(&self, watch: i32, files: Vec<FileId>) -> Option<Vec<FileId>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match state.get_mut(&watch) {
            Some(mounted) => {
                mounted.left.extend(files);
                None
            }
            None => Some(files),
        }
    }
}

/// Layers that are marked for one mount. Dropped, it gives the marks up: at once where nothing was mounted or the
/// mount is gone, else when the kernel says that it is.
#[derive(Debug)]
pub struct Watch {
    pager: Arc<Inner>,
    files: Vec<FileId>,
    mount: Option<(i32, watch::Receiver<bool>)>,
    mountpoints: Vec<PathBuf>,
}

impl Watch {
    pub(super) fn new(pager: Arc<Inner>) -> Self {
        Self { pager, files: Vec::new(), mount: None, mountpoints: Vec::new() }
    }

    pub(super) fn add(&mut self, layer: &Arc<LazyLayer>) -> Result<(), PagerError> {
        let id = self.pager.mark(layer)?;
        self.files.push(id);
        Ok(())
    }

    /// Tells what the layers are mounted as. Must be called with the root of the mount before anybody can reach it: with
    /// the descriptor that `fsmount(2)` gives; or after a restart, when it was told before.
    ///
    /// # Errors
    /// Where it cannot be watched. It must not be attached to a directory then.
    pub fn mounted(&mut self, root: BorrowedFd<'_>) -> Result<(), PagerError> {
        let path = format!("/proc/self/fd/{}", root.as_raw_fd());
        self.mount = Some(self.pager.mounts.add(&self.pager.journal, Path::new(&path))?);
        Ok(())
    }

    /// Notes at which directories the mount is to be found, the uppermost first, for those who have to take it down where
    /// this process was killed.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn attached(&mut self, mountpoints: &[PathBuf]) -> Result<(), PagerError> {
        for mountpoint in mountpoints {
            self.pager.register().add(mountpoint)?;
            self.mountpoints.push(mountpoint.clone());
        }
        if let Some((watch, _)) = self.mount
            && self.pager.outlives
        {
            let (files, mountpoints) = (self.files.clone(), self.mountpoints.clone());
            self.pager.shown().push(Shown { watch, files, mountpoints, is_whole: None });
            self.pager.note_whole();
        }
        Ok(())
    }

    /// Waits until the kernel has no use for the mount any more.
    pub async fn ended(&self) {
        if let Some((_, gone)) = &self.mount {
            let _ = gone.clone().wait_for(|gone| *gone).await;
        }
    }

    /// Says whether the kernel has no use for the mount any more, after waiting a moment for it.
    pub fn is_gone(&self) -> bool {
        let Some((_, gone)) = &self.mount else { return true };
        let start = std::time::Instant::now();
        while !*gone.borrow() {
            if start.elapsed() > GOODBYE {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let files = std::mem::take(&mut self.files);
        if let Some((watch, _)) = self.mount {
            self.pager.shown().retain(|shown| shown.watch != watch);
        }
        let files = match &self.mount {
            Some((watch, _)) => self.pager.mounts.leave(*watch, files),
            None => Some(files),
        };
        if let Some(files) = files {
            self.pager.release(&files);
        }
        for mountpoint in &self.mountpoints {
            if let Err(error) = self.pager.register().forget(mountpoint) {
                tracing::warn!(%error, "a mount that is gone stays registered");
            }
        }
    }
}
