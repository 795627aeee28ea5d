//! The client against Debian's `docker-registry`, in plain HTTP and TLS, open and with passwords.

use std::{collections::BTreeMap, path::PathBuf};

use loris_oci::{
    Error, ImageSink as _, ImageSource as _, Reference,
    auth::Credentials,
    registry::{Client, Config, ManifestName},
};
use loris_testkit::registry::{DockerRegistry, DockerRegistryOptions};

use super::{config, content, descriptor, manifest, read, stream};

fn name(registry: &DockerRegistry, repository: &str) -> Reference {
    format!("{}/{repository}:latest", registry.address()).parse().unwrap()
}

/// Puts an image with one layer, and returns the layer.
async fn push(client: &Client, reference: &Reference, length: usize) -> Vec<u8> {
    let layer = content(length);
    let sink = client.sink(reference);
    sink.put_blob(&descriptor(b"{}"), stream(b"{}")).await.unwrap();
    sink.put_blob(&descriptor(&layer), stream(&layer)).await.unwrap();
    sink.commit(&manifest("x"), &BTreeMap::new()).await.unwrap();
    layer
}

#[tokio::test]
async fn a_real_registry_is_read_and_written() {
    let test = "registry::peer::a_real_registry_is_read_and_written";
    let Some(registry) = DockerRegistry::start(test, &DockerRegistryOptions::default()).unwrap() else { return };
    // Chunks are tried too: this registry takes them.
    for config in [config(), Config { chunked_from_bytes: 1 << 20, chunk_bytes: 1 << 20, ..config() }] {
        let client = Client::new(config).unwrap();
        let reference = name(&registry, "a/b");
        let layer = push(&client, &reference, 5 << 20).await;
        let source = client.source(&reference);
        assert_eq!(source.root().await.unwrap(), manifest("x"));
        assert_eq!(source.document(&descriptor(b"{}")).await.unwrap().bytes, "{}");
        assert!(read(source.blob(&descriptor(&layer)).await.unwrap()).await.unwrap() == layer);
        for range in [0..1, 1000..2000, layer.len() - 1..layer.len(), 0..layer.len()] {
            let found = source.blob_range(&descriptor(&layer), range.start as u64..range.end as u64).await.unwrap();
            assert!(found == layer[range]);
        }
        let repository = source.in_repository();
        assert_eq!(repository.tags().await.unwrap(), ["latest"]);
        assert_eq!(repository.catalog().await.unwrap(), ["a/b"]);
        let found = repository.manifest_descriptor(ManifestName::Tag("latest")).await.unwrap();
        assert_eq!(found, Some(manifest("x").descriptor()));
        repository.delete_blob(&descriptor(&layer).digest).await.unwrap();
        assert!(!client.sink(&reference).has_blob(&descriptor(&layer)).await.unwrap());
    }
}

#[tokio::test]
async fn a_real_registry_takes_files_and_mounts_and_lists_many_tags() {
    let test = "registry::peer::a_real_registry_takes_files_and_mounts_and_lists_many_tags";
    let Some(registry) = DockerRegistry::start(test, &DockerRegistryOptions::default()).unwrap() else { return };
    let client = Client::new(Config { chunked_from_bytes: 1 << 20, chunk_bytes: 1 << 20, ..config() }).unwrap();
    let reference = name(&registry, "a/b");
    let layer = content(3 << 20);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &layer).unwrap();
    let sink = client.sink(&reference);
    sink.put_blob_file(&descriptor(&layer), file.path()).await.unwrap();
    let other = name(&registry, "c/d");
    let mounted = client.sink(&other);
    assert!(!mounted.has_blob(&descriptor(&layer)).await.unwrap());
    assert!(mounted.mount_blob(&descriptor(&layer), (registry.address(), "a/b")).await.unwrap());
    assert!(read(client.source(&other).blob(&descriptor(&layer)).await.unwrap()).await.unwrap() == layer);
    // What can't be mounted goes on as an upload.
    let more = content(1000);
    assert!(!mounted.mount_blob(&descriptor(&more), (registry.address(), "a/b")).await.unwrap());
    mounted.put_blob(&descriptor(&more), stream(&more)).await.unwrap();
    assert!(mounted.has_blob(&descriptor(&more)).await.unwrap());
    // A wrong blob is refused before the registry has all of it.
    let error = mounted.put_blob(&descriptor(b"right"), stream(b"wrong")).await.unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");

    sink.put_blob(&descriptor(b"{}"), stream(b"{}")).await.unwrap();
    let repository = sink.in_repository();
    let tags: Vec<String> = (0..5).map(|n| format!("v{n}")).collect();
    for tag in &tags {
        repository.put_manifest(ManifestName::Tag(tag), &manifest("x")).await.unwrap();
    }
    let mut found = repository.tags().await.unwrap();
    found.sort();
    assert_eq!(found, tags);
    let digest = manifest("x").digest;
    repository.delete_manifest(ManifestName::Digest(&digest)).await.unwrap();
    let gone = repository.manifest(ManifestName::Digest(&digest)).await.unwrap_err();
    assert!(matches!(gone, Error::NotFound { .. }), "{gone}");
}

