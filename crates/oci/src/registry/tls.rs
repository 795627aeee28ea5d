//! HTTP clients with the certificates that a host needs, and the question whether a host speaks TLS at all.
//!
//! Certificates lie as Docker and Podman keep them (containers-certs.d(5)): a directory for each `HOST[:PORT]` with
//! authorities in `*.crt`, and a client certificate in `*.cert` beside its `*.key`. Where there are several client
//! certificates, the first by name is shown.

use std::{
    io::Read as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rustls::{ClientConfig, ClientConnection, RootCertStore, crypto::ring};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{
    Config,
    anchors::{ClientIdentity, trusting},
    hosts::ConnectionSettings,
};
use crate::place::Error;

/// Largest file with certificates, in bytes. The bundle of all public authorities has about 250 KB.
const PEM_BYTES: u64 = 8 << 20;
/// Connections that idle longer are closed: many servers and gateways do it after a minute, at a bad moment.
const IDLE: Duration = Duration::from_secs(50);

/// What clients of different hosts differ in.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Trust {
    /// Whether certificates are verified.
    pub(super) verify: bool,
    /// Plain HTTP: nothing about TLS matters, and nothing of it is loaded.
    pub(super) plain: bool,
    /// The machine itself is never asked for through a proxy.
    pub(super) loopback: bool,
    /// The host's directory of certificates.
    pub(super) directory: Option<PathBuf>,
    /// What the administrator has said of it.
    pub(super) settings: Option<Arc<ConnectionSettings>>,
}

/// Makes a client of its own for each kind of trust.
pub(super) fn build_client(config: &Config, trust: &Trust) -> Result<reqwest::Client, Error> {
    install_provider();
    let settings = trust.settings.as_deref();
    let mut builder = reqwest::Client::builder()
        .user_agent(concat!("loris/", env!("CARGO_PKG_VERSION")))
        // Followed by hand: who may see credentials is not the library's decision.
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never())
        .referer(false)
        .connect_timeout(settings.and_then(|settings| settings.dial_timeout).unwrap_or(config.connect_timeout))
        .pool_idle_timeout(IDLE)
        .pool_max_idle_per_host(config.connections_per_host.saturating_mul(2))
        .tcp_keepalive(config.stall_timeout);
    if trust.loopback {
        builder = builder.no_proxy();
    }
    if trust.plain {
        builder = builder.tls_certs_only([]);
    } else {
        let mut identity = None;
        let mut authorities = Vec::new();
        for file in &config.ca_files {
            authorities.extend(read_authorities(file)?);
        }
        if let Some(directory) = &trust.directory {
            let (more, own) = read_directory(directory)?;
            authorities.extend(more);
            identity = own;
        }
        if let Some(settings) = settings {
            for file in &settings.authorities {
                authorities.extend(read_authorities(file)?);
            }
            if let Some((certificate, key)) = &settings.client {
                identity = Some(read_identity(certificate, key.as_deref())?);
            }
        }
        if !trust.verify || authorities.is_empty() {
            builder = builder.tls_danger_accept_invalid_certs(!trust.verify);
            if let Some((identity, _)) = identity {
                builder = builder.identity(identity);
            }
        } else {
            let config = trusting(authorities, identity.map(|(_, own)| own)).map_err(|error| Error::Invalid {
                what: "the certificates that were given".to_owned(),
                detail: error.to_string(),
            })?;
            builder = builder.tls_backend_preconfigured(config);
        }
    }
    builder.build().map_err(|error| Error::Invalid {
        what: "the TLS configuration".to_owned(),
        detail: super::error::chain(&error.without_url()),
    })
}

/// Reads the files that the configuration names, so that a mistake in them is found at once.
pub(super) fn check(config: &Config) -> Result<(), Error> {
    config.ca_files.iter().try_for_each(|file| read_authorities(file).map(|_| ()))?;
    config.cert_dir.iter().try_for_each(|directory| read_directory(directory).map(|_| ()))
}

/// Returns the host's directory of certificates.
pub(super) fn certificates_of(config: &Config, authority: &str) -> Option<PathBuf> {
    if config.cert_dir.is_some() {
        return config.cert_dir.clone();
    }
    config.cert_roots.iter().map(|root| root.join(authority)).find(|directory| directory.is_dir())
}

