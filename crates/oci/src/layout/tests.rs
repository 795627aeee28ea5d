use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tempfile::TempDir;

use super::*;
use crate::{
    document::{Manifest, Platform},
    place::ImageSink,
};

fn descriptor(media_type: &str, bytes: &'static [u8]) -> Descriptor {
    Descriptor::new(media_type, Digest::sha256_of(bytes), bytes.len() as u64)
}

fn selector(name: &str) -> Selector {
    Selector { name: (!name.is_empty()).then(|| name.to_owned()), ..Selector::default() }
}

const CONFIG: &[u8] = br#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}"#;

fn manifest(mark: &str, subject: Option<&Document>) -> Document {
    let manifest = Manifest {
        schema_version: 2,
        media_type: media_type::OCI_MANIFEST.to_owned(),
        artifact_type: subject.map(|_| "application/x-signature".to_owned()),
        config: descriptor(media_type::OCI_CONFIG, CONFIG),
        layers: vec![descriptor(media_type::OCI_LAYER, b"layer")],
        subject: subject.map(Document::descriptor),
        annotations: [("mark".to_owned(), mark.to_owned())].into(),
    };
    manifest.to_document().unwrap()
}

async fn put(sink: &LayoutSink, descriptor: &Descriptor, bytes: &'static [u8]) -> Result<(), Error> {
    sink.put_blob(descriptor, stream::iter(bytes.chunks(3).map(|piece| Ok(Bytes::from_static(piece)))).boxed()).await
}

async fn write(path: &Path, name: &str, mark: &str) -> Document {
    let sink = LayoutSink::open(path, &selector(name), &Limits::default()).await.unwrap();
    let document = manifest(mark, None);
    put(&sink, &descriptor(media_type::OCI_CONFIG, CONFIG), CONFIG).await.unwrap();
    put(&sink, &descriptor(media_type::OCI_LAYER, b"layer"), b"layer").await.unwrap();
    sink.put_manifest(&document).await.unwrap();
    sink.commit(&document, &BTreeMap::new()).await.unwrap();
    document
}

async fn open(path: &Path, name: &str) -> Result<LayoutSource, Error> {
    LayoutSource::open(path, &selector(name), &Limits::default()).await
}

fn visible(path: &Path) -> Vec<String> {
    let names = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

#[tokio::test]
async fn what_is_written_is_read() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("layout");
    let document = write(&path, "v1", "a").await;
    assert_eq!(visible(&path), ["blobs", "index.json", "oci-layout"]);
    let source = open(&path, "").await.unwrap();
    assert_eq!(source.root().await.unwrap(), document);
    let layer = descriptor(media_type::OCI_LAYER, b"layer");
    let pieces: Vec<Bytes> = source.blob(&layer).await.unwrap().try_collect().await.unwrap();
    assert_eq!(pieces.concat(), b"layer");
    assert_eq!(source.blob_range(&layer, 1..3).await.unwrap(), b"ay"[..]);
    assert!(source.blob_range(&layer, 1..6).await.is_err());
    let empty = descriptor(media_type::OCI_LAYER, b"");
    assert!(matches!(source.blob(&empty).await, Err(Error::NotFound { .. })));
    std::fs::write(path.join(blob_path(&empty.digest)), b"").unwrap();
    assert!(source.blob(&empty).await.unwrap().try_collect::<Vec<_>>().await.unwrap().concat().is_empty());
}

