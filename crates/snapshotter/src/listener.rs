//! The socket of the service, which outlives its process: clients that come while nobody serves wait, and are not refused.
//!
//! A second descriptor of it stays open over `exec`, and with it in the keeper of mounts and in the keeper's successors,
//! which are told its number.
//!
//! What this module must not know: what is served.

use std::{
    ffi::OsString,
    io,
    os::{
        fd::{AsFd as _, IntoRawFd as _, OwnedFd},
        unix::{
            fs::{DirBuilderExt as _, PermissionsExt as _},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
    time::Duration,
};

use futures_util::Stream;
use loris_mount::pager::OnDeath;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

use crate::DaemonError;

/// How a successor is told the descriptor's number.
pub const ARGUMENT: &str = "--listener-fd";

/// After a connection that could not be accepted.
const PAUSE: Duration = Duration::from_millis(20);

/// A socket that is listened on.
#[derive(Debug)]
pub struct Listener {
    listener: OwnedFd,
    address: PathBuf,
}

/// Returns a descriptor that was open when this process began.
///
/// # Errors
/// Where there is none of this number.
pub fn inherited(number: i32) -> io::Result<OwnedFd> {
    // The one way to a descriptor that has only a number which is safe: the kernel says whether it is open.
    let ourselves = pidfd_open(getpid(), PidfdFlags::empty())?;
    Ok(pidfd_getfd(ourselves, number, PidfdGetfdFlags::empty())?)
}

impl Listener {
    /// Listens on an address, which the caller has the right to; or goes on with what is open already. Successors will find
    /// it.
    ///
    /// # Errors
    /// See [`DaemonError::Socket`].
    pub(crate) fn open(address: &Path, open: Option<OwnedFd>, on_death: &mut OnDeath) -> Result<Self, DaemonError> {
        let failed = |source| DaemonError::Socket { path: address.to_owned(), source };
        let listener = match open {
            Some(listener) => listener,
            None => bind(address).map_err(failed)?.into(),
        };
        if let OnDeath::Restart(command) = on_death
            && !is_told(command)
        {
            // Not closed over `exec`, and never in this process.
            let kept = rustix::io::dup(&listener).map_err(|errno| failed(errno.into()))?.into_raw_fd();
            command.push(format!("{ARGUMENT}={kept}").into());
        }
        Ok(Self { listener, address: address.to_owned() })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> &Path {
        &self.address
    }

    /// Returns a descriptor to accept connections on.
    pub(crate) fn socket(&self) -> io::Result<tokio::net::UnixListener> {
        let listener = UnixListener::from(self.listener.as_fd().try_clone_to_owned()?);
        listener.set_nonblocking(true)?;
        tokio::net::UnixListener::from_std(listener)
    }

    /// Nobody serves there any more.
    pub(crate) fn remove(&self) {
        let _ = std::fs::remove_file(&self.address);
    }
}

/// Listens on an address, for this process alone.
///
/// # Errors
/// See [`DaemonError::Socket`]; also where somebody listens there.
pub fn listen(address: &Path) -> Result<tokio::net::UnixListener, DaemonError> {
    let listen = || {
        if std::os::unix::net::UnixStream::connect(address).is_ok() {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "somebody listens there"));
        }
        let listener = bind(address)?;
        listener.set_nonblocking(true)?;
        tokio::net::UnixListener::from_std(listener)
    };
    listen().map_err(|source| DaemonError::Socket { path: address.to_owned(), source })
}

/// Connections to a socket.
pub(crate) fn incoming(listener: tokio::net::UnixListener) -> impl Stream<Item = io::Result<tokio::net::UnixStream>> {
    futures_util::stream::unfold(listener, |listener| async {
        let accepted = listener.accept().await.map(|(stream, _)| stream);
        if accepted.is_err() {
            // No descriptor is left, mostly.
            tokio::time::sleep(PAUSE).await;
        }
        Some((accepted, listener))
    })
}

/// Whether the command is that of a successor, which has the descriptor.
fn is_told(command: &[OsString]) -> bool {
    command.iter().any(|argument| argument.as_encoded_bytes().starts_with(ARGUMENT.as_bytes()))
}

/// Makes a socket which only this user can use. One that nobody listens on is replaced.
fn bind(address: &Path) -> io::Result<UnixListener> {
    if let Some(parent) = address.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o711).create(parent)?;
    }
    // Made beside its place and renamed, so that nobody meets it before it has its mode.
    let mut beside = address.as_os_str().to_owned();
    beside.push(format!(".{}", std::process::id()));
    let beside = PathBuf::from(beside);
    let _ = std::fs::remove_file(&beside);
    let listener = UnixListener::bind(&beside)?;
    let placed = std::fs::set_permissions(&beside, std::fs::Permissions::from_mode(0o600))
        .and_then(|()| std::fs::rename(&beside, address));
    if let Err(error) = placed {
        let _ = std::fs::remove_file(&beside);
        return Err(error);
    }
    Ok(listener)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_successor_finds_the_socket_and_clients_wait_meanwhile() {
        let directory = tempfile::tempdir().unwrap();
        let address = directory.path().join("a/service.sock");
        let mut on_death = OnDeath::Restart(vec!["loris".into()]);
        let first = Listener::open(&address, None, &mut on_death).unwrap();
        assert_eq!(address.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let OnDeath::Restart(command) = &on_death else { panic!() };
        let number = command[1].to_str().unwrap().strip_prefix("--listener-fd=").unwrap().parse().unwrap();
        drop(first);
        let waiting = UnixStream::connect(&address).unwrap();
        let told = command.len();
        let again = Listener::open(&address, Some(inherited(number).unwrap()), &mut on_death).unwrap();
        let OnDeath::Restart(command) = &on_death else { panic!() };
        assert_eq!(command.len(), told, "told once");
        let (_, _) = UnixListener::from(again.listener).accept().unwrap();
        drop(waiting);
        assert!(inherited(9_999).is_err());
    }
}
