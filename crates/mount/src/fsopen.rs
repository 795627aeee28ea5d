//! File systems mounted through file descriptors: fsopen(2), fsconfig(2), fsmount(2), move_mount(2), of Linux 5.2.
//!
//! Where mount(2) takes one page of options, these take any number of them one by one. And what [`Context::mount`]
//! returns stands nowhere yet: it can be read through its descriptor, and goes with that descriptor's last user.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::CWD,
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_flag,
        fsconfig_set_string, fsmount, fsopen, move_mount,
    },
};

/// `fsconfig` takes strings of 256 bytes with their NUL.
pub(crate) const STRING_BYTES: usize = 255;
/// Most that is read of the kernel's messages about one mount, in bytes.
const MESSAGE_BYTES: usize = 1 << 10;

/// Why the kernel does not mount something.
#[derive(Debug)]
pub(crate) struct Refusal {
    /// Its answer.
    pub source: io::Error,
    /// What it logged, and what may help: empty, or beginning with a separator.
    pub detail: String,
}

impl Refusal {
    pub(crate) fn plain(source: impl Into<io::Error>) -> Self {
        Self { source: source.into(), detail: String::new() }
    }
}

/// A mount in the making.
pub(crate) struct Context(OwnedFd);

impl Context {
    /// Begins with a kind of file system.
    pub(crate) fn open(kind: &str) -> Result<Self, Refusal> {
        fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).map(Self).map_err(|errno| {
            let detail = match errno {
                Errno::NODEV => format!("; the kernel has no {kind}, try `modprobe {kind}`"),
                Errno::NOSYS => "; this takes Linux 5.2".to_owned(),
                _ => String::new(),
            };
            Refusal { source: errno.into(), detail }
        })
    }

    /// Sets an option.
    pub(crate) fn set(&self, key: &str, value: &[u8]) -> Result<(), Refusal> {
        fsconfig_set_string(&self.0, key, value).map_err(|errno| self.refusal(errno))
    }

    /// Sets an option without a value.
    pub(crate) fn set_flag(&self, key: &str) -> Result<(), Refusal> {
        fsconfig_set_flag(&self.0, key).map_err(|errno| self.refusal(errno))
    }

    /// Makes the file system, and a mount of it that stands nowhere.
    pub(crate) fn mount(self, attributes: MountAttrFlags) -> Result<OwnedFd, Refusal> {
        fsconfig_create(&self.0).map_err(|errno| self.refusal(errno))?;
        fsmount(&self.0, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(|errno| self.refusal(errno))
    }

    fn refusal(&self, errno: Errno) -> Refusal {
        Refusal { source: errno.into(), detail: kernel_messages(&self.0) }
    }
}

/// Puts a mount that stands nowhere at a directory.
pub(crate) fn attach(mount: &OwnedFd, mountpoint: &Path) -> io::Result<()> {
    Ok(move_mount(mount.as_fd(), "", CWD, mountpoint, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

/// Reads what the kernel logged about a mount in the making: one message a call, `e overlay: text`.
pub(crate) fn kernel_messages(context: &OwnedFd) -> String {
    let mut messages = String::new();
    let mut buffer = [0; 256];
    while let Ok(length @ 1..) = rustix::io::read(context, &mut buffer) {
        let text = String::from_utf8_lossy(&buffer[..length]);
        if messages.len() + text.len() > MESSAGE_BYTES {
            break;
        }
        messages.push_str("; ");
        messages.push_str(text.trim_start_matches(['e', 'w', 'i', ' ']).trim_end());
    }
    messages
}
