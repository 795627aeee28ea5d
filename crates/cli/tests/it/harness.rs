//! Programs with a time limit, and places that leave nothing behind.

use std::{
    fs::{self, File},
    io::{Read as _, Seek as _},
    os::unix::{ffi::OsStrExt as _, fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// The program under test.
pub const LORIS: &str = env!("CARGO_BIN_EXE_loris");
/// Longer than anything takes on a busy machine, but for what says so itself.
pub const LIMIT: Duration = Duration::from_secs(120);

/// What a program did.
pub struct Ran {
    pub command: String,
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Ran {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.stdout).unwrap_or_else(|error| panic!("{self}: {error}"))
    }

    #[track_caller]
    pub fn succeeded(self) -> Self {
        assert!(self.status.success(), "{self}");
        self
    }

    /// The program has ended with this status, and said all of these.
    #[track_caller]
    pub fn failed(self, code: i32, said: &[&str]) -> Self {
        assert_eq!(self.status.code(), Some(code), "{self}");
        for part in said {
            assert!(self.stderr.contains(part), "{part:?} is not said by {self}");
        }
        assert!(!self.stderr.contains("panicked"), "{self}");
        self
    }
}

impl std::fmt::Display for Ran {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = self.text();
        // Its end: what went wrong is said last.
        let stdout = text.char_indices().rev().nth(2000).map_or(&*text, |(start, _)| &text[start..]);
        let Self { command, status, stderr, .. } = self;
        write!(f, "{command}\n{status}\nstdout: {stdout}\nstderr: {stderr}")
    }
}

/// Runs a program to its end; one that has not ended by then is killed, with what it has started, and fails the test.
#[track_caller]
pub fn run_within(limit: Duration, command: &mut Command) -> Ran {
    // Files and not pipes: a process that stays behind with the other end of a pipe must not hold the test.
    let mut outputs = [tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()];
    let handed = |file: &File| Stdio::from(file.try_clone().unwrap());
    let name = format!("{command:?}");
    command.stdin(Stdio::null()).stdout(handed(&outputs[0])).stderr(handed(&outputs[1])).process_group(0);
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{name}: {error}"));
    let end = Instant::now() + limit;
    let mut pause = Duration::from_millis(1);
    let (status, ended) = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break (status, true);
        }
        if Instant::now() > end {
            // The group is the child's own, and the child was not waited for: the id is still its.
            let group = rustix::process::Pid::from_child(&child);
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
            break (child.wait().unwrap(), false);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    };
    let [stdout, stderr] = outputs.each_mut().map(|file| {
        let mut bytes = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    });
    let ran = Ran { command: name, status, stdout, stderr: String::from_utf8_lossy(&stderr).into_owned() };
    assert!(ended, "did not end within {limit:?}: {ran}");
    ran
}

#[track_caller]
pub fn run(command: &mut Command) -> Ran {
    run_within(LIMIT, command)
}

/// Runs a program that must succeed.
#[track_caller]
pub fn ok(command: &mut Command) -> Ran {
    run(command).succeeded()
}

/// Finds a peer that is known to be there: the test has asked for it.
pub fn peer(name: &str) -> Command {
    Command::new(loris_testkit::peer(name).unwrap_or_else(|| panic!("{name} is not installed")))
}

/// Whether all of these programs are there; says so where not.
pub fn have(test: &str, peers: &[&str]) -> bool {
    peers.iter().all(|name| loris_testkit::require_peer(test, name).is_some())
}

