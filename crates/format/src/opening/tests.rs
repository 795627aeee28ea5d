use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::{
    compression::{FrameDecoder, zstd_frame},
    estargz::footer::{skippable_head, write_zstd_containers, write_zstd_stargz},
    index::{NodeId, NodeKind, Prefetch},
};

/// Layers that skopeo and ctr-remote made, and the annotations that they gave them: see `zstd-chunked.sh` beside them.
const CONTAINERS: (&[u8], &str) =
    (include_bytes!("../../tests/golden/zstd-containers.zst"), include_str!("../../tests/golden/zstd-containers.json"));
const STARGZ: (&[u8], &str) =
    (include_bytes!("../../tests/golden/zstd-stargz.zst"), include_str!("../../tests/golden/zstd-stargz.json"));

fn promise((_, annotations): (&[u8], &str)) -> Promise {
    let lines = annotations.lines().filter_map(|line| line.trim().trim_end_matches(',').split_once(": "));
    let owned = |text: &str| text.trim_matches('"').to_owned();
    let annotations: BTreeMap<String, String> = lines.map(|(key, value)| (owned(key), owned(value))).collect();
    Promise::read(&annotations).unwrap()
}

fn open(blob: &[u8], promise: Promise, trust: Trust) -> Result<(LayerIndex, Opened, usize), OpenError> {
    let (mut opening, mut range) = Opening::new(blob.len() as u64, promise, trust, &Limits::default())?;
    for reads in 1.. {
        let start = usize::try_from(range.start.0).unwrap();
        match opening.supply(&blob[start..][..usize::try_from(range.length).unwrap()])? {
            Step::Read(next, next_range) => (opening, range) = (next, next_range),
            Step::Done(index, opened) => return Ok((index, opened, reads)),
        }
    }
    unreachable!()
}

fn content(blob: &[u8], index: &LayerIndex, path: &str) -> Vec<u8> {
    let NodeKind::Regular(content) = &index.node(index.lookup(path.as_bytes()).unwrap()).kind else {
        panic!("{path} is not a regular file");
    };
    let end = content.data.checked_add(content.size).unwrap();
    let mut bytes = Vec::new();
    for extent in &index.extents()[index.extents_in(&(content.data..end))] {
        let frame = &index.frames()[extent.frame.0 as usize];
        let range = frame.range.start.0.try_into().unwrap()..frame.range.end().0.try_into().unwrap();
        let limits = Limits::default();
        let decoded = FrameDecoder::new().decode(frame.codec, &blob[range], frame.decoded_length, &limits).unwrap();
        let start = usize::try_from(extent.frame_offset).unwrap();
        let piece = &decoded[start..][..usize::try_from(extent.length).unwrap()];
        assert!(extent.digest.unwrap().matches(piece));
        bytes.extend_from_slice(piece);
    }
    bytes
}

#[test]
fn both_dialects_are_read() {
    for (golden, kind) in [(CONTAINERS, Kind::ZstdChunkedContainers), (STARGZ, Kind::ZstdChunkedStargz)] {
        let blob = golden.0;
        let (index, opened, reads) = open(blob, promise(golden), Trust::Required).unwrap();
        assert_eq!((opened.kind, opened.vouched, reads), (kind, true, 1));
        let large: String = (0..30_000).map(|number| format!("{number}\n")).collect();
        let large = [large.as_bytes(), &[0; 5000], b"behind the hole"].concat();
        assert!(content(blob, &index, "usr/share/large") == large);
        assert!(content(blob, &index, "usr/share/zeros") == vec![0; 70_000]);
        assert_eq!(content(blob, &index, "etc/link"), b"lazy\n");
        let long = format!("{}/{}", "a".repeat(120), "b".repeat(120));
        assert_eq!(content(blob, &index, &long), b"long");
        assert_eq!(content(blob, &index, "etc/empty"), b"");
        let node = |path: &str| index.node(index.lookup(path.as_bytes()).unwrap());
        assert_eq!((node("etc/hostname").permissions, node("etc/hostname").link_count), (0o4755, 2));
        assert_eq!(node("etc/attributes").xattrs, [((*b"user.one").into(), (*b"value").into())]);
        let fraction = if kind == Kind::ZstdChunkedContainers { 250_000_000 } else { 0 };
        assert_eq!(node("etc/attributes").mtime.nanoseconds, fraction);
        assert!(index.is_implied(index.lookup(b"usr/share").unwrap()));
        assert!(index.lookup(b"etc/.wh.gone").is_some());
        let prefetch = if kind == Kind::ZstdChunkedStargz { Prefetch::Nothing } else { Prefetch::Unspecified };
        assert_eq!(index.prefetch(), prefetch);
        assert!(index.child(NodeId::ROOT, b"dev").is_some());
    }
}

