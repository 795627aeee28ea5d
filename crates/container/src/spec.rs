//! An image's configuration and a user's wishes, as an OCI runtime specification.
//!
//! The defaults are Docker's (mounts, masked paths, capabilities, environment), with two differences: processes can't
//! gain privileges (`noNewPrivileges`), and there is no system-call filter.
//!
//! Source: OCI runtime specification 1.1, `config.md` and `config-linux.md`; OCI image specification 1.1,
//! `conversion.md`.

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io::{self, Read},
    path::{Component, Path, PathBuf},
    str::FromStr,
};

use loris_oci::document::ProcessConfig;
use oci_spec::runtime::Spec;
use rustix::process::{Resource, getrlimit};
use serde_json::{Value, json};

use crate::{
    root::Root,
    user::{self, UserError},
};

/// What Docker lets a container's root do.
const CAPABILITIES: [&str; 14] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];
/// What tells too much about the host.
const MASKED_PATHS: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];
/// What would change the host.
const READ_ONLY_PATHS: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];
/// Where programs are looked for, if the image doesn't say.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Most open files of a process, as under Docker, where ours may be as many.
const OPEN_FILES: u64 = 1 << 20;
/// Longest file of the host that is copied into a container, in bytes.
const HOST_FILE_BYTES: u64 = 1 << 20;

/// What network a container has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Network {
    /// The host's.
    #[default]
    Host,
    /// None but its own loopback.
    None,
}

/// A file or directory of the host in the container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Where it is on the host; absolute.
    pub source: PathBuf,
    /// Where it will be in the container; absolute, without `..`, and not `/`.
    pub target: PathBuf,
    /// Whether the container may only read it.
    pub read_only: bool,
}

/// What a user asks for beyond what the image says.
#[derive(Clone, Debug, Default)]
pub struct Wishes {
    /// Arguments, in place of the image's `Cmd`.
    pub args: Vec<String>,
    /// In place of the image's `Entrypoint`; its `Cmd` is then left out too. An empty one removes the entry point.
    pub entrypoint: Option<Vec<String>>,
    /// `NAME=value`, or `NAME` to pass the caller's on.
    pub env: Vec<String>,
    /// Files and directories of the host.
    pub volumes: Vec<Volume>,
    /// The working directory, in place of the image's.
    pub working_dir: Option<String>,
    /// `name|uid[:group|gid]`, in place of the image's.
    pub user: Option<String>,
    /// The network.
    pub network: Network,
    /// Whether the root file system may only be read.
    pub read_only: bool,
    /// The container's name for itself. By default the host's with the host's network, else the container's identifier.
    pub hostname: Option<String>,
    /// Whether the process gets a terminal.
    pub tty: bool,
    /// Whether the process gets our standard input.
    pub interactive: bool,
}

/// A container that can be run.
#[derive(Clone, Debug)]
pub struct Container {
    /// Its identifier: 12 hexadecimal digits.
    pub id: String,
    /// What the runtime is to do. Paths of `files` are missing from it until the container has a bundle.
    pub spec: Spec,
    /// Files to be written into the bundle and mounted, by their path in the container.
    pub files: BTreeMap<&'static str, Vec<u8>>,
    /// Whether the process gets our standard input.
    pub interactive: bool,
}

