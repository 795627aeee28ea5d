use std::io::{Read as _, Write as _};

use proptest::prelude::*;

use super::*;
use crate::{
    digest::Digest,
    estargz::{
        footer::{self, FooterError, Kind},
        toc::{TocError, TocWriter},
    },
    index::{Codec, FrameId, Timestamp},
    opening::{GUESS_LEAST, GUESS_MOST, Opened, Opening, Promise, Step},
    position::BlobRange,
    tar,
};

/// Blobs that containerd's library made, see `make.go` beside them, and the digests that it told.
const VARIOUS: (&[u8], &str) = (
    include_bytes!("../../../tests/golden/various.esgz"),
    "sha256:db9a38fdeaf83b0c0e536cd18eea18b7609ec9616122335616ad2f4f393d68ac",
);
const DOT_SLASH: (&[u8], &str) = (
    include_bytes!("../../../tests/golden/dotslash.esgz"),
    "sha256:26c75ba95dc5be8a28ebbdaba5aa995ca6e94e03da872b0f23883529cb0ba3b7",
);
const DOT_DOT: (&[u8], &str) = (
    include_bytes!("../../../tests/golden/dotdot.esgz"),
    "sha256:821a6b00416d0dd981fdf246a5af11124a1969776d6b572f6c178bf6a5b159c4",
);
const EMPTY: (&[u8], &str) = (
    include_bytes!("../../../tests/golden/empty.esgz"),
    "sha256:42ae44ee4a0934ad867fd5d1726da9d2e28fa42579b10f4782e62c2882a65495",
);
const NO_ENTRIES: (&[u8], &str) = (
    include_bytes!("../../../tests/golden/no-entries.esgz"),
    "sha256:34389139a1c1b35477be831e2253885fa98a9fc3906b16880a391631786dd194",
);
const LEGACY: (&[u8], &str) = (
    include_bytes!("../../../tests/golden/legacy.stargz"),
    "sha256:dd483f8dc05cf83dc4d91fcaccd52ec2f585e25021768b72a434448157dcbffd",
);

/// Made by `min-chunk.go`.
const MIN_CHUNK: (&[u8], &str) = (
    include_bytes!("../../../tests/golden/min-chunk.esgz"),
    "sha256:1523b8f99b428ad392da13fa481fa4cd03b7001cb8342f2139c6313691a5049a",
);

/// Positions of these small blobs.
fn at(position: u64) -> usize {
    position.try_into().unwrap()
}

/// Opens a blob that is in memory, and counts reads.
fn open_counted(
    blob: &[u8],
    toc_digest: Option<Digest>,
    trust: Trust,
    limits: &Limits,
) -> Result<(LayerIndex, Opened, usize), OpenError> {
    let (mut opening, mut range) = Opening::new(blob.len() as u64, Promise::estargz(toc_digest), trust, limits)?;
    for reads in 1.. {
        let bytes = &blob[at(range.start.0)..at(range.end().0)];
        match opening.supply(bytes)? {
            Step::Read(next, next_range) => (opening, range) = (next, next_range),
            Step::Done(index, opened) => return Ok((index, opened, reads)),
        }
    }
    unreachable!()
}

fn open(blob: &[u8], toc_digest: Option<Digest>, trust: Trust) -> Result<(LayerIndex, Opened), OpenError> {
    open_counted(blob, toc_digest, trust, &Limits::default()).map(|(index, opened, _)| (index, opened))
}

fn open_golden((blob, digest): (&[u8], &str)) -> (LayerIndex, Opened) {
    open(blob, Some(digest.parse().unwrap()), Trust::Required).unwrap()
}

