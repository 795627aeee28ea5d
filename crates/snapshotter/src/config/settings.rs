//! What can be configured, as types. The defaults are those of a daemon that nobody has configured.

use std::{collections::BTreeMap, num::NonZeroU64, path::PathBuf, time::Duration};

use loris_lazy::IndexTrust;
use loris_mount::engine::Engine;

use crate::{
    content,
    keychain::{cri, kube, provider},
};

/// All of it.
#[derive(Clone, PartialEq, Debug)]
pub struct Settings {
    /// Where snapshots are kept.
    pub root: PathBuf,
    /// The socket that containerd is told of.
    pub address: PathBuf,
    /// How long containerd waits for a layer to be opened, before it pulls it itself.
    pub open_timeout: Duration,
    /// How long a read waits for content that can't be had at the moment.
    pub read_timeout: Duration,
    /// Whether what the writers of images marked is fetched first.
    pub prefetch: bool,
    /// Whether the rest is fetched behind what is read.
    pub complete: When,
    /// Most bytes a second for that.
    pub complete_rate: Option<NonZeroU64>,
    /// The engine; `None` for the best that works here.
    pub engine: Option<Engine>,
    /// More options of overlayfs for containers.
    pub mount_options: Vec<String>,
    /// Whether layers are served whose content no digest in the manifest vouches for.
    pub allow_unverified: bool,
    /// Whose word counts for an index beside a layer.
    pub index_trust: IndexTrust,
    /// Which lazy formats count, the preferred first.
    pub formats: Vec<String>,
    /// Most bytes of memory for what was fetched and is not on the disk yet.
    pub memory: u64,
    /// Where metrics are served: `HOST:PORT`.
    pub metrics_address: Option<String>,
    /// What is kept on the disk.
    pub cache: Cache,
    /// What is logged.
    pub log: Log,
    /// Where containerd is made to have all layers of lazily pulled images.
    pub containerd: content::Settings,
    /// How registries are reached.
    pub registries: Registries,
    /// Where credentials come from.
    pub credentials: Credentials,
    /// Kubernetes' secrets.
    pub kubeconfig_keychain: kube::Settings,
    /// What kubelet sends with its requests.
    pub cri_keychain: cri::Settings,
    /// kubelet's credential providers.
    pub credential_provider: provider::Settings,
}

/// When the rest of an image is fetched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum When {
    /// Behind what is read, not much later than a pull would have it.
    Always,
    /// While nobody waits for a read.
    Idle,
    /// Not at all.
    Never,
}

/// What is kept on the disk.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Cache {
    /// Where; `None` for the usual place.
    pub dir: Option<PathBuf>,
    /// Most bytes of it.
    pub quota: Option<u64>,
    /// Whether it is hashed again before its first use.
    pub paranoid: bool,
}

/// What is logged.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Log {
    /// A level, or a filter such as `info,loris_lazy=debug`.
    pub level: String,
    /// Whether a line is a JSON object.
    pub json: bool,
}

/// How registries are reached.
#[derive(Clone, PartialEq, Debug)]
pub struct Registries {
    /// Directories as `/etc/containerd/certs.d`.
    pub hosts_dirs: Vec<PathBuf>,
    /// Registries that may be spoken to without a verified certificate, or in plain HTTP.
    pub insecure: Vec<String>,
    /// Plain HTTP for all of them.
    pub plain_http: bool,
    /// Whether certificates are verified.
    pub tls_verify: bool,
    /// Authorities to trust beside the system's.
    pub ca: Vec<PathBuf>,
    /// A directory with certificates for all registries.
    pub cert_dir: Option<PathBuf>,
    /// A stargz-snapshotter's configuration, for the mirrors in it.
    pub stargz_config: Option<PathBuf>,
    /// How often a request is repeated.
    pub retries: u32,
    /// How long a registry may stand still.
    pub stall_timeout: Duration,
    /// How long a document or range may take, whoever is asked.
    pub read_deadline: Duration,
    /// By registry: who is asked before it, in this order.
    pub mirrors: BTreeMap<String, Vec<Mirror>>,
}

/// A host that has a registry's images: an entry of `[[resolver.host."REGISTRY".mirrors]]`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Mirror {
    /// Its name, port and path.
    pub host: String,
    /// Whether it speaks plain HTTP.
    pub insecure: bool,
    /// How long it may stand still; 0 and less for as long as others.
    pub request_timeout_sec: i64,
    /// The names of headers that it is sent. What they say may be secret, and is not kept here.
    pub headers: Vec<String>,
}

/// Where credentials come from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Credentials {
    /// Whether Docker's and Podman's files and helpers are asked.
    pub docker: bool,
    /// The only file with credentials.
    pub authfile: Option<PathBuf>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            root: "/var/lib/loris-snapshotter".into(),
            address: "/run/loris/snapshotter.sock".into(),
            open_timeout: Duration::from_secs(10),
            read_timeout: Duration::from_secs(60),
            prefetch: true,
            complete: When::Always,
            complete_rate: None,
            engine: None,
            mount_options: Vec::new(),
            allow_unverified: false,
            index_trust: IndexTrust::Manifest,
            formats: vec!["estargz".to_owned(), "zstdchunked".to_owned()],
            memory: 128 << 20,
            metrics_address: None,
            cache: Cache::default(),
            log: Log { level: "info".to_owned(), json: false },
            containerd: content::Settings::default(),
            registries: Registries::default(),
            credentials: Credentials { docker: true, authfile: None },
            kubeconfig_keychain: kube::Settings::default(),
            cri_keychain: cri::Settings::default(),
            credential_provider: provider::Settings::default(),
        }
    }
}

impl Default for Registries {
    fn default() -> Self {
        Self {
            hosts_dirs: vec!["/etc/containerd/certs.d".into()],
            insecure: Vec::new(),
            plain_http: false,
            tls_verify: true,
            ca: Vec::new(),
            cert_dir: None,
            stargz_config: None,
            retries: 5,
            stall_timeout: Duration::from_secs(30),
            read_deadline: Duration::from_secs(300),
            mirrors: BTreeMap::new(),
        }
    }
}
