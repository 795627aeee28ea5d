//! FUSE without privileges: `fusermount3`, which is set-uid root, mounts for its caller.
//!
//! It gets one end of a socket as its standard input (`_FUSE_COMMFD` names the descriptor) and sends the descriptor of
//! the FUSE connection back over it. So says fusermount3(1); the protocol has been the same since FUSE 2.

use std::{
    fs,
    io::{self, IoSliceMut, Read as _},
    mem::MaybeUninit,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use crate::{MountError, mounts::Unmounted};

/// The program, as Debian's package `fuse3` and everybody else's install it.
const PROGRAM: &str = "fusermount3";
/// Where administrators allow `allow_other` to users.
const CONFIGURATION: &str = "/etc/fuse.conf";
/// How long the program may take. It makes one system call.
const PATIENCE: Duration = Duration::from_secs(10);
/// Most that is kept of what the program says, in bytes.
const MESSAGE_BYTES: u64 = 1 << 10;

/// Whether `fusermount3` is on the path, and where.
pub(crate) fn find() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(PROGRAM)).find(|program| program.is_file())
}

/// Whether users may let other users see their mounts: a line `user_allow_other` in `/etc/fuse.conf`.
pub(crate) fn may_allow_other() -> bool {
    fs::read(CONFIGURATION).is_ok_and(|text| allows_other(&text))
}

fn allows_other(configuration: &[u8]) -> bool {
    configuration.split(|&byte| byte == b'\n').any(|line| line.trim_ascii() == b"user_allow_other")
}

/// Mounts at a directory and returns the connection's descriptor.
pub(crate) fn mount(mountpoint: &Path, options: &str) -> Result<OwnedFd, MountError> {
    let refused = |message: String| MountError::Fusermount { path: mountpoint.to_owned(), message };
    let (ours, theirs) = UnixStream::pair().map_err(|error| refused(error.to_string()))?;
    ours.set_read_timeout(Some(PATIENCE)).map_err(|error| refused(error.to_string()))?;
    // The command owns their end and is dropped at the end of the statement: only the program holds it then, and its
    // end shows as end of file here.
    let mut child = Command::new(PROGRAM)
        .args(["-o", options, "--"])
        .arg(mountpoint)
        .env("_FUSE_COMMFD", "0")
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => MountError::FusermountMissing,
            _ => refused(error.to_string()),
        })?;
    let received = receive_descriptor(&ours);
    let (success, message) = finish(&mut child, matches!(&received, Err(error) if is_timeout(error)));
    match received {
        Ok(Some(descriptor)) if success => Ok(descriptor),
        Err(error) if message.is_empty() => Err(refused(error.to_string())),
        _ => Err(refused(message)),
    }
}

/// Unmounts, or detaches where the mount is in use.
pub(crate) fn unmount(mountpoint: &Path) -> Result<Unmounted, MountError> {
    let failed = |source: io::Error| MountError::Unmount { path: mountpoint.to_owned(), source };
    let run = |arguments: &[&str]| -> Result<(bool, String), MountError> {
        let mut child = Command::new(PROGRAM)
            .args(arguments)
            .arg("--")
            .arg(mountpoint)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => MountError::FusermountMissing,
                _ => failed(error),
            })?;
        Ok(finish(&mut child, false))
    };
    if run(&["-u"])?.0 {
        return Ok(Unmounted::Whole);
    }
    match run(&["-u", "-z"])? {
        (true, _) => Ok(Unmounted::Detached),
        (false, message) => Err(failed(io::Error::other(message))),
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// Waits for the program's end and returns whether it succeeded, and what it said.
fn finish(child: &mut Child, overdue: bool) -> (bool, String) {
    if overdue {
        // A failure means that it has ended.
        let _ = child.kill();
    }
    let mut message = Vec::new();
    if let Some(stderr) = child.stderr.take() {
        // What cannot be read is not known; the exit status decides.
        let _ = stderr.take(MESSAGE_BYTES).read_to_end(&mut message);
    }
    let success = child.wait().is_ok_and(|status| status.success());
    let message = String::from_utf8_lossy(&message);
    let message = message.trim().trim_start_matches("fusermount3: ").to_owned();
    (success, if message.is_empty() && !success { "it gave no reason".to_owned() } else { message })
}

/// Receives one byte and the descriptor beside it; `None` where the other side has closed without.
fn receive_descriptor(socket: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut byte = [0];
    loop {
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received =
            rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC);
        match received {
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
            Ok(_) => {
                let descriptor = ancillary.drain().find_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
                    _ => None,
                });
                return Ok(descriptor);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::allows_other;

    #[test]
    fn configuration_is_read_as_fusermount_reads_it() {
        let cases: [(&[u8], bool); 6] = [
            (b"", false),
            (b"#user_allow_other\n", false),
            (b"# comment\nuser_allow_other\n", true),
            (b"  user_allow_other  ", true),
            (b"user_allow_other=1\n", false),
            (b"mount_max = 10\r\nuser_allow_other\r\n", true),
        ];
        for (text, allowed) in cases {
            assert_eq!(allows_other(text), allowed, "{}", text.escape_ascii());
        }
    }
}
