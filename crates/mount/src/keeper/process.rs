//! The keeper's own process.
//!
//! It has one thread, and allocates nothing once it has started: what it needs it has then. Standard input is the
//! socket of the daemon.
//!
//! **While it is in charge, no error ends it**: it may be the last holder of the group, with whose end readers are let
//! through. What goes wrong is tried again, and where that is in vain, readers are refused.

use std::{
    ffi::{CString, OsString},
    fs::File,
    io::{self, Write as _},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
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
    process::{Pid, Signal, WaitOptions, kill_process, waitpid},
};

use super::{
    INHERIT,
    message::{Kind, Message, garbled},
};
use crate::{
    fuse::devices::wire::{Connection, REQUEST_BYTES},
    pager::{
        claim,
        event::{Answer, Event},
        group::Group,
        journal::Journal,
    },
};

/// Start a successor.
pub(super) const RESTART: &str = "restart";
/// Refuse reads, and run a program that takes the mounts down.
pub(super) const CLEAN: &str = "clean";
/// Refuse reads of what nobody else can fill, until the mounts are gone.
pub(super) const REFUSE: &str = "refuse";

/// Most layers whose files are kept.
pub(super) const FILES: usize = 8192;
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
    on_death: OnDeath,
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
    /// The last successor that was started, while it is known to be there.
    successor: Option<Pid>,
    files: Vec<Option<(u64, File, File)>>,
}

/// How the kernel asks.
enum Asks {
    /// A group, and inotify for its mounts.
    Events(Group, OwnedFd),
    /// A connection of FUSE, and room for a request.
    Requests(Connection, Box<[u8; REQUEST_BYTES]>),
}

/// What is done when the daemon is killed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum OnDeath {
    /// A successor is started, until one lives.
    Restart,
    /// The mounts are taken down.
    Clean,
    /// They are already, and somebody uses them still.
    Refuse,
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

/// How far it is that mounts are taken down.
#[derive(Clone, Copy)]
enum Cleaning {
    /// Tried when that time has come.
    From(Instant),
    By(Pid),
    /// Or nobody asked for it.
    Done,
}