/// rustls has no provider of its own in this build, and panics without one.
fn install_provider() {
    // An error means that somebody else has installed one, which serves as well.
    let _ = ring::default_provider().install_default();
}

/// A client's own certificate, for the HTTP library and for a configuration of our own.
type OwnCertificate = (reqwest::Identity, ClientIdentity);

fn read_directory(directory: &Path) -> Result<(Vec<CertificateDer<'static>>, Option<OwnCertificate>), Error> {
    let failed = |source| Error::File { path: directory.display().to_string(), source };
    let entries = std::fs::read_dir(directory).map_err(failed)?;
    let mut files = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>, _>>().map_err(failed)?;
    files.sort();
    let with = |extension: &'static str| {
        files.iter().filter(move |file| file.extension().is_some_and(|found| found == extension))
    };
    let mut authorities = Vec::new();
    for file in with("crt") {
        authorities.extend(read_authorities(file)?);
    }
    let Some(certificate) = with("cert").next() else { return Ok((authorities, None)) };
    let key = certificate.with_extension("key");
    Ok((authorities, Some(read_identity(certificate, Some(&key))?)))
}

/// Reads a certificate and its key, which may be in the same file.
fn read_identity(certificate: &Path, key: Option<&Path>) -> Result<OwnCertificate, Error> {
    let key_text = key.map(read).transpose()?.unwrap_or_default();
    let pem = [read(certificate)?, b"\n".to_vec(), key_text].concat();
    let invalid = || Error::Invalid {
        what: certificate.display().to_string(),
        detail: match key {
            Some(key) => format!("it and {} are not a certificate and its key in PEM", key.display()),
            None => "it does not hold a certificate and its key in PEM".to_owned(),
        },
    };
    let identity = reqwest::Identity::from_pem(&pem).map_err(|_| invalid())?;
    let chain = CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>().map_err(|_| invalid())?;
    let private = PrivateKeyDer::from_pem_slice(&pem).map_err(|_| invalid())?;
    Ok((identity, (chain, private)))
}

fn read_authorities(file: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let invalid =
        || Error::Invalid { what: file.display().to_string(), detail: "it has no certificate in PEM".to_owned() };
    let authorities =
        CertificateDer::pem_slice_iter(&read(file)?).collect::<Result<Vec<_>, _>>().map_err(|_| invalid())?;
    if authorities.is_empty() { Err(invalid()) } else { Ok(authorities) }
}

fn read(file: &Path) -> Result<Vec<u8>, Error> {
    let path = || file.display().to_string();
    let mut content = Vec::new();
    let outcome = std::fs::File::open(file).and_then(|open| open.take(PEM_BYTES + 1).read_to_end(&mut content));
    match outcome {
        Err(source) => Err(Error::File { path: path(), source }),
        Ok(_) if content.len() as u64 > PEM_BYTES => Err(Error::TooLarge { what: path(), limit: PEM_BYTES }),
        Ok(_) => Ok(content),
    }
}

/// Finds out whether a server speaks TLS: sends the first message of a handshake and looks at the first byte of what
/// comes back. A record of a handshake or an alert means yes; anything else, an end, or nothing within `patience` no.
///
/// # Errors
///
/// Fails where no connection can be made.
pub(super) async fn speaks_tls(host: &str, port: u16, patience: Duration) -> std::io::Result<bool> {
    const ALERT: u8 = 21;
    const HANDSHAKE: u8 = 22;
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let hello = client_hello(bare).map_err(std::io::Error::other)?;
    let mut socket = tokio::time::timeout(patience, tokio::net::TcpStream::connect((bare, port)))
        .await
        .map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))??;
    let asked = async {
        socket.write_all(&hello).await?;
        socket.read_u8().await
    };
    let first = tokio::time::timeout(patience, asked).await;
    Ok(matches!(first, Ok(Ok(ALERT | HANDSHAKE))))
}

fn client_hello(host: &str) -> Result<Vec<u8>, Box<dyn std::error::Error + Send + Sync>> {
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    let mut connection = ClientConnection::new(Arc::new(config), ServerName::try_from(host.to_owned())?)?;
    let mut hello = Vec::new();
    connection.write_tls(&mut hello)?;
    Ok(hello)
}