/// A temporary directory for one test, in which everything that its commands keep is kept.
pub struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    pub fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("loris-it-").tempdir().unwrap();
        // Tests without privileges go through it too.
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(directory.path().join("tmp")).unwrap();
        Self { directory }
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A new directory.
    pub fn make(&self, name: &str) -> PathBuf {
        let path = self.join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// Any program, with temporary files in this place.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command.env("TMPDIR", self.join("tmp")).current_dir(self.path());
        command
    }

    /// `loris VERB`, with cache and temporary files in this place and nothing of the user's settings.
    pub fn loris(&self, verb: &str) -> Command {
        let mut command = self.command(LORIS);
        // Tests do not sweep each other's mounts.
        command
            .env("LORIS_CACHE_DIR", self.join("cache"))
            .env("LORIS_REGISTER", self.join("register"))
            .env_remove("LORIS_LOG")
            .env_remove("LORIS_CREDS");
        command.args(verb.split(' '));
        command
    }

    /// Mounts an image, by a process in the background as users do.
    #[track_caller]
    pub fn mount(&self, image: &str) -> Mounted<'_> {
        self.try_mount(image).unwrap_or_else(|ran| panic!("{ran}"))
    }

    pub fn try_mount(&self, image: &str) -> Result<Mounted<'_>, Ran> {
        self.try_mount_with("mount", image)
    }

    /// Mounts with a command such as `mount --option`.
    pub fn try_mount_with(&self, verb: &str, image: &str) -> Result<Mounted<'_>, Ran> {
        let at = tempfile::Builder::new().prefix("mnt-").tempdir_in(self.path()).unwrap().keep();
        let ran = run(self.loris(verb).arg(image).arg(&at));
        if ran.status.success() { Ok(Mounted { place: self, at }) } else { Err(ran) }
    }

    /// Nothing is mounted in this place, no process knows it, and no temporary file is left in it.
    #[track_caller]
    pub fn assert_clean(&self) {
        assert_eq!(mounted_in(self.path()), Vec::<PathBuf>::new(), "still mounted");
        let end = Instant::now() + LIMIT;
        while !processes_about(self.path()).is_empty() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(processes_about(self.path()), Vec::<String>::new(), "still running");
        let left: Vec<_> = fs::read_dir(self.join("tmp")).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(left, Vec::<PathBuf>::new(), "left behind");
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // A test that has failed may leave mounts, which must not be walked into when the directory is removed.
        for mounted in mounted_in(self.path()).iter().rev() {
            let _ = rustix::mount::unmount(mounted, rustix::mount::UnmountFlags::DETACH);
        }
    }
}

/// A mounted image; unmounted when dropped.
pub struct Mounted<'a> {
    place: &'a Place,
    pub at: PathBuf,
}

impl Mounted<'_> {
    /// Unmounts, and waits until the serving process has gone.
    #[track_caller]
    pub fn unmount(self) {
        ok(self.place.loris("umount").arg(&self.at));
        self.place.assert_clean();
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        if mounted_in(&self.at).contains(&self.at) {
            let _ = rustix::mount::unmount(&self.at, rustix::mount::UnmountFlags::DETACH);
        }
    }
}

/// What is mounted at or below a directory, in the order of mounting.
pub fn mounted_in(directory: &Path) -> Vec<PathBuf> {
    let directory = directory.canonicalize().unwrap();
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mountpoints = table.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    mountpoints.filter(|mountpoint| mountpoint.starts_with(&directory)).collect()
}

/// Processes with a path in their command line.
fn processes_about(path: &Path) -> Vec<String> {
    let wanted = path.as_os_str().as_bytes();
    let processes = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let lines = processes.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    lines
        .filter(|line| line.windows(wanted.len()).any(|window| window == wanted))
        .map(|line| String::from_utf8_lossy(&line).replace('\0', " "))
        .collect()
}

/// Held by tests that start containers: what they leave in the machine's own directories can be seen only one at a
/// time.
pub fn containers() -> MutexGuard<'static, ()> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Builds something that takes long into Cargo's directory for tests, once for all processes and runs. `recipe` is the
/// text that decides how it is built: where it changes, so does the name.
pub fn cached(name: &str, recipe: &str, build: impl FnOnce(&Path)) -> PathBuf {
    use sha2::Digest as _;
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
    fs::create_dir_all(directory).unwrap();
    let digest: String = sha2::Sha256::digest(recipe).iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    let lock = File::create(directory.join(format!("{name}.lock"))).unwrap();
    lock.lock().unwrap();
    let done = directory.join(format!("{name}-{digest}"));
    if !done.exists() {
        for old in fs::read_dir(directory).unwrap().map(|entry| entry.unwrap()) {
            if old.file_name().to_string_lossy().starts_with(&format!("{name}-")) {
                fs::remove_dir_all(old.path()).unwrap();
            }
        }
        let unfinished = tempfile::Builder::new().prefix(&format!("{name}-unfinished-")).tempdir_in(directory).unwrap();
        let layout = unfinished.path().join("layout");
        build(unfinished.path());
        fs::rename(layout, &done).unwrap();
    }
    done
}
