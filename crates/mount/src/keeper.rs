//! The keeper: a tiny second process, so that mounts fail closed.
//!
//! A pager's fanotify group must never be without a holder while a mount needs it: the kernel would let readers through,
//! and holes read as zeros. So the keeper holds the group too, and the journal, the data files and the register of
//! mounts. The *daemon* (the process with the pager) and its keeper watch each other over a socket:
//!
//! | who is killed | what happens |
//! |---|---|
//! | the daemon, [`OnDeath::Restart`] | readers wait; the keeper starts a successor, which [inherits](Keeper::inherit) all of it |
//! | the daemon, [`OnDeath::Clean`] | the keeper refuses reads (`EIO`), takes the mounts down, and ends when they are gone |
//! | the keeper | the daemon starts another one |
//! | both in the same instant | the next one that mounts finds their register unlocked and takes the mounts down; of those that are in use, a keeper without a daemon refuses reads ([`crate::register`]) |
//!
//! A successor always starts a keeper of its own and then dismisses the one that started it. So the keeper is as new as
//! the daemon: the binary is upgraded by ending the daemon without unmounting.
//!
//! Which keeper is in charge stands in the journal (its *generation*): of two that see the same daemon die, one acts.
//!
//! It keeps the connection of [devices over FUSE](crate::engine::Engine::ErofsFuse) in the same way, but for one thing: the
//! kernel fails their reads by itself when nobody holds it any more.
//!
//! What this module must not know: what is mounted, what events and requests mean beyond refusing them.

use std::{
    ffi::OsString,
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    net::{
        AddressFamily, SocketFlags, SocketType, socketpair,
        sockopt::{Timeout, set_socket_timeout},
    },
};

use crate::pager::{OnDeath, PagerError, PagerOptions, journal::Journal};

mod inherited;
mod message;
#[cfg(test)]
mod model;
mod process;

pub(crate) use inherited::Asking;
pub use inherited::Inherited;

use message::{Kind, Message};

/// The hidden verb of the binary under which it is the keeper.
pub const VERB: &str = "mount-keeper";
/// Set for a successor, whose standard input is the keeper's socket.
pub const INHERIT: &str = "LORIS_INHERIT_MOUNTS";

pub use process::main;

/// Most layers that a keeper keeps.
pub(crate) const LAYERS: u64 = process::FILES as u64;

/// How long a keeper may take to hear what it is told. It does nothing else meanwhile.
const ANSWER: Duration = Duration::from_secs(30);

/// What a keeper keeps beside files.
pub(crate) struct Kept<'a> {
    pub(crate) asks: Asks<'a>,
    pub(crate) journal: &'a Journal,
    pub(crate) register: BorrowedFd<'a>,
}

/// How the kernel asks the daemon, see [`Asking`](inherited::Asking).
pub(crate) enum Asks<'a> {
    Events { group: BorrowedFd<'a>, inotify: BorrowedFd<'a> },
    Requests { connection: BorrowedFd<'a> },
}

/// The daemon's end.
#[derive(Debug)]
pub struct Keeper {
    link: Mutex<Link>,
    start: Start,
}

/// How a keeper is started.
#[derive(Debug)]
struct Start {
    program: PathBuf,
    mode: &'static str,
    command: Vec<OsString>,
    patience: Duration,
    log: Option<PathBuf>,
}

#[derive(Debug)]
struct Link {
    socket: Arc<OwnedFd>,
    child: Child,
    /// It is dead, and another one could not be started so far.
    is_lost: bool,
}

impl Keeper {
    /// Starts a keeper and hands everything over. On return it is in charge.
    pub(crate) fn start(
        kept: &Kept<'_>,
        files: Vec<(u64, [File; 2])>,
        options: &PagerOptions,
    ) -> Result<Self, PagerError> {
        let (mode, command) = match &options.on_death {
            OnDeath::Restart(command) => (process::RESTART, command.clone()),
            OnDeath::Clean(command) => (process::CLEAN, command.clone()),
        };
        let program = program(options.keeper.as_deref()).map_err(PagerError::Keeper)?;
        let start = Start { program, mode, command, patience: options.patience, log: options.log.clone() };
        let link = Link::start(&start, kept, files, Predecessor::MayLive).map_err(PagerError::Keeper)?;
        Ok(Self { link: Mutex::new(link), start })
    }

