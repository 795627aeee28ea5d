//! Fills data files as the kernel reads them: fanotify's pre-content events.
//!
//! EROFS reads a file's content from the layer's data file. The data file is *marked*: before the kernel reads it, it
//! asks us, and the reader waits until we have answered.
//!
//! ```text
//!  reader ──▶ EROFS ──▶ data file, marked ──▶ event ──▶ journal slot ──┬─▶ filled: allow, at once
//!                                                                       └─▶ else: a task, ensure, allow or deny
//! ```
//!
//! A data file is marked *before* it is mounted, since the kernel decides when it opens the file; a layer that is
//! complete is not marked (or not any more), and nothing of ours is on the way of its reads.
//!
//! **It fails closed.** If the last holder of the group's descriptor goes, the kernel lets readers through, and holes
//! read as zeros. So a second process, the [keeper], holds the group, the data files and the
//! *journal*, into which the kernel writes events; when this process is killed, readers wait, a successor finds
//! what was unanswered and goes on. For the same reason a mark is removed only when its file is complete, or when the
//! kernel has said that every mount which reads it is gone ([`Watch`]).
//!
//! What this module must not know: EROFS, where bytes come from, images.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::fs::{FileExt as _, MetadataExt},
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use loris_lazy::LazyLayer;
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, eventfd, poll},
    io::Errno,
    process::{Resource, Rlimit},
};
use tokio::runtime::Handle;

use crate::{
    keeper::{self, Asking, Asks, Inherited, Keeper, Kept},
    register::Register,
};

mod answering;
pub(crate) mod claim;
mod error;
pub mod event;
mod files;
pub mod group;
pub(crate) mod journal;
#[cfg(test)]
mod model;
pub(crate) mod slots;
mod unasked;
mod watch;

pub use error::PagerError;
pub use unasked::fill_unasked;
pub use watch::Watch;

use files::Files;
use group::Group;
use journal::Journal;
use slots::Slots;
use watch::Mounts;

/// Most events that are unanswered at a time; the readers of more of them wait in the kernel's queue. Each takes 128
/// bytes of locked memory and a descriptor.
const SLOTS: u32 = 4096;
/// Descriptors that are left for everything else.
const SPARE_DESCRIPTORS: u64 = 512;
/// How long an event that this process brings about itself may take: longer where another process watches the file and is
/// being replaced.
const OWN_EVENT: Duration = Duration::from_secs(5);
/// Between attempts to bring it about.
const OWN_PAUSE: Duration = Duration::from_millis(10);
/// Between attempts to bring a complete layer to the disk.
const RETRY: Duration = Duration::from_secs(10);
/// Threads that read events. An event of filled content costs each some microseconds.
const MOST_READERS: usize = 4;

/// How to run a pager.
#[derive(Clone, Debug)]
pub struct PagerOptions {
    /// How long a reader waits for content that cannot be had at the moment, before it gets `EIO`; also where this process
    /// was killed and no successor lives so long.
    pub patience: Duration,
    /// Where it is noted which mounts this machine has; one folder for all pagers.
    pub register: PathBuf,
    /// What the keeper does when this process is killed.
    pub on_death: OnDeath,
    /// The program that is the keeper when it is called with [`crate::keeper::VERB`]; `None` for this one.
    pub keeper: Option<PathBuf>,
    /// What a successor has to know, kept beside the register for as long as mounts are: see [`Inherited::note`].
    pub note: Option<Vec<u8>>,
    /// Where keeper and successors write what they have to say; `None` for where this process does.
    pub log: Option<PathBuf>,
}

/// What a keeper does when its daemon is killed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum OnDeath {
    /// It starts a successor: a program and its arguments. The successor calls [`Keeper::inherit`] and
    /// [`Server::resume`](crate::rootfs::Server::resume).
    Restart(Vec<std::ffi::OsString>),
    /// It refuses all reads, and runs a program that takes the mounts down: its arguments, behind which the path of the
    /// register is put, for [`crate::register::sweep_one`].
    Clean(Vec<std::ffi::OsString>),
}

