//! The registry client against a registry that misbehaves on purpose, and against a real one.

use std::time::Duration;

use futures_util::TryStreamExt as _;
use loris_format::digest::Digest;
use loris_oci::{
    BlobStream, Descriptor, Document, Error, Reference, auth,
    document::media_type,
    registry::{Client, Config, RegistrySink, RegistrySource},
};
use loris_testkit::registry::FaultRegistry;

mod access;
mod faults;
mod keychains;
mod mirrors;
mod peer;
mod redirects;
mod writing;

/// A configuration that knows nothing of the machine and does not wait long.
fn config() -> Config {
    Config {
        environment: auth::Environment::default(),
        cert_roots: Vec::new(),
        hosts_dirs: Vec::new(),
        retry_delay: Duration::from_millis(1),
        retry_delay_max: Duration::from_millis(20),
        ..Config::default()
    }
}

fn reference(registry: &FaultRegistry) -> Reference {
    registry.reference("latest").parse().unwrap()
}

fn source(registry: &FaultRegistry, config: Config) -> RegistrySource {
    Client::new(config).unwrap().source(&reference(registry))
}

fn sink(registry: &FaultRegistry, config: Config) -> RegistrySink {
    Client::new(config).unwrap().sink(&reference(registry))
}

/// Bytes that are different at every offset.
fn content(length: usize) -> Vec<u8> {
    (0..length.div_ceil(4)).flat_map(|n| (n as u32).wrapping_mul(2_654_435_761).to_le_bytes()).take(length).collect()
}

fn descriptor(content: &[u8]) -> Descriptor {
    Descriptor::new(media_type::OCI_LAYER_GZIP, Digest::sha256_of(content), content.len() as u64)
}

/// Returns a manifest without layers whose bytes differ by `mark`.
fn manifest(mark: &str) -> Document {
    let empty = Digest::sha256_of(b"{}");
    let text = format!(
        r#"{{"schemaVersion":2,"mediaType":"{}","config":{{"mediaType":"{}","digest":"{empty}","size":2}},"layers":[],"annotations":{{"mark":"{mark}"}}}}"#,
        media_type::OCI_MANIFEST,
        media_type::OCI_EMPTY
    );
    Document::new(media_type::OCI_MANIFEST, text.into()).unwrap()
}

async fn read(stream: BlobStream) -> Result<Vec<u8>, Error> {
    stream
        .try_fold(Vec::new(), |mut all, chunk| async move {
            all.extend_from_slice(&chunk);
            Ok(all)
        })
        .await
}

fn stream(content: &[u8]) -> BlobStream {
    let chunks: Vec<Result<bytes::Bytes, Error>> =
        content.chunks(100_000).map(|chunk| Ok(bytes::Bytes::copy_from_slice(chunk))).collect();
    Box::pin(futures_util::stream::iter(chunks))
}
