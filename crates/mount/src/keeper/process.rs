//! The keeper's own process.
//!
//! It has one thread, and allocates nothing once it has started: what it needs it has then. Standard input is the
//! socket of the daemon.

use std::{
    ffi::{CString, OsString},
    fs::File,
    io::{self, Write as _},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::ffi::OsStringExt,
    },
    process::ExitCode,
    ptr,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::inotify,
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
    process::{Pid, WaitOptions, waitpid},
};

use super::{
    INHERIT,
    message::{Kind, Message, garbled},
};
use crate::{
    fuse::devices::wire::{Connection, REQUEST_BYTES},
    pager::{
        event::{Answer, Event},
        group::Group,
        journal::Journal,
    },
};

/// Start a successor.
pub(super) const RESTART: &str = "restart";
/// Refuse reads, and run a program that takes the mounts down.
pub(super) const CLEAN: &str = "clean";

/// Most layers whose files are kept.
const FILES: usize = 8192;
/// Between attempts to start a successor that does not live.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// How often is looked at what does not announce itself.
const TICK: Duration = Duration::from_millis(50);
/// As low as it goes for what may still be killed by hand: the kernel kills it last.
const OOM_SCORE: &[u8] = b"-999";
const OOM_FILE: &std::ffi::CStr = c"/proc/self/oom_score_adj";

