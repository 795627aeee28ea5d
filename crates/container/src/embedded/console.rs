//! A container's terminal: its other end comes through a socket, and we copy between it and ours.
//!
//! Source: OCI runtime specification, `runtime-linux.md`, and runc's `docs/terminals.md` for the socket.

use std::{
    fs::File,
    io::{self, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
    thread::{self, JoinHandle},
};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::signal::unix::{SignalKind, signal};

use crate::terminal::{Saved, copy_size};

/// How much is copied at a time. A terminal's own buffer is 4 KiB.
const COPY_BYTES: usize = 16 << 10;

/// A socket that waits for the terminal of a container.
pub struct Console {
    listener: UnixListener,
    path: PathBuf,
}

/// A terminal that we copy to and from.
pub struct Open {
    output: JoinHandle<()>,
    /// Our own terminal's settings, until the end.
    _settings: Option<Saved<io::Stdin>>,
}

impl Console {
    /// Listens in a directory.
    pub fn listen(directory: &Path) -> io::Result<Self> {
        let path = directory.join("console");
        Ok(Self { listener: UnixListener::bind(&path)?, path })
    }

    /// Returns where the socket is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the terminal that has been sent, and begins to copy. From here on the process has several threads.
    pub fn open(self) -> io::Result<Open> {
        let (socket, _) = self.listener.accept()?;
        let terminal = receive(socket.as_fd())?;
        let settings = Saved::save(io::stdin())?;
        if let Some(settings) = &settings {
            settings.make_raw()?;
        }
        copy_size(io::stdin(), &terminal)?;
        let resized = terminal.try_clone()?;
        thread::Builder::new().name("size".to_owned()).spawn(move || follow_size(&resized))?;
        let input = File::from(terminal.try_clone()?);
        // It never ends by itself: it waits in a read. It ends with the process.
        thread::Builder::new().name("input".to_owned()).spawn(move || copy(io::stdin(), input))?;
        let output = File::from(terminal);
        let output = thread::Builder::new().name("output".to_owned()).spawn(move || copy(output, io::stdout()))?;
        Ok(Open { output, _settings: settings })
    }
}

impl Open {
    /// Copies what the container has still written before it ended, and gives our terminal its settings back.
    pub fn finish(self) {
        // All processes of the container are gone, so the read of its terminal fails once it is empty.
        let _ = self.output.join();
    }
}

fn receive(socket: std::os::fd::BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut name = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    recvmsg(socket, &mut [IoSliceMut::new(&mut name)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let descriptors = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    descriptors.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the socket brought no terminal"))
}

fn copy(mut from: impl Read, mut to: impl Write) {
    let mut buffer = [0; COPY_BYTES];
    loop {
        match from.read(&mut buffer) {
            // A terminal whose other end is closed fails with EIO.
            Ok(0) => return,
            Ok(count) => {
                if to.write_all(&buffer[..count]).and_then(|()| to.flush()).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// Gives the container's terminal the size of ours, whenever that changes.
fn follow_size(terminal: &OwnedFd) {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_io().build() else { return };
    runtime.block_on(async {
        let Ok(mut changes) = signal(SignalKind::window_change()) else { return };
        // It may have changed before we listened.
        while copy_size(io::stdin(), terminal).is_ok() && changes.recv().await.is_some() {}
    });
}