/// A container that can't be made as it was asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpecError {
    /// The root can't be opened.
    #[error("open the root file system {}: {source}", path.display())]
    Root {
        /// Where it is.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Neither the image nor the user says what to run.
    #[error("nothing to run: the image has no entry point and no command; give one behind the image's name")]
    NoCommand,
    /// The user or group is unknown.
    #[error(transparent)]
    User(#[from] UserError),
    /// A variable without a name, or with a NUL.
    #[error("not an environment variable: {text:?} (expected NAME=value or NAME)")]
    Variable {
        /// What was given.
        text: String,
    },
    /// The working directory can't be.
    #[error("working directory {path:?}: {reason}")]
    WorkingDirectory {
        /// The directory.
        path: String,
        /// Why.
        reason: String,
    },
    /// The volume can't be mounted.
    #[error("volume {text:?}: {reason}")]
    Volume {
        /// What was given.
        text: String,
        /// Why.
        reason: String,
    },
    /// The host name isn't one.
    #[error("not a host name: {text:?}")]
    Hostname {
        /// What was given.
        text: String,
    },
    /// No random numbers, which names of containers are made of.
    #[error("get random numbers: {0}")]
    Random(io::Error),
    /// What was built is no specification.
    #[error("build the runtime specification: {0}")]
    Build(#[from] serde_json::Error),
}

impl FromStr for Volume {
    type Err = SpecError;

    /// Reads `SOURCE:TARGET[:ro|rw]`.
    fn from_str(text: &str) -> Result<Self, SpecError> {
        let wrong = |reason: &str| SpecError::Volume { text: text.to_owned(), reason: reason.to_owned() };
        let mut parts = text.split(':');
        let (Some(source), Some(target), options, None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(wrong("expected SOURCE:TARGET[:ro|rw]"));
        };
        let read_only = match options {
            None | Some("rw") => false,
            Some("ro") => true,
            Some(_) => return Err(wrong("the only options are ro and rw")),
        };
        let volume = Self { source: source.into(), target: target.into(), read_only };
        volume.check().map_err(wrong)?;
        Ok(volume)
    }
}

impl Volume {
    fn check(&self) -> Result<(), &'static str> {
        let parent = |path: &Path| path.components().any(|component| component == Component::ParentDir);
        let text = |path: &Path| path.to_str().is_some_and(|text| !text.contains('\0'));
        if !self.source.is_absolute() {
            Err("the source is not an absolute path (named volumes are not supported)")
        } else if !self.target.is_absolute() {
            Err("the target is not an absolute path")
        } else if parent(&self.target) || self.target == Path::new("/") {
            Err("the target must not hold .. and not be /")
        } else if !text(&self.source) || !text(&self.target) {
            Err("a runtime takes only paths that are UTF-8 and without NUL")
        } else {
            Ok(())
        }
    }
}

impl Container {
    /// Makes a container over the root file system at `rootfs`, which must be an absolute path. `caller_env` returns
    /// variables of the caller's environment.
    ///
    /// The working directory is created in the root if it is missing.
    ///
    /// # Errors
    /// The image or the user asks for what can't be.
    pub fn new(
        image: &ProcessConfig,
        wishes: &Wishes,
        rootfs: &Path,
        caller_env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, SpecError> {
        let root = Root::open(rootfs).map_err(|source| SpecError::Root { path: rootfs.to_owned(), source })?;
        let id = new_id()?;
        let hostname = hostname(wishes, &id)?;
        let identity = user::resolve(&root, wishes.user.as_deref().unwrap_or(&image.user))?;
        let cwd = working_directory(image, wishes, &root)?;
        let home = identity.home.as_deref().unwrap_or("/");
        let env = environment(image, wishes, &hostname, home, caller_env)?;

        let files: BTreeMap<_, _> = host_files(wishes.network, &hostname)
            .into_iter()
            .filter(|(path, _)| {
                let mounted = wishes.volumes.iter().any(|volume| Path::new(path).starts_with(&volume.target));
                !mounted && root.takes_mount(Path::new(path), false)
            })
            .collect();
        let open_files = getrlimit(Resource::Nofile).maximum.map_or(OPEN_FILES, |most| most.min(OPEN_FILES));

        let mut namespaces = vec!["pid", "ipc", "uts", "mount"];
        if wishes.network == Network::None {
            namespaces.push("network");
        }
        let namespaces: Vec<Value> = namespaces.into_iter().map(|kind| json!({ "type": kind })).collect();
        let mut mounts = default_mounts();
        for volume in &wishes.volumes {
            mounts.push(bind(volume)?);
        }
        let spec = json!({
            "ociVersion": "1.0.2",
            "root": { "path": rootfs, "readonly": wishes.read_only },
            "hostname": hostname,
            "process": {
                "terminal": wishes.tty,
                "user": { "uid": identity.uid, "gid": identity.gid, "additionalGids": identity.groups },
                "args": command(image, wishes)?,
                "env": env,
                "cwd": cwd,
                "capabilities": {
                    // None are inheritable: a file's inheritable capabilities would give them to anybody.
                    "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES,
                },
                "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": open_files, "soft": open_files }],
                "noNewPrivileges": true,
            },
            "mounts": mounts,
            "linux": {
                "namespaces": namespaces,
                "resources": { "devices": devices() },
                // One level: runtimes remove what is at the path, and nothing above it.
                "cgroupsPath": format!("/loris-{id}"),
                "maskedPaths": MASKED_PATHS,
                "readonlyPaths": READ_ONLY_PATHS,
            },
        });
        Ok(Self { id, spec: serde_json::from_value(spec)?, files, interactive: wishes.interactive })
    }
}

