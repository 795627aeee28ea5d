#![allow(clippy::unwrap_used)]
use std::{collections::BTreeMap, fs};

use super::*;

/// A machine: files below a directory.
struct Machine {
    directory: tempfile::TempDir,
}

impl Machine {
    fn with(files: &[(&str, &str)]) -> Self {
        let machine = Self { directory: tempfile::tempdir().unwrap() };
        for (path, text) in files {
            machine.write(path, text);
        }
        machine
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.directory.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.directory.path().join(path)).unwrap()
    }

    fn wanted(&self) -> Wanted {
        Wanted {
            root_dir: self.directory.path().to_owned(),
            program: "/usr/local/bin/loris".into(),
            config: None,
            address: "/run/loris/snapshotter.sock".into(),
            root: "/var/lib/loris-snapshotter".into(),
            containerd: true,
            cri: true,
            docker: true,
            is_two: false,
        }
    }

    fn install(&self) -> Plan {
        self.install_as(&self.wanted())
    }

    fn install_as(&self, wanted: &Wanted) -> Plan {
        let plan = plan(wanted).unwrap();
        plan.clone().carry_out().unwrap();
        plan
    }

    fn uninstall(&self) -> Plan {
        let plan = removal(self.directory.path()).unwrap();
        plan.clone().carry_out().unwrap();
        plan
    }

    /// All files and directories, with what they say and their mode.
    fn everything(&self) -> BTreeMap<PathBuf, (u32, Vec<u8>)> {
        let mut found = BTreeMap::new();
        let mut left = vec![self.directory.path().to_owned()];
        while let Some(directory) = left.pop() {
            for entry in fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                let mode = path.metadata().unwrap().mode();
                if path.is_dir() {
                    found.insert(path.clone(), (mode, Vec::new()));
                    left.push(path);
                } else {
                    found.insert(path.clone(), (mode, fs::read(&path).unwrap()));
                }
            }
        }
        found
    }
}

const DEBIAN: &str = r#"version = 2

[plugins]
  [plugins."io.containerd.grpc.v1.cri"]
    [plugins."io.containerd.grpc.v1.cri".cni]
      bin_dir = "/usr/lib/cni"
      conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.internal.v1.opt"]
    path = "/var/lib/containerd/opt"
"#;

/// As docker.com's packages have it.
const DOCKER_CE: &str = r#"#   Copyright 2018-2022 Docker Inc.

disabled_plugins = ["cri"]

#root = "/var/lib/containerd"
#[grpc]
#  address = "/run/containerd/containerd.sock"
"#;

/// With stargz-snapshotter, as its documentation says.
const STARGZ: &str = r#"version = 2

# Enable stargz snapshotter for CRI
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "stargz" # lazily
  disable_snapshot_annotations = false

# Plug stargz snapshotter into containerd
[proxy_plugins]
  [proxy_plugins.stargz]
    type = "snapshot"
    address = "/run/containerd-stargz-grpc/containerd-stargz-grpc.sock"
"#;

/// Of containerd 2, with what Kubernetes needs.
const TWO: &str = r#"version = 3
imports = ["/etc/containerd/conf.d/*.toml"]

[plugins]
  [plugins.'io.containerd.cri.v1.images']
    # keep me
    snapshotter = 'overlayfs'
    max_concurrent_downloads = 3

    [plugins.'io.containerd.cri.v1.images'.pinned_images]
      sandbox = 'registry.k8s.io/pause:3.10'

  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
    runtime_type = 'io.containerd.runc.v2'
"#;

const TWO_TRANSFER: &str = r#"version = 3
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux/amd64"
  snapshotter = "overlayfs"
"#;

const INLINE: &str = "version = 2\nproxy_plugins = { other = { type = \"snapshot\", address = \"/a\" } }\n";
const DOTTED: &str = "version = 2\nproxy_plugins.other.type = \"snapshot\"\nproxy_plugins.other.address = \"/a\"\n";
const ONE: &str = "[plugins.cri.containerd]\ndefault_runtime_name = \"runc\"\n";

