//! zstd:chunked layers, written and read again.

use std::num::NonZeroUsize;

use loris_format::{
    compression::{Decoder, FrameDecoder},
    digest::{DiffId, Digest},
    index::{LayerIndex, NodeKind, Prefetch},
    limits::Limits,
    opening::{Opening, Step, Trust},
    position::Packed,
    tar::{Entry, EntryKind},
};
use proptest::prelude::*;

use super::{archive::Archive, *};

fn options(dialect: Dialect, chunk_bytes: u64) -> LayerOptions {
    LayerOptions { format: Format::ZstdChunked(3, dialect), chunk_bytes, ..LayerOptions::default() }
}

fn convert(source: &[u8], options: &LayerOptions, threads: usize) -> (ConvertedLayer, Vec<u8>) {
    let workers = Workers::start(NonZeroUsize::new(threads).unwrap(), options.chunk_bytes, 0).unwrap();
    let mut blob = Vec::new();
    let directory = std::env::temp_dir();
    let layer = convert_layer(source, options, &workers, &Watch::default(), &directory, &mut blob).unwrap();
    assert_eq!((layer.blob_size, layer.blob_digest), (blob.len() as u64, Digest::sha256_of(&blob)));
    (layer, blob)
}

fn open(blob: &[u8], layer: &ConvertedLayer) -> LayerIndex {
    let (mut opening, mut range) =
        Opening::new(blob.len() as u64, layer.promise.clone(), Trust::Required, &Limits::default()).unwrap();
    loop {
        let bytes = &blob[range.start.0 as usize..range.end().0 as usize];
        match opening.supply(bytes).unwrap() {
            Step::Read(next, next_range) => (opening, range) = (next, next_range),
            Step::Done(index, _) => return index,
        }
    }
}

fn content(index: &LayerIndex, blob: &[u8], path: &str) -> Vec<u8> {
    let NodeKind::Regular(content) = &index.node(index.lookup(path.as_bytes()).unwrap()).kind else { panic!("{path}") };
    let end = content.data.checked_add(content.size).unwrap();
    let mut bytes = Vec::new();
    for extent in &index.extents()[index.extents_in(&(content.data..end))] {
        let frame = &index.frames()[extent.frame.0 as usize];
        let packed = &blob[frame.range.start.0 as usize..frame.range.end().0 as usize];
        let decoded =
            FrameDecoder::new().decode(frame.codec, packed, frame.decoded_length, &Limits::default()).unwrap();
        let piece = &decoded[extent.frame_offset as usize..][..extent.length as usize];
        assert!(extent.digest.unwrap().matches(piece));
        bytes.extend_from_slice(piece);
    }
    bytes
}

fn unpacked(blob: &[u8]) -> Vec<u8> {
    let mut tar = Vec::new();
    Decoder::new(blob).unwrap().read_to_end(&mut tar).unwrap();
    tar
}

fn part(blob: &[u8], part: Packed) -> String {
    let bytes = &blob[part.range.start.0 as usize..part.range.end().0 as usize];
    let text = String::from_utf8(unpacked(bytes)).unwrap();
    assert_eq!(text.len() as u64, part.uncompressed);
    text
}

/// Puts a tar together out of a `tar-split` and the layer's files.
fn assembled(split: &str, mut file: impl FnMut(&str) -> Vec<u8>) -> Vec<u8> {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    let mut tar = Vec::new();
    for (number, line) in split.lines().enumerate() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(line["position"], number);
        if line["type"] == 2 {
            tar.extend(STANDARD.decode(line["payload"].as_str().unwrap()).unwrap());
        } else if line["size"].as_u64().unwrap_or_default() > 0 {
            tar.extend(file(line["name"].as_str().unwrap()));
        }
    }
    tar
}

fn various() -> Archive {
    let hole = [b"before".as_slice(), &[0; 5000], b"behind"].concat();
    let symlink = Entry { path: "s".into(), kind: EntryKind::Symlink, link: b"d/a".to_vec(), ..Entry::default() };
    Archive::default()
        .directory("d/")
        .file("d/a", b"hello")
        .file("empty", b"")
        .file("hole", &hole)
        .file("large", &(0..100_000_u32).flat_map(u32::to_le_bytes).collect::<Vec<u8>>())
        .link("l", "d/a")
        .entry(&symlink, b"")
}

#[test]
fn a_layer_keeps_its_tar() {
    // What follows the end of the archive belongs to it.
    let source = [various().end(), vec![0; 3000]].concat();
    let (layer, blob) = convert(&source, &options(Dialect::Containers, 4 << 20), 2);
    assert!(unpacked(&blob) == source);
    assert_eq!((layer.diff_id, layer.source_diff_id), (DiffId(Digest::sha256_of(&source)), layer.diff_id));
    let index = open(&blob, &layer);
    assert_eq!(content(&index, &blob, "l"), b"hello");
    assert_eq!(content(&index, &blob, "large").len(), 400_000);
    assert_eq!(index.prefetch(), Prefetch::Unspecified);
    let promised = layer.promise.zstd_chunked.clone().unwrap();
    let split = part(&blob, promised.tar_split.unwrap());
    assert!(assembled(&split, |name| content(&index, &blob, name)) == source);
    let toc: serde_json::Value = serde_json::from_str(&part(&blob, promised.position.unwrap())).unwrap();
    let hole: Vec<_> = toc["entries"].as_array().unwrap().iter().filter(|entry| entry["name"] == "hole").collect();
    assert_eq!((hole.len(), &hole[1]["chunkType"]), (3, &"zeros".into()));
    let packed = promised.tar_split.unwrap().range;
    let packed = Digest::sha256_of(&blob[packed.start.0 as usize..packed.end().0 as usize]);
    assert_eq!(toc["tarSplitDigest"], packed.to_string());
    assert_eq!(layer.annotations().len(), 3);
    assert!(layer.annotations().iter().all(|(key, _)| key.starts_with("io.github.containers.zstd-chunked.")));
}