/// A pager: threads of this process that answer the kernel. See the module's documentation.
#[derive(Debug)]
pub struct Pager {
    inner: Arc<Inner>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Inner {
    group: Group,
    journal: Journal,
    slots: Slots,
    files: Files,
    mounts: Mounts,
    keeper: Keeper,
    register: Mutex<Register>,
    runtime: Handle,
    patience: Duration,
    /// Held while marks and the table of files change together.
    marking: Mutex<()>,
    /// What is mounted, where mounts are to outlive their processes; else nothing.
    shown: Mutex<Vec<Shown>>,
    outlives: bool,
    /// Whether what was inherited is to be given up as soon as that can be done.
    settled: AtomicBool,
    /// Readable when the threads are to end.
    stop: OwnedFd,
    stopping: AtomicBool,
}

/// A mount, as the register knows it.
#[derive(Debug)]
struct Shown {
    /// The number of its watch.
    watch: i32,
    files: Vec<files::FileId>,
    mountpoints: Vec<PathBuf>,
    /// Whether nothing of it is missing, as far as the register was told.
    is_whole: Option<bool>,
}

impl Pager {
    /// Starts a pager with a keeper of its own. Missing content is fetched on `runtime`.
    ///
    /// # Errors
    /// See [`PagerError`]: nothing is left running then.
    pub fn start(options: &PagerOptions, runtime: &Handle) -> Result<Self, PagerError> {
        let descriptors = raise_descriptor_limit();
        let slots = u32::try_from(descriptors.saturating_sub(SPARE_DESCRIPTORS)).unwrap_or(SLOTS).clamp(16, SLOTS);
        let group = Group::new().map_err(PagerError::Group)?;
        let journal = Journal::create(slots).map_err(PagerError::Journal)?;
        let mounts = Mounts::new().map_err(PagerError::Inotify)?;
        let register = Register::create(&options.register)?;
        if let Some(note) = &options.note {
            register.note(note)?;
        }
        let mut options = options.clone();
        if let OnDeath::Clean(command) = &mut options.on_death {
            command.push(register.path().into());
        }
        Self::run(Parts { group, journal, mounts, register, files: Files::default() }, Vec::new(), &options, runtime)
    }

    /// Goes on where a killed pager was: with its group, its marks, and its unanswered events.
    ///
    /// `layers` are those that it served. What readers ask of files that are not among them is refused.
    ///
    /// # Errors
    /// See [`PagerError`]. The old keeper stays as it is then, and starts another successor when this process ends.
    pub fn resume(
        inherited: Inherited,
        layers: &[Arc<LazyLayer>],
        options: &PagerOptions,
        runtime: &Handle,
    ) -> Result<Self, PagerError> {
        let Inherited { asking, journal, register, files, keeper } = inherited;
        let Asking::Events { group, inotify, left } = asking else {
            return Err(PagerError::Keeper(io::Error::new(io::ErrorKind::InvalidData, "it kept no pager")));
        };
        let group = Group::from_descriptor(group);
        let mounts = Mounts::attach(inotify, &journal);
        let register = Register::attach(&options.register, register)?;
        let files = Files::inherited(files, layers).map_err(PagerError::DataFile)?;
        let pager = Self::run(Parts { group, journal, mounts, register, files }, left, options, runtime)?;
        // Only now does the old keeper know of nobody to care for.
        crate::keeper::dismiss(&keeper);
        Ok(pager)
    }

    fn run(parts: Parts, left: Vec<slots::Left>, options: &PagerOptions, runtime: &Handle) -> Result<Self, PagerError> {
        let Parts { group, journal, mounts, register, files } = parts;
        let kept = Kept {
            asks: Asks::Events { group: group.as_fd(), inotify: mounts.descriptor() },
            journal: &journal,
            register: register.descriptor(),
        };
        let keeper = Keeper::start(&kept, files.kept().map_err(PagerError::DataFile)?, options)?;
        let stop =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|e| PagerError::Threads(e.into()))?;
        let occupied: Vec<u32> = left.iter().map(|left| left.slot).collect();
        let inner = Arc::new(Inner {
            slots: Slots::new(journal.slots(), &occupied),
            group,
            journal,
            files,
            mounts,
            keeper,
            register: Mutex::new(register),
            runtime: runtime.clone(),
            patience: options.patience,
            marking: Mutex::default(),
            shown: Mutex::default(),
            settled: AtomicBool::new(false),
            outlives: matches!(options.on_death, OnDeath::Restart(_)),
            stop,
            stopping: AtomicBool::new(false),
        });
        let mut pager = Self { inner: Arc::clone(&inner), threads: Vec::new() };
        for left in left {
            answering::take_up(&inner, left);
        }
        for number in 0..std::thread::available_parallelism().map_or(1, usize::from).clamp(2, MOST_READERS) {
            pager.spawn(&format!("loris-pager-{number}"), Inner::read_events)?;
        }
        pager.spawn("loris-mounts", Inner::read_mounts)?;
        pager.spawn("loris-keeping", Inner::keep_keeper)?;
        for layer in inner.files.layers() {
            // Of those that were inherited, before their old keeper, which claims them, is dismissed.
            claim::claim(layer.kept_files()[1]).map_err(PagerError::DataFile)?;
            inner.unmark_when_complete(&layer);
        }
        Ok(pager)
    }

