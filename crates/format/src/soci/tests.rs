//! Round trips, and what the real tool makes.

use std::{borrow::Cow, io::Write as _};

use proptest::prelude::*;

use super::{
    flat::{Builder, Value, Written},
    ztoc::ZtocError,
    *,
};
use crate::{
    compression::SpanDecoder,
    digest::Digest,
    index::{FrameId, LayerIndex},
    limits::Limits,
    tar,
};

fn layer(files: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (name, content) in files {
        let entry = tar::Entry {
            path: name.as_bytes().to_vec(),
            size: content.len() as u64,
            permissions: 0o644,
            ..tar::Entry::default()
        };
        archive.extend_from_slice(&tar::encode_header(&entry).unwrap());
        archive.extend_from_slice(content);
        archive.extend_from_slice(tar::padding(content.len() as u64));
    }
    archive.extend_from_slice(&tar::END_OF_ARCHIVE);
    archive
}

fn gzip(bytes: &[u8], level: u32) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(level));
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Something between text and noise.
fn content(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let noise = state.to_le_bytes();
        bytes.extend_from_slice([&b"the "[..], b"of a", b"\0\0\0\0", &noise[..4]][(state >> 60) as usize % 4]);
    }
    bytes.truncate(length);
    bytes
}

fn options(span_bytes: u64) -> BuildOptions {
    BuildOptions { span_bytes, ..BuildOptions::default() }
}

/// Decodes all spans, with the windows of the ztoc.
fn decode(index: &LayerIndex, ztoc: &[u8], blob: &[u8]) -> Vec<u8> {
    let limits = Limits::default();
    let document = ztoc::Ztoc::read(ztoc, &limits).unwrap();
    let mut decoder = SpanDecoder::new();
    let mut tar = Vec::new();
    for (number, frame) in index.frames().iter().enumerate() {
        let span = index.span(FrameId(u32::try_from(number).unwrap())).unwrap();
        let place = |at: u64| usize::try_from(at).unwrap();
        let compressed = &blob[place(frame.range.start.0)..place(frame.range.end().0)];
        assert!(span.digest.matches(compressed), "span {number}");
        if document.algorithm == ztoc::Algorithm::Zstd {
            let decoded = crate::compression::decode_frame(frame.codec, compressed, span.length, &limits);
            tar.extend(decoded.unwrap());
            continue;
        }
        if document.algorithm == ztoc::Algorithm::Uncompressed {
            tar.extend_from_slice(compressed);
            continue;
        }
        let points = zinfo::Checkpoints::read(document.checkpoints).unwrap();
        let window = &document.checkpoints[points.window_at(number).unwrap()];
        tar.extend(decoder.decode(span, window, compressed, span.length, &limits).unwrap());
    }
    tar
}

fn check(archive: &[u8], blob: &[u8], span_bytes: u64) -> Built {
    let limits = Limits::default();
    let built = build(blob, &options(span_bytes)).unwrap();
    assert_eq!(built.diff_id.0, Digest::sha256_of(archive));
    assert_eq!(built.blob, Digest::sha256_of(blob));
    let index = open(&built.ztoc, blob.len() as u64, &limits).unwrap();
    assert_eq!(index.frames().len(), built.spans);
    let decoded = decode(&index, &built.ztoc, blob);
    assert!(decoded == archive[..decoded.len()], "spans decode to something else");
    assert!(decoded.len() >= archive.len().min(archive.len().saturating_sub(1 << 20)));
    built
}

#[test]
fn spans_decode_to_the_tar() {
    let files =
        [("a", content(1, 700_000)), ("empty", Vec::new()), ("b/c", content(2, 3_000_000)), ("d", content(3, 1))];
    let archive = layer(&files);
    for level in [0, 1, 6, 9] {
        let blob = gzip(&archive, level);
        for span_bytes in [0, 50_000, 1 << 20, 4 << 20] {
            let built = check(&archive, &blob, span_bytes);
            assert!(span_bytes != 50_000 || level < 6 || built.spans > 10, "level {level}: {} spans", built.spans);
        }
    }
    check(&archive, &archive, 1 << 20);
}

#[test]
fn members_one_after_another_are_one_stream() {
    let archive = layer(&[("a", content(4, 900_000)), ("b", content(5, 400_000))]);
    let mut blob = Vec::new();
    for piece in archive.chunks(123_457) {
        blob.extend(gzip(piece, 6));
    }
    for span_bytes in [0, 100_000, 1 << 20, 1 << 30] {
        check(&archive, &blob, span_bytes);
    }
    // Blocks with the fixed tables and with others in turn.
    let mut turns = Vec::new();
    let mut rest = &archive[..];
    for length in [10, 200_000, 20, 30, 300_000, 5, usize::MAX] {
        let (piece, behind) = rest.split_at(length.min(rest.len()));
        turns.extend(gzip(piece, 6));
        rest = behind;
    }
    check(&archive, &turns, 100_000);
    // An empty member in front, and zeros behind.
    let mut padded = gzip(&[], 6);
    padded.extend(&blob);
    padded.extend([0; 1000]);
    check(&archive, &padded, 100_000);
}

