use std::collections::BTreeMap;

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use loris_format::{
    compression::{GzipLevel, gzip_member, zstd_frame},
    digest::Digest,
    tar::{self, Entry, EntryKind},
};
use tempfile::TempDir;

use super::*;
use crate::{
    document::{Descriptor, Document, Manifest, media_type},
    name::ImageName,
    place::ImageSink,
    registry::{Client, Config},
};

/// A tar that is made member by member.
#[derive(Default)]
struct Made(Vec<u8>);

impl Made {
    fn file(mut self, path: &str, content: &[u8]) -> Self {
        let size = content.len() as u64;
        let entry = Entry { path: path.into(), size, permissions: 0o644, ..Entry::default() };
        self.0.extend(tar::encode_header(&entry).unwrap());
        self.0.extend(content);
        self.0.extend(tar::padding(size));
        self
    }

    fn link(mut self, path: &str, kind: EntryKind, link: &str) -> Self {
        let entry = Entry { path: path.into(), kind, link: link.into(), ..Entry::default() };
        self.0.extend(tar::encode_header(&entry).unwrap());
        self
    }

    fn end(mut self) -> Vec<u8> {
        self.0.extend(tar::END_OF_ARCHIVE);
        self.0
    }
}

fn options(directory: &TempDir) -> OpenOptions {
    OpenOptions { temp_dir: directory.path().to_owned(), ..OpenOptions::new(Client::new(Config::default()).unwrap()) }
}

/// Opens an archive of these bytes, through a file.
async fn open(bytes: &[u8], transport: &str, selected: &str) -> Result<Arc<dyn ImageSource>, Error> {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("a.tar");
    std::fs::write(&path, bytes).unwrap();
    let name: ImageName = format!("{transport}:{}{selected}", path.display()).parse().unwrap();
    crate::open_source(&name, &options(&directory)).await
}

async fn error_of(bytes: &[u8], transport: &str, selected: &str) -> String {
    open(bytes, transport, selected).await.err().expect("an error").to_string()
}

async fn read(source: &dyn ImageSource, descriptor: &Descriptor) -> Result<Vec<u8>, Error> {
    Ok(source.blob(descriptor).await?.try_collect::<Vec<_>>().await?.concat())
}

fn config(layers: &[&[u8]]) -> Vec<u8> {
    let diff_ids: Vec<String> =
        layers.iter().map(|layer| format!("{:?}", Digest::sha256_of(layer).to_string())).collect();
    let diff_ids = diff_ids.join(",");
    let json = format!(
        r#"{{"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":[{diff_ids}]}},"config":{{}}}}"#
    );
    json.into_bytes()
}

fn hex_of(bytes: &[u8]) -> String {
    Digest::sha256_of(bytes).hex()
}

/// What Docker before 25 writes: a shared layer is a symbolic link.
fn old_docker_save() -> (Vec<u8>, [Vec<u8>; 2]) {
    let layers = [b"lower layer".repeat(100_000), b"upper layer".to_vec()];
    let config = config(&[&layers[0], &layers[1], &layers[0]]);
    let name = hex_of(&config);
    let list = format!(
        r#"[{{"Config":"{name}.json","RepoTags":["alpine:3","example.com/x:1"],
            "Layers":["a/layer.tar","b/layer.tar","c/layer.tar"]}},
            {{"Config":"{name}.json","RepoTags":null,"Layers":["a/layer.tar","b/layer.tar","./c/layer.tar"]}}]"#
    );
    let archive = Made::default()
        .file("a/VERSION", b"1.0")
        .file("a/layer.tar", &layers[0])
        .link("c/layer.tar", EntryKind::Symlink, "../a/layer.tar")
        .file("b/layer.tar", &layers[1])
        .file(&format!("{name}.json"), &config)
        .file("manifest.json", list.as_bytes())
        .end();
    (archive, layers)
}