#[test]
fn the_other_dialect_has_landmarks_and_its_own_annotations() {
    let source = various().end();
    let (layer, blob) = convert(&source, &options(Dialect::Stargz, 4 << 20), 1);
    let index = open(&blob, &layer);
    assert_eq!(index.prefetch(), Prefetch::Nothing);
    assert_eq!(layer.diff_id, DiffId(Digest::sha256_of(&unpacked(&blob))));
    assert_ne!(layer.diff_id, layer.source_diff_id);
    let keys: Vec<String> = layer.annotations().into_iter().map(|(key, _)| key).collect();
    assert_eq!(
        keys,
        [
            "containerd.io/snapshot/stargz/toc.digest",
            "io.containers.zstd-chunked.manifest-checksum",
            "io.containers.zstd-chunked.manifest-position",
            "io.containers.estargz.uncompressed-size"
        ]
    );
    let first = LayerOptions { prioritised: vec![b"empty".to_vec()], ..options(Dialect::Containers, 4 << 20) };
    let (layer, blob) = convert(&source, &first, 1);
    assert!(unpacked(&blob).starts_with(b"empty\0"));
    // Who pulls with Podman must not find a file that is none.
    assert!(open(&blob, &layer).lookup(b".prefetch.landmark").is_none());
}

#[test]
fn what_cannot_stay_is_written_anew() {
    let twice = various().file("empty", b"no more");
    let landmark = various().file(".no.prefetch.landmark", b"\x0f");
    for (archive, name, expected) in
        [(twice, "empty", Some(b"no more".as_slice())), (landmark, ".no.prefetch.landmark", None)]
    {
        let source = archive.end();
        let (layer, blob) = convert(&source, &options(Dialect::Containers, 4 << 20), 1);
        assert_ne!(layer.diff_id, layer.source_diff_id);
        assert_eq!(layer.diff_id, DiffId(Digest::sha256_of(&unpacked(&blob))));
        let index = open(&blob, &layer);
        let found = index.lookup(name.as_bytes()).map(|_| content(&index, &blob, name));
        assert_eq!(found.as_deref(), expected);
        let split = part(&blob, layer.promise.zstd_chunked.clone().unwrap().tar_split.unwrap());
        assert!(assembled(&split, |name| content(&index, &blob, name)) == unpacked(&blob));
        assert_eq!(layer.source_diff_id, DiffId(Digest::sha256_of(&source)));
    }
}

#[test]
fn a_name_that_json_cannot_hold_costs_the_tar_split() {
    let odd = Entry { path: b"f\xff".to_vec(), ..Entry::default() };
    let source = various().entry(&odd, b"x").end();
    let (layer, blob) = convert(&source, &options(Dialect::Containers, 4 << 20), 1);
    assert_eq!(layer.promise.zstd_chunked.clone().unwrap().tar_split, None);
    assert!(open(&blob, &layer).lookup(b"f\xff").is_some());
    assert!(unpacked(&blob) == source);
}

#[test]
fn empty_layers_are_layers() {
    for dialect in [Dialect::Containers, Dialect::Stargz] {
        let (layer, blob) = convert(&Archive::default().end(), &options(dialect, 4 << 20), 1);
        assert_eq!(open(&blob, &layer).extents().len(), usize::from(dialect == Dialect::Stargz));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn any_layer_comes_back_whatever_the_threads(
        files in proptest::collection::vec((0..4_u8, 0..200_000_usize, any::<u8>()), 0..12),
        chunk_bytes in prop_oneof![1000..5000_u64, Just(64 << 10), Just(4 << 20)],
        zeros in 0..2000_usize,
    ) {
        let mut archive = Archive::default();
        let mut contents = Vec::new();
        for (number, (kind, size, seed)) in files.into_iter().enumerate() {
            let content: Vec<u8> = match kind {
                0 => vec![0; size],
                1 => (0..size).map(|at| (at / 3000 % 2 * usize::from(seed)) as u8).collect(),
                2 => (0..size).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8 ^ seed).collect(),
                _ => Vec::new(),
            };
            archive = archive.file(&format!("f{number}"), &content);
            contents.push(content);
        }
        let source = [archive.end(), vec![0; zeros]].concat();
        let (layer, blob) = convert(&source, &options(Dialect::Containers, chunk_bytes), 1);
        let (_, again) = convert(&source, &options(Dialect::Containers, chunk_bytes), 3);
        prop_assert!(blob == again);
        prop_assert!(unpacked(&blob) == source);
        let index = open(&blob, &layer);
        for (number, expected) in contents.iter().enumerate() {
            let found = content(&index, &blob, &format!("f{number}"));
            prop_assert!(&found == expected);
        }
        let split = part(&blob, layer.promise.zstd_chunked.unwrap().tar_split.unwrap());
        prop_assert!(assembled(&split, |name| content(&index, &blob, name)) == source);
        prop_assert!(index.extents().iter().all(|extent| extent.length <= chunk_bytes));
    }
}
