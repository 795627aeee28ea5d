//! The same over TLS, by HTTP/1 and HTTP/2.

use std::{
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use futures_util::StreamExt as _;
use loris_format::digest::Digest;
use loris_oci::{
    Descriptor, ImageSink as _, ImageSource as _, Reference, auth,
    registry::{Client, Config},
};
use loris_serve::{
    link::{Link, LinkOptions},
    registry::Registry,
    server::{ServerHandle, ServerOptions},
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};

/// Starts a registry that speaks TLS and these protocols in it, and returns its certificate's file too.
fn serve(test: &str, directory: &Path, protocols: &[&[u8]]) -> Option<(ServerHandle, PathBuf)> {
    let openssl = loris_testkit::require_peer(test, "openssl")?;
    let (key, certificate) = (directory.join("key"), directory.join("certificate"));
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
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    let registry = Registry::open(directory.join("registry")).unwrap();
    let options = ServerOptions { tls: Some(Arc::new(config)), ..ServerOptions::default() };
    let server = registry.serve(TcpListener::bind("127.0.0.1:0").unwrap(), options).unwrap();
    Some((server, certificate))
}

#[tokio::test]
async fn tls() {
    let directory = tempfile::tempdir().unwrap();
    let Some((server, certificate)) = serve("tls", directory.path(), &[b"h2", b"http/1.1"]) else { return };
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

/// Our client takes HTTP/2 where it is offered: the server speaks nothing else, and many requests need one connection.
#[tokio::test]
async fn our_client_speaks_http_2() {
    let test = "tls::our_client_speaks_http_2";
    let directory = tempfile::tempdir().unwrap();
    let Some((server, certificate)) = serve(test, directory.path(), &[b"h2"]) else { return };
    let link = Link::start(LinkOptions::symmetric(0, Duration::ZERO), server.address()).unwrap();
    let config = Config {
        environment: auth::Environment::default(),
        cert_roots: Vec::new(),
        ca_files: vec![certificate.clone()],
        ..Config::default()
    };
    let reference: Reference = format!("{}/a/b:latest", link.address()).parse().unwrap();
    let source = Client::new(config).unwrap().source(&reference);
    let mut connections = 0;
    for requests in [1, 20] {
        let asking = (0..requests).map(|_| source.root());
        for answer in futures_util::future::join_all(asking).await {
            let error = answer.unwrap_err();
            assert!(matches!(error, loris_oci::Error::NotFound { .. }), "{error}");
        }
        // On loopback, the first one only finds out whether TLS is spoken.
        let made = link.statistics().connections;
        assert!(requests == 1 || made == connections, "{made} connections for {requests} requests at a time");
        connections = made;
    }
    // The server refuses who speaks HTTP/1 only.
    let trusted = reqwest::Certificate::from_pem(&std::fs::read(&certificate).unwrap()).unwrap();
    let old = reqwest::Client::builder().no_proxy().tls_certs_only([trusted]).http1_only().build().unwrap();
    assert!(old.get(format!("https://{}/v2/", server.address())).send().await.is_err());
    link.stop();
    server.stop().await;
}

/// Ranges of a blob over HTTP/2, which is one connection, and over several connections of HTTP/1. Prints; asserts nothing
/// but that the bytes come. What it showed is in docs/figures.md.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn protocols_over_a_link() {
    const BLOB: usize = 16 << 20;
    let blob: bytes::Bytes = (0..=250).cycle().take(BLOB).collect::<Vec<u8>>().into();
    let descriptor = Descriptor::new("application/octet-stream", Digest::sha256_of(&blob), BLOB as u64);
    let servers: Vec<_> = [b"h2".as_slice(), b"http/1.1"]
        .into_iter()
        .map(|protocol| {
            let directory = tempfile::tempdir().unwrap();
            let (server, certificate) = serve("tls::protocols_over_a_link", directory.path(), &[protocol]).unwrap();
            (String::from_utf8_lossy(protocol).into_owned(), server, certificate, directory)
        })
        .collect();
    let client = |certificate: &Path| {
        let ca_files = vec![certificate.to_owned()];
        let environment = auth::Environment::default();
        Client::new(Config { environment, cert_roots: Vec::new(), ca_files, ..Config::default() }).unwrap()
    };
    for (_, server, certificate, _) in &servers {
        let reference: Reference = format!("{}/a/b:latest", server.address()).parse().unwrap();
        let content = blob.clone();
        let stream = Box::pin(futures_util::stream::once(async move { Ok(content) }));
        client(certificate).sink(&reference).put_blob(&descriptor, stream).await.unwrap();
    }
    let limited = |rate: u64, milliseconds: u64, own: u64| LinkOptions {
        connection_bits_per_second: std::num::NonZeroU64::new(own * 1_000_000),
        ..LinkOptions::symmetric(rate * 1_000_000, Duration::from_millis(milliseconds) / 2)
    };
    for (rate, milliseconds, own) in [(1000, 1, 0), (100, 20, 0), (25, 80, 0), (1000, 20, 200)] {
        // How many ranges, and how long each is: many small ones, and four at once that fill the link.
        for (count, bytes, at_once) in [(48, 64 << 10, 8), (12, 512 << 10, 4)] {
            let mut seconds = vec![Vec::new(); servers.len()];
            for _ in 0..3 {
                for (number, (_, server, certificate, _)) in servers.iter().enumerate() {
                    let link = Link::start(limited(rate, milliseconds, own), server.address()).unwrap();
                    let reference: Reference = format!("{}/a/b:latest", link.address()).parse().unwrap();
                    let source = client(certificate).source(&reference);
                    let began = std::time::Instant::now();
                    let ranges =
                        futures_util::stream::iter(
                            (0..count).map(|range| {
                                let start = range * bytes;
                                let (source, descriptor) = (&source, &descriptor);
                                async move {
                                    source.blob_range(descriptor, start..start + bytes).await.unwrap().len() as u64
                                }
                            }),
                        );
                    let lengths: Vec<u64> = ranges.buffer_unordered(at_once).collect().await;
                    assert!(lengths.iter().all(|&length| length == bytes));
                    seconds[number].push(began.elapsed().as_secs_f64());
                }
            }
            for (times, (protocol, ..)) in seconds.iter_mut().zip(&servers) {
                times.sort_by(f64::total_cmp);
                println!(
                    "{rate} Mbit/s {milliseconds} ms, {own} a connection, {count} x {bytes}: {protocol} {:.3} s",
                    times[1]
                );
            }
        }
    }
}