#[tokio::test]
async fn an_old_docker_archive_is_an_image() {
    let (archive, layers) = old_docker_save();
    for bytes in [archive.clone(), gzip_member(GzipLevel::DEFAULT, &archive), zstd_frame(3, &archive)] {
        for selected in [":alpine:3", ":docker.io/library/alpine:3", ":example.com/x:1", ":@0", ":@1"] {
            let source = open(&bytes, "docker-archive", selected).await.unwrap();
            let root = source.root().await.unwrap();
            let manifest = root.manifest(&Limits::default()).unwrap();
            assert_eq!(manifest.layers.len(), 3);
            assert_eq!(manifest.layers[0], manifest.layers[2]);
            for (layer, expected) in manifest.layers.iter().zip(&layers) {
                assert_eq!(layer.media_type, media_type::OCI_LAYER);
                assert_eq!(read(&*source, layer).await.unwrap(), *expected);
                assert_eq!(source.blob_range(layer, 3..7).await.unwrap(), expected[3..7]);
            }
            let image = crate::platform::resolve_image(&*source, None, &Limits::default()).await.unwrap();
            assert_eq!(image.config.diff_ids[1].0, Digest::sha256_of(&layers[1]));
            assert_eq!(read(&*source, &manifest.config).await.unwrap(), image.config_document.bytes);
        }
    }
    assert!(error_of(&archive, "docker-archive", "").await.contains("alpine:3, @1 without a name"));
    assert!(error_of(&archive, "docker-archive", ":alpine:4").await.contains("alpine:4"));
    assert!(error_of(&archive, "docker-archive", ":@2").await.contains("number 2"));
    assert!(error_of(&archive, "oci-archive", "").await.contains("docker-archive:FILE"));
}

