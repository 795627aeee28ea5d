//! A container in the foreground.
//!
//! Every runtime is driven in the same way, `RUNTIME --root DIR run --bundle DIR --pid-file FILE ID`, be it installed or
//! our own program executed again. The container has our standard streams, or a terminal of its own between which and
//! ours the runtime copies. Signals that we get go to the container's first process, and its exit status is ours.
//!
//! When we are killed, nobody is left to clean up: a *guard* process, whose standard input ends with us, kills the
//! container and removes its directory. Should the guard be killed too, the next start does it.

use std::{
    collections::VecDeque,
    ffi::OsString,
    fs,
    io::{self, Read},
    os::fd::{AsFd, OwnedFd},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use oci_spec::runtime::MountBuilder;
use rustix::process::Signal;
use tokio::{
    process::{Child, Command},
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use crate::{
    spec::Container,
    state::{self, Owner, StateDirectory},
    terminal::Saved,
};

/// Exit status where a container could not be started, as `docker run` has it.
pub const NOT_STARTED: u8 = 125;
/// Exit status where the program is not one.
pub const NOT_EXECUTABLE: u8 = 126;
/// Exit status where the program isn't there.
pub const NOT_FOUND: u8 = 127;

/// How often it is looked whether the container has started, while a signal waits for it.
const STARTING: Duration = Duration::from_millis(10);
/// Most signals that wait for a container to start.
const PENDING: usize = 16;
/// Longest part of a runtime's log that is read, in bytes.
const LOG_BYTES: u64 = 64 << 10;

/// What starts containers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Runtime {
    /// The one that this program holds.
    Embedded,
    /// An installed one: `crun`, `runc`, `youki`, with its path.
    External(PathBuf),
}

/// The standard streams of a container.
#[derive(Debug)]
pub struct Streams {
    /// What it reads, if it is interactive. With a terminal it must be one.
    pub stdin: OwnedFd,
    /// Where its output goes.
    pub stdout: OwnedFd,
    /// Where its errors go.
    pub stderr: OwnedFd,
}

impl Streams {
    /// Returns our own streams.
    ///
    /// # Errors
    /// They can't be duplicated.
    pub fn inherited() -> io::Result<Self> {
        Ok(Self {
            stdin: io::stdin().as_fd().try_clone_to_owned()?,
            stdout: io::stdout().as_fd().try_clone_to_owned()?,
            stderr: io::stderr().as_fd().try_clone_to_owned()?,
        })
    }
}

/// A container that could not be run. Its exit status is [`NOT_STARTED`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The bundle can't be made.
    #[error("prepare the container in {}: {source}", path.display())]
    Prepare {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A terminal was asked for, and standard input is none.
    #[error("a terminal was asked for, but standard input is not one")]
    NoTerminal,
    /// The runtime can't be executed.
    #[error("execute the runtime {program}: {source}")]
    Runtime {
        /// The program.
        program: String,
        /// Why.
        source: io::Error,
    },
}

/// Runs containers.
#[derive(Clone, Debug)]
pub struct Runner {
    runtime: Runtime,
    own: Vec<OsString>,
}

impl Runner {
    /// Returns a runner for a program that hands the arguments behind `oci-runtime` to [`embedded::main`].
    ///
    /// [`embedded::main`]: crate::embedded::main
    #[must_use]
    pub fn new(runtime: Runtime) -> Self {
        Self::with_program(runtime, vec!["/proc/self/exe".into(), "oci-runtime".into()])
    }

    /// Returns a runner that reaches [`embedded::main`](crate::embedded::main) by another command than this program's
    /// own.
    #[must_use]
    pub fn with_program(runtime: Runtime, own: Vec<OsString>) -> Self {
        Self { runtime, own }
    }

    /// Runs a container until it ends, and returns its exit status: that of its first process, 128 and the signal's
    /// number if it was killed, or [`NOT_STARTED`], [`NOT_EXECUTABLE`] or [`NOT_FOUND`] if the runtime has said so on
    /// standard error.
    ///
    /// Whatever is sent into `signals` goes to the container's first process. If the returned future is dropped, the
    /// container is killed.
    ///
    /// # Errors
    /// There is no runtime, no terminal, or no place for the bundle.
    pub async fn run(
        &self,
        container: Container,
        streams: Streams,
        signals: mpsc::Receiver<Signal>,
    ) -> Result<u8, RunError> {
        let tty = container.spec.process().as_ref().and_then(oci_spec::runtime::Process::terminal).unwrap_or(false);
        if tty && container.interactive && !rustix::termios::isatty(&streams.stdin) {
            return Err(RunError::NoTerminal);
        }
        if let Err(error) = state::sweep() {
            tracing::warn!(%error, "failed to clean up after earlier containers");
        }
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| RunError::Prepare { path, source }
        };
        let directory = StateDirectory::create(&container.id).map_err(failed(Path::new(&container.id)))?;
        let id = container.id.clone();
        let interactive = container.interactive;
        write_bundle(directory.path(), container, &self.runtime).map_err(failed(directory.path()))?;

        let _terminal = if tty {
            let stdin = streams.stdin.try_clone().map_err(failed(directory.path()))?;
            Saved::save(stdin).map_err(failed(directory.path()))?
        } else {
            None
        };
        let mut guard = self.start_guard(directory.path())?;
        let mut runtime = self.start_runtime(directory.path(), &id, streams, tty, interactive)?;
        let status = wait(&mut runtime, directory.path(), signals, tty).await.map_err(failed(directory.path()))?;
        let code = self.exit_code(status, directory.path());
        drop(directory);
        drop(guard.stdin.take());
        if let Err(error) = guard.wait().await {
            tracing::warn!(%error, "failed to wait for the guard");
        }
        Ok(code)
    }

    fn start_guard(&self, directory: &Path) -> Result<Child, RunError> {
        let mut command = self.own_command()?;
        command.arg("guard").arg(directory);
        // A group of its own: Ctrl-C is not meant for it.
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().map_err(|source| self.unusable(&self.own, source))
    }

    fn start_runtime(
        &self,
        directory: &Path,
        id: &str,
        streams: Streams,
        tty: bool,
        interactive: bool,
    ) -> Result<Child, RunError> {
        let mut command = match &self.runtime {
            Runtime::Embedded => self.own_command()?,
            Runtime::External(program) => {
                let mut command = Command::new(program);
                // Why it could not start the container is only in its log.
                command.arg("--log").arg(directory.join("log")).args(["--log-format", "json"]);
                command
            }
        };
        command.arg("--root").arg(directory.join("runtime")).arg("run").arg("--bundle").arg(directory);
        command.arg("--pid-file").arg(directory.join("pid")).arg(id);
        if !tty {
            // With a terminal, the runtime must be in the foreground to read from it. Without, Ctrl-C would reach it
            // beside us, and the container would get it twice.
            command.process_group(0);
        }
        command.stdin(if interactive || tty { streams.stdin.into() } else { Stdio::null() });
        command.stdout(Stdio::from(streams.stdout)).stderr(Stdio::from(streams.stderr));
        command.spawn().map_err(|source| match &self.runtime {
            Runtime::Embedded => self.unusable(&self.own, source),
            Runtime::External(program) => self.unusable(&[program.clone().into()], source),
        })
    }

    fn own_command(&self) -> Result<Command, RunError> {
        let Some((program, args)) = self.own.split_first() else {
            return Err(self.unusable(&[], io::ErrorKind::NotFound.into()));
        };
        let mut command = Command::new(program);
        command.args(args);
        Ok(command)
    }

    fn unusable(&self, command: &[OsString], source: io::Error) -> RunError {
        let program = command.join(std::ffi::OsStr::new(" ")).to_string_lossy().into_owned();
        RunError::Runtime { program, source }
    }

    fn exit_code(&self, status: ExitStatus, directory: &Path) -> u8 {
        let code = match (status.code(), status.signal()) {
            (Some(code), _) => u8::try_from(code).unwrap_or(u8::MAX),
            (None, signal) => 128 | u8::try_from(signal.unwrap_or(0)).unwrap_or(0),
        };
        let started = directory.join("pid").exists();
        match &self.runtime {
            Runtime::External(_) if !started && code != 0 => failure_code(&directory.join("log")).unwrap_or(code),
            _ => code,
        }
    }
}

