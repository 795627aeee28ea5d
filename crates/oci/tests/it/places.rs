//! Images that go from place to place, ours and skopeo's, and stay what they are.

use std::{collections::BTreeMap, path::Path, process::Command};

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use loris_format::{
    compression::{GzipLevel, gzip_member, zstd_frame},
    digest::Digest,
    limits::Limits,
    tar,
};
use loris_oci::{
    Descriptor, Document, ImageName, ImageSink, ImageSource, OpenOptions, auth,
    document::{Index, Kind, Manifest, media_type},
    open_sink, open_source, platform,
    registry::{Client, Config},
};
use loris_testkit::{peer, registry::FaultRegistry, require_peer};
use tempfile::TempDir;

fn options(temp_dir: &Path) -> OpenOptions {
    let config = Config {
        environment: auth::Environment::default(),
        cert_roots: Vec::new(),
        plain_http: true,
        ..Config::default()
    };
    OpenOptions { temp_dir: temp_dir.to_owned(), ..OpenOptions::new(Client::new(config).unwrap()) }
}

/// A layer with one file.
fn layer(name: &str, content: &[u8]) -> Vec<u8> {
    let entry =
        tar::Entry { path: name.into(), size: content.len() as u64, permissions: 0o644, ..tar::Entry::default() };
    let mut bytes = tar::encode_header(&entry).unwrap();
    bytes.extend_from_slice(content);
    bytes.extend_from_slice(tar::padding(entry.size));
    bytes.extend_from_slice(&tar::END_OF_ARCHIVE);
    bytes
}

async fn put(sink: &dyn ImageSink, media_type: &str, bytes: Vec<u8>) -> Descriptor {
    let descriptor = Descriptor::new(media_type, Digest::sha256_of(&bytes), bytes.len() as u64);
    sink.put_blob(&descriptor, stream::iter([Ok(Bytes::from(bytes))]).boxed()).await.unwrap();
    descriptor
}

/// Writes an image whose layers are compressed in all ways there are; `zstd` is left out where the peer knows no zstd.
async fn put_image(sink: &dyn ImageSink, architecture: &str, zstd: bool) -> Document {
    let tars = [layer("a", &b"lower".repeat(50_000)), layer("b", b"middle"), layer("c", b"upper")];
    let mut layers = vec![put(sink, media_type::OCI_LAYER_GZIP, gzip_member(GzipLevel::DEFAULT, &tars[0])).await];
    layers.push(if zstd {
        put(sink, media_type::OCI_LAYER_ZSTD, zstd_frame(3, &tars[1])).await
    } else {
        put(sink, media_type::OCI_LAYER_GZIP, gzip_member(GzipLevel::BEST, &tars[1])).await
    });
    layers.push(put(sink, media_type::OCI_LAYER, tars[2].clone()).await);
    let diff_ids: Vec<String> = tars.iter().map(|tar| format!("{:?}", Digest::sha256_of(tar).to_string())).collect();
    let config = format!(
        r#"{{"architecture":"{architecture}","os":"linux","config":{{"Cmd":["/a"]}},"rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#,
        diff_ids.join(",")
    );
    let manifest = Manifest {
        schema_version: 2,
        media_type: media_type::OCI_MANIFEST.to_owned(),
        artifact_type: None,
        config: put(sink, media_type::OCI_CONFIG, config.into_bytes()).await,
        layers,
        subject: None,
        annotations: BTreeMap::new(),
    };
    let document = manifest.to_document().unwrap();
    sink.put_manifest(&document).await.unwrap();
    document
}

