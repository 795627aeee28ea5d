//! The daemon's configuration and installation: what is in force and why, what changes while it runs, what systemd and
//! containerd think of what is written for them.

use std::{
    fs,
    os::unix::net::{UnixDatagram, UnixStream},
    path::{Path, PathBuf},
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::harness::{LIMIT, LORIS, Place, have, ok, peer, run};

/// As Debian's package has it.
const DEBIAN: &str = "version = 2\n\n[plugins]\n  [plugins.\"io.containerd.grpc.v1.cri\"]\n    \
                      [plugins.\"io.containerd.grpc.v1.cri\".cni]\n      bin_dir = \"/usr/lib/cni\"\n";

#[test]
fn what_is_in_force_is_printed_with_where_it_came_from() {
    let place = Place::new();
    let file = place.join("config.toml");
    fs::write(&file, "open_timeot = 3\nnoprefetch = true\n[cache]\nquota = '1G'\n[log]\nlevel = 'debug'\n").unwrap();
    let mut command = place.loris("daemon config --complete idle --log-level warning --config");
    let ran = ok(command.arg(&file).env("LORIS_READ_TIMEOUT", "7"));
    let (text, path) = (ran.text(), file.display());
    let is_there = |value: &str, origin: &str| {
        text.lines().any(|line| line.split_once(" # ").is_some_and(|(v, o)| v.trim_end() == value && o == origin))
    };
    for (value, origin) in [
        ("root = \"/var/lib/loris-snapshotter\"", "default".to_owned()),
        ("prefetch = false", format!("{path}:2, noprefetch")),
        ("quota = 1073741824", format!("{path}:4")),
        ("complete = \"idle\"", "flag --complete".to_owned()),
        ("level = \"warn\"", "flag --log-level".to_owned()),
        ("read_timeout = 7", "environment LORIS_READ_TIMEOUT".to_owned()),
        (&format!("dir = \"{}\"", place.join("cache").display()), "environment LORIS_CACHE_DIR".to_owned()),
    ] {
        assert!(is_there(value, &origin), "{value} # {origin}\n{text}");
    }
    let warning = format!("{path}:1: there is no key open_timeot; did you mean open_timeout?");
    assert!(ran.stderr.contains(&warning), "{ran}");
    // What is printed says the same.
    let again = place.join("again.toml");
    fs::write(&again, &text).unwrap();
    let values = |text: &str| {
        text.lines().map(|line| line.split(" # ").next().unwrap().trim_end().to_owned()).collect::<Vec<_>>()
    };
    let printed = ok(place.loris("daemon config --config").arg(&again)).text();
    assert_eq!(values(&printed), values(&text));
}

#[test]
fn what_is_wrong_in_a_configuration_is_a_mistake_of_its_user() {
    let place = Place::new();
    let file = place.join("config.toml");
    let cases = [
        ("root = 3", ":1:8: root: expected a path in quotes, found a whole number"),
        ("[log]\nlevel = 'loud'", ":2: log.level: \"loud\" is none of"),
        ("root = ", ":1:"),
    ];
    for (text, expected) in cases {
        fs::write(&file, text).unwrap();
        let said = [file.to_str().unwrap(), expected];
        run(place.loris("daemon config --config").arg(&file)).failed(2, &said);
        run(place.loris("daemon snapshotter --config").arg(&file)).failed(2, &said);
    }
    run(place.loris("daemon config --config").arg(place.join("none.toml"))).failed(2, &["none.toml"]);
    run(&mut place.loris("daemon config --log-level loud")).failed(2, &["loud"]);
}

/// A machine's files, with containerd's configuration.
fn machine(place: &Place) -> PathBuf {
    let root = place.make("machine");
    fs::create_dir_all(root.join("etc/containerd")).unwrap();
    fs::write(root.join("etc/containerd/config.toml"), DEBIAN).unwrap();
    root
}

fn tree(root: &Path) -> String {
    ok(std::process::Command::new("find").arg(root).args(["-printf", "%P %m %s\n"])).text()
}

#[test]
fn an_installation_is_shown_made_and_taken_back() {
    let place = Place::new();
    let root = machine(&place);
    let before = tree(&root);
    let verb = |verb: &str| {
        let mut command = place.loris(&format!("daemon {verb} --root-dir"));
        command.arg(&root);
        command
    };
    let shown = ok(verb("install").arg("--dry-run")).text();
    for line in [
        "--- /dev/null",
        "+++ /etc/systemd/system/loris-snapshotter.service",
        "--- /etc/containerd/config.toml",
        "+[proxy_plugins.loris]",
        "+snapshotter = \"loris\"",
    ] {
        assert!(shown.lines().any(|other| other == line), "{line}\n{shown}");
    }
    run(&mut verb("install")).failed(2, &["--yes"]);
    assert_eq!(tree(&root), before);
    let installed = ok(verb("install").arg("--yes"));
    assert_eq!(installed.text(), shown);
    assert!(installed.stderr.contains("left to you: systemctl enable --now"), "{installed}");
    let after = tree(&root);
    let again = ok(verb("install").arg("--yes"));
    assert!(again.stderr.contains("nothing changes") && again.stdout.is_empty(), "{again}");
    assert_eq!(tree(&root), after);
    ok(verb("uninstall").arg("--dry-run"));
    assert_eq!(tree(&root), after);
    ok(verb("uninstall").arg("--yes"));
    assert_eq!(tree(&root), before);
    assert_eq!(fs::read_to_string(root.join("etc/containerd/config.toml")).unwrap(), DEBIAN);
    assert!(ok(&mut verb("uninstall")).stderr.contains("nothing changes"));
}

#[test]
fn systemd_takes_the_units() {
    let test = "systemd_takes_the_units";
    if !have(test, &["systemd-analyze"]) {
        return;
    }
    let place = Place::new();
    let root = machine(&place);
    ok(place.loris("daemon install --yes --program").arg(LORIS).arg("--root-dir").arg(&root));
    let units = root.join("etc/systemd/system");
    let mut verify = peer("systemd-analyze");
    verify.args(["verify", "--man=no", "--recursive-errors=no"]);
    let ran = ok(verify.arg(units.join("loris-snapshotter.service")).arg(units.join("loris-snapshotter.socket")));
    assert_eq!(ran.stderr.lines().filter(|line| line.contains("loris")).collect::<Vec<_>>(), [] as [&str; 0], "{ran}");
}

#[test]
fn containerd_takes_its_configuration() {
    let test = "containerd_takes_its_configuration";
    if !have(test, &["containerd"]) {
        return;
    }
    let place = Place::new();
    let root = machine(&place);
    ok(place.loris("daemon install --yes --root-dir").arg(&root));
    let mut containerd = peer("containerd");
    let dump = ok(containerd.arg("--config").arg(root.join("etc/containerd/config.toml")).args(["config", "dump"]));
    let text = dump.text();
    for line in [
        "[proxy_plugins.loris]",
        "address = \"/run/loris/snapshotter.sock\"",
        "snapshotter = \"loris\"",
        "disable_snapshot_annotations = false",
        "bin_dir = \"/usr/lib/cni\"",
    ] {
        assert!(text.lines().any(|other| other.trim() == line), "{line}\n{dump}");
    }
}

/// A process that a service manager has started for a connection.
struct Managed {
    child: Child,
    log: PathBuf,
    notified: UnixDatagram,
}

impl Managed {
    /// Starts it with a socket at `address`, and connects.
    fn start(place: &Place, address: &Path, arguments: &[&str]) -> Self {
        let (notify, log) = (place.join("notify"), place.join("log"));
        let notified = UnixDatagram::bind(&notify).unwrap();
        notified.set_read_timeout(Some(LIMIT)).unwrap();
        let mut command = peer("systemd-socket-activate");
        command.arg("--listen").arg(address).arg(format!("--setenv=NOTIFY_SOCKET={}", notify.display()));
        command.arg(format!("--setenv=LORIS_CACHE_DIR={}", place.join("cache").display()));
        command.arg(format!("--setenv=PATH={}", std::env::var("PATH").unwrap_or_default()));
        command.arg(LORIS).args(["daemon", "snapshotter"]).args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(fs::File::create(&log).unwrap());
        Self { child: command.spawn().unwrap(), log, notified }
    }

    fn told(&self) -> String {
        let mut message = [0; 500];
        let length = self.notified.recv(&mut message).unwrap_or_else(|error| panic!("{error}: {}", self.said()));
        String::from_utf8(message[..length].to_vec()).unwrap()
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Tells it to read its configuration again, and waits until it has.
    fn reload(&self) {
        self.signal(Signal::HUP);
        assert!(self.told().starts_with("RELOADING=1\nMONOTONIC_USEC="));
        assert!(self.told().starts_with("READY=1\n"));
    }
}

impl Drop for Managed {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_service_manager_opens_the_socket_and_is_told_how_the_daemon_gets_on() {
    let test = "a_service_manager_opens_the_socket_and_is_told_how_the_daemon_gets_on";
    if !loris_testkit::require_root(test) || !have(test, &["systemd-socket-activate"]) {
        return;
    }
    let place = Place::new();
    let (address, root, file) = (place.join("service.sock"), place.join("root"), place.join("config.toml"));
    fs::write(&file, "[log]\nlevel = 'info'\n").unwrap();
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    // With the flags of stargz-snapshotter's unit, and an address that is not used.
    let elsewhere = path(&place.join("elsewhere.sock"));
    let arguments = ["--config", &path(&file), "--address", &elsewhere, "--root", &path(&root)];
    let mut daemon = Managed::start(&place, &address, &arguments);
    let end = Instant::now() + LIMIT;
    let _connected = loop {
        if let Ok(stream) = UnixStream::connect(&address) {
            break stream;
        }
        assert!(Instant::now() < end, "{}", daemon.said());
        std::thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(daemon.told(), format!("READY=1\nMAINPID={}\n", daemon.child.id()));
    assert!(!Path::new(&elsewhere).exists());

    // What counts from now on, and what does not.
    fs::write(
        &file,
        "complete = 'never'\nopen_timeout = 3\nroot = '/other'\n[cache]\nquota = '1G'\n[log]\nformat = 'json'\n",
    )
    .unwrap();
    daemon.reload();
    let said = daemon.said();
    let about = |key: &str| {
        let named = format!("\"key\":\"{key}\"");
        let line = said.lines().find(|line| line.contains(&named)).unwrap_or_else(|| panic!("{key}: {said}"));
        serde_json::from_str::<serde_json::Value>(line).unwrap()
    };
    for key in ["complete", "open_timeout", "log.format"] {
        assert_eq!(about(key)["level"], "INFO", "{key}");
    }
    assert_eq!(about("cache.quota")["level"], "WARN");
    assert_eq!(about("cache.quota")["place"], format!("{}:5", file.display()));
    // A flag counts more.
    assert!(!said.contains("\"key\":\"root\""), "{said}");

    // A file that is wrong changes nothing, and a successor would go on with what it said before.
    fs::write(&file, "complete = 7\n").unwrap();
    daemon.reload();
    assert!(daemon.said().contains("config.toml:1:12: complete: expected one of"), "{}", daemon.said());
    assert!(fs::read_to_string(root.join("configuration.toml")).unwrap().starts_with("complete = 'never'\n"));

    daemon.signal(Signal::TERM);
    assert_eq!(daemon.told(), "STOPPING=1\n");
    assert!(daemon.child.wait().unwrap().success(), "{}", daemon.said());
    assert!(address.exists(), "it is the service manager's");
    fs::remove_file(&address).unwrap();
}