#[tokio::test]
async fn a_real_registry_without_the_referrers_api_gets_tags() {
    let test = "registry::peer::a_real_registry_without_the_referrers_api_gets_tags";
    let Some(registry) = DockerRegistry::start(test, &DockerRegistryOptions::default()).unwrap() else { return };
    let client = Client::new(config()).unwrap();
    let reference = name(&registry, "a/b");
    push(&client, &reference, 1000).await;
    let subject = manifest("x");
    let (sink, source) = (client.sink(&reference), client.source(&reference));
    assert_eq!(source.referrers(&subject.digest, None).await.unwrap(), []);
    let one = super::writing::artifact(&subject, "a/one", "1");
    let two = super::writing::artifact(&subject, "a/two", "2");
    sink.put_manifest(&one).await.unwrap();
    sink.put_manifest(&two).await.unwrap();
    let found = source.referrers(&subject.digest, Some("a/one")).await.unwrap();
    assert_eq!(found.iter().map(|it| it.digest).collect::<Vec<_>>(), [one.digest]);
    sink.in_repository().delete_manifest(ManifestName::Digest(&one.digest)).await.unwrap();
    let left = source.referrers(&subject.digest, None).await.unwrap();
    assert_eq!(left.iter().map(|it| it.digest).collect::<Vec<_>>(), [two.digest]);
}

