//! Reads of mounts that are in use and that nobody serves any more are refused.
//!
//! What this module must not know: who has killed whom, and how mounts are taken down.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::fs::OpenOptionsExt as _,
    },
    path::Path,
    sync::atomic::Ordering,
};

use rustix::fs::{FlockOperation, Mode, OFlags, flock, inotify};

use super::{Noted, Register};
use crate::{
    keeper::{Asks, Keeper, Kept},
    mounts,
    pager::{group::Group, journal::Journal},
};

/// Whoever reads what is marked waits, from [`Refusal::prepare`] on until it [begins](Refusal::begin) or is dropped.
pub(super) struct Refusal<'a> {
    keeper: Option<&'a Path>,
    group: Group,
    journal: Journal,
    inotify: OwnedFd,
    files: Vec<(u64, [File; 2])>,
}

impl<'a> Refusal<'a> {
    /// Marks the layers of a register again, and watches its mounts, which must be up still. `None` where there is nothing
    /// of the kind, as of devices over FUSE, whose reads the kernel refuses; or where that cannot be done.
    pub(super) fn prepare(register: &mut Register, mounts: &[Noted], keeper: Option<&'a Path>) -> Option<Self> {
        let layers = register.layers().unwrap_or_default();
        if layers.is_empty() {
            return None;
        }
        let prepare = || -> io::Result<Self> {
            let (group, journal) = (Group::new()?, Journal::create(1)?);
            let inotify = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
            let mut places = journal.mounts();
            for mount in mounts.iter().filter(|mount| is_erofs(&mount.mountpoint)) {
                let root = rustix::fs::open(&mount.mountpoint, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
                let path = format!("/proc/self/fd/{}", root.as_raw_fd());
                let watch = inotify::add_watch(&inotify, path, inotify::WatchFlags::DELETE_SELF)?;
                if let Some(place) = places.next() {
                    place.store(watch, Ordering::Release);
                }
            }
            drop(places);
            let files = (1..).zip(&layers).filter_map(|(key, layer)| Some((key, files(layer).ok()?))).collect();
            Ok(Self { keeper, group, journal, inotify, files })
        };
        let refusal = prepare().inspect_err(|error| tracing::warn!(%error, "reads cannot be refused")).ok()?;
        for (_, [data, _]) in &refusal.files {
            // One that cannot be marked is no reason to let the others through.
            if let Err(error) = refusal.group.mark(data) {
                tracing::warn!(%error, "reads of a layer cannot be refused");
            }
        }
        Some(refusal)
    }

    /// Lets another process refuse reads, until the mounts are gone. It holds the register's lock as long.
    pub(super) fn begin(self, register: &Register) -> io::Result<()> {
        let asks = Asks::Events { group: self.group.as_fd(), inotify: self.inotify.as_fd() };
        let kept = Kept { asks, journal: &self.journal, register: register.descriptor() };
        Keeper::refuse(&kept, self.files, self.keeper)
    }
}

/// Data file and lock of a layer, which is shared with those who use the layer, so that it stays.
fn files(layer: &Path) -> io::Result<[File; 2]> {
    let open = |name| {
        let no_follow = OFlags::NOFOLLOW.bits().cast_signed();
        File::options().read(true).custom_flags(no_follow).open(layer.join(name))
    };
    let lock = open("lock")?;
    // Where somebody has it alone at the moment, it may be removed: it is read for as long as the mount is there.
    let _ = flock(&lock, FlockOperation::NonBlockingLockShared);
    Ok([open("data")?, lock])
}

fn is_erofs(mountpoint: &Path) -> bool {
    mounts::find(mountpoint)
        .is_ok_and(|found| found.is_some_and(|mount| mount.file_system == "erofs" && mount.is_loris()))
}
