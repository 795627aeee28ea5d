use std::num::NonZeroUsize;

use loris_format::{
    compression::{GzipLevel, gzip_member},
    estargz::footer::Footer,
    position::BlobOffset,
    tar::{Entry, EntryKind},
};
use loris_oci::{Document, document::media_type};

use super::*;
use crate::{
    layer::{ConvertedLayer, LayerOptions, Workers, archive::Archive, convert_layer},
    memory::Memory,
    progress::Silent,
};

fn convert(tar: &[u8], chunk_bytes: u64) -> (ConvertedLayer, Vec<u8>) {
    convert_with(tar, &LayerOptions { chunk_bytes, ..LayerOptions::default() })
}

fn convert_with(tar: &[u8], options: &LayerOptions) -> (ConvertedLayer, Vec<u8>) {
    let workers = Workers::start(NonZeroUsize::MIN, options.piece_bytes(), 0).unwrap();
    let mut blob = Vec::new();
    let layer = convert_layer(tar, options, &workers, &Watch::default(), &std::env::temp_dir(), &mut blob).unwrap();
    (layer, blob)
}

/// A layer and what an image says about it.
struct Claimed {
    blob: Vec<u8>,
    diff_id: Digest,
    annotations: Vec<(String, String)>,
    media_type: &'static str,
}

impl Claimed {
    fn converted(tar: &[u8], chunk_bytes: u64) -> Self {
        Self::of(convert(tar, chunk_bytes))
    }

    fn of((layer, blob): (ConvertedLayer, Vec<u8>)) -> Self {
        let annotations = layer.annotations();
        Self { blob, diff_id: layer.diff_id.0, annotations, media_type: media_type::OCI_LAYER_GZIP }
    }

    /// What it says of itself is right again, whatever was done to the blob.
    fn with_blob(self, blob: Vec<u8>) -> Self {
        let mut text = Vec::new();
        let (diff_id, size) = crate::layer::decompress_layer(&*blob, &Watch::default(), &mut text).unwrap();
        let size = (UNCOMPRESSED_SIZE_ANNOTATION.to_owned(), size.to_string());
        let annotations = self.annotations.into_iter().filter(|(key, _)| *key != size.0).chain([size.clone()]);
        Self { blob, diff_id, annotations: annotations.collect(), ..self }
    }

    fn source(&self) -> (Memory, Digest) {
        let source = Memory::new();
        let mut layer = source.add_blob(self.media_type, self.blob.clone());
        layer.annotations.extend(self.annotations.iter().map(|(key, value)| (key.clone(), value.clone())));
        let config = format!(
            r#"{{"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":["{}"]}}}}"#,
            self.diff_id
        );
        let config = source.add_blob(media_type::OCI_CONFIG, config);
        let manifest = loris_oci::document::Manifest {
            schema_version: 2,
            media_type: media_type::OCI_MANIFEST.to_owned(),
            artifact_type: None,
            config,
            layers: vec![layer.clone()],
            subject: None,
            annotations: std::collections::BTreeMap::new(),
        };
        let text = serde_json::to_string(&manifest).unwrap();
        let document: Document = source.add_document(&text);
        source.set_root(&document);
        (source, layer.digest)
    }

    fn findings(&self) -> Vec<String> {
        verify(&self.source().0)
    }
}

fn verify(source: &Memory) -> Vec<String> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let findings = runtime.block_on(verify_image(source, &VerifyOptions::default(), &Silent)).unwrap().problems;
    findings.iter().map(|finding| format!("{:?} {finding}", finding.severity)).collect()
}

fn file(path: &str) -> Entry {
    Entry { path: path.into(), permissions: 0o644, ..Entry::default() }
}

fn everything() -> Archive {
    let symlink = Entry { kind: EntryKind::Symlink, link: b"../x".to_vec(), ..file("s") };
    let device = Entry { kind: EntryKind::CharDevice, device: (5, 6), ..file("c") };
    let xattrs = vec![(b"user.a".as_slice().into(), b"\xff".as_slice().into())];
    Archive::default()
        .directory("d/")
        .entry(&Entry { uid: 7, user_name: b"u".to_vec(), xattrs, ..file("d/a") }, b"This is such a big file")
        .file("empty", b"")
        .link("l", "d/a")
        .entry(&symlink, b"")
        .entry(&device, b"")
}