#[tokio::test]
async fn passwords_of_a_real_registry_are_found_in_files() {
    let test = "registry::peer::passwords_of_a_real_registry_are_found_in_files";
    let options = DockerRegistryOptions { credentials: Some(("u".into(), "hunter2".into())), ..Default::default() };
    let Some(registry) = DockerRegistry::start(test, &options).unwrap() else { return };
    let reference = name(&registry, "a/b");
    let error = Client::new(config()).unwrap().source(&reference).root().await.unwrap_err();
    assert!(matches!(error, Error::Denied { .. }), "{error}");

    let file = tempfile::NamedTempFile::new().unwrap();
    // "u:hunter2"
    let text = format!(r#"{{"auths":{{"{}/a":{{"auth":"dTpodW50ZXIy"}}}}}}"#, registry.address());
    std::fs::write(file.path(), text).unwrap();
    let mut config = config();
    config.environment.auth_file = Some(file.path().to_owned());
    let client = Client::new(config).unwrap();
    let layer = push(&client, &reference, 5 << 20).await;
    assert!(read(client.source(&reference).blob(&descriptor(&layer)).await.unwrap()).await.unwrap() == layer);
    let other = client.source(&name(&registry, "other")).root().await.unwrap_err();
    assert!(matches!(other, Error::Denied { .. }), "{other}");
}

#[tokio::test]
async fn certificates_of_a_real_registry_are_verified() {
    let test = "registry::peer::certificates_of_a_real_registry_are_verified";
    let options =
        DockerRegistryOptions { tls: true, credentials: Some(("u".into(), "hunter2".into())), ..Default::default() };
    let Some(registry) = DockerRegistry::start(test, &options).unwrap() else { return };
    let credentials = Credentials::Basic { username: "u".into(), password: "hunter2".into() };
    let base = Config { credentials: Some(credentials), ..config() };
    let reference = name(&registry, "a/b");

    // An authority that is not known, also on loopback, is an error that no repetition cures.
    let error = Client::new(base.clone()).unwrap().source(&reference).root().await.unwrap_err();
    assert!(!error.is_transient() && error.to_string().contains("--ca FILE"), "{error}");
    // In plain HTTP this server answers, but not as a registry.
    let plain = Client::new(Config { plain_http: true, ..base.clone() }).unwrap();
    assert!(matches!(plain.source(&reference).root().await, Err(Error::Registry { status: Some(400), .. })));

    let directory = tempfile::tempdir().unwrap();
    let host = directory.path().join(registry.address());
    std::fs::create_dir(&host).unwrap();
    std::fs::copy(registry.ca(), host.join("any-name.crt")).unwrap();
    for (name, config) in [
        ("--ca", Config { ca_files: vec![registry.ca()], ..base.clone() }),
        ("--tls-verify=false", Config { tls_verify: false, ..base.clone() }),
        ("insecure", Config { insecure: vec!["127.0.0.1".into()], ..base.clone() }),
        ("certs.d", Config { cert_roots: vec![directory.path().to_owned()], ..base.clone() }),
        ("--cert-dir", Config { cert_dir: Some(host.clone()), ..base.clone() }),
    ] {
        let client = Client::new(config).unwrap();
        let layer = push(&client, &reference, 5 << 20).await;
        let source = client.source(&reference);
        assert!(read(source.blob(&descriptor(&layer)).await.unwrap()).await.unwrap() == layer, "{name}");
        assert_eq!(source.blob_range(&descriptor(&layer), 7..99).await.unwrap(), layer[7..99], "{name}");
    }
}

#[tokio::test]
async fn client_certificates_are_shown_to_a_real_registry() {
    let test = "registry::peer::client_certificates_are_shown_to_a_real_registry";
    let options = DockerRegistryOptions { tls: true, client_certificate: true, ..Default::default() };
    let Some(registry) = DockerRegistry::start(test, &options).unwrap() else { return };
    let reference = name(&registry, "a/b");
    let without = Client::new(Config { ca_files: vec![registry.ca()], retries: 0, ..config() }).unwrap();
    assert!(without.source(&reference).root().await.is_err());

    let directory = tempfile::tempdir().unwrap();
    let host = directory.path().join(registry.address());
    std::fs::create_dir(&host).unwrap();
    std::fs::copy(registry.ca(), host.join("ca.crt")).unwrap();
    let (certificate, key) = registry.client_certificate();
    std::fs::copy(certificate, host.join("client.cert")).unwrap();
    let config = Config { cert_roots: vec![directory.path().to_owned()], ..config() };
    let error = Client::new(config.clone()).unwrap().source(&reference).root().await.unwrap_err();
    assert!(matches!(&error, Error::File { path, .. } if path.ends_with("client.key")), "{error}");
    std::fs::copy(key, host.join("client.key")).unwrap();
    push(&Client::new(config).unwrap(), &reference, 1000).await;
}

#[tokio::test]
async fn a_self_signed_certificate_that_was_given_is_taken() {
    let test = "registry::peer::a_self_signed_certificate_that_was_given_is_taken";
    let options = DockerRegistryOptions { tls: true, self_signed: true, ..Default::default() };
    let Some(registry) = DockerRegistry::start(test, &options).unwrap() else { return };
    let Some(other) = DockerRegistry::start(test, &options).unwrap() else { return };
    let reference = name(&registry, "a/b");
    let host = tempfile::tempdir().unwrap();
    std::fs::copy(registry.ca(), host.path().join("server.crt")).unwrap();
    let trusting = |ca| Config { ca_files: vec![ca], retries: 0, ..config() };
    for config in [trusting(registry.ca()), Config { cert_dir: Some(host.path().to_owned()), ..config() }] {
        push(&Client::new(config).unwrap(), &reference, 1000).await;
    }
    // One of the same name that was not given; and the right one under a name that is not in it.
    let by_name = reference.to_string().replace("127.0.0.1", "localhost").parse().unwrap();
    for (config, reference) in [(trusting(other.ca()), &reference), (trusting(registry.ca()), &by_name)] {
        let error = Client::new(config).unwrap().source(reference).root().await.unwrap_err();
        assert!(error.to_string().contains("certificate"), "{reference}: {error}");
    }
}

#[test]
fn files_with_certificates_are_checked_at_once() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "not a certificate").unwrap();
    let with = |ca_files, cert_dir| Client::new(Config { ca_files, cert_dir, ..config() }).err().unwrap();
    let error = with(vec![file.path().to_owned()], None);
    assert!(matches!(error, Error::Invalid { .. }), "{error}");
    let error = with(vec![PathBuf::from("/no/such/file")], None);
    assert!(matches!(error, Error::File { .. }), "{error}");
    let error = with(Vec::new(), Some("/no/such/directory".into()));
    assert!(matches!(error, Error::File { .. }), "{error}");
}
