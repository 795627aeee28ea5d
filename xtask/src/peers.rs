//! The real peers: the tools that users have today, from Debian's packages. Tests run against them, never against mocks.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Result, bail};

use crate::run::run;

/// A program that tests call, and the Debian package that has it.
const PEERS: &[(&str, &str)] = &[
    ("docker-registry", "docker-registry"),
    ("skopeo", "skopeo"),
    ("umoci", "umoci"),
    ("podman", "podman"),
    ("conmon", "conmon"),
    ("ctr-remote", "stargz-snapshotter"),
    ("containerd", "containerd"),
    ("runc", "runc"),
    ("crun", "crun"),
    ("fusermount3", "fuse3"),
    ("debootstrap", "debootstrap"),
    ("htpasswd", "apache2-utils"),
    ("openssl", "openssl"),
    ("python3", "python3"),
    ("tar", "tar"),
    ("getfattr", "attr"),
    ("setpriv", "util-linux"),
    ("iptables", "iptables"),
    ("go", "golang-go"),
    ("kubectl", "kubernetes-client"),
];

/// Libraries that tests build small programs against: a file that tells that one is there, and its package.
const LIBRARIES: &[(&str, &str)] = &[(
    "/usr/share/gocode/src/github.com/containerd/stargz-snapshotter/estargz",
    "golang-github-containerd-stargz-snapshotter-dev",
)];

/// Installs what is missing of the peers.
pub fn install() -> Result<()> {
    let missing: Vec<&str> = PEERS
        .iter()
        .filter(|(program, _)| !installed(program))
        .map(|(_, package)| *package)
        .chain(LIBRARIES.iter().filter(|(file, _)| !Path::new(file).exists()).map(|(_, package)| *package))
        .collect();
    if missing.is_empty() {
        eprintln!("peers: all installed");
        return Ok(());
    }
    apt_install(&missing)?;
    let failed: Vec<&str> =
        PEERS.iter().filter(|(program, _)| !installed(program)).map(|(program, _)| *program).collect();
    if !failed.is_empty() {
        bail!("still missing after the installation: {}", failed.join(", "));
    }
    Ok(())
}

/// Installs what the demo can use and lacks. It goes on without: the demo itself says what it can't do then.
pub fn install_for_demo() {
    if !installed("fusermount3")
        && let Err(error) = apt_install(&["fuse3"])
    {
        eprintln!("demo: going on without fuse3: {error:#}");
    }
}

fn apt_install(packages: &[&str]) -> Result<()> {
    eprintln!("installing Debian packages: {}", packages.join(" "));
    // Daemons that packages bring are started by the tests that need them, on sockets of their own; the packages' own
    // services stay off.
    let policy = Path::new("/usr/sbin/policy-rc.d");
    let ours = !policy.exists() && std::fs::write(policy, "#!/bin/sh\nexit 101\n").is_ok();
    if ours {
        run(Command::new("chmod").args(["+x", "/usr/sbin/policy-rc.d"]))?;
    }
    let outcome = run(apt().args(["update", "-qq"])).and_then(|()| {
        run(apt().args(["install", "-y", "-qq", "--no-install-recommends"]).args(packages).stdout(Stdio::null()))
    });
    if ours {
        std::fs::remove_file(policy)?;
    }
    outcome
}

fn apt() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command
}

fn installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(Into::into))
        .any(|folder| folder.join(program).is_file())
}