/// Reads a file by its extents and checks their digests.
fn content(blob: &[u8], index: &LayerIndex, path: &str) -> Vec<u8> {
    let NodeKind::Regular(content) = &index.node(index.lookup(path.as_bytes()).unwrap()).kind else {
        panic!("{path} is not a regular file");
    };
    let end = content.data.checked_add(content.size).unwrap();
    let mut bytes = Vec::new();
    for extent in &index.extents()[index.extents_in(&(content.data..end))] {
        let frame = &index.frames()[extent.frame.0 as usize];
        assert_eq!(frame.codec, Codec::Gzip);
        let compressed = &blob[at(frame.range.start.0)..at(frame.range.end().0)];
        let mut decoded = vec![0; at(frame.decoded_length)];
        flate2::bufread::MultiGzDecoder::new(compressed).read_exact(&mut decoded).unwrap();
        let piece = &decoded[at(extent.frame_offset)..][..at(extent.length)];
        assert!(extent.digest.is_none_or(|digest| digest.matches(piece)));
        bytes.extend_from_slice(piece);
    }
    assert!(content.digest.is_none_or(|digest| digest.matches(&bytes)));
    bytes
}

fn names(index: &LayerIndex) -> Vec<String> {
    let names = index.children(NodeId::ROOT).iter();
    names.map(|(name, _)| String::from_utf8_lossy(name).into_owned()).collect()
}

/// The tree that `make.go` writes, under a name that depends on the prefix only in the archive.
#[track_caller]
fn check_various(blob: &[u8], index: &LayerIndex, landmarks: &[&str]) {
    let odd = "<&>\u{2028}\u{2029}\"\\\n\t\u{1}\u{7f}\u{e9}";
    let mut expected = vec![odd, "bar", "barlink", "baz.txt", "dev", "empty", "foo1.txt", "test", "test2"];
    // Go has written U+FFFD for each byte that is not UTF-8.
    expected.push("latin1-\u{fffd}\u{fffd}-\u{fffd}\u{fffd}.txt");
    expected.extend(landmarks);
    expected.sort_unstable();
    assert_eq!(names(index), expected);

    let node = |path: &str| index.node(index.lookup(path.as_bytes()).unwrap());
    let baz = node("baz.txt");
    assert_eq!((baz.permissions, baz.uid, baz.gid, baz.link_count), (0o4755, 1000, 1001, 2));
    assert_eq!(baz.mtime, Timestamp { seconds: 1_700_000_000, nanoseconds: 0 });
    assert_eq!(node("bar/foo2.txt").mtime, Timestamp::default());
    assert_eq!(node("empty").mtime, Timestamp { seconds: -1, nanoseconds: 0 });
    assert_eq!(index.lookup(b"test2/bazlink"), index.lookup(b"baz.txt"));
    assert_eq!(node("barlink").kind, NodeKind::Symlink { target: (*b"test/bar.txt").into() });
    assert_eq!(node("dev/testblock").kind, NodeKind::BlockDevice { major: 3, minor: 4 });
    assert_eq!(node("dev/testchar").kind, NodeKind::CharDevice { major: 5, minor: 6 });
    assert_eq!(node("dev/testfifo").kind, NodeKind::Fifo);
    assert_eq!((node("test").permissions, node("test").link_count), (0o1777, 2));
    assert!(index.is_implied(index.lookup(b"bar").unwrap()) && !index.is_implied(index.lookup(b"test").unwrap()));
    let xattr = |name: &str, value: &[u8]| (name.as_bytes().into(), value.into());
    assert_eq!(
        node("test/bar.txt").xattrs,
        [xattr("user.bytes", b"\xff\xfe\xfd"), xattr("user.empty", b""), xattr("user.test", b"sample")]
    );
    for (path, expected) in [
        ("baz.txt", "bazbazbazbazbazbazbaz"),
        ("foo1.txt", "a"),
        ("bar/foo2.txt", "b"),
        ("test/bar.txt", "testbartestbar"),
        (odd, "odd name"),
        ("empty", ""),
    ] {
        assert_eq!(content(blob, index, path), expected.as_bytes(), "{path}");
    }
}

