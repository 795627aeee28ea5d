//! One question of the kernel before a read, and its answer: as much of fanotify as the probe needs.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::fs::FileExt,
    },
    ptr,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

/// "A file is about to be read", of the kernel's `include/uapi/linux/fanotify.h`.
const FAN_PRE_ACCESS: u64 = 0x0010_0000;
/// An event's length, version, metadata length, mask, descriptor and process, in bytes: the descriptor's place.
const DESCRIPTOR_AT: usize = 16;
const METADATA_LENGTH: usize = 24;
/// How long the kernel may take to ask. It takes microseconds; a machine may be busy.
const PATIENCE: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };

/// Where the kernel asks.
pub(super) struct Group(OwnedFd);

impl Group {
    pub(super) fn new() -> io::Result<Self> {
        let flags = libc::FAN_CLASS_PRE_CONTENT | libc::FAN_CLOEXEC | libc::FAN_NONBLOCK;
        let file_flags = (libc::O_RDONLY | libc::O_LARGEFILE | libc::O_CLOEXEC).cast_unsigned();
        // SAFETY: takes two numbers and returns a descriptor or -1.
        let descriptor = unsafe { libc::fanotify_init(flags, file_flags) };
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made it, and nobody else knows of it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(descriptor) }))
    }

    /// Asks before a file is read through descriptors that are opened from now on.
    pub(super) fn mark(&self, file: &File) -> io::Result<()> {
        // SAFETY: both descriptors are open; without a path, the second one is what is marked.
        let result = unsafe {
            libc::fanotify_mark(self.0.as_raw_fd(), libc::FAN_MARK_ADD, FAN_PRE_ACCESS, file.as_raw_fd(), ptr::null())
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Waits for a question, writes the content that is asked for into the file, and lets the reader go on. Returns
    /// whether there was a question. The reader goes on in any case once the group is dropped.
    pub(super) fn answer_one(&self, file: &File, content: &[u8], stop: &OwnedFd) -> io::Result<bool> {
        let mut wanted = [PollFd::new(&self.0, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        poll(&mut wanted, Some(&PATIENCE))?;
        let mut event = [0; 256];
        let length = match rustix::io::read(&self.0, &mut event) {
            Ok(length) => length,
            Err(Errno::AGAIN) => return Ok(false),
            Err(errno) => return Err(errno.into()),
        };
        let descriptor: &[u8; 4] = event[..length]
            .get(DESCRIPTOR_AT..METADATA_LENGTH)
            .and_then(<[u8]>::first_chunk)
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        let number = i32::from_ne_bytes(*descriptor);
        if number < 0 {
            return Err(Errno::MFILE.into());
        }
        // SAFETY: the kernel opened it for this process when the event was read, and nobody else knows of it.
        let _asked = unsafe { OwnedFd::from_raw_fd(number) };
        let filled = file.write_all_at(content, 0);
        let mut answer = [0; 8];
        answer[..4].copy_from_slice(descriptor);
        answer[4..].copy_from_slice(&libc::FAN_ALLOW.to_ne_bytes());
        rustix::io::write(&self.0, &answer)?;
        filled.map(|()| true)
    }
}
