//! What the command line and configuration files decide about registries.

use std::{path::PathBuf, sync::Arc, time::Duration};

use loris_format::limits::Limits;

use crate::auth;

/// How registries are talked to. [`Config::default`] is right for registries on the Internet, with the credentials of
/// the process's environment.
#[derive(Clone, Debug)]
pub struct Config {
    /// Plain HTTP for every registry (`--plain-http`).
    pub plain_http: bool,
    /// Whether certificates are verified (`--tls-verify`).
    pub tls_verify: bool,
    /// Registries (`HOST` or `HOST:PORT`) that may be spoken to without a verified certificate and, where they don't
    /// speak TLS, in plain HTTP. As Docker's `insecure-registries`.
    pub insecure: Vec<String>,
    /// Certificate authorities to trust beside the system's (`--ca`): PEM files.
    pub ca_files: Vec<PathBuf>,
    /// A directory with authorities (`*.crt`) and a client certificate (`*.cert`, `*.key`) for every registry
    /// (`--cert-dir`), instead of those of [`Config::cert_roots`].
    pub cert_dir: Option<PathBuf>,
    /// Directories with such a directory for each `HOST[:PORT]`; the first that has one for a host is used.
    pub cert_roots: Vec<PathBuf>,
    /// Directories as containerd's `/etc/containerd/certs.d`: for each registry one with a `hosts.toml`, which says what
    /// hosts serve its images (`--hosts-dir`). The first with a directory for a registry, or with `_default`, is used.
    pub hosts_dirs: Vec<PathBuf>,
    /// How long those files are believed before they are looked at again. Images that are open stay with what was read.
    pub hosts_live: Duration,
    /// stargz-snapshotter's `config.toml`, for the mirrors in it (`--stargz-config`).
    pub stargz_config: Option<PathBuf>,
    /// The same, read already: the file and what it says. It counts before the other one.
    pub stargz_text: Option<(PathBuf, String)>,
    /// User name and password for every registry, instead of those in files (`--creds`). Mirrors are not shown them.
    pub credentials: Option<auth::Credentials>,
    /// What has credentials beside files. Asked in this order, and before the files: what was said of an image goes before
    /// what was said of the machine.
    pub keychains: Vec<Arc<dyn auth::Keychain>>,
    /// Where files of credentials are.
    pub environment: auth::Environment,
    /// Longest wait for a connection, TLS included.
    pub connect_timeout: Duration,
    /// Longest wait for the next byte, of an answer or of a body that is taken.
    pub stall_timeout: Duration,
    /// Longest time for a document or a range, repetitions and all.
    pub deadline: Duration,
    /// A body that comes more slowly, in bytes per second over twice [`Config::stall_timeout`], stands still: a byte now
    /// and then is no life.
    pub least_bytes_per_second: u64,
    /// How long a host that failed is asked only after others. Doubled each time it fails again, up to 64 times as long,
    /// and shortened at random by up to a half.
    pub put_back: Duration,
    /// Longest wait for the answer to the end of an upload: registries hash or move the blob then.
    pub commit_timeout: Duration,
    /// Most requests to one host at once: so many short ones (documents, ranges), and so many whole blobs.
    pub connections_per_host: usize,
    /// How often a request is repeated after a failure that may pass.
    pub retries: u32,
    /// Wait before the first repetition; doubled each time, and shortened at random by up to a half.
    pub retry_delay: Duration,
    /// Longest wait between repetitions, also where `Retry-After` asks for more.
    pub retry_delay_max: Duration,
    /// Blobs of at least so many bytes are uploaded in chunks. Not all registries can take chunks, and each costs a round
    /// trip, so that it pays only where much would have to be sent again.
    pub chunked_from_bytes: u64,
    /// Size of a chunk, in bytes. One is held in memory for each upload from a stream. The registry's
    /// `OCI-Chunk-Min-Length` makes them larger.
    pub chunk_bytes: u64,
    /// Bounds on documents.
    pub limits: Limits,
}

impl Default for Config {
    fn default() -> Self {
        let environment = auth::Environment::from_env();
        let own = environment.config_directory().map(|directory| directory.join("containers/certs.d"));
        let system = ["/etc/containers/certs.d", "/etc/docker/certs.d"].map(PathBuf::from);
        Self {
            plain_http: false,
            tls_verify: true,
            insecure: Vec::new(),
            ca_files: Vec::new(),
            cert_dir: None,
            cert_roots: own.into_iter().chain(system).collect(),
            hosts_dirs: vec![PathBuf::from("/etc/containerd/certs.d")],
            hosts_live: Duration::from_secs(60),
            stargz_config: None,
            stargz_text: None,
            credentials: None,
            keychains: Vec::new(),
            environment,
            connect_timeout: Duration::from_secs(15),
            stall_timeout: Duration::from_secs(30),
            deadline: Duration::from_secs(300),
            least_bytes_per_second: 64,
            put_back: Duration::from_secs(5),
            commit_timeout: Duration::from_secs(600),
            connections_per_host: 8,
            retries: 5,
            retry_delay: Duration::from_millis(250),
            retry_delay_max: Duration::from_secs(60),
            chunked_from_bytes: 1 << 30,
            chunk_bytes: 16 << 20,
            limits: Limits::default(),
        }
    }
}

impl Config {
    /// Returns what a user can do who was refused access.
    pub(super) fn remedy(&self) -> &'static str {
        if self.credentials.is_some() {
            "check the user name and password that were given with --creds or LORIS_CREDS, and what they permit"
        } else if !self.keychains.is_empty() {
            "log in with `podman login` or `docker login`, name a pull secret in the cluster, or check the permissions"
        } else {
            "log in with `podman login` or `docker login`, or check the permissions"
        }
    }
}