/// Configurations of containerd, by name.
const CONTAINERDS: &[(&str, &str)] = &[
    ("debian", DEBIAN),
    ("docker_ce", DOCKER_CE),
    ("stargz", STARGZ),
    ("two", TWO),
    ("two_transfer", TWO_TRANSFER),
    ("inline", INLINE),
    ("one", ONE),
    ("dotted", DOTTED),
    ("empty", ""),
];

const DAEMONS: &[(&str, &str)] = &[
    (
        "four_spaces",
        "{\n    \"log-driver\": \"journald\",\n    \"features\": {\n        \"buildkit\": true\n    }\n}\n",
    ),
    ("empty_object", "{}\n"),
    ("one_line", "{\"storage-driver\": \"overlay2\", \"features\": {}}"),
    ("tabs", "{\n\t\"storage-driver\":\"overlay2\"\n}"),
];

#[test]
fn units() {
    let machine = Machine::with(&[]);
    let config = Some("/etc/my config.toml".into());
    machine.install_as(&Wanted { config, containerd: false, ..machine.wanted() });
    let service = machine.read(SERVICE);
    assert!(service.contains("\nExecStart=/usr/local/bin/loris daemon snapshotter --config /etc/my\\x20config.toml\n"));
    for line in ["Type=notify", "NotifyAccess=all", "KillMode=process", "Restart=always"] {
        assert!(service.lines().any(|other| other == line), "{line}");
    }
    let settings: Vec<_> =
        service.lines().filter_map(|line| line.split_once('=').filter(|_| !line.starts_with('#'))).collect();
    for needs_a_mount_namespace in ["Private", "Protect", "ReadOnly", "Inaccessible", "Bind", "Temporary", "Dynamic"] {
        assert!(!settings.iter().any(|(key, _)| key.starts_with(needs_a_mount_namespace)), "{needs_a_mount_namespace}");
    }
    let socket = machine.read(SOCKET);
    assert!(
        socket.contains("\nListenStream=/run/loris/snapshotter.sock\nSocketMode=0600\n")
            || socket.contains("SocketMode=0600")
    );
    assert!(!machine.directory.path().join("etc/containerd").exists());
}

#[test]
fn containerds_configuration() {
    for (name, text) in CONTAINERDS {
        let machine = Machine::with(&[(CONTAINERD, text)]);
        machine.install();
        let after = machine.read(CONTAINERD);
        insta::assert_snapshot!(format!("containerd_{name}"), after);
        after.parse::<::toml::Table>().unwrap();
    }
    let machine = Machine::with(&[]);
    machine.install_as(&Wanted { is_two: true, ..machine.wanted() });
    insta::assert_snapshot!("containerd_none_but_two", machine.read(CONTAINERD));
}

#[test]
fn dockers_configuration() {
    for (name, text) in DAEMONS {
        let machine = Machine::with(&[(DOCKER, text)]);
        machine.install();
        let after = machine.read(DOCKER);
        insta::assert_snapshot!(format!("docker_{name}"), after);
        let value: serde_json::Value = serde_json::from_str(&after).unwrap();
        assert_eq!(value["features"]["containerd-snapshotter"], true);
        assert_eq!(value["storage-driver"], "loris");
    }
    // Not where Docker is not.
    let machine = Machine::with(&[]);
    machine.install();
    assert!(!machine.directory.path().join(DOCKER).exists());
    machine.write("usr/bin/dockerd", "");
    machine.install();
    insta::assert_snapshot!("docker_none", machine.read(DOCKER));
}

#[test]
fn what_is_uninstalled_is_as_it_was_byte_for_byte() {
    for (name, text) in CONTAINERDS {
        for (daemon, json) in DAEMONS {
            let machine = Machine::with(&[(CONTAINERD, text), (DOCKER, json)]);
            let mode = fs::Permissions::from_mode(0o640);
            fs::set_permissions(machine.directory.path().join(DOCKER), mode).unwrap();
            let before = machine.everything();
            assert!(!machine.install().is_empty());
            assert_ne!(machine.everything(), before);
            machine.uninstall();
            assert_eq!(machine.everything(), before, "{name}, {daemon}");
        }
    }
    let machine = Machine::with(&[]);
    machine.install();
    machine.uninstall();
    assert_eq!(machine.everything(), BTreeMap::new());
}

