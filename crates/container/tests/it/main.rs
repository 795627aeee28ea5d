//! Containers that run, by the embedded runtime and by the installed ones.
//!
//! The root file system is an empty directory into which the host's `/usr` is mounted as a volume, so that there is a
//! shell without an image.
#![allow(clippy::unwrap_used)]

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::symlink,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use loris_container::{
    runtime::{NOT_EXECUTABLE, NOT_FOUND, RunError, Runner, Runtime, Streams, forwarded_signals},
    spec::{Container, Network, Volume, Wishes},
};
use loris_oci::document::ProcessConfig;
use rustix::process::Signal;
use tempfile::TempDir;
use tokio::sync::mpsc;

/// The program whose arguments go to the embedded runtime.
const PROGRAM: &str = env!("CARGO_BIN_EXE_loris-oci-runtime");

/// What a container did.
#[derive(Debug)]
struct Outcome {
    code: u8,
    stdout: String,
    stderr: String,
}

struct Case {
    runner: Runner,
    rootfs: TempDir,
    wishes: Wishes,
    stdin: Vec<u8>,
}

impl Case {
    fn new(runtime: &Runtime, script: &str) -> Self {
        let rootfs = tempfile::tempdir().unwrap();
        // A directory for one user only would keep the container's other users out.
        fs::set_permissions(rootfs.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        for name in ["bin", "lib", "lib64", "sbin"] {
            symlink(format!("usr/{name}"), rootfs.path().join(name)).unwrap();
        }
        fs::create_dir(rootfs.path().join("etc")).unwrap();
        let passwd = "root:x:0:0::/root:/bin/sh\nweb:x:33:34::/var/www:/bin/sh\n";
        fs::write(rootfs.path().join("etc/passwd"), passwd).unwrap();
        fs::write(rootfs.path().join("etc/group"), "adm:x:4:web\n").unwrap();
        let usr = Volume { source: "/usr".into(), target: "/usr".into(), read_only: true };
        let args = ["/bin/sh", "-c", script].map(str::to_owned).to_vec();
        let wishes = Wishes { args, volumes: vec![usr], network: Network::None, ..Wishes::default() };
        let runner = Runner::with_program(runtime.clone(), vec![PROGRAM.into()]);
        Self { runner, rootfs, wishes, stdin: Vec::new() }
    }

    fn with(mut self, change: impl FnOnce(&mut Wishes)) -> Self {
        change(&mut self.wishes);
        self
    }

    fn container(&self) -> Container {
        let image = ProcessConfig::default();
        Container::new(&image, &self.wishes, self.rootfs.path(), &|_| None).unwrap()
    }

    fn run(self) -> Outcome {
        self.run_with(|_| {}).unwrap()
    }

    /// Runs the container while another thread does `meanwhile` with a sender of signals.
    fn run_with(self, meanwhile: impl FnOnce(mpsc::Sender<Signal>) + Send + 'static) -> Result<Outcome, RunError> {
        let container = self.container();
        let state = PathBuf::from("/run/loris/containers").join(&container.id);
        let mut files: Vec<File> = (0..3).map(|_| tempfile::tempfile().unwrap()).collect();
        files[0].write_all(&self.stdin).unwrap();
        std::io::Seek::rewind(&mut files[0]).unwrap();
        let descriptor = |file: &File| OwnedFd::from(file.try_clone().unwrap());
        let streams =
            Streams { stdin: descriptor(&files[0]), stdout: descriptor(&files[1]), stderr: descriptor(&files[2]) };
        let code = run(&self.runner, container, streams, meanwhile)?;
        assert!(!state.exists(), "the container's directory was left behind");
        let mut read = |position: usize| {
            let mut text = String::new();
            std::io::Seek::rewind(&mut files[position]).unwrap();
            files[position].read_to_string(&mut text).unwrap();
            text
        };
        Ok(Outcome { code, stdout: read(1), stderr: read(2) })
    }
}

fn run(
    runner: &Runner,
    container: Container,
    streams: Streams,
    meanwhile: impl FnOnce(mpsc::Sender<Signal>) + Send + 'static,
) -> Result<u8, RunError> {
    let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (sender, signals) = mpsc::channel(16);
    let thread = std::thread::spawn(move || meanwhile(sender));
    let result = tokio.block_on(async {
        // As `loris run` does: what has a handler here has its default in the container. Where tests are started in the
        // background, interrupts are ignored, and the container's shell could not trap them.
        let _forwarded = forwarded_signals().unwrap();
        runner.run(container, streams, signals).await
    });
    thread.join().unwrap();
    result
}

/// The runtimes that work here. Where one doesn't, the test says so.
fn runtimes(test: &str) -> Vec<Runtime> {
    if !loris_testkit::require_root(test) {
        return Vec::new();
    }
    let mut runtimes = vec![Runtime::Embedded];
    for name in ["runc", "crun"] {
        let Some(program) = loris_testkit::require_peer(test, name) else { continue };
        let runtime = Runtime::External(program);
        // Some refuse some machines' cgroups, whatever the container.
        let outcome = Case::new(&runtime, "exit 0").run();
        if outcome.code == 0 {
            runtimes.push(runtime);
        } else {
            loris_testkit::skip(test, &format!("{name} that works here: {}", outcome.stderr.trim()));
        }
    }
    runtimes
}

/// Waits until a file exists and is not empty.
fn wait_for(path: &Path) {
    while fs::metadata(path).map_or(true, |metadata| metadata.len() == 0) {
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn status_and_output() {
    for runtime in runtimes("status_and_output") {
        let outcome = Case::new(&runtime, "printf 'a\\000b'; echo oops >&2; exit 7").run();
        assert_eq!((outcome.code, outcome.stdout.as_str()), (7, "a\0b"), "{runtime:?} {outcome:?}");
        assert_eq!(outcome.stderr, "oops\n", "{runtime:?}");
        assert_eq!(Case::new(&runtime, "kill -9 $$; sleep 1; kill -9 -1; exec sleep 0").run().code, 0, "{runtime:?}");
    }
}

#[test]
fn programs_that_are_none() {
    for runtime in runtimes("programs_that_are_none") {
        let run = |program: &str| {
            let case = Case::new(&runtime, "").with(|wishes| wishes.args = vec![program.to_owned()]);
            fs::write(case.rootfs.path().join("text"), "no program").unwrap();
            case.run().code
        };
        assert_eq!(run("does-not-exist"), NOT_FOUND, "{runtime:?}");
        assert_eq!(run("/does/not/exist"), NOT_FOUND, "{runtime:?}");
        assert_eq!(run("/text"), NOT_EXECUTABLE, "{runtime:?}");
    }
}

#[test]
fn environment_user_and_directory() {
    for runtime in runtimes("environment_user_and_directory") {
        let script = "echo $A $HOME $HOSTNAME; hostname; id -u; id -g; id -G; pwd; echo $$; cat /etc/hostname";
        let outcome = Case::new(&runtime, script)
            .with(|wishes| {
                wishes.env = vec!["A=a b".to_owned()];
                wishes.user = Some("web".to_owned());
                wishes.working_dir = Some("/new/place".to_owned());
                wishes.hostname = Some("box".to_owned());
            })
            .run();
        assert_eq!(
            outcome.stdout, "a b /var/www box\nbox\n33\n34\n34 4\n/new/place\n1\nbox\n",
            "{runtime:?} {outcome:?}"
        );
    }
}

#[test]
fn what_is_kept_away() {
    for runtime in runtimes("what_is_kept_away") {
        let script = "grep -E '^(NoNewPrivs|CapBnd):' /proc/self/status; \
            ls /proc | grep -c '^[0-9]'; \
            (echo x > /proc/sys/kernel/domainname) 2>/dev/null || echo read-only; \
            cat /proc/kcore | wc -c; \
            ls /sys/class/net; ulimit -n; \
            (echo x > /usr/x) 2>/dev/null || echo read-only; \
            for device in null zero full random urandom tty; do test -c /dev/$device || echo no $device; done; \
            test -d /dev/shm && test -d /dev/mqueue && test -c /dev/ptmx && echo devices";
        let outcome = Case::new(&runtime, script).run();
        let lines: Vec<&str> = outcome.stdout.lines().collect();
        // With no device rules, the embedded runtime gives no CAP_MKNOD, which is the 27th.
        let bounding = match runtime {
            Runtime::Embedded => "CapBnd:\t00000000a00425fb",
            Runtime::External(_) => "CapBnd:\t00000000a80425fb",
        };
        assert!(lines.contains(&"NoNewPrivs:\t1"), "{runtime:?} {outcome:?}");
        assert!(lines.contains(&bounding), "{runtime:?} {outcome:?}");
        assert_eq!(lines[3], "read-only", "{runtime:?} {outcome:?}");
        assert_eq!(lines[4], "0", "{runtime:?} {outcome:?}");
        assert_eq!(lines[5], "lo", "{runtime:?} {outcome:?}");
        assert_eq!(lines[7..], ["read-only", "devices"], "{runtime:?} {outcome:?}");
    }
}

#[test]
fn volumes_and_read_only_roots() {
    for runtime in runtimes("volumes_and_read_only_roots") {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("file"), "content").unwrap();
        let script = "cat /data/file /file; echo > /data/x || echo no; echo > /out/made; echo > /x || echo no";
        let outcome = Case::new(&runtime, script)
            .with(|wishes| {
                let volume = |source: &Path, target: &str, read_only| Volume {
                    source: source.to_owned(),
                    target: target.into(),
                    read_only,
                };
                wishes.volumes.push(volume(directory.path(), "/data", true));
                wishes.volumes.push(volume(directory.path(), "/out", false));
                wishes.volumes.push(volume(&directory.path().join("file"), "/file", false));
                wishes.read_only = true;
            })
            .run();
        assert_eq!(outcome.stdout, "contentcontentno\nno\n", "{runtime:?} {outcome:?}");
        assert!(directory.path().join("made").exists(), "{runtime:?}");
        assert!(!directory.path().join("x").exists(), "{runtime:?}");
    }
}

#[test]
fn standard_input() {
    for runtime in runtimes("standard_input") {
        for (interactive, expected) in [(true, "given"), (false, "")] {
            let mut case = Case::new(&runtime, "cat").with(|wishes| wishes.interactive = interactive);
            case.stdin = b"given".to_vec();
            assert_eq!(case.run().stdout, expected, "{runtime:?}");
        }
    }
}

#[test]
fn signals() {
    for runtime in runtimes("signals") {
        for (signal, name) in
            [(Signal::TERM, "TERM"), (Signal::INT, "INT"), (Signal::HUP, "HUP"), (Signal::USR1, "USR1")]
        {
            let shared = tempfile::tempdir().unwrap();
            let script = format!("trap 'echo got; exit 9' {name}; echo > /shared/ready; while :; do sleep 0.01; done");
            let case = Case::new(&runtime, &script).with(|wishes| {
                let source = shared.path().to_owned();
                wishes.volumes.push(Volume { source, target: "/shared".into(), read_only: false });
            });
            let ready = shared.path().join("ready");
            let outcome = case
                .run_with(move |signals| {
                    wait_for(&ready);
                    signals.blocking_send(signal).unwrap();
                })
                .unwrap();
            assert_eq!((outcome.code, outcome.stdout.as_str()), (9, "got\n"), "{runtime:?} {name} {outcome:?}");
        }
    }
}

#[test]
fn a_program_that_is_killed() {
    for runtime in runtimes("a_program_that_is_killed") {
        let shared = tempfile::tempdir().unwrap();
        let case = Case::new(&runtime, "echo > /shared/ready; exec sleep 100").with(|wishes| {
            let source = shared.path().to_owned();
            wishes.volumes.push(Volume { source, target: "/shared".into(), read_only: false });
        });
        let ready = shared.path().join("ready");
        let outcome = case
            .run_with(move |signals| {
                wait_for(&ready);
                signals.blocking_send(Signal::KILL).unwrap();
            })
            .unwrap();
        assert_eq!(outcome.code, 137, "{runtime:?} {outcome:?}");
    }
}

/// Opens a terminal, and returns its two ends.
fn terminal() -> (File, OwnedFd) {
    use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let ours = openpt(flags).unwrap();
    grantpt(&ours).unwrap();
    unlockpt(&ours).unwrap();
    let theirs = ioctl_tiocgptpeer(&ours, flags).unwrap();
    (File::from(ours), theirs)
}

#[test]
fn terminals() {
    for runtime in runtimes("terminals") {
        let (mut ours, theirs) = terminal();
        let size = rustix::termios::Winsize { ws_row: 33, ws_col: 77, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&ours, size).unwrap();
        let before = rustix::termios::tcgetattr(&theirs).unwrap();
        // A program may start before its terminal has its size, and is told then.
        let script = "test -t 0 && test -t 1 && test -t 2 && tty && echo $TERM; i=0; \
                      while [ \"$(stty size)\" = '0 0' ] && [ $i -lt 2000 ]; do i=$((i + 1)); done; \
                      stty size; echo type; read line; echo \"<$line>\"; exit 5";
        let case = Case::new(&runtime, script).with(|wishes| {
            wishes.tty = true;
            wishes.interactive = true;
        });
        let container = case.container();
        let streams = Streams {
            stdin: theirs.try_clone().unwrap(),
            stdout: theirs.try_clone().unwrap(),
            stderr: theirs.try_clone().unwrap(),
        };
        let reader = ours.try_clone().unwrap();
        let conversation = std::thread::spawn(move || {
            let mut text = Vec::new();
            let mut reader = reader;
            let mut typed = false;
            let mut buffer = [0; 1024];
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                text.extend_from_slice(&buffer[..count]);
                let seen = String::from_utf8_lossy(&text).into_owned();
                if seen.contains("type") && !typed {
                    typed = true;
                    ours.write_all(b"hello\r").unwrap();
                }
                if seen.contains("<hello>") {
                    break;
                }
            }
            // Once our end is closed, the other end can't tell its settings.
            (String::from_utf8_lossy(&text).into_owned(), ours)
        });
        let code = run(&case.runner, container, streams, |_| {}).unwrap();
        let (seen, _ours) = conversation.join().unwrap();
        let after = rustix::termios::tcgetattr(theirs.as_fd()).unwrap();
        assert_eq!(code, 5, "{runtime:?} {seen}");
        for expected in ["/dev/pts/0\r\n", "xterm\r\n", "33 77\r\n", "<hello>"] {
            assert!(seen.contains(expected), "{expected:?} in {runtime:?} {seen:?}");
        }
        assert_eq!(before.local_modes, after.local_modes, "{runtime:?}");
        assert_eq!(before.input_modes, after.input_modes, "{runtime:?}");

        let refused = case.with(|_| {}).run_with(|_| {});
        assert!(matches!(refused, Err(RunError::NoTerminal)), "{runtime:?}");
    }
}

/// A runner is killed, so its guard must clean up.
#[test]
fn nothing_outlives_its_owner() {
    for runtime in runtimes("nothing_outlives_its_owner") {
        let shared = tempfile::tempdir().unwrap();
        let case = Case::new(&runtime, "echo > /shared/ready; exec sleep 1000").with(|wishes| {
            let source = shared.path().to_owned();
            wishes.volumes.push(Volume { source, target: "/shared".into(), read_only: false });
        });
        let container = case.container();
        let state = PathBuf::from("/run/loris/containers").join(&container.id);
        let ready = shared.path().join("ready");
        let (watched, watched_state) = (state.clone(), ready);
        let null = || OwnedFd::from(File::options().read(true).write(true).open("/dev/null").unwrap());
        let streams = Streams { stdin: null(), stdout: null(), stderr: null() };
        let code = run(&case.runner, container, streams, move |_signals| {
            wait_for(&watched_state);
            let mut guard = Command::new(PROGRAM).arg("guard").arg(&watched).stdin(Stdio::piped()).spawn().unwrap();
            // It does nothing as long as its owner lives.
            std::thread::sleep(Duration::from_millis(50));
            assert!(guard.try_wait().unwrap().is_none() && watched.exists());
            drop(guard.stdin.take());
            assert!(guard.wait().unwrap().success());
            assert!(!watched.exists());
        })
        .unwrap();
        assert_eq!(code, 137, "{runtime:?}");
        assert!(!state.exists());
    }
}