#[test]
fn files_that_share_members_are_compared() {
    let tar = everything().file("z", b"another file").file("empty2", b"").file("y", &[7; 3000]).end();
    let filled = |least| LayerOptions { chunk_bytes: 5, min_member_bytes: least, ..LayerOptions::default() };
    for least in [600, 2000, 1 << 20] {
        assert_eq!(Claimed::of(convert_with(&tar, &filled(least))).findings(), [""; 0], "{least}");
    }
    // The table of members that begin elsewhere.
    let (_, table) = convert_with(&tar, &filled(2000));
    let other = Claimed::of(convert_with(&tar, &filled(600)));
    let spliced = splice(&other.blob, &table);
    assert!(!other.with_blob(spliced).findings().is_empty());
}

/// Puts the table of contents of one blob behind the content of another.
fn splice(content: &[u8], table: &[u8]) -> Vec<u8> {
    let offset = |blob: &[u8]| match footer::read(blob, blob.len() as u64).unwrap() {
        Footer::Toc { offset, .. } => offset.0 as usize,
        Footer::Zstd { .. } | Footer::External => panic!("no table of contents"),
    };
    let (end, begin) = (offset(content), offset(table));
    let table = &table[begin..table.len() - footer::FOOTER_BYTES];
    [&content[..end], table, &footer::write(BlobOffset(end as u64))].concat()
}

#[test]
fn what_we_write_is_right() {
    for chunk in [4, 1000] {
        assert_eq!(Claimed::converted(&everything().end(), chunk).findings(), [""; 0]);
    }
    assert_eq!(Claimed::converted(&Archive::default().end(), 4).findings(), [""; 0]);
    // Layers that are not lazy at all are right, too.
    let tar = everything().end();
    let diff_id = Digest::sha256_of(&tar);
    for (blob, media_type) in
        [(tar.clone(), media_type::OCI_LAYER), (gzip_member(GzipLevel::DEFAULT, &tar), media_type::OCI_LAYER_GZIP)]
    {
        let layer = Claimed { blob, diff_id, annotations: Vec::new(), media_type };
        assert_eq!(layer.findings(), [""; 0], "{media_type}");
        let wrong = Claimed { diff_id: Digest::sha256_of(b"another"), ..layer };
        assert!(wrong.findings()[0].contains("the configuration says"), "{:?}", wrong.findings());
    }
}

#[test]
fn a_table_of_contents_that_says_something_else_is_found() {
    let base = |entry: &Entry, content: &[u8]| Archive::default().file("before", b"x").entry(entry, content).end();
    let a = Entry { mtime: loris_format::index::Timestamp { seconds: 5, nanoseconds: 0 }, ..file("a") };
    let with = |change: fn(&mut Entry)| {
        let mut entry = a.clone();
        change(&mut entry);
        entry
    };
    let tar = base(&a, b"content");
    for (name, other, want) in [
        ("content", base(&a, b"CONTENT"), "chunk at 0 has the digest"),
        ("size", base(&a, b"content and more"), "size is 7 in the tar and 16 in the table of contents"),
        ("mode", base(&with(|entry| entry.permissions = 0o4644), b"content"), "mode is 420 in the tar and 2468"),
        ("owner", base(&with(|entry| entry.uid = 5), b"content"), "uid is 0 in the tar and 5"),
        ("time", base(&with(|entry| entry.mtime.seconds = 7), b"content"), "time is"),
        ("name", base(&with(|entry| entry.path = b"b".to_vec()), b"content"), "has b in its place"),
        ("type", base(&with(|entry| entry.kind = EntryKind::Fifo), b""), "type is \"reg\" in the tar and \"fifo\""),
        ("one too few", Archive::default().file("before", b"x").end(), "the table of contents does not have it"),
        (
            "one too many",
            Archive::default().file("before", b"x").entry(&a, b"content").file("more", b"").end(),
            "the table of contents has more, the tar has not",
        ),
    ] {
        assert_found(name, &tar, &other, want);
    }
    // The longer headers are in the tar here: the table's offsets must lie inside the blob, or it is refused at once.
    let xattrs = vec![(b"user.x".as_slice().into(), b"".as_slice().into())];
    let richer = base(&Entry { xattrs, ..a.clone() }, b"content");
    assert_found("attribute", &richer, &tar, "extended attributes (names or values) is \"user.x\" in the tar and \"\"");
}