#[test]
fn installing_again_changes_nothing() {
    for (_, text) in CONTAINERDS {
        let machine = Machine::with(&[(CONTAINERD, text), (DOCKER, DAEMONS[0].1)]);
        let before = machine.everything();
        machine.install();
        let once = machine.everything();
        let again = plan(&machine.wanted()).unwrap();
        assert_eq!(again.changes, []);
        // With something else, and then back: the first state is what comes back.
        machine.install_as(&Wanted { address: "/run/other.sock".into(), ..machine.wanted() });
        assert!(machine.read(CONTAINERD).contains("/run/other.sock"));
        machine.install();
        assert_eq!(
            machine.read(CONTAINERD),
            String::from_utf8(once[&machine.directory.path().join(CONTAINERD)].1.clone()).unwrap()
        );
        machine.uninstall();
        assert_eq!(machine.everything(), before);
    }
}

/// What others wrote in between stays, and nothing else does.
#[test]
fn what_was_changed_since_stays() {
    for (name, text) in CONTAINERDS {
        let machine = Machine::with(&[(CONTAINERD, text), (DOCKER, DAEMONS[0].1)]);
        machine.install();
        let after = machine.read(CONTAINERD);
        machine.write(CONTAINERD, &format!("{after}\n[debug]\nlevel = \"debug\" # mine\n"));
        let json = machine.read(DOCKER).replacen('{', "{\n    \"debug\": true,", 1);
        machine.write(DOCKER, &json);
        let plan = machine.uninstall();
        assert!(plan.notes.iter().any(|note| note.contains("changed since")), "{:?}", plan.notes);
        let left: ::toml::Table = machine.read(CONTAINERD).parse().unwrap();
        let version = if text.trim().is_empty() { "version = 2\n" } else { text };
        let mut expected: ::toml::Table = version.parse().unwrap();
        expected.extend("[debug]\nlevel = \"debug\"\n".parse::<::toml::Table>().unwrap());
        assert_eq!(left, expected, "{name}");
        for comment in ["# mine", "#[grpc]", "# Plug stargz", "# keep me", "# lazily"] {
            let there = |text: &str| text.contains(comment);
            assert!(there(&machine.read(CONTAINERD)) || !(there(text) || comment == "# mine"), "{name}: {comment}");
        }
        let expected = DAEMONS[0].1.replacen('{', "{\n    \"debug\": true,", 1);
        assert_eq!(machine.read(DOCKER), expected);
    }
}

#[test]
fn what_has_another_value_by_now_is_not_taken_back() {
    let machine = Machine::with(&[(CONTAINERD, STARGZ)]);
    machine.install();
    let after = machine.read(CONTAINERD).replace("snapshotter = \"loris\"", "snapshotter = \"overlayfs\"");
    machine.write(CONTAINERD, &after);
    let plan = machine.uninstall();
    assert!(machine.read(CONTAINERD).contains("snapshotter = \"overlayfs\" # lazily"));
    assert!(!machine.read(CONTAINERD).contains("loris"));
    assert!(plan.notes.iter().any(|note| note.contains("has another value by now")), "{:?}", plan.notes);
}

