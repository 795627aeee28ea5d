//! How the cluster's API server is reached: a kubeconfig file, or what a pod finds inside itself.
//!
//! Everything is read anew for each connection: tokens and certificates in files are replaced while we run.
//!
//! Source: Kubernetes' documentation, "Organizing Cluster Access Using kubeconfig Files" and "Accessing the Kubernetes API
//! from a Pod".

use std::{
    fmt,
    io::Read as _,
    path::{Path, PathBuf},
    time::Duration,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use http::HeaderValue;
use reqwest::{Certificate, Identity, Proxy, Url};
use serde::Deserialize;

use super::super::yaml;

/// Largest file that is read, in bytes.
const FILE_BYTES: u64 = 4 << 20;
/// Where a pod finds its token and the cluster's authority.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// Longest wait for a connection, TLS included.
const CONNECT: Duration = Duration::from_secs(15);

/// Why the API server can't be asked. Messages quote no secret.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A file can't be read.
    #[error("{path} can't be read: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file does not say what it must.
    #[error("{path}: {detail}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// There is no file, and this is no pod.
    #[error(
        "no kubeconfig is named and this is not a pod (KUBERNETES_SERVICE_HOST is not set): name one with `kubeconfig_path`"
    )]
    NoCluster,
}

/// A server, and what it is shown.
pub(super) struct Cluster {
    pub(super) server: Url,
    pub(super) client: reqwest::Client,
    pub(super) authorization: Option<HeaderValue>,
}

/// Where it is, and nothing of what is shown.
impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster").field("server", &self.server.as_str()).finish_non_exhaustive()
    }
}

impl Cluster {
    /// Reads a kubeconfig, or what a pod has where none is named. Blocks.
    pub(super) fn read(kubeconfig: Option<&Path>) -> Result<Self, ConfigError> {
        match kubeconfig {
            Some(file) => Kubeconfig::read(file)?.cluster(file),
            None => Self::in_pod(),
        }
    }

