//! The same over TLS, by HTTP/1 and HTTP/2.

use std::{net::TcpListener, process::Command, sync::Arc};

use loris_serve::{registry::Registry, server::ServerOptions};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};

#[tokio::test]
async fn tls() {
    let Some(openssl) = loris_testkit::require_peer("tls", "openssl") else { return };
    let directory = tempfile::tempdir().unwrap();
    let (key, certificate) = (directory.path().join("key"), directory.path().join("certificate"));
    let made = Command::new(openssl)
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"])
        .args(["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"])
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .arg("-keyout")
        .arg(&key)
        .arg("-out")
        .arg(&certificate)
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));

    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut config = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(
            vec![CertificateDer::from_pem_file(&certificate).unwrap()],
            PrivateKeyDer::from_pem_file(&key).unwrap(),
        )
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let registry = Registry::open(directory.path().join("registry")).unwrap();
    let options = ServerOptions { tls: Some(Arc::new(config)), ..ServerOptions::default() };
    let server = registry.serve(TcpListener::bind("127.0.0.1:0").unwrap(), options).unwrap();

    let trusted = reqwest::Certificate::from_pem(&std::fs::read(&certificate).unwrap()).unwrap();
    let client = || reqwest::Client::builder().no_proxy().tls_certs_only([trusted.clone()]);
    let url = format!("https://{}/v2/", server.address());
    for (client, version) in [
        (client().build().unwrap(), reqwest::Version::HTTP_2),
        (client().http1_only().build().unwrap(), reqwest::Version::HTTP_11),
    ] {
        let response = client.get(&url).send().await.unwrap();
        assert_eq!((response.status().as_u16(), response.version()), (200, version));
        assert_eq!(response.bytes().await.unwrap(), "{}");
    }
    // Plain HTTP to a port of TLS is refused, and the server goes on.
    assert!(client().build().unwrap().get(url.replace("https", "http")).send().await.is_err());
    assert!(client().build().unwrap().get(&url).send().await.is_ok());
    server.stop().await;
}
