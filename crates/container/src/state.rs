//! What a running container leaves on the host, and how it is taken away.
//!
//! ```text
//! STATE/containers/<id>/lock          locked by the process that runs the container, for as long as it lives
//! STATE/containers/<id>/config.json   the bundle (OCI runtime specification, bundle.md)
//! STATE/containers/<id>/files/...     files that are mounted into the container
//! STATE/containers/<id>/pid           the container's first process, written by the runtime
//! STATE/containers/<id>/owner.json    the runtime, to be told to delete what it knows
//! STATE/containers/<id>/runtime/      the runtime's own state
//! ```
//!
//! `STATE` is `/run/loris` for root, else `$XDG_RUNTIME_DIR/loris`, else `/tmp/loris-<uid>`. Whoever holds no lock is
//! dead: a guard process and every later start take away what such a process has left.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt, MetadataExt},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    fs::FlockOperation,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use serde::{Deserialize, Serialize};

/// How long a killed process may take to be gone. It may be in the middle of a read from a slow disk.
const DYING: Duration = Duration::from_secs(10);

/// Which runtime knows a container.
#[derive(Serialize, Deserialize)]
pub struct Owner {
    /// The container's identifier.
    pub id: String,
    /// An installed runtime; the embedded one has no state that would need it.
    pub program: Option<PathBuf>,
}

/// The directory of a container that runs. It is taken away when it is dropped.
pub struct StateDirectory {
    path: PathBuf,
    /// Its lock says that we live.
    _lock: File,
}

impl StateDirectory {
    /// Makes the directory of a new container.
    pub fn create(id: &str) -> io::Result<Self> {
        let containers = containers()?;
        let path = containers.join(id);
        DirBuilder::new().mode(0o700).create(&path)?;
        let lock = File::create(path.join("lock"))?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
        Ok(Self { path, _lock: lock })
    }

    /// Returns where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for StateDirectory {
    fn drop(&mut self) {
        if let Err(error) = clean(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "failed to clean up after a container");
        }
    }
}

/// Makes and returns the directory that holds the directories of all containers.
pub fn containers() -> io::Result<PathBuf> {
    let uid = rustix::process::geteuid();
    let state = match std::env::var_os("XDG_RUNTIME_DIR") {
        _ if uid.is_root() => PathBuf::from("/run/loris"),
        Some(directory) if Path::new(&directory).is_absolute() => PathBuf::from(directory).join("loris"),
        _ => std::env::temp_dir().join(format!("loris-{}", uid.as_raw())),
    };
    let containers = state.join("containers");
    DirBuilder::new().mode(0o700).recursive(true).create(&containers)?;
    let metadata = fs::symlink_metadata(&state)?;
    if !metadata.is_dir() || metadata.uid() != uid.as_raw() {
        // In /tmp, somebody else may have made it first.
        return Err(io::Error::other(format!("{} is not ours", state.display())));
    }
    Ok(containers)
}

/// Takes away what processes have left that died without cleaning up.
pub fn sweep() -> io::Result<()> {
    for entry in fs::read_dir(containers()?)? {
        let path = entry?.path();
        match abandoned(&path) {
            Ok(true) => {
                tracing::info!(path = %path.display(), "cleaning up after a process that was killed");
                if let Err(error) = clean(&path) {
                    tracing::warn!(path = %path.display(), %error, "failed to clean up");
                }
            }
            Ok(false) => {}
            Err(error) => tracing::warn!(path = %path.display(), %error, "failed to look at a container's directory"),
        }
    }
    Ok(())
}

/// Says whether nobody holds the directory's lock.
fn abandoned(path: &Path) -> io::Result<bool> {
    let lock = match File::open(path.join("lock")) {
        Ok(lock) => lock,
        // It is being made or taken away at this moment, unless it has been so for long.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let age = fs::metadata(path).and_then(|metadata| metadata.modified())?.elapsed();
            return Ok(age.is_ok_and(|age| age > Duration::from_secs(60)));
        }
        Err(error) => return Err(error),
    };
    match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Kills the container of a directory if it still runs, has its runtime forget it, and removes the directory.
pub fn clean(path: &Path) -> io::Result<()> {
    if let Some(process) = init_process(path)? {
        process.send(Signal::KILL)?;
        process.wait_for_end()?;
    }
    let runtime = path.join("runtime");
    if let Ok(bytes) = fs::read(path.join("owner.json"))
        && let Ok(Owner { id, program: Some(program) }) = serde_json::from_slice(&bytes)
        && runtime.join(&id).exists()
    {
        // A runtime that lives deletes it itself; that it is gone already is no failure.
        let deleted = Command::new(&program)
            .arg("--root")
            .arg(&runtime)
            .args(["delete", "--force", &id])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if let Err(error) = deleted {
            tracing::warn!(program = %program.display(), %error, "failed to have the runtime delete a container");
        }
    }
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The first process of a container.
pub struct InitProcess {
    pid: Pid,
    descriptor: OwnedFd,
}

/// Returns the container's first process, if it is alive.
pub fn init_process(path: &Path) -> io::Result<Option<InitProcess>> {
    let Ok(text) = fs::read_to_string(path.join("pid")) else { return Ok(None) };
    let pid = text.trim().parse().ok().filter(|pid| *pid > 0);
    let Some(pid) = pid.and_then(Pid::from_raw) else { return Ok(None) };
    let descriptor = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(descriptor) => descriptor,
        // Linux says that the number is too large, or that it is a thread's.
        Err(rustix::io::Errno::SRCH | rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    let process = InitProcess { pid, descriptor };
    Ok(process.is_alive().then_some(process))
}

impl InitProcess {
    /// Sends it a signal. One that has ended takes none, which is no failure.
    pub fn send(&self, signal: Signal) -> io::Result<()> {
        match pidfd_send_signal(&self.descriptor, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Says whether the number is that of a living first process of a namespace of its own.
    ///
    /// A number may have been given to another process. Since the descriptor was opened before this looks, it is the
    /// descriptor's process that this tells about, or one that has followed it, and then the descriptor takes no signal.
    fn is_alive(&self) -> bool {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid.as_raw_nonzero())).unwrap_or_default();
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let numbers: Vec<_> = field("NSpid").into_iter().flat_map(str::split_ascii_whitespace).collect();
        let ended = field("State").is_none_or(|state| state.trim_start().starts_with(['Z', 'X']));
        !ended && numbers.len() > 1 && numbers.last() == Some(&"1")
    }

    fn wait_for_end(&self) -> io::Result<()> {
        let end = Instant::now() + DYING;
        while self.is_alive() {
            if Instant::now() > end {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the container's process does not end"));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_abandoned_are_cleaned() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x");
        fs::create_dir(&path).unwrap();
        assert!(!abandoned(&path).unwrap(), "it is just being made");
        let lock = File::create(path.join("lock")).unwrap();
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
        assert!(!abandoned(&path).unwrap());
        drop(lock);
        assert!(abandoned(&path).unwrap());
        // Our own number is not that of a container's first process, so nothing is killed.
        fs::write(path.join("pid"), std::process::id().to_string()).unwrap();
        clean(&path).unwrap();
        assert!(!path.exists());
        clean(&path).unwrap();
    }

    #[test]
    fn numbers_that_are_no_process() {
        let directory = tempfile::tempdir().unwrap();
        for text in ["", "x", "0", "-1", "99999999999999", "4194304000"] {
            fs::write(directory.path().join("pid"), text).unwrap();
            assert!(init_process(directory.path()).unwrap().is_none(), "{text:?}");
        }
    }
}