    fn in_pod() -> Result<Self, ConfigError> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let host = variable("KUBERNETES_SERVICE_HOST").ok_or(ConfigError::NoCluster)?;
        let port = variable("KUBERNETES_SERVICE_PORT").ok_or(ConfigError::NoCluster)?;
        let host = if host.contains(':') { format!("[{host}]") } else { host };
        let account = Path::new(ACCOUNT);
        let own = ClusterEntry {
            server: format!("https://{host}:{port}"),
            certificate_authority: Some(account.join("ca.crt")),
            ..ClusterEntry::default()
        };
        let user = User { token_file: Some(account.join("token")), ..User::default() };
        connect(&own, &user, account)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Kubeconfig {
    #[serde(default)]
    clusters: Vec<Named<ClusterEntry>>,
    #[serde(default)]
    users: Vec<Named<User>>,
    #[serde(default)]
    contexts: Vec<Named<ContextEntry>>,
    #[serde(default)]
    current_context: String,
}

#[derive(Deserialize)]
struct Named<T> {
    name: String,
    #[serde(alias = "cluster", alias = "user", alias = "context")]
    entry: Option<T>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct ClusterEntry {
    server: String,
    certificate_authority: Option<PathBuf>,
    certificate_authority_data: Option<String>,
    insecure_skip_tls_verify: bool,
    tls_server_name: Option<String>,
    proxy_url: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct User {
    client_certificate: Option<PathBuf>,
    client_certificate_data: Option<String>,
    client_key: Option<PathBuf>,
    client_key_data: Option<String>,
    token: Option<String>,
    #[serde(rename = "tokenFile")]
    token_file: Option<PathBuf>,
    username: Option<String>,
    password: Option<String>,
    exec: Option<serde::de::IgnoredAny>,
    auth_provider: Option<serde::de::IgnoredAny>,
    #[serde(rename = "as")]
    impersonate: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct ContextEntry {
    cluster: String,
    user: String,
}

impl Kubeconfig {
    fn read(file: &Path) -> Result<Self, ConfigError> {
        let text = String::from_utf8(read(file)?).map_err(|_| invalid(file, "it is not text"))?;
        yaml::parse(&text).map_err(|detail| invalid(file, format!("not a kubeconfig: {detail}")))
    }

    fn cluster(&self, file: &Path) -> Result<Cluster, ConfigError> {
        let name = self.current_context.as_str();
        if name.is_empty() {
            return Err(invalid(file, "it has no current-context"));
        }
        let context = find(&self.contexts, name).ok_or_else(|| invalid(file, format!("it has no context {name:?}")))?;
        let (cluster, user) = (context.cluster.as_str(), context.user.as_str());
        let cluster =
            find(&self.clusters, cluster).ok_or_else(|| invalid(file, format!("it has no cluster {cluster:?}")))?;
        let nobody = User::default();
        let user = match user {
            "" => &nobody,
            user => find(&self.users, user).ok_or_else(|| invalid(file, format!("it has no user {user:?}")))?,
        };
        connect(cluster, user, file)
    }
}

fn find<'a, T>(entries: &'a [Named<T>], name: &str) -> Option<&'a T> {
    entries.iter().find(|entry| entry.name == name)?.entry.as_ref()
}

/// Makes what asks the server. Paths are relative to the directory of `file`.
fn connect(cluster: &ClusterEntry, user: &User, file: &Path) -> Result<Cluster, ConfigError> {
    for (is_there, what) in [
        (user.exec.is_some(), "a program that is asked for credentials (exec)"),
        (user.auth_provider.is_some(), "an auth-provider"),
        (user.impersonate.is_some(), "another user who is played (as)"),
        (cluster.tls_server_name.is_some(), "tls-server-name"),
    ] {
        if is_there {
            let detail =
                format!("it has {what}, which is not supported: use a token, a tokenFile or a client certificate");
            return Err(invalid(file, detail));
        }
    }
    let server: Url = cluster.server.parse().map_err(|_| invalid(file, "the cluster's server is not an address"))?;
    if server.scheme() != "https" {
        return Err(invalid(file, "the cluster's server must be an https address: secrets come from it"));
    }
    // An error means that somebody else has installed one, which serves as well.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut builder = reqwest::Client::builder()
        .user_agent(concat!("loris/", env!("CARGO_PKG_VERSION")))
        // Credentials go to this server and nowhere else.
        .redirect(reqwest::redirect::Policy::none())
        .referer(false)
        .connect_timeout(CONNECT)
        .tcp_keepalive(Duration::from_secs(30));
    if cluster.insecure_skip_tls_verify {
        builder = builder.tls_danger_accept_invalid_certs(true);
    } else if let Some(pem) = bytes(&cluster.certificate_authority_data, &cluster.certificate_authority, file)? {
        let authorities = Certificate::from_pem_bundle(&pem).ok().filter(|authorities| !authorities.is_empty());
        let wrong = || invalid(file, "the cluster's certificate-authority has no certificate in PEM");
        builder = builder.tls_certs_only(authorities.ok_or_else(wrong)?);
    }
    let certificate = bytes(&user.client_certificate_data, &user.client_certificate, file)?;
    let key = bytes(&user.client_key_data, &user.client_key, file)?;
    if let Some(certificate) = certificate {
        let pem = [certificate, b"\n".to_vec(), key.unwrap_or_default()].concat();
        let wrong =
            |_| invalid(file, "the user's client-certificate and client-key are not a certificate and its key in PEM");
        builder = builder.identity(Identity::from_pem(&pem).map_err(wrong)?);
    }
    if let Some(proxy) = &cluster.proxy_url {
        let proxy = Proxy::all(proxy).map_err(|_| invalid(file, "the cluster's proxy-url is not an address"))?;
        builder = builder.proxy(proxy);
    }
    let client =
        builder.build().map_err(|error| invalid(file, format!("TLS can't be set up: {}", error.without_url())))?;
    Ok(Cluster { server, client, authorization: authorization(user, file)? })
}

fn authorization(user: &User, file: &Path) -> Result<Option<HeaderValue>, ConfigError> {
    // A file goes before the token that was in it once.
    let token = match &user.token_file {
        Some(path) => Some(String::from_utf8_lossy(&read(&beside(file, path))?).trim().to_owned()),
        None => user.token.clone(),
    };
    let text = match (token.filter(|token| !token.is_empty()), &user.username, &user.password) {
        (Some(token), ..) => format!("Bearer {token}"),
        (None, Some(name), Some(password)) => {
            format!("Basic {}", BASE64_STANDARD.encode(format!("{name}:{password}")))
        }
        _ => return Ok(None),
    };
    let mut value = HeaderValue::from_str(&text)
        .map_err(|_| invalid(file, "the user's token has characters that can't be sent in a header"))?;
    value.set_sensitive(true);
    Ok(Some(value))
}

/// Returns what stands in the file itself, or in one that it names.
fn bytes(data: &Option<String>, path: &Option<PathBuf>, file: &Path) -> Result<Option<Vec<u8>>, ConfigError> {
    let data = data.as_ref().filter(|data| !data.is_empty());
    if let Some(data) = data {
        let without_breaks: String = data.split_whitespace().collect();
        let decoded = BASE64_STANDARD.decode(without_breaks);
        return decoded.map(Some).map_err(|_| invalid(file, "a field that ends in -data is not Base64"));
    }
    let path = path.as_ref().filter(|path| !path.as_os_str().is_empty());
    path.map(|path| read(&beside(file, path))).transpose()
}

fn beside(file: &Path, path: &Path) -> PathBuf {
    file.parent().unwrap_or(Path::new("")).join(path)
}

fn read(path: &Path) -> Result<Vec<u8>, ConfigError> {
    let mut text = Vec::new();
    let outcome = std::fs::File::open(path).and_then(|file| file.take(FILE_BYTES + 1).read_to_end(&mut text));
    match outcome {
        Ok(_) if text.len() as u64 > FILE_BYTES => Err(invalid(path, format!("it is larger than {FILE_BYTES} bytes"))),
        Ok(_) => Ok(text),
        Err(source) => Err(ConfigError::File { path: path.to_owned(), source }),
    }
}

fn invalid(path: &Path, detail: impl Into<String>) -> ConfigError {
    ConfigError::Invalid { path: path.to_owned(), detail: detail.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: &str = "current-context: c\ncontexts: [{name: c, context: {cluster: k, user: u}}]\n\
                        clusters: [{name: k, cluster: {server: 'https://127.0.0.1:6443'}}]\n";

    fn cluster(text: &str) -> Result<Cluster, ConfigError> {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("kubeconfig");
        std::fs::write(&file, text).unwrap();
        std::fs::write(directory.path().join("token"), "from a file\n").unwrap();
        Cluster::read(Some(&file))
    }

    fn with_user(user: &str) -> Result<Cluster, ConfigError> {
        cluster(&format!("{BASE}users: [{{name: u, user: {user}}}]\n"))
    }

    #[test]
    fn users_are_shown_as_they_are_named() {
        for (user, expected) in [
            ("{}", None),
            ("{token: abc}", Some("Bearer abc")),
            ("{token: abc, tokenFile: token}", Some("Bearer from a file")),
            ("{username: u, password: p}", Some("Basic dTpw")),
        ] {
            let cluster = with_user(user).unwrap();
            let shown = cluster.authorization.as_ref().map(|value| value.to_str().unwrap());
            assert_eq!(shown, expected, "{user}");
            assert!(!format!("{cluster:?} {:?}", cluster.authorization).contains("abc"));
        }
    }

    #[test]
    fn what_is_not_supported_or_wrong_says_so() {
        let no_server = BASE.replace("https://127.0.0.1:6443", "http://127.0.0.1:6443");
        for (outcome, expected) in [
            (with_user("{exec: {command: aws, args: [a]}}"), "exec"),
            (with_user("{auth-provider: {name: gcp}}"), "auth-provider"),
            (with_user("{tokenFile: missing}"), "missing can't be read"),
            (with_user("{client-certificate-data: hunter2!}"), "not Base64"),
            (with_user("{client-certificate-data: aHVudGVyMg==}"), "in PEM"),
            (with_user("{token: \"hunter2\\n\"}"), "header"),
            (with_user("{token: [hunter2]}"), "not a kubeconfig"),
            (cluster(BASE), "no user \"u\""),
            (cluster(&no_server.replace("user: u", "")), "https"),
            (cluster("{}"), "no current-context"),
            (cluster("a: 'hunter2"), "not YAML"),
        ] {
            let error = outcome.map(drop).unwrap_err().to_string();
            assert!(error.contains(expected) && !error.contains("hunter2"), "{expected}: {error}");
        }
        let error = Cluster::read(Some(Path::new("/no/such/file"))).unwrap_err();
        assert!(error.to_string().starts_with("/no/such/file can't be read"), "{error}");
    }
}