#[test]
fn members_of_json_come_and_go() {
    let cases = [
        "{}",
        "{\n}\n",
        "{ \"a\": 1 }",
        "{\n  \"a\": [1, {\"b\": \"}\"}],\n  \"features\": {\n    \"x\": null\n  }\n}\n",
        "{\"features\":{\"containerd-snapshotter\":false},\"z\":\"\\\"{\"}",
    ];
    for text in cases {
        let mut edited = json::Edited::parse(text).unwrap();
        edited.set(&["features", "containerd-snapshotter"], "true").unwrap();
        edited.set(&["storage-driver"], "\"loris\"").unwrap();
        let (after, edits) = edited.finish();
        let mut value: serde_json::Value = serde_json::from_str(&after).unwrap();
        assert_eq!(value["features"]["containerd-snapshotter"], true, "{after}");
        assert_eq!(value["storage-driver"], "loris", "{after}");
        let mut edited = json::Edited::parse(&after).unwrap();
        assert!(edited.edits_undone(&edits));
        value = serde_json::from_str(&edited.finish().0).unwrap();
        assert_eq!(value, serde_json::from_str::<serde_json::Value>(text).unwrap(), "{after}");
    }
}

impl json::Edited {
    fn edits_undone(&mut self, edits: &[Edit]) -> bool {
        edits.iter().rev().all(|edit| self.undo(edit))
    }
}

#[test]
fn what_can_not_be_changed_is_said_and_nothing_is_done() {
    let cases = [
        (CONTAINERD, "version = ", "etc/containerd/config.toml"),
        (CONTAINERD, "proxy_plugins = 3", "proxy_plugins is not a table"),
        (DOCKER, "[]", "daemon.json"),
        (DOCKER, "{\"features\": 3}", "features"),
        (DOCKER, "{\"a\": ", "daemon.json"),
        (RECORD, "{\"version\": 9}", "of version 9"),
        (RECORD, "nonsense", "installed.json"),
    ];
    for (path, text, expected) in cases {
        let machine = Machine::with(&[(path, text)]);
        let before = machine.everything();
        let error = plan(&machine.wanted()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert_eq!(machine.everything(), before);
    }
    let machine = Machine::with(&[("etc/containerd/other", "")]);
    std::os::unix::fs::symlink("/etc/hostname", machine.directory.path().join(CONTAINERD)).unwrap();
    let error = plan(&machine.wanted()).unwrap_err().to_string();
    assert!(error.contains("outside of"), "{error}");
}

#[test]
fn a_link_stays_one() {
    let machine = Machine::with(&[("etc/real/config.toml", DEBIAN), ("etc/containerd/other", "")]);
    let link = machine.directory.path().join(CONTAINERD);
    std::os::unix::fs::symlink("../real/config.toml", &link).unwrap();
    machine.install();
    assert!(link.is_symlink());
    assert!(machine.read("etc/real/config.toml").contains("loris"));
    machine.uninstall();
    assert!(link.is_symlink());
    assert_eq!(machine.read("etc/real/config.toml"), DEBIAN);
}

#[test]
fn changes_are_shown() {
    let machine = Machine::with(&[(CONTAINERD, STARGZ)]);
    let plan = plan(&Wanted { docker: false, ..machine.wanted() }).unwrap();
    let diff = plan.changes.iter().find(|change| change.path.ends_with("config.toml")).unwrap().diff();
    insta::assert_snapshot!("diff", diff);
    assert!(plan.diff().contains("--- /dev/null\n+++ /etc/systemd/system/loris-snapshotter.socket\n"));
}

#[test]
fn k3s_is_spoken_of() {
    let machine = Machine::with(&[("var/lib/rancher/k3s/agent/etc/containerd/config.toml", "")]);
    let plan = plan(&machine.wanted()).unwrap();
    assert!(plan.notes.iter().any(|note| note.contains("config.toml.tmpl")));
}

#[test]
fn versions_of_containerd() {
    let cases = [
        ("containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u3", false),
        ("containerd github.com/containerd/containerd v1.7.27 05044ec0a9a75232cad458027ca83437aae3f4da", false),
        ("containerd github.com/containerd/containerd/v2 v2.1.3 c787fb98911740dd3ff2d0e45ce88cdf01410486", true),
        ("containerd containerd.io 1.7.27 05044ec", false),
        ("", false),
    ];
    for (printed, expected) in cases {
        assert_eq!(is_two(printed), expected, "{printed}");
    }
}