/// Copies everything that a document leads to, and the document.
async fn copy_tree(source: &dyn ImageSource, sink: &dyn ImageSink, document: &Document) {
    match document.parse_kind(&Limits::default()).unwrap() {
        Kind::Index(index) => {
            for descriptor in &index.manifests {
                let inner = source.document(descriptor).await.unwrap();
                Box::pin(copy_tree(source, sink, &inner)).await;
            }
        }
        Kind::Manifest(manifest) => {
            for blob in manifest.layers.iter().chain([&manifest.config]) {
                if !sink.has_blob(blob).await.unwrap() {
                    sink.put_blob(blob, source.blob(blob).await.unwrap()).await.unwrap();
                }
            }
        }
    }
    sink.put_manifest(document).await.unwrap();
}

async fn copy(from: &str, to: &str, options: &OpenOptions) -> Digest {
    let source = open_source(&from.parse().unwrap(), options).await.unwrap();
    let sink = open_sink(&to.parse().unwrap(), options).await.unwrap();
    let root = source.root().await.unwrap();
    copy_tree(&*source, &*sink, &root).await;
    sink.commit(&root, &BTreeMap::new()).await.unwrap();
    root.digest
}

/// The tars of an image's layers, uncompressed and checked against the DiffIDs.
async fn tars(name: &str, options: &OpenOptions) -> Vec<Vec<u8>> {
    let source = open_source(&name.parse().unwrap(), options).await.unwrap();
    let image = platform::resolve_image(&*source, None, &Limits::default()).await.unwrap();
    let mut tars = Vec::new();
    for (layer, diff_id) in image.manifest.layers.iter().zip(&image.config.diff_ids) {
        let bytes = source.blob(layer).await.unwrap().try_collect::<Vec<_>>().await.unwrap().concat();
        let mut tar = Vec::new();
        let mut decoder = loris_format::compression::Decoder::new(bytes.as_slice()).unwrap();
        std::io::Read::read_to_end(&mut decoder, &mut tar).unwrap();
        assert!(diff_id.0.matches(&tar), "{name}: {diff_id}");
        tars.push(tar);
    }
    tars
}

async fn made_in_layout(directory: &Path, options: &OpenOptions, zstd: bool) -> String {
    let name = format!("oci:{}:made", directory.join("made").display());
    let sink = open_sink(&name.parse().unwrap(), options).await.unwrap();
    let document = put_image(&*sink, &loris_oci::Platform::host().architecture, zstd).await;
    sink.commit(&document, &BTreeMap::new()).await.unwrap();
    name
}

#[tokio::test]
async fn an_image_stays_the_same_through_all_places() {
    let directory = TempDir::new().unwrap();
    let (path, options) = (directory.path(), options(directory.path()));
    let registry = FaultRegistry::start().await;
    let made = made_in_layout(path, &options, true).await;
    let first = open_source(&made.parse().unwrap(), &options).await.unwrap().root().await.unwrap().digest;
    let way = [
        made.clone(),
        registry.reference("there"),
        format!("oci-archive:{}:x", path.join("a.tar").display()),
        format!("oci:{}", path.join("unnamed").display()),
        registry.reference("back"),
        format!("oci-archive:{}", path.join("b.tar").display()),
    ];
    for step in way.windows(2) {
        assert_eq!(copy(&step[0], &step[1], &options).await, first, "{step:?}");
        let printed = step[1].parse::<ImageName>().unwrap().with_digest(first).to_string();
        assert!(open_source(&printed.parse().unwrap(), &options).await.is_ok(), "{printed}");
    }
    // Docker's archives keep the configuration and the tars.
    let docker = format!("docker-archive:{}:x:1", path.join("d.tar").display());
    copy(&way[5], &docker, &options).await;
    assert_eq!(tars(&docker, &options).await, tars(&made, &options).await);
    let again = format!("oci:{}:docker", path.join("unnamed").display());
    copy(&docker, &again, &options).await;
    assert_eq!(tars(&again, &options).await, tars(&made, &options).await);
}

