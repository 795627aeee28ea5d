//! One file of credentials: Docker's `config.json`, Podman's `auth.json`, and the older `.dockercfg`, which is what the
//! others have under `auths`.

use std::{collections::BTreeMap, io, path::PathBuf};

use base64::{
    Engine as _,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use serde::Deserialize;
use tokio::io::AsyncReadExt as _;

use super::{Credentials, FILE_BYTES};
use crate::{place::Error, reference::DEFAULT_REGISTRY};

/// Docker Hub's key, which no rule explains.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";

/// Files that were edited by hand have lost their padding now and then.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// A file that may hold credentials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct AuthFile {
    pub(super) path: PathBuf,
    pub(super) required: bool,
    /// Whether it is the map of `auths` alone.
    pub(super) legacy: bool,
}

/// What a file says.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Settings {
    auths: BTreeMap<String, Entry>,
    creds_store: Option<String>,
    cred_helpers: BTreeMap<String, String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Entry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
    registrytoken: Option<String>,
}

impl AuthFile {
    /// Reads the file; `None` where it does not exist and need not.
    pub(super) async fn read(&self) -> Result<Option<Settings>, Error> {
        let path = || self.path.display().to_string();
        let mut text = Vec::new();
        let outcome = match tokio::fs::File::open(&self.path).await {
            Ok(file) => file.take(FILE_BYTES + 1).read_to_end(&mut text).await,
            Err(error) => Err(error),
        };
        match outcome {
            Ok(_) if text.len() as u64 > FILE_BYTES => Err(Error::TooLarge { what: path(), limit: FILE_BYTES }),
            Ok(_) => self.parse(&text).map(Some).map_err(|detail| Error::Invalid { what: path(), detail }),
            Err(error) if error.kind() == io::ErrorKind::NotFound && !self.required => Ok(None),
            // Looking must not fail where root's files are in the way of an ordinary user.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied && !self.required => Ok(None),
            Err(source) => Err(Error::File { path: path(), source }),
        }
    }

    fn parse(&self, text: &[u8]) -> Result<Settings, String> {
        Settings::parse(text, self.legacy)
    }
}

impl Settings {
    /// Reads a text; `is_legacy` says that it is the map of `auths` alone.
    pub(super) fn parse(text: &[u8], is_legacy: bool) -> Result<Self, String> {
        if text.trim_ascii().is_empty() {
            return Ok(Self::default());
        }
        let parsed = if is_legacy {
            serde_json::from_slice(text).map(|auths| Settings { auths, ..Settings::default() })
        } else {
            serde_json::from_slice(text)
        };
        // The error's own words quote the file.
        parsed.map_err(|error| {
            format!("not a file of credentials (JSON, line {}, column {})", error.line(), error.column())
        })
    }

    /// Returns what `auths` has, by key.
    pub(super) fn into_entries(self) -> Vec<(String, Credentials)> {
        let entries = self.auths.into_iter();
        entries.filter_map(|(key, entry)| Some((key, entry.credentials()?))).collect()
    }

    /// Returns the helper that holds a registry's credentials, by the name behind `docker-credential-`.
    pub(super) fn helper(&self, registry: &str) -> Option<&str> {
        let named = self.cred_helpers.iter().find(|(key, _)| normalized(key) == registry).map(|(_, helper)| helper);
        named.or(self.creds_store.as_ref()).map(String::as_str).filter(|name| !name.is_empty())
    }

    /// Returns what `auths` has for a repository or its nearest parent.
    pub(super) fn credentials(&self, registry: &str, repository: &str) -> Option<Credentials> {
        let full = format!("{registry}/{repository}");
        let mut name = full.as_str();
        loop {
            let exact = self.auths.get(name).and_then(Entry::credentials);
            let alike = || {
                let matching = self.auths.iter().filter(|(key, _)| normalized(key) == name);
                matching.into_iter().find_map(|(_, entry)| entry.credentials())
            };
            if let Some(found) = exact.or_else(alike) {
                return Some(found);
            }
            name = name.rsplit_once('/')?.0;
        }
    }
}

impl Entry {
    fn credentials(&self) -> Option<Credentials> {
        let text = |field: &Option<String>| field.clone().filter(|text| !text.is_empty());
        if let Some(token) = text(&self.identitytoken) {
            return Some(Credentials::Identity(token));
        }
        if let Some(token) = text(&self.registrytoken) {
            return Some(Credentials::Bearer(token));
        }
        if let Some(decoded) = text(&self.auth).and_then(|auth| BASE64.decode(auth.trim()).ok()) {
            return basic(decoded);
        }
        Some(Credentials::Basic { username: text(&self.username)?, password: text(&self.password)? })
    }
}

/// Reads a field `auth`: user name and password in Base64.
pub(super) fn from_auth_field(auth: &str) -> Option<Credentials> {
    basic(BASE64.decode(auth.trim()).ok()?)
}

fn basic(decoded: Vec<u8>) -> Option<Credentials> {
    let decoded = String::from_utf8(decoded).ok()?;
    // Docker has padded passwords with NUL, and takes them off.
    let (username, password) = decoded.trim_end_matches('\0').split_once(':')?;
    Some(Credentials::Basic { username: username.to_owned(), password: password.to_owned() })
}

/// Returns the key that helpers know a registry by.
pub(super) fn helper_key(registry: &str) -> String {
    if registry == DEFAULT_REGISTRY { DOCKER_HUB_KEY.to_owned() } else { registry.to_owned() }
}

/// Returns a key as `host` or `host/path`: without a scheme (and the path of an API version that comes with one), and
/// with one name for Docker Hub.
fn normalized(key: &str) -> String {
    let without_scheme = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://"));
    let name = match without_scheme {
        Some(rest) => rest.split('/').next().unwrap_or_default(),
        None => key.trim_end_matches('/').trim_end_matches("/v1").trim_end_matches("/v2"),
    };
    let (host, path) = name.split_once('/').map_or((name, None), |(host, path)| (host, Some(path)));
    let host = if matches!(host, "index.docker.io" | "registry-1.docker.io") { DEFAULT_REGISTRY } else { host };
    path.map_or_else(|| host.to_owned(), |path| format!("{host}/{path}"))
}