#[test]
fn the_footer_is_enough_where_nothing_need_be_vouched_for() {
    for golden in [CONTAINERS, STARGZ] {
        let (index, opened, _) = open(golden.0, Promise::default(), Trust::Optional).unwrap();
        let (promised, known, _) = open(golden.0, promise(golden), Trust::Required).unwrap();
        assert_eq!((index, opened.kind, opened.vouched), (promised, known.kind, false));
        assert_eq!(opened.toc_digest, known.toc_digest);
    }
}

#[test]
fn the_annotations_are_enough_where_there_is_no_footer() {
    // As containers/storage reads it; nothing else is looked at.
    let cut = CONTAINERS.0.len() - 72;
    let blob = [&CONTAINERS.0[..cut], &[0; 72]].concat();
    let (index, ..) = open(&blob, promise(CONTAINERS), Trust::Required).unwrap();
    assert_eq!(index, open(CONTAINERS.0, promise(CONTAINERS), Trust::Required).unwrap().0);
}

#[test]
fn either_digest_vouches() {
    // What stargz-snapshotter goes by, for a blob of containers/storage.
    let (index, opened, _) = open(CONTAINERS.0, promise(CONTAINERS), Trust::Required).unwrap();
    let toc = Promise::estargz(Some(opened.toc_digest));
    let (again, opened, _) = open(CONTAINERS.0, toc, Trust::Required).unwrap();
    assert_eq!((again, opened.kind), (index, Kind::ZstdChunkedContainers));
    // As it was until 2022: only the digest of the compressed table.
    let old = Promise { toc: None, ..promise(STARGZ) };
    assert!(open(STARGZ.0, old, Trust::Required).is_ok());
}

#[test]
fn other_tables_than_promised_are_refused() {
    let other = Digest::sha256_of(b"");
    for golden in [CONTAINERS, STARGZ] {
        let mut wrong = promise(golden);
        wrong.zstd_chunked.as_mut().unwrap().checksum = other;
        assert!(matches!(open(golden.0, wrong, Trust::Required), Err(OpenError::TocDigest { .. })));
        let wrong = Promise { toc: Some(other), ..promise(golden) };
        assert!(matches!(open(golden.0, wrong, Trust::Required), Err(OpenError::TocDigest { .. })));
        let try_place = |change: &dyn Fn(&mut Packed)| {
            let mut wrong = promise(golden);
            change(wrong.zstd_chunked.as_mut().unwrap().position.as_mut().unwrap());
            open(golden.0, wrong, Trust::Required).unwrap_err()
        };
        assert!(matches!(try_place(&|place| place.range.start.0 = 7), OpenError::Outside { .. }));
        assert!(matches!(try_place(&|place| place.range.length = 1 << 20), OpenError::Outside { .. }));
        assert!(matches!(try_place(&|place| place.range.length = 0), OpenError::Outside { .. }));
        assert!(matches!(try_place(&|place| place.range.length -= 1), OpenError::TocCorrupt { .. }));
        assert!(matches!(try_place(&|place| place.range.start.0 -= 1), OpenError::TocCorrupt { .. }));
        for wrong in [-1, 1] {
            let error = try_place(&|place| place.uncompressed = place.uncompressed.saturating_add_signed(wrong));
            assert!(error.to_string().contains("it should have"), "{error}");
        }
        assert!(matches!(try_place(&|place| place.uncompressed = 1 << 40), OpenError::TocTooLarge { .. }));
    }
}

#[test]
fn a_layer_that_promises_one_format_and_is_another_is_refused() {
    let estargz = include_bytes!("../../tests/golden/various.esgz");
    let mut wrong = promise(STARGZ);
    wrong.zstd_chunked.as_mut().unwrap().position = None;
    let error = open(estargz, wrong, Trust::Required).unwrap_err();
    assert!(matches!(error, OpenError::Disagree { kind: Kind::Estargz }), "{error}");
    assert!(error.to_string().contains("two formats"), "{error}");
}