    /// Starts one that has no daemon: it refuses reads of files that no living process can fill, until all mounts of the
    /// journal are gone.
    pub(crate) fn refuse(kept: &Kept<'_>, files: Vec<(u64, [File; 2])>, keeper: Option<&Path>) -> io::Result<()> {
        let (mode, log) = (process::REFUSE, Some("/dev/null".into()));
        let start = Start { program: program(keeper)?, mode, command: Vec::new(), patience: Duration::ZERO, log };
        let Link { socket, mut child, .. } = Link::start(&start, kept, files, Predecessor::IsDead)?;
        drop(socket);
        // Where this process lives for longer.
        let waiting = std::thread::Builder::new().name("loris-refusing".to_owned());
        waiting.spawn(move || child.wait()).map(drop)
    }

    /// Starts another one in the place of one that was killed. `files` is asked while nobody can hand over another one.
    pub(crate) fn replace(
        &self,
        kept: &Kept<'_>,
        files: impl FnOnce() -> io::Result<Vec<(u64, [File; 2])>>,
    ) -> io::Result<()> {
        let mut link = self.link();
        let _ = link.child.wait();
        link.is_lost = true;
        *link = Link::start(&self.start, kept, files()?, Predecessor::IsDead)?;
        Ok(())
    }

    /// Hands a layer's files over.
    ///
    /// # Errors
    /// Where there is no keeper and none could be started: nothing must be mounted then.
    pub(crate) fn keep(&self, key: u64, [data, lock]: [&File; 2]) -> io::Result<()> {
        if self.link().is_lost {
            return Err(io::Error::new(
                io::ErrorKind::NotConnected,
                "it was killed, and another one cannot be started",
            ));
        }
        self.tell(&Message { kind: Kind::Keep, number: key }, &[data.as_fd(), lock.as_fd()])
    }

    /// A layer's files need not be kept any more.
    pub(crate) fn forget(&self, key: u64) {
        let _ = self.tell(&Message { kind: Kind::Forget, number: key }, &[]);
    }

    /// Ends the keeper, or lets it refuse all reads where mounts are still in use.
    pub(crate) fn leave(&self, mounts_are_up: bool) {
        let kind = if mounts_are_up { Kind::Refuse } else { Kind::Dismiss };
        let _ = self.tell(&Message { kind, number: 0 }, &[]);
        if !mounts_are_up {
            let _ = self.link().child.wait();
        }
    }

    /// A keeper that was killed loses what it is sent; its successor is given everything.
    fn tell(&self, message: &Message, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        match message.send(&self.link().socket, descriptors) {
            Err(error) if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => Ok(()),
            result => result,
        }
    }

