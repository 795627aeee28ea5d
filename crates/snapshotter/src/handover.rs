//! Which process serves a root directory, and how the next one gets what a killed one had.
//!
//! Two kinds of processes come after one that has ended: a *successor*, which the keeper of its mounts started
//! ([`loris_mount::keeper`]) and which has the keeper's socket; and a *fresh* one, which a service manager or a user started
//! and which has nothing. Whichever serves holds `ROOT/lock`.
//!
//! ```text
//!  killed ──▶ keeper ──▶ successor ──▶ nobody is coming: it serves
//!                            └───────▶ a fresh one is: gives it the socket, ends
//!  fresh ──▶ somebody only keeps mounts alive: asks it to end ──▶ its keeper's successor comes, as above
//! ```
//!
//! | path in ROOT | is |
//! |---|---|
//! | `lock` | locked by who serves; its process number |
//! | `next` | locked by a fresh process until it serves |
//! | `control.sock` | where who serves is asked to make way |
//! | `handover.sock` | where a fresh process waits for a successor |
//! | `serving` | the register of who served last, which its keeper has locked for as long as it lives |
//!
//! What this module must not know: mounts, snapshots.

use std::{
    fs::File,
    io::{self, IoSlice, IoSliceMut, Read as _, Write as _},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{
            fs::OpenOptionsExt as _,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};

/// How long a process that was asked to make way, or a successor, is waited for.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long one who asks may take to ask, or to take the answer.
const PATIENCE_OF_CONTROL: Duration = Duration::from_secs(2);
/// Largest report that is read.
const MOST_REPORT_BYTES: u64 = 256 << 20;
/// Between looks.
const PAUSE: Duration = Duration::from_millis(5);
/// What is said on `control.sock`.
const MAKE_WAY: &[u8] = b"make way\n";
const BUSY: &[u8] = b"busy\n";
/// So long as the other one, so that each is read whole.
const REPORT: &[u8] = b"report!!\n";

/// What a process that was killed has left.
#[derive(Debug)]
pub(crate) struct Left {
    /// The socket of its keeper.
    pub(crate) keeper: OwnedFd,
    /// Where it listened. Clients that came since then wait there, and are not refused.
    pub(crate) listener: Option<OwnedFd>,
}

/// What became of the attempt to serve.
#[derive(Debug)]
pub(crate) enum Entered {
    /// This process serves.
    Serves {
        /// Held for as long as it does.
        lock: File,
        /// What who served before has left.
        left: Option<Left>,
    },
    /// Another process does, and has got what this one had.
    PassedOn,
}

/// Enters a root directory, with what its predecessor left if this process is a successor. Blocks.
///
/// # Errors
/// Where another process serves and will not make way, or files can't be used.
pub(crate) fn enter(root: &Path, left: Option<Left>) -> io::Result<Entered> {
    match left {
        Some(left) => enter_as_successor(root, left),
        None => enter_fresh(root),
    }
}

fn enter_as_successor(root: &Path, left: Left) -> io::Result<Entered> {
    let end = Instant::now() + PATIENCE;
    loop {
        let next = lock_file(root, "next")?;
        if next.try_lock().is_ok() {
            // Nobody is coming.
            let lock = lock_file(root, "lock")?;
            if lock.try_lock().is_ok() {
                sign(&lock)?;
                return Ok(Entered::Serves { lock, left: Some(left) });
            }
        }
        drop(next);
        if let Ok(fresh) = UnixStream::connect(root.join("handover.sock"))
            && send(&fresh, &left).is_ok()
        {
            return Ok(Entered::PassedOn);
        }
        if Instant::now() > end {
            // The keeper starts another one.
            return Err(io::Error::new(io::ErrorKind::TimedOut, "another process serves, and does not take over"));
        }
        std::thread::sleep(PAUSE);
    }
}

fn enter_fresh(root: &Path) -> io::Result<Entered> {
    let next = lock_file(root, "next")?;
    let end = Instant::now() + PATIENCE;
    // A successor has it for as long as it takes to see whether anyone is coming.
    while next.try_lock().is_err() {
        if Instant::now() > end {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process is just starting here"));
        }
        std::thread::sleep(PAUSE);
    }
    let path = root.join("handover.sock");
    remove_socket(&path)?;
    let listener = UnixListener::bind(&path)?;
    let entered = wait_for_lock(root).and_then(|lock| {
        sign(&lock)?;
        let left = wait_for_keeper(root, &listener)?;
        Ok(Entered::Serves { lock, left })
    });
    remove_socket(&path)?;
    entered
}

fn wait_for_lock(root: &Path) -> io::Result<File> {
    let lock = lock_file(root, "lock")?;
    let end = Instant::now() + PATIENCE;
    loop {
        if lock.try_lock().is_ok() {
            return Ok(lock);
        }
        ask_to_make_way(root)?;
        if Instant::now() > end {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process serves, and does not make way"));
        }
        std::thread::sleep(PAUSE);
    }
}

fn ask_to_make_way(root: &Path) -> io::Result<()> {
    // It may be just ending, or just starting.
    let Ok(mut stream) = UnixStream::connect(root.join("control.sock")) else { return Ok(()) };
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut answer = Vec::new();
    let asked = stream.write_all(MAKE_WAY).and_then(|()| (&stream).take(16).read_to_end(&mut answer));
    match asked {
        Ok(_) if answer == BUSY => {
            Err(io::Error::new(io::ErrorKind::AddrInUse, "a snapshotter runs here already; end it first"))
        }
        _ => Ok(()),
    }
}

/// Waits for a successor where there is a keeper that will start one.
fn wait_for_keeper(root: &Path, listener: &UnixListener) -> io::Result<Option<Left>> {
    listener.set_nonblocking(true)?;
    let end = Instant::now() + PATIENCE;
    while has_keeper(root) && Instant::now() < end {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                if let Ok(left) = receive(&stream) {
                    return Ok(Some(left));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(PAUSE),
            Err(error) => return Err(error),
        }
    }
    if has_keeper(root) {
        // Its mounts are in use, and must not be taken for what nobody needs.
        return Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "the keeper of mounts has started no successor so far; try again",
        ));
    }
    Ok(None)
}