#[test]
fn blobs_of_the_reference_are_read() {
    let (index, opened) = open_golden(VARIOUS);
    check_various(VARIOUS.0, &index, &[".prefetch.landmark"]);
    assert_eq!((opened.kind, opened.vouched), (Kind::Estargz, true));
    // Chunks of 4 bytes.
    assert_eq!(opened.entries, 30);
    let Prefetch::Until(end) = index.prefetch() else { panic!("{:?}", index.prefetch()) };
    assert_eq!(content(VARIOUS.0, &index, ".prefetch.landmark"), toc::LANDMARK_CONTENT);
    let before: Vec<_> = index.frames().iter().filter(|frame| frame.range.start < end).collect();
    assert_eq!(before.len(), 5, "four chunks of test/bar.txt and foo1.txt");

    let (index, _) = open_golden(DOT_SLASH);
    check_various(DOT_SLASH.0, &index, &[".no.prefetch.landmark"]);
    assert_eq!(index.prefetch(), Prefetch::Nothing);
    assert_eq!(index.node(NodeId::ROOT).permissions, 0o755);

    let (index, _) = open_golden(DOT_DOT);
    check_various(DOT_DOT.0, &index, &[".no.prefetch.landmark"]);
    assert_eq!(index.node(NodeId::ROOT).permissions, 0o700);
    assert!(!index.is_implied(NodeId::ROOT));
}

#[test]
fn members_of_several_files_are_read() {
    let (index, opened) = open_golden(MIN_CHUNK);
    check_various(MIN_CHUNK.0, &index, &[".prefetch.landmark"]);
    let extents = index.extents();
    assert!(index.frames().len() < extents.len(), "{} {}", index.frames().len(), extents.len());
    assert!(extents.iter().any(|extent| extent.frame_offset > 0) && opened.vouched);
    let Prefetch::Until(end) = index.prefetch() else { panic!("{:?}", index.prefetch()) };
    let before = extents.iter().filter(|extent| index.frames()[extent.frame.0 as usize].range.start < end).count();
    assert_eq!(before, 3, "two chunks of test/bar.txt and foo1.txt");
}

#[test]
fn empty_layers_have_a_root() {
    let (index, opened) = open_golden(EMPTY);
    assert_eq!((names(&index), opened.entries), (vec![".no.prefetch.landmark".to_string()], 1));
    let (index, opened) = open_golden(NO_ENTRIES);
    assert_eq!((index.nodes().len(), opened.entries), (1, 0));
    assert_eq!((index.frames().len(), index.data_length(), index.prefetch()), (0, 0, Prefetch::Unspecified));
}

#[test]
fn legacy_layers_need_leave() {
    let (blob, digest) = LEGACY;
    let digest = Some(digest.parse().unwrap());
    let error = open(blob, digest, Trust::Required).unwrap_err();
    assert!(matches!(&error, OpenError::Index(IndexError { problem: Problem::NoDigest { .. }, .. })), "{error}");
    for digest in [digest, None] {
        let (index, opened) = open(blob, digest, Trust::Optional).unwrap();
        check_various(blob, &index, &[]);
        assert_eq!((opened.kind, opened.vouched), (Kind::LegacyStargz, digest.is_some()));
        assert_eq!(index.prefetch(), Prefetch::Unspecified);
    }
}

#[test]
fn tables_are_written_as_the_reference_writes_them() {
    for (blob, _) in [VARIOUS, DOT_SLASH, DOT_DOT, EMPTY, NO_ENTRIES, LEGACY] {
        let (_, opened) = open(blob, None, Trust::Optional).unwrap();
        let member = &blob[at(opened.toc_range.start.0)..at(opened.toc_range.end().0)];
        let json = decode_toc(member, opened.toc_range.start, &Limits::default()).unwrap();
        let mut writer = TocWriter::new();
        let mut taken = Vec::new();
        toc::read(&json, &Limits::default(), |number, entry| {
            writer.push(&entry);
            if number % 3 == 0 {
                taken.extend(writer.take());
            }
            Ok::<_, TocError>(())
        })
        .unwrap();
        taken.extend(writer.finish());
        // What Go escapes because it is no UTF-8 has become UTF-8.
        let expected = std::str::from_utf8(&json).unwrap().replace("\\ufffd", "\u{fffd}");
        assert_eq!(String::from_utf8(taken).unwrap(), expected);
    }
}