impl Keeper {
    fn start(arguments: &[OsString]) -> io::Result<Self> {
        let [mode, patience, separator, command @ ..] = arguments else { return Err(garbled()) };
        let patience = patience.to_str().and_then(|milliseconds| milliseconds.parse().ok()).ok_or_else(garbled)?;
        let on_death = match mode.to_str() {
            Some(RESTART) => OnDeath::Restart,
            Some(CLEAN) => OnDeath::Clean,
            Some(REFUSE) => OnDeath::Refuse,
            _ => return Err(garbled()),
        };
        if separator != "--" || (command.is_empty() && on_death != OnDeath::Refuse) {
            return Err(garbled());
        }
        let socket = rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3)?;
        rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
        let command = Command::new(command, on_death == OnDeath::Restart)?;
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
            on_death,
            command,
            patience: Duration::from_millis(patience),
            asks,
            journal,
            register,
            generation,
            died: None,
            pause: FIRST_PAUSE,
            successor: None,
            files,
        };
        match keeper.hear_everything() {
            // Its daemon was killed over that, or has given it up. The predecessor goes on.
            Err(error) if !keeper.is_in_charge() => Err(error),
            // There is no predecessor: what was heard so far has to do.
            _ => Ok(keeper),
        }
    }

    /// Receives what is to be kept, and says that it is.
    fn hear_everything(&mut self) -> io::Result<()> {
        loop {
            match self.receive() {
                Ok(Some(Kind::End)) => return Message { kind: Kind::End, number: 0 }.send(&self.socket, &[]),
                Ok(Some(_)) => {}
                Ok(None) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Err(error) if self.is_in_charge() => go_on_after(&error),
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether this is the keeper that acts: neither was it replaced, nor is its predecessor still the one.
    fn is_in_charge(&self) -> bool {
        self.journal.generation().load(Ordering::Acquire) == self.generation
    }

    fn run(mut self) -> io::Result<()> {
        loop {
            let end = self.serve()?;
            if !self.is_in_charge() {
                return Ok(());
            }
            match end {
                End::Dismissed => return Ok(()),
                End::Died if self.on_death == OnDeath::Restart => self.restart(),
                End::Died => {
                    self.refuse_until_gone(self.on_death == OnDeath::Clean);
                    return Ok(());
                }
                End::Left => {
                    self.refuse_until_gone(false);
                    return Ok(());
                }
            }
        }
    }

    /// Does what the daemon says, until it does not say anything any more. An error is that of a keeper which is not in
    /// charge.
    fn serve(&mut self) -> io::Result<End> {
        let mut left = false;
        loop {
            let said = match self.receive() {
                Ok(Some(Kind::Resume)) => self.send_everything().map(|()| Some(Kind::Resume)),
                said => said,
            };
            match said {
                Ok(Some(Kind::Dismiss)) => return Ok(End::Dismissed),
                Ok(Some(Kind::Refuse)) => left = true,
                Ok(Some(_)) => {}
                Ok(None) => return Ok(if left { End::Left } else { End::Died }),
                Err(error) if !self.is_in_charge() => return Err(error),
                // Its next one may be another program, or find more room.
                Err(error) if self.died.is_some() => {
                    go_on_after(&error);
                    self.end_successor();
                    return Ok(End::Died);
                }
                // The daemon lives. A layer of it may not be kept; its successor opens that by its path.
                Err(error) => go_on_after(&error),
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
        let Some(message) = message? else { return Ok(None) };
        match (message.kind, received) {
            (Kind::Keep, [None, ..] | [_, None, ..]) => return Err(garbled()),
            (Kind::Keep, [Some(data), Some(lock), ..]) => {
                self.forget(message.number);
                let free = self.files.iter_mut().find(|place| place.is_none());
                let full = || io::Error::from_raw_os_error(libc::EMFILE);
                *free.ok_or_else(full)? = Some((message.number, data, lock));
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
            // The latter where it has left something unread.
            Err(error) if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => Ok(()),
            result => result,
        }
    }

    /// Starts successors until one asks for its inheritance.
    fn restart(&mut self) {
        // At once for the first one.
        if let Some(died) = self.died {
            self.refuse_for(self.pause, died);
            self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        }
        let died = *self.died.get_or_insert_with(Instant::now);
        while !(self.start_successor() && self.wait_for_successor(died)) {
            self.reap();
            self.refuse_for(self.pause, died);
            self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        }
    }

    fn start_successor(&mut self) -> bool {
        let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
        let started = pair.map_err(io::Error::from).and_then(|(ours, theirs)| {
            self.successor = Some(self.command.spawn(&theirs)?);
            self.socket = ours;
            Ok(())
        });
        started.inspect_err(go_on_after).is_ok()
    }

    /// Ends a successor with whom there is nothing to be begun.
    fn end_successor(&mut self) {
        if let Some(successor) = self.successor.take() {
            // It was not waited for: the id is still its.
            let _ = kill_process(successor, Signal::KILL);
        }
    }

    /// Takes note of children that have ended.
    fn reap(&mut self) {
        while let Ok(Some((ended, _))) = waitpid(None, WaitOptions::NOHANG) {
            self.successor.take_if(|successor| *successor == ended);
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
            self.reap();
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

    /// Refuses reads until no mount is up; where it `cleans`, a program that takes them down is started, and has ended.
    fn refuse_until_gone(&mut self, cleans: bool) {
        self.refuse_what_was_left();
        let mut cleaning = if cleans { Cleaning::From(Instant::now()) } else { Cleaning::Done };
        loop {
            cleaning = self.clean(cleaning);
            // Of devices this process holds the last descriptor, with whose end the kernel refuses everything.
            let Asks::Events(group, inotify) = &self.asks else { return };
            forget_mounts(&self.journal, inotify);
            if matches!(cleaning, Cleaning::Done) && !self.journal.has_mounts() {
                return;
            }
            let mut wanted = [PollFd::new(group, PollFlags::IN), PollFd::new(inotify, PollFlags::IN)];
            let _ = poll(&mut wanted, Some(&timespec(TICK)));
            self.refuse_waiting();
        }
    }

    /// Starts the program that takes the mounts down, and again where it fails.
    fn clean(&mut self, cleaning: Cleaning) -> Cleaning {
        let again = |pause: &mut Duration| {
            let next = Instant::now() + *pause;
            *pause = (*pause * 2).min(LONGEST_PAUSE);
            Cleaning::From(next)
        };
        match cleaning {
            // The standard input leads nowhere.
            Cleaning::From(time) if time <= Instant::now() => match self.command.spawn(&io::stdin()) {
                Ok(cleaner) => Cleaning::By(cleaner),
                Err(_) => again(&mut self.pause),
            },
            Cleaning::By(cleaner) => match waitpid(Some(cleaner), WaitOptions::NOHANG) {
                Ok(None) => cleaning,
                Ok(Some((_, status))) if status.exit_status() != Some(0) => again(&mut self.pause),
                _ => Cleaning::Done,
            },
            _ => cleaning,
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
            if event.descriptor < 0 {
                continue;
            }
            // SAFETY: the kernel opened it for this process with the event, and nobody else knows of it.
            let file = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(event.descriptor) };
            // Others who serve the same layer are asked too. Nobody of theirs could read it otherwise.
            let is_others = self.on_death == OnDeath::Refuse && is_answered_by_others(&self.files, &file);
            let _ = group.answer(event.descriptor, if is_others { Answer::Allow } else { Answer::Deny(Errno::IO) });
        }
    }
}

/// Whether somebody who can fill a data file is asked too.
fn is_answered_by_others(files: &[Option<(u64, File, File)>], file: &OwnedFd) -> bool {
    let identity = |file: BorrowedFd<'_>| rustix::fs::fstat(file).map(|found| (found.st_dev, found.st_ino)).ok();
    let Some(wanted) = identity(file.as_fd()) else { return false };
    let layer = files.iter().flatten().find(|(_, data, _)| identity(data.as_fd()) == Some(wanted));
    layer.is_some_and(|(_, _, lock)| claim::is_claimed(lock))
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

/// Says what went wrong where that must not matter, and waits for a moment: it may go wrong again.
fn go_on_after(error: &io::Error) {
    // A number, since its text would take memory.
    let _ = writeln!(
        io::stderr(),
        "loris: the keeper of mounts goes on after an error ({:?}, {})",
        error.kind(),
        error.raw_os_error().unwrap_or_default()
    );
    std::thread::sleep(TICK);
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
