//! Filling data files beside somebody who watches them.
//!
//! A process that fills a layer which another one has mounted would ask that one's pager before each write, and the pager
//! would fetch the same range first: everything twice, and an error where the pager can't fetch. The kernel makes
//! descriptors for whose writes nobody is asked, but only for events; so a group of our own brings one about, and is gone
//! again at once. Where that can't be done (no right to make a group), content is filled as before.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd as _, AsRawFd as _},
        unix::fs::FileExt as _,
    },
    sync::Arc,
    time::Instant,
};

use loris_lazy::LazyLayer;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

use super::{
    OWN_EVENT,
    event::{Answer, Event},
    event_file,
    group::Group,
    identity,
};

/// Sees to it that nobody is asked before these layers are filled, where another process has them open. Blocks until that
/// one has answered, for some seconds at most.
///
/// # Errors
/// Where the kernel has no such events or this process no right to them, or the other process does not answer.
pub fn fill_unasked(layers: &[Arc<LazyLayer>]) -> io::Result<()> {
    for layer in layers.iter().filter(|layer| layer.is_open_elsewhere() && !layer.is_complete()) {
        // The group ends with this, and with it all that was asked of it.
        layer.fill_through(descriptor(&Group::new()?, layer.data_file())?)?;
    }
    Ok(())
}

/// Returns another descriptor of a file, made for an event: a read behind the end of the file.
fn descriptor(group: &Group, file: &File) -> io::Result<File> {
    let expected = identity(file)?;
    let (end, again) = (file.metadata()?.len(), format!("/proc/self/fd/{}", file.as_raw_fd()));
    group.mark(file)?;
    // Opened behind the mark, or its reads would not be asked for.
    let again = File::open(again)?;
    std::thread::Builder::new().name("loris-asking".to_owned()).spawn(move || again.read_at(&mut [0], end))?;
    let deadline = Instant::now() + OWN_EVENT;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).unwrap_or_default();
        match poll(&mut [PollFd::new(group, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "another process watches it and does not answer"));
            }
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let mut bytes = [0; 256];
        let length = match rustix::io::read(group.as_fd(), &mut bytes) {
            Ok(length) => length,
            Err(Errno::AGAIN | Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        };
        let event = Event::parse(&bytes[..length]).map_err(io::Error::other)?;
        let Some(asked) = event_file(event.descriptor).map(File::from) else { continue };
        let ours = asked.try_clone()?;
        // Whoever else asks is watched by somebody else, who answers for what he reads.
        group.answer(asked.as_raw_fd(), Answer::Allow)?;
        let is_own = event.process == rustix::process::getpid().as_raw_nonzero().get() && event.range.start >= end;
        if is_own && identity(&ours)? == expected {
            return Ok(ours);
        }
    }
}