#[test]
fn frames_of_zstd_are_spans() {
    let archive = layer(&[("a", content(4, 900_000)), ("b", content(5, 400_000))]);
    let mut blob = Vec::new();
    for piece in archive.chunks(100_000) {
        // Skippable frames, as pzstd writes them.
        blob.extend([0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4]);
        blob.extend(crate::compression::zstd_frame(3, piece));
    }
    assert_eq!(check(&archive, &blob, 0).spans, archive.chunks(100_000).len());
    assert_eq!(check(&archive, &blob, 150_000).spans, archive.chunks(200_000).len());
    assert!(!check(&archive, &blob, 1 << 30).is_common);
    let large = layer(&[("large", vec![7; 80 << 20])]);
    let one = crate::compression::zstd_frame(1, &large);
    let error = build(&one[..], &options(1 << 20)).unwrap_err();
    assert!(matches!(error, BuildError::OneFrame { .. }), "{error}");
    // Found out before the end, which is missing here.
    let error = build(&one[..one.len() - 8], &options(1 << 20)).unwrap_err();
    assert!(matches!(error, BuildError::OneFrame { .. }), "{error}");
}

#[test]
fn names_and_attributes_are_bounded() {
    let names: Vec<String> = (0..40).map(|number| format!("{number}{}", "n".repeat(80))).collect();
    let files: Vec<(&str, Vec<u8>)> = names.iter().map(|name| (name.as_str(), Vec::new())).collect();
    let blob = layer(&files);
    let with = |toc_bytes| {
        let limits = Limits { toc_bytes, ..Limits::default() };
        build(&blob[..], &BuildOptions { limits, ..options(1 << 20) })
    };
    assert!(matches!(with(8000), Err(BuildError::TooMuch { limit: 4000 })));
    assert_eq!(with(80_000).unwrap().files, 40);
}

/// Makes a ztoc of an uncompressed layer of `size` bytes, of parts.
fn crafted(mut builder: Builder, files: Written, digests: (Written, usize), size: usize) -> Vec<u8> {
    let size = i64::try_from(size).unwrap();
    let zinfo = zinfo::TarZinfo { span_bytes: 1, size: size.unsigned_abs() }.write().unwrap();
    let checkpoints = builder.bytes(&zinfo);
    let last = i32::try_from(digests.1 - 1).unwrap();
    let info = [(1, Value::I32(last)), (2, Value::Reference(digests.0)), (3, Value::Reference(checkpoints))];
    let info = builder.table(&[&info[..], &[(0, Value::I8(2))]].concat());
    let toc = builder.table(&[(0, Value::Reference(files))]);
    let parts = [(4, Value::Reference(toc)), (5, Value::Reference(info))];
    let root = builder.table(&[&parts[..], &[(2, Value::I64(size)), (3, Value::I64(size))]].concat());
    builder.finish(root).unwrap()
}

#[test]
fn parts_that_are_there_once_do_not_count_a_thousand_times() {
    const MOST: usize = 1 << 20;
    let limits = Limits::default();
    let mut builder = Builder::default();
    let record = builder.table(&[]);
    let records = builder.vector(&vec![record; 1000]);
    let kind = builder.string(b"reg");
    let file = builder.table(&[(1, Value::Reference(kind)), (13, Value::Reference(records))]);
    let files = builder.vector(&vec![file; 1000]);
    let digest = builder.string(Digest::sha256_of(b"").to_string().as_bytes());
    let digests = builder.vector(&[digest]);
    let ztoc = crafted(builder, files, (digests, 1), 1);
    let read = ztoc::Ztoc::read(&ztoc, &limits).unwrap();
    assert!(matches!(read.files().find_map(Result::err), Some(ZtocError::Limit { part: "bytes of text", .. })));
    let many = |count: usize| {
        let mut builder = Builder::default();
        let files = builder.vector(&[]);
        let digest = builder.string(Digest::sha256_of(b"").to_string().as_bytes());
        let digests = builder.vector(&vec![digest; count]);
        open(&crafted(builder, files, (digests, count), count), count as u64, &limits)
    };
    many(1000).unwrap();
    let error = many(MOST + 1).unwrap_err();
    assert!(matches!(error, open::OpenError::Ztoc(ZtocError::Limit { part: "spans", .. })), "{error}");
}

