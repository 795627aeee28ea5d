//! The keeper's process by itself, which is told everything by a daemon that this test is; see docs/formats/mounts.md. Its
//! successors are scripts that go wrong in all the ways in which processes do.

use std::{
    fs::{self, File},
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt as _,
    },
    path::Path,
    process::{Child, Command, Stdio},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use loris_mount::{keeper, pager::group::Group};
use rustix::{
    fs::{MemfdFlags, inotify},
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
        SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
    },
    process::{Pid, Resource, Rlimit, prlimit},
};

use crate::pager::can_page;

const LIMIT: Duration = Duration::from_secs(60);
const SLOTS: u32 = 4;
/// How long readers wait for a successor that does not come.
const PATIENCE: &str = "300";

const STATE: u32 = 1;
const KEEP: u32 = 2;
const END: u32 = 4;
/// For `printf`: packets of a successor.
const RESUME: &str = r"\001\000\000\000\005\000\000\000\001\000\000\000\000\000\000\000";
const RESUME_NEWER: &str = r"\002\000\000\000\005\000\000\000\002\000\000\000\000\000\000\000";
const DISMISS: &str = r"\001\000\000\000\006\000\000\000\000\000\000\000\000\000\000\000";

/// What a daemon has, with a keeper that has been started and told nothing yet.
struct Daemon {
    directory: tempfile::TempDir,
    group: Group,
    journal: File,
    inotify: OwnedFd,
    register: File,
    data: File,
    socket: OwnedFd,
    keeper: Child,
}

impl Daemon {
    /// A successor is a shell, which runs this script; `$starts` is how often one was started.
    fn start(mode: &str, script: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let data = File::options().read(true).write(true).create_new(true).open(directory.path().join("data")).unwrap();
        data.set_len(1 << 20).unwrap();
        let group = Group::new().unwrap();
        group.mark(&data).unwrap();
        let journal = File::from(rustix::fs::memfd_create("journal", MemfdFlags::CLOEXEC).unwrap());
        journal.set_len(4096 + 128 * u64::from(SLOTS)).unwrap();
        journal.write_all_at(b"LORISJNL", 0).unwrap();
        journal.write_all_at(&[1_u32.to_ne_bytes(), SLOTS.to_ne_bytes()].concat(), 8).unwrap();
        let inotify = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK).unwrap();
        let (ours, theirs) = pair();
        let script = format!("cd {}; echo >> starts; starts=$(wc -l < starts); {script}", directory.path().display());
        let keeper = Command::new(env!("CARGO_BIN_EXE_mount-keeper"))
            .args([keeper::VERB, mode, PATIENCE, "--", "/bin/sh", "-c", &script])
            .stdin(Stdio::from(theirs))
            .stderr(File::create(directory.path().join("said")).unwrap())
            .spawn()
            .unwrap();
        let register = File::create(directory.path().join("register")).unwrap();
        Self { directory, group, journal, inotify, register, data, socket: ours, keeper }
    }

    fn tell_state(&self) {
        let state = [self.group.as_fd(), self.journal.as_fd(), self.inotify.as_fd(), self.register.as_fd()];
        send(&self.socket, STATE, 1, &state);
    }

    /// Tells everything, and puts the keeper in charge.
    fn tell(&self, layers: u64) {
        self.tell_state();
        for key in 1..=layers {
            send(&self.socket, KEEP, key, &[self.data.as_fd(), self.register.as_fd()]);
        }
        send(&self.socket, END, 0, &[]);
        assert_eq!(receive(&self.socket), END);
        self.put_in_charge();
    }

    fn put_in_charge(&self) {
        self.journal.write_all_at(&1_u32.to_ne_bytes(), 16).unwrap();
    }

    /// It is killed: nobody but the keeper holds anything any more.
    fn die(self) -> Orphaned {
        let read = File::open(self.directory.path().join("data")).unwrap();
        Orphaned { directory: self.directory, keeper: self.keeper, read }
    }
}

/// What is left of it.
struct Orphaned {
    directory: tempfile::TempDir,
    keeper: Child,
    /// As the kernel opens the file for a mount.
    read: File,
}

impl Orphaned {
    fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Somebody reads what is not there, and must wait or be refused.
    fn reader(&self) -> JoinHandle<io::Result<()>> {
        let read = self.read.try_clone().unwrap();
        std::thread::spawn(move || read.read_exact_at(&mut [0; 100], 4096))
    }

    fn starts(&self) -> usize {
        fs::read_to_string(self.path().join("starts")).unwrap_or_default().lines().count()
    }

    fn await_starts(&mut self, least: usize) {
        let end = Instant::now() + LIMIT;
        while self.starts() < least {
            assert_eq!(self.keeper.try_wait().unwrap(), None, "the keeper has ended: {}", self.said());
            assert!(Instant::now() < end, "started {} times: {}", self.starts(), self.said());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn said(&self) -> String {
        fs::read_to_string(self.path().join("said")).unwrap()
    }

    fn refused(reader: JoinHandle<io::Result<()>>) {
        let error = reader.join().unwrap().expect_err("what is not there was read");
        assert!(matches!(error.raw_os_error(), Some(libc::EIO | libc::EPERM)), "{error}");
    }

    fn await_end(&mut self) -> bool {
        ended(&mut self.keeper)
    }
}

impl Drop for Orphaned {
    fn drop(&mut self) {
        // Where a test has failed.
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}

/// Waits for the end of a process: whether it was content.
fn ended(child: &mut Child) -> bool {
    let end = Instant::now() + LIMIT;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.success();
        }
        if Instant::now() > end {
            let _ = child.kill();
            panic!("the keeper goes on");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn pair() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
}

fn send(socket: &OwnedFd, kind: u32, number: u64, descriptors: &[BorrowedFd<'_>]) {
    let bytes = [&1_u32.to_ne_bytes()[..], &kind.to_ne_bytes(), &number.to_ne_bytes()].concat();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    sendmsg(socket, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL).unwrap();
}

fn receive(socket: &OwnedFd) -> u32 {
    let mut bytes = [0; 16];
    let mut ancillary = RecvAncillaryBuffer::default();
    let received = recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::empty()).unwrap();
    assert_eq!(received.bytes, 16);
    u32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]])
}

