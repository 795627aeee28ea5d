//! What a service manager says to a process, and is told: sockets that it has opened (`sd_listen_fds(3)`), and how the
//! process gets on (`sd_notify(3)`).
//!
//! What this module must not know: what the process does.

use std::{
    ffi::{OsStr, OsString},
    io,
    os::{
        fd::OwnedFd,
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
};

use rustix::{
    net::{
        AddressFamily,
        sockopt::{socket_acceptconn, socket_domain},
    },
    process::getpid,
    time::{ClockId, clock_gettime},
};

use crate::listener;

/// The first descriptor that is passed.
const FIRST: i32 = 3;

/// How a process gets on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// It serves; after [`State::Reloading`] too.
    Ready,
    /// It reads its configuration again.
    Reloading,
    /// It is about to end.
    Stopping,
}

/// Whether a service manager of systemd's kind has started this process, and starts another one when it ends.
#[must_use]
pub fn is_manager() -> bool {
    // The first alone is inherited by everything below any unit, as a terminal is.
    let is_set = |name: &str| std::env::var_os(name).is_some();
    is_set("INVOCATION_ID") && (is_set("NOTIFY_SOCKET") || is_set("LISTEN_FDS"))
}

/// Tells the service manager, where there is one that wants to know. That it can't be told is no reason to fail.
pub fn tell(state: State) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    if let Err(error) = send(&path, &state.message()) {
        tracing::warn!(%error, ?path, "the service manager can't be told how this process gets on");
    }
}

impl State {
    fn message(self) -> String {
        match self {
            Self::Ready => format!("READY=1\nMAINPID={}\n", getpid()),
            Self::Reloading => {
                let now = clock_gettime(ClockId::Monotonic);
                format!("RELOADING=1\nMONOTONIC_USEC={}\n", now.tv_sec * 1_000_000 + now.tv_nsec / 1000)
            }
            Self::Stopping => "STOPPING=1\n".to_owned(),
        }
    }
}

fn send(path: &OsStr, message: &str) -> io::Result<()> {
    let address = match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(path)?,
    };
    UnixDatagram::unbound()?.send_to_addr(message.as_bytes(), &address).map(drop)
}

/// Returns the socket that the service manager listens on for this process, where it does.
///
/// # Errors
/// Where it passes something else, or more than one.
pub fn socket() -> io::Result<Option<OwnedFd>> {
    let variable = |name| std::env::var_os(name);
    let process = getpid().as_raw_nonzero().get();
    match passed(variable("LISTEN_PID"), variable("LISTEN_FDS"), process) {
        0 => Ok(None),
        1 => {
            let socket = listener::inherited(FIRST)?;
            let listens = socket_domain(&socket)? == AddressFamily::UNIX && socket_acceptconn(&socket)?;
            if listens {
                Ok(Some(socket))
            } else {
                Err(invalid("what the service manager passes is no socket to listen on"))
            }
        }
        number => Err(invalid(&format!("the service manager passes {number} sockets, and one is expected"))),
    }
}

/// How many descriptors are passed, to this process and no other.
fn passed(to: Option<OsString>, number: Option<OsString>, process: i32) -> u32 {
    let text = |value: Option<OsString>| value?.into_string().ok();
    let is_meant = text(to).and_then(|to| to.parse().ok()) == Some(process);
    if is_meant { text(number).and_then(|number| number.parse().ok()).unwrap_or(0) } else { 0 }
}

fn invalid(detail: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, detail)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn descriptors_are_those_of_this_process() {
        let cases = [
            (Some("7"), Some("1"), 1),
            (Some("8"), Some("1"), 0),
            (None, Some("1"), 0),
            (Some("7"), None, 0),
            (Some("7"), Some("x"), 0),
        ];
        for (to, number, expected) in cases {
            assert_eq!(passed(to.map(OsString::from), number.map(OsString::from), 7), expected, "{to:?} {number:?}");
        }
    }

    #[test]
    fn states_are_sent_to_paths_and_abstract_names() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let abstract_name = format!("loris-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&abstract_name).unwrap();
        let receivers = [UnixDatagram::bind(&path).unwrap(), UnixDatagram::bind_addr(&address).unwrap()];
        for (receiver, name) in receivers.iter().zip([path.into_os_string(), format!("@{abstract_name}").into()]) {
            for state in [State::Ready, State::Reloading, State::Stopping] {
                send(&name, &state.message()).unwrap();
                let mut message = [0; 200];
                let length = receiver.recv(&mut message).unwrap();
                let word = ["READY=1\n", "RELOADING=1\n", "STOPPING=1\n"][state as usize];
                assert!(message[..length].starts_with(word.as_bytes()));
            }
        }
        assert!(send(OsStr::new("/nowhere/at/all"), "x").is_err());
    }
}