/// Returns the signals that this process gets and that are meant for its container.
///
/// # Errors
/// A handler can't be installed.
///
/// # Panics
/// Outside a Tokio runtime.
pub fn forwarded_signals() -> io::Result<mpsc::Receiver<Signal>> {
    let (sender, receiver) = mpsc::channel(PENDING);
    let kinds = [
        (SignalKind::interrupt(), Signal::INT),
        (SignalKind::terminate(), Signal::TERM),
        (SignalKind::hangup(), Signal::HUP),
        (SignalKind::quit(), Signal::QUIT),
        (SignalKind::user_defined1(), Signal::USR1),
        (SignalKind::user_defined2(), Signal::USR2),
        (SignalKind::window_change(), Signal::WINCH),
    ];
    for (kind, forwarded) in kinds {
        let mut stream = signal(kind)?;
        let sender = sender.clone();
        tokio::spawn(async move {
            while stream.recv().await.is_some() {
                if sender.send(forwarded).await.is_err() {
                    return;
                }
            }
        });
    }
    Ok(receiver)
}

fn write_bundle(directory: &Path, mut container: Container, runtime: &Runtime) -> io::Result<()> {
    fs::create_dir(directory.join("runtime"))?;
    let mut mounts = container.spec.mounts().clone().unwrap_or_default();
    if matches!(runtime, Runtime::External(_)) {
        let cgroup = MountBuilder::default()
            .destination("/sys/fs/cgroup")
            .typ("cgroup")
            .source("cgroup")
            .options(["ro", "nosuid", "noexec", "nodev", "relatime"].map(str::to_owned).to_vec())
            .build()
            .map_err(io::Error::other)?;
        mounts.push(cgroup);
    }
    let files = directory.join("files");
    fs::create_dir(&files)?;
    for (path, bytes) in &container.files {
        let Some(name) = Path::new(path).file_name() else { continue };
        let file = files.join(name);
        fs::write(&file, bytes)?;
        // The container's root is to change them, not its other users; the directory above is closed to all others.
        let mount = MountBuilder::default()
            .destination(*path)
            .typ("bind")
            .source(file)
            .options(["bind", "rprivate", "rw"].map(str::to_owned).to_vec())
            .build()
            .map_err(io::Error::other)?;
        mounts.push(mount);
    }
    container.spec.set_mounts(Some(mounts));
    let program = match runtime {
        Runtime::Embedded => None,
        Runtime::External(program) => Some(program.clone()),
    };
    fs::write(directory.join("owner.json"), serde_json::to_vec(&Owner { id: container.id, program })?)?;
    fs::write(directory.join("config.json"), serde_json::to_vec(&container.spec)?)
}