fn new_id() -> Result<String, SpecError> {
    let mut bytes = [0; 6];
    File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut bytes)).map_err(SpecError::Random)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn hostname(wishes: &Wishes, id: &str) -> Result<String, SpecError> {
    let hostname = match (&wishes.hostname, wishes.network) {
        (Some(hostname), _) => hostname.clone(),
        (None, Network::Host) => rustix::system::uname().nodename().to_string_lossy().into_owned(),
        (None, Network::None) => id.to_owned(),
    };
    // Linux takes 64 bytes of anything; what is written into /etc/hosts must be one word.
    let word = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    if hostname.is_empty() || hostname.len() > 64 || !hostname.bytes().all(word) {
        return Err(SpecError::Hostname { text: hostname });
    }
    Ok(hostname)
}

fn command(image: &ProcessConfig, wishes: &Wishes) -> Result<Vec<String>, SpecError> {
    let (entrypoint, default_args): (&[String], &[String]) = match &wishes.entrypoint {
        Some(entrypoint) => (entrypoint, &[]),
        None => (&image.entrypoint, &image.cmd),
    };
    let args = if wishes.args.is_empty() { default_args } else { &wishes.args };
    let command = [entrypoint, args].concat();
    match command.first() {
        Some(program) if !program.is_empty() => Ok(command),
        _ => Err(SpecError::NoCommand),
    }
}

fn working_directory(image: &ProcessConfig, wishes: &Wishes, root: &Root) -> Result<String, SpecError> {
    let wanted = wishes.working_dir.as_deref().unwrap_or(&image.working_dir);
    let wrong = |reason: String| SpecError::WorkingDirectory { path: wanted.to_owned(), reason };
    if wanted.is_empty() {
        return Ok("/".to_owned());
    }
    if !wanted.starts_with('/') || wanted.contains('\0') {
        return Err(wrong("not an absolute path".to_owned()));
    }
    let mut cwd = PathBuf::from("/");
    for component in Path::new(wanted).components() {
        match component {
            Component::Normal(name) => cwd.push(name),
            Component::ParentDir => drop(cwd.pop()),
            _ => {}
        }
    }
    // What is below a volume is the volume's.
    if !wishes.volumes.iter().any(|volume| cwd.starts_with(&volume.target)) {
        root.create_directories(&cwd).map_err(|error| wrong(error.to_string()))?;
    }
    Ok(cwd.to_string_lossy().into_owned())
}

