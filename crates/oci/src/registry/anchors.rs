//! Certificates that a user gave: authorities, and self-signed certificates of servers.
//!
//! `openssl req -x509` makes certificates that call themselves authorities, and many registries in cellars serve one
//! themselves. webpki refuses them as a server's (`CaUsedAsEndEntity`), curl and skopeo take them. Here such a one is
//! taken where it is, byte for byte, one that was given: then it is the server's key that was vouched for, and nobody
//! else's. Its time and the host's name are checked as always, and so is that the server has its key.

use std::sync::Arc;

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_name,
    },
    crypto::ring,
    server::ParsedCertificate,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls_platform_verifier::Verifier;

/// A client's own certificate, the chain to its authority, and its key.
pub(super) type ClientIdentity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// Returns a configuration that trusts the system's authorities and those that were given.
///
/// # Errors
/// One of the certificates is none, or the key does not fit.
pub(super) fn trusting(
    given: Vec<CertificateDer<'static>>,
    identity: Option<ClientIdentity>,
) -> Result<ClientConfig, Box<dyn std::error::Error + Send + Sync>> {
    let provider = Arc::new(ring::default_provider());
    let mut roots = RootCertStore::empty();
    for certificate in &given {
        roots.add(certificate.clone())?;
    }
    let alone = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build()?;
    let all = Verifier::new_with_extra_roots(given.iter().cloned(), provider.clone())?;
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(GivenOrKnown { given, alone, all }));
    let mut config = match identity {
        Some((chain, key)) => config.with_client_auth_cert(chain, key)?,
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

#[derive(Debug)]
struct GivenOrKnown {
    given: Vec<CertificateDer<'static>>,
    /// Knows what was given, and nothing else.
    alone: Arc<WebPkiServerVerifier>,
    /// Knows the system's authorities too.
    all: Verifier,
}

impl ServerCertVerifier for GivenOrKnown {
    fn verify_server_cert(
        &self,
        server: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if !self.given.iter().any(|given| given.as_ref() == server.as_ref()) {
            return self.all.verify_server_cert(server, intermediates, name, ocsp, now);
        }
        match self.alone.verify_server_cert(server, intermediates, name, ocsp, now) {
            // webpki has looked at its time before it comes to that, not at its name.
            Err(error) if is_authority_as_server(&error) => {
                verify_server_name(&ParsedCertificate::try_from(server)?, name)?;
                Ok(ServerCertVerified::assertion())
            }
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        server: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.all.verify_tls12_signature(message, server, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        server: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.all.verify_tls13_signature(message, server, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.all.supported_verify_schemes()
    }
}

/// rustls has no name of its own for this error of webpki's.
fn is_authority_as_server(error: &Error) -> bool {
    matches!(error, Error::InvalidCertificate(CertificateError::Other(other)) if other.to_string() == "CaUsedAsEndEntity")
}