    /// Waits until the keeper was killed: `true`; or until `stop` is readable: `false`.
    fn wait_for_death(&self, stop: &OwnedFd) -> bool {
        let socket = Arc::clone(&self.link().socket);
        loop {
            // The keeper says nothing unasked: whatever happens on its socket is the end.
            let mut wanted = [PollFd::new(&*socket, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
            if poll(&mut wanted, None).is_ok() {
                return wanted[1].revents().is_empty();
            }
        }
    }

    /// Starts a new keeper by `replace` whenever the old one was killed, until `stop` is readable and `stopping` set.
    pub(crate) fn attend(&self, stop: &OwnedFd, stopping: &AtomicBool, replace: impl Fn() -> io::Result<()>) {
        while self.wait_for_death(stop) {
            if stopping.load(Ordering::SeqCst) {
                return;
            }
            tracing::warn!("the keeper of mounts was killed; another one is started");
            if let Err(error) = replace() {
                tracing::error!(%error, "mounts have no keeper, and do not survive this process if it is killed now");
                std::thread::sleep(Duration::from_secs(1));
            }
        }
    }

    /// Takes over from a daemon that was killed, where this process was started as its successor. Must come before
    /// files are opened that are to be closed again. The standard input is replaced by nothing.
    ///
    /// # Errors
    /// Where the keeper is gone too, or of another version.
    pub fn inherit() -> io::Result<Option<Inherited>> {
        Self::inherited_socket()?.map(Self::inherit_through).transpose()
    }

    /// Returns the keeper's socket, where this process was started as the successor of a daemon that was killed. The
    /// standard input is replaced by nothing.
    ///
    /// # Errors
    /// Where there are too many open files.
    pub fn inherited_socket() -> io::Result<Option<OwnedFd>> {
        if std::env::var_os(INHERIT).is_none() {
            return Ok(None);
        }
        let keeper = rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3)?;
        rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
        Ok(Some(keeper))
    }

    /// Takes over from a daemon that was killed, by the socket of its keeper. Must come before files are opened that are
    /// to be closed again.
    ///
    /// # Errors
    /// Where the keeper is gone too, or of another version.
    pub fn inherit_through(keeper: OwnedFd) -> io::Result<Inherited> {
        Inherited::receive(keeper)
    }

    fn link(&self) -> MutexGuard<'_, Link> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells a keeper that its daemon has a new one.
pub(crate) fn dismiss(keeper: &OwnedFd) {
    let _ = Message { kind: Kind::Dismiss, number: 0 }.send(keeper, &[]);
}

/// What is known of the keeper before a new one.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Predecessor {
    /// It stays in charge until the new one has heard everything; or there never was one.
    MayLive,
    /// Nobody is in charge.
    IsDead,
}

impl Link {
    fn start(
        start: &Start,
        kept: &Kept<'_>,
        files: Vec<(u64, [File; 2])>,
        predecessor: Predecessor,
    ) -> io::Result<Self> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        // One that stands still must not stop whoever mounts or unmounts.
        for direction in [Timeout::Send, Timeout::Recv] {
            set_socket_timeout(&ours, direction, Some(ANSWER))?;
        }
        let log = match &start.log {
            Some(path) => Stdio::from(File::options().create(true).append(true).open(path)?),
            None => Stdio::inherit(),
        };
        let child = Command::new(&start.program)
            .arg(VERB)
            .arg(start.mode)
            .arg(start.patience.as_millis().to_string())
            .arg("--")
            .args(&start.command)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()?;
        let link = Self { socket: Arc::new(ours), child, is_lost: false };
        let generation = kept.journal.next_generation();
        if predecessor == Predecessor::IsDead {
            // In charge from its first packet on: where this process is killed before the last one, nobody else is there.
            kept.journal.generation().store(generation, Ordering::Release);
        }
        match link.hand_over(kept, files, generation) {
            Ok(()) => {
                // From here on it is in charge, and its predecessor is not.
                kept.journal.generation().store(generation, Ordering::Release);
                Ok(link)
            }
            Err(error) => {
                if predecessor == Predecessor::IsDead {
                    // Before its socket is closed, which it would take for the death of this process.
                    kept.journal.generation().store(kept.journal.next_generation(), Ordering::Release);
                }
                let Self { socket, mut child, .. } = link;
                drop(socket);
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    fn hand_over(&self, kept: &Kept<'_>, files: Vec<(u64, [File; 2])>, generation: u32) -> io::Result<()> {
        let (journal, number) = (kept.journal.memory(), u64::from(generation));
        let (kind, state) = match kept.asks {
            Asks::Events { group, inotify } => (Kind::State, vec![group, journal, inotify, kept.register]),
            Asks::Requests { connection } => (Kind::Devices, vec![connection, journal, kept.register]),
        };
        Message { kind, number }.send(&self.socket, &state)?;
        for (key, [data, lock]) in files {
            Message { kind: Kind::Keep, number: key }.send(&self.socket, &[data.as_fd(), lock.as_fd()])?;
        }
        Message { kind: Kind::End, number: 0 }.send(&self.socket, &[])?;
        let (answer, _) = Message::receive(&self.socket)?;
        if answer.kind == Kind::End { Ok(()) } else { Err(message::garbled()) }
    }
}

/// Returns the program that is the keeper.
fn program(wanted: Option<&Path>) -> io::Result<PathBuf> {
    match wanted {
        Some(program) => Ok(program.to_owned()),
        // Not /proc/self/exe: after an upgrade, the path leads to the new binary.
        None => this_program(),
    }
}

/// Returns the path of this program, for a process that is to be started later: after an upgrade it leads to the new binary,
/// as `/proc/self/exe` does not.
///
/// # Errors
/// Where `/proc` is not there.
pub fn this_program() -> io::Result<PathBuf> {
    std::env::current_exe().map(program_on_disk)
}

/// Returns the path of a program that may have been replaced: the kernel marks the name of one that was.
fn program_on_disk(program: PathBuf) -> PathBuf {
    use std::os::unix::ffi::OsStrExt as _;
    match program.as_os_str().as_bytes().strip_suffix(b" (deleted)") {
        Some(path) => PathBuf::from(std::ffi::OsStr::from_bytes(path)),
        None => program,
    }
}