/// Whether the register of who served last is locked: its keeper lives.
fn has_keeper(root: &Path) -> bool {
    let Ok(register) = std::fs::read_to_string(root.join("serving")) else { return false };
    let Ok(file) = File::open(register.trim_end()) else { return false };
    matches!(file.try_lock_shared(), Err(std::fs::TryLockError::WouldBlock))
}

/// Notes the register of who serves.
pub(crate) fn note_register(root: &Path, register: &Path) -> io::Result<()> {
    let mut file = tempfile::Builder::new().prefix(".serving-").tempfile_in(root)?;
    writeln!(file, "{}", register.display())?;
    file.persist(root.join("serving")).map(drop).map_err(|error| error.error)
}

/// Where who serves is asked to make way for another one.
#[derive(Debug)]
pub(crate) struct Control {
    listener: tokio::net::UnixListener,
    path: PathBuf,
}

impl Control {
    /// Listens. The lock must be held.
    pub(crate) fn listen(root: &Path) -> io::Result<Self> {
        let path = root.join("control.sock");
        remove_socket(&path)?;
        Ok(Self { listener: tokio::net::UnixListener::bind(&path)?, path })
    }

    /// Answers those who ask what is known with a report. Returns when somebody asked the process to make way, and it does
    /// for anyone.
    pub(crate) async fn asked<F: Future<Output = Vec<u8>>>(&self, makes_way: bool, report: impl Fn() -> F) {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        loop {
            let Ok((mut stream, _)) = self.listener.accept().await else {
                tokio::time::sleep(PAUSE).await;
                continue;
            };
            let mut question = [0; MAKE_WAY.len()];
            let read = tokio::time::timeout(PATIENCE_OF_CONTROL, stream.read_exact(&mut question)).await;
            let answer = match (read, question.as_slice()) {
                (Ok(Ok(_)), MAKE_WAY) if makes_way => return,
                (Ok(Ok(_)), MAKE_WAY) => BUSY.to_vec(),
                (Ok(Ok(_)), REPORT) => report().await,
                _ => continue,
            };
            let _ = tokio::time::timeout(PATIENCE_OF_CONTROL, stream.write_all(&answer)).await;
        }
    }
}

