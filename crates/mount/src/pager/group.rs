//! A fanotify group: the kernel's end of the pager.
//!
//! fanotify_init(2), fanotify_mark(2) and fanotify(7), called through libc: rustix has none of them.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr,
};

use rustix::io::Errno;

use super::event::{Answer, FAN_PRE_ACCESS};

/// A group that is asked before a marked file is read.
///
/// Whoever holds a copy of its descriptor keeps readers waiting. When the last copy is closed, every waiting and later
/// reader goes on unasked, and reads zeros where the file is not filled.
#[derive(Debug)]
pub struct Group(OwnedFd);

impl Group {
    /// Makes a group. Needs `CAP_SYS_ADMIN` outside of any user namespace.
    ///
    /// # Errors
    /// `EPERM` without the right; `EINVAL` or `ENOSYS` where the kernel was built without permission events; `EMFILE`
    /// where there are too many groups (`/proc/sys/fs/fanotify/max_user_groups`).
    pub fn new() -> io::Result<Self> {
        // A queue that overflows loses readers, who would go on unasked. Each waiting reader is one thread, so that it
        // cannot grow without bound.
        let flags = libc::FAN_CLASS_PRE_CONTENT
            | libc::FAN_CLOEXEC
            | libc::FAN_NONBLOCK
            | libc::FAN_UNLIMITED_QUEUE
            | libc::FAN_UNLIMITED_MARKS;
        // Written through, the descriptors of events raise no events, in no group: the way to fill a file that others watch.
        let file_flags = (libc::O_RDWR | libc::O_LARGEFILE | libc::O_CLOEXEC).cast_unsigned();
        // SAFETY: takes two numbers and returns a descriptor or -1.
        let descriptor = unsafe { libc::fanotify_init(flags, file_flags) };
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made it, and nobody else knows of it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(descriptor) }))
    }

    /// Takes over a group that another process made.
    #[must_use]
    pub fn from_descriptor(descriptor: OwnedFd) -> Self {
        Self(descriptor)
    }

    /// Asks from now on before a file is read through descriptors that are opened later. Those that are open already
    /// are not affected: this is how the file is filled. Marking it twice is marking it once.
    ///
    /// # Errors
    /// `EOPNOTSUPP` where the file system does not take part (all but ext4, XFS and btrfs); `EINVAL` before Linux 6.14.
    pub fn mark(&self, file: &File) -> io::Result<()> {
        self.change(libc::FAN_MARK_ADD, file)
    }

    /// Stops asking. Readers who wait already still want their answer.
    ///
    /// # Errors
    /// As the system call.
    pub fn unmark(&self, file: &File) -> io::Result<()> {
        match self.change(libc::FAN_MARK_REMOVE, file) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            result => result,
        }
    }

    fn change(&self, operation: libc::c_uint, file: &File) -> io::Result<()> {
        // SAFETY: both descriptors are open; without a path, the second one is what is marked.
        let result = unsafe {
            libc::fanotify_mark(self.0.as_raw_fd(), operation, FAN_PRE_ACCESS, file.as_raw_fd(), ptr::null())
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Answers the event of a descriptor number. An event whose reader was killed is gone: that is no error.
    ///
    /// # Errors
    /// As `write(2)`.
    pub fn answer(&self, descriptor: i32, answer: Answer) -> io::Result<()> {
        let bytes = answer.to_bytes(descriptor);
        loop {
            match rustix::io::write(&self.0, &bytes) {
                Ok(_) | Err(Errno::NOENT) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