#[test]
fn checkpoints_that_are_more_than_they_say_are_refused() {
    let mut blob = [&1_i32.to_le_bytes()[..], &8_i64.to_le_bytes()].concat();
    blob.resize(blob.len() + 2 * (17 + (32 << 10)), 0);
    assert!(matches!(zinfo::Checkpoints::read(&blob), Err(ZtocError::Zinfo { .. })));
}

#[test]
fn what_is_no_layer_is_refused() {
    let archive = layer(&[("a", content(6, 300_000))]);
    let blob = gzip(&archive, 6);
    for cut in [1, 3, 9, 10, 11, 1000, blob.len() / 2, blob.len() - 9, blob.len() - 8, blob.len() - 1] {
        let error = build(&blob[..cut], &options(1000)).unwrap_err();
        assert!(!error.to_string().is_empty(), "{cut}");
    }
    for flipped in [blob.len() - 8, blob.len() - 4] {
        let mut damaged = blob.clone();
        damaged[flipped] ^= 1;
        build(&damaged[..], &options(1000)).unwrap_err();
    }
    let mut garbage = blob;
    garbage.extend(b"more");
    build(&garbage[..], &options(1000)).unwrap_err();
    assert!(matches!(build(&b""[..], &options(1)), Err(BuildError::Empty)));
}

#[test]
fn a_ztoc_of_something_else_is_refused() {
    let limits = Limits::default();
    let archive = layer(&[("a", content(7, 300_000))]);
    let blob = gzip(&archive, 6);
    let built = build(&blob[..], &options(10_000)).unwrap();
    let error = open(&built.ztoc, blob.len() as u64 + 1, &limits).unwrap_err();
    assert!(matches!(error, open::OpenError::OtherLayer { .. }), "{error}");
    for cut in 0..built.ztoc.len().min(3000) {
        // Not even a length in front says where it ends.
        let _ = open(&built.ztoc[..cut], blob.len() as u64, &limits);
    }
}

#[test]
fn version_1_leaves_the_first_checkpoint_out() {
    let archive = layer(&[("a", content(8, 300_000))]);
    let blob = gzip(&archive, 6);
    let built = build(&blob[..], &options(50_000)).unwrap();
    let limits = Limits::default();
    let document = ztoc::Ztoc::read(&built.ztoc, &limits).unwrap();
    let mut first = document.checkpoints.to_vec();
    first.drain(12..12 + 17 + (32 << 10));
    let (one, two) =
        (zinfo::Checkpoints::read(&first).unwrap(), zinfo::Checkpoints::read(document.checkpoints).unwrap());
    assert_eq!(one.count(), two.count());
    let both = one.iter().zip(two.iter());
    for (one, two) in both {
        assert_eq!(one.unwrap(), two.unwrap());
    }
    assert_eq!(one.window_at(0), None);
    let second = one.window_at(1).unwrap();
    assert_eq!(&first[second], &document.checkpoints[two.window_at(1).unwrap()]);
    first.truncate(first.len() - 1);
    zinfo::Checkpoints::read(&first).unwrap_err();
}

#[test]
fn spans_to_prefetch() {
    let parse = |text: &str| serde_json::from_str::<prefetch::PrefetchDocument>(text).unwrap().spans();
    let wanted = [
        prefetch::PrefetchSpans { start_span: 3, end_span: 4, priority: None },
        prefetch::PrefetchSpans { start_span: 0, end_span: 0, priority: Some(1) },
    ];
    let text = prefetch::write(&wanted);
    assert_eq!(
        text,
        r#"{"version":"1.0","prefetch_spans":[{"start_span":3,"end_span":4},{"start_span":0,"end_span":0,"priority":1}]}"#
    );
    assert_eq!(parse(&text).unwrap(), [wanted[1], wanted[0]]);
    for bad in [
        r#"{"version":"1.1","prefetch_spans":[{"start_span":3,"end_span":4}]}"#,
        r#"{"version":"1.0","prefetch_spans":[]}"#,
        r#"{"version":"1.0","prefetch_spans":[{"start_span":3,"end_span":2}]}"#,
    ] {
        parse(bad).unwrap_err();
    }
}