#[tokio::test]
async fn compressed_layers_are_named_by_what_they_are() {
    let layer = b"layer ".repeat(1000);
    let (gzip, zstd) = (gzip_member(GzipLevel::DEFAULT, &layer), zstd_frame(3, &layer));
    let config = config(&[&layer, &layer]);
    let archive = Made::default()
        .file("manifest.json", br#"[{"Config":"c","Layers":["l.tar.gz","l.tar.zst"]}]"#)
        .file("l.tar.gz", &gzip)
        .file("l.tar.zst", &zstd)
        .file("c", &config)
        .end();
    let source = open(&archive, "docker-archive", "").await.unwrap();
    let manifest = source.root().await.unwrap().manifest(&Limits::default()).unwrap();
    for (found, (bytes, kind)) in
        manifest.layers.iter().zip([(gzip, media_type::OCI_LAYER_GZIP), (zstd, media_type::OCI_LAYER_ZSTD)])
    {
        assert_eq!(*found, Descriptor::new(kind, Digest::sha256_of(&bytes), bytes.len() as u64));
        assert_eq!(read(&*source, found).await.unwrap(), bytes);
    }
}

#[tokio::test]
async fn a_layer_that_is_not_what_its_diff_id_says_is_an_error() {
    let config = config(&[b"layer"]);
    let archive = Made::default()
        .file("manifest.json", br#"[{"Config":"c","Layers":["l"]}]"#)
        .file("l", b"laier")
        .file("c", &config)
        .end();
    let source = open(&archive, "docker-archive", "").await.unwrap();
    let manifest = source.root().await.unwrap().manifest(&Limits::default()).unwrap();
    assert!(matches!(read(&*source, &manifest.layers[0]).await, Err(Error::Corrupt { .. })));
}

#[tokio::test]
async fn hostile_archives_are_errors() {
    let config = config(&[b"layer"]);
    let with =
        |list: &str| Made::default().file("manifest.json", list.as_bytes()).file("c", &config).file("l", b"layer");
    let good = r#"[{"Config":"c","Layers":["l"]}]"#;
    assert!(open(&with(good).end(), "docker-archive", "").await.is_ok());
    let many = vec![r#"{"Config":"c"}"#; 5000].join(",");
    let loops = Made::default()
        .file("manifest.json", good.as_bytes())
        .link("c", EntryKind::Symlink, "d")
        .link("d", EntryKind::Symlink, "c")
        .end();
    let itself = Made::default().link("manifest.json", EntryKind::HardLink, "manifest.json").end();
    let outside =
        Made::default().file("manifest.json", good.as_bytes()).link("c", EntryKind::Symlink, "/etc/passwd").end();
    let up = Made::default()
        .file("manifest.json", good.as_bytes())
        .link("c", EntryKind::Symlink, "../../../etc/passwd")
        .end();
    let device = Made::default().file("manifest.json", good.as_bytes()).link("c", EntryKind::Fifo, "").end();
    let cut = with(good).end();
    let long = Made::default().file("big", &vec![0; 1 << 20]).end();
    for (archive, message) in [
        (with(r#"[{"Config":"manifest.json","Layers":["l"]}]"#).end(), "not an image's configuration"),
        (with(r#"[{"Config":"c","Layers":["l","l"]}]"#).end(), "2 layers are listed"),
        (with(r#"[{"Config":"../../etc/passwd","Layers":["l"]}]"#).end(), "is not in"),
        (with(r#"[{"Config":"","Layers":["l"]}]"#).end(), "is not in"),
        (with(r#"[{"Config":"c","Layers":["nothing"]}]"#).end(), "is not in"),
        (with(r#"[]"#).end(), "it is empty"),
        (with(r#"{}"#).end(), "manifest.json of"),
        (with(&format!("[{many}]")).end(), "limit of 4096"),
        (with(&format!("[{}]", " ".repeat(5_000_000))).end(), "larger than the limit"),
        (with(good).file("c", b"other").end(), "two of this name"),
        (with(good).file("./x/../l", b"other").end(), "two of this name"),
        (with(good).file("../l", b"other").end(), "two of this name"),
        (loops, "links lead from one to the next"),
        (itself, "links lead from one to the next"),
        (outside, "out of the archive"),
        (up, "which is not there"),
        (device, "not a regular file"),
        (cut[..cut.len() - 1600].to_vec(), "cut off"),
        (long[..1 << 19].to_vec(), "cut off"),
        (gzip_member(GzipLevel::DEFAULT, &cut)[..100].to_vec(), "a.tar is corrupt"),
        (b"no tar at all, but text of more than five hundred and twelve bytes. ".repeat(10), "is corrupt"),
        (Vec::new(), "no file in it"),
        (Made::default().file("x", b"").end(), "not a Docker archive"),
    ] {
        let error = error_of(&archive, "docker-archive", "").await;
        assert!(error.contains(message), "{message}: {error}");
    }
    let wrong_name = with(&format!(r#"[{{"Config":"{}.json","Layers":["l"]}}]"#, hex_of(b"other")));
    let wrong_name = wrong_name.file(&format!("{}.json", hex_of(b"other")), &config).end();
    assert!(error_of(&wrong_name, "docker-archive", "").await.contains("is corrupt"));
}

#[tokio::test]
async fn too_many_members_are_refused() {
    let mut archive = Made::default();
    for number in 0..70_000 {
        archive = archive.file(&format!("{number}"), b"");
    }
    assert!(error_of(&archive.end(), "oci-archive", "").await.contains("more than 65536 members"));
}

#[tokio::test]
async fn a_stream_is_read_as_a_file_is() {
    let (archive, _) = old_docker_save();
    let directory = TempDir::new().unwrap();
    let pipe = directory.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let (name, options) = (format!("docker-archive:{}:@1", pipe.display()), options(&directory));
    let writer = std::thread::spawn(move || std::fs::write(pipe, archive).unwrap());
    let source = crate::open_source(&name.parse().unwrap(), &options).await.unwrap();
    writer.join().unwrap();
    let manifest = source.root().await.unwrap().manifest(&Limits::default()).unwrap();
    for layer in &manifest.layers {
        assert_eq!(read(&*source, layer).await.unwrap().len() as u64, layer.size);
    }
    // What it was unpacked to has no name.
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
}

/// An image with a gzip layer, an uncompressed one, and the first one again.
struct Image {
    manifest: Document,
    blobs: Vec<(Descriptor, Bytes)>,
}

fn image() -> Image {
    let layers = [b"one".repeat(200_000), b"two".to_vec()];
    let gzip = gzip_member(GzipLevel::DEFAULT, &layers[0]);
    let blob = |media_type: &str, bytes: Vec<u8>| {
        (Descriptor::new(media_type, Digest::sha256_of(&bytes), bytes.len() as u64), Bytes::from(bytes))
    };
    let config = blob(media_type::OCI_CONFIG, config(&[&layers[0], &layers[1], &layers[0]]));
    let blobs = [blob(media_type::OCI_LAYER_GZIP, gzip), blob(media_type::OCI_LAYER, layers[1].clone())];
    let manifest = Manifest {
        schema_version: 2,
        media_type: media_type::OCI_MANIFEST.to_owned(),
        artifact_type: None,
        config: config.0.clone(),
        layers: vec![blobs[0].0.clone(), blobs[1].0.clone(), blobs[0].0.clone()],
        subject: None,
        annotations: BTreeMap::new(),
    };
    Image { manifest: manifest.to_document().unwrap(), blobs: [config].into_iter().chain(blobs).collect() }
}

async fn put(sink: &dyn ImageSink, image: &Image) -> Result<(), Error> {
    // In an order that depends on nothing in the image.
    for (descriptor, bytes) in image.blobs.iter().rev() {
        sink.put_blob(descriptor, stream::iter([Ok(bytes.clone())]).boxed()).await?;
    }
    sink.put_manifest(&image.manifest).await?;
    sink.commit(&image.manifest, &BTreeMap::new()).await
}

#[tokio::test]
async fn an_oci_archive_is_read_as_it_was_written() {
    let directory = TempDir::new().unwrap();
    let image = image();
    let path = directory.path().join("a.tar");
    std::fs::write(&path, b"what was there before").unwrap();
    let name: ImageName = format!("oci-archive:{}:v1", path.display()).parse().unwrap();
    let options = options(&directory);
    let sink = crate::open_sink(&name, &options).await.unwrap();
    put(&*sink, &image).await.unwrap();
    drop(sink);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    let first = std::fs::read(&path).unwrap();
    let source = crate::open_source(&name, &options).await.unwrap();
    assert_eq!(source.root().await.unwrap(), image.manifest);
    for (descriptor, bytes) in &image.blobs {
        assert_eq!(read(&*source, descriptor).await.unwrap(), *bytes);
    }
    let sink = crate::open_sink(&name, &options).await.unwrap();
    put(&*sink, &image).await.unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), first);
}

#[tokio::test]
async fn a_docker_archive_has_the_layers_uncompressed() {
    let directory = TempDir::new().unwrap();
    let image = image();
    let name: ImageName = format!("docker-archive:{}:x:1", directory.path().join("a.tar").display()).parse().unwrap();
    let options = options(&directory);
    put(&*crate::open_sink(&name, &options).await.unwrap(), &image).await.unwrap();
    let source = crate::open_source(&name, &options).await.unwrap();
    let manifest = source.root().await.unwrap().manifest(&Limits::default()).unwrap();
    assert_eq!(manifest.config.digest, image.blobs[0].0.digest);
    let mut layers = Vec::new();
    for layer in &manifest.layers {
        layers.push(read(&*source, layer).await.unwrap());
    }
    assert_eq!(layers, [b"one".repeat(200_000), b"two".to_vec(), b"one".repeat(200_000)]);
}

#[tokio::test]
async fn nothing_is_written_before_everything_is_right() {
    let directory = TempDir::new().unwrap();
    let options = options(&directory);
    let path = directory.path().join("a.tar");
    std::fs::write(&path, b"before").unwrap();
    let mut wrong = image();
    // A configuration whose DiffIDs are those of other layers.
    let other = config(&[b"x", b"y", b"z"]);
    wrong.blobs[0] =
        (Descriptor::new(media_type::OCI_CONFIG, Digest::sha256_of(&other), other.len() as u64), other.into());
    let mut manifest = wrong.manifest.manifest(&Limits::default()).unwrap();
    manifest.config = wrong.blobs[0].0.clone();
    wrong.manifest = manifest.to_document().unwrap();
    let name = |transport: &str| format!("{transport}:{}:x", path.display()).parse::<ImageName>().unwrap();
    let sink = crate::open_sink(&name("docker-archive"), &options).await.unwrap();
    assert!(matches!(put(&*sink, &wrong).await, Err(Error::Corrupt { .. })));
    drop(sink);
    let index =
        crate::document::Index { manifests: vec![image().manifest.descriptor()], ..crate::document::Index::empty() };
    let index = index.to_document().unwrap();
    let sink = crate::open_sink(&name("docker-archive"), &options).await.unwrap();
    let error = sink.commit(&index, &BTreeMap::new()).await.unwrap_err();
    assert!(error.to_string().contains("--platform"), "{error}");
    drop(sink);
    let pinned = name("oci-archive").with_digest(Digest::sha256_of(b"other"));
    let sink = crate::open_sink(&pinned, &options).await.unwrap();
    assert!(put(&*sink, &image()).await.is_err());
    drop(sink);
    assert_eq!(std::fs::read(&path).unwrap(), b"before");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
}

#[tokio::test]
async fn the_archive_of_a_new_docker_is_read_as_a_layout() {
    let image = image();
    let mut archive = Made::default();
    for (descriptor, bytes) in &image.blobs {
        archive = archive.file(&crate::layout::blob_path(&descriptor.digest), bytes);
    }
    archive = archive.file(&crate::layout::blob_path(&image.manifest.digest), &image.manifest.bytes);
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"{}","digest":"{}","size":{},"annotations":{{
            "io.containerd.image.name":"docker.io/library/x:1","org.opencontainers.image.ref.name":"1"}}}}]}}"#,
        image.manifest.media_type,
        image.manifest.digest,
        image.manifest.bytes.len()
    );
    let list = r#"[{"Config":"blobs/sha256/x","RepoTags":["x:1"],"Layers":[]}]"#;
    let archive = archive
        .file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)
        .file("index.json", index.as_bytes())
        .file("manifest.json", list.as_bytes())
        .end();
    for (transport, selected) in
        [("docker-archive", ":x:1"), ("docker-archive", ""), ("oci-archive", ":1"), ("oci-archive", "")]
    {
        let source = open(&archive, transport, selected).await.unwrap();
        assert_eq!(source.root().await.unwrap(), image.manifest, "{transport}{selected}");
    }
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("a.tar");
    std::fs::write(&path, archive).unwrap();
    let any = Archive::open(&path, &options(&directory)).await.unwrap().any("-".to_owned(), &Limits::default()).await;
    assert_eq!(any.unwrap().root().await.unwrap(), image.manifest);
}