#[tokio::test]
async fn an_index_goes_with_all_its_platforms() {
    let directory = TempDir::new().unwrap();
    let (path, options) = (directory.path(), options(directory.path()));
    let name = format!("oci:{}:many", path.join("many").display());
    let sink = open_sink(&name.parse().unwrap(), &options).await.unwrap();
    let mut index = Index::empty();
    for architecture in ["amd64", "arm64"] {
        let document = put_image(&*sink, architecture, true).await;
        let platform = Some(format!("linux/{architecture}").parse().unwrap());
        index.manifests.push(Descriptor { platform, ..document.descriptor() });
    }
    let index = index.to_document().unwrap();
    sink.put_manifest(&index).await.unwrap();
    sink.commit(&index, &BTreeMap::new()).await.unwrap();
    let archive = format!("oci-archive:{}:many", path.join("many.tar").display());
    assert_eq!(copy(&name, &archive, &options).await, index.digest);
    let source = open_source(&archive.parse().unwrap(), &options).await.unwrap();
    let arm = "linux/arm64".parse().unwrap();
    let image = platform::resolve_image(&*source, Some(&arm), &Limits::default()).await.unwrap();
    assert_eq!(image.config.architecture, "arm64");
}

fn skopeo(arguments: &[&str]) -> String {
    let program = peer("skopeo").expect("asked for before");
    let output = Command::new(program).arg("--insecure-policy").args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test]
async fn skopeo_reads_what_we_write_and_writes_what_we_read() {
    if require_peer("skopeo_reads_what_we_write_and_writes_what_we_read", "skopeo").is_none() {
        return;
    }
    let directory = TempDir::new().unwrap();
    let (path, options) = (directory.path(), options(directory.path()));
    let at = |transport: &str, file: &str, name: &str| format!("{transport}:{}{name}", path.join(file).display());
    let made = made_in_layout(path, &options, false).await;
    let first = open_source(&made.parse().unwrap(), &options).await.unwrap().root().await.unwrap();
    let expected = tars(&made, &options).await;

    let ours = [at("oci-archive", "ours.tar", ":v1"), at("docker-archive", "ours-docker.tar", ":example.com/x:1")];
    for name in &ours {
        copy(&made, name, &options).await;
    }
    assert_eq!(skopeo(&["inspect", "--raw", &made]).as_bytes(), first.bytes);
    assert_eq!(skopeo(&["inspect", "--raw", &ours[0]]).as_bytes(), first.bytes);

    // From each of our places to each of theirs, and back.
    for (number, name) in [&made, &ours[0], &ours[1]].into_iter().enumerate() {
        for (theirs, keeps_digests) in [
            (at("oci", &format!("theirs{number}"), ":t"), true),
            (at("oci-archive", &format!("theirs{number}.tar"), ":t"), true),
            (at("docker-archive", &format!("theirs-docker{number}.tar"), ":example.com/y:2"), false),
        ] {
            let keep = ["copy", "--quiet", "--preserve-digests", name.as_str(), &theirs];
            let change = ["copy", "--quiet", name.as_str(), &theirs];
            let keeps_digests = keeps_digests && number < 2;
            skopeo(if keeps_digests { &keep } else { &change });
            assert_eq!(tars(&theirs, &options).await, expected, "{name} {theirs}");
            if keeps_digests {
                let source = open_source(&theirs.parse().unwrap(), &options).await.unwrap();
                assert_eq!(source.root().await.unwrap(), first, "{theirs}");
            }
        }
    }

    // Into a layout that skopeo made, beside its image, and skopeo into ours.
    let (layout, other) = (at("oci", "theirs0", ":ours"), at("oci", "made", ":theirs"));
    assert_eq!(copy(&made, &layout, &options).await, first.digest);
    skopeo(&["copy", "--quiet", "--preserve-digests", &at("oci", "theirs0", ":t"), &other]);
    for name in [&layout, &other, &made, &at("oci", "theirs0", ":t")] {
        assert_eq!(skopeo(&["inspect", "--raw", name]).as_bytes(), first.bytes, "{name}");
        assert_eq!(tars(name, &options).await, expected, "{name}");
    }
}
