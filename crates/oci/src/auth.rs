//! Credentials, found where Podman and Docker keep them, or in a [`Keychain`].
//!
//! The order of files is that of containers-auth.json(5): a file that was named (`--authfile`, `REGISTRY_AUTH_FILE`) and no other;
//! or else `$XDG_RUNTIME_DIR/containers/auth.json`, `$XDG_CONFIG_HOME/containers/auth.json`, Docker's `config.json`
//! (`$DOCKER_CONFIG` or `~/.docker`), `~/.dockercfg`. The first file with credentials for the repository or one of its
//! parents (`host/ns/repo`, `host/ns`, `host`) wins. Within a file, as in Docker: `credHelpers` for the host, then
//! `credsStore`, then `auths`.
//!
//! What this module must not do: show a secret, in `Debug`, an error or a log. So texts of JSON errors and of helpers,
//! which may quote them, are not passed on.

use std::{
    ffi::OsString,
    fmt,
    path::{Path, PathBuf},
};

use crate::place::Error;

mod file;
mod helper;
mod keychain;

use file::AuthFile;
pub use keychain::Keychain;

/// Largest file of credentials, in bytes; they have a few kilobytes.
const FILE_BYTES: u64 = 4 << 20;

/// What a registry or its token server is shown.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// A user name and a password (or an access token that takes its place).
    Basic {
        /// The user.
        username: String,
        /// The secret.
        password: String,
    },
    /// A token that is exchanged for access tokens (OAuth 2 calls it a refresh token).
    Identity(String),
    /// A token that is shown to the registry as it is.
    Bearer(String),
}

impl Credentials {
    /// Reads what Docker calls `auth`: user name and password in Base64. `None` where it is something else.
    #[must_use]
    pub fn from_auth_field(auth: &str) -> Option<Self> {
        file::from_auth_field(auth)
    }
}

/// Only the kind: secrets stay out of logs.
impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Basic { .. } => "Basic(..)",
            Self::Identity(_) => "Identity(..)",
            Self::Bearer(_) => "Bearer(..)",
        })
    }
}

/// Where files of credentials and helpers are looked for. The default finds none.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    /// The only file to look at (`--authfile`, `REGISTRY_AUTH_FILE`). It must exist.
    pub auth_file: Option<PathBuf>,
    /// `XDG_RUNTIME_DIR`.
    pub runtime_dir: Option<PathBuf>,
    /// `XDG_CONFIG_HOME`.
    pub config_home: Option<PathBuf>,
    /// `DOCKER_CONFIG`: a directory.
    pub docker_config: Option<PathBuf>,
    /// `HOME`.
    pub home: Option<PathBuf>,
    /// `PATH`, for `docker-credential-*` helpers; the process's own where this is `None`.
    pub path: Option<OsString>,
}

impl Environment {
    /// Returns what the process's environment says.
    #[must_use]
    pub fn from_env() -> Self {
        // An empty variable counts as unset, as in Go's tools.
        let directory = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        Self {
            auth_file: directory("REGISTRY_AUTH_FILE"),
            // Podman falls back to a directory of its own where no session manager has made one.
            runtime_dir: directory("XDG_RUNTIME_DIR")
                .or_else(|| Some(format!("/run/containers/{}", user_id()?).into())),
            config_home: directory("XDG_CONFIG_HOME"),
            docker_config: directory("DOCKER_CONFIG"),
            home: directory("HOME"),
            path: None,
        }
    }

    /// Returns the configuration directory of the user, `~/.config` by default.
    #[must_use]
    pub fn config_directory(&self) -> Option<PathBuf> {
        self.config_home.clone().or_else(|| Some(self.home.as_ref()?.join(".config")))
    }

    /// Returns the files to look at, in order, and whether each must exist.
    fn files(&self) -> Vec<AuthFile> {
        if let Some(named) = &self.auth_file {
            return vec![AuthFile { path: named.clone(), required: true, legacy: false }];
        }
        let docker = self.docker_config.clone().or_else(|| Some(self.home.as_ref()?.join(".docker")));
        let candidates = [
            (self.runtime_dir.as_deref().map(runtime_file), false),
            (self.config_directory().map(|directory| directory.join("containers/auth.json")), false),
            (docker.map(|directory| directory.join("config.json")), false),
            (self.home.as_ref().map(|home| home.join(".dockercfg")), true),
        ];
        let present = candidates.into_iter().filter_map(|(path, legacy)| Some((path?, legacy)));
        present.map(|(path, legacy)| AuthFile { path, required: false, legacy }).collect()
    }
}

/// Podman's own directory is already one of containers: only a session's has `containers/` inside.
fn runtime_file(directory: &Path) -> PathBuf {
    if directory.starts_with("/run/containers") {
        directory.join("auth.json")
    } else {
        directory.join("containers/auth.json")
    }
}

fn user_id() -> Option<u32> {
    use std::os::unix::fs::MetadataExt as _;
    Some(std::fs::metadata("/proc/self").ok()?.uid())
}

/// Returns what a text in the form of Docker's `config.json` has in `auths`, by the keys as they stand there. `is_legacy` says
/// that it is the older `.dockercfg`, which is that map alone. For such texts that are in no file.
///
/// # Errors
///
/// [`Error::Invalid`], naming the text `what`, where it is not JSON of the right form.
pub fn entries(what: &str, text: &[u8], is_legacy: bool) -> Result<Vec<(String, Credentials)>, Error> {
    let settings = file::Settings::parse(text, is_legacy);
    settings.map(file::Settings::into_entries).map_err(|detail| Error::Invalid { what: what.to_owned(), detail })
}

/// Returns the credentials for a repository, `None` where there are none.
///
/// `registry` is the registry's name as in [`crate::Reference::registry`] (`docker.io` for Docker Hub). A helper that
/// fails counts as one that knows nothing; a warning is logged.
///
/// # Errors
///
/// [`Error::File`] and [`Error::Invalid`] where a file can't be read or is not JSON of the right form.
pub async fn lookup(environment: &Environment, registry: &str, repository: &str) -> Result<Option<Credentials>, Error> {
    for file in environment.files() {
        let Some(settings) = file.read().await? else { continue };
        let found = match settings.helper(registry) {
            Some(name) => helper::get(name, &file::helper_key(registry), environment.path.as_ref()).await,
            None => None,
        };
        if let Some(credentials) = found.or_else(|| settings.credentials(registry, repository)) {
            tracing::debug!(registry, repository, file = %file.path.display(), "found credentials");
            return Ok(Some(credentials));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests;
