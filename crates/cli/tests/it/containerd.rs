//! A containerd of a test's own, for the tools that speak to one.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::harness::{Place, have, mounted_in, ok, peer, run};

/// A running containerd, with all that it keeps in one directory. Ends with the value.
pub struct Containerd {
    child: Child,
    directory: PathBuf,
    temporary: PathBuf,
}

impl Containerd {
    /// Starts one; `None` where it, or what it needs, is missing, which has then been said.
    pub fn start(test: &str, place: &Place) -> Option<Self> {
        Self::start_with(test, place, "")
    }

    /// Does the same, with more lines of configuration.
    pub fn start_with(test: &str, place: &Place, more: &str) -> Option<Self> {
        if !loris_testkit::require_root(test) || !have(test, &["containerd", "ctr", "ctr-remote"]) {
            return None;
        }
        let directory = place.make("containerd");
        let path = directory.display();
        let disabled = ["grpc.v1.cri", "snapshotter.v1.btrfs", "snapshotter.v1.zfs", "snapshotter.v1.devmapper"]
            .map(|plugin| format!("\"io.containerd.{plugin}\""))
            .join(", ");
        let config = format!(
            "version = 2\nroot = \"{path}/root\"\nstate = \"{path}/state\"\ndisabled_plugins = [{disabled}]\n\
             [grpc]\naddress = \"{path}/socket\"\n{more}"
        );
        fs::write(directory.join("config.toml"), config).unwrap();
        let temporary = place.join("tmp");
        let child = spawn(&directory, &temporary);
        let started = Self { child, directory, temporary };
        started.wait_until_it_answers();
        Some(started)
    }

    fn wait_until_it_answers(&self) {
        let end = Instant::now() + Duration::from_secs(60);
        while !run(self.ctr().arg("version")).status.success() {
            let log = || fs::read_to_string(self.directory.join("log")).unwrap_or_default();
            assert!(Instant::now() < end, "containerd does not answer: {}", log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Ends it, and starts it again. What runs in containers goes on.
    pub fn restart(&mut self, signal: Signal, meanwhile: impl FnOnce()) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
        self.child.wait().unwrap();
        meanwhile();
        self.child = spawn(&self.directory, &self.temporary);
        self.wait_until_it_answers();
    }

    /// `ctr`, for this daemon.
    pub fn ctr(&self) -> Command {
        self.client("ctr")
    }

    /// `ctr-remote`, for this daemon.
    pub fn ctr_remote(&self) -> Command {
        self.client("ctr-remote")
    }

    fn client(&self, program: &str) -> Command {
        let mut command = peer(program);
        command.arg("--address").arg(self.directory.join("socket")).args(["--namespace", "tests"]);
        command.current_dir(&self.directory);
        command
    }

    /// Where it listens.
    pub fn socket(&self) -> PathBuf {
        self.directory.join("socket")
    }

    /// Brings a layout's image in, under a name.
    pub fn import(&self, layout: &Path, tag: &str, name: &str) {
        let archive = self.directory.join("import.tar");
        // The layout may hold other images; containerd wants the whole of each.
        let from = format!("oci:{}:{tag}", layout.display());
        ok(peer("skopeo").args(["copy", "--quiet", &from]).arg(format!("oci-archive:{}:{tag}", archive.display())));
        let images = self.ctr();
        let mut images = images;
        images.args(["images", "import", "--base-name", name, "--snapshotter", "overlayfs"]).arg(&archive);
        ok(&mut images);
        fs::remove_file(archive).unwrap();
    }

    /// Writes an image out as a layout.
    pub fn export(&self, name: &str, layout: &Path) {
        let archive = self.directory.join("export.tar");
        ok(self.ctr().args(["images", "export"]).arg(&archive).arg(name));
        fs::create_dir(layout).unwrap();
        ok(Command::new("tar").arg("-C").arg(layout).arg("-xf").arg(&archive));
        fs::remove_file(archive).unwrap();
    }
}

fn spawn(directory: &Path, temporary: &Path) -> Child {
    let log = fs::File::options().create(true).append(true).open(directory.join("log")).unwrap();
    let mut command = peer("containerd");
    command.arg("--config").arg(directory.join("config.toml")).env("TMPDIR", temporary);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap()
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // Asked, not forced: it unmounts what it has mounted.
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        let end = Instant::now() + Duration::from_secs(20);
        while self.child.try_wait().is_ok_and(|ended| ended.is_none()) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        for mounted in mounted_in(&self.directory).iter().rev() {
            let _ = rustix::mount::unmount(mounted, rustix::mount::UnmountFlags::DETACH);
        }
    }
}