/// Checks that a layer with the content of one tar and the table of contents of another one has a finding.
fn assert_found(name: &str, tar: &[u8], other: &[u8], want: &str) {
    let (_, content) = convert(tar, 100);
    let (layer, table) = convert(other, 100);
    let claimed = Claimed::converted(tar, 100);
    let spliced = Claimed { annotations: layer.annotations(), ..claimed }.with_blob(splice(&content, &table));
    let findings = spliced.findings();
    assert!(
        findings.iter().any(|finding| finding.starts_with("Error") && finding.contains(want)),
        "{name}: {findings:#?}"
    );
}

#[test]
fn claims_are_checked() {
    let good = || Claimed::converted(&everything().end(), 1000);
    let digest = Digest::sha256_of(b"another");
    let annotate = |toc: Option<String>, size: Option<&str>| {
        let mut layer = good();
        let toc = toc.map(|toc| (TOC_DIGEST_ANNOTATION, toc));
        let size = size.map(|size| (UNCOMPRESSED_SIZE_ANNOTATION, size.to_owned()));
        layer.annotations = toc.into_iter().chain(size).map(|(key, value)| (key.to_owned(), value)).collect();
        layer
    };
    let right = good().annotations;
    let (toc, size) = (right[0].1.clone(), right[1].1.clone());
    let tar = everything().end();
    let plain = gzip_member(GzipLevel::DEFAULT, &tar);
    for (name, layer, want) in [
        ("DiffID", Claimed { diff_id: digest, ..good() }, "Error layer"),
        ("no digest", annotate(None, Some(&size)), "is missing: no lazy reader will trust it"),
        ("wrong digest", annotate(Some(digest.to_string()), Some(&size)), "the annotation says"),
        ("no digest at all", annotate(Some("sha256:x".into()), Some(&size)), "not a digest"),
        ("no size", annotate(Some(toc.clone()), None), "is missing: Podman can't use"),
        ("wrong size", annotate(Some(toc.clone()), Some("7")), "says \"7\", but the tar has"),
        (
            "annotated but not lazy",
            Claimed { diff_id: Digest::sha256_of(&tar), ..annotate(Some(toc), None).with_blob(plain) },
            "ends in no eStargz footer",
        ),
    ] {
        let findings = layer.findings();
        assert!(findings.iter().any(|finding| finding.contains(want)), "{name}: {findings:#?}");
    }
}

#[test]
fn damage_is_found() {
    let layer = Claimed::converted(&everything().end(), 4);
    for place in [0, 40, layer.blob.len() / 2, layer.blob.len() - 60] {
        let (source, digest) = layer.source();
        source.damage(&digest, place);
        let findings = verify(&source);
        assert!(findings.iter().any(|finding| finding.starts_with("Error")), "{place}: {findings:?}");
    }
}

#[test]
fn bytes_that_nobody_sees_are_found() {
    let layer = Claimed::converted(&everything().end(), 1000);
    let end = layer.blob.len() - footer::FOOTER_BYTES;
    let hidden = gzip_member(GzipLevel::DEFAULT, b"hidden");
    let blob = [&layer.blob[..end], &hidden, &layer.blob[end..]].concat();
    let findings = layer.with_blob(blob).findings();
    assert!(!findings.is_empty());
}

#[test]
fn a_blob_that_is_not_there_is_found() {
    let layer = Claimed::converted(&everything().end(), 1000);
    let (source, digest) = layer.source();
    source.lose(&digest);
    let findings = verify(&source);
    assert!(findings[0].contains("is not in memory"), "{findings:?}");
}