/// Lets a process have so many descriptors from now on; those that it has stay.
fn limit_descriptors(child: &Child, most: u64) {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    prlimit(Some(Pid::from_child(child)), Resource::Nofile, Rlimit { current: Some(most), ..limit }).unwrap();
}

/// Of so many layers that the packets do not fit into the socket: it is killed while the keeper still sends.
#[test]
fn a_successor_that_dies_while_it_inherits() {
    if !can_page("a_successor_that_dies_while_it_inherits") {
        return;
    }
    for layers in [1, 400] {
        let script = format!(
            "if [ $starts -ge 4 ]; then printf '{DISMISS}' >&0; exit; fi; printf '{RESUME}' >&0; sleep 0.2; kill -9 $$"
        );
        let daemon = Daemon::start("restart", &script);
        daemon.tell(layers);
        let mut orphaned = daemon.die();
        let reader = orphaned.reader();
        orphaned.await_starts(3);
        Orphaned::refused(reader);
        assert!(orphaned.await_end(), "{layers} layers: dismissed by the last one: {}", orphaned.said());
    }
}

#[test]
fn a_successor_that_speaks_another_version() {
    if !can_page("a_successor_that_speaks_another_version") {
        return;
    }
    for nonsense in [RESUME_NEWER, "x", r"\001\000\000\000\377\000\000\000\000\000\000\000\000\000\000\000"] {
        // It waits for an answer that never comes: not for ever.
        let script = format!(
            "if [ $starts -ge 4 ]; then printf '{DISMISS}' >&0; exit; fi; printf '{nonsense}' >&0; exec cat <&0 >/dev/null"
        );
        let daemon = Daemon::start("restart", &script);
        daemon.tell(1);
        let mut orphaned = daemon.die();
        let reader = orphaned.reader();
        orphaned.await_starts(3);
        Orphaned::refused(reader);
        assert!(orphaned.await_end(), "{nonsense}: dismissed by the last one: {}", orphaned.said());
    }
}

/// The processes of this machine run out of files, at the moment when the daemon dies.
#[test]
fn a_keeper_that_has_no_descriptor_left() {
    if !can_page("a_keeper_that_has_no_descriptor_left") {
        return;
    }
    for mode in ["restart", "clean"] {
        let script = if mode == "restart" { format!("printf '{DISMISS}' >&0") } else { "true".to_owned() };
        let daemon = Daemon::start(mode, &script);
        daemon.tell(1);
        // Of a mount that is gone when this directory is.
        let mounted = daemon.directory.path().join("mounted");
        fs::create_dir(&mounted).unwrap();
        let watch = inotify::add_watch(&daemon.inotify, &mounted, inotify::WatchFlags::DELETE_SELF).unwrap();
        daemon.journal.write_all_at(&watch.to_ne_bytes(), 64).unwrap();
        limit_descriptors(&daemon.keeper, 4);
        // What it is told and has no room for must not end it either.
        send(&daemon.socket, KEEP, 2, &[daemon.data.as_fd(), daemon.register.as_fd()]);
        let mut orphaned = daemon.die();
        // Refused, and more than once: it goes on.
        for _ in 0..3 {
            Orphaned::refused(orphaned.reader());
        }
        assert_eq!(orphaned.keeper.try_wait().unwrap(), None, "{mode}: {}", orphaned.said());
        limit_descriptors(&orphaned.keeper, 1024);
        orphaned.await_starts(1);
        if mode == "clean" {
            Orphaned::refused(orphaned.reader());
            fs::remove_dir(&mounted).unwrap();
        }
        assert!(orphaned.await_end(), "{mode}: {}", orphaned.said());
    }
}

/// Its predecessor is in charge still.
#[test]
fn a_daemon_that_dies_while_it_tells_a_new_keeper() {
    if !can_page("a_daemon_that_dies_while_it_tells_a_new_keeper") {
        return;
    }
    for layers in [0, 3] {
        let mut daemon = Daemon::start("restart", "true");
        daemon.tell_state();
        for key in 1..=layers {
            send(&daemon.socket, KEEP, key, &[daemon.data.as_fd(), daemon.register.as_fd()]);
        }
        let (_, nobody) = pair();
        drop(std::mem::replace(&mut daemon.socket, nobody));
        let mut orphaned = daemon.die();
        orphaned.await_end();
        assert_eq!(orphaned.starts(), 0, "it is not in charge");
    }
}

/// There is no predecessor any more: it was killed, and this one is in charge of whatever it has been told so far.
#[test]
fn a_daemon_that_dies_while_it_replaces_a_keeper() {
    if !can_page("a_daemon_that_dies_while_it_replaces_a_keeper") {
        return;
    }
    let script = format!("if [ $starts -ge 3 ]; then printf '{DISMISS}' >&0; fi");
    let daemon = Daemon::start("restart", &script);
    daemon.put_in_charge();
    daemon.tell_state();
    send(&daemon.socket, KEEP, 1, &[daemon.data.as_fd(), daemon.register.as_fd()]);
    let mut orphaned = daemon.die();
    let reader = orphaned.reader();
    orphaned.await_starts(2);
    assert!(orphaned.await_end(), "{}", orphaned.said());
    // The successor that has dismissed it did not take over: nobody holds the group any more.
    drop(reader.join().unwrap());
}
