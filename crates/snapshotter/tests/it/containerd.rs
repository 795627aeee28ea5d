//! A containerd of a test's own, with the CRI plugin.

use std::{
    fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

/// A running containerd, with all that it keeps in one directory. Ends with the value.
pub struct Containerd {
    child: Child,
    directory: PathBuf,
}

impl Containerd {
    /// Starts one; `None` where it, or what it needs, is missing, which has then been said.
    pub fn start(test: &str, directory: &Path) -> Option<Self> {
        Self::start_with(test, directory, "", "")
    }

    /// Does that with more lines for the CRI plugin, and more tables.
    pub fn start_with(test: &str, directory: &Path, cri: &str, more: &str) -> Option<Self> {
        if !loris_testkit::require_root(test) {
            return None;
        }
        loris_testkit::require_peer(test, "runc")?;
        let program = loris_testkit::require_peer(test, "containerd")?;
        let path = directory.display();
        let disabled = ["snapshotter.v1.btrfs", "snapshotter.v1.zfs", "snapshotter.v1.devmapper"]
            .map(|plugin| format!("\"io.containerd.{plugin}\""))
            .join(", ");
        let config = format!(
            "version = 2\nroot = \"{path}/root\"\nstate = \"{path}/state\"\ndisabled_plugins = [{disabled}]\n\
             [grpc]\naddress = \"{path}/socket\"\n\
             [plugins.\"io.containerd.internal.v1.opt\"]\npath = \"{path}/opt\"\n\
             [plugins.\"io.containerd.grpc.v1.cri\"]\nstream_server_address = \"127.0.0.1\"\nstream_server_port = \"0\"\n\
             {cri}\n\
             [plugins.\"io.containerd.grpc.v1.cri\".cni]\nbin_dir = \"{path}/cni\"\nconf_dir = \"{path}/cni\"\n{more}"
        );
        fs::write(directory.join("config.toml"), config).unwrap();
        let child = spawn(&program, directory);
        let started = Self { child, directory: directory.to_owned() };
        started.wait();
        Some(started)
    }

    /// Ends it and starts it again.
    pub fn restart(&mut self, between: impl FnOnce()) {
        self.end();
        between();
        self.child = spawn(&loris_testkit::peer("containerd").unwrap(), &self.directory);
        self.wait();
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.join("socket")
    }

    fn wait(&self) {
        let end = Instant::now() + Duration::from_secs(120);
        while UnixStream::connect(self.socket()).is_err() {
            let log = || fs::read_to_string(self.directory.join("log")).unwrap_or_default();
            assert!(Instant::now() < end, "containerd does not listen: {}", log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn end(&mut self) {
        // Asked, not forced: it unmounts what it has mounted.
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        let end = Instant::now() + Duration::from_secs(20);
        while self.child.try_wait().is_ok_and(|ended| ended.is_none()) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(program: &Path, directory: &Path) -> Child {
    let log = fs::OpenOptions::new().create(true).append(true).open(directory.join("log")).unwrap();
    let mut command = Command::new(program);
    command.arg("--config").arg(directory.join("config.toml"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap()
}

impl Drop for Containerd {
    fn drop(&mut self) {
        self.end();
    }
}
