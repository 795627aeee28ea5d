//! What a keeper kept of a daemon that was killed, at the daemon's successor.

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

use super::message::{Kind, Message, VERSION, garbled};
use crate::pager::{
    journal::Journal,
    raise_descriptor_limit,
    slots::{self, Left},
};

/// What a keeper kept of a daemon that was killed. [`Keeper::inherit`](super::Keeper::inherit) gets it.
#[derive(Debug)]
pub struct Inherited {
    pub(crate) asking: Asking,
    pub(crate) journal: Journal,
    pub(crate) register: OwnedFd,
    /// Data file and lock of each layer, by its key.
    pub(crate) files: HashMap<u64, [File; 2]>,
    pub(crate) keeper: OwnedFd,
}

/// The ways in which the kernel asks for content.
#[derive(Debug)]
pub(crate) enum Asking {
    /// By events of a fanotify group, some of which may be unanswered; inotify says which mounts are up.
    Events { group: OwnedFd, inotify: OwnedFd, left: Vec<Left> },
    /// By requests over a connection of FUSE.
    Requests { connection: OwnedFd },
}

impl Inherited {
    /// Receives it. Must come before files are opened that are to be closed again.
    pub(super) fn receive(keeper: OwnedFd) -> io::Result<Self> {
        Message { kind: Kind::Resume, number: u64::from(VERSION) }.send(&keeper, &[])?;
        let mut files = HashMap::new();
        let mut state = None;
        loop {
            let (message, descriptors) = Message::receive(&keeper)?;
            match message.kind {
                kind @ (Kind::State | Kind::Devices) => state = Some((kind, descriptors)),
                Kind::Keep => {
                    let [data, lock] = <[OwnedFd; 2]>::try_from(descriptors).map_err(|_| garbled())?;
                    files.insert(message.number, [data.into(), lock.into()]);
                }
                Kind::End => break,
                _ => return Err(garbled()),
            }
        }
        raise_descriptor_limit();
        match state {
            Some((Kind::State, descriptors)) => Self::of_events(descriptors, files, keeper),
            Some((_, descriptors)) => {
                let [connection, journal, register] = <[OwnedFd; 3]>::try_from(descriptors).map_err(|_| garbled())?;
                let asking = Asking::Requests { connection };
                Ok(Self { asking, journal: Journal::attach(journal)?, register, files, keeper })
            }
            None => Err(garbled()),
        }
    }

    fn of_events(descriptors: Vec<OwnedFd>, files: HashMap<u64, [File; 2]>, keeper: OwnedFd) -> io::Result<Self> {
        let [group, journal, inotify, register] = <[OwnedFd; 4]>::try_from(descriptors).map_err(|_| garbled())?;
        let journal = Journal::attach(journal)?;
        // The numbers of unanswered events must stay taken until they are answered. What was just received and is
        // closed earlier is moved above all of them.
        let above =
            slots::unanswered(&journal).iter().map(|(_, event)| event.descriptor).max().map_or(3, |most| most + 1);
        let moved = |descriptor: OwnedFd| rustix::io::fcntl_dupfd_cloexec(&descriptor, above).map_err(io::Error::from);
        let files = files
            .into_iter()
            .map(|(key, [data, lock])| Ok((key, [moved(data.into())?.into(), moved(lock.into())?.into()])))
            .collect::<io::Result<_>>()?;
        let (group, inotify, register, keeper) = (moved(group)?, moved(inotify)?, moved(register)?, moved(keeper)?);
        let left = slots::left_behind(&journal)?;
        Ok(Self { asking: Asking::Events { group, inotify, left }, journal, register, files, keeper })
    }

    /// Returns the data files, to be [adopted](loris_lazy::Store::adopt) before the layers are opened.
    ///
    /// # Errors
    /// Where there are too many open files.
    pub fn data_files(&self) -> io::Result<Vec<File>> {
        self.files.values().map(|[data, _]| data.try_clone()).collect()
    }

    /// Returns what the process that was killed had noted
    /// ([`PagerOptions::note`](crate::pager::PagerOptions::note)).
    ///
    /// # Errors
    /// Where it cannot be read, or nothing was noted.
    pub fn note(&self) -> io::Result<Vec<u8>> {
        let path = std::fs::read_link(format!("/proc/self/fd/{}", self.register.as_raw_fd()))?;
        crate::register::noted(&path)
    }
}