/// What `soci create` 0.4.1 has made, see `make.sh` beside it.
#[test]
fn ztocs_are_those_of_soci() {
    use std::io::Read as _;
    let golden =
        |name: &str| std::fs::read(format!("{}/tests/golden/soci/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let unpacked = |name: &str| {
        let mut bytes = Vec::new();
        flate2::read::GzDecoder::new(&golden(name)[..]).read_to_end(&mut bytes).unwrap();
        bytes
    };
    let options = BuildOptions { build_tool: "AWS SOCI CLI v0.1".to_owned(), ..options(32 << 10) };
    let (blob, archive) = (golden("layer.tar.gz"), unpacked("layer.tar.gz"));
    let built = build(&blob[..], &options).unwrap();
    assert!(built.ztoc == unpacked("gzip.ztoc.gz"), "gzip");
    let built_of_tar = build(&archive[..], &options).unwrap();
    assert!(built_of_tar.ztoc == golden("tar.ztoc"), "tar");
    for (blob, ztoc) in [(&blob, &built.ztoc), (&archive, &built_of_tar.ztoc)] {
        let index = open(ztoc, blob.len() as u64, &Limits::default()).unwrap();
        assert!(decode(&index, ztoc, blob).starts_with(&archive[..100_000]));
        let file = index.node(index.lookup(b"suid").unwrap());
        assert_eq!(file.permissions, 0o4755);
        assert_eq!(file.xattrs, [(b"user.k"[..].into(), b"v"[..].into())]);
        assert_eq!(index.node(index.lookup(b"etc/hello").unwrap()).mtime.nanoseconds, 250_000_000);
        assert_eq!(index.node(index.lookup(b"hard").unwrap()).link_count, 2);
    }
}

fn text() -> impl Strategy<Value = Cow<'static, [u8]>> {
    prop::collection::vec(any::<u8>(), 0..40).prop_map(Cow::Owned)
}

fn any_file() -> impl Strategy<Value = ztoc::File<'static>> {
    let kind = prop::sample::select(&[
        tar::EntryKind::Regular,
        tar::EntryKind::Directory,
        tar::EntryKind::HardLink,
        tar::EntryKind::Symlink,
        tar::EntryKind::CharDevice,
        tar::EntryKind::BlockDevice,
        tar::EntryKind::Fifo,
    ]);
    let numbers = (0..1_u64 << 62, 0..1_u64 << 62, any::<i64>(), any::<u32>(), any::<u32>(), any::<(i64, i64)>());
    let time = (-62_167_219_200..253_402_300_800_i64, 0..1_000_000_000_u32);
    let texts = (text(), text(), text(), text());
    (kind, numbers, time, texts, prop::collection::vec((text(), text()), 0..4)).prop_map(
        |(
            kind,
            (offset, size, mode, uid, gid, device),
            (seconds, nanoseconds),
            (name, link, user_name, group_name),
            records,
        )| {
            let mtime = crate::index::Timestamp { seconds, nanoseconds };
            ztoc::File { name, kind, offset, size, link, mode, uid, gid, user_name, group_name, mtime, device, records }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_ztoc_reads_as_it_was_written(
        files in prop::collection::vec(any_file(), 0..8),
        checkpoints in prop::collection::vec(any::<u8>(), 0..100),
        digests in prop::collection::vec(any::<[u8; 32]>(), 0..4),
        sizes in (0..1_u64 << 62, 0..1_u64 << 62),
    ) {
        let digests: Vec<Digest> = digests.into_iter().map(Digest::Sha256).collect();
        let new = ztoc::NewZtoc {
            build_tool: "a tool",
            compressed_size: sizes.0,
            uncompressed_size: sizes.1,
            algorithm: ztoc::Algorithm::Uncompressed,
            digests: &digests,
            checkpoints: &checkpoints,
            files: &files,
        };
        let bytes = new.write().unwrap();
        let limits = Limits::default();
        let read = ztoc::Ztoc::read(&bytes, &limits).unwrap();
        prop_assert_eq!(read.version, b"0.9");
        prop_assert_eq!(read.build_tool, b"a tool");
        prop_assert_eq!((read.compressed_size, read.uncompressed_size), sizes);
        prop_assert_eq!(read.checkpoints, checkpoints);
        prop_assert_eq!(read.digests().collect::<Result<Vec<_>, _>>().unwrap(), digests);
        prop_assert_eq!(read.files().collect::<Result<Vec<_>, _>>().unwrap(), files);
    }

    #[test]
    fn any_stream_can_be_entered(seed in any::<u64>(), length in 0..600_000_usize, level in 0..10_u32, span in 0..200_000_u64) {
        let archive = layer(&[("a", content(seed, length)), ("b", content(!seed, length / 3))]);
        check(&archive, &gzip(&archive, level), span);
    }

    #[test]
    fn damage_is_an_error_and_no_panic(at in any::<prop::sample::Index>(), value in any::<u8>()) {
        let archive = layer(&[("a", content(9, 50_000)), ("b", content(10, 20_000))]);
        let blob = gzip(&archive, 6);
        let mut ztoc = build(&blob[..], &options(10_000)).unwrap().ztoc;
        let at = at.index(ztoc.len());
        ztoc[at] = value;
        let _ = open(&ztoc, blob.len() as u64, &Limits::default());
        let mut damaged = blob;
        let at = at % damaged.len();
        damaged[at] = value;
        let _ = build(&damaged[..], &options(10_000));
    }
}