#[test]
fn names_that_are_not_utf_8_survive() {
    let entry = Entry {
        name: (&b"\xe9<\xf0\x9f"[..]).into(),
        entry_type: EntryType::Symlink,
        link_name: (&b"\xff"[..]).into(),
        modtime: Timestamp { seconds: 1, nanoseconds: 20_000_000 },
        ..Entry::default()
    };
    let mut writer = TocWriter::new();
    writer.push(&entry);
    let json = writer.finish();
    let text = std::str::from_utf8(&json).unwrap();
    assert!(text.contains(r#""name": "\ufffd\u003c\ufffd\ufffd","#), "{text}");
    assert!(text.contains(r#""modtime": "1970-01-01T00:00:01.02Z","#), "{text}");
    let mut read = Vec::new();
    toc::read(&json, &Limits::default(), |_, entry| {
        read.push(entry);
        Ok::<_, TocError>(())
    })
    .unwrap();
    assert_eq!(read, [entry]);
    // A name that others would see as another one is refused.
    let forged = text.replace("6Tzwnw==", "6TzwLw==");
    assert_ne!(forged, text);
    let error = index(forged.as_bytes(), BlobOffset(0), Codec::Gzip, Trust::Required, &Limits::default()).unwrap_err();
    assert!(error.to_string().contains("bytes of a name are another name"), "{error}");
}

/// A blob of some payload, a table of contents and a footer.
fn blob(payload: &[u8], json: &[u8]) -> Vec<u8> {
    let entry = tar::Entry { path: TOC_NAME.into(), size: json.len() as u64, ..tar::Entry::default() };
    let mut archive = tar::encode_header(&entry).unwrap();
    archive.extend_from_slice(json);
    archive.extend_from_slice(tar::padding(entry.size));
    archive.extend_from_slice(&tar::END_OF_ARCHIVE);
    blob_of_member(payload, &gzip(&archive))
}

fn blob_of_member(payload: &[u8], member: &[u8]) -> Vec<u8> {
    [payload, member, &footer::write(BlobOffset(payload.len() as u64))].concat()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A table of many files, whose compressed size is well above that of the first read.
fn large_toc(files: u64) -> Vec<u8> {
    let mut writer = TocWriter::new();
    for number in 0..files {
        let digest = Some(Digest::sha256_of(&number.to_le_bytes()));
        writer.push(&Entry {
            name: format!("d{}/f{number}", number / 100).into_bytes().into(),
            size: 1,
            mode: 0o644,
            offset: number * 10,
            digest,
            chunk_digest: digest,
            ..Entry::default()
        });
    }
    writer.finish()
}

#[test]
fn at_most_two_reads_are_needed() {
    let json = large_toc(3000);
    let digest = Some(Digest::sha256_of(&json));
    let large = blob(&vec![0; 200_000], &json);
    let (index, opened, reads) = open_counted(&large, digest, Trust::Required, &Limits::default()).unwrap();
    assert_eq!((reads, opened.entries, index.extents().len()), (2, 3000, 3000));
    assert!(opened.toc_range.length > GUESS_LEAST, "{}", opened.toc_range.length);
    assert_eq!(opened.toc_bytes, json.len() as u64);

    let json = large_toc(100);
    let digest = Some(Digest::sha256_of(&json));
    // The whole blob, and a part of it.
    for payload in [1000, 200_000] {
        let small = blob(&vec![0; payload], &json);
        assert_eq!(open_counted(&small, digest, Trust::Required, &Limits::default()).unwrap().2, 1);
    }
    let (_, range) = Opening::new(1 << 40, Promise::estargz(digest), Trust::Required, &Limits::default()).unwrap();
    assert_eq!(range, BlobRange { start: BlobOffset((1 << 40) - GUESS_MOST), length: GUESS_MOST });
}

#[test]
fn an_unvouched_layer_is_not_even_read() {
    let new = |size, digest, trust| Opening::new(size, Promise::estargz(digest), trust, &Limits::default()).map(|_| ());
    assert!(matches!(new(1000, None, Trust::Required), Err(OpenError::NotVouched)));
    assert!(matches!(new(0, None, Trust::Optional), Err(OpenError::Footer(FooterError::NoFooter))));
    let wrong = Some(Digest::sha256_of(b""));
    for trust in [Trust::Required, Trust::Optional] {
        let error = open(VARIOUS.0, wrong, trust).unwrap_err();
        assert!(matches!(error, OpenError::TocDigest { found, .. } if found == VARIOUS.1.parse().unwrap()));
    }
    let (_, digest) = (VARIOUS.1, Digest::Sha512([0; 64]));
    assert!(matches!(open(VARIOUS.0, Some(digest), Trust::Required), Err(OpenError::TocDigest { .. })));
}

#[test]
fn other_blobs_are_told_apart() {
    let error = open(&[0; 1000], None, Trust::Optional).unwrap_err();
    assert!(matches!(error, OpenError::Footer(FooterError::NoFooter)));
    let external = b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x15\0SG\x11\0STARGZEXTERNALTOC\x01\0\0\xff\xff\0\0\0\0\0\0\0\0";
    let error = open(external, None, Trust::Optional).unwrap_err();
    assert_eq!(
        error.to_string(),
        "layer is eStargz with external table of contents, which can't be read lazily here: its table of contents is in \
         another image"
    );
    let (opening, range) = Opening::new(1000, Promise::default(), Trust::Optional, &Limits::default()).unwrap();
    let error = opening.supply(&[0; 999]).unwrap_err();
    assert!(matches!(error, OpenError::WrongLength { expected: 1000, found: 999, .. }));
    assert_eq!(range.length, 1000);
}

#[test]
fn corrupt_members_are_refused() {
    let json = br#"{"version": 1, "entries": []}"#;
    let header = |entry: tar::Entry| tar::encode_header(&entry).unwrap();
    let toc_header = |size| header(tar::Entry { path: TOC_NAME.into(), size, ..tar::Entry::default() });
    let padded = [&json[..], tar::padding(json.len() as u64)].concat();
    let good = [toc_header(json.len() as u64), padded.clone()].concat();
    let try_member = |member: &[u8]| open(&blob_of_member(b"", member), None, Trust::Optional);

    // With and without the end of the archive, and with more than one is used to.
    for zeros in [0, 1024, 1 << 20] {
        let archive = [good.clone(), vec![0; zeros]].concat();
        assert!(try_member(&gzip(&archive)).is_ok(), "{zeros}");
    }
    // What stands behind the member is not looked at.
    assert!(try_member(&[gzip(&good), b"behind".to_vec()].concat()).is_ok());

    let mut bad_sum = good.clone();
    bad_sum[0] ^= 1;
    let mut bad_crc = gzip(&good);
    let crc = bad_crc.len() - 8;
    bad_crc[crc] ^= 1;
    let directory = tar::Entry { path: TOC_NAME.into(), kind: tar::EntryKind::Directory, ..tar::Entry::default() };
    let other = tar::Entry { path: b"other".to_vec(), size: json.len() as u64, ..tar::Entry::default() };
    let cases: &[(Vec<u8>, &str)] = &[
        (b"not gzip at all, but long enough to be".to_vec(), "gzip: "),
        (Vec::from(&gzip(&good)[..40]), "gzip: "),
        (bad_crc, "gzip: "),
        (gzip(b"short"), "gzip: "),
        (gzip(&bad_sum), "checksum is wrong"),
        (gzip(&[header(other), padded.clone()].concat()), "not named stargz.index.json"),
        (gzip(&header(directory)), "not a regular file"),
        (gzip(&good[..good.len() - 500]), "cut off"),
        (gzip(&[toc_header(700), padded].concat()), "cut off"),
        (gzip(&toc_header(1 << 29)), "cannot hold 536870912 bytes"),
    ];
    for (member, detail) in cases {
        let error = try_member(member).unwrap_err();
        assert!(matches!(error, OpenError::TocCorrupt { .. }), "{error}");
        assert!(error.to_string().contains(detail), "{error} does not contain {detail:?}");
    }
    let error = try_member(&gzip(&toc_header(1 << 31))).unwrap_err();
    assert!(matches!(error, OpenError::TocTooLarge { bytes: 0x8000_0000, limit: 0x4000_0000 }), "{error}");

    // A bomb: within the density of deflate, beyond the limit.
    let bomb = gzip(&[toc_header(10 << 20), vec![b' '; 10 << 20]].concat());
    let limits = Limits { toc_bytes: 1 << 20, ..Limits::default() };
    let blob = blob_of_member(b"", &bomb);
    assert!(matches!(open_counted(&blob, None, Trust::Optional, &limits), Err(OpenError::TocTooLarge { .. })));
    let limits = Limits { toc_bytes: 100, ..Limits::default() };
    assert!(matches!(open_counted(&blob, None, Trust::Optional, &limits), Err(OpenError::TocTooLarge { .. })));
}

#[test]
fn hostile_tables_are_refused() {
    let digest = format!("sha256:{}", "0".repeat(64));
    let file = |more: &str| format!(r#"{{"name":"f","type":"reg","size":10,"chunkDigest":"{digest}"{more}}}"#);
    let chunk = |more: &str| format!(r#"{{"name":"f","type":"chunk","chunkDigest":"{digest}"{more}}}"#);
    let cases: &[(String, &str)] = &[
        (
            r#"{"name":"a","type":"hardlink","linkName":"a"}"#.into(),
            "entry 0 (\"a\"): hard link to \"a\", which leads back",
        ),
        (
            r#"{"name":"a","type":"hardlink","linkName":"b"},{"name":"b","type":"hardlink","linkName":"a"}"#.into(),
            "leads back to itself",
        ),
        (r#"{"name":"a","type":"hardlink","linkName":"../../etc/passwd"}"#.into(), "\"etc/passwd\", which is not in"),
        (r#"{"name":"a\u0000b","type":"dir"}"#.into(), "entry 0 (\"a\\x00b\"): path holds a NUL byte"),
        (r#"{"name":"a","type":"socket"}"#.into(), "entry 0 (\"a\"): type \"socket\" is not known"),
        (r#"{"name":"a"}"#.into(), "entry 0 (\"a\"): entry has no type"),
        (r#"{"name":"a","type":"reg","size":-1}"#.into(), "entry 0 (\"a\"): number is negative at line 1 column 59"),
        (r#"{"name":"a","type":"reg","size":1.5}"#.into(), "entry 0 (\"a\"): number is not a whole one"),
        (r#"{"name":"a","type":"reg","size":9223372036854775807}"#.into(), "beyond the limit of 1099511627776 bytes"),
        (r#"{"name":"a","type":"reg","size":99999999999999999999}"#.into(), "entry 0 (\"a\"): number is too large"),
        (r#"{"name":"a","type":"dir","uid":-1}"#.into(), "uid -1 is out of range"),
        (r#"{"name":"a","type":"dir","gid":4294967296}"#.into(), "gid 4294967296 is out of range"),
        (r#"{"name":"a","type":"char","devMajor":-1}"#.into(), "devMajor -1 is out of range"),
        (r#"{"name":"a","type":"dir","modtime":"yesterday"}"#.into(), "modtime \"yesterday\" is not a time"),
        (r#"{"name":"a","type":"dir","digest":"md5:00"}"#.into(), "entry 0 (\"a\"): not a digest that can be verified"),
        // The name may stand behind what is wrong, and is as hostile as everything.
        (r#"{"type":"dir","uid":1.5,"name":"b\n"}"#.into(), "entry 0 (\"b\\n\"): number is not a whole one"),
        (r#"{"name":"a","type":"dir"},{"size":-1,"name":"b"}"#.into(), "entry 1 (\"b\"): number is negative"),
        (r#"{"size":-1}"#.into(), "entry 0: number is negative"),
        (
            format!(r#"{{"name":"{}","size":-1}}"#, "n".repeat(5000)),
            // As for an entry that can be read, see `IndexError`.
            "nnnn...\"): number is negative",
        ),
        (r#"{"name":"a","type":"dir","xattrs":{"user.a":"%"}}"#.into(), "base64: "),
        (
            r#"{"name":"a","type":"dir"},{"name":"a","type":"chunk","chunkSize":1}"#.into(),
            "entry 1 (\"a\"): chunk does not",
        ),
        (r#"{"name":"a","type":"chunk","chunkSize":1}"#.into(), "chunk"),
        (file(r#","offset":1000"#), "content at 1000 of the blob lies behind the end of content at 1000"),
        (file(r#","offset":18446744073709551615"#), "lies behind"),
        (file(r#","innerOffset":18446744073709551615"#), "more than 268435456 bytes when decoded"),
        (file(r#","innerOffset":200000000"#), "cannot hold 200000010 bytes in 1000"),
        (file(r#","chunkSize":11"#), "has 11 bytes, the file has 10 left"),
        (file(r#","chunkSize":4"#), "chunks have 4 of the file's 10 bytes"),
        (file(r#","chunkOffset":2"#), "chunk begins at 2 of the file instead of 0"),
        (
            [file(r#","chunkSize":4"#), chunk(r#","chunkOffset":6,"offset":9"#)].join(","),
            "begins at 6 of the file instead",
        ),
        (
            [file(r#","chunkSize":4"#), chunk(r#","chunkOffset":2,"offset":9"#)].join(","),
            "begins at 2 of the file instead",
        ),
        ([file(r#","chunkSize":4"#), chunk(r#","chunkOffset":4,"innerOffset":3"#)].join(","), "overlaps"),
        ([file(""), chunk(r#","chunkOffset":10,"offset":9"#)].join(","), "has 0 bytes, the file has 0 left"),
        (
            [file(r#","chunkSize":4"#), chunk(r#","chunkOffset":4,"offset":9"#).replace("\"f\"", "\"../g\"")].join(","),
            "entry 1 (\"../g\"): chunk says that it is of \"../g\"",
        ),
        (r#"{"name":"f","type":"reg","size":10}"#.into(), "chunk at 0 of the file has no digest"),
        (
            [file(""), file(r#","offset":0"#).replace("\"f\"", "\"g\"")].join(","),
            "its content overlaps with that of another entry in the frame at 0",
        ),
        (
            r#"{"name":"a","type":"reg"},{"name":"a/b","type":"reg"}"#.into(),
            "\"a\" on the way to it is not a directory",
        ),
        (r#"{"name":"a","type":"dir","userName":["#.repeat(1000), "entry 0 (\"a\"): expected a string"),
    ];
    for (entries, message) in cases {
        let json = format!(r#"{{"version":1,"entries":[{entries}]}}"#);
        let error =
            index(json.as_bytes(), BlobOffset(1000), Codec::Gzip, Trust::Required, &Limits::default()).unwrap_err();
        assert!(error.to_string().contains(message), "{error} does not contain {message:?}");
    }
    let documents: &[(&str, &str)] = &[
        ("", "entry 0: the text ends at line 1 column 1"),
        ("[]", "expected an object"),
        ("{", "the text ends"),
        (r#"{"entries":{}}"#, "expected a list"),
        (r#"{"entries":[],"entries":[]}"#, "stands there twice"),
        (r#"{"version":2,"entries":[]}"#, "version 2, only version 1 is known"),
        (r#"{"version":1,"entries":[{"name":"a","type":"dir"}"#, "entry 1: the text ends"),
        (r#"{"version":1,"entries":[{"name":"a","type":"dir"},{"na"#, "entry 1: the text ends"),
    ];
    for (json, message) in documents {
        let error =
            index(json.as_bytes(), BlobOffset(1000), Codec::Gzip, Trust::Required, &Limits::default()).unwrap_err();
        assert!(error.to_string().contains(message), "{error} does not contain {message:?}");
    }
    let limits = Limits { entries: 3, ..Limits::default() };
    let json = format!(r#"{{"entries":[{}]}}"#, [r#"{"name":"a","type":"dir"}"#; 4].join(","));
    let error = index(json.as_bytes(), BlobOffset(1000), Codec::Gzip, Trust::Required, &limits).unwrap_err();
    assert!(matches!(error, OpenError::Toc(TocError::TooManyEntries { limit: 3 })), "{error}");
}

#[test]
fn what_go_tolerates_is_tolerated() {
    let json = br#" {"more": {"deep": [1, {"a": null}]}, "entries": [
        {"type": "dir", "name": "wrong", "name": "d", "mode": null, "digest": "", "modtime": "", "xattrs": null},
        {"name": "d/f", "type": "reg", "size": 3, "chunkDigest":
            "sha256:0000000000000000000000000000000000000000000000000000000000000000", "new": "\ud800"},
        {"name": "d/l\ud800\xff", "type": "symlink", "linkName": "\u002f"},
        {"name": "d/x", "type": "fifo", "xattrs": {"a": null, "b": "AA=="}, "userName": null}
    ], "version": 1} trailing"#;
    // A byte that is no UTF-8 in a string.
    let place = json.windows(4).position(|window| window == b"\\xff").unwrap();
    let json = [&json[..place], b"\xff", &json[place + 4..]].concat();
    let (index, entries) = index(&json, BlobOffset(100), Codec::Gzip, Trust::Required, &Limits::default()).unwrap();
    assert_eq!(entries, 4);
    let directory = index.lookup(b"d").unwrap();
    let children: Vec<_> =
        index.children(directory).iter().map(|(name, _)| std::str::from_utf8(name).unwrap()).collect();
    assert_eq!(children[0], "f");
    assert!(children[1].starts_with("l\u{fffd}"), "{children:?}");
    assert_eq!(children[2], "x");
    assert_eq!(index.node(index.child(directory, b"x").unwrap()).xattrs.len(), 2);
    assert_eq!(index.extents_of(FrameId(0)), [0]);
}

#[test]
fn files_can_share_a_member() {
    let [foo, bar] = [b"foofoo".as_slice(), b"barbar!"];
    let digest = |bytes: &[u8]| Some(Digest::sha256_of(bytes));
    let mut writer = TocWriter::new();
    let entry = |name: &'static str, content: &[u8], inner_offset| Entry {
        name: name.as_bytes().into(),
        size: content.len() as u64,
        inner_offset,
        digest: digest(content),
        chunk_digest: digest(content),
        ..Entry::default()
    };
    writer.push(&entry("foo", foo, 512));
    writer.push(&entry("bar", bar, 1536));
    let json = writer.finish();
    assert!(std::str::from_utf8(&json).unwrap().contains("\"innerOffset\": 512"));
    let mut archive = vec![1; 512];
    archive.extend_from_slice(foo);
    archive.resize(1536, 2);
    archive.extend_from_slice(bar);
    archive.resize(2560, 3);
    let blob = blob(&gzip(&archive), &json);
    let (index, _) = open(&blob, digest(&json), Trust::Required).unwrap();
    assert_eq!((content(&blob, &index, "foo"), content(&blob, &index, "bar")), (foo.to_vec(), bar.to_vec()));
    assert_eq!(index.frames().len(), 1);
    assert_eq!(index.frames()[0].decoded_length, 1543);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn a_flipped_bit_changes_nothing_that_is_vouched_for(bit in 0..VARIOUS.0.len() * 8) {
        let (blob, digest) = VARIOUS;
        let mut flipped = blob.to_vec();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let digest = Some(digest.parse().unwrap());
        if let Ok((index, _)) = open(&flipped, digest, Trust::Required) {
            // In content, or in a part of a header or footer that says nothing, or behind the table.
            prop_assert_eq!(index, open(blob, digest, Trust::Required).unwrap().0);
        }
    }

    #[test]
    fn no_table_panics(json in r#"(\{|\}|\[|\]|,|:|"entries"|"name"|"type"|"reg"|"chunk"|"size"|"offset"|"xattrs"|null|[0-9]|-){0,60}"#) {
        let json = format!(r#"{{"entries":[{json}"#);
        let _ = index(json.as_bytes(), BlobOffset(1000), Codec::Gzip, Trust::Optional, &Limits::default());
    }
}
