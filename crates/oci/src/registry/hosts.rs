//! Which hosts serve a registry's images, as the administrator says.
//!
//! Two forms are read: containerd's directories of hosts (`certs.d/HOST/hosts.toml`, see [`file`]) and the mirrors in
//! stargz-snapshotter's configuration (see [`stargz`]). Both say which hosts are asked, in which order, for what, with
//! which certificates and headers. Which host is asked *now* is not decided here, see [`super::route`].
//!
//! Unlike containerd, which logs it and goes on without, a file that says something wrong is an error: whoever wrote it
//! meant something by it, and to ask the registry itself instead may be what the file was to prevent.

use std::{
    io::Read as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use http::HeaderMap;
use reqwest::Url;

use super::{Config, location::split_port};
use crate::{place::Error, reference::DEFAULT_REGISTRY};

mod file;
mod stargz;
mod value;

#[cfg(test)]
mod tests;

/// The file of a directory of hosts.
const HOSTS_FILE: &str = "hosts.toml";
/// The directory for registries that have none of their own.
const DEFAULT_DIRECTORY: &str = "_default";
/// Largest file, in bytes.
const FILE_BYTES: u64 = 1 << 20;
/// Most hosts for one registry.
pub(super) const MAX_HOSTS: usize = 64;

/// What a host may be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Capabilities {
    /// Content by its digest.
    pub(super) pull: bool,
    /// What a tag leads to. Nobody can check the answer, so the host must be trusted.
    pub(super) resolve: bool,
    /// To take content.
    pub(super) push: bool,
}

impl Capabilities {
    pub(super) const ALL: Self = Self { pull: true, resolve: true, push: true };
    pub(super) const PULL: Self = Self { pull: true, resolve: false, push: false };
    pub(super) const RESOLVE: Self = Self { pull: true, resolve: true, push: false };
    pub(super) const PUSH: Self = Self { pull: false, resolve: false, push: true };

    /// Says whether everything that `wanted` has is here.
    pub(super) fn has(self, wanted: Self) -> bool {
        (self.pull || !wanted.pull) && (self.resolve || !wanted.resolve) && (self.push || !wanted.push)
    }
}

/// A host that serves a registry's images.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Endpoint {
    /// Where its repositories are, with a slash at the end: `https://mirror.example/v2/`. `None` is the registry itself,
    /// at its own address.
    pub(super) url: Option<Url>,
    pub(super) capabilities: Capabilities,
    pub(super) settings: Settings,
}

impl Endpoint {
    /// The registry itself, at its own address.
    pub(super) fn registry() -> Self {
        Self { url: None, capabilities: Capabilities::ALL, settings: Settings::default() }
    }
}

/// How one host is talked to, where it differs from others.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Settings {
    /// `None` where nothing about the connection differs.
    pub(super) connection: Option<Arc<ConnectionSettings>>,
    /// Sent with each request to this host, and nowhere else.
    pub(super) headers: HeaderMap,
    /// Longest wait for the next byte, where it is less than the general one.
    pub(super) patience: Option<Duration>,
}

/// What makes a connection another one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct ConnectionSettings {
    /// Files with authorities that are trusted beside others.
    pub(super) authorities: Vec<PathBuf>,
    /// A file with a client certificate, and one with its key where that is not in the first.
    pub(super) client: Option<(PathBuf, Option<PathBuf>)>,
    /// Whether certificates are *not* verified.
    pub(super) skip_verify: Option<bool>,
    /// Longest wait for a connection.
    pub(super) dial_timeout: Option<Duration>,
    /// A directory as Docker has them: `*.crt`, `*.cert`, `*.key`.
    pub(super) directory: Option<PathBuf>,
}

impl Settings {
    fn new(connection: ConnectionSettings, headers: HeaderMap) -> Self {
        let connection = (connection != ConnectionSettings::default()).then(|| Arc::new(connection));
        Self { connection, headers, patience: None }
    }
}

/// Returns the hosts that serve a registry's images, in the order in which they are asked; the registry itself alone
/// where nothing is said of it.
///
/// What a directory of hosts says comes before what stargz-snapshotter's file says: the one is written for all clients
/// of a node, the other for one.
///
/// # Errors
/// [`Error::File`] and [`Error::Invalid`] where a file can't be read or says something wrong.
pub(super) fn endpoints(config: &Config, registry: &str) -> Result<Vec<Endpoint>, Error> {
    let roots = config.hosts_dirs.iter();
    for directory in roots.flat_map(|root| candidates(root, registry)) {
        match directory.metadata() {
            Ok(_) => return of_directory(&directory, registry),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(Error::File { path: directory.display().to_string(), source }),
        }
    }
    if let Some((path, text)) = &config.stargz_text
        && let Some(endpoints) = stargz::mirrors(path, text, registry)?
    {
        return Ok(endpoints);
    }
    if let Some(path) = &config.stargz_config
        && let Some(endpoints) = stargz::mirrors(path, &read(path)?, registry)?
    {
        return Ok(endpoints);
    }
    Ok(vec![Endpoint::registry()])
}

/// Returns the directories that may be about a registry. A port is written as `_5000_` where a colon can't be.
fn candidates(root: &Path, registry: &str) -> Vec<PathBuf> {
    let mut names = Vec::new();
    if let (host, Some(port)) = split_port(registry) {
        names.push(format!("{host}_{port}_"));
    }
    names.extend([registry.to_owned(), DEFAULT_DIRECTORY.to_owned()]);
    names.into_iter().map(|name| root.join(name)).collect()
}

/// Reads `hosts.toml`. A directory without it has the registry's certificates, as Docker keeps them.
fn of_directory(directory: &Path, registry: &str) -> Result<Vec<Endpoint>, Error> {
    let path = directory.join(HOSTS_FILE);
    let text = match read(&path) {
        Ok(text) => text,
        Err(Error::File { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error),
    };
    if text.trim().is_empty() {
        let directory = Some(directory.to_owned());
        let connection = ConnectionSettings { directory, ..ConnectionSettings::default() };
        let settings = Settings::new(connection, HeaderMap::new());
        return Ok(vec![Endpoint { settings, ..Endpoint::registry() }]);
    }
    file::endpoints(&path, &text, registry)
}

fn read(path: &Path) -> Result<String, Error> {
    let name = || path.display().to_string();
    let mut text = Vec::new();
    let outcome = std::fs::File::open(path).and_then(|file| file.take(FILE_BYTES + 1).read_to_end(&mut text));
    match outcome {
        Err(source) => Err(Error::File { path: name(), source }),
        Ok(_) if text.len() as u64 > FILE_BYTES => Err(Error::TooLarge { what: name(), limit: FILE_BYTES }),
        Ok(_) => String::from_utf8(text)
            .map_err(|_| Error::Invalid { what: name(), detail: "it is not UTF-8, as TOML must be".to_owned() }),
    }
}

/// Returns the name that a host's credentials are kept under, and by which it is told from the registry.
pub(super) fn name_of(authority: &str) -> &str {
    match authority {
        "registry-1.docker.io" | "index.docker.io" => DEFAULT_REGISTRY,
        other => other,
    }
}