    fn spawn(&mut self, name: &str, body: fn(&Arc<Inner>)) -> Result<(), PagerError> {
        let inner = Arc::clone(&self.inner);
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || body(&inner));
        self.threads.push(thread.map_err(PagerError::Threads)?);
        Ok(())
    }

    /// Returns the path of its register of mounts, which is locked for as long as this pager or its keeper lives.
    #[must_use]
    pub fn register(&self) -> PathBuf {
        self.inner.register().path().to_owned()
    }

    /// What was taken over and is wanted has been found again: files that only other mounts of the process before this one
    /// read are given up when these are gone.
    pub fn settled(&self) {
        self.inner.settled.store(true, Ordering::SeqCst);
        self.inner.release_inherited();
    }

    /// Waits until no mount is up, also none that is out of sight but in use.
    pub async fn idle(&self) {
        self.inner.mounts.all_gone().await;
    }

    /// Marks the data files of layers, so that they can be mounted. Blocks for some system calls.
    ///
    /// # Errors
    /// See [`PagerError`]: nothing is marked then that was not before.
    pub fn watch(&self, layers: &[Arc<LazyLayer>]) -> Result<Watch, PagerError> {
        let mut watch = Watch::new(Arc::clone(&self.inner));
        for layer in layers {
            watch.add(layer)?;
        }
        Ok(watch)
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        self.inner.stopping.store(true, Ordering::SeqCst);
        // While mounts of ours are in use somewhere, the keeper refuses their reads: they must not read zeros.
        let are_up = self.inner.journal.has_mounts();
        self.inner.keeper.leave(are_up);
        if !are_up {
            self.inner.register().remove();
        }
        let _ = rustix::io::write(&self.inner.stop, &1_u64.to_ne_bytes());
        self.inner.slots.stop();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// What a pager is made of, new or inherited.
struct Parts {
    group: Group,
    journal: Journal,
    mounts: Mounts,
    register: Register,
    files: Files,
}

impl Inner {
    /// Is a thread that reads events and answers those that need no waiting.
    fn read_events(self: &Arc<Self>) {
        while let Some(slot) = self.slots.claim() {
            match self.journal.read_event(slot, &self.group) {
                Ok(_) => answering::answer(self, slot),
                Err(error) => {
                    self.slots.give_back(slot);
                    if !self.wait_for_events(&error) {
                        return;
                    }
                }
            }
        }
    }

    /// Waits until there may be something to read; `false` when there is nothing more to do.
    fn wait_for_events(&self, error: &io::Error) -> bool {
        match error.raw_os_error() {
            Some(libc::EAGAIN) => {
                let mut wanted = [PollFd::new(&self.group, PollFlags::IN), PollFd::new(&self.stop, PollFlags::IN)];
                let _ = poll(&mut wanted, None);
            }
            Some(libc::EINTR) => {}
            _ => {
                // No descriptor is left, or no memory. The kernel has refused that reader; it may try again.
                tracing::error!(%error, "a reader was refused, since its event could not be read");
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        !self.stopping.load(Ordering::SeqCst)
    }

    /// Is the thread that hears of mounts that are gone.
    fn read_mounts(self: &Arc<Self>) {
        loop {
            let mut wanted = [
                PollFd::from_borrowed_fd(self.mounts.descriptor(), PollFlags::IN),
                PollFd::new(&self.stop, PollFlags::IN),
            ];
            let _ = poll(&mut wanted, None);
            if self.stopping.load(Ordering::SeqCst) {
                return;
            }
            let files = self.mounts.take_gone(&self.journal);
            self.release(&files);
            self.release_inherited();
        }
    }

    /// Is the thread that starts a new keeper where the old one was killed.
    fn keep_keeper(self: &Arc<Self>) {
        self.keeper.attend(&self.stop, &self.stopping, || {
            let register = self.register();
            let kept = Kept {
                asks: Asks::Events { group: self.group.as_fd(), inotify: self.mounts.descriptor() },
                journal: &self.journal,
                register: register.descriptor(),
            };
            self.keeper.replace(&kept, || self.files.kept())
        });
    }

    /// Marks a layer's data file, unless it is complete and on the disk, or marked already.
    fn mark(self: &Arc<Self>, layer: &Arc<LazyLayer>) -> Result<files::FileId, PagerError> {
        let marking = self.marking();
        let id = self.files.add(layer).map_err(PagerError::DataFile)?;
        if layer.is_on_disk() {
            // A process before this one may have been killed between the two.
            self.unmark(layer);
            return Ok(id);
        }
        // It was complete once, and a stranger has cut it.
        self.files.set_marked(layer, true);
        self.note_whole();
        let registered = self.register().add_layer(layer.directory());
        // Again also where it is marked: a process before this one may have been killed before it came to it.
        let [_, lock] = layer.kept_files();
        let marked = self
            .group
            .mark(layer.data_file())
            .and_then(|()| claim::claim(lock))
            .and_then(|()| self.fill_unasked(layer))
            .map_err(|source| PagerError::mark(layer, source))
            .and_then(|()| registered.map_err(PagerError::from))
            .and_then(|()| self.keeper.keep(id.key, layer.kept_files()).map_err(PagerError::Keeper));
        drop(marking);
        if let Err(error) = marked {
            self.release(&[id]);
            return Err(error);
        }
        self.unmark_when_complete(layer);
        Ok(id)
    }

    /// Gives a layer a descriptor of its data file for whose writes nobody is asked: neither this process, which would
    /// wait for itself, nor another one that watches the same file. The kernel makes such descriptors for events alone, so
    /// one is brought about, by a read behind the end of the file.
    fn fill_unasked(&self, layer: &Arc<LazyLayer>) -> io::Result<()> {
        let expected = self.files.expect(layer)?;
        let (data, end) = (layer.data_file().try_clone()?, layer.data_file().metadata()?.len());
        // Whoever else watches the file is asked too, and may take its time; or refuse, before this group is asked, as a
        // keeper does until the last user of a mount that was taken down has gone.
        let done = Arc::new(AtomicBool::new(false));
        let (is_done, deadline) = (Arc::clone(&done), Instant::now() + OWN_EVENT);
        std::thread::Builder::new().name("loris-asking".to_owned()).spawn(move || {
            let again = File::open(format!("/proc/self/fd/{}", data.as_raw_fd()))?;
            loop {
                match again.read_at(&mut [0], end) {
                    Err(_) if !is_done.load(Ordering::SeqCst) && Instant::now() < deadline => {
                        std::thread::sleep(OWN_PAUSE);
                    }
                    result => return result,
                }
            }
        })?;
        let received = expected.recv_timeout(OWN_EVENT);
        done.store(true, Ordering::SeqCst);
        match received {
            Ok(data) => layer.fill_through(data),
            Err(_) => {
                self.files.take_expected(identity(layer.data_file())?);
                let problem = "another process watches it and does not answer";
                Err(io::Error::new(io::ErrorKind::TimedOut, problem))
            }
        }
    }

    /// Sees to it that a layer's mark goes when the layer is complete: its reads concern nobody any more then.
    fn unmark_when_complete(self: &Arc<Self>, layer: &Arc<LazyLayer>) {
        let (pager, waiting) = (Arc::downgrade(self), Arc::clone(layer));
        let task = async move {
            loop {
                waiting.completed().await;
                // What does not reach the disk is forgotten again, and must be asked for then.
                if let Err(error) = waiting.sync().await {
                    tracing::warn!(layer = %waiting.digest(), %error, "a layer is complete but not on the disk");
                    tokio::time::sleep(RETRY).await;
                    continue;
                }
                let Some(pager) = pager.upgrade() else { return };
                let layer = Arc::clone(&waiting);
                // Others hold the lock for as long as a layer is marked: no thread of the runtime waits for that.
                let unmarking = tokio::task::spawn_blocking(move || pager.unmark_if_on_disk(&layer));
                if unmarking.await.unwrap_or(true) {
                    return;
                }
                tokio::time::sleep(OWN_PAUSE).await;
            }
        };
        self.files.await_completion(layer, || self.runtime.spawn(task).abort_handle());
    }

    /// Removes a mark unless something was forgotten meanwhile.
    fn unmark_if_on_disk(&self, layer: &LazyLayer) -> bool {
        let _marking = self.marking();
        let is_on_disk = layer.is_on_disk();
        if is_on_disk {
            self.unmark(layer);
        }
        is_on_disk
    }

    fn unmark(&self, layer: &LazyLayer) {
        give_claim_up(layer);
        if let Err(error) = self.group.unmark(layer.data_file()) {
            tracing::warn!(layer = %layer.digest(), %error, "a complete layer stays marked, which costs time");
            return;
        }
        if let Some(key) = self.files.set_marked(layer, false) {
            self.keeper.forget(key);
            self.forget_layer(layer);
        }
        self.note_whole();
    }

    /// Tells the register which mounts need no process of ours any more, so that they are left alone where all of these
    /// are gone.
    fn note_whole(&self) {
        for shown in self.shown().iter_mut() {
            let is_whole = !self.files.is_any_marked(&shown.files);
            if shown.is_whole == Some(is_whole) {
                continue;
            }
            let mut register = self.register();
            let change = |mountpoint: &PathBuf| match is_whole {
                true => register.set_whole(mountpoint),
                false => register.clear_whole(mountpoint),
            };
            match shown.mountpoints.iter().try_for_each(change) {
                Ok(()) => shown.is_whole = Some(is_whole),
                Err(error) => tracing::warn!(%error, "a mount is not known to be complete"),
            }
        }
    }

    /// Gives up files that no mount reads any more.
    fn release(&self, files: &[files::FileId]) {
        let _marking = self.marking();
        for id in files {
            let Some(layer) = self.files.remove(*id) else { continue };
            give_claim_up(&layer);
            if let Err(error) = self.group.unmark(layer.data_file()) {
                tracing::warn!(layer = %layer.digest(), %error, "a layer stays marked");
            }
            self.keeper.forget(id.key);
            self.forget_layer(&layer);
        }
    }

    /// Gives up what was inherited, when no mount is up any more that may read it for all that is known.
    fn release_inherited(&self) {
        let _marking = self.marking();
        if !self.settled.load(Ordering::SeqCst) || self.mounts.is_any_unknown() {
            return;
        }
        self.settled.store(false, Ordering::SeqCst);
        let ended = match self.files.take_inherited() {
            Ok(ended) => ended,
            Err(error) => {
                tracing::warn!(%error, "files of an earlier process stay open until the next mount ends");
                self.settled.store(true, Ordering::SeqCst);
                return;
            }
        };
        for files::Ended { key, data, lock } in ended {
            let path = std::fs::read_link(format!("/proc/self/fd/{}", lock.as_raw_fd()));
            let given_up = claim::give_up(&lock).and_then(|()| self.group.unmark(&data));
            if let Err(error) = given_up {
                tracing::warn!(%error, "a layer of an earlier process stays marked");
            }
            self.keeper.forget(key);
            let Ok(Some(directory)) = path.map(|path| path.parent().map(Path::to_owned)) else { continue };
            if let Err(error) = self.register().forget_layer(&directory) {
                tracing::warn!(layer = %directory.display(), %error, "a layer stays registered");
            }
        }
    }

    fn forget_layer(&self, layer: &LazyLayer) {
        if let Err(error) = self.register().forget_layer(layer.directory()) {
            tracing::warn!(layer = %layer.digest(), %error, "a layer stays registered");
        }
    }

    fn marking(&self) -> MutexGuard<'_, ()> {
        self.marking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shown(&self) -> MutexGuard<'_, Vec<Shown>> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn register(&self) -> MutexGuard<'_, Register> {
        self.register.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn give_claim_up(layer: &LazyLayer) {
    if let Err(error) = claim::give_up(layer.kept_files()[1]) {
        tracing::warn!(layer = %layer.digest(), %error, "a layer stays claimed");
    }
}

/// Lets this process have as many descriptors as it may, since each unanswered event is one, and returns how many.
pub(crate) fn raise_descriptor_limit() -> u64 {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    // A keeper, which inherits the limit, has two for each layer.
    let wanted = u64::from(SLOTS) + 2 * keeper::LAYERS + 4 * SPARE_DESCRIPTORS;
    if limit.current.is_none_or(|current| current >= wanted) {
        return limit.current.unwrap_or(u64::MAX);
    }
    let raised = limit.maximum.map_or(wanted, |maximum| maximum.min(wanted));
    match rustix::process::setrlimit(Resource::Nofile, Rlimit { current: Some(raised), maximum: limit.maximum }) {
        Ok(()) => raised,
        Err(_) => limit.current.unwrap_or(raised),
    }
}

/// What a file is known by on this machine: device and inode number.
fn identity(file: &File) -> io::Result<(u64, u64)> {
    let metadata = file.metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Takes ownership of the descriptor that the kernel has opened for an event.
///
/// Must be called once for each event, by the process that read it.
fn event_file(descriptor: i32) -> Option<OwnedFd> {
    if descriptor < 0 {
        return None;
    }
    // SAFETY: the kernel opened it for this process when the event was read, and nobody else knows of it.
    Some(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// What a reader is told where content cannot be had.
fn errno(error: &loris_lazy::EnsureError) -> Errno {
    match error {
        error if error.is_no_space() => Errno::NOSPC,
        _ => Errno::IO,
    }
}