/// Is the keeper, until there is nothing to keep. `arguments` are those behind the [verb](super::VERB), as the daemon
/// gave them.
#[must_use]
pub fn main(arguments: &[OsString]) -> ExitCode {
    match Keeper::start(arguments).and_then(Keeper::run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Where that is written to may be gone.
            let _ = writeln!(io::stderr(), "loris: the keeper of mounts ends: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What the keeper has.
struct Keeper {
    socket: OwnedFd,
    /// Whether the successor is started anew each time, or the mounts are taken down.
    restarts: bool,
    command: Command,
    /// After so long without a daemon, readers are refused and no longer kept waiting.
    patience: Duration,
    asks: Asks,
    journal: Journal,
    register: OwnedFd,
    generation: u32,
    /// When the daemon died that had started this keeper. A successor that has taken over starts a keeper of its own, so
    /// that this one sees no other death than that of successors which failed.
    died: Option<Instant>,
    pause: Duration,
    files: Vec<Option<(u64, File, File)>>,
}

/// How the kernel asks.
enum Asks {
    /// A group, and inotify for its mounts.
    Events(Group, OwnedFd),
    /// A connection of FUSE, and room for a request.
    Requests(Connection, Box<[u8; REQUEST_BYTES]>),
}

/// What ended the service of a daemon.
enum End {
    /// There is nothing to keep any more.
    Dismissed,
    /// It has left mounts that are in use, and will not come back.
    Left,
    /// It was killed.
    Died,
}

impl Keeper {
    fn start(arguments: &[OsString]) -> io::Result<Self> {
        let [mode, patience, separator, command @ ..] = arguments else { return Err(garbled()) };
        let patience = patience.to_str().and_then(|milliseconds| milliseconds.parse().ok()).ok_or_else(garbled)?;
        if separator != "--" || command.is_empty() {
            return Err(garbled());
        }
        let restarts = match mode.to_str() {
            Some(RESTART) => true,
            Some(CLEAN) => false,
            _ => return Err(garbled()),
        };
        let socket = rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3)?;
        rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
        let command = Command::new(command, restarts)?;
        set_apart();

        let (message, descriptors) = Message::receive(&socket)?;
        let (asks, journal, register) = match message.kind {
            Kind::State => {
                let [group, journal, inotify, register] = descriptors_of(descriptors)?;
                (Asks::Events(Group::from_descriptor(group), inotify), journal, register)
            }
            Kind::Devices => {
                let [connection, journal, register] = descriptors_of(descriptors)?;
                (Asks::Requests(Connection::new(connection), Box::new([0; REQUEST_BYTES])), journal, register)
            }
            _ => return Err(garbled()),
        };
        let generation = u32::try_from(message.number).map_err(|_| garbled())?;
        let files = (0..FILES).map(|_| None).collect();
        let journal = Journal::attach(journal)?;
        let mut keeper = Self {
            socket,
            restarts,
            command,
            patience: Duration::from_millis(patience),
            asks,
            journal,
            register,
            generation,
            died: None,
            pause: FIRST_PAUSE,
            files,
        };
        while keeper.receive()? != Some(Kind::End) {}
        Message { kind: Kind::End, number: 0 }.send(&keeper.socket, &[])?;
        Ok(keeper)
    }

    fn run(mut self) -> io::Result<()> {
        loop {
            let end = self.serve()?;
            // Another keeper is in charge, or this one never was.
            if self.journal.generation().load(Ordering::Acquire) != self.generation {
                return Ok(());
            }
            match end {
                End::Dismissed => return Ok(()),
                End::Died if self.restarts => self.restart()?,
                End::Died => return self.clean(),
                End::Left => return self.refuse_until_gone(None),
            }
        }
    }

    /// Does what the daemon says, until it does not say anything any more.
    fn serve(&mut self) -> io::Result<End> {
        let mut left = false;
        loop {
            match self.receive()? {
                Some(Kind::Dismiss) => return Ok(End::Dismissed),
                Some(Kind::Refuse) => left = true,
                Some(Kind::Resume) => self.send_everything()?,
                Some(_) => {}
                None => return Ok(if left { End::Left } else { End::Died }),
            }
        }
    }

    /// Receives one message and keeps or drops what it is about. `None` where the daemon is gone.
    fn receive(&mut self) -> io::Result<Option<Kind>> {
        let mut received = [None, None, None, None];
        let mut count = 0;
        let message = Message::receive_into(&self.socket, |descriptor| {
            if let Some(place) = received.get_mut(count) {
                *place = Some(File::from(descriptor));
                count += 1;
            }
        });
        // An error ends the keeper, and the daemon starts another one; a successor that died in the middle of its start is a
        // death like others.
        let Some(message) = message? else { return Ok(None) };
        match (message.kind, received) {
            (Kind::Keep, [None, ..] | [_, None, ..]) => return Err(garbled()),
            (Kind::Keep, [Some(data), Some(lock), ..]) => {
                self.forget(message.number);
                let free = self.files.iter_mut().find(|place| place.is_none());
                *free.ok_or_else(garbled)? = Some((message.number, data, lock));
            }
            (Kind::Forget, _) => self.forget(message.number),
            _ => {}
        }
        Ok(Some(message.kind))
    }

    fn forget(&mut self, key: u64) {
        for place in &mut self.files {
            if place.as_ref().is_some_and(|(kept, ..)| *kept == key) {
                *place = None;
            }
        }
    }

    /// Gives a successor what its predecessor had. Where it dies over that, the next read of the socket says so.
    fn send_everything(&self) -> io::Result<()> {
        let (journal, register) = (self.journal.memory(), self.register.as_fd());
        let number = u64::from(self.generation);
        let send = || {
            match &self.asks {
                Asks::Events(group, inotify) => Message { kind: Kind::State, number }
                    .send(&self.socket, &[group.as_fd(), journal, inotify.as_fd(), register])?,
                Asks::Requests(connection, _) => Message { kind: Kind::Devices, number }
                    .send(&self.socket, &[connection.as_fd(), journal, register])?,
            }
            for (key, data, lock) in self.files.iter().flatten() {
                Message { kind: Kind::Keep, number: *key }.send(&self.socket, &[data.as_fd(), lock.as_fd()])?;
            }
            Message { kind: Kind::End, number: 0 }.send(&self.socket, &[])
        };
        match send() {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
            _ => Ok(()),
        }
    }

    /// Starts successors until one takes over.
    fn restart(&mut self) -> io::Result<()> {
        // At once for the first one.
        if let Some(died) = self.died {
            self.refuse_for(self.pause, died);
            self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        }
        let died = *self.died.get_or_insert_with(Instant::now);
        loop {
            let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
            let child = self.command.spawn(&theirs);
            drop(theirs);
            if child.is_ok() {
                self.socket = ours;
                if self.wait_for_successor(died) {
                    return Ok(());
                }
            }
            reap();
            self.refuse_for(self.pause, died);
            self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Waits until a successor asks for its inheritance (which [`Keeper::serve`] then gives): `true`; or is dead.
    fn wait_for_successor(&mut self, died: Instant) -> bool {
        loop {
            let mut wanted = [PollFd::new(&self.socket, PollFlags::IN)];
            match poll(&mut wanted, Some(&timespec(TICK))) {
                Ok(0) => self.refuse_for(Duration::ZERO, died),
                Ok(_) => return wanted[0].revents().contains(PollFlags::IN) && !is_at_end(&self.socket),
                Err(_) => {}
            }
            reap();
        }
    }

    /// Waits for a moment; where there was no daemon for too long, readers are refused meanwhile.
    fn refuse_for(&mut self, pause: Duration, died: Instant) {
        let end = Instant::now() + pause;
        let refuses = died.elapsed() > self.patience;
        loop {
            if refuses {
                self.refuse_what_was_left();
                self.refuse_waiting();
            }
            let rest = end.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return;
            }
            std::thread::sleep(rest.min(TICK));
        }
    }

    /// Takes the mounts down, refusing reads.
    fn clean(self) -> io::Result<()> {
        self.refuse_what_was_left();
        let child = self.command.spawn(&File::open("/dev/null")?).ok();
        self.refuse_until_gone(child)
    }

    /// Refuses reads until no mount is up and a child has ended.
    fn refuse_until_gone(mut self, mut child: Option<Pid>) -> io::Result<()> {
        self.refuse_what_was_left();
        loop {
            if let Some(pid) = child
                && !matches!(waitpid(Some(pid), WaitOptions::NOHANG), Ok(None))
            {
                child = None;
            }
            // Of devices this process holds the last descriptor, with whose end the kernel refuses everything.
            let Asks::Events(group, inotify) = &self.asks else { return Ok(()) };
            forget_mounts(&self.journal, inotify);
            if child.is_none() && !self.journal.has_mounts() {
                return Ok(());
            }
            let mut wanted = [PollFd::new(group, PollFlags::IN), PollFd::new(inotify, PollFlags::IN)];
            let _ = poll(&mut wanted, Some(&timespec(TICK)));
            self.refuse_waiting();
        }
    }

    /// Refuses events that a daemon read and did not answer. No daemon may be alive, and no event read by this process
    /// be open: their numbers are those of other events.
    fn refuse_what_was_left(&self) {
        let Asks::Events(group, _) = &self.asks else { return };
        for slot in (0..self.journal.slots()).filter(|&slot| !self.journal.is_free(slot)) {
            if let Ok(event) = Event::parse(&self.journal.event(slot)) {
                let _ = group.answer(event.descriptor, Answer::Deny(Errno::IO));
            }
            self.journal.clear(slot);
        }
    }

    /// Refuses all that wait.
    fn refuse_waiting(&mut self) {
        let group = match &mut self.asks {
            Asks::Events(group, _) => group,
            Asks::Requests(connection, buffer) => return connection.refuse_waiting(buffer),
        };
        let mut buffer = [0; 88];
        while let Ok(length) = rustix::io::read(&*group, &mut buffer) {
            let Ok(event) = Event::parse(&buffer[..length]) else { continue };
            let _ = group.answer(event.descriptor, Answer::Deny(Errno::IO));
            if event.descriptor >= 0 {
                // SAFETY: the kernel opened it for this process with the event, and nobody else knows of it.
                drop(unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(event.descriptor) });
            }
        }
    }
}

/// Notes which mounts are gone.
fn forget_mounts(journal: &Journal, inotify: &OwnedFd) {
    let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
    let mut reader = inotify::Reader::new(inotify.as_fd(), &mut buffer);
    while let Ok(event) = reader.next() {
        if event.events().intersects(inotify::ReadFlags::UNMOUNT | inotify::ReadFlags::IGNORED) {
            journal.forget_mount(event.wd());
        }
    }
}

fn descriptors_of<const N: usize>(descriptors: Vec<OwnedFd>) -> io::Result<[OwnedFd; N]> {
    <[OwnedFd; N]>::try_from(descriptors).map_err(|_| garbled())
}

/// A program to start, prepared so that starting it allocates nothing.
struct Command {
    /// What `argv` points to.
    _arguments: Vec<CString>,
    argv: Vec<*const libc::c_char>,
    _environment: Vec<CString>,
    envp: Vec<*const libc::c_char>,
}

impl Command {
    fn new(command: &[OsString], inherits: bool) -> io::Result<Self> {
        let c_string = |text: OsString| CString::new(text.into_vec()).map_err(io::Error::other);
        let arguments = command.iter().cloned().map(c_string).collect::<io::Result<Vec<_>>>()?;
        let mut environment = std::env::vars_os()
            .filter(|(name, _)| name != INHERIT)
            .map(|(name, value)| {
                let mut pair = name;
                pair.push("=");
                pair.push(value);
                c_string(pair)
            })
            .collect::<io::Result<Vec<_>>>()?;
        if inherits {
            environment.push(c_string(format!("{INHERIT}=1").into())?);
        }
        let pointers =
            |strings: &[CString]| strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect::<Vec<_>>();
        let (argv, envp) = (pointers(&arguments), pointers(&environment));
        Ok(Self { _arguments: arguments, argv, _environment: environment, envp })
    }

    /// Starts it with a standard input.
    fn spawn(&self, stdin: &impl AsRawFd) -> io::Result<Pid> {
        let stdin = stdin.as_raw_fd();
        // SAFETY: this process has one thread. The child only makes system calls before it executes the program or ends,
        // with pointers into memory that was prepared before.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            // SAFETY: as above; the strings end with NUL and the arrays with a null pointer.
            unsafe {
                for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGPIPE] {
                    libc::signal(signal, libc::SIG_DFL);
                }
                let file = libc::open(OOM_FILE.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
                libc::write(file, c"0".as_ptr().cast(), 1);
                libc::dup2(stdin, 0);
                libc::execve(self.argv[0], self.argv.as_ptr(), self.envp.as_ptr());
                libc::_exit(127);
            }
        }
        Pid::from_raw(pid).filter(|_| pid > 0).ok_or_else(io::Error::last_os_error)
    }
}

/// Makes the process one that nobody ends by accident.
fn set_apart() {
    // Each is a help and no condition: where it is refused, the keeper does its work all the same.
    let _ = rustix::process::setsid();
    // The working directory stays: a successor's arguments may be relative to it.
    let _ = rustix::thread::set_name(c"loris-keeper");
    let _ = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE);
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGPIPE] {
        // SAFETY: ignores a signal; no handler runs.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// Takes note of children that have ended.
fn reap() {
    while matches!(waitpid(None, WaitOptions::NOHANG), Ok(Some(_))) {}
}

/// Whether the other end of a socket is gone and nothing more is to be read.
fn is_at_end(socket: &OwnedFd) -> bool {
    let mut byte = [0_u8; 1];
    let flags = rustix::net::RecvFlags::PEEK | rustix::net::RecvFlags::DONTWAIT;
    match rustix::net::recv(socket, &mut byte, flags) {
        Ok((_, length)) => length == 0,
        Err(errno) => errno != Errno::AGAIN,
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec { tv_sec: duration.as_secs().cast_signed(), tv_nsec: duration.subsec_nanos().into() }
}