fn environment(
    image: &ProcessConfig,
    wishes: &Wishes,
    hostname: &str,
    home: &str,
    caller_env: &dyn Fn(&str) -> Option<String>,
) -> Result<Vec<String>, SpecError> {
    // The last one of a name counts, at its place. An image may have very many.
    let mut env: Vec<Option<(String, String)>> = Vec::new();
    let mut places: HashMap<String, usize> = HashMap::new();
    let mut set = |name: &str, value: &str| {
        if let Some(before) = places.insert(name.to_owned(), env.len()) {
            env[before] = None;
        }
        env.push(Some((name.to_owned(), value.to_owned())));
    };
    set("PATH", PATH);
    set("HOSTNAME", hostname);
    set("HOME", home);
    if wishes.tty {
        set("TERM", "xterm");
    }
    for (variables, from_user) in [(&image.env, false), (&wishes.env, true)] {
        for text in variables {
            let (name, value) = match text.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None if from_user => (text.as_str(), caller_env(text)),
                None => (text.as_str(), Some(String::new())),
            };
            if name.is_empty() || text.contains('\0') {
                return Err(SpecError::Variable { text: text.clone() });
            }
            if let Some(value) = value.filter(|value| !value.contains('\0')) {
                set(name, &value);
            }
        }
    }
    Ok(env.into_iter().flatten().map(|(name, value)| format!("{name}={value}")).collect())
}

/// What a container should see in place of the image's files. The host's are copied, since a bind of the file itself
/// would go stale when the host replaces it, and would let the container write to it.
fn host_files(network: Network, hostname: &str) -> Vec<(&'static str, Vec<u8>)> {
    let host = |path: &str| -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(path).ok()?.take(HOST_FILE_BYTES).read_to_end(&mut bytes).ok()?;
        Some(bytes)
    };
    let local = || format!("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{hostname}\n");
    let hosts = match network {
        Network::Host => host("/etc/hosts"),
        Network::None => None,
    };
    let mut files = vec![
        ("/etc/hostname", format!("{hostname}\n").into_bytes()),
        ("/etc/hosts", hosts.unwrap_or_else(|| local().into_bytes())),
    ];
    if network == Network::Host
        && let Some(resolver) = host("/etc/resolv.conf")
    {
        files.push(("/etc/resolv.conf", resolver));
    }
    files
}

fn default_mounts() -> Vec<Value> {
    vec![
        json!({ "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] }),
        json!({ "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
            "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] }),
        json!({ "destination": "/dev/pts", "type": "devpts", "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] }),
        json!({ "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
            "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"] }),
        json!({ "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
            "options": ["nosuid", "noexec", "nodev"] }),
        json!({ "destination": "/sys", "type": "sysfs", "source": "sysfs",
            "options": ["nosuid", "noexec", "nodev", "ro"] }),
    ]
}

fn bind(volume: &Volume) -> Result<Value, SpecError> {
    let wrong = |reason: String| SpecError::Volume {
        text: format!("{}:{}", volume.source.display(), volume.target.display()),
        reason,
    };
    volume.check().map_err(|reason| wrong(reason.to_owned()))?;
    std::fs::metadata(&volume.source).map_err(|error| wrong(format!("the source: {error}")))?;
    let access = if volume.read_only { "ro" } else { "rw" };
    Ok(json!({ "destination": volume.target, "type": "bind", "source": volume.source,
        "options": ["rbind", "rprivate", access] }))
}

/// Which devices a container may use, where a runtime controls that: the harmless ones and its own terminals.
fn devices() -> Vec<Value> {
    let mut rules = vec![
        json!({ "allow": false, "access": "rwm" }),
        json!({ "allow": true, "type": "c", "access": "m" }),
        json!({ "allow": true, "type": "b", "access": "m" }),
    ];
    let allowed = [
        (1, Some(3)),
        (1, Some(5)),
        (1, Some(7)),
        (1, Some(8)),
        (1, Some(9)),
        (5, Some(0)),
        (5, Some(1)),
        (5, Some(2)),
        (136, None),
    ];
    for (major, minor) in allowed {
        let mut rule = json!({ "allow": true, "type": "c", "major": major, "access": "rwm" });
        if let Some(minor) = minor {
            rule["minor"] = json!(minor);
        }
        rules.push(rule);
    }
    rules
}

#[cfg(test)]
mod tests;