/// Asks the process that serves a root directory what it knows. Blocks.
///
/// # Errors
/// Where none does.
pub(crate) fn ask_for_report(root: &Path) -> io::Result<Vec<u8>> {
    let mut stream = UnixStream::connect(root.join("control.sock"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(REPORT)?;
    let mut answer = Vec::new();
    stream.take(MOST_REPORT_BYTES).read_to_end(&mut answer)?;
    Ok(answer)
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Says who has a lock.
fn sign(mut lock: &File) -> io::Result<()> {
    lock.set_len(0)?;
    writeln!(lock, "{}", std::process::id())
}

fn lock_file(root: &Path, name: &str) -> io::Result<File> {
    File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(root.join(name))
}

fn remove_socket(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn send(stream: &UnixStream, left: &Left) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors: Vec<BorrowedFd<'_>> =
        [Some(&left.keeper), left.listener.as_ref()].into_iter().flatten().map(AsFd::as_fd).collect();
    ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    sendmsg(stream, &[IoSlice::new(b"k")], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn receive(stream: &UnixStream) -> io::Result<Left> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(mut descriptors) = message
            && let Some(keeper) = descriptors.next()
        {
            return Ok(Left { keeper, listener: descriptors.next() });
        }
    }
    Err(io::ErrorKind::UnexpectedEof.into())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn who_is_alone_serves() {
        let root = tempfile::tempdir().unwrap();
        let Entered::Serves { lock, left: None } = enter(root.path(), None).unwrap() else { panic!("not alone") };
        assert!(lock_file(root.path(), "lock").unwrap().try_lock().is_err());
        drop(lock);
        assert!(matches!(enter(root.path(), None).unwrap(), Entered::Serves { .. }));
    }

    #[test]
    fn a_successor_gives_what_it_has_to_one_that_is_coming() {
        let root = tempfile::tempdir().unwrap();
        let register = root.path().join("register");
        let held = File::create(&register).unwrap();
        held.lock().unwrap();
        note_register(root.path(), &register).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let listener = UnixListener::bind(root.path().join("service.sock")).unwrap();
        let left = Left { keeper: theirs.into(), listener: Some(listener.into()) };
        let fresh = {
            let root = root.path().to_owned();
            std::thread::spawn(move || enter(&root, None).unwrap())
        };
        while !root.path().join("handover.sock").exists() {
            std::thread::sleep(PAUSE);
        }
        assert!(matches!(enter(root.path(), Some(left)).unwrap(), Entered::PassedOn));
        let Entered::Serves { left: Some(Left { keeper, listener: Some(_) }), .. } = fresh.join().unwrap() else {
            panic!("nothing was passed on")
        };
        // It is the same socket.
        rustix::io::write(&keeper, b"hello").unwrap();
        let mut said = [0; 5];
        (&ours).read_exact(&mut said).unwrap();
        assert_eq!(&said, b"hello");
    }

    #[test]
    fn a_successor_that_only_looks_keeps_nobody_from_starting() {
        let root = tempfile::tempdir().unwrap();
        let next = lock_file(root.path(), "next").unwrap();
        next.lock().unwrap();
        let fresh = {
            let root = root.path().to_owned();
            std::thread::spawn(move || enter(&root, None))
        };
        std::thread::sleep(PAUSE * 10);
        drop(next);
        assert!(matches!(fresh.join().unwrap().unwrap(), Entered::Serves { left: None, .. }));
    }

    #[test]
    fn a_successor_serves_where_nobody_is_coming() {
        let root = tempfile::tempdir().unwrap();
        let (_ours, theirs) = UnixStream::pair().unwrap();
        let left = Left { keeper: theirs.into(), listener: None };
        let entered = enter(root.path(), Some(left)).unwrap();
        assert!(matches!(entered, Entered::Serves { left: Some(_), .. }));
    }
}