#[tokio::test]
async fn names_lead_to_images() {
    let directory = TempDir::new().unwrap();
    let path = directory.path();
    let (one, two) = (write(path, "one", "1").await, write(path, "example.com/x:two", "2").await);
    for (name, document) in [("one", &one), ("example.com/x:two", &two)] {
        assert_eq!(open(path, name).await.unwrap().root().await.unwrap(), *document);
    }
    let error = open(path, "").await.err().unwrap().to_string();
    assert!(error.contains(r#""one", "example.com/x:two""#), "{error}");
    let error = open(path, "three").await.err().unwrap();
    assert!(matches!(&error, Error::NotFound { place, .. } if place.contains("\"one\"")), "{error}");
    for (chosen, document) in [
        (Selector { index: Some(1), ..Selector::default() }, Some(&two)),
        (Selector { index: Some(2), ..Selector::default() }, None),
        (Selector { digest: Some(one.digest), ..Selector::default() }, Some(&one)),
        (Selector { digest: Some(two.digest), ..selector("one") }, None),
    ] {
        let found = LayoutSource::open(path, &chosen, &Limits::default()).await;
        assert_eq!(found.ok().map(|source| source.descriptor().digest), document.map(|document| document.digest));
    }
    // The same name again takes the place of the first.
    let three = write(path, "one", "3").await;
    assert_eq!(open(path, "one").await.unwrap().root().await.unwrap(), three);
    let index: Index = serde_json::from_slice(&std::fs::read(path.join(INDEX)).unwrap()).unwrap();
    assert_eq!(index.manifests.len(), 2);
}

#[tokio::test]
async fn containerds_names_are_understood() {
    let directory = TempDir::new().unwrap();
    write(directory.path(), "latest", "1").await;
    let index = std::fs::read_to_string(directory.path().join(INDEX)).unwrap();
    let name = r#""annotations":{"io.containerd.image.name":"docker.io/library/alpine:latest","#;
    std::fs::write(directory.path().join(INDEX), index.replace(r#""annotations":{"#, name)).unwrap();
    for name in ["alpine", "latest", "docker.io/library/alpine:latest"] {
        assert!(open(directory.path(), name).await.is_ok(), "{name}");
    }
    assert!(open(directory.path(), "debian").await.is_err());
}

#[tokio::test]
async fn writers_side_by_side_lose_nothing() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("layout");
    let names: Vec<String> = (0..12).map(|number| format!("image{number}")).collect();
    futures_util::future::join_all(names.iter().map(|name| write(&path, name, name))).await;
    for name in &names {
        assert!(open(&path, name).await.is_ok(), "{name}");
    }
    assert_eq!(visible(&path), ["blobs", "index.json", "oci-layout"]);
}

#[tokio::test]
async fn an_image_that_is_not_finished_leaves_nothing() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("layout");
    let layer = descriptor(media_type::OCI_LAYER, b"layer");
    let sink = LayoutSink::open(&path, &selector("x"), &Limits::default()).await.unwrap();
    assert!(!sink.has_blob(&layer).await.unwrap());
    put(&sink, &layer, b"layer").await.unwrap();
    assert!(sink.has_blob(&layer).await.unwrap());
    for wrong in [&b"laier"[..], b"laye", b"layers"] {
        let error = put(&sink, &layer, wrong).await.unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    }
    drop(sink);
    assert!(!path.exists());
}

#[tokio::test]
async fn what_a_killed_writer_left_is_removed_and_a_live_one_is_not() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("layout");
    write(&path, "x", "x").await;
    std::fs::create_dir(path.join(".loris-dead")).unwrap();
    std::fs::write(path.join(".loris-dead/blob"), b"x").unwrap();
    let live = LayoutSink::open(&path, &selector("live"), &Limits::default()).await.unwrap();
    let other = LayoutSink::open(&path, &selector("other"), &Limits::default()).await.unwrap();
    assert!(!path.join(".loris-dead").exists());
    put(&live, &descriptor(media_type::OCI_LAYER, b"layer"), b"layer").await.unwrap();
    drop((live, other));
    assert_eq!(visible(&path), ["blobs", "index.json", "oci-layout"]);
}

#[tokio::test]
async fn a_directory_with_something_else_in_it_is_left_alone() {
    let directory = TempDir::new().unwrap();
    std::fs::write(directory.path().join("letter.txt"), b"x").unwrap();
    let error = LayoutSink::open(directory.path(), &selector("x"), &Limits::default()).await.err().unwrap();
    assert!(error.to_string().contains("letter.txt"), "{error}");
    assert_eq!(visible(directory.path()), ["letter.txt"]);
}

#[tokio::test]
async fn referrers_are_found_and_are_not_taken_for_the_image() {
    let directory = TempDir::new().unwrap();
    let image = write(directory.path(), "", "image").await;
    let signature = manifest("signature", Some(&image));
    let late = manifest("late", Some(&image));
    let sink = LayoutSink::open(directory.path(), &selector(""), &Limits::default()).await.unwrap();
    sink.put_manifest(&signature).await.unwrap();
    sink.commit(&image, &BTreeMap::new()).await.unwrap();
    sink.put_manifest(&late).await.unwrap();
    let source = open(directory.path(), "").await.unwrap();
    assert_eq!(source.root().await.unwrap(), image);
    let found = source.referrers(&image.digest, None).await.unwrap();
    let mut expected = vec![signature.digest, late.digest];
    expected.sort();
    assert_eq!(found.iter().map(|found| found.digest).collect::<Vec<_>>(), expected);
    assert_eq!(found[0].artifact_type.as_deref(), Some("application/x-signature"));
    assert!(found[0].annotations.contains_key("mark"));
    assert_eq!(source.referrers(&image.digest, Some("application/x-other")).await.unwrap(), []);
    assert_eq!(source.referrers(&signature.digest, None).await.unwrap(), []);
}

#[tokio::test]
async fn damage_is_found() {
    let directory = TempDir::new().unwrap();
    let path = directory.path();
    let document = write(path, "x", "x").await;
    let layer = descriptor(media_type::OCI_LAYER, b"layer");
    let layer_path = path.join(blob_path(&layer.digest));
    let source = open(path, "x").await.unwrap();
    std::fs::write(&layer_path, b"laier").unwrap();
    let read = source.blob(&layer).await.unwrap().try_collect::<Vec<_>>().await;
    assert!(matches!(read, Err(Error::Corrupt { .. })));
    std::fs::write(&layer_path, b"laye").unwrap();
    assert!(matches!(source.blob(&layer).await, Err(Error::Corrupt { .. })));
    assert!(matches!(source.blob_range(&layer, 0..1).await, Err(Error::Corrupt { .. })));
    std::fs::remove_file(&layer_path).unwrap();
    std::fs::create_dir(&layer_path).unwrap();
    assert!(matches!(source.blob(&layer).await, Err(Error::Invalid { .. })));
    let manifest_path = path.join(blob_path(&document.digest));
    let bytes = std::fs::read_to_string(&manifest_path).unwrap();
    std::fs::write(&manifest_path, bytes.replace("layers", "LAYERS")).unwrap();
    assert!(matches!(source.root().await, Err(Error::Corrupt { .. })));
}

#[tokio::test]
async fn what_is_no_layout_is_refused() {
    let empty = r#"{"schemaVersion":2,"manifests":[]}"#;
    let marker = r#"{"imageLayoutVersion":"1.0.0"}"#;
    let huge = format!(r#"{{"schemaVersion":2,"manifests":[],"x":"{}"}}"#, "x".repeat(5 << 20));
    for (marker, index, message) in [
        (None, Some(empty), "no file oci-layout"),
        (Some(marker), None, "no file index.json"),
        (Some(r#"{"imageLayoutVersion":"2.0.0"}"#), Some(empty), "version \"2.0.0\""),
        (Some("{}"), Some(empty), "missing field"),
        (Some(marker), Some(empty), "it is empty"),
        (Some(marker), Some("[]"), "index.json of oci:"),
        (Some(marker), Some(r#"{"schemaVersion":2,"manifests":[],"layers":[]}"#), "at once"),
        (Some(marker), Some(huge.as_str()), "larger than the limit"),
    ] {
        let directory = TempDir::new().unwrap();
        for (name, content) in [(MARKER, marker), (INDEX, index)] {
            if let Some(content) = content {
                std::fs::write(directory.path().join(name), content).unwrap();
            }
        }
        let error = open(directory.path(), "").await.err().unwrap().to_string();
        assert!(error.contains(message), "{message}: {error}");
    }
    let directory = TempDir::new().unwrap();
    assert!(open(&directory.path().join("nothing"), "").await.is_err());
}

#[tokio::test]
async fn a_platform_is_chosen_through_nested_indexes() {
    let directory = TempDir::new().unwrap();
    let path = directory.path();
    let document = write(path, "single", "1").await;
    let sink = LayoutSink::open(path, &selector("many"), &Limits::default()).await.unwrap();
    let on = |platform: &str| Descriptor { platform: Some(platform.parse().unwrap()), ..document.descriptor() };
    let inner = Index { manifests: vec![on("linux/arm/v7"), document.descriptor()], ..Index::empty() };
    let inner = inner.to_document().unwrap();
    let mut attestation = Descriptor { digest: Digest::sha256_of(b"?"), ..document.descriptor() };
    attestation.annotations.insert("vnd.docker.reference.type".to_owned(), "attestation-manifest".to_owned());
    let outer = Index { manifests: vec![attestation, inner.descriptor(), on("linux/s390x")], ..Index::empty() };
    let outer = outer.to_document().unwrap();
    sink.put_manifest(&inner).await.unwrap();
    sink.put_manifest(&outer).await.unwrap();
    sink.commit(&outer, &BTreeMap::new()).await.unwrap();
    let source = open(path, "many").await.unwrap();
    let limits = Limits::default();
    let choose = |platform: &str| {
        let (source, platform) = (&source, platform.parse::<Platform>().unwrap());
        let outer = outer.index(&limits).unwrap().manifests;
        async move { crate::platform::choose(source, &outer, &platform, &Limits::default()).await }
    };
    assert_eq!(choose("linux/s390x").await.unwrap().platform, Some("linux/s390x".parse().unwrap()));
    // A 64-bit machine runs 32-bit programs; amd64 is what a configuration says, since no descriptor does.
    assert_eq!(choose("linux/arm64").await.unwrap().platform, Some("linux/arm/v7".parse().unwrap()));
    assert_eq!(choose("linux/amd64").await.unwrap().platform, None);
    let error = choose("linux/riscv64").await.unwrap_err();
    assert!(
        matches!(&error, Error::NoPlatform { available, .. } if available == "linux/amd64, linux/arm/v7, linux/s390x"),
        "{error}"
    );
    let shallow = Limits { index_depth: 1, ..Limits::default() };
    let platform = "linux/s390x".parse().unwrap();
    let manifests = outer.index(&limits).unwrap().manifests;
    let error = crate::platform::choose(&source, &manifests, &platform, &shallow).await.unwrap_err();
    assert!(error.to_string().contains("nested deeper"), "{error}");

    // The configuration has no DiffID for the layer.
    let single = open(path, "single").await.unwrap();
    let error = crate::platform::resolve_image(&single, None, &limits).await.unwrap_err();
    assert!(error.to_string().contains("0 DiffIDs for 1 layers"), "{error}");
    assert_eq!(crate::platform::resolve_manifest(&single, None, &limits).await.unwrap().0, document);
}