#[test]
fn a_table_far_from_its_footer_is_read_for_what_it_is() {
    let mut promised = promise(CONTAINERS);
    let position = promised.zstd_chunked.as_mut().unwrap().position.take().unwrap();
    let end = usize::try_from(position.range.end().0).unwrap();
    // The tar-split is longer than what is read at first.
    let behind = 3 << 20;
    let range = BlobRange { start: BlobOffset(position.range.end().0 + 8), length: behind.into() };
    let footer = write_zstd_containers(position, Packed { range, uncompressed: 1 });
    let split = vec![7; behind as usize];
    let blob = [&CONTAINERS.0[..end], &skippable_head(behind), &split, &footer].concat();
    let (index, _, reads) = open(&blob, promised, Trust::Required).unwrap();
    assert_eq!((content(&blob, &index, "etc/link").as_slice(), reads), (&b"lazy\n"[..], 2));
}

#[test]
fn a_footer_makes_nobody_read_more_than_a_table_may_have() {
    let toc = Packed { range: BlobRange { start: BlobOffset(8), length: 100 }, uncompressed: 100 };
    let vouched = Promise { toc: Some(Digest::sha256_of(b"")), ..Promise::default() };
    let (opening, range) = Opening::new(64 << 30, vouched, Trust::Required, &Limits::default()).unwrap();
    let footer = write_zstd_stargz(toc);
    let mut tail = vec![0; usize::try_from(range.length).unwrap() - footer.len()];
    tail.extend(footer);
    assert!(matches!(opening.supply(&tail), Err(OpenError::TocTooLarge { .. })));
}

/// Makes a blob of frames, a table and a footer.
fn made(frames: &[u8], json: &[u8]) -> Vec<u8> {
    let compressed = zstd_frame(3, json);
    let length = u32::try_from(compressed.len()).unwrap();
    let start = BlobOffset(frames.len() as u64 + 8);
    let toc = Packed { range: BlobRange { start, length: length.into() }, uncompressed: json.len() as u64 };
    [frames, &skippable_head(length), &compressed, &write_zstd_stargz(toc)].concat()
}

#[test]
fn tables_are_as_dense_as_zstd_allows_and_no_denser() {
    let hole = vec![0; 100 << 20];
    let frame = zstd_frame(3, &hole);
    let json = |size: usize| {
        let digest = Digest::sha256_of(&hole);
        format!(r#"{{"version":1,"entries":[{{"name":"f","type":"reg","size":{size},"digest":"{digest}"}}]}}"#)
    };
    let blob = made(&frame, json(hole.len()).as_bytes());
    let (index, ..) = open(&blob, Promise::default(), Trust::Optional).unwrap();
    assert!(content(&blob, &index, "f") == hole);
    let blob = made(&frame[..1000], json(hole.len()).as_bytes());
    let error = open(&blob, Promise::default(), Trust::Optional).unwrap_err();
    assert!(error.to_string().contains("cannot hold"), "{error}");
}

#[test]
fn what_is_no_table_is_refused() {
    let start = |length| BlobRange { start: BlobOffset(8), length };
    let blob_of = |bytes: &[u8], uncompressed| {
        let length = u32::try_from(bytes.len()).unwrap();
        let toc = Packed { range: start(length.into()), uncompressed };
        let footer = write_zstd_containers(toc, Packed { range: start(1), uncompressed: 1 });
        [&skippable_head(length), bytes, &footer].concat()
    };
    for (bytes, uncompressed, message) in [
        (b"{}".to_vec(), 2, "no zstd frame begins there"),
        (zstd_frame(3, b"{}")[..8].to_vec(), 2, "zstd"),
        (zstd_frame(3, b"{}"), 3, "it should have 3 bytes and has 2"),
        (zstd_frame(3, b"[]"), 2, "expected an object"),
        (skippable_head(0).to_vec(), 2, "it should have 2 bytes and has 0"),
    ] {
        let error = open(&blob_of(&bytes, uncompressed), Promise::default(), Trust::Optional).unwrap_err();
        assert!(error.to_string().contains(message), "{error} does not contain {message:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn a_flipped_bit_changes_nothing_that_is_vouched_for(which in 0..2, place in any::<proptest::sample::Index>()) {
        let golden = [CONTAINERS, STARGZ][usize::try_from(which).unwrap()];
        // The content of files is not looked at here.
        let from = golden.0.len() - 3000;
        let bit = place.index(3000 * 8);
        let mut flipped = golden.0.to_vec();
        flipped[from + bit / 8] ^= 1 << (bit % 8);
        if let Ok((index, ..)) = open(&flipped, promise(golden), Trust::Required) {
            prop_assert_eq!(index, open(golden.0, promise(golden), Trust::Required).unwrap().0);
        }
        let _ = open(&flipped, Promise::default(), Trust::Optional);
    }
}