/// Waits for the runtime's end, and passes signals on meanwhile.
async fn wait(
    runtime: &mut Child,
    directory: &Path,
    mut signals: mpsc::Receiver<Signal>,
    tty: bool,
) -> io::Result<ExitStatus> {
    let mut pending = VecDeque::new();
    let mut process = None;
    let mut open = true;
    loop {
        tokio::select! {
            status = runtime.wait() => return status,
            signal = signals.recv(), if open => match signal {
                // A runtime that copies to our terminal learns the size from the kernel, and tells the container.
                Some(Signal::WINCH) if tty => {}
                Some(signal) if pending.len() < PENDING => pending.push_back(signal),
                Some(_) => {}
                None => open = false,
            },
            () = tokio::time::sleep(STARTING), if !pending.is_empty() => {}
        }
        if !pending.is_empty() && process.is_none() {
            process = state::init_process(directory)?;
        }
        if let Some(process) = &process {
            for signal in pending.drain(..) {
                if let Err(error) = process.send(signal) {
                    tracing::warn!(%error, ?signal, "failed to pass a signal on");
                }
            }
        }
    }
}

/// Finds out why an installed runtime did not start a container, which it has said on standard error itself. Nothing is
/// known if it has no reason in its log.
fn failure_code(log: &Path) -> Option<u8> {
    let mut text = String::new();
    fs::File::open(log).ok()?.take(LOG_BYTES).read_to_string(&mut text).ok()?;
    let message = text.lines().rev().find_map(|line| {
        let line: serde_json::Value = serde_json::from_str(line).ok()?;
        Some(line.get("msg")?.as_str()?.to_ascii_lowercase())
    })?;
    let has = |words: &[&str]| words.iter().any(|words| message.contains(words));
    // Runtimes have no codes for it; these are the words of runc, crun and youki.
    let about_program = has(&["exec", "find executable"]);
    Some(match () {
        () if about_program && has(&["not found", "no such file"]) => NOT_FOUND,
        () if about_program && has(&["permission denied", "is a directory", "exec format"]) => NOT_EXECUTABLE,
        () => NOT_STARTED,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_runtimes() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        assert_eq!(failure_code(&log), None);
        let cases = [
            ("exec: \\\"x\\\": executable file not found in $PATH", NOT_FOUND),
            ("unable to start container process: exec: \\\"/x\\\": stat /x: no such file or directory", NOT_FOUND),
            ("executable file `x` not found in $PATH: No such file or directory", NOT_FOUND),
            ("open executable: Permission denied", NOT_EXECUTABLE),
            ("exec: \\\"/text\\\": permission denied", NOT_EXECUTABLE),
            ("cgroups in hybrid mode not supported", NOT_STARTED),
            ("mount `/x`: Permission denied", NOT_STARTED),
        ];
        for (message, code) in cases {
            let line = format!("{{\"level\":\"error\",\"msg\":\"{message}\"}}\n");
            fs::write(&log, format!("{{\"level\":\"debug\",\"msg\":\"x\"}}\n{line}not json\n")).unwrap();
            assert_eq!(failure_code(&log), Some(code), "{message}");
        }
    }
}
